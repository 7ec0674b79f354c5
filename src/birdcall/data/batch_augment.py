"""Mix clips of a batch, turn them round in time and change their gain, where the batch lies."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from birdcall.config import AugmentConfig
from birdcall.frontend import SpecAugment

N_PARTNERS = 2  # clips that can be added to one


@dataclass(frozen=True)
class BatchDraws:
    """All chance of a batch, drawn on the CPU for the clips of all processes together.

    So a GPU sees what a CPU sees, and each of several processes its `part` of what one would see.
    First dimension: the clips. index ``(n,)``: place in the whole batch; partners ``(n, 2)``: the
    clips there that are added; mix_gain ``(n, 2)``: at so many times the clip's own level, 0: not
    at all; shift ``(n,)``: in shares of the clip; gain ``(n,)``: linear; masks: of `SpecAugment`.
    """

    index: Tensor
    partners: Tensor
    mix_gain: Tensor
    shift: Tensor
    gain: Tensor
    masks: Tensor

    @classmethod
    def draw(cls, n_clips: int, config: AugmentConfig, generator: torch.Generator) -> BatchDraws:
        """Draw for a whole batch; ``generator`` is one of the CPU."""

        def chosen(probability: float) -> Tensor:
            return torch.rand(n_clips, generator=generator) < probability

        def uniform(bounds: tuple[float, float], *shape: int) -> Tensor:
            share = torch.rand(n_clips, *shape, generator=generator)
            return bounds[0] + (bounds[1] - bounds[0]) * share

        # Clips in a ring at random: each takes from the next one, or the next two.
        ring = torch.randperm(n_clips, generator=generator)
        partners = torch.empty(n_clips, N_PARTNERS, dtype=torch.int64)
        for number in range(N_PARTNERS):
            partners[ring, number] = ring.roll(-1 - number)
        mixed = chosen(config.mixup_probability)
        third = mixed & chosen(config.mixup_third_probability)
        mix_gain = _amplitude(uniform(config.mixup_gain_db, N_PARTNERS))
        mix_gain *= torch.stack([mixed & (n_clips > 1), third & (n_clips > N_PARTNERS)], dim=1)
        shift = uniform((0.0, 1.0)) * chosen(config.shift_probability)
        gain = _amplitude(uniform(config.gain_db) * chosen(config.gain_probability))
        hide = SpecAugment(config.time_mask_share, config.mel_mask_share, config.n_masks)
        masks = hide.draw(n_clips, generator)
        return cls(torch.arange(n_clips), partners, mix_gain, shift, gain, masks)

    def part(self, start: int, stop: int) -> BatchDraws:
        """Return the draws of some of the clips; partners are counted in the whole batch still."""
        return BatchDraws(*(getattr(self, item.name)[start:stop] for item in fields(self)))


def augment_batch(
    waveform: Tensor,
    target: Tensor,
    draws: BatchDraws,
    everyone: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix, then shift, then change the gain; return new tensors on the same device.

    waveform ``(batch, samples)``, target ``(batch, classes)``; ``everyone``: both of the whole
    batch, where these are a part of it. What is added is brought to the clip's own power times the
    drawn gain, so that both are heard, and targets become unions (3rd, 4th place); a silent clip
    has no power to be matched: it takes and gives nothing.
    The shift turns a clip round as a ring: what leaves at its end comes in at its start.
    """
    everyone = (waveform, target) if everyone is None else everyone
    scale = _mix_scale(everyone[0], draws)
    augmented = torch.empty_like(waveform)
    rows = zip(
        *(item.tolist() for item in (draws.partners, draws.mix_gain, draws.shift, draws.gain)),
        strict=True,
    )
    # Clip by clip: on a CPU a third of the time of whole-batch operations, as most clips need few
    # of them; on a GPU some ten launches. Nothing here waits for the device.
    for row, (partners, mix_gain, shift, gain) in enumerate(rows):
        n_shift = int(shift * waveform.shape[1])
        _copy_shifted(waveform[row], augmented[row], n_shift, gain)
        for number, partner in enumerate(partners):
            if mix_gain[number]:
                factor = scale[row, number] * gain
                _add_shifted(everyone[0][partner], augmented[row], n_shift, factor)
    return augmented, _unite(target, everyone[1], draws.partners.to(target.device), scale > 0)


def _mix_scale(waveform: Tensor, draws: BatchDraws) -> Tensor:
    """Return ``(n, 2)``, on the waveform's device: the factor on each partner, 0 where silent."""
    mix_gain = draws.mix_gain.to(waveform.device)
    if not draws.mix_gain.any():
        return mix_gain
    norm = torch.linalg.vector_norm(waveform, dim=1)  # ratios of it are those of the RMS
    index, partners = draws.index.to(waveform.device), draws.partners.to(waveform.device)
    own, other = norm[index][:, None], norm[partners]
    audible = (own > 0) & (other > 0)
    return torch.where(audible, mix_gain * own / other.clamp(min=1e-30), 0)


def _copy_shifted(source: Tensor, out: Tensor, n_shift: int, gain: float) -> None:
    n_left = len(out) - n_shift
    torch.mul(source[:n_left], gain, out=out[n_shift:])
    if n_shift:
        torch.mul(source[n_left:], gain, out=out[:n_shift])


def _add_shifted(source: Tensor, out: Tensor, n_shift: int, factor: Tensor) -> None:
    n_left = len(out) - n_shift
    out[n_shift:].addcmul_(source[:n_left], factor)
    if n_shift:
        out[:n_shift].addcmul_(source[n_left:], factor)


def _unite(target: Tensor, everyone: Tensor, partners: Tensor, heard: Tensor) -> Tensor:
    """Return the union of a clip's target and of those that were added.

    A class is UNKNOWN (-1) where it is so in one of them and positive in none.
    """
    others = torch.where(heard[..., None], everyone[partners], target[:, None])
    together = torch.cat((target[:, None], others), dim=1)
    highest = together.amax(dim=1)
    return torch.where(highest > 0, highest, together.amin(dim=1))


def _amplitude(db: Tensor) -> Tensor:
    return 10 ** (db / 20)
