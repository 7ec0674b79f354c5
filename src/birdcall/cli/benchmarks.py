"""Commands that measure birdcall itself, and its peers: `birdcall benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from birdcall.cli.options import Data, Folders, Folds, Labelled, Output

benchmarks = typer.Typer(help="Measure birdcall and its peers.", no_args_is_help=True)


@benchmarks.command("frontend")
def _benchmark_frontend(
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


@benchmarks.command("loader")
def _benchmark_loader(
    data: Data,
    output: Output = None,
    recordings: Annotated[
        int | None,
        typer.Option(min=1, help="Write this many mp3 files to --data first.", show_default="none"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=5.1, help="Length of each written mp3 file, with --recordings.")
    ] = 60.0,
    n_clips: Annotated[int, typer.Option(min=1, help="Number of clips in an epoch.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 3,
) -> None:
    """Time reading clips: librosa, a seek, the cache, and the loader with its workers."""
    from birdcall.benchmark.frontend import make_recordings
    from birdcall.benchmark.loader import benchmark_loader

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


@benchmarks.command("training")
def _benchmark_training(
    data: Data,
    experiment: Annotated[str, typer.Option(help="Name of an experiment.")] = "small_gru",
    output: Output = None,
    folds: Folds = None,
    n_steps: Annotated[int, typer.Option(min=1, help="Steps per repetition.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 5,
) -> None:
    """Time training steps with loading and augmentation, and on clips that are in memory."""
    from birdcall.benchmark.loader import benchmark_training
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


@benchmarks.command("evaluation")
def _benchmark_evaluation(
    output: Annotated[Path, typer.Option(help="Folder for random predictions and results.")] = Path(
        "output/benchmark-evaluation"
    ),
    n_soundscapes: Annotated[int, typer.Option(min=2, help="Number of soundscapes.")] = 150,
    seconds: Annotated[float, typer.Option(min=5, help="Length of each soundscape.")] = 600.0,
    classes: Annotated[int, typer.Option(min=2, help="Number of species.")] = 264,
    members: Annotated[int, typer.Option(min=1, help="Number of members.")] = 5,
) -> None:
    """Time an evaluation of stored predictions in a new process, and measure its memory."""
    from birdcall.benchmark.scale import benchmark_evaluation

    table = benchmark_evaluation(
        output, n_soundscapes=n_soundscapes, seconds=seconds, n_classes=classes, n_members=members
    )
    typer.echo(table.to_string(index=False))


@benchmarks.command("inference")
def _benchmark_inference(
    data: Data,
    output: Output = None,
    members: Annotated[int, typer.Option(min=1, help="Members of the larger ensemble.")] = 5,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Minutes of audio for each implementation.")
    ] = 10.0,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 3,
    bfloat16: Annotated[
        bool, typer.Option("--bfloat16", help="By OpenVINO, in bfloat16, where that is possible.")
    ] = False,
) -> None:
    """Time inference from file to prediction, one member and several, and the naive kernel."""
    from birdcall.benchmark.inference import benchmark_inference

    table = benchmark_inference(
        data,
        Folders(data, output).benchmark,
        n_members=members,
        minutes=minutes,
        repeats=repeats,
        in_bfloat16=bfloat16,
    )
    typer.echo(table.T.to_string(header=False))


@benchmarks.command("peers")
def _benchmark_peers(
    data: Data,
    output: Output = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of a trained run.", show_default="the first of the data's runs"),
    ] = None,
    soundscapes: Labelled = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes of audio that are timed.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 5,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Probability from which a class is predicted.")
    ] = 0.5,
) -> None:
    """Measure a run beside torch, librosa, opensoundscape and BirdNET: speed, memory, scores."""
    from birdcall.benchmark.peers import benchmark_peers
    from birdcall.training.log import find_runs

    folders = Folders(data, output)
    table = benchmark_peers(
        data,
        run or find_runs(folders.runs)[0],
        folders.benchmark,
        soundscapes=soundscapes or (),
        minutes=minutes,
        repeats=repeats,
        threshold=threshold,
    )
    typer.echo(table.to_string(index=False, na_rep=""))


@benchmarks.command("memory")
def _benchmark_memory(
    data: Data,
    output: Output = None,
    hours: Annotated[float, typer.Option(min=0.2, help="Length of the long recording.")] = 24.0,
) -> None:
    """Measure the memory that inference takes for a recording of 10 minutes and a long one."""
    from birdcall.benchmark.inference import benchmark_memory

    folder = Folders(data, output).benchmark
    table = benchmark_memory(data, folder, long_seconds=3600 * hours)
    typer.echo(table.to_string(index=False))


@benchmarks.command("scale")
def _benchmark_scale(
    data: Data,
    output: Output = None,
    hours: Annotated[float, typer.Option(min=0.1, help="Hours of audio in the archive.")] = 1e6,
    workers: Annotated[int, typer.Option(min=1, help="Workers of two cores each.")] = 200,
    failures: Annotated[float, typer.Option(min=0, help="Failures of each worker per day.")] = 1.0,
    members: Annotated[int, typer.Option(min=1, help="Members that predict the archive.")] = 5,
) -> None:
    """Estimate the time for the hidden test set and an archive, from `benchmark inference`."""
    from birdcall.benchmark.scale import Archive, benchmark_scale

    archive = Archive(hours=hours, n_workers=workers, failures_per_day=failures)
    hidden, estimate = benchmark_scale(Folders(data, output).benchmark, archive, members)
    typer.echo(hidden.to_string(index=False))
    typer.echo(estimate.T.to_string(header=False))


@benchmarks.command("labels")
def _benchmark_labels(
    annotations: Annotated[int, typer.Option(min=1, help="Number of annotations.")] = 100_000,
    recordings: Annotated[int, typer.Option(min=1, help="Number of recordings.")] = 300,
    hours: Annotated[float, typer.Option(min=0.1, help="Hours of sound, of all together.")] = 300.0,
) -> None:
    """Time reading annotations of soundscapes and matching them to segments; measure the memory."""
    from tempfile import TemporaryDirectory

    from birdcall.benchmark.scale import benchmark_labels

    with TemporaryDirectory() as folder:
        table = benchmark_labels(Path(folder) / "labels", annotations, recordings, hours)
    typer.echo(table.to_string(index=False))


@benchmarks.command("season")
def _benchmark_season(
    data: Data,
    output: Output = None,
    names: Annotated[
        Path | None,
        typer.Option(
            help="CSV of the season's recordings: filename, ebird_code, background_codes.",
            show_default="43,934 names are made up",
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="Numbers of recordings that are measured.")
    ] = "10000,22000,43934",
    script: Annotated[Path, typer.Option(help="Script of the kernel.")] = Path(
        "kernels/submission/submission.py"
    ),
) -> None:
    """Measure all steps for a whole season's recordings: time, memory, disk; is it linear?

    The sound of --data is repeated under all names, a second of it in each, never the same.
    """
    from birdcall.benchmark.season import benchmark_season

    parts = sizes.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--sizes is {sizes!r}; give numbers such as 10000,22000")
    if not script.is_file():  # the last step needs it, after hours
        raise FileNotFoundError(f"{script}: no such script of the kernel; give --script")
    table, machines = benchmark_season(
        *(data, Folders(data, output).benchmark, script),
        names=names,
        sizes=[int(part) for part in parts],
    )
    typer.echo(table.to_string(index=False))
    if machines is not None:
        typer.echo(machines.T.to_string(header=False))
