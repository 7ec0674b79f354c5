"""Choose the decision: forward selection of simple, flat rules, nested so that the score is honest.

The search begins with the simplest rule (mean of the members, one pair of thresholds) and adopts a
further step only where it is better by more than a standard error. The whole search is repeated
without each group of recordings, and the score is what is then named in that group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter, uniform_filter1d

from birdcall.evaluation.metrics import row_f1_scores
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.decision import (
    Calibration,
    Decision,
    average_members,
    combine_members,
    passes_gate,
)

logger = logging.getLogger(__name__)

# At 1.0 no bird is ever named, so that choosing can also come out at all-nocall.
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20)) + (1.0,)
VOTE_SHARES = (0.5, 2 / 3, 1.0)
NEIGHBOUR_WEIGHTS = (0.25, 0.5)
GATES = (0.3, 0.5, 0.7, 0.9)
MAX_BIRDS = (2, 5)  # beside the 3 that the search begins with
FILE_MAX_BIRDS = (3, 5, 10)
SIMPLEST = Decision()

FitCalibration = Callable[[frozenset[str]], Calibration | None]  # groups to leave out


@dataclass(frozen=True, eq=False)
class DecisionSearchResult:
    """The decision chosen on some soundscapes, and what it is worth on others.

    decision: with `members`, `chosen_on` and `score` of the search's start. in_sample_f1: its
    weighted row-wise F1 on the rows of the search, which is never its score. cross_validated: the
    known species predicted in each labelled row by the decision that was searched without the row's
    group, ``(labelled rows, known)``; cross_validated_f1: ``(labelled rows,)``;
    cross_validated_recording_f1: ``(recordings,)``, of whole recordings, as site 3 is scored.
    grid_scores: weighted row-wise F1 of each pair of `THRESHOLDS`, ``(clip, frame)``; grid_index:
    of the chosen pair. steps: the alternatives of the forward selection, a row each, with step,
    alternative, score, gain, standard_error, adopted. by_group: the cross-validated decisions.
    """

    decision: Decision
    in_sample_f1: float
    cross_validated: NDArray[np.bool_]
    cross_validated_f1: NDArray[np.floating]
    cross_validated_recording_f1: NDArray[np.floating]
    grid_scores: NDArray[np.floating]
    grid_index: tuple[int, int]
    steps: pd.DataFrame
    by_group: Mapping[str, Decision]


def search_decision(
    scores: LabelledPredictions,
    weights: NDArray[np.floating],
    *,
    start: Decision = SIMPLEST,
    fit_calibration: FitCalibration | None = None,
    max_groups: int = 8,
) -> DecisionSearchResult:
    """Choose the rule with the best flat optimum of weighted row-wise F1, and score it nested.

    weights ``(labelled rows,)``. ``fit_calibration`` fits one without the out-of-fold recordings of
    some groups. More than ``max_groups`` groups are merged. Raises ``ValueError`` where there is a
    single group: nothing would be held out.
    """
    groups = _merge_groups(scores, max_groups)
    if len(groups) < 2:
        raise ValueError(
            "all soundscapes are of one group: a decision chosen on them could be scored nowhere"
        )
    fit = fit_calibration or (lambda groups: None)
    calibrations = {names: fit(frozenset(names)) for names in groups}
    calibrated = _calibrate_by_group(scores, groups, calibrations)
    search = _Search(scores, np.asarray(weights, dtype=float), start, calibrated)
    found = search.run(np.ones(len(scores.starts), dtype=bool), fit(frozenset()))
    n_known = scores.truth.shape[1]
    nested = np.zeros((int(scores.labelled.sum()), n_known), dtype=bool)
    recording_f1 = np.zeros(len(scores.starts))
    by_group: dict[str, Decision] = {}
    for originals, held_out in groups.items():
        own = search.run(~held_out, calibrations[originals]).decision
        segments = search.segments_of(held_out)
        part = scores.select(segments)
        nested[segments[scores.labelled]] = part.decide(own)
        recording_f1[held_out] = part.recording_f1(own)
        by_group |= dict.fromkeys(originals, own)
    return DecisionSearchResult(
        decision=found.decision,
        in_sample_f1=found.tuned,
        cross_validated=nested,
        cross_validated_f1=row_f1_scores(scores.labelled_truth, nested),
        cross_validated_recording_f1=recording_f1,
        grid_scores=found.grid,
        grid_index=found.place,
        steps=found.steps,
        by_group=by_group,
    )


def _merge_groups(
    scores: LabelledPredictions, max_groups: int
) -> dict[tuple[str, ...], NDArray[np.bool_]]:
    """Return the names of the groups merged into one, and the mask of their recordings."""
    of_recording = scores.segments["group"].to_numpy()[scores.starts].astype(str)
    names = sorted(set(of_recording))
    n_merged = min(max_groups, len(names))
    merged = [tuple(names[place::n_merged]) for place in range(n_merged)]
    return {parts: np.isin(of_recording, parts) for parts in merged}


def _calibrate_by_group(
    scores: LabelledPredictions,
    groups: Mapping[tuple[str, ...], NDArray[np.bool_]],
    calibrations: Mapping[tuple[str, ...], Calibration | None],
) -> LabelledPredictions | None:
    """Return scores of which each group's are calibrated without its own recordings.

    A calibration that has seen the recordings which it is tried on would be adopted too easily.
    """
    if any(calibration is None for calibration in calibrations.values()):
        return None
    lengths = np.diff([*scores.starts, len(scores.segments)])
    clipwise, framewise = np.empty_like(scores.clipwise), np.empty_like(scores.framewise)
    for names, recordings in groups.items():
        own = np.repeat(recordings, lengths)
        clipwise[:, own], framewise[:, own] = calibrations[names].apply(
            scores.clipwise[:, own], scores.framewise[:, own]
        )
    return scores.with_probabilities(clipwise, framewise)


# --- the search ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Found:
    decision: Decision
    tuned: float
    grid: NDArray[np.floating]
    place: tuple[int, int]
    steps: pd.DataFrame


@dataclass(frozen=True, eq=False)
class _Optimum:
    """The flat-best thresholds of a rule: ``sums`` are the neighbourhood's, per recording."""

    rule: Decision
    grid: NDArray[np.floating]
    place: tuple[int, int]
    score: float
    sums: NDArray[np.floating]


class _Search:
    """Forward selection over rules; keeps each rule's F1 per recording and pair of thresholds."""

    def __init__(
        self,
        scores: LabelledPredictions,
        weights: NDArray[np.floating],
        start: Decision,
        calibrated: LabelledPredictions | None = None,
    ) -> None:
        n_rows = int(scores.labelled.sum())
        if weights.shape != (n_rows,):
            raise ValueError(f"weights have shape {weights.shape}; want one of {n_rows} rows each")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError("weights must be numbers of 0 or more, and not all 0")
        self.scores, self.weights, self.start = scores, weights, start
        self.calibrated = calibrated
        lengths = np.diff([*scores.starts, len(scores.segments)])
        self.recording_of_segment = np.repeat(np.arange(len(lengths)), lengths)
        self.recording_of_row = self.recording_of_segment[scores.labelled]
        self.recording_weights = self._by_recording(weights)
        self.n_true = scores.labelled_truth.sum(axis=1)
        self.kept: dict[tuple[object, ...], NDArray[np.floating]] = {}
        self.combined: dict[tuple[str, bool], LabelledPredictions] = {}

    def run(self, chosen: NDArray[np.bool_], calibration: Calibration | None) -> _Found:
        """Choose on some recordings ``(recordings,)``."""
        simplest = replace(
            self.start, combination="mean", recording_threshold=0.0, neighbour_weight=0.0,
            max_birds=3, calibration=None,
        )  # fmt: skip
        best = self._optimum(simplest, chosen)
        steps = [_step("begin", simplest, score=best.score, gain=0.0, error=0.0, adopted=True)]
        for name, alternatives in self._steps(calibration):
            tried = [
                self._optimum(replace(best.rule, **changes), chosen) for changes in alternatives
            ]
            challenger = max(tried, key=lambda one: one.score, default=best)
            base = best
            for one in tried:
                gain, error = self._gain(one, base, chosen)
                adopted = one is challenger and gain > error
                steps.append(
                    _step(name, one.rule, score=one.score, gain=gain, error=error, adopted=adopted)
                )
                best = one if adopted else best
        clip, frame = best.place
        rule = replace(
            best.rule, clip_threshold=THRESHOLDS[clip], frame_threshold=THRESHOLDS[frame]
        )
        decision = self._choose_for_recordings(rule, chosen)
        return _Found(
            decision=decision,
            tuned=float(best.grid[best.place]),
            grid=best.grid,
            place=best.place,
            steps=pd.DataFrame(steps),
        )

    def segments_of(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the mask of all segments of some recordings."""
        return chosen[self.recording_of_segment]

    def _steps(
        self, calibration: Calibration | None
    ) -> Iterator[tuple[str, list[dict[str, object]]]]:
        """Yield each step's alternatives: what they change in the rule found so far."""
        n_members = len(self.scores.member_names)
        combinations: list[dict[str, object]] = []
        if n_members > 1:
            combinations.append({"combination": "rms"})
        if n_members > 2:  # of two, votes are nothing but the higher or the lower score
            by_votes = {
                replace(self.start, vote_share=share).n_votes(n_members): share
                for share in VOTE_SHARES
            }
            combinations += [
                {"combination": "votes", "vote_share": share} for share in by_votes.values()
            ]
        yield "combination", combinations
        yield "neighbours", [{"neighbour_weight": weight} for weight in NEIGHBOUR_WEIGHTS]
        yield "gate", [{"recording_threshold": threshold} for threshold in GATES]
        yield "calibration", [] if calibration is None else [{"calibration": calibration}]
        yield "max_birds", [{"max_birds": n_birds} for n_birds in MAX_BIRDS]

    def _optimum(self, rule: Decision, chosen: NDArray[np.bool_]) -> _Optimum:
        sums = self._sums(rule)
        total = self.recording_weights[chosen].sum()
        grid = sums[:, :, chosen].sum(axis=2) / total
        flat = average_neighbours(grid)
        place = flattest(flat)
        near = [np.clip([p - 1, p, p + 1], 0, len(THRESHOLDS) - 1) for p in place]
        around = sums[np.ix_(*near)].mean(axis=(0, 1))
        return _Optimum(rule=rule, grid=grid, place=place, score=float(flat[place]), sums=around)

    def _gain(
        self, one: _Optimum, other: _Optimum, chosen: NDArray[np.bool_]
    ) -> tuple[float, float]:
        """Return by how much one is better and the standard error of that, over recordings."""
        weights = self.recording_weights[chosen]
        difference = (one.sums - other.sums)[chosen]
        gain = difference.sum() / weights.sum()
        residual = difference - gain * weights
        n_recordings = len(weights)
        spread = np.square(residual).sum() * n_recordings / max(n_recordings - 1, 1)
        return float(gain), float(np.sqrt(spread) / weights.sum())

    def _sums(self, rule: Decision) -> NDArray[np.floating]:
        """Return weighted F1 summed by recording, ``(clip, frame, recordings)``, of all pairs."""
        key = (
            rule.combination, rule.vote_share if rule.combination == "votes" else None,
            rule.neighbour_weight, rule.recording_threshold, rule.max_birds,
            rule.calibration is not None,
        )  # fmt: skip
        if key not in self.kept:
            self.kept[key] = np.array(
                [self._by_recording(self.weights * f1) for f1 in self._f1_of_pairs(rule)]
            ).reshape(len(THRESHOLDS), len(THRESHOLDS), -1)
        return self.kept[key]

    def _f1_of_pairs(self, rule: Decision) -> Iterator[NDArray[np.floating]]:
        """Yield the F1 of the labelled rows for each pair of thresholds; see `decide`."""
        cells = _find_cells(*self._combined(rule))
        n_rows = len(self.n_true)
        floor = np.maximum(self.n_true, 1)
        for clip in THRESHOLDS:
            cells = cells.reaching(clip)
            for frame in THRESHOLDS:
                row, is_true = cells.name_birds(frame, rule.max_birds)
                n_named = np.bincount(row, minlength=n_rows)
                hits = np.bincount(row[is_true], minlength=n_rows)
                both_nocall = (self.n_true == 0) & (n_named == 0)
                yield 2 * (hits + both_nocall) / (floor + np.maximum(n_named, 1))

    def _combined(self, rule: Decision) -> tuple[LabelledPredictions, Decision]:
        """Return scores and rule that say the same, calibrated and averaged already."""
        is_calibrated = rule.calibration is not None
        scores = self.calibrated if is_calibrated else self.scores
        rule = replace(rule, calibration=None)
        if rule.combination == "votes":
            return scores, rule
        key = rule.combination, is_calibrated
        if key not in self.combined:
            self.combined[key] = scores.with_probabilities(
                average_members(scores.clipwise, rule.combination)[None],
                average_members(scores.framewise, rule.combination)[None],
                [rule.combination],
            )
        return self.combined[key], replace(rule, combination="mean")

    def _by_recording(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.bincount(self.recording_of_row, values, minlength=len(self.scores.starts))

    def _choose_for_recordings(self, rule: Decision, chosen: NDArray[np.bool_]) -> Decision:
        """Choose what a whole recording needs, as site 3 is scored: each is one row."""
        scores, combined_rule = self._combined(rule)
        part = scores.select(self.segments_of(chosen))
        rules = [
            replace(combined_rule, file_threshold=threshold, file_max_birds=n_birds)
            for n_birds in FILE_MAX_BIRDS
            for threshold in THRESHOLDS
        ]
        grid = part.recording_f1_of(rules).mean(axis=1).reshape(len(FILE_MAX_BIRDS), -1)
        flat = uniform_filter1d(grid, size=3, axis=1, mode="nearest").round(9)
        # Of equals the fewest birds and the highest threshold.
        birds, threshold = max(
            map(tuple, np.argwhere(flat == flat.max())), key=lambda at: (-at[0], at[1])
        )
        return replace(
            rule,
            file_threshold=THRESHOLDS[threshold],
            file_max_birds=FILE_MAX_BIRDS[birds],
        )


def average_neighbours(grid: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the mean of each pair and its eight neighbours: a peak with steep sides is luck."""
    return uniform_filter(grid, size=3, mode="nearest")


def flattest(flat: NDArray[np.floating]) -> tuple[int, int]:
    """Return the place of the best pair in a grid of means over neighbours ``(clip, frame)``.

    Of equals the highest thresholds, since a false bird on an empty row costs most.
    """
    rounded = flat.round(9)
    places = np.argwhere(rounded == rounded.max())
    clip, frame = max(map(tuple, places), key=lambda place: (sum(place), place))
    return int(clip), int(frame)


# --- the cells that thresholds decide on ----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Cells:
    """Pairs of a labelled row and a class that reach the thresholds so far: few of all there are.

    row, is_true: ``(cells,)``, sorted by row, and in a row from the strongest down. clipwise,
    framewise: ``(voters, cells)``; below 0 where a voter does not count. n_votes: that must agree.
    """

    row: NDArray[np.intp]
    is_true: NDArray[np.bool_]
    clipwise: NDArray[np.floating]
    framewise: NDArray[np.floating]
    n_votes: int

    def reaching(self, clip_threshold: float) -> _Cells:
        """Return the cells that reach it; voters below it count no more."""
        reached = self.clipwise >= clip_threshold
        kept = reached.sum(axis=0) >= self.n_votes
        framewise = np.where(reached, self.framewise, -1)[:, kept]
        clipwise = self.clipwise[:, kept]
        return _Cells(
            row=self.row[kept],
            is_true=self.is_true[kept],
            clipwise=clipwise,
            framewise=framewise,
            n_votes=self.n_votes,
        )

    def name_birds(
        self, frame_threshold: float, max_birds: int
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return the row of each bird that is named, and whether it is there."""
        reached = (self.framewise >= frame_threshold).sum(axis=0) >= self.n_votes
        row, is_true = self.row[reached], self.is_true[reached]
        if len(row) <= max_birds:
            return row, is_true
        # The place in its row: a cell is beyond the last one allowed where the one so many before
        # it is of the same row.
        beyond = np.zeros(len(row), dtype=bool)
        beyond[max_birds:] = row[max_birds:] == row[:-max_birds]
        return row[~beyond], is_true[~beyond]


def _find_cells(scores: LabelledPredictions, rule: Decision) -> _Cells:
    labelled = scores.labelled
    voters = combine_members(scores.clipwise, scores.framewise, rule, scores.starts)
    lowest = THRESHOLDS[0]
    reached = (voters.clipwise >= lowest) & (voters.framewise >= lowest)
    if rule.recording_threshold > 0:
        reached &= passes_gate(voters, rule.recording_threshold)
    n_votes = rule.n_votes(len(reached)) if rule.combination == "votes" else 1
    kept = (reached.sum(axis=0) >= n_votes) & labelled[:, None]
    segment, column = np.nonzero(kept)
    order = np.lexsort((column, -voters.strength[segment, column], segment))
    segment, column = segment[order], column[order]
    row_of_segment = np.cumsum(labelled) - 1
    counted = reached[:, segment, column]
    return _Cells(
        row=row_of_segment[segment],
        is_true=scores.truth[segment, column],
        clipwise=np.where(counted, voters.clipwise[:, segment, column], -1),
        framewise=np.where(counted, voters.framewise[:, segment, column], -1),
        n_votes=n_votes,
    )


def _step(
    name: str, rule: Decision, score: float, gain: float, error: float, *, adopted: bool
) -> dict[str, object]:
    return {
        "step": name,
        "alternative": _describe(name, rule),
        "score": score,
        "gain": gain,
        "standard_error": error,
        "adopted": adopted,
    }


def _describe(step: str, rule: Decision) -> str:
    if step == "combination":
        votes = f" of {rule.vote_share:.0%}" if rule.combination == "votes" else ""
        return f"{rule.combination}{votes}"
    if step == "neighbours":
        return f"neighbours weigh {rule.neighbour_weight:g}"
    if step == "gate":
        return f"{rule.recording_threshold:g} anywhere in the recording"
    if step == "calibration":
        return "calibrated"
    return "mean of the members" if step == "begin" else f"at most {rule.max_birds} birds"
