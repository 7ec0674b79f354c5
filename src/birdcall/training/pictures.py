"""Draw augmented clips as the network hears them, so that a wrong augmentation is seen at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from birdcall.data.augment import UNKNOWN
from birdcall.models import SEDOutput

N_CLIPS = 8
N_COLUMNS = 4
N_NAMED = 3  # predictions of a clip
DOTS_PER_INCH = 80


class Watched(NamedTuple):
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
    ) -> Watched:
        """Keep the first clips of a batch, on the CPU and without their graph."""
        parts = (log_mel, target, output.clipwise)
        kept = [part[:N_CLIPS].detach().float().cpu() for part in parts]
        return cls(*kept, recordings[:N_CLIPS])


def is_drawn(epoch: int) -> bool:
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
    true += [f"{classes[place]}?" for place in np.flatnonzero(target == UNKNOWN)]
    likeliest = np.argsort(-clipwise, kind="stable")[:N_NAMED]
    said = [f"{classes[place]} {clipwise[place]:.2f}" for place in likeliest]
    return f"is {', '.join(true) or 'no bird'}\nsaid {', '.join(said)}"


def draw_clips(watched: Watched, classes: Sequence[str]) -> np.ndarray:
    """Return a picture ``(height, width, 3)``, uint8, of a batch's first clips."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_clips = len(watched.log_mel)
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
            watched.log_mel[place, 0].numpy().T, origin="lower", aspect="auto", cmap="magma"
        )
        text = describe_clip(
            watched.target[place].numpy(), watched.clipwise[place].numpy(), classes
        )
        axes.set_title(f"{_end_of(watched.recordings[place])}\n{text}", fontsize=9, loc="left")
        axes.set(xlabel="frame", ylabel="mel bin")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _end_of(recording: str, n_letters: int = 44) -> str:
    # matplotlib would take a pair of dollars for a formula.
    name = recording if len(recording) <= n_letters else f"…{recording[-n_letters:]}"
    return name.replace("$", r"\$")
