"""Serve training clips: crops of recordings with their targets, the same ones in every run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from birdcall.audio import AudioError, crop_or_pad, is_cut
from birdcall.audit import read_audit, usable_recordings
from birdcall.augment import MAX_TRIES, ClipAugment, NothingReadableError, ReadFailure
from birdcall.cache import Cache
from birdcall.config import SAMPLINGS, Experiment, require, require_choice
from birdcall.folds import read_folds
from birdcall.noise import find_noise, generate_noise, split_noise
from birdcall.recordings import check_recordings_exist, classes_of, read_recordings

logger = logging.getLogger(__name__)

# (path below the data folder, sample rate, offsets in seconds, duration of each in seconds or None
# for all the rest) → a waveform (samples,) per offset, all of one opened recording
ReadClip = Callable[[str, int, Sequence[float], float | None], list[np.ndarray]]

UNRATED = 0.0  # in xeno-canto's tables: nobody has rated the recording
LOWEST_RATING_WEIGHT = 0.1  # of the best recordings' weight


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

    def split_noise(self, fold: int) -> tuple[list[Path], list[Path]]:
        """Return the noise to train and to validate with; no source is in both."""
        return split_noise(self.noise_files, self.folds.index(fold), len(self.folds))


@dataclass(frozen=True)
class ClipReader:
    """A `ReadClip`: from the cache where the audit has left one, else by seeking in the file."""

    folder: Path
    cache: Path

    def __call__(
        self, path: str, sample_rate: int, offsets: Sequence[float], duration: float | None
    ) -> list[np.ndarray]:
        return Cache(self.cache, sample_rate).read_crops(self.folder, path, offsets, duration)


def load_training_data(
    folder: Path, folds: Path, audit: Path, cache: Path, noise: Path | None = None
) -> TrainingData:
    """Join the recordings of ``folder`` with their audit and folds; open cache and noise.

    Recordings that the audit leaves out are not in it. Bird-free sound is taken from ``noise``,
    else from ``noise/`` in the data folder or beside it; without any it is generated, beside the
    cache.
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
    places = [noise] if noise is not None else [folder / "noise", folder.parent / "noise"]
    noise_files = next((files for place in places if (files := find_noise(place))), [])
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


def recording_weights(
    ebird_codes: Sequence[str], sampling: str, ratings: Sequence[float] | None = None
) -> np.ndarray:
    """Return how often each recording is drawn, as shares of one.

    ``uniform``: all equally often. ``balanced``: every class equally often (1st place).
    ``rated``: in proportion to xeno-canto's rating (E to A: 1 to 5), but at least a tenth as often
    as the best (the 2nd place of 2021 weighs the loss so); an unrated recording is not a bad one
    and counts as the data set's mean. ``balanced+rated``: every class equally often, its better
    recordings more often than the others.
    """
    require_choice("sampling", sampling, SAMPLINGS)
    weights = pd.Series(np.ones(len(ebird_codes)))
    if "rated" in sampling:
        require(ratings is not None, f"sampling is {sampling!r}, but there are no ratings")
        rating = pd.Series(np.asarray(ratings, dtype=np.float64)).replace(UNRATED, np.nan)
        weights = (rating / 5).clip(LOWEST_RATING_WEIGHT, 1)
        weights = weights.fillna(weights.mean()).fillna(1.0)  # the last where none has a rating
    if "balanced" in sampling:
        weights /= weights.groupby(np.asarray(ebird_codes, dtype=object)).transform("sum")
    return (weights / weights.sum()).to_numpy()


class ClipSampler(Sampler[ClipRequest]):
    """Draw an epoch's clips from (seed, epoch) alone; call `set_epoch` before each epoch.

    ``crops_per_recording`` clips in a row come from one recording. ``n_clips`` None: as many as
    there are recordings. See `recording_weights` for ``sampling``.
    """

    def __init__(
        self,
        ebird_codes: Sequence[str],
        n_clips: int | None,
        sampling: str,
        seed: int,
        ratings: Sequence[float] | None = None,
        crops_per_recording: int = 1,
    ) -> None:
        self.weights = recording_weights(ebird_codes, sampling, ratings)
        self.n_clips = n_clips or len(ebird_codes)
        self.crops_per_recording = crops_per_recording
        self.seed = seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw ``epoch`` next, from its clip number ``start`` on: what an interrupted one lacks."""
        require(
            0 <= start <= self.n_clips,
            f"start is {start}; an epoch has {self.n_clips} clips, from 0 on",
        )
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.n_clips - self.start

    def __iter__(self) -> Iterator[ClipRequest]:
        generator = np.random.default_rng((self.seed, self.epoch))
        n_drawn = -(-self.n_clips // self.crops_per_recording)
        # Systematic sampling: in an epoch a recording comes up as often as its weight says, +-1.
        steps = (np.arange(n_drawn) + generator.random()) / n_drawn
        order = generator.permutation(len(self.weights))
        drawn = np.searchsorted(np.cumsum(self.weights[order]), steps).clip(max=len(order) - 1)
        indices = generator.permutation(order[drawn]).repeat(self.crops_per_recording)
        for position in range(self.start, self.n_clips):
            yield ClipRequest(self.epoch, position, int(indices[position]))


class Clip(NamedTuple):
    """A training clip, and what could not be read on the way to it.

    waveform: ``(clip samples,)``, None where neither the recording nor any other tried could be
    read; target: ``(classes,)``.
    """

    waveform: Tensor | None
    target: Tensor
    failures: tuple[ReadFailure, ...]


class ClipDataset(Dataset[tuple[Tensor, Tensor]]):
    """Clips of recordings with their targets: ``(clip samples,)`` and ``(classes,)``, float32.

    recordings: rows with ``path``, ``ebird_code``, ``secondary_codes`` and ``seconds`` (the true
    length). noise_files: bird-free sound, to mix in and to learn nocall from. A clip depends on
    the experiment's seed and on its request alone.
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
        self.codes = pd.factorize(recordings["ebird_code"])[0]
        self.targets = make_targets(recordings, classes, experiment.train.secondary_label_weight)
        self.augment = ClipAugment(
            experiment.augment, experiment.frontend.sample_rate, self.noise_files
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, request: ClipRequest) -> tuple[Tensor, Tensor]:
        """Make one clip; raise AudioError for the first file that cannot be read."""
        clip = self.make_clips([request])[0]
        for failure in clip.failures:
            raise AudioError(Path(failure.path), failure.reason.removeprefix(f"{failure.path}: "))
        return clip.waveform, clip.target

    def make_clips(self, requests: Sequence[ClipRequest]) -> list[Clip]:
        """Make a batch's clips; neighbours from one recording are read in one go.

        Where a recording cannot be read, another takes its place, one of the same class if there
        is one; which, depends on the request alone. `Clip.failures` tells.
        """
        drafts = [_Draft(request, self.experiment, self.noise_files) for request in requests]
        for index, group in groupby(drafts, key=lambda draft: draft.index):
            self._read_together(index, list(group))
        return [self._finish(draft) for draft in drafts]

    def _read_together(self, index: int, drafts: list[_Draft]) -> None:
        """Read the crops of one recording, or leave them to `_finish`, one by one."""
        if index == NOISE_ONLY or len(drafts) == 1:
            return
        try:
            waveforms = self._read_crops(index, [draft.place for draft in drafts])
        except (AudioError, OSError):
            return  # perhaps one crop only is damaged: `_finish` finds out which, and reports it
        for draft, waveform in zip(drafts, waveforms, strict=True):
            draft.waveform = waveform

    def _finish(self, draft: _Draft) -> Clip:
        failures: list[ReadFailure] = []
        target, waveform = torch.zeros(self.targets.shape[1]), None
        try:
            if draft.index == NOISE_ONLY:
                n_samples = self.experiment.clip_samples
                waveform = self.augment.noise.draw(n_samples, draft.generator, failures)
            else:
                index, waveform = self._read_recording(draft, failures)
                target = torch.from_numpy(self.targets[index])
                waveform = self.augment(waveform, draft.generator, failures)
        except NothingReadableError:
            return Clip(None, target, tuple(failures))
        waveform = np.ascontiguousarray(waveform, dtype=np.float32)
        return Clip(torch.from_numpy(waveform), target, tuple(failures))

    def _read_recording(self, draft: _Draft, failures: list[ReadFailure]) -> tuple[int, np.ndarray]:
        """Read the draft's crop, of another recording where its own fails; return whose it is."""
        if draft.waveform is not None:
            return draft.index, draft.waveform
        for index in self._candidates(draft):
            try:
                return index, self._read_crops(index, [draft.place])[0]
            except (AudioError, OSError) as error:
                failures.append(ReadFailure.of("recording", self.paths[index], error))
        raise NothingReadableError(f"none of {len(failures)} recordings can be read")

    def _candidates(self, draft: _Draft) -> Iterator[int]:
        """Yield the draft's recording, then others of its class at random, then any others."""
        yield draft.index
        generator = draft.generator.spawn(1)[0]  # what the clip draws next stays the same
        others = generator.permutation(len(self.paths))
        others = others[others != draft.index]
        strange = self.codes[others] != self.codes[draft.index]
        yield from others[np.argsort(strange, kind="stable")][:MAX_TRIES].tolist()

    def _read_crops(self, index: int, places: Sequence[float]) -> list[np.ndarray]:
        """Read a crop at each of ``places``, shares of the way that it could start on.

        A recording shorter than the clip lies at such a place in silence.
        """
        path, sample_rate = self.paths[index], self.experiment.frontend.sample_rate
        clip_seconds, n_samples = self.experiment.train.clip_seconds, self.experiment.clip_samples
        spare = self.seconds[index] - clip_seconds
        if spare > 0:
            offsets = [place * spare for place in places]
            crops = self.read_clip(path, sample_rate, offsets, clip_seconds)
            return [crop_or_pad(crop, n_samples) for crop in crops]
        whole = self.read_clip(path, sample_rate, [0.0], None)[0]
        seconds = len(whole) / sample_rate
        if is_cut(seconds, self.seconds[index]):
            reason = f"has {seconds:g} s, had {self.seconds[index]:g} s when it was audited"
            raise AudioError(Path(path), reason)
        room = max(0, n_samples - len(whole))
        return [crop_or_pad(np.pad(whole, (round(place * room), 0)), n_samples) for place in places]


NOISE_ONLY = -1  # in place of a recording's index


class _Draft:
    """A clip's own draws, before anything is read."""

    def __init__(
        self, request: ClipRequest, experiment: Experiment, noise_files: Sequence[Path]
    ) -> None:
        seed = (experiment.train.seed, request.epoch, request.position)
        self.generator = np.random.default_rng(seed)
        noise_only = self.generator.random() < experiment.augment.noise_only_probability
        self.index = NOISE_ONLY if noise_only and noise_files else request.index
        self.place = self.generator.random()
        self.waveform: np.ndarray | None = None


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
