"""Search for the decision: forward selection of simple rules, scored by nested cross-validation.

The search begins with the simplest rule (mean of the members, a pair of thresholds) and adopts a
further step only where it is better by more than a standard error. The whole search is repeated
without each group of recordings; the score is of what is then predicted in that group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter, uniform_filter1d

from birdcall.evaluation.calibration import calibrate_by_group
from birdcall.evaluation.metrics import mean_and_error, row_f1_scores
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.decision import Decision, average_members, combine_members
from birdcall.inference.predictions import Calibration

# With a threshold of 1 no species is ever predicted: a search can also result in all-nocall.
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20)) + (1.0,)
_VOTE_SHARES = (0.5, 2 / 3, 1.0)
_NEIGHBOUR_WEIGHTS = (0.25, 0.5, 1.0)
_GATES = (0.3, 0.5, 0.7, 0.9)
_MAX_BIRDS = (2, 5)  # beside the 3 of the simplest rule
_FILE_MAX_BIRDS = (3, 5, 10)
_STEP_COLUMNS = ["step", "alternative", "score", "gain", "standard_error", "adopted"]

_FitCalibration = Callable[[frozenset[str]], Calibration | None]  # of all groups but these


@dataclass(frozen=True, eq=False)
class DecisionSearchResult:
    """The decision that some soundscapes chose, and its score by cross-validation.

    decision: with `members`, `chosen_on` and `score` of the search's start. in_sample_f1: its
    weighted row-wise F1 on the rows of the search, which is never its score. cross_validated: the
    known species predicted in each labelled row by the decision that was searched without the row's
    group, ``(labelled rows, known)``; cross_validated_f1: ``(labelled rows,)``;
    cross_validated_recording_f1: ``(recordings,)``, of whole recordings, as site 3 is scored.
    grid_scores: weighted row-wise F1 of each pair of `THRESHOLDS`, ``(clip, frame)``; grid_index:
    of the chosen pair. calibrated: the predictions, each group's by a calibration that was fitted
    without it. steps: the alternatives of the selection. by_group: the cross-validated decisions.
    """

    decision: Decision
    in_sample_f1: float
    cross_validated: NDArray[np.bool_]
    cross_validated_f1: NDArray[np.floating]
    cross_validated_recording_f1: NDArray[np.floating]
    grid_scores: NDArray[np.floating]
    grid_index: tuple[int, int]
    steps: pd.DataFrame
    calibrated: LabelledPredictions | None
    by_group: Mapping[str, Decision]


def search_decision(
    predictions: LabelledPredictions,
    weights: NDArray[np.floating],
    *,
    start: Decision | None = None,
    fit_calibration: _FitCalibration | None = None,
    max_groups: int = 8,
) -> DecisionSearchResult:
    """Search for the rule with the best flat optimum of weighted row-wise F1, and cross-validate.

    weights: ``(labelled rows,)``. ``fit_calibration`` fits a calibration without the recordings of
    some groups. More than ``max_groups`` groups are merged. Raises ``ValueError`` for weights that
    are no weights, and where there is a single group: nothing would be held out.
    """
    groups = predictions.segments["group"].to_numpy()[predictions.starts].astype(str)
    names = sorted(set(groups))
    if len(names) < 2:
        raise ValueError(
            "all soundscapes are of one group: a decision searched on them could not be scored"
        )
    n_merged = min(max_groups, len(names))
    merged = [tuple(names[first::n_merged]) for first in range(n_merged)]
    fit = fit_calibration or (lambda excluded: None)
    calibrations = {group: fit(frozenset(group)) for group in merged}
    calibrated = None
    if None not in calibrations.values():
        by_name = {name: calibrations[group] for group in merged for name in group}
        calibrated = calibrate_by_group(predictions, by_name)
    search = _ForwardSelection(predictions, weights, start or Decision(), calibrated)
    final = search.run(np.ones(len(groups), dtype=bool), fit(frozenset()))
    predicted = np.zeros_like(predictions.labelled_truth)
    recording_f1 = np.zeros(len(groups))
    by_group: dict[str, Decision] = {}
    for group in merged:
        held_out = np.isin(groups, group)
        decision = search.run(~held_out, calibrations[group]).decision
        segments = held_out[search.recording_of_segment]
        subset = predictions.select(segments)
        predicted[segments[predictions.labelled]] = subset.decide(decision)
        recording_f1[held_out] = subset.recording_f1(decision)[0]
        by_group |= dict.fromkeys(group, decision)
    return DecisionSearchResult(
        decision=final.decision,
        in_sample_f1=float(final.best.grid_scores[final.best.grid_index]),
        cross_validated=predicted,
        cross_validated_f1=row_f1_scores(predictions.labelled_truth, predicted),
        cross_validated_recording_f1=recording_f1,
        grid_scores=final.best.grid_scores,
        grid_index=final.best.grid_index,
        steps=final.steps,
        calibrated=calibrated,
        by_group=by_group,
    )


# --- forward selection ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _RuleScore:
    """The flat optimum of a rule over both thresholds.

    score: mean of the neighbourhood of the optimum; by_recording: the same, before it is divided by
    the sum of the weights, ``(recordings,)``.
    """

    rule: Decision
    grid_scores: NDArray[np.floating]
    grid_index: tuple[int, int]
    score: float
    by_recording: NDArray[np.floating]


class _Selection(NamedTuple):
    decision: Decision
    best: _RuleScore
    steps: pd.DataFrame


class _ForwardSelection:
    """Forward selection of rules on subsets of the recordings.

    Scores of a rule are computed once, by recording, and used for all subsets. ``calibrated``: the
    predictions as `calibrate_by_group` returns them, with which calibration is scored.
    """

    def __init__(
        self,
        predictions: LabelledPredictions,
        weights: NDArray[np.floating],
        start: Decision,
        calibrated: LabelledPredictions | None,
    ) -> None:
        weights = np.asarray(weights, dtype=float)
        n_rows = int(predictions.labelled.sum())
        if weights.shape != (n_rows,):
            raise ValueError(f"weights have shape {weights.shape}; want ({n_rows},), one of a row")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError("weights must be numbers of 0 or more, and not all 0")
        self.predictions, self.calibrated = predictions, calibrated
        self.weights, self.start = weights, start
        lengths = np.diff([*predictions.starts, len(predictions.segments)])
        self.recording_of_segment = np.repeat(np.arange(len(lengths)), lengths)
        self.recording_of_row = self.recording_of_segment[predictions.labelled]
        self.recording_weights = np.bincount(
            self.recording_of_row, weights, minlength=len(predictions.starts)
        )
        self._sums: dict[tuple[object, ...], NDArray[np.floating]] = {}
        self._combined: dict[tuple[str, bool], LabelledPredictions] = {}

    def run(self, recordings: NDArray[np.bool_], calibration: Calibration | None) -> _Selection:
        """Select a rule on a subset of the recordings ``(recordings,)``."""
        simplest = replace(
            self.start, combination="mean", recording_threshold=0.0, neighbour_weight=0.0,
            max_birds=3, calibration=None,
        )  # fmt: skip
        weights = self.recording_weights[recordings]
        best = self._score_rule(simplest, recordings)
        steps = [("begin", "mean of the members", best.score, 0.0, 0.0, True)]
        for step, alternatives in self._alternatives(calibration).items():
            base = best
            scored = {
                text: self._score_rule(replace(base.rule, **changes), recordings)
                for text, changes in alternatives.items()
            }
            highest = max(scored.values(), key=lambda item: item.score, default=base)
            for text, candidate in scored.items():
                difference = (candidate.by_recording - base.by_recording)[recordings]
                gain, error = mean_and_error(difference, weights)
                is_adopted = candidate is highest and gain > error
                steps.append((step, text, candidate.score, gain, error, is_adopted))
                if is_adopted:
                    best = candidate
        clip, frame = best.grid_index
        rule = replace(
            best.rule, clip_threshold=THRESHOLDS[clip], frame_threshold=THRESHOLDS[frame]
        )
        decision = self._search_file_thresholds(rule, recordings)
        return _Selection(decision, best, pd.DataFrame(steps, columns=_STEP_COLUMNS))

    def _alternatives(
        self, calibration: Calibration | None
    ) -> dict[str, dict[str, dict[str, object]]]:
        """Return for each step, by name, what its alternatives change in the best rule so far."""
        n_members = len(self.predictions.member_names)
        combinations: dict[str, dict[str, object]] = {}
        if n_members > 1:
            combinations |= {name: {"combination": name} for name in ("rms", "geometric")}
        if n_members > 2:  # votes of two members are the higher or the lower of their scores
            by_votes = {
                Decision(combination="votes", vote_share=s).n_votes(n_members): s
                for s in _VOTE_SHARES
            }
            for share in by_votes.values():
                text = f"votes of {share:.0%}"
                combinations[text] = {"combination": "votes", "vote_share": share}
        neighbours = {
            f"neighbours weigh {w:g}": {"neighbour_weight": w} for w in _NEIGHBOUR_WEIGHTS
        }
        gates = {f"{g:g} anywhere in the recording": {"recording_threshold": g} for g in _GATES}
        return {
            "combination": combinations,
            "neighbours": neighbours,
            "gate": gates,
            "calibration": {"calibrated": {"calibration": calibration}} if calibration else {},
            "max_birds": {f"at most {n} birds": {"max_birds": n} for n in _MAX_BIRDS},
        }

    def _score_rule(self, rule: Decision, recordings: NDArray[np.bool_]) -> _RuleScore:
        """Score a rule; weighted F1 ``(clip, frame, recordings)`` of all pairs is stored by key."""
        key = (
            rule.combination, rule.vote_share if rule.combination == "votes" else None,
            rule.neighbour_weight, rule.recording_threshold, rule.max_birds,
            rule.calibration is not None,
        )  # fmt: skip
        if key not in self._sums:
            by_pair = [
                np.bincount(self.recording_of_row, self.weights * f1, minlength=len(recordings))
                for f1 in score_threshold_pairs(*self._combine(rule))
            ]
            self._sums[key] = np.array(by_pair).reshape(len(THRESHOLDS), len(THRESHOLDS), -1)
        sums = self._sums[key]
        grid = sums[:, :, recordings].sum(axis=2) / self.recording_weights[recordings].sum()
        index, score = find_flat_optimum(grid)
        near = [np.clip([i - 1, i, i + 1], 0, len(THRESHOLDS) - 1) for i in index]
        by_recording = sums[np.ix_(*near)].mean(axis=(0, 1))
        return _RuleScore(rule, grid, index, score=score, by_recording=by_recording)

    def _combine(self, rule: Decision) -> tuple[LabelledPredictions, Decision]:
        """Return equivalent predictions and rule, already calibrated and averaged."""
        is_calibrated = rule.calibration is not None
        predictions = self.calibrated if is_calibrated else self.predictions
        rule = replace(rule, calibration=None)
        if rule.combination == "votes":
            return predictions, rule
        key = rule.combination, is_calibrated
        if key not in self._combined:
            self._combined[key] = predictions.with_probabilities(
                average_members(predictions.clipwise, rule.combination)[None],
                average_members(predictions.framewise, rule.combination)[None],
                [rule.combination],
            )
        return self._combined[key], replace(rule, combination="mean")

    def _search_file_thresholds(self, rule: Decision, recordings: NDArray[np.bool_]) -> Decision:
        """Choose the thresholds of whole recordings, which site 3 scores as one row each."""
        predictions, combined_rule = self._combine(rule)
        subset = predictions.select(recordings[self.recording_of_segment])
        rules = [
            replace(combined_rule, file_threshold=threshold, file_max_birds=n_birds)
            for n_birds in _FILE_MAX_BIRDS
            for threshold in THRESHOLDS
        ]
        grid = subset.recording_f1(*rules).mean(axis=1).reshape(len(_FILE_MAX_BIRDS), -1)
        flat = uniform_filter1d(grid, size=3, axis=1, mode="nearest").round(9)
        # Of equal scores the fewest birds and the highest threshold.
        birds, threshold = max(
            map(tuple, np.argwhere(flat == flat.max())), key=lambda pair: (-pair[0], pair[1])
        )
        return replace(
            rule, file_threshold=THRESHOLDS[threshold], file_max_birds=_FILE_MAX_BIRDS[birds]
        )


def find_flat_optimum(grid: NDArray[np.floating]) -> tuple[tuple[int, int], float]:
    """Return the best pair of a grid ``(clip, frame)``, averaged over neighbours, and its mean.

    A narrow peak is chance, so each pair has the mean of itself and its eight neighbours.
    Of equal means the highest thresholds, since a false species on an empty row costs most.
    """
    flat = uniform_filter(grid, size=3, mode="nearest")
    rounded = flat.round(9)
    best = np.argwhere(rounded == rounded.max())
    clip, frame = max(map(tuple, best), key=lambda index: (sum(index), index))
    return (int(clip), int(frame)), float(flat[clip, frame])


def score_threshold_pairs(
    predictions: LabelledPredictions, rule: Decision
) -> Iterator[NDArray[np.floating]]:
    """Yield the F1 of the labelled rows ``(rows,)`` for each pair of `THRESHOLDS`, clip first.

    All else is as in ``rule``. Equals `LabelledPredictions.row_f1` of each pair, and is faster:
    only cells (a row and a class) that reach the thresholds so far are compared again.
    """
    labelled, starts = predictions.labelled, predictions.starts
    voters = combine_members(predictions.clipwise, predictions.framewise, rule, starts)
    lowest = replace(rule, clip_threshold=THRESHOLDS[0]).clip_thresholds(voters.clipwise.dtype)
    reached = (voters.clipwise >= lowest) & (voters.framewise >= THRESHOLDS[0])
    if rule.recording_threshold > 0:
        reached &= voters.passes_gate(rule.recording_threshold)
    n_votes = rule.n_votes(len(reached))
    agreed = (reached.sum(axis=0) >= n_votes) & labelled[:, None]
    segment, column = np.nonzero(agreed)
    # Sorted by row, and within a row from the strongest down.
    order = np.lexsort((column, -voters.strength[segment, column], segment))
    segment, column = segment[order], column[order]
    row = (np.cumsum(labelled) - 1)[segment]
    is_true = predictions.truth[segment, column]
    # ``(voters, cells)``, -1 where a voter is below a threshold.
    is_counted = reached[:, segment, column]
    clipwise = np.where(is_counted, voters.clipwise[:, segment, column], -1)
    framewise = np.where(is_counted, voters.framewise[:, segment, column], -1)
    n_true = predictions.labelled_truth.sum(axis=1)
    for clip_threshold in THRESHOLDS:
        reached = clipwise >= clip_threshold
        agreed = reached.sum(axis=0) >= n_votes
        row, is_true, clipwise = row[agreed], is_true[agreed], clipwise[:, agreed]
        framewise = np.where(reached, framewise, -1)[:, agreed]
        for frame_threshold in THRESHOLDS:
            agreed = (framewise >= frame_threshold).sum(axis=0) >= n_votes
            predicted_row, is_hit = row[agreed], is_true[agreed]
            # A cell is one too many where the cell max_birds before it is of the same row.
            is_within = np.ones(len(predicted_row), dtype=bool)
            is_within[rule.max_birds :] = (
                predicted_row[rule.max_birds :] != predicted_row[: -rule.max_birds]
            )
            n_predicted = np.bincount(predicted_row[is_within], minlength=len(n_true))
            hits = np.bincount(predicted_row[is_within & is_hit], minlength=len(n_true))
            both_nocall = (n_true == 0) & (n_predicted == 0)
            total = np.maximum(n_true, 1) + np.maximum(n_predicted, 1)
            yield 2 * (hits + both_nocall) / total
