"""Crop and filter waveforms (any curve over frequency, without delay); synthesise noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr
from scipy import fft

from birdcall.storage.files import atomic_path

# A filter is a symmetric kernel of so many samples (32 ms at 32 kHz) and is applied block by block
# (overlap-save). Fifty short transforms stay in the processor's cache, one of 160,000 points does
# not: measured 0.4 (torch's FFT; scipy's 0.55) against 2.2 ms for a 5-s clip.
_KERNEL_SAMPLES = 1025
_BLOCK_SAMPLES = 4096
_HALF_KERNEL = _KERNEL_SAMPLES // 2
_STEP_SAMPLES = _BLOCK_SAMPLES - _KERNEL_SAMPLES + 1

Curve = Callable[[np.ndarray], np.ndarray]  # frequencies in Hz → gain (linear) at each


def crop_or_pad(waveform: np.ndarray, n_samples: int, offset: int = 0) -> np.ndarray:
    """Return exactly ``n_samples`` of ``waveform`` from ``offset`` on, zeros after its end."""
    if n_samples < 0 or offset < 0:
        raise ValueError(f"n_samples {n_samples} and offset {offset} must not be negative")
    crop = waveform[..., offset : offset + n_samples]
    missing = n_samples - crop.shape[-1]
    if not missing:
        return crop
    return np.pad(crop, [(0, 0)] * (crop.ndim - 1) + [(0, missing)])


def fade_ends(waveform: np.ndarray, n_fade: int) -> np.ndarray:
    """Fade the first ``n_fade`` samples in and the last ones out, along a cosine; at most half."""
    n_fade = min(n_fade, len(waveform) // 2)
    envelope = np.ones(len(waveform), np.float32)
    rise = np.sin(np.pi / 2 * (np.arange(n_fade, dtype=np.float32) + 0.5) / max(1, n_fade)) ** 2
    envelope[:n_fade] = rise
    envelope[len(waveform) - n_fade :] = rise[::-1]
    return waveform * envelope


def butterworth_curve(kind: Literal["low", "high"], cutoff_hz: float, order: int) -> Curve:
    """Return the magnitude of a Butterworth low-pass or high-pass, 6 dB per octave and order."""
    if kind == "low":
        return lambda hz: 1 / np.sqrt(1 + (hz / cutoff_hz) ** (2 * order))
    return lambda hz: 1 / np.sqrt(1 + (cutoff_hz / np.maximum(hz, 1)) ** (2 * order))


def fade_curve(fade_db: float, sample_rate: int) -> Curve:
    """Return a line in decibels from 0 at 0 Hz to ``-fade_db`` at half the sample rate."""
    return lambda hz: 10 ** (-fade_db / 20 * hz / (sample_rate / 2))


def equalizer_curve(gains_db: np.ndarray, sample_rate: int) -> Curve:
    """Return gains in decibels at nodes that are evenly spaced over the mel scale, from 0 Hz on.

    Between the nodes the gain in decibels is linear (FilterAugment, Nam et al. 2022).
    """
    nodes = np.linspace(0, _mel(np.asarray(sample_rate / 2)), len(gains_db))
    return lambda hz: 10 ** (np.interp(_mel(hz), nodes, gains_db) / 20)


def _mel(hz: np.ndarray) -> np.ndarray:
    return 2595 * np.log10(1 + hz / 700)


def slope_curve(db_per_octave: float, flat_below_hz: float) -> Curve:
    """Return a curve that falls (or rises) by so many decibels per octave, flat at the bottom."""
    exponent = db_per_octave / (20 * np.log10(2))
    return lambda hz: (np.maximum(hz, flat_below_hz) / flat_below_hz) ** exponent


def filter_waveform(
    waveform: np.ndarray,
    sample_rate: int,
    curves: list[Curve],
    *,
    edges: Literal["constant", "wrap"] = "constant",
) -> np.ndarray:
    """Filter ``waveform`` ``(samples,)`` by the product of ``curves``; float32, the same length.

    ``edges`` is what lies before and after the waveform, in the words of ``np.pad``: silence
    ("constant") or the waveform itself ("wrap").
    """
    import torch  # here: the processes that synthesise noise for the demo need no torch

    n_blocks = -(-len(waveform) // _STEP_SAMPLES)
    n_after = n_blocks * _STEP_SAMPLES + _HALF_KERNEL - len(waveform)
    padded = np.pad(waveform.astype(np.float32, copy=False), (_HALF_KERNEL, n_after), mode=edges)
    blocks = torch.from_numpy(padded).unfold(0, _BLOCK_SAMPLES, _STEP_SAMPLES)
    spectra = torch.fft.rfft(blocks).mul_(torch.from_numpy(_response(sample_rate, curves)))
    filtered = torch.fft.irfft(spectra, _BLOCK_SAMPLES)
    # Before _HALF_KERNEL and from there on by _STEP_SAMPLES a block's end leaks into its start.
    whole = filtered[:, _HALF_KERNEL : _HALF_KERNEL + _STEP_SAMPLES].reshape(-1)
    return whole[: len(waveform)].numpy()


def _response(sample_rate: int, curves: list[Curve]) -> np.ndarray:
    """Return the gains of the curves' kernel, cut to length, at a block's frequencies."""
    hz = fft.rfftfreq(_BLOCK_SAMPLES, 1 / sample_rate).astype(np.float32)
    gain = np.prod([curve(hz) for curve in curves], axis=0, dtype=np.float32)
    kernel = fft.irfft(gain, _BLOCK_SAMPLES)  # its middle is sample 0, its first half at the end
    kernel[_HALF_KERNEL + 1 : -_HALF_KERNEL] = 0
    kernel[1 : _HALF_KERNEL + 1] *= _TAPER
    kernel[-_HALF_KERNEL:] *= _TAPER[::-1]
    return fft.rfft(kernel).real


# The kernel's outer half fades: a sharp cut would ring.
_TAPER = np.ones(_HALF_KERNEL, np.float32)
_TAPER[_HALF_KERNEL // 2 :] = np.cos(np.linspace(0, np.pi / 2, _HALF_KERNEL // 2)) ** 2


# --- noise ---


NOISE_KINDS = ("white", "pink", "brown", "rain", "wind", "hum")
NOISE_RMS = 0.1  # of all kinds; mixing scales noise to the SNR

_FLAT_BELOW_HZ = 20.0  # all spectra are flat below it, or brown noise would be one slow wave
_RAIN_PEAK_HZ = 1_000.0
_WIND_CORNER_HZ = 100.0
_MAINS_HZ = 60  # North America
_N_MAINS_HARMONICS = 16
_HUM_FLOOR_DB = -20.0  # of the pink floor, below the lines together
_FLUCTUATION_STEP = 64  # samples


def generate_noise(
    folder: Path, sample_rate: int = 32_000, seconds: float = 20.0, per_kind: int = 3
) -> list[Path]:
    """Write ``per_kind`` wav files of each kind of noise to ``folder``, unless they are there."""
    paths = []
    for kind_index, kind in enumerate(NOISE_KINDS):
        for number in range(per_kind):
            path = folder / f"{kind}_{sample_rate}_{seconds:g}s_{number}.wav"
            paths.append(path)
            if path.is_file():
                continue
            generator = np.random.default_rng((kind_index, number))
            noise = make_noise(kind, round(seconds * sample_rate), sample_rate, generator)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                soundfile.write(file, noise, sample_rate, format="WAV", subtype="FLOAT")
    return paths


def make_noise(
    kind: str, n_samples: int, sample_rate: int, generator: np.random.Generator
) -> np.ndarray:
    """Return float32 noise ``(n_samples,)`` of zero mean and RMS ``NOISE_RMS``.

    The power spectral densities, all flat below 20 Hz:

    =====  ==========================================================================
    kind   spectrum
    =====  ==========================================================================
    white  flat (0 dB/octave), Gaussian
    pink   -3 dB/octave, Gaussian
    brown  -6 dB/octave, Gaussian
    rain   +6 dB/octave up to 1 kHz, -3 dB/octave above; half its power are single drops
    wind   -3 dB/octave up to 100 Hz, -9 dB/octave above; gusts swell and fade in seconds
    hum    lines at 60, 120, … 960 Hz falling by 6 dB/octave, and 20 dB below all of them
           together a floor of pink noise
    =====  ==========================================================================
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"noise kind is {kind!r}; choose one of {', '.join(NOISE_KINDS)}")
    if n_samples < 1 or sample_rate < 1:
        raise ValueError(f"n_samples {n_samples} and sample_rate {sample_rate} must be above 0")
    if kind == "hum":
        noise = _make_hum(n_samples, sample_rate, generator)
    elif kind == "rain":
        noise = _make_rain(n_samples, sample_rate, generator)
    else:
        noise = generator.standard_normal(n_samples, dtype=np.float32)
    if kind in _NOISE_CURVES:
        noise = shape_spectrum(noise, sample_rate, _NOISE_CURVES[kind])
    if kind == "wind":
        rate_hz = generator.uniform(0.1, 0.4)
        gusts = slow_fluctuation(n_samples, sample_rate, rate_hz, generator)
        noise = noise * 10 ** (np.clip(4 * gusts, -10, 10) / 20)  # 4 dB up and down
    noise = noise - noise.mean()
    rms = np.sqrt(np.mean(np.square(noise)))
    return (noise * (NOISE_RMS / rms if rms > 0 else 1.0)).astype(np.float32)


def shape_spectrum(waveform: np.ndarray, sample_rate: int, curve: Curve) -> np.ndarray:
    """Filter a whole ``waveform`` in one transform; below 20 Hz with the gain at 20 Hz."""
    n_fft = fft.next_fast_len(len(waveform), real=True)
    spectrum = fft.rfft(waveform, n_fft)
    spectrum *= _gains(n_fft, sample_rate, curve)
    return fft.irfft(spectrum, n_fft)[: len(waveform)]


@lru_cache(maxsize=2)  # simulated soundscapes have one length; the gains of a minute take 4 MB
def _gains(n_fft: int, sample_rate: int, curve: Curve) -> np.ndarray:
    hz = np.maximum(fft.rfftfreq(n_fft, 1 / sample_rate), _FLAT_BELOW_HZ)
    return curve(hz).astype(np.float32)


def slow_fluctuation(
    n_samples: int, sample_rate: int, rate_hz: float, generator: np.random.Generator
) -> np.ndarray:
    """Draw a smooth random curve ``(n_samples,)`` of unit variance with changes at ``rate_hz``."""
    n_knots = max(4, int(np.ceil(n_samples / sample_rate * 2 * rate_hz)) + 3)
    knots = generator.standard_normal(n_knots)
    # Computed at every 64th sample and linear in between: long curves are slow otherwise.
    n_steps = -(-n_samples // _FLUCTUATION_STEP)
    position = np.linspace(0, n_knots - 3, n_steps + 1) + generator.random()
    left = np.minimum(position.astype(np.int64), n_knots - 2)
    turn = (1 - np.cos(np.pi * np.clip(position - left, 0, 1))) / 2
    curve = knots[left] * (1 - turn) + knots[left + 1] * turn
    curve = (curve / np.sqrt(0.75)).astype(np.float32)  # the sum varies less between knots
    ramp = np.arange(_FLUCTUATION_STEP, dtype=np.float32) / _FLUCTUATION_STEP
    return (curve[:-1, None] + np.diff(curve)[:, None] * ramp).ravel()[:n_samples]


def _corner_curve(corner_hz: float, below: float, above: float) -> Curve:
    """Return a curve of power laws that is 1 at ``corner_hz``, with one exponent on either side."""
    return lambda hz: np.where(hz < corner_hz, (hz / corner_hz) ** below, (hz / corner_hz) ** above)


_NOISE_CURVES: dict[str, Curve] = {
    "pink": lambda hz: hz**-0.5,
    "brown": lambda hz: 1 / hz,
    "rain": _corner_curve(_RAIN_PEAK_HZ, below=1.0, above=-0.5),
    "wind": _corner_curve(_WIND_CORNER_HZ, below=-0.5, above=-1.5),
}


def _make_rain(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    """Return white noise with drops: a Poisson train of impulses, whose spectrum is flat."""
    drops = np.zeros(n_samples, np.float32)
    n_drops = generator.poisson(n_samples / sample_rate * generator.uniform(40, 200))
    size = generator.standard_normal(n_drops, dtype=np.float32)
    np.add.at(drops, generator.integers(0, n_samples, n_drops), size)
    power = np.mean(np.square(drops))
    return generator.standard_normal(n_samples, dtype=np.float32) + drops / np.sqrt(
        max(power, 1e-12)
    )


def _make_hum(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    period = sample_rate // math.gcd(sample_rate, _MAINS_HZ)  # whole cycles in whole samples
    seconds = np.arange(period) / sample_rate
    lines = np.zeros(period)
    for harmonic in range(1, _N_MAINS_HARMONICS + 1):
        if harmonic * _MAINS_HZ < sample_rate / 2:
            phase = generator.uniform(0, 2 * np.pi)
            lines += np.sin(2 * np.pi * harmonic * _MAINS_HZ * seconds + phase) / harmonic
    lines = np.resize(lines.astype(np.float32), n_samples)
    floor = shape_spectrum(
        generator.standard_normal(n_samples, dtype=np.float32), sample_rate, _NOISE_CURVES["pink"]
    )
    level = np.sqrt(np.mean(np.square(lines)) / max(np.mean(np.square(floor)), 1e-12))
    return lines + floor * level * 10 ** (_HUM_FLOOR_DB / 20)


# --- resampling ---


def resampled_length(n_samples: int, from_rate: int, to_rate: int) -> int:
    """Return how many samples soxr makes of ``n_samples``."""
    return (2 * n_samples * to_rate + from_rate) // (2 * from_rate)


def resample_blocks(
    blocks: Iterable[np.ndarray], from_rate: int, to_rate: int
) -> Iterator[np.ndarray]:
    """Resample consecutive blocks as if they were one waveform (soxr HQ)."""
    if from_rate == to_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def rearrange_blocks(blocks: Iterable[np.ndarray], n_block: int) -> Iterator[np.ndarray]:
    """Yield the same samples in blocks of ``n_block``, the last one shorter."""
    waiting: list[np.ndarray] = []
    n_waiting = 0
    for block in blocks:
        waiting.append(block)
        n_waiting += len(block)
        while n_waiting >= n_block:
            joined = np.concatenate(waiting)
            yield joined[:n_block]
            waiting = [joined[n_block:]]
            n_waiting -= n_block
    if n_waiting:
        yield np.concatenate(waiting)


# --- levels ---


# Of full scale: 40 dB above it, where floats of field recorders stay below 24 dB. Integers written
# as floats are above it, and squares of samples below it are far from overflow.
MAX_LEVEL = 100.0
MAX_BEYOND_SHARE = 0.1  # of the samples; of more, the recording is refused
BEYOND_REASON = f"not finite numbers, or beyond {MAX_LEVEL:g} times full scale"
_MIN_RANGE = 2e-4  # of samples from lowest to highest; -80 dB


class LevelCheck:
    """Silences samples that are beyond reason, and notes what the others of a recording are."""

    def __init__(self) -> None:
        self.n_samples = self.n_beyond = 0  # of all channels, so far
        self.lowest, self.highest = math.inf, -math.inf

    def silence_beyond(self, block: np.ndarray) -> int | None:
        """Silence such samples of ``(frames, channels)``, where they are.

        Return the frame of the first of all blocks; None: there is none, or it has been returned.
        """
        lowest, highest, first = block.min(), block.max(), None
        self.n_samples += block.size
        if not (lowest >= -MAX_LEVEL and highest <= MAX_LEVEL):  # NaN too
            is_beyond = ~(np.abs(block) <= MAX_LEVEL)
            if not self.n_beyond:
                first = int(is_beyond.any(axis=1).argmax())
            self.n_beyond += int(is_beyond.sum())
            block[is_beyond] = 0
            lowest, highest = block.min(), block.max()
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        return first

    @property
    def beyond_share(self) -> float:
        return self.n_beyond / max(1, self.n_samples)

    @property
    def is_constant(self) -> bool:
        return self.highest - self.lowest <= _MIN_RANGE
