"""Show what a model is made of: run it once, record every stage's shape, and draw them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from birdcall.config import Experiment, require
from birdcall.models.sed import (
    AttentionHead,
    GeM,
    LogMeanExpHead,
    MaxHead,
    MeanPooling,
    SEDModel,
    build_model,
)
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
POOLING_NAMES = {MeanPooling: "mean over mel bins", GeM: "GeM over mel bins"}
HEAD_NAMES = {
    AttentionHead: "weighted by attention",
    MaxHead: "loudest frame",
    LogMeanExpHead: "log-mean-exp over frames",
}
IMAGE, POWER = ("channels", "frames", "mel bins"), ("channels", "frames", "frequencies")
SEQUENCE = ("channels", "frames")
BACKBONE_DEPTH = 2  # timm's stages lie no deeper: layer3, blocks.4, features.denseblock2
MAX_SHEETS = 6


class Output(NamedTuple):
    """What left a module of a given name."""

    name: str
    shape: tuple[int, ...]


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

    Backbones differ, so theirs is a stage wherever the size of the image changes.
    """
    backbone = _modules_of(model.backbone)
    preview = backbone | {
        "front end": model.frontend,
        "mel_norm": model.mel_norm,
        "pooling": model.pooling,
        "project": model.project,
        "temporal": model.temporal,
    }
    was_training = model.training
    with _recording(preview) as outputs, torch.inference_mode():
        power = model.frontend.spectrogram(waveform)
        output = model.eval()(waveform)
    model.train(was_training)
    shapes = dict(outputs)
    features = [one for one in outputs if one.name in backbone and len(one.shape) == 4]
    norm, pooling, projection, temporal, head = map(
        _count_weights,
        (model.mel_norm, model.pooling, model.project, model.temporal, model.head),
    )
    framewise, clipwise = tuple(output.framewise.shape), tuple(output.clipwise.shape)
    return [
        Stage(
            part="input",
            name="waveform",
            shape=tuple(waveform.shape),
            axes=("samples",),
            n_weights=0,
        ),
        Stage(
            part="front end",
            name="power spectrogram",
            shape=tuple(power.shape),
            axes=POWER,
            n_weights=0,
        ),
        Stage(
            part="front end",
            name=", ".join(model.frontend.config.features),
            shape=shapes["front end"],
            axes=IMAGE,
            n_weights=0,
        ),
        Stage(
            part="front end",
            name="each mel bin normalised",
            shape=shapes["front end"],
            axes=IMAGE,
            n_weights=norm,
        ),
        *_backbone_stages(model.backbone, features),
        Stage(
            part="backbone",
            name=POOLING_NAMES[type(model.pooling)],
            shape=shapes["pooling"],
            axes=SEQUENCE,
            n_weights=pooling,
        ),
        Stage(
            part="backbone",
            name="projected",
            shape=shapes["project"],
            axes=SEQUENCE,
            n_weights=projection,
        ),
        Stage(
            part="temporal layer",
            name=_name_temporal(model),
            shape=shapes["temporal"],
            axes=SEQUENCE,
            n_weights=temporal,
        ),
        Stage(
            part="head",
            name="framewise output",
            shape=framewise,
            axes=("classes", "frames"),
            n_weights=head,
        ),
        Stage(
            part="head",
            name=f"clipwise: {HEAD_NAMES[type(model.head)]}",
            shape=clipwise,
            axes=("classes",),
            n_weights=0,
        ),
    ]


def _modules_of(backbone: nn.Module) -> dict[str, nn.Module]:
    named = backbone.named_modules()
    return {name: module for name, module in named if name and name.count(".") < BACKBONE_DEPTH}


@contextmanager
def _recording(modules: dict[str, nn.Module]) -> Iterator[list[Output]]:
    """Record (name, shape of its output) whenever one of ``modules`` has run, in that order."""
    outputs: list[Output] = []

    def record(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append(Output(name, tuple(output.shape)))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _backbone_stages(backbone: nn.Module, outputs: list[Output]) -> list[Stage]:
    """Join neighbours whose images are equally large, under the names of the first and the last."""
    stages: list[Stage] = []
    counted: set[nn.Parameter] = set()
    for _, group in groupby(outputs, key=lambda output: output.shape[2:]):
        joined = list(group)
        used = {p for o in joined for p in backbone.get_submodule(o.name).parameters()} - counted
        counted |= used
        names = [_shorten(o.name, joined, outputs) for o in joined if _is_innermost(o, outputs)]
        name = " … ".join(dict.fromkeys((names[0], names[-1])))
        n_weights = sum(parameter.numel() for parameter in used)
        stages.append(
            Stage(
                part="backbone", name=name, shape=joined[-1].shape, axes=IMAGE, n_weights=n_weights
            )
        )
    return stages


def _is_innermost(output: Output, outputs: list[Output]) -> bool:
    return not any(other.name.startswith(f"{output.name}.") for other in outputs)


def _shorten(name: str, joined: list[Output], outputs: list[Output]) -> str:
    """Return "layer1" for "layer1.0" if all of layer1 is joined."""
    top = name.split(".")[0]
    if all(output in joined for output in outputs if output.name.split(".")[0] == top):
        return top
    return name.removeprefix("features.")


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
