"""The loss of a weakly labelled sound event detector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from birdcall.models import SEDOutput


def sed_loss(output: SEDOutput, target: Tensor, framewise_weight: float) -> Tensor:
    """Return BCE(clipwise) + ``framewise_weight`` x BCE(loudest frame), a scalar.

    target: ``(batch, classes)`` in [0, 1]. The second term is the 6th place's: attention pooling
    alone leaves false frames, the maximum alone follows single impulses. Computed in float32,
    where the logarithm of a probability is safe.
    """
    with torch.autocast(target.device.type, enabled=False):
        target = target.float()
        clip_loss = functional.binary_cross_entropy(output.clipwise.float(), target)
        peak = output.framewise.float().amax(dim=-1)
        return clip_loss + framewise_weight * functional.binary_cross_entropy(peak, target)
