"""Build the sound event detectors: front end, backbone, pooling, temporal layer and head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from birdcall.audio.frontend import LogMel
from birdcall.config import Experiment
from birdcall.models.backbones import MIN_FRAMES, build_backbone, count_features


class SEDOutput(NamedTuple):
    """Probabilities in [0, 1], float32.

    clipwise: ``(batch, classes)``, of a species in the clip.
    framewise: ``(batch, classes, frames)``, over time; when a frame is depends on the backbone, see
    `birdcall.models.summary.measure_frame_times`.
    """

    clipwise: Tensor
    framewise: Tensor


# --- temporal layers: (batch, channels, frames) in and out ---


class BiGRU(nn.Module):
    """Bidirectional GRU as a residual branch.

    Without the shortcut the gradient must pass through a recurrent layer between backbone and
    head, and short trainings ended at chance level.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, channels // 2, batch_first=True, bidirectional=True)

    def forward(self, features: Tensor) -> Tensor:
        hidden, _ = self.gru(features.transpose(1, 2))
        return features + hidden.transpose(1, 2)


class SelfAttention(nn.Module):
    """One pre-norm transformer layer with sinusoidal positions (Vaswani et al., 2017)."""

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
        hidden = features.transpose(1, 2)  # (batch, frames, channels)
        n_frames, channels = hidden.shape[1:]
        frame = torch.arange(n_frames, device=hidden.device, dtype=torch.float32)[:, None]
        rate = torch.arange(0, channels, 2, device=hidden.device, dtype=torch.float32)
        angle = frame * torch.exp(rate * (-math.log(10_000.0) / channels))
        positions = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
        return self.layer(hidden + positions.to(hidden.dtype)).transpose(1, 2)


# --- pooling over frequency: (batch, channels, frames, mels) to (batch, channels, frames) ---


class MeanPooling(nn.Module):
    """The mean over frequency."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=3)


class GeM(nn.Module):
    """Generalised mean over frequency (Radenovic et al., 2018), between mean and maximum.

    The power is learned. At 1 it is the mean; at ``HIGHEST``, which limits it, it is the maximum
    to some percent.
    """

    EPS, LOWEST, HIGHEST = 1e-6, 1.0, 16.0

    def __init__(self, power: float = 3.0) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.full((1,), power))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            values = features.float().clamp(min=self.EPS)
            power = self.power.float().clamp(self.LOWEST, self.HIGHEST)
            # Relative to the largest value, so that no power overflows. It cancels out, so no
            # gradient need pass through it.
            largest = values.detach().amax(dim=3, keepdim=True)
            pooled = (values / largest).pow(power).mean(dim=3).pow(1 / power)
            return (pooled * largest.squeeze(3)).to(features.dtype)


# --- heads: (batch, channels, frames) to SEDOutput ---


class DetectionHead(nn.Module):
    """Framewise probabilities; a subclass pools them to the clipwise ones.

    Everything after the detection layer is computed in float32.
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
        # By rounding, a weighted mean of ones can exceed one, which binary cross-entropy refuses.
        return (self.attend(features) * torch.sigmoid(logits)).sum(dim=-1).clamp(0, 1)


class MaxHead(DetectionHead):
    """The clip is its loudest frame: what weak labels mean literally (Kumar and Raj, 2016).

    Only one frame of a clip gets a gradient, so training is slow and follows single impulses.
    """

    def pool(self, logits: Tensor, features: Tensor) -> Tensor:
        return torch.sigmoid(logits.amax(dim=-1))


class LogMeanExpHead(DetectionHead):
    """The clip's odds are the mean of its frames' odds: log(mean(exp(logits))) in logits.

    A soft maximum, as in the 7th and the 39th place (first on the public board). It is taken on
    logits: on probabilities, which are at most 1, it would be little more than their mean, and a
    call of one second in a clip of thirty would be lost. Every frame gets a gradient, in
    proportion to its odds. The sharpness is the 7th place's fixed 1: a learned sharpness may
    drift to the mean or to the maximum, and both make framewise probabilities worse.
    """

    def pool(self, logits: Tensor, features: Tensor) -> Tensor:
        log_sum = torch.logsumexp(logits, dim=-1)
        return torch.sigmoid(log_sum - math.log(logits.shape[-1]))


POOLINGS = {"mean": MeanPooling, "gem": GeM}
HEADS = {"attention": AttentionHead, "max": MaxHead, "log_mean_exp": LogMeanExpHead}


# --- the model ---


class SEDModel(nn.Module):
    """A sound event detector, from waveform to probabilities per clip and per frame.

    ``model(waveform)`` is ``model.detect(model.frontend(waveform))``; members of an ensemble that
    share a front end call `detect` on one log-mel. Under autocast, wrap `detect` alone: the front
    end stays in float32 either way.

    n_features: channels of the backbone's output. pooling, temporal, head: see the sections above.
    memory_format: of images; ``torch.channels_last`` is faster on a CPU and on tensor cores.
    """

    def __init__(
        self,
        *,
        frontend: LogMel,
        backbone: nn.Module,
        n_features: int,
        pooling: nn.Module,
        temporal: nn.Module,
        head: DetectionHead,
        dropout: float,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.frontend = frontend
        # PANNs' bn0: every mel bin of every channel has a scale of its own. Pooled over the
        # channels, decibels of -50 would leave the deltas, which are near 0, no contrast.
        n_channels = len(frontend.config.features)
        self.mel_norm: nn.Module = nn.Identity()
        if not getattr(backbone, "takes_decibels", False):
            self.mel_norm = nn.BatchNorm2d(n_channels * frontend.config.n_mels)
        self.memory_format = memory_format
        self.backbone = backbone.to(memory_format=memory_format)
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Conv1d(n_features, head.detection.in_channels, kernel_size=1)
        self.temporal = temporal
        self.head = head

    def forward(self, waveform: Tensor) -> SEDOutput:
        """Detect in ``waveform`` ``(batch, samples)``."""
        return self.detect(self.frontend(waveform))

    def detect(self, log_mel: Tensor) -> SEDOutput:
        """Detect in ``log_mel`` ``(batch, channels, frames, n_mels)``."""
        return self.head(self.features(log_mel))

    def features(self, log_mel: Tensor) -> Tensor:
        """Return the input of the head, ``(batch, temporal_size, frames)``."""
        return self.dropout(self.temporal(self.embed(log_mel)))

    def embed(self, log_mel: Tensor) -> Tensor:
        """Return the projected backbone features ``(batch, temporal_size, frames)``."""
        features = self.extract(log_mel)
        # A little context for every frame (1st place, after PANNs).
        features = functional.max_pool1d(features, 3, 1, 1) + functional.avg_pool1d(
            features, 3, 1, 1
        )
        return functional.relu(self.project(self.dropout(features)))

    def extract(self, log_mel: Tensor) -> Tensor:
        """Return the backbone's features, pooled over frequency, ``(batch, n_features, frames)``.

        Of an image with fewer than ``MIN_FRAMES`` frames the last frame is repeated.
        """
        by_bin = log_mel.transpose(1, 2).flatten(2)[
            :, None
        ]  # (batch, 1, frames, channels * n_mels)
        normalised = self.mel_norm(by_bin.transpose(1, 3)).transpose(1, 3)
        image = normalised[:, 0].unflatten(2, (log_mel.shape[1], -1)).transpose(1, 2)
        missing = MIN_FRAMES - image.shape[2]
        if missing > 0:  # shorter images vanish in backbones that round down, such as DenseNet
            image = torch.cat((image, image[:, :, -1:].expand(-1, -1, missing, -1)), dim=2)
        image = image.contiguous(memory_format=self.memory_format)
        return self.pooling(self.backbone.forward_features(image))


def build_model(experiment: Experiment, n_classes: int, *, pretrained: bool = False) -> SEDModel:
    """Build the model of ``experiment``; every model is built here.

    ``pretrained`` downloads timm's weights of the backbone.
    """
    frontend, config = experiment.frontend, experiment.model
    size, dropout = config.temporal_size, config.dropout
    channels_last = experiment.train.channels_last
    backbone = build_backbone(config, len(frontend.features), pretrained=pretrained)
    temporal_layers = {
        "none": nn.Identity,
        "gru": lambda: BiGRU(size),
        "attention": lambda: SelfAttention(size, dropout),
    }
    return SEDModel(
        frontend=LogMel(frontend),
        backbone=backbone,
        n_features=count_features(backbone, config.backbone, frontend),
        pooling=POOLINGS[config.pooling](),
        temporal=nn.Sequential(*(temporal_layers[name]() for name in config.temporal.split("+"))),
        head=HEADS[config.head](size, n_classes),
        dropout=dropout,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


# --- training on a GPU ---


def record_graph(network: nn.Module, log_mel: Tensor) -> None:
    """Make ``network`` replay its forward and backward pass as CUDA graphs, while it is training.

    log_mel: an example, whose shape and device all later ones have. A replay launches all kernels
    at once, where Python takes longer to launch each of them than a GPU to run it. The results are
    those of the kernels one by one; normalisations and random generators stay as they are.
    """
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):
        # The weights' gradients wait for the stream of the recording; torch warns that this costs.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    with torch.random.fork_rng([log_mel.device]):
        torch.cuda.make_graphed_callables(network, (log_mel.detach().clone(),))
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    torch.cuda.empty_cache()  # what the runs before the recording needed
