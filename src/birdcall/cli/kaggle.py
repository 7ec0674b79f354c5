"""Commands that use trained runs: package, package-training, export, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from birdcall.cli.options import (
    ContextSeconds,
    Data,
    Folders,
    Folds,
    Init,
    LabelColumn,
    Labels,
    Noise,
    OtherBirds,
    Output,
    WindowSegments,
    parse_fold,
)
from birdcall.experiments import EXPERIMENTS

commands = typer.Typer()

_Owner = Annotated[str, typer.Option(help="Your user name on Kaggle.")]
_Script = Annotated[Path, typer.Option(help="Script of the kernel.")]
_Wheels = Annotated[
    Path | None,
    typer.Option(help="Folder of wheels: packages that Kaggle's image lacks.", show_default="none"),
]
_OWNER = "your-kaggle-name"
_SUBMISSION_SCRIPT = Path("kernels/submission/submission.py")
_TRAINING_SCRIPT = Path("kernels/training/training.py")
_BUILD = Path("kernels/build")


@commands.command("package")
def _package(
    data: Data,
    output: Output = None,
    build: Annotated[Path, typer.Option(help="Folder to be uploaded.")] = _BUILD,
    script: _Script = _SUBMISSION_SCRIPT,
    owner: _Owner = _OWNER,
    wheels: _Wheels = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="With the full runs of the decision's experiments, not those of folds."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Then run the kernel on --data, offline as on Kaggle."),
    ] = False,
) -> None:
    """Write the submission kernel and its dataset, with the members of the decision."""
    from birdcall.inference.decision import read_decision
    from birdcall.kaggle.dry_run import dry_run_submission
    from birdcall.kaggle.packaging import StagingOptions, stage_package

    folders = Folders(data, output)
    decision = read_decision(folders.decision)
    if full:
        from birdcall.evaluation.ensemble_decision import decide_for_full_runs

        decision = decide_for_full_runs(decision, folders.runs)
    # Names of members are <experiment>-<folder of the run>.
    members = [folders.runs / Path(*name.rsplit("-", 1)) for name in decision.members]
    dataset = stage_package(members, decision, StagingOptions(script, build, owner, wheels))
    size = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    typer.echo(f"{dataset}: {len(members)} members, {size / 1e6:.1f} MB")
    if dry_run:
        typer.echo(dry_run_submission(build, data, folders.submission).rstrip())
        typer.echo(f"{folders.submission}: written by the kernel, valid")


@commands.command("package-training")
def _package_training(
    data: Data,
    experiment: Annotated[str, typer.Option(help=f"One of: {', '.join(EXPERIMENTS)}.")],
    fold: Annotated[str, typer.Option(help="Number of the held-out fold, or full.")],
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    other_birds: OtherBirds = None,
    labels: Labels = None,
    init: Init = None,
    wheels: _Wheels = None,
    hours: Annotated[float, typer.Option(help="Time limit of a session.")] = 11.5,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode recordings, for all GPUs together.")
    ] = 4,
    build: Annotated[
        Path | None,
        typer.Option(
            help="Folder to be uploaded.",
            show_default="kernels/build/training/<experiment>-fold<k>",
        ),
    ] = None,
    script: _Script = _TRAINING_SCRIPT,
    owner: _Owner = _OWNER,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Then run two sessions on --data, offline as on Kaggle."),
    ] = False,
) -> None:
    """Write the kernel that trains one run on Kaggle's GPUs over several sessions."""
    from birdcall.kaggle.dry_run import dry_run_training
    from birdcall.kaggle.packaging import StagingOptions, TrainingFiles, stage_training
    from birdcall.kaggle.training_kernel import TrainingSettings

    folders = Folders(data, output, folds)
    held_out = parse_fold(fold)
    if held_out is None:
        raise ValueError("a kernel trains one run: --fold is its number, or full")
    settings = TrainingSettings(experiment, held_out, hours * 3600, workers)
    build = build or _BUILD / "training" / settings.name
    files = TrainingFiles(
        data=data,
        folds=folders.folds,
        audit=folders.audit,
        noise=noise,
        other_birds=other_birds,
        labels=labels,
        init=init,
    )
    dataset = stage_training(settings, files, StagingOptions(script, build, owner, wheels))
    size = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    typer.echo(f"{dataset}: {settings.name}, {size / 1e6:.1f} MB")
    if dry_run:
        sessions = folders.output / "dry_run" / settings.name
        typer.echo(dry_run_training(build, data, sessions).rstrip())
        typer.echo(f"{sessions}: two sessions; the second resumed the training of the first")


@commands.command("export")
def _export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a run or of a packaged member.")],
    to: Annotated[
        Path | None,
        typer.Option(help="File to write.", show_default="model.onnx in the folder"),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--input",
            help="Input of the exported network: log_mel, for the kernel and evaluate, or "
            "waveform, for other programs.",
        ),
    ] = "log_mel",
    window_segments: WindowSegments = 1,
    context_seconds: ContextSeconds = 0.0,
) -> None:
    """Export a network to ONNX, and check that ONNX Runtime predicts the same as torch."""
    from birdcall.inference.windows import ONNX_FILE, WindowConfig, export_checkpoint

    path = to or checkpoint / ONNX_FILE
    if source != "log_mel" and to is None:
        raise ValueError(f"--input waveform needs --to FILE: {path} must have log_mel as its input")
    difference = export_checkpoint(
        checkpoint, path, WindowConfig(window_segments, context_seconds), source
    )
    typer.echo(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB; probabilities differ from torch's by at "
        f"most {difference:.1g}"
    )


@commands.command("predict")
def _predict(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Recordings, folders of recordings, globs.",
            show_default="the rows of test.csv",
            readable=False,  # not checked: what cannot be read costs its own rows only
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Data folder in the layout of the competition; writes submission.csv.",
            show_default=False,
        ),
    ] = None,
    package: Annotated[
        Path, typer.Option(help="Dataset folder written by `birdcall package`.")
    ] = _BUILD / "dataset",
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results.",
            show_default="output/predictions, or output/<name of the data folder>",
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="csv, parquet, jsonl: one table; raven, audacity: one file per recording. May be "
            "repeated.",
            show_default="csv and raven",
        ),
    ] = None,
    min_confidence: Annotated[
        float, typer.Option(help="Leave out detections of lower confidence.")
    ] = 0.0,
    species: Annotated[
        list[str] | None,
        typer.Option(help="Code or name of a species. May be repeated.", show_default="all"),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Also write the embedding of each segment.")
    ] = False,
    view: Annotated[
        bool,
        typer.Option(
            "--view", help="Also write a page for each recording: player, predictions, labels."
        ),
    ] = False,
    label_column: LabelColumn = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Predict finished recordings again.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster that shares the work, or auto."),
    ] = None,
) -> None:
    """Predict the test rows of a data folder, or detect birds in your own recordings.

    A journal stores finished recordings: after a stop, the same command resumes.
    """
    from birdcall.inference.ensemble import default_device
    from birdcall.inference.tables import read_labels_beside
    from birdcall.kaggle.submission import open_package, predict_test_set
    from birdcall.prediction.local import (
        ResultOptions,
        fingerprint_of,
        predict_locally,
        predict_recordings,
    )
    from birdcall.prediction.package import find_recordings
    from birdcall.report.soundscape import SoundscapePageWriter
    from birdcall.storage.store import Journal
    from birdcall.taxonomy import known_species

    if bool(paths) == (data is not None):
        raise ValueError("give either PATHS of recordings or --data DIR")
    if view and (ray is not None or data is not None):
        raise ValueError(
            "--view needs PATHS, predicted on this machine: leave out --ray and --data"
        )
    device = default_device()
    opened = open_package(package, device, all_members=True)
    if opened.decision.names_nothing:
        typer.echo(
            f"the decision of {package} {opened.decision.describe()}; the report of `birdcall "
            "evaluate` says which score is low, and --view writes pages with the probabilities",
            err=True,
        )
    if data is not None:
        submission = Folders(data, output).submission
        typer.echo(f"{submission}: {predict_test_set(data, submission, lambda: opened)}")
        return
    options = ResultOptions(
        formats=tuple(format or ResultOptions.formats),
        min_confidence=min_confidence,
        species=tuple(species or ()),
        embeddings=embeddings,
        view=view,
    ).for_classes(opened.ensemble.classes)
    recordings = find_recordings(paths)
    output = output or Path("output/predictions")
    journal_file = output / "journal.jsonl"
    pages, labels = None, {}
    if view:
        labels = read_labels_beside(
            [recording.path for recording in recordings],
            known_species(opened.ensemble.classes),
            label_column,
        )
        pages = SoundscapePageWriter(
            folder=output / "view",
            decision=opened.decision,
            classes=opened.ensemble.classes,
            members=tuple(member.name for member in opened.ensemble.members),
        )
    if ray is None:
        predictor = predict_locally(
            opened, output, options, pages=pages, labels=labels, progress=True
        )
    else:
        from birdcall.prediction.ray_cluster import predict_on_ray

        predictor = predict_on_ray(ray, package, output, embeddings=embeddings, progress=True)
    fingerprint = fingerprint_of(package, options, device.type)
    with Journal(journal_file, fingerprint, overwrite=overwrite) as journal:
        typer.echo(
            predict_recordings(
                recordings, predictor, journal, output, options=options, pages=pages, labels=labels
            )
        )
