"""Show what a model is made of: run it once, record every stage's shape, and draw them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from birdcall.config import Experiment, require
from birdcall.models import SEDModel, build_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind too; each row says its part in words.
COLORS = {
    "input": "#999999",
    "front end": "#E69F00",
    "backbone": "#56B4E9",
    "temporal layer": "#009E73",
    "attention head": "#CC79A7",
}
BACKBONE_DEPTH = 2  # timm's stages lie no deeper: layer3, blocks.4, features.denseblock2
MAX_SHEETS = 6  # drawn for one tensor: a sheet stands for four times as many channels


class Stage(NamedTuple):
    """One step of a forward pass: the tensor that left it, and the weights it took.

    axes: what the dimensions of ``shape`` after the first, the batch, are.
    """

    part: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    n_weights: int


def trace_stages(model: SEDModel, waveform: Tensor) -> list[Stage]:
    """Run ``model`` on ``waveform`` (batch, samples) and list what really leaves each stage.

    Backbones differ, so theirs is a stage wherever the image's size or its channels change.
    """
    backbone = _modules_of(model.backbone)
    watched = backbone | {
        "front end": model.frontend,
        "mel_norm": model.mel_norm,
        "project": model.project,
        "temporal": model.temporal,
    }
    with _recording(watched) as outputs, torch.inference_mode():
        power = model.frontend.spectrogram(waveform)
        output = model.eval()(waveform)
    shapes = {name: tuple(shape) for name, shape in outputs}
    image, sequence = ("channels", "frames", "mel bins"), ("channels", "frames")
    features = [(name, shape) for name, shape in outputs if name in backbone and len(shape) == 4]
    norm, projection = _count_weights(model.mel_norm), _count_weights(model.project)
    temporal, head = _count_weights(model.temporal), _count_weights(model.head)
    bins, classes = ("channels", "frames", "frequencies"), ("classes", "frames")
    return [
        Stage("input", "waveform", tuple(waveform.shape), ("samples",), 0),
        Stage("front end", "power spectrogram", tuple(power.shape), bins, 0),
        Stage("front end", "log-mel", shapes["front end"], image, 0),
        Stage("front end", "normalised per mel bin", shapes["front end"], image, norm),
        *_backbone_stages(model.backbone, features, image),
        Stage("backbone", "mean over mel bins, 1×1", shapes["project"], sequence, projection),
        Stage("temporal layer", _name_temporal(model), shapes["temporal"], sequence, temporal),
        Stage("attention head", "framewise", tuple(output.framewise.shape), classes, head),
        Stage("attention head", "clipwise", tuple(output.clipwise.shape), ("classes",), 0),
    ]


def _modules_of(backbone: nn.Module) -> dict[str, nn.Module]:
    named = backbone.named_modules()
    return {name: module for name, module in named if name and name.count(".") < BACKBONE_DEPTH}


@contextmanager
def _recording(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, torch.Size]]]:
    """Record (name, shape of its output) whenever one of ``modules`` has run, in that order."""
    outputs: list[tuple[str, torch.Size]] = []

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output.shape))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _backbone_stages(
    backbone: nn.Module, outputs: list[tuple[str, torch.Size]], axes: tuple[str, ...]
) -> list[Stage]:
    """Join neighbouring outputs of one shape; a stage has the name of the last and all weights."""
    stages: list[Stage] = []
    counted: set[int] = set()
    for name, shape in outputs:
        parameters = backbone.get_submodule(name).parameters()
        fresh = {id(p): p.numel() for p in parameters if id(p) not in counted}
        counted |= fresh.keys()
        n_weights = sum(fresh.values())
        if stages and stages[-1].shape == tuple(shape):
            n_weights += stages.pop().n_weights
        stages.append(Stage("backbone", name, tuple(shape), axes, n_weights))
    return stages


def _name_temporal(model: SEDModel) -> str:
    names = [type(layer).__name__ for layer in model.temporal]
    return " + ".join(name for name in names if name != "Identity") or "none"


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- the figure ----------------------------------------------------------------------------------


def plot_architecture(experiment: Experiment, n_classes: int, seconds: float = 5.0) -> Figure:
    """Draw the model of ``experiment`` from top to bottom, as it hears one clip of ``seconds``.

    The model is built, with random weights, and run: every shape in the figure was measured.
    """
    from matplotlib.figure import Figure

    require(seconds > 0, f"seconds is {seconds}; it must be above 0")
    n_samples = round(seconds * experiment.frontend.sample_rate)
    with torch.random.fork_rng(devices=[]):
        model = build_model(experiment, n_classes)
    stages = trace_stages(model, torch.zeros(1, n_samples))
    figure = Figure(figsize=(10, 0.62 * len(stages) + 1.1), layout="constrained")
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


HEADINGS = ((0.0, "part", "left"), (1.55, "what leaves it", "left"), (5.0, "drawn", "center"),
            (6.3, "shape of one clip", "left"), (10.0, "weights", "right"))  # fmt: skip


def _draw_stage(axes: Axes, stage: Stage, row: int, *, is_new: bool) -> None:
    color = COLORS[stage.part]
    axes.barh(row, 0.08, left=0.0, height=1.0, color=color)
    if is_new:
        axes.text(0.16, row, stage.part, va="center", fontsize=11, fontweight="bold")
    axes.text(1.55, row, stage.name, va="center", fontsize=11)
    _draw_tensor(axes, stage, row, color)
    sizes = zip(stage.shape[1:], stage.axes, strict=True)
    text = " × ".join(f"{size:,} {axis}" for size, axis in sizes)
    axes.text(6.3, row, text, va="center", fontsize=10)
    if stage.n_weights:
        axes.text(10.0, row, f"{stage.n_weights:,}", va="center", ha="right", fontsize=10)


def _draw_tensor(axes: Axes, stage: Stage, row: int, color: str) -> None:
    """Draw time to the right, frequency upwards (both as square roots), channels as sheets."""
    from matplotlib.patches import Rectangle

    size = dict(zip(stage.axes, stage.shape[1:], strict=True))
    # A waveform has too many samples and a clipwise output no time at all.
    width = 1.9 if "samples" in size else 1.9 * min(1.0, (size.get("frames", 1) / 512) ** 0.5)
    rows = max(size.get("mel bins", 1), size.get("frequencies", 1))
    height = 0.06 + 0.5 * min(1.0, (rows / 513) ** 0.5)
    n_sheets = min(MAX_SHEETS, 1 + (size.get("channels", 1).bit_length() - 1) // 2)
    for sheet in reversed(range(n_sheets)):
        shift = sheet - (n_sheets - 1) / 2
        corner = (5.0 - width / 2 + 0.05 * shift, row - height / 2 - 0.035 * shift)
        axes.add_patch(Rectangle(corner, width, height, fc=color, ec="white", lw=0.8))
