"""Label the rows of test.csv within a budget of time, so that a valid file exists at any moment."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.audio.reading import AudioError, probe_audio
from birdcall.config import NOCALL, SEGMENT_SECONDS, require
from birdcall.inference.decision import Decision, decide_recordings, decide_segments, label_strings
from birdcall.inference.engine import open_recording, predict_audio
from birdcall.inference.ensemble import CostMeter, Ensemble, MemberError
from birdcall.inference.predictions import SEGMENTS_ONLY, SegmentPredictions
from birdcall.inference.tables import write_submission
from birdcall.kaggle.test_set import find_audio, find_test_audio_folder, read_test_rows
from birdcall.storage.files import write_atomically

logger = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"  # beside the submission
SAFE_SHARE = 0.9  # of the time left, planned for: speeds vary


@dataclass(frozen=True)
class SubmissionSummary:
    """How a submission came about; what the kernel's last log line says.

    failed: audio_ids that are missing or do not decode; late: those that the time did not suffice
    for. The rows of both say nocall. members: those that ran, and on how many recordings; left_out:
    those that did not, and why. birds_per_row: how many rows have so many birds.
    """

    n_rows: int
    birds_per_row: dict[int, int]
    members: dict[str, int]
    left_out: dict[str, str]
    n_recordings: int
    failed: tuple[str, ...]
    late: tuple[str, ...]
    seconds: float
    audio_seconds: float

    @property
    def n_rows_with_birds(self) -> int:
        return sum(count for n_birds, count in self.birds_per_row.items() if n_birds)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} with {birds}" for birds, n in sorted(self.birds_per_row.items()))
        left_out = f" ({len(self.left_out)} left out)" if self.left_out else ""
        speed = self.audio_seconds / max(self.seconds, 1e-9)
        return (
            f"{self.n_rows} rows: {counts} birds; {len(self.members)} members{left_out}; "
            f"{self.n_recordings} recordings, {len(self.failed)} failed, "
            f"{len(self.late)} too late; {self.seconds:.1f} s, {speed:.0f} x real time"
        )


def write_nocall(data: Path, submission: Path) -> pd.DataFrame:
    """Write a valid submission without any bird; return the rows of ``test.csv``."""
    rows = read_test_rows(data)
    write_submission(submission, list(rows["row_id"]), [NOCALL] * len(rows))
    return rows


def predict_test_set(
    data: Path,
    ensemble: Ensemble,
    decision: Decision,
    submission: Path,
    budget_seconds: float | None = None,
) -> SubmissionSummary:
    """Label every row of ``test.csv`` and write the submission, in the order of ``test.csv``.

    A valid all-nocall file is written first, so that whatever happens later one exists. Recordings
    that are missing or do not decode keep nocall; each is named in the log. See `label_rows_of` for
    the budget.
    """
    rows = write_nocall(data, submission)
    labels, summary = label_rows_of(
        rows,
        find_test_audio_folder(data),
        ensemble=ensemble,
        decision=decision,
        budget_seconds=budget_seconds,
    )
    write_submission(submission, list(rows["row_id"]), labels)
    return summary


def write_summary(path: Path, summary: SubmissionSummary) -> None:
    write_atomically(path, json.dumps(asdict(summary), indent=1) + "\n")


def label_rows_of(
    rows: pd.DataFrame,
    folder: Path | None,
    ensemble: Ensemble,
    decision: Decision,
    budget_seconds: float | None = None,
) -> tuple[list[str], SubmissionSummary]:
    """Return the labels of ``rows`` (see `read_test_rows`), of recordings in ``folder``.

    With a budget, each recording is heard by as many members, the first ones, as the time left
    allows for it and those after it; when it is over, what is left says nocall. A member that does
    not run, or says what is no number, is left out and the others go on; without any it raises
    MemberError.
    """
    require(
        decision.classes in ((), ensemble.classes),
        f"the decision is for other classes: {len(decision.classes)}, the members have "
        f"{len(ensemble.classes)}, or in another order",
    )
    start = time.perf_counter()
    paths, failed = _find_recordings(folder, list(dict.fromkeys(rows["audio_id"])))
    run = _Run(rows, paths, decision, Budget(paths, budget_seconds))
    left_out: dict[str, str] = {}
    while True:
        try:
            run.label(ensemble)
            break
        except MemberError as error:
            logger.error("%s; left out", error)
            left_out[error.member] = str(error)
            others = [one for one in ensemble.members if one.name != error.member]
            if not others:
                raise
            ensemble = ensemble.for_members(others)
    run.give_up()
    labels = [run.labels[row_id] for row_id in rows["row_id"]]
    n_birds = Counter(0 if text == NOCALL else len(text.split()) for text in labels)
    return labels, SubmissionSummary(
        n_rows=len(rows),
        birds_per_row=dict(n_birds),
        members=dict(run.heard_by),
        left_out=left_out,
        n_recordings=len(paths) + len(failed),
        failed=tuple(failed + run.failed),
        late=tuple(run.late),
        seconds=time.perf_counter() - start,
        audio_seconds=run.audio_seconds,
    )


class _Run:
    """The recordings still to be labelled, and what became of the others."""

    def __init__(
        self, rows: pd.DataFrame, paths: Mapping[str, Path], decision: Decision, budget: Budget
    ) -> None:
        self.rows = dict(tuple(rows.groupby("audio_id", sort=False)))
        self.labels = dict.fromkeys(rows["row_id"], NOCALL)
        self.left, self.decision, self.budget = dict(paths), decision, budget
        self.heard_by: Counter[str] = Counter()
        self.failed: list[str] = []
        self.late: list[str] = []
        self.audio_seconds = 0.0

    def label(self, ensemble: Ensemble) -> None:
        """Label what is left; after a MemberError it can be called again, with others."""
        sounds = {name: open_recording(path) for name, path in self.left.items()}
        names = [member.name for member in ensemble.members]
        n_used = {}

        def choose_n_members(name: str) -> int:
            n_used[name] = self.budget.choose_n_members(ensemble.costs, names, list(self.left))
            return n_used[name]

        began = time.perf_counter()
        for name, scores in predict_audio(ensemble, sounds, SEGMENTS_ONLY, choose_n_members):
            if isinstance(scores, AudioError):
                logger.warning("%s; its rows say nocall", scores)
                self.failed.append(name)
            else:
                rows = self.rows[name]
                decided = label_recording(
                    scores, list(rows["seconds"]), self.decision, ensemble.classes
                )
                self.labels.update(zip(rows["row_id"], decided, strict=True))
                self.audio_seconds += scores.seconds
                self.heard_by.update(names[: n_used[name]])
                now = time.perf_counter()
                logger.info(
                    "%s: %.0f s, %d of %d rows with birds, %d members, %.0f x real time",
                    name, scores.seconds, sum(text != NOCALL for text in decided), len(rows),
                    n_used[name], scores.seconds / max(now - began, 1e-9),
                )  # fmt: skip
                began = now
            del self.left[name]

    def give_up(self) -> None:
        """Tell of what the time has not sufficed for."""
        self.late = list(self.left)
        if self.late:
            logger.warning(
                "the time is over: %d recordings are not heard, their rows say nocall: %s",
                len(self.late), ", ".join(self.late),
            )  # fmt: skip


class Budget:
    """Decides how many members hear a recording, so that all recordings are heard in time.

    A member costs what it has taken so far for a second of sound, in shares of all that threads and
    devices have done in the time that has passed. Until that is known, all members hear.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        seconds: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock, self.seconds = clock, seconds
        self.began = clock()
        self.lengths = {} if seconds is None else {n: _seconds_of(p) for n, p in paths.items()}

    def choose_n_members(
        self, costs: CostMeter, members: Sequence[str], left: Sequence[str]
    ) -> int:
        """Return how many members hear the next recording; ``left``: it and all not finished."""
        if self.seconds is None:
            return len(members)
        passed = self.clock() - self.began
        if passed >= self.seconds:
            return 0
        options = sum(self.lengths[name] for name in left)
        allowed = SAFE_SHARE * (self.seconds - passed)
        n_members = len(members)
        while n_members > 1 and costs.estimate(members[:n_members], passed) * options > allowed:
            n_members -= 1
        return n_members


def _seconds_of(path: Path) -> float:
    try:
        return probe_audio(path).seconds
    except (AudioError, OSError):  # it will be told of when it is heard
        return 0.0


def _find_recordings(
    folder: Path | None, names: Sequence[str]
) -> tuple[dict[str, Path], list[str]]:
    if folder is None:
        logger.warning("test_audio is not there: every row says nocall")
        return {}, list(names)
    found: dict[str, Path] = {}
    missing = []
    for name in names:
        try:
            path = find_audio(folder, name)
        except (ValueError, OSError) as error:  # a name that leads out of the folder
            logger.warning("%s; its rows say nocall", error)
            missing.append(name)
            continue
        if path is None:
            logger.warning("%s: no recording of this audio_id; its rows say nocall", folder / name)
            missing.append(name)
        else:
            found[name] = path
    return found, missing


def label_recording(
    scores: SegmentPredictions,
    seconds: Sequence[float],
    decision: Decision,
    classes: Sequence[str],
) -> list[str]:
    """Label a recording's rows, given their ``seconds`` (the segment's end; NaN: whole file).

    A row beyond the end of the recording says nocall.
    """
    by_segment = label_strings(
        decide_segments(scores.clipwise, scores.framewise, decision), classes
    )
    whole = decide_recordings(scores.clipwise, scores.framewise, decision)
    by_file = label_strings(whole, classes)[0]
    labels = []
    for end in seconds:
        if np.isnan(end):
            labels.append(by_file)
            continue
        segment = round(end / SEGMENT_SECONDS) - 1
        labels.append(by_segment[segment] if segment < len(by_segment) else NOCALL)
    return labels
