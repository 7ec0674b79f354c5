"""Draw what a model is made of: every stage with its measured shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from birdcall.config import Experiment, require
from birdcall.models.sed import build_model
from birdcall.models.summary import Stage, trace_stages
from birdcall.report.style import AMBER, GREEN, GREY, PURPLE, SKY, use_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "input": GREY,
    "front end": AMBER,
    "backbone": SKY,
    "temporal layer": GREEN,
    "head": PURPLE,
}
MAX_SHEETS = 6


def plot_architecture(experiment: Experiment, n_classes: int, seconds: float = 5.0) -> Figure:
    """Draw the model of ``experiment`` from top to bottom, as it hears one clip of ``seconds``.

    The model is built, with random weights, and run: every shape in the figure was measured.
    """
    from matplotlib.figure import Figure

    require(seconds > 0, f"seconds is {seconds}; it must be above 0")
    use_style()
    n_samples = round(seconds * experiment.frontend.sample_rate)
    with torch.random.fork_rng(devices=[]):
        model = build_model(experiment, n_classes)
    stages = trace_stages(model, torch.zeros(1, n_samples))
    figure = Figure(figsize=(10.5, 0.6 * len(stages) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    for row, stage in enumerate(stages):
        _draw_stage(axes, stage, row, is_new=row == 0 or stages[row - 1].part != stage.part)
    axes.set(xlim=(0, 10), ylim=(len(stages) - 0.4, -1.0))
    axes.axis("off")
    for x, text, align in HEADINGS:
        axes.text(x, -0.75, text, ha=align, va="center", color="#555555", fontsize=10)
    n_weights = sum(stage.n_weights for stage in stages)
    axes.set_title(
        f"{experiment.name}: {seconds:g} s in, {n_classes} classes out, {n_weights:,} weights",
        loc="left", fontsize=12,
    )  # fmt: skip
    return figure


# x, text and its alignment
HEADINGS = (
    (0.16, "part", "left"),
    (1.65, "what leaves it", "left"),
    (5.0, "drawn, log scales", "center"),
    (6.2, "shape, one clip", "left"),
    (10.0, "weights", "right"),
)


def _draw_stage(axes: Axes, stage: Stage, row: int, *, is_new: bool) -> None:
    color = COLORS[stage.part]
    axes.barh(row, 0.08, left=0.0, height=1.0, color=color)
    if is_new:
        axes.text(0.16, row, stage.part, va="center", fontsize=11, fontweight="bold")
    axes.text(1.65, row, stage.name, va="center", fontsize=11)
    _draw_tensor(axes, stage, row, color)
    sizes = zip(stage.shape[1:], stage.axes, strict=True)
    text = " × ".join(f"{size:,} {axis if size > 1 else axis[:-1]}" for size, axis in sizes)
    axes.text(6.2, row, text, va="center", fontsize=10)
    if stage.n_weights:
        axes.text(10.0, row, f"{stage.n_weights:,}", va="center", ha="right", fontsize=10)


def _draw_tensor(axes: Axes, stage: Stage, row: int, color: str) -> None:
    """Draw time to the right and frequency upwards, and a sheet for every fourfold of channels."""
    from matplotlib.patches import Rectangle

    size = dict(zip(stage.axes, stage.shape[1:], strict=True))
    n_frames = size.get("frames", size.get("samples", 1))
    n_bins = max(size.get("mel bins", 1), size.get("frequencies", 1))
    width, height = 0.1 + 1.6 * _log_share(n_frames), 0.06 + 0.5 * _log_share(n_bins)
    n_sheets = min(MAX_SHEETS, 1 + (size.get("channels", 1).bit_length() - 1) // 2)
    for sheet in reversed(range(n_sheets)):
        shift = sheet - (n_sheets - 1) / 2
        corner = (5.0 - width / 2 + 0.06 * shift, row - height / 2 - 0.045 * shift)
        axes.add_patch(Rectangle(corner, width, height, fc=color, ec="white", lw=0.8))


def _log_share(size: int) -> float:
    return min(1.0, math.log2(size) / 9)  # 512 frames or frequencies fill the width or height
