"""Score a finished submission by the truth of its rows, which only made data has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from birdcall.config import NOCALL
from birdcall.metrics import Interval, bootstrap_interval, row_wise_f1
from birdcall.outputs import read_submission
from birdcall.soundscapes import read_solution, read_test_rows


class SubmissionRows(NamedTuple):
    """A submission's rows in the order of test.csv: each one's F1, that of nocall, and whose."""

    f1: np.ndarray
    nocall_f1: np.ndarray
    recordings: list[str]


@dataclass(frozen=True)
class SubmissionScore:
    """A submission against the truth of the hidden rows, with all-nocall beside it."""

    row_wise_f1: float
    interval: Interval
    all_nocall: float
    n_rows: int

    def __str__(self) -> str:
        return (
            f"submission: row-wise F1 {self.row_wise_f1:.3f} "
            f"[{self.interval.low:.3f}, {self.interval.high:.3f}] on {self.n_rows} hidden rows; "
            f"all nocall: {self.all_nocall:.3f}; "
            f"difference {self.row_wise_f1 - self.all_nocall:+.3f}"
        )


def score_submission(data: Path, submission: Path) -> SubmissionScore:
    """Score ``submission.csv`` as a whole, with an interval from resampled recordings."""
    rows = score_submission_rows(data, submission)
    return SubmissionScore(
        float(rows.f1.mean()),
        bootstrap_interval(rows.f1, rows.recordings),
        float(rows.nocall_f1.mean()),
        len(rows.f1),
    )


def score_submission_rows(data: Path, submission: Path) -> SubmissionRows:
    """Score each row of ``submission.csv`` by ``solution.csv``."""
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
