"""Compute the tables of an evaluation from predictions and truth: scores, classes, confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from birdcall.config import SEGMENT_SECONDS
from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation import metrics
from birdcall.evaluation.labelled import LabelledSoundscapes
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.decision import Decision, average_members
from birdcall.inference.events import detect_events

RECORDINGS, SIMULATED, LABELLED = "recordings", "simulated", "labelled"  # kinds of audio
ENSEMBLE, PRIOR = "ensemble", "prior"  # names that are no experiment's
_SNR_STEP_DB = 3.0
_SEGMENT_SECONDS_OF_EVENTS = 1.0
# People mark a song by eye on a spectrogram: they are not more precise than half a second.
_ONSET_COLLAR_SECONDS = 0.5
_RELIABILITY_BINS = 10
_MIN_ROWS = 3  # of a class, for macro scores that one row moves less


class ScoreSubject(NamedTuple):
    """The subject of scores: an experiment or ensemble, and the kind of audio it is scored on."""

    name: str
    members: int
    audio: str


# --- the table of scores --------------------------------------------------------------------------


def decided_rows(
    subject: ScoreSubject,
    predictions: LabelledPredictions,
    predicted: np.ndarray,
    weights: np.ndarray | None = None,
) -> list[dict[str, object]]:
    """Score the species predicted in each labelled row, boolean ``(rows, known species)``."""
    truth = predictions.labelled_truth
    f1 = metrics.row_f1_scores(truth, predicted)
    # A recording is used in several simulated soundscapes of its group: groups are resampled.
    positive = None if weights is None else np.maximum(weights, 1e-12)
    interval = metrics.bootstrap_interval(f1, predictions.groups, weights=positive)
    precision, recall = metrics.precision_recall(truth, predicted)
    values = {
        "row_wise_f1": float(np.average(f1, weights=weights)),
        "precision": precision,
        "recall": recall,
        "false_birds_per_nocall_row": metrics.false_birds_per_nocall_row(truth, predicted),
        "nocall_share_named": float(np.average(~predicted.any(axis=1), weights=weights)),
    }
    f1_row, *rows = _rows(subject, values, len(truth), len(set(predictions.recordings)))
    return [f1_row | interval._asdict(), *rows]


def ranked_rows(
    subject: ScoreSubject,
    predictions: LabelledPredictions,
    learnable: np.ndarray,
    n_left_out: int = 0,
    *,
    calibrated: LabelledPredictions | None = None,
    decisions: Mapping[str, Decision] | None = None,
) -> list[dict[str, object]]:
    """Score the ranking by the members' mean probabilities, before any decision.

    Over the classes that a member could learn, ``learnable (classes,)``. n_left_out: of classes
    that were kept out of the soundscapes, beside species that occur there and are not learnable.
    calibrated: the same rows with calibrated probabilities, for their calibration error. decisions:
    of each group, for the ranking by what they compare with thresholds (``decision_macro_ap``).
    ``_min3``: over the classes that are in three rows or more; with fewer, one row moves AP by 0.5.
    """
    occurs, n_classes = predictions.labelled_truth.any(axis=0), len(predictions.classes)
    truth = predictions.labelled_truth[:, :n_classes] & learnable
    probability = average_members(predictions.framewise)[predictions.labelled]
    rankings = {"": probability}
    if decisions is not None:
        rankings["decision_"] = predictions.strength(decisions)
    values = {"lwlrap": metrics.lwlrap(truth, probability)}
    is_frequent = truth.sum(axis=0) >= _MIN_ROWS
    for prefix, score in rankings.items():
        for name, measure in (("ap", metrics.average_precision), ("auc", metrics.roc_auc)):
            of_class = values[f"{prefix}macro_{name}"] = measure(truth, score)
            values[f"{prefix}macro_{name}_min{_MIN_ROWS}"] = np.where(is_frequent, of_class, np.nan)
    is_scored = truth.any(axis=0)
    if is_scored.any():
        for metric, item in (("ece", predictions), ("ece_calibrated", calibrated)):
            if item is not None:
                clipwise = average_members(item.clipwise)[item.labelled][:, is_scored]
                values[metric] = metrics.expected_calibration_error(truth[:, is_scored], clipwise)
    n_left_out += int(occurs.sum() - is_scored.sum())
    n_recordings = len(set(predictions.recordings))
    return _rows(subject, values, len(truth), n_recordings, n_left_out=n_left_out)


def out_of_fold_rows(
    subject: ScoreSubject,
    probabilities: np.ndarray,
    targets: np.ndarray,
    *,
    learnable: np.ndarray,
) -> list[dict[str, object]]:
    """Score held-out recordings ``(recordings, classes)``; rows of NaN were held out by no run.

    targets: 1 for the primary label, `IGNORE_TARGET` for secondary labels, which are left out of
    all scores but LWLRAP, where every given label counts. learnable: whether the run that held the
    recording out could learn the class; other labels are in no score.
    """
    known = ~np.isnan(probabilities).any(axis=1)
    probability, target, could_learn = probabilities[known], targets[known], learnable[known]
    is_scored, is_true = (target != IGNORE_TARGET) & could_learn, (target > 0) & could_learn
    is_right = probability.argmax(axis=1) == target.argmax(axis=1)
    values = {
        "macro_ap": metrics.average_precision(is_true, probability, is_scored),
        "macro_auc": metrics.roc_auc(is_true, probability, is_scored),
        "lwlrap": metrics.lwlrap((target != 0) & could_learn, probability),
        "top1": float(np.mean(is_right[is_true.any(axis=1)])) if is_true.any() else np.nan,
    }
    if is_scored.any():
        cells, of_cells = is_true[is_scored][:, None], probability[is_scored][:, None]
        values["ece"] = metrics.expected_calibration_error(cells, of_cells)
    n_left_out = int((target > 0).any(axis=0).sum() - is_true.any(axis=0).sum())
    n_recordings = len(probability)
    return _rows(subject, values, n_recordings, n_recordings, n_left_out=n_left_out)


def event_rows(
    name: str, labelled: LabelledSoundscapes, decisions: Mapping[str, Decision]
) -> list[dict[str, object]]:
    """Score the events of each recording's decision: in segments of 1 s, and by their times."""
    segments, events = metrics.DetectionCounts(), metrics.DetectionCounts()
    classes = labelled.predictions.classes
    for recording, scores in labelled.frames.items():
        annotations = labelled.annotations[labelled.annotations["recording"] == recording]
        detected = detect_events(scores, decisions[recording], classes)
        arguments = (
            annotations[["onset", "offset"]].to_numpy(float),
            list(annotations["ebird_code"]),
            [(event.onset, event.offset) for event in detected],
            [event.ebird_code for event in detected],
        )
        segments += metrics.segment_based_counts(
            *arguments, segment_seconds=_SEGMENT_SECONDS_OF_EVENTS
        )
        events += metrics.event_based_counts(*arguments, onset_collar_seconds=_ONSET_COLLAR_SECONDS)
    subject = ScoreSubject(name, len(labelled.predictions.member_names), LABELLED)
    values = {"segment_f1": segments.f1, "event_f1": events.f1}
    return _rows(subject, values, len(labelled.annotations), len(labelled.frames))


def _rows(
    subject: ScoreSubject,
    values: Mapping[str, float | np.ndarray],
    n_rows: int,
    n_recordings: int,
    *,
    n_left_out: int = 0,
) -> list[dict[str, object]]:
    """Return a row of the table of scores per metric; its keys are the columns, in order.

    A value of each class ``(classes,)``, NaN where undefined, is averaged; only such a row says
    over how many ``classes`` it is, and how many are ``left_out``.
    """
    rows = []
    for metric, value in values.items():
        n_classes = pd.NA
        if is_macro := isinstance(value, np.ndarray):
            n_classes, value = int((~np.isnan(value)).sum()), metrics.macro_average(value)
        rows.append(
            subject._asdict()
            | {"metric": metric, "value": value, "low": np.nan, "high": np.nan}
            | {"rows": n_rows, "recordings": n_recordings}
            | {"classes": n_classes, "left_out": n_left_out if is_macro else pd.NA}
        )
    return rows


def wide_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return a row per name with the scores that people compare, as text."""
    texts: dict[tuple[str, str, str], str] = {}
    for row in scores.dropna(subset="value").itertuples():
        interval = "" if np.isnan(row.low) else f" [{row.low:.3f}, {row.high:.3f}]"
        texts[row.name, row.audio, row.metric] = f"{row.value:.3f}{interval}"
    shares = [audio for audio in scores["audio"].unique() if audio.startswith(f"{SIMULATED} ")]
    columns = {
        "recordings: AP": (RECORDINGS, "macro_ap"),
        "simulated: F1": (SIMULATED, "row_wise_f1"),
        **{audio.removeprefix(SIMULATED).strip(): (audio, "row_wise_f1") for audio in shares},
        "AP": (SIMULATED, "macro_ap"),
        "labelled: F1": (LABELLED, "row_wise_f1"),
        "AP ": (LABELLED, "macro_ap"),
        "event F1": (LABELLED, "event_f1"),
    }
    names = list(dict.fromkeys(scores["name"]))
    cells = {
        title: [texts.get((name, *source), "-") for name in names]
        for title, source in columns.items()
    }
    used = {title: column for title, column in cells.items() if set(column) != {"-"}}
    return pd.DataFrame({"name": names} | used)


# --- classes, levels -----------------------------------------------------------------------------


def per_class_table(
    classes: Sequence[str],
    *,
    targets: np.ndarray,
    learnable: np.ndarray,
    out_of_fold: np.ndarray,
    simulated: LabelledPredictions | None,
    predicted: np.ndarray | None,
    labelled: LabelledPredictions | None,
    decision: Decision,
) -> pd.DataFrame:
    """Return a row per class: its recordings and rows, average precision, precision, recall.

    targets, learnable, out_of_fold: ``(recordings, classes)``, as `out_of_fold_rows` scores them;
    left_out: the class's recordings that are not scored, where there are some. predicted: the
    species predicted in the labelled rows of ``simulated``, ``(rows, known species)``. decision:
    whose strengths rank labelled rows, beside the members' mean probability.
    """
    known = ~np.isnan(out_of_fold).any(axis=1)
    columns = {"ebird_code": list(classes), "recordings": (targets == 1).sum(axis=0)}
    if known.any():
        target, could_learn = targets[known], learnable[known]
        n_left_out = ((target > 0) & ~could_learn).sum(axis=0)
        if n_left_out.any():
            columns["left_out"] = n_left_out
        columns["oof_ap"] = metrics.average_precision(
            (target > 0) & could_learn, out_of_fold[known], (target != IGNORE_TARGET) & could_learn
        )
    for title, predictions in (("simulated", simulated), ("labelled", labelled)):
        if predictions is not None:
            truth = predictions.labelled_truth[:, : len(classes)]
            columns[f"{title}_rows"] = truth.sum(axis=0)
            probability = average_members(predictions.framewise)[predictions.labelled]
            columns[f"{title}_ap"] = metrics.average_precision(truth, probability)
    if labelled is not None:
        truth = labelled.labelled_truth[:, : len(classes)]
        strength = labelled.strength(dict.fromkeys(labelled.groups, decision))
        columns["labelled_decision_ap"] = metrics.average_precision(truth, strength)
        columns["labelled_decision_auc"] = metrics.roc_auc(truth, strength)
    if simulated is not None and predicted is not None:
        truth = simulated.labelled_truth[:, : len(classes)]
        predicted = predicted[:, : len(classes)]
        hits = (truth & predicted).sum(axis=0)
        with np.errstate(invalid="ignore"):
            columns["simulated_precision"] = hits / predicted.sum(axis=0)
            columns["simulated_recall"] = hits / truth.sum(axis=0)
    return pd.DataFrame(columns)


def snr_table(
    events: pd.DataFrame, simulated: LabelledPredictions, predicted: np.ndarray
) -> pd.DataFrame:
    """Return the recall of simulated events by intervals of 3 dB of their SNR.

    An event is recalled where its species is predicted in a segment that contains a part of it.
    predicted: ``(labelled rows, known species)``. Columns: snr_db (the low end of the interval),
    events, recall, standard_error, centre_db.
    """
    events = events[events["recording"].isin(set(simulated.recordings))]
    column = {code: index for index, code in enumerate(simulated.classes)}
    names = simulated.segments["recording"].iloc[simulated.starts]
    first_row = dict(zip(names, simulated.starts, strict=True))
    hits = predicted & simulated.labelled_truth
    is_recalled = []
    for event in events.itertuples():
        start = first_row[event.recording] + int(event.onset // SEGMENT_SECONDS)
        stop = first_row[event.recording] + int(event.offset // SEGMENT_SECONDS) + 1
        is_recalled.append(hits[start:stop, column[event.ebird_code]].any())
    step = (events["snr_db"] // _SNR_STEP_DB * _SNR_STEP_DB).to_numpy()
    by_step = pd.DataFrame({"snr_db": step, "is_recalled": is_recalled}).groupby("snr_db")
    table = by_step["is_recalled"].agg(events="size", recall="mean").reset_index()
    error = np.sqrt(table["recall"] * (1 - table["recall"]) / table["events"])
    return table.assign(standard_error=error, centre_db=table["snr_db"] + _SNR_STEP_DB / 2)


def reliability_table(
    probabilities: np.ndarray, calibrated: np.ndarray | None, targets: np.ndarray
) -> pd.DataFrame:
    """Return how often a class is present, by the probability predicted for it.

    probabilities, calibrated, targets: ``(rows, classes)``; NaN and `IGNORE_TARGET` do not count.
    Columns: probabilities ("predicted" or "calibrated"), mean_probability, share_true, cells.
    """
    cells = (targets != IGNORE_TARGET) & ~np.isnan(probabilities)
    truth = targets[cells][:, None] > 0
    tables = []
    for name, values in (("predicted", probabilities), ("calibrated", calibrated)):
        if values is not None:
            curve = metrics.reliability(truth, values[cells][:, None], _RELIABILITY_BINS)
            columns = zip(("mean_probability", "share_true", "cells"), curve, strict=True)
            tables.append(pd.DataFrame({"probabilities": name} | dict(columns)))
    return pd.concat(tables, ignore_index=True)


# --- confusions -----------------------------------------------------------------------------------


def confusion_table(
    classes: Sequence[str],
    *,
    probabilities: np.ndarray,
    targets: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
) -> pd.DataFrame:
    """Return the pairs of species that are confused, the most frequent first.

    probabilities, targets: ``(recordings, classes)`` of held-out recordings, of which those count
    whose most probable species is wrong; a secondary label is not wrong. truth, predicted: rows
    ``(rows, known species)``, beginning with the classes; a row counts for each pair of a missed
    and a false species. Columns: true_species, predicted_species, recordings, rows, only ("yes"
    where the true species is confused with no other).
    """
    known = ~np.isnan(probabilities).any(axis=1)
    probability, target = probabilities[known], targets[known]
    best, true = probability.argmax(axis=1), target.argmax(axis=1)
    is_wrong = (best != true) & (target[np.arange(len(best)), best] != IGNORE_TARGET)
    recordings = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(recordings, (true[is_wrong], best[is_wrong]), 1)
    missed = (truth & ~predicted)[:, : len(classes)].astype(int)
    false = (predicted & ~truth)[:, : len(classes)].astype(int)
    rows = missed.T @ false
    total = recordings + rows
    is_only = (total > 0).sum(axis=1) == 1
    table = pd.DataFrame(
        [
            (classes[i], classes[j], recordings[i, j], rows[i, j], "yes" if is_only[i] else "")
            for i, j in zip(*np.nonzero(total), strict=True)
        ],
        columns=["true_species", "predicted_species", "recordings", "rows", "only"],
    )
    table = table.sort_values(["true_species", "predicted_species"])
    order = (-table["recordings"] - table["rows"]).argsort(kind="stable")
    return table.iloc[order].reset_index(drop=True)
