"""Commands that use trained runs: package, package-training, predict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from birdcall.cli.options import (
    Data,
    Folders,
    Folds,
    Init,
    LabelColumn,
    Labels,
    Noise,
    OtherBirds,
    Output,
    parse_fold,
)
from birdcall.experiments import EXPERIMENTS

if TYPE_CHECKING:
    from kaggle.api.kaggle_api_extended import KaggleApi

    from birdcall.inference.decision import Decision
    from birdcall.kaggle.packaging import StagingOptions

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


def _stage(
    folders: Folders, decision: Decision, staging: StagingOptions, *, full: bool, dry_run: bool
) -> None:
    """Stage the submission kernel and its dataset, and run it if asked to."""
    from birdcall.kaggle.dry_run import dry_run_submission
    from birdcall.kaggle.packaging import stage_package

    if full:
        from birdcall.evaluation.ensemble_decision import decide_for_full_runs

        decision = decide_for_full_runs(decision, folders.runs)
    # A member's name is <experiment>-<folder of the run>.
    members = [folders.runs / Path(*name.rsplit("-", 1)) for name in decision.members]
    dataset = stage_package(members, decision, staging)
    size = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    typer.echo(f"{dataset}: {len(members)} members, {size / 1e6:.1f} MB")
    if dry_run:
        log = dry_run_submission(staging.build, folders.data, folders.submission).rstrip()
        typer.echo(f"{log}\n{folders.submission}: written by the kernel, valid")


def _send(client: KaggleApi, build: Path, *, upload: bool, push: bool) -> None:
    """Upload the dataset, push the kernel, and say what to do next."""
    from birdcall.kaggle.test_set import COMPETITION
    from birdcall.kaggle.upload import push_kernel, upload_dataset

    command = "birdcall package --push" + (f" --build {build}" if build != _BUILD else "")
    if upload:
        dataset = upload_dataset(client, build)
        typer.echo(
            f"{dataset.id}: version {dataset.version} is ready, {dataset.url}"
            + ("" if push else f"; next: {command}")
        )
    if not push:
        return
    kernel = push_kernel(client, build)
    typer.echo(f"{kernel.id}: Kaggle runs version {kernel.version}, {kernel.url}")
    typer.echo(f"when `kaggle kernels status {kernel.id}` says complete:")
    if kernel.sees_own_output:
        typer.echo(f"    {command}    # resumes, until the log says finished; then")
        typer.echo(f"    kaggle kernels output {kernel.id} -p output/{COMPETITION}")
    else:
        typer.echo(
            f"    kaggle competitions submit {COMPETITION} -f submission.csv -k {kernel.id} "
            f"-v {kernel.version} -m TEXT"
        )


@commands.command("package")
def _package(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Data folder in the layout of the competition.",
            show_default="none: upload or push what is staged",
        ),
    ] = None,
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
    upload: Annotated[
        bool,
        typer.Option(
            "--upload",
            help="Then upload the dataset, its first version or the next (the extra kaggle).",
        ),
    ] = False,
    push: Annotated[
        bool, typer.Option("--push", help="Then push the kernel, which runs it (the extra kaggle).")
    ] = False,
) -> None:
    """Write the submission kernel and its dataset, with the members of the decision.

    With --upload and --push it goes to Kaggle; without --data, what was staged before, of
    package-training too.
    """
    if data is None and not (upload or push):
        raise ValueError("give --data DIR to stage a package, --upload or --push to send one")
    options = (output, script, owner, wheels, full, dry_run)
    if data is None and options != (None, _SUBMISSION_SCRIPT, _OWNER, None, False, False):
        raise ValueError(
            "--output, --script, --owner, --wheels, --full and --dry-run need --data DIR: without "
            f"it, what is staged in {build} goes to Kaggle as it is"
        )
    client = None
    if upload or push:
        from birdcall.kaggle.upload import connect, require_uploadable, user_of

        if data is None:
            require_uploadable(build)
        client = connect(None if owner == _OWNER else owner)  # before minutes of staging
        owner = user_of(client)
    if data is not None:
        from birdcall.inference.decision import read_decision
        from birdcall.kaggle.packaging import StagingOptions

        decision = read_decision(Folders(data, output).decision)  # a missing step is named first
        staging = StagingOptions(script, build, owner, wheels)
        _stage(Folders(data, output), decision, staging, full=full, dry_run=dry_run)
    if client is not None:
        _send(client, build, upload=upload, push=push)


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
        typer.Option(help="Address of a Ray cluster, or auto.", show_default="this machine"),
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
    for_paths = (format, species, min_confidence, embeddings, view, label_column, overwrite, ray)
    if data is not None and any(for_paths):
        raise ValueError("--data takes --package and --output only: all others are for PATHS")
    if view and ray is not None:
        raise ValueError("--view needs PATHS, predicted on this machine: leave out --ray")
    if label_column is not None and not view:
        raise ValueError("--label-column names what --view shows: give both, or neither")
    options = ResultOptions(
        formats=tuple(format or ResultOptions.formats),
        min_confidence=min_confidence,
        species=tuple(species or ()),
        embeddings=embeddings,
        view=view,
    )
    recordings = find_recordings(paths) if paths else []  # before networks are loaded
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
    options = options.for_classes(opened.ensemble.classes)
    output = output or Path("output/predictions")
    pages, labels = None, {}
    if view:
        files, codes = [item.path for item in recordings], known_species(opened.ensemble.classes)
        labels = read_labels_beside(files, codes, label_column)
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
    fingerprint = fingerprint_of(package, options, opened)
    with Journal(output / "journal.jsonl", fingerprint, overwrite=overwrite) as journal:
        typer.echo(
            predict_recordings(
                recordings, predictor, journal, output, options=options, pages=pages, labels=labels
            )
        )
