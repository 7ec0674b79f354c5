"""Commands from the data to trained runs: demo, audit, folds, train, ablate."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from birdcall.cli.options import (
    Data,
    Fold,
    Folders,
    Folds,
    Init,
    Labels,
    Noise,
    OtherBirds,
    Output,
    SoundscapeLabels,
    parse_fold,
)
from birdcall.config import FULL
from birdcall.experiments import EXPERIMENTS

commands = typer.Typer()

_Experiments = Annotated[
    list[str], typer.Option(help=f"May be repeated. One of: {', '.join(EXPERIMENTS)}.")
]
_Workers = Annotated[int, typer.Option(min=0, help="Processes that decode recordings.")]
_Jobs = Annotated[int, typer.Option(min=1, help="Runs trained at once; they share the cores.")]
_WORKERS = max(1, min(8, (os.cpu_count() or 2) - 1))


@commands.command("demo")
def _demo(
    context: typer.Context,
    data: Data,
    seed: Annotated[int, typer.Option(help="Another seed gives other songs and recordings.")] = 0,
    workers: _Workers = _WORKERS + 1,
) -> None:
    """Write a small data set of synthetic birdsong with all files of the competition."""
    from birdcall.demo.plan import DemoConfig
    from birdcall.demo.writer import make_demo
    from birdcall.storage.locks import locked

    context.with_resource(locked(data))
    make_demo(data, DemoConfig(seed=seed), workers=workers, progress=True)
    typer.echo(f"{data}: written")


@commands.command("audit")
def _audit(
    data: Data,
    output: Output = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Store decoded audio: training reads it faster.")
    ] = False,
    workers: _Workers = _WORKERS + 1,
) -> None:
    """Decode every recording; list the unreadable, truncated, silent and duplicate ones."""
    from birdcall.data.audit import audit_recordings, describe_audit
    from birdcall.data.cache import RecordingCache
    from birdcall.data.recordings import check_recordings_exist, read_recordings
    from birdcall.storage.files import write_atomically

    folders = Folders(data, output)
    recordings = read_recordings(data)
    check_recordings_exist(recordings, data)
    table = audit_recordings(
        data,
        recordings,
        folders.audit,
        workers=workers,
        cache=RecordingCache(data, folders.cache) if cache else None,
        progress=True,
    )
    write_atomically(folders.data_note, os.fsencode(data.resolve()))
    typer.echo(describe_audit(table))


@commands.command("folds")
def _folds(
    data: Data,
    output: Output = None,
    folds: Folds = None,
    n_folds: Annotated[int, typer.Option(min=2, help="Number of folds.")] = 5,
    seed: Annotated[int, typer.Option(help="Decides between splits of equal quality.")] = 0,
    min_recordings: Annotated[
        int,
        typer.Option(
            min=1,
            help="Species with fewer recordings, or one recordist, are in every training part and "
            "held out in no fold.",
            show_default="1: all are held out",
        ),
    ] = 1,
) -> None:
    """Split the recordings into folds by species, each recordist in one fold only."""
    from birdcall.data.audit import read_audit
    from birdcall.data.folds import (
        check_folds,
        class_shares,
        describe_training_only,
        fold_report,
        make_folds,
        write_folds,
    )
    from birdcall.data.recordings import audio_hashes, read_recordings, usable_recordings
    from birdcall.report.plots import plot_folds, save_figure

    folders = Folders(data, output, folds)
    audit = read_audit(folders.audit)
    recordings = usable_recordings(read_recordings(data), audit)
    hashes = audio_hashes(recordings, audit)
    table = make_folds(recordings, n_folds, seed, hashes, min_recordings=min_recordings)
    check_folds(table, recordings, hashes)
    write_folds(table, folders.folds)
    figure = folders.output / "folds.png"
    report, sizes = fold_report(table, recordings), table["ebird_code"].value_counts()
    save_figure(plot_folds(class_shares(table), sizes, report), figure)
    typer.echo(report.round(3).to_string())
    if training_only := describe_training_only(table):
        typer.echo(training_only)
    typer.echo(f"{folders.folds}: {len(table)} recordings in {n_folds} folds; figure: {figure}")


@commands.command("experiments")
def _experiments() -> None:
    """List the named experiments: network, size, stride and receptive field."""
    from birdcall.models.summary import experiments_table

    typer.echo(experiments_table(list(EXPERIMENTS)).to_string(index=False))


@commands.command("train")
def _train(
    data: Data,
    experiment: _Experiments,
    fold: Annotated[
        str, typer.Option(help="Number of the held-out fold, all, or full: hold out nothing.")
    ] = "all",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    labels: Labels = None,
    other_birds: OtherBirds = None,
    soundscape_labels: SoundscapeLabels = None,
    init: Init = None,
    workers: _Workers = _WORKERS,
    jobs: _Jobs = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue unfinished runs, skip finished ones.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace trained and unfinished runs.")
    ] = False,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between two saved states, for --resume.")
    ] = 200,
    time_limit: Annotated[
        float | None,
        typer.Option(help="Save the state and stop after these seconds.", show_default="none"),
    ] = None,
) -> None:
    """Train experiments, each on all folds except the held-out fold; --fold full: on everything.

    On several GPUs: torchrun --nproc_per_node=2 -m birdcall train ...
    """
    from birdcall.experiments import find_experiment
    from birdcall.inference.ensemble import default_device
    from birdcall.training.distributed import distributed_context
    from birdcall.training.log import find_best_epochs
    from birdcall.training.runs import plan_runs, runs_table, train_many
    from birdcall.training.trainer import RunOptions

    if resume and overwrite:
        raise ValueError("--resume continues a run, --overwrite replaces it: give one of them")
    deadline = None if time_limit is None else time.monotonic() + time_limit
    chosen = [find_experiment(name) for name in experiment]
    folders = Folders(data, output, folds)
    training_data = folders.load_training_data(
        noise, labels, other_birds=other_birds, soundscape_labels=soundscape_labels
    )
    runs = plan_runs(chosen, training_data, parse_fold(fold), folders.runs)
    with (
        _report_interruption(deadline),
        distributed_context(default_device()) as (distributed, device),
    ):
        options = RunOptions(
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
        train_many(runs, training_data, options)
        if distributed.is_first:
            typer.echo(runs_table(runs).to_string(index=False))
            for run in (run for run in runs if run.fold == FULL):
                best = find_best_epochs(run.folder.parent)
                shown = ", ".join(f"{name} after epoch {epoch}" for name, epoch in best.items())
                typer.echo(
                    f"{run.name}: not validated; trained for the {run.experiment.train.epochs} "
                    f"epochs of the experiment; the folds' validation was best: {shown or 'no log'}"
                )


@contextmanager
def _report_interruption(deadline: float | None = None) -> Iterator[None]:
    """Print the step of the interruption: a success at the deadline, else exit code 130."""
    from birdcall.training.runs import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as interruption:
        if deadline is not None and time.monotonic() >= deadline:
            typer.echo(str(interruption))
            return
        typer.echo(f"birdcall: {interruption}", err=True)
        raise typer.Exit(130) from None


@commands.command("ablate")
def _ablate(
    data: Data,
    experiment: _Experiments,
    seeds: Annotated[int, typer.Option(help="Seeds of each experiment and fold.")] = 3,
    fold: Fold = "all",
    minutes: Annotated[
        float, typer.Option(help="Time budget; a seed that does not fit is left out.")
    ] = 60.0,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Experiment that the others are compared with.", show_default="the first one"
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="Folder of this ablation in the output folder.")
    ] = "ablation",
    output: Output = None,
    folds: Folds = None,
    noise: Noise = None,
    other_birds: OtherBirds = None,
    soundscape_labels: SoundscapeLabels = None,
    init: Init = None,
    workers: _Workers = _WORKERS,
    jobs: _Jobs = 1,
) -> None:
    """Compare experiments over several seeds within a time budget; a second call resumes."""
    from birdcall.evaluation.ablation import AblationOptions, ablate
    from birdcall.experiments import find_experiment
    from birdcall.report.ablation import describe_ablation, plot_ablation
    from birdcall.report.plots import save_figure
    from birdcall.storage.files import inside, write_atomically
    from birdcall.training.trainer import RunOptions

    chosen = [find_experiment(experiment_name) for experiment_name in experiment]
    folders = Folders(data, output, folds)
    folder = inside(folders.output, name)
    held_out = parse_fold(fold)
    training_data = folders.load_training_data(
        noise, other_birds=other_birds, soundscape_labels=soundscape_labels
    )
    with _report_interruption():
        options = AblationOptions(
            budget_seconds=60 * minutes,
            n_seeds=seeds,
            folds=None if held_out is None else (held_out,),
            reference=reference,
            training=RunOptions(workers=workers, jobs=jobs, init=init, progress=True),
        )
        ablation = ablate(chosen, training_data, folder, options)
    page = describe_ablation(ablation, shlex.join(["birdcall", *sys.argv[1:]]))
    ablation.write_tables(folder)
    save_figure(plot_ablation(ablation), folder / "ablation.png")
    write_atomically(folder / "ablation.md", page)
    typer.echo(page)
