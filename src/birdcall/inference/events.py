"""Say from when to when each bird is heard, in a recording of any length, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from birdcall.config import SEGMENT_SECONDS
from birdcall.inference.decision import (
    Decision,
    agree,
    calibrate,
    keep_strongest,
    make_voters,
    pass_thresholds,
)
from birdcall.inference.predictions import SegmentPredictions, concatenate
from birdcall.inference.tables import Event, merge_events
from birdcall.inference.windows import FRAME_SECONDS, FRAMES_PER_SEGMENT

MAX_GAP_SECONDS = 0.5  # two calls this close are one event


class _Candidates(NamedTuple):
    """Birds that pass the thresholds of their row: an entry each, in order of row and class.

    passed: ``(voters, entries)``; frames: ``(entries, FRAMES_PER_SEGMENT)``, the members' mean.
    """

    row: np.ndarray
    column: np.ndarray
    passed: np.ndarray
    strength: np.ndarray
    frames: np.ndarray


class RecordingDetector:
    """Collects what is heard in a recording and decides, as `decision.decide` would on all of it.

    What is kept grows with the birds that can be named, not with classes x seconds: a row is
    decided as soon as its neighbours are known, all but the gate, which asks the whole recording.
    """

    def __init__(self, decision: Decision, classes: Sequence[str]) -> None:
        self.decision, self.classes = decision, tuple(classes)
        self.n_decided = 0  # rows
        # The last decided row, for smoothing, and those not yet decided.
        self.held: SegmentPredictions | None = None
        self.highest: np.ndarray | None = None
        self.candidates: list[_Candidates] = []

    def add(self, piece: SegmentPredictions) -> None:
        """Take the next segments of the recording, with their frames."""
        self._decide(piece, is_last=False)

    def finish(self, seconds: float) -> list[Event]:
        """Return the events of a recording that is so long.

        They are the decided segments, narrowed to loud frames. Every bird of a row has an event in
        it: where the members' mean over time stays below the frame threshold, its highest frames
        count.
        """
        if self.held is None:
            return []
        self._decide(None, is_last=True)
        *parts, frames = zip(*self.candidates, strict=True)
        self.candidates = []
        joined = [np.concatenate(part, axis=-1) for part in parts]
        found = _Candidates(*joined, np.concatenate(frames))
        return self._find_events(self._choose(found), seconds)

    def _decide(self, piece: SegmentPredictions | None, is_last: bool) -> None:
        rows = concatenate([part for part in (self.held, piece) if part is not None])
        n_rows = rows.clipwise.shape[1]
        first = 1 if self.n_decided else 0  # the row before is a neighbour only
        last = n_rows if is_last else n_rows - 1
        if last > first:
            self._collect(rows, first, last)
            self.n_decided += last - first
        kept = max(0, last - 1) if self.n_decided else 0
        self.held = _copy(rows.select(slice(kept, None)))

    def _collect(self, rows: SegmentPredictions, first: int, last: int) -> None:
        voters = make_voters(rows.clipwise, rows.framewise, self.decision)
        own = slice(first, last)
        highest = voters.clipwise[:, own].max(axis=1)
        self.highest = highest if self.highest is None else np.maximum(self.highest, highest)
        passed = pass_thresholds(voters, self.decision)[:, own]
        row, column = np.nonzero(self._may_be_chosen(passed, voters.strength[own]))
        by_row = rows.frames.reshape(len(self.classes), -1, FRAMES_PER_SEGMENT)
        frames = by_row[column, row + first]
        calibration = self.decision.calibration
        if calibration is not None:
            scale, offset = (
                np.asarray(values)[column]
                for values in (calibration.frame_scale, calibration.frame_offset)
            )
            frames = calibrate(frames.T, scale, offset).T
        self.candidates.append(
            _Candidates(
                row=row + self.n_decided,
                column=column,
                passed=passed[:, row, column],
                strength=voters.strength[own][row, column],
                frames=frames,
            )
        )

    def _may_be_chosen(self, passed: np.ndarray, strength: np.ndarray) -> np.ndarray:
        """Return which of ``(voters, rows, classes)`` can be among the strongest of their row.

        Who has passed the gate before the end has passed it. So a bird that is weaker than as many
        of these as a row may have is out, whatever is still to be heard.
        """
        sure = passed & (self.highest >= self.decision.recording_threshold)[:, None]
        n_kept = min(self.decision.max_birds, strength.shape[1])
        strengths = np.where(agree(sure, self.decision), strength, -np.inf)
        weakest = np.partition(strengths, -n_kept, axis=1)[:, -n_kept]
        return passed.any(axis=0) & (strength >= weakest[:, None])

    def _choose(self, found: _Candidates) -> _Candidates:
        """Return those that pass the gate and are among the strongest of their row."""
        gate = self.highest >= self.decision.recording_threshold
        agreed = agree(found.passed & gate[:, found.column], self.decision)
        # Entries are in order of row. Rows in which more birds agree than are wanted are few, and
        # ranked as `decide` ranks them.
        chosen = agreed.copy()
        starts = np.flatnonzero(np.diff(found.row, prepend=-1))
        counts = np.add.reduceat(agreed, starts, dtype=np.intp) if len(starts) else starts
        ends = np.append(starts[1:], len(agreed))
        for crowded in np.flatnonzero(counts > self.decision.max_birds):
            own = slice(starts[crowded], ends[crowded])
            chosen[own] = keep_strongest(
                agreed[None, own], found.strength[None, own], self.decision.max_birds
            )[0]
        return _Candidates(
            row=found.row[chosen],
            column=found.column[chosen],
            passed=found.passed[:, chosen],
            strength=found.strength[chosen],
            frames=found.frames[chosen],
        )

    def _find_events(self, chosen: _Candidates, seconds: float) -> list[Event]:
        if not len(chosen.row):
            return []
        frames = chosen.frames
        threshold = np.minimum(frames.max(axis=1), self.decision.frame_threshold)
        active = frames >= threshold[:, None].astype(frames.dtype)
        n_frames = max(1, round(seconds / FRAME_SECONDS))
        position = chosen.row[:, None] * FRAMES_PER_SEGMENT + np.arange(FRAMES_PER_SEGMENT)
        active &= position < n_frames
        change = np.diff(np.pad(active, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        entry, start = np.nonzero(change == 1)
        end = np.nonzero(change == -1)[1]
        events = []
        for at, begin, stop in zip(entry, start, end, strict=True):
            onset = round(float(chosen.row[at] * SEGMENT_SECONDS + begin * FRAME_SECONDS), 6)
            offset = round(float(chosen.row[at] * SEGMENT_SECONDS + stop * FRAME_SECONDS), 6)
            confidence = round(float(frames[at, begin:stop].max()), 6)
            code = self.classes[chosen.column[at]]
            events.append(Event(code, onset, max(onset, min(offset, seconds)), confidence))
        return merge_events(events, max_gap_seconds=MAX_GAP_SECONDS)


def detect_events(
    scores: SegmentPredictions, decision: Decision, classes: Sequence[str]
) -> list[Event]:
    """Return the events of a recording that was heard at once; see `RecordingDetector`."""
    detector = RecordingDetector(decision, classes)
    detector.add(scores)
    return detector.finish(scores.seconds)


def _copy(part: SegmentPredictions) -> SegmentPredictions:
    """Return clipwise, framewise and frames in memory of their own, so that the rest is freed."""
    return SegmentPredictions(part.clipwise.copy(), part.framewise.copy(), part.frames.copy())
