"""Serve training clips: crops of recordings with their targets, the same clips in every run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from birdcall.audio.decoder import AudioError, is_cut
from birdcall.audio.filters import crop_or_pad, generate_noise
from birdcall.config import FULL, Experiment
from birdcall.data.audit import read_audit
from birdcall.data.augment import ClipAugment
from birdcall.data.cache import (
    MAX_TRIES,
    CropRequest,
    NothingReadableError,
    ReadCrops,
    ReadFailure,
    RecordingCache,
)
from birdcall.data.folds import TRAINING_ONLY, read_folds
from birdcall.data.noise import NoiseFiles, digest_noise, find_noise, split_noise
from birdcall.data.recordings import (
    check_recordings_exist,
    classes_of,
    read_recordings,
    usable_recordings,
)
from birdcall.data.targets import (
    ClipRequest,
    StrongTargets,
    make_targets,
    rating_weights,
    read_strong_labels,
)
from birdcall.storage.files import digest, shorten_list, write_atomically

logger = logging.getLogger(__name__)

_LEARNT = ["filename", "ebird_code", "secondary_codes", "rating"]  # columns of recordings
_NOISE = "noise"  # in place of a recording's path
_NOISE_INDEX = -1  # in place of a recording's index


@dataclass(frozen=True)
class TrainingData:
    """What runs share: recordings with their fold, and a way to read them."""

    folder: Path  # the data folder
    # With the columns of `read_recordings` and `usable_recordings`, and ``fold``.
    recordings: pd.DataFrame
    classes: tuple[str, ...]
    read_crops: ReadCrops
    noise_files: Sequence[Path] = ()  # bird-free, to mix in and to learn nocall from
    strong_labels: pd.DataFrame | None = None  # see `targets.StrongTargets`
    noise_store: Path | None = None  # folder of decoded noise, see `noise.NoiseFiles`

    @property
    def folds(self) -> list[int]:
        """Return the folds that can be held out."""
        return sorted(set(map(int, self.recordings["fold"])) - {TRAINING_ONLY})

    @cached_property
    def digests(self) -> dict[str, str | None]:
        """Digests of all that a training learns from, by name; the folder has no part in them.

        recordings: what the tables say about them. audio: their files, as audited. lengths: as
        decoded. labels: the strong labels, None without them. No audio is read for them.
        """
        table, labels = self.recordings, self.strong_labels
        return {
            "recordings": digest(table[_LEARNT].to_csv(index=False)),
            "audio": digest("\n".join(table["sha256"])) if "sha256" in table else None,
            "lengths": digest(table["seconds"].to_csv(index=False)),
            "folds": digest(table[["filename", "fold"]].to_csv(index=False)),
            "noise": digest_noise(self.noise_files),
            "labels": None if labels is None else digest(labels.to_csv(index=False)),
        }

    def split(self, fold: int | str) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the training and the validation recordings of ``fold``; FULL: all, and none."""
        if fold == FULL:
            return self.recordings, self.recordings[:0]
        if fold not in self.folds:
            known = ", ".join(map(str, self.folds))
            raise ValueError(f"fold {fold} is out of range; the folds are {known}")
        held_out = self.recordings["fold"] == fold
        return self.recordings[~held_out], self.recordings[held_out]

    def learnable_classes(self, fold: int | str) -> np.ndarray:
        """Return which classes a run that holds out ``fold`` can learn, boolean ``(classes,)``.

        By primary labels: what a secondary one teaches depends on the experiment.
        """
        return np.isin(self.classes, self.split(fold)[0]["ebird_code"].unique())

    def split_noise(self, fold: int | str) -> tuple[list[Path], list[Path]]:
        """Return the noise to train and to validate with; no source is in both."""
        if fold == FULL:
            return list(self.noise_files), []
        return split_noise(self.noise_files, self.folds.index(fold), len(self.folds))


def load_training_data(
    folder: Path,
    *,
    folds: Path,
    audit: Path,
    cache: Path,
    noise: Path | None = None,
    labels: Path | None = None,
) -> TrainingData:
    """Join the recordings of ``folder`` with their audit and folds; open cache and noise.

    Recordings that the audit leaves out are not included; those of another size than in the audit
    are counted in a warning. Bird-free noise is taken from ``noise``,
    else from ``noise/`` in the data folder or beside it; without any it is generated, beside the
    cache. ``labels``: a file of strong labels, from which targets are then made.
    """
    recordings = read_recordings(folder)
    classes = classes_of(recordings)
    audited = read_audit(audit)
    recordings = usable_recordings(recordings, audited)
    fold_of = read_folds(folds, recordings)[["filename", "fold"]]
    recordings = recordings.merge(fold_of, on="filename", validate="one_to_one")
    check_recordings_exist(recordings, folder)
    sizes = dict(zip(audited["path"], audited["size"], strict=True))
    paths = recordings["path"]
    changed = [path for path in paths if (folder / path).stat().st_size != sizes[path]]
    if changed:
        logger.warning(
            "%d of %d recordings have another size than in %s, such as %s: run `birdcall audit` "
            "again, which decodes those only",
            *(len(changed), len(paths), audit, changed[0]),
        )
    folders = [noise] if noise is not None else [folder / "noise", folder.parent / "noise"]
    noise_files = next((files for path in folders if (files := find_noise(path))), [])
    if not noise_files:
        if noise is not None:
            raise FileNotFoundError(f"{noise}: no audio in this folder of noise")
        logger.info("%s has no noise/: wind, rain, hum and coloured noise are generated", folder)
        noise_files = generate_noise(cache.parent / "generated_noise")
    return TrainingData(
        folder=folder,
        recordings=recordings,
        classes=classes,
        read_crops=RecordingCache(folder, cache),
        noise_files=noise_files,
        strong_labels=None if labels is None else read_strong_labels(labels, recordings, classes),
        noise_store=cache / "noise",
    )


def check_classes(
    training: pd.DataFrame,
    validation: pd.DataFrame,
    *,
    classes: Sequence[str],
    fold: int | str,
    table: Path,
) -> None:
    """Warn of classes without a recording in the training or in the validation part.

    ``table`` lists them all, a row each: part, ebird_code. It is not there if none is missing. A
    run that holds out nothing has no validation part.
    """
    rows = []
    for part, recordings, consequence in (
        ("training", training, "no score of this fold covers them"),
        ("validation", validation, "its scores do not cover them"),
    ):
        missing = sorted(set(classes) - set(recordings["ebird_code"])) if len(recordings) else []
        if missing:
            logger.warning(
                "fold %s has no %s recording of %d of %d classes (%s): %s; %s lists them",
                *(fold, part, len(missing), len(classes), shorten_list(missing), consequence),
                table,
            )
        rows += [(part, code) for code in missing]
    table.unlink(missing_ok=True)  # of an earlier training
    if rows:
        text = pd.DataFrame(rows, columns=["part", "ebird_code"]).to_csv(index=False)
        write_atomically(table, text)


class Clip(NamedTuple):
    """A training clip, and the files that could not be read for it."""

    waveform: Tensor | None  # (clip samples,); None: no recording that was tried can be read
    target: Tensor  # (classes,)
    weight: float  # of its loss
    recording: str  # path; "noise" for bird-free noise alone
    failures: tuple[ReadFailure, ...]


class ClipDataset:
    """Clips of ``data.recordings`` with their targets, a batch at a time.

    A clip depends on the experiment's seed and its request alone. Where ratings weigh the loss, the
    recordings have a ``rating``; with strong labels, a ``filename``.
    """

    def __init__(self, data: TrainingData, experiment: Experiment) -> None:
        recordings, loss = data.recordings, experiment.train.loss
        self.experiment = experiment
        self.read_crops = data.read_crops
        self.noise_files = list(data.noise_files)
        self.paths = list(recordings["path"])
        self.seconds = recordings["seconds"].to_numpy(dtype=np.float64)
        self.codes = pd.factorize(recordings["ebird_code"])[0]
        self.targets = make_targets(recordings, data.classes, loss.secondary_label_weight)
        self.strong_targets: StrongTargets | None = None
        if data.strong_labels is not None:
            self.strong_targets = StrongTargets(recordings, data.classes, data.strong_labels)
        self.weights = (
            rating_weights(recordings["rating"]) if loss.rating_weight else np.ones(len(self.paths))
        )
        noise = NoiseFiles(self.noise_files, experiment.frontend.sample_rate, data.noise_store)
        self.augment = ClipAugment(experiment.augment, noise)

    def __len__(self) -> int:
        return len(self.paths)

    def make_clips(self, requests: Sequence[ClipRequest]) -> list[Clip]:
        """Make the clips of a batch; consecutive crops of one recording are read together.

        Where a recording cannot be read, another replaces it, of the same class if possible; the
        request alone decides which. `Clip.failures` lists what could not be read.
        """
        drafts = []
        for request in requests:
            seed = (self.experiment.train.seed, request.epoch, request.position)
            generator = np.random.default_rng(seed)
            noise_only = generator.random() < self.experiment.augment.noise_only_probability
            draft = _Draft(
                generator,
                index=_NOISE_INDEX if noise_only and self.noise_files else request.index,
                position=generator.random(),
                downmix=self.augment.draw_downmix(generator),
            )
            drafts.append(draft)
        for (index, downmix), group in groupby(drafts, key=lambda item: (item.index, item.downmix)):
            same = list(group)
            if index == _NOISE_INDEX or len(same) == 1:
                continue
            try:
                waveforms = self._read_crops(index, [draft.position for draft in same], downmix)
            except (AudioError, OSError):
                continue  # perhaps one crop only is damaged: `_finish` reads them one by one
            for draft, waveform in zip(same, waveforms, strict=True):
                draft.waveform = waveform
        return [self._finish(draft) for draft in drafts]

    __getitems__ = make_clips  # the name by which torch's DataLoader asks for a batch

    def _finish(self, draft: _Draft) -> Clip:
        failures: list[ReadFailure] = []
        target, weight, recording = np.zeros(self.targets.shape[1], np.float32), 1.0, _NOISE
        waveform: Tensor | None = None
        try:
            if draft.index == _NOISE_INDEX:
                n_samples = self.experiment.clip_samples
                samples = self.augment.noise.draw(n_samples, draft.generator, failures)
            else:
                recording = self.paths[draft.index]
                index, samples = self._read_recording(draft, failures)
                samples = self.augment(samples, draft.generator, failures)
                recording, weight = self.paths[index], float(self.weights[index])
                target = self.targets[index]
                if self.strong_targets is not None:
                    clip_seconds = self.experiment.train.data.clip_seconds
                    # Below 0 for a recording shorter than the clip, which lies somewhere within it.
                    start = draft.position * (self.seconds[index] - clip_seconds)
                    strong_target = self.strong_targets.find(index, start, clip_seconds)
                    target = target if strong_target is None else strong_target
            waveform = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
        except NothingReadableError:
            weight = 0.0
        return Clip(
            waveform=waveform,
            target=torch.from_numpy(target),
            weight=weight,
            recording=recording,
            failures=tuple(failures),
        )

    def _read_recording(self, draft: _Draft, failures: list[ReadFailure]) -> tuple[int, np.ndarray]:
        """Read the draft's crop, or of another recording if that fails; return index and crop."""
        if draft.waveform is not None:
            return draft.index, draft.waveform
        for index in self._candidates(draft):
            try:
                return index, self._read_crops(index, [draft.position], draft.downmix)[0]
            except (AudioError, OSError) as error:
                failures.append(ReadFailure.of("recording", self.paths[index], error))
        raise NothingReadableError(f"none of {len(failures)} recordings can be read")

    def _candidates(self, draft: _Draft) -> Iterator[int]:
        """Yield the draft's recording, then others of its class at random, then any others."""
        yield draft.index
        generator = draft.generator.spawn(1)[0]  # the clip's later draws stay the same
        others = generator.permutation(len(self.paths))
        others = others[others != draft.index]
        is_other_class = self.codes[others] != self.codes[draft.index]
        yield from others[np.argsort(is_other_class, kind="stable")][:MAX_TRIES].tolist()

    def _read_crops(
        self, index: int, positions: Sequence[float], downmix: float | None
    ) -> list[np.ndarray]:
        """Read a crop at each of ``positions``, shares of the range in which it can start.

        A recording shorter than the clip lies at such a position in silence.
        """
        path, sample_rate = self.paths[index], self.experiment.frontend.sample_rate
        clip_seconds = self.experiment.train.data.clip_seconds
        n_samples = self.experiment.clip_samples
        spare = self.seconds[index] - clip_seconds
        if spare > 0:
            offsets = tuple(position * spare for position in positions)
            request = CropRequest(path, sample_rate, offsets, clip_seconds, downmix=downmix)
            return [crop_or_pad(crop, n_samples) for crop in self.read_crops(request)]
        (recording,) = self.read_crops(CropRequest(path, sample_rate, downmix=downmix))
        seconds = len(recording) / sample_rate
        if is_cut(seconds, self.seconds[index]):
            reason = f"has {seconds:g} s, had {self.seconds[index]:g} s when it was audited"
            raise AudioError(Path(path), reason)
        room = max(0, n_samples - len(recording))
        starts = [round(position * room) for position in positions]
        return [crop_or_pad(np.pad(recording, (start, 0)), n_samples) for start in starts]


@dataclass
class _Draft:
    """What is drawn for a clip before anything is read."""

    generator: np.random.Generator
    index: int  # of the recording, or _NOISE_INDEX
    position: float  # of the crop, see `ClipDataset._read_crops`
    downmix: float | None
    waveform: np.ndarray | None = None  # the crop, once it is read
