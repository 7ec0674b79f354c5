"""Draw the figures of README and docs: the stages of a network, the layers of the code, results."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import birdcall
from birdcall.audio.reading import read_audio
from birdcall.config import SEGMENT_SECONDS, Experiment, require
from birdcall.evaluation.scoring import Evaluation
from birdcall.inference.decision import average_members
from birdcall.inference.windows import FRAMES_PER_SEGMENT
from birdcall.models.sed import build_model
from birdcall.models.summary import Stage, trace_stages
from birdcall.report.html import SAMPLE_RATE
from birdcall.report.plots import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SHOWN_SECONDS,
    SKY,
    new_figure,
    plot_pipeline,
    plot_recall_over_snr,
    plot_soundscape,
)
from birdcall.storage.files import UserError

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


# --- the figures of README and docs ---------------------------------------------------------------


def project_figures(
    experiment: Experiment, evaluation: Callable[[], Evaluation], n_classes: int = 264
) -> dict[str, Callable[[], Figure]]:
    """Return what draws the figures of README and docs, by file name; see `plots.write_figures`.

    experiment: the one whose architecture is drawn. evaluation: called once, when it is needed.
    """
    evaluation = cache(evaluation)
    return {
        "pipeline.svg": plot_pipeline,
        "layers.svg": lambda: plot_layers(read_layers(Path(birdcall.__file__).parent)),
        "architecture.svg": lambda: plot_architecture(experiment, n_classes),
        "snr.svg": lambda: _plot_recall(evaluation()),
        "spectrogram.webp": lambda: _plot_fullest_soundscape(evaluation()),
    }


def _plot_recall(evaluation: Evaluation) -> Figure:
    if evaluation.snr is None:
        raise UserError("no soundscape was simulated for all runs")
    return plot_recall_over_snr(evaluation.snr)


def _plot_fullest_soundscape(evaluation: Evaluation) -> Figure:
    """Draw the labelled soundscape with most birds in its first minute."""
    labelled = evaluation.labelled
    if labelled is None:
        raise UserError("there are no labelled soundscapes")
    predictions = labelled.predictions
    is_shown = predictions.segments["seconds"].to_numpy() <= SHOWN_SECONDS
    recordings = predictions.segments["recording"].to_numpy()
    n_birds = pd.Series(predictions.truth[is_shown].sum(axis=1))
    recording = n_birds.groupby(recordings[is_shown]).sum().idxmax()
    predictions = predictions.select(recordings == recording)
    n_rows, n_classes = SHOWN_SECONDS // SEGMENT_SECONDS, len(predictions.classes)
    predicted = np.zeros(predictions.truth.shape, dtype=bool)
    predicted[predictions.labelled] = predictions.decide(evaluation.ensemble.decision)
    predicted, truth = predicted[:n_rows, :n_classes], predictions.truth[:n_rows, :n_classes]
    probability = average_members(predictions.framewise)[:n_rows].T
    columns = np.flatnonzero(truth.any(axis=0) | predicted.any(axis=0))
    if not len(columns):
        columns = np.argsort(-probability.max(axis=1))[:3]
    frames = labelled.frames.get(recording)
    if frames is not None and frames.frames.shape[1]:
        probability = frames.frames[:, : len(truth) * FRAMES_PER_SEGMENT]
    return plot_soundscape(
        read_audio(labelled.paths[recording], SAMPLE_RATE),
        codes=[predictions.classes[column] for column in columns],
        truth=truth[:, columns],
        predicted=predicted[:, columns],
        probability=probability[columns],
    )
