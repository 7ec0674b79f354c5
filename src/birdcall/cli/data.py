"""Commands from the data to its folds: demo, audit, folds."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from birdcall.cli.options import Data, Folders, Folds, Output

commands = typer.Typer()

_Workers = Annotated[int, typer.Option(min=0, help="Processes that decode recordings.")]
_WORKERS = max(2, min(9, os.cpu_count() or 2))


@commands.command("demo")
def _demo(
    context: typer.Context,
    data: Data,
    seed: Annotated[int, typer.Option(help="Another seed gives other songs and recordings.")] = 0,
    workers: _Workers = _WORKERS,
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
