"""Score predictions: the competition's row-wise F1, ranking, calibration, intervals and events.

Conventions:

- A *row* is one scored segment (or file), a *label string* its species, ``"aldfly norcar"``, or
  ``"nocall"``. In matrices ``(rows, classes)`` an all-False row means nocall; it has no column.
- ``truth`` comes first. ``scores`` rank (higher is likelier), ``predicted`` are decisions.
- An undefined value (the precision of no prediction) is NaN, never 0 or 1.
- Every function is pure and checks its input first: ``ValueError`` names the likely mistake.

LWLRAP is scikit-learn's, the matching of events is scipy's. Average precision and ROC-AUC are ours,
because a bootstrap computes them thousands of times: for 500 rows of 264 classes with ignored cells
they take 13 and 16 ms, with scikit-learn's functions 236 and 432 ms (see docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.stats import rankdata
from sklearn.metrics import label_ranking_average_precision_score

from birdcall.config import NOCALL, SEGMENT_SECONDS

_TIME_TOLERANCE = 1e-6  # seconds; 0.9 - 0.7 is above 0.2 in floating point

# --- the competition's metric -------------------------------------------------------------------


def row_wise_f1(truth: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the competition's score of label strings: the mean over rows of 2TP / (2TP + FP + FN).

    ``nocall`` is a token like any other, so a submission of only nocall scores the share of nocall
    rows. Equals scikit-learn's ``f1_score(average="samples")`` with a further column for nocall.
    """
    if len(truth) != len(predicted):
        hint = "are both of the same rows, in the same order?"
        raise ValueError(f"{len(truth)} rows of truth but {len(predicted)} predicted: {hint}")
    if len(truth) == 0:
        raise ValueError("there are no rows to score")
    pairs = zip(_token_sets("truth", truth), _token_sets("predicted", predicted), strict=True)
    scores = [2 * len(true & guess) / (len(true) + len(guess)) for true, guess in pairs]
    return float(np.mean(scores))


def row_f1_scores(truth: ArrayLike, predicted: ArrayLike) -> NDArray[np.floating]:
    """Return the F1 of each row ``(rows,)`` of boolean matrices ``(rows, classes)``."""
    true = _checked_decisions("truth", truth)
    guess = _checked_decisions("predicted", predicted, true)
    # 16 bits are enough for 65,535 classes and several times faster than numpy's default.
    hits, n_true, n_predicted = (
        np.add.reduce(matrix, axis=1, dtype=np.uint16) for matrix in (true & guess, true, guess)
    )
    both_nocall = (n_true == 0) & (n_predicted == 0)
    n_tokens = np.maximum(n_true, 1) + np.maximum(n_predicted, 1)  # nocall is one token
    return 2 * (hits + both_nocall) / n_tokens


# --- which kind of mistakes ---------------------------------------------------------------------


def precision_recall(truth: ArrayLike, predicted: ArrayLike) -> tuple[float, float]:
    """Return precision and recall, over all rows together.

    Precision is the share of predicted species that are true, NaN if none is predicted; recall is
    the share of true species that are predicted, NaN if none is true.
    """
    true = _checked_decisions("truth", truth)
    guess = _checked_decisions("predicted", predicted, true)
    n_hits = (true & guess).sum()
    return _share(n_hits, guess.sum()), _share(n_hits, true.sum())


def false_birds_per_nocall_row(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Return the number of species predicted per nocall row; NaN if no row is nocall."""
    true = _checked_decisions("truth", truth)
    guess = _checked_decisions("predicted", predicted, true)
    nocall = ~true.any(axis=1)
    return _share(guess[nocall].sum(), nocall.sum())


def count_false_names(truth: NDArray, predicted: NDArray, audio: str) -> dict[str, float]:
    """Return names per hour of rows without a known bird, and how many hours these are."""
    n_rows = int((~truth.any(axis=1)).sum())
    rows_per_hour = 3600 / SEGMENT_SECONDS
    return {
        f"{audio}_false_names_per_hour": false_birds_per_nocall_row(truth, predicted)
        * rows_per_hour,
        f"{audio}_nocall_hours": n_rows / rows_per_hour,
    }


def _share(part: float, whole: float) -> float:
    """Return ``part / whole``; NaN where ``whole`` is 0."""
    return float(part / whole) if whole else float("nan")


# --- ranking, without thresholds ----------------------------------------------------------------


def average_precision(
    truth: ArrayLike, scores: ArrayLike, known: ArrayLike | None = None
) -> NDArray[np.floating]:
    """Return AP = sum of (R_n - R_n-1) P_n over distinct scores, ``(classes,)``.

    Equals scikit-learn's ``average_precision_score``; NaN for a class without a true row. Cells
    that are not ``known (rows, classes)`` are ignored, whatever their truth.
    """
    true, score = _ranking(truth, scores, known)
    order = np.argsort(-score, axis=0)
    true, score = (np.take_along_axis(values, order, axis=0) for values in (true, score))
    ends_tie = np.ones(score.shape, bool)
    np.not_equal(score[1:], score[:-1], out=ends_tie[:-1])
    hits = np.cumsum(true, axis=0)
    # Of each tie the hits so far, and those before it: the hits at the end of the tie above.
    at_end = np.maximum.accumulate(np.where(ends_tie, hits, 0), axis=0)
    before = np.concatenate([np.zeros_like(at_end[:1]), at_end[:-1]])
    precision = hits / np.arange(1, len(hits) + 1)[:, None]
    values = np.sum(np.where(ends_tie, (hits - before) * precision, 0.0), axis=0)
    n_true = true.sum(axis=0)
    return np.where(n_true > 0, values / np.maximum(n_true, 1), np.nan)


def roc_auc(
    truth: ArrayLike, scores: ArrayLike, known: ArrayLike | None = None
) -> NDArray[np.floating]:
    """Return scikit-learn's area under the ROC curve of each class, ``(classes,)``.

    NaN for a class that is true in no row or in all rows. ``known`` as in `average_precision`.
    """
    true, score = _ranking(truth, scores, known)
    n_known = np.full(true.shape[1], len(true)) if known is None else np.sum(known, axis=0)
    n_true = true.sum(axis=0)
    n_false = n_known - n_true
    # Mann and Whitney's statistic; cells that are not known rank below all others.
    ranks = rankdata(score, axis=0) - (len(true) - n_known)
    n_pairs_won = np.sum(ranks, axis=0, where=true) - n_true * (n_true + 1) / 2
    is_defined = (n_true > 0) & (n_false > 0)
    return np.where(is_defined, n_pairs_won / np.maximum(n_true * n_false, 1), np.nan)


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
    high or higher in that row (DCASE 2019 task 2, Fonseca et al.): scikit-learn's
    ``label_ranking_average_precision_score``, each row weighted by its number of labels.
    """
    true, score = _ranking(truth, scores, None)
    n_labels = true.sum(axis=1)
    rows = n_labels > 0
    if not rows.any():
        return float("nan")
    metric = label_ranking_average_precision_score
    return float(metric(true[rows], score[rows], sample_weight=n_labels[rows]))


# --- calibration --------------------------------------------------------------------------------


def reliability(
    truth: ArrayLike, probabilities: ArrayLike, n_bins: int = 15
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.intp]]:
    """Compare probabilities, in ``n_bins`` equal bins of [0, 1], with the share of true cells.

    Returns a reliability diagram: the mean probability, the share of true cells and the number of
    cells of each bin ``(bins,)`` that holds a probability.
    """
    true, probability = _ranking(truth, probabilities, None)
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
    return sum_probability[used] / count[used], sum_true[used] / count[used], count[used]


def expected_calibration_error(
    truth: ArrayLike, probabilities: ArrayLike, n_bins: int = 15
) -> float:
    """Return sum over bins of n_b / n * |share true - mean probability| (Guo et al. 2017).

    Over all cells of ``(rows, classes)``. Most cells are near 0 and easy: the columns of the
    classes that occur, or a single column, show more.
    """
    mean_probability, share_true, count = reliability(truth, probabilities, n_bins)
    return float(np.average(np.abs(share_true - mean_probability), weights=count))


# --- uncertainty --------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A percentile interval."""

    low: float
    high: float


def mean_and_error(sums: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Return a weighted mean over recordings and its standard error.

    sums, weights: ``(recordings,)``, sums over a recording's rows of weighted values, of weights.
    """
    total, n_recordings = weights.sum(), len(weights)
    mean = sums.sum() / total
    spread = np.square(sums - mean * weights).sum() * n_recordings / max(n_recordings - 1, 1)
    return float(mean), float(np.sqrt(spread) / total)


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[object],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    weights: ArrayLike | None = None,
) -> Interval:
    """Return the percentile interval of the mean of ``values (rows,)``, resampling whole groups.

    With ``weights (rows,)`` it is the weighted mean. ``groups`` name each row's recording: its rows
    are not independent, and resampling rows would give a much too narrow interval (cluster
    bootstrap, Davison & Hinkley 1997, 3.8). With a single group the interval is NaN.
    """
    value = np.asarray(values, dtype=float)
    if value.ndim != 1 or np.isnan(value).any():
        raise ValueError(f"values have shape {value.shape} or NaN; give one number per row")
    weight = np.ones(len(value)) if weights is None else np.asarray(weights, dtype=float)
    if weight.shape != value.shape or not (np.isfinite(weight).all() and (weight > 0).all()):
        raise ValueError(f"weights have shape {weight.shape} or values of 0 and below")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; give a share between 0 and 1, such as 0.95")
    if len(groups) != len(value):
        raise ValueError(f"{len(groups)} groups for {len(value)} rows: give each row's recording")
    index, draws = _draw_groups(groups, n_resamples, seed)
    totals = np.bincount(index, value * weight)
    sizes = np.bincount(index, weight)
    if len(sizes) == 1:
        return Interval(float("nan"), float("nan"))
    means = totals[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def bootstrap_rows(
    groups: Sequence[object], n_resamples: int = 1000, seed: int = 0
) -> Iterator[NDArray[np.intp]]:
    """Yield the row indices of each resample: all rows of n groups, drawn with replacement from n.

    The draws are those of `bootstrap_interval`.
    """
    index, draws = _draw_groups(groups, n_resamples, seed)
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    for draw in draws:
        yield np.concatenate([members[group] for group in draw])


def _draw_groups(
    groups: Sequence[object], n_resamples: int, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return each row's group as an index ``(rows,)``, and ``(resamples, groups)`` drawn ones."""
    if len(groups) == 0:
        raise ValueError("there are no rows to score")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; give at least 1")
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    size = (n_resamples, len(names))
    return index, np.random.default_rng(seed).integers(len(names), size=size)


# --- events -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DetectionCounts:
    """Hits and mistakes of detected events; add those of several recordings, then take ``f1``."""

    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0

    def __add__(self, other: DetectionCounts) -> DetectionCounts:
        """Return the sums of both."""
        return DetectionCounts(
            self.true_positives + other.true_positives,
            self.false_positives + other.false_positives,
            self.false_negatives + other.false_negatives,
        )

    @property
    def f1(self) -> float:
        """2TP / (2TP + FP + FN); NaN if there is neither a true nor a predicted event."""
        mistakes = self.false_positives + self.false_negatives
        return _share(2 * self.true_positives, 2 * self.true_positives + mistakes)


def segment_based_counts(
    true_intervals: ArrayLike,
    true_labels: Sequence[str],
    predicted_intervals: ArrayLike,
    predicted_labels: Sequence[str],
    *,
    segment_seconds: float = 1.0,
) -> DetectionCounts:
    """Count (segment, label) pairs: a label is active in every segment that its events touch.

    Intervals are ``(events, 2)``, onset and offset in seconds. Source: Mesaros, Heittola & Virtanen
    2016, "Metrics for polyphonic sound event detection".
    """
    if not segment_seconds > 0:
        raise ValueError(f"segment_seconds is {segment_seconds}; it must be above 0")
    active = []
    for name, intervals, labels in (
        ("true", true_intervals, true_labels),
        ("predicted", predicted_intervals, predicted_labels),
    ):
        pairs = set()
        edges = np.round(_checked_intervals(name, intervals, labels) / segment_seconds, 6)
        for (onset, offset), label in zip(edges, labels, strict=True):
            first = int(np.floor(onset))
            end = max(int(np.ceil(offset)), first + 1)
            pairs.update((segment, label) for segment in range(first, end))
        active.append(pairs)
    true, guess = active
    return DetectionCounts(len(true & guess), len(guess - true), len(true - guess))


def event_based_counts(
    true_intervals: ArrayLike,
    true_labels: Sequence[str],
    predicted_intervals: ArrayLike,
    predicted_labels: Sequence[str],
    *,
    onset_collar_seconds: float = 0.2,
    offset_collar_seconds: float = 0.2,
    offset_share: float = 0.5,
) -> DetectionCounts:
    """Count matched events: same label, onset and offset within their collars, each used once.

    Intervals as in `segment_based_counts`. The offset may differ by the larger of its collar and
    ``offset_share`` of the true event's length; ``offset_collar_seconds=inf`` compares onsets only.
    As many events as possible are matched (as in mir_eval). Source and defaults: as there.
    """
    for name, value in (
        ("onset_collar_seconds", onset_collar_seconds),
        ("offset_collar_seconds", offset_collar_seconds),
        ("offset_share", offset_share),
    ):
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must not be negative")
    true = _checked_intervals("true", true_intervals, true_labels)
    guess = _checked_intervals("predicted", predicted_intervals, predicted_labels)
    n_matched = 0
    for label in set(true_labels) & set(predicted_labels):
        true_events = true[[other == label for other in true_labels]]
        predicted_events = guess[[other == label for other in predicted_labels]]
        lengths = true_events[:, 1] - true_events[:, 0]
        offset_collars = np.maximum(offset_collar_seconds, offset_share * lengths)
        collars = onset_collar_seconds, offset_collars
        n_matched += _count_matches(true_events, predicted_events, *collars)
    return DetectionCounts(n_matched, len(guess) - n_matched, len(true) - n_matched)


def _count_matches(
    true: NDArray, predicted: NDArray, onset_collar: float, offset_collars: NDArray
) -> int:
    """Return the size of the largest one-to-one matching of events within their collars."""
    predicted = predicted[np.argsort(predicted[:, 0])]
    reach = onset_collar + _TIME_TOLERANCE
    # Only neighbours in time are compared: the pairs of a whole day are too many.
    first = np.searchsorted(predicted[:, 0], true[:, 0] - reach, side="left")
    end = np.searchsorted(predicted[:, 0], true[:, 0] + reach, side="right")
    candidates = []
    for i, j, offset, collar in zip(first, end, true[:, 1], offset_collars, strict=True):
        is_near = np.abs(predicted[i:j, 1] - offset) <= collar + _TIME_TOLERANCE
        candidates.append(i + np.flatnonzero(is_near))
    # Below 1.13 scipy matches with indices of 32 bits only.
    columns = np.concatenate(candidates).astype(np.int32)
    row_bounds = np.cumsum([0, *map(len, candidates)], dtype=np.int32)
    is_pair = np.ones(len(columns), dtype=bool)
    pairs = csr_array((is_pair, columns, row_bounds), shape=(len(true), len(predicted)))
    return int((maximum_bipartite_matching(pairs) >= 0).sum())


# --- checks -------------------------------------------------------------------------------------


def _checked_matrix(name: str, values: ArrayLike, truth: NDArray | None = None) -> NDArray:
    """Return ``values (rows, classes)`` as an array; ``truth``, if given, must have its shape."""
    matrix = np.asarray(values)
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {matrix.shape}; it must be (rows, classes)")
    if len(matrix) == 0:
        raise ValueError("there are no rows to score")
    if truth is not None and truth.shape != matrix.shape:
        hint = "do both have the same rows and the same classes?"
        if truth.shape == matrix.shape[::-1]:
            hint = "is one of them transposed?"
        raise ValueError(f"truth has shape {truth.shape} but {name} {matrix.shape}: {hint}")
    return matrix


def _checked_decisions(
    name: str, values: ArrayLike, truth: NDArray | None = None
) -> NDArray[np.bool_]:
    """Return ``values`` as `_checked_matrix` does, boolean."""
    matrix = _checked_matrix(name, values, truth)
    if matrix.dtype == bool:
        return matrix
    if matrix.dtype.kind not in "iuf" or not np.isin(matrix, (0, 1)).all():
        raise ValueError(
            f"{name} ({matrix.dtype}) must be True or False: are these scores that still need a "
            "threshold?"
        )
    return matrix.astype(bool)


def _ranking(
    truth: ArrayLike, scores: ArrayLike, known: ArrayLike | None
) -> tuple[NDArray[np.bool_], NDArray[np.floating]]:
    """Return truth and scores as floats; cells that are not ``known`` are false, and rank last."""
    true = _checked_decisions("truth", truth)
    score = _checked_matrix("scores", scores, true)
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
    if known is None:
        return true, score
    cells = _checked_decisions("known", known, true)
    return true & cells, np.where(cells, score, -np.inf)


def _token_sets(name: str, labels: Sequence[str]) -> list[set[str]]:
    if isinstance(labels, str):
        raise ValueError(f"{name} is one string; give a sequence of label strings, one per row")
    sets = []
    for row, text in enumerate(labels):
        if not isinstance(text, str):
            raise ValueError(
                f"row {row} of {name} is {text!r}, not a string: an empty CSV cell? Write "
                f"{NOCALL!r} in a row without birds"
            )
        sets.append(set(text.split()))
        if not sets[-1]:
            raise ValueError(f"row {row} of {name} is empty; write {NOCALL!r} where no bird is")
    return sets


def _checked_intervals(
    name: str, intervals: ArrayLike, labels: Sequence[str]
) -> NDArray[np.floating]:
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
