"""Draw what an evaluation found, for print: the report's charts are in `charts`."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from birdcall.config import SEGMENT_SECONDS
from birdcall.decision import Decision, combine
from birdcall.evaluation.held_out import HeldOutScores
from birdcall.evaluation.tables import SNR_STEP_DB
from birdcall.frontend import Spectrogram
from birdcall.style import BLUE, HEAT, SOUND, use_style
from birdcall.taxonomy import display_name
from birdcall.windows import FRAMES_PER_SEGMENT

SHOWN_SECONDS = 60


def plot_recall_over_snr(table: pd.DataFrame) -> Figure:
    """Draw the recall of simulated events over their SNR in the bird's own band."""
    use_style()
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    centre = table["snr_db"] + SNR_STEP_DB / 2
    error = np.sqrt(table["recall"] * (1 - table["recall"]) / table["events"])
    axes.errorbar(centre, table["recall"], yerr=error, marker="o", color=BLUE, capsize=3)
    for x, y, n_events in zip(centre, table["recall"], table["events"], strict=True):
        axes.annotate(f"{n_events}", (x, y), (6, -12), textcoords="offset points", fontsize=9)
    axes.set(xlabel="SNR in the bird's band, dB", ylabel="events found", ylim=(0, 1))
    axes.grid(visible=True)
    return figure


def plot_soundscape(
    waveform: np.ndarray,
    sample_rate: int,
    scores: HeldOutScores,
    recording: str,
    decision: Decision,
    frames: np.ndarray | None = None,
) -> Figure:
    """Draw a minute of a soundscape: spectrogram, framewise probability, truth and labels.

    frames: ``(classes, frames of the recording)``; without them each row has its highest.
    """
    whole = scores.of_segments((scores.segments["recording"] == recording).to_numpy())
    n_rows = min(len(whole.segments), SHOWN_SECONDS // SEGMENT_SECONDS)
    everything = np.zeros((len(whole.segments), whole.truth.shape[1]), dtype=bool)
    everything[whole.labelled] = whole.decide(decision)
    n_classes = len(scores.classes)
    chosen, truth = everything[:n_rows, :n_classes], whole.truth[:n_rows, :n_classes]
    framewise = combine(whole.framewise)[:n_rows]
    shown = np.flatnonzero(truth.any(axis=0) | chosen.any(axis=0))
    if not len(shown):
        shown = np.argsort(-framewise.max(axis=0))[:3]
    use_style()
    figure = Figure(figsize=(12, 4 + 0.3 * len(shown)), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _draw_spectrogram(top, waveform[: SHOWN_SECONDS * sample_rate], sample_rate)
    heat = framewise[:, shown].T
    if frames is not None and frames.shape[1]:
        heat = frames[shown, : n_rows * FRAMES_PER_SEGMENT]
    image = bottom.imshow(
        heat, aspect="auto", cmap=HEAT, vmin=0, vmax=1,
        extent=(0, SEGMENT_SECONDS * n_rows, len(shown), 0), interpolation="nearest",
    )  # fmt: skip
    for row, line in zip(*np.nonzero(truth[:, shown]), strict=True):
        corner = (SEGMENT_SECONDS * row, line)
        bottom.add_patch(Rectangle(corner, SEGMENT_SECONDS, 1, fill=False, ec="white", lw=2))
    for row, line in zip(*np.nonzero(chosen[:, shown]), strict=True):
        bottom.plot(SEGMENT_SECONDS * (row + 0.5), line + 0.5, "o", ms=6, mfc="w", mec="k")
    names = [display_name(scores.classes[place]) for place in shown]
    bottom.set_yticks(np.arange(len(shown)) + 0.5, names)
    bottom.set(xlabel="seconds", title="probability; frame: truth of a row, dot: label given to it")
    figure.colorbar(image, ax=bottom, pad=0.01)
    return figure


def _draw_spectrogram(axes: Axes, waveform: np.ndarray, sample_rate: int) -> None:
    power = Spectrogram(n_fft=1024, hop_length=640)(torch.from_numpy(waveform)[None])[0, 0].numpy()
    level = 10 * np.log10(np.maximum(power, 1e-10)).T
    axes.imshow(
        level, origin="lower", aspect="auto", cmap=SOUND, vmin=np.percentile(level, 20),
        extent=(0, len(waveform) / sample_rate, 0, sample_rate / 2000),
    )  # fmt: skip
    axes.set(ylabel="kHz", ylim=(0, 12))
