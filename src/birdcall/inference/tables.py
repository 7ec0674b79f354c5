"""Write and read tables: submissions, detections, labels of Raven and Audacity."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.config import NOCALL, require_choice
from birdcall.inference.events import Event
from birdcall.storage.files import atomic_path, read_table, write_atomically

_SUBMISSION_COLUMNS = ("row_id", "birds")
DETECTION_COLUMNS = (*("recording", "onset", "offset", "ebird_code", "common_name", "confidence"),)
_EVENT_COLUMNS = ("recording", "ebird_code", "onset", "offset", "confidence")
_RAVEN_COLUMNS = (
    *("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)"),
    *("Low Freq (Hz)", "High Freq (Hz)", "Species Code", "Common Name", "Confidence"),
)
_RAVEN_LABEL_COLUMNS = (*("Species Code", "ebird_code", "Code", "Species", "Annotation", "Label"),)

_Detections = Mapping[str, Sequence[Event]]  # recording -> its events


# --- the submission -----------------------------------------------------------------------------


def write_submission(path: Path, row_ids: Sequence[str], birds: Sequence[str]) -> None:
    """Write the columns row_id, birds in the order given; ``birds`` are label strings.

    Raises ``ValueError`` for what Kaggle would score wrongly: a row twice, a row without label,
    ``nocall`` beside birds.
    """
    if len(row_ids) != len(birds):
        raise ValueError(f"{path}: {len(row_ids)} row_ids but {len(birds)} predictions")
    _check_submission(path, row_ids, birds)
    write_atomically(path, _csv_text([_SUBMISSION_COLUMNS, *zip(row_ids, birds, strict=True)]))


def read_submission(path: Path, row_ids: Sequence[str]) -> pd.DataFrame:
    """Read a submission, columns row_id, birds; its rows must be ``row_ids``, in this order."""
    frame = read_table(path, _SUBMISSION_COLUMNS)
    if frame.columns.tolist() != list(_SUBMISSION_COLUMNS):
        raise ValueError(f"{path}: the columns are {', '.join(frame)}, not row_id,birds")
    read_ids = frame["row_id"].tolist()
    _check_submission(path, read_ids, frame["birds"].tolist())
    for line, row_id, expected in zip(frame.index, read_ids, row_ids, strict=False):
        if row_id != expected:
            raise ValueError(f"{path}, line {line}: row_id is {row_id!r}; expected {expected!r}")
    if len(read_ids) != len(row_ids):
        raise ValueError(f"{path}: {len(read_ids)} rows where {len(row_ids)} were expected")
    return frame.reset_index(drop=True)


def _check_submission(path: Path, row_ids: Sequence[str], birds: Sequence[str]) -> None:
    seen = set()
    for number, (row_id, text) in enumerate(zip(row_ids, birds, strict=True), start=1):
        where = f"{path}, row {number} ({row_id!r})"
        if not isinstance(row_id, str) or not row_id or row_id in seen:
            raise ValueError(f"{where}: row_id is empty or occurs twice")
        seen.add(row_id)
        tokens = text.split(" ") if isinstance(text, str) else [""]
        if "" in tokens:
            raise ValueError(
                f"{where}: birds is {text!r}; give codes with a space between, or {NOCALL}"
            )
        if len(set(tokens)) != len(tokens):
            raise ValueError(f"{where}: birds is {text!r}; it names a species twice")
        if NOCALL in tokens and len(tokens) > 1:
            raise ValueError(
                f"{where}: birds is {text!r}; {NOCALL} cannot be combined with species"
            )


# --- event files: one combined table, or one file per recording ---------------------------------


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
        write_atomically(path, _csv_text([DETECTION_COLUMNS, *(row.values() for row in rows)]))
    elif path.suffix == ".jsonl":
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        import pyarrow as pa  # the kernel, which imports this module, can do without
        import pyarrow.parquet as pq

        types = {"onset": pa.float64(), "offset": pa.float64(), "confidence": pa.float64()}
        schema = pa.schema([(name, types.get(name, pa.string())) for name in DETECTION_COLUMNS])
        with atomic_path(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary, compression="zstd")


def read_detections(path: Path) -> dict[str, list[Event]]:
    """Return the events of each recording in a ``.csv`` or ``.jsonl`` of `write_detections`.

    Raises ``ValueError`` with the line of an invalid event.
    """
    require_choice("suffix of a table of detections", path.suffix, (".csv", ".jsonl"))
    rows: list[tuple[int, Mapping[str, str | float]]] = []
    if path.suffix == ".csv":
        rows += read_table(path, DETECTION_COLUMNS).iterrows()
    else:
        for line, text in enumerate(_read_lines(path), start=1):
            try:
                row = json.loads(text)
                rows.append((line, {name: row[name] for name in _EVENT_COLUMNS}))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {line}: not a detection: {error}") from error
    detections: dict[str, list[Event]] = {}
    for line, row in rows:
        recording, *values = (row[name] for name in _EVENT_COLUMNS)
        detections.setdefault(recording, []).append(_event(path, line, *values))
    return detections


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
            number,
            "Spectrogram 1",
            1,
            _decimal(event.onset),
            _decimal(event.offset),
            *map(_decimal, band_hz),
            event.ebird_code,
            names.get(event.ebird_code, ""),
            _decimal(event.confidence),
        )
        for number, event in enumerate(events, start=1)
    ]
    write_atomically(path, _csv_text([_RAVEN_COLUMNS, *rows], delimiter="\t"))


def read_raven_table(path: Path, label_column: str | None = None) -> list[Event]:
    """Return the selections of a Raven table, ours or one drawn by hand in Raven.

    The label is in ``label_column``, else in the first of ``_RAVEN_LABEL_COLUMNS`` that is there; a
    confidence, where there is none, is 1. Raven saves a selection once per view (waveform and
    spectrogram): the first is taken. Raises ``ValueError`` with the line of an invalid selection.
    """
    options = ("Selection", "Begin Time (s)", "End Time (s)")
    frame = read_table(path, [*options, label_column] if label_column else options, delimiter="\t")
    labels = [name for name in _RAVEN_LABEL_COLUMNS if name in frame.columns]
    if not (label_column or labels):
        raise ValueError(
            f"{path}: no column with labels ({', '.join(_RAVEN_LABEL_COLUMNS)}); its columns are "
            f"{', '.join(frame.columns)}"
        )
    column = label_column or labels[0]
    return [
        _event(
            path,
            line,
            ebird_code=row[column],
            onset=row["Begin Time (s)"],
            offset=row["End Time (s)"],
            confidence=row.get("Confidence") or 1.0,
            note=row.get("Notes", ""),
        )
        for line, row in frame.drop_duplicates("Selection").iterrows()
    ]


def write_audacity_labels(path: Path, events: Iterable[Event]) -> None:
    """Write one recording's events as an Audacity label track: ``aldfly 0.93``."""
    lines = [
        f"{_decimal(event.onset)}\t{_decimal(event.offset)}\t"
        f"{event.ebird_code} {_decimal(event.confidence)}\n"
        for event in events
    ]
    write_atomically(path, "".join(lines))


def read_audacity_labels(path: Path) -> list[Event]:
    """Return the labels of an Audacity track; a label without a number has confidence 1."""
    events = []
    for line, text in enumerate(_read_lines(path), start=1):
        if text.startswith("\\") or not text.strip():
            continue  # Audacity puts the frequency range of a label on a line of its own
        cells = text.split("\t")
        label = cells[2].split() if len(cells) == 3 else []
        if len(label) not in (1, 2):
            raise ValueError(f"{path}, line {line}: {text!r} is not onset, offset, label")
        confidence = label[1] if len(label) == 2 else 1.0
        events.append(
            _event(
                path,
                line,
                ebird_code=label[0],
                onset=cells[0],
                offset=cells[1],
                confidence=confidence,
            )
        )
    return events


# --- text ---------------------------------------------------------------------------------------


def _csv_text(rows: Iterable[Iterable[object]], delimiter: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _decimal(number: float) -> str:
    """Return a float's shortest exact decimals: Raven and Audacity need not know 1e-05."""
    return np.format_float_positional(float(number), trim="0")


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def _event(
    path: Path,
    line: int,
    ebird_code: str,
    onset: str | float,
    offset: str | float,
    confidence: str | float,
    note: str = "",
) -> Event:
    try:
        return Event(
            ebird_code=ebird_code,
            onset=float(onset),
            offset=float(offset),
            confidence=float(confidence),
            note=note,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, line {line}: {error}") from None
