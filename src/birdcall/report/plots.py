"""Draw what an evaluation found, for print: the report's charts are in `charts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from birdcall.audio.frontend import Spectrogram
from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.tables import SNR_STEP_DB
from birdcall.inference.decision import Decision, average_members
from birdcall.inference.windows import FRAMES_PER_SEGMENT
from birdcall.report.style import (
    AMBER,
    BLUE,
    COLORS,
    GREEN,
    GREY,
    HEAT,
    MARKERS,
    ORANGE,
    PURPLE,
    SOUND,
    use_style,
)
from birdcall.taxonomy import display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_SECONDS = 60


def plot_folds(shares: pd.DataFrame, sizes: pd.Series, report: pd.DataFrame) -> Figure:
    """Draw each species' share in each fold against an equal share, and the folds' recordists.

    shares: of each species (rows) in each fold (columns), as `folds.class_shares` returns them;
    sizes: recordings of each species; report: as `folds.fold_report` returns it.
    """
    use_style()
    sizes = sizes.reindex(shares.index)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    for order, fold in enumerate(shares.columns):
        color, marker = COLORS[order % len(COLORS)], MARKERS[order % len(MARKERS)]
        left.scatter(
            sizes, shares[fold], s=18, alpha=0.7, color=color, marker=marker, label=f"fold {fold}"
        )
    left.axhline(1 / len(shares.columns), color="black", linewidth=1, label="equal share")
    left.set(xscale="log", xlabel="recordings of the species", ylabel="share in the fold")
    left.set_title(f"{len(shares)} species: how evenly each is divided", loc="left")
    left.legend(fontsize="small")
    names = [str(fold) for fold in report.index]
    right.bar(names, report["recordings"], color="0.8", label="all")
    largest = report["recordings"] * report["largest_recordist"]
    right.bar(
        names, largest, color=ORANGE, hatch="//", ec="white", label="by the largest recordist"
    )
    right.set(xlabel="fold", ylabel="recordings", ylim=(0, 1.25 * report["recordings"].max()))
    right.legend(fontsize="small")
    return figure


def plot_recall_over_snr(table: pd.DataFrame) -> Figure:
    """Draw the recall of simulated events over their SNR in the bird's own band."""
    use_style()
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    centre = table["snr_db"] + SNR_STEP_DB / 2
    error = table["standard_error"]
    axes.errorbar(centre, table["recall"], yerr=error, marker="o", color=BLUE, capsize=3)
    for x, y, n_events in zip(centre, table["recall"], table["events"], strict=True):
        axes.annotate(f"{n_events}", (x, y), (6, -12), textcoords="offset points", fontsize=9)
    axes.set(xlabel="SNR in the bird's band, dB", ylabel="events found", ylim=(0, 1))
    axes.grid(visible=True)
    return figure


def plot_soundscape(
    waveform: np.ndarray,
    sample_rate: int,
    scores: LabelledPredictions,
    recording: str,
    decision: Decision,
    frames: np.ndarray | None = None,
) -> Figure:
    """Draw a minute of a soundscape: spectrogram, framewise probability, truth and labels.

    frames: ``(classes, frames of the recording)``; without them each row has its highest.
    """
    whole = scores.select((scores.segments["recording"] == recording).to_numpy())
    n_rows = min(len(whole.segments), SHOWN_SECONDS // SEGMENT_SECONDS)
    everything = np.zeros((len(whole.segments), whole.truth.shape[1]), dtype=bool)
    everything[whole.labelled] = whole.decide(decision)
    n_classes = len(scores.classes)
    chosen, truth = everything[:n_rows, :n_classes], whole.truth[:n_rows, :n_classes]
    framewise = average_members(whole.framewise)[:n_rows]
    shown = np.flatnonzero(truth.any(axis=0) | chosen.any(axis=0))
    if not len(shown):
        shown = np.argsort(-framewise.max(axis=0))[:3]
    use_style()
    figure = Figure(figsize=(12, 4 + 0.3 * len(shown)), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _draw_spectrogram(top, waveform[: SHOWN_SECONDS * sample_rate], sample_rate)
    heat = framewise[:, shown].T
    if frames is not None and frames.shape[1]:
        heat = frames[shown, : n_rows * FRAMES_PER_SEGMENT]
    image = bottom.imshow(
        heat, aspect="auto", cmap=HEAT, vmin=0, vmax=1,
        extent=(0, SEGMENT_SECONDS * n_rows, len(shown), 0), interpolation="nearest",
    )  # fmt: skip
    for row, line in zip(*np.nonzero(truth[:, shown]), strict=True):
        corner = (SEGMENT_SECONDS * row, line)
        bottom.add_patch(Rectangle(corner, SEGMENT_SECONDS, 1, fill=False, ec="white", lw=2))
    for row, line in zip(*np.nonzero(chosen[:, shown]), strict=True):
        bottom.plot(SEGMENT_SECONDS * (row + 0.5), line + 0.5, "o", ms=6, mfc="w", mec="k")
    names = [display_name(scores.classes[place]) for place in shown]
    bottom.set_yticks(np.arange(len(shown)) + 0.5, names)
    bottom.set(xlabel="seconds", title="probability; frame: truth of a row, dot: label given to it")
    figure.colorbar(image, ax=bottom, pad=0.01)
    return figure


def _draw_spectrogram(axes: Axes, waveform: np.ndarray, sample_rate: int) -> None:
    power = Spectrogram(n_fft=1024, hop_length=640)(torch.from_numpy(waveform)[None])[0, 0].numpy()
    level = 10 * np.log10(np.maximum(power, 1e-10)).T
    axes.imshow(
        level, origin="lower", aspect="auto", cmap=SOUND, vmin=np.percentile(level, 20),
        extent=(0, len(waveform) / sample_rate, 0, sample_rate / 2000),
    )  # fmt: skip
    axes.set(ylabel="kHz", ylim=(0, 12))


# --- road ---


class Step(NamedTuple):
    """A step of the road. after: the steps whose results it takes; place: column and row."""

    name: str
    command: str
    module: str
    leaves: str
    after: tuple[str, ...]
    place: tuple[int, int]
    color: str


STEPS = (
    Step(
        name="make or get data",
        command="demo",
        module="demo",
        leaves="train.csv, mp3",
        after=(),
        place=(0, 0),
        color=GREY,
    ),
    Step(
        name="decode everything",
        command="audit",
        module="data.audit",
        leaves="audit.csv, cache",
        after=("make or get data",),
        place=(1, 0),
        color=BLUE,
    ),
    Step(
        name="split",
        command="folds",
        module="data.folds",
        leaves="folds/<name>.csv",
        after=("decode everything",),
        place=(2, 0),
        color=BLUE,
    ),
    Step(
        name="train",
        command="train",
        module="training",
        leaves="model.safetensors",
        after=("split",),
        place=(3, 0),
        color=GREEN,
    ),
    Step(
        name="compare",
        command="ablate",
        module="evaluation.ablation",
        leaves="ablation.md",
        after=("train",),
        place=(4, 0),
        color=GREEN,
    ),
    Step(
        name="score, decide",
        command="evaluate",
        module="evaluation",
        leaves="decision.json, report",
        after=("train",),
        place=(3, 1),
        color=AMBER,
    ),
    Step(
        name="stage, rehearse",
        command="package",
        module="packaging",
        leaves="kernels/build",
        after=("score, decide",),
        place=(2, 1),
        color=PURPLE,
    ),
    Step(
        name="submit",
        command="predict --data",
        module="submission",
        leaves="submission.csv",
        after=("stage, rehearse",),
        place=(1, 1),
        color=PURPLE,
    ),
    Step(
        name="listen",
        command="predict --view",
        module="prediction",
        leaves="tables, pages, Raven",
        after=("stage, rehearse",),
        place=(2, 2),
        color=PURPLE,
    ),
    Step(
        name="use elsewhere",
        command="export",
        module="export",
        leaves="model.onnx",
        after=("train",),
        place=(4, 1),
        color=GREY,
    ),
)
WIDTH, HEIGHT = 1.0, 0.62
COLUMN, ROW = 1.28, 1.0


def plot_pipeline() -> Figure:
    """Draw `STEPS` as boxes, with arrows from step to step."""
    use_style()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    corners = {step.name: _corner(step) for step in STEPS}
    for step in STEPS:
        _draw_step(axes, step)
        for other in step.after:
            _draw_arrow(axes, corners[other], corners[step.name])
    axes.set(xlim=(-0.05, 4 * COLUMN + WIDTH + 0.05), ylim=(-2 * ROW - 0.05, HEIGHT + 0.05))
    axes.axis("off")
    return figure


def _corner(step: Step) -> tuple[float, float]:
    column, row = step.place
    return column * COLUMN, -row * ROW


def _draw_step(axes: Axes, step: Step) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = _corner(step)
    axes.add_patch(
        FancyBboxPatch(
            (x, y), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.04", fc="white",
            ec=step.color, lw=2.5,
        )
    )  # fmt: skip
    middle = x + WIDTH / 2
    axes.text(middle, y + 0.51, step.name, ha="center", va="center", fontsize=12, weight="bold")
    lines = (f"birdcall {step.command}", step.module, f"→ {step.leaves}")
    for number, (text, family) in enumerate(
        zip(lines, ("monospace", "monospace", "sans-serif"), strict=True)
    ):
        axes.text(
            middle, y + 0.37 - 0.13 * number, text, ha="center", va="center", fontsize=9,
            family=family, color="black" if number != 1 else GREY,
        )  # fmt: skip


def _draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw from edge to edge: along a row, or down, or down to the side."""
    (x, y), (to_x, to_y) = start, end
    if y == to_y:
        begin = (x + WIDTH, y + HEIGHT / 2) if to_x > x else (x, y + HEIGHT / 2)
        stop = (to_x, to_y + HEIGHT / 2) if to_x > x else (to_x + WIDTH, to_y + HEIGHT / 2)
    else:
        side = (to_x > x) - (to_x < x)
        begin = (x + WIDTH / 2 + 0.3 * side, y)
        stop = (to_x + WIDTH / 2 - 0.3 * side, to_y + HEIGHT)
    axes.annotate(
        "", stop, begin, arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 2, "shrinkA": 2,
                                     "shrinkB": 2},
    )  # fmt: skip
