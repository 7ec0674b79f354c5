"""The loss of a weakly labelled sound event detector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from birdcall.config import TrainConfig
from birdcall.data.augment import UNKNOWN
from birdcall.models import SEDOutput


def sed_loss(
    output: SEDOutput, target: Tensor, config: TrainConfig, weight: Tensor | None = None
) -> Tensor:
    """Return the loss of a batch, a scalar: ``weight`` times each clip's own, averaged over clips.

    A clip's loss is the mean over classes of loss(clipwise) + ``framewise_loss_weight`` x
    loss(loudest frame). The second term is the 6th place's: attention pooling alone leaves false
    frames, the maximum alone follows single impulses.

    target: ``(batch, classes)`` in [0, 1], or UNKNOWN: such a class adds nothing, and the mean is
    still over all classes, so that a batch's loss is the mean of its halves' losses. weight:
    ``(batch,)``, None: ones. Computed in float32, where the logarithm of a probability is safe.
    """
    with torch.autocast(target.device.type, enabled=False):
        known = target != UNKNOWN
        target = smooth_labels(target.float().clamp(min=0), config.label_smoothing)
        peak = output.framewise.float().amax(dim=-1)
        loss = class_loss(output.clipwise.float(), target, config)
        loss = loss + config.framewise_loss_weight * class_loss(peak, target, config)
        by_clip = torch.where(known, loss, 0).mean(dim=1)
        return (by_clip if weight is None else weight.float() * by_clip).mean()


def class_loss(probability: Tensor, target: Tensor, config: TrainConfig) -> Tensor:
    """Return each element's cross-entropy, or its focal loss, in the shape of ``probability``.

    Focal (Lin et al. 2017, without alpha): cross-entropy x (1 - p_t) ** ``focal_gamma``, where p_t
    is how probable the model calls what is there; what it knows already counts less.
    """
    entropy = functional.binary_cross_entropy(probability, target, reduction="none")
    if config.loss == "bce":
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
