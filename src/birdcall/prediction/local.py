"""Detect birds in anyone's recordings: bounded memory, no stop at a bad file, resumed if killed.

Each finished recording is a line of a journal; tables are written from it at the end. So a run that
was killed resumes where it was, and filters and formats can change without predicting again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from tqdm import tqdm

from birdcall.config import SEGMENT_SECONDS, require_choice, require_share
from birdcall.inference.events import Event
from birdcall.inference.predictions import OutputOptions, SegmentPredictions
from birdcall.inference.tables import (
    write_audacity_labels,
    write_detections,
    write_raven_table,
)
from birdcall.kaggle.manifest import MANIFEST_FILE
from birdcall.kaggle.submission import LoadedPackage, probed_seconds
from birdcall.prediction.package import (
    EmbeddingWriter,
    Recording,
    RecordingResult,
    detect_recordings,
    embedding_part,
    is_whole_part,
)
from birdcall.storage.files import (
    csv_text,
    digest,
    fitting_name,
    inside,
    shorten_list,
    write_atomically,
)
from birdcall.storage.store import Journal, code_digest
from birdcall.taxonomy import display_name, match_code

logger = logging.getLogger(__name__)

_TABLES = ("csv", "parquet", "jsonl")  # of all recordings
_SUFFIXES = {"raven": ".selections.txt", "audacity": ".labels.txt"}  # a file of each recording
_PROGRESS = "{percentage:3.0f} % of {total:.0f} s{postfix}, {remaining} left"


# Predicts recordings and yields their results, in any order.
Predictor = Callable[[Sequence[Recording]], Iterator[tuple[Recording, RecordingResult]]]


class PageWriter(Protocol):
    """Writes pages of recordings as they are predicted; `report` has one."""

    def add(self, predictions: SegmentPredictions) -> None:
        """Take the next predictions of a recording, with frames and member_frames."""

    def finish(
        self,
        name: str,
        path: Path,
        seconds: float,
        decided: Sequence[Event],
        labels: Sequence[Event] = (),
        truth: Sequence[Event] = (),
    ) -> Path:
        """Write the pages of the recording; return the first."""

    def discard(self) -> None:
        """Drop what was added of a recording that could not be read to its end."""

    def has_pages(self, name: str, seconds: float) -> bool:
        """Return whether the pages of a recording are there."""

    def write_index(self, table: pd.DataFrame) -> Path:
        """Write the page that leads to all recordings, rows of ``table``."""


@dataclass(frozen=True)
class ResultOptions:
    """Which events are written, and in which formats.

    species: ebird codes, empty for all. embeddings: also the embedding of each segment. view: also
    a page for each recording.
    """

    formats: tuple[str, ...] = ("csv", "raven")
    min_confidence: float = 0.0
    species: tuple[str, ...] = ()
    embeddings: bool = False
    view: bool = False

    def __post_init__(self) -> None:
        for name in self.formats:
            require_choice("format", name, (*_TABLES, *_SUFFIXES))
        require_share("min_confidence", self.min_confidence)

    def for_classes(self, classes: Sequence[str]) -> ResultOptions:
        """Return the options with the model's codes of the species, given as codes or names.

        Raises ValueError for a species that the model does not know.
        """
        codes = {name: match_code(name, classes) for name in self.species}
        unknown = [name for name, code in codes.items() if code is None]
        if unknown:
            raise ValueError(
                f"the model knows no species {', '.join(unknown)}; it knows {shorten_list(classes)}"
            )
        return replace(self, species=tuple(codes.values()))


def _journal_key(
    recording: Recording, options: ResultOptions, labels: Sequence[Event]
) -> dict[str, Any]:
    """Return what identifies a recording in the journal: a changed file is predicted again.

    So is a file whose embeddings and pages get another name, or whose page shows other labels.
    """
    key: dict[str, Any] = {"recording": str(recording.path), "size": None, "mtime_ns": None}
    try:
        stat = recording.path.stat()
        key |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    except OSError:
        return key
    if options.view or options.embeddings:
        key["name"] = recording.name
    return key | ({"labels": digest(repr(labels))} if labels else {})


# --- what observes the predictions ----------------------------------------------------------------


@dataclass
class PageObserver:
    """Writes the pages of each recording, with its labels; first_pages: by name of the recording.

    labels: of recordings, by path.
    """

    pages: PageWriter
    labels: Mapping[Path, Sequence[Event]]
    first_pages: dict[str, Path] = field(default_factory=dict)

    def __call__(self, recording: Recording, item: SegmentPredictions | RecordingResult) -> None:
        """Take the next segments of a recording; at its end, write or drop its pages."""
        if isinstance(item, SegmentPredictions):
            self.pages.add(item)
        elif item.reason:
            self.pages.discard()
        else:
            labels = self.labels.get(recording.path, ())
            self.first_pages[recording.name] = self.pages.finish(
                recording.name,
                recording.path,
                seconds=item.seconds,
                decided=item.events,
                labels=labels,
                truth=labels,
            )


@dataclass
class _Progress:
    """Shows a bar: x real time and the time left."""

    bar: tqdm
    n_recordings: int
    n_finished: int = 0
    started: float = field(default_factory=time.monotonic)

    def __call__(self, _: Recording, item: SegmentPredictions | RecordingResult) -> None:
        if isinstance(item, SegmentPredictions):
            # No more than the total: a last segment is padded, and a header may name less than the
            # recording has.
            seconds = item.n_segments * float(SEGMENT_SECONDS)
            self.bar.update(min(seconds, self.bar.total - self.bar.n))
        else:
            self.n_finished += 1
        speed = self.bar.n / max(time.monotonic() - self.started, 1e-3)
        self.bar.set_postfix_str(
            f"{self.n_finished} of {self.n_recordings} recordings, {speed:.0f} x real time"
        )


# --- predicting what is not in the journal --------------------------------------------------------


def fingerprint_of(package: Path, options: ResultOptions, opened: LoadedPackage) -> dict[str, Any]:
    """Return what results depend on beside the recordings: code, weights, decision, runtimes."""
    exports = [item.export for item in opened.ensemble.members if item.export is not None]
    return {
        "package": digest((package / MANIFEST_FILE).read_text(encoding="utf-8")),
        "code": digest(json.dumps(code_digest("prediction.package"))),
        "device": opened.ensemble.device.type,
        "runtimes": sorted({f"{item.runtime} {item.version} {item.precision}" for item in exports}),
        "embeddings": options.embeddings,
        "view": options.view,
        **{name: import_module(name).__version__ for name in ("torch", "soundfile", "soxr")},
    }


def predict_recordings(
    recordings: Sequence[Recording],
    predict: Predictor,
    journal: Journal,
    output: Path,
    *,
    options: ResultOptions,
    pages: PageWriter | None = None,
    labels: Mapping[Path, Sequence[Event]] | None = None,
) -> str:
    """Predict the recordings that are not in the journal, write all results; return a summary.

    ValueError, after that, where none could be predicted.

    Those that failed, whose parts or pages have been deleted, or whose parts are damaged, are
    predicted again: a permission may have been given since, or a disk answer again.

    ``labels``: of a person, by path; a recording whose labels have changed gets its page again.
    """
    # Before they are read: a file that changes meanwhile is predicted again.
    labels = labels or {}
    keys = {item: _journal_key(item, options, labels.get(item.path, ())) for item in recordings}
    remaining = []
    for recording in recordings:
        values = journal.find(keys[recording])
        is_finished = values is not None and not values["reason"]
        if is_finished:
            is_finished = all(is_whole_part(output / part) for part in values["parts"])
        if is_finished and pages is not None:
            is_finished = pages.has_pages(recording.name, values["seconds"])
        if not is_finished:
            remaining.append(recording)
    if len(remaining) < len(recordings):
        logger.info("%d recordings were finished before", len(recordings) - len(remaining))
    for recording, result in predict(remaining) if remaining else ():
        if result.reason:
            logger.warning("%s: %s", recording.path, result.reason)
        journal.add(keys[recording], result.to_json())
    results = {item: RecordingResult.from_json(journal.find(keys[item])) for item in recordings}
    summary = write_results(results, output, options)
    failed = [f"{item.path}: {result.reason}" for item, result in results.items() if result.reason]
    if failed and len(failed) == len(results):
        raise ValueError(f"{summary}, such as {failed[0]}")
    if pages is not None:
        summary += f"; look at {pages.write_index(_index_table(results))}"
    return summary


def predict_locally(
    package: LoadedPackage,
    output: Path,
    options: ResultOptions,
    *,
    pages: PageWriter | None = None,
    labels: Mapping[Path, Sequence[Event]] | None = None,
    progress: bool = False,
) -> Predictor:
    """Return what predicts on this machine.

    ``labels``: of a person, which pages show, by path. ``progress``: with a bar.
    """
    outputs = OutputOptions(
        frames=True, member_frames=pages is not None, embedding=options.embeddings
    )

    def predict(recordings: Sequence[Recording]) -> Iterator[tuple[Recording, RecordingResult]]:
        lengths = [probed_seconds(recording.path) for recording in recordings] if progress else []
        total = sum(lengths)
        with tqdm(total=total, disable=not total, bar_format=_PROGRESS) as bar:
            observers: list[Callable[..., None]] = []
            if total:
                observers.append(_Progress(bar, len(recordings)))
            if options.embeddings:
                observers.append(EmbeddingWriter(output))
            if pages is not None:
                observers.append(PageObserver(pages, labels or {}))
            for recording, result in detect_recordings(recordings, package, observers, outputs):
                if options.embeddings and not result.reason:
                    result = replace(result, parts=(embedding_part(recording),))
                yield recording, result

    return predict


# --- writing --------------------------------------------------------------------------------------


def write_results(
    results: Mapping[Recording, RecordingResult], output: Path, options: ResultOptions
) -> str:
    """Write tables of all recordings, files of each, and ``failed.csv``; return a summary."""
    predicted = {item: result for item, result in results.items() if not result.reason}
    codes = {event.ebird_code for result in results.values() for event in result.events}
    names = {code: display_name(code) for code in codes}
    selected = {
        recording: [
            event
            for event in result.events
            if event.confidence >= options.min_confidence
            and (not options.species or event.ebird_code in options.species)
        ]
        for recording, result in predicted.items()
    }
    detections = {str(recording.path): events for recording, events in selected.items()}
    tables = [name for name in _TABLES if name in options.formats]
    for name in tables:
        write_detections(output / f"detections.{name}", detections, names)
    for recording, events in selected.items():
        for name in (name for name in _SUFFIXES if name in options.formats):
            path = inside(output / name, fitting_name(recording.name, _SUFFIXES[name]))
            if name == "raven":
                write_raven_table(path, events, names)
            else:
                write_audacity_labels(path, events)
    failed = {str(item.path): result.reason for item, result in results.items() if result.reason}
    write_atomically(output / "failed.csv", csv_text([("recording", "reason"), *failed.items()]))
    n_events = sum(map(len, selected.values()))
    seconds = sum(result.seconds for result in predicted.values())
    written = ", ".join(str(output / f"detections.{name}") for name in tables)
    return (
        f"{written or output}: {n_events} detections in {len(predicted)} recordings of "
        f"{seconds / 60:.1f} min; {len(failed)} failed"
    )


def _index_table(results: Mapping[Recording, RecordingResult]) -> pd.DataFrame:
    """Return a row for each recording: its length, its species, or why it was not predicted."""
    return pd.DataFrame(
        {
            "recording": recording.name,
            "seconds": np.nan if result.reason else result.seconds,
            "detections": len(result.events),
            "species": ", ".join(
                sorted({display_name(event.ebird_code) for event in result.events})
            ),
            "failed": result.reason,
        }
        for recording, result in results.items()
    )
