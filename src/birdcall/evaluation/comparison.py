"""Compare experiments on the same audio: paired differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from birdcall.config import NOCALL
from birdcall.data.folds import recordist_clusters
from birdcall.evaluation import metrics
from birdcall.kaggle.test_set import read_solution, read_submission, read_test_rows

if TYPE_CHECKING:  # `birdcall score` needs no torch
    from birdcall.evaluation.ensemble_decision import EnsembleDecision
    from birdcall.evaluation.predict import HeldOutPredictions
    from birdcall.evaluation.predictions import LabelledPredictions

_FloatArray = NDArray[np.float64]

N_RESAMPLES = 1000
LEVEL = 0.95
_HIDDEN = "hidden_f1"  # the measure of hidden rows


@dataclass(frozen=True, eq=False)
class Measure:
    """A score of experiments, and the rows that it is computed from.

    clusters: the recording or recordist of each row, ``(rows,)``; rows of the same cluster are not
    independent. Without ``truth`` the score is the mean of a value per row; with ``truth`` ``(rows,
    classes)`` it is the mean over classes of ``score_classes``, average precision or area under the
    ROC curve, of probabilities ``(rows, classes)``. all_nocall: the score of predicting no bird.
    """

    title: str
    clusters: tuple[str, ...]
    cluster_kind: str  # plural
    truth: NDArray[np.bool_] | None = None
    known: NDArray[np.bool_] | None = None  # cells of the truth that count; None: all
    score_classes: Callable[..., NDArray] = metrics.average_precision
    all_nocall: float | None = None
    n_left_out: int = 0  # classes that occur but are not in the truth: no member could learn them

    @property
    def n_classes(self) -> int | None:
        """Return over how many classes the score is on all rows; None where it is of rows."""
        if self.truth is None:
            return None
        scored = self.truth if self.known is None else self.truth & self.known
        return int(scored.any(axis=0).sum())

    @property
    def n_clusters(self) -> int:
        """Return the number of independent clusters."""
        return len(set(self.clusters))

    def score(self, values: NDArray, rows: NDArray[np.intp] | slice = slice(None)) -> float:
        """Return the score of ``values`` on some rows, each as often as it is in ``rows``."""
        if self.truth is None:
            return float(values[rows].mean())
        truth = self.truth[rows]
        occurs = truth.any(axis=0)  # the others have no score
        known = None if self.known is None else self.known[rows][:, occurs]
        return metrics.macro_average(
            self.score_classes(truth[:, occurs], values[rows][:, occurs], known)
        )


@dataclass(frozen=True, eq=False)
class Resampled:
    """A measure's scores of an experiment, or the differences of two experiments.

    scores: ``(seeds,)``, on all rows. resampled: ``(resamples, seeds)``; resample k has the same
    clusters for all seeds and experiments, which is what makes differences paired.
    """

    scores: _FloatArray
    resampled: _FloatArray
    n_clusters: int

    def means(self, seed: int = 0) -> _FloatArray:
        """Return the mean over drawn training seeds of each resample, ``(resamples,)``.

        One seed fewer is drawn than there are: drawing all of n would give (n - 1) / n of the
        variance of their mean, which for three seeds is a third too little (Rao & Wu 1988). A
        single seed is always drawn: its interval does not include the spread of seeds. Resamples
        without a score (none of their rows has a class in the truth) are left out.
        """
        n_resamples, n_seeds = self.resampled.shape
        # Not the stream of the clusters, which is seeded with `seed` itself.
        generator = np.random.default_rng((seed, 1))
        drawn = generator.integers(n_seeds, size=(n_resamples, max(1, n_seeds - 1)))
        weights = (drawn[:, :, None] == np.arange(n_seeds)).mean(axis=1)
        means = (self.resampled * weights).sum(axis=1)
        return means[~np.isnan(means)]

    def interval(self) -> metrics.Interval:
        """Return the percentile interval of the mean over seeds; NaN for a single cluster.

        Simulated (10 rows a cluster, 400 trials), it holds the truth in 84 to 93 % of cases with 3
        seeds and 88 to 95 % with 6, for 4 to 30 clusters and spreads of 0.2 and 1 between seeds,
        where clusters spread by 1. With a single seed, whose spread it lacks, in 28 to 85 %.
        """
        means = self.means()
        if self.n_clusters < 2 or len(means) == 0:
            return metrics.Interval(float("nan"), float("nan"))
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return metrics.Interval(float(low), float(high))

    def compare(self, reference: Resampled) -> dict[str, float]:
        """Return the mean over seeds of the difference, its interval, how often it is positive.

        Seeds are compared in order, the first of both, the second of both.
        """
        by_seed = self.scores - reference.scores
        differences = Resampled(by_seed, self.resampled - reference.resampled, self.n_clusters)
        return {
            "difference": float(by_seed.mean()),
            **differences.interval()._asdict(),
            "seeds": len(by_seed),
            "positive_seeds": int((by_seed > 0).sum()),
            "positive_share": float((by_seed > 0).mean()),
        }


def resample_scores(
    measure: Measure, values: Sequence[NDArray], n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Resampled:
    """Score each training seed's ``values`` on all rows, and on resamples of whole clusters."""
    for position, of_seed in enumerate(values):
        if len(of_seed) != len(measure.clusters):
            raise ValueError(
                f"{measure.title}: values of seed {position} have {len(of_seed)} rows instead of "
                f"{len(measure.clusters)}: were all experiments scored on the same audio?"
            )
    resampled = [
        [measure.score(of_seed, rows) for of_seed in values]
        for rows in metrics.bootstrap_rows(measure.clusters, n_resamples, seed)
    ]
    scores = [measure.score(of_seed) for of_seed in values]
    return Resampled(np.array(scores), np.array(resampled), measure.n_clusters)


def compare_all(
    measures: Mapping[str, Measure],
    values: Mapping[str, Mapping[str, Sequence[NDArray]]],
    reference: str,
    n_resamples: int = N_RESAMPLES,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a table of scores and one of differences from ``reference``.

    values: ``[measure][experiment]`` holds the values of each seed. Scores: a row per measure and
    experiment with the mean over seeds, its interval, and the seeds' sample standard deviation.
    """
    means, differences = [], []
    for key, measure in measures.items():
        rows = {
            "measure": key, "rows": len(measure.clusters), "clusters": measure.n_clusters,
            "cluster_kind": measure.cluster_kind, "classes": measure.n_classes,
            "left_out": measure.n_left_out if measure.truth is not None else None,
        }  # fmt: skip
        scored = {
            name: resample_scores(measure, seeds, n_resamples)
            for name, seeds in values[key].items()
        }
        for name, resampled in scored.items():
            n_seeds = len(resampled.scores)
            mean = {
                "mean": float(resampled.scores.mean()),
                "sd": float(resampled.scores.std(ddof=1)) if n_seeds > 1 else float("nan"),
                **resampled.interval()._asdict(),
                "seeds": n_seeds,
            }
            means.append({"experiment": name} | mean | rows)
            if name != reference:
                difference = resampled.compare(scored[reference])
                names = {"experiment": name, "reference": reference}
                differences.append(names | difference | rows)
    return pd.DataFrame(means), pd.DataFrame(differences)


def rank_agreement(table: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame | None:
    """Return how well each measure ranks as hidden rows do, by Spearman's correlation.

    table: a row per ``experiment`` and ``seed`` with a column per measure. Columns: measure;
    experiments, the correlation of the means over seeds; networks, that of all rows (each seed of
    an experiment is another network); NaN where there are fewer than three, or all are equal.
    None where hidden rows are not among the measures.
    """
    if _HIDDEN not in measures:
        return None
    names = [measure for measure in measures if measure != _HIDDEN]
    means = table.groupby("experiment", sort=False)[list(measures)].mean()
    correlations = {
        title: scores[list(measures)].corr("spearman", min_periods=3).loc[names, _HIDDEN].to_numpy()
        for title, scores in (("experiments", means), ("networks", table))
    }
    return pd.DataFrame({"measure": names} | correlations)


# --- submission -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SubmissionScore:
    """The score of a submission on hidden rows, beside that of predicting no bird.

    f1: ``(rows,)``, in the order of test.csv. recordings: the ``audio_id`` of each row, which the
    interval resamples. row_wise_f1, all_nocall: means over rows.
    """

    f1: np.ndarray
    recordings: tuple[str, ...]
    row_wise_f1: float
    interval: metrics.Interval
    all_nocall: float

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"submission: row-wise F1 {self.row_wise_f1:.3f} [{low:.3f}, {high:.3f}] on "
            f"{len(self.f1)} hidden rows; all nocall: {self.all_nocall:.3f}; "
            f"difference {self.row_wise_f1 - self.all_nocall:+.3f}"
        )


def score_submission(data: Path, submission: Path) -> SubmissionScore:
    """Score each row of a submission by ``solution.csv`` in the data folder.

    Raises ValueError for an invalid submission, or a row of test.csv that solution.csv lacks.
    """
    rows = read_test_rows(data)
    predicted = read_submission(submission, list(rows["row_id"]))["birds"]
    solution = read_solution(data).set_index("row_id")["birds"]
    if missing := [row_id for row_id in rows["row_id"] if row_id not in solution.index]:
        raise ValueError(f"{data / 'solution.csv'}: no row {missing[0]}, which test.csv has")
    truth = list(solution.loc[rows["row_id"]])
    f1 = [
        metrics.row_wise_f1([true], [birds]) for true, birds in zip(truth, predicted, strict=True)
    ]
    recordings = tuple(rows["audio_id"])
    return SubmissionScore(
        f1=np.array(f1),
        recordings=recordings,
        row_wise_f1=float(np.mean(f1)),
        interval=metrics.bootstrap_interval(f1, recordings),
        all_nocall=float(np.mean([metrics.row_wise_f1([true], [NOCALL]) for true in truth])),
    )


# --- what is compared -----------------------------------------------------------------------------


def measure_held_out(
    held_out: HeldOutPredictions, ensemble: EnsembleDecision, hidden: SubmissionScore | None
) -> dict[str, tuple[Measure, np.ndarray]]:
    """Measure the experiments of ``ensemble`` together on audio that their runs did not train on.

    Returns each measure with its values, one per row; see `Measure`. The measures depend on the
    data: F1 and macro AP of simulated and of labelled soundscapes, of these also both macro scores
    as `EnsembleDecision.ranking` ranks; F1 of ``hidden`` rows; macro AP and top-1 of recordings.
    """
    from birdcall.inference.decision import average_members

    measured: dict[str, tuple[Measure, np.ndarray]] = {}
    simulated, weights = ensemble.simulated, ensemble.weights
    could_learn = held_out.learnable_by(ensemble.experiments)
    if simulated is not None:
        nocall = ~simulated.labelled_truth.any(axis=1)
        all_nocall = float(weights[nocall].sum() / weights.sum())
        clusters = tuple(simulated.groups)
        f1 = Measure("simulated: F1", clusters, "groups of recordists", all_nocall=all_nocall)
        # Weighted so that their plain mean is the score.
        values = ensemble.search.cross_validated_f1 * weights / weights.mean()
        measured["simulated_f1"] = f1, values
        probabilities = average_members(simulated.framewise)[simulated.labelled]
        ap = _measure_ranking(f1, "macro AP", simulated, could_learn)
        measured["simulated_ap"] = ap, probabilities
    labelled = held_out.labelled_for(ensemble.experiments)
    if labelled is not None:
        all_nocall = float((~labelled.labelled_truth.any(axis=1)).mean())
        clusters = tuple(labelled.recordings)
        f1 = Measure("soundscapes: F1", clusters, "soundscapes", all_nocall=all_nocall)
        predicted = ensemble.on_labelled.predicted
        measured["soundscape_f1"] = f1, metrics.row_f1_scores(labelled.labelled_truth, predicted)
        ap = _measure_ranking(f1, "macro AP", labelled, could_learn)
        if ap.truth.any():
            probabilities = average_members(labelled.framewise)[labelled.labelled]
            strength = labelled.strength(dict.fromkeys(labelled.groups, ensemble.ranking))
            by_decision = replace(ap, title="soundscapes: macro AP, decision")
            auc = replace(
                ap, title="soundscapes: macro AUC, decision", score_classes=metrics.roc_auc
            )
            measured["soundscape_ap"] = ap, probabilities
            measured["soundscape_decision_ap"] = by_decision, strength
            measured["soundscape_decision_auc"] = auc, strength
    if hidden is not None:
        f1 = Measure(
            "hidden rows: F1", hidden.recordings, "soundscapes", all_nocall=hidden.all_nocall
        )
        measured[_HIDDEN] = f1, hidden.f1
    return measured | _measure_recordings(held_out, ensemble.experiments)


def _measure_ranking(
    f1: Measure, score: str, predictions: LabelledPredictions, learnable: np.ndarray
) -> Measure:
    """Return a macro score of the soundscapes whose F1 is measured, of ``learnable`` classes."""
    truth = predictions.labelled_truth[:, : len(predictions.classes)] & learnable
    n_left_out = int(predictions.labelled_truth.any(axis=0).sum() - truth.any(axis=0).sum())
    title = f1.title.replace("F1", score)
    return replace(f1, title=title, truth=truth, all_nocall=None, n_left_out=n_left_out)


def _measure_recordings(
    held_out: HeldOutPredictions, experiments: Sequence[str]
) -> dict[str, tuple[Measure, np.ndarray]]:
    """Measure the recordings of the folds that were held out, each by the run of its fold."""
    from birdcall.data.targets import IGNORE_TARGET, make_targets

    probabilities, _ = held_out.out_of_fold_for(experiments)
    known = ~np.isnan(probabilities).any(axis=1)
    classes = held_out.data.classes
    probabilities, recordings = probabilities[known], held_out.data.recordings[known]
    clusters = tuple(recordist_clusters(recordings))
    targets, learnable = make_targets(recordings, classes, None), held_out.learnable[known]
    truth = (targets > 0) & learnable
    primary = [classes.index(code) for code in recordings["ebird_code"]]
    is_right = (probabilities.argmax(axis=1) == primary).astype(float)
    ap = Measure(
        title="recordings: macro AP",
        clusters=clusters,
        cluster_kind="recordists",
        truth=truth,
        known=(targets != IGNORE_TARGET) & learnable,
        n_left_out=int((targets > 0).any(axis=0).sum() - truth.any(axis=0).sum()),
    )
    is_scored = truth.any(axis=1)
    if not is_scored.any():
        return {}
    top1 = Measure("recordings: top-1", tuple(np.array(clusters)[is_scored]), "recordists")
    return {"oof_ap": (ap, probabilities), "oof_top1": (top1, is_right[is_scored])}
