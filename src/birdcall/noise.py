"""Make bird-free noise with a stated spectrum, and find the bird-free recordings a user has."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from scipy import fft

from birdcall.files import atomic_path

NOISE_KINDS = ("white", "pink", "brown", "rain", "wind", "hum")
AUDIO_SUFFIXES = (".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
NOISE_RMS = 0.1  # every kind has this level; mixing scales to the SNR that it wants

SHAPE_FROM_HZ = 20.0  # below it all spectra are flat, or brown noise would be one slow wave
RAIN_PEAK_HZ = 1_000.0
WIND_CORNER_HZ = 100.0
MAINS_HZ = 60  # North America
N_MAINS_HARMONICS = 16
HUM_FLOOR_DB = -20.0  # of the pink floor, below the lines together

FLUCTUATION_STEP = 64


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
    if kind not in _MAKERS:
        raise ValueError(f"noise kind is {kind!r}; choose one of {', '.join(NOISE_KINDS)}")
    if n_samples < 1 or sample_rate < 1:
        raise ValueError(f"n_samples {n_samples} and sample_rate {sample_rate} must be above 0")
    noise = _MAKERS[kind](n_samples, sample_rate, generator)
    noise = noise - noise.mean()
    rms = np.sqrt(np.mean(np.square(noise)))
    return (noise * (NOISE_RMS / rms if rms > 0 else 1.0)).astype(np.float32)


def find_noise(folder: Path) -> list[Path]:
    """List the audio files below ``folder``, sorted; an absent folder has none.

    Links to folders are followed (noise collections are large and often linked), each real
    folder once, so that a link to a parent ends.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = Path(root).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(root, name) for name in files if name.lower().endswith(AUDIO_SUFFIXES)]
    return sorted(path for path in found if path.is_file())


def generate_noise(
    folder: Path, sample_rate: int = 32_000, seconds: float = 20.0, per_kind: int = 3
) -> list[Path]:
    """Write ``per_kind`` wav files of each kind of noise to ``folder``, unless they are there."""
    paths = []
    for kind in NOISE_KINDS:
        for number in range(per_kind):
            path = folder / f"{kind}_{sample_rate}_{seconds:g}s_{number}.wav"
            paths.append(path)
            if path.is_file():
                continue
            generator = np.random.default_rng((NOISE_KINDS.index(kind), number))
            noise = make_noise(kind, round(seconds * sample_rate), sample_rate, generator)
            with atomic_path(path) as temporary:
                soundfile.write(temporary, noise, sample_rate, subtype="FLOAT")
    return paths


def slow_fluctuation(
    n_samples: int, sample_rate: int, rate_hz: float, generator: np.random.Generator
) -> np.ndarray:
    """Draw a smooth random curve ``(n_samples,)`` of unit variance with changes at ``rate_hz``."""
    n_knots = max(4, int(np.ceil(n_samples / sample_rate * 2 * rate_hz)) + 3)
    knots = generator.standard_normal(n_knots)
    # Computed at every 64th sample and linear between them: long curves are slow otherwise.
    n_steps = -(-n_samples // FLUCTUATION_STEP)
    place = np.linspace(0, n_knots - 3, n_steps + 1) + generator.random()
    left = np.minimum(place.astype(np.int64), n_knots - 2)
    turn = (1 - np.cos(np.pi * np.clip(place - left, 0, 1))) / 2
    curve = knots[left] * (1 - turn) + knots[left + 1] * turn
    curve = (curve / np.sqrt(0.75)).astype(np.float32)  # between knots the sum varies less
    ramp = np.arange(FLUCTUATION_STEP, dtype=np.float32) / FLUCTUATION_STEP
    return (curve[:-1, None] + np.diff(curve)[:, None] * ramp).ravel()[:n_samples]


def shape_spectrum(
    waveform: np.ndarray,
    sample_rate: int,
    amplitude: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Filter ``waveform`` by ``amplitude(frequency_hz)``, without delay."""
    n_fft = fft.next_fast_len(len(waveform), real=True)
    spectrum = fft.rfft(waveform, n_fft)
    frequency = np.maximum(fft.rfftfreq(n_fft, 1 / sample_rate), SHAPE_FROM_HZ)
    spectrum *= amplitude(frequency).astype(np.float32)
    return fft.irfft(spectrum, n_fft)[: len(waveform)]


def _white(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    return generator.standard_normal(n_samples, dtype=np.float32)


def _pink(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    return shape_spectrum(
        _white(n_samples, sample_rate, generator), sample_rate, lambda hz: hz**-0.5
    )


def _brown(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    return shape_spectrum(_white(n_samples, sample_rate, generator), sample_rate, lambda hz: 1 / hz)


def _rain(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    # Drops are a Poisson train of impulses, whose spectrum is flat: the shape stays as stated.
    drops = np.zeros(n_samples, np.float32)
    n_drops = generator.poisson(n_samples / sample_rate * generator.uniform(40, 200))
    size = generator.standard_normal(n_drops, dtype=np.float32)
    np.add.at(drops, generator.integers(0, n_samples, n_drops), size)
    power = np.mean(np.square(drops))
    patter = _white(n_samples, sample_rate, generator) + drops / np.sqrt(max(power, 1e-12))

    def amplitude(frequency: np.ndarray) -> np.ndarray:
        ratio = frequency / RAIN_PEAK_HZ
        return np.where(ratio < 1, ratio, np.maximum(ratio, 1e-9) ** -0.5)

    return shape_spectrum(patter, sample_rate, amplitude)


def _wind(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    def amplitude(frequency: np.ndarray) -> np.ndarray:
        ratio = frequency / WIND_CORNER_HZ
        return np.where(ratio < 1, ratio**-0.5, ratio**-1.5)

    breeze = shape_spectrum(_white(n_samples, sample_rate, generator), sample_rate, amplitude)
    rate_hz = generator.uniform(0.1, 0.4)
    gusts = slow_fluctuation(n_samples, sample_rate, rate_hz, generator)
    return breeze * 10 ** (np.clip(4 * gusts, -10, 10) / 20)  # 4 dB up and down


def _hum(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    period = sample_rate // math.gcd(sample_rate, MAINS_HZ)  # whole cycles in whole samples
    seconds = np.arange(period) / sample_rate
    lines = np.zeros(period)
    for harmonic in range(1, N_MAINS_HARMONICS + 1):
        if harmonic * MAINS_HZ < sample_rate / 2:
            phase = generator.uniform(0, 2 * np.pi)
            lines += np.sin(2 * np.pi * harmonic * MAINS_HZ * seconds + phase) / harmonic
    lines = np.resize(lines.astype(np.float32), n_samples)
    floor = _pink(n_samples, sample_rate, generator)
    level = np.sqrt(np.mean(np.square(lines)) / max(np.mean(np.square(floor)), 1e-12))
    return lines + floor * level * 10 ** (HUM_FLOOR_DB / 20)


_MAKERS = {
    "white": _white,
    "pink": _pink,
    "brown": _brown,
    "rain": _rain,
    "wind": _wind,
    "hum": _hum,
}
