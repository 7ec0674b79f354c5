"""Find the birds in anyone's recordings: bounded memory, no stop at a bad file, resumed if killed.

Each finished recording is a line of a journal; tables are written from it at the end. So a run that
was killed goes on where it was, and filters and formats can be changed without hearing again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from birdcall.audio.reading import AudioError, probe_audio
from birdcall.config import SEGMENT_SECONDS, require_choice, require_share
from birdcall.inference.decision import Decision
from birdcall.inference.engine import open_recording, predict_stream
from birdcall.inference.ensemble import Ensemble
from birdcall.inference.events import Event, EventDetector
from birdcall.inference.predictions import OutputOptions, SegmentPredictions
from birdcall.inference.tables import (
    read_raven_table,
    write_audacity_labels,
    write_detections_csv,
    write_detections_jsonl,
    write_detections_parquet,
    write_failures,
    write_raven_table,
)
from birdcall.inference.windows import End
from birdcall.kaggle.manifest import MANIFEST_FILE
from birdcall.kaggle.test_set import AUDIO_SUFFIXES, raven_tables_of
from birdcall.models.onnx import is_onnx_installed
from birdcall.report.html import fitting_name
from birdcall.report.soundscape import (
    INDEX_FILE,
    SoundscapePageWriter,
    n_parts_of,
    page_names,
    write_index,
)
from birdcall.storage.files import atomic_path, digest, inside
from birdcall.storage.store import Journal
from birdcall.taxonomy import display_name

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"
FAILED_FILE = "failed.csv"
VIEW_FOLDER = "view"
# What can be written: a table of all recordings, or a file of each.
TABLES: dict[str, Callable[..., None]] = {
    "csv": write_detections_csv,
    "parquet": write_detections_parquet,
    "jsonl": write_detections_jsonl,
}
PER_RECORDING = {"raven": ".selections.txt", "audacity": ".labels.txt"}
FORMATS = (*TABLES, *PER_RECORDING)
DEFAULT_FORMATS = ("csv", "raven")
ROWS_AT_ONCE = 512  # of a Parquet file of embeddings
PROGRESS = "{percentage:3.0f} % of {total:.0f} s{postfix}, {remaining} left"


@dataclass(frozen=True)
class Recording:
    """A recording to be heard: where it is, and its name among the results, unique and relative."""

    path: Path
    name: str


@dataclass(frozen=True)
class RecordingResult:
    """What was found in a recording, or why it could not be heard (``reason``)."""

    seconds: float
    events: tuple[Event, ...] = ()
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        events = [[one.ebird_code, one.onset, one.offset, one.confidence] for one in self.events]
        return {"seconds": self.seconds, "events": events, "reason": self.reason}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RecordingResult:
        events = tuple(Event(*event) for event in values["events"])
        return cls(float(values["seconds"]), events, str(values["reason"]))


@dataclass(frozen=True)
class ResultOptions:
    """What of the events is written, and how.

    species: ebird codes, none for all. embeddings: also the networks' features of each segment.
    view: also pages to look at and listen to.
    """

    formats: tuple[str, ...] = DEFAULT_FORMATS
    min_confidence: float = 0.0
    species: tuple[str, ...] = ()
    embeddings: bool = False
    view: bool = False

    def __post_init__(self) -> None:
        for name in self.formats:
            require_choice("format", name, FORMATS)
        require_share("min_confidence", self.min_confidence)

    def require_known(self, classes: Sequence[str]) -> None:
        """Raise ValueError for a species that the model does not know."""
        unknown = sorted(set(self.species) - set(classes))
        if unknown:
            raise ValueError(
                f"the model knows no species {', '.join(unknown)}; it knows {', '.join(classes)}"
            )

    def choose(self, events: Sequence[Event]) -> list[Event]:
        return [
            event
            for event in events
            if event.confidence >= self.min_confidence
            and (not self.species or event.ebird_code in self.species)
        ]


# --- which recordings -----------------------------------------------------------------------------


def find_recordings(paths: Sequence[str | Path]) -> list[Recording]:
    """Return the recordings among ``paths``, below those that are folders, and that match globs.

    Each once. Results of a recording in a folder are named as in that folder; where two have one
    name, the second is told apart by a number.
    """
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = (item for item in path.rglob("*") if item.suffix.lower() in AUDIO_SUFFIXES)
            places = {item: item.relative_to(path).as_posix() for item in sorted(below)}
        elif path.exists():
            places = {path: path.name}
        else:
            anchor = Path(path.anchor)
            matching = sorted(anchor.glob(path.relative_to(anchor).as_posix()))
            if not matching:
                raise FileNotFoundError(f"{path}: no such recording or folder, nor does any match")
            places = {item: item.name for item in matching if item.is_file()}
        for item, name in places.items():
            found.setdefault(item, name)
    if not found:
        raise FileNotFoundError(f"{paths[0]}: no recording; known are {', '.join(AUDIO_SUFFIXES)}")
    taken: dict[str, int] = {}
    recordings = []
    for path, name in found.items():
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{taken[name]}/{name}"
        recordings.append(Recording(path, unique))
    return recordings


def state_of(recording: Recording, with_labels: bool = False) -> dict[str, Any]:
    """Return by what a journal knows a file again: a changed one is heard again.

    ``with_labels``: and one whose labels have changed, which its page shows.
    """
    try:
        stat = recording.path.stat()
        tables = raven_tables_of(recording.path) if with_labels else []
        labels = [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in tables]
    except OSError:
        return {"recording": str(recording.path), "size": None, "mtime_ns": None}
    state = {
        "recording": str(recording.path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns
    }  # fmt: skip
    return state | ({"labels": labels} if labels else {})


# --- hearing them ---------------------------------------------------------------------------------


def _ignore(_: float) -> None:
    """Tell nobody of progress."""


def detect_recordings(
    recordings: Sequence[Recording],
    ensemble: Ensemble,
    decision: Decision,
    embeddings: Path | None = None,
    advance: Callable[[float], object] = _ignore,
    view: Path | None = None,
) -> Iterator[tuple[Recording, RecordingResult]]:
    """Yield what is found in each recording, in order; one that does not decode has a reason.

    ``embeddings``: a folder for a Parquet file of each recording; ``view``: one for its pages.
    ``advance`` is told of every few seconds that were heard.
    """
    by_name = {one.name: one for one in recordings}
    sounds = {one.name: open_recording(one.path) for one in recordings}
    outputs = OutputOptions(
        frames=True, member_frames=view is not None, embedding=embeddings is not None
    )
    names = tuple(member.name for member in ensemble.members)
    page_writer = view and SoundscapePageWriter(view, decision, ensemble.classes, names)
    detector = EventDetector(decision, ensemble.classes)
    writer: _EmbeddingWriter | None = None
    with ExitStack() as stack:
        heard = stack.enter_context(closing(predict_stream(ensemble, sounds, outputs)))
        open_file = stack.enter_context(ExitStack())
        for name, item in heard:
            if isinstance(item, SegmentPredictions):
                detector.add(item)
                if page_writer:
                    page_writer.add(item)
                if embeddings is not None:
                    if writer is None:
                        path = inside(embeddings, fitting_name(name, ".parquet"))
                        writer = _EmbeddingWriter(path, open_file)
                    writer.add(item.embedding)
                advance(item.clipwise.shape[1] * float(SEGMENT_SECONDS))
                continue
            if isinstance(item, End):
                detected = RecordingResult(item.seconds, tuple(detector.finish(item.seconds)))
                if writer is not None:
                    writer.flush()
                if page_writer:
                    path = by_name[name].path
                    labels = _labels_beside(path)
                    page_writer.finish(
                        name,
                        path,
                        seconds=item.seconds,
                        decided=detected.events,
                        labels=labels,
                        truth=labels,
                    )
            else:
                detected = RecordingResult(0.0, reason=item.reason)
                if writer is not None:
                    writer.give_up()
                if page_writer:
                    page_writer.discard()
            open_file.close()
            detector, writer = EventDetector(decision, ensemble.classes), None
            yield by_name[name], detected


def _labels_beside(recording: Path) -> list[Event]:
    """Return what a person has labelled: the Raven selection tables beside a recording."""
    labels: list[Event] = []
    for table in raven_tables_of(recording):
        try:
            labels += read_raven_table(table)
        except ValueError as error:  # there may be other text beside it
            logger.warning("%s; not shown as labels", error)
    return labels


class _EmbeddingWriter:
    """Writes ``onset``, ``offset`` and ``embedding`` of the segments of a recording."""

    def __init__(self, path: Path, open_file: ExitStack) -> None:
        self.path, self.n_segments = path, 0
        self.is_wanted = True
        open_file.callback(self._forget)
        self.temporary = open_file.enter_context(atomic_path(path))
        self.open_file = open_file
        self.writer: pq.ParquetWriter | None = None
        self.held: list[np.ndarray] = []

    def add(self, embedding: np.ndarray) -> None:
        self.held.append(embedding)
        if sum(map(len, self.held)) >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what has been added."""
        if not self.held:
            return
        embedding, self.held = np.concatenate(self.held), []
        n_segments, size = embedding.shape
        onsets = SEGMENT_SECONDS * np.arange(
            self.n_segments, self.n_segments + n_segments, dtype=np.float64
        )
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embedding.ravel()), size)
        table = pa.table(
            {"onset": onsets, "offset": onsets + SEGMENT_SECONDS, "embedding": vectors}
        )
        if self.writer is None:
            self.writer = self.open_file.enter_context(
                pq.ParquetWriter(self.temporary, table.schema, compression="zstd")
            )
        self.writer.write_table(table)
        self.n_segments += n_segments

    def give_up(self) -> None:
        """Leave no file: the recording has broken off."""
        self.is_wanted = False

    def _forget(self) -> None:
        if not self.is_wanted:
            self.path.unlink(missing_ok=True)


def fingerprint_of(package: Path, options: ResultOptions, device: str) -> str:
    """Return what results depend on beside the recordings: code, weights, decision, runtime."""
    manifest = (package / MANIFEST_FILE).read_text(encoding="utf-8")
    onnx_version = version("onnxruntime") if is_onnx_installed() else None
    made = [options.embeddings, options.view]
    return digest(json.dumps([manifest, *made, device, version("torch"), onnx_version]))


def predict_recordings(
    recordings: Sequence[Recording],
    journal: Journal,
    listen: Callable[[Sequence[Recording]], Iterator[tuple[Recording, RecordingResult]]],
    output: Path,
    options: ResultOptions,
) -> str:
    """Hear what the journal does not have yet, then write all that is wanted; return a summary.

    ``listen`` yields what is found in the recordings given to it, in any order.
    """
    view = output / VIEW_FOLDER if options.view else None
    states = {one: state_of(one, options.view) for one in recordings}  # before they are heard
    left = [one for one in recordings if not _is_finished(one, journal.find(states[one]), view)]
    if len(left) < len(recordings):
        logger.info("%d recordings were finished before", len(recordings) - len(left))
    if left:
        for recording, detected in listen(left):
            if detected.reason:
                logger.warning("%s: %s", recording.path, detected.reason)
            journal.add(states[recording], detected.to_json())
    found = {one: RecordingResult.from_json(journal.find(states[one])) for one in recordings}
    return write_results(found, output, options)


def _is_finished(recording: Recording, value: dict[str, Any] | None, view: Path | None) -> bool:
    """Say whether a recording is in the journal, and its page, if wanted, where it belongs."""
    if value is None or view is None or value["reason"]:
        return value is not None
    return (view / page_names(recording.name, n_parts_of(value["seconds"]))[0]).is_file()


def predict_locally(
    ensemble: Ensemble, decision: Decision, output: Path, options: ResultOptions, progress: bool
) -> Callable[[Sequence[Recording]], Iterator[tuple[Recording, RecordingResult]]]:
    """Return a ``listen`` for this machine, with a bar: x real time and the time left."""
    embeddings = output / "embeddings" if options.embeddings else None
    view = output / VIEW_FOLDER if options.view else None

    def listen(recordings: Sequence[Recording]) -> Iterator[tuple[Recording, RecordingResult]]:
        total = sum(map(_promised_seconds, recordings)) if progress else 0.0
        began, n_finished = time.monotonic(), 0
        with tqdm(total=total, disable=not total, bar_format=PROGRESS) as bar:

            def advance(seconds: float) -> None:
                # A last segment is padded, and headers promise too little: tqdm knows no more
                # than all.
                bar.update(min(seconds, total - bar.n))
                show()

            def show() -> None:
                speed = bar.n / max(time.monotonic() - began, 1e-3)
                bar.set_postfix_str(
                    f"{n_finished} of {len(recordings)} recordings, {speed:.0f} x real time"
                )

            for recording, detected in detect_recordings(
                recordings,
                ensemble,
                decision=decision,
                embeddings=embeddings,
                advance=advance if total else _ignore,
                view=view,
            ):
                n_finished += 1
                if total:
                    show()
                yield recording, detected

    return listen


def _promised_seconds(recording: Recording) -> float:
    try:
        return probe_audio(recording.path).seconds
    except (AudioError, OSError):  # told of when it is heard
        return 0.0


# --- writing --------------------------------------------------------------------------------------


def write_results(
    found: Mapping[Recording, RecordingResult], output: Path, options: ResultOptions
) -> str:
    """Write tables of all recordings, files of each, and ``failed.csv``; return a summary."""
    names = {
        event.ebird_code: display_name(event.ebird_code)
        for detected in found.values()
        for event in detected.events
    }
    heard = {one: detected for one, detected in found.items() if not detected.reason}
    chosen = {one: options.choose(detected.events) for one, detected in heard.items()}
    detections = {str(one.path): events for one, events in chosen.items()}
    for name, write_table in TABLES.items():
        if name in options.formats:
            write_table(output / f"detections.{name}", detections, names)
    for recording, events in chosen.items():
        for name, suffix in PER_RECORDING.items():
            if name not in options.formats:
                continue
            path = inside(output / name, fitting_name(recording.name, suffix))
            if name == "raven":
                write_raven_table(path, events, names)
            else:
                write_audacity_labels(path, events)
    if options.view:
        write_index(output / VIEW_FOLDER, "Recordings", _index_table(found))
    failed = {str(one.path): two.reason for one, two in found.items() if two.reason}
    write_failures(output / FAILED_FILE, failed)
    n_events = sum(map(len, chosen.values()))
    seconds = sum(detected.seconds for detected in heard.values())
    tables = ", ".join(
        str(output / f"detections.{one}") for one in TABLES if one in options.formats
    )
    return (
        f"{tables or output}: {n_events} detections in {len(heard)} recordings of "
        f"{seconds / 60:.1f} min; {len(failed)} failed"
        + (f"; look at {output / VIEW_FOLDER / INDEX_FILE}" if options.view else "")
    )


def _index_table(found: Mapping[Recording, RecordingResult]) -> pd.DataFrame:
    """Return a row for each recording: its length, what is in it, or why it was not heard."""
    return pd.DataFrame(
        {
            "recording": one.name,
            "seconds": np.nan if detected.reason else detected.seconds,
            "detections": len(detected.events),
            "species": ", ".join(
                sorted({display_name(event.ebird_code) for event in detected.events})
            ),
            "failed": detected.reason,
        }
        for one, detected in found.items()
    )
