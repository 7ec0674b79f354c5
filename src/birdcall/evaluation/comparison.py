"""Compare experiments on the same audio: paired differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from birdcall.data.folds import recordist_clusters
from birdcall.data.targets import IGNORE_TARGET, make_targets
from birdcall.evaluation.metrics import Interval, average_precision, bootstrap_rows, macro_average
from birdcall.evaluation.predict import HeldOutPredictions
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.scoring import EnsembleDecision, SubmissionScore
from birdcall.inference.decision import average_members

_FloatArray = NDArray[np.float64]

N_RESAMPLES = 1000
LEVEL = 0.95
HIDDEN = "hidden_f1"  # the measure of hidden rows


@dataclass(frozen=True, eq=False)
class Measure:
    """A score of experiments, and the rows that it is computed from.

    clusters: the recording or recordist of each row, ``(rows,)``; rows of the same cluster are not
    independent. Without ``truth`` the score is the mean of a value per row; with ``truth`` ``(rows,
    classes)`` it is the macro average precision of probabilities ``(rows, classes)``. all_nocall:
    the score of predicting no bird.
    """

    title: str
    clusters: tuple[str, ...]
    cluster_kind: str  # plural
    truth: NDArray[np.bool_] | None = None
    known: NDArray[np.bool_] | None = None  # cells of the truth that count; None: all
    all_nocall: float | None = None

    @property
    def n_clusters(self) -> int:
        return len(set(self.clusters))

    def score(self, values: NDArray, rows: NDArray[np.intp] | slice = slice(None)) -> float:
        """Return the score of ``values`` on some rows, each as often as it is in ``rows``."""
        if self.truth is None:
            return float(values[rows].mean())
        truth = self.truth[rows]
        occurs = truth.any(axis=0)  # the others have no average precision
        known = None if self.known is None else self.known[rows][:, occurs]
        return macro_average(average_precision(truth[:, occurs], values[rows][:, occurs], known))


class MeasuredValues(NamedTuple):
    """The values of a measure for one experiment and seed, one per row; see `Measure`."""

    measure: Measure
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Resampled:
    """A measure's scores of one experiment.

    scores: ``(seeds,)``, on all rows. resampled: ``(resamples, seeds)``; resample k has the same
    clusters for all seeds and experiments, which is what makes differences paired.
    """

    scores: _FloatArray
    resampled: _FloatArray


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
        for rows in bootstrap_rows(measure.clusters, n_resamples, seed)
    ]
    scores = [measure.score(of_seed) for of_seed in values]
    return Resampled(np.array(scores), np.array(resampled))


def seed_weights(n_seeds: int, n_resamples: int, seed: int = 0) -> _FloatArray:
    """Return the weight of each training seed in each resample, ``(resamples, seeds)``.

    One seed fewer is drawn than there are: drawing all of n would give (n - 1) / n of the variance
    of their mean, which for three seeds is a third too little (Rao & Wu 1988). A single seed is
    always drawn: its interval does not include the spread of seeds.
    """
    n_drawn = max(1, n_seeds - 1)
    # Not the stream of the clusters, which is seeded with `seed` itself.
    generator = np.random.default_rng((seed, 1))
    drawn = generator.integers(n_seeds, size=(n_resamples, n_drawn))
    return (drawn[:, :, None] == np.arange(n_seeds)).mean(axis=1)


def resampled_means(resampled: _FloatArray, seed: int = 0) -> _FloatArray:
    """Return the mean over drawn seeds of each resample: ``(resamples, seeds)`` → ``(n,)``.

    Resamples without a score (none of their rows has a class in the truth) are left out.
    """
    weights = seed_weights(resampled.shape[1], len(resampled), seed)
    means = (resampled * weights).sum(axis=1)
    return means[~np.isnan(means)]


def interval_of(resampled: _FloatArray, n_clusters: int) -> Interval:
    """Return the percentile interval of the mean over seeds; NaN for a single cluster.

    Simulated (10 rows a cluster, 400 trials), it holds the truth in 84 to 93 % of cases with 3
    seeds and 88 to 95 % with 6, for 4 to 30 clusters and spreads of 0.2 and 1 between seeds, where
    clusters spread by 1. With a single seed it is blind to seeds: 28 to 85 %.
    """
    means = resampled_means(resampled)
    if n_clusters < 2 or len(means) == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def compare(scored: Resampled, reference: Resampled, n_clusters: int) -> dict[str, float]:
    """Return the mean over seeds of ``scored - reference``, its interval, how often it is positive.

    Seeds are compared in order, the first of both, the second of both.
    """
    by_seed = scored.scores - reference.scores
    interval = interval_of(scored.resampled - reference.resampled, n_clusters)
    return {
        "difference": float(by_seed.mean()),
        "low": interval.low,
        "high": interval.high,
        "seeds": len(by_seed),
        "positive_seeds": int((by_seed > 0).sum()),
        "positive_share": float((by_seed > 0).mean()),
    }


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
            "cluster_kind": measure.cluster_kind,
        }  # fmt: skip
        scored = {
            name: resample_scores(measure, seeds, n_resamples)
            for name, seeds in values[key].items()
        }
        for name, resampled in scored.items():
            n_seeds = len(resampled.scores)
            interval = interval_of(resampled.resampled, measure.n_clusters)
            mean = {
                "mean": float(resampled.scores.mean()),
                "sd": float(resampled.scores.std(ddof=1)) if n_seeds > 1 else float("nan"),
                "low": interval.low,
                "high": interval.high,
                "seeds": n_seeds,
            }
            means.append({"experiment": name} | mean | rows)
            if name != reference:
                difference = compare(resampled, scored[reference], measure.n_clusters)
                names = {"experiment": name, "reference": reference}
                differences.append(names | difference | rows)
    return pd.DataFrame(means), pd.DataFrame(differences)


def rank_agreement(table: pd.DataFrame, measures: Sequence[str], target: str) -> pd.DataFrame:
    """Return how well each measure ranks as ``target`` does, by Spearman's correlation.

    table: a row per ``experiment`` and ``seed`` with a column per measure. Columns: measure;
    experiments, the correlation of the means over seeds; networks, that of all rows (each seed of
    an experiment is another network); NaN where there are fewer than three, or all are equal.
    """
    means = table.groupby("experiment", sort=False)[[*measures, target]].mean()

    def correlate(scores: pd.DataFrame, measure: str) -> float:
        if len(scores) < 3 or scores[measure].nunique() == 1 or scores[target].nunique() == 1:
            return float("nan")
        return float(spearmanr(scores[measure], scores[target]).statistic)

    rows = [(measure, correlate(means, measure), correlate(table, measure)) for measure in measures]
    return pd.DataFrame(rows, columns=["measure", "experiments", "networks"])


# --- what is compared -----------------------------------------------------------------------------


def measure_held_out(
    held_out: HeldOutPredictions, ensemble: EnsembleDecision, hidden: SubmissionScore | None
) -> dict[str, MeasuredValues]:
    """Measure all experiments together on the audio that their runs did not train on.

    The measures depend on the data: F1 and macro AP of simulated and of labelled soundscapes; F1 of
    ``hidden`` rows; macro AP and top-1 accuracy of the recordings of the held-out folds.
    """
    measured = _measure_simulated(ensemble)
    labelled = held_out.labelled_for(held_out.experiments)
    if labelled is not None:
        measured |= _measure_labelled(labelled, ensemble)
    if hidden is not None:
        f1 = Measure(
            "hidden rows: F1", hidden.recordings, "soundscapes", all_nocall=hidden.all_nocall
        )
        measured[HIDDEN] = MeasuredValues(f1, hidden.f1)
    return measured | _measure_recordings(held_out)


def _measure_simulated(ensemble: EnsembleDecision) -> dict[str, MeasuredValues]:
    simulated, weights = ensemble.simulated, ensemble.weights
    if simulated is None:
        return {}
    clusters, kind = tuple(simulated.groups), "groups of recordists"
    truth = simulated.labelled_truth
    all_nocall = float(weights[~truth.any(axis=1)].sum() / weights.sum())
    f1 = Measure("simulated: F1", clusters, kind, all_nocall=all_nocall)
    # Weighted so that their plain mean is the score.
    values = ensemble.search.cross_validated_f1 * weights / weights.mean()
    ap = Measure("simulated: macro AP", clusters, kind, truth[:, : len(simulated.classes)])
    probabilities = average_members(simulated.framewise)[simulated.labelled]
    return {
        "simulated_f1": MeasuredValues(f1, values),
        "simulated_ap": MeasuredValues(ap, probabilities),
    }


def _measure_labelled(
    labelled: LabelledPredictions, ensemble: EnsembleDecision
) -> dict[str, MeasuredValues]:
    clusters, kind = tuple(labelled.recordings), "soundscapes"
    all_nocall = float((~labelled.labelled_truth.any(axis=1)).mean())
    f1 = Measure("soundscapes: F1", clusters, kind, all_nocall=all_nocall)
    measured = {"soundscape_f1": MeasuredValues(f1, labelled.row_f1(ensemble.decision))}
    truth = labelled.labelled_truth[:, : len(labelled.classes)]
    if truth.any():
        ap = Measure("soundscapes: macro AP", clusters, kind, truth)
        probabilities = average_members(labelled.framewise)[labelled.labelled]
        measured["soundscape_ap"] = MeasuredValues(ap, probabilities)
    return measured


def _measure_recordings(held_out: HeldOutPredictions) -> dict[str, MeasuredValues]:
    """Measure the recordings of the folds that were held out, each by the run of its fold."""
    probabilities, _ = held_out.out_of_fold_for(held_out.experiments)
    known = ~np.isnan(probabilities).any(axis=1)
    classes = held_out.data.classes
    probabilities, recordings = probabilities[known], held_out.data.recordings[known]
    clusters = tuple(recordist_clusters(recordings))
    targets = make_targets(recordings, classes, None)
    primary = [classes.index(code) for code in recordings["ebird_code"]]
    is_right = (probabilities.argmax(axis=1) == primary).astype(float)
    ap = Measure(
        title="recordings: macro AP",
        clusters=clusters,
        cluster_kind="recordists",
        truth=targets > 0,
        known=targets != IGNORE_TARGET,
    )
    top1 = Measure("recordings: top-1", clusters, "recordists")
    return {"oof_ap": MeasuredValues(ap, probabilities), "oof_top1": MeasuredValues(top1, is_right)}
