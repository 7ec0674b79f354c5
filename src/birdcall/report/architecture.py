"""Draw how models and code are built: the stages of a network, and the layers of the package."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from birdcall.config import Experiment, require
from birdcall.models.sed import build_model
from birdcall.models.summary import Stage, trace_stages
from birdcall.report.plots import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, new_figure

_PART_COLORS = {
    "input": GREY,
    "front end": AMBER,
    "backbone": SKY,
    "temporal layer": GREEN,
    "head": PURPLE,
}
_MAX_SHEETS = 6


# --- the stages of a network ----------------------------------------------------------------------

# x, text and alignment of each column
_HEADINGS = (
    (0.16, "part", "left"),
    (1.65, "stage", "left"),
    (5.0, "output, log scales", "center"),
    (6.2, "shape, one clip", "left"),
    (10.0, "weights", "right"),
)


def plot_architecture(experiment: Experiment, n_classes: int, seconds: float = 5.0) -> Figure:
    """Draw the model of ``experiment`` from top to bottom, for one clip of ``seconds``.

    The model is built with random weights and run: every shape in the figure was measured.
    """
    require(seconds > 0, f"seconds is {seconds}; it must be above 0")
    n_samples = round(seconds * experiment.frontend.sample_rate)
    with torch.random.fork_rng(devices=[]):
        model = build_model(experiment, n_classes)
    stages = trace_stages(model, torch.zeros(1, n_samples))
    figure = new_figure(10.5, 0.6 * len(stages) + 1.1)
    axes = figure.add_subplot()
    for row, stage in enumerate(stages):
        if row == 0 or stages[row - 1].part != stage.part:
            axes.text(0.16, row, stage.part, va="center", fontsize=11, fontweight="bold")
        _draw_stage(axes, stage, row)
    axes.set(xlim=(0, 10), ylim=(len(stages) - 0.4, -1.0))
    axes.axis("off")
    for x, text, align in _HEADINGS:
        axes.text(x, -0.75, text, ha=align, va="center", color=GREY, fontsize=10)
    n_weights = sum(stage.n_weights for stage in stages)
    axes.set_title(
        f"{experiment.name}: {seconds:g} s in, {n_classes} classes out, {n_weights:,} weights"
    )
    return figure


def _draw_stage(axes: Axes, stage: Stage, row: int) -> None:
    """Draw a line of the figure. Time goes right, frequency up; sheets are channels, log scale."""
    color = _PART_COLORS[stage.part]
    axes.barh(row, 0.08, left=0.0, height=1.0, color=color)
    axes.text(1.65, row, stage.name, va="center", fontsize=11)
    size = dict(zip(stage.axes, stage.shape[1:], strict=True))
    n_frames = size.get("frames", size.get("samples", 1))
    n_bins = max(size.get("mel bins", 1), size.get("frequencies", 1))
    # 512 frames or frequencies fill the width or the height.
    width = 0.1 + 1.6 * min(1.0, math.log2(n_frames) / 9)
    height = 0.06 + 0.5 * min(1.0, math.log2(n_bins) / 9)
    # A sheet for every fourfold of channels.
    n_sheets = min(_MAX_SHEETS, 1 + (size.get("channels", 1).bit_length() - 1) // 2)
    for sheet in reversed(range(n_sheets)):
        shift = sheet - (n_sheets - 1) / 2
        corner = (5.0 - width / 2 + 0.06 * shift, row - height / 2 - 0.045 * shift)
        axes.add_patch(Rectangle(corner, width, height, fc=color, ec="white", lw=0.8))
    lengths = [f"{n:,} {axis if n > 1 else axis[:-1]}" for axis, n in size.items()]
    axes.text(6.2, row, " × ".join(lengths), va="center", fontsize=10)
    if stage.n_weights:
        axes.text(10.0, row, f"{stage.n_weights:,}", va="center", ha="right", fontsize=10)


# --- the layers of the package --------------------------------------------------------------------

_ROOT, _PACKAGING = "root", "kaggle: packaging"
# From top to bottom; a layer may import those below it. The modules `config`, `experiments` and
# `taxonomy` are the layer "root". `kaggle` has two halves: what the offline kernel imports, and
# what packages it.
LAYERS = (
    *("cli", "benchmark", "demo", "report", "evaluation", "prediction", _PACKAGING, "training"),
    *("data", "kaggle", "inference", "models", "audio", "storage", _ROOT),
)
_LOWEST_ABOVE_KERNEL = "data"
_INTERFACES = ("__init__", "__main__")  # of the package: with the layer `cli`


@dataclass(frozen=True)
class Layer:
    """A folder of the package: its size, and its import statements by imported layer."""

    name: str
    n_files: int
    n_lines: int
    imports: Counter[str]


def read_layers(package: Path) -> list[Layer]:
    """Read the layers of the package in this folder from its source files, in `LAYERS`' order."""
    texts = {}
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        texts[module.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    imports = {module: _imported_modules(text, texts) for module, text in texts.items()}
    layer_of = {module: _folder_of(module) for module in texts}
    above_kernel = LAYERS[: LAYERS.index(_LOWEST_ABOVE_KERNEL) + 1]
    has_changed = True
    while has_changed:  # a module that imports a packaging module is a packaging module too
        packaging = {
            module
            for module, layer in layer_of.items()
            if layer == "kaggle" and any(layer_of[name] in above_kernel for name in imports[module])
        }
        layer_of |= dict.fromkeys(packaging, _PACKAGING)
        has_changed = bool(packaging)
    layers = []
    for layer in LAYERS:
        modules = [module for module, name in layer_of.items() if name == layer]
        targets = [layer_of[name] for module in modules for name in imports[module]]
        n_lines = sum(texts[module].count("\n") for module in modules)
        layers.append(Layer(layer, len(modules), n_lines, Counter(targets)))
    return layers


def _folder_of(module: str) -> str:
    folder = module.split(".")[0]
    if folder in LAYERS:
        return folder
    return LAYERS[0] if folder in _INTERFACES else _ROOT


def _imported_modules(text: str, modules: Container[str]) -> list[str]:
    """Return the modules of the package that a source text imports, once per statement."""
    imported: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        ours = {str(name).removeprefix("birdcall.") for name in names}
        imported += sorted(name for name in ours if name in modules)
    return imported


_CELL, _LABEL_WIDTH = 0.62, 3.5  # inches


def plot_layers(layers: Sequence[Layer]) -> Figure:
    """Draw the layers from top to bottom with their sizes, and a matrix of their imports."""
    n_layers = len(layers)
    figure = new_figure(_LABEL_WIDTH + _CELL * n_layers + 0.9, 0.45 * (n_layers + 4.5))
    axes = figure.add_subplot()
    names = [layer.name for layer in layers]
    for row, layer in enumerate(layers):
        is_kernel = row > names.index(_LOWEST_ABOVE_KERNEL)
        color = GREEN if is_kernel else BLUE
        axes.add_patch(Rectangle((0, row + 0.1), 0.08, 0.8, fc=color))
        axes.text(0.16, row + 0.5, layer.name, va="center", fontsize=11, weight="bold")
        files = "file" if layer.n_files == 1 else "files"
        size = f"{layer.n_files} {files}, {layer.n_lines:,} lines"
        axes.text(_LABEL_WIDTH - 0.15, row + 0.5, size, va="center", ha="right", fontsize=9)
        for column, name in enumerate(names):
            _draw_cell(axes, layer.imports[name], row, column)
    for column, name in enumerate(names):
        x = _LABEL_WIDTH + (column + 0.5) * _CELL
        axes.text(x, -0.1, name, rotation=55, ha="left", va="bottom", fontsize=10)
    y, right = names.index(_LOWEST_ABOVE_KERNEL) + 1, _LABEL_WIDTH + n_layers * _CELL
    axes.plot((0, right), (y, y), "--", color=ORANGE, lw=2)
    notes = (
        "Numbers: import statements, from the layer of the row to the layer of the column.\n"
        "Blue: a lower layer, allowed. Grey: the same layer. Orange: a higher layer, not allowed.\n"
        "Dashed line: the offline kernel on Kaggle imports only the layers below it."
    )
    axes.text(right, n_layers + 0.2, notes, ha="right", va="top", fontsize=10)
    axes.set(xlim=(0, right + 0.9), ylim=(n_layers + 1.9, -2.6))
    axes.axis("off")
    return figure


def _draw_cell(axes: Axes, n_imports: int, row: int, column: int) -> None:
    color = GREY if row == column else BLUE if column > row else ORANGE
    alpha = min(0.75, 0.1 + 0.02 * n_imports) if n_imports else 0.04
    if color == ORANGE and n_imports:
        alpha = 1.0
    corner = (_LABEL_WIDTH + column * _CELL, row)
    axes.add_patch(Rectangle(corner, _CELL, 1, fc=color, ec="white", alpha=alpha))
    if n_imports:
        x, y = corner[0] + _CELL / 2, row + 0.5
        axes.text(x, y, f"{n_imports}", ha="center", va="center", fontsize=9)
