"""Draw all figures in one style: readable in print, and by the colour-blind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from birdcall.storage.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, apart for every kind of sight; markers and dashes differ as well.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, GREY = "#56B4E9", "#E69F00", "#595959"
COLORS = (BLUE, GREEN, PURPLE, ORANGE, SKY, AMBER)
MARKERS = ("o", "s", "^", "v", "D", "P")
HEAT = "cividis"  # of tables; of spectrograms it is magma
SOUND = "magma"
DOTS_PER_INCH = 110

STYLE = {
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
    "figure.dpi": DOTS_PER_INCH,
    "savefig.dpi": DOTS_PER_INCH,
    "svg.hashsalt": "birdcall",  # the same figure is the same file
    "svg.fonttype": "none",  # text stays text: searchable, and read aloud
}


def use_style() -> None:
    """Let the figures that are drawn from now on have the project's style."""
    import matplotlib

    matplotlib.rcParams.update(STYLE)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all; the same figure makes the same bytes."""
    options = {
        ".svg": {"metadata": {"Date": None}},
        ".webp": {"pil_kwargs": {"quality": 80}},  # of noise a PNG would be eight times as large
    }.get(path.suffix, {"metadata": {"Software": None}})
    with atomic_path(path) as temporary:
        figure.savefig(temporary, **options)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure in the project's style; the size is in inches."""
    use_style()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
