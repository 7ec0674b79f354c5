"""Build the sound event detectors: front end, backbone, temporal layer and attention head."""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from birdcall.config import Experiment, FrontendConfig, ModelConfig
from birdcall.frontend import LogMel


class SEDOutput(NamedTuple):
    """Probabilities in [0, 1], float32.

    clipwise: ``(batch, classes)``, is the species in the clip?
    framewise: ``(batch, classes, frames)``, when? Frames divide the clip into equal parts.
    """

    clipwise: Tensor
    framewise: Tensor


class BiGRU(nn.Module):
    """Bidirectional GRU on convolutional layout: ``(batch, channels, frames)`` in and out.

    It is a residual branch: where a recurrent layer stood between a backbone and its head, the
    gradient had to pass through it, and short trainings ended at chance level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, channels // 2, batch_first=True, bidirectional=True)

    def forward(self, features: Tensor) -> Tensor:
        hidden, _ = self.gru(features.transpose(1, 2))
        return features + hidden.transpose(1, 2)


class SelfAttention(nn.Module):
    """One pre-norm transformer layer on ``(batch, channels, frames)``, with a sense of time.

    Sinusoidal positions are added to what is attended to, so any clip length works.
    """

    def __init__(self, channels: int, dropout: float, n_heads: int = 4) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            channels,
            n_heads,
            dim_feedforward=2 * channels,
            dropout=dropout,
            batch_first=True,
            norm_first=True,
        )

    def forward(self, features: Tensor) -> Tensor:
        hidden = features.transpose(1, 2)
        return self.layer(hidden + sinusoidal_positions(hidden)).transpose(1, 2)


def sinusoidal_positions(hidden: Tensor) -> Tensor:
    """Return the positions ``(frames, channels)`` of Vaswani et al. (2017) for ``hidden``."""
    n_frames, channels = hidden.shape[1:]
    frame = torch.arange(n_frames, device=hidden.device, dtype=torch.float32)[:, None]
    rate = torch.arange(0, channels, 2, device=hidden.device, dtype=torch.float32)
    angle = frame * torch.exp(rate * (-math.log(10_000.0) / channels))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(hidden.dtype)


class AttentionHead(nn.Module):
    """PANNs' attention pooling: framewise probabilities and their weighted mean over frames.

    ``(batch, channels, frames)`` → `SEDOutput`. tanh keeps the attention's softmax from collapsing
    on one frame (1st, 6th place); Kong et al. (2020) clamp to [-10, 10] instead.
    """

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__()
        self.attention = nn.Conv1d(channels, n_classes, kernel_size=1)
        self.detection = nn.Conv1d(channels, n_classes, kernel_size=1)
        nn.init.xavier_uniform_(self.attention.weight)
        nn.init.xavier_uniform_(self.detection.weight)
        nn.init.zeros_(self.attention.bias)
        # Most species are absent from most frames; starting there saves the first epochs.
        nn.init.constant_(self.detection.bias, -math.log(max(n_classes - 1, 1)))

    def attend(self, features: Tensor) -> Tensor:
        """Return the weights ``(batch, classes, frames)``, which sum to 1 over the frames."""
        return torch.softmax(torch.tanh(self.attention(features)).float(), dim=-1)

    def forward(self, features: Tensor) -> SEDOutput:
        framewise = torch.sigmoid(self.detection(features).float())
        # Rounding lets a weighted mean of ones exceed one, which binary cross-entropy refuses.
        clipwise = (self.attend(features) * framewise).sum(dim=-1).clamp(0, 1)
        return SEDOutput(clipwise, framewise)


class SEDModel(nn.Module):
    """A sound event detector, from waveform to probabilities per clip and per frame.

    ``model(waveform)`` is ``model.detect(model.frontend(waveform))``; members of an ensemble that
    share a front end call `detect` on one log-mel.
    """

    def __init__(
        self,
        frontend: LogMel,
        backbone: nn.Module,
        temporal: nn.Module,
        head: AttentionHead,
        *,
        n_mels: int,
        n_features: int,
        temporal_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.frontend = frontend
        self.mel_norm = nn.BatchNorm2d(n_mels)  # PANNs' bn0: every mel bin at its own scale
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Conv1d(n_features, temporal_size, kernel_size=1)
        self.temporal = temporal
        self.head = head

    def forward(self, waveform: Tensor) -> SEDOutput:
        """Detect in ``waveform`` ``(batch, samples)``."""
        return self.detect(self.frontend(waveform))

    def detect(self, log_mel: Tensor) -> SEDOutput:
        """Detect in ``log_mel`` ``(batch, channels, frames, n_mels)``."""
        return self.head(self.dropout(self.temporal(self.embed(log_mel))))

    def embed(self, log_mel: Tensor) -> Tensor:
        """Return the projected backbone features ``(batch, temporal_size, frames)``."""
        normed = self.mel_norm(log_mel.transpose(1, 3)).transpose(1, 3)
        # Convolutions of one-channel images are 1.4 x faster so, on a CPU and on tensor cores.
        normed = normed.contiguous(memory_format=torch.channels_last)
        features = self.backbone.forward_features(normed)
        features = features.mean(dim=3)  # over frequency
        # A little context for every frame (1st place, after PANNs).
        features = functional.max_pool1d(features, 3, 1, 1) + functional.avg_pool1d(
            features, 3, 1, 1
        )
        return functional.relu(self.project(self.dropout(features)))


def build_backbone(config: ModelConfig, in_chans: int, *, pretrained: bool) -> nn.Module:
    """Build the timm network whose features are ``(batch, channels, frames, mels)``."""
    if not timm.is_model(config.backbone):
        close = difflib.get_close_matches(config.backbone, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no backbone {config.backbone!r}; did you mean "
            f"{', '.join(close) or 'another'}? `timm.list_models()` lists all"
        )
    try:
        return timm.create_model(
            config.backbone,
            pretrained=pretrained,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            **dict(config.backbone_options),
        )
    except TypeError as error:
        raise ValueError(f"backbone {config.backbone!r}: backbone_options: {error}") from error


def build_temporal(config: ModelConfig) -> nn.Module:
    """Build what stands between backbone and head, all on ``(batch, channels, frames)``."""
    layers = {
        "none": lambda: nn.Identity(),
        "gru": lambda: BiGRU(config.temporal_size),
        "attention": lambda: SelfAttention(config.temporal_size, config.dropout),
    }
    return nn.Sequential(*(layers[name]() for name in config.temporal.split("+")))


def build_model(experiment: Experiment, n_classes: int, *, pretrained: bool = False) -> SEDModel:
    """Build the model of ``experiment``; the only place where a model is put together.

    ``pretrained`` fetches timm's weights for the backbone and so needs the network.
    """
    frontend, config = experiment.frontend, experiment.model
    backbone = build_backbone(config, len(frontend.features), pretrained=pretrained)
    return SEDModel(
        LogMel(frontend),
        backbone,
        build_temporal(config),
        AttentionHead(config.temporal_size, n_classes),
        n_mels=frontend.n_mels,
        n_features=_count_features(backbone, frontend),
        temporal_size=config.temporal_size,
        dropout=config.dropout,
    )


def _count_features(backbone: nn.Module, frontend: FrontendConfig) -> int:
    """Return the channels of ``forward_features``; timm's ``num_features`` may differ."""
    image = torch.zeros(1, len(frontend.features), 64, frontend.n_mels)
    was_training = backbone.training
    with torch.no_grad():
        n_features = backbone.eval().forward_features(image).shape[1]
    backbone.train(was_training)
    return n_features
