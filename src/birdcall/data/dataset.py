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

from birdcall.audio.reading import AudioError, crop_or_pad, is_cut
from birdcall.config import Experiment
from birdcall.data.audit import read_audit, usable_recordings
from birdcall.data.augment import ClipAugment
from birdcall.data.cache import Cache
from birdcall.data.folds import read_folds
from birdcall.data.noise import (
    MAX_TRIES,
    NothingReadableError,
    ReadFailure,
    find_noise,
    generate_noise,
    split_noise,
)
from birdcall.data.recordings import check_recordings_exist, classes_of, read_recordings
from birdcall.data.targets import (
    ClipRequest,
    StrongTargets,
    make_targets,
    rating_weights,
    read_strong_labels,
)

logger = logging.getLogger(__name__)

# (path below the data folder, sample rate, offsets in seconds, duration of each in seconds or None
# for all the rest, share of the first channel or None for the channels' mean) → a waveform
# (samples,) per offset, all of one opened recording
ReadClip = Callable[[str, int, Sequence[float], float | None, float | None], list[np.ndarray]]


@dataclass(frozen=True)
class TrainingData:
    """What runs share: recordings with ``fold`` and true ``seconds``, and a way to their sound."""

    folder: Path  # the data folder; `recordings["path"]` is below it
    recordings: pd.DataFrame
    classes: tuple[str, ...]
    read_clip: ReadClip
    noise_files: Sequence[Path] = ()
    strong_labels: pd.DataFrame | None = None  # labels with times, see `targets.StrongTargets`
    noise_store: Path | None = None  # where decoded noise is kept, see `noise_files.NoiseFiles`

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
        self,
        path: str,
        sample_rate: int,
        offsets: Sequence[float],
        duration: float | None,
        downmix: float | None = None,
    ) -> list[np.ndarray]:
        cache = Cache(self.cache, sample_rate)
        return cache.read_crops(self.folder, path, offsets, duration, downmix)


def load_training_data(
    folder: Path,
    folds: Path,
    audit: Path,
    cache: Path,
    noise: Path | None = None,
    labels: Path | None = None,
) -> TrainingData:
    """Join the recordings of ``folder`` with their audit and folds; open cache and noise.

    Recordings that the audit leaves out are not in it. Bird-free sound is taken from ``noise``,
    else from ``noise/`` in the data folder or beside it; without any it is generated, beside the
    cache. ``labels``: a file of labels with times, which targets then come from.
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
    return TrainingData(
        folder=folder,
        recordings=recordings,
        classes=classes,
        read_clip=ClipReader(folder, cache),
        noise_files=noise_files,
        strong_labels=None if labels is None else read_strong_labels(labels, recordings, classes),
        noise_store=cache / "noise",
    )


def check_classes(
    training: pd.DataFrame, validation: pd.DataFrame, classes: Sequence[str], fold: int
) -> None:
    """Warn of classes that no recording of the training or of the validation part is of."""
    for part, recordings, consequence in (
        ("training", training, "they are learnt from secondary labels, if at all"),
        ("validation", validation, "its scores say nothing of them"),
    ):
        missing = sorted(set(classes) - set(recordings["ebird_code"]))
        if missing:
            logger.warning(
                "fold %d has no %s recording of %d of %d classes (%s): %s",
                *(fold, part, len(missing), len(classes), ", ".join(missing), consequence),
            )


class Clip(NamedTuple):
    """A training clip, and what could not be read on the way to it.

    waveform: ``(clip samples,)``, None where neither the recording nor any other tried could be
    read; target: ``(classes,)``; weight: how much its loss counts; recording: the path that it was
    cut from, ``NOISE`` for bird-free sound alone.
    """

    waveform: Tensor | None
    target: Tensor
    weight: float
    recording: str
    failures: tuple[ReadFailure, ...]


class ClipDataset:
    """Clips of recordings with their targets, a batch's at a time.

    recordings: rows with ``path``, ``ebird_code``, ``secondary_codes`` and ``seconds`` (the true
    length), where ratings weigh the loss ``rating``, with ``strong_labels`` ``filename``.
    noise_files: bird-free sound, to mix in and to learn nocall from. strong_labels: labels with
    times, for targets by what is present in a clip. noise_store: where decoded noise is kept, for
    all workers. A clip depends on the experiment's seed and its request alone.
    """

    def __init__(
        self,
        recordings: pd.DataFrame,
        classes: Sequence[str],
        experiment: Experiment,
        read_clip: ReadClip,
        noise_files: Sequence[Path] = (),
        strong_labels: pd.DataFrame | None = None,
        noise_store: Path | None = None,
    ) -> None:
        loss = experiment.train.loss
        self.experiment = experiment
        self.read_clip = read_clip
        self.noise_files = list(noise_files)
        self.paths = list(recordings["path"])
        self.seconds = recordings["seconds"].to_numpy(dtype=np.float64)
        self.codes = pd.factorize(recordings["ebird_code"])[0]
        self.targets = make_targets(recordings, classes, loss.secondary_label_weight)
        self.timed = (
            None if strong_labels is None else StrongTargets(recordings, classes, strong_labels)
        )
        self.weights = (
            rating_weights(recordings["rating"]) if loss.rating_weight else np.ones(len(self.paths))
        )
        self.augment = ClipAugment(
            experiment.augment, experiment.frontend.sample_rate, self.noise_files, noise_store
        )

    def __len__(self) -> int:
        return len(self.paths)

    def make_clips(self, requests: Sequence[ClipRequest]) -> list[Clip]:
        """Make a batch's clips; neighbours from one recording are read in one go.

        Where a recording cannot be read, another takes its place, one of the same class if there
        is one; which, depends on the request alone. `Clip.failures` tells.
        """
        drafts = [
            _Draft(request, self.experiment, self.noise_files, self.augment) for request in requests
        ]
        for (index, _), group in groupby(drafts, key=lambda draft: (draft.index, draft.downmix)):
            self._read_together(index, list(group))
        return [self._finish(draft) for draft in drafts]

    def _read_together(self, index: int, drafts: list[_Draft]) -> None:
        """Read the crops of one recording, or leave them to `_finish`, one by one."""
        if index == NOISE_ONLY or len(drafts) == 1:
            return
        try:
            waveforms = self._read_crops(
                index, [draft.place for draft in drafts], drafts[0].downmix
            )
        except (AudioError, OSError):
            return  # perhaps one crop only is damaged: `_finish` finds out which, and reports it
        for draft, waveform in zip(drafts, waveforms, strict=True):
            draft.waveform = waveform

    def _finish(self, draft: _Draft) -> Clip:
        failures: list[ReadFailure] = []
        try:
            if draft.index == NOISE_ONLY:
                n_samples = self.experiment.clip_samples
                waveform = self.augment.noise.draw(n_samples, draft.generator, failures)
                target, weight, recording = np.zeros(self.targets.shape[1], np.float32), 1.0, NOISE
            else:
                index, waveform = self._read_recording(draft, failures)
                target, weight = self._target(index, draft.place), float(self.weights[index])
                recording = self.paths[index]
                waveform = self.augment(waveform, draft.generator, failures)
        except NothingReadableError:
            recording = NOISE if draft.index == NOISE_ONLY else self.paths[draft.index]
            nothing = torch.zeros(self.targets.shape[1])
            return Clip(
                waveform=None,
                target=nothing,
                weight=0.0,
                recording=recording,
                failures=tuple(failures),
            )
        waveform = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))
        return Clip(
            waveform=waveform,
            target=torch.from_numpy(target),
            weight=weight,
            recording=recording,
            failures=tuple(failures),
        )

    def _target(self, index: int, place: float) -> np.ndarray:
        """Return the target ``(classes,)`` of the clip at ``place``, as in `_read_crops`."""
        if self.timed is not None:
            clip_seconds = self.experiment.train.data.clip_seconds
            # Below 0 for a short recording, which lies somewhere within its clip.
            start = place * (self.seconds[index] - clip_seconds)
            target = self.timed.find(index, start, clip_seconds)
            if target is not None:
                return target
        return self.targets[index]

    def _read_recording(self, draft: _Draft, failures: list[ReadFailure]) -> tuple[int, np.ndarray]:
        """Read the draft's crop, of another recording where its own fails; return whose it is."""
        if draft.waveform is not None:
            return draft.index, draft.waveform
        for index in self._candidates(draft):
            try:
                return index, self._read_crops(index, [draft.place], draft.downmix)[0]
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

    def _read_crops(
        self, index: int, places: Sequence[float], downmix: float | None
    ) -> list[np.ndarray]:
        """Read a crop at each of ``places``, shares of the way that it could start on.

        A recording shorter than the clip lies at such a place in silence.
        """
        path, sample_rate = self.paths[index], self.experiment.frontend.sample_rate
        clip_seconds, n_samples = (
            self.experiment.train.data.clip_seconds,
            self.experiment.clip_samples,
        )
        spare = self.seconds[index] - clip_seconds
        if spare > 0:
            offsets = [place * spare for place in places]
            crops = self.read_clip(path, sample_rate, offsets, clip_seconds, downmix)
            return [crop_or_pad(crop, n_samples) for crop in crops]
        whole = self.read_clip(path, sample_rate, [0.0], None, downmix)[0]
        seconds = len(whole) / sample_rate
        if is_cut(seconds, self.seconds[index]):
            reason = f"has {seconds:g} s, had {self.seconds[index]:g} s when it was audited"
            raise AudioError(Path(path), reason)
        room = max(0, n_samples - len(whole))
        return [crop_or_pad(np.pad(whole, (round(place * room), 0)), n_samples) for place in places]


NOISE_ONLY = -1  # in place of a recording's index
NOISE = "noise"  # and of its path


class _Draft:
    """A clip's own draws, before anything is read."""

    def __init__(
        self,
        request: ClipRequest,
        experiment: Experiment,
        noise_files: Sequence[Path],
        augment: ClipAugment,
    ) -> None:
        seed = (experiment.train.seed, request.epoch, request.position)
        self.generator = np.random.default_rng(seed)
        noise_only = self.generator.random() < experiment.augment.noise_only_probability
        self.index = NOISE_ONLY if noise_only and noise_files else request.index
        self.place = self.generator.random()
        self.downmix = augment.draw_downmix(self.generator)
        self.waveform: np.ndarray | None = None
