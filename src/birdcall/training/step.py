"""The loss of a weakly labelled sound event detector."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from birdcall.audio.frontend import SpecAugment
from birdcall.config import Experiment, LossConfig, OptimizerConfig
from birdcall.data.augment import BatchDraws, augment_batch
from birdcall.data.loader import ClipBatch
from birdcall.data.targets import IGNORE_TARGET
from birdcall.models.sed import SEDModel, SEDOutput
from birdcall.training.distributed import (
    SINGLE_PROCESS,
    DistributedContext,
    convert_sync_batch_norm,
)
from birdcall.training.log import BatchPreview


def sed_loss(
    output: SEDOutput, target: Tensor, config: LossConfig, weight: Tensor | None = None
) -> Tensor:
    """Return the loss of a batch, a scalar: ``weight`` times each clip's own, averaged over clips.

    A clip's loss is the mean over classes of loss(clipwise) + ``framewise_weight`` x
    loss(loudest frame). The second term is the 6th place's: attention pooling alone leaves false
    frames, the maximum alone follows single impulses.

    target: ``(batch, classes)`` in [0, 1], or UNKNOWN: such a class adds nothing, and the mean is
    still over all classes, so that a batch's loss is the mean of its halves' losses. weight:
    ``(batch,)``, None: ones. Computed in float32, where the logarithm of a probability is safe.
    """
    with torch.autocast(target.device.type, enabled=False):
        known = target != IGNORE_TARGET
        target = smooth_labels(target.float().clamp(min=0), config.label_smoothing)
        peak = output.framewise.float().amax(dim=-1)
        loss = class_loss(output.clipwise.float(), target, config)
        loss = loss + config.framewise_weight * class_loss(peak, target, config)
        by_clip = torch.where(known, loss, 0).mean(dim=1)
        return (by_clip if weight is None else weight.float() * by_clip).mean()


def class_loss(probability: Tensor, target: Tensor, config: LossConfig) -> Tensor:
    """Return each element's cross-entropy, or its focal loss, in the shape of ``probability``.

    Focal (Lin et al. 2017, without alpha): cross-entropy x (1 - p_t) ** ``focal_gamma``, where p_t
    is how probable the model calls what is there; what it knows already counts less.
    """
    entropy = functional.binary_cross_entropy(probability, target, reduction="none")
    if config.name == "bce":
        return entropy
    wrong = probability * (1 - target) + (1 - probability) * target
    # A root (gamma below 1) has no slope at zero.
    return entropy * wrong.clamp(min=torch.finfo(torch.float32).eps) ** config.focal_gamma


def smooth_labels(target: Tensor, smoothing: float) -> Tensor:
    """Move targets towards one half: 0 becomes ``smoothing / 2``, 1 becomes ``1 - smoothing / 2``.

    Keras' rule for independent classes. The 2nd place of 2021 adds its 0.01 to 0.025 to targets, to
    those that are 1 as well, which no probability can reach; absent classes, nearly all there are,
    get as much here at twice the value.
    """
    return target * (1 - smoothing) + smoothing / 2


# --- step ---


PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Detector(nn.Module):
    """``model.detect`` as a module of its own, which can be compiled and distributed."""

    def __init__(self, model: SEDModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, log_mel: Tensor) -> SEDOutput:
        return self.model.detect(log_mel)


def make_detector(
    model: SEDModel, experiment: Experiment, device: torch.device, distributed: DistributedContext
) -> nn.Module:
    detector: nn.Module = Detector(model)
    if distributed.world_size > 1:
        convert_sync_batch_norm(model)
        devices = [device] if device.type == "cuda" else None
        detector = DistributedDataParallel(detector, devices, broadcast_buffers=False)
    return torch.compile(detector) if experiment.train.compile else detector


def batch_loss(
    model: SEDModel,
    detect: nn.Module,
    batch: ClipBatch,
    experiment: Experiment,
    epoch: int,
    position: int,
    device: torch.device,
    distributed: DistributedContext = SINGLE_PROCESS,
    watch: Callable[[BatchPreview], None] | None = None,
) -> Tensor:
    """Augment a batch, detect in it, and return the loss of this process's clips.

    ``epoch`` and ``position`` of the batch in it decide what is drawn. NaN where the model's output
    is not finite: cross-entropy of NaN would end a CUDA process without saying where. ``watch`` is
    shown the clips as the network heard them.
    """
    config = experiment.train
    waveform = batch.waveform.to(device, non_blocking=True)
    target = batch.target.to(device, non_blocking=True)
    whole_batch = None
    n_clips = len(waveform) * distributed.world_size
    seed = np.random.SeedSequence((config.seed, epoch, position)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed[0] >> np.uint64(1)))
    draws = BatchDraws.draw(n_clips, experiment.augment, generator)
    if distributed.world_size > 1:
        # Partners of a mix may lie in another process.
        whole_batch = (distributed.gather(waveform), distributed.gather(target))
        part = distributed.part(n_clips)
        draws = draws.part(part.start, part.stop)
    waveform, target = augment_batch(waveform, target, draws, whole_batch)
    augment = experiment.augment
    hide = SpecAugment(augment.time_mask_share, augment.mel_mask_share, augment.n_masks)
    log_mel = hide.hide(model.frontend(waveform), draws.masks)
    dtype = PRECISIONS[config.precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = detect(log_mel)
    if watch is not None:
        watch(BatchPreview.of(log_mel, target, output, batch.recordings))
    if not (output.framewise.isfinite().all() and output.clipwise.isfinite().all()):
        # Still a function of the weights, as the other processes expect of this one.
        return output.framewise.sum() * math.nan
    return sed_loss(output, target, config.loss, batch.weight.to(device, non_blocking=True))


def warmup_cosine(config: OptimizerConfig, step: int, n_steps: int) -> float:
    """Return the factor on the learning rate: up in a line, down along a cosine to nothing."""
    n_warmup = max(1, round(config.warmup_share * n_steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))
