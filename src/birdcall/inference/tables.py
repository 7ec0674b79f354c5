"""Write detections as tables, for Raven and for Audacity; read the labels of both."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from birdcall.config import require_choice
from birdcall.inference.events import Event
from birdcall.storage.files import (
    atomic_path,
    csv_text,
    folded_name,
    is_sound,
    letters_of,
    list_folder,
    read_tab_rows,
    shorten_list,
    utf8_text,
    write_atomically,
)
from birdcall.taxonomy import match_code

logger = logging.getLogger(__name__)

DETECTION_COLUMNS = (*("recording", "onset", "offset", "ebird_code", "common_name", "confidence"),)
_RAVEN_COLUMNS = (
    *("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)"),
    *("Low Freq (Hz)", "High Freq (Hz)", "Species Code", "Common Name", "Confidence"),
)
LABEL_COLUMNS = (  # of labels; the first that has text counts
    *("Species eBird Code", "Species Code", "ebird_code", "Code", "Species", "Annotation"),
    *("Label", "Common Name", "Scientific Name"),
)
_TIMES = {"begintimes": "Begin Time (s)", "endtimes": "End Time (s)"}
_SECONDS = _TIMES | {"fileoffsets": "File Offset (s)"}
# What follows the recording's name in the names of tables that a model has predicted: BirdNET, and
# our pages. What a person has checked ends with .selections.txt.
_OF_MODELS = re.compile(
    r"(?!.*\.selections\.txt$).*(birdnet|\.(detections|audacity)\.)", re.IGNORECASE
)
_CONFIDENCE = re.compile(r"(?<=\S) +([01]\.[0-9]+)$")  # see `write_audacity_labels`
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_TIME_TOLERANCE = 0.01  # seconds; Raven rounds
_Detections = Mapping[str, Sequence[Event]]  # recording -> its events


def write_detections(
    path: Path, detections: _Detections, common_names: Mapping[str, str] | None = None
) -> None:
    """Write the events of all recordings as one table with ``DETECTION_COLUMNS``.

    The suffix of ``path`` chooses the format: ``.csv``, ``.parquet`` or ``.jsonl`` (a JSON object
    per line). Recordings are in the order given; one without events has no row. ``common_names``
    maps ebird codes to names; where it has none the cell is empty.
    """
    require_choice("suffix of a table of detections", path.suffix, (".csv", ".parquet", ".jsonl"))
    rows = detection_rows(detections, common_names)
    if path.suffix == ".csv":
        write_atomically(path, csv_text([DETECTION_COLUMNS, *(row.values() for row in rows)]))
    elif path.suffix == ".jsonl":
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        import pyarrow as pa  # the kernel, which imports this module, can do without
        import pyarrow.parquet as pq

        types = {"onset": pa.float64(), "offset": pa.float64(), "confidence": pa.float64()}
        schema = pa.schema([(name, types.get(name, pa.string())) for name in DETECTION_COLUMNS])
        texts = [row | {"recording": utf8_text(str(row["recording"]))} for row in rows]
        table = pa.Table.from_pylist(texts, schema=schema)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")


def detection_rows(
    detections: _Detections, common_names: Mapping[str, str] | None = None
) -> list[dict[str, str | float]]:
    """Return one row per event, with the keys ``DETECTION_COLUMNS`` in order."""
    names = common_names or {}
    return [
        {
            "recording": recording,
            "onset": float(event.onset),
            "offset": float(event.offset),
            "ebird_code": event.ebird_code,
            "common_name": names.get(event.ebird_code, ""),
            "confidence": float(event.confidence),
        }
        for recording, events in detections.items()
        for event in events
    ]


def write_raven_table(
    path: Path,
    events: Iterable[Event],
    common_names: Mapping[str, str] | None = None,
    band_hz: tuple[float, float] = (0.0, 16_000.0),
) -> None:
    """Write one recording's events as a Raven selection table; its boxes span ``band_hz``."""
    names = common_names or {}
    rows = [
        (
            *(number, "Spectrogram 1", 1),
            _decimal(event.onset),
            _decimal(event.offset),
            *map(_decimal, band_hz),
            event.ebird_code,
            names.get(event.ebird_code, ""),
            _decimal(event.confidence),
        )
        for number, event in enumerate(events, start=1)
    ]
    lines = ("\t".join(" ".join(str(cell).split()) for cell in row) for row in rows)
    write_atomically(path, "\n".join(["\t".join(_RAVEN_COLUMNS), *lines, ""]))


def read_raven_table(path: Path, label_column: str | None = None) -> list[Event]:
    """Return the selections of a Raven table, or the labels of an Audacity track.

    The label is in ``label_column``, else in the first of ``LABEL_COLUMNS`` that has text; a
    confidence that is no number is 1. Columns are found by their letters, in any case. Raven saves
    a selection once per view (waveform and spectrogram): of those with the same label and times,
    the first is taken. Raises ``ValueError`` with the line of an invalid selection.
    """
    return [selection.event for selection in _read_selections(path, label_column)]


def read_labels_beside(
    recordings: Collection[Path],
    codes: Collection[str],
    label_column: str | None = None,
    *,
    is_strict: bool = False,
) -> dict[Path, list[Event]]:
    """Return the labels of recordings with Raven or Audacity tables beside them (`_find_tables`).

    A label that means one of ``codes`` is that code (`match_code`), any other is as it was written.
    A table without selections says that its recording has none. A table of several files, with
    ``Begin File`` and ``File Offset (s)``, labels each. Text that is no table, results of a model,
    and selections of files that are not there are left out, with a warning. A table that cannot be
    read: ``ValueError``, or a warning where not ``is_strict``.
    """
    labels: dict[Path, dict[tuple[str, float, float], Event]] = {}
    left_out: dict[str, list[Path]] = {}
    for table, subjects, rest, by_name in _find_tables(recordings):
        if _OF_MODELS.match(rest):
            reason = "results of a model; name those that a person has checked .selections.txt"
            left_out.setdefault(reason, []).append(table)
            continue
        try:
            selections = _read_selections(table, label_column)
            assigned = list(_assign_selections(table, subjects, selections, by_name))
        except (_NoTableError, IsADirectoryError):
            if subjects:
                left_out.setdefault("no Raven selection tables", []).append(table)
            continue
        except (ValueError, OSError) as error:
            if is_strict and subjects:
                raise
            logger.warning("%s; its labels are left out", error)
            continue
        labels |= {recording: {} for recording in subjects if recording not in labels}
        for recording, event in assigned:
            code = match_code(event.ebird_code, codes) or event.ebird_code
            key = code, event.onset, event.offset
            labels.setdefault(recording, {}).setdefault(key, replace(event, ebird_code=code))
    for why, tables in left_out.items():
        logger.warning("text beside recordings is left out, %s: %s", why, shorten_list(tables))
    return {path: list(labels[path].values()) for path in recordings if path in labels}


def _find_tables(
    paths: Iterable[Path],
) -> Iterator[tuple[Path, list[Path], str, dict[str, list[Path]]]]:
    """Yield each text file beside recordings, whose it is, the rest of its name, and what is there.

    Its name begins with that of its recording, with or without suffix, and a dot. The longest such
    name counts: ``dawn.2.a.txt`` is of ``dawn.2.wav`` if that is there, else of ``dawn.wav``. The
    last is the sound there by name and stem, see `_look_up`. Each folder is listed once.
    """
    folders: dict[Path, set[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, set()).add(path)
    for folder, sounds in folders.items():
        files = sorted(folder / entry.name for entry in list_folder(folder))
        named: dict[str, list[Path]] = {}
        folded: dict[str, list[Path]] = {}
        for path in sorted(sounds.union(filter(is_sound, files))):
            for name in {utf8_text(path.name), utf8_text(path.stem)}:
                named.setdefault(name, []).append(path)
                folded.setdefault(folded_name(name), []).append(path)
        by_name = folded | named
        for table in filter(lambda path: path.suffix.lower() == ".txt", files):
            beginning = utf8_text(table.stem)
            while beginning and not _look_up(by_name, beginning):
                beginning = beginning.rpartition(".")[0]
            rest = utf8_text(table.name)[len(beginning) :]
            yield table, _look_up(by_name, beginning), rest, by_name


def _look_up(by_name: Mapping[str, list[Path]], name: str) -> list[Path]:
    """Return the sound of a name; if there is none, that of the same letters in another case."""
    return by_name.get(name) or by_name.get(folded_name(name), [])


class _NoTableError(ValueError):
    """A text file without the columns of a selection table."""


class _Selection(NamedTuple):
    """An event with the times of its table, and the file in which it begins."""

    event: Event
    file: str  # name; empty where the table does not tell
    start: float  # of the file, in the times of the table


def _read_selections(path: Path, label_column: str | None) -> list[_Selection]:
    rows = _with_header(read_tab_rows(path), label_column or "Label")
    (_, header), *lines = rows or [(1, [])]
    letters = list(map(letters_of, header))
    columns = {name: letters.index(name) for name in letters}
    wanted = (label_column,) if label_column else LABEL_COLUMNS
    labels = [name for name in map(letters_of, wanted) if name in columns]
    if not (_TIMES.keys() & columns.keys() or (lines and path.match("*.selections.txt"))):
        raise _NoTableError(f"{path}: no column 'Begin Time (s)'; it has {', '.join(header)}")
    if lines and not (labels and _TIMES.keys() <= columns.keys()):
        raise ValueError(
            f"{path}: it needs 'Begin Time (s)', 'End Time (s)' and a column with labels: "
            f"{', '.join(wanted)}, or what --label-column names; it has {', '.join(header)}"
        )
    # Excel leaves out empty cells at the end of a row; those that are read must be there.
    needed = {*labels[:1], *_SECONDS, "beginfile", "beginpath"} & columns.keys()
    n_needed = 1 + max((columns[name] for name in needed), default=0)
    selections: dict[tuple[object, ...], _Selection] = {}
    for line, cells in lines:
        if len(cells) < n_needed or any(cells[len(header) :]):
            raise ValueError(
                f"{path}, line {line}: {len(cells)} fields where the header has {len(header)}; "
                "is the file cut short, or a tab in a note?"
            )
        row = {name: cells[index] for name, index in columns.items() if index < len(cells)}
        file = re.split(r"[/\\]", row.get("beginfile") or row.get("beginpath", ""))[-1]
        numbers = [name for name in _SECONDS if name in row and (file or name != "fileoffsets")]
        for name in numbers:
            if not _NUMBER.fullmatch(row[name]):
                what = f"{_SECONDS[name]} is {row[name]!r}"
                raise ValueError(f"{path}, line {line}: {what}; give seconds, such as 12.5")
        onset, offset, *inside = (float(row[name]) for name in numbers)
        confidence = row.get("confidence", "")
        try:
            event = Event(
                ebird_code=next((row[name] for name in labels if row.get(name)), ""),
                onset=onset,
                offset=offset,
                confidence=float(confidence) if _NUMBER.fullmatch(confidence) else 1.0,
                note=row.get("notes", ""),
            )
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        start = onset - inside[0] if inside else 0.0
        key = event.ebird_code, onset, offset, file
        selections.setdefault(key, _Selection(event, file, start))
    if "fileoffsets" not in columns and len({item.file for item in selections.values()}) > 1:
        raise ValueError(
            f"{path}: selections of several files, but no column 'File Offset (s)': add it to the "
            "measurements of the table in Raven and save the table again"
        )
    return list(selections.values())


def _with_header(rows: list[tuple[int, list[str]]], label: str) -> list[tuple[int, list[str]]]:
    """Return the rows of a table as they are, those of an Audacity track with a header."""
    if not (rows and rows[0][1][2:] and all(map(_NUMBER.fullmatch, rows[0][1][:2]))):
        return rows
    labels = [(line, cells) for line, cells in rows if cells[0] != "\\"]  # else: frequencies
    split = [(line, [*cells[:-1], *_CONFIDENCE.split(cells[-1])[:2]]) for line, cells in labels]
    return [(0, ["Begin Time (s)", "End Time (s)", label, "Confidence"]), *split]


def _assign_selections(
    table: Path,
    subjects: Sequence[Path],
    selections: Sequence[_Selection],
    by_name: Mapping[str, list[Path]],
) -> Iterator[tuple[Path, Event]]:
    """Yield each selection of a table with its recording, in the times of the recording.

    In a table of several files, or of no recording by its name, the ``Begin File`` decides. A
    selection across files is in each in which another begins. ``ValueError`` if the name is of one
    recording and the ``Begin File`` of another.
    """
    starts = {selection.file: selection.start for selection in selections}
    is_sequence = len(starts) > 1 or any(abs(start) > _TIME_TOLERANCE for start in starts.values())
    if subjects and not is_sequence:
        for file in starts:
            if file in by_name and not set(by_name[file]) & set(subjects):
                raise ValueError(
                    f"{table}: by its name it is of {subjects[0].name}, but its selections are of "
                    f"{file}, which is there too: rename the table, or correct the Begin File"
                )
        yield from ((path, selection.event) for path in subjects for selection in selections)
        return
    is_ordered = len(set(starts.values())) == len(starts)  # else it is of several sequences
    lost: Counter[str] = Counter()
    for event, file, start in selections:
        parts = {file: start}
        if is_ordered:
            parts |= {
                other: begin
                for other, begin in starts.items()
                if event.onset < begin < event.offset - _TIME_TOLERANCE
            }
        for name, begin in parts.items():
            end = min((other for other in parts.values() if other > begin), default=event.offset)
            onset, offset = max(0.0, event.onset - begin), end - begin
            paths = _look_up(by_name, name) or _look_up(by_name, Path(name).stem)
            if paths:
                yield paths[0], replace(event, onset=round(onset, 6), offset=round(offset, 6))
            else:
                lost[name or "(no Begin File)"] += 1
    if lost:
        logger.warning(
            "%s: %d selections are left out, because their files are not beside the table: %s",
            *(table, lost.total(), shorten_list(list(lost))),
        )


def write_audacity_labels(path: Path, events: Iterable[Event]) -> None:
    """Write one recording's events as an Audacity label track: ``aldfly 0.93``."""
    lines = [
        f"{_decimal(event.onset)}\t{_decimal(event.offset)}\t"
        f"{event.ebird_code} {_decimal(event.confidence)}\n"
        for event in events
    ]
    write_atomically(path, "".join(lines))


def _decimal(number: float) -> str:
    """Return a float's shortest exact decimals: Raven and Audacity need not know 1e-05."""
    return np.format_float_positional(float(number), trim="0")
