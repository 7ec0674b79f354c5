"""Hold predictions with their truth, and store the predictions of members, to compute them once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from birdcall.audio.reading import AudioError
from birdcall.evaluation.metrics import row_f1_scores
from birdcall.inference.decision import (
    Decision,
    combine_members,
    decide_recordings,
    decide_segments,
)
from birdcall.inference.engine import predict_audio
from birdcall.inference.ensemble import Ensemble, Member
from birdcall.inference.predictions import SEGMENTS_ONLY, SegmentPredictions
from birdcall.inference.windows import AudioSource, WindowConfig
from birdcall.storage.files import digest, shorten_list
from birdcall.storage.store import Store, read_arrays, write_arrays

logger = logging.getLogger(__name__)

_Predictions = dict[str, SegmentPredictions | AudioError]  # by recording; an error: not decodable


# --- predictions and truth ---


@dataclass(frozen=True, eq=False)
class LabelledPredictions:
    """Predictions for soundscapes that no member was trained on, and the true species in them.

    segments: a row per segment. All segments of a recording are there, adjacent and in order of
    time, because decisions use neighbours. Columns: ``recording``; ``seconds``, the segment's
    end; ``is_labelled``, whether its truth is known; ``group``: soundscapes of different groups
    share no training recording and no recordist.
    truth: ``(segments, species)``, boolean. The first columns are ``classes``; the others are
    competition species that the members cannot predict. False where the truth is not known.
    predictions: of all members, ``(members, segments, classes)``; ``clipwise`` and ``framewise``
    are theirs.
    starts: the first segment of each recording. labelled: which segments are scored rows,
    ``(segments,)``, boolean. recordings, groups: of each labelled row. Intervals resample groups.
    """

    segments: pd.DataFrame
    truth: np.ndarray
    predictions: SegmentPredictions
    member_names: tuple[str, ...]
    classes: tuple[str, ...]
    clipwise: np.ndarray = field(init=False)
    framewise: np.ndarray = field(init=False)
    starts: np.ndarray = field(init=False)
    labelled: np.ndarray = field(init=False)
    recordings: np.ndarray = field(init=False)
    groups: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        recordings = self.segments["recording"].to_numpy()
        labelled = self.segments["is_labelled"].to_numpy(dtype=bool)
        derived = {
            "clipwise": self.predictions.clipwise,
            "framewise": self.predictions.framewise,
            "starts": np.flatnonzero(np.append(True, recordings[1:] != recordings[:-1])),
            "labelled": labelled,
            "recordings": recordings[labelled],
            "groups": self.segments["group"].to_numpy()[labelled],
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        shape = (len(self.member_names), len(self.segments), len(self.classes))
        for name in ("clipwise", "framewise"):
            actual = getattr(self, name).shape
            if actual != shape:
                raise ValueError(
                    f"{name} has shape {actual} instead of (members, segments, classes) = {shape}"
                )
        if len(self.starts) != self.segments["recording"].nunique():
            raise ValueError("the segments of a recording are not adjacent")
        if tuple(self.starts) != tuple(self.predictions.starts):
            raise ValueError("recordings start elsewhere in the predictions than in the segments")

    @classmethod
    def concatenate(cls, parts: Sequence[LabelledPredictions]) -> LabelledPredictions:
        """Join different soundscapes, predicted by the same number of members each."""
        first = parts[0]
        for part in parts[1:]:
            if part.classes != first.classes or part.truth.shape[1] != first.truth.shape[1]:
                raise ValueError(
                    f"classes of {', '.join(part.member_names)} are not those of "
                    f"{', '.join(first.member_names)}: were they trained on the same data?"
                )
        return replace(
            first,
            segments=pd.concat([part.segments for part in parts], ignore_index=True),
            truth=np.concatenate([part.truth for part in parts]),
            predictions=SegmentPredictions.concatenate([part.predictions for part in parts]),
        )

    def select(self, segments: np.ndarray) -> LabelledPredictions:
        """Return some recordings, given the mask of all their segments ``(segments,)``."""
        return replace(
            self,
            segments=self.segments[segments].reset_index(drop=True),
            truth=self.truth[segments],
            predictions=self.predictions.select(segments),
        )

    def for_members(self, positions: Sequence[int]) -> LabelledPredictions:
        """Return the predictions of some members, by position."""
        return replace(
            self,
            predictions=self.predictions.for_members(positions),
            member_names=tuple(self.member_names[position] for position in positions),
        )

    def with_probabilities(
        self, clipwise: np.ndarray, framewise: np.ndarray, member_names: Sequence[str] = ()
    ) -> LabelledPredictions:
        """Return other probabilities ``(members, segments, classes)`` for the same segments."""
        predictions = replace(self.predictions, clipwise=clipwise, framewise=framewise)
        names = tuple(member_names) or self.member_names
        return replace(self, predictions=predictions, member_names=names)

    @cached_property
    def labelled_truth(self) -> np.ndarray:
        """Return the truth of the labelled rows, ``(labelled rows, species)``."""
        return self.truth[self.labelled]

    def decide(self, decision: Decision) -> np.ndarray:
        """Return the decided species of each labelled row, ``(labelled rows, species)``."""
        decided = decide_segments(self.clipwise, self.framewise, decision, self.starts)
        return self._pad(decided[self.labelled])

    def strength(self, decisions: Mapping[str, Decision]) -> np.ndarray:
        """Return how strongly each labelled row has each class, ``(labelled rows, classes)``.

        That is `VoterPredictions.strength` under the decision of the row's group.
        """
        strength = np.empty(self.clipwise.shape[1:], self.clipwise.dtype)
        for group, decision in decisions.items():
            is_group = self.segments["group"].astype(str).to_numpy() == str(group)
            part = self.select(is_group)
            voters = combine_members(part.clipwise, part.framewise, decision, part.starts)
            strength[is_group] = voters.strength
        return strength[self.labelled]

    def row_f1(self, decision: Decision) -> np.ndarray:
        """Return the F1 of each labelled row under a decision."""
        return row_f1_scores(self.labelled_truth, self.decide(decision))

    def recording_f1(self, *decisions: Decision) -> np.ndarray:
        """Return the F1 of each recording as a single row, ``(decisions, recordings)``.

        Site 3 is scored so. The decisions differ only in their thresholds of whole recordings.
        """
        truth = np.logical_or.reduceat(self.truth, self.starts, axis=0)
        decided = decide_recordings(self.clipwise, self.framewise, decisions, self.starts)
        return np.array([row_f1_scores(truth, self._pad(species)) for species in decided])

    def _pad(self, decided: np.ndarray) -> np.ndarray:
        """Add the species that the members cannot predict."""
        return np.pad(decided, ((0, 0), (0, self.truth.shape[1] - decided.shape[1])))


# --- stored predictions ---


@dataclass(frozen=True)
class PredictionCache:
    """Predicts a set of recordings, and stores the predictions of each member.

    A member's predictions are identified by its weights, its experiment, the windows, the runtime,
    the audio and the code of all these. A member whose training is not finished is not stored, nor
    one whose runtime has failed.
    """

    folder: Path | None  # None: nothing is stored
    name: str  # of the set of recordings, part of the file names
    made_from: str  # digest of the files or of the plan that the audio comes from
    modules: tuple[str, ...] = ()  # those that make the audio, beside the inference

    @property
    def _store(self) -> Store:
        return Store(self.folder, ".safetensors", ("inference.engine", *self.modules))

    def _identify(self, member: Member, window: WindowConfig) -> dict[str, Any] | None:
        """Return all that a member's predictions depend on; None where they are not stored."""
        if self.folder is None or not member.checkpoint.weights_sha256:
            return None
        return {
            "weights": member.checkpoint.weights_sha256,
            "experiment": asdict(member.checkpoint.experiment),
            "classes": member.checkpoint.classes,
            "audio": self.made_from,
            "window": asdict(window),
            "runtime": member.runtime_identity,
            "torch": torch.__version__,
        }

    def _read(
        self, member: Member, window: WindowConfig, recordings: Sequence[str]
    ) -> _Predictions | None:
        """Return the stored predictions of a member, or None if it must predict."""

        def read_file(path: Path) -> _Predictions:
            arrays, values = read_arrays(path)
            errors = {name: AudioError(Path(path), why) for name, path, why in values["errors"]}
            names = [name for name in recordings if name not in errors]
            if names != values["names"] or not errors.keys() <= set(recordings):
                raise ValueError("its recordings are others, or in another order")
            if arrays["clipwise"].shape != arrays["framewise"].shape:
                raise ValueError("its arrays have different shapes")
            bounds = tuple(values["starts"]), tuple(values["seconds"])
            together = SegmentPredictions(**arrays, starts=bounds[0], recording_seconds=bounds[1])
            predicted = dict(zip(names, together.split(), strict=True))
            return {name: errors.get(name) or predicted[name] for name in recordings}

        identity = self._identify(member, window)
        if identity is None:
            return None
        return self._store.read(f"{member.name}.{self.name}", identity, read_file)

    def write(self, member: Member, window: WindowConfig, predictions: _Predictions) -> None:
        """Write the predictions of a member, and delete those of an earlier state of it."""
        identity, predicted = self._identify(member, window), _without_errors(predictions)
        if identity is None or not predicted:
            return
        together = SegmentPredictions.concatenate(list(predicted.values()))
        errors = {name: item for name, item in predictions.items() if name not in predicted}
        values = {
            "names": list(predicted),
            "starts": together.starts,
            "seconds": together.recording_seconds,
            "errors": [(name, str(item.path), item.reason) for name, item in errors.items()],
        }
        arrays = {"clipwise": together.clipwise, "framewise": together.framewise}
        with self._store.writing(f"{member.name}.{self.name}", identity) as path:
            write_arrays(path, arrays, values)

    def predict(
        self, ensemble: Ensemble, sources: Mapping[str, AudioSource], *, progress: bool = False
    ) -> _Predictions:
        """Predict recordings as `predict_audio` does, without frames, as far as not stored.

        Members that are not stored predict together, so that the audio is decoded once.
        """
        window, names = ensemble.window_config, list(sources)
        stored = [self._read(member, window, names) for member in ensemble.members]
        by_member = self._predict_missing(ensemble, sources, stored, progress=progress)
        lengths = [
            {name: item.n_segments for name, item in _without_errors(predictions).items()}
            for predictions in by_member
        ]
        if any(other != lengths[0] for other in lengths):
            # A disk that failed for some members only: their segments are not those of the others.
            logger.warning(
                "members could read different recordings of %s; all predict again",
                shorten_list(names),
            )
            stored = [None] * len(lengths)
            by_member = self._predict_missing(ensemble, sources, stored, progress=progress)
        readable = _without_errors(by_member[0])
        broken = {name: source for name, source in sources.items() if name not in readable}
        if broken and None not in stored:  # they could not be read then: perhaps they can now
            retried = _without_errors(dict(predict_audio(ensemble, broken, SEGMENTS_ONLY)))
            for index, member in enumerate(ensemble.members if retried else ()):
                by_member[index] |= {n: item.for_members([index]) for n, item in retried.items()}
                if member.name not in ensemble.fallen_back:
                    self.write(member, window, by_member[index])
        result: _Predictions = {}
        for name in sources:
            items = [predictions[name] for predictions in by_member]
            is_error = isinstance(items[0], AudioError)
            result[name] = items[0] if is_error else SegmentPredictions.stack_members(items)
        return result

    def _predict_missing(
        self,
        ensemble: Ensemble,
        sources: Mapping[str, AudioSource],
        stored: Sequence[_Predictions | None],
        *,
        progress: bool,
    ) -> list[_Predictions]:
        """Return the predictions of each member; those not ``stored`` are computed and written."""
        by_member = list(stored)
        missing = [index for index, predictions in enumerate(stored) if predictions is None]
        if not missing:
            return by_member
        some = ensemble.for_members([ensemble.members[index] for index in missing])
        stream = predict_audio(some, sources, SEGMENTS_ONLY)
        bar = tqdm(stream, self.name, len(sources), disable=not progress, unit="recording")
        computed = dict(bar)
        for position, index in enumerate(missing):
            by_member[index] = {
                name: item if isinstance(item, AudioError) else item.for_members([position])
                for name, item in computed.items()
            }
            if (member := some.members[position]).name not in some.fallen_back:
                self.write(member, ensemble.window_config, by_member[index])
        return by_member

    def predict_frames(
        self, ensemble: Ensemble, sources: Mapping[str, AudioSource]
    ) -> dict[str, np.ndarray]:
        """Return the ``frames`` of `SegmentPredictions` of each recording, the members' mean.

        They are stored for these members together. Recordings that do not decode are left out.
        """

        def read_file(path: Path) -> dict[str, np.ndarray]:
            arrays, _ = read_arrays(path)
            return {name: arrays[name] for name in sources}

        window = ensemble.window_config
        identities = [self._identify(member, window) for member in ensemble.members]
        is_stored = None not in identities
        members = digest(" ".join(member.name for member in ensemble.members))
        stored_as = f"frames-{members}.{self.name}", {"members": identities}
        stored = self._store.read(*stored_as, read_file) if is_stored else None
        if stored is not None:
            return stored
        predictions = _without_errors(dict(predict_audio(ensemble, sources)))
        frames = {name: item.frames for name, item in predictions.items()}
        if is_stored and frames and not ensemble.fallen_back:
            with self._store.writing(*stored_as) as path:
                write_arrays(path, frames, {})
        return frames


def _without_errors(predictions: _Predictions) -> dict[str, SegmentPredictions]:
    return {
        name: item for name, item in predictions.items() if isinstance(item, SegmentPredictions)
    }
