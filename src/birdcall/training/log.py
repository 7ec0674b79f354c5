"""Tell how a training goes: ``log.csv``, TensorBoard, and a table of several runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from birdcall.data.targets import IGNORE_TARGET
from birdcall.models.sed import SEDOutput
from birdcall.storage.files import write_atomically

LOG_FILE = "log.csv"
TENSORBOARD_FOLDER = "tensorboard"
CLIPS_TAG = "clips as the network hears them"


class TrainingInterrupted(RuntimeError):  # noqa: N818 - as KeyboardInterrupt
    """A signal or the time limit has ended a training; its state lies in the run's folder."""


@dataclass
class EpochLog:
    """What one epoch cost and gave; a row of ``log.csv``."""

    epoch: int
    loss: float
    learning_rate: float
    seconds: float
    clips_per_second: float
    waiting_share: float  # of the time, spent waiting for the loader
    skipped: int = 0  # batches whose loss was not finite
    validation: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        values = {name: value for name, value in vars(self).items() if name != "validation"}
        return {name: round(value, 6) for name, value in (values | self.validation).items()}


def write_log(path: Path, log: Sequence[EpochLog]) -> None:
    """Write a row per epoch; what was not measured in one is empty."""
    rows = [entry.row() for entry in log]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


class TensorBoard:
    """Writes the same numbers as ``log.csv`` for ``tensorboard --logdir output/…/runs``."""

    def __init__(self, folder: Path, n_epochs: int) -> None:
        """Go on behind ``n_epochs`` epochs; what an interrupted run wrote of later ones goes."""
        from torch.utils.tensorboard import SummaryWriter  # a second, where nobody trains

        self.writer = SummaryWriter(str(folder), purge_step=n_epochs + 1)

    def write(self, entry: EpochLog) -> None:
        """Add an epoch and flush, so that a run can be watched."""
        for name, value in entry.row().items():
            if name != "epoch":
                self.writer.add_scalar(name, value, entry.epoch)
        self.writer.flush()

    def write_clips(self, epoch: int, picture: np.ndarray) -> None:
        """Add a picture ``(height, width, 3)`` of clips, and flush: the first comes at once."""
        self.writer.add_image(CLIPS_TAG, picture, epoch, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def summarize_log(log: Sequence[EpochLog]) -> dict[str, Any]:
    """Return one row on a whole run: its epochs, speed and last scores."""
    seconds = sum(entry.seconds for entry in log)
    n_clips = sum(entry.clips_per_second * entry.seconds for entry in log)
    waiting = sum(entry.waiting_share * entry.seconds for entry in log)
    return {
        "epochs": len(log),
        "minutes": round(seconds / 60, 1),
        "clips_per_second": round(n_clips / max(seconds, 1e-9), 1),
        "waiting_share": round(waiting / max(seconds, 1e-9), 3),
    }


def read_log(path: Path) -> list[EpochLog]:
    """Read `write_log`'s table back."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]
    own = [name for name in EpochLog.__dataclass_fields__ if name != "validation"]
    return [
        EpochLog(
            **{name: int(row[name]) if name in ("epoch", "skipped") else row[name] for name in own},
            validation={name: value for name, value in row.items() if name not in own},
        )
        for row in rows
    ]


# --- pictures ---


N_CLIPS = 8
N_COLUMNS = 4
N_NAMED = 3  # predictions of a clip
DOTS_PER_INCH = 80


class BatchPreview(NamedTuple):
    """A batch as it was learned from.

    log_mel: ``(batch, channels, frames, n_mels)``, after mixing, noise and masks; target ``(batch,
    classes)``, after mixing; clipwise ``(batch, classes)``, what the network said. recordings: from
    which the clips were cut; what was mixed in is in the target.
    """

    log_mel: Tensor
    target: Tensor
    clipwise: Tensor
    recordings: tuple[str, ...]

    @classmethod
    def of(
        cls, log_mel: Tensor, target: Tensor, output: SEDOutput, recordings: tuple[str, ...]
    ) -> BatchPreview:
        """Keep the first clips of a batch, on the CPU and without their graph."""
        parts = (log_mel, target, output.clipwise)
        kept = [part[:N_CLIPS].detach().float().cpu() for part in parts]
        return cls(*kept, recordings[:N_CLIPS])


def is_previewed(epoch: int) -> bool:
    """Say whether clips of an epoch, from 0, are drawn: of the 1st, 2nd, 4th, 8th, …"""
    return (epoch + 1) & epoch == 0


def describe_clip(target: np.ndarray, clipwise: np.ndarray, classes: Sequence[str]) -> str:
    """Return the target and the likeliest species of a clip, one line each.

    Shares are of mixed labels that count less than 1; ? are species that may be there.
    """
    true = [
        classes[place] if target[place] == 1 else f"{classes[place]} {target[place]:.2g}"
        for place in np.flatnonzero(target > 0)
    ]
    true += [f"{classes[place]}?" for place in np.flatnonzero(target == IGNORE_TARGET)]
    likeliest = np.argsort(-clipwise, kind="stable")[:N_NAMED]
    said = [f"{classes[place]} {clipwise[place]:.2f}" for place in likeliest]
    return f"is {', '.join(true) or 'no bird'}\nsaid {', '.join(said)}"


def plot_batch_preview(preview: BatchPreview, classes: Sequence[str]) -> np.ndarray:
    """Return a picture ``(height, width, 3)``, uint8, of a batch's first clips."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_clips = len(preview.log_mel)
    n_rows = -(-n_clips // N_COLUMNS)
    figure = Figure(
        figsize=(4.4 * N_COLUMNS, 3.1 * n_rows), dpi=DOTS_PER_INCH, layout="constrained"
    )
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(n_rows, N_COLUMNS, squeeze=False).ravel()
    for axes in grid[n_clips:]:
        axes.set_axis_off()
    for place, axes in enumerate(grid[:n_clips]):
        axes.imshow(
            preview.log_mel[place, 0].numpy().T, origin="lower", aspect="auto", cmap="magma"
        )
        text = describe_clip(
            preview.target[place].numpy(), preview.clipwise[place].numpy(), classes
        )
        axes.set_title(f"{_end_of(preview.recordings[place])}\n{text}", fontsize=9, loc="left")
        axes.set(xlabel="frame", ylabel="mel bin")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _end_of(recording: str, n_letters: int = 44) -> str:
    # matplotlib would take a pair of dollars for a formula.
    name = recording if len(recording) <= n_letters else f"…{recording[-n_letters:]}"
    return name.replace("$", r"\$")
