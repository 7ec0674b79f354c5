"""Score predictions: the competition's row-wise F1, ranking, calibration and intervals.

Conventions:

- A *row* is one scored segment (or file), a *label string* its species, ``"aldfly norcar"``, or
  ``"nocall"``. In matrices ``(rows, classes)`` an all-False row means nocall; it has no column.
- ``truth`` comes first. ``scores`` rank (higher is likelier), ``predicted`` are decisions.
- What is undefined (the precision of no prediction) is NaN, never a flattering 0 or 1.
- Every function is pure, and checks its input first: ``ValueError`` with the likely mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from birdcall.config import NOCALL

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.floating]


# --- the competition's metric -------------------------------------------------------------------


def row_wise_f1(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the competition's score of label strings: the mean over rows of 2TP / (2TP + FP + FN).

    ``nocall`` is a token like any other, so an all-nocall file scores the share of nocall rows.
    scikit-learn's ``f1_score(average="samples")`` with nocall as one more column is the same.
    """
    if len(truth) != len(predicted):
        raise ValueError(
            f"{len(truth)} rows of truth but {len(predicted)} predicted: are both of the same "
            "rows, in the same order?"
        )
    _require_rows(len(truth))
    true_sets = _token_sets("truth", truth)
    predicted_sets = _token_sets("predicted", predicted)
    return float(
        np.mean(
            [
                2 * len(true & guess) / (len(true) + len(guess))
                for true, guess in zip(true_sets, predicted_sets, strict=True)
            ]
        )
    )


def row_wise_f1_from_matrix(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the same score as ``row_wise_f1`` for boolean matrices ``(rows, classes)``."""
    return float(row_f1_scores(truth, predicted).mean())


def row_f1_scores(truth: ArrayLike, predicted: ArrayLike) -> FloatArray:
    """Return the F1 of each row ``(rows,)`` of boolean matrices ``(rows, classes)``."""
    true = _decisions("truth", truth)
    guess = _decisions("predicted", predicted)
    _require_same_shape(true, guess, "predicted")
    return _row_f1(_count(true & guess), _count(true), _count(guess))


def labels_to_matrix(labels: Sequence[str], classes: Sequence[str]) -> BoolArray:
    """Return label strings as a boolean matrix ``(rows, classes)``; nocall is an all-False row."""
    columns = {ebird_code: column for column, ebird_code in enumerate(classes)}
    if len(columns) != len(classes) or NOCALL in columns:
        raise ValueError(f"classes must be distinct codes without {NOCALL}")
    matrix = np.zeros((len(labels), len(classes)), dtype=bool)
    for row, tokens in enumerate(_token_sets("labels", labels)):
        for token in tokens - {NOCALL}:
            if token not in columns:
                raise ValueError(f"row {row} has {token!r}, which is none of the classes")
            matrix[row, columns[token]] = True
    return matrix


def _row_f1(hits: NDArray, n_true: NDArray, n_predicted: NDArray) -> FloatArray:
    both_nocall = (n_true == 0) & (n_predicted == 0)
    n_tokens = np.maximum(n_true, 1) + np.maximum(n_predicted, 1)  # nocall is one token
    return 2 * (hits + both_nocall) / n_tokens


def _count(matrix: BoolArray) -> NDArray[np.uint16]:
    # 16 bits are enough for 65,535 classes and several times faster than numpy's default.
    return np.add.reduce(matrix, axis=1, dtype=np.uint16)


# --- what kind of mistakes ----------------------------------------------------------------------


def precision(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the share of predicted birds that are right, over all rows; NaN if there is none."""
    true, guess = _decided(truth, predicted)
    return share((true & guess).sum(), guess.sum())


def recall(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the share of true birds that are predicted, over all rows; NaN if there is none."""
    true, guess = _decided(truth, predicted)
    return share((true & guess).sum(), true.sum())


def false_birds_per_nocall_row(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return how many birds are predicted per row without any; NaN if every row has a bird."""
    true, guess = _decided(truth, predicted)
    nocall = ~true.any(axis=1)
    return share(guess[nocall].sum(), nocall.sum())


# --- ranking, threshold-free --------------------------------------------------------------------


def average_precision(
    truth: ArrayLike, scores: ArrayLike, known: ArrayLike | None = None
) -> FloatArray:
    """Return AP = sum of (R_n - R_n-1) P_n over distinct scores, ``(classes,)``.

    Equals scikit-learn's ``average_precision_score``; NaN for a class that does not occur. Cells
    that are not ``known (rows, classes)`` are left out, whatever their truth.
    """
    return _per_class(_average_precision, truth, scores, known)


def roc_auc(truth: ArrayLike, scores: ArrayLike, known: ArrayLike | None = None) -> FloatArray:
    """Return the area under the ROC curve ``(classes,)``: P(a true row outranks a false one).

    Equals scikit-learn's ``roc_auc_score``; NaN for a class that occurs in no row or in every row.
    ``known`` as in ``average_precision``.
    """
    return _per_class(_roc_auc, truth, scores, known)


def macro_average(values: ArrayLike) -> float:
    """Return the mean over the classes for which a per-class metric is defined (not NaN)."""
    per_class = np.asarray(values, dtype=float)
    if per_class.ndim != 1:
        raise ValueError(f"values have shape {per_class.shape}; give one per class")
    defined = per_class[~np.isnan(per_class)]
    return float(defined.mean()) if len(defined) else float("nan")


def lwlrap(truth: ArrayLike, scores: ArrayLike) -> float:
    """Return the label-weighted label-ranking average precision; NaN if no row has a label.

    The mean over all true (row, class) pairs of the share of true classes among those ranked as
    high or higher in that row (DCASE 2019 task 2, Fonseca et al.). Equals scikit-learn's
    ``label_ranking_average_precision_score`` weighted with the labels per row; ties rank last.
    """
    true, score = _ranked(truth, scores)
    rows, classes = np.nonzero(true)
    if len(rows) == 0:
        return float("nan")
    as_high = score[rows] >= score[rows, classes][:, None]
    return float(np.mean((as_high & true[rows]).sum(axis=1) / as_high.sum(axis=1)))


def _per_class(
    metric: Callable[[NDArray, NDArray], float],
    truth: ArrayLike,
    scores: ArrayLike,
    known: ArrayLike | None,
) -> FloatArray:
    true, score = _ranked(truth, scores)
    cells = np.ones(true.shape, dtype=bool) if known is None else _decisions("known", known)
    _require_same_shape(true, cells, "known")
    return np.array(
        [
            metric(*_cumulated_hits(true[own, k], score[own, k])) if own.any() else float("nan")
            for k, own in enumerate(cells.T)
        ]
    )


def _cumulated_hits(truth: BoolArray, scores: FloatArray) -> tuple[NDArray, NDArray]:
    """Count true rows and all rows at or above each distinct score, from the highest down."""
    order = np.argsort(-scores)
    ranked = scores[order]
    last_of_tie = np.append(np.nonzero(ranked[1:] != ranked[:-1])[0], len(ranked) - 1)
    return np.cumsum(truth[order])[last_of_tie], last_of_tie + 1


def _average_precision(hits: NDArray, taken: NDArray) -> float:
    if hits[-1] == 0:
        return float("nan")
    return float(np.sum(np.diff(hits, prepend=0) * hits / taken) / hits[-1])


def _roc_auc(hits: NDArray, taken: NDArray) -> float:
    misses = taken - hits
    if hits[-1] == 0 or misses[-1] == 0:
        return float("nan")
    mean_hits = (hits + np.concatenate([[0], hits[:-1]])) / 2  # a tie counts half
    return float(np.sum(np.diff(misses, prepend=0) * mean_hits) / (hits[-1] * misses[-1]))


# --- calibration --------------------------------------------------------------------------------


class Reliability(NamedTuple):
    """A reliability diagram: for each bin ``(bins,)`` that holds a probability."""

    mean_probability: FloatArray
    share_true: FloatArray
    count: NDArray[np.intp]


def reliability(truth: ArrayLike, probabilities: ArrayLike, n_bins: int = 15) -> Reliability:
    """Compare probabilities, in ``n_bins`` equal bins of [0, 1], with how often they come true."""
    true, probability = _ranked(truth, probabilities)
    if probability.min() < 0 or probability.max() > 1:
        raise ValueError(
            f"probabilities lie in [{probability.min():g}, {probability.max():g}], not in [0, 1]: "
            "are they logits?"
        )
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; give at least 1")
    bins = np.minimum((probability.ravel() * n_bins).astype(np.intp), n_bins - 1)
    count = np.bincount(bins, minlength=n_bins)
    sum_probability = np.bincount(bins, probability.ravel(), n_bins)
    sum_true = np.bincount(bins, true.ravel(), n_bins)
    used = count > 0
    return Reliability(
        sum_probability[used] / count[used], sum_true[used] / count[used], count[used]
    )


def expected_calibration_error(
    truth: ArrayLike, probabilities: ArrayLike, n_bins: int = 15
) -> float:
    """Return sum over bins of n_b / n * |share true - mean probability| (Guo et al. 2017).

    Over all cells of ``(rows, classes)``. Most of these are near 0 and easy: give the matrix of
    the classes that occur, or one column, to see more.
    """
    curve = reliability(truth, probabilities, n_bins)
    gaps = np.abs(curve.share_true - curve.mean_probability)
    return float(np.average(gaps, weights=curve.count))


# --- uncertainty --------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A percentile interval."""

    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[object],
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    weights: ArrayLike | None = None,
) -> Interval:
    """Return the percentile interval of the mean of ``values (rows,)``, resampling whole groups.

    With ``weights (rows,)`` it is the weighted mean. ``groups`` name each row's recording: its rows
    are not independent, and resampling rows would give an interval much too narrow (cluster
    bootstrap, Davison & Hinkley 1997, 3.8). With a single group there is nothing to resample and
    the interval is NaN.
    """
    value = np.asarray(values, dtype=float)
    if value.ndim != 1 or np.isnan(value).any():
        raise ValueError(f"values have shape {value.shape} or NaN; give one number per row")
    weight = np.ones(len(value)) if weights is None else np.asarray(weights, dtype=float)
    if weight.shape != value.shape or not (np.isfinite(weight).all() and (weight > 0).all()):
        raise ValueError(f"weights have shape {weight.shape} or values of 0 and below")
    index = _group_index(groups, len(value))
    totals = np.bincount(index, value * weight)
    sizes = np.bincount(index, weight)
    draws = _draw_groups(len(sizes), n_resamples, seed)
    return _percentiles(totals[draws].sum(axis=1) / sizes[draws].sum(axis=1), len(sizes), level)


def bootstrap_interval_of(
    statistic: Callable[[NDArray[np.intp]], float],
    groups: Sequence[object],
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the interval of any ``statistic(row indices)``, such as a macro AP.

    Draws the same groups as ``bootstrap_interval``; resamples where it is NaN are left out.
    """
    values = np.array([statistic(rows) for rows in bootstrap_rows(groups, n_resamples, seed)])
    n_groups = len(np.unique(np.asarray(groups)))
    return _percentiles(values[~np.isnan(values)], n_groups, level)


def bootstrap_rows(
    groups: Sequence[object], n_resamples: int = 1000, seed: int = 0
) -> Iterator[NDArray[np.intp]]:
    """Yield the row indices of each resample: all rows of as many drawn groups as there are."""
    index = _group_index(groups, len(groups))
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    for draw in _draw_groups(len(members), n_resamples, seed):
        yield np.concatenate([members[group] for group in draw])


def _group_index(groups: Sequence[object], n_rows: int) -> NDArray[np.intp]:
    if len(groups) != n_rows:
        raise ValueError(f"{len(groups)} groups for {n_rows} rows: give each row's recording")
    _require_rows(n_rows)
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _draw_groups(n_groups: int, n_resamples: int, seed: int) -> NDArray[np.intp]:
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; give at least 1")
    return np.random.default_rng(seed).integers(n_groups, size=(n_resamples, n_groups))


def _percentiles(values: FloatArray, n_groups: int, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a share between 0 and 1, such as 0.95")
    if n_groups == 1 or len(values) == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


# --- checks -------------------------------------------------------------------------------------


def _require_rows(n_rows: int) -> None:
    if n_rows == 0:
        raise ValueError("there are no rows to score")


def _require_same_shape(truth: NDArray, other: NDArray, name: str) -> None:
    if truth.shape != other.shape:
        hint = (
            "is one of them transposed?"
            if truth.shape == other.shape[::-1]
            else "do both have the same rows and the same classes?"
        )
        raise ValueError(f"truth has shape {truth.shape} but {name} {other.shape}: {hint}")


def _matrix(name: str, values: ArrayLike) -> NDArray:
    matrix = np.asarray(values)
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {matrix.shape}; it must be (rows, classes)")
    _require_rows(len(matrix))
    return matrix


def _decisions(name: str, values: ArrayLike) -> BoolArray:
    matrix = _matrix(name, values)
    if matrix.dtype == bool:
        return matrix
    if matrix.dtype.kind not in "iuf" or not np.isin(matrix, (0, 1)).all():
        raise ValueError(
            f"{name} ({matrix.dtype}) must be True or False: are these scores that still need a "
            "threshold?"
        )
    return matrix.astype(bool)


def _decided(truth: ArrayLike, predicted: ArrayLike) -> tuple[BoolArray, BoolArray]:
    true, guess = _decisions("truth", truth), _decisions("predicted", predicted)
    _require_same_shape(true, guess, "predicted")
    return true, guess


def _ranked(truth: ArrayLike, scores: ArrayLike) -> tuple[BoolArray, FloatArray]:
    true, score = _decisions("truth", truth), _matrix("scores", scores)
    _require_same_shape(true, score, "scores")
    if score.dtype.kind not in "biuf":
        raise ValueError(f"scores are {score.dtype}; they must be numbers")
    if score.dtype.kind != "f":
        score = score.astype(float)
    if not np.isfinite(score).all():
        row, column = np.argwhere(~np.isfinite(score))[0]
        raise ValueError(
            f"scores has {score[row, column]} in row {row}, class {column}: did a model diverge, "
            "or is its output missing there?"
        )
    return true, score


def _token_sets(name: str, labels: Iterable[str]) -> list[set[str]]:
    if isinstance(labels, str):
        raise ValueError(f"{name} is one string; give a sequence of label strings, one per row")
    sets = []
    for row, text in enumerate(labels):
        if not isinstance(text, str):
            raise ValueError(
                f"row {row} of {name} is {text!r}, not a string: an empty CSV cell? a row without "
                f"birds must say {NOCALL!r}"
            )
        sets.append(set(text.split()))
        if not sets[-1]:
            raise ValueError(f"row {row} of {name} is empty; a row without birds says {NOCALL!r}")
    return sets


def share(part: float, whole: float) -> float:
    """Return ``part / whole``; a share of nothing is undefined, NaN."""
    return float(part / whole) if whole else float("nan")


# --- event metrics ---


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
        options = true[[other == label for other in true_labels]]
        found = guess[[other == label for other in predicted_labels]]
        offset_collars = np.maximum(
            offset_collar_seconds, offset_share * (options[:, 1] - options[:, 0])
        )
        n_matched += _n_matched(_candidates(options, found, onset_collar_seconds, offset_collars))
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
