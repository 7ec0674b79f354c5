"""Choose an ensemble's decision: searched on simulated soundscapes, adapted to labelled ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.config import FULL, SEGMENT_SECONDS
from birdcall.data.dataset import TrainingData
from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation.calibration import (
    LabelledChoice,
    choose_on_labelled,
    find_floor,
    fit_calibration,
)
from birdcall.evaluation.decision_search import DecisionSearchResult, search_decision
from birdcall.evaluation.metrics import (
    bootstrap_interval,
    count_false_names,
    mean_and_error,
    row_f1_scores,
)
from birdcall.evaluation.predict import HeldOutOptions, HeldOutPredictions, predict_held_out
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.tables import ENSEMBLE, LABELLED, SIMULATED
from birdcall.inference.background import Background
from birdcall.inference.decision import Decision, average_members, decide_segments
from birdcall.inference.predictions import Calibration
from birdcall.models.checkpoint import read_checkpoint
from birdcall.training.resume import describe_other_training

logger = logging.getLogger(__name__)

# Of the public rows: an all-nocall submission scores it. About the same of the private (5th place).
NOCALL_SHARE = 0.54


@dataclass(frozen=True, eq=False)
class EnsembleDecision:
    """The decision for the members of some experiments, and the predictions it was searched on.

    search, simulated and weights are None where no soundscape was simulated for all experiments, or
    all of one group: then the decision is the one that a search begins with. weights: of the
    simulated rows ``(labelled rows,)``. on_labelled: None without labelled soundscapes.
    """

    name: str
    experiments: tuple[str, ...]
    decision: Decision
    search: DecisionSearchResult | None = None
    simulated: LabelledPredictions | None = None
    weights: np.ndarray | None = None
    on_labelled: LabelledChoice | None = None
    background: Background | None = None  # of each class in simulated soundscapes

    @property
    def ranking(self) -> Decision:
        """Return the decision whose strengths rank labelled rows; no label has a part in it."""
        if self.search is None:
            return self.decision
        return replace(self.search.decision, background=self.background)


def decide_ensemble(
    held_out: HeldOutPredictions,
    experiments: Sequence[str],
    nocall_share: float = NOCALL_SHARE,
    name: str = ENSEMBLE,
) -> EnsembleDecision:
    """Search for the decision of some experiments on the soundscapes simulated for them."""
    names = tuple(experiments)
    members = held_out.member_names(names)
    start = Decision(
        **asdict(held_out.ensemble.window_config),
        classes=held_out.data.classes,
        members=members,
        weights={
            member.name: member.checkpoint.weights_sha256
            for member in held_out.ensemble.members
            if member.name in members
        },
    )
    simulated, labelled = held_out.simulated_for(names), held_out.labelled_for(names)
    unlabelled = held_out.unlabelled_for(names)
    if simulated is None or simulated.segments["group"].nunique() < 2:
        logger.warning(
            "%s: its experiments share no held-out fold, or what can be simulated is of one "
            "species: the default decision is used",
            name,
        )
        decision, choice = find_floor(replace(start, chosen_on="nothing"), unlabelled), None
        if labelled is not None:
            choice = choose_on_labelled(decision, labelled, unlabelled=unlabelled)
            decision = replace(choice.decision, chosen_on=f"nothing, {choice.describe()}")
        return EnsembleDecision(name, names, decision, on_labelled=choice)
    fit = _segment_calibration(simulated)
    background = Background.of(simulated.clipwise, simulated.framewise, simulated.starts)
    weights = share_weights(simulated.labelled_truth, nocall_share)
    search = search_decision(simulated, weights, start=start, fit_calibration=fit)
    decision = search.decision
    chosen_on = (
        f"{len(simulated.recordings)} rows of {len(set(simulated.recordings))} soundscapes "
        f"simulated from held-out recordings, scored nested over {len(set(simulated.groups))} "
        "groups of recordists"
    )
    score = _score_on_simulated(search, simulated, weights, nocall_share)
    choice = None
    if labelled is not None:
        choice = choose_on_labelled(
            decision, labelled, fit(frozenset()), unlabelled, background=background
        )
        decision = choice.decision
        chosen_on += f", {choice.describe()}"
        score |= _score_on_labelled(choice, labelled, name)
    else:
        decision = find_floor(decision, unlabelled)
    if unlabelled is not None:
        arrays, starts = (unlabelled.clipwise, unlabelled.framewise), np.array(unlabelled.starts)
        named = decide_segments(*arrays, decision, starts)
        score["unlabelled_names_per_hour"] = named.sum() / (len(named) * SEGMENT_SECONDS / 3600)
    # The interval of a single soundscape is NaN, which JSON does not have.
    score = {key: round(float(value), 4) for key, value in score.items() if not np.isnan(value)}
    return EnsembleDecision(
        name=name,
        experiments=names,
        decision=replace(decision, chosen_on=chosen_on, score=score),
        search=search,
        simulated=simulated,
        weights=weights,
        on_labelled=choice,
        background=background,
    )


def predict_with_best_windows(
    folders: Sequence[Path],
    data: TrainingData,
    candidates: Sequence[HeldOutOptions],
    nocall_share: float = NOCALL_SHARE,
) -> HeldOutPredictions:
    """Predict held-out audio with the first options, or with later ones that are clearly better.

    candidates: they differ in their windows. As any step of the decision search, others are adopted
    where row-wise F1 of simulated soundscapes, each scored by a decision that did not see its
    group, is higher by more than a standard error over soundscapes.
    """
    best, *others = candidates
    held_out = predict_held_out(folders, data, best)
    if not others:
        return held_out
    decided = decide_ensemble(held_out, held_out.experiments, nocall_share)
    for candidate in others:
        other = predict_held_out(folders, data, candidate)
        other_decided = decide_ensemble(other, other.experiments, nocall_share)
        gain, error = compare_decisions(decided, other_decided)
        logger.info(
            "windows with %s: F1 of simulated soundscapes is higher by %+.4f +- %.4f: %s",
            *(_describe_windows(candidate), gain, error),
            "adopted" if gain > error else "not adopted",
        )
        if gain > error:
            held_out, decided = other, other_decided
    return held_out


def _describe_windows(options: HeldOutOptions) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in asdict(options.window_config).items())


def compare_decisions(first: EnsembleDecision, second: EnsembleDecision) -> tuple[float, float]:
    """Return how much higher the second scores on the same simulated rows, and its standard error.

    Nested row-wise F1, weighted as in the search. 0 and 0 where nothing was simulated.
    """
    if first.search is None or second.search is None:
        return 0.0, 0.0
    recordings, index = np.unique(first.simulated.recordings, return_inverse=True)
    if not np.array_equal(first.simulated.recordings, second.simulated.recordings):
        raise ValueError("the decisions are of other simulated soundscapes: not comparable")
    gains = first.weights * (second.search.cross_validated_f1 - first.search.cross_validated_f1)
    return mean_and_error(
        np.bincount(index, gains, minlength=len(recordings)),
        np.bincount(index, first.weights, minlength=len(recordings)),
    )


def share_weights(truth: np.ndarray, nocall_share: float) -> np.ndarray:
    """Return weights of rows ``(rows,)``, mean 1, that give nocall rows a share of the total.

    Row-wise F1 is a mean over rows: at any share of nocall it is a mixture of the mean over nocall
    rows and the mean over rows with birds. Where all rows are of one kind, each weight is 1.
    """
    nocall = ~truth.any(axis=1)
    share = nocall.mean()
    if share in (0.0, 1.0):
        return np.ones(len(truth))
    return np.where(nocall, nocall_share / share, (1 - nocall_share) / (1 - share))


def votes_table(
    predictions: LabelledPredictions, weights: np.ndarray, decision: Decision
) -> pd.DataFrame:
    """Return weighted row-wise F1 by the number of members that must agree: votes, row_wise_f1.

    All else is as in ``decision``. weights: ``(labelled rows,)``.
    """
    n_members = len(predictions.member_names)
    rows = []
    for votes in range(1, n_members + 1):
        share = votes / n_members
        rule = replace(decision, combination="votes", vote_share=share, members=())
        rows.append((votes, float(np.average(predictions.row_f1(rule), weights=weights))))
    return pd.DataFrame(rows, columns=["votes", "row_wise_f1"])


def _segment_calibration(
    simulated: LabelledPredictions,
) -> Callable[[frozenset[str]], Calibration]:
    """Return a function that fits the calibration of the mean of members without some groups, once.

    On segments, as the decision takes them: the maxima of recordings have another level.
    """
    groups = simulated.segments["group"].to_numpy()
    clipwise, framewise = map(average_members, (simulated.clipwise, simulated.framewise))

    @cache
    def fit(excluded: frozenset[str]) -> Calibration:
        used = ~np.isin(groups, list(excluded))
        truth = simulated.truth[used, : len(simulated.classes)]
        # A class without a simulated row keeps what is common to all classes.
        targets = np.where(truth.any(axis=0), truth, IGNORE_TARGET)
        return fit_calibration(clipwise[used], framewise[used], targets)

    return fit


def _score_on_simulated(
    search: DecisionSearchResult,
    simulated: LabelledPredictions,
    weights: np.ndarray,
    nocall_share: float,
) -> dict[str, float]:
    """Return the scores of a decision on rows that had no part in its choice."""
    f1, positive = search.cross_validated_f1, np.maximum(weights, 1e-12)
    interval = bootstrap_interval(f1, simulated.groups, weights=positive)
    return {
        "cross_validated_row_wise_f1": np.average(f1, weights=weights),
        "low": interval.low,
        "high": interval.high,
        "all_nocall": np.average(~simulated.labelled_truth.any(axis=1), weights=weights),
        "in_sample_row_wise_f1": search.in_sample_f1,
        "nocall_share_expected": nocall_share,
        "nocall_share_named": np.average(~search.cross_validated.any(axis=1), weights=weights),
        "cross_validated_recording_f1": search.cross_validated_recording_f1.mean(),
        **count_false_names(simulated.labelled_truth, search.cross_validated, SIMULATED),
    }


def decide_for_full_runs(decision: Decision, runs: Path) -> Decision:
    """Return ``decision`` for the full runs of its experiments, in ``runs/<experiment>/full``.

    They held out nothing that a rule could be chosen on: it stays the one that was chosen on the
    runs of folds, which ``chosen_on`` then names. ValueError if weights of these have changed since
    then, or if a full run was trained in another way.
    """
    weights = {}
    for name in decision.members:
        experiment, _, fold = name.rpartition("-")
        if not (runs / experiment / FULL).is_dir():
            command = f"birdcall train --experiment {experiment} --fold {FULL}"
            raise FileNotFoundError(
                f"{runs / experiment / FULL}: no such run; `{command}` makes it"
            )
        of_fold = read_checkpoint(runs / experiment / fold)
        full = read_checkpoint(runs / experiment / FULL)
        differences = describe_other_training(of_fold, full)
        if of_fold.weights_sha256 != decision.weights.get(name):
            differences = f"the decision was chosen on other weights of {name}"
        if differences:
            raise ValueError(
                f"{runs / experiment / FULL}: the decision does not suit it: {differences}; train "
                "both in one way, and let `birdcall evaluate` choose a decision again"
            )
        weights[full.name] = full.weights_sha256
    chosen_on = f"{decision.chosen_on}, predicted by {', '.join(decision.members)}"
    logger.info("%s: with the decision chosen on %s", ", ".join(weights), chosen_on)
    return replace(decision, members=tuple(weights), weights=weights, chosen_on=chosen_on)


def _score_on_labelled(
    choice: LabelledChoice, labelled: LabelledPredictions, name: str
) -> dict[str, float]:
    """Score the nested decisions of labelled soundscapes; warn where no bird scores higher."""
    f1 = row_f1_scores(labelled.labelled_truth, choice.predicted)
    interval = bootstrap_interval(f1, labelled.groups)
    nocall = float((~labelled.labelled_truth.any(axis=1)).mean())
    if f1.mean() < nocall:
        logger.warning(
            "%s: on labelled soundscapes its decision scores %.3f, less than naming no bird, %.3f; "
            "do their species or their noise differ from the training data?",
            *(name, f1.mean(), nocall),
        )
    return {
        "labelled_row_wise_f1": float(f1.mean()),
        "labelled_low": interval.low,
        "labelled_high": interval.high,
        "labelled_all_nocall": nocall,
        "labelled_offset": choice.offset,
        **count_false_names(labelled.labelled_truth, choice.predicted, LABELLED),
    }
