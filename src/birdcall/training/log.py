"""Record a training: ``log.csv``, TensorBoard, and previews of the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from birdcall.data.targets import IGNORE_TARGET
from birdcall.storage.files import write_atomically
from birdcall.training.step import BatchPreview, EpochLog

_LOG_FILE = "log.csv"
_N_COLUMNS = 4
_N_PREDICTIONS = 3  # named of each clip
_MAX_TARGETS = 4  # likewise
_DPI = 80
_MAX_LETTERS = 44  # of a recording's path in a title


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
    scores = table.drop(columns=names).to_dict("records")
    return [
        EpochLog(**values, validation={k: score for k, score in row.items() if pd.notna(score)})
        for values, row in zip(table[names].to_dict("records"), scores, strict=True)
    ]


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
