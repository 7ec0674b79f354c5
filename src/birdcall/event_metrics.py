"""Score time-stamped events: segment-based and event-based F1 with collars.

Conventions, mir_eval's: events of one recording are ``intervals (events, 2)``, onset and offset in
seconds, with one label each; truth comes first. The result is counts, because a score over several
recordings is the F1 of their sum: ``sum(counts, DetectionCounts()).f1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from birdcall.metrics import share

TIME_TOLERANCE = 1e-6  # seconds; 0.9 - 0.7 is above 0.2 in floating point


@dataclass(frozen=True)
class DetectionCounts:
    """Hits and mistakes of detected events; add those of several recordings, then take ``f1``."""

    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0

    def __add__(self, other: DetectionCounts) -> DetectionCounts:
        """Return the counts of both."""
        return DetectionCounts(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
        )

    @property
    def precision(self) -> float:
        """Share of the predicted that is right; NaN if nothing was predicted."""
        return share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Share of the true that is found; NaN if nothing is there."""
        return share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """2TP / (2TP + FP + FN); NaN if nothing is there and nothing was predicted."""
        mistakes = self.false_positives + self.false_negatives
        return share(2 * self.true_positives, 2 * self.true_positives + mistakes)


def segment_based_counts(
    true_intervals: ArrayLike,
    true_labels: Sequence[str],
    predicted_intervals: ArrayLike,
    predicted_labels: Sequence[str],
    segment_seconds: float = 1.0,
) -> DetectionCounts:
    """Count (segment, label) pairs: a label is active in every segment that its events touch.

    Source: Mesaros, Heittola & Virtanen 2016, "Metrics for polyphonic sound event detection".
    """
    if not segment_seconds > 0:
        raise ValueError(f"segment_seconds is {segment_seconds}; it must be above 0")
    true = _active_segments("true", true_intervals, true_labels, segment_seconds)
    guess = _active_segments("predicted", predicted_intervals, predicted_labels, segment_seconds)
    return DetectionCounts(len(true & guess), len(guess - true), len(true - guess))


def event_based_counts(
    true_intervals: ArrayLike,
    true_labels: Sequence[str],
    predicted_intervals: ArrayLike,
    predicted_labels: Sequence[str],
    onset_collar_seconds: float = 0.2,
    offset_collar_seconds: float = 0.2,
    offset_share: float = 0.5,
) -> DetectionCounts:
    """Count events found: same label, onset and offset within their collars, each used once.

    The offset may be off by the larger of its collar and ``offset_share`` of the true event's
    length; ``offset_collar_seconds=inf`` scores onsets only. Pairs are chosen so that as many
    events as possible match (as in mir_eval). Source: as ``segment_based_counts``; its defaults.
    """
    for name, value in (
        ("onset_collar_seconds", onset_collar_seconds),
        ("offset_collar_seconds", offset_collar_seconds),
        ("offset_share", offset_share),
    ):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
    true = _intervals("true", true_intervals, true_labels)
    guess = _intervals("predicted", predicted_intervals, predicted_labels)
    n_matched = 0
    for label in set(true_labels) & set(predicted_labels):
        wanted = true[[other == label for other in true_labels]]
        found = guess[[other == label for other in predicted_labels]]
        offset_collars = np.maximum(
            offset_collar_seconds, offset_share * (wanted[:, 1] - wanted[:, 0])
        )
        n_matched += _n_matched(_candidates(wanted, found, onset_collar_seconds, offset_collars))
    return DetectionCounts(n_matched, len(guess) - n_matched, len(true) - n_matched)


def _candidates(
    true: NDArray, predicted: NDArray, onset_collar: float, offset_collars: NDArray
) -> list[list[int]]:
    """Return, for each true event, the predicted events near enough in onset and offset."""
    predicted = predicted[np.argsort(predicted[:, 0])]  # a day has too many pairs to try them all
    reach = onset_collar + TIME_TOLERANCE
    first = np.searchsorted(predicted[:, 0], true[:, 0] - reach, side="left")
    end = np.searchsorted(predicted[:, 0], true[:, 0] + reach, side="right")
    near_offset = [
        np.abs(predicted[i:j, 1] - offset) <= collar + TIME_TOLERANCE
        for i, j, offset, collar in zip(first, end, true[:, 1], offset_collars, strict=True)
    ]
    return [(np.nonzero(near)[0] + i).tolist() for near, i in zip(near_offset, first, strict=True)]


def _active_segments(
    name: str, intervals: ArrayLike, labels: Sequence[str], segment_seconds: float
) -> set[tuple[int, str]]:
    active = set()
    edges = np.round(_intervals(name, intervals, labels) / segment_seconds, 6)
    for (onset, offset), label in zip(edges, labels, strict=True):
        first = int(np.floor(onset))
        end = max(int(np.ceil(offset)), first + 1)
        active.update((segment, label) for segment in range(first, end))
    return active


def _n_matched(candidates: Sequence[Sequence[int]]) -> int:
    """Return the size of the largest one-to-one matching of each item to its candidates.

    Augmenting paths, breadth first (Berge 1957); a greedy choice can block a better one.
    """
    owner: dict[int, int] = {}  # candidate -> item
    return sum(_augment(item, candidates, owner) for item in range(len(candidates)))


def _augment(item: int, candidates: Sequence[Sequence[int]], owner: dict[int, int]) -> bool:
    came_from: dict[int, int] = {}  # candidate -> the item that would take it
    taken: dict[int, int | None] = {item: None}  # item -> the candidate it would give up
    queue = [item]
    for current in queue:
        for candidate in candidates[current]:
            if candidate in came_from:
                continue
            came_from[candidate] = current
            if candidate in owner:
                taken[owner[candidate]] = candidate
                queue.append(owner[candidate])
                continue
            step: int | None = candidate
            while step is not None:
                owner[step] = came_from[step]
                step = taken[came_from[step]]
            return True
    return False


def _intervals(name: str, intervals: ArrayLike, labels: Sequence[str]) -> NDArray[np.floating]:
    times = np.asarray(intervals, dtype=float)
    if times.size == 0:
        times = times.reshape(0, 2)
    if times.ndim != 2 or times.shape[1] != 2:
        raise ValueError(f"{name} intervals have shape {times.shape}; give (events, 2)")
    if len(times) != len(labels):
        raise ValueError(f"{len(times)} {name} intervals but {len(labels)} labels")
    wrong = ~np.isfinite(times).all(axis=1) | (times[:, 0] < 0) | (times[:, 1] < times[:, 0])
    if wrong.any():
        event = int(np.argmax(wrong))
        onset, offset = times[event]
        raise ValueError(
            f"{name} event {event} lasts from {onset:g} to {offset:g} s: are these (onset, offset) "
            "in seconds, and not a duration?"
        )
    return times
