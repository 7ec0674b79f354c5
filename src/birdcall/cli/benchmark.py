"""The commands of `birdcall benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from birdcall.cli.options import Data, Folders, Folds, Output

commands = typer.Typer()


@commands.command("frontend")
def _frontend(
    data: Data,
    output: Output = None,
    n_clips: Annotated[int, typer.Option(min=1, help="Number of five-second clips.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 5,
) -> None:
    """Time log-mel spectrograms of librosa, torchlibrosa, nnAudio and birdcall, on CPU and GPU."""
    from birdcall.benchmark.frontend import benchmark_frontend

    folder = Folders(data, output).benchmark
    table = benchmark_frontend(data, folder, n_clips=n_clips, repeats=repeats)
    typer.echo(table.to_string(index=False))


@commands.command("loader")
def _loader(
    data: Data,
    output: Output = None,
    recordings: Annotated[
        int | None,
        typer.Option(min=1, help="Write this many mp3 files to --data first.", show_default="none"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of each written mp3 file.")] = 60.0,
    n_clips: Annotated[int, typer.Option(min=1, help="Number of clips in an epoch.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 3,
) -> None:
    """Time reading clips: librosa, a seek, the cache, and the loader with its workers."""
    from birdcall.benchmark.loader import benchmark_loader, make_recordings

    if recordings is not None:
        make_recordings(data, recordings, seconds)
    table = benchmark_loader(
        data,
        Folders(data, output).benchmark,
        n_recordings=recordings or 200,
        n_clips=n_clips,
        repeats=repeats,
    )
    typer.echo(table.to_string(index=False))


@commands.command("training")
def _training(
    data: Data,
    experiment: Annotated[str, typer.Option(help="Name of an experiment.")] = "small_gru",
    output: Output = None,
    folds: Folds = None,
    n_steps: Annotated[int, typer.Option(min=1, help="Steps per repetition.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 5,
) -> None:
    """Time training steps with loading and augmentation, and on clips that are in memory."""
    from birdcall.benchmark.training import benchmark_training
    from birdcall.experiments import find_experiment

    folders = Folders(data, output, folds)
    table = benchmark_training(
        folders.load_training_data(),
        find_experiment(experiment),
        folders.benchmark,
        n_steps=n_steps,
        repeats=repeats,
    )
    typer.echo(table.to_string(index=False))


@commands.command("evaluation")
def _evaluation(
    output: Annotated[Path, typer.Option(help="Folder for random predictions and results.")] = Path(
        "output/benchmark-evaluation"
    ),
    soundscapes: Annotated[int, typer.Option(min=2, help="Number of soundscapes.")] = 150,
    seconds: Annotated[float, typer.Option(help="Length of each soundscape.")] = 600.0,
    classes: Annotated[int, typer.Option(min=2, help="Number of species.")] = 264,
    members: Annotated[int, typer.Option(min=1, help="Number of members.")] = 5,
) -> None:
    """Time an evaluation of stored predictions in a new process, and measure its memory."""
    from birdcall.benchmark.training import benchmark_evaluation

    table = benchmark_evaluation(
        output, n_soundscapes=soundscapes, seconds=seconds, n_classes=classes, n_members=members
    )
    typer.echo(table.to_string(index=False))


@commands.command("inference")
def _inference(
    data: Data,
    output: Output = None,
    members: Annotated[int, typer.Option(min=1, help="Members of the larger ensemble.")] = 5,
    minutes: Annotated[
        float, typer.Option(help="Minutes of audio for each implementation.")
    ] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 3,
) -> None:
    """Time inference from file to prediction, one member and several, and the naive kernel."""
    from birdcall.benchmark.inference import benchmark_inference

    table = benchmark_inference(
        data,
        Folders(data, output).benchmark,
        n_members=members,
        minutes=minutes,
        repeats=repeats,
    )
    typer.echo(table.T.to_string(header=False))


@commands.command("memory")
def _memory(
    data: Data,
    output: Output = None,
    hours: Annotated[float, typer.Option(help="Length of the long recording.")] = 24.0,
) -> None:
    """Measure the memory that inference takes for a recording of 10 minutes and a long one."""
    from birdcall.benchmark.scale import benchmark_memory

    folder = Folders(data, output).benchmark
    table = benchmark_memory(data, folder, long_seconds=3600 * hours)
    typer.echo(table.to_string(index=False))


@commands.command("scale")
def _scale(
    data: Data,
    output: Output = None,
    hours: Annotated[float, typer.Option(help="Hours of audio in the archive.")] = 1e6,
    workers: Annotated[int, typer.Option(min=1, help="Workers of two cores each.")] = 200,
    failures: Annotated[float, typer.Option(help="Failures of each worker per day.")] = 1.0,
    members: Annotated[int, typer.Option(min=1, help="Members that predict the archive.")] = 5,
) -> None:
    """Estimate the time for the hidden test set and an archive, from `benchmark inference`."""
    from birdcall.benchmark.scale import Archive, benchmark_scale

    archive = Archive(hours=hours, n_workers=workers, failures_per_day=failures)
    hidden, estimate = benchmark_scale(Folders(data, output).benchmark, archive, members)
    typer.echo(hidden.to_string(index=False))
    typer.echo(estimate.T.to_string(header=False))
