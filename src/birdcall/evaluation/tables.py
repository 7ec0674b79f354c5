"""Make tables of scores: one row per name, kind of sound and metric, and a short one to read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from birdcall.config import SEGMENT_SECONDS
from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation.labelled import Labelled
from birdcall.evaluation.metrics import (
    DetectionCounts,
    average_precision,
    bootstrap_interval,
    event_based_counts,
    expected_calibration_error,
    false_birds_per_nocall_row,
    lwlrap,
    macro_average,
    precision,
    recall,
    roc_auc,
    row_f1_scores,
    segment_based_counts,
)
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.decision import Decision, combine
from birdcall.inference.events import detect_events

COLUMNS = (*("name", "members", "sound", "metric", "value", "low", "high", "rows", "recordings"),)
RECORDINGS, SIMULATED, LABELLED = "recordings", "simulated", "labelled"
ENSEMBLE, PRIOR = "ensemble", "prior"  # names that are no experiment's
SEGMENT_SECONDS_OF_EVENTS = 1.0
SNR_STEP_DB = 3.0
# People mark a bird's song by eye on a spectrogram of seconds: half a second is as good as it gets.
ONSET_COLLAR_SECONDS = 0.5

Rows = list[dict[str, object]]


def share_weights(truth: np.ndarray, nocall_share: float) -> np.ndarray:
    """Return weights of rows ``(rows,)``, mean 1, with which nocall rows are such a share of all.

    Row-wise F1 is a mean over rows: at any share of nocall it is a mixture of the mean over nocall
    rows and that over rows with birds. Where all rows are of one kind, they weigh 1.
    """
    nocall = ~truth.any(axis=1)
    share = nocall.mean()
    if share in (0.0, 1.0):
        return np.ones(len(truth))
    return np.where(nocall, nocall_share / share, (1 - nocall_share) / (1 - share))


def decided_rows(
    name: str,
    n_members: int,
    sound: str,
    scores: LabelledPredictions,
    named: np.ndarray,
    weights: np.ndarray | None = None,
) -> Rows:
    """Score what was named in the labelled rows ``(rows, known species)``; F1 has an interval."""
    truth, recordings = scores.labelled_truth, scores.recordings
    f1 = row_f1_scores(truth, named)
    # Recordings come again in several simulated soundscapes of a group.
    interval = bootstrap_interval(f1, scores.groups, weights=_positive(weights))
    values = {
        "row_wise_f1": float(np.average(f1, weights=weights)),
        "precision": precision(truth, named),
        "recall": recall(truth, named),
        "false_birds_per_nocall_row": false_birds_per_nocall_row(truth, named),
        "nocall_share_named": float(np.average(~named.any(axis=1), weights=weights)),
    }
    rows = _rows(
        name,
        n_members,
        sound=sound,
        values=values,
        n_rows=len(truth),
        n_recordings=len(set(recordings)),
    )
    rows[0] |= {"low": interval.low, "high": interval.high}
    return rows


def _positive(weights: np.ndarray | None) -> np.ndarray | None:
    return None if weights is None else np.maximum(weights, 1e-12)  # a share of 0 or 1


def ranked_rows(name: str, n_members: int, sound: str, scores: LabelledPredictions) -> Rows:
    """Score how members' mean probabilities rank, whatever is made of them."""
    classes = len(scores.classes)
    truth = scores.labelled_truth[:, :classes]
    probability = combine(scores.framewise)[scores.labelled]
    values = {
        "macro_ap": macro_average(average_precision(truth, probability)),
        "macro_auc": macro_average(roc_auc(truth, probability)),
        "lwlrap": lwlrap(truth, probability),
    }
    occurs = truth.any(axis=0)
    if occurs.any():
        clipwise = combine(scores.clipwise)[scores.labelled]
        values["ece"] = expected_calibration_error(truth[:, occurs], clipwise[:, occurs])
    return _rows(
        name,
        n_members,
        sound=sound,
        values=values,
        n_rows=len(truth),
        n_recordings=len(set(scores.recordings)),
    )


def out_of_fold_rows(
    name: str,
    n_members: int,
    clipwise: np.ndarray,
    targets: np.ndarray,
    calibrated: np.ndarray | None,
) -> Rows:
    """Score held-out recordings ``(recordings, classes)``; rows of NaN were held out by no run.

    targets: 1 for the primary label, UNKNOWN for secondary ones, which are left out of all but
    LWLRAP, where every label that is given counts.
    """
    known = ~np.isnan(clipwise).any(axis=1)
    scores, target = clipwise[known], targets[known]
    values = {
        "macro_ap": macro_average(average_precision(target > 0, scores, target != IGNORE_TARGET)),
        "macro_auc": macro_average(roc_auc(target > 0, scores, target != IGNORE_TARGET)),
        "lwlrap": lwlrap(target != 0, scores),
        "top1": float((scores.argmax(axis=1) == target.argmax(axis=1)).mean()),
        "ece": calibration_error(target, scores),
    }
    if calibrated is not None:
        values["ece_calibrated"] = calibration_error(target, calibrated[known])
    return _rows(
        name,
        n_members,
        sound=RECORDINGS,
        values=values,
        n_rows=len(scores),
        n_recordings=len(scores),
    )


def calibration_error(targets: np.ndarray, scores: np.ndarray) -> float:
    """Return the expected calibration error over all cells that are not UNKNOWN."""
    cells = targets != IGNORE_TARGET
    return expected_calibration_error(targets[cells][:, None] > 0, scores[cells][:, None])


def event_rows(name: str, labelled: Labelled, decision: Decision) -> Rows:
    """Score detected events against annotations: in segments of 1 s, and by onset and offset."""
    segments, events = DetectionCounts(), DetectionCounts()
    classes = labelled.scores.classes
    for recording, scores in labelled.frames.items():
        own = labelled.annotations[labelled.annotations["recording"] == recording]
        found = detect_events(scores, decision, classes)
        arguments = (
            own[["onset", "offset"]].to_numpy(float),
            list(own["ebird_code"]),
            [(event.onset, event.offset) for event in found],
            [event.ebird_code for event in found],
        )
        segments += segment_based_counts(*arguments, segment_seconds=SEGMENT_SECONDS_OF_EVENTS)
        events += event_based_counts(*arguments, onset_collar_seconds=ONSET_COLLAR_SECONDS)
    values = {"segment_f1": segments.f1, "event_f1": events.f1}
    n_members = len(labelled.scores.member_names)
    return _rows(
        name,
        n_members,
        sound=LABELLED,
        values=values,
        n_rows=len(labelled.annotations),
        n_recordings=len(labelled.frames),
    )


def _rows(
    name: str, n_members: int, sound: str, values: dict[str, float], n_rows: int, n_recordings: int
) -> Rows:
    return [
        {
            "name": name, "members": n_members, "sound": sound, "metric": metric, "value": value,
            "low": np.nan, "high": np.nan, "rows": n_rows, "recordings": n_recordings,
        }
        for metric, value in values.items()
    ]  # fmt: skip


def tidy_table(rows: Rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))


def simulated_at(share: float) -> str:
    """Return the name of the simulated soundscapes of one share of nocall."""
    return f"{SIMULATED} {share:.0%}"


def wide_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per name with the scores that people compare, as text."""
    found: dict[tuple[str, str, str], pd.Series] = {
        (row["name"], row["sound"], row["metric"]): row for _, row in table.iterrows()
    }
    sounds = list(dict.fromkeys(table["sound"]))
    shares = [sound for sound in sounds if sound.startswith(f"{SIMULATED} ")]
    columns = {
        "recordings: AP": (RECORDINGS, "macro_ap"),
        "simulated: F1": (SIMULATED, "row_wise_f1"),
        **{sound.removeprefix(SIMULATED).strip(): (sound, "row_wise_f1") for sound in shares},
        "AP": (SIMULATED, "macro_ap"),
        "labelled: F1": (LABELLED, "row_wise_f1"),
        "AP ": (LABELLED, "macro_ap"),
        "event F1": (LABELLED, "event_f1"),
    }
    rows = []
    for name in dict.fromkeys(table["name"]):
        row = {"name": name}
        for title, (sound, metric) in columns.items():
            if sound in sounds:
                row[title] = _cell(found.get((name, sound, metric)))
        rows.append(row)
    wide = pd.DataFrame(rows)
    is_used = (wide != "-").any(axis=0)
    return wide.loc[:, is_used]


def _cell(row: pd.Series | None) -> str:
    if row is None or np.isnan(row["value"]):
        return "-"
    interval = "" if np.isnan(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['value']:.3f}{interval}"


def terminal_table(table: pd.DataFrame) -> str:
    return wide_table(table).to_string(index=False)


def per_class_table(
    classes: Sequence[str],
    targets: np.ndarray,
    out_of_fold: np.ndarray,
    simulated: LabelledPredictions | None,
    named: np.ndarray | None,
    labelled: LabelledPredictions | None,
) -> pd.DataFrame:
    """Return a row per class: its recordings and rows, how it ranks, how often it is right."""
    known = ~np.isnan(out_of_fold).any(axis=1)
    columns = {"ebird_code": list(classes), "recordings": (targets == 1).sum(axis=0)}
    if known.any():
        target = targets[known]
        columns["oof_ap"] = average_precision(
            target > 0, out_of_fold[known], target != IGNORE_TARGET
        )
    for title, scores in (("simulated", simulated), ("labelled", labelled)):
        if scores is not None:
            truth = scores.labelled_truth[:, : len(classes)]
            columns[f"{title}_rows"] = truth.sum(axis=0)
            ranked = combine(scores.framewise)[scores.labelled]
            columns[f"{title}_ap"] = average_precision(truth, ranked)
    if simulated is not None and named is not None:
        truth, guess = simulated.labelled_truth[:, : len(classes)], named[:, : len(classes)]
        hits = (truth & guess).sum(axis=0)
        with np.errstate(invalid="ignore"):
            columns["simulated_precision"] = hits / guess.sum(axis=0)
            columns["simulated_recall"] = hits / truth.sum(axis=0)
    return pd.DataFrame(columns)


def recall_over_snr(
    events: pd.DataFrame, simulated: LabelledPredictions, named: np.ndarray
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
