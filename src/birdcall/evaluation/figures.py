"""Draw what an evaluation found: how the decision was chosen, and what it is worth where."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")  # figures are made without a screen
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from birdcall.config import SEGMENT_SECONDS
from birdcall.decision import Decision, combine
from birdcall.evaluation.held_out import HeldOutScores
from birdcall.frontend import Spectrogram
from birdcall.taxonomy import display_name

# Okabe and Ito's colours, apart for every kind of sight; markers differ as well.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLORS = (BLUE, GREEN, PURPLE, "#56B4E9", "#E69F00", "#F0E442")
MARKERS = ("o", "s", "^", "v", "D", "P")
SNR_STEP_DB = 3.0
SHOWN_SECONDS = 60


def recall_over_snr(
    events: pd.DataFrame, simulated: HeldOutScores, named: np.ndarray
) -> pd.DataFrame:
    """Return how many simulated events are found, by their SNR: snr_db (from), events, recall.

    An event is found where its species is named in a segment in which it is heard. named:
    ``(labelled rows, known species)``.
    """
    own = events[events["recording"].isin(set(simulated.recordings))]
    column = {code: place for place, code in enumerate(simulated.classes)}
    names = simulated.segments["recording"].iloc[simulated.starts]
    first = dict(zip(names, simulated.starts, strict=True))
    hits = named & simulated.labelled_truth
    found = [
        hits[
            first[one.recording] + int(one.onset // SEGMENT_SECONDS) :
            first[one.recording] + int(one.offset // SEGMENT_SECONDS) + 1,
            column[one.ebird_code],
        ].any()
        for one in own.itertuples()
    ]  # fmt: skip
    step = (own["snr_db"] // SNR_STEP_DB * SNR_STEP_DB).to_numpy()
    table = pd.DataFrame({"snr_db": step, "found": found}).groupby("snr_db")["found"]
    return table.agg(events="size", recall="mean").reset_index()


def plot_recall_over_snr(table: pd.DataFrame) -> Figure:
    """Draw the recall of simulated events over their SNR in the bird's own band."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    centre = table["snr_db"] + SNR_STEP_DB / 2
    error = np.sqrt(table["recall"] * (1 - table["recall"]) / table["events"])
    axes.errorbar(centre, table["recall"], yerr=error, marker="o", color=BLUE, capsize=3)
    for x, y, n_events in zip(centre, table["recall"], table["events"], strict=True):
        axes.annotate(f"{n_events}", (x, y), (6, -12), textcoords="offset points", fontsize=9)
    axes.set(xlabel="SNR in the bird's band, dB", ylabel="events found", ylim=(0, 1))
    axes.grid(color="0.9")
    return figure


def plot_soundscape(
    waveform: np.ndarray,
    sample_rate: int,
    scores: HeldOutScores,
    recording: str,
    decision: Decision,
) -> Figure:
    """Draw a minute of a soundscape: spectrogram, probability per row, truth and labels."""
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
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(12, 4 + 0.3 * len(shown)), sharex=True, layout="constrained"
    )
    _draw_spectrogram(top, waveform[: SHOWN_SECONDS * sample_rate], sample_rate)
    bottom.imshow(
        framewise[:, shown].T, aspect="auto", cmap="cividis", vmin=0, vmax=1,
        extent=(0, SEGMENT_SECONDS * n_rows, len(shown), 0), interpolation="nearest",
    )  # fmt: skip
    for row, line in zip(*np.nonzero(truth[:, shown]), strict=True):
        corner = (SEGMENT_SECONDS * row, line)
        bottom.add_patch(plt.Rectangle(corner, SEGMENT_SECONDS, 1, fill=False, ec="white", lw=2))
    for row, line in zip(*np.nonzero(chosen[:, shown]), strict=True):
        bottom.plot(SEGMENT_SECONDS * (row + 0.5), line + 0.5, "o", ms=6, mfc="w", mec="k")
    names = [display_name(scores.classes[place]) for place in shown]
    bottom.set_yticks(np.arange(len(shown)) + 0.5, names)
    bottom.set(xlabel="seconds", title="probability per row; frame: truth, dot: label given")
    return figure


def _draw_spectrogram(axes: Axes, waveform: np.ndarray, sample_rate: int) -> None:
    power = Spectrogram(n_fft=1024, hop_length=640)(torch.from_numpy(waveform)[None])[0, 0].numpy()
    level = 10 * np.log10(np.maximum(power, 1e-10)).T
    axes.imshow(
        level, origin="lower", aspect="auto", cmap="magma", vmin=np.percentile(level, 20),
        extent=(0, len(waveform) / sample_rate, 0, sample_rate / 2000),
    )  # fmt: skip
    axes.set(ylabel="kHz", ylim=(0, 12))
