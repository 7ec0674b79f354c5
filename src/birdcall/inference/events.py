"""Turn predictions over time into events: from when to when a species is in a recording."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from birdcall.config import SEGMENT_SECONDS
from birdcall.inference.background import BackgroundAligner
from birdcall.inference.decision import Decision, combine_members, limit_species
from birdcall.inference.predictions import (
    SegmentPredictions,
    calibrate,
)
from birdcall.inference.windows import FRAME_SECONDS, FRAMES_PER_SEGMENT

_TIME_TOLERANCE = 1e-6  # seconds; times are rounded to it, or 3 x 0.1 s would not be 0.3 s
_MAX_GAP_SECONDS = 0.5  # two calls this close are one event
_TIME_ORDER = attrgetter("onset", "offset", "ebird_code")


@dataclass(frozen=True)
class Event:
    """A species from ``onset`` to ``offset``, in seconds of its recording.

    confidence: the highest probability of its frames; 1 for what a person has labelled. note: the
    text that a person has written beside it.
    """

    ebird_code: str
    onset: float
    offset: float
    confidence: float = 1.0
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.onset <= self.offset < float("inf"):
            raise ValueError(
                f"event of {self.ebird_code} lasts from {self.onset} to {self.offset} s; it must "
                "not end before it begins, nor begin before 0"
            )
        if not np.isfinite(self.confidence):
            raise ValueError(f"confidence of {self.ebird_code} is {self.confidence}")


def frames_to_events(
    framewise: ArrayLike,
    classes: Sequence[str],
    frame_seconds: float,
    threshold: ArrayLike,
    min_seconds: float = 0.0,
    max_gap_seconds: float = 0.0,
    start_seconds: float = 0.0,
) -> list[Event]:
    """Return the events in probabilities ``framewise (classes, frames)``, in order of onset.

    An event is a run of frames at or above ``threshold`` (a number, or one per class); its
    confidence is the highest of them. Runs at most ``max_gap_seconds`` apart are one event; then
    those under ``min_seconds`` are dropped. Frame 0 begins at ``start_seconds``: a long recording
    can be processed in parts with both limits at 0, and `merge_events` of all parts gives the same
    result.
    """
    frames = np.asarray(framewise)
    if frames.ndim != 2 or len(frames) != len(classes):
        raise ValueError(
            f"framewise has shape {frames.shape}; it must be ({len(classes)} classes, frames)"
        )
    if not np.isfinite(frames).all():
        raise ValueError("framewise holds NaN or infinity: did a model diverge?")
    if not frame_seconds > 0:
        raise ValueError(f"frame_seconds is {frame_seconds}; it must be above 0")
    limits = np.broadcast_to(np.asarray(threshold, dtype=frames.dtype), len(classes))
    runs = [
        Event(
            classes[row],
            round(float(start_seconds + start * frame_seconds), 6),
            round(float(start_seconds + end * frame_seconds), 6),
            round(float(frames[row, start:end].max()), 6),
        )
        for row, start, end in _find_runs(frames >= limits[:, None])
    ]
    return merge_events(runs, min_seconds, max_gap_seconds)


def _find_runs(active: np.ndarray) -> Iterable[tuple[int, int, int]]:
    """Return row, start and end of each run of True in ``(rows, frames)``, row by row."""
    change = np.diff(np.pad(active, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(change == 1)
    ends = np.nonzero(change == -1)[1]  # each row has as many ends as starts, in the same order
    return zip(rows, starts, ends, strict=True)


def merge_events(
    events: Iterable[Event], min_seconds: float = 0.0, max_gap_seconds: float = 0.0
) -> list[Event]:
    """Join events of a species at most ``max_gap_seconds`` apart, then drop the short ones."""
    if not (min_seconds >= 0 and max_gap_seconds >= 0):
        raise ValueError(
            f"min_seconds is {min_seconds} and max_gap_seconds {max_gap_seconds}; neither may be "
            "negative"
        )
    merged: dict[str, list[Event]] = {}
    for event in sorted(events, key=_TIME_ORDER):
        earlier = merged.setdefault(event.ebird_code, [])
        if earlier and event.onset - earlier[-1].offset <= max_gap_seconds + _TIME_TOLERANCE:
            earlier[-1] = Event(
                event.ebird_code,
                earlier[-1].onset,
                max(earlier[-1].offset, event.offset),
                max(earlier[-1].confidence, event.confidence),
            )
        else:
            earlier.append(event)
    long_enough = [
        event
        for of_species in merged.values()
        for event in of_species
        if event.offset - event.onset >= min_seconds - _TIME_TOLERANCE
    ]
    return sorted(long_enough, key=_TIME_ORDER)


# --- detection in a recording of any length -------------------------------------------------------


class _Candidates(NamedTuple):
    """Species that pass the thresholds of their row: an entry each, in order of row and class.

    row, column: the segment and the class. passed: ``(voters, entries)``; frames: ``(entries,
    FRAMES_PER_SEGMENT)``, the members' mean.
    """

    row: np.ndarray
    column: np.ndarray
    passed: np.ndarray
    strength: np.ndarray
    frames: np.ndarray


@dataclass(eq=False)
class EventDetector:
    """Takes the predictions of a recording part by part; decides as `decide_segments` on all of it.

    Memory grows with the species that can still be chosen, not with classes x seconds: a row (a
    segment) is decided as soon as its neighbours are known. Only the gate waits for the end.
    """

    decision: Decision
    classes: Sequence[str]
    n_decided: int = field(default=0, init=False)  # rows
    aligner: BackgroundAligner = field(init=False)
    # The last decided row, for smoothing, and those not yet decided.
    pending: SegmentPredictions | None = field(default=None, init=False)
    highest: np.ndarray | None = field(default=None, init=False)  # clipwise, (voters, classes)
    candidates: list[_Candidates] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.aligner = BackgroundAligner(self.decision.background)

    def add(self, part: SegmentPredictions) -> None:
        """Take the next segments of the recording, with their frames."""
        for aligned in self.aligner.add(part):
            self._add_aligned(aligned)

    def _add_aligned(self, part: SegmentPredictions) -> None:
        rows = (
            part if self.pending is None else SegmentPredictions.concatenate([self.pending, part])
        )
        self._decide(rows, end=rows.n_segments - 1)  # the last row waits for its neighbour

    def finish(self, seconds: float) -> list[Event]:
        """Return the events of the recording, which is ``seconds`` long.

        They are the decided segments, narrowed to the frames above the frame threshold. Every
        species of a row has an event in it: where the members' mean over time stays below the
        threshold, its highest frames count.
        """
        for aligned in self.aligner.finish():
            self._add_aligned(aligned)
        if self.pending is None:
            return []
        self._decide(self.pending, end=self.pending.n_segments)
        row, column, passed, strength, frames = zip(*self.candidates, strict=True)
        self.candidates = []
        candidates = _Candidates(
            row=np.concatenate(row),
            column=np.concatenate(column),
            passed=np.concatenate(passed, axis=1),
            strength=np.concatenate(strength),
            frames=np.concatenate(frames),
        )
        chosen = self._choose(candidates)
        if not chosen.any():
            return []
        segment, column, frames = (
            candidates.row[chosen],
            candidates.column[chosen],
            candidates.frames[chosen],
        )
        threshold = np.minimum(frames.max(axis=1), self.decision.frame_threshold)
        active = frames >= threshold[:, None].astype(frames.dtype)
        n_frames = max(1, round(seconds / FRAME_SECONDS))
        position = segment[:, None] * FRAMES_PER_SEGMENT + np.arange(FRAMES_PER_SEGMENT)
        active &= position < n_frames
        events = []
        for entry, start, end in _find_runs(active):
            segment_start = segment[entry] * SEGMENT_SECONDS
            onset = round(float(segment_start + start * FRAME_SECONDS), 6)
            offset = round(float(segment_start + end * FRAME_SECONDS), 6)
            confidence = round(float(frames[entry, start:end].max()), 6)
            code = self.classes[column[entry]]
            events.append(Event(code, onset, max(onset, min(offset, seconds)), confidence))
        return merge_events(events, max_gap_seconds=_MAX_GAP_SECONDS)

    def _decide(self, rows: SegmentPredictions, end: int) -> None:
        """Decide the pending rows before ``end``; keep the last one of them and those after it."""
        first = 1 if self.n_decided else 0  # the row before is a neighbour only
        if end > first:
            rule = replace(self.decision, background=None)
            voters = combine_members(rows.clipwise, rows.framewise, rule)
            decided = slice(first, end)
            highest = voters.clipwise[:, decided].max(axis=1)
            self.highest = highest if self.highest is None else np.maximum(self.highest, highest)
            clipwise = voters.clipwise[:, decided]
            passed = clipwise >= self.decision.clip_thresholds(clipwise.dtype)
            passed &= voters.framewise[:, decided] >= self.decision.frame_threshold
            strength = voters.strength[decided]
            row, column = np.nonzero(self._can_be_chosen(passed, strength))
            by_row = rows.frames.reshape(len(self.classes), -1, FRAMES_PER_SEGMENT)
            frames = by_row[column, row + first]
            calibration = self.decision.calibration
            if calibration is not None:
                scale = np.asarray(calibration.frame_scale)[column]
                offset = np.asarray(calibration.frame_offset)[column]
                frames = calibrate(frames.T, scale, offset).T
            self.candidates.append(
                _Candidates(
                    row=row + self.n_decided,
                    column=column,
                    passed=passed[:, row, column],
                    strength=strength[row, column],
                    frames=frames,
                )
            )
            self.n_decided += end - first
        n_dropped = max(0, end - 1) if self.n_decided else 0
        self.pending = rows.copy_from(n_dropped)

    def _can_be_chosen(self, passed: np.ndarray, strength: np.ndarray) -> np.ndarray:
        """Return which of ``(voters, rows, classes)`` can be among the strongest of their row.

        A species that passes the gate now passes it at the end, too. So a species that is weaker
        than ``max_birds`` such species of its row is out, whatever follows in the recording.
        """
        certain = passed & (self.highest >= self.decision.recording_threshold)[:, None]
        n_strongest = min(self.decision.max_birds, strength.shape[1])
        agreed = certain.sum(axis=0) >= self.decision.n_votes(len(certain))
        strengths = np.where(agreed, strength, -np.inf)
        weakest = np.partition(strengths, -n_strongest, axis=1)[:, -n_strongest]
        return passed.any(axis=0) & (strength >= weakest[:, None])

    def _choose(self, candidates: _Candidates) -> np.ndarray:
        """Return which candidates pass the gate and are among the strongest of their row."""
        gate = self.highest >= self.decision.recording_threshold
        passed = candidates.passed & gate[:, candidates.column]
        agreed = passed.sum(axis=0) >= self.decision.n_votes(len(passed))
        # Entries are in order of row. Rows with more than max_birds species are few; they are
        # ranked as `decide_segments` ranks them.
        chosen = agreed.copy()
        starts = np.flatnonzero(np.diff(candidates.row, prepend=-1))
        counts = np.add.reduceat(agreed, starts, dtype=np.intp) if len(starts) else starts
        ends = np.append(starts[1:], len(agreed))
        for index in np.flatnonzero(counts > self.decision.max_birds):
            row = slice(starts[index], ends[index])
            chosen[row] = limit_species(
                agreed[None, row], candidates.strength[None, row], self.decision.max_birds
            )[0]
        return chosen


def detect_events(
    predictions: SegmentPredictions, decision: Decision, classes: Sequence[str]
) -> list[Event]:
    """Return the events of a whole recording; see `EventDetector`."""
    detector = EventDetector(decision, classes)
    detector.add(predictions)
    return detector.finish(predictions.seconds)
