"""Score experiments and ensembles on held-out audio, and search for the ensemble's decision."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from birdcall.config import NOCALL, require
from birdcall.data import birdnet
from birdcall.data.targets import make_targets
from birdcall.evaluation.calibration import (
    choose_on_labelled,
)
from birdcall.evaluation.decision_search import search_decision
from birdcall.evaluation.ensemble_decision import (
    NOCALL_SHARE,
    EnsembleDecision,
    decide_ensemble,
    votes_table,
)
from birdcall.evaluation.labelled import LabelledSoundscapes
from birdcall.evaluation.metrics import (
    row_f1_scores,
)
from birdcall.evaluation.predict import HeldOutPredictions
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.tables import (
    ENSEMBLE,
    LABELLED,
    PRIOR,
    RECORDINGS,
    SIMULATED,
    ScoreSubject,
    confusion_table,
    decided_rows,
    event_rows,
    out_of_fold_rows,
    per_class_table,
    ranked_rows,
    reliability_table,
    snr_table,
)
from birdcall.inference.decision import Decision, average_members
from birdcall.inference.predictions import Calibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of an evaluation as arrays and tables; nothing in it predicts.

    ensemble: the decision of all experiments together. scores: a row per name (experiments,
    ensembles, all nocall, prior), kind of audio and metric, with interval and number of rows; a
    macro score has the number of ``classes`` that it is over, and of those ``left_out``: they
    occur, but no member that predicts them could learn them. The others are described in `tables`.
    None where there is nothing of the kind: votes, snr, reliability (without simulation),
    soundscapes (without labelled ones).
    """

    classes: tuple[str, ...]
    ensemble: EnsembleDecision
    scores: pd.DataFrame
    per_class: pd.DataFrame
    confusions: pd.DataFrame
    votes: pd.DataFrame | None
    snr: pd.DataFrame | None
    reliability: pd.DataFrame | None
    soundscapes: pd.DataFrame | None
    labelled: LabelledSoundscapes | None


def check_request(
    experiments: Sequence[str], ensembles: Sequence[Sequence[str]], nocall_share: float
) -> None:
    """Raise ``ValueError`` for an ensemble with an experiment without runs, or no possible share.

    Experiments are those that have runs. A command asks before it predicts, which takes long.
    """
    require(0 <= nocall_share <= 1, f"nocall share is {nocall_share:g}; give one from 0 to 1")
    unknown = [name for names in ensembles for name in names if name not in experiments]
    require(
        not unknown,
        f"there is no run of {', '.join(unknown)}; there are runs of {', '.join(experiments)}",
    )


def evaluate(
    held_out: HeldOutPredictions,
    ensembles: Sequence[Sequence[str]] = (),
    nocall_share: float = NOCALL_SHARE,
) -> Evaluation:
    """Score each experiment, each of ``ensembles`` and all experiments together.

    A decision is searched for each of them, for rows of which ``nocall_share`` have no bird. Raises
    what `check_request` does.
    """
    check_request(held_out.experiments, ensembles, nocall_share)
    experiments_of = {name: (name,) for name in held_out.experiments}
    experiments_of |= {"+".join(names): tuple(names) for names in ensembles}
    decisions = [
        decide_ensemble(held_out, names, nocall_share, name)
        for name, names in experiments_of.items()
    ]
    if len(held_out.experiments) == 1:
        ensemble = replace(decisions[0], name=ENSEMBLE)
    else:
        ensemble = decide_ensemble(held_out, held_out.experiments, nocall_share, ENSEMBLE)
    # The best experiment's members first: a kernel that is short of time uses the first ones.
    score = {
        item.name: item.decision.score.get("cross_validated_row_wise_f1", 0.0) for item in decisions
    }
    best_first = sorted(held_out.experiments, key=lambda name: -score[name])
    members = tuple(member for name in best_first for member in held_out.member_names([name]))
    ensemble = replace(ensemble, decision=replace(ensemble.decision, members=members))
    targets = make_targets(held_out.data.recordings, held_out.data.classes, None)
    rows = []
    for ensemble_decision in [*decisions, ensemble]:
        rows += _score(ensemble_decision, held_out, targets)
    if held_out.labelled is not None and len(held_out.labelled.frames):
        rows += event_rows(ENSEMBLE, held_out.labelled, ensemble.on_labelled.by_group)
    rows += _score_baselines(held_out, ensemble, targets)
    if held_out.yardstick is not None:
        rows += _score_yardstick(held_out.yardstick, held_out.learnable_by(held_out.experiments))
    scores = pd.DataFrame(rows).astype({"classes": "Int64", "left_out": "Int64"})
    return _gather(held_out, ensemble, targets, scores=scores)


def _gather(
    held_out: HeldOutPredictions,
    ensemble: EnsembleDecision,
    targets: np.ndarray,
    scores: pd.DataFrame,
) -> Evaluation:
    """Compute the tables of the ensemble."""
    classes, labelled = held_out.data.classes, held_out.labelled
    clipwise, _ = held_out.out_of_fold_for(held_out.experiments)
    learnable = held_out.learnable
    is_scored = ((targets > 0) & learnable).any(axis=1)  # recordings
    search, simulated = ensemble.search, ensemble.simulated
    truth = predicted = np.zeros((0, len(classes)), dtype=bool)
    votes = snr = reliability = soundscapes = None
    if search is not None:
        truth, predicted = simulated.labelled_truth, search.cross_validated
        votes = votes_table(simulated, ensemble.weights, search.decision)
        snr = snr_table(held_out.events, simulated, predicted)
        reliability = reliability_table(
            *(_mean_of_rows(item) for item in (simulated, search.calibrated)),
            truth[:, : len(classes)],
        )
    if labelled is not None:
        soundscapes = soundscape_table(labelled.predictions, ensemble.on_labelled.predicted)
    return Evaluation(
        classes=classes,
        ensemble=ensemble,
        scores=scores,
        per_class=per_class_table(
            classes,
            targets=targets,
            learnable=learnable,
            out_of_fold=clipwise,
            simulated=simulated,
            predicted=None if search is None else predicted,
            labelled=None if labelled is None else labelled.predictions,
            decision=ensemble.ranking,
        ),
        confusions=confusion_table(
            classes,
            probabilities=clipwise[is_scored],
            targets=targets[is_scored],
            truth=truth,
            predicted=predicted,
        ),
        votes=votes,
        snr=snr,
        reliability=reliability,
        soundscapes=soundscapes,
        labelled=labelled,
    )


def _mean_of_rows(predictions: LabelledPredictions) -> np.ndarray:
    """Return the members' mean clipwise probability of labelled rows, ``(rows, classes)``."""
    return average_members(predictions.clipwise)[predictions.labelled]


# --- rows of the table of scores ------------------------------------------------------------------


def _score(
    ensemble: EnsembleDecision, held_out: HeldOutPredictions, targets: np.ndarray
) -> list[dict[str, object]]:
    """Score some experiments on recordings, simulated and labelled soundscapes."""
    subject = ScoreSubject(
        ensemble.name, len(held_out.member_names(ensemble.experiments)), RECORDINGS
    )
    clipwise, _ = held_out.out_of_fold_for(ensemble.experiments)
    rows = []
    known, learnable = ~np.isnan(clipwise).any(axis=1), held_out.learnable
    if known.any():
        rows += out_of_fold_rows(subject, clipwise, targets, learnable=learnable)
    could_learn = held_out.learnable_by(ensemble.experiments)
    if ensemble.search is not None:
        simulated, predicted = ensemble.simulated, ensemble.search.cross_validated
        rows += _simulated_rows(subject, simulated, predicted, ensemble.weights)
        n_left_out = _count_unlearnable(targets, learnable, known)
        subject = subject._replace(audio=SIMULATED)
        rows += ranked_rows(
            subject,
            simulated,
            could_learn,
            n_left_out,
            calibrated=ensemble.search.calibrated,
            decisions=ensemble.search.by_group,
        )
    labelled = held_out.labelled_for(ensemble.experiments)
    if labelled is not None:
        subject = subject._replace(audio=LABELLED)
        rows += decided_rows(subject, labelled, ensemble.on_labelled.predicted)
        # Not those of `on_labelled`: recordings are ranked together, under one decision.
        decisions = dict.fromkeys(labelled.groups, ensemble.ranking)
        rows += ranked_rows(subject, labelled, could_learn, decisions=decisions)
    return rows


def _simulated_rows(
    subject: ScoreSubject,
    simulated: LabelledPredictions,
    predicted: np.ndarray,
    weights: np.ndarray,
) -> list[dict[str, object]]:
    """Score simulated soundscapes at the expected share of nocall, and each simulated share."""
    rows = decided_rows(subject._replace(audio=SIMULATED), simulated, predicted, weights)
    shares = simulated.segments["nocall_share"].to_numpy()
    for share in sorted(set(shares)):
        is_share = shares == share
        rows += decided_rows(
            subject._replace(audio=f"{SIMULATED} {share:.0%}"),
            simulated.select(is_share),
            predicted[is_share[simulated.labelled]],
        )
    return rows


def _score_baselines(
    held_out: HeldOutPredictions, ensemble: EnsembleDecision, targets: np.ndarray
) -> list[dict[str, object]]:
    """Score predicting no bird, and a model that knows the frequency of each species only."""
    rows = []
    known = ~np.isnan(held_out.out_of_fold_for(held_out.experiments)[0]).any(axis=1)
    learnable, could_learn = held_out.learnable, held_out.learnable_by(held_out.experiments)
    frequency = (targets == 1).mean(axis=0)
    all_nocall, prior = (ScoreSubject(name, 0, RECORDINGS) for name in (f"all {NOCALL}", PRIOR))
    labelled = None if held_out.labelled is None else held_out.labelled.predictions
    constant: dict[str, LabelledPredictions] = {}  # each segment has the frequencies
    for audio, predictions in ((SIMULATED, ensemble.simulated), (LABELLED, labelled)):
        if predictions is not None:
            shape = (1, len(predictions.segments), len(frequency))
            probabilities = np.broadcast_to(frequency.astype(np.float32), shape)
            constant[audio] = predictions.with_probabilities(probabilities, probabilities, [PRIOR])
    search = None
    if ensemble.search is not None:
        simulated = constant[SIMULATED]
        nothing = np.zeros_like(simulated.labelled_truth)
        rows += _simulated_rows(all_nocall, simulated, nothing, ensemble.weights)
        search = search_decision(simulated, ensemble.weights)
        rows += _simulated_rows(prior, simulated, search.cross_validated, ensemble.weights)
        n_left_out = _count_unlearnable(targets, learnable, known)
        rows += ranked_rows(prior._replace(audio=SIMULATED), simulated, could_learn, n_left_out)
    if labelled is not None:
        nothing = np.zeros_like(labelled.labelled_truth)
        rows += decided_rows(all_nocall._replace(audio=LABELLED), labelled, nothing)
        subject, labelled = prior._replace(audio=LABELLED), constant[LABELLED]
        if search is not None:
            rows += decided_rows(subject, labelled, labelled.decide(search.decision))
        rows += ranked_rows(subject, labelled, could_learn)
    if known.any():
        out_of_fold = np.where(known[:, None], frequency, np.nan)
        rows += out_of_fold_rows(prior, out_of_fold, targets, learnable=learnable)
    return rows


def _score_yardstick(yardstick: LabelledPredictions, learnable: np.ndarray) -> list[dict]:
    """Score BirdNET with its default threshold, and with a decision that is chosen as ours is."""
    subject, n_classes = ScoreSubject(birdnet.NAME, 1, LABELLED), len(yardstick.classes)
    threshold = birdnet.DEFAULT_THRESHOLD
    default = Decision(threshold, threshold, max_birds=n_classes, classes=yardstick.classes)
    choice = choose_on_labelled(default, yardstick, Calibration.identity(n_classes))
    logger.info("%s: %g or more, %s", birdnet.NAME, threshold, choice.describe())
    rows = decided_rows(subject, yardstick, yardstick.decide(default))
    rows += ranked_rows(subject, yardstick, learnable)
    subject = subject._replace(name=f"{birdnet.NAME}, decision chosen")
    return rows + decided_rows(subject, yardstick, choice.predicted)


def _count_unlearnable(targets: np.ndarray, learnable: np.ndarray, known: np.ndarray) -> int:
    """Return how many classes of ``known`` recordings are no events of simulated soundscapes."""
    return int(((targets > 0) & ~learnable)[known].any(axis=0).sum())


def soundscape_table(predictions: LabelledPredictions, predicted: np.ndarray) -> pd.DataFrame:
    """Return a row per labelled soundscape, the worst first.

    predicted: ``(labelled rows, known species)``. Columns: recording, rows, f1 (mean over rows),
    and summed over rows birds (true species), hits (of these) and false (predicted, not true).
    """
    truth = predictions.labelled_truth
    rows = pd.DataFrame(
        {
            "f1": row_f1_scores(truth, predicted),
            "birds": truth.sum(axis=1),
            "hits": (truth & predicted).sum(axis=1),
            "false": (predicted & ~truth).sum(axis=1),
        }
    )
    by_recording = rows.groupby(predictions.recordings)
    table = by_recording.sum().assign(f1=by_recording["f1"].mean())
    table.insert(0, "rows", by_recording.size())
    table = table.rename_axis("recording").reset_index()
    return table.sort_values("f1", kind="stable").reset_index(drop=True)


def describe_classes(scores: pd.DataFrame) -> str:
    """Return over how many classes the macro scores of `Evaluation.scores` are, in sentences.

    Names of one kind of audio are listed where they differ.
    """
    macro = scores[scores["metric"] == "macro_ap"]
    texts = []
    for audio, rows in macro.groupby("audio", sort=False):
        by_counts = rows.groupby(["classes", "left_out"], sort=False)["name"].agg(list)
        for (n_classes, n_left_out), names in by_counts.items():
            left_out = f", {n_left_out} left out" if n_left_out else ""
            of_names = "" if len(by_counts) == 1 else f" ({', '.join(names)})"
            texts.append(f"{audio} {n_classes} classes{left_out}{of_names}")
    text = f"Macro scores are over: {'; '.join(texts)}."
    if macro["left_out"].any():
        text += " Left out: they occur, but no member that predicts them has trained on one."
    return text
