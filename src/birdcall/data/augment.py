"""Make clean close recordings sound like distant birds in a noisy place."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from birdcall.audio.filters import (
    HALF_KERNEL,
    Curve,
    fade_curve,
    filter_padded,
    filter_waveform,
    high_pass_curve,
    low_pass_curve,
    padded_length,
    slope_curve,
)
from birdcall.audio.frontend import SpecAugment
from birdcall.config import AugmentConfig
from birdcall.data.noise import NoiseFiles, ReadFailure

Transform = Callable[[np.ndarray, int], np.ndarray]  # (waveform, sample rate) → waveform

# Loader workers import this module: no audiomentations here, which brings librosa along (0.6 s and
# 50 MB a worker). Where a transform of it is switched on, it is imported with the first clip that
# takes it.

FILTER_ORDERS = (2, 4)  # 12 to 24 dB per octave
COLOR_FLAT_BELOW_HZ = 50.0  # else steep noise would spend its power where no front end listens
SLOPE_STEP_DB = 0.5
POOL_SAMPLES = 1 << 19  # of noise of one slope, 16 s at 32 kHz; 2 MB for each slope in use
POOL_SEED = 0
BURST_FADE_SECONDS = 0.02
MP3_MIN_SECONDS = 0.1  # of the encoder
KEPT_BYTES = 31 << 20  # the most that glibc's threshold adapts to is 32 MiB


class ClipAugment:
    """What a loader worker does to one clip: what needs files or filters. The batch has the rest.

    All draws come from the generator of the clip, none from a global one.
    """

    def __init__(
        self,
        config: AugmentConfig,
        sample_rate: int,
        noise_files: Sequence[Path] = (),
        noise_store: Path | None = None,
    ) -> None:
        self.config = config
        self.sample_rate = sample_rate
        self.noise = NoiseFiles(noise_files, sample_rate, noise_store)

    def draw_downmix(self, generator: np.random.Generator) -> float | None:
        """Draw the share of a recording's first channel, or None: the mean of its channels."""
        mixed = generator.random() < self.config.downmix_probability
        share = generator.random()
        return share if mixed else None

    def __call__(
        self,
        waveform: np.ndarray,
        generator: np.random.Generator,
        failures: list[ReadFailure],
    ) -> np.ndarray:
        """Return ``waveform`` ``(samples,)``, float32, filtered and with noise added.

        The array itself is left as it is. Noise files that fail are added to ``failures``; raises
        NothingReadableError as `NoiseFiles.draw` does.
        """
        reuse_freed_memory()
        config = self.config

        def happens(probability: float) -> bool:
            return bool(generator.random() < probability)

        if happens(config.pitch_probability):
            waveform = shift_pitch(waveform, self.sample_rate, config.pitch_semitones, generator)
        if happens(config.tempo_probability):
            waveform = stretch_time(waveform, self.sample_rate, config.tempo_rate, generator)
        if curves := self._draw_curves(generator):
            waveform = filter_waveform(waveform, self.sample_rate, curves)
        if happens(config.color_noise_probability):
            snr_db = generator.uniform(*config.color_noise_snr_db)
            waveform = mix_at_snr(waveform, self._color_noise(len(waveform), generator), snr_db)
        if self.noise.paths and happens(config.noise_probability):
            snr_db = generator.uniform(*config.noise_snr_db)
            noise = self.noise.draw(len(waveform), generator, failures)
            waveform = mix_at_snr(waveform, noise, snr_db)
        if happens(config.short_noise_probability):
            waveform = self._add_bursts(waveform, generator, failures)
        if happens(config.mp3_probability):
            waveform = encode_mp3(waveform, self.sample_rate, config.mp3_kbps, generator)
        return waveform

    def _draw_curves(self, generator: np.random.Generator) -> list[Curve]:
        """Draw what is done to the clip's spectrum; all of it is one filter."""
        config, curves = self.config, []
        if generator.random() < config.low_pass_probability:
            curves.append(low_pass_curve(*_draw_filter(config.low_pass_hz, generator)))
        if generator.random() < config.high_fade_probability:
            curves.append(fade_curve(generator.uniform(*config.high_fade_db), self.sample_rate))
        if generator.random() < config.high_pass_probability:
            curves.append(high_pass_curve(*_draw_filter(config.high_pass_hz, generator)))
        return curves

    def _color_noise(self, n_samples: int, generator: np.random.Generator) -> np.ndarray:
        slope_db = generator.uniform(*self.config.color_noise_slope_db)
        return color_noise(n_samples, self.sample_rate, slope_db, generator)

    def _add_bursts(
        self, waveform: np.ndarray, generator: np.random.Generator, failures: list[ReadFailure]
    ) -> np.ndarray:
        """Add bursts of bird-free sound, of coloured noise where there are no files."""
        config, power = self.config, _power(waveform)
        lowest, highest = config.short_noise_count
        noisy = waveform.copy()
        for _ in range(generator.integers(lowest, highest + 1)):
            snr_db = generator.uniform(*config.short_noise_snr_db)
            n_samples = round(generator.uniform(*config.short_noise_seconds) * self.sample_rate)
            n_samples = min(max(1, n_samples), len(waveform))
            start = int(generator.integers(len(waveform) - n_samples + 1))
            if self.noise.paths:
                burst = self.noise.draw(n_samples, generator, failures)
            else:
                burst = self._color_noise(n_samples, generator)
            burst = fade_ends(burst, round(BURST_FADE_SECONDS * self.sample_rate))
            noisy[start : start + n_samples] += _gain_to(power, burst, snr_db) * burst
        return noisy


def mix_at_snr(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add ``noise`` to ``waveform``, both ``(samples,)``, at this ratio of their mean powers.

    Where either is silent there is no such ratio, and the waveform stays as it is.
    """
    gain = _gain_to(_power(waveform), noise, snr_db)
    return waveform + gain * noise if gain else waveform


def _gain_to(power: float, noise: np.ndarray, snr_db: float) -> np.float32:
    """Return the factor on ``noise`` that puts it so far below ``power``; 0 for silence."""
    noise_power = _power(noise)
    if power == 0 or noise_power == 0:
        return np.float32(0)
    return np.float32(math.sqrt(power / noise_power * 10 ** (-snr_db / 10)))


def _power(waveform: np.ndarray) -> float:
    # Not np.dot: BLAS sums in another order with other threads, and a clip must not depend on them.
    return float(np.einsum("i,i", waveform, waveform)) / len(waveform)


def color_noise(
    n_samples: int, sample_rate: int, slope_db: float, generator: np.random.Generator
) -> np.ndarray:
    """Return noise ``(n_samples,)``, float32, of ``slope_db`` decibels per octave.

    Two stretches of a pool of such noise, at places and in a ratio that are drawn, are added: a sum
    of Gaussian noise is Gaussian noise, drawing and filtering it anew would take 2 ms of 5 s, and
    there are 3e11 pairs of places, so that no two clips have the same noise. The slope is rounded
    to `SLOPE_STEP_DB`, of which each has its pool.
    """
    pool = _color_pool(round(slope_db / SLOPE_STEP_DB), sample_rate)
    angle = generator.uniform(0, 2 * math.pi)
    noise = np.zeros(n_samples, np.float32)
    for share in (math.cos(angle), math.sin(angle)):
        start = int(generator.integers(len(pool)))
        filled = 0
        while filled < n_samples:  # the pool is a ring
            part = pool[start : start + n_samples - filled]
            noise[filled : filled + len(part)] += np.float32(share) * part
            filled, start = filled + len(part), 0
    return noise


@cache
def _color_pool(slope_steps: int, sample_rate: int) -> np.ndarray:
    white = np.random.default_rng(POOL_SEED).standard_normal(POOL_SAMPLES, dtype=np.float32)
    n_after = padded_length(POOL_SAMPLES) - POOL_SAMPLES - HALF_KERNEL
    ring = np.pad(white, (HALF_KERNEL, n_after), mode="wrap")
    curve = slope_curve(slope_steps * SLOPE_STEP_DB, COLOR_FLAT_BELOW_HZ)
    return filter_padded(ring, sample_rate, [curve])[:POOL_SAMPLES]


def fade_ends(waveform: np.ndarray, n_fade: int) -> np.ndarray:
    """Let the first and last ``n_fade`` samples, a half at most, rise and fall along a cosine."""
    n_fade = min(n_fade, len(waveform) // 2)
    envelope = np.ones(len(waveform), np.float32)
    rise = np.sin(np.pi / 2 * (np.arange(n_fade, dtype=np.float32) + 0.5) / max(1, n_fade)) ** 2
    envelope[:n_fade] = rise
    envelope[len(waveform) - n_fade :] = rise[::-1]
    return waveform * envelope


def _draw_filter(
    bounds_hz: tuple[float, float], generator: np.random.Generator
) -> tuple[float, int]:
    """Draw cutoff, evenly over octaves, and order."""
    cutoff_hz = math.exp(generator.uniform(*map(math.log, bounds_hz)))
    return cutoff_hz, int(generator.integers(FILTER_ORDERS[0], FILTER_ORDERS[1] + 1))


# --- by audiomentations --------------------------------------------------------------------------


def shift_pitch(
    waveform: np.ndarray,
    sample_rate: int,
    semitones: tuple[float, float],
    generator: np.random.Generator,
) -> np.ndarray:
    """Shift all pitches by so many semitones, drawn from ``semitones``; the tempo stays."""
    return _transform(_pitch_shift(*semitones), waveform, sample_rate, generator)


def stretch_time(
    waveform: np.ndarray,
    sample_rate: int,
    rate: tuple[float, float],
    generator: np.random.Generator,
) -> np.ndarray:
    """Play so many times as fast, drawn from ``rate``; pitch and number of samples stay.

    What is faster ends in silence, what is slower loses its end.
    """
    return _transform(_time_stretch(*rate), waveform, sample_rate, generator)


def encode_mp3(
    waveform: np.ndarray,
    sample_rate: int,
    kbps: tuple[int, int],
    generator: np.random.Generator,
) -> np.ndarray:
    """Encode as mp3, of a bit rate drawn from ``kbps``, and decode; samples keep their places."""
    n_missing = math.ceil(MP3_MIN_SECONDS * sample_rate) - len(waveform)
    padded = np.pad(waveform, (0, n_missing)) if n_missing > 0 else waveform
    return _transform(_mp3_compression(*kbps), padded, sample_rate, generator)[: len(waveform)]


# Each of a range's own, made once: to make one takes longer than to use it.
@cache
def _pitch_shift(lowest: float, highest: float) -> Transform:
    from audiomentations import PitchShift

    return PitchShift(lowest, highest, p=1.0)


@cache
def _time_stretch(lowest: float, highest: float) -> Transform:
    from audiomentations import TimeStretch

    return TimeStretch(lowest, highest, leave_length_unchanged=True, p=1.0)


@cache
def _mp3_compression(lowest: int, highest: int) -> Transform:
    from audiomentations import Mp3Compression

    return Mp3Compression(lowest, highest, backend="fast-mp3-augment", p=1.0)


def _transform(
    transform: Transform, waveform: np.ndarray, sample_rate: int, generator: np.random.Generator
) -> np.ndarray:
    with seeded_globals(int(generator.integers(2**32))):
        made = transform(np.ascontiguousarray(waveform, np.float32), sample_rate)
    return np.asarray(made, np.float32)


@contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed the global generators, from which audiomentations draws, and put them back after."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


# --- memory --------------------------------------------------------------------------------------


@cache
def reuse_freed_memory() -> None:
    """Have this process keep the memory of the clips that it is done with, for the next ones.

    glibc hands larger blocks back to the system when they are freed, and every page of the next one
    is a fault: 160 of them, 0.3 ms, for each array of a 5-s clip, more than all that is computed on
    it. The size from which it does so grows to that of the largest block that has been freed.
    Elsewhere this does nothing.
    """
    block = bytearray(KEPT_BYTES)
    del block


# --- batch augment ---


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
