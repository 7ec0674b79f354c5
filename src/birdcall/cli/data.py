"""Commands that prepare a training: demo, audit, folds, labels and embeddings by models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

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

_Workers = Annotated[int, typer.Option(min=0, help="Processes that decode recordings.")]
_WORKERS = max(2, min(9, os.cpu_count() or 2))


@commands.command("demo")
def _demo(
    context: typer.Context,
    data: Data,
    seed: Annotated[int, typer.Option(help="Another seed gives other songs and recordings.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that write files.")] = _WORKERS,
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
    workers: _Workers = _WORKERS,
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
    from birdcall.training.log import find_runs
    from birdcall.training.pseudo_labels import write_pseudo_labels
    from birdcall.training.student import (
        describe_labels,
        label_soundscapes,
        write_labels_of_people,
    )

    if annotated and (soundscapes is None or experiment or birdnet):
        raise ValueError("--annotated takes labels from tables: give --soundscapes and no model")
    if birdnet and (soundscapes is None or experiment):
        raise ValueError("--birdnet labels soundscapes: give --soundscapes, and no --experiment")
    if soundscapes is None and labelled:
        raise ValueError("--labelled keeps --soundscapes apart: give both, or neither")
    if label_column is not None and not annotated:
        raise ValueError("--label-column is of the tables of --annotated: give both, or neither")
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
