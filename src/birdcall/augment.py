"""Make clean close recordings sound like distant birds in a noisy place."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import audiomentations
import numpy as np
import torch
from torch import Tensor

from birdcall.config import AugmentConfig

PINK_DB_PER_OCTAVE = -3.01


@contextmanager
def seeded_globals(generator: np.random.Generator) -> Iterator[None]:
    """Let audiomentations, which draws from the global generators, draw from ``generator``.

    The global states are put back, so nothing else sees a difference.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    seed = int(generator.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class ClipAugment:
    """What audiomentations does to a clip in a loader worker: what needs files or filters."""

    def __init__(
        self, config: AugmentConfig, sample_rate: int, noise_files: Sequence[Path] = ()
    ) -> None:
        self.config = config
        self.sample_rate = sample_rate
        self.noise_files = list(noise_files)
        self.transform = audiomentations.Compose(self._transforms())

    def _transforms(
        self,
    ) -> list[audiomentations.core.transforms_interface.BaseWaveformTransform]:
        config = self.config
        transforms = [
            audiomentations.LowPassFilter(
                min_cutoff_freq=config.low_pass_hz[0],
                max_cutoff_freq=config.low_pass_hz[1],
                p=config.low_pass_probability,
            ),
            audiomentations.AddColorNoise(
                min_snr_db=config.color_noise_snr_db[0],
                max_snr_db=config.color_noise_snr_db[1],
                min_f_decay=PINK_DB_PER_OCTAVE,
                max_f_decay=PINK_DB_PER_OCTAVE,
                p=config.color_noise_probability,
            ),
        ]
        if self.noise_files:
            transforms.append(self._background(config.noise_probability))
        return transforms

    def _background(self, probability: float) -> audiomentations.AddBackgroundNoise:
        return audiomentations.AddBackgroundNoise(
            self.noise_files,
            min_snr_db=self.config.noise_snr_db[0],
            max_snr_db=self.config.noise_snr_db[1],
            p=probability,
        )

    def __call__(self, waveform: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return an augmented copy of ``waveform`` ``(samples,)``, float32."""
        with seeded_globals(generator):
            return self.transform(samples=waveform, sample_rate=self.sample_rate)


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
