"""Write the soundscape page: a recording to see, play and label, with what members predict."""

from __future__ import annotations

import base64
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from birdcall.audio.reading import AudioError, iterate_audio
from birdcall.inference.background import BackgroundAligner
from birdcall.inference.decision import Decision
from birdcall.inference.events import Event
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import FRAME_SECONDS
from birdcall.report.html import (
    MAX_HZ,
    SAMPLE_RATE,
    HtmlTable,
    PageContent,
    draw_tiles,
    encode_audio,
    read_asset,
    write_page,
)
from birdcall.storage.files import digest, fitting_name, inside
from birdcall.taxonomy import all_species, display_name

logger = logging.getLogger(__name__)

PART_SECONDS = 600  # of a recording on one page: about 7 MB
# Probabilities are stored in steps of 1 / LEVELS, rounded down: compared with a threshold of whole
# hundredths they give the same detections as the probabilities themselves.
LEVELS = 200
# Species of a part: those with the highest probabilities. The size of a page depends on the length
# of the recording, not on the number of classes.
MAX_CLASSES = 24
_MIN_PROBABILITY = 0.05
_INDEX_FILE = "index.html"
_SCRIPTS = ("soundscape_view.js", "soundscape_player.js", "soundscape_labels.js")


@dataclass(frozen=True)
class PartFrames:
    """Probabilities over time in one part of a recording, of its most probable species.

    packed: zlib of uint8 ``(outputs, classes, n_frames)`` in `LEVELS`; the first output is the
    members' mean, then each member.
    """

    classes: tuple[str, ...]
    n_frames: int
    packed: bytes

    def unpack(self) -> np.ndarray:
        """Return the levels ``(outputs, classes, n_frames)``."""
        values = np.frombuffer(zlib.decompress(self.packed), np.uint8)
        n_outputs = len(values) // max(1, len(self.classes) * self.n_frames)
        return values.reshape(n_outputs, len(self.classes), self.n_frames)


_NO_FRAMES = PartFrames((), 0, zlib.compress(b""))


class FrameCollector:
    """Collects a recording's frames for its pages; memory does not grow with the classes."""

    def __init__(self, decision: Decision, classes: Sequence[str]) -> None:
        self.decision, self.classes = decision, tuple(classes)
        self.aligner = BackgroundAligner(decision.background)
        self.pending: list[np.ndarray] = []  # levels (outputs, classes, frames) of this part
        self.n_pending = 0  # frames
        self.parts: list[PartFrames] = []

    def add(self, predictions: SegmentPredictions) -> None:
        """Add the next segments, with frames and member_frames."""
        self._add_aligned(self.aligner.add(predictions))

    def _add_aligned(self, parts: list[SegmentPredictions]) -> None:
        for predictions in parts:
            outputs = np.concatenate([predictions.frames[None], predictions.member_frames])
            if not np.isfinite(outputs).all():
                raise ValueError("framewise output contains NaN or infinity: did a model diverge?")
            if self.decision.calibration is not None:
                outputs = self.decision.calibration.apply_over_time(outputs)
            levels = np.floor(outputs * LEVELS).astype(np.uint8)
            n_part = round(PART_SECONDS / FRAME_SECONDS)
            while levels.shape[2]:
                head = levels[:, :, : n_part - self.n_pending]
                self.pending.append(head)
                self.n_pending += head.shape[2]
                levels = levels[:, :, head.shape[2] :]
                if self.n_pending == n_part:
                    self._pack()

    def finish(self) -> list[PartFrames]:
        """Return all parts of the recording."""
        self._add_aligned(self.aligner.finish())
        if self.n_pending:
            self._pack()
        return self.parts

    def _pack(self) -> None:
        levels = np.concatenate(self.pending, axis=2)
        self.pending, self.n_pending = [], 0
        highest = levels.max(axis=(0, 2))
        order = np.argsort(-highest.astype(int), kind="stable")[:MAX_CLASSES]
        columns = order[highest[order] >= _MIN_PROBABILITY * LEVELS]
        packed = zlib.compress(np.ascontiguousarray(levels[:, columns]).tobytes(), 6)
        codes = tuple(self.classes[column] for column in columns)
        self.parts.append(PartFrames(codes, levels.shape[2], packed))


@dataclass(frozen=True)
class Soundscape:
    """What a soundscape page shows.

    name: of the recording among the results, a relative path. members: their names. threshold:
    where the slider starts, unless it is 1. decided: detections by the decision.
    truth: known events. labels: the labels that a person starts from, with notes. species: the
    members' classes, which a label can have beside the species of the competition.
    """

    name: str
    path: Path
    seconds: float
    parts: Sequence[PartFrames]
    members: Sequence[str]
    threshold: float
    decided: Sequence[Event] = ()
    truth: Sequence[Event] = ()
    labels: Sequence[Event] = ()
    species: Sequence[str] = ()


def page_names(name: str, n_parts: int) -> list[str]:
    """Return the file names of a recording's pages, relative to their folder."""
    if n_parts <= 1:
        return [fitting_name(name, ".html")]
    return [fitting_name(name, f".part{part:03d}.html") for part in range(1, n_parts + 1)]


def n_parts_of(seconds: float) -> int:
    """Return the number of pages of a recording."""
    return max(1, -(-math.ceil(seconds) // PART_SECONDS))


def write_soundscape_pages(folder: Path, soundscape: Soundscape, home: str = _INDEX_FILE) -> Path:
    """Write a page for each ten minutes of a recording; return the first page.

    home: the page that they link back to, relative to ``folder``. A recording that cannot be read
    has pages without audio that give the reason.
    """
    n_parts = max(1, len(soundscape.parts))
    names = page_names(soundscape.name, n_parts)
    paths = [inside(folder, name) for name in names]
    home_text = "All recordings" if home == _INDEX_FILE else "Report"
    for part, (waveform, reason) in enumerate(_read_parts(soundscape.path, n_parts)):
        targets = {home_text: home}
        if part > 0:
            targets["Previous part"] = names[part - 1]
        if part + 1 < n_parts:
            targets["Next part"] = names[part + 1]
        up = "../" * (len(Path(names[part]).parts) - 1)
        title = soundscape.name
        if n_parts > 1:
            title += f", part {part + 1} of {n_parts}"
        data = _page_data(soundscape, part, n_parts, waveform)
        frames = soundscape.parts[part] if soundscape.parts else _NO_FRAMES
        highest = frames.unpack()[:1].max(initial=0) / LEVELS  # of the ensemble
        # A decision that names nothing has threshold 1: the slider starts where it shows something.
        percent = (
            round(100 * soundscape.threshold) if soundscape.threshold < 1 else 100 * highest // 1
        )
        content = PageContent(
            title=title,
            scripts=tuple(map(read_asset, _SCRIPTS)),
            styles=(read_asset("soundscape.css"),),
            data={"data": data},
        )
        write_page(
            paths[part],
            "soundscape.html",
            content,
            links={text: up + quote(target) for text, target in targets.items()},
            reason=reason,
            has_classes=bool(data["classes"]),
            has_detections=bool(data["detections"]),
            highest=highest,
            min_probability=_MIN_PROBABILITY,
            threshold_percent=min(99, max(5, percent)),
            max_khz=f"{MAX_HZ / 1000:g}",
        )
    return paths[0]


def _read_parts(path: Path, n_parts: int) -> Iterator[tuple[np.ndarray | None, str]]:
    """Yield the waveform of each part of a recording, or None and the reason."""
    n_read, reason = 0, "the recording ends before this part"
    try:
        for waveform in iterate_audio(path, SAMPLE_RATE, PART_SECONDS):
            if n_read < n_parts:
                n_read += 1
                yield waveform, ""
    except (AudioError, OSError) as error:
        reason = str(error)
        logger.warning("%s; its page has no audio", error)
    for _ in range(n_read, n_parts):
        yield None, reason


def _page_data(
    soundscape: Soundscape, part: int, n_parts: int, waveform: np.ndarray | None
) -> dict[str, Any]:
    """Return what the scripts of the page read. Events are ``[code, onset, offset, ...]``."""
    start = float(part * PART_SECONDS)
    frames = soundscape.parts[part] if soundscape.parts else _NO_FRAMES
    seconds = min(soundscape.seconds - start, PART_SECONDS)
    if waveform is not None:
        seconds = len(waveform) / SAMPLE_RATE
    seconds = max(seconds, FRAME_SECONDS)
    events = (*soundscape.truth, *soundscape.decided, *soundscape.labels)
    codes = dict.fromkeys(
        [
            *soundscape.species,
            *(species.ebird_code for species in all_species()),
            *frames.classes,
            *(event.ebird_code for event in events),
        ]
    )

    def of_part(events: Sequence[Event]) -> list[Event]:
        # An event is on the page on which it begins, so it is saved once.
        if n_parts == 1:
            return list(events)
        return [event for event in events if start <= event.onset < start + PART_SECONDS]

    stem = Path(soundscape.name).stem  # label tables of a recording begin with the stem of its file
    tiles = [] if waveform is None else draw_tiles(waveform)
    return {
        "identity": digest(f"{soundscape.path.resolve()} {part} {soundscape.seconds}"),
        "fileStem": stem if n_parts == 1 else f"{stem}.part{part + 1:03d}",
        "start": start,
        "seconds": round(seconds, 6),
        "totalSeconds": round(max(soundscape.seconds, start + seconds), 6),
        "maxHz": MAX_HZ,
        "tiles": [vars(tile) for tile in tiles],
        "audio": None if waveform is None else encode_audio(waveform),
        "classes": frames.classes,
        "modelled": soundscape.species,
        "maxClasses": MAX_CLASSES,
        "minProbability": _MIN_PROBABILITY,
        "species": [(code, display_name(code)) for code in codes],
        "outputs": ["ensemble", *soundscape.members],
        "frames": base64.b64encode(frames.packed).decode(),
        "nFrames": frames.n_frames,
        "frameSeconds": FRAME_SECONDS,
        "detections": [
            (event.ebird_code, event.onset, event.offset, event.confidence)
            for event in of_part(soundscape.decided)
        ],
        "truth": [
            (event.ebird_code, event.onset, event.offset) for event in of_part(soundscape.truth)
        ],
        "labels": [
            (event.ebird_code, event.onset, event.offset, event.note)
            for event in of_part(soundscape.labels)
        ],
    }


@dataclass
class SoundscapePageWriter:
    """Writes the pages of recordings while they are predicted, one recording after another."""

    folder: Path
    decision: Decision
    classes: tuple[str, ...]
    members: tuple[str, ...]
    home: str = _INDEX_FILE
    collector: FrameCollector = field(init=False)

    def __post_init__(self) -> None:
        self.discard()

    def add(self, predictions: SegmentPredictions) -> None:
        """Add the next segments of a recording."""
        self.collector.add(predictions)

    def discard(self) -> None:
        """Forget the segments that were added: their recording failed."""
        self.collector = FrameCollector(self.decision, self.classes)

    def finish(
        self,
        name: str,
        path: Path,
        seconds: float,
        decided: Sequence[Event],
        labels: Sequence[Event] = (),
        truth: Sequence[Event] = (),
    ) -> Path:
        """Write the pages of the recording whose segments were added; return the first page."""
        soundscape = Soundscape(
            name=name,
            path=path,
            seconds=seconds,
            parts=self.collector.finish(),
            members=self.members,
            threshold=self.decision.frame_threshold,
            decided=decided,
            truth=truth,
            labels=labels,
            species=self.classes,
        )
        self.discard()
        return write_soundscape_pages(self.folder, soundscape, self.home)

    def has_pages(self, name: str, seconds: float) -> bool:
        """Return whether the pages of a recording of this length are in the folder."""
        names = page_names(name, n_parts_of(seconds))
        return all((self.folder / page).is_file() for page in names)

    def write_index(self, table: pd.DataFrame, title: str = "Recordings") -> Path:
        """Write the page that links to the pages of all recordings.

        table: a row per recording, ``recording`` first; ``seconds`` is NaN for one without a page.
        """
        links = {
            name: quote(page_names(name, n_parts_of(seconds))[0])
            for name, seconds in zip(table["recording"], table["seconds"], strict=True)
            if not math.isnan(seconds)
        }
        # Whole seconds are enough to read and to sort by.
        frame = table.assign(seconds=table["seconds"].round().astype("Int64"))
        caption = "Recordings and the detections in them"
        content = HtmlTable(frame, caption, is_sortable=True, links=links)
        path = self.folder / _INDEX_FILE
        write_page(path, "index.html", PageContent(title, has_tables=True), table=content)
        return path
