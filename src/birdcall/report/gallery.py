"""Make the figures of README and docs, each from what commands have left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure

from birdcall.audio.reading import read_audio
from birdcall.benchmark import frontend, loader
from birdcall.config import Experiment
from birdcall.report.architecture import plot_architecture
from birdcall.report.plots import (
    SHOWN_SECONDS,
    plot_pipeline,
    plot_recall_over_snr,
    plot_soundscape,
)
from birdcall.report.style import BLUE, GREY, ORANGE, save_figure, use_style

if TYPE_CHECKING:
    from birdcall.evaluation.scoring import Evaluation

SAMPLE_RATE = 32_000


def write_figures(
    folder: Path,
    output: Path,
    experiment: Experiment,
    evaluation: Callable[[], Evaluation],
    n_classes: int = 264,
) -> Iterator[str]:
    """Write all figures into ``folder``; yield a line on each, or on what is missing for it.

    ``output``: of a data set; ``evaluation`` is asked once, and raises FileNotFoundError where
    nothing is trained yet.
    """
    yield _write(plot_pipeline(), folder / "road.svg")
    yield _write(plot_architecture(experiment, n_classes), folder / "architecture.svg")
    for name, plot in BENCHMARKS.items():
        table = output / "benchmark" / f"{name}.csv"
        if table.is_file():
            yield _write(plot(pd.read_csv(table)), folder / f"{name}.svg")
        else:
            yield f"{table} is missing: `birdcall benchmark {name}` makes it; no {name}.svg"
    try:
        found = evaluation()
    except FileNotFoundError as error:
        yield f"{error}; no snr.svg, no spectrogram.webp"
        return
    if found.snr is None:
        yield "no decision could be chosen on simulated soundscapes; no snr.svg"
    else:
        yield _write(plot_recall_over_snr(found.snr), folder / "snr.svg")
    if found.labelled is None:
        yield "there are no labelled soundscapes; no spectrogram.webp"
    else:
        yield _write(_spectrogram(found), folder / "spectrogram.webp")


def _write(figure: Figure, path: Path) -> str:
    save_figure(figure, path)
    return f"{path}: {path.stat().st_size / 1000:.0f} kB"


def _spectrogram(found: Evaluation) -> Figure:
    """Draw the minute with most birds of the labelled soundscapes."""
    labelled = found.labelled
    scores = labelled.predictions
    shown = scores.segments["seconds"].to_numpy() <= SHOWN_SECONDS
    n_birds = pd.Series(scores.truth[shown].sum(axis=1))
    recording = n_birds.groupby(scores.segments["recording"][shown].to_numpy()).sum().idxmax()
    waveform = read_audio(labelled.paths[recording], SAMPLE_RATE)
    heard = labelled.frames.get(recording)
    frames = None if heard is None else heard.frames
    return plot_soundscape(
        waveform,
        SAMPLE_RATE,
        scores=scores,
        recording=recording,
        decision=found.decision,
        frames=frames,
    )


def plot_inference(table: pd.DataFrame) -> Figure:
    """Draw how much faster than real time a hearing is, from `benchmark_inference`'s table."""
    use_style()
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{n} member{'s' if n > 1 else ''}" for n in table["members"]]
    for order, (column, label, color, hatch) in enumerate(
        (
            ("naive_x_real_time", "naive public kernel", GREY, ""),
            ("x_real_time", "birdcall", BLUE, "//"),
            ("model_alone_x_real_time", "the networks alone", ORANGE, ".."),
        )
    ):
        places = [row + 0.27 * (1 - order) for row in range(len(table))]
        bars = axes.barh(
            places, table[column], 0.25, color=color, label=label, hatch=hatch, ec="white"
        )
        axes.bar_label(bars, [f"{value:,.0f} ×" for value in table[column]], padding=4)
    axes.set_yticks(range(len(table)), names)
    axes.margins(x=0.15)
    axes.set_xlabel("× real time, from mp3 to probabilities")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


BENCHMARKS: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "frontend": frontend.plot_frontend_speed,
    "loader": loader.plot_loader_speed,
    "inference": plot_inference,
}
