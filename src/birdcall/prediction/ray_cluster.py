"""Spread recordings over a Ray cluster: the same ensemble on every worker, the same results."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from birdcall.inference.decision import Decision
from birdcall.inference.ensemble import Ensemble, default_device
from birdcall.inference.tables import write_detections_parquet
from birdcall.kaggle.submission import open_package, require_all_members
from birdcall.prediction.local import Recording, RecordingResult, detect_recordings
from birdcall.storage.files import digest
from birdcall.taxonomy import display_name

logger = logging.getLogger(__name__)

SHARDS_FOLDER = "shards"
RECORDINGS_PER_TASK = 16
CORES_PER_WORKER = 2  # one decodes while the other runs the networks


class Worker:
    """What runs on a worker: it opens the package once, then takes tasks of some recordings.

    A task writes what it has found as a Parquet shard, whole or not at all, under a name that
    follows from its recordings: done again after the loss of a worker, it writes the same file.
    """

    def __init__(self, package: str, output: str, embeddings: bool, n_threads: int) -> None:
        import torch

        torch.set_num_threads(n_threads)
        self.ensemble: Ensemble
        self.decision: Decision
        self.ensemble, self.decision, refused = open_package(Path(package), default_device())
        require_all_members(refused)
        self.output = Path(output)
        self.embeddings = self.output / "embeddings" if embeddings else None
        self.names = {code: display_name(code) for code in self.ensemble.classes}

    def __call__(self, task: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Hear the recordings of a task, columns path and name; add what was found as JSON."""
        paths, names = (list(map(str, task[key])) for key in ("path", "name"))
        recordings = [Recording(Path(path), name) for path, name in zip(paths, names, strict=True)]
        found = dict(detect_recordings(recordings, self.ensemble, self.decision, self.embeddings))
        shard = self.output / SHARDS_FOLDER / f"{digest(chr(10).join(paths))}.parquet"
        events = {str(one.path): detected.events for one, detected in found.items()}
        write_detections_parquet(shard, events, self.names)
        said = [json.dumps(found[one].to_json()) for one in recordings]
        return {"path": task["path"], "name": task["name"], "found": np.array(said, dtype=object)}


def predict_on_ray(
    address: str, package: Path, output: Path, *, embeddings: bool, progress: bool
) -> Callable[[Sequence[Recording]], Iterator[tuple[Recording, RecordingResult]]]:
    """Return a ``listen`` (see `predict_recordings`) that runs on the cluster at ``address``.

    ``package``, ``output`` and the recordings must lie where all workers see them. One worker per
    two cores, or per GPU where there are some; what a lost worker had in hand is done again by
    another one. Raises ValueError where Ray is not installed, ConnectionError where none answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"--ray needs more: {error}; pip install birdcall[ray]") from error

    def listen(recordings: Sequence[Recording]) -> Iterator[tuple[Recording, RecordingResult]]:
        if not ray.is_initialized():
            _require_answer(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        rows = [{"path": str(one.path.resolve()), "name": one.name} for one in recordings]
        by_name = {one.name: one for one in recordings}
        for said in tqdm(
            run_tasks(rows, package, output, embeddings=embeddings),
            total=len(rows), disable=not progress, unit="recording",
        ):  # fmt: skip
            yield by_name[said["name"]], RecordingResult.from_json(json.loads(said["found"]))

    return listen


def _require_answer(address: str) -> None:
    """Raise ConnectionError where nobody answers: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # auto, or a kind of address that Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"--ray {address}: no cluster answers there: {error}") from error


def run_tasks(
    rows: list[dict[str, str]], package: Path, output: Path, *, embeddings: bool
) -> Iterator[dict[str, Any]]:
    """Yield what the workers of the connected cluster have found, as tasks are finished."""
    import ray
    import ray.data

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    n_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise ValueError("the Ray cluster has no node with a core")
    cores_each = 1 if n_gpus or min(cores) < CORES_PER_WORKER else CORES_PER_WORKER
    n_workers = n_gpus or sum(n_cores // cores_each for n_cores in cores)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    n_per_task = max(1, min(RECORDINGS_PER_TASK, -(-len(rows) // (4 * n_workers))))
    n_tasks = -(-len(rows) // n_per_task)
    results = ray.data.from_items(rows, override_num_blocks=n_tasks).map_batches(
        Worker,
        fn_constructor_args=(
            str(package.resolve()), str(output.resolve()), embeddings, cores_each,
        ),
        batch_size=None,  # a block is a task
        batch_format="numpy",
        concurrency=(1, n_workers),
        num_cpus=cores_each,
        num_gpus=1 if n_gpus else 0,
        max_restarts=-1,
        max_task_retries=-1,
    )  # fmt: skip
    yield from results.iter_rows()
