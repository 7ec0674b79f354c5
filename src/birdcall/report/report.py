"""Write the report of an evaluation: one self-contained page that opens from disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

from birdcall.config import NOCALL, SEGMENT_SECONDS
from birdcall.data.birdnet import DEFAULT_THRESHOLD, NAME
from birdcall.evaluation.mistakes import FALSE, Mistake, PredictedMistake
from birdcall.evaluation.scoring import Evaluation, describe_classes
from birdcall.evaluation.tables import ENSEMBLE, LABELLED, PRIOR, SIMULATED, wide_table
from birdcall.inference.decision import Decision
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
    HtmlTable,
    PageContent,
    describe_scale,
    draw_tiles,
    encode_audio,
    read_asset,
    write_page,
)
from birdcall.taxonomy import display_name

PAGES_FOLDER = "soundscapes"  # beside the report
_YARDSTICK = (
    f"{NAME} predicts labelled soundscapes only: with its default threshold of "
    f"{DEFAULT_THRESHOLD:g}, and with a decision that was chosen on the others of them. "
)
_MAX_PAIRS = 200  # of confused species, in the table
_MAX_CURVES = 4  # of a mistake: its species, and others of its row
_CURVE_WIDTH, _CURVE_HEIGHT = 250, 44  # of framewise probabilities: a pixel is 20 ms
_GOOD_AUC = 0.8  # on two real soundscapes names raised F1 at 0.89, not at 0.77
_MEMBER_STYLES = (  # colour and dashes
    *(("#d55e00", "6 3"), ("#009e73", "2 2"), ("#aa3377", "8 3 2 3"), ("#7a5c00", "1 3")),
    *(("#0072b2", "12 4"), ("#4d4d4d", "4 4")),
)


def write_report(
    path: Path,
    title: str,
    evaluation: Evaluation,
    *,
    mistakes: Iterable[PredictedMistake] = (),
    pages: Mapping[str, Path] | None = None,
) -> None:
    """Write ``report.html``: scores, the decision and its search, mistakes, species.

    pages: the soundscape pages of labelled soundscapes by recording, below the report's folder.
    The report grows by one line of text per species and soundscape; it holds the audio of the
    mistakes only.
    """
    charts = _charts(evaluation)
    labelled = evaluation.labelled
    content = PageContent(
        title=f"birdcall on {title}",
        scripts=(read_asset("report.js"),),
        styles=(read_asset("report.css"),),
        data={"charts": {name: json.loads(c.figure.to_json()) for name, c in charts.items()}},
        has_tables=True,
        has_charts=True,
    )
    write_page(
        path,
        "report.html",
        content,
        scores=HtmlTable(
            wide_table(evaluation.scores),
            "Recordings: each is predicted by the model that was not trained on its fold. "
            "Simulated soundscapes are mixed from these recordings, and scored under a decision "
            "that was chosen without their recordists. On labelled soundscapes this decision is "
            "adapted to the others of them. F1 is the competition's row-wise F1. Intervals (95 %) "
            "resample groups of recordists, or labelled soundscapes. The prior predicts from the "
            "frequency of each species alone. "
            + (_YARDSTICK if NAME in set(evaluation.scores["name"]) else "")
            + describe_classes(evaluation.scores),
        ),
        decision=describe_decision(evaluation.ensemble.decision),
        weaknesses=find_weaknesses(evaluation.scores),
        charts=charts,
        confusions=_confusions(evaluation.confusions),
        mistakes=_group_mistakes(mistakes),
        foreign_labels={} if labelled is None else dict(labelled.foreign.most_common()),
        n_unknown=0 if labelled is None else labelled.n_unknown,
        soundscapes=_soundscapes(evaluation.soundscapes, path.parent, pages or {}),
        species=_species(evaluation.per_class),
    )


def describe_decision(decision: Decision) -> str:
    """Return the rule, the data it was chosen on and its score, in a sentence."""
    score = decision.score
    text = f"{decision.describe()}; chosen on {decision.chosen_on}"
    if score:
        text += (
            f": {score['cross_validated_row_wise_f1']:.3f} "
            f"[{score['low']:.3f}, {score['high']:.3f}] where "
            f"{score['nocall_share_expected']:.0%} of the rows have no bird (all nocall "
            f"{score['all_nocall']:.3f}; it predicts none in {score['nocall_share_named']:.0%})"
        )
    if "labelled_row_wise_f1" in score:
        text += (
            f"; on labelled soundscapes {score['labelled_row_wise_f1']:.3f} (all nocall "
            f"{score['labelled_all_nocall']:.3f})"
        )
    else:
        text += "; its score on real soundscapes is not known, since none is labelled"
    return text


@dataclass(frozen=True)
class Weakness:
    """Why the ensemble's decision scores no more than naming no bird on a kind of audio.

    low: the score that is low, "ranking" or "decision". text: this, and the next step, in words.
    """

    audio: str
    low: str
    text: str


def find_weaknesses(scores: pd.DataFrame) -> list[Weakness]:
    """Return a weakness for each kind of soundscape where the decision gains nothing by names.

    scores: as `Evaluation` has them. Where a macro AUC shows that rows with a species are before
    those without, the decision is low; else the ranking, which no threshold can mend.
    """
    value = scores.set_index(["name", "audio", "metric"])["value"].to_dict()
    weaknesses = []
    for audio in (SIMULATED, LABELLED):
        f1 = value.get((ENSEMBLE, audio, "row_wise_f1"), np.nan)
        silence = value.get((f"all {NOCALL}", audio, "row_wise_f1"), np.nan)
        if np.isnan(f1) or round(f1 - silence, 3) > 0:  # NaN: there is no such audio
            continue
        text = f"On {audio} soundscapes the decision "
        if round(value[ENSEMBLE, audio, "nocall_share_named"], 6) == 1:
            text += f"names no bird in any row: row-wise F1 {f1:.3f}"
        else:
            text += f"scores no more than naming no bird: row-wise F1 {f1:.3f}, not {silence:.3f}"
        auc = value[ENSEMBLE, audio, "macro_auc"]
        low = "decision" if auc >= _GOOD_AUC else "ranking"
        if low == "decision":
            text += (
                f". The ranking is good (macro AUC {auc:.2f}), the decision is low: rows with a "
                "species come first, but their probabilities are too low or too alike for one "
                "threshold. Next: look at them by threshold on a soundscape page, and train for "
                "longer, or with noise of such places."
            )
        elif np.isnan(auc):
            text += ". No row has a species that the models know, so there is nothing to rank."
        else:
            text += (
                f". The ranking is low: macro AUC {auc:.2f} (0.5 is chance), macro AP "
                f"{value[ENSEMBLE, audio, 'macro_ap']:.3f} (prior "
                f"{value[PRIOR, audio, 'macro_ap']:.3f}). No threshold mends it. Next: more "
                "recordings of these species, soundscapes without labels (birdcall student), "
                "longer training, or other initial weights."
            )
        weaknesses.append(Weakness(audio, low, text))
    return weaknesses


# --- charts and tables ----------------------------------------------------------------------------


def _charts(evaluation: Evaluation) -> dict[str, Chart]:
    """Return the charts by name: those for which the evaluation has data."""
    charts: dict[str, Chart | None] = {}
    if evaluation.ensemble.search is not None:
        charts |= {
            "steps": chart_steps(evaluation.ensemble.search),
            "threshold_curves": chart_threshold_curves(evaluation.ensemble.search),
            "thresholds": chart_thresholds(evaluation.ensemble.search),
            "votes": chart_votes(evaluation.votes, evaluation.ensemble.search),
            "shares": chart_shares(evaluation.scores),
            "recall": chart_recall_over_snr(evaluation.snr),
        }
    if evaluation.reliability is not None:
        charts["reliability"] = chart_reliability(evaluation.reliability)
    charts["confusions"] = chart_confusions(evaluation.confusions)
    return {name: chart for name, chart in charts.items() if chart is not None}


def _confusions(pairs: pd.DataFrame) -> HtmlTable:
    caption = (
        "Recordings: the most probable species is the predicted one instead of the true one. Rows: "
        "the true species is missed and the predicted one is false. Only: the true species is "
        "confused with no other species."
    )
    if len(pairs) > _MAX_PAIRS:
        caption += f" The first {_MAX_PAIRS} of {len(pairs)} pairs."
    frame = pairs.head(_MAX_PAIRS).copy()
    for column in ("true_species", "predicted_species"):
        frame[column] = frame[column].map(display_name)
    return HtmlTable(_readable_columns(frame), caption, is_sortable=True)


def _soundscapes(
    table: pd.DataFrame | None, folder: Path, pages: Mapping[str, Path]
) -> HtmlTable | None:
    if table is None:
        return None
    links = {name: quote(page.relative_to(folder).as_posix()) for name, page in pages.items()}
    caption = (
        f"Labelled soundscapes, the lowest F1 first. {len(links)} of them have a page with "
        "spectrogram and audio, linked here (birdcall evaluate --pages N). Birds: the number of "
        "true species, summed over rows."
    )
    return HtmlTable(_readable_columns(table), caption, is_sortable=True, links=links)


def _species(per_class: pd.DataFrame) -> HtmlTable:
    frame = per_class.copy()
    frame.insert(0, "name", [display_name(code) for code in frame["ebird_code"]])
    caption = (
        "The ensemble by species. AP ranks by its mean probability. Precision and recall are those "
        "of the decisions chosen without the recordists of a row. Recordings and rows are the "
        "number of those with the species."
    )
    return HtmlTable(_readable_columns(frame), caption, is_sortable=True)


def _readable_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Write the names of columns as people read them: out-of-fold AP."""
    words = {"oof": "out-of-fold", "ap": "AP", "f1": "F1", "ebird": "eBird"}
    return frame.rename(columns=lambda name: " ".join(words.get(w, w) for w in name.split("_")))


# --- mistakes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """Framewise probabilities of a species in the row of a mistake, as the points of an SVG.

    scale: the probability at the top, in words. area: the members' mean; empty where nothing was
    predicted. lines: points, colour and dashes of each member. bars: left edge and width of each
    true event.
    """

    name: str
    scale: str
    area: str
    lines: tuple[tuple[str, str, str], ...]
    bars: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Card:
    """A mistake as the page shows it; ``picture`` and ``audio`` are empty with a ``reason``."""

    name: str
    score: str
    row: str
    true: str
    predicted: str
    curves: tuple[_Curve, ...]
    picture: str = ""
    audio: str = ""
    reason: str = ""


def _group_mistakes(mistakes: Iterable[PredictedMistake]) -> dict[str, list[_Card]]:
    """Return the cards under the heading of their kind of audio and of mistake."""
    groups: dict[str, list[_Card]] = {}
    for predicted in mistakes:
        mistake = predicted.mistake
        heading = f"{mistake.audio.capitalize()} soundscapes: {mistake.kind}"
        groups.setdefault(heading, []).append(_card(predicted))
    return groups


def _card(predicted: PredictedMistake) -> _Card:
    mistake = predicted.mistake
    picture = audio = ""
    if predicted.waveform is not None:
        # A shorter last row is padded: all pictures show five seconds.
        missing = max(0, SEGMENT_SECONDS * SAMPLE_RATE - len(predicted.waveform))
        waveform = np.pad(predicted.waveform, (0, missing))
        picture, audio = draw_tiles(waveform)[0].picture, encode_audio(waveform)
    return _Card(
        name=display_name(mistake.ebird_code),
        score=_describe_score(mistake),
        row=f"{mistake.recording}, {mistake.start:g} to {mistake.start + SEGMENT_SECONDS:g} s",
        true=", ".join(map(display_name, mistake.true)) or "no bird",
        predicted=", ".join(map(display_name, mistake.predicted)) or "no bird",
        curves=tuple(_curves(predicted)),
        picture=picture,
        audio=audio,
        reason=predicted.reason,
    )


def _describe_score(mistake: Mistake) -> str:
    if mistake.kind == FALSE:
        return f"predicted with a frame probability of {mistake.score:.2f}"
    if mistake.audio == LABELLED:
        return f"missed, with a frame probability of {-mistake.score:.2f}"
    return f"missed, {mistake.score:.0f} dB above the noise in its frequency band"


def _curves(predicted: PredictedMistake) -> Iterator[_Curve]:
    """Yield the framewise probabilities of the first species of the row, with their true events."""
    pixels_per_second = _CURVE_WIDTH / SEGMENT_SECONDS
    for index, code in enumerate(predicted.mistake.species[:_MAX_CURVES]):
        area, lines, scale = "", (), "not predicted"
        if predicted.frames is not None and np.isfinite(predicted.frames[:, index]).all():
            top = max(predicted.frames[:, index].max(), 1e-9)
            mean, *members = predicted.frames[:, index] / top
            area = f"0,{_CURVE_HEIGHT} {_points(mean)} {_CURVE_WIDTH},{_CURVE_HEIGHT}"
            styles = zip(members, _MEMBER_STYLES, strict=False)
            lines = tuple((_points(frames), color, dashes) for frames, (color, dashes) in styles)
            scale = describe_scale(top)
        bars = tuple(
            (
                f"{(event.onset - predicted.mistake.start) * pixels_per_second:.1f}",
                f"{(event.offset - event.onset) * pixels_per_second:.1f}",
            )
            for event in predicted.events
            if event.ebird_code == code
        )
        yield _Curve(display_name(code), scale, area=area, lines=lines, bars=bars)


def _points(frames: Sequence[float] | np.ndarray) -> str:
    """Return the points of an SVG line through shares of the scale; 0 is at the bottom."""
    xs = np.linspace(0, _CURVE_WIDTH, len(frames))
    ys = _CURVE_HEIGHT - 1 - np.asarray(frames) * (_CURVE_HEIGHT - 8)
    return " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
