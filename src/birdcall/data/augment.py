"""Make clean close recordings sound like distant birds in a noisy place."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from torch import Tensor

from birdcall.audio.filters import (
    butterworth_curve,
    equalizer_curve,
    fade_curve,
    fade_ends,
    filter_waveform,
    slope_curve,
)
from birdcall.audio.frontend import SpecAugment
from birdcall.audio.reading import reuse_freed_memory
from birdcall.config import AugmentConfig
from birdcall.data.cache import ReadFailure
from birdcall.data.noise import NoiseFiles

# Loader workers import this module: no audiomentations here, which imports librosa (0.6 s and 50 MB
# per worker). Where one of its transforms is switched on, it is imported with the first clip that
# needs it.

_POOL_SAMPLES = 1 << 19  # of noise of one slope, 16 s at 32 kHz; 2 MB for each slope in use
_POOL_SEED = 0
_FILTER_ORDERS = (2, 4)  # 12 to 24 dB per octave
_COLOR_FLAT_BELOW_HZ = 50.0  # or steep noise would have its power where no front end has a band
_SLOPE_STEP_DB = 0.5
_EQUALIZER_NODES = 6
_BURST_FADE_SECONDS = 0.02
_MP3_MIN_SECONDS = 0.1  # of the encoder


class ClipAugment:
    """What a loader worker does to a single clip: all that needs files or filters.

    `augment_batch` does the rest. All draws come from the generator of the clip, none from a global
    generator.
    """

    def __init__(self, config: AugmentConfig, noise: NoiseFiles) -> None:
        self.config = config
        self.sample_rate = noise.sample_rate
        self.noise = noise

    def draw_downmix(self, generator: np.random.Generator) -> float | None:
        """Draw the share of a recording's first channel, or None: the mean of its channels."""
        is_drawn = generator.random() < self.config.downmix_probability
        share = generator.random()
        return share if is_drawn else None

    def __call__(
        self, waveform: np.ndarray, generator: np.random.Generator, failures: list[ReadFailure]
    ) -> np.ndarray:
        """Return ``waveform`` ``(samples,)``, float32, filtered and with noise added.

        The array itself is not changed. Noise files that fail are added to ``failures``; raises
        NothingReadableError as `NoiseFiles.draw` does.
        """
        reuse_freed_memory()
        config, rate = self.config, self.sample_rate
        if generator.random() < config.pitch_probability:
            shift = _build_transform("PitchShift", *config.pitch_semitones)
            waveform = _transform(shift, waveform, rate, generator)
        if generator.random() < config.tempo_probability:  # pitch and number of samples stay
            change = _build_transform("TimeStretch", *config.tempo_rate)
            waveform = _transform(change, waveform, rate, generator)
        curves = []  # changes of the clip's spectrum; together they are one filter
        if generator.random() < config.low_pass_probability:
            curves.append(butterworth_curve("low", *_draw_filter(config.low_pass_hz, generator)))
        if generator.random() < config.high_fade_probability:
            curves.append(fade_curve(generator.uniform(*config.high_fade_db), rate))
        if generator.random() < config.high_pass_probability:
            curves.append(butterworth_curve("high", *_draw_filter(config.high_pass_hz, generator)))
        if curves:
            waveform = filter_waveform(waveform, rate, curves)
        if generator.random() < config.color_noise_probability:
            snr_db = generator.uniform(*config.color_noise_snr_db)
            slope_db = generator.uniform(*config.color_noise_slope_db)
            noise = color_noise(len(waveform), rate, slope_db, generator)
            waveform = mix_at_snr(waveform, noise, snr_db)
        if self.noise.paths and generator.random() < config.noise_probability:
            snr_db = generator.uniform(*config.noise_snr_db)
            noise = self.noise.draw(len(waveform), generator, failures)
            waveform = mix_at_snr(waveform, noise, snr_db)
        if generator.random() < config.short_noise_probability:
            waveform = self._add_bursts(waveform, generator, failures)
        if config.equalizer_probability and generator.random() < config.equalizer_probability:
            gains_db = generator.normal(0, config.equalizer_db, _EQUALIZER_NODES)
            waveform = filter_waveform(waveform, rate, [equalizer_curve(gains_db, rate)])
        if generator.random() < config.mp3_probability:
            waveform = encode_mp3(waveform, rate, config.mp3_kbps, generator)
        return waveform

    def _add_bursts(
        self, waveform: np.ndarray, generator: np.random.Generator, failures: list[ReadFailure]
    ) -> np.ndarray:
        """Add bursts of bird-free noise, of coloured noise where there are no files."""
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
                slope_db = generator.uniform(*config.color_noise_slope_db)
                burst = color_noise(n_samples, self.sample_rate, slope_db, generator)
            burst = fade_ends(burst, round(_BURST_FADE_SECONDS * self.sample_rate))
            noisy[start : start + n_samples] += _gain_to(power, burst, snr_db) * burst
        return noisy


def mix_at_snr(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add ``noise`` to ``waveform``, both ``(samples,)``, at this ratio of their mean powers.

    Where either is silent there is no such ratio, and the waveform is returned as it is.
    """
    gain = _gain_to(_power(waveform), noise, snr_db)
    mixed = gain * noise
    return np.add(mixed, waveform, out=mixed) if gain else waveform


def _gain_to(power: float, noise: np.ndarray, snr_db: float) -> np.float32:
    """Return the factor on ``noise`` that puts it ``snr_db`` below ``power``; 0 for silence."""
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

    Two parts of a pool of such noise are added, with random starts and a random ratio: a sum of
    Gaussian noise is Gaussian noise. To draw and filter it anew would take 2 ms for 5 s. There are
    3e11 pairs of starts, so no two clips have the same noise. The slope is rounded to 0.5 dB; each
    rounded slope has its pool.
    """
    pool = _color_pool(round(slope_db / _SLOPE_STEP_DB), sample_rate)
    angle = generator.uniform(0, 2 * math.pi)
    noise = np.zeros(n_samples, np.float32)
    for share in (math.cos(angle), math.sin(angle)):
        start = int(generator.integers(len(pool)))
        filled = 0
        while filled < n_samples:  # the pool is circular
            part = pool[start : start + n_samples - filled]
            noise[filled : filled + len(part)] += np.float32(share) * part
            filled, start = filled + len(part), 0
    return noise


@cache
def _color_pool(slope_steps: int, sample_rate: int) -> np.ndarray:
    white = np.random.default_rng(_POOL_SEED).standard_normal(_POOL_SAMPLES, dtype=np.float32)
    curve = slope_curve(slope_steps * _SLOPE_STEP_DB, _COLOR_FLAT_BELOW_HZ)
    return filter_waveform(white, sample_rate, [curve], edges="wrap")


def _draw_filter(
    bounds_hz: tuple[float, float], generator: np.random.Generator
) -> tuple[float, int]:
    """Draw cutoff, evenly over octaves, and order."""
    cutoff_hz = math.exp(generator.uniform(*map(math.log, bounds_hz)))
    return cutoff_hz, int(generator.integers(_FILTER_ORDERS[0], _FILTER_ORDERS[1] + 1))


# --- audiomentations ---


_Transform = Callable[[np.ndarray, int], np.ndarray]  # (waveform, sample rate) → waveform


def encode_mp3(
    waveform: np.ndarray, sample_rate: int, kbps: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """Encode as mp3 with a bit rate drawn from ``kbps``, and decode; samples are not shifted."""
    n_missing = math.ceil(_MP3_MIN_SECONDS * sample_rate) - len(waveform)
    padded = np.pad(waveform, (0, n_missing)) if n_missing > 0 else waveform
    encode = _build_transform("Mp3Compression", *kbps)
    return _transform(encode, padded, sample_rate, generator)[: len(waveform)]


@cache
def _build_transform(name: str, lowest: float, highest: float) -> _Transform:
    """Build a transform of audiomentations, once: that takes longer than to apply it."""
    import audiomentations

    options = {
        "TimeStretch": {"leave_length_unchanged": True},
        "Mp3Compression": {"backend": "fast-mp3-augment"},
    }.get(name, {})
    return getattr(audiomentations, name)(lowest, highest, p=1.0, **options)


def _transform(
    transform: _Transform, waveform: np.ndarray, sample_rate: int, generator: np.random.Generator
) -> np.ndarray:
    """Seed the global generators, from which audiomentations draws, and restore them after."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed := int(generator.integers(2**32)))
    np.random.seed(seed)
    try:
        changed = transform(np.ascontiguousarray(waveform, np.float32), sample_rate)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
    return np.asarray(changed, np.float32)


# --- batches ---


_N_PARTNERS = 2  # clips that can be added to a clip


@dataclass(frozen=True)
class BatchDraws:
    """All random draws of a batch, made on the CPU for the clips of all processes together.

    So a GPU gets the same draws as a CPU, and each of several processes its `part` of them. The
    first dimension is the clip.
    """

    index: Tensor  # (n,), in the whole batch
    partners: Tensor  # (n, 2), the clips of the whole batch that are added
    mix_gain: Tensor  # (n, 2), relative to the clip's level; 0: not added
    shift: Tensor  # (n,), share of the clip
    gain: Tensor  # (n,), linear
    masks: Tensor  # of `SpecAugment`

    @classmethod
    def draw(cls, n_clips: int, config: AugmentConfig, generator: torch.Generator) -> BatchDraws:
        """Draw for a whole batch; ``generator`` is on the CPU."""

        def uniform(bounds: tuple[float, float] = (0.0, 1.0), *shape: int) -> Tensor:
            share = torch.rand(n_clips, *shape, generator=generator)
            return bounds[0] + (bounds[1] - bounds[0]) * share

        # Clips in a random circle: each takes from the next one, or the next two.
        circle = torch.randperm(n_clips, generator=generator)
        partners = torch.empty(n_clips, _N_PARTNERS, dtype=torch.int64)
        for number in range(_N_PARTNERS):
            partners[circle, number] = circle.roll(-1 - number)
        mixed = uniform() < config.mixup_probability
        third = mixed & (uniform() < config.mixup_third_probability)
        mix_gain = 10 ** (uniform(config.mixup_gain_db, _N_PARTNERS) / 20)
        mix_gain *= torch.stack([mixed & (n_clips > 1), third & (n_clips > _N_PARTNERS)], dim=1)
        shift = uniform() * (uniform() < config.shift_probability)
        gain_db = uniform(config.gain_db) * (uniform() < config.gain_probability)
        masking = SpecAugment(config.time_mask_share, config.mel_mask_share, config.n_masks)
        return cls(
            index=torch.arange(n_clips),
            partners=partners,
            mix_gain=mix_gain,
            shift=shift,
            gain=10 ** (gain_db / 20),
            masks=masking.draw(n_clips, generator),
        )

    def part(self, start: int, stop: int) -> BatchDraws:
        """Return the draws of some of the clips; ``partners`` still index the whole batch."""
        return BatchDraws(*(getattr(self, item.name)[start:stop] for item in fields(self)))


def augment_batch(
    waveform: Tensor,
    target: Tensor,
    draws: BatchDraws,
    whole_batch: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix, then shift, then change the gain; return new tensors on the same device.

    waveform ``(batch, samples)``, target ``(batch, classes)``; ``whole_batch``: both of the whole
    batch, where these are a part of it. A partner is brought to the clip's power times the drawn
    gain, so that both are audible, and the target is the union (3rd, 4th place); a silent clip has
    no power to match: nothing is added to it, and it is not added. The shift is circular.
    """
    waveforms, targets = (waveform, target) if whole_batch is None else whole_batch
    scale = mix_scale(waveforms, draws)
    augmented = torch.empty_like(waveform)
    n_samples = waveform.shape[1]
    rows = zip(
        *(item.tolist() for item in (draws.partners, draws.mix_gain, draws.shift, draws.gain)),
        strict=True,
    )
    # Clip by clip: on a CPU a third of the time of whole-batch operations, as most clips need few
    # of them; on a GPU some ten launches. Nothing here waits for the device.
    for row, (partners, mix_gain, shift, gain) in enumerate(rows):
        n_shift = int(shift * n_samples)
        parts = [(slice(0, n_samples - n_shift), slice(n_shift, n_samples))]
        if n_shift:  # the end of the clip comes in at its start
            parts.append((slice(n_samples - n_shift, n_samples), slice(0, n_shift)))
        for source, goal in parts:
            torch.mul(waveform[row, source], gain, out=augmented[row, goal])
        for number, partner in enumerate(partners):
            if mix_gain[number]:
                factor = scale[row, number] * gain
                for source, goal in parts:
                    augmented[row, goal].addcmul_(waveforms[partner, source], factor)
    partner_targets = targets[draws.partners.to(target.device)]
    added = torch.where((scale > 0)[..., None], partner_targets, target[:, None])
    together = torch.cat((target[:, None], added), dim=1)
    highest = together.amax(dim=1)
    # IGNORE_TARGET (-1) where a class is so in one of them and positive in none.
    return augmented, torch.where(highest > 0, highest, together.amin(dim=1))


def mix_scale(waveform: Tensor, draws: BatchDraws) -> Tensor:
    """Return ``(n, 2)``, on the waveform's device: the factor on each partner, 0 where silent."""
    mix_gain = draws.mix_gain.to(waveform.device)
    if not draws.mix_gain.any():
        return mix_gain
    norm = torch.linalg.vector_norm(waveform, dim=1)  # ratios of norms are those of the RMS
    index, partners = draws.index.to(waveform.device), draws.partners.to(waveform.device)
    norm_of_clip, norm_of_partner = norm[index][:, None], norm[partners]
    audible = (norm_of_clip > 0) & (norm_of_partner > 0)
    return torch.where(audible, mix_gain * norm_of_clip / norm_of_partner.clamp(min=1e-30), 0)
