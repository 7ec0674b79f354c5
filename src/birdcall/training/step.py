"""Make one forward pass of the training: augment a batch, detect in it, compute its loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from birdcall.config import Experiment, TrainConfig
from birdcall.data.batch_augment import BatchDraws, augment_batch
from birdcall.data.loader import ClipBatch
from birdcall.frontend import SpecAugment
from birdcall.models import SEDModel, SEDOutput
from birdcall.training.distributed import ALONE, Processes, share_batch_norm
from birdcall.training.losses import sed_loss
from birdcall.training.pictures import Watched

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Detector(nn.Module):
    """``model.detect`` as a module of its own, which can be compiled and distributed."""

    def __init__(self, model: SEDModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, log_mel: Tensor) -> SEDOutput:
        return self.model.detect(log_mel)


def make_detector(
    model: SEDModel, experiment: Experiment, device: torch.device, processes: Processes
) -> nn.Module:
    detector: nn.Module = Detector(model)
    if processes.world_size > 1:
        share_batch_norm(model)
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
    processes: Processes = ALONE,
    watch: Callable[[Watched], None] | None = None,
) -> Tensor:
    """Augment a batch, detect in it, and return the loss of this process's clips.

    ``epoch`` and ``position`` of the batch in it decide what is drawn. NaN where the model's output
    is not finite: cross-entropy of NaN would end a CUDA process without saying where. ``watch`` is
    shown the clips as the network heard them.
    """
    config = experiment.train
    waveform = batch.waveform.to(device, non_blocking=True)
    target = batch.target.to(device, non_blocking=True)
    everyone = None
    n_clips = len(waveform) * processes.world_size
    seed = np.random.SeedSequence((config.seed, epoch, position)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed[0] >> np.uint64(1)))
    draws = BatchDraws.draw(n_clips, experiment.augment, generator)
    if processes.world_size > 1:
        # Partners of a mix may lie in another process.
        everyone = (processes.gather(waveform), processes.gather(target))
        part = processes.part(n_clips)
        draws = draws.part(part.start, part.stop)
    waveform, target = augment_batch(waveform, target, draws, everyone)
    augment = experiment.augment
    hide = SpecAugment(augment.time_mask_share, augment.mel_mask_share, augment.n_masks)
    log_mel = hide.hide(model.frontend(waveform), draws.masks)
    dtype = PRECISIONS[config.precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = detect(log_mel)
    if watch is not None:
        watch(Watched.of(log_mel, target, output, batch.recordings))
    if not (output.framewise.isfinite().all() and output.clipwise.isfinite().all()):
        # Still a function of the weights, as the other processes expect of this one.
        return output.framewise.sum() * math.nan
    return sed_loss(output, target, config, batch.weight.to(device, non_blocking=True))


def warmup_cosine(config: TrainConfig, step: int, n_steps: int) -> float:
    """Return the factor on the learning rate: up in a line, down along a cosine to nothing."""
    n_warmup = max(1, round(config.warmup_share * n_steps))
    if step < n_warmup:
        return (step + 1) / n_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / max(1, n_steps - n_warmup)))
