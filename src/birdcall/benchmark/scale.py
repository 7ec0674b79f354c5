"""Estimate the time for large amounts of audio, and measure a large evaluation."""

from __future__ import annotations

import heapq
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from birdcall.benchmark.frontend import peak_megabytes
from birdcall.config import SEGMENT_SECONDS, require
from birdcall.demo.writer import write_annotations
from birdcall.evaluation import tables
from birdcall.evaluation.decision_search import search_decision
from birdcall.evaluation.ensemble_decision import share_weights
from birdcall.evaluation.labelled import read_truth, segment_table
from birdcall.evaluation.predictions import LabelledPredictions, PredictionCache
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision
from birdcall.inference.ensemble import Member, load_ensemble
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import SINGLE_SEGMENT
from birdcall.models.checkpoint import Checkpoint, find_checkpoints, save_checkpoint
from birdcall.models.sed import build_model
from birdcall.storage.files import read_table, write_atomically
from birdcall.taxonomy import all_species, known_species

# --- scale ----------------------------------------------------------------------------------------

_DAY_SECONDS = 24 * 3600
_HIDDEN_HOURS = 25.0  # 150 soundscapes of ten minutes
_LIMIT_SECONDS = 2 * 3600.0
_MP3_MEGABYTES_PER_HOUR = 28.8  # 64 kbit/s
_ROW_BYTES = 20.0  # of a detection in a Parquet shard: `predict` on the demo, 607 detections
BUSY_SHARE = 0.9  # of a core's time; the rest is waiting and Python


@dataclass(frozen=True)
class InferenceCosts:
    """Seconds of a core for an hour of audio; network: of one member."""

    reading: float
    front_end: float
    network: float

    @classmethod
    def read(cls, path: Path) -> InferenceCosts:
        """Read the costs of the largest ensemble in an ``inference.csv``."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such measurement; `birdcall benchmark inference` writes it"
            )
        columns = ["members", "reading_seconds", "front_end_seconds", "networks_seconds"]
        table = read_table(path, columns)[columns].astype(float)
        n_members, reading, front_end, networks = table.loc[table["members"].idxmax()]
        return cls(reading, front_end, networks / n_members)


@dataclass(frozen=True)
class Machine:
    """Cores, and GPUs that run one network at so many times real time.

    Without a GPU the cores run the networks too.
    """

    name: str
    cores: int
    gpus: int = 0
    gpu_x_real_time: float = 0.0

    def seconds_per_hour(self, costs: InferenceCosts, n_members: int) -> float:
        """Return how long an hour of audio takes, all of the machine working side by side."""
        reading = costs.reading
        networks = costs.front_end + n_members * costs.network
        if not self.gpus:
            return (reading + networks) / (self.cores * BUSY_SHARE)
        on_gpus = 3600 * n_members / (self.gpu_x_real_time * self.gpus)
        # Half of the cores read (see `inference.engine`): the slower of the two decides.
        return max(reading / (max(1, self.cores // 2) * BUSY_SHARE), on_gpus)


# A T4 has 8.1 TFLOP/s in float32, an H100 51; there five networks took 0.2 s each for an hour of
# audio, most of it for starting small kernels. The estimate takes a tenth of that speed.
MACHINES = (
    Machine("two cores", 2),
    Machine("Kaggle: T4 x2, four cores", 4, 2, 1_800.0),
    Machine("16 cores", 16),
)


@dataclass(frozen=True)
class Archive:
    """An archive of recordings and the workers that predict it.

    failures_per_day: of each worker. restart_seconds: until a lost worker is replaced. task_hours:
    of audio in a task, which is lost with its worker.
    """

    hours: float = 1e6
    n_workers: int = 200
    task_hours: float = 16 / 6  # 16 recordings of ten minutes
    failures_per_day: float = 1.0
    restart_seconds: float = 300.0
    detections_per_hour: float = 670.0  # as in the demo

    def __post_init__(self) -> None:
        for name in ("hours", "n_workers", "task_hours"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; give above 0")
        for name in ("failures_per_day", "restart_seconds", "detections_per_hour"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more")

    def simulate(self, seconds_per_hour: float, seed: int = 0) -> dict[str, float | int]:
        """Predict the archive task by task on workers that are lost at random.

        A worker is lost after an exponentially distributed time; its task goes to the next free
        worker. Returns the time, the losses and the sizes of the results.
        """
        generator = np.random.default_rng(seed)
        n_tasks = int(np.ceil(self.hours / self.task_hours))
        task_seconds = self.task_hours * seconds_per_hour
        failures = self.failures_per_day
        mean_lifetime = _DAY_SECONDS / failures if failures else np.inf
        # When each worker is free, and its number; when it is lost.
        free = [(0.0, number) for number in range(self.n_workers)]
        heapq.heapify(free)
        lost_at = [generator.exponential(mean_lifetime) for _ in range(self.n_workers)]
        left, n_lost, wasted, end = n_tasks, 0, 0.0, 0.0
        while left:
            now, worker = heapq.heappop(free)
            done = now + task_seconds
            if done <= lost_at[worker]:
                left -= 1
                end = max(end, done)
                heapq.heappush(free, (done, worker))
                continue
            n_lost += 1
            wasted += max(0.0, lost_at[worker] - now)
            back = lost_at[worker] + self.restart_seconds
            lost_at[worker] = back + generator.exponential(mean_lifetime)
            heapq.heappush(free, (back, worker))
        ideal = n_tasks * task_seconds / self.n_workers
        shard_bytes = self.hours * self.detections_per_hour * _ROW_BYTES
        return {
            "hours": self.hours,
            "workers": self.n_workers,
            "tasks": n_tasks,
            "task_minutes": round(task_seconds / 60, 2),
            "days": round(end / _DAY_SECONDS, 2),
            "lost_workers": n_lost,
            "work_done_again": round(wasted / (n_tasks * task_seconds), 5),
            "longer_than_without_failures": round(end / ideal - 1, 4),
            "audio_terabytes": round(self.hours * _MP3_MEGABYTES_PER_HOUR / 1e6, 1),
            "shards_gigabytes": round(shard_bytes / 1e9, 1),
        }


def benchmark_scale(
    folder: Path, archive: Archive, n_members: int = 5
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Estimate the hidden test set on known machines, and an archive on workers of two cores each.

    Reads ``inference.csv`` in ``folder``; writes ``scale_hidden.csv`` (seconds, and the share of
    the two hours that Kaggle allows) and ``scale_archive.csv``; returns both tables.
    """
    costs = InferenceCosts.read(folder / "inference.csv")
    rows = []
    for machine in MACHINES:
        for count in (1, 5, 13):
            seconds = _HIDDEN_HOURS * machine.seconds_per_hour(costs, count)
            rows.append(
                {
                    "machine": machine.name,
                    "members": count,
                    "x_real_time": round(3600 * _HIDDEN_HOURS / seconds),
                    "seconds": round(seconds),
                    "share_of_two_hours": round(seconds / _LIMIT_SECONDS, 3),
                }
            )
    hidden = pd.DataFrame(rows)
    seconds_per_hour = MACHINES[0].seconds_per_hour(costs, n_members)
    archive_table = pd.DataFrame([archive.simulate(seconds_per_hour)])
    write_atomically(folder / "scale_hidden.csv", hidden.to_csv(index=False))
    write_atomically(folder / "scale_archive.csv", archive_table.to_csv(index=False))
    return hidden, archive_table


# --- evaluation -----------------------------------------------------------------------------------

_NOCALL_SHARE = 0.54
_SPECIES_SHARES = (0.7, 0.25, 0.05)  # of the rows with birds: those of one, two and three species
_EXPERIMENT = find_experiment("small_plain")  # any: the predictions are random
_SIZE_FILE = "size.json"
_CACHE_NAMES = ("soundscapes", "random")  # of the recordings, and of where their audio comes from
_RESULT_FILE = "evaluation.json"


@dataclass(frozen=True)
class _EvaluationSize:
    """How much is evaluated; segments are those of each soundscape."""

    n_soundscapes: int
    n_segments: int
    n_classes: int
    n_members: int


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
    size = _EvaluationSize(n_soundscapes, int(seconds // SEGMENT_SECONDS), n_classes, n_members)
    n_species = len(all_species())
    require(n_classes <= n_species, f"n_classes is {n_classes}; there are {n_species} species")
    stored = folder / "stored"
    shutil.rmtree(stored, ignore_errors=True)
    _store_predictions(stored, size)
    start = time.perf_counter()
    code = f"import sys; from {__name__} import _evaluate_stored; _evaluate_stored(sys.argv[1])"
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


def benchmark_labels(
    folder: Path, n_annotations: int = 100_000, n_recordings: int = 300, hours: float = 300.0
) -> pd.DataFrame:
    """Time reading the annotations of soundscapes, and matching them to segments.

    Columns: annotations, recordings, hours, rows (that are scored), seconds, peak_gigabytes.
    """
    write_annotations(folder, n_annotations, n_recordings, hours)
    start = time.perf_counter()
    n_rows = len(read_truth([folder], known_species([])).rows)
    row = {"annotations": n_annotations, "recordings": n_recordings, "hours": hours, "rows": n_rows}
    row |= {"seconds": round(time.perf_counter() - start, 2)}
    return pd.DataFrame([row | {"peak_gigabytes": round(peak_megabytes() / 1000, 2)}])


def random_truth(n_rows: int, n_classes: int) -> np.ndarray:
    """Return truth ``(rows, classes)``: species of unequal frequency, 54 % of the rows empty."""
    generator = np.random.default_rng(0)
    prior = generator.pareto(1.0, n_classes) + 0.1
    truth = np.zeros((n_rows, n_classes), dtype=bool)
    for row in np.flatnonzero(generator.random(n_rows) >= _NOCALL_SHARE):
        n_birds = 1 + min(generator.choice(3, p=_SPECIES_SHARES), n_classes - 1)
        birds = generator.choice(
            n_classes, n_birds, replace=False, p=prior / prior.sum(), shuffle=False
        )
        truth[row, birds] = True
    return truth


def _store_predictions(folder: Path, size: _EvaluationSize) -> None:
    """Write checkpoints, and random predictions of them for all soundscapes into the cache."""
    classes = tuple(species.ebird_code for species in all_species()[: size.n_classes])
    names = [f"soundscape{number:04d}" for number in range(size.n_soundscapes)]
    truth = random_truth(size.n_soundscapes * size.n_segments, size.n_classes)
    cache = PredictionCache(folder / "predictions", *_CACHE_NAMES)
    generator = np.random.default_rng(1)
    # What all members have in common: the birds more or less, and some confusions.
    common = generator.normal(-6, 1.2, truth.shape).astype(np.float32)
    common[truth] += generator.normal(6, 2.5, truth.sum())
    confused = generator.random(len(truth)) < 0.15
    common[confused, generator.integers(size.n_classes, size=confused.sum())] += 5
    for number in range(size.n_members):
        torch.manual_seed(number)
        model = build_model(_EXPERIMENT, len(classes)).eval()
        checkpoint = Checkpoint(_EXPERIMENT, classes, number)
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
        by_name = dict(zip(names, predictions.split(), strict=True))
        cache.write(Member(saved.name, model, saved), SINGLE_SEGMENT, by_name)
    write_atomically(folder / _SIZE_FILE, json.dumps({"size": vars(size), "names": names}))


def _evaluate_stored(folder: str) -> None:
    """Evaluate the predictions in ``folder``; write scores and this process's peak memory there."""
    stored = Path(folder)
    values = json.loads((stored / _SIZE_FILE).read_text(encoding="utf-8"))
    size, names = _EvaluationSize(**values["size"]), values["names"]
    ensemble = load_ensemble(find_checkpoints(stored / "runs"))

    def not_stored(rates: object) -> dict[int, np.ndarray]:
        raise RuntimeError(f"{stored}: the cache does not hold the predictions")

    sources = dict.fromkeys(names, not_stored)
    cache = PredictionCache(stored / "predictions", *_CACHE_NAMES)
    predictions = cache.predict(ensemble, sources)
    n_segments = size.n_segments  # each soundscape is a group
    segments = [segment_table(name, n_segments, is_labelled=True, group=name) for name in names]
    labelled = LabelledPredictions(
        segments=pd.concat(segments, ignore_index=True),
        truth=random_truth(size.n_soundscapes * size.n_segments, size.n_classes),
        predictions=SegmentPredictions.concatenate(list(predictions.values())),
        member_names=tuple(member.name for member in ensemble.members),
        classes=ensemble.classes,
    )
    weights = share_weights(labelled.labelled_truth, _NOCALL_SHARE)
    rows, scores = [], {}
    subsets = {f"member {number}": [number] for number in range(size.n_members)}
    for name, positions in {**subsets, tables.ENSEMBLE: range(size.n_members)}.items():
        subset = labelled.for_members(list(positions))
        search = search_decision(subset, weights, start=Decision(classes=labelled.classes))
        subject = tables.ScoreSubject(name, len(subset.member_names), tables.SIMULATED)
        rows += tables.decided_rows(subject, subset, search.cross_validated, weights)
        rows += tables.ranked_rows(subject, subset, np.ones(size.n_classes, bool))
        scores[name] = float(np.average(search.cross_validated_f1, weights=weights))
    kept = {tables.ENSEMBLE: scores[tables.ENSEMBLE], "member_0": scores["member 0"]}
    result = {
        "peak_gigabytes": peak_megabytes() / 1000,
        "scores": {"all_nocall": _NOCALL_SHARE} | kept,
        "table": tables.wide_table(pd.DataFrame(rows)).to_string(index=False),
    }
    write_atomically(stored / _RESULT_FILE, json.dumps(result))
