"""Serve training clips: crops of recordings with their targets, the same ones in every run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from birdcall.audio import crop_or_pad, probe_audio, read_audio
from birdcall.audit import read_audit, usable_recordings
from birdcall.augment import ClipAugment
from birdcall.cache import Cache
from birdcall.config import Experiment
from birdcall.folds import read_folds
from birdcall.noise import find_noise, generate_noise
from birdcall.recordings import check_recordings_exist, classes_of, read_recordings

logger = logging.getLogger(__name__)

# (path below the data folder, sample rate, offset in seconds, duration in seconds or None for all
# the rest) → waveform (samples,)
ReadClip = Callable[[str, int, float, float | None], np.ndarray]


@dataclass(frozen=True)
class TrainingData:
    """What runs share: recordings with ``fold`` and true ``seconds``, and a way to their sound."""

    folder: Path  # the data folder; `recordings["path"]` is below it
    recordings: pd.DataFrame
    classes: tuple[str, ...]
    read_clip: ReadClip
    noise_files: Sequence[Path] = ()

    @property
    def folds(self) -> list[int]:
        return sorted(int(fold) for fold in self.recordings["fold"].unique())

    def split(self, fold: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the training and the validation recordings of ``fold``."""
        if fold not in self.folds:
            known = ", ".join(map(str, self.folds))
            raise ValueError(f"fold {fold} is out of range; the folds are {known}")
        held_out = self.recordings["fold"] == fold
        return self.recordings[~held_out], self.recordings[held_out]


@dataclass(frozen=True)
class ClipReader:
    """A `ReadClip`: from the cache where the audit has left one, else by seeking in the file."""

    folder: Path
    cache: Path

    def __call__(
        self, path: str, sample_rate: int, offset: float, duration: float | None
    ) -> np.ndarray:
        return Cache(self.cache, sample_rate).read(self.folder, path, offset, duration)


def load_training_data(
    folder: Path, folds: Path, audit: Path, cache: Path, noise: Path | None = None
) -> TrainingData:
    """Join the recordings of ``folder`` with their audit and folds; open cache and noise.

    Recordings that the audit leaves out are not in it. Bird-free sound is taken from ``noise``,
    else from the data folder's ``noise/``; where there is none it is generated, beside the cache.
    """
    recordings = read_recordings(folder)
    classes = classes_of(recordings)
    recordings = usable_recordings(recordings, read_audit(audit))
    recordings = recordings.merge(
        read_folds(folds, recordings)[["filename", "fold"]],
        on="filename",
        validate="one_to_one",
    )
    check_recordings_exist(recordings, folder)
    noise_files = find_noise(noise or folder / "noise")
    if not noise_files:
        if noise is not None:
            raise FileNotFoundError(f"{noise}: no audio in this folder of noise")
        logger.info("%s has no noise/: wind, rain, hum and coloured noise are generated", folder)
        noise_files = generate_noise(cache.parent / "generated_noise")
    return TrainingData(folder, recordings, classes, ClipReader(folder, cache), noise_files)


class ClipRequest(NamedTuple):
    """Which clip to make: enough to draw the same one in any worker of any run."""

    epoch: int
    position: int  # in the epoch
    index: int  # of the recording


class ClipSampler(Sampler[ClipRequest]):
    """Draw an epoch's clips from (seed, epoch) alone; call `set_epoch` before each epoch.

    ``balanced`` draws every class equally often (1st place); ``uniform`` every recording.
    """

    def __init__(
        self, ebird_codes: Sequence[str], n_clips: int | None, sampling: str, seed: int
    ) -> None:
        codes = pd.Series(list(ebird_codes))
        weights = (
            1 / codes.map(codes.value_counts()) if sampling == "balanced" else codes.index >= 0
        )
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.n_clips = n_clips or len(codes)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n_clips

    def __iter__(self) -> Iterator[ClipRequest]:
        generator = np.random.default_rng((self.seed, self.epoch))
        # Systematic sampling: in an epoch a recording comes up as often as its weight says, +-1.
        steps = (np.arange(self.n_clips) + generator.random()) / self.n_clips
        order = generator.permutation(len(self.weights))
        drawn = np.searchsorted(np.cumsum(self.weights[order]), steps).clip(max=len(order) - 1)
        for position, index in enumerate(generator.permutation(order[drawn])):
            yield ClipRequest(self.epoch, position, int(index))


class ClipDataset(Dataset[tuple[Tensor, Tensor]]):
    """Clips of recordings with their targets: ``(clip samples,)`` and ``(classes,)``, float32.

    recordings: rows with ``path``, ``ebird_code``, ``secondary_codes`` and ``seconds`` (the true
    length). noise_files: bird-free sound, to mix in and to learn nocall from.
    """

    def __init__(
        self,
        recordings: pd.DataFrame,
        classes: Sequence[str],
        experiment: Experiment,
        read_clip: ReadClip,
        noise_files: Sequence[Path] = (),
    ) -> None:
        self.experiment = experiment
        self.read_clip = read_clip
        self.noise_files = list(noise_files)
        self.paths = list(recordings["path"])
        self.seconds = recordings["seconds"].to_numpy(dtype=np.float64)
        self.targets = make_targets(recordings, classes, experiment.train.secondary_label_weight)
        self.augment = ClipAugment(
            experiment.augment, experiment.frontend.sample_rate, self.noise_files
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, request: ClipRequest) -> tuple[Tensor, Tensor]:
        seed = self.experiment.train.seed
        generator = np.random.default_rng((seed, request.epoch, request.position))
        noise_only = generator.random() < self.experiment.augment.noise_only_probability
        if noise_only and self.noise_files:
            waveform = self._read_noise(generator)
            return torch.from_numpy(waveform), torch.zeros(self.targets.shape[1])
        waveform = self._read_crop(request.index, generator)
        waveform = np.ascontiguousarray(self.augment(waveform, generator), dtype=np.float32)
        return torch.from_numpy(waveform), torch.from_numpy(self.targets[request.index])

    def _read_crop(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """Read a random crop; what is shorter than the clip lies at a random place in silence."""
        path, sample_rate = self.paths[index], self.experiment.frontend.sample_rate
        clip_seconds, n_samples = self.experiment.train.clip_seconds, self.experiment.clip_samples
        spare = self.seconds[index] - clip_seconds
        place = generator.random()
        if spare > 0:
            waveform = self.read_clip(path, sample_rate, place * spare, clip_seconds)
            return crop_or_pad(waveform, n_samples)
        waveform = self.read_clip(path, sample_rate, 0.0, None)
        before = round(place * max(0, n_samples - len(waveform)))
        return crop_or_pad(np.pad(waveform, (before, 0)), n_samples)

    def _read_noise(self, generator: np.random.Generator) -> np.ndarray:
        path = self.noise_files[int(generator.integers(len(self.noise_files)))]
        clip_seconds, n_samples = self.experiment.train.clip_seconds, self.experiment.clip_samples
        spare = probe_audio(path).seconds - clip_seconds
        place = generator.random()
        if spare > 0:
            offset, duration = place * spare, clip_seconds
        else:
            offset, duration = 0.0, None
        waveform = read_audio(path, self.experiment.frontend.sample_rate, offset, duration)
        # Noise has no beginning: a short file is repeated until the clip is full.
        return np.resize(waveform, n_samples).astype(np.float32)


def make_targets(
    recordings: pd.DataFrame, classes: Sequence[str], secondary_label_weight: float
) -> np.ndarray:
    """Return targets ``(recordings, classes)``: 1 for the primary label, less for others."""
    column = {code: position for position, code in enumerate(classes)}
    targets = np.zeros((len(recordings), len(classes)), dtype=np.float32)
    rows = zip(recordings["ebird_code"], recordings["secondary_codes"], strict=True)
    for row, (primary, secondary) in enumerate(rows):
        for code in secondary:
            targets[row, column[code]] = secondary_label_weight
        targets[row, column[primary]] = 1.0
    return targets


def limit_worker_threads(_worker: int) -> None:
    """Keep each loader worker on one core; the model needs the others."""
    torch.set_num_threads(1)
