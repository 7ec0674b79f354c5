"""Ablate: experiments on the same folds and seeds under one budget of time, and what differs."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from birdcall.config import Experiment, require
from birdcall.data.dataset import TrainingData
from birdcall.data.folds import recordist_clusters
from birdcall.data.targets import IGNORE_TARGET, make_targets
from birdcall.evaluation.comparison import Measure, compare_all, rank_agreement
from birdcall.evaluation.predict import HeldOutOptions, HeldOutPredictions, predict_held_out
from birdcall.evaluation.scoring import EnsembleDecision, decide_ensemble, score_submission
from birdcall.inference.decision import average_members
from birdcall.inference.ensemble import default_device, load_ensemble
from birdcall.kaggle.submission import Package, predict_test_set
from birdcall.kaggle.test_set import SOLUTION, find_test_audio_folder
from birdcall.models.checkpoint import SETTINGS_FILE
from birdcall.storage.files import write_atomically
from birdcall.training.log import LOG_FILE, read_log, summarize_log
from birdcall.training.runs import train_many
from birdcall.training.trainer import EpochLog, Run, RunOptions

logger = logging.getLogger(__name__)

LEDGER_FILE = "ablation.json"
HIDDEN = "hidden_f1"


class Sample(NamedTuple):
    """What a measure is computed from, of one experiment and seed: values per row."""

    measure: Measure
    values: np.ndarray


@dataclass(frozen=True)
class Ablation:
    """What an ablation found, and under which conditions.

    table: a row per experiment and seed. means, differences: see `comparison.compare_all`.
    block_seconds: training and scoring, by seed. left_out: seeds that the budget had no room for.
    """

    data: TrainingData
    experiments: tuple[Experiment, ...]
    folds: tuple[int, ...]
    reference: str
    measures: Mapping[str, Measure]
    table: pd.DataFrame
    means: pd.DataFrame
    differences: pd.DataFrame
    block_seconds: Mapping[int, float]
    left_out: tuple[int, ...]
    budget_seconds: float
    workers: int
    jobs: int
    init: Path | None

    @property
    def agreement(self) -> pd.DataFrame | None:
        """Return how each measure ranks the experiments, compared with hidden rows, if any."""
        if HIDDEN not in self.measures:
            return None
        others = [key for key in self.measures if key != HIDDEN]
        return rank_agreement(self.table, others, HIDDEN)

    def write_tables(self, folder: Path) -> None:
        """Write ``ablation.csv``, ``ablation_means.csv`` and ``ablation_differences.csv``."""
        for name, table in (
            ("ablation", self.table),
            ("ablation_means", self.means),
            ("ablation_differences", self.differences),
        ):
            text = table.round(6).to_csv(index=False, lineterminator="\n")
            write_atomically(folder / f"{name}.csv", text)


def ablate(
    experiments: Sequence[Experiment],
    data: TrainingData,
    folder: Path,
    *,
    folds: Sequence[int] | None = None,
    n_seeds: int = 3,
    budget_seconds: float,
    reference: str | None = None,
    workers: int = 1,
    jobs: int = 1,
    init: Path | None = None,
    progress: bool = False,
) -> Ablation:
    """Train and score ``experiments`` on ``folds`` (None: all) with ``n_seeds`` seeds each.

    A block is all runs of one seed: ``folder/<experiment>/seed<s>/fold<k>``, trained with the
    experiment's own seed + s. Blocks are complete, so that comparisons stay paired: one that would
    not fit into what is left of ``budget_seconds``, by the time that the last one took, is left
    out. What is finished in ``folder`` is kept, and the time it took counts.

    Differences are taken from ``reference`` (None: the first experiment).
    """
    reference = _check(experiments, n_seeds, budget_seconds, reference)
    folds = _check_folds(data, data.folds if folds is None else folds)
    ledger = BlockTimes.open(folder, [one.name for one in experiments], folds)
    options = RunOptions(workers=workers, jobs=jobs, init=init, progress=progress, resume=True)
    rows, samples, left_out = [], [], []
    for seed in range(n_seeds):
        if not ledger.has_room(seed, budget_seconds):
            left_out.append(seed)
            continue
        logger.info("seed %d of %d: %d runs", seed, n_seeds, len(experiments) * len(folds))
        runs = {one.name: plan_seed(one, seed, folds, folder) for one in experiments}
        with ledger.clock(seed, [run for group in runs.values() for run in group]):
            train_many([r for group in runs.values() for r in group], data, options)
            for name, group in runs.items():
                scored = score_seed(group, data)
                samples.append((name, scored))
                rows.append({"experiment": name, "seed": seed} | _row(group, scored))
    measures, values = _gather(samples)
    means, differences = compare_all(measures, values, reference)
    return Ablation(
        data=data,
        experiments=tuple(experiments),
        folds=folds,
        reference=reference,
        measures=measures,
        table=pd.DataFrame(rows),
        means=means,
        differences=differences,
        block_seconds=ledger.seconds,
        left_out=tuple(left_out),
        budget_seconds=budget_seconds,
        workers=workers,
        jobs=jobs,
        init=init,
    )


def _check(
    experiments: Sequence[Experiment], n_seeds: int, budget_seconds: float, reference: str | None
) -> str:
    """Refuse what cannot be compared; return the reference's name."""
    names = [one.name for one in experiments]
    require(len(names) > 0, "an ablation needs at least one experiment")
    _require_once("experiment", names)
    require(n_seeds >= 1, f"n_seeds is {n_seeds}; give at least 1")
    require(budget_seconds > 0, f"the budget is {budget_seconds:g} seconds; give more than 0")
    require(
        reference is None or reference in names,
        f"reference {reference!r} is none of the experiments: {', '.join(names)}",
    )
    return reference or names[0]


def _check_folds(data: TrainingData, folds: Sequence[int]) -> tuple[int, ...]:
    require(len(folds) > 0, "an ablation needs at least one fold")
    _require_once("fold", folds)
    for fold in folds:
        data.split(fold)
    return tuple(folds)


def _require_once(kind: str, values: Sequence[object]) -> None:
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    require(not twice, f"{kind} {', '.join(twice)} is given twice")


def plan_seed(experiment: Experiment, seed: int, folds: Sequence[int], folder: Path) -> list[Run]:
    """Return the runs of one experiment and seed, a run per fold."""
    seeded = replace(experiment, train=replace(experiment.train, seed=experiment.train.seed + seed))
    target = folder / experiment.name / f"seed{seed}"
    return [Run(seeded, fold, target / f"fold{fold}") for fold in folds]


# --- time ---------------------------------------------------------------------------------------


@dataclass
class BlockTimes:
    """The time that each block took, kept on disk through interruptions."""

    path: Path
    experiments: list[str]
    folds: list[int]
    seconds: dict[int, float] = field(default_factory=dict)
    complete: set[int] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path, experiments: Sequence[str], folds: Sequence[int]) -> BlockTimes:
        """Read the ledger of ``folder``, or begin one; refuse one of another ablation."""
        ledger = cls(folder / LEDGER_FILE, list(experiments), list(folds))
        if not ledger.path.is_file():
            return ledger
        try:
            kept = json.loads(ledger.path.read_text(encoding="utf-8"))
            seconds = {int(seed): float(value) for seed, value in kept["seconds"].items()}
            complete = {int(seed) for seed in kept["complete"]}
            others = {"experiments": list(kept["experiments"]), "folds": list(kept["folds"])}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{ledger.path}: not a readable ablation: {error!r}") from error
        for name, found in others.items():
            own = getattr(ledger, name)
            if sorted(found) != sorted(own):
                raise ValueError(
                    f"{ledger.path} is of {name} {', '.join(map(str, found))}, not "
                    f"{', '.join(map(str, own))}; begin another ablation in another folder"
                )
        return replace(ledger, seconds=seconds, complete=complete)

    def has_room(self, seed: int, budget_seconds: float) -> bool:
        """Say whether a block fits the budget, if it takes as long as the last complete one.

        A complete one needs no time, and as long as none is there is nothing to judge by.
        """
        if seed in self.complete or not self.complete:
            return True
        expected = self.seconds[max(self.complete)]
        spent = sum(self.seconds.values())
        missing = max(0.0, expected - self.seconds.get(seed, 0.0))
        if spent + missing <= budget_seconds:
            return True
        logger.warning(
            "seed %d is left out: it would take %.1f minutes, and %.1f of %.1f are spent",
            *(seed, missing / 60, spent / 60, budget_seconds / 60),
        )
        return False

    @contextmanager
    def clock(self, seed: int, runs: Sequence[Run]) -> Iterator[None]:
        """Add the time spent inside to the block's, also where it ends by an error.

        Nothing is added for a complete block, which is only scored again.
        """
        if seed in self.complete and all((run.folder / SETTINGS_FILE).exists() for run in runs):
            yield
            return
        self.complete.discard(seed)
        start, before = time.monotonic(), self.seconds.get(seed, 0.0)
        try:
            yield
            self.complete.add(seed)
        finally:
            self.seconds[seed] = before + time.monotonic() - start
            self._write()

    def _write(self) -> None:
        values = {
            "experiments": self.experiments,
            "folds": self.folds,
            "seconds": {str(seed): round(value, 2) for seed, value in self.seconds.items()},
            "complete": sorted(self.complete),
        }
        write_atomically(self.path, json.dumps(values, indent=1) + "\n")


# --- scores -------------------------------------------------------------------------------------


def score_seed(runs: Sequence[Run], data: TrainingData) -> dict[str, Sample]:
    """Score one experiment and seed on all that its runs did not train on.

    The decision is chosen on simulated soundscapes; labelled and hidden ones are heard by all runs
    together and decided by it. Which measures there are depends on the data: labelled soundscapes,
    hidden rows with their solution, recordings of the folds that were trained.
    """
    folder = runs[0].folder.parent
    device = default_device()
    options = HeldOutOptions(device, cache_folder=folder / "predictions")
    heard = predict_held_out([run.folder for run in runs], data, options)
    judged = decide_ensemble(heard, heard.experiments)
    samples = _score_simulated(judged) | _score_labelled(heard, judged, data)
    if (data.folder / SOLUTION).is_file() and find_test_audio_folder(data.folder) is not None:
        submission = folder / "submission.csv"
        ensemble = load_ensemble([run.folder for run in runs], device)
        predict_test_set(data.folder, submission, lambda: Package(ensemble, judged.decision))
        samples[HIDDEN] = _score_hidden_rows(data.folder, submission)
    return samples | _score_recordings(heard, data)


def _score_simulated(judged: EnsembleDecision) -> dict[str, Sample]:
    if judged.search is None:
        return {}
    clusters = tuple(judged.simulated.groups)
    share = judged.weights[~judged.simulated.labelled_truth.any(axis=1)].sum()
    all_nocall = float(share / judged.weights.sum())
    measure = Measure("simulated: F1", clusters, "groups of recordists", all_nocall=all_nocall)
    # Weighted so that their plain mean is the score.
    values = judged.search.cross_validated_f1 * judged.weights / judged.weights.mean()
    samples = {"simulated_f1": Sample(measure, values)}
    truth = judged.simulated.labelled_truth[:, : len(judged.simulated.classes)]
    measure = Measure("simulated: macro AP", clusters, "groups of recordists", truth)
    scores = average_members(judged.simulated.framewise)[judged.simulated.labelled]
    return samples | {"simulated_ap": Sample(measure, scores)}


def _score_labelled(
    heard: HeldOutPredictions, judged: EnsembleDecision, data: TrainingData
) -> dict[str, Sample]:
    labelled = heard.labelled_for(heard.experiments)
    if labelled is None:
        return {}
    clusters = tuple(labelled.recordings)
    nocall = float((~labelled.labelled_truth.any(axis=1)).mean())
    measure = Measure("soundscapes: F1", clusters, "soundscapes", all_nocall=nocall)
    samples = {"soundscape_f1": Sample(measure, labelled.row_f1(judged.decision))}
    truth = labelled.labelled_truth[:, : len(data.classes)]
    if truth.any():
        measure = Measure("soundscapes: macro AP", clusters, "soundscapes", truth)
        scores = average_members(labelled.framewise)[labelled.labelled]
        samples["soundscape_ap"] = Sample(measure, scores)
    return samples


def _score_hidden_rows(data: Path, submission: Path) -> Sample:
    rows = score_submission(data, submission)
    measure = Measure("hidden rows: F1", rows.recordings, "soundscapes", all_nocall=rows.all_nocall)
    return Sample(measure, rows.f1)


def _score_recordings(heard: HeldOutPredictions, data: TrainingData) -> dict[str, Sample]:
    """Score the recordings of the folds that were held out, each by its own fold's member."""
    scores, _ = heard.out_of_fold_for(heard.experiments)
    known = ~np.isnan(scores).any(axis=1)
    scores, recordings = scores[known], data.recordings[known]
    clusters = tuple(recordist_clusters(recordings))
    targets = make_targets(recordings, data.classes, None)
    primary = [data.classes.index(code) for code in recordings["ebird_code"]]
    is_right = (scores.argmax(axis=1) == primary).astype(float)
    ap = Measure(
        title="recordings: macro AP",
        clusters=clusters,
        cluster_kind="recordists",
        truth=targets > 0,
        known=targets != IGNORE_TARGET,
    )
    top1 = Measure("recordings: top-1", clusters, "recordists")
    return {"oof_ap": Sample(ap, scores), "oof_top1": Sample(top1, is_right)}


def _gather(
    samples: Sequence[tuple[str, Mapping[str, Sample]]],
) -> tuple[dict[str, Measure], dict[str, dict[str, list[np.ndarray]]]]:
    measures: dict[str, Measure] = {}
    values: dict[str, dict[str, list[np.ndarray]]] = {}
    for name, scored in samples:
        for key, sample in scored.items():
            measures.setdefault(key, sample.measure)
            values.setdefault(key, {}).setdefault(name, []).append(sample.values)
    return measures, values


def _row(runs: Sequence[Run], scored: Mapping[str, Sample]) -> dict[str, float]:
    """Return the scores of one experiment and seed, and how its training went."""
    logs = [read_log(run.folder / LOG_FILE) for run in runs]
    everything = summarize_log([entry for log in logs for entry in log])
    scores = {key: sample.measure.score(sample.values) for key, sample in scored.items()}
    return {"train_seed": runs[0].experiment.train.seed} | scores | {
        "epochs": len(logs[0]),
        "clips_per_second": everything["clips_per_second"],
        "train_minutes": everything["minutes"],
        "loss_last_fifth": float(np.mean([_last_fifths(log)[1] for log in logs])),
        "loss_change_last_fifth": float(np.mean([loss_change_last_fifth(log) for log in logs])),
    }  # fmt: skip


def loss_change_last_fifth(log: Sequence[EpochLog]) -> float:
    """Return the relative change of the training loss from the last but one fifth to the last.

    Near 0 a run has converged, as far as its schedule lets it; clearly below it could have gone on.
    NaN where a run has a single epoch.
    """
    before, last = _last_fifths(log)
    return last / before - 1


def _last_fifths(log: Sequence[EpochLog]) -> tuple[float, float]:
    losses = [entry.loss for entry in log]
    n_epochs = max(1, round(len(losses) / 5))
    before = losses[-2 * n_epochs : -n_epochs]
    return float(np.mean(before)) if before else float("nan"), float(np.mean(losses[-n_epochs:]))
