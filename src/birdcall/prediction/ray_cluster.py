"""Spread recordings over a Ray cluster: the same ensemble on every worker, the same results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from birdcall.inference.ensemble import default_device
from birdcall.inference.predictions import OutputOptions
from birdcall.inference.tables import write_detections
from birdcall.kaggle.submission import open_package
from birdcall.prediction.local import Predictor
from birdcall.prediction.package import (
    EmbeddingWriter,
    Recording,
    RecordingResult,
    detect_recordings,
    embedding_part,
)
from birdcall.storage.files import digest
from birdcall.taxonomy import display_name
from birdcall.training.distributed import connect_to_ray, live_nodes, require_ray

_SHARDS_FOLDER = "shards"
_RECORDINGS_PER_TASK = 16
_CORES_PER_WORKER = 2  # one decodes while the other runs the networks


class Worker:
    """What runs on a worker: it opens the package once, then takes tasks of some recordings.

    A task writes its events as a Parquet shard, whole or not at all, under a name that follows from
    its recordings: done again after the loss of a worker, it writes the same file.
    """

    def __init__(self, package: str, output: str, embeddings: bool, n_threads: int) -> None:
        import torch

        torch.set_num_threads(n_threads)
        self.package = open_package(Path(package), default_device(), all_members=True)
        self.output = Path(output)
        self.embeddings = embeddings
        self.names = {code: display_name(code) for code in self.package.ensemble.classes}

    def __call__(self, task: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Predict the recordings of a task, columns path and name; add their results as JSON."""
        paths, names = list(map(os.fsdecode, task["path"])), list(map(str, task["name"]))
        recordings = [Recording(Path(path), name) for path, name in zip(paths, names, strict=True)]
        observers = [EmbeddingWriter(self.output)] if self.embeddings else []
        outputs = OutputOptions(frames=True, embedding=self.embeddings)
        results = dict(detect_recordings(recordings, self.package, observers, outputs))
        shard = f"{_SHARDS_FOLDER}/{digest(chr(10).join(paths))}.parquet"
        events = {str(recording.path): result.events for recording, result in results.items()}
        write_detections(self.output / shard, events, self.names)
        texts = []
        for recording in recordings:
            parts = [shard, embedding_part(recording)] if self.embeddings else [shard]
            result = replace(results[recording], parts=tuple(parts))
            texts.append(json.dumps(result.to_json()))
        return {"path": task["path"], "name": task["name"], "result": np.array(texts, dtype=object)}


def predict_on_ray(
    address: str, package: Path, output: Path, *, embeddings: bool, progress: bool
) -> Predictor:
    """Return what predicts on the Ray cluster at ``address``; see `predict_recordings`.

    ``package``, ``output`` and the recordings must be in folders that all workers can read. There
    is a worker per two cores, or per GPU where there are some; another worker repeats the tasks of
    a lost one. Raises ValueError where Ray is not installed, ConnectionError where no cluster
    answers.
    """
    require_ray()

    def predict(recordings: Sequence[Recording]) -> Iterator[tuple[Recording, RecordingResult]]:
        connect_to_ray(address)
        # As bytes: a path need not be UTF-8, which Arrow's strings are.
        paths = [os.fsencode(item.path.resolve()) for item in recordings]
        rows = [
            {"path": path, "name": item.name} for path, item in zip(paths, recordings, strict=True)
        ]
        by_name = {recording.name: recording for recording in recordings}
        for row in tqdm(
            _run_tasks(rows, package, output, embeddings=embeddings),
            total=len(rows), disable=not progress, unit="recording",
        ):  # fmt: skip
            yield by_name[row["name"]], RecordingResult.from_json(json.loads(row["result"]))

    return predict


def _run_tasks(
    rows: list[dict[str, bytes | str]], package: Path, output: Path, *, embeddings: bool
) -> Iterator[dict[str, Any]]:
    """Yield the rows with their results, as the workers of the connected cluster finish them."""
    import ray.data

    nodes = [node["Resources"] for node in live_nodes()]
    n_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if not cores:
        raise ValueError("the Ray cluster has no node with a core")
    cores_each = 1 if n_gpus or min(cores) < _CORES_PER_WORKER else _CORES_PER_WORKER
    n_workers = n_gpus or sum(n_cores // cores_each for n_cores in cores)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    n_per_task = max(1, min(_RECORDINGS_PER_TASK, -(-len(rows) // (4 * n_workers))))
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
