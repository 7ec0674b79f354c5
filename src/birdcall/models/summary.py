"""Measure how far a backbone hears: its stride and its effective receptive field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from birdcall.config import Experiment, ModelConfig
from birdcall.experiments import find_experiment
from birdcall.models.sed import build_backbone, build_model

ENERGY_SHARE = 0.95
IMAGE_FRAMES = 1024  # ten seconds of PANNs' front end: wider than any field measured so far
N_INPUTS = 4


class Field(NamedTuple):
    """What of its input one unit in the middle of a backbone's output depends on.

    stride: input frames to one output frame. frames, mels: the shortest stretch that holds
    `ENERGY_SHARE` of the gradient's energy. reach: the frames on which it depends at all, the
    theoretical field; None if those are all of the image, as with squeeze-and-excitation, which
    hears the whole clip.
    """

    stride: int
    frames: int
    mels: int
    reach: int | None


@dataclass(frozen=True)
class ModelSummary:
    """What a model costs and how it hears; see `Field` for the meaning of ``field`` and ``reach``.

    Of the backbone alone: the head's pooling adds a frame of context to each side, and a temporal
    layer hears the whole clip.
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
    field = _field_of(
        config.backbone, config.backbone_options, len(frontend.features), frontend.n_mels
    )
    return ModelSummary(
        experiment=experiment.name,
        description=experiment.description,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
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


@lru_cache(maxsize=64)  # experiments often differ in what stands behind the backbone
def _field_of(backbone: str, options: tuple, n_channels: int, n_mels: int) -> Field:
    config = ModelConfig(backbone=backbone, backbone_options=options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_backbone(config, n_channels, pretrained=False)
    return measure_field(network, n_channels, n_mels)


def measure_field(
    backbone: nn.Module, n_channels: int, n_mels: int, n_frames: int = IMAGE_FRAMES
) -> Field:
    """Measure the effective receptive field of Luo et al. (2016) in images of noise.

    ``backbone.forward_features`` takes ``(batch, n_channels, n_frames, n_mels)``. Weights may be
    random: the field is the architecture's, and training widens it by some. Zero gains, with which
    many residual branches start, are opened in ``backbone``, as the first steps of training do.
    """
    backbone.eval()
    open_gains(backbone)
    generator = torch.Generator().manual_seed(0)
    gradients = torch.stack(
        [
            _centre_gradient(
                backbone, torch.randn(1, n_channels, n_frames, n_mels, generator=generator)
            )
            for _ in range(N_INPUTS)
        ]
    )
    energy = gradients.double().square().mean(dim=0)
    touched = (gradients != 0).any(dim=0).any(dim=1).nonzero().flatten()
    reach = int(touched[-1] - touched[0]) + 1
    return Field(
        measure_stride(backbone, n_channels, n_mels, n_frames),
        shortest_stretch(energy.sum(dim=1)),
        shortest_stretch(energy.sum(dim=0)),
        reach if reach < n_frames else None,
    )


def measure_stride(backbone: nn.Module, n_channels: int, n_mels: int, n_frames: int) -> int:
    """Return how many input frames make one more output frame."""
    with torch.no_grad():
        short, long = (
            backbone.forward_features(torch.zeros(1, n_channels, length, n_mels)).shape[2]
            for length in (n_frames // 2, n_frames)
        )
    return round((n_frames - n_frames // 2) / (long - short))


def open_gains(backbone: nn.Module) -> None:
    """Set gains of zero to one: behind them, a residual branch passes no gradient at all."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if not name.endswith("bias") and not parameter.any():
                parameter.fill_(1)


def _centre_gradient(backbone: nn.Module, image: Tensor) -> Tensor:
    """Return the gradient, (channels, frames, mels) summed in squares over channels, of one unit.

    The unit is the middle one of the output, all of its channels with random signs, so that they
    do not cancel out for all inputs alike.
    """
    image.requires_grad_()
    features = backbone.forward_features(image)
    unit = features[0, :, features.shape[2] // 2, features.shape[3] // 2]
    generator = torch.Generator().manual_seed(len(unit))
    signs = torch.randint(0, 2, unit.shape, generator=generator) * 2 - 1
    (gradient,) = torch.autograd.grad((unit * signs).sum(), image)
    # The norm, not its square, which would underflow at the edges.
    return gradient[0].norm(dim=0)


def shortest_stretch(energy: Tensor, share: float = ENERGY_SHARE) -> int:
    """Return the length of the shortest stretch of ``energy`` (n,) that holds ``share`` of it."""
    total = torch.cat((torch.zeros(1, dtype=torch.float64), energy.double().cumsum(0)))
    options = share * total[-1] * (1 - 1e-9)  # sums round
    ends = torch.searchsorted(total, total + options)
    starts = torch.arange(len(total))
    return int((ends - starts)[ends < len(total)].min())
