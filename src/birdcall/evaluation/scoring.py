"""Score runs on sound they were not trained on, and choose the decision that the kernel applies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import uniform_filter

from birdcall.audio import AudioError
from birdcall.checkpoint import read_checkpoint, require_same_classes
from birdcall.config import NOCALL, SEGMENT_SECONDS
from birdcall.data.dataset import TrainingData, make_targets
from birdcall.decision import Decision, combine, decide
from birdcall.inference import Ensemble, SegmentScores, load_ensemble, score_recordings
from birdcall.metrics import (
    Interval,
    average_precision,
    bootstrap_interval,
    labels_to_matrix,
    macro_average,
    roc_auc,
    row_f1_scores,
    row_wise_f1,
)
from birdcall.outputs import read_submission
from birdcall.soundscapes import (
    example_audio_folder,
    find_audio,
    format_labels,
    read_labelled_soundscapes,
    read_solution,
    read_test_rows,
)
from birdcall.taxonomy import all_species
from birdcall.training.validation import score_out_of_fold

logger = logging.getLogger(__name__)

# At 1.0 no bird is ever named, so that choosing can also come out at all-nocall.
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20)) + (1.0,)


@dataclass(frozen=True)
class LabelledScores:
    """What members heard in labelled soundscapes, and what is there.

    rows: filename, seconds, row_id of each row. truth: ``(rows, known species)``; its first columns
    are the model's classes, the rest are competition species that it cannot name and so misses.
    clipwise, framewise: ``(members, rows, classes)``.
    """

    rows: pd.DataFrame
    truth: np.ndarray
    clipwise: np.ndarray
    framewise: np.ndarray
    member_names: tuple[str, ...]

    @property
    def recordings(self) -> list[str]:
        return list(self.rows["filename"])

    def of_members(self, chosen: Sequence[int]) -> LabelledScores:
        """Return the scores of some members, by position."""
        return replace(
            self,
            clipwise=self.clipwise[list(chosen)],
            framewise=self.framewise[list(chosen)],
            member_names=tuple(self.member_names[position] for position in chosen),
        )


@dataclass(frozen=True)
class Evaluation:
    """All that `birdcall evaluate` found.

    table: a row per experiment, one for the ensemble, one for all-nocall.
    classes: a row per class, with its support and scores of the ensemble.
    f1_grid: row-wise F1 of the ensemble, ``(clip thresholds, frame thresholds)`` of `THRESHOLDS`.
    """

    table: pd.DataFrame
    per_class: pd.DataFrame
    out_of_fold: pd.DataFrame
    decision: Decision
    labelled: LabelledScores | None
    f1_grid: np.ndarray | None


def evaluate_runs(
    folders: Sequence[Path], data: TrainingData, device: torch.device | str = "cpu"
) -> Evaluation:
    """Score the checkpoints in ``folders``, each experiment alone and all together."""
    for folder in folders:
        require_same_classes(folder, read_checkpoint(folder), data.classes)
    ensemble = load_ensemble(folders, device)
    experiments = [member.checkpoint.experiment.name for member in ensemble.members]
    out_of_fold = predict_out_of_fold(ensemble, data)
    labelled = score_labelled_soundscapes(ensemble, data.folder)
    targets = make_targets(data.recordings, data.classes, 0.0) > 0
    groups = {name: [] for name in experiments}
    for position, name in enumerate(experiments):
        groups[name].append(position)
    rows = [_score_row(name, out_of_fold[name], targets, labelled, groups[name]) for name in groups]
    everyone = list(range(len(experiments)))
    rows.append(_score_row("ensemble", _average(out_of_fold), targets, labelled, everyone))
    rows.append(_nocall_row(labelled))
    decision, grid = _choose_for_all(labelled, tuple(m.name for m in ensemble.members))
    return Evaluation(
        pd.DataFrame(rows),
        _per_class(_average(out_of_fold), targets, labelled, data.classes),
        _out_of_fold_table(out_of_fold, data),
        decision,
        labelled,
        grid,
    )


def predict_out_of_fold(ensemble: Ensemble, data: TrainingData) -> dict[str, np.ndarray]:
    """Return for each experiment the scores ``(recordings, classes)`` of its held-out recordings.

    Every member hears only the fold it was not trained on. A recording in the fold of no member is
    NaN: not every fold needs to have been trained.
    """
    scores: dict[str, np.ndarray] = {}
    shape = (len(data.recordings), len(data.classes))
    for member in ensemble.members:
        held_out = (data.recordings["fold"] == member.checkpoint.fold).to_numpy()
        own = scores.setdefault(member.checkpoint.experiment.name, np.full(shape, np.nan))
        alone = Ensemble([member], ensemble.device)
        own[held_out] = score_out_of_fold(alone, data.recordings[held_out], data.folder)
    return scores


def score_labelled_soundscapes(ensemble: Ensemble, folder: Path) -> LabelledScores | None:
    """Score the labelled example soundscapes; None where there are none.

    A soundscape whose recording is missing or does not decode is left out and named in the log.
    """
    if not (folder / "example_test_audio_summary.csv").is_file():
        logger.warning("%s has no labelled soundscapes: thresholds stay at their defaults", folder)
        return None
    known = dict.fromkeys((*ensemble.classes, *(s.ebird_code for s in all_species())))
    rows = read_labelled_soundscapes(folder, known)
    paths = {name: find_audio(example_audio_folder(folder), name) for name in rows["filename"]}
    for name in [name for name, path in paths.items() if path is None]:
        logger.warning("%s: no recording of this labelled soundscape; left out", name)
    heard = {}
    found = {name: path for name, path in paths.items() if path is not None}
    for name, scores in score_recordings(ensemble, found):
        if isinstance(scores, AudioError):
            logger.warning("%s; this labelled soundscape is left out", scores)
        else:
            heard[name] = scores
    rows = rows[_is_heard(rows, heard)].reset_index(drop=True)
    return _gather(rows, heard, ensemble, list(known)) if len(rows) else None


def _is_heard(rows: pd.DataFrame, heard: dict[str, SegmentScores]) -> list[bool]:
    """Say which rows have a score: one may be labelled beyond the end of its recording."""
    ends = zip(rows["filename"], rows["seconds"], strict=True)
    return [
        name in heard and end / SEGMENT_SECONDS <= heard[name].clipwise.shape[1]
        for name, end in ends
    ]


def _gather(
    rows: pd.DataFrame,
    heard: dict[str, SegmentScores],
    ensemble: Ensemble,
    known: list[str],
) -> LabelledScores:
    places = [
        (name, round(end / SEGMENT_SECONDS) - 1)
        for name, end in zip(rows["filename"], rows["seconds"], strict=True)
    ]
    return LabelledScores(
        rows,
        labels_to_matrix([format_labels(birds) for birds in rows["birds"]], known),
        np.stack([heard[name].clipwise[:, segment] for name, segment in places], axis=1),
        np.stack([heard[name].framewise[:, segment] for name, segment in places], axis=1),
        tuple(member.name for member in ensemble.members),
    )


# --- the decision -------------------------------------------------------------------------------


def row_scores_on_grid(labelled: LabelledScores) -> np.ndarray:
    """Return each row's F1 at all pairs of thresholds: ``(clip, frame, rows)``."""
    clipwise, framewise = combine(labelled.clipwise), combine(labelled.framewise)
    pairs = product(THRESHOLDS, THRESHOLDS)
    rows = [
        _row_f1(labelled, decide(clipwise, framewise, Decision(clip, frame)))
        for clip, frame in pairs
    ]
    return np.array(rows).reshape(len(THRESHOLDS), len(THRESHOLDS), -1)


def _row_f1(labelled: LabelledScores, chosen: np.ndarray) -> np.ndarray:
    unnamed = labelled.truth.shape[1] - chosen.shape[1]
    return row_f1_scores(labelled.truth, np.pad(chosen, ((0, 0), (0, unnamed))))


def choose_thresholds(grid: np.ndarray) -> tuple[int, int]:
    """Return the place of the best pair of thresholds in a grid of F1 ``(clip, frame)``.

    Best is the mean of a pair and its eight neighbours, since a peak with steep sides is luck; of
    equals the highest thresholds, since a false bird on an empty row costs most.
    """
    smooth = uniform_filter(grid, size=3, mode="nearest").round(9)
    places = np.argwhere(smooth == smooth.max())
    clip, frame = max(map(tuple, places), key=lambda place: (sum(place), place))
    return int(clip), int(frame)


def nested_row_scores(row_scores: np.ndarray, recordings: Sequence[str]) -> np.ndarray:
    """Return each row's F1 ``(rows,)`` under thresholds that were chosen without its recording."""
    names = np.asarray(recordings)
    nested = np.empty(len(names))
    for name in np.unique(names):
        held_out = names == name
        clip, frame = choose_thresholds(row_scores[:, :, ~held_out].mean(axis=2))
        nested[held_out] = row_scores[clip, frame, held_out]
    return nested


def _choose_for_all(
    labelled: LabelledScores | None, members: tuple[str, ...]
) -> tuple[Decision, np.ndarray | None]:
    if labelled is None:
        return Decision(members=members, chosen_on="nothing: no labelled soundscapes"), None
    row_scores = row_scores_on_grid(labelled)
    grid = row_scores.mean(axis=2)
    clip, frame = choose_thresholds(grid)
    score = {"row_wise_f1": round(float(grid[clip, frame]), 4)}
    n_recordings = len(set(labelled.recordings))
    if n_recordings > 1:
        nested = nested_row_scores(row_scores, labelled.recordings).mean()
        score["nested_row_wise_f1"] = round(float(nested), 4)
    decision = Decision(
        THRESHOLDS[clip],
        THRESHOLDS[frame],
        members=members,
        chosen_on=f"{len(labelled.rows)} rows of {n_recordings} labelled soundscapes",
        score=score,
    )
    return decision, grid


# --- tables -------------------------------------------------------------------------------------


def _score_row(
    name: str,
    out_of_fold: np.ndarray,
    targets: np.ndarray,
    labelled: LabelledScores | None,
    members: list[int],
) -> dict[str, object]:
    known = ~np.isnan(out_of_fold).any(axis=1)
    row: dict[str, object] = {
        "name": name,
        "members": len(members),
        "oof_recordings": int(known.sum()),
        "oof_macro_ap": macro_average(average_precision(targets[known], out_of_fold[known])),
        "oof_macro_auc": macro_average(roc_auc(targets[known], out_of_fold[known])),
    }
    if labelled is None:
        return row
    chosen = labelled.of_members(members)
    truth = labelled.truth[:, : targets.shape[1]]
    row["soundscape_macro_ap"] = macro_average(average_precision(truth, combine(chosen.framewise)))
    row |= _interval_columns(_held_out_row_scores(chosen), labelled.recordings)
    return row


def _held_out_row_scores(labelled: LabelledScores) -> np.ndarray:
    """Return nested scores, or with a single soundscape those at the default thresholds."""
    if len(set(labelled.recordings)) > 1:
        return nested_row_scores(row_scores_on_grid(labelled), labelled.recordings)
    clipwise, framewise = combine(labelled.clipwise), combine(labelled.framewise)
    return _row_f1(labelled, decide(clipwise, framewise, Decision()))


def _nocall_row(labelled: LabelledScores | None) -> dict[str, object]:
    row: dict[str, object] = {"name": f"all {NOCALL}", "members": 0}
    if labelled is not None:
        row |= _interval_columns(
            row_f1_scores(labelled.truth, np.zeros_like(labelled.truth)),
            labelled.recordings,
        )
    return row


def _interval_columns(row_scores: np.ndarray, recordings: Sequence[str]) -> dict[str, float]:
    interval = bootstrap_interval(row_scores, recordings)
    return {
        "soundscape_f1": float(row_scores.mean()),
        "f1_low": interval.low,
        "f1_high": interval.high,
    }


def _average(out_of_fold: dict[str, np.ndarray]) -> np.ndarray:
    return np.mean(list(out_of_fold.values()), axis=0)


def _per_class(
    out_of_fold: np.ndarray,
    targets: np.ndarray,
    labelled: LabelledScores | None,
    classes: Sequence[str],
) -> pd.DataFrame:
    known = ~np.isnan(out_of_fold).any(axis=1)
    table = pd.DataFrame(
        {
            "ebird_code": list(classes),
            "recordings": targets.sum(axis=0),
            "oof_ap": average_precision(targets[known], out_of_fold[known]),
        }
    )
    if labelled is not None:
        truth = labelled.truth[:, : len(classes)]
        table["soundscape_rows"] = truth.sum(axis=0)
        table["soundscape_ap"] = average_precision(truth, combine(labelled.framewise))
    return table


def _out_of_fold_table(out_of_fold: dict[str, np.ndarray], data: TrainingData) -> pd.DataFrame:
    """Return a row per experiment and recording, with a column of probabilities per class."""
    parts = []
    for name, scores in out_of_fold.items():
        keys = data.recordings[["path", "ebird_code", "fold"]].reset_index(drop=True)
        columns = pd.DataFrame(scores, columns=list(data.classes))
        parts.append(pd.concat([keys.assign(experiment=name), columns], axis=1))
    return pd.concat(parts, ignore_index=True)


# --- a finished submission ----------------------------------------------------------------------


@dataclass(frozen=True)
class SubmissionScore:
    """A submission against the truth of the hidden rows, with all-nocall beside it."""

    row_wise_f1: float
    interval: Interval
    all_nocall: float
    n_rows: int


class SubmissionRows(NamedTuple):
    """A submission's rows in the order of test.csv: each one's F1, that of nocall, and whose."""

    f1: np.ndarray
    nocall_f1: np.ndarray
    recordings: list[str]


def score_submission_rows(data: Path, submission: Path) -> SubmissionRows:
    """Score each row of ``submission.csv`` by ``solution.csv``, which only made data has."""
    rows = read_test_rows(data)
    predicted = read_submission(submission, list(rows["row_id"]))["birds"]
    solution = read_solution(data).set_index("row_id")["birds"]
    missing = [row_id for row_id in rows["row_id"] if row_id not in solution.index]
    if missing:
        raise ValueError(f"{data / 'solution.csv'}: no row {missing[0]}, which test.csv has")
    truth = list(solution.loc[rows["row_id"]])
    f1 = [row_wise_f1([t], [p]) for t, p in zip(truth, predicted, strict=True)]
    nocall_f1 = [row_wise_f1([t], [NOCALL]) for t in truth]
    return SubmissionRows(np.array(f1), np.array(nocall_f1), list(rows["audio_id"]))


def score_submission(data: Path, submission: Path) -> SubmissionScore:
    """Score ``submission.csv`` as a whole, with an interval from resampled recordings."""
    rows = score_submission_rows(data, submission)
    return SubmissionScore(
        float(rows.f1.mean()),
        bootstrap_interval(rows.f1, rows.recordings),
        float(rows.nocall_f1.mean()),
        len(rows.f1),
    )
