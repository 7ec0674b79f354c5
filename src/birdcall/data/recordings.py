"""Read a data set's table of labelled recordings, in whichever published layout, and check it."""

from __future__ import annotations

import ast
import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import pandas as pd

from birdcall.storage.files import inside, read_table
from birdcall.taxonomy import find_species

log = logging.getLogger(__name__)

LAYOUT = (
    "train.csv with train_audio/<ebird_code>/XC*.mp3 (Kaggle: birdsong-recognition), "
    "birdsong-resampled-train-audio-00..04 with train_mod.csv, "
    "or train_metadata.csv with train_audio/ (BirdCLEF 2021 and later)"
)
# The folders of the resampled data set, by the first letter of the ebird_code.
RESAMPLED_LETTERS = {
    "00": "ab",
    "01": "cdef",
    "02": "ghijklm",
    "03": "nopqr",
    "04": "stuvwxyz",
}
RESAMPLED_FOLDER = "birdsong-resampled-train-audio-"
EXTENDED_FOLDER = "xeno-canto-bird-recordings-extended-"
EBIRD_CODE = re.compile(r"\w[\w.+-]{0,63}")


@dataclass(frozen=True)
class Layout:
    """Which columns of a table hold what, and in which folders its files may lie.

    ``label`` is the column of ``Scientific_Common`` names, None where labels are codes themselves.
    ``folders`` are tried in order; the first that has a folder of the ebird_code holds its files.
    """

    folders: Callable[[str], list[str]]
    filename: str = "filename"
    audio_filename: str = "filename"
    ebird_code: str = "ebird_code"
    label: str | None = "primary_label"
    secondary_labels: str = "secondary_labels"
    recordist: str = "recordist"
    optional: tuple[str, ...] = ("sampling_rate",)

    @property
    def columns(self) -> list[str]:
        needed = [
            self.filename,
            self.audio_filename,
            self.ebird_code,
            self.label or "filename",
        ]
        needed += [self.secondary_labels, self.recordist, "rating", "duration"]
        return [name for name in dict.fromkeys(needed) if name not in self.optional]


class Row(NamedTuple):
    """One line of a table, and where it stands, to say so when it is wrong."""

    csv: Path
    line: int
    values: dict[str, str]

    def fail(self, column: str, reason: str) -> NoReturn:
        value = self.values.get(column, "")
        shown = repr(value if len(value) <= 80 else value[:77] + "...")
        raise ValueError(f"{self.csv}, line {self.line}, column {column}: {shown} {reason}")


def read_recordings(data: Path) -> pd.DataFrame:
    """Read one row per training recording, in the order of the tables.

    Columns: filename (verbatim), ebird_code, secondary_codes (tuple of codes among the classes,
    without the primary one), recordist ("" where unknown), rating (0 to 5, 0: none given), duration
    (seconds that the metadata promise; 0: unknown or less than one), sample_rate (Hz, 0: unknown)
    and path (relative to ``data``, posix). Raises FileNotFoundError for a folder in no known layout
    and ValueError naming file, line and column for what cannot be read.
    """
    records: dict[str, dict[str, object]] = {}
    labels: Counter[tuple[str, str]] = Counter()
    for table, layout in _find_tables(data):
        for filename, record, label in _read_table(data, table, layout):
            labels[label, str(record["ebird_code"])] += 1
            if filename in records:
                log.warning(
                    "%s: %s is in an earlier table too; that one counts",
                    table,
                    filename,
                )
            records.setdefault(filename, record)
    recordings = pd.DataFrame.from_records(list(records.values()))
    recordings["secondary_codes"] = _map_labels(recordings, labels)
    _check_links(data, recordings)
    log.info(
        "%s: %d recordings of %d species",
        data,
        len(recordings),
        recordings.ebird_code.nunique(),
    )
    return recordings.drop(columns=["row", "folder"])


def classes_of(recordings: pd.DataFrame) -> tuple[str, ...]:
    """Return the data set's classes: its ebird_codes, sorted."""
    return tuple(sorted(set(recordings["ebird_code"])))


def check_recordings_exist(recordings: pd.DataFrame, data: Path) -> None:
    """Raise FileNotFoundError naming the first recording that is missing, and how many are."""
    paths = [PurePosixPath(path) for path in recordings["path"]]
    present = {parent: set(_entries(data / parent)) for parent in {path.parent for path in paths}}
    missing = [path for path in paths if path.name not in present[path.parent]]
    if missing:
        raise FileNotFoundError(
            f"{data / missing[0]}: no such file, though the table of recordings names it; "
            f"{len(missing)} of {len(paths)} recordings are missing"
        )


def _find_tables(data: Path) -> list[tuple[Path, Layout]]:
    """List the tables in ``data`` with their layouts, the one whose rows count first in front."""
    if not data.is_dir():
        what = "is not a folder" if data.exists() else "no such folder"
        raise FileNotFoundError(f"{data}: {what}; expected {LAYOUT}")
    tables = [data / name for name in ("train.csv", "train_metadata.csv", "train_mod.csv")]
    tables = [table for table in tables if table.is_file()][:1]
    if not tables:
        tables = _different(data.glob(f"{RESAMPLED_FOLDER}*/train_mod.csv"))
    tables += _different(
        [
            data / "train_extended.csv",
            *data.glob(f"{EXTENDED_FOLDER}*/train_extended.csv"),
        ]
    )
    if not tables:
        raise FileNotFoundError(f"{data}: holds no table of recordings; expected {LAYOUT}")
    return [(table, _layout_of(table)) for table in tables]


def _different(tables: Iterable[Path]) -> list[Path]:
    """Leave out copies: each part of a data set comes with the table of the whole."""
    contents = {table.read_bytes(): table for table in sorted(tables) if table.is_file()}
    return sorted(contents.values())


def _layout_of(table: Path) -> Layout:
    header = _read_header(table)
    if "resampled_filename" in header:
        return Layout(_resampled_folders, audio_filename="resampled_filename")
    if "ebird_code" in header or "sci_name" in header or "primary_label" not in header:
        extended = table.name == "train_extended.csv"
        return Layout(_extended_folders if extended else lambda code: ["train_audio"])
    recordist = "recordist" if "recordist" in header else "author"
    return Layout(
        lambda code: ["train_audio", "train_short_audio"],
        ebird_code="primary_label",
        label=None,
        recordist=recordist,
        optional=("sampling_rate", "rating", "duration"),
    )


def _resampled_folders(code: str) -> list[str]:
    own = [part for part, letters in RESAMPLED_LETTERS.items() if code[0].lower() in letters]
    parts = [f"{RESAMPLED_FOLDER}{part}" for part in [*own, *RESAMPLED_LETTERS]]
    return [*dict.fromkeys(parts), "train_audio", "."]


def _extended_folders(code: str) -> list[str]:
    letters = "a-m" if code[0].lower() <= "m" else "n-z"
    part = EXTENDED_FOLDER + letters
    return [
        f"{part}/{letters.upper()}",
        letters.upper(),
        "train_extended",
        "train_audio",
    ]


def _read_table(
    data: Path, table: Path, layout: Layout
) -> Iterator[tuple[str, dict[str, object], str]]:
    """Yield filename, record and the primary label's name for each line of a table."""
    first_lines: dict[str, int] = {}
    folder_of = cache(lambda code: _folder_of(data, layout, code))
    for row in _read_rows(table, layout):
        record = _read_record(row, layout)
        filename = str(record["filename"])
        if filename in first_lines:
            row.fail(layout.filename, f"is in line {first_lines[filename]} already")
        first_lines[filename] = row.line
        code, name = str(record["ebird_code"]), _read_path(row, layout.audio_filename)
        record["folder"] = folder_of(code)
        name = name if len(name.parts) > 1 else code / name
        record["path"] = str(PurePosixPath(record["folder"]) / name)
        yield filename, record, row.values[layout.label] if layout.label else code
    if not first_lines:
        raise ValueError(f"{table}: has a header, but no recordings")


def _folder_of(data: Path, layout: Layout, code: str) -> str:
    folders = layout.folders(code)
    return next((folder for folder in folders if (data / folder / code).is_dir()), folders[0])


def _read_record(row: Row, layout: Layout) -> dict[str, object]:
    return {
        "filename": str(_read_path(row, layout.filename)),
        "ebird_code": _read_code(row, layout.ebird_code),
        "secondary_codes": _read_labels(row, layout.secondary_labels),
        "recordist": row.values[layout.recordist].strip(),
        "rating": _read_number(row, "rating", 0, 5),
        "duration": _read_number(row, "duration", 0, 1e6),
        "sample_rate": _read_rate(row),
        "row": row,
    }


def _read_path(row: Row, column: str) -> PurePosixPath:
    value = row.values[column]
    path = PurePosixPath(value)
    if not path.name or "\0" in value:
        row.fail(column, "is no file name")
    if path.is_absolute() or ".." in path.parts:
        row.fail(
            column,
            "leaves the data folder; file names are relative to it and without ..",
        )
    return path


def _read_code(row: Row, column: str) -> str:
    code = row.values[column]
    if not EBIRD_CODE.fullmatch(code):
        row.fail(column, "is no eBird code; expected letters and digits, such as aldfly")
    if code == "nocall":
        row.fail(column, "is no species: it is the answer for segments without birds")
    return code


def _read_number(row: Row, column: str, lowest: float, highest: float) -> float:
    text = row.values.get(column, "").strip()
    try:
        number = float(text or 0)
    except ValueError:
        number = float("nan")
    if not lowest <= number <= highest:
        row.fail(column, f"is no number from {lowest:g} to {highest:g}")
    return number


def _read_rate(row: Row) -> int:
    """Read "48000 (Hz)"."""
    text = row.values.get("sampling_rate", "").strip()
    match = re.fullmatch(r"([0-9]{1,9})(?:\.0)?(?: *\(?Hz\)?)?", text)
    if text and not match:
        row.fail("sampling_rate", 'is no sampling rate; expected one such as "48000 (Hz)"')
    return int(match[1]) if match else 0


def _read_labels(row: Row, column: str) -> tuple[str, ...]:
    labels = _parse_labels(row.values[column].strip())
    if labels is None:
        row.fail(
            column,
            "is no list of labels; expected one such as ['Sayornis saya_Say's Phoebe']",
        )
    return labels


@lru_cache(maxsize=4096)
def _parse_labels(text: str) -> tuple[str, ...] | None:
    """Parse a Python list of strings without running it; None where it is something else."""
    try:
        labels = ast.literal_eval(text or "[]")
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(labels, (list, tuple)) or not all(isinstance(item, str) for item in labels):
        return None
    return tuple(label for label in labels if label.strip())


def _map_labels(
    recordings: pd.DataFrame, labels: Counter[tuple[str, str]]
) -> list[tuple[str, ...]]:
    """Turn the names of secondary labels into codes among the classes; others are left out.

    The tables of the competition and of its extension do not agree on every scientific name, so
    names are looked up in the labels of both, whole and by either half, and then in the taxonomy.
    """
    classes = set(recordings["ebird_code"])
    known: dict[str, str] = {}
    for (label, code), _ in sorted(labels.items(), key=lambda item: (item[1], item[0])):
        scientific, _, common = label.partition("_")
        known |= {name: code for name in (scientific, common, label) if name}
    known |= {code: code for code in classes}

    @cache
    def code_of(label: str) -> str | None:
        scientific, _, common = label.partition("_")
        species = find_species(label)
        code = known.get(label) or known.get(scientific) or known.get(common)
        return code or (species.ebird_code if species else None)

    def codes_of(names: tuple[str, ...], primary: str) -> tuple[str, ...]:
        codes = dict.fromkeys(code_of(name) for name in names)
        return tuple(code for code in codes if code in classes and code != primary)

    pairs = zip(recordings["secondary_codes"], recordings["ebird_code"], strict=True)
    return [codes_of(names, primary) for names, primary in pairs]


def _check_links(data: Path, recordings: pd.DataFrame) -> None:
    """Refuse a recording that a symbolic link puts outside the data folder.

    The layout's own folders (train_audio) may be links, as users do with large disks; nothing that
    a table names may.
    """
    rows: dict[tuple[str, PurePosixPath], dict[str, Row]] = {}
    columns = zip(recordings["folder"], recordings["path"], recordings["row"], strict=True)
    for folder, name, row in columns:
        path = PurePosixPath(name).relative_to(folder)
        rows.setdefault((folder, path.parent), {})[path.name] = row
    for (folder, parent), named in rows.items():
        linked = [name for name, link in _entries(data / folder / parent).items() if link]
        suspects = {str(parent): next(iter(named.values()))}
        suspects |= {str(parent / name): named[name] for name in linked if name in named}
        for name, row in suspects.items():
            try:
                inside(data / folder, name)
            except OSError:  # a loop of links leads nowhere; the audit will say so
                continue
            except ValueError as error:
                raise ValueError(f"{row.csv}, line {row.line}: {error}") from error


def _entries(folder: Path) -> dict[str, bool]:
    """Say for each name in a folder whether it is a symbolic link; empty where there is none."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except (OSError, ValueError):
        return {}


def _read_header(table: Path) -> list[str]:
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(csv.reader(file), [])


def _read_rows(table: Path, layout: Layout) -> Iterator[Row]:
    lines = read_table(table, layout.columns)
    used = [name for name in (*layout.columns, *layout.optional) if name in lines]
    for line, *values in lines[used].itertuples():
        yield Row(table, line, dict(zip(used, values, strict=True)))
