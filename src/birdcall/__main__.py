"""Run birdcall from the command line: one command, one step of the pipeline."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from birdcall.experiments import EXPERIMENTS

if TYPE_CHECKING:
    from birdcall.data.dataset import TrainingData

# Commands import what they need when they run, so that `--help` answers at once.

app = typer.Typer(
    help="Name the birds of a soundscape, every five seconds. Commands in pipeline order.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
benchmark_app = typer.Typer(help="Measure birdcall against its peers.", no_args_is_help=True)

Data = Annotated[Path, typer.Option(help="Folder in the competition's layout.", show_default=False)]
Output = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads it at run time
    typer.Option(help="Where results go.", show_default="output/<name of the data folder>"),
]
Folds = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="The CSV of folds.", show_default="folds/<name of the data folder>.csv"),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read sound.")]
Noise = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="Folder of bird-free sound.", show_default="noise/ in the data folder, or beside it"
    ),
]
Experiments = Annotated[
    list[str], typer.Option(help=f"May be repeated. One of: {', '.join(EXPERIMENTS)}.")
]
Trained = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="May be repeated.", show_default="all trained ones"),
]
Fold = Annotated[str, typer.Option(help="The held-out fold, or all.")]
Init = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Weights to start from: .safetensors or .pth", show_default="timm's"),
]
Labels = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        help="What `birdcall make_pseudo_labels` wrote.", show_default="train.csv's labels"
    ),
]
WindowSegments = Annotated[int, typer.Option(min=1, help="Segments that the models hear at once.")]
ContextSeconds = Annotated[
    float, typer.Option(min=0, help="Sound before and after them that the models hear as well.")
]
Wheels = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Folder of wheels that Kaggle's image lacks.", show_default="none"),
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs trained at once, sharing the cores.")]
DEFAULT_WORKERS = max(1, min(8, (os.cpu_count() or 2) - 1))
KERNEL_SCRIPT = Path("kernels/submission/submission.py")
TRAINING_SCRIPT = Path("kernels/training/training.py")
KERNEL_BUILD = Path("kernels/build")


@app.callback()
def _configure(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show warnings and results only.")] = False,
) -> None:
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)
    if traceback:
        os.environ["BIRDCALL_TRACEBACK"] = "1"


@app.command()
def demo(
    data: Data,
    seed: Annotated[int, typer.Option(help="Another seed makes other birds.")] = 0,
    workers: Workers = DEFAULT_WORKERS + 1,
) -> None:
    """Make a small data set of synthetic birdsong, with all of the competition's files."""
    from birdcall.demo import DemoConfig, make_demo

    make_demo(data, DemoConfig(seed=seed), workers=workers, progress=True)
    typer.echo(f"{data}: made")


@app.command()
def audit(
    data: Data,
    output: Output = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Keep decoded sound, for fast training.")
    ] = False,
    workers: Workers = DEFAULT_WORKERS + 1,
) -> None:
    """Decode every recording; list what is unreadable, truncated, silent or doubled."""
    from birdcall.data.audit import audit_recordings, describe_audit
    from birdcall.data.cache import Cache
    from birdcall.data.recordings import check_recordings_exist, read_recordings

    output = _output_of(data, output)
    recordings = read_recordings(data)
    check_recordings_exist(recordings, data)
    store = Cache(output / "cache") if cache else None
    table = audit_recordings(
        data,
        recordings,
        output / "audit.csv",
        workers=workers,
        cache=store,
        progress=True,
    )
    typer.echo(describe_audit(table))


@app.command()
def folds(
    data: Data,
    output: Output = None,
    folds: Folds = None,
    n_folds: Annotated[int, typer.Option(min=2, help="How many folds.")] = 5,
    seed: Annotated[int, typer.Option(help="Breaks ties between equal splits.")] = 0,
) -> None:
    """Split recordings into folds, by species and without a recordist in two of them."""
    from birdcall.data.audit import read_audit, same_sound, usable_recordings
    from birdcall.data.folds import check_folds, fold_report, make_folds, plot_folds, write_folds
    from birdcall.data.recordings import read_recordings
    from birdcall.report.style import save_figure

    output, folds = _output_of(data, output), _folds_of(data, folds)
    table = read_audit(output / "audit.csv")
    recordings = usable_recordings(read_recordings(data), table)
    made = make_folds(recordings, n_folds, seed, same_sound(recordings, table))
    check_folds(made, recordings)
    write_folds(made, folds)
    picture = output / "folds.png"
    save_figure(plot_folds(made, recordings), picture)
    typer.echo(fold_report(made, recordings).round(3).to_string())
    typer.echo(f"{folds}: {len(made)} recordings in {n_folds} folds; see {picture}")


@app.command()
def experiments() -> None:
    """List the named experiments: network, size, stride and receptive field."""
    from birdcall.models.summary import experiments_table

    typer.echo(experiments_table(list(EXPERIMENTS)).to_string(index=False))


@app.command()
def train(
    data: Data,
    experiment: Experiments,
    fold: Fold = "all",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    labels: Labels = None,
    init: Init = None,
    workers: Workers = DEFAULT_WORKERS,
    jobs: Jobs = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with unfinished runs, keep finished ones.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train again what is trained already.")
    ] = False,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between two states to resume from.")
    ] = 200,
    time_limit: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Seconds after which to save and stop.", show_default="none"),
    ] = None,
) -> None:
    """Train experiments, each on all folds but the held-out one.

    For several GPUs: torchrun --nproc_per_node=2 -m birdcall train ...
    """
    from birdcall.experiments import find_experiment
    from birdcall.inference.ensemble import default_device
    from birdcall.training.distributed import distributed_context
    from birdcall.training.log import TrainingInterrupted
    from birdcall.training.runs import plan_runs, runs_table, train_many

    if resume and overwrite:
        raise ValueError("--resume goes on and --overwrite starts again: give one of them")
    deadline = None if time_limit is None else time.monotonic() + time_limit
    chosen = [find_experiment(name) for name in experiment]
    output = _output_of(data, output)
    training_data = _load_training_data(data, output, folds=folds, noise=noise, labels=labels)
    runs = plan_runs(chosen, training_data, _parse_fold(fold), output / "runs")
    try:
        with distributed_context(default_device()) as (distributed, device):
            train_many(
                runs,
                training_data,
                workers=workers,
                jobs=jobs,
                device=device,
                distributed=distributed,
                init=init,
                resume=resume,
                overwrite=overwrite,
                save_every=save_every,
                deadline=deadline,
                progress=True,
            )
            if distributed.is_first:
                typer.echo(runs_table(runs).to_string(index=False))
    except TrainingInterrupted as interruption:
        if deadline is None or time.monotonic() < deadline:
            raise  # a signal
        typer.echo(str(interruption))  # the time that was asked for is over: a success


@app.command()
def make_pseudo_labels(
    data: Data,
    experiment: Trained = None,
    output: Output = None,
    folds: Folds = None,
) -> None:
    """Say which labels are heard where, by models that did not train on the recording."""
    from birdcall.inference.ensemble import default_device
    from birdcall.training.pseudo_labels import write_pseudo_labels

    output = _output_of(data, output)
    training_data = _load_training_data(data, output, folds)
    labels = output / "relabelled.csv"
    runs = _find_runs(output, experiment)
    summary = write_pseudo_labels(
        runs, training_data, labels, device=default_device(), progress=True
    )
    typer.echo(summary)
    typer.echo(f"{labels}: written; birdcall train --labels {labels} trains by it")


@app.command()
def evaluate(
    data: Data,
    experiment: Trained = None,
    fold: Fold = "all",
    ensemble: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Also score these experiments together: A+B. May be repeated.",
            show_default="all together",
        ),
    ] = None,
    soundscapes: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            help="Folder of labelled soundscapes: recordings and their Raven selection tables, or "
            "the competition's example files. May be repeated.",
            show_default="the data's examples",
        ),
    ] = None,
    nocall_share: Annotated[
        float, typer.Option(help="Share of rows without a bird that is expected.")
    ] = 0.54,
    window_segments: WindowSegments = 1,
    context_seconds: ContextSeconds = 0.0,
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    pages: Annotated[
        int, typer.Option(min=0, help="Labelled soundscapes with a page to see and hear.")
    ] = 20,
    screenshots: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for pictures of the report, by Chromium.", show_default="none"),
    ] = None,
    submission: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Only score this submission by the data's solution.csv."),
    ] = None,
) -> None:
    """Score runs on held-out sound of three kinds, choose the decision, write the report."""
    from birdcall.evaluation.scoring import score_submission

    if submission is not None:
        typer.echo(score_submission(data, submission))
        return
    if screenshots is not None:
        from birdcall.report.browser import require_browser

        require_browser()  # before an hour of hearing, not after it
    from birdcall.evaluation.out_of_fold import write_oof_parquet
    from birdcall.evaluation.predict import hear
    from birdcall.evaluation.scoring import evaluate
    from birdcall.evaluation.tables import terminal_table
    from birdcall.inference.decision import write_decision
    from birdcall.inference.ensemble import default_device
    from birdcall.inference.windows import WindowConfig
    from birdcall.report.report import describe_decision, write_report
    from birdcall.storage.files import write_atomically

    output = _output_of(data, output)
    training_data = _load_training_data(data, output, folds, noise)
    heard = hear(
        _find_runs(output, experiment, _parse_fold(fold)),
        training_data,
        default_device(),
        labelled_folders=soundscapes or (),
        listening=WindowConfig(window_segments, context_seconds),
        kept=output / "heard",
        progress=True,
    )
    together = [tuple(one.split("+")) for one in ensemble or []]
    found = evaluate(heard, together, nocall_share)
    write_decision(output / "decision.json", found.decision)
    write_atomically(output / "scores.csv", found.table.to_csv(index=False))
    write_oof_parquet(output / "oof.parquet", list(heard.out_of_fold.values()), found.classes)
    seen = write_report(output / "report.html", data.resolve().name, found, pages)
    typer.echo(terminal_table(found.table))
    typer.echo(f"decision: {describe_decision(found)}")
    typer.echo(f"report: {output / 'report.html'}")
    if screenshots is not None:
        from birdcall.report.browser import open_browser, take_screenshots
        from birdcall.report.labelled_pages import fullest

        shown = seen.get(fullest(found, list(seen)) or "")
        with open_browser() as browser:
            made = take_screenshots(browser, output / "report.html", shown, screenshots)
        typer.echo("screenshots: " + ", ".join(map(str, made)))


@app.command()
def figures(
    data: Data,
    experiment: Annotated[
        str, typer.Option(help="Whose architecture is drawn.")
    ] = "efficientnet_b0_gru_attention",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    to: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("docs/figures"),
) -> None:
    """Draw the figures of README and docs from what the other commands have left."""
    from birdcall.evaluation.predict import hear
    from birdcall.evaluation.scoring import Evaluation, evaluate
    from birdcall.experiments import find_experiment
    from birdcall.inference.ensemble import default_device
    from birdcall.report.gallery import write_figures

    output = _output_of(data, output)

    def evaluation() -> Evaluation:
        runs = _find_runs(output, None)
        training_data = _load_training_data(data, output, folds, noise)
        kept = output / "heard"
        return evaluate(hear(runs, training_data, default_device(), kept=kept, progress=True))

    for line in write_figures(to, output, find_experiment(experiment), evaluation):
        typer.echo(line)


@app.command()
def ablate(
    data: Data,
    experiment: Experiments,
    seeds: Annotated[int, typer.Option(help="Runs of each experiment and fold.")] = 3,
    fold: Fold = "all",
    minutes: Annotated[
        float, typer.Option(help="Budget; a seed that would not fit is left out.")
    ] = 60.0,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Differences are from this one.", show_default="the first experiment"),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Folder of this ablation in the output folder.")
    ] = "ablation",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    init: Init = None,
    workers: Workers = DEFAULT_WORKERS,
    jobs: Jobs = 1,
) -> None:
    """Compare experiments over seeds in a budget of time; a second call goes on."""
    from birdcall.evaluation.ablation import ablate
    from birdcall.experiments import find_experiment
    from birdcall.report.ablation import describe_ablation, write_picture
    from birdcall.storage.files import inside, write_atomically

    chosen = [find_experiment(one) for one in experiment]
    output = _output_of(data, output)
    folder = inside(output, name)
    training_data = _load_training_data(data, output, folds, noise)
    held_out = _parse_fold(fold)
    found = ablate(
        chosen,
        training_data,
        folder,
        folds=None if held_out is None else [held_out],
        n_seeds=seeds,
        budget_seconds=60 * minutes,
        reference=reference,
        workers=workers,
        jobs=jobs,
        init=init,
        progress=True,
    )
    page = describe_ablation(found, shlex.join(["birdcall", *sys.argv[1:]]))
    found.write_tables(folder)
    write_picture(folder / "ablation.png", found)
    write_atomically(folder / "ablation.md", page)
    typer.echo(page)


@app.command()
def package(
    data: Data,
    output: Output = None,
    build: Annotated[Path, typer.Option(help="What is to be uploaded.")] = KERNEL_BUILD,
    script: Annotated[Path, typer.Option(help="The kernel.")] = KERNEL_SCRIPT,
    owner: Annotated[str, typer.Option(help="Your name on Kaggle.")] = "your-kaggle-name",
    wheels: Wheels = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Then run the kernel as Kaggle will, on --data."),
    ] = False,
) -> None:
    """Stage the submission kernel with the members of the decision."""
    from birdcall.inference.decision import read_decision
    from birdcall.kaggle.packaging import dry_run_submission, stage_package

    output = _output_of(data, output)
    decision = read_decision(output / "decision.json")
    members = [_run_folder(output, name) for name in decision.members]
    dataset = stage_package(
        members, decision, script=script, build=build, owner=owner, wheels=wheels
    )
    typer.echo(f"{dataset}: {len(members)} members, {_megabytes(dataset):.1f} MB")
    if dry_run:
        submission = output / "submission.csv"
        typer.echo(dry_run_submission(build, data, submission).rstrip())
        typer.echo(f"{submission}: written by the kernel, valid")


@app.command("package-training")
def package_training(
    data: Data,
    experiment: Annotated[str, typer.Option(help=f"One of: {', '.join(EXPERIMENTS)}.")],
    fold: Annotated[int, typer.Option(min=0, help="The held-out fold.")],
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    labels: Labels = None,
    init: Init = None,
    wheels: Wheels = None,
    hours: Annotated[float, typer.Option(help="Time limit of a session.")] = 11.5,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read sound, of all GPUs together.")
    ] = 4,
    build: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="What is to be uploaded.",
            show_default="kernels/build/training/<experiment>-fold<k>",
        ),
    ] = None,
    script: Annotated[Path, typer.Option(help="The kernel.")] = TRAINING_SCRIPT,
    owner: Annotated[str, typer.Option(help="Your name on Kaggle.")] = "your-kaggle-name",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Then run two sessions as Kaggle will, on --data."),
    ] = False,
) -> None:
    """Stage the kernel that trains one run on Kaggle's GPUs, session by session."""
    from birdcall.kaggle.packaging import dry_run_training, stage_training
    from birdcall.kaggle.training_kernel import TrainingSettings

    output, folds = _output_of(data, output), _folds_of(data, folds)
    settings = TrainingSettings(experiment, fold, hours * 3600, workers)
    build = build or KERNEL_BUILD / "training" / settings.name
    dataset = stage_training(
        settings,
        data,
        folds=folds,
        audit=output / "audit.csv",
        script=script,
        build=build,
        owner=owner,
        init=init,
        noise=noise,
        labels=labels,
        wheels=wheels,
    )
    typer.echo(f"{dataset}: {settings.name}, {_megabytes(dataset):.1f} MB")
    if dry_run:
        dry_run_output = output / "rehearsal" / settings.name
        typer.echo(dry_run_training(build, data, dry_run_output).rstrip())
        typer.echo(f"{dry_run_output}: two sessions, the second went on from the first")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run, or of a packaged member.")],
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The file to write.", show_default="model.onnx in the folder"),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--input",
            help="What goes in: log_mel, as the kernel and evaluate want it, or waveform.",
        ),
    ] = "log_mel",
    window_segments: WindowSegments = 1,
    context_seconds: ContextSeconds = 0.0,
) -> None:
    """Write a model as ONNX, refused if ONNX Runtime says anything else than torch."""
    from birdcall.inference.export import export_onnx
    from birdcall.inference.windows import WindowConfig
    from birdcall.models.onnx import ONNX_FILE

    path = to or checkpoint / ONNX_FILE
    if source != "log_mel" and to is None:
        raise ValueError("--input waveform needs --to FILE: the folder's is for log-mels")
    difference = export_onnx(
        checkpoint, path, WindowConfig(window_segments, context_seconds), source
    )
    typer.echo(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, probabilities within {difference:.1g} of "
        "torch's"
    )


@app.command()
def predict(
    paths: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(
            help="Recordings, folders of them, globs.", show_default="the data's test rows"
        ),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder in the competition's layout: writes submission.csv."),
    ] = None,
    package: Annotated[Path, typer.Option(help="A staged package.")] = KERNEL_BUILD / "dataset",
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Where results go.",
            show_default="output/predictions, or output/<name of the data folder>",
        ),
    ] = None,
    format: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="csv, parquet, jsonl: one table; raven, audacity: a file of each recording. May "
            "be repeated.",
            show_default="csv and raven",
        ),
    ] = None,
    min_confidence: Annotated[float, typer.Option(help="Leave out detections below it.")] = 0.0,
    species: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="An ebird code. May be repeated.", show_default="all"),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Also the networks' features of each segment.")
    ] = False,
    view: Annotated[
        bool,
        typer.Option("--view", help="Also pages to look at, listen to, label and export from."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin again, forget what is finished.")
    ] = False,
    ray: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Address of a Ray cluster to spread recordings over, or auto."),
    ] = None,
) -> None:
    """Label a data folder's test rows, or find the birds in recordings of your own.

    Finished recordings are kept in a journal: the same command again goes on after a stop.
    """
    from birdcall.inference.ensemble import default_device
    from birdcall.kaggle.kernel import open_package, require_all_members
    from birdcall.kaggle.submission import predict_test_set
    from birdcall.prediction.local import (
        DEFAULT_FORMATS,
        JOURNAL_FILE,
        ResultOptions,
        find_recordings,
        fingerprint_of,
        predict_locally,
        predict_recordings,
    )
    from birdcall.storage.store import Journal

    if bool(paths) == (data is not None):
        raise ValueError("predict takes either PATHS of recordings or --data DIR")
    if view and (ray is not None or data is not None):
        raise ValueError("--view is for PATHS heard on this machine: not with --ray or --data")
    device = default_device()
    ensemble, decision, refused = open_package(package, device)
    require_all_members(refused)
    if data is not None:
        submission = _output_of(data, output) / "submission.csv"
        typer.echo(f"{submission}: {predict_test_set(data, ensemble, decision, submission)}")
        return
    options = ResultOptions(
        formats=tuple(format or DEFAULT_FORMATS),
        min_confidence=min_confidence,
        species=tuple(species or ()),
        embeddings=embeddings,
        view=view,
    )
    options.require_known(ensemble.classes)
    recordings = find_recordings(paths)
    output = output or Path("output/predictions")
    if overwrite:
        (output / JOURNAL_FILE).unlink(missing_ok=True)
    if ray is None:
        listen = predict_locally(ensemble, decision, output, options, progress=True)
    else:
        from birdcall.prediction.ray_cluster import predict_on_ray

        listen = predict_on_ray(ray, package, output, embeddings=embeddings, progress=True)
    with Journal(output / JOURNAL_FILE, fingerprint_of(package, options, device.type)) as journal:
        typer.echo(
            predict_recordings(recordings, journal, listen=listen, output=output, options=options)
        )


@benchmark_app.command("frontend")
def benchmark_frontend(
    data: Data,
    output: Output = None,
    n_clips: Annotated[int, typer.Option(min=1, help="Five-second clips.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the median counts.")] = 5,
) -> None:
    """Time log-mel by librosa, torchlibrosa, nnAudio and birdcall, on CPU and GPU."""
    from birdcall.benchmark.frontend import benchmark_frontend

    table = benchmark_frontend(
        data, _output_of(data, output) / "benchmark", n_clips=n_clips, repeats=repeats
    )
    typer.echo(table.to_string(index=False))


@benchmark_app.command("loader")
def benchmark_loader(
    data: Data,
    output: Output = None,
    recordings: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Make so many mp3 in --data first.", show_default="none"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of each mp3 that is made.")] = 60.0,
    n_clips: Annotated[int, typer.Option(min=1, help="Clips in an epoch.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the median counts.")] = 3,
) -> None:
    """Time the reading of clips: librosa, a seek, the cache, and the loader with its workers."""
    from birdcall.benchmark.loader import benchmark_loader, make_recordings

    if recordings is not None:
        make_recordings(data, recordings, seconds)
    table = benchmark_loader(
        data,
        _output_of(data, output) / "benchmark",
        n_recordings=recordings or 200,
        n_clips=n_clips,
        repeats=repeats,
    )
    typer.echo(table.to_string(index=False))


@benchmark_app.command("training")
def benchmark_training(
    data: Data,
    experiment: Annotated[str, typer.Option(help="A named experiment.")] = "small_gru",
    output: Output = None,
    folds: Folds = None,
    n_steps: Annotated[int, typer.Option(min=1, help="Steps of each turn.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; the median counts.")] = 5,
) -> None:
    """Time training steps with their clips and augmentation, and on ready-made tensors."""
    from birdcall.benchmark.training import benchmark_training
    from birdcall.experiments import find_experiment

    output = _output_of(data, output)
    training_data = _load_training_data(data, output, folds)
    table = benchmark_training(
        training_data,
        find_experiment(experiment),
        output / "benchmark",
        n_steps=n_steps,
        repeats=repeats,
    )
    typer.echo(table.to_string(index=False))


@benchmark_app.command("evaluation")
def benchmark_evaluation(
    output: Annotated[Path, typer.Option(help="Where made-up outputs and results go.")] = Path(
        "output/benchmark-evaluation"
    ),
    soundscapes: Annotated[int, typer.Option(min=2, help="How many of them.")] = 150,
    seconds: Annotated[float, typer.Option(help="Length of each.")] = 600.0,
    classes: Annotated[int, typer.Option(min=2, help="Species.")] = 264,
    members: Annotated[int, typer.Option(min=1, help="Of the ensemble.")] = 5,
) -> None:
    """Time an evaluation from stored outputs, in a process of its own, and say its memory."""
    from birdcall.benchmark.evaluation import benchmark_evaluation

    table = benchmark_evaluation(
        output, n_soundscapes=soundscapes, seconds=seconds, n_classes=classes, n_members=members
    )
    typer.echo(table.to_string(index=False))


@benchmark_app.command("inference")
def benchmark_inference(
    data: Data,
    output: Output = None,
    members: Annotated[int, typer.Option(min=1, help="Of the larger ensemble.")] = 5,
    minutes: Annotated[float, typer.Option(help="Of sound, heard by each side.")] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; the median counts.")] = 3,
) -> None:
    """Time a hearing end to end, one member and several, against the naive public kernel."""
    from birdcall.benchmark.inference import benchmark_inference

    table = benchmark_inference(
        data,
        _output_of(data, output) / "benchmark",
        n_members=members,
        minutes=minutes,
        repeats=repeats,
    )
    typer.echo(table.T.to_string(header=False))


@benchmark_app.command("memory")
def benchmark_memory(
    data: Data,
    output: Output = None,
    hours: Annotated[float, typer.Option(help="Of the long recording.")] = 24.0,
) -> None:
    """Say how much memory a recording of 10 minutes takes, and a long one."""
    from birdcall.benchmark.inference import benchmark_memory

    table = benchmark_memory(
        data, _output_of(data, output) / "benchmark", long_seconds=3600 * hours
    )
    typer.echo(table.to_string(index=False))


@benchmark_app.command("scale")
def benchmark_scale(
    data: Data,
    output: Output = None,
    hours: Annotated[float, typer.Option(help="Of sound in the archive.")] = 1e6,
    workers: Annotated[int, typer.Option(min=1, help="Of two cores each.")] = 200,
    failures: Annotated[float, typer.Option(help="Of each worker, a day.")] = 1.0,
    members: Annotated[int, typer.Option(min=1, help="That hear the archive.")] = 5,
) -> None:
    """Reckon what the hidden test set and an archive take, from what `inference` measured."""
    from birdcall.benchmark.inference import Archive, benchmark_scale

    archive = Archive(hours=hours, n_workers=workers, failures_per_day=failures)
    hidden, found = benchmark_scale(_output_of(data, output) / "benchmark", archive, members)
    typer.echo(hidden.to_string(index=False))
    typer.echo(found.T.to_string(header=False))


app.add_typer(benchmark_app, name="benchmark")


def _output_of(data: Path, output: Path | None) -> Path:
    return output or Path("output") / data.resolve().name


def _folds_of(data: Path, folds: Path | None) -> Path:
    return folds or Path("folds") / f"{data.resolve().name}.csv"


def _load_training_data(
    data: Path,
    output: Path,
    folds: Path | None,
    noise: Path | None = None,
    labels: Path | None = None,
) -> TrainingData:
    from birdcall.data.dataset import load_training_data

    return load_training_data(
        data,
        _folds_of(data, folds),
        audit=output / "audit.csv",
        cache=output / "cache",
        noise=noise,
        labels=labels,
    )


def _parse_fold(fold: str) -> int | None:
    if fold == "all":
        return None
    if not fold.isdigit():
        raise ValueError(f"--fold is {fold!r}; give a number or all")
    return int(fold)


def _run_folder(output: Path, name: str) -> Path:
    experiment, _, fold = name.rpartition("-fold")
    return output / "runs" / experiment / f"fold{fold}"


def _find_runs(output: Path, experiments: list[str] | None, fold: int | None = None) -> list[Path]:
    from birdcall.experiments import find_experiment
    from birdcall.models.checkpoint import find_checkpoints

    for name in experiments or []:
        find_experiment(name)
    runs = [
        folder
        for folder in find_checkpoints(output / "runs")
        if not experiments or folder.parent.name in experiments
        if fold is None or folder.name == f"fold{fold}"
    ]
    missing = sorted(set(experiments or []) - {folder.parent.name for folder in runs})
    if not runs or missing:
        which = ", ".join(missing) or "trained run"
        of = "" if fold is None else f" of fold {fold}"
        raise FileNotFoundError(f"{output / 'runs'}: no {which}{of}; `birdcall train` makes one")
    return runs


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Run a command; what is wrong with its input is one line on stderr and exit code 2."""
    try:
        app(prog_name="birdcall")
    except (ValueError, OSError, RuntimeError) as error:
        from birdcall.training.log import TrainingInterrupted

        if isinstance(error, TrainingInterrupted):
            typer.echo(f"birdcall: {error}", err=True)
            sys.exit(130)
        if isinstance(error, RuntimeError):
            raise
        if os.environ.get("BIRDCALL_TRACEBACK"):
            raise
        typer.echo(f"birdcall: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
