"""Hold what members heard in soundscapes with known birds: the matter of every soundscape score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from birdcall.config import SEGMENT_SECONDS
from birdcall.data.targets import MIN_OVERLAP_SECONDS
from birdcall.evaluation.metrics import row_f1_scores
from birdcall.inference.decision import (
    Decision,
    apply_recording_thresholds,
    combine_members,
    decide_segments,
    summarise_recordings,
)

_TIME_TOLERANCE = 1e-6  # seconds


@dataclass(frozen=True, eq=False)
class LabelledPredictions:
    """What members heard in soundscapes that none of them was trained on, and what is there.

    segments: a row per segment; those of a recording stand together and are all there, in order of
    time, since rules look at neighbours. Columns: ``recording``; ``seconds``, the segment's end;
    ``is_labelled``, whether it is known what sings there; ``group``, which soundscapes share no
    training recording nor recordist with those of other groups.
    truth: ``(segments, known species)``; its first columns are ``classes``, the rest competition
    species that the members cannot name and so miss. False where it is not known.
    clipwise, framewise: ``(members, segments, classes)``.
    """

    segments: pd.DataFrame
    truth: np.ndarray
    clipwise: np.ndarray
    framewise: np.ndarray
    member_names: tuple[str, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = (len(self.member_names), len(self.segments), len(self.classes))
        for name in ("clipwise", "framewise"):
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} has shape {found}; want (members, segments, classes)")
        recordings = self.segments["recording"].to_numpy()
        if len(self.starts) != len(set(recordings)):
            raise ValueError("the segments of a recording do not stand together")

    @cached_property
    def starts(self) -> np.ndarray:
        """Return the first row of each recording, ``(recordings,)``."""
        recordings = self.segments["recording"].to_numpy()
        return np.flatnonzero(np.append(True, recordings[1:] != recordings[:-1]))

    @cached_property
    def labelled(self) -> np.ndarray:
        """Return which rows are scored, ``(segments,)``, boolean."""
        return self.segments["is_labelled"].to_numpy(dtype=bool)

    @cached_property
    def recordings(self) -> np.ndarray:
        """Return the recording of each labelled row."""
        return self.segments["recording"].to_numpy()[self.labelled]

    @cached_property
    def groups(self) -> np.ndarray:
        """Return the group of each labelled row: what an interval resamples."""
        return self.segments["group"].to_numpy()[self.labelled]

    @cached_property
    def labelled_truth(self) -> np.ndarray:
        """Return the truth of the labelled rows, ``(labelled rows, known species)``."""
        return self.truth[self.labelled]

    def for_members(self, positions: Sequence[int]) -> LabelledPredictions:
        """Return the scores of some members, by position."""
        return replace(
            self,
            clipwise=self.clipwise[list(positions)],
            framewise=self.framewise[list(positions)],
            member_names=tuple(self.member_names[position] for position in positions),
        )

    def select(self, chosen: np.ndarray) -> LabelledPredictions:
        """Return some recordings, given the mask of all their segments ``(segments,)``."""
        return replace(
            self,
            segments=self.segments[chosen].reset_index(drop=True),
            truth=self.truth[chosen],
            clipwise=self.clipwise[:, chosen],
            framewise=self.framewise[:, chosen],
        )

    def decide(self, decision: Decision) -> np.ndarray:
        """Return which known species are named in each labelled row."""
        chosen = decide_segments(self.clipwise, self.framewise, decision, self.starts)
        return self._pad(chosen[self.labelled])

    def row_f1(self, decision: Decision) -> np.ndarray:
        """Return the F1 of each labelled row under a decision."""
        return row_f1_scores(self.labelled_truth, self.decide(decision))

    def recording_f1(self, decision: Decision) -> np.ndarray:
        """Return the F1 of each recording as one row, as site 3 is scored, ``(recordings,)``."""
        return self.recording_f1_of([decision])[0]

    def recording_f1_of(self, decisions: Sequence[Decision]) -> np.ndarray:
        """Return `recording_f1` of rules that differ only in what they ask of whole recordings."""
        rule = decisions[0]
        voters = combine_members(self.clipwise, self.framewise, rule, self.starts)
        gathered = summarise_recordings(voters, rule)
        truth = np.logical_or.reduceat(self.truth, self.starts, axis=0)
        named = (apply_recording_thresholds(gathered, one) for one in decisions)
        return np.array([row_f1_scores(truth, self._pad(chosen)) for chosen in named])

    def _pad(self, chosen: np.ndarray) -> np.ndarray:
        """Add the species that the members cannot name."""
        return np.pad(chosen, ((0, 0), (0, self.truth.shape[1] - chosen.shape[1])))


def concatenate(parts: Sequence[LabelledPredictions]) -> LabelledPredictions:
    """Join soundscapes that the same number of members heard; their recordings' names differ."""
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
        clipwise=np.concatenate([part.clipwise for part in parts], axis=1),
        framewise=np.concatenate([part.framewise for part in parts], axis=1),
    )


def segment_table(
    recording: str, n_segments: int, *, is_labelled: np.ndarray | bool, group: str
) -> pd.DataFrame:
    """Return the table of one recording's segments, as in `LabelledPredictions`."""
    return pd.DataFrame(
        {
            "recording": recording,
            "seconds": SEGMENT_SECONDS * np.arange(1.0, n_segments + 1),
            "is_labelled": is_labelled,
            "group": group,
        }
    )


def truth_from_intervals(
    intervals: Iterable[tuple[float, float]], columns: Sequence[int], shape: tuple[int, int]
) -> np.ndarray:
    """Return which species are present in each segment, boolean, of ``shape`` (segments, species).

    intervals: onset and offset of each event in seconds; columns: the column of its species. An
    event is present in a segment that holds half a second of it, or half of it.
    """
    truth = np.zeros(shape, dtype=bool)
    starts = SEGMENT_SECONDS * np.arange(shape[0])
    for (onset, offset), column in zip(intervals, columns, strict=True):
        overlap = np.minimum(offset, starts + SEGMENT_SECONDS) - np.maximum(onset, starts)
        touches = (onset < starts + SEGMENT_SECONDS) & (offset >= starts)
        enough = min(MIN_OVERLAP_SECONDS, (offset - onset) / 2) - _TIME_TOLERANCE
        truth[touches & (overlap >= enough), column] = True
    return truth
