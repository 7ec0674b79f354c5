"""Train one run: an experiment on all folds but one, validated on that one."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pandas as pd
import torch
from tqdm import tqdm

from birdcall.config import Experiment, require
from birdcall.data.dataset import TrainingData, check_classes
from birdcall.data.loader import check_worker_memory
from birdcall.experiments import find_experiment
from birdcall.models.checkpoint import (
    SETTINGS_FILE,
    STATE_FILE,
    Checkpoint,
    find_checkpoints,
    read_checkpoint,
)
from birdcall.training.distributed import SINGLE_PROCESS, DistributedContext
from birdcall.training.log import (
    LOG_FILE,
    TENSORBOARD_FOLDER,
    TensorBoard,
    TrainingInterrupted,
    plot_batch_preview,
    read_log,
    summarize_log,
    write_log,
)
from birdcall.training.resume import delete_state
from birdcall.training.trainer import Run, start_training

logger = logging.getLogger(__name__)

SAVE_EVERY = 200  # steps


def train_run(
    run: Run,
    data: TrainingData,
    *,
    workers: int = 1,
    device: torch.device | None = None,
    distributed: DistributedContext = SINGLE_PROCESS,
    init: Path | None = None,
    resume: bool = False,
    save_every: int = SAVE_EVERY,
    deadline: float | None = None,
    progress: bool = False,
    bar_position: int | None = None,
) -> Checkpoint:
    """Train ``run`` and leave its checkpoint and log in its folder.

    Two calls with the same arguments give the same weights (on a CPU), and so does a call that is
    interrupted, by whatever means, and goes on with ``resume``. Seeds torch's global generator,
    from which weights and dropout are drawn. ``deadline`` is a value of `time.monotonic`.
    """
    experiment, fold, folder = run
    config = experiment.train
    train_part, validation_part = data.split(fold)
    check_classes(train_part, validation_part, data.classes, fold)
    training = start_training(
        run, data, train_part, workers=workers, device=device, distributed=distributed, init=init
    )
    if resume and (folder / STATE_FILE).is_file():
        training.restore()
    elif distributed.is_first:
        delete_state(folder / STATE_FILE)
        training.best.delete()
    board = (
        TensorBoard(folder / TENSORBOARD_FOLDER, len(training.log))
        if distributed.is_first
        else None
    )
    if board is not None:
        training.watch = lambda epoch, preview: board.write_clips(
            epoch, plot_batch_preview(preview, data.classes)
        )
    n_steps = config.epochs * training.steps_per_epoch
    with (
        stop_requests() as stop,
        tqdm(
            total=n_steps,
            initial=training.progress.step,
            disable=not (progress and distributed.is_first),
            unit="step",
            position=bar_position,
            desc=run.name,
        ) as bar,
    ):
        while not training.is_finished:
            for _ in training.steps():
                bar.update()
                bar.set_postfix_str(training.progress.describe(), refresh=False)
                asked = stop.is_set() or (deadline is not None and time.monotonic() >= deadline)
                if training.agree(asked):
                    training.save()
                    raise TrainingInterrupted(
                        f"{run.name}: stopped after step {training.progress.step} of {n_steps}; "
                        "the same command with --resume goes on"
                    )
                if training.progress.step % save_every == 0:
                    training.save()
            entry = training.end_epoch()
            if training.is_last_epoch or (entry.epoch % config.validate_every == 0):
                training.validate(entry, validation_part)
            if board is not None:
                write_log(folder / LOG_FILE, training.log)
                board.write(entry)
            training.save()
    if board is not None:
        board.close()
    return training.finish(validation_part)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or Ctrl-C sets; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread hears signals
        return

    def note(number: int, _frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- runs ---


def plan_runs(
    experiments: Sequence[Experiment], data: TrainingData, fold: int | None, folder: Path
) -> list[Run]:
    """Return each experiment on ``fold``, or on all, in ``folder/<experiment>/fold<k>``."""
    folds = data.folds if fold is None else [fold]
    return [Run(one, k, folder / one.name / f"fold{k}") for one in experiments for k in folds]


def run_folder(folder: Path, name: str) -> Path:
    """Return the folder of the run ``<experiment>-fold<k>`` below ``folder``."""
    experiment, _, fold = name.rpartition("-fold")
    return folder / experiment / f"fold{fold}"


def find_runs(
    folder: Path, experiments: Sequence[str] | None = None, fold: int | None = None
) -> list[Path]:
    """Return the folders of trained runs below ``folder``, of some or all experiments and folds.

    Raises FileNotFoundError where a named experiment has no trained run, and where there is none.
    """
    experiments = list(experiments or ())
    for name in experiments:
        find_experiment(name)
    runs = [
        run
        for run in find_checkpoints(folder)
        if (not experiments or run.parent.name in experiments)
        and (fold is None or run.name == f"fold{fold}")
    ]
    missing = sorted(set(experiments) - {run.parent.name for run in runs})
    if not runs or missing:
        what = ", ".join(missing) or "trained run"
        of_fold = "" if fold is None else f" of fold {fold}"
        raise FileNotFoundError(f"{folder}: no {what}{of_fold}; `birdcall train` makes one")
    return runs


def train_many(
    runs: Sequence[Run],
    data: TrainingData,
    *,
    workers: int = 1,
    jobs: int = 1,
    device: torch.device | None = None,
    distributed: DistributedContext = SINGLE_PROCESS,
    init: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = SAVE_EVERY,
    deadline: float | None = None,
    progress: bool = False,
) -> list[Checkpoint]:
    """Train ``runs`` and return their checkpoints, in order.

    ``jobs`` runs are trained at once, each in a process with its share of the cores: on a CPU, two
    networks on one core each are faster than one on two. With ``resume``, finished runs are kept
    and unfinished ones go on. What would be overwritten is refused before the first run starts.
    ``deadline`` (of `time.monotonic`), SIGTERM and Ctrl-C end it by TrainingInterrupted.
    """
    require(
        jobs == 1 or distributed.world_size == 1,
        f"{jobs} runs at once and {distributed.world_size} processes for each do not go together: "
        "leave --jobs at 1 under torchrun",
    )
    for run in runs:
        data.split(run.fold)
        check_worker_memory(workers * jobs, run.experiment, distributed.world_size)
        if not (resume or overwrite):
            _require_untouched(run)
    kept = {run: _finished(run) for run in runs} if resume else {}
    pending = [run for run in runs if kept.get(run) is None]
    options = {
        "workers": workers, "init": init, "resume": resume, "save_every": save_every,
        "deadline": deadline, "progress": progress,
    }  # fmt: skip
    if jobs == 1 or len(pending) <= 1:
        options |= {"device": device, "distributed": distributed}
        made = {run: train_run(run, data, **options) for run in pending}
    else:
        made = _train_at_once(pending, data, jobs, options)
    return [kept.get(run) or made[run] for run in runs]


def _require_untouched(run: Run) -> None:
    if (run.folder / STATE_FILE).exists():
        raise ValueError(
            f"{run.folder} holds an unfinished run; --resume goes on, --overwrite starts again"
        )
    if (run.folder / SETTINGS_FILE).exists():
        raise ValueError(f"{run.folder} holds a trained run already; --overwrite trains it again")


def _finished(run: Run) -> Checkpoint | None:
    """Return a finished run's checkpoint; refuse one of other settings under the same name."""
    if (run.folder / STATE_FILE).exists() or not (run.folder / SETTINGS_FILE).exists():
        return None
    checkpoint = read_checkpoint(run.folder)
    if checkpoint.experiment != run.experiment:
        raise ValueError(
            f"{run.folder} was trained by other settings of {run.experiment.name}; "
            "--overwrite trains it again"
        )
    logger.info("%s is finished and kept", run.name)
    return checkpoint


def _train_at_once(
    runs: Sequence[Run], data: TrainingData, jobs: int, options: dict[str, object]
) -> dict[Run, Checkpoint]:
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, stuck
    level = logger.getEffectiveLevel()
    with (
        stop_requests() as stop,
        ProcessPoolExecutor(jobs, spawn, _prepare_process, (jobs, level)) as pool,
    ):
        futures = {
            pool.submit(train_run, run, data, bar_position=number % jobs, **options): run
            for number, run in enumerate(runs)
        }
        try:
            return _collect(futures, stop)
        except BaseException:
            for future in futures:
                future.cancel()
            for child in multiprocessing.active_children():
                # A terminal's Ctrl-C reaches them by itself, a signal to this process does not.
                os.kill(child.pid, signal.SIGTERM)  # each writes its state
            raise


def _prepare_process(jobs: int, level: int) -> None:
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between two runs; within one it is heard
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _collect(
    futures: dict[Future[Checkpoint], Run], stop: threading.Event
) -> dict[Run, Checkpoint]:
    """Wait for all runs; the first that fails, or a signal, ends the waiting."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if stop.is_set():
            raise TrainingInterrupted("stopped; the same command with --resume goes on")
    return {run: future.result() for future, run in futures.items()}


def runs_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row per finished run: what it scored, and what it cost."""
    rows = []
    for run in runs:
        cost = summarize_log(read_log(run.folder / LOG_FILE))
        score = read_checkpoint(run.folder).score
        rows.append({"experiment": run.experiment.name, "fold": run.fold} | score | cost)
    return pd.DataFrame(rows)
