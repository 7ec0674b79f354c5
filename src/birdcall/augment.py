"""Make clean close recordings sound like distant birds in a noisy place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from birdcall.audio import AudioError, probe_audio, read_audio
from birdcall.config import AugmentConfig
from birdcall.noise import make_noise, shape_spectrum

# Loader workers import this module: no audiomentations here, which imports librosa and, with the
# first noise file, numba (2 s and 200 MB a worker). Where a transform of it is needed, import it
# where the transform is switched on.

MAX_TRIES = 8  # other files that are tried for one that fails; if none of them reads, none will
LOW_PASS_ORDERS = (2, 4)  # 12 to 24 dB per octave
EDGE_SAMPLES = 512  # of silence behind the clip, or its end would ring in its beginning


class ReadFailure(NamedTuple):
    """A file that could not be read while training, and why: one line that names the file."""

    kind: str  # "recording" or "noise file"
    path: str
    reason: str

    @classmethod
    def of(cls, kind: str, path: str, error: Exception) -> ReadFailure:
        reason = " ".join(str(error).split())
        return cls(kind, path, reason if path in reason else f"{path}: {reason}")


class NothingReadableError(ValueError):
    """Neither a file nor any that was tried in its place could be read."""


class NoiseFiles:
    """Bird-free sound files, to be drawn from."""

    def __init__(self, paths: Sequence[Path], sample_rate: int) -> None:
        self.paths = list(paths)
        self.sample_rate = sample_rate

    def draw(
        self, n_samples: int, generator: np.random.Generator, failures: list[ReadFailure]
    ) -> np.ndarray:
        """Read a random stretch ``(n_samples,)``, float32, of a random file.

        Files that cannot be read are added to ``failures`` and another is drawn. Raises
        NothingReadableError after ``MAX_TRIES`` of them.
        """
        place = generator.random()
        n_tries = min(len(self.paths), MAX_TRIES)
        for index in generator.choice(len(self.paths), n_tries, replace=False):
            try:
                return self._read(self.paths[index], n_samples, place)
            except (AudioError, OSError) as error:
                failures.append(ReadFailure.of("noise file", str(self.paths[index]), error))
        raise NothingReadableError(f"none of {n_tries} noise files can be read")

    def _read(self, path: Path, n_samples: int, place: float) -> np.ndarray:
        seconds = n_samples / self.sample_rate
        spare = probe_audio(path).seconds - seconds
        if spare > 0:
            return read_audio(path, self.sample_rate, place * spare, seconds)
        # Noise has no beginning: a short file is repeated until the clip is full.
        return np.resize(read_audio(path, self.sample_rate), n_samples)


class ClipAugment:
    """What a loader worker does to one clip: what needs files or filters. The batch has the rest.

    All draws come from the generator of the clip, none from a global one.
    """

    def __init__(
        self, config: AugmentConfig, sample_rate: int, noise_files: Sequence[Path] = ()
    ) -> None:
        self.config = config
        self.sample_rate = sample_rate
        self.noise = NoiseFiles(noise_files, sample_rate)

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
        config = self.config
        if generator.random() < config.low_pass_probability:
            cutoff_hz = math.exp(generator.uniform(*map(math.log, config.low_pass_hz)))
            order = int(generator.integers(LOW_PASS_ORDERS[0], LOW_PASS_ORDERS[1] + 1))
            waveform = low_pass(waveform, self.sample_rate, cutoff_hz, order)
        if generator.random() < config.color_noise_probability:
            snr_db = generator.uniform(*config.color_noise_snr_db)
            noise = make_noise("pink", len(waveform), self.sample_rate, generator)
            waveform = mix_at_snr(waveform, noise, snr_db)
        if self.noise.paths and generator.random() < config.noise_probability:
            snr_db = generator.uniform(*config.noise_snr_db)
            noise = self.noise.draw(len(waveform), generator, failures)
            waveform = mix_at_snr(waveform, noise, snr_db)
        return waveform


def low_pass(waveform: np.ndarray, sample_rate: int, cutoff_hz: float, order: int) -> np.ndarray:
    """Filter with the magnitude of a Butterworth low-pass, without its delay."""

    def amplitude(frequency_hz: np.ndarray) -> np.ndarray:
        return 1 / np.sqrt(1 + (frequency_hz / cutoff_hz) ** (2 * order))

    padded = np.pad(waveform, (0, EDGE_SAMPLES))
    return shape_spectrum(padded, sample_rate, amplitude)[: len(waveform)]


def mix_at_snr(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add ``noise`` to ``waveform``, both ``(samples,)``, at this ratio of their mean powers.

    Where either is silent there is no such ratio, and the waveform stays as it is.
    """
    clip_power, noise_power = _power(waveform), _power(noise)
    if clip_power == 0 or noise_power == 0:
        return waveform
    gain = math.sqrt(clip_power / noise_power * 10 ** (-snr_db / 10))
    return waveform + np.float32(gain) * noise


def _power(waveform: np.ndarray) -> float:
    return float(np.mean(np.square(waveform, dtype=np.float64)))


def augment_batch(
    waveform: Tensor, target: Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix up and change the gain of a batch, where it lies.

    waveform: ``(batch, samples)``; target: ``(batch, classes)``. Draws come from
    ``generator`` on the CPU, so that a GPU sees the same numbers.
    """
    waveform, target = mix_up(waveform, target, config, generator)
    n_clips = len(waveform)
    chosen = torch.rand(n_clips, generator=generator) < config.gain_probability
    gain_db = _uniform(n_clips, config.gain_db, generator) * chosen
    return waveform * _amplitude(gain_db).to(waveform.device)[:, None], target


def mix_up(
    waveform: Tensor, target: Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Add another clip of the batch to some clips; targets become unions (3rd, 4th place).

    The other clip is brought to the clip's own power times the drawn gain, so that both are heard.
    """
    n_clips = len(waveform)
    partner = torch.randperm(n_clips, generator=generator)
    chosen = torch.rand(n_clips, generator=generator) < config.mixup_probability
    gain = _amplitude(_uniform(n_clips, config.mixup_gain_db, generator))
    chosen &= partner != torch.arange(n_clips)
    partner, gain, chosen = (item.to(waveform.device) for item in (partner, gain, chosen))
    rms = waveform.square().mean(dim=1).sqrt()
    # A silent clip has no power to be matched; it takes or gives nothing.
    audible = (rms > 0) & (rms[partner] > 0) & chosen
    scale = torch.where(audible, gain * rms / rms[partner].clamp(min=1e-12), 0)
    mixed = waveform + scale[:, None] * waveform[partner]
    union = torch.where(audible[:, None], torch.maximum(target, target[partner]), target)
    return mixed, union


def _uniform(n: int, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(n, generator=generator)


def _amplitude(db: Tensor) -> Tensor:
    return 10 ** (db / 20)
