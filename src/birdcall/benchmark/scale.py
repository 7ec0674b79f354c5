"""Reckon what large amounts of sound cost, from what `benchmark inference` has measured.

Time follows from seconds of a core for an hour of sound. Failures are simulated: workers that are
lost at random lose the task in hand, which another one does again.
"""

from __future__ import annotations

import heapq
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.config import require
from birdcall.files import read_table, write_atomically

logger = logging.getLogger(__name__)

HIDDEN_HOURS = 25.0  # 150 soundscapes of ten minutes
LIMIT_SECONDS = 2 * 3600.0
MP3_MEGABYTES_PER_HOUR = 28.8  # 64 kbit/s
ROW_BYTES = 20.0  # of a detection in a Parquet shard: `predict` on the demo, 607 of them
BUSY = 0.9  # of a core's time, beside what is counted: waiting, Python


@dataclass(frozen=True)
class Machine:
    """What hears: cores, and GPUs that hear so many times real time by one network each.

    Without a GPU the cores run the networks too.
    """

    name: str
    cores: int
    gpus: int = 0
    gpu_x_real_time: float = 0.0

    def seconds_per_hour(self, costs: Costs, n_members: int) -> float:
        """Return how long an hour of sound takes, all of the machine working side by side."""
        reading = costs.reading
        networks = costs.front_end + n_members * costs.network
        if not self.gpus:
            return (reading + networks) / (self.cores * BUSY)
        on_gpus = 3600 * n_members / (self.gpu_x_real_time * self.gpus)
        # Half of the cores read (`inference`): what takes longer decides.
        return max(reading / (max(1, self.cores // 2) * BUSY), on_gpus)


@dataclass(frozen=True)
class Costs:
    """Seconds of a core for an hour of sound; network: of one member."""

    reading: float
    front_end: float
    network: float


def read_costs(path: Path) -> Costs:
    """Read the costs from an ``inference.csv``, those of its largest ensemble."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such measurement; `birdcall benchmark inference`")
    columns = ["members", "reading_seconds", "front_end_seconds", "networks_seconds"]
    table = read_table(path, columns)[columns].astype(float)
    row = table.loc[table["members"].idxmax()]
    return Costs(
        row["reading_seconds"], row["front_end_seconds"], row["networks_seconds"] / row["members"]
    )


# A T4 has 8.1 TFLOP/s in float32, an H100 51; there five networks took 0.2 s each for an hour of
# sound, most of it spent on starting small kernels. A tenth of that speed is reckoned with.
MACHINES = (
    Machine("two cores", 2),
    Machine("Kaggle: T4 x2, four cores", 4, 2, 1_800.0),
    Machine("16 cores", 16),
)


def hidden_test_table(costs: Costs, members: tuple[int, ...] = (1, 5, 13)) -> pd.DataFrame:
    """Return what the hidden test set takes: seconds, and the share of the two hours."""
    rows = []
    for machine in MACHINES:
        for n_members in members:
            seconds = HIDDEN_HOURS * machine.seconds_per_hour(costs, n_members)
            rows.append(
                {
                    "machine": machine.name,
                    "members": n_members,
                    "x_real_time": round(3600 * HIDDEN_HOURS / seconds),
                    "seconds": round(seconds),
                    "share_of_two_hours": round(seconds / LIMIT_SECONDS, 3),
                }
            )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Archive:
    """An archive and who hears it.

    failures_per_day: of each worker. restart_seconds: until a lost worker is back, or another one
    is there. task_hours: of sound in a task, which is lost with its worker.
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


def simulate_archive(
    archive: Archive, seconds_per_hour: float, seed: int = 0
) -> dict[str, float | int]:
    """Hear an archive task by task on workers that are lost at random; return what that takes.

    A worker is lost after an exponentially distributed time; its task goes to the next free one.
    """
    generator = np.random.default_rng(seed)
    n_tasks = int(np.ceil(archive.hours / archive.task_hours))
    task_seconds = archive.task_hours * seconds_per_hour
    day = 86_400.0

    def lifetime() -> float:
        if not archive.failures_per_day:
            return np.inf
        return generator.exponential(day / archive.failures_per_day)

    # (when a worker is free, its number); when it is lost.
    free = [(0.0, number) for number in range(archive.n_workers)]
    heapq.heapify(free)
    lost_at = [lifetime() for _ in range(archive.n_workers)]
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
        back = lost_at[worker] + archive.restart_seconds
        lost_at[worker] = back + lifetime()
        heapq.heappush(free, (back, worker))
    ideal = n_tasks * task_seconds / archive.n_workers
    return {
        "hours": archive.hours,
        "workers": archive.n_workers,
        "tasks": n_tasks,
        "task_minutes": round(task_seconds / 60, 2),
        "days": round(end / day, 2),
        "lost_workers": n_lost,
        "work_done_again": round(wasted / (n_tasks * task_seconds), 5),
        "longer_than_without_failures": round(end / ideal - 1, 4),
        "sound_terabytes": round(archive.hours * MP3_MEGABYTES_PER_HOUR / 1e6, 1),
        "shards_gigabytes": round(archive.hours * archive.detections_per_hour * ROW_BYTES / 1e9, 1),
    }


def benchmark_scale(
    folder: Path, archive: Archive, n_members: int = 5
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the hidden test set on known machines, and an archive on workers of two cores each.

    Reads ``inference.csv`` in ``folder`` and writes ``scale_hidden.csv``, ``scale_archive.csv``.
    """
    costs = read_costs(folder / "inference.csv")
    hidden = hidden_test_table(costs)
    seconds = MACHINES[0].seconds_per_hour(costs, n_members)
    found = pd.DataFrame([simulate_archive(archive, seconds)])
    write_atomically(folder / "scale_hidden.csv", hidden.to_csv(index=False))
    write_atomically(folder / "scale_archive.csv", found.to_csv(index=False))
    return hidden, found
