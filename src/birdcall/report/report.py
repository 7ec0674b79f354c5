"""Write the report of an evaluation: one self-contained page that opens from disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import birdcall
from birdcall.audio.reading import read_audio
from birdcall.config import SEGMENT_SECONDS, Experiment
from birdcall.evaluation.mistakes import FALSE, Mistake, PredictedMistake
from birdcall.evaluation.scoring import Evaluation, describe_classes
from birdcall.evaluation.tables import LABELLED, wide_table
from birdcall.inference.decision import Decision, average_members
from birdcall.inference.windows import FRAMES_PER_SEGMENT
from birdcall.report.architecture import plot_architecture, plot_layers, read_layers
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
    draw_tiles,
    encode_audio,
    read_asset,
    write_page,
)
from birdcall.report.plots import (
    SHOWN_SECONDS,
    plot_pipeline,
    plot_recall_over_snr,
    plot_soundscape,
)
from birdcall.storage.files import UserError
from birdcall.taxonomy import display_name

PAGES_FOLDER = "soundscapes"  # beside the report
_MAX_PAIRS = 200  # of confused species, in the table
_MAX_CURVES = 4  # of a mistake: its species, and others of its row
_CURVE_WIDTH, _CURVE_HEIGHT = 250, 44  # of framewise probabilities: a pixel is 20 ms
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
            "that was chosen without their recordists. On labelled soundscapes the decision is the "
            "one that was chosen on simulated soundscapes. F1 is the competition's row-wise F1. "
            "Intervals (95 %) resample groups of recordists, or labelled soundscapes. The prior "
            "predicts from the frequency of each species alone. "
            + describe_classes(evaluation.scores),
        ),
        decision=describe_decision(evaluation.ensemble.decision),
        charts=charts,
        confusions=_confusions(evaluation.confusions),
        mistakes=_group_mistakes(mistakes),
        foreign_labels={} if labelled is None else dict(labelled.foreign.most_common()),
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
    return text


def project_figures(
    experiment: Experiment, evaluation: Callable[[], Evaluation], n_classes: int = 264
) -> dict[str, Callable[[], Figure]]:
    """Return what draws the figures of README and docs, by file name; see `plots.write_figures`.

    experiment: the one whose architecture is drawn. evaluation: called once, when it is needed.
    """
    evaluation = cache(evaluation)
    return {
        "pipeline.svg": plot_pipeline,
        "layers.svg": lambda: plot_layers(read_layers(Path(birdcall.__file__).parent)),
        "architecture.svg": lambda: plot_architecture(experiment, n_classes),
        "snr.svg": lambda: _plot_recall(evaluation()),
        "spectrogram.webp": lambda: _plot_fullest_soundscape(evaluation()),
    }


def _plot_recall(evaluation: Evaluation) -> Figure:
    if evaluation.snr is None:
        raise UserError("no soundscape was simulated for all runs")
    return plot_recall_over_snr(evaluation.snr)


def _plot_fullest_soundscape(evaluation: Evaluation) -> Figure:
    """Draw the labelled soundscape with most birds in its first minute."""
    labelled = evaluation.labelled
    if labelled is None:
        raise UserError("there are no labelled soundscapes")
    predictions = labelled.predictions
    is_shown = predictions.segments["seconds"].to_numpy() <= SHOWN_SECONDS
    recordings = predictions.segments["recording"].to_numpy()
    n_birds = pd.Series(predictions.truth[is_shown].sum(axis=1))
    recording = n_birds.groupby(recordings[is_shown]).sum().idxmax()
    predictions = predictions.select(recordings == recording)
    n_rows, n_classes = SHOWN_SECONDS // SEGMENT_SECONDS, len(predictions.classes)
    predicted = np.zeros(predictions.truth.shape, dtype=bool)
    predicted[predictions.labelled] = predictions.decide(evaluation.ensemble.decision)
    predicted, truth = predicted[:n_rows, :n_classes], predictions.truth[:n_rows, :n_classes]
    probability = average_members(predictions.framewise)[:n_rows].T
    columns = np.flatnonzero(truth.any(axis=0) | predicted.any(axis=0))
    if not len(columns):
        columns = np.argsort(-probability.max(axis=1))[:3]
    frames = labelled.frames.get(recording)
    if frames is not None and frames.frames.shape[1]:
        probability = frames.frames[:, : len(truth) * FRAMES_PER_SEGMENT]
    return plot_soundscape(
        read_audio(labelled.paths[recording], SAMPLE_RATE),
        SAMPLE_RATE,
        codes=[predictions.classes[column] for column in columns],
        truth=truth[:, columns],
        predicted=predicted[:, columns],
        probability=probability[columns],
    )


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

    area: the members' mean; empty where nothing was predicted. lines: points, colour and dashes of
    each member. bars: left edge and width of each true event.
    """

    name: str
    highest: str
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
        area, lines, highest = "", (), "not predicted"
        if predicted.frames is not None and np.isfinite(predicted.frames[:, index]).all():
            mean, *members = predicted.frames[:, index]
            area = f"0,{_CURVE_HEIGHT} {_points(mean)} {_CURVE_WIDTH},{_CURVE_HEIGHT}"
            styles = zip(members, _MEMBER_STYLES, strict=False)
            lines = tuple((_points(frames), color, dashes) for frames, (color, dashes) in styles)
            highest = f"at most {mean.max():.2f}"
        bars = tuple(
            (
                f"{(event.onset - predicted.mistake.start) * pixels_per_second:.1f}",
                f"{(event.offset - event.onset) * pixels_per_second:.1f}",
            )
            for event in predicted.events
            if event.ebird_code == code
        )
        yield _Curve(display_name(code), highest, area=area, lines=lines, bars=bars)


def _points(frames: Sequence[float] | np.ndarray) -> str:
    """Return the points of an SVG line through probabilities; 0 is at the bottom."""
    xs = np.linspace(0, _CURVE_WIDTH, len(frames))
    ys = _CURVE_HEIGHT - 1 - np.asarray(frames) * (_CURVE_HEIGHT - 8)
    return " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
