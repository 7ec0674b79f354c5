"""Predict recordings with a staged package: ``birdcall.load_package(path)``, `birdcall predict`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS
from birdcall.inference.background import BackgroundAligner
from birdcall.inference.decision import average_members
from birdcall.inference.engine import open_recording, predict_stream
from birdcall.inference.ensemble import default_device
from birdcall.inference.events import Event, EventDetector
from birdcall.inference.predictions import OutputOptions, SegmentPredictions
from birdcall.inference.tables import DETECTION_COLUMNS, detection_rows
from birdcall.kaggle.submission import LoadedPackage, open_package
from birdcall.storage.files import (
    SOUND_SUFFIXES,
    atomic_path,
    conversion_advice,
    find_files,
    fitting_name,
    inside,
    is_sound,
    unique_names,
    utf8_text,
)
from birdcall.taxonomy import display_name

logger = logging.getLogger(__name__)

_EMBEDDING_ROWS = 512  # written to Parquet at once
_Paths = str | Path | Sequence[str | Path]


# --- recordings and their events ------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """A recording to predict; name: of its results, unique, relative and UTF-8."""

    path: Path
    name: str


@dataclass(frozen=True)
class RecordingResult:
    """The events of a recording, or the ``reason`` why it was not predicted.

    parts: files with more of its results, relative to the output folder.
    """

    seconds: float
    events: tuple[Event, ...] = ()
    reason: str = ""
    parts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        events = [
            [event.ebird_code, event.onset, event.offset, event.confidence] for event in self.events
        ]
        return {
            "seconds": self.seconds,
            "events": events,
            "reason": self.reason,
            "parts": list(self.parts),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RecordingResult:
        events = tuple(Event(*event) for event in values["events"])
        return cls(float(values["seconds"]), events, values["reason"], tuple(values["parts"]))


# Receives the predictions of recordings, one recording after another: its segments part by part,
# then its result.
_Observer = Callable[[Recording, SegmentPredictions | RecordingResult], None]


def find_recordings(paths: Sequence[str | Path]) -> list[Recording]:
    """Return the recordings among ``paths``, below those that are folders, and that match globs.

    Each file once, however it is spelt. Of folders, and of globs such as ``field/*``, sound is
    taken (`is_sound`). Results of a recording in a folder are named as in that folder; where two
    have one name, the second gets a number. Names are UTF-8, whatever those of the files are.
    """
    names: dict[str, tuple[Path, str]] = {}  # path and name, by real path
    for path in (item for given in paths for item in _expand_glob(Path(given))):
        items = filter(is_sound, find_files(path)) if path.is_dir() else [path]
        for item in items:
            name = item.relative_to(path).as_posix() if item != path else path.name
            names.setdefault(os.path.realpath(item), (item, utf8_text(name)))
    if not names:
        raise FileNotFoundError(f"{paths[0]}: no recording; known are {', '.join(SOUND_SUFFIXES)}")
    unique = unique_names([name for _, name in names.values()])
    recordings = zip(names.values(), unique, strict=True)
    return [Recording(path, name) for (path, _), name in recordings]


def _expand_glob(path: Path) -> list[Path]:
    """Return a path that exists, or the folders and recordings that match a glob."""
    if path.exists():
        return [path]
    anchor = Path(path.anchor)
    matches = sorted(anchor.glob(path.relative_to(anchor).as_posix()))
    if not matches:
        raise FileNotFoundError(f"{path}: no such recording or folder, nor does any match")
    names_suffix = not re.search(r"[*?\]]", path.suffix or "*")  # as a/*.dat does, not a/*
    return [item for item in matches if names_suffix or is_sound(item) or item.is_dir()]


def detect_recordings(
    recordings: Sequence[Recording],
    package: LoadedPackage,
    observers: Sequence[_Observer] = (),
    outputs: OutputOptions = OutputOptions(frames=True),  # noqa: B008 - it is frozen
) -> Iterator[tuple[Recording, RecordingResult]]:
    """Yield the events of each recording, in order; one that does not decode has a reason.

    ``observers`` are called with each recording and its next segments, which have the ``outputs``,
    and at the end with its result. Without frames there are no events.
    """
    by_name = {recording.name: recording for recording in recordings}
    sources = {recording.name: open_recording(recording.path) for recording in recordings}
    detector = EventDetector(package.decision, package.ensemble.classes)
    with closing(predict_stream(package.ensemble, sources, outputs)) as stream:
        for name, item in stream:
            recording = by_name[name]
            if isinstance(item, SegmentPredictions):
                if outputs.frames:
                    detector.add(item)
                for observe in observers:
                    observe(recording, item)
                continue
            if isinstance(item, AudioError):
                advice = conversion_advice(recording.path)
                reason = f"{item.reason}; {advice}" if advice else item.reason
                result = RecordingResult(0.0, reason=reason)
            else:
                result = RecordingResult(item.seconds, tuple(detector.finish(item.seconds)))
            for observe in observers:
                observe(recording, result)
            detector = EventDetector(package.decision, package.ensemble.classes)
            yield recording, result


def embedding_part(recording: Recording) -> str:
    """Return the file in the output folder that `EmbeddingWriter` writes for a recording."""
    return Path("embeddings", fitting_name(recording.name, ".parquet")).as_posix()


def is_whole_part(path: Path) -> bool:
    """Return whether a Parquet file is there, and ends as such files do."""
    with suppress(OSError), path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return file.read() == b"PAR1"
    return False


class EmbeddingWriter:
    """Writes ``onset``, ``offset`` and ``embedding`` of the segments of each recording.

    A Parquet file of each recording, below ``output/embeddings``, and none of a recording that
    breaks off.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.stack = ExitStack()  # of the open file
        self.temporary: Path | None = None
        self.writer: pq.ParquetWriter | None = None
        self.n_segments = 0
        self.pending: list[np.ndarray] = []

    def __call__(self, recording: Recording, item: SegmentPredictions | RecordingResult) -> None:
        """Take the next segments of a recording; at its end, complete or drop its file."""
        if isinstance(item, SegmentPredictions):
            if self.temporary is None:
                path = inside(self.output, embedding_part(recording))
                self.temporary = self.stack.enter_context(atomic_path(path))
            self.pending.append(item.embedding)
            if sum(map(len, self.pending)) >= _EMBEDDING_ROWS:
                self._write_pending()
            return
        if item.reason:
            error = AudioError(recording.path, item.reason)
            self.stack.__exit__(AudioError, error, None)  # an error leaves no file
        else:
            if self.pending:
                self._write_pending()
            self.stack.close()
        self.temporary = self.writer = None
        self.n_segments, self.pending = 0, []

    def _write_pending(self) -> None:
        embedding, self.pending = np.concatenate(self.pending), []
        n_segments, size = embedding.shape
        numbers = np.arange(self.n_segments, self.n_segments + n_segments, dtype=np.float64)
        onsets = SEGMENT_SECONDS * numbers
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embedding.ravel()), size)
        table = pa.table(
            {"onset": onsets, "offset": onsets + SEGMENT_SECONDS, "embedding": vectors}
        )
        if self.writer is None:
            file = self.stack.enter_context(self.temporary.open("wb"))  # its path may be no UTF-8
            self.writer = self.stack.enter_context(
                pq.ParquetWriter(file, table.schema, compression="zstd")
            )
        self.writer.write_table(table)
        self.n_segments += n_segments


# --- use from Python ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackagePredictions:
    """What a package predicts for recordings.

    segments: a row for each 5-second segment, indexed by ``recording``, ``onset`` and ``offset``
    (seconds); a column of probabilities for each ebird_code. events: a row for each detected event,
    with the columns of ``detections.csv``. failed: why a recording has no rows, by its path.
    """

    segments: pd.DataFrame
    events: pd.DataFrame
    failed: Mapping[str, str]


class Package:
    """Trained members and their decision, as ``birdcall package`` has staged them.

    classes: the ebird codes of the species, in the order of the columns of predictions.
    """

    def __init__(self, loaded: LoadedPackage) -> None:
        self.loaded = loaded
        self.classes: tuple[str, ...] = loaded.ensemble.classes

    def __repr__(self) -> str:
        names = ", ".join(member.name for member in self.loaded.ensemble.members)
        return f"Package({len(self.classes)} classes, members: {names})"

    def predict(self, paths: _Paths) -> PackagePredictions:
        """Predict recordings, folders of recordings and globs; as ``birdcall predict`` does.

        A probability is the mean over the members of the calibrated clipwise probability. A
        recording that cannot be decoded is logged and listed in ``failed``; the others are
        predicted. Raises FileNotFoundError where a path matches no recording.
        """
        segments, events, failed = self._run(paths, OutputOptions(frames=True))
        codes = {event.ebird_code for of_recording in events.values() for event in of_recording}
        rows = detection_rows(events, {code: display_name(code) for code in codes})
        return PackagePredictions(
            segments=_segment_table(segments, self.classes),
            events=pd.DataFrame(rows, columns=list(DETECTION_COLUMNS)),
            failed=failed,
        )

    def embed(self, paths: _Paths) -> pd.DataFrame:
        """Return the embedding of each segment: the members' features, one member after another.

        Rows are indexed as in `PackagePredictions.segments`, columns are numbered. The reasons of
        recordings that cannot be decoded are in ``attrs["failed"]``, by path.
        """
        segments, _, failed = self._run(paths, OutputOptions(embedding=True))
        n_features = next(iter(segments.values())).shape[1] if segments else 0
        table = _segment_table(segments, range(n_features))
        table.attrs["failed"] = failed
        return table

    def _run(
        self, paths: _Paths, outputs: OutputOptions
    ) -> tuple[dict[str, np.ndarray], dict[str, Sequence[Event]], dict[str, str]]:
        """Return values ``(segments, columns)``, events (if frames are asked for) and failures.

        The values are embeddings, if ``outputs`` asks for them, else probabilities. Frames are not
        stored: memory grows only with the number of segments.
        """
        aligner = BackgroundAligner(self.loaded.decision.background)
        parts: list[np.ndarray] = []  # of the recording that is being predicted

        def collect(_: Recording, item: SegmentPredictions | RecordingResult) -> None:
            if isinstance(item, RecordingResult):
                return
            if outputs.embedding:
                parts.append(item.embedding)
                return
            add(aligner.add(item))

        def add(aligned: list[SegmentPredictions]) -> None:
            for item in aligned:
                clipwise = item.clipwise
                if calibration := self.loaded.decision.calibration:
                    clipwise, _ = calibration.apply(clipwise, item.framewise)
                parts.append(average_members(clipwise))

        recordings = find_recordings([paths] if isinstance(paths, str | Path) else list(paths))
        segments: dict[str, np.ndarray] = {}
        events: dict[str, Sequence[Event]] = {}
        failed: dict[str, str] = {}
        for recording, result in detect_recordings(recordings, self.loaded, [collect], outputs):
            path = str(recording.path)
            add(aligner.finish())
            if result.reason:
                logger.warning("%s: %s", path, result.reason)
                failed[path] = result.reason
            else:
                segments[path] = np.concatenate(parts)
                events[path] = result.events
            parts.clear()
        return segments, events, failed


def load_package(path: str | Path, device: torch.device | str | None = None) -> Package:
    """Load the dataset folder that ``birdcall package`` wrote (``kernels/build/dataset``).

    ``device``: the default is the GPU if there is one. Raises ValueError or FileNotFoundError where
    a file is missing or is not as packaged.
    """
    return Package(open_package(Path(path), device or default_device(), all_members=True))


def _segment_table(
    segments: Mapping[str, np.ndarray], columns: Sequence[str] | range
) -> pd.DataFrame:
    index = [
        (path, float(SEGMENT_SECONDS * number), float(SEGMENT_SECONDS * (number + 1)))
        for path, values in segments.items()
        for number in range(len(values))
    ]
    values = np.concatenate(list(segments.values())) if segments else np.empty((0, len(columns)))
    names = ["recording", "onset", "offset"]
    return pd.DataFrame(
        values, index=pd.MultiIndex.from_tuples(index, names=names), columns=list(columns)
    )
