"""Make training clips: crops of recordings with their targets, the same clips in every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from birdcall.audio.decoder import AudioError, is_cut, warn_once
from birdcall.audio.filters import crop_or_pad
from birdcall.config import Experiment
from birdcall.data.augment import BatchDraws, ClipAugment, mix_at_snr
from birdcall.data.birdnet import EMBEDDING_SIZE, read_clip
from birdcall.data.cache import (
    MAX_TRIES,
    CropRequest,
    NothingReadableError,
    ReadFailure,
    RecordingCache,
)
from birdcall.data.dataset import TrainingData
from birdcall.data.noise import NoiseFiles
from birdcall.data.soundscapes import SoundscapeTargets
from birdcall.data.targets import (
    IGNORE_TARGET,
    ClipRequest,
    StrongTargets,
    make_targets,
    rating_weights,
)
from birdcall.inference.windows import FRAME_SECONDS
from birdcall.storage.store import DAMAGED

# In place of a recording's path, and of its index.
_NOISE, _NOISE_INDEX = "noise", -1
_OTHER_BIRDS, _OTHER_BIRDS_INDEX = "other birds", -2
_SOUNDSCAPE_INDEX = -3


def union_of(target: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return the higher of both, IGNORE_TARGET (-1) where one is so and none is positive."""
    highest = np.maximum(target, label)
    return np.where(highest > 0, highest, np.minimum(target, label))


def mix_targets(target: np.ndarray, probabilities: np.ndarray, share: float) -> np.ndarray:
    """Return targets ``(classes,)`` with a share of a teacher's probabilities, float32.

    A target that the loss would ignore is the teacher's alone. A class of probability 0 is one that
    the teacher does not know: its target stays.
    """
    if share == 0:
        return target
    labels = np.where(target == IGNORE_TARGET, probabilities, target)
    mixed = (1 - share) * labels + share * probabilities
    return np.where(probabilities > 0, mixed, target).astype(np.float32)


def mix_embeddings(embedding: Tensor, draws: BatchDraws, scale: Tensor) -> Tensor:
    """Return the embeddings of mixed clips, ``(n, size)``; zeros where a part of a mix has none.

    embedding: of the whole batch. The weights are the gains of the parts, 1 for the clip itself.
    scale: see `mix_scale`.
    """
    index, partners = draws.index.to(scale.device), draws.partners.to(scale.device)
    is_known, is_added = embedding.any(dim=1), scale > 0
    gain = torch.where(is_added, draws.mix_gain.to(scale.device), 0)
    mixed = embedding[index] + (gain[..., None] * embedding[partners]).sum(dim=1)
    is_complete = is_known[index] & (is_known[partners] | ~is_added).all(dim=1)
    return torch.where(is_complete[:, None], mixed, 0)


def mix_frame_targets(frames: Tensor, draws: BatchDraws, scale: Tensor) -> Tensor:
    """Return the frame targets ``(n, classes, frames)`` of clips that `augment_batch` makes.

    frames: of the whole batch. scale: of `mix_scale`; a partner at 0 is silent and adds nothing.
    """
    own = frames[draws.index.to(frames.device)]
    partners = frames[draws.partners.to(frames.device)]
    added = torch.where((scale > 0)[..., None, None], partners, own[:, None])
    together = torch.cat((own[:, None], added), dim=1)
    highest = together.amax(dim=1)
    union = torch.where(highest > 0, highest, together.amin(dim=1))
    n_shift = [round(share * frames.shape[-1]) for share in draws.shift.tolist()]
    return torch.stack([row.roll(n, -1) for row, n in zip(union, n_shift, strict=True)])


class Clip(NamedTuple):
    """A training clip, and the files that could not be read for it."""

    waveform: Tensor | None  # (clip samples,); None: no recording that was tried can be read
    target: Tensor  # (classes,)
    weight: float  # of its loss
    recording: str  # path; "noise" for bird-free noise alone; "other birds"
    failures: tuple[ReadFailure, ...]
    embedding: Tensor | None = None  # (size,), of a teacher; zeros: it has none for this clip
    frames: Tensor | None = None  # (classes, frames), targets; None: no clip of the data has any


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
        rate, store = experiment.frontend.sample_rate, data.noise_store
        noise = NoiseFiles(self.noise_files, rate, store)
        data.require_sound_for(experiment)
        self.other_birds = NoiseFiles(data.other_birds, rate, store, kind="other-birds file")
        self.soundscapes: SoundscapeTargets | None = None
        if experiment.train.student.share > 0:
            self.soundscapes = SoundscapeTargets(data.soundscape_labels, experiment)
            folder = data.soundscape_labels.folder
            self.read_soundscape = RecordingCache(folder, data.soundscape_cache)
        self.augment = ClipAugment(experiment.augment, noise)
        is_taught = experiment.train.teacher.is_used
        self.teacher_files = data.teacher_files(experiment) if is_taught else None

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
            draft = _Draft(
                generator,
                *self._choose_source(generator.random(), request.index),
                position=generator.random(),
                downmix=self.augment.draw_downmix(generator),
            )
            drafts.append(draft)
        for (index, downmix), group in groupby(drafts, key=lambda item: (item.index, item.downmix)):
            same = list(group)
            if index < 0 or len(same) == 1:
                continue
            try:
                waveforms = self._read_crops(index, [draft.position for draft in same], downmix)
            except (AudioError, OSError):
                continue  # perhaps one crop only is damaged: `_finish` reads them one by one
            for draft, waveform in zip(same, waveforms, strict=True):
                draft.waveform = waveform
        return [self._finish(draft) for draft in drafts]

    __getitems__ = make_clips  # the name by which torch's DataLoader asks for a batch

    def _choose_source(self, draw: float, index: int) -> tuple[int, bool]:
        """Return what the clip is made from, and whether a soundscape is added to it.

        That is the recording ``index``, noise, other birds or a soundscape. One draw decides, so
        that the other clips stay the same when a probability changes.
        """
        augment, student = self.experiment.augment, self.experiment.train.student
        without_class = augment.noise_only_probability + augment.other_birds_probability
        if draw < augment.noise_only_probability:
            return (_NOISE_INDEX if self.noise_files else index), False
        if draw < without_class:
            return _OTHER_BIRDS_INDEX, False
        if draw < 1 - student.share * (1 - without_class):
            return index, False
        return (index, True) if student.mode == "mix" else (_SOUNDSCAPE_INDEX, False)

    def _finish(self, draft: _Draft) -> Clip:
        failures: list[ReadFailure] = []
        target, weight, recording = np.zeros(self.targets.shape[1], np.float32), 1.0, _NOISE
        waveform: Tensor | None = None
        source: tuple[str, int, float] | None = None  # kind, index and start in it
        try:
            if draft.index == _NOISE_INDEX:
                n_samples = self.experiment.clip_samples
                samples = self.augment.noise.draw(n_samples, draft.generator, failures)
            elif draft.index == _OTHER_BIRDS_INDEX:
                recording = _OTHER_BIRDS
                n_samples = self.experiment.clip_samples
                samples = self.other_birds.draw(n_samples, draft.generator, failures)
                samples = self.augment(samples, draft.generator, failures)
            elif draft.index == _SOUNDSCAPE_INDEX:
                recording, samples, target, source = self._read_soundscape(draft, failures)
            else:
                recording = self.paths[draft.index]
                index, samples = self._read_recording(draft, failures)
                samples = self.augment(samples, draft.generator, failures)
                recording, weight = self.paths[index], float(self.weights[index])
                target = self.targets[index]
                clip_seconds = self.experiment.train.data.clip_seconds
                # Below 0 for a recording shorter than the clip, which lies somewhere within it.
                start = draft.position * (self.seconds[index] - clip_seconds)
                source = ("recordings", index, start)
                if self.strong_targets is not None:
                    strong_target = self.strong_targets.find(index, start, clip_seconds)
                    target = target if strong_target is None else strong_target
                if draft.with_soundscape:
                    _, soundscape, label, _ = self._read_soundscape(draft, failures)
                    mixed = mix_at_snr(samples, soundscape, snr_db=0.0)
                    if mixed is not samples:  # neither is silent
                        samples, target, source = mixed, union_of(target, label), None
            waveform = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
        except NothingReadableError:
            weight = 0.0
        embedding, probabilities = self._ask_teacher(source)
        if probabilities is not None and source is not None and source[0] == "recordings":
            share = self.experiment.train.teacher.label_share
            target = mix_targets(target, probabilities, share)
        return Clip(
            waveform=waveform,
            target=torch.from_numpy(target),
            weight=weight,
            recording=recording,
            failures=tuple(failures),
            embedding=embedding,
            frames=self._find_frames(source),
        )

    def _find_frames(self, source: tuple[str, int, float] | None) -> Tensor | None:
        """Return the targets of a clip's frames, IGNORE_TARGET where its labels have no times."""
        if self.soundscapes is None or self.soundscapes.strong is None:
            return None
        kind, index, start = source or ("", 0, 0.0)
        found = self.soundscapes.find_frames(index, start) if kind == "soundscapes" else None
        if found is None:
            n_frames = round(self.experiment.train.data.clip_seconds / FRAME_SECONDS)
            found = np.full((self.targets.shape[1], n_frames), IGNORE_TARGET, np.float32)
        return torch.from_numpy(found)

    def _ask_teacher(
        self, source: tuple[str, int, float] | None
    ) -> tuple[Tensor | None, np.ndarray | None]:
        """Return the teacher's embedding of a clip and its probabilities; None: no teacher.

        The embedding is zeros, and there are no probabilities, where it does not know the clip.
        """
        if self.teacher_files is None:
            return None, None
        embedding, probabilities = np.zeros(EMBEDDING_SIZE, np.float32), None
        if source is not None:
            kind, index, start = source
            path = self.teacher_files[kind][index]
            try:
                seconds = self.experiment.train.data.clip_seconds
                embedding, probabilities = read_clip(path, start, seconds)
            except (OSError, *DAMAGED) as error:
                warn_once(f"{path}: cannot be read, its clips are not taught: {error}")
        return torch.from_numpy(embedding), probabilities

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

    def _read_soundscape(
        self, draft: _Draft, failures: list[ReadFailure]
    ) -> tuple[str, np.ndarray, np.ndarray, tuple[str, int, float]]:
        """Return name, waveform ``(samples,)``, soft target and source of a soundscape's clip."""
        generator = draft.generator.spawn(1)[0]  # the clip's later draws stay the same
        rate, labels = self.experiment.frontend.sample_rate, self.soundscapes.labels
        for _ in range(MAX_TRIES):
            index, start, target = self.soundscapes.draw(generator)
            name = labels.soundscapes[index]["name"]
            seconds = labels.soundscapes[index]["seconds"] - start
            seconds = min(seconds, self.experiment.train.data.clip_seconds)
            try:
                (crop,) = self.read_soundscape(CropRequest(name, rate, (start,), seconds))
                waveform = crop_or_pad(crop, self.experiment.clip_samples)
                return name, waveform, target, ("soundscapes", index, start)
            except (AudioError, OSError) as error:
                failures.append(ReadFailure.of("soundscape", str(labels.folder / name), error))
        raise NothingReadableError(f"none of {MAX_TRIES} clips of soundscapes can be read")

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
    index: int  # of the recording; below 0: of another source
    with_soundscape: bool  # it is added
    position: float  # of the crop, see `ClipDataset._read_crops`
    downmix: float | None
    waveform: np.ndarray | None = None  # the crop, once it is read
