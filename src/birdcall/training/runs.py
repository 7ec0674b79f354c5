"""Train runs: one after another, several at once, or on a cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import pandas as pd
import torch
from tqdm import tqdm

from birdcall.audio.reading import reuse_freed_memory
from birdcall.config import FULL, Experiment, require
from birdcall.data.dataset import TrainingData, check_classes
from birdcall.data.loader import check_worker_memory
from birdcall.inference.ensemble import default_device
from birdcall.models.checkpoint import (
    SETTINGS_FILE,
    STATE_FILE,
    Checkpoint,
    fold_name,
)
from birdcall.storage.locks import locked
from birdcall.training.distributed import process_context
from birdcall.training.initialisation import initialise, require_unseen
from birdcall.training.log import TensorBoard, describe_epoch, plot_preview, write_log
from birdcall.training.resume import conditions_of, require_finished
from birdcall.training.trainer import Run, RunOptions, Training, start_training

logger = logging.getLogger(__name__)

_MISSING_CLASSES_FILE = "missing_classes.csv"  # in a run's folder, see `check_classes`


class TrainingInterrupted(RuntimeError):  # noqa: N818 - as KeyboardInterrupt
    """A signal or the deadline has stopped a training; its state is in the run's folder."""


def train_run(
    run: Run,
    data: TrainingData,
    options: RunOptions = RunOptions(),
    bar_position: int | None = None,
    *,
    on_step: Callable[[Training], None] = lambda _training: None,
) -> Checkpoint:
    """Train ``run`` and write its checkpoint and log to its folder; ``on_step`` follows each step.

    Two calls with the same arguments give the same weights (on a CPU), also if a call was
    interrupted in any way and then resumed. Seeds torch's global generator. Raises
    TrainingInterrupted at a signal (SIGTERM, Ctrl-C) and at the deadline, after saving the state.
    """
    reuse_freed_memory()
    train_part, held_out = _split(run, data)
    if options.distributed.is_first:
        table = run.folder / _MISSING_CLASSES_FILE
        check_classes(train_part, held_out, classes=data.classes, fold=run.fold, table=table)
    training = start_training(run, data, train_part, options)
    progress, is_first = training.progress, options.distributed.is_first
    if options.resume and (run.folder / STATE_FILE).is_file():
        training.restore()
        progress = training.progress
    elif is_first:
        training.discard()
        # Else a run that is killed before its first state would be taken for the finished old one.
        (run.folder / SETTINGS_FILE).unlink(missing_ok=True)
    board = TensorBoard(run.folder, len(training.log)) if is_first else None
    if board is not None:
        training.show_preview = lambda epoch, preview: board.write_preview(
            epoch, plot_preview(preview, data.classes)
        )
    n_steps = training.n_steps
    with (
        stop_requests() as stop,
        tqdm(
            total=n_steps,
            initial=progress.step,
            disable=not (options.progress and is_first),
            unit="step",
            position=bar_position,
            desc=run.name,
        ) as bar,
    ):
        while not training.is_finished:
            for _ in training.steps():
                bar.update()
                bar.set_postfix_str(describe_epoch(training), refresh=False)
                on_step(training)
                is_late = options.deadline is not None and time.monotonic() >= options.deadline
                if options.distributed.any(stop.is_set() or is_late, training.device):
                    training.save()
                    raise TrainingInterrupted(
                        f"{run.name}: stopped after step {progress.step} of {n_steps}; "
                        "the same command with --resume continues it"
                    )
                if progress.step % options.save_every == 0:
                    training.save()
            entry = training.end_epoch(held_out)
            if board is not None:
                write_log(run.folder, training.log)
                board.write(entry)
            training.save()
    if board is not None:
        board.writer.close()
    return training.finish(held_out)


def _split(run: Run, data: TrainingData) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what the run trains and validates on; refuse what it cannot train without folds."""
    config = run.experiment.train
    require(
        run.fold != FULL or (config.patience is None and not config.optimizer.average_best),
        f"{run.experiment.name} has a patience or average_best, but --fold full holds out nothing "
        "to validate its epochs on: train an experiment with neither, for as many epochs as needed",
    )
    return data.split(run.fold)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or Ctrl-C sets; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread receives signals
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- several runs ---


def plan_runs(
    experiments: Sequence[Experiment], data: TrainingData, fold: int | str | None, folder: Path
) -> list[Run]:
    """Return each experiment on ``fold``, or on all folds (None): ``folder/<experiment>/fold<k>``.

    FULL is a run that holds out nothing, ``folder/<experiment>/full``; all folds are without it.
    """
    folds = data.folds if fold is None else [fold]
    return [
        Run(experiment, k, folder / experiment.name / fold_name(k))
        for experiment in experiments
        for k in folds
    ]


class Cluster(Protocol):
    """Other machines that train runs; `check` raises what keeps them from it: see `RayCluster`."""

    check: Callable[[Sequence[Run], TrainingData, RunOptions], None]
    train: Callable[[Sequence[Run], TrainingData, RunOptions], dict[Run, Checkpoint]]


def train_many(
    runs: Sequence[Run],
    data: TrainingData,
    options: RunOptions = RunOptions(),
    cluster: Cluster | None = None,
) -> list[Checkpoint]:
    """Train ``runs`` and return their checkpoints, in order.

    ``jobs`` runs are trained at the same time, each in a process with its share of the cores: on a
    CPU, two networks on one core each are faster than one network on two cores. Or ``cluster``
    trains them. With ``resume``, finished runs are kept and unfinished runs are continued. Raises
    ValueError before the first run starts if a run would be overwritten without ``overwrite``,
    OSError where another command trains one of them, and TrainingInterrupted as `train_run`.
    """
    jobs, world_size = options.jobs, options.distributed.world_size
    require(
        jobs == 1 or world_size == 1,
        f"{jobs} runs at once cannot be combined with {world_size} processes for each run: "
        "leave --jobs at 1 under torchrun",
    )
    alone = cluster is None or world_size == 1
    require(alone, f"--ray trains a run in one process, not in {world_size}: leave out torchrun")
    checkpoints = {}
    for run in runs:
        _split(run, data)  # raises for a fold out of range
        data.require_sound_for(run.experiment)
        if options.distributed.is_first:
            with locked(run.folder):
                pass  # raises where another command trains it
        if cluster is None:
            check_worker_memory(options.workers * jobs, run.experiment, world_size)
        require_unseen(options.init, data, run.fold)
        if not options.overwrite and (finished := _find_finished(run, data, options)):
            checkpoints[run] = finished
    pending = [run for run in runs if run not in checkpoints]
    if cluster is not None and pending:
        cluster.check(pending, data, options)
    if options.overwrite:
        # An error of initial weights that cannot be had comes before anything is deleted.
        for experiment in {run.experiment.name: run.experiment for run in pending}.values():
            classes, names = data.classes, data.scientific_names
            initialise(experiment, len(classes), options.init, classes=classes, names=names)
        # Else `resume` after an interruption would keep the runs whose turn had not come.
        for run in pending if options.distributed.is_first else []:
            (run.folder / SETTINGS_FILE).unlink(missing_ok=True)
    if cluster is not None and pending:
        checkpoints |= cluster.train(pending, data, options)
    elif jobs == 1 or len(pending) <= 1:
        for run in pending:
            checkpoints[run] = _train_alone(run, data, options)
    else:
        checkpoints |= _train_at_once(pending, data, options)
    return [checkpoints[run] for run in runs]


def _find_finished(run: Run, data: TrainingData, options: RunOptions) -> Checkpoint | None:
    """Return the checkpoint of a finished run; None if the run is still to be trained.

    ValueError if it would be overwritten, and if it was trained in another way.
    """
    has_state = (run.folder / STATE_FILE).exists()
    has_checkpoint = (run.folder / SETTINGS_FILE).exists()
    if has_state and not options.resume:
        raise ValueError(
            f"{run.folder} holds an unfinished run; --resume continues it, --overwrite starts again"
        )
    if has_checkpoint and not options.resume:
        raise ValueError(f"{run.folder} holds a trained run already; --overwrite trains it again")
    if has_state or not has_checkpoint:
        return None
    device, distributed = options.device or default_device(), options.distributed
    trained_on = conditions_of(data, run.experiment, options.init, device, distributed=distributed)
    expected = Checkpoint(run.experiment, data.classes, run.fold, trained_on=trained_on)
    checkpoint = require_finished(run.folder, expected)
    logger.info("%s: finished already, kept", run.name)
    return checkpoint


def _train_alone(
    run: Run, data: TrainingData, options: RunOptions, bar_position: int | None = None
) -> Checkpoint:
    if not options.distributed.is_first:
        return train_run(run, data, options, bar_position)
    with claimed(run, options):
        return train_run(run, data, options, bar_position)


@contextmanager
def claimed(run: Run, options: RunOptions) -> Iterator[None]:
    """Lock a run that no other command trains, or has trained since this one has begun.

    Raises OSError or ValueError where another does or has.
    """
    with locked(run.folder):
        has_state = (run.folder / STATE_FILE).exists()
        is_new = not has_state and not (run.folder / SETTINGS_FILE).exists()
        if not (is_new or options.overwrite or (options.resume and has_state)):
            raise ValueError(
                f"{run.folder}: another command has trained this run since this one has started; "
                "--resume keeps what is finished and continues the rest"
            )
        yield


def _train_at_once(
    runs: Sequence[Run], data: TrainingData, options: RunOptions
) -> dict[Run, Checkpoint]:
    jobs, options = options.jobs, replace(options, device=None)
    settings = jobs, logger.getEffectiveLevel()
    with (
        stop_requests() as stop,
        ProcessPoolExecutor(jobs, process_context(), _prepare_process, settings) as pool,
    ):
        futures = [
            pool.submit(_train_alone, run, data, options, bar_position=number % jobs)
            for number, run in enumerate(runs)
        ]
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if stop.is_set():
                    raise TrainingInterrupted("stopped; the same command with --resume continues")
        except BaseException:
            # Repeated: a child that saves one run may already have taken its next run.
            while running := [item for item in futures if not (item.cancel() or item.done())]:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGTERM)  # each child saves its state
                wait(running, timeout=0.5)
            raise
        return dict(zip(runs, (future.result() for future in futures), strict=True))


def _prepare_process(jobs: int, level: int) -> None:
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    # `train_run` handles them. A process that ends between two runs keeps the lock of the queue.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that has started it is gone; a run saves its state first."""
    multiprocessing.parent_process().join()
    while signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # else it is between two runs
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    os._exit(1)
