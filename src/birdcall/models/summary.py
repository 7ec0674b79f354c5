"""Measure what models are: weights, stages, strides, receptive fields, the times of frames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from birdcall.config import Experiment, ModelConfig
from birdcall.experiments import find_experiment
from birdcall.models.backbones import MIN_FRAMES, build_backbone
from birdcall.models.sed import (
    AttentionHead,
    GeM,
    LogMeanExpHead,
    MaxHead,
    MeanPooling,
    SEDModel,
    build_model,
)

_ENERGY_SHARE = 0.95
_IMAGE_FRAMES = 1024  # ten seconds of PANNs' front end: wider than any field measured so far
_N_INPUTS = 4
_N_PROBES, _PROBE_STRIDES = 8, 16
_PROBE_RMS = 0.01  # of noise as loud as a quiet recording's
_BACKBONE_DEPTH = 2  # timm's stages lie no deeper: layer3, blocks.4, features.denseblock2


@dataclass(frozen=True)
class ModelSummary:
    """The size of a model, and what its backbone depends on; see `ReceptiveField`.

    The head's pooling adds a frame of context to each side of the backbone's field; a temporal
    layer depends on the whole clip.
    """

    experiment: str
    description: str
    n_parameters: int
    stride_frames: int
    stride_seconds: float  # from one frame of the output to the next
    field_frames: int
    field_seconds: float
    field_mels: int
    reach_frames: int | None


def describe_model(experiment: Experiment, n_classes: int) -> ModelSummary:
    """Build the model of ``experiment`` with random weights, and measure it."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(experiment, n_classes)
    frontend, config = experiment.frontend, experiment.model
    field = _backbone_field(
        config.backbone, config.backbone_options, len(frontend.features), frontend.n_mels
    )
    return ModelSummary(
        experiment=experiment.name,
        description=experiment.description,
        n_parameters=_count_weights(model),
        stride_frames=field.stride,
        stride_seconds=field.stride * model.frontend.frame_seconds,
        field_frames=field.frames,
        field_seconds=field.frames * model.frontend.frame_seconds,
        field_mels=field.mels,
        reach_frames=field.reach,
    )


def experiments_table(names: Sequence[str], n_classes: int = 264) -> pd.DataFrame:
    """Return a row for each experiment: `ModelSummary`, with parameters in millions."""
    rows = [asdict(describe_model(find_experiment(name), n_classes)) for name in names]
    table = pd.DataFrame(rows).astype({"reach_frames": "Int64"})
    table.insert(2, "parameters_m", (table.pop("n_parameters") / 1e6).round(1))
    return table.round({"stride_seconds": 2, "field_seconds": 1})


def _count_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- receptive field ---


class ReceptiveField(NamedTuple):
    """The part of its input on which one unit in the middle of a backbone's output depends.

    stride: input frames to one output frame. frames, mels: the shortest interval with 95 % of the
    gradient's energy. reach: the frames on which the unit depends at all, the theoretical field;
    None if that is the whole image, as with squeeze-and-excitation.
    """

    stride: int
    frames: int
    mels: int
    reach: int | None


def measure_field(
    backbone: nn.Module, n_channels: int, n_mels: int, n_frames: int = _IMAGE_FRAMES
) -> ReceptiveField:
    """Measure the effective receptive field of Luo et al. (2016) in images of noise.

    ``backbone.forward_features`` takes ``(batch, n_channels, n_frames, n_mels)``. Weights may be
    random: the field is the architecture's, and training widens it by some. Gains of zero, with
    which many residual branches begin, are set to one in ``backbone``: behind a zero a branch
    passes no gradient, and the first steps of training open it.
    """
    backbone.eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if not name.endswith("bias") and not parameter.any():
                parameter.fill_(1)
    generator = torch.Generator().manual_seed(0)
    shape = (1, n_channels, n_frames, n_mels)
    images = [torch.randn(shape, generator=generator) for _ in range(_N_INPUTS)]
    gradients = torch.stack([_centre_gradient(backbone, image) for image in images])
    energy = gradients.double().square().mean(dim=0)
    touched = (gradients != 0).any(dim=0).any(dim=1).nonzero().flatten()
    reach = int(touched[-1] - touched[0]) + 1
    with torch.no_grad():
        short, long = (
            backbone.forward_features(torch.zeros(1, n_channels, length, n_mels)).shape[2]
            for length in (n_frames // 2, n_frames)
        )
    return ReceptiveField(
        stride=round((n_frames - n_frames // 2) / (long - short)),
        frames=shortest_interval(energy.sum(dim=1)),
        mels=shortest_interval(energy.sum(dim=0)),
        reach=reach if reach < n_frames else None,
    )


def shortest_interval(energy: Tensor, share: float = _ENERGY_SHARE) -> int:
    """Return the length of the shortest interval of ``energy`` (n,) that holds ``share`` of it."""
    total = torch.cat((torch.zeros(1, dtype=torch.float64), energy.double().cumsum(0)))
    needed = share * total[-1] * (1 - 1e-9)  # sums are rounded
    ends = torch.searchsorted(total, total + needed)
    starts = torch.arange(len(total))
    return int((ends - starts)[ends < len(total)].min())


@lru_cache(maxsize=64)  # experiments often differ only in what follows the backbone
def _backbone_field(backbone: str, options: tuple, n_channels: int, n_mels: int) -> ReceptiveField:
    config = ModelConfig(backbone=backbone, backbone_options=options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_backbone(config, n_channels, pretrained=False)
    return measure_field(network, n_channels, n_mels)


def _centre_gradient(backbone: nn.Module, image: Tensor) -> Tensor:
    """Return the norm over channels of the gradient of one unit, (frames, mels).

    The unit is the middle one of the output, all of its channels with random signs, so that they
    do not cancel out for all inputs alike.
    """
    image.requires_grad_()
    features = backbone.forward_features(image)
    unit = features[0, :, features.shape[2] // 2, features.shape[3] // 2]
    generator = torch.Generator().manual_seed(len(unit))
    signs = torch.randint(0, 2, unit.shape, generator=generator) * 2 - 1
    (gradient,) = torch.autograd.grad((unit * signs).sum(), image)
    return gradient[0].norm(dim=0)  # not its square, which would underflow at the edges


# --- the times of frames ---


class FrameTimes(NamedTuple):
    """When the frames of a network's output are: frame i is centred at ``start + i * step`` s."""

    start: float
    step: float

    def interpolate(self, frames: Tensor, moments: np.ndarray) -> Tensor:
        """Return ``frames`` ``(…, frames)`` at these moments, in seconds: ``(…, moments)``.

        Between two centres they are interpolated, before the first and after the last constant.
        """
        last = frames.shape[-1] - 1
        position = np.clip((moments - self.start) / self.step, 0, last)
        before = position.astype(int)
        weight = torch.tensor(position - before, dtype=frames.dtype, device=frames.device)
        after = np.minimum(before + 1, last)
        return torch.lerp(frames[..., before.tolist()], frames[..., after.tolist()], weight)


def measure_frame_times(model: SEDModel, n_frames: int) -> FrameTimes:
    """Measure when the output frames of ``model`` are, for a log_mel of ``n_frames`` frames.

    They do not divide a clip into equal parts: paddings shift them, and their number is rounded. A
    frame is centred where it depends on its input: at the mean time of the absolute gradient of the
    backbone's features, in noise. The weights are those of ``model``, as trained: where a shortcut
    averages two frames and the block beside it is centred on the first, they decide between both.
    """
    # Padding to the "same" size depends on whether a length is even, at every halving: the probe
    # differs from the log_mel by a multiple of the stride.
    n_image = n_frames % MIN_FRAMES + _PROBE_STRIDES * MIN_FRAMES
    generator = torch.Generator().manual_seed(0)
    n_samples = (n_image - 1) * model.frontend.config.hop_length
    noise = _PROBE_RMS * torch.randn(_N_PROBES, n_samples, generator=generator)
    was_training = model.training
    model.eval()
    # Gradients are needed in inference mode as well.
    with torch.inference_mode(False), torch.enable_grad():
        image = model.frontend(noise.to(model.project.weight.device)).requires_grad_()
        features = model.extract(image)
        signs = torch.randint(0, 2, features.shape[:2], generator=generator) * 2.0 - 1
        middle = features.shape[2] // 2
        units = features[:, :, middle] * signs.to(features)
        (gradient,) = torch.autograd.grad(units.sum(), image)
        shorter = image.detach()[:1, :, : -_PROBE_STRIDES // 2 * MIN_FRAMES]
        n_shorter = model.extract(shorter).shape[2]
    model.train(was_training)
    step = _PROBE_STRIDES // 2 * MIN_FRAMES / (features.shape[2] - n_shorter)
    weight = gradient.abs().sum(dim=(0, 1, 3)).double().cpu()
    # A layer that averages over the whole image adds the same everywhere.
    weight = (weight - weight.median()).clamp(min=0)
    start = float((weight * torch.arange(n_image)).sum() / weight.sum()) - step * middle
    if not math.isfinite(start):  # the weights are NaN, or all zero: it predicts nothing anyway
        start = (step - 1) / 2
    seconds = model.frontend.frame_seconds
    return FrameTimes(start * seconds, step * seconds)


# --- stages ---


class Stage(NamedTuple):
    """A step of a forward pass: its part of the model, its output's shape, its weights.

    axes: the names of the dimensions of ``shape`` after the first, which is the batch.
    """

    part: str  # input, front end, backbone, temporal layer or head
    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    n_weights: int


_IMAGE, _SEQUENCE = ("channels", "frames", "mel bins"), ("channels", "frames")
_POOLING_NAMES = {MeanPooling: "mean over mel bins", GeM: "GeM over mel bins"}
_HEAD_NAMES = {
    AttentionHead: "weighted by attention",
    MaxHead: "loudest frame",
    LogMeanExpHead: "log-mean-exp over frames",
}


def trace_stages(model: SEDModel, waveform: Tensor) -> list[Stage]:
    """Run ``model`` on ``waveform`` (batch, samples) and list the measured output of each stage.

    Backbones differ, so each size of the image in a backbone is a stage.
    """
    named = model.backbone.named_modules()
    backbone = {name: m for name, m in named if name and name.count(".") < _BACKBONE_DEPTH}
    parts = {
        "front end": model.frontend,
        "pooling": model.pooling,
        "project": model.project,
        "temporal": model.temporal,
    }
    outputs: list[tuple[str, tuple[int, ...]]] = []  # in the order in which modules have run

    def record(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((name, tuple(output.shape)))

    modules = (backbone | parts).items()
    hooks = [module.register_forward_hook(partial(record, name)) for name, module in modules]
    was_training = model.training
    try:
        with torch.inference_mode():
            spectrogram = getattr(model.frontend, "spectrogram", None)
            power = () if spectrogram is None else tuple(spectrogram(waveform).shape)
            output = model.eval()(waveform)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    shapes = dict(outputs)
    images = [(name, shape) for name, shape in outputs if name in backbone and len(shape) == 4]
    temporal = [type(layer).__name__ for layer in model.temporal if type(layer) is not nn.Identity]
    log_mel, power_axes = shapes["front end"], ("channels", "frames", "frequencies")
    features = ", ".join(model.frontend.config.features)
    pooling, head = _POOLING_NAMES[type(model.pooling)], _HEAD_NAMES[type(model.head)]
    clipwise, framewise = tuple(output.clipwise.shape), tuple(output.framewise.shape)
    n_norm, n_pooling, n_project, n_temporal, n_head = map(
        _count_weights, (model.mel_norm, model.pooling, model.project, model.temporal, model.head)
    )
    front_end, network = partial(Stage, "front end"), partial(Stage, "backbone")
    normalised = log_mel if n_norm else ()  # BirdNET's filters have neither this nor a spectrogram
    front_end_stages = (
        front_end("power spectrogram", power, axes=power_axes, n_weights=0),
        front_end(features, log_mel, axes=_IMAGE, n_weights=0),
        front_end("each mel bin normalised", normalised, axes=_IMAGE, n_weights=n_norm),
    )
    return [
        Stage("input", "waveform", tuple(waveform.shape), axes=("samples",), n_weights=0),
        *(stage for stage in front_end_stages if stage.shape),
        *_backbone_stages(model.backbone, images),
        network(pooling, shapes["pooling"], axes=_SEQUENCE, n_weights=n_pooling),
        network("projected", shapes["project"], axes=_SEQUENCE, n_weights=n_project),
        Stage(
            "temporal layer",
            " + ".join(temporal) or "none",
            shapes["temporal"],
            axes=_SEQUENCE,
            n_weights=n_temporal,
        ),
        Stage("head", "framewise output", framewise, axes=("classes", "frames"), n_weights=n_head),
        Stage("head", f"clipwise: {head}", clipwise, axes=("classes",), n_weights=0),
    ]


def _backbone_stages(
    backbone: nn.Module, outputs: list[tuple[str, tuple[int, ...]]]
) -> Iterator[Stage]:
    """Join consecutive outputs of one image size, named by the first and the last of them."""
    all_names = [name for name, _ in outputs]
    counted: set[nn.Parameter] = set()
    for _, group in groupby(outputs, key=lambda output: output[1][2:]):
        joined = list(group)
        names = [name for name, _ in joined]
        used = {p for name in names for p in backbone.get_submodule(name).parameters()} - counted
        counted |= used
        innermost = [name for name in names if not any(n.startswith(f"{name}.") for n in all_names)]
        labels = []
        for name in (innermost[0], innermost[-1]):
            top = name.split(".")[0]
            # "layer1" for "layer1.0" if all of layer1 is joined
            is_whole = all(n in names for n in all_names if n.split(".")[0] == top)
            labels.append(top if is_whole else name.removeprefix("features."))
        yield Stage(
            "backbone",
            " … ".join(dict.fromkeys(labels)),
            joined[-1][1],
            axes=_IMAGE,
            n_weights=sum(parameter.numel() for parameter in used),
        )
