"""Measure the memory of inference, and estimate the time of large amounts of audio."""

from __future__ import annotations

import heapq
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from birdcall.audio.reading import read_audio
from birdcall.benchmark.frontend import peak_megabytes
from birdcall.benchmark.inference import make_members, write_soundscapes
from birdcall.config import require
from birdcall.inference.decision import Decision
from birdcall.inference.ensemble import load_ensemble
from birdcall.kaggle.submission import LoadedPackage
from birdcall.prediction.package import Recording, detect_recordings
from birdcall.storage.files import read_table, write_atomically

_DAY_SECONDS = 24 * 3600
_RESULT_FILE = "result.json"

# --- memory ---------------------------------------------------------------------------------------


def benchmark_memory(
    data: Path, folder: Path, *, short_seconds: float = 600.0, long_seconds: float = _DAY_SECONDS
) -> pd.DataFrame:
    """Measure the memory of detecting birds in a short and a long recording.

    A process of its own predicts each, as `predict` does, with one member of
    `benchmark_inference`. Writes ``memory.csv``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = write_soundscapes(data, Path(scratch) / "soundscapes", short_seconds / 60)
        (member,) = make_members(Path(scratch) / "members", paths, 1)
        rows = []
        for seconds in (short_seconds, long_seconds):
            path = Path(scratch) / "long.wav"
            write_long(path, list(paths.values()), seconds)
            code = f"import sys; from {__name__} import predict_long; predict_long(*sys.argv[1:])"
            subprocess.run(
                [sys.executable, "-c", code, str(path), str(member), scratch], check=True
            )
            result = json.loads((Path(scratch) / _RESULT_FILE).read_text(encoding="utf-8"))
            rows.append({"hours": round(seconds / 3600, 2), **result})
    table = pd.DataFrame(rows)
    write_atomically(folder / "memory.csv", table.to_csv(index=False))
    return table


def write_long(path: Path, sources: Sequence[Path], seconds: float, rate: int = 8000) -> None:
    """Write a recording of ``seconds``, block by block: the sources one after another."""
    waveform = np.concatenate([read_audio(source, rate) for source in sources])
    left = round(seconds * rate)
    with soundfile.SoundFile(path, "w", rate, 1, subtype="PCM_U8") as file:
        while left > 0:
            file.write(waveform[:left])
            left -= len(waveform)


def predict_long(path: str, member: str, folder: str) -> None:
    """Detect the birds of a recording; write the peak memory of the process into ``folder``."""
    ensemble = load_ensemble([Path(member)])
    decision = Decision(0.6, 0.6, neighbour_weight=0.25, recording_threshold=0.7)
    start = time.perf_counter()
    package = LoadedPackage(ensemble, decision)
    ((_, detected),) = detect_recordings([Recording(Path(path), "long")], package)
    result = {
        "peak_megabytes": round(peak_megabytes(), 1),
        "x_real_time": round(detected.seconds / (time.perf_counter() - start), 1),
        "events": len(detected.events),
    }
    write_atomically(Path(folder) / _RESULT_FILE, json.dumps(result))


# --- scale ----------------------------------------------------------------------------------------

_HIDDEN_HOURS = 25.0  # 150 soundscapes of ten minutes
_LIMIT_SECONDS = 2 * 3600.0
_MP3_MEGABYTES_PER_HOUR = 28.8  # 64 kbit/s
_ROW_BYTES = 20.0  # of a detection in a Parquet shard: `predict` on the demo, 607 detections
_BUSY_SHARE = 0.9  # of a core's time; the rest is waiting and Python


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
            return (reading + networks) / (self.cores * _BUSY_SHARE)
        on_gpus = 3600 * n_members / (self.gpu_x_real_time * self.gpus)
        # Half of the cores read (see `inference.engine`): the slower of the two decides.
        return max(reading / (max(1, self.cores // 2) * _BUSY_SHARE), on_gpus)


# A T4 has 8.1 TFLOP/s in float32, an H100 51; there five networks took 0.2 s each for an hour of
# audio, most of it for starting small kernels. The estimate takes a tenth of that speed.
_MACHINES = (
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

        def lifetime() -> float:
            if not self.failures_per_day:
                return np.inf
            return generator.exponential(_DAY_SECONDS / self.failures_per_day)

        # When each worker is free, and its number; when it is lost.
        free = [(0.0, number) for number in range(self.n_workers)]
        heapq.heapify(free)
        lost_at = [lifetime() for _ in range(self.n_workers)]
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
            lost_at[worker] = back + lifetime()
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
            "sound_terabytes": round(self.hours * _MP3_MEGABYTES_PER_HOUR / 1e6, 1),
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
    for machine in _MACHINES:
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
    archive_table = pd.DataFrame(
        [archive.simulate(_MACHINES[0].seconds_per_hour(costs, n_members))]
    )
    write_atomically(folder / "scale_hidden.csv", hidden.to_csv(index=False))
    write_atomically(folder / "scale_archive.csv", archive_table.to_csv(index=False))
    return hidden, archive_table
