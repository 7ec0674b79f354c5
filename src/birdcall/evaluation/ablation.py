"""Ablate: train and score experiments on the same folds and seeds within a time budget."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.config import FULL, Experiment, require
from birdcall.data.dataset import TrainingData
from birdcall.evaluation.comparison import (
    Measure,
    compare_all,
    measure_held_out,
    rank_agreement,
    score_submission,
)
from birdcall.evaluation.ensemble_decision import decide_ensemble
from birdcall.evaluation.predict import HeldOutOptions, predict_held_out
from birdcall.kaggle.submission import LoadedPackage, predict_test_set
from birdcall.kaggle.test_set import CompetitionFile
from birdcall.models.checkpoint import SETTINGS_FILE
from birdcall.storage.files import write_atomically
from birdcall.storage.store import Journal
from birdcall.training.log import read_log, summarize_log
from birdcall.training.runs import train_many
from birdcall.training.step import EpochLog
from birdcall.training.trainer import Run, RunOptions

logger = logging.getLogger(__name__)

_JOURNAL_FILE = "ablation.jsonl"
_PREDICTIONS_FOLDER = "predictions"  # of all seeds


@dataclass(frozen=True)
class AblationOptions:
    """How experiments are trained and compared.

    folds: held-out folds that are trained (None: all). n_seeds: of each experiment and fold.
    budget_seconds: for training and scoring of all. reference: the experiment that the others are
    compared with (None: the first). training: of all runs, which are always resumed. evaluation: of
    all runs; its ``cache_folder`` is not used, an ablation has one of its own.
    """

    budget_seconds: float
    n_seeds: int = 3
    folds: tuple[int, ...] | None = None
    reference: str | None = None
    training: RunOptions = RunOptions()
    evaluation: HeldOutOptions = field(default_factory=HeldOutOptions)

    def __post_init__(self) -> None:
        require(self.n_seeds >= 1, f"n_seeds is {self.n_seeds}; give at least 1")
        require(
            self.budget_seconds > 0,
            f"the budget is {self.budget_seconds:g} seconds; give more than 0",
        )


@dataclass(frozen=True)
class Ablation:
    """The results of an ablation and its conditions.

    options: with folds and reference filled in. measures: by column of the table. table: a row per
    experiment and seed. means, differences: see `comparison.compare_all`. agreement: see
    `comparison.rank_agreement`. block_seconds: training and scoring, by seed. left_out: seeds that
    did not fit into the budget.
    """

    data: TrainingData
    experiments: tuple[Experiment, ...]
    options: AblationOptions
    measures: Mapping[str, Measure]
    table: pd.DataFrame
    means: pd.DataFrame
    differences: pd.DataFrame
    agreement: pd.DataFrame | None
    block_seconds: Mapping[int, float]
    left_out: tuple[int, ...]

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
    experiments: Sequence[Experiment], data: TrainingData, folder: Path, options: AblationOptions
) -> Ablation:
    """Train and score experiments with several seeds on the same folds.

    A block is all runs of one seed: ``folder/<experiment>/seed<s>/fold<k>``, trained with the
    seed of its experiment + s. A comparison needs complete blocks: a block that would not fit into
    the rest of the budget, if it takes as long as the last one, is left out. A second call with the
    same folder resumes; the time already spent counts. Raises ValueError for experiments or folds
    that cannot be compared, or where the folder holds another ablation.
    """
    options = _complete(options, experiments, data)
    names = [experiment.name for experiment in experiments]
    rows, left_out = [], []
    measures: dict[str, Measure] = {}
    values: dict[str, dict[str, list[np.ndarray]]] = {}
    with Journal(folder / _JOURNAL_FILE, "ablation") as journal:
        times = _BlockTimes(journal, {"experiments": names, "folds": list(options.folds)})
        for seed in range(options.n_seeds):
            if not times.has_room(seed, options.budget_seconds):
                left_out.append(seed)
                continue
            runs_of = {}
            for experiment in experiments:
                train = replace(experiment.train, seed=experiment.train.seed + seed)
                target = folder / experiment.name / f"seed{seed}"
                runs_of[experiment.name] = [
                    Run(replace(experiment, train=train), fold, target / f"fold{fold}")
                    for fold in options.folds
                ]
            runs = [run for group in runs_of.values() for run in group]
            logger.info("seed %d of %d: %d runs", seed, options.n_seeds, len(runs))
            with times.measure(seed, runs):
                train_many(runs, data, replace(options.training, resume=True))
                stored = replace(options.evaluation, cache_folder=folder / _PREDICTIONS_FOLDER)
                for name, scored in score_block(runs_of, data, stored).items():
                    rows.append(
                        {"experiment": name, "seed": seed} | _table_row(runs_of[name], scored)
                    )
                    for key, (measure, of_seed) in scored.items():
                        measures.setdefault(key, measure)
                        values.setdefault(key, {}).setdefault(name, []).append(of_seed)
        block_seconds = dict(times.seconds)
    table = pd.DataFrame(rows)
    means, differences = compare_all(measures, values, options.reference)
    return Ablation(
        data=data,
        experiments=tuple(experiments),
        options=options,
        measures=measures,
        table=table,
        means=means,
        differences=differences,
        agreement=rank_agreement(table, list(measures)),
        block_seconds=block_seconds,
        left_out=tuple(left_out),
    )


def _complete(
    options: AblationOptions, experiments: Sequence[Experiment], data: TrainingData
) -> AblationOptions:
    """Return options with folds and reference; refuse experiments that cannot be compared."""
    names = [experiment.name for experiment in experiments]
    folds = data.folds if options.folds is None else options.folds
    for kind, given in (("experiment", names), ("fold", folds)):
        require(len(given) > 0, f"an ablation needs at least one {kind}")
        repeated = [str(value) for value, count in Counter(given).items() if count > 1]
        require(not repeated, f"{kind} {', '.join(repeated)} is given twice")
    for fold in folds:
        if fold == FULL:
            raise ValueError("an ablation scores what runs hold out: give it folds, not full")
        data.split(fold)  # raises for a fold that does not exist
    reference = names[0] if options.reference is None else options.reference
    require(
        reference in names,
        f"reference {reference!r} is none of the experiments: {', '.join(names)}",
    )
    return replace(options, folds=tuple(folds), reference=reference)


# --- time ---------------------------------------------------------------------------------------


class _BlockTimes:
    """The time that each block took so far, in a journal: an ablation resumes with it.

    seconds: by seed. complete: seeds whose block is trained and scored. conditions: experiments and
    folds. Raises ValueError where the journal is damaged or of other experiments or folds.
    """

    def __init__(self, journal: Journal, conditions: dict[str, list]) -> None:
        self.seconds: dict[int, float] = {}
        self.complete: set[int] = set()
        self._journal = journal
        path = journal.path
        if journal.find({"item": "conditions"}) is None:
            journal.add({"item": "conditions"}, conditions)
        for key, value in journal.items():
            try:
                if "seed" in key:
                    self.seconds[key["seed"]] = float(value["seconds"])
                    if value["is_complete"]:
                        self.complete.add(key["seed"])
                    continue
                stored = {name: list(value[name]) for name in conditions}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: not a readable ablation: {error!r}") from error
            for name, values in conditions.items():
                if sorted(stored[name]) != sorted(values):
                    raise ValueError(
                        f"{path} is of {name} {', '.join(map(str, stored[name]))}, not "
                        f"{', '.join(map(str, values))}; give another folder to another ablation"
                    )

    def has_room(self, seed: int, budget_seconds: float) -> bool:
        """Return whether a block fits the budget, if it takes as long as the last complete one.

        A complete block needs no time, and the first block is always trained.
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
    def measure(self, seed: int, runs: Sequence[Run]) -> Iterator[None]:
        """Add the time spent inside to the block's time, also where it ends by an error.

        Nothing is added for a complete block, which is only scored again.
        """
        is_trained = all((run.folder / SETTINGS_FILE).exists() for run in runs)
        if seed in self.complete and is_trained:
            yield
            return
        self.complete.discard(seed)
        start, before = time.monotonic(), self.seconds.get(seed, 0.0)
        try:
            yield
            self.complete.add(seed)
        finally:
            self.seconds[seed] = before + time.monotonic() - start
            value = {
                "seconds": round(self.seconds[seed], 2),
                "is_complete": seed in self.complete,
            }
            self._journal.add({"seed": seed}, value)


# --- scores -------------------------------------------------------------------------------------


def score_block(
    runs_of: Mapping[str, Sequence[Run]], data: TrainingData, options: HeldOutOptions
) -> dict[str, dict[str, tuple[Measure, np.ndarray]]]:
    """Score the runs of each experiment, of one seed, on all audio that they did not train on.

    Returns the measures of each experiment: see `measure_held_out`. All runs predict together: a
    soundscape is simulated, and read, once. The decision of an experiment is searched on simulated
    soundscapes; labelled and hidden ones are predicted by all of its runs and decided by it.
    """
    folders = [run.folder for runs in runs_of.values() for run in runs]
    held_out = predict_held_out(folders, data, options)
    solution, audio = CompetitionFile.SOLUTION, CompetitionFile.TEST_AUDIO
    is_solved = (data.folder / solution).is_file() and (data.folder / audio).is_dir()
    measured = {}
    for name, runs in runs_of.items():
        decided = decide_ensemble(held_out, (name,))
        score = None
        if is_solved:
            submission = runs[0].folder.parent / "submission.csv"
            package = LoadedPackage(held_out.ensemble_of((name,)), decided.decision)
            predict_test_set(data.folder, submission, lambda package=package: package)
            score = score_submission(data.folder, submission)
        measured[name] = measure_held_out(held_out, decided, score)
    return measured


def _table_row(
    runs: Sequence[Run], measured: Mapping[str, tuple[Measure, np.ndarray]]
) -> dict[str, float]:
    """Return the scores of one experiment and seed, and how its training went."""
    logs = [read_log(run.folder) for run in runs]
    summary = summarize_log([entry for log in logs for entry in log])
    scores = {key: measure.score(values) for key, (measure, values) in measured.items()}
    losses, changes = zip(*map(loss_of_last_fifth, logs), strict=True)
    return {"train_seed": runs[0].experiment.train.seed} | scores | {
        "epochs": len(logs[0]),
        "clips_per_second": summary["clips_per_second"],
        "train_minutes": summary["minutes"],
        "loss_last_fifth": float(np.mean(losses)),
        "loss_change_last_fifth": float(np.mean(changes)),
    }  # fmt: skip


def loss_of_last_fifth(log: Sequence[EpochLog]) -> tuple[float, float]:
    """Return the training loss of the last fifth, and its change relative to the fifth before.

    With a change near 0 a run has converged, as far as its schedule allows; clearly below 0 more
    epochs could lower the loss. The change of a run of a single epoch is NaN.
    """
    losses = [entry.loss for entry in log]
    n_epochs = max(1, round(len(losses) / 5))
    last, before = float(np.mean(losses[-n_epochs:])), losses[-2 * n_epochs : -n_epochs]
    return last, last / float(np.mean(before)) - 1 if before else float("nan")
