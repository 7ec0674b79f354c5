"""Show what an evaluation found: one self-contained page that opens from disk, and is heard."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.mistakes import FALSE, Mistake, PredictedMistake
from birdcall.evaluation.scoring import Evaluation
from birdcall.evaluation.tables import LABELLED, confusion_matrix, nocall_share_table, wide_table
from birdcall.report.charts import (
    Chart,
    chart_confusions,
    chart_recall_over_snr,
    chart_reliability,
    chart_shares,
    chart_steps,
    chart_threshold_curves,
    chart_thresholds,
    chart_votes,
)
from birdcall.report.html import (
    SAMPLE_RATE,
    chart_script,
    draw_tiles,
    encode_mp3,
    html_table,
    read_asset,
    readable,
    table_scripts,
    table_style,
    write_page,
)
from birdcall.taxonomy import display_name

logger = logging.getLogger(__name__)

PAGES_FOLDER = "soundscapes"  # beside the report
MAX_PAIRS = 200  # of confused species, in the table
CURVE_WIDTH, CURVE_HEIGHT = 250, 44  # of a mistake's framewise output: a pixel is 20 ms
CURVE_STYLES = (
    *(("#d55e00", "6 3"), ("#009e73", "2 2"), ("#aa3377", "8 3 2 3"), ("#7a5c00", "1 3")),
    *(("#0072b2", "12 4"), ("#4d4d4d", "4 4")),
)


def write_report(
    path: Path,
    title: str,
    evaluation: Evaluation,
    *,
    mistakes: Sequence[PredictedMistake] = (),
    pages: Mapping[str, Path] | None = None,
) -> None:
    """Write ``report.html``: scores, the decision and how it came about, mistakes, species.

    pages: soundscape pages of labelled soundscapes by recording, below the report's folder. The
    report grows with species and soundscapes by a line of text each; audio is of the mistakes.
    """
    charts: list[Chart] = []
    sections = {
        "scores": ("Scores on sound that was held out", _scores(evaluation)),
        "decision": ("The decision", _decision(evaluation, charts)),
        "probabilities": ("Are probabilities probabilities?", _recordings(evaluation, charts)),
        "confusions": ("What is taken for what", _confusions(evaluation, charts)),
        "mistakes": ("The worst mistakes, to see and hear", _mistakes(mistakes)),
        "soundscapes": ("Labelled soundscapes", _soundscapes(evaluation, path.parent, pages or {})),
        "species": ("Species", _species(evaluation)),
    }
    made = {name: (heading, "".join(parts)) for name, (heading, parts) in sections.items()}
    shown = {name: section for name, section in made.items() if section[1]}
    links = "".join(f"<li><a href='#{name}'>{head}</a></li>" for name, (head, _) in shown.items())
    body = "".join(
        f"<section id='{name}' aria-labelledby='h-{name}'><h2 id='h-{name}'>{head}</h2>{text}"
        "</section>"
        for name, (head, text) in shown.items()
    )
    heading = f"birdcall on {title}"
    write_page(
        path,
        readable(heading),
        f"<a class='skip' href='#scores'>To the scores</a><header><h1>{escape(readable(heading))}"
        f"</h1><nav aria-label='Sections'><ul>{links}</ul></nav></header><main>{body}</main>",
        scripts=(chart_script(), read_asset("report.js"), *table_scripts()),
        styles=(table_style(), read_asset("report.css")),
        data={"charts": [json.loads(chart.figure.to_json()) for chart in charts]},
    )


def describe_decision(evaluation: Evaluation) -> str:
    """Say the rule, what it was chosen on and what it is worth."""
    decision, score = evaluation.decision, evaluation.decision.score
    text = f"{decision.describe()}; chosen on {decision.chosen_on}"
    if score:
        text += (
            f": {score['cross_validated_row_wise_f1']:.3f} [{score['low']:.3f}, "
            f"{score['high']:.3f}] where {score['nocall_share_expected']:.0%} of the rows have no "
            f"bird (all nocall {score['all_nocall']:.3f}; it predicts none in "
            f"{score['nocall_share_named']:.0%})"
        )
    if "labelled_row_wise_f1" in score:
        text += (
            f"; on labelled soundscapes {score['labelled_row_wise_f1']:.3f} (all nocall "
            f"{score['labelled_all_nocall']:.3f})"
        )
    return text


# --- sections -------------------------------------------------------------------------------------


def _scores(evaluation: Evaluation) -> Iterator[str]:
    yield html_table(
        wide_table(evaluation.scores),
        "Recordings of the fold that a model was not trained on; soundscapes simulated from "
        "these, each scored under a decision chosen without its recordists; labelled "
        "soundscapes under the decision chosen on simulated ones. F1 is the competition's "
        "row-wise F1; intervals (95 %) resample groups of recordists, or labelled soundscapes. "
        "The prior knows how common species are, and nothing else.",
    )


def _decision(evaluation: Evaluation, charts: list[Chart]) -> Iterator[str]:
    search = evaluation.search
    yield f"<p>{escape(describe_decision(evaluation))}.</p>"
    if search is None:
        return
    for chart in (
        chart_steps(search),
        chart_threshold_curves(search),
        chart_thresholds(search),
        chart_votes(evaluation.votes, search),
        chart_shares(nocall_share_table(evaluation.scores)),
        chart_recall_over_snr(evaluation.snr),
    ):
        if chart is not None:
            yield _place(chart, charts)


def _recordings(evaluation: Evaluation, charts: list[Chart]) -> Iterator[str]:
    if evaluation.reliability is not None:
        yield _place(chart_reliability(evaluation.reliability), charts)


def _confusions(evaluation: Evaluation, charts: list[Chart]) -> Iterator[str]:
    pairs = evaluation.confusions
    chart = chart_confusions(confusion_matrix(pairs))
    if chart is None:
        yield "<p>No species was confused with another.</p>"
        return
    yield _place(chart, charts)
    cut = "" if len(pairs) <= MAX_PAIRS else f" The first {MAX_PAIRS} of {len(pairs)} pairs."
    shown = pairs.head(MAX_PAIRS)
    names = {
        column.replace("_", " "): shown[column].map(display_name)
        for column in ("true_species", "predicted_species")
    }
    yield html_table(
        pd.DataFrame(names).join(
            shown[["recordings", "rows", "only"]].rename(columns={"only": "no other"})
        ),
        "Pairs: recordings whose most probable species is wrong, and rows in which the true "
        "species is missed and the other is predicted. No other: the true species is confused with "
        "no other." + cut,
        sortable=True,
    )


def _soundscapes(evaluation: Evaluation, folder: Path, pages: Mapping[str, Path]) -> Iterator[str]:
    labelled = evaluation.labelled
    if labelled is None:
        return
    if labelled.foreign:
        named = ", ".join(f"{label} {count}" for label, count in labelled.foreign.most_common())
        yield f"<p>Labels that are no species of the competition: {escape(readable(named))}.</p>"
    links = {name: quote(page.relative_to(folder).as_posix()) for name, page in pages.items()}
    yield html_table(
        evaluation.soundscapes,
        f"Every labelled soundscape, the worst first; {len(links)} of them have a page to see and "
        "hear, with a link (birdcall evaluate --pages N). Birds: how many, summed over rows.",
        sortable=True,
        links=links,
    )


def _species(evaluation: Evaluation) -> Iterator[str]:
    per_class = evaluation.per_class.copy()
    names = [display_name(code) for code in per_class["ebird_code"]]
    per_class.insert(0, "name", names)
    yield html_table(
        per_class.rename(columns=lambda name: name.replace("_", " ")),
        "The ensemble, per species. AP is of its mean probability, precision and recall are of "
        "what the nested decisions name; recordings and rows are the support.",
        sortable=True,
    )


def _place(chart: Chart, charts: list[Chart]) -> str:
    """Return where a chart will be drawn, with its caption and its numbers."""
    charts.append(chart)
    numbers = ""
    if chart.numbers is not None:
        table = html_table(chart.numbers, "The numbers of this chart")
        numbers = f"<details><summary>Numbers</summary>{table}</details>"
    return (
        f"<figure><div class='chart' data-chart='{len(charts) - 1}' role='img' "
        f"aria-label='{escape(chart.caption, quote=True)}'></div>"
        f"<figcaption>{escape(chart.caption)}</figcaption>{numbers}</figure>"
    )


# --- mistakes -------------------------------------------------------------------------------------


def _mistakes(mistakes: Sequence[PredictedMistake]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for number, predicted in enumerate(mistakes):
        key = predicted.mistake.audio, predicted.mistake.kind
        groups.setdefault(key, []).append(_card(number, predicted))
    if groups:
        yield (
            "<p>Area: the members' mean probability over the five seconds; lines: each member; "
            "orange bars: when the species sings, where that is known.</p>"
        )
    for (audio, kind), cards in groups.items():
        yield f"<h3>{audio.capitalize()} soundscapes: {kind}</h3><div class='cards'>"
        yield from cards
        yield "</div>"


def _card(number: int, heard: PredictedMistake) -> str:
    mistake = heard.mistake
    name = display_name(mistake.ebird_code)
    place = (
        f"{readable(mistake.recording)}, {mistake.start:g} to {mistake.start + SEGMENT_SECONDS:g} s"
    )
    if heard.waveform is None:
        seen = f"<p class='notice'>No sound: {escape(readable(heard.reason))}</p>"
    else:
        # A padded row's picture is as long as the others'.
        n_row = SEGMENT_SECONDS * SAMPLE_RATE
        waveform = np.pad(heard.waveform, (0, max(0, n_row - len(heard.waveform))))
        (tile,) = draw_tiles(waveform)
        seen = (
            f"<div class='seen'><img src='{tile.picture}' alt='Spectrogram, 0 to 16 kHz' "
            "width='250' height='256'><span class='cursor'></span></div>"
        )
        player = (
            f"<audio controls preload='none' aria-label='Five seconds: {escape(name, quote=True)}' "
            f"src='data:audio/mpeg;base64,{encode_mp3(waveform)}'></audio>"
        )
    curves = "".join(_curve(heard, place, code) for place, code in enumerate(mistake.species[:4]))
    true = ", ".join(map(display_name, mistake.true)) or "no bird"
    named = ", ".join(map(display_name, mistake.predicted)) or "no bird"
    return (
        f"<article class='card' aria-labelledby='m{number}'><h4 id='m{number}'>{escape(name)}</h4>"
        f"<p>{escape(_say_score(mistake))}<br>{escape(place)}</p>{seen}{curves}"
        f"<p>true: {escape(true)}<br>predicted: {escape(named)}</p>"
        f"{player if heard.waveform is not None else ''}</article>"
    )


def _say_score(mistake: Mistake) -> str:
    if mistake.kind == FALSE:
        return f"named with a frame probability of {mistake.score:.2f}"
    if mistake.audio == LABELLED:
        return f"missed, with a frame probability of {-mistake.score:.2f}"
    return f"missed, {mistake.score:.0f} dB above the noise of its band"


def _curve(heard: PredictedMistake, place: int, code: str) -> str:
    """Draw the framewise output of one species as SVG, with when it sings."""
    mistake = heard.mistake
    bars = "".join(
        f"<rect x='{_across(one.onset - mistake.start):.1f}' y='0' height='5' "
        f"width='{_across(one.offset - one.onset):.1f}' fill='#b34700'/>"
        for one in heard.events
        if one.ebird_code == code
    )
    lines, highest = "", "not heard again"
    if heard.frames is not None and np.isfinite(heard.frames[:, place]).all():
        own = heard.frames[:, place]
        corners = f"0,{CURVE_HEIGHT}", f"{CURVE_WIDTH},{CURVE_HEIGHT}"
        lines = f"<polygon points='{corners[0]} {_points(own[0])} {corners[1]}' fill='#a9c7dd'/>"
        lines += "".join(
            f"<polyline points='{_points(one)}' fill='none' stroke='{color}' "
            f"stroke-dasharray='{dash}'/>"
            for one, (color, dash) in zip(own[1:], CURVE_STYLES, strict=False)
        )
        highest = f"at most {own[0].max():.2f}"
    name = display_name(code)
    return (
        f"<div class='curve'><span>{escape(name)}</span><svg viewBox='0 0 {CURVE_WIDTH} "
        f"{CURVE_HEIGHT}' preserveAspectRatio='none' role='img' aria-label='Probability of "
        f"{escape(name, quote=True)} over five seconds: {highest}'>{lines}{bars}</svg></div>"
    )


def _across(seconds: float) -> float:
    return seconds / SEGMENT_SECONDS * CURVE_WIDTH


def _points(frames: np.ndarray) -> str:
    x = np.linspace(0, CURVE_WIDTH, len(frames))
    y = CURVE_HEIGHT - 1 - frames * (CURVE_HEIGHT - 8)
    return " ".join(f"{one:.0f},{two:.1f}" for one, two in zip(x, y, strict=True))
