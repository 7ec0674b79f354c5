"""Time training steps against batches in memory, and an evaluation of stored predictions."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from birdcall.benchmark.frontend import peak_megabytes
from birdcall.config import NO_AUGMENT, SEGMENT_SECONDS, Experiment, replace_nested, require
from birdcall.data.dataset import TrainingData
from birdcall.data.loader import ClipBatch
from birdcall.evaluation.decision_search import search_decision
from birdcall.evaluation.labelled import segment_table
from birdcall.evaluation.predictions import (
    LabelledPredictions,
    PredictionCache,
    predict_cached,
)
from birdcall.evaluation.tables import (
    ENSEMBLE,
    SIMULATED,
    Rows,
    ScoreSubject,
    decided_rows,
    ranked_rows,
    share_weights,
    tidy_table,
    wide_table,
)
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision
from birdcall.inference.ensemble import Member, load_ensemble
from birdcall.inference.predictions import SegmentPredictions, concatenate
from birdcall.inference.windows import SINGLE_SEGMENT
from birdcall.models.checkpoint import Checkpoint, find_checkpoints, save_checkpoint
from birdcall.models.sed import build_model
from birdcall.storage.files import write_atomically
from birdcall.taxonomy import all_species
from birdcall.training.trainer import Run, RunOptions, Training, start_training

logger = logging.getLogger(__name__)

_STORED_BATCHES = 8  # of different clips, so that no step repeats the one before
_WARM_UP_STEPS = 4  # before each timing: batches that wait in a queue must not count as speed


# --- training -------------------------------------------------------------------------------------


def benchmark_training(
    data: TrainingData, experiment: Experiment, folder: Path, *, n_steps: int = 40, repeats: int = 5
) -> pd.DataFrame:
    """Time steps of ``experiment`` with and without loading and augmentation; write training.csv.

    Two settings: one process on one core (as each run of `make demo`), and a process with loader
    workers on all cores. Both trainings take turns of ``n_steps``, so that a slow minute of the
    machine slows both. Columns: clips per second of each (medians), their ratio (median, lowest,
    highest of the turns), and the share of time in which the augmented training waits for clips.
    """
    n_cores = torch.get_num_threads()
    rows = []
    try:
        for setting, threads, workers in (
            ("a run on each core", 1, 0),
            ("a run on all cores", n_cores, max(1, n_cores - 1)),
        ):
            torch.set_num_threads(threads)
            n_clips = (_WARM_UP_STEPS + n_steps) * (repeats + 1) * experiment.train.data.batch_size
            endless = replace_nested(
                experiment, train={"epochs": 1, "data": {"clips_per_epoch": n_clips}}
            )
            augmented = _start(endless, data, folder, workers)
            stored = _start(replace(endless, augment=NO_AUGMENT), data, folder, 0)
            stored.loader = _StoredBatches(stored.loader)
            row = {"setting": setting, "threads": threads, "workers": workers}
            rows.append(row | _compare(augmented, stored, n_steps, repeats))
    finally:
        torch.set_num_threads(n_cores)
    table = pd.DataFrame(rows)
    write_atomically(folder / "training.csv", table.to_csv(index=False))
    return table


class _StoredBatches:
    """Stands in for a DataLoader: repeats a few batches that are in memory."""

    def __init__(self, loader: torch.utils.data.DataLoader[ClipBatch]) -> None:
        self.sampler, self.dataset = loader.sampler, loader.dataset
        self.sampler.set_epoch(0)
        self.batches = [batch for batch, _ in zip(loader, range(_STORED_BATCHES), strict=False)]

    def __iter__(self) -> Iterator[ClipBatch]:
        while True:
            yield from self.batches


def _start(experiment: Experiment, data: TrainingData, folder: Path, workers: int) -> Training:
    train_part, _ = data.split(data.folds[0])
    run = Run(experiment, data.folds[0], folder)
    return start_training(run, data, train_part, RunOptions(workers=workers))


def _compare(augmented: Training, stored: Training, n_steps: int, repeats: int) -> dict[str, float]:
    trainings = [(training, training.steps()) for training in (augmented, stored)]
    speeds: list[list[float]] = []
    waiting = []
    for turn in range(repeats + 1):
        speeds.append([_clips_per_second(*training, n_steps) for training in trainings])
        waiting.append(augmented.progress.waiting / augmented.progress.seconds)
        logger.info("turn %d of %d done", turn, repeats)
    augmented_speed, stored_speed = np.array(speeds[1:]).T  # the first turn is the warm-up
    ratio = augmented_speed / stored_speed
    return {
        "augmented_clips_per_second": round(float(np.median(augmented_speed)), 1),
        "ready_clips_per_second": round(float(np.median(stored_speed)), 1),
        "ratio": round(float(np.median(ratio)), 3),
        "ratio_low": round(float(ratio.min()), 3),
        "ratio_high": round(float(ratio.max()), 3),
        "waiting_share": round(float(np.median(waiting[1:])), 3),
    }


def _clips_per_second(training: Training, steps: Iterator[None], n_steps: int) -> float:
    """Time ``n_steps`` steps after the warm-up."""
    for _ in range(_WARM_UP_STEPS):
        next(steps)
    progress = training.progress
    progress.seconds = progress.waiting = 0.0
    before = progress.n_clips
    start = time.perf_counter()
    for _ in range(n_steps):
        next(steps)
    return (progress.n_clips - before) / (time.perf_counter() - start)


# --- evaluation -----------------------------------------------------------------------------------

_NOCALL_SHARE = 0.54
_SPECIES_SHARES = (0.7, 0.25, 0.05)  # of the rows with birds: those of one, two and three species
_EXPERIMENT = "small_plain"  # the network does not matter: its predictions are random
_SIZE_FILE = "size.json"
_RESULT_FILE = "evaluation.json"


@dataclass(frozen=True)
class EvaluationSize:
    """How much is evaluated; segments are those of each soundscape."""

    n_soundscapes: int
    n_segments: int
    n_classes: int
    n_members: int

    @property
    def names(self) -> list[str]:
        return [f"soundscape{number:04d}" for number in range(self.n_soundscapes)]


def benchmark_evaluation(
    folder: Path,
    n_soundscapes: int = 150,
    seconds: float = 600.0,
    n_classes: int = 264,
    n_members: int = 5,
) -> pd.DataFrame:
    """Store random predictions of members and evaluate them in a new process; return its costs.

    The process reads the predictions as `birdcall evaluate` does, searches the decision of each
    member and of the ensemble (cross-validated over groups of soundscapes) and makes the table.
    Columns: rows, members, classes, seconds (with the start of Python), peak_gigabytes (of
    memory), and the scores, which show that the search had a choice.
    """
    size = EvaluationSize(n_soundscapes, int(seconds // SEGMENT_SECONDS), n_classes, n_members)
    n_species = len(all_species())
    require(n_classes <= n_species, f"n_classes is {n_classes}; there are {n_species} species")
    stored = folder / "stored"
    shutil.rmtree(stored, ignore_errors=True)
    _store_predictions(stored, size)
    start = time.perf_counter()
    code = f"import sys; from {__name__} import evaluate_stored; evaluate_stored(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(stored)], check=True)
    wall_seconds = time.perf_counter() - start
    result = json.loads((stored / _RESULT_FILE).read_text(encoding="utf-8"))
    row = {
        "soundscapes": n_soundscapes,
        "rows": n_soundscapes * size.n_segments,
        "classes": n_classes,
        "members": n_members,
        "seconds": round(wall_seconds, 1),
        "peak_gigabytes": round(result["peak_gigabytes"], 2),
        **{name: round(value, 3) for name, value in result["scores"].items()},
    }
    return pd.DataFrame([row])


def random_truth(size: EvaluationSize) -> np.ndarray:
    """Return truth ``(rows, classes)``: species of unequal frequency, 54 % of the rows empty."""
    generator = np.random.default_rng(0)
    n_rows = size.n_soundscapes * size.n_segments
    prior = generator.pareto(1.0, size.n_classes) + 0.1
    truth = np.zeros((n_rows, size.n_classes), dtype=bool)
    for row in np.flatnonzero(generator.random(n_rows) >= _NOCALL_SHARE):
        n_birds = 1 + generator.choice(len(_SPECIES_SHARES), p=_SPECIES_SHARES)
        n_birds = min(n_birds, size.n_classes)
        birds = generator.choice(
            size.n_classes, n_birds, replace=False, p=prior / prior.sum(), shuffle=False
        )
        truth[row, birds] = True
    return truth


def _store_predictions(folder: Path, size: EvaluationSize) -> None:
    """Write checkpoints, and random predictions of them for all soundscapes into the cache."""
    classes = tuple(species.ebird_code for species in all_species()[: size.n_classes])
    truth = random_truth(size)
    generator = np.random.default_rng(1)
    # What all members have in common: the birds more or less, and some confusions.
    common = generator.normal(-6, 1.2, truth.shape).astype(np.float32)
    common[truth] += generator.normal(6, 2.5, truth.sum())
    confused = generator.random(len(truth)) < 0.15
    common[confused, generator.integers(size.n_classes, size=confused.sum())] += 5
    for number in range(size.n_members):
        torch.manual_seed(number)
        experiment = find_experiment(_EXPERIMENT)
        model = build_model(experiment, len(classes)).eval()
        checkpoint = Checkpoint(experiment, classes, number)
        saved = save_checkpoint(folder / "runs" / f"fold{number}", model, checkpoint)
        logits = common + generator.normal(0, 0.8, truth.shape).astype(np.float32)
        clipwise = 1 / (1 + np.exp(-logits))
        framewise = 1 / (1 + np.exp(-(logits + generator.normal(0.7, 0.4, truth.shape))))
        predictions = SegmentPredictions(
            clipwise[None],
            framewise[None].astype(np.float32),
            starts=tuple(range(0, len(truth), size.n_segments)),
            recording_seconds=(float(SEGMENT_SECONDS * size.n_segments),) * size.n_soundscapes,
        )
        by_name = dict(zip(size.names, predictions.split(), strict=True))
        _cache(folder).write(Member(saved.name, model, saved), SINGLE_SEGMENT, by_name)
    write_atomically(folder / _SIZE_FILE, json.dumps(vars(size)))


def _cache(folder: Path) -> PredictionCache:
    return PredictionCache(folder / "predictions", "soundscapes", "random")


def evaluate_stored(folder: str) -> None:
    """Evaluate what ``folder`` holds, in this process; write scores and peak memory there."""
    stored = Path(folder)
    size = EvaluationSize(**json.loads((stored / _SIZE_FILE).read_text(encoding="utf-8")))
    labelled = _read_labelled(stored, size)
    weights = share_weights(labelled.labelled_truth, _NOCALL_SHARE)
    rows: Rows = []
    scores = {}
    subsets = {f"member {number}": [number] for number in range(size.n_members)}
    for name, positions in {**subsets, ENSEMBLE: range(size.n_members)}.items():
        subset = labelled.for_members(list(positions))
        search = search_decision(subset, weights, start=Decision(classes=labelled.classes))
        subject = ScoreSubject(name, len(subset.member_names), SIMULATED)
        rows += decided_rows(subject, subset, search.cross_validated, weights)
        rows += ranked_rows(subject, subset)
        scores[name] = float(np.average(search.cross_validated_f1, weights=weights))
    result = {
        "peak_gigabytes": peak_megabytes() / 1000,
        "scores": {
            "all_nocall": _NOCALL_SHARE,
            "member_0": scores["member 0"],
            ENSEMBLE: scores[ENSEMBLE],
        },
        "table": wide_table(tidy_table(rows)).to_string(index=False),
    }
    write_atomically(stored / _RESULT_FILE, json.dumps(result))


def _read_labelled(folder: Path, size: EvaluationSize) -> LabelledPredictions:
    """Read the members' predictions; each soundscape is a group of its own."""

    def not_stored(rates: object) -> dict[int, np.ndarray]:
        raise RuntimeError(f"{folder}: the cache does not hold the predictions")

    ensemble = load_ensemble(find_checkpoints(folder / "runs"))
    sources = dict.fromkeys(size.names, not_stored)
    predictions = predict_cached(ensemble, sources, _cache(folder))
    tables = [
        segment_table(name, size.n_segments, is_labelled=True, group=name) for name in size.names
    ]
    return LabelledPredictions(
        segments=pd.concat(tables, ignore_index=True),
        truth=random_truth(size),
        predictions=concatenate(list(predictions.values())),
        member_names=tuple(member.name for member in ensemble.members),
        classes=ensemble.classes,
    )
