"""Measure what clips and augmentation cost a training, against ready-made tensors."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from birdcall.config import NO_AUGMENT, Experiment, replace_nested
from birdcall.data.dataset import TrainingData
from birdcall.data.loader import ClipBatch
from birdcall.storage.files import write_atomically
from birdcall.training.trainer import Run, Training, start_training

logger = logging.getLogger(__name__)

READY_BATCHES = 8  # other clips in each, so that no step is the one before
WARM_UP = 4  # steps before each timing: a worker's queue must not count as speed


class Setting(NamedTuple):
    """How the cores are shared between the network and what makes its clips."""

    name: str
    threads: int
    workers: int


def settings(n_cores: int) -> list[Setting]:
    """Return the settings of `make demo` (a run on each core) and of a run that has all cores."""
    return [
        Setting("a run on each core", 1, 0),
        Setting("a run on all cores", n_cores, max(1, n_cores - 1)),
    ]


class _ReadyLoader:
    """Stands in for a DataLoader: a few batches, made before the clock runs, again and again."""

    def __init__(self, loader: torch.utils.data.DataLoader[ClipBatch]) -> None:
        self.sampler, self.dataset = loader.sampler, loader.dataset
        self.sampler.set_epoch(0)
        self.batches = [batch for batch, _ in zip(loader, range(READY_BATCHES), strict=False)]

    def __iter__(self) -> Iterator[ClipBatch]:
        while True:
            yield from self.batches


def benchmark_training(
    data: TrainingData, experiment: Experiment, folder: Path, *, n_steps: int = 40, repeats: int = 5
) -> pd.DataFrame:
    """Time steps of ``experiment`` with and without clips to be made; write ``training.csv``.

    The two take turns, ``n_steps`` each, so that a slow minute of the machine hits both. Columns:
    clips per second of each (medians), their ratio (median, lowest, highest of the turns), and the
    share of time that the augmented one waits for its clips.
    """
    n_threads = torch.get_num_threads()
    try:
        rows = [
            _compare(
                setting,
                data,
                experiment=experiment,
                folder=folder,
                n_steps=n_steps,
                repeats=repeats,
            )
            for setting in settings(n_threads)
        ]
    finally:
        torch.set_num_threads(n_threads)
    table = pd.DataFrame(rows)
    write_atomically(folder / "training.csv", table.to_csv(index=False))
    return table


def _compare(
    setting: Setting,
    data: TrainingData,
    experiment: Experiment,
    folder: Path,
    n_steps: int,
    repeats: int,
) -> dict[str, object]:
    torch.set_num_threads(setting.threads)
    n_clips = (WARM_UP + n_steps) * (repeats + 1) * experiment.train.data.batch_size
    endless = replace_nested(experiment, train={"epochs": 1, "data": {"clips_per_epoch": n_clips}})
    augmented = _start(endless, data, folder, setting.workers)
    ready = _start(replace(endless, augment=NO_AUGMENT), data, folder, 0)
    ready.loader = _ReadyLoader(ready.loader)
    sides = [(one, one.steps()) for one in (augmented, ready)]
    speeds: list[list[float]] = []
    waiting = []
    for turn in range(repeats + 1):
        speeds.append([_time_steps(*side, n_steps) for side in sides])
        waiting.append(augmented.progress.waiting / augmented.progress.seconds)
        logger.info("%s: turn %d of %d", setting.name, turn, repeats)
    made, given = np.array(speeds[1:]).T  # the first turn warms up
    ratio = made / given
    return {
        "setting": setting.name,
        "threads": setting.threads,
        "workers": setting.workers,
        "augmented_clips_per_second": round(float(np.median(made)), 1),
        "ready_clips_per_second": round(float(np.median(given)), 1),
        "ratio": round(float(np.median(ratio)), 3),
        "ratio_low": round(float(ratio.min()), 3),
        "ratio_high": round(float(ratio.max()), 3),
        "waiting_share": round(float(np.median(waiting[1:])), 3),
    }


def _start(experiment: Experiment, data: TrainingData, folder: Path, workers: int) -> Training:
    train_part, _ = data.split(data.folds[0])
    run = Run(experiment, data.folds[0], folder)
    return start_training(run, data, train_part, workers=workers)


def _time_steps(training: Training, steps: Iterator[None], n_steps: int) -> float:
    """Return clips per second over ``n_steps`` steps, after some that do not count."""
    for _ in range(WARM_UP):
        next(steps)
    progress = training.progress
    progress.seconds = progress.waiting = 0.0
    before = progress.n_clips
    began = time.perf_counter()
    for _ in range(n_steps):
        next(steps)
    return (progress.n_clips - before) / (time.perf_counter() - began)
