"""Build the sound event detectors: front end, backbone, pooling, temporal layer and head."""

from __future__ import annotations

import difflib
import math
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from birdcall.audio.frontend import LogMel
from birdcall.config import Experiment, FrontendConfig, ModelConfig
from birdcall.models.backbones import PANNS

MIN_FRAMES = 32  # the stride of nearly every backbone: one frame comes out of them


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


class MeanPooling(nn.Module):
    """The mean over frequency: (batch, channels, frames, mels) → ``(batch, channels, frames)``."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=3)


class GeM(nn.Module):
    """Generalised mean over frequency (Radenovic et al., 2018), between mean and maximum.

    ``(batch, channels, frames, mels)`` → ``(batch, channels, frames)``; the power is learned. At 1
    it is the mean; no power is let above ``HIGHEST``, where it is the maximum to some percent.
    """

    EPS, LOWEST, HIGHEST = 1e-6, 1.0, 16.0

    def __init__(self, power: float = 3.0) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.full((1,), power))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            values = features.float().clamp(min=self.EPS)
            power = self.power.float().clamp(self.LOWEST, self.HIGHEST)
            # In shares of the largest, of which no power overflows. It cancels out, so no gradient
            # need pass through it.
            largest = values.detach().amax(dim=3, keepdim=True)
            pooled = (values / largest).pow(power).mean(dim=3).pow(1 / power)
            return (pooled * largest.squeeze(3)).to(features.dtype)


class DetectionHead(nn.Module):
    """Framewise probabilities, and what a subclass makes of them for the clip.

    ``(batch, channels, frames)`` → `SEDOutput`. Everything behind the one detection layer is
    computed in float32.
    """

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__()
        self.detection = nn.Conv1d(channels, n_classes, kernel_size=1)
        nn.init.xavier_uniform_(self.detection.weight)
        # Most species are absent from most frames; starting there saves the first epochs.
        nn.init.constant_(self.detection.bias, -math.log(max(n_classes - 1, 1)))

    def forward(self, features: Tensor) -> SEDOutput:
        logits = self.detection(features).float()
        return SEDOutput(self.pool(logits, features), torch.sigmoid(logits))

    def pool(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return the clipwise probabilities of framewise ``logits`` (batch, classes, frames)."""
        raise NotImplementedError


class AttentionHead(DetectionHead):
    """PANNs' attention pooling: the clip is the weighted mean of its frames.

    tanh keeps the attention's softmax from collapsing on one frame (1st, 6th place); Kong et al.
    (2020) clamp to [-10, 10] instead.
    """

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__(channels, n_classes)
        self.attention = nn.Conv1d(channels, n_classes, kernel_size=1)
        nn.init.xavier_uniform_(self.attention.weight)
        nn.init.zeros_(self.attention.bias)

    def attend(self, features: Tensor) -> Tensor:
        """Return the weights ``(batch, classes, frames)``, which sum to 1 over the frames."""
        return torch.softmax(torch.tanh(self.attention(features)).float(), dim=-1)

    def pool(self, logits: Tensor, features: Tensor) -> Tensor:
        # Rounding lets a weighted mean of ones exceed one, which binary cross-entropy refuses.
        return (self.attend(features) * torch.sigmoid(logits)).sum(dim=-1).clamp(0, 1)


class MaxHead(DetectionHead):
    """The clip is its loudest frame: what weak labels say literally (Kumar and Raj, 2016).

    Only one frame of a clip learns from it, so that training is slow and follows single impulses.
    """

    def pool(self, logits: Tensor, features: Tensor) -> Tensor:
        return torch.sigmoid(logits.amax(dim=-1))


class LogMeanExpHead(DetectionHead):
    """The clip's odds are the mean of its frames' odds: log(mean(exp(logits))) in logits.

    A soft maximum, as in the 7th and the 39th place (first on the public board). It is taken on
    logits: on probabilities, which are at most 1, it would be little more than their mean, and a
    call of one second in a clip of thirty would be lost. Every frame learns, in proportion to its
    odds. The sharpness is the 7th place's fixed 1: a learned one may run off to the mean or to the
    maximum, and frames are worse off with either.
    """

    def pool(self, logits: Tensor, features: Tensor) -> Tensor:
        log_sum = torch.logsumexp(logits, dim=-1)
        return torch.sigmoid(log_sum - math.log(logits.shape[-1]))


POOLINGS = {"mean": MeanPooling, "gem": GeM}
HEADS = {"attention": AttentionHead, "max": MaxHead, "log_mean_exp": LogMeanExpHead}


class SEDModel(nn.Module):
    """A sound event detector, from waveform to probabilities per clip and per frame.

    ``model(waveform)`` is ``model.detect(model.frontend(waveform))``; members of an ensemble that
    share a front end call `detect` on one log-mel. Under autocast, wrap `detect` alone: the front
    end stays in float32 either way.
    """

    def __init__(
        self,
        frontend: LogMel,
        backbone: nn.Module,
        pooling: nn.Module,
        temporal: nn.Module,
        head: DetectionHead,
        *,
        n_mels: int,
        n_features: int,
        temporal_size: int,
        dropout: float,
        channels_last: bool,
    ) -> None:
        super().__init__()
        self.frontend = frontend
        self.mel_norm = nn.BatchNorm2d(n_mels)  # PANNs' bn0: every mel bin at its own scale
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone = backbone.to(memory_format=self.memory_format)
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Conv1d(n_features, temporal_size, kernel_size=1)
        self.temporal = temporal
        self.head = head

    def forward(self, waveform: Tensor) -> SEDOutput:
        """Detect in ``waveform`` ``(batch, samples)``."""
        return self.detect(self.frontend(waveform))

    def detect(self, log_mel: Tensor) -> SEDOutput:
        """Detect in ``log_mel`` ``(batch, channels, frames, n_mels)``."""
        return self.head(self.features(log_mel))

    def features(self, log_mel: Tensor) -> Tensor:
        """Return what the head sees, ``(batch, temporal_size, frames)``."""
        return self.dropout(self.temporal(self.embed(log_mel)))

    def embed(self, log_mel: Tensor) -> Tensor:
        """Return the projected backbone features ``(batch, temporal_size, frames)``."""
        normed = self.mel_norm(log_mel.transpose(1, 3)).transpose(1, 3)
        normed = pad_frames(normed).contiguous(memory_format=self.memory_format)
        features = self.pooling(self.backbone.forward_features(normed))
        # A little context for every frame (1st place, after PANNs).
        features = functional.max_pool1d(features, 3, 1, 1) + functional.avg_pool1d(
            features, 3, 1, 1
        )
        return functional.relu(self.project(self.dropout(features)))


def pad_frames(image: Tensor) -> Tensor:
    """Repeat the last frame of ``image`` (batch, channels, frames, mels) up to ``MIN_FRAMES``.

    Shorter images vanish in backbones that round down when they halve, such as DenseNet.
    """
    missing = MIN_FRAMES - image.shape[2]
    if missing <= 0:
        return image
    return torch.cat((image, image[:, :, -1:].expand(-1, -1, missing, -1)), dim=2)


def build_backbone(config: ModelConfig, in_chans: int, *, pretrained: bool) -> nn.Module:
    """Build the network whose ``forward_features`` are ``(batch, channels, frames, mels)``.

    ``ValueError`` names a backbone or an option that does not exist, with what does.
    """
    name, options = config.backbone, dict(config.backbone_options)
    try:
        if name in PANNS:
            return PANNS[name](in_chans, **options)
        _require_backbone(name)
        return timm.create_model(
            name,
            pretrained=pretrained,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            **options,
        )
    except TypeError as error:
        raise ValueError(f"backbone {name!r}: backbone_options: {error}") from error


def _require_backbone(name: str) -> None:
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name, [*PANNS, *timm.list_models()], n=3)
    raise ValueError(
        f"there is no backbone {name!r}; did you mean {', '.join(close) or 'another'}? There are "
        f"{', '.join(PANNS)} and what `timm.list_models()` lists"
    )


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
        frontend=LogMel(frontend),
        backbone=backbone,
        pooling=POOLINGS[config.pooling](),
        temporal=build_temporal(config),
        head=HEADS[config.head](config.temporal_size, n_classes),
        n_mels=frontend.n_mels,
        n_features=_count_features(backbone, config.backbone, frontend),
        temporal_size=config.temporal_size,
        dropout=config.dropout,
        channels_last=experiment.train.channels_last,
    )


def _count_features(backbone: nn.Module, name: str, frontend: FrontendConfig) -> int:
    """Return the channels of ``forward_features``; timm's ``num_features`` may differ.

    ``ValueError`` if what comes out of two lengths is no image whose third axis is time.
    """
    shapes = []
    was_training = backbone.training
    backbone.eval()
    for n_frames in (MIN_FRAMES, 4 * MIN_FRAMES):
        image = torch.zeros(1, len(frontend.features), n_frames, frontend.n_mels)
        try:
            with torch.no_grad():
                shapes.append(tuple(backbone.forward_features(image).shape))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"backbone {name!r} takes no image of {n_frames} frames and {frontend.n_mels} mel "
                f"bins, so it is not a CNN of any length: {str(error).splitlines()[0]}"
            ) from error
    backbone.train(was_training)
    short, long = shapes
    if len(short) != 4 or long[1] != short[1] or long[2] <= short[2] or long[3] != short[3]:
        raise ValueError(
            f"backbone {name!r} gives features {short}, and {long} of four times as many frames; "
            "choose a CNN, which gives (batch, channels, frames, mels)"
        )
    return short[1]
