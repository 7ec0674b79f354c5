"""Read a data set's table of labelled recordings, in any of the published layouts, and check it."""

from __future__ import annotations

import ast
import csv
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

import pandas as pd

from birdcall.storage.files import inside, read_table
from birdcall.taxonomy import match_code

logger = logging.getLogger(__name__)

_EXPECTED = (
    "train.csv with train_audio/<ebird_code>/XC*.mp3 (Kaggle: birdsong-recognition), "
    "birdsong-resampled-train-audio-00..04 with train_mod.csv, "
    "or train_metadata.csv with train_audio/ (BirdCLEF 2021 and later)"
)
# The folders of the resampled data set, by the first letter of the ebird_code.
_RESAMPLED_LETTERS = {
    "00": "ab",
    "01": "cdef",
    "02": "ghijklm",
    "03": "nopqr",
    "04": "stuvwxyz",
}
_RESAMPLED_FOLDER = "birdsong-resampled-train-audio-"
_EXTENDED_FOLDER = "xeno-canto-bird-recordings-extended-"
_EBIRD_CODE = re.compile(r"\w[\w.+-]{0,63}")
_SAMPLE_RATE = re.compile(r"([0-9]{1,9})(?:\.0)?(?: *\(?Hz\)?)?")  # 48000 (Hz)


@dataclass(frozen=True)
class _Layout:
    """Which columns of a table have which meaning, and in which folders its files may lie."""

    folders: Callable[[str], list[str]]  # of an ebird_code; the first that has its folder counts
    filename: str = "filename"
    audio_filename: str = "filename"
    ebird_code: str = "ebird_code"
    label: str | None = "primary_label"  # ``Scientific_Common`` names; None: the codes are labels
    secondary_labels: str = "secondary_labels"
    recordist: str = "recordist"
    optional: tuple[str, ...] = ("sampling_rate",)


class _Row(NamedTuple):
    """One line of a table, with what an error message needs."""

    csv: Path
    line: int
    values: dict[str, str]

    def fail(self, column: str, reason: str) -> NoReturn:
        value = self.values.get(column, "")
        shown = repr(value if len(value) <= 80 else value[:77] + "...")
        raise ValueError(f"{self.csv}, line {self.line}, column {column}: {shown} {reason}")

    def read_path(self, column: str) -> PurePosixPath:
        value = self.values[column]
        path = PurePosixPath(value)
        if not path.name or "\0" in value:
            self.fail(column, "is no file name")
        if path.is_absolute() or ".." in path.parts:
            reason = "leaves the data folder; file names are relative to it and without .."
            self.fail(column, reason)
        return path

    def read_number(self, column: str, lowest: float, highest: float) -> float:
        text = self.values.get(column, "").strip()
        try:
            number = float(text or 0)
        except ValueError:
            number = float("nan")
        if not lowest <= number <= highest:
            self.fail(column, f"is no number from {lowest:g} to {highest:g}")
        return number


def read_recordings(data: Path) -> pd.DataFrame:
    """Read one row per training recording, in the order of the tables.

    Columns: filename (verbatim), ebird_code, label (of the table: ``Scientific_Common``, or the
    code), secondary_codes (tuple of codes among the classes, without the primary one), recordist
    ("" where unknown), rating (0 to 5, 0: none given), duration (seconds by the metadata; 0:
    unknown or less than one), sample_rate (Hz, 0: unknown) and path (relative to ``data``, posix).
    Raises FileNotFoundError for a folder in no known layout and ValueError naming file, line and
    column for what cannot be read.
    """
    records: dict[str, dict[str, object]] = {}
    labels: Counter[tuple[str, str]] = Counter()
    for table, layout in _find_tables(data):
        for filename, record, label in _read_table(data, table, layout):
            labels[label, str(record["ebird_code"])] += 1
            if filename in records:
                logger.warning("%s: %s is in an earlier table too, which counts", table, filename)
            records.setdefault(filename, record | {"label": label})
    recordings = pd.DataFrame.from_records(list(records.values()))
    recordings["secondary_codes"] = _map_labels(recordings, labels)
    _check_links(data, recordings)
    n_species = recordings["ebird_code"].nunique()
    logger.info("%s: %d recordings of %d species", data, len(recordings), n_species)
    return recordings.drop(columns=["row", "folder"])


def classes_of(recordings: pd.DataFrame) -> tuple[str, ...]:
    """Return the data set's classes: its ebird_codes, sorted."""
    return tuple(sorted(set(recordings["ebird_code"])))


def check_recordings_exist(recordings: pd.DataFrame, data: Path) -> None:
    """Raise FileNotFoundError naming the first missing recording and the number of them."""
    paths = [PurePosixPath(path) for path in recordings["path"]]
    present = {parent: set(_entries(data / parent)) for parent in {path.parent for path in paths}}
    missing = [path for path in paths if path.name not in present[path.parent]]
    if missing:
        raise FileNotFoundError(
            f"{data / missing[0]}: no such file, though the table of recordings names it; "
            f"{len(missing)} of {len(paths)} recordings are missing"
        )


def _find_tables(data: Path) -> list[tuple[Path, _Layout]]:
    """List the tables in ``data`` with their layouts; rows of earlier tables take precedence."""
    if not data.is_dir():
        problem = "is not a folder" if data.exists() else "no such folder"
        raise FileNotFoundError(f"{data}: {problem}; expected {_EXPECTED}")
    tables = [data / name for name in ("train.csv", "train_metadata.csv", "train_mod.csv")]
    tables = [table for table in tables if table.is_file()][:1]
    if not tables:
        tables = _without_copies(data.glob(f"{_RESAMPLED_FOLDER}*/train_mod.csv"))
    extended = data.glob(f"{_EXTENDED_FOLDER}*/train_extended.csv")
    tables += _without_copies([data / "train_extended.csv", *extended])
    if not tables:
        raise FileNotFoundError(f"{data}: contains no table of recordings; expected {_EXPECTED}")
    return [(table, _layout_of(table)) for table in tables]


def _without_copies(tables: Iterable[Path]) -> list[Path]:
    """Leave out copies: each part of a data set comes with the table of the whole."""
    contents = {table.read_bytes(): table for table in sorted(tables) if table.is_file()}
    return sorted(contents.values())


def _layout_of(table: Path) -> _Layout:
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next(csv.reader(file), [])
    if "resampled_filename" in header:
        return _Layout(_resampled_folders, audio_filename="resampled_filename")
    if "ebird_code" in header or "sci_name" in header or "primary_label" not in header:
        is_extended = table.name == "train_extended.csv"
        return _Layout(_extended_folders if is_extended else lambda code: ["train_audio"])
    return _Layout(
        lambda code: ["train_audio", "train_short_audio"],
        ebird_code="primary_label",
        label=None,
        recordist="recordist" if "recordist" in header else "author",
        optional=("sampling_rate", "rating", "duration"),
    )


def _resampled_folders(code: str) -> list[str]:
    first = [part for part, letters in _RESAMPLED_LETTERS.items() if code[0].lower() in letters]
    folders = [f"{_RESAMPLED_FOLDER}{part}" for part in [*first, *_RESAMPLED_LETTERS]]
    return [*dict.fromkeys(folders), "train_audio", "."]


def _extended_folders(code: str) -> list[str]:
    letters = "a-m" if code[0].lower() <= "m" else "n-z"
    folder = f"{_EXTENDED_FOLDER}{letters}/{letters.upper()}"
    return [folder, letters.upper(), "train_extended", "train_audio"]


def _read_table(
    data: Path, table: Path, layout: _Layout
) -> Iterator[tuple[str, dict[str, object], str]]:
    """Yield filename, record and the primary label's name for each line of a table."""
    first_lines: dict[str, int] = {}
    folder_of: dict[str, str] = {}
    needed = dict.fromkeys(
        [
            *(layout.filename, layout.audio_filename, layout.ebird_code),
            *(layout.label or "filename", layout.secondary_labels, layout.recordist),
            *("rating", "duration"),
        ]
    )
    columns = [name for name in needed if name not in layout.optional]
    lines = read_table(table, columns)
    used = [name for name in (*columns, *layout.optional) if name in lines]
    for line, *values in lines[used].itertuples():
        row = _Row(table, line, dict(zip(used, values, strict=True)))
        record = _read_record(row, layout)
        filename, code = str(record["filename"]), str(record["ebird_code"])
        if filename in first_lines:
            row.fail(layout.filename, f"is in line {first_lines[filename]} already")
        first_lines[filename] = line
        name = row.read_path(layout.audio_filename)
        if code not in folder_of:
            folders = layout.folders(code)
            present = (folder for folder in folders if (data / folder / code).is_dir())
            folder_of[code] = next(present, folders[0])
        record["folder"] = folder_of[code]
        name = name if len(name.parts) > 1 else code / name
        record["path"] = str(PurePosixPath(record["folder"]) / name)
        yield filename, record, row.values[layout.label] if layout.label else code
    if not first_lines:
        raise ValueError(f"{table}: has a header, but no recordings")


def _read_record(row: _Row, layout: _Layout) -> dict[str, object]:
    filename = str(row.read_path(layout.filename))
    code = row.values[layout.ebird_code]
    if not _EBIRD_CODE.fullmatch(code):
        reason = "is no eBird code; expected letters and digits, such as aldfly"
        row.fail(layout.ebird_code, reason)
    if code == "nocall":
        row.fail(layout.ebird_code, "is no species: it stands for segments without birds")
    labels = _parse_labels(row.values[layout.secondary_labels].strip())
    if labels is None:
        reason = "is no list of labels; expected one such as ['Sayornis saya_Say's Phoebe']"
        row.fail(layout.secondary_labels, reason)
    rating, duration = row.read_number("rating", 0, 5), row.read_number("duration", 0, 1e6)
    rate_text = row.values.get("sampling_rate", "").strip()
    rate = _SAMPLE_RATE.fullmatch(rate_text)
    if rate_text and not rate:
        row.fail("sampling_rate", 'is no sampling rate; expected one such as "48000 (Hz)"')
    return {
        "filename": filename,
        "ebird_code": code,
        "secondary_codes": labels,
        "recordist": row.values[layout.recordist].strip(),
        "rating": rating,
        "duration": duration,
        "sample_rate": int(rate[1]) if rate else 0,
        "row": row,
    }


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
    """Turn the names of secondary labels into codes among the classes; leave the others out.

    The tables of the competition and of its extension do not agree on every scientific name, so
    names are looked up in the labels of both, whole and by either half, and then in the taxonomy.
    """
    classes = set(recordings["ebird_code"])
    known: dict[str, str] = {}
    for (label, code), _ in sorted(labels.items(), key=lambda item: (item[1], item[0])):
        scientific, _, common = label.partition("_")
        known |= {name: code for name in (scientific, common, label) if name}
    known |= {code: code for code in classes}

    code_of: dict[str, str | None] = {}
    for label in {name for names in recordings["secondary_codes"] for name in names}:
        scientific, _, common = label.partition("_")
        code = known.get(label) or known.get(scientific) or known.get(common)
        code_of[label] = code or match_code(label, classes)
    rows = []
    for names, primary in zip(recordings["secondary_codes"], recordings["ebird_code"], strict=True):
        codes = dict.fromkeys(code_of[name] for name in names)
        rows.append(tuple(code for code in codes if code in classes and code != primary))
    return rows


def _check_links(data: Path, recordings: pd.DataFrame) -> None:
    """Refuse a recording that a symbolic link puts outside the data folder.

    The layout's folders (train_audio) may be links, as users with large disks have them; nothing
    that a table names may.
    """
    rows: dict[tuple[str, PurePosixPath], dict[str, _Row]] = {}
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
            except OSError:  # a circle of links; the audit reports the file as unreadable
                continue
            except ValueError as error:
                raise ValueError(f"{row.csv}, line {row.line}: {error}") from error


def _entries(folder: Path) -> dict[str, bool]:
    """Return for each name in a folder whether it is a symbolic link; empty without the folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except (OSError, ValueError):
        return {}


# --- what the audit says of them ---


def usable_recordings(recordings: pd.DataFrame, audit: pd.DataFrame) -> pd.DataFrame:
    """Leave out the recordings that are not usable; add ``seconds``, the true length, and sha256.

    Raises ValueError for a recording that the audit does not contain, or more than once.
    """
    again = audit.loc[audit["path"].duplicated(), "path"]
    if len(again):
        raise ValueError(f"the audit has {again.iloc[0]} twice; run `birdcall audit` again")
    verdicts = audit.set_index("path").reindex(recordings["path"])
    unknown = recordings.loc[verdicts["seconds"].isna().to_numpy(), "path"]
    if len(unknown):
        raise ValueError(
            f"the audit does not know {unknown.iloc[0]} and {len(unknown) - 1} other recordings; "
            "run `birdcall audit` again"
        )
    recordings = recordings.assign(**verdicts[["seconds", "sha256"]].to_dict("list"))
    return recordings[verdicts["usable"].to_numpy(dtype=bool)].reset_index(drop=True)


def audio_hashes(recordings: pd.DataFrame, audit: pd.DataFrame) -> list[str]:
    """Return the hash of the decoded audio of each recording, for `make_folds`."""
    return list(recordings["path"].map(audit.set_index("path")["audio_hash"]).fillna(""))
