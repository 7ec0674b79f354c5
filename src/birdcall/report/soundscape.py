"""Write the soundscape page: a recording to look at, hear and label, and what members say."""

from __future__ import annotations

import base64
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd

from birdcall.audio.reading import AudioError, iterate_audio
from birdcall.inference.decision import Decision, calibrate
from birdcall.inference.events import Event
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import FRAME_SECONDS
from birdcall.report.html import (
    MAX_HZ,
    SAMPLE_RATE,
    draw_tiles,
    encode_mp3,
    fitting_name,
    html_table,
    read_asset,
    readable,
    table_scripts,
    table_style,
    write_page,
)
from birdcall.storage.files import digest, inside
from birdcall.taxonomy import all_species, display_name

logger = logging.getLogger(__name__)

PART_SECONDS = 600  # of a recording on one page: some 7 MB
# Frames are kept in steps of 1 / LEVELS, rounded down: at thresholds of whole hundredths they say
# what the probabilities say.
LEVELS = 200
MAX_CLASSES = 24  # of a part, those that are heard most: the page grows with sound, not classes
FAINTEST = 0.05
INDEX_FILE = "index.html"
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class PartFrames:
    """What was said over time in a part of a recording, of the classes that are heard in it.

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


class FrameCollector:
    """Keeps what a page needs of what is heard in a recording, piece by piece, part by part.

    What is kept grows with the length of the recording and not with the number of classes.
    """

    def __init__(self, decision: Decision, classes: Sequence[str]) -> None:
        self.decision, self.classes = decision, tuple(classes)
        self.held: list[np.ndarray] = []  # (outputs, classes, frames) each
        self.n_held = 0
        self.parts: list[PartFrames] = []

    def add(self, piece: SegmentPredictions) -> None:
        """Take the next segments, with frames and member_frames."""
        outputs = np.concatenate([piece.frames[None], piece.member_frames])
        if not np.isfinite(outputs).all():
            raise ValueError("framewise output holds NaN or infinity: did a model diverge?")
        if self.decision.calibration is not None:
            scale = self.decision.calibration.frame_scale
            offset = self.decision.calibration.frame_offset
            outputs = calibrate(outputs.swapaxes(1, 2), scale, offset).swapaxes(1, 2)
        levels = np.floor(outputs * LEVELS).astype(np.uint8)
        n_part = round(PART_SECONDS / FRAME_SECONDS)
        while levels.shape[2]:
            taken = levels[:, :, : n_part - self.n_held]
            self.held.append(taken)
            self.n_held += taken.shape[2]
            levels = levels[:, :, taken.shape[2] :]
            if self.n_held == n_part:
                self._pack()

    def finish(self) -> list[PartFrames]:
        """Return all parts of the recording."""
        if self.n_held:
            self._pack()
        return self.parts

    def _pack(self) -> None:
        levels = np.concatenate(self.held, axis=2)
        self.held, self.n_held = [], 0
        highest = levels.max(axis=(0, 2))
        order = np.argsort(-highest.astype(int), kind="stable")[:MAX_CLASSES]
        chosen = order[highest[order] >= FAINTEST * LEVELS]
        packed = zlib.compress(np.ascontiguousarray(levels[:, chosen]).tobytes(), 6)
        names = tuple(self.classes[place] for place in chosen)
        self.parts.append(PartFrames(names, levels.shape[2], packed))


@dataclass(frozen=True)
class Soundscape:
    """What a soundscape page shows.

    name: of the recording among the results, relative. members: their names. threshold: where the
    slider begins. decided: what the decision names; truth: what is known to sing; labels: where a
    person's labelling begins, with notes. species: ebird codes that a label can have, beside the
    competition's.
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

    @property
    def stem(self) -> str:
        """Return the name of the recording's file without suffix: label tables begin with it."""
        return Path(self.name).stem


def page_names(name: str, n_parts: int) -> list[str]:
    """Return the pages of a recording, relative to their folder."""
    if n_parts <= 1:
        return [fitting_name(name, ".html")]
    return [fitting_name(name, f".part{part:03d}.html") for part in range(1, n_parts + 1)]


def write_soundscape_pages(folder: Path, soundscape: Soundscape, home: str = INDEX_FILE) -> Path:
    """Write a page for each ten minutes of a recording; return the first.

    ``home``: the page, relative to ``folder``, that they lead back to. A recording that cannot be
    read has pages without sound, which say why.
    """
    n_parts = max(1, len(soundscape.parts))
    names = page_names(soundscape.name, n_parts)
    paths = [inside(folder, name) for name in names]
    for part, (waveform, reason) in enumerate(_read_parts(soundscape.path, n_parts)):
        depth = len(Path(names[part]).parts) - 1
        links = [
            "" if target is None else "../" * depth + quote(target)
            for target in (
                home,
                names[part - 1] if part else None,
                names[part + 1] if part + 1 < n_parts else None,
            )
        ]
        data = _page_data(soundscape, part, n_parts=n_parts, waveform=waveform, reason=reason)
        where = f", part {part + 1} of {n_parts}" if n_parts > 1 else ""
        title = f"{readable(soundscape.name)}{where}"
        write_page(
            paths[part],
            title,
            _body(title, data, links, reason),
            scripts=(read_asset("soundscape.js"),),
            styles=(read_asset("soundscape.css"),),
            data=data,
        )
    return paths[0]


def _read_parts(path: Path, n_parts: int) -> Iterator[tuple[np.ndarray | None, str]]:
    """Yield so many stretches of a recording, or None and why there is none."""
    n_read, reason = 0, "the recording ends before"
    try:
        for waveform in iterate_audio(path, SAMPLE_RATE, PART_SECONDS):
            if n_read < n_parts:
                n_read += 1
                yield waveform, ""
    except (AudioError, OSError) as error:
        reason = str(error)
        logger.warning("%s; its page has no sound", error)
    for _ in range(n_read, n_parts):
        yield None, reason


def _page_data(
    soundscape: Soundscape, part: int, n_parts: int, waveform: np.ndarray | None, reason: str
) -> dict[str, object]:
    start = float(part * PART_SECONDS)
    frames = soundscape.parts[part] if soundscape.parts else PartFrames((), 0, zlib.compress(b""))
    seconds = min(soundscape.seconds - start, PART_SECONDS)
    if waveform is not None:
        seconds = len(waveform) / SAMPLE_RATE
    seconds = max(seconds, FRAME_SECONDS)
    codes = dict.fromkeys(
        [*soundscape.species, *(one.ebird_code for one in all_species()), *frames.classes]
        + [one.ebird_code for one in (*soundscape.truth, *soundscape.decided, *soundscape.labels)]
    )
    stem = soundscape.stem if n_parts == 1 else f"{soundscape.stem}.part{part + 1:03d}"
    return {
        "identity": digest(f"{soundscape.path.resolve()} {part} {soundscape.seconds}"),
        "file": readable(stem),
        "start": start,
        "seconds": round(seconds, 6),
        "total": round(max(soundscape.seconds, start + seconds), 6),
        "maxHz": MAX_HZ,
        "tiles": [
            {"start": one.start, "seconds": one.seconds, "picture": one.picture}
            for one in ([] if waveform is None else draw_tiles(waveform))
        ],
        "audio": None if waveform is None else encode_mp3(waveform),
        "reason": reason,
        "classes": frames.classes,
        "species": [(code, display_name(code)) for code in codes],
        "outputs": [ENSEMBLE, *soundscape.members],
        "frames": base64.b64encode(frames.packed).decode(),
        "nFrames": frames.n_frames,
        "frameSeconds": FRAME_SECONDS,
        "decided": [
            (one.ebird_code, one.onset, one.offset, one.confidence)
            for one in _of_part(soundscape.decided, start, n_parts)
        ],
        "truth": [
            (one.ebird_code, one.onset, one.offset)
            for one in _of_part(soundscape.truth, start, n_parts)
        ],
        "labels": [
            (one.ebird_code, one.onset, one.offset, one.note)
            for one in _of_part(soundscape.labels, start, n_parts)
        ],
        "threshold": soundscape.threshold,
    }


def _of_part(events: Sequence[Event], start: float, n_parts: int) -> list[Event]:
    """Return the events that begin in a part: each is on one page, and saved once."""
    if n_parts == 1:
        return list(events)
    return [one for one in events if start <= one.onset < start + PART_SECONDS]


def _body(title: str, data: dict[str, object], links: Sequence[str], reason: str) -> str:
    home, previous, following = links
    whole = "All recordings" if home.endswith(INDEX_FILE) else "The report"
    steps = [f"<li><a href='{escape(home, quote=True)}'>{whole}</a></li>"]
    for target, text in ((previous, "Part before"), (following, "Part after")):
        if target:
            steps.append(f"<li><a href='{escape(target, quote=True)}'>{text}</a></li>")
    notice = ""
    if reason:
        said = escape(readable(reason))
        notice = f"<p class='notice' role='status'>No sound to see or hear: {said}</p>"
    if not data["classes"]:
        notice += (
            f"<p class='notice'>No species reaches a probability of {FAINTEST:g} here: the slider "
            "has nothing to show.</p>"
        )
    threshold = round(100 * float(data["threshold"]))
    return (
        read_asset("soundscape.html")
        .replace("{{title}}", escape(title))
        .replace("{{links}}", "".join(steps))
        .replace("{{notice}}", notice)
        .replace("{{threshold}}", str(min(99, max(5, threshold))))
        .replace("{{thresholdvalue}}", f"{min(99, max(5, threshold)) / 100:.2f}")
        .replace("{{maxkhz}}", f"{MAX_HZ / 1000:g}")
    )


@dataclass
class SoundscapePageWriter:
    """Writes the pages of recordings as they are heard, and at the end the page of all of them."""

    folder: Path
    decision: Decision
    classes: tuple[str, ...]
    members: tuple[str, ...]
    home: str = INDEX_FILE
    collector: FrameCollector = field(init=False)

    def __post_init__(self) -> None:
        self.collector = FrameCollector(self.decision, self.classes)

    def add(self, piece: SegmentPredictions) -> None:
        self.collector.add(piece)

    def forget(self) -> None:
        """Begin with the next recording: this one has broken off."""
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
        """Write the pages of the recording that was added; return the first."""
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
        self.forget()
        return write_soundscape_pages(self.folder, soundscape, self.home)


def n_parts_of(seconds: float) -> int:
    """Return how many pages a recording has."""
    return max(1, -(-int(np.ceil(seconds)) // PART_SECONDS))


def write_index(folder: Path, title: str, table: pd.DataFrame) -> Path:
    """Write the page that leads to all recordings; ``table``: a row each, ``recording`` first.

    A recording whose ``seconds`` are NaN has no page.
    """
    links = {}
    for name, seconds in zip(table["recording"], table["seconds"], strict=True):
        if seconds == seconds:
            links[name] = quote(page_names(name, n_parts_of(seconds))[0])
    # Whole seconds are enough to read, and to sort by.
    table = table.assign(seconds=table["seconds"].round().astype("Int64"))
    body = (
        f"<main><h1>{escape(readable(title))}</h1>"
        + html_table(table, "Recordings and what was found in them", sortable=True, links=links)
        + "</main>"
    )
    path = folder / INDEX_FILE
    write_page(path, title, body, scripts=table_scripts(), styles=(table_style(),))
    return path
