"""Draw figures for print, in one style: folds, recall, soundscapes, the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from birdcall.config import SEGMENT_SECONDS
from birdcall.report.html import MAX_HZ, SAMPLE_RATE, describe_scale, draw_spectrogram
from birdcall.storage.files import UserError, atomic_path
from birdcall.taxonomy import display_name

# --- style ----------------------------------------------------------------------------------------

# The colours of Okabe and Ito, which the colour-blind can tell apart; markers and dashes differ
# as well.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, GREY = "#56B4E9", "#E69F00", "#595959"
COLORS = (BLUE, GREEN, PURPLE, ORANGE, SKY, AMBER)
MARKERS = ("o", "s", "^", "v", "D", "P")
_DOTS_PER_INCH = 110

_STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": _DOTS_PER_INCH,
    "savefig.dpi": _DOTS_PER_INCH,
    "svg.hashsalt": "birdcall",  # the same figure is the same file
    "svg.fonttype": "none",  # text stays text, for search and for screen readers
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure in the project's style; the size is in inches."""
    mpl.rcParams.update(_STYLE)
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the same figure makes the same bytes."""
    options = {
        ".svg": {"metadata": {"Date": None}},
        # As PNG, a spectrogram's noise would be eight times as large.
        ".webp": {"pil_kwargs": {"quality": 80}},
    }.get(path.suffix, {"metadata": {"Software": None}})
    with atomic_path(path) as temporary:
        figure.savefig(temporary, **options)


def write_figures(folder: Path, figures: Mapping[str, Callable[[], Figure]]) -> Iterator[str]:
    """Write figures into ``folder`` by file name; yield a line on each file.

    A function that draws a figure raises FileNotFoundError or UserError where its input is missing:
    then the line gives this reason.
    """
    for name, draw in figures.items():
        try:
            figure = draw()
        except (FileNotFoundError, UserError) as error:
            yield f"{error}; {name} was not written"
            continue
        path = folder / name
        save_figure(figure, path)
        yield f"{path}: {path.stat().st_size / 1000:.0f} kB"


def plot_table(path: Path, plot: Callable[[pd.DataFrame], Figure]) -> Figure:
    """Draw the table of a benchmark; raise FileNotFoundError where it was not measured yet."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `birdcall benchmark {path.stem}` writes it")
    return plot(pd.read_csv(path))


# --- data and evaluation --------------------------------------------------------------------------

SHOWN_SECONDS = 60  # of a soundscape


def plot_folds(shares: pd.DataFrame, sizes: pd.Series, report: pd.DataFrame) -> Figure:
    """Draw each species' share in each fold against an equal share, and the folds' recordists.

    shares: of each species (rows) in each fold (columns), as `folds.class_shares` returns them;
    sizes: recordings of each species; report: as `folds.fold_report` returns it.
    """
    sizes = sizes.reindex(shares.index)
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    for index, fold in enumerate(shares.columns):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        left.scatter(
            sizes, shares[fold], s=18, alpha=0.7, color=color, marker=marker, label=f"fold {fold}"
        )
    left.axhline(1 / len(shares.columns), color="black", linewidth=1, label="equal share")
    left.set(xscale="log", xlabel="recordings of the species", ylabel="share in the fold")
    left.set_title(f"Shares of {len(shares)} species in the folds", loc="left")
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
    """Draw the recall of simulated events over the SNR in the frequency band of the bird."""
    figure = new_figure(6.5, 4)
    axes = figure.add_subplot()
    centre, error = table["centre_db"], table["standard_error"]
    axes.errorbar(centre, table["recall"], yerr=error, marker="o", color=BLUE, capsize=3)
    for x, y, n_events in zip(centre, table["recall"], table["events"], strict=True):
        axes.annotate(f"{n_events}", (x, y), (6, -12), textcoords="offset points", fontsize=9)
    axes.set(xlabel="SNR in the bird's frequency band, dB", ylabel="recall of events", ylim=(0, 1))
    axes.grid(visible=True)
    return figure


def plot_soundscape(
    waveform: np.ndarray,
    *,
    codes: Sequence[str],
    truth: np.ndarray,
    predicted: np.ndarray,
    probability: np.ndarray,
) -> Figure:
    """Draw a minute of a soundscape: spectrogram, framewise probability, truth and predictions.

    waveform: ``(samples,)`` at `html.SAMPLE_RATE`. codes: the species that are shown. truth,
    predicted: ``(segments, species)``. probability: ``(species, steps)`` of the same time, steps of
    a frame or a segment; each species is drawn up to its highest, which stands beside its name.
    """
    n_rows = len(truth)
    figure = new_figure(12, 4 + 0.3 * len(codes))
    top, bottom = figure.subplots(2, 1, sharex=True)
    waveform = waveform[: SHOWN_SECONDS * SAMPLE_RATE]
    top.imshow(
        draw_spectrogram(waveform), aspect="auto", cmap="magma",
        extent=(0, len(waveform) / SAMPLE_RATE, 0, MAX_HZ / 1000),
    )  # fmt: skip
    top.set(ylabel="kHz", ylim=(0, 12))
    highest = np.maximum(probability.max(axis=1, keepdims=True), 1e-9)
    image = bottom.imshow(
        probability / highest, aspect="auto", cmap="cividis", vmin=0, vmax=1,
        extent=(0, SEGMENT_SECONDS * n_rows, len(codes), 0), interpolation="nearest",
    )  # fmt: skip
    left = SEGMENT_SECONDS * np.arange(n_rows)
    for row, line in zip(*np.nonzero(truth), strict=True):
        corner = (left[row], line)
        bottom.add_patch(Rectangle(corner, SEGMENT_SECONDS, 1, fill=False, ec="white", lw=2))
    for row, line in zip(*np.nonzero(predicted), strict=True):
        centre = left[row] + SEGMENT_SECONDS / 2
        bottom.plot(centre, line + 0.5, "o", ms=6, mfc="w", mec="k")
    names = [
        f"{display_name(code)}, {describe_scale(top)}"
        for code, top in zip(codes, highest[:, 0], strict=True)
    ]
    bottom.set_yticks(np.arange(len(codes)) + 0.5, names)
    bottom.set(xlabel="seconds", title="Probability. White frame: true. Dot: predicted.")
    figure.colorbar(image, ax=bottom, pad=0.01, label="share of the row's highest")
    return figure


# --- the pipeline ---------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A step of the pipeline, drawn as a box.

    command: of `birdcall`. module: where its code is. output: what it writes. after: names of the
    steps whose output it reads. position: column and row.
    """

    name: str
    command: str
    module: str
    output: str
    after: tuple[str, ...]
    position: tuple[int, int]
    color: str


# fmt: off
STEPS = (
    _Step(
        name="get data", command="demo", module="demo",
        output="train.csv, mp3", after=(),
        position=(0, 0), color=GREY,
    ),
    _Step(
        name="check recordings", command="audit", module="data.audit",
        output="audit.csv, cache", after=("get data",),
        position=(1, 0), color=BLUE,
    ),
    _Step(
        name="split into folds", command="folds", module="data.folds",
        output="folds/<name>.csv", after=("check recordings",),
        position=(2, 0), color=BLUE,
    ),
    _Step(
        name="train", command="train", module="training",
        output="model.safetensors", after=("split into folds",),
        position=(3, 0), color=GREEN,
    ),
    _Step(
        name="compare", command="ablate", module="evaluation.ablation",
        output="ablation.md", after=("train",),
        position=(4, 0), color=GREEN,
    ),
    _Step(
        name="score and decide", command="evaluate", module="evaluation",
        output="decision.json, report", after=("train",),
        position=(3, 1), color=AMBER,
    ),
    _Step(
        name="package, dry run", command="package", module="kaggle.packaging",
        output="kernels/build", after=("score and decide",),
        position=(2, 1), color=PURPLE,
    ),
    _Step(
        name="submit", command="predict --data", module="kaggle.submission",
        output="submission.csv", after=("package, dry run",),
        position=(1, 1), color=PURPLE,
    ),
    _Step(
        name="predict recordings", command="predict --view", module="prediction",
        output="tables, pages, Raven", after=("package, dry run",),
        position=(2, 2), color=PURPLE,
    ),
    _Step(
        name="use elsewhere", command="export", module="inference.windows",
        output="model.onnx", after=("train",),
        position=(4, 1), color=GREY,
    ),
)
# fmt: on
_BOX_WIDTH, _BOX_HEIGHT = 1.0, 0.62
_COLUMN_WIDTH, _ROW_HEIGHT = 1.28, 1.0


def plot_pipeline() -> Figure:
    """Draw `STEPS` as boxes, with an arrow from each step to the steps that read its output."""
    figure = new_figure(13.5, 5.2)
    axes = figure.add_subplot()
    corners = {}
    for step in STEPS:
        column, row = step.position
        corners[step.name] = (column * _COLUMN_WIDTH, -row * _ROW_HEIGHT)
    for step in STEPS:
        _draw_step(axes, step, corners[step.name])
        for name in step.after:
            _draw_arrow(axes, corners[name], corners[step.name])
    n_columns = 1 + max(step.position[0] for step in STEPS)
    n_rows = 1 + max(step.position[1] for step in STEPS)
    axes.set_xlim(-0.05, (n_columns - 1) * _COLUMN_WIDTH + _BOX_WIDTH + 0.05)
    axes.set_ylim(-(n_rows - 1) * _ROW_HEIGHT - 0.05, _BOX_HEIGHT + 0.05)
    axes.axis("off")
    return figure


def _draw_step(axes: Axes, step: _Step, corner: tuple[float, float]) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=0.04", "fc": "white", "lw": 2.5}
    axes.add_patch(FancyBboxPatch(corner, _BOX_WIDTH, _BOX_HEIGHT, ec=step.color, **style))
    x, y = corner[0] + _BOX_WIDTH / 2, corner[1]
    centred = {"ha": "center", "va": "center"}
    axes.text(x, y + 0.51, step.name, fontsize=12, weight="bold", **centred)
    small = centred | {"fontsize": 9}
    axes.text(x, y + 0.37, f"birdcall {step.command}", family="monospace", **small)
    axes.text(x, y + 0.24, step.module, family="monospace", color=GREY, **small)
    axes.text(x, y + 0.11, f"→ {step.output}", **small)


def _draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw from box to box: along a row, or downwards."""
    (x, y), (to_x, to_y) = start, end
    side = (to_x > x) - (to_x < x)
    if y == to_y:
        tail = (x + _BOX_WIDTH if side > 0 else x, y + _BOX_HEIGHT / 2)
        tip = (to_x if side > 0 else to_x + _BOX_WIDTH, y + _BOX_HEIGHT / 2)
    else:
        tail = (x + _BOX_WIDTH / 2 + 0.3 * side, y)
        tip = (to_x + _BOX_WIDTH / 2 - 0.3 * side, to_y + _BOX_HEIGHT)
    arrow = {"arrowstyle": "-|>", "color": GREY, "lw": 2, "shrinkA": 2, "shrinkB": 2}
    axes.annotate("", tip, tail, arrowprops=arrow)
