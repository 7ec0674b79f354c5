"""Run birdcall from the command line: one command, one step of the pipeline."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from birdcall.experiments import EXPERIMENTS

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
DEFAULT_WORKERS = max(1, min(8, (os.cpu_count() or 2) - 1))
KERNEL_SCRIPT = Path("kernels/submission/submission.py")
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
    from birdcall.audit import audit_recordings, describe_audit
    from birdcall.cache import Cache
    from birdcall.recordings import check_recordings_exist, read_recordings

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
    from birdcall.audit import read_audit, same_sound, usable_recordings
    from birdcall.folds import check_folds, fold_report, make_folds, plot_folds, write_folds
    from birdcall.recordings import read_recordings

    output, folds = _output_of(data, output), _folds_of(data, folds)
    table = read_audit(output / "audit.csv")
    recordings = usable_recordings(read_recordings(data), table)
    made = make_folds(recordings, n_folds, seed, same_sound(recordings, table))
    check_folds(made, recordings)
    write_folds(made, folds)
    picture = output / "folds.png"
    plot_folds(made, recordings).savefig(picture)
    typer.echo(fold_report(made, recordings).round(3).to_string())
    typer.echo(f"{folds}: {len(made)} recordings in {n_folds} folds; see {picture}")


@app.command()
def train(
    data: Data,
    experiment: Annotated[
        list[str],
        typer.Option(help=f"May be repeated. One of: {', '.join(EXPERIMENTS)}."),
    ],
    fold: Annotated[str, typer.Option(help="The held-out fold, or all.")] = "all",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    init: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The backbone's weights: .safetensors or .pth", show_default="timm's"),
    ] = None,
    workers: Workers = DEFAULT_WORKERS,
    jobs: Annotated[int, typer.Option(min=1, help="Runs trained at once, sharing the cores.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train again what is trained already.")
    ] = False,
) -> None:
    """Train experiments, each on all folds but the held-out one."""
    from birdcall.dataset import load_training_data
    from birdcall.experiments import find_experiment
    from birdcall.training import train_runs

    experiments = [find_experiment(name) for name in experiment]
    output = _output_of(data, output)
    training_data = load_training_data(
        data, _folds_of(data, folds), output / "audit.csv", output / "cache", noise
    )
    checkpoints = train_runs(
        experiments,
        training_data,
        _parse_fold(fold),
        output / "runs",
        workers=workers,
        jobs=jobs,
        init=init,
        overwrite=overwrite,
        progress=True,
    )
    for checkpoint in checkpoints:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in checkpoint.score.items())
        typer.echo(f"{checkpoint.name}: {scores}")


@app.command()
def evaluate(
    data: Data,
    experiment: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="May be repeated.", show_default="all trained ones"),
    ] = None,
    output: Output = None,
    folds: Folds = None,
    submission: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Only score this submission by the data's solution.csv."),
    ] = None,
) -> None:
    """Score trained runs on held-out sound, choose the decision, write the report."""
    from birdcall.evaluation import score_submission
    from birdcall.report import describe_submission

    if submission is not None:
        typer.echo(describe_submission(score_submission(data, submission)))
        return
    from birdcall.dataset import load_training_data
    from birdcall.decision import write_decision
    from birdcall.evaluation import evaluate_runs
    from birdcall.files import write_atomically
    from birdcall.inference import default_device
    from birdcall.report import describe_decision, score_table, write_report

    output = _output_of(data, output)
    training_data = load_training_data(
        data, _folds_of(data, folds), output / "audit.csv", output / "cache"
    )
    runs = _find_runs(output, experiment)
    evaluation = evaluate_runs(runs, training_data, default_device())
    write_decision(output / "decision.json", evaluation.decision)
    write_atomically(output / "scores.csv", evaluation.table.to_csv(index=False))
    write_atomically(output / "oof.csv", evaluation.out_of_fold.to_csv(index=False))
    write_report(output / "report.html", data.resolve().name, evaluation, data, None)
    typer.echo(score_table(evaluation.table).to_string(index=False, na_rep="-"))
    typer.echo(f"decision: {describe_decision(evaluation)}")
    typer.echo(f"report: {output / 'report.html'}")


@app.command()
def package(
    data: Data,
    output: Output = None,
    build: Annotated[Path, typer.Option(help="What is to be uploaded.")] = KERNEL_BUILD,
    script: Annotated[Path, typer.Option(help="The kernel.")] = KERNEL_SCRIPT,
    owner: Annotated[str, typer.Option(help="Your name on Kaggle.")] = "your-kaggle-name",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Then run the kernel as Kaggle will, on --data."),
    ] = False,
) -> None:
    """Stage the submission kernel with the members of the decision."""
    from birdcall.decision import read_decision
    from birdcall.packaging import rehearse, stage_package

    output = _output_of(data, output)
    decision = read_decision(output / "decision.json")
    members = [_run_folder(output, name) for name in decision.members]
    dataset = stage_package(members, decision, script, build, owner)
    typer.echo(f"{dataset}: {len(members)} members, {_megabytes(dataset):.1f} MB")
    if dry_run:
        submission = output / "submission.csv"
        typer.echo(rehearse(build, data, submission).rstrip())
        typer.echo(f"{submission}: written by the kernel, valid")


@app.command()
def predict(
    paths: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(help="Recordings or folders of them.", show_default="the data's test rows"),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder in the competition's layout: writes submission.csv."),
    ] = None,
    package: Annotated[Path, typer.Option(help="A staged package.")] = KERNEL_BUILD / "dataset",
    output: Output = None,
) -> None:
    """Label a data folder's test rows, or find the birds in recordings of your own."""
    from birdcall.checkpoint import find_checkpoints
    from birdcall.decision import read_decision
    from birdcall.inference import default_device, load_ensemble, write_predictions
    from birdcall.kernel import DECISION_FILE, MEMBERS_FOLDER, check_manifest
    from birdcall.prediction import predict_recordings

    if bool(paths) == (data is not None):
        raise ValueError("predict takes either PATHS of recordings or --data DIR")
    check_manifest(package)
    decision = read_decision(package / DECISION_FILE)
    ensemble = load_ensemble(find_checkpoints(package / MEMBERS_FOLDER), default_device())
    if data is not None:
        submission = _output_of(data, output) / "submission.csv"
        typer.echo(f"{submission}: {write_predictions(data, ensemble, decision, submission)}")
        return
    output = output or Path("output/predictions")
    typer.echo(predict_recordings(paths, ensemble, decision, output, progress=True))


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


app.add_typer(benchmark_app, name="benchmark")


def _output_of(data: Path, output: Path | None) -> Path:
    return output or Path("output") / data.resolve().name


def _folds_of(data: Path, folds: Path | None) -> Path:
    return folds or Path("folds") / f"{data.resolve().name}.csv"


def _parse_fold(fold: str) -> int | None:
    if fold == "all":
        return None
    if not fold.isdigit():
        raise ValueError(f"--fold is {fold!r}; give a number or all")
    return int(fold)


def _run_folder(output: Path, name: str) -> Path:
    experiment, _, fold = name.rpartition("-fold")
    return output / "runs" / experiment / f"fold{fold}"


def _find_runs(output: Path, experiments: list[str] | None) -> list[Path]:
    from birdcall.checkpoint import find_checkpoints
    from birdcall.experiments import find_experiment

    for name in experiments or []:
        find_experiment(name)
    runs = [
        folder
        for folder in find_checkpoints(output / "runs")
        if not experiments or folder.parent.name in experiments
    ]
    if not runs:
        raise FileNotFoundError(f"{output / 'runs'}: no trained run; `birdcall train` makes one")
    return runs


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Run a command; what is wrong with its input is one line on stderr and exit code 2."""
    try:
        app(prog_name="birdcall")
    except (ValueError, OSError) as error:
        if os.environ.get("BIRDCALL_TRACEBACK"):
            raise
        typer.echo(f"birdcall: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
