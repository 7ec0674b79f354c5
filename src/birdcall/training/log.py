"""Record trainings: ``log.csv``, TensorBoard, previews, reports; find trained runs, list them."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from birdcall.config import FULL
from birdcall.data.targets import IGNORE_TARGET
from birdcall.models.checkpoint import STATE_FILE, find_checkpoints, fold_name, read_checkpoint
from birdcall.storage.files import shorten_list, write_atomically
from birdcall.training.step import BatchPreview, EpochLog
from birdcall.training.trainer import Run, Training

if TYPE_CHECKING:
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

_LOG_FILE = "log.csv"
_N_COLUMNS = 4
_N_PREDICTIONS = 3  # named of each clip
_MAX_TARGETS = 4  # likewise
_DPI = 80
_MAX_LETTERS = 44  # of a recording's path in a title
_REPORT_SECONDS = 1.0  # between two reports of a run: it stops so long after it was told to
_ANSWER_SECONDS = 60.0  # without an answer from the board; then the run is given up


def write_log(folder: Path, log: Sequence[EpochLog]) -> None:
    """Write a row per epoch to the run's folder; scores of epochs without validation are empty."""
    table = pd.DataFrame([_numbers(entry) for entry in log])
    write_atomically(folder / _LOG_FILE, table.to_csv(index=False, lineterminator="\n"))


def _numbers(entry: EpochLog) -> dict[str, float]:
    """Return all numbers of an epoch by name, rounded."""
    values = {name: value for name, value in vars(entry).items() if name != "validation"}
    return {name: round(value, 6) for name, value in (values | entry.validation).items()}


def read_log(folder: Path) -> list[EpochLog]:
    """Read the log that `write_log` wrote to a run's folder.

    Raises ``ValueError`` or ``FileNotFoundError`` that names the file.
    """
    path = folder / _LOG_FILE
    names = [item.name for item in fields(EpochLog) if item.name != "validation"]
    try:
        table = pd.read_csv(path, float_precision="round_trip")
        table[names].astype(float)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable log of a training: {error}") from error
    scores = [name for name in table if name not in names]
    return [
        EpochLog(
            **{name: row[name] for name in names},
            validation={name: row[name] for name in scores if pd.notna(row[name])},
        )
        for row in table.to_dict("records")
    ]


def describe_epoch(training: Training) -> str:
    """Return the epoch, the mean loss and the speed of the epoch so far."""
    progress = training.progress
    seconds = max(progress.seconds, 1e-9)
    return (
        f"epoch {progress.epoch + 1}, loss {progress.loss_sum / max(progress.n_batches, 1):.3f}, "
        f"{progress.n_clips / seconds:.0f} clips/s, waiting {progress.waiting / seconds:.0%}"
    )


def summarize_log(log: Sequence[EpochLog]) -> dict[str, Any]:
    """Return the number of epochs and the speed of a whole run."""
    seconds = sum(entry.seconds for entry in log)
    n_clips = sum(entry.clips_per_second * entry.seconds for entry in log)
    waiting = sum(entry.waiting_share * entry.seconds for entry in log)
    return {
        "epochs": len(log),
        "minutes": round(seconds / 60, 1),
        "clips_per_second": round(n_clips / max(seconds, 1e-9), 1),
        "waiting_share": round(waiting / max(seconds, 1e-9), 3),
    }


def find_best_epochs(folder: Path) -> dict[str, int]:
    """Return after which epoch each run in ``folder`` had its highest macro AP, by run."""
    best = {}
    for path in sorted(folder.glob(f"*/{_LOG_FILE}")):
        scores = {entry.epoch: entry.validation.get("macro_ap") for entry in read_log(path.parent)}
        scores = {epoch: score for epoch, score in scores.items() if score is not None}
        if scores:
            best[path.parent.name] = max(scores, key=scores.__getitem__)
    return best


def runs_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row per finished run: its scores, and the time it took if its log tells."""
    rows = []
    for run in runs:
        summary = {}
        try:
            summary = summarize_log(read_log(run.folder))
        except (ValueError, OSError) as error:
            logger.warning("%s", error)
        score = read_checkpoint(run.folder).score
        rows.append({"experiment": run.experiment.name, "fold": run.fold} | score | summary)
    return pd.DataFrame(rows)


def find_runs(
    folder: Path, experiments: Sequence[str] | None = None, fold: int | None = None
) -> list[Path]:
    """Return the folders of trained runs below ``folder``, of some or all experiments and folds.

    Runs that hold out nothing (FULL) are left out: nothing can score them. The log names unfinished
    runs. Raises FileNotFoundError where a named experiment has no trained run, or there is none.
    """
    experiments = list(experiments or ())
    started = {path.parent for path in folder.rglob(STATE_FILE)}
    trained = set(find_checkpoints(folder))
    wanted = [
        run
        for run in sorted(trained | started)
        if (not experiments or run.parent.name in experiments)
        and (run.name != FULL if fold is None else run.name == fold_name(fold))
    ]
    runs = [run for run in wanted if run in trained]
    if fold is None and (full := [str(run) for run in sorted(trained) if run.name == FULL]):
        logger.info("left out, since they held out nothing: %s", shorten_list(full))
    if unfinished := [run for run in wanted if run not in trained]:
        message = "unfinished runs are left out; `birdcall train --resume` continues them: %s"
        logger.warning(message, shorten_list(unfinished))
    missing = sorted(set(experiments) - {run.parent.name for run in runs})
    if not runs or missing:
        what = ", ".join(missing) or "trained run"
        of_fold = "" if fold is None else f" of fold {fold}"
        known = ", ".join(sorted({run.parent.name for run in trained}))
        there = f"; there are runs of {known}" if known else ""
        raise FileNotFoundError(f"{folder}: no {what}{of_fold}; `birdcall train` makes one{there}")
    return runs


class TensorBoard:
    """Writes the log, and previews, for ``tensorboard --logdir output/…/runs``."""

    def __init__(self, folder: Path, n_epochs: int) -> None:
        """Continue after ``n_epochs`` epochs; later entries of an interrupted run are removed."""
        from torch.utils.tensorboard import SummaryWriter  # its import takes a second

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=n_epochs + 1)

    def write(self, entry: EpochLog) -> None:
        """Add the numbers of an epoch."""
        for name, value in _numbers(entry).items():
            if name != "epoch":
                self.writer.add_scalar(name, value, entry.epoch)
        self.writer.flush()

    def write_preview(self, epoch: int, picture: np.ndarray) -> None:
        """Add a picture ``(height, width, 3)`` of training clips."""
        self.writer.add_image("training clips", picture, epoch, dataformats="HWC")
        self.writer.flush()


# --- pictures ---


def plot_preview(preview: BatchPreview, classes: Sequence[str]) -> np.ndarray:
    """Return a picture ``(height, width, 3)``, uint8, of the clips in ``preview``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_clips = len(preview.log_mel)
    n_rows = -(-n_clips // _N_COLUMNS)
    size = (4.4 * _N_COLUMNS, 3.1 * n_rows)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(n_rows, _N_COLUMNS, squeeze=False).ravel()
    for axes in grid[n_clips:]:
        axes.set_axis_off()
    for index, axes in enumerate(grid[:n_clips]):
        image = preview.log_mel[index, 0].numpy().T
        axes.imshow(image, origin="lower", aspect="auto", cmap="magma")
        name = preview.recordings[index]
        if len(name) > _MAX_LETTERS:
            name = f"…{name[-_MAX_LETTERS:]}"
        name = name.replace("$", r"\$")  # matplotlib takes a pair of dollars for a formula
        target, clipwise = preview.target[index].numpy(), preview.clipwise[index].numpy()
        text = describe_clip(target, clipwise, classes)
        axes.set_title(f"{name}\n{text}", fontsize=9, loc="left")
        axes.set(xlabel="frame", ylabel="mel bin")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def describe_clip(target: np.ndarray, clipwise: np.ndarray, classes: Sequence[str]) -> str:
    """Return two lines: the targets of a clip, and the species with the highest probabilities.

    A number after a species is a target below 1; ``?`` marks a species that the loss ignores. Soft
    labels have a target for every class: the highest are listed.
    """
    highest = np.argsort(-target, kind="stable")
    true = [
        classes[index] if target[index] == 1 else f"{classes[index]} {target[index]:.2g}"
        for index in highest
        if target[index] > 0
    ]
    true += [f"{classes[index]}?" for index in np.flatnonzero(target == IGNORE_TARGET)]
    if len(true) > _MAX_TARGETS:
        true = [*true[:_MAX_TARGETS], f"{len(true) - _MAX_TARGETS} more"]
    likeliest = np.argsort(-clipwise, kind="stable")[:_N_PREDICTIONS]
    predicted = [f"{classes[index]} {clipwise[index]:.2f}" for index in likeliest]
    return f"true: {', '.join(true) or 'no bird'}\npredicted: {', '.join(predicted)}"


# --- reports from another machine ---


class Answer(Enum):
    """What a run does after a report."""

    CONTINUE = 1
    STOP = 2  # after saving its state
    LEAVE = 3  # without writing anything: another node has taken the run


class Report(NamedTuple):
    """How far an attempt at a run is, and what it has logged since its last report."""

    index: int  # of the run
    attempt: int  # 0: the first
    step: int  # 0: before the first
    messages: list[tuple[int, str]]  # level and text


class Board:
    """A Ray actor where runs report, and learn what to do.

    It keeps a run to one node: a node that is cut off from the others, and taken for lost, cannot
    report, and so its training ends. Locks of files do that on some shared file systems only.
    """

    def __init__(self) -> None:
        self._attempts: dict[int, int] = {}  # at each run, the last
        self._reports: list[Report] = []
        self._stops = False

    def begin(self, index: int, attempt: int) -> None:
        """Take reports of this ``attempt`` at the run ``index``, and of no earlier one."""
        self._attempts[index] = attempt

    def add(self, report: Report) -> Answer:
        """Keep a report for `take`."""
        if self._attempts[report.index] != report.attempt:
            return Answer.LEAVE
        self._reports.append(report)
        return Answer.STOP if self._stops else Answer.CONTINUE

    def stop(self) -> None:
        """Tell all runs to stop at their next report."""
        self._stops = True

    def take(self) -> list[Report]:
        """Return the reports since the last call."""
        reports, self._reports = self._reports, []
        return reports


class Reporter(logging.Handler):
    """Sends the step and the log of an attempt at a run to a `Board`, and does what it answers."""

    def __init__(
        self, board: ActorHandle, run: Run, *, index: int, attempt: int, line_seconds: float
    ) -> None:
        """Report also a line of progress every ``line_seconds``."""
        super().__init__()
        self._board = board
        self._run = run
        self._report = Report(index, attempt, 0, [])
        self._line_seconds = line_seconds
        self._next_report = self._next_line = -math.inf

    @contextmanager
    def attached(self, level: int) -> Iterator[None]:
        """Send what is logged in the block from this level on."""
        package = logging.getLogger("birdcall")
        before = package.level
        package.addHandler(self)
        package.setLevel(level)
        try:
            yield
        finally:
            package.removeHandler(self)
            package.setLevel(before)
            self.send()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record for the next report, with the name of the run."""
        text, name = record.getMessage(), self._run.name
        text = text if text.startswith(name) else f"{name}: {text}"
        self._report.messages.append((record.levelno, text))

    def on_step(self, training: Training) -> None:
        """Report a step, if it is time to; see `train_run`."""
        now, step = time.monotonic(), training.progress.step
        self._report = self._report._replace(step=step)
        if now >= self._next_line:
            self._next_line = now + self._line_seconds
            text = describe_epoch(training)
            logger.info("%s: step %d of %d, %s", self._run.name, step, training.n_steps, text)
        if now >= self._next_report:
            self._next_report = now + min(_REPORT_SECONDS, self._line_seconds)
            if self.send() == Answer.STOP:
                signal.raise_signal(signal.SIGTERM)  # `train_run` saves its state and stops

    def send(self) -> Answer:
        """Report to the board. RuntimeError where another attempt at the run has begun."""
        import ray

        report, self._report = self._report, self._report._replace(messages=[])
        answer = ray.get(self._board.add.remote(report), timeout=_ANSWER_SECONDS)
        if answer == Answer.LEAVE:
            raise RuntimeError(f"{self._run.name}: another node has taken it")
        return answer
