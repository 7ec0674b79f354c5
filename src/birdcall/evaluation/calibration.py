"""Calibrate probabilities on simulated segments, and adapt a decision to labelled soundscapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.metrics import Interval, bootstrap_interval, row_f1_scores
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.background import Background
from birdcall.inference.decision import Decision, average_members, combine_members
from birdcall.inference.predictions import Calibration, SegmentPredictions, to_logits

OFFSETS = tuple(round(0.25 * step, 2) for step in range(-24, 25))  # of logits, for a domain
# If logits are normal, the value that one row of an hour exceeds lies above the median by so many
# times the distance from the lower quartile to the median.
_FLOOR_QUARTILES = float(norm.isf(SEGMENT_SECONDS / 3600) / norm.isf(0.25))
_LOG_SCALES = (-3.0, 3.0)
_LONGEST_STEP, _TOLERANCE, _MAX_STEPS = 1.0, 1e-7, 200
_ONE_ERROR = 0.683  # the level of an interval of a standard error on either side


def fit_calibration(
    clipwise: NDArray[np.floating], framewise: NDArray[np.floating], targets: NDArray[np.floating]
) -> Calibration:
    """Fit a scale and an offset per class, of clipwise and of framewise probabilities.

    clipwise, framewise: ``(rows, classes)``, of segments, as decisions take them. targets: the same
    shape; see `fit_scale_and_offset`.
    """
    for name, probabilities in (("clipwise", clipwise), ("framewise", framewise)):
        if probabilities.shape != targets.shape or probabilities.ndim != 2:
            raise ValueError(
                f"{name} has shape {probabilities.shape} and targets {targets.shape}; both must be "
                "(rows, classes)"
            )
    fitted = (*fit_scale_and_offset(clipwise, targets), *fit_scale_and_offset(framewise, targets))
    return Calibration(*(tuple(round(float(v), 6) for v in values) for values in fitted))


def calibrate_by_group(
    predictions: LabelledPredictions, calibrations: Mapping[str, Calibration]
) -> LabelledPredictions:
    """Return predictions of which each group's are calibrated by the calibration of that group.

    A calibration that is tried on the recordings it was fitted on would be adopted too easily.
    """
    clipwise, framewise = np.empty_like(predictions.clipwise), np.empty_like(predictions.framewise)
    groups = predictions.segments["group"].to_numpy().astype(str)
    for name, calibration in calibrations.items():
        is_group = groups == name
        clipwise[:, is_group], framewise[:, is_group] = calibration.apply(
            predictions.clipwise[:, is_group], predictions.framewise[:, is_group]
        )
    return predictions.with_probabilities(clipwise, framewise)


def fit_scale_and_offset(
    probabilities: NDArray[np.floating],
    targets: NDArray[np.floating],
    *,
    log_scale_spread: float = 0.2,
    offset_spread: float = 0.5,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scale and offset ``(classes,)`` of sigmoid(scale * logit(probability) + offset).

    targets: ``(rows, classes)``, 1 and 0; targets below 0 and probabilities of NaN are left
    out. Raises ``ValueError`` where none is left.

    A hierarchical logistic regression (Platt 1999): log scale and offset of a class have a normal
    prior around what all classes share, with these standard deviations, so that a class of three
    rows stays near it. On the demo's held-out recordings its log loss is 0.039, that of
    scikit-learn's LogisticRegression of each class 0.039 (C=1) or 0.049 (no penalty) and of its
    IsotonicRegression 0.052; with 10 recordings per class 0.043, 0.046, 0.061 and 0.064.

    By Fisher scoring: 264 classes of 3,600 rows take 0.3 s of a core. SciPy's L-BFGS-B took 5 to 8
    s, and stopped where offsets were still 0.03 from the optimum.
    """
    known = ~np.isnan(probabilities) & (targets >= 0)
    if not known.any():
        raise ValueError("no row to fit a calibration on")
    z = to_logits(np.where(known, probabilities, 0.5).astype(float))
    y = np.where(known, targets > 0, 0).astype(float)
    precision = np.array([log_scale_spread, offset_spread]) ** -2.0
    shared = np.zeros(2)  # log scale and offset
    values = np.zeros((probabilities.shape[1], 2))  # of each class
    for _ in range(_MAX_STEPS):
        # Fisher scoring: the expected second derivatives, which are never negative.
        scale = np.exp(values[:, 0])
        probability = expit(scale * z + values[:, 1])
        residual = np.where(known, probability - y, 0)
        weight = np.where(known, probability * (1 - probability), 0)
        by_scale, mixed = z * scale, (weight * z).sum(axis=0) * scale
        curvature = np.empty((len(values), 2, 2))
        curvature[:, 0, 0] = (weight * by_scale**2).sum(axis=0) + precision[0]
        curvature[:, 0, 1] = curvature[:, 1, 0] = mixed
        curvature[:, 1, 1] = weight.sum(axis=0) + precision[1]
        gradient = np.stack([(residual * by_scale).sum(axis=0), residual.sum(axis=0)], axis=1)
        gradient += precision * (values - shared)
        # Classes are tied by what they share alone: eliminated, two equations remain.
        inverse = np.linalg.inv(curvature)
        alone = -(inverse @ gradient[:, :, None])[:, :, 0]
        tie = inverse * precision
        system = len(values) * np.eye(2) - tie.sum(axis=0)
        right = (values - shared + alone).sum(axis=0)
        shared_step = np.linalg.solve(system, right)
        # Bounded, since predictions at random have a scale of 0, which leaves no ranking.
        bounded = np.clip(shared[0] + shared_step[0], *_LOG_SCALES) - shared[0]
        if bounded != shared_step[0]:
            shared_step = np.array([bounded, (right[1] - system[1, 0] * bounded) / system[1, 1]])
        step = alone + tie @ shared_step
        # No step is long: far from the optimum the curvature is not that of the way there.
        limit = min(1.0, _LONGEST_STEP / np.abs([*step, shared_step]).max())
        values, shared = values + limit * step, shared + limit * shared_step
        if np.abs(step).max() < _TOLERANCE:
            break
    return np.exp(values[:, 0]), values[:, 1]


# --- labelled soundscapes ---


@dataclass(frozen=True, eq=False)
class LabelledChoice:
    """What labelled soundscapes make of a decision that simulated ones chose.

    decision: chosen on all of them. offset: of the logits, part of its calibration. is_silent:
    whether it names nothing because naming nothing scores as high or higher. gain: of names over
    silence, before this choice, with its interval. by_group: for each soundscape the decision that
    was chosen on the others. predicted: what these predict, ``(labelled rows, known species)``.
    """

    decision: Decision
    offset: float
    is_silent: bool
    gain: float
    interval: Interval
    by_group: Mapping[str, Decision]
    predicted: np.ndarray

    def describe(self) -> str:
        """Return in words what was chosen, and on how many soundscapes."""
        text = f"with {len(self.by_group)} labelled soundscapes"
        changes = ["the background of each class"] if self.decision.background else []
        changes += [f"an offset of {self.offset:+g} logits"] if self.offset else []
        if changes:
            text += f": {' and '.join(changes)}"
        low, high = self.interval
        text += f" (gain over naming no bird {self.gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        return text + (", so it names none)" if self.is_silent else ")")


class _Adaptation(NamedTuple):
    """What is changed in a decision for labelled soundscapes."""

    is_aligned: bool = False  # each class is brought to the background of simulated soundscapes
    offset: float = 0.0  # of all logits
    has_floor: bool = False
    is_silent: bool = False  # nothing is named, whatever the others are


def log_likelihood_by_offset(
    predictions: LabelledPredictions, calibration: Calibration
) -> NDArray[np.float64]:
    """Return how likely the truth of each labelled row is, ``(OFFSETS, labelled rows)``.

    An offset is added to the logits of the members' mean, before a ``calibration`` that was fitted
    elsewhere; the most likely one is the shift of the scores from there to these soundscapes.
    """
    truth = predictions.labelled_truth[:, : len(predictions.classes)]
    result = np.zeros((len(OFFSETS), len(truth)))
    for output in ("clip", "frame"):
        probability = average_members(getattr(predictions, f"{output}wise"))[predictions.labelled]
        z = to_logits(probability)
        scale, offset = (
            np.array(getattr(calibration, f"{output}_{part}"), z.dtype)
            for part in ("scale", "offset")
        )
        sign = np.where(truth, -1, 1).astype(z.dtype)
        for index, shift in enumerate(OFFSETS):
            loss = np.logaddexp(0, sign * (scale * (z + z.dtype.type(shift)) + offset))
            result[index] -= loss.sum(axis=1)
    return result


def find_floor(decision: Decision, unlabelled: SegmentPredictions | None) -> Decision:
    """Return the decision with a floor of each class, from soundscapes without labels.

    Most of their rows have other birds or none. The floor is the probability that one row of an
    hour would exceed if logits were normal, as the lower half of all rows shows, which the class
    hardly moves if it is in few rows. Without soundscapes there is no floor.
    """
    if unlabelled is None:
        return decision
    starts = np.array(unlabelled.starts)
    voters = combine_members(unlabelled.clipwise, unlabelled.framewise, decision, starts).clipwise
    decisive = np.sort(voters, axis=0)[-decision.n_votes(len(voters))].astype(float)
    logits = to_logits(decisive)
    lower, median = np.quantile(logits, [0.25, 0.5], axis=0)
    floor = expit(median + _FLOOR_QUARTILES * (median - lower))
    return replace(decision, floor=tuple(np.round(floor, 6).tolist()))


def choose_on_labelled(
    decision: Decision,
    labelled: LabelledPredictions,
    calibration: Calibration | None = None,
    unlabelled: SegmentPredictions | None = None,
    background: Background | None = None,
) -> LabelledChoice:
    """Adapt a decision to labelled soundscapes, and score it nested by soundscape.

    Each class is brought to a ``background`` (of the soundscapes that ``calibration`` was
    fitted on) if the labels are then more likely, and F1 is not lower. The scores are shifted
    by the most likely offset, if that gains more than a standard error of row-wise F1. The
    floor of ``unlabelled`` soundscapes (`find_floor`) stays unless it loses more than a
    standard error. Then silence is chosen if it scores as high or higher (without labelled
    birds: higher); a gain above its error would need more soundscapes than there are. Of a single
    soundscape, rows are resampled. With no other soundscape to choose on, a soundscape is
    scored by ``decision`` as it is.
    """
    search = _LabelledSearch(
        decision,
        labelled,
        calibration=calibration,
        unlabelled=unlabelled,
        background=background,
    )
    groups = labelled.groups
    predicted = np.zeros_like(labelled.labelled_truth)
    by_group: dict[str, Decision] = {}
    for group in labelled.segments["group"].unique():  # perhaps without a labelled row
        others = groups != group
        chosen = _Adaptation(has_floor=unlabelled is not None)
        if others.any():
            chosen, *_ = search.choose(others)
        by_group[group], of_all, _ = search.predict(chosen)
        predicted[~others] = of_all[~others]
    chosen, gain, interval = search.choose(np.ones(len(predicted), dtype=bool))
    return LabelledChoice(
        decision=search.predict(chosen)[0],
        offset=chosen.offset,
        is_silent=chosen.is_silent,
        gain=gain,
        interval=interval,
        by_group=by_group,
        predicted=predicted,
    )


class _LabelledSearch:
    """The search of `choose_on_labelled`, whose arguments these are, on any of the labelled rows.

    likelihood: of the labels of each row at each of OFFSETS, by whether classes are aligned.
    """

    def __init__(
        self,
        decision: Decision,
        labelled: LabelledPredictions,
        calibration: Calibration | None,
        unlabelled: SegmentPredictions | None,
        background: Background | None,
    ) -> None:
        self.decision = decision
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.background = background
        self.truth, self.groups = labelled.labelled_truth, labelled.groups
        self.likelihood: dict[bool, np.ndarray] = {}
        if calibration is not None:
            self.likelihood[False] = log_likelihood_by_offset(labelled, calibration)
            if background is not None:
                arrays = background.apply(labelled.clipwise, labelled.framewise, labelled.starts)
                aligned = labelled.with_probabilities(*arrays)
                self.likelihood[True] = log_likelihood_by_offset(aligned, calibration)
        self._predicted: dict[_Adaptation, tuple[Decision, np.ndarray, np.ndarray]] = {}

    def predict(self, change: _Adaptation) -> tuple[Decision, np.ndarray, np.ndarray]:
        """Return the adapted decision, what it names ``(rows, classes)`` and the rows' F1."""
        if change not in self._predicted:
            adapted = self._adapt(change)
            predicted = self.labelled.decide(adapted)
            self._predicted[change] = adapted, predicted, row_f1_scores(self.truth, predicted)
        return self._predicted[change]

    def _adapt(self, change: _Adaptation) -> Decision:
        if change.is_silent:
            thresholds = dict.fromkeys(("clip_threshold", "frame_threshold", "file_threshold"), 1.0)
            return replace(self.decision, **thresholds, calibration=None, background=None)
        adapted = self.decision
        if change.is_aligned:
            adapted = replace(adapted, background=self.background)
        if change.offset:
            n_classes = len(self.labelled.classes)
            base = self.decision.calibration or Calibration.identity(n_classes)
            adapted = replace(adapted, calibration=base.shifted(change.offset))
        return find_floor(adapted, self.unlabelled) if change.has_floor else adapted

    def choose(self, rows: np.ndarray) -> tuple[_Adaptation, float, Interval]:
        """Return the adaptation for ``rows``; before silence, its gain over it and the interval."""
        chosen = _Adaptation()
        totals = {key: value[:, rows].sum(axis=1) for key, value in self.likelihood.items()}
        if totals and max(totals, key=lambda key: (totals[key].max(), not key)):
            aligned = chosen._replace(is_aligned=True)
            if self._f1(aligned, rows).mean() >= self._f1(chosen, rows).mean():
                chosen = aligned
        if totals:
            total = totals[chosen.is_aligned]
            # Of equal ones the smallest: where the scores tell nothing, they stay.
            likely = min(np.flatnonzero(total >= total.max() - 1e-9), key=lambda k: abs(OFFSETS[k]))
            shifted = chosen._replace(offset=OFFSETS[likely])
            if self._gain(shifted, chosen, rows, level=_ONE_ERROR).low > 0:
                chosen = shifted
        if self.unlabelled is not None:
            floored = chosen._replace(has_floor=True)
            if not self._gain(floored, chosen, rows, level=_ONE_ERROR).high < 0:
                chosen = floored
        silent = _Adaptation(is_silent=True)
        gain = float((self._f1(chosen, rows) - self._f1(silent, rows)).mean())
        interval = self._gain(chosen, silent, rows)
        # A decision that gains nothing on labelled birds is not expected to elsewhere.
        has_birds = bool(self.truth[rows].any())
        is_better = gain > 0 or (gain == 0 and not has_birds)
        return (chosen if is_better else silent), gain, interval

    def _f1(self, change: _Adaptation, rows: np.ndarray) -> np.ndarray:
        return self.predict(change)[2][rows]

    def _gain(
        self, new: _Adaptation, old: _Adaptation, rows: np.ndarray, *, level: float = 0.95
    ) -> Interval:
        units = self.groups[rows]
        if len(set(units)) == 1:
            units = np.flatnonzero(rows)
        gain = self._f1(new, rows) - self._f1(old, rows)
        return bootstrap_interval(gain, units, level=level)
