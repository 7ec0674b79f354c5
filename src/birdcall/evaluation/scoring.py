"""Score runs on three kinds of sound that they were not trained on, and choose the decision."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from birdcall.config import NOCALL, require
from birdcall.data.targets import make_targets
from birdcall.evaluation.calibration import fit_calibration
from birdcall.evaluation.decision_search import DecisionSearchResult, search_decision
from birdcall.evaluation.labelled import Labelled
from birdcall.evaluation.metrics import Interval, bootstrap_interval, row_wise_f1
from birdcall.evaluation.out_of_fold import OutOfFoldPredictions
from birdcall.evaluation.predict import HeldOutPredictions
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.tables import (
    ENSEMBLE,
    LABELLED,
    PRIOR,
    SIMULATED,
    Rows,
    decided_rows,
    event_rows,
    out_of_fold_rows,
    per_class_table,
    ranked_rows,
    share_weights,
    simulated_at,
    tidy_table,
)
from birdcall.inference.decision import Calibration, Decision
from birdcall.inference.tables import read_submission
from birdcall.kaggle.test_set import read_solution, read_test_rows

logger = logging.getLogger(__name__)


# Public rows of the competition without a bird, as probed with an all-nocall file; on the private
# side there were about as many (5th place).
NOCALL_SHARE = 0.54


@dataclass(frozen=True, eq=False)
class EnsembleDecision:
    """By which rule some experiments are used together, and what that is worth.

    choice is None where nothing was simulated for them, or all of it in one group: then the
    decision is the one that a search begins with. weights: of the simulated rows.
    """

    name: str
    experiments: tuple[str, ...]
    decision: Decision
    choice: DecisionSearchResult | None
    simulated: LabelledPredictions | None
    weights: np.ndarray | None
    calibration: Calibration | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All that `birdcall evaluate` found.

    table: a row per name (experiments, ensembles, all nocall, prior), kind of sound and metric.
    per_class: a row per class, with scores of the ensemble. targets: ``(recordings, classes)`` of
    the data, secondary labels UNKNOWN. judgement: of all experiments together.
    """

    heard: HeldOutPredictions
    table: pd.DataFrame
    per_class: pd.DataFrame
    targets: np.ndarray
    ensemble_decision: EnsembleDecision

    @property
    def decision(self) -> Decision:
        return self.ensemble_decision.decision

    @property
    def classes(self) -> tuple[str, ...]:
        return self.heard.data.classes

    @property
    def out_of_fold(self) -> Mapping[str, OutOfFoldPredictions]:
        return self.heard.out_of_fold

    @property
    def labelled(self) -> Labelled | None:
        return self.heard.labelled


def evaluate(
    heard: HeldOutPredictions,
    ensembles: Sequence[Sequence[str]] = (),
    nocall_share: float = NOCALL_SHARE,
) -> Evaluation:
    """Score each experiment, each of ``ensembles`` and all experiments together.

    The decision is chosen for all of them, for rows of which ``nocall_share`` have no bird.
    """
    require(0 <= nocall_share <= 1, f"nocall share is {nocall_share:g}; give one from 0 to 1")
    targets = make_targets(heard.data.recordings, heard.data.classes, None)
    sets = {name: (name,) for name in heard.experiments}
    for names in ensembles:
        unknown = [name for name in names if name not in heard.experiments]
        require(
            not unknown,
            f"no run of {', '.join(unknown)} was heard; there are {', '.join(heard.experiments)}",
        )
        sets["+".join(names)] = tuple(names)
    judged = [decide_ensemble(heard, names, nocall_share, name) for name, names in sets.items()]
    together = (
        replace(judged[0], name=ENSEMBLE)
        if len(heard.experiments) == 1
        else decide_ensemble(heard, heard.experiments, nocall_share, ENSEMBLE)
    )
    members = _members_by_value(heard, judged)
    together = replace(together, decision=replace(together.decision, members=members))
    rows: Rows = []
    for one in [*judged, together]:
        rows += _score(one, heard, targets)
    if heard.labelled is not None and len(heard.labelled.frames):
        rows += event_rows(ENSEMBLE, heard.labelled, together.decision)
    rows += _baselines(heard, together, targets, nocall_share)
    choice = together.choice
    per_class = per_class_table(
        heard.data.classes,
        targets,
        out_of_fold=heard.out_of_fold_for(heard.experiments)[0],
        simulated=together.simulated,
        named=None if choice is None else choice.nested,
        labelled=None if heard.labelled is None else heard.labelled.scores,
    )
    return Evaluation(
        heard=heard,
        table=tidy_table(rows),
        per_class=per_class,
        targets=targets,
        ensemble_decision=together,
    )


def _members_by_value(
    heard: HeldOutPredictions, judged: Sequence[EnsembleDecision]
) -> tuple[str, ...]:
    """Return all members, those of the best experiment first: a kernel short of time takes these.

    What an experiment is worth is its nested score on simulated soundscapes.
    """
    worth = {one.name: one.decision.score.get("nested_row_wise_f1", 0.0) for one in judged}
    best_first = sorted(heard.experiments, key=lambda name: -worth[name])
    return tuple(member for name in best_first for member in heard.member_names([name]))


def decide_ensemble(
    heard: HeldOutPredictions,
    experiments: Sequence[str],
    nocall_share: float = NOCALL_SHARE,
    name: str = ENSEMBLE,
) -> EnsembleDecision:
    """Choose the decision for some experiments on the soundscapes simulated for them."""
    names = tuple(experiments)
    start = Decision(
        window_segments=heard.listening.window_segments,
        context_seconds=heard.listening.context_seconds,
        classes=heard.data.classes,
        members=heard.member_names(names),
    )
    simulated = heard.simulated_for(names)
    if simulated is None or simulated.segments["group"].nunique() < 2:
        logger.warning("%s: no fold was held out by all, or one recordist: nothing chosen", name)
        start = replace(start, chosen_on="nothing")
        return EnsembleDecision(
            name=name,
            experiments=names,
            decision=start,
            choice=None,
            simulated=None,
            weights=None,
            calibration=None,
        )
    clipwise, framewise = heard.out_of_fold_for(names)
    targets = make_targets(heard.data.recordings, heard.data.classes, None)

    def fit(excluded: frozenset[str]) -> Calibration:
        kept = ~np.isin(heard.groups, list(excluded))
        return fit_calibration(clipwise[kept], framewise[kept], targets[kept])

    weights = share_weights(simulated.labelled_truth, nocall_share)
    choice = search_decision(simulated, weights, start=start, fit_calibration=fit)
    decision = _describe_choice(choice, simulated, weights, nocall_share)
    decision = _try_on_labelled(decision, heard.labelled_for(names), name)
    return EnsembleDecision(
        name=name,
        experiments=names,
        decision=decision,
        choice=choice,
        simulated=simulated,
        weights=weights,
        calibration=fit(frozenset()),
    )


def _describe_choice(
    choice: DecisionSearchResult,
    simulated: LabelledPredictions,
    weights: np.ndarray,
    nocall_share: float,
) -> Decision:
    """Return the decision with where it comes from and what it is worth elsewhere."""
    recordings = simulated.recordings
    groups = simulated.groups
    interval = bootstrap_interval(choice.nested_f1, groups, weights=np.maximum(weights, 1e-12))
    nocall = ~simulated.labelled_truth.any(axis=1)
    score = {
        "nested_row_wise_f1": np.average(choice.nested_f1, weights=weights),
        "low": interval.low,
        "high": interval.high,
        "all_nocall": np.average(nocall, weights=weights),
        "tuned_row_wise_f1": choice.tuned,
        "nocall_share_expected": nocall_share,
        "nocall_share_named": np.average(~choice.nested.any(axis=1), weights=weights),
        "nested_recording_f1": choice.nested_recording_f1.mean(),
    }
    return replace(
        choice.decision,
        chosen_on=f"{len(recordings)} rows of {len(set(recordings))} soundscapes simulated from "
        f"held-out recordings, scored nested over {len(set(groups))} groups of recordists",
        score={name: round(float(value), 4) for name, value in score.items()},
    )


def _try_on_labelled(
    decision: Decision, labelled: LabelledPredictions | None, name: str
) -> Decision:
    """Return the decision with its score on labelled soundscapes, which it has never seen."""
    if labelled is None:
        return decision
    f1 = labelled.row_f1(decision)
    interval = bootstrap_interval(f1, labelled.groups)
    nocall = float((~labelled.labelled_truth.any(axis=1)).mean())
    if f1.mean() < nocall:
        logger.warning(
            "%s: on labelled soundscapes its decision scores %.3f, less than naming no bird, %.3f; "
            "are species or noise there others than in training?",
            *(name, f1.mean(), nocall),
        )
    score = {
        "labelled_row_wise_f1": float(f1.mean()),
        "labelled_low": interval.low,
        "labelled_high": interval.high,
        "labelled_all_nocall": nocall,
    }
    # A single soundscape has no interval, and JSON no NaN.
    kept = {key: round(value, 4) for key, value in score.items() if not np.isnan(value)}
    return replace(decision, score=decision.score | kept)


# --- rows of the table ----------------------------------------------------------------------------


def _score(judged: EnsembleDecision, heard: HeldOutPredictions, targets: np.ndarray) -> Rows:
    """Score some experiments on recordings, simulated and labelled soundscapes."""
    name, names = judged.name, judged.experiments
    n_members = len(heard.positions(names))
    clipwise, framewise = heard.out_of_fold_for(names)
    calibrated = None
    if judged.calibration is not None:
        calibrated, _ = judged.calibration.apply(clipwise, framewise)
    rows: Rows = []
    if (~np.isnan(clipwise)).any():
        rows += out_of_fold_rows(
            name, n_members, clipwise=clipwise, targets=targets, calibrated=calibrated
        )
    if judged.choice is not None:
        rows += _simulated_rows(
            name,
            n_members,
            scores=judged.simulated,
            named=judged.choice.nested,
            weights=judged.weights,
        )
        rows += ranked_rows(name, n_members, SIMULATED, judged.simulated)
    labelled = heard.labelled_for(names)
    if labelled is not None:
        rows += decided_rows(
            name, n_members, sound=LABELLED, scores=labelled, named=labelled.decide(judged.decision)
        )
        rows += ranked_rows(name, n_members, LABELLED, labelled)
    return rows


def _simulated_rows(
    name: str, n_members: int, scores: LabelledPredictions, named: np.ndarray, weights: np.ndarray
) -> Rows:
    """Score simulated soundscapes at the expected share of nocall, and each share for itself."""
    rows = decided_rows(
        name, n_members, sound=SIMULATED, scores=scores, named=named, weights=weights
    )
    shares = scores.segments["nocall_share"].to_numpy()
    for share in sorted(set(shares)):
        own = shares == share
        part = scores.select(own)
        rows += decided_rows(
            name,
            n_members,
            sound=simulated_at(share),
            scores=part,
            named=named[own[scores.labelled]],
        )
    return rows


def _baselines(
    heard: HeldOutPredictions, together: EnsembleDecision, targets: np.ndarray, nocall_share: float
) -> Rows:
    """Score naming no bird, and a model that knows how common species are and nothing else."""
    rows: Rows = []
    common = (targets == 1).mean(axis=0)
    decision = None
    if together.choice is not None:
        scores = together.simulated
        nothing = np.zeros_like(scores.labelled_truth)
        rows += _simulated_rows(
            f"all {NOCALL}", 0, scores=scores, named=nothing, weights=together.weights
        )
        prior = _with_constant_scores(scores, common)
        choice = search_decision(prior, together.weights)
        decision = choice.decision
        rows += _simulated_rows(
            PRIOR, 0, scores=prior, named=choice.nested, weights=together.weights
        )
        rows += ranked_rows(PRIOR, 0, SIMULATED, prior)
    if heard.labelled is not None:
        scores = heard.labelled.scores
        nothing = np.zeros_like(scores.labelled_truth)
        rows += decided_rows(f"all {NOCALL}", 0, sound=LABELLED, scores=scores, named=nothing)
        prior = _with_constant_scores(scores, common)
        if decision is not None:
            rows += decided_rows(
                PRIOR, 0, sound=LABELLED, scores=prior, named=prior.decide(decision)
            )
        rows += ranked_rows(PRIOR, 0, LABELLED, prior)
    known = ~np.isnan(heard.out_of_fold_for(heard.experiments)[0]).any(axis=1)
    if known.any():
        constant = np.where(known[:, None], common, np.nan)
        rows += out_of_fold_rows(PRIOR, 0, clipwise=constant, targets=targets, calibrated=None)
    return rows


def _with_constant_scores(scores: LabelledPredictions, common: np.ndarray) -> LabelledPredictions:
    constant = np.broadcast_to(common.astype(np.float32), (1, len(scores.segments), len(common)))
    return replace(scores, clipwise=constant, framewise=constant, member_names=(PRIOR,))


# --- submission ---


class SubmissionRows(NamedTuple):
    """A submission's rows in the order of test.csv: each one's F1, that of nocall, and whose."""

    f1: np.ndarray
    nocall_f1: np.ndarray
    recordings: list[str]


@dataclass(frozen=True)
class SubmissionScore:
    """A submission against the truth of the hidden rows, with all-nocall beside it."""

    row_wise_f1: float
    interval: Interval
    all_nocall: float
    n_rows: int

    def __str__(self) -> str:
        return (
            f"submission: row-wise F1 {self.row_wise_f1:.3f} "
            f"[{self.interval.low:.3f}, {self.interval.high:.3f}] on {self.n_rows} hidden rows; "
            f"all nocall: {self.all_nocall:.3f}; "
            f"difference {self.row_wise_f1 - self.all_nocall:+.3f}"
        )


def score_submission(data: Path, submission: Path) -> SubmissionScore:
    """Score ``submission.csv`` as a whole, with an interval from resampled recordings."""
    rows = score_submission_rows(data, submission)
    return SubmissionScore(
        float(rows.f1.mean()),
        bootstrap_interval(rows.f1, rows.recordings),
        float(rows.nocall_f1.mean()),
        len(rows.f1),
    )


def score_submission_rows(data: Path, submission: Path) -> SubmissionRows:
    """Score each row of ``submission.csv`` by ``solution.csv``."""
    rows = read_test_rows(data)
    predicted = read_submission(submission, list(rows["row_id"]))["birds"]
    solution = read_solution(data).set_index("row_id")["birds"]
    missing = [row_id for row_id in rows["row_id"] if row_id not in solution.index]
    if missing:
        raise ValueError(f"{data / 'solution.csv'}: no row {missing[0]}, which test.csv has")
    truth = list(solution.loc[rows["row_id"]])
    f1 = [row_wise_f1([t], [p]) for t, p in zip(truth, predicted, strict=True)]
    nocall_f1 = [row_wise_f1([t], [NOCALL]) for t in truth]
    return SubmissionRows(np.array(f1), np.array(nocall_f1), list(rows["audio_id"]))
