"""Train one run: an experiment on all folds but one, validated on that one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from birdcall.checkpoint import STATE_FILE, Checkpoint
from birdcall.data.dataset import TrainingData, check_classes
from birdcall.training.distributed import ALONE, Processes
from birdcall.training.log import (
    LOG_FILE,
    TENSORBOARD_FOLDER,
    TensorBoard,
    TrainingInterrupted,
    write_log,
)
from birdcall.training.pictures import draw_clips
from birdcall.training.resume import delete_state
from birdcall.training.trainer import Run, start_training

SAVE_EVERY = 200  # steps


def train_run(
    run: Run,
    data: TrainingData,
    *,
    workers: int = 1,
    device: torch.device | None = None,
    processes: Processes = ALONE,
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
        run, data, train_part, workers=workers, device=device, processes=processes, init=init
    )
    if resume and (folder / STATE_FILE).is_file():
        training.restore()
    elif processes.is_first:
        delete_state(folder / STATE_FILE)
        training.best.delete()
    board = (
        TensorBoard(folder / TENSORBOARD_FOLDER, len(training.log)) if processes.is_first else None
    )
    if board is not None:
        training.watch = lambda epoch, watched: board.write_clips(
            epoch, draw_clips(watched, data.classes)
        )
    n_steps = config.epochs * training.steps_per_epoch
    with (
        stop_requests() as stop,
        tqdm(
            total=n_steps,
            initial=training.progress.step,
            disable=not (progress and processes.is_first),
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
