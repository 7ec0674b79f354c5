"""Write a submission with a package's members, within a time limit: kernel and `predict --data`."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from birdcall.audio.reading import AudioError, probe_audio
from birdcall.config import NOCALL, SEGMENT_SECONDS, require
from birdcall.inference.decision import (
    Decision,
    decide_recordings,
    decide_segments,
    label_strings,
    read_decision,
)
from birdcall.inference.engine import open_recording, predict_audio
from birdcall.inference.ensemble import (
    CostMeter,
    Ensemble,
    Member,
    MemberError,
    default_device,
    load_member,
    log_runtimes,
)
from birdcall.inference.predictions import SEGMENTS_ONLY, SegmentPredictions
from birdcall.inference.windows import ONNX_FILE, Waveforms
from birdcall.kaggle.manifest import find_changes
from birdcall.kaggle.test_set import (
    CompetitionFile,
    find_recordings_of,
    read_example_rows,
    read_test_rows,
    write_submission,
)
from birdcall.models.checkpoint import require_same_classes
from birdcall.storage.files import inside, shorten_list, write_atomically

logger = logging.getLogger(__name__)

DECISION_FILE = "decision.json"
MEMBERS_FOLDER = "members"
SUMMARY_FILE = "summary.json"  # beside the submission, as is the next one
_EXAMPLE_SUBMISSION = "example_submission.csv"  # predictions of the example soundscapes
_SAFE_SHARE = 0.9  # of the time left, planned for: speeds vary


# --- the package ----------------------------------------------------------------------------------


class LoadedPackage(NamedTuple):
    """What labels recordings. refused: members that are not used, and why."""

    ensemble: Ensemble
    decision: Decision
    refused: Mapping[str, str] = {}


def open_package(
    package: Path, device: torch.device | str, *, all_members: bool = False
) -> LoadedPackage:
    """Load the members of a package in the decision's order: the best experiment's first.

    Members are refused whose files are missing, or not as in the manifest, whose classes are not
    those of the others, or that cannot be loaded or put on the device, whatever the reason. An
    export that is not as packaged costs its speed only: torch runs the weights. Raises an error if
    no member is left, or, with ``all_members``, if one is refused; also if code or decision are not
    as packaged.
    """
    changes = find_changes(package)
    for name, reason in changes.items():
        if Path(name).parts[0] != MEMBERS_FOLDER:
            raise ValueError(reason)
    decision = read_decision(package / DECISION_FILE)
    names = decision.members or tuple(
        sorted(folder.name for folder in (package / MEMBERS_FOLDER).iterdir())
    )
    members: list[Member] = []
    refused: dict[str, str] = {}
    for name in names:
        reasons = {file: why for file, why in changes.items() if Path(file).parts[1:2] == (name,)}
        export_reason = reasons.pop(f"{MEMBERS_FOLDER}/{name}/{ONNX_FILE}", None)
        with_export = torch.device(device).type == "cpu"  # exports do not run elsewhere
        if with_export and export_reason:
            logger.warning("%s; torch runs in its place", export_reason)
        try:
            require(not reasons, next(iter(reasons.values()), ""))
            folder = inside(package / MEMBERS_FOLDER, name)
            member = load_member(
                folder, decision.window_config, with_export=with_export and not export_reason
            )
            first = members[0] if members else member
            require_same_classes(
                folder, member.checkpoint, decision.classes or first.checkpoint.classes
            )
            members.append(member)
        except Exception as error:  # whatever it is, the other members can still run
            refused[name] = str(error) or repr(error)
    log_runtimes(members)
    ensemble = None
    while members and ensemble is None:
        try:
            ensemble = Ensemble(members, device, decision.window_config)
        except MemberError as error:
            refused[error.member] = str(error)
            members = [member for member in members if member.name != error.member]
    if ensemble is None:
        raise ValueError(f"{package}: no member can be used: {'; '.join(refused.values())}")
    if all_members and refused:
        raise ValueError(next(iter(refused.values())))
    return LoadedPackage(ensemble, decision, refused)


# --- the submission -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SubmissionSummary:
    """What became of a submission: ``summary.json`` and the last line of the kernel's log.

    failed: audio_ids that are missing or do not decode; late: those that there was no time for. The
    rows of both are nocall. members: those that ran, and on how many recordings; left_out: those
    that did not, and why. birds_per_row: the number of rows by their number of species.
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

    def __str__(self) -> str:
        counts = ", ".join(f"{n} with {birds}" for birds, n in sorted(self.birds_per_row.items()))
        left_out = f" ({len(self.left_out)} left out)" if self.left_out else ""
        speed = self.audio_seconds / max(self.seconds, 1e-9)
        return (
            f"{self.n_rows} rows: {counts} birds; {len(self.members)} members{left_out}; "
            f"{self.n_recordings} recordings, {len(self.failed)} failed, "
            f"{len(self.late)} too late; {self.seconds:.1f} s, {speed:.0f} x real time"
        )


def run_kernel(
    package: Path, data: Path, submission: Path, budget_seconds: float | None = None
) -> SubmissionSummary:
    """Write ``submission`` for ``test.csv`` in ``data``: what the kernel's script calls.

    A member that is not as packaged, or does not run, is left out, and so are members for which
    ``budget_seconds`` do not suffice; ``summary.json`` names them. Without ``test_audio``, as when
    the kernel is not yet scored, the rows are nocall and the members run on the example
    soundscapes. Raises an error if no member ran: a kernel without models must not score like
    all-nocall.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    def load() -> LoadedPackage:
        loaded = open_package(package, default_device())
        for name, reason in loaded.refused.items():
            logger.error("%s: left out: %s", name, reason)
        ensemble = loaded.ensemble
        logger.info("%d members on %s, data in %s", len(ensemble.members), ensemble.device, data)
        return loaded

    summary = predict_test_set(
        data, submission, load, budget_seconds=budget_seconds, use_examples=True
    )
    text = json.dumps(asdict(summary), indent=1) + "\n"
    write_atomically(submission.with_name(SUMMARY_FILE), text)
    logger.info("%s: %s", submission, summary)
    if not summary.members:
        raise ValueError(
            f"no member has predicted anything ({len(summary.failed)} recordings failed, "
            f"{len(summary.late)} too late): {submission} is nocall in all rows"
        )
    return summary


def predict_test_set(
    data: Path,
    submission: Path,
    load: Callable[[], LoadedPackage],
    *,
    budget_seconds: float | None = None,
    use_examples: bool = False,
) -> SubmissionSummary:
    """Label every row of ``test.csv`` and write the submission, in the order of ``test.csv``.

    A valid all-nocall file is written before ``load`` opens the members, so that whatever happens
    later there is one. Recordings that are missing or do not decode keep nocall; the log names
    each. ``use_examples``: where there is no test audio, run on the example soundscapes instead,
    and write ``example_submission.csv``. See `predict_rows` for the budget.
    """
    rows = read_test_rows(data)
    write_submission(submission, list(rows["row_id"]), [NOCALL] * len(rows))
    package = load()
    # On Kaggle the hidden recordings exist only on the rerun that is scored. When the kernel is
    # saved, the visible test.csv has three rows and no audio.
    folder = data / CompetitionFile.TEST_AUDIO
    if use_examples and not folder.is_dir():
        folder = data / CompetitionFile.EXAMPLE_AUDIO
        if not folder.is_dir() or not (data / CompetitionFile.EXAMPLE_LABELS).is_file():
            raise FileNotFoundError(
                f"{data}: neither {CompetitionFile.TEST_AUDIO} nor {folder.name}: nothing to run "
                "the models on"
            )
        logger.warning(
            "%s is not there: every row is nocall; the members run on %s",
            CompetitionFile.TEST_AUDIO, folder,
        )  # fmt: skip
        rows = read_example_rows(data)
        submission = submission.with_name(_EXAMPLE_SUBMISSION)
    labels, summary = predict_rows(rows, folder, package, budget_seconds)
    write_submission(submission, list(rows["row_id"]), labels)
    return replace(summary, left_out={**package.refused, **summary.left_out})


def predict_rows(
    rows: pd.DataFrame,
    folder: Path,
    package: LoadedPackage,
    budget_seconds: float | None = None,
) -> tuple[list[str], SubmissionSummary]:
    """Return the labels of ``rows`` (see `read_test_rows`), of recordings in ``folder``.

    With a budget, a recording is predicted by as many members, the first ones, as the time left
    allows for it and all after it; when the time is over, the remaining rows are nocall. A member
    that does not run, or predicts what is not finite, is left out; the others continue. Without
    any the remaining recordings have failed; raises MemberError if those are all.
    """
    ensemble, decision = package.ensemble, package.decision
    require(
        decision.classes in ((), ensemble.classes),
        f"the decision is for other classes: {len(decision.classes)}, the members have "
        f"{len(ensemble.classes)}, or in another order",
    )
    start = time.perf_counter()
    paths, missing = find_recordings_of(rows, folder)
    progress = _Progress(rows, dict(paths), TimeBudget(paths, budget_seconds), failed=list(missing))
    members = list(ensemble.members)
    left_out: dict[str, str] = {}
    is_finished = False
    while not is_finished:
        try:
            if left_out:
                ensemble = ensemble.for_members(members)
            _label_recordings(progress, ensemble, decision)
            is_finished = True
        except MemberError as error:
            logger.error("%s; left out", error)
            left_out[error.member] = str(error)
            members = [member for member in members if member.name != error.member]
            if members:
                continue
            if not progress.recordings_by_member:
                raise
            names = list(progress.remaining)
            logger.error("no member is left: rows are nocall of %s", shorten_list(names))
            progress.failed += progress.remaining
            progress.remaining.clear()
            is_finished = True
    if progress.remaining:
        logger.warning(
            "the time is over: %d recordings are not predicted, their rows are nocall: %s",
            len(progress.remaining),
            shorten_list(list(progress.remaining)),
        )
    labels = [progress.labels.get(row_id, NOCALL) for row_id in rows["row_id"]]
    n_birds = Counter(0 if text == NOCALL else len(text.split()) for text in labels)
    return labels, SubmissionSummary(
        n_rows=len(rows),
        birds_per_row=dict(n_birds),
        members=dict(progress.recordings_by_member),
        left_out=left_out,
        n_recordings=len(paths) + len(missing),
        failed=tuple(progress.failed),
        late=tuple(progress.remaining),
        seconds=time.perf_counter() - start,
        audio_seconds=progress.audio_seconds,
    )


@dataclass
class _Progress:
    """The labels so far, by row_id, and the recordings that remain."""

    rows: pd.DataFrame
    remaining: dict[str, Path]
    budget: TimeBudget
    failed: list[str]
    labels: dict[str, str] = field(default_factory=dict)
    recordings_by_member: Counter[str] = field(default_factory=Counter)
    audio_seconds: float = 0.0


def _label_recordings(progress: _Progress, ensemble: Ensemble, decision: Decision) -> None:
    """Label the remaining recordings; after a MemberError call it again with other members."""
    rows_of = dict(tuple(progress.rows.groupby("audio_id", sort=False)))
    sources = {name: partial(_read_recording, path) for name, path in progress.remaining.items()}
    member_names = [member.name for member in ensemble.members]
    n_members: dict[str, int] = {}

    def limit_members(name: str) -> int:
        remaining = list(progress.remaining)
        n_members[name] = progress.budget.limit_members(ensemble.costs, member_names, remaining)
        return n_members[name]

    started = time.perf_counter()
    for name, predictions in predict_audio(ensemble, sources, SEGMENTS_ONLY, limit_members):
        del progress.remaining[name]
        if isinstance(predictions, AudioError):
            logger.warning("%s; its rows are nocall", predictions)
            progress.failed.append(name)
            continue
        rows = rows_of[name]
        labels = label_recording(predictions, list(rows["seconds"]), decision, ensemble.classes)
        progress.labels.update(zip(rows["row_id"], labels, strict=True))
        n_beyond = int((rows["seconds"] > SEGMENT_SECONDS * predictions.n_segments).sum())
        if n_beyond:
            message = "%s: %d rows lie beyond the end of the recording (%g s) and are nocall"
            logger.warning(message, name, n_beyond, predictions.seconds)
        progress.audio_seconds += predictions.seconds
        progress.recordings_by_member.update(member_names[: n_members[name]])
        n_with_birds = sum(text != NOCALL for text in labels)
        now = time.perf_counter()
        text = (
            f"{predictions.seconds:.0f} s, {n_with_birds} of {len(rows)} rows with birds, "
            f"{n_members[name]} members, "
            f"{predictions.seconds / max(now - started, 1e-9):.0f} x real time"
        )
        logger.info("%s: %s", name, text)
        started = now


def _read_recording(path: Path, sample_rates: Sequence[int]) -> Iterator[Waveforms]:
    """Yield blocks of a recording; AudioError, whatever goes wrong: the others can be read."""
    try:
        yield from open_recording(path)(sample_rates)
    except AudioError:
        raise
    except Exception as error:
        raise AudioError(path, f"cannot be read: {error!r}") from error


class TimeBudget:
    """Limits the members of each recording, so that there is time for all recordings.

    The costs of a member are the time that it needed so far for a second of audio, as a share of
    all work of threads and devices in the elapsed time. Until they are known, all members run.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        seconds: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock, self.seconds = clock, seconds
        self.start = clock()
        self.lengths = {} if seconds is None else {n: probed_seconds(p) for n, p in paths.items()}

    def limit_members(
        self, costs: CostMeter, members: Sequence[str], remaining: Sequence[str]
    ) -> int:
        """Return how many members predict the next recording; 0 when the time is over.

        ``remaining``: this recording and all others that are not finished.
        """
        if self.seconds is None:
            return len(members)
        elapsed = self.clock() - self.start
        if elapsed >= self.seconds:
            return 0
        audio_seconds = sum(self.lengths[name] for name in remaining)
        allowed = _SAFE_SHARE * (self.seconds - elapsed)
        n_members = len(members)
        while n_members > 1:
            if costs.estimate(members[:n_members], elapsed) * audio_seconds <= allowed:
                break
            n_members -= 1
        return n_members


def probed_seconds(path: Path) -> float:
    """Return the length of a recording by its header; 0 where it cannot be read."""
    try:
        return probe_audio(path).seconds
    except Exception:  # reported when the recording is decoded
        return 0.0


def label_recording(
    predictions: SegmentPredictions,
    seconds: Sequence[float],
    decision: Decision,
    classes: Sequence[str],
) -> list[str]:
    """Label a recording's rows, given their ``seconds`` (the segment's end; NaN: whole file).

    A row beyond the end of the recording is nocall.
    """
    clipwise, framewise = predictions.clipwise, predictions.framewise
    by_segment = label_strings(decide_segments(clipwise, framewise, decision), classes)
    by_file = label_strings(decide_recordings(clipwise, framewise, [decision])[0], classes)[0]
    labels = []
    for end in seconds:
        if np.isnan(end):
            labels.append(by_file)
            continue
        segment = round(end / SEGMENT_SECONDS) - 1
        labels.append(by_segment[segment] if segment < len(by_segment) else NOCALL)
    return labels
