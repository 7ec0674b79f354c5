"""Show what an evaluation found: figures, and one self-contained page that opens from disk."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a report is made without a screen
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from birdcall.audio import read_audio
from birdcall.config import SEGMENT_SECONDS
from birdcall.decision import combine, decide
from birdcall.evaluation.scoring import THRESHOLDS, Evaluation, LabelledScores, SubmissionScore
from birdcall.files import write_atomically
from birdcall.frontend import Spectrogram
from birdcall.soundscapes import example_audio_folder, find_audio
from birdcall.taxonomy import display_name

SHOWN_SECONDS = 60
SCORE_COLUMNS = {
    "name": "experiment",
    "members": "members",
    "oof_macro_ap": "clips: macro AP",
    "oof_macro_auc": "clips: macro AUC",
    "soundscape_macro_ap": "soundscapes: macro AP",
    "soundscape_f1": "soundscapes: row-wise F1",
    "f1_low": "95 % from",
    "f1_high": "to",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; color: #444 }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100% }
.wide { overflow-x: auto } figure { margin: 1.5rem 0 } figcaption { color: #444 }
"""


def write_report(
    path: Path,
    title: str,
    evaluation: Evaluation,
    data: Path,
    submission: SubmissionScore | None,
) -> None:
    """Write ``report.html``: scores, thresholds, classes, and what a soundscape looks like."""
    parts = [f"<h1>birdcall on {escape(title)}</h1>"]
    if submission is not None:
        parts.append(f"<p><strong>{escape(describe_submission(submission))}</strong></p>")
    parts += [
        "<h2>Scores on sound that was held out</h2>",
        _table(
            score_table(evaluation.table),
            "Clips are recordings of the fold that a model was not trained on. Row-wise F1 is the "
            "competition's metric, each soundscape under thresholds chosen on the others; the "
            "interval is bootstrapped by soundscape.",
        ),
        f"<p>The decision: {escape(describe_decision(evaluation))}</p>",
    ]
    if evaluation.f1_grid is not None:
        parts.append(_image(plot_thresholds(evaluation), "Row-wise F1 over both thresholds."))
    if evaluation.labelled is not None:
        parts.append("<h2>A labelled soundscape</h2>")
        parts.append(_soundscape_image(evaluation, data))
    parts.append("<h2>Species</h2>")
    per_class = evaluation.per_class
    names = [display_name(code) for code in per_class["ebird_code"]]
    parts.append(_table(per_class.assign(name=names).round(3), "AP of the ensemble, per species."))
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'>"
        f"<title>birdcall: {escape(title)}</title>"
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    write_atomically(path, page)


def score_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of scores with the columns that people read."""
    known = {name: title for name, title in SCORE_COLUMNS.items() if name in table}
    return table[list(known)].rename(columns=known).round(3)


def describe_decision(evaluation: Evaluation) -> str:
    decision = evaluation.decision
    score = ", ".join(f"{name} {value:.3f}" for name, value in decision.score.items())
    return (
        f"clip probability >= {decision.clip_threshold:g} and frame probability >= "
        f"{decision.frame_threshold:g}, at most {decision.max_birds} birds; chosen on "
        f"{decision.chosen_on}" + (f" ({score})" if score else "")
    )


def describe_submission(score: SubmissionScore) -> str:
    return (
        f"submission: row-wise F1 {score.row_wise_f1:.3f} "
        f"[{score.interval.low:.3f}, {score.interval.high:.3f}] on {score.n_rows} hidden rows; "
        f"all nocall: {score.all_nocall:.3f}; "
        f"difference {score.row_wise_f1 - score.all_nocall:+.3f}"
    )


def plot_thresholds(evaluation: Evaluation) -> Figure:
    """Draw row-wise F1 over clip and frame threshold, with the chosen point."""
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    image = axes.pcolormesh(THRESHOLDS, THRESHOLDS, evaluation.f1_grid, cmap="cividis")
    decision = evaluation.decision
    axes.plot(decision.frame_threshold, decision.clip_threshold, "o", ms=10, mfc="w", mec="k")
    axes.set(xlabel="frame threshold", ylabel="clip threshold", title="row-wise F1; ○ chosen")
    figure.colorbar(image)
    return figure


def plot_soundscape(
    waveform: np.ndarray,
    sample_rate: int,
    labelled: LabelledScores,
    filename: str,
    evaluation: Evaluation,
) -> Figure:
    """Draw a minute of a soundscape: spectrogram, probability per row, truth and labels."""
    is_shown = (labelled.rows["filename"] == filename) & (labelled.rows["seconds"] <= SHOWN_SECONDS)
    rows = is_shown.to_numpy()
    classes = list(evaluation.per_class["ebird_code"])
    truth = labelled.truth[rows][:, : len(classes)]
    clipwise, framewise = (
        combine(labelled.clipwise[:, rows]),
        combine(labelled.framewise[:, rows]),
    )
    chosen = decide(clipwise, framewise, evaluation.decision)
    shown = np.flatnonzero(truth.any(axis=0) | chosen.any(axis=0))
    if not len(shown):
        shown = np.argsort(-framewise.max(axis=0))[:3]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(12, 4 + 0.3 * len(shown)), sharex=True, layout="constrained"
    )
    _draw_spectrogram(top, waveform, sample_rate)
    end = SEGMENT_SECONDS * len(framewise)
    bottom.imshow(
        framewise[:, shown].T, aspect="auto", cmap="cividis", vmin=0, vmax=1,
        extent=(0, end, len(shown), 0), interpolation="nearest",
    )  # fmt: skip
    for row, line in zip(*np.nonzero(truth[:, shown]), strict=True):
        bottom.add_patch(
            plt.Rectangle(
                (SEGMENT_SECONDS * row, line), SEGMENT_SECONDS, 1, fill=False, ec="white", lw=2
            )
        )
    for row, line in zip(*np.nonzero(chosen[:, shown]), strict=True):
        bottom.plot(SEGMENT_SECONDS * (row + 0.5), line + 0.5, "o", ms=6, mfc="w", mec="k")
    bottom.set_yticks(np.arange(len(shown)) + 0.5, [display_name(classes[i]) for i in shown])
    bottom.set(xlabel="seconds", title="probability per row; frame: truth, dot: label given")
    return figure


def _draw_spectrogram(axes: plt.Axes, waveform: np.ndarray, sample_rate: int) -> None:
    power = Spectrogram(n_fft=1024, hop_length=640)(torch.from_numpy(waveform)[None])[0, 0].numpy()
    level = 10 * np.log10(np.maximum(power, 1e-10)).T
    axes.imshow(
        level, origin="lower", aspect="auto", cmap="magma", vmin=np.percentile(level, 20),
        extent=(0, len(waveform) / sample_rate, 0, sample_rate / 2000),
    )  # fmt: skip
    axes.set(ylabel="kHz", ylim=(0, 12))


def _soundscape_image(evaluation: Evaluation, data: Path) -> str:
    labelled = evaluation.labelled
    # The soundscape whose first minute has most birds shows most.
    rows = labelled.rows[labelled.rows["seconds"] <= SHOWN_SECONDS]
    filename = rows["birds"].map(len).groupby(rows["filename"]).sum().idxmax()
    path = find_audio(example_audio_folder(data), filename)
    sample_rate = 32_000
    waveform = read_audio(path, sample_rate)[: SHOWN_SECONDS * sample_rate]
    figure = plot_soundscape(waveform, sample_rate, labelled, filename, evaluation)
    return _image(figure, f"The first minute of {filename}, which no model was trained on.")


def _image(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure><img alt='{escape(caption, quote=True)}' src='data:image/png;base64,{encoded}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(table: pd.DataFrame, caption: str) -> str:
    body = table.to_html(index=False, na_rep="", border=0, escape=True)
    head, _, rest = body.partition("\n")
    return f"<div class='wide'>{head}<caption>{escape(caption)}</caption>{rest}</div>"
