"""Show what an evaluation found: one self-contained page that opens from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from birdcall.audio import AudioError, read_audio
from birdcall.evaluation.figures import (
    SHOWN_SECONDS,
    plot_recall_over_snr,
    plot_reliability,
    plot_shares,
    plot_soundscape,
    plot_steps,
    plot_thresholds,
    recall_over_snr,
)
from birdcall.evaluation.scoring import Evaluation
from birdcall.evaluation.tables import wide_table
from birdcall.files import write_atomically
from birdcall.taxonomy import display_name

SAMPLE_RATE = 32_000

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; color: #444 }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ccc; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100% }
.wide { overflow-x: auto } figure { margin: 1.5rem 0 } figcaption { color: #444 }
"""


def write_report(path: Path, title: str, evaluation: Evaluation) -> None:
    """Write ``report.html``: scores, the decision and how it came about, classes, a soundscape."""
    parts = [
        f"<h1>birdcall on {escape(title)}</h1>",
        "<h2>Scores on sound that was held out</h2>",
        _table(
            wide_table(evaluation.table),
            "Recordings of the fold that a model was not trained on; soundscapes simulated from "
            "these, each scored under a decision chosen without its recordists; labelled "
            "soundscapes under the decision chosen on simulated ones. F1 is the competition's "
            "row-wise F1; intervals (95 %) resample groups of recordists, or labelled soundscapes. "
            "The prior knows how common species are, and nothing else.",
        ),
        *_decision(evaluation),
        *_recordings(evaluation),
        *_soundscape(evaluation),
        "<h2>Species</h2>",
        _species(evaluation),
    ]
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width'>"
        f"<title>birdcall: {escape(title)}</title>"
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    write_atomically(path, page)


def describe_decision(evaluation: Evaluation) -> str:
    """Say the rule, what it was chosen on and what it is worth."""
    decision, score = evaluation.decision, evaluation.decision.score
    text = f"{decision.describe()}; chosen on {decision.chosen_on}"
    if score:
        text += (
            f": {score['nested_row_wise_f1']:.3f} [{score['low']:.3f}, {score['high']:.3f}] where "
            f"{score['nocall_share_expected']:.0%} of the rows have no bird (all nocall "
            f"{score['all_nocall']:.3f}; it names none in {score['nocall_share_named']:.0%})"
        )
    if "labelled_row_wise_f1" in score:
        text += (
            f"; on labelled soundscapes {score['labelled_row_wise_f1']:.3f} (all nocall "
            f"{score['labelled_all_nocall']:.3f})"
        )
    return text


def _decision(evaluation: Evaluation) -> Iterator[str]:
    judgement = evaluation.judgement
    yield f"<h2>The decision</h2><p>{escape(describe_decision(evaluation))}.</p>"
    if judgement.choice is None:
        return
    yield _image(
        plot_steps(judgement.choice),
        "What was tried, in this order: a step is adopted only if it is better by more than a "
        "standard error, over soundscapes.",
    )
    yield _image(
        plot_thresholds(judgement.choice),
        "Row-wise F1 over both thresholds where they were chosen, so higher than the score.",
    )
    yield _image(plot_shares(evaluation.table), "The same at three shares of rows without a bird.")
    found = recall_over_snr(evaluation.heard.events, judgement.simulated, judgement.choice.nested)
    yield _image(
        plot_recall_over_snr(found),
        "Simulated birds that are named, by their level above the noise in their own band; "
        "beside the points, how many birds.",
    )


def _recordings(evaluation: Evaluation) -> Iterator[str]:
    judgement = evaluation.judgement
    clipwise, framewise = evaluation.heard.out_of_fold_for(judgement.experiments)
    if judgement.calibration is None:
        return
    calibrated, _ = judgement.calibration.apply(clipwise, framewise)
    yield "<h2>Are probabilities probabilities?</h2>"
    yield _image(
        plot_reliability(clipwise, calibrated, evaluation.targets),
        "Held-out recordings: how often a species is there when it is said with a probability. "
        "The calibration was fitted on these recordings; the decision uses it only if that paid.",
    )


def _soundscape(evaluation: Evaluation) -> Iterator[str]:
    labelled = evaluation.labelled
    if labelled is None:
        return
    yield "<h2>A labelled soundscape</h2>"
    if labelled.foreign:
        named = ", ".join(f"{label} {count}" for label, count in labelled.foreign.most_common())
        yield f"<p>Labels that are no species of the competition: {escape(named)}.</p>"
    scores = labelled.scores
    shown = scores.segments["seconds"].to_numpy() <= SHOWN_SECONDS
    n_birds = pd.Series(scores.truth[shown].sum(axis=1))
    recording = n_birds.groupby(scores.segments["recording"][shown].to_numpy()).sum().idxmax()
    path = labelled.paths[recording]
    try:
        waveform = read_audio(path, SAMPLE_RATE)
    except (AudioError, OSError) as error:
        yield f"<p>{escape(str(error))}</p>"
        return
    figure = plot_soundscape(waveform, SAMPLE_RATE, scores, recording, evaluation.decision)
    yield _image(figure, f"The first minute of {recording}, which no model was trained on.")


def _species(evaluation: Evaluation) -> str:
    per_class = evaluation.per_class
    names = [display_name(code) for code in per_class["ebird_code"]]
    per_class = per_class.copy()
    per_class.insert(1, "name", names)
    return _table(
        per_class.round(3),
        "The ensemble, per species. AP is of its mean probability, precision and recall are of "
        "what the nested decisions name.",
    )


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
