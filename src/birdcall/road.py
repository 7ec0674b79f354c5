"""Draw the road from data to submission: each step with its command, its module, what it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from birdcall.style import AMBER, BLUE, GREEN, GREY, PURPLE, use_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def plot_road() -> Figure:
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
