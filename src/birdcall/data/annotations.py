"""Read what people have labelled in soundscapes: published tables, Raven, Audacity and CSV."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from birdcall.audio.reading import AudioError, probe_audio
from birdcall.config import NOCALL, SEGMENT_SECONDS
from birdcall.data.targets import describe_counts
from birdcall.inference.tables import LABEL_COLUMNS, read_labels_beside
from birdcall.inference.windows import count_segments
from birdcall.kaggle.test_set import find_audio, list_audio
from birdcall.storage.files import (
    conversion_advice,
    find_files,
    inside,
    is_sound,
    letters_of,
    path_below,
    read_loose_table,
    shorten_list,
)
from birdcall.taxonomy import UNKNOWN_BIRD, is_unknown_bird, match_code

logger = logging.getLogger(__name__)

_MAX_EXCESS = 0.25  # seconds; a label that ends so little after its recording needs no warning
# The names under which collections are published, and the folder of their recordings.
PUBLISHED = {
    "annotations.csv": "soundscape_data",  # Cornell Lab of Ornithology, on Zenodo
    "train_soundscape_labels.csv": "train_soundscapes",  # BirdCLEF 2021
    "train_soundscapes_labels.csv": "train_soundscapes",  # BirdCLEF+ 2026
}
_OF_MODELS = re.compile(r"(?!.*selections\.csv$).*(birdnet|detections|pseudo_labels)", re.I)
_CLOCK_TIME = re.compile(r"(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)")
# Columns, found by their letters (`letters_of`), the first that is there.
_FILES = ("Filename", "File", "Recording", "Begin File")
_ONSETS = ("Start Time (s)", "Begin Time (s)", "Start (s)", "onset")
_OFFSETS = ("End Time (s)", "End (s)", "offset")
_COLUMNS = ["name", "onset", "offset", "label"]


@dataclass(frozen=True, eq=False)
class AnnotatedSoundscape:
    """What people have labelled in a recording.

    events: ``onset``, ``offset`` (seconds), ``ebird_code``, one that was asked for or UNKNOWN_BIRD.
    labelled: which segments have labels, if only that there is no bird, boolean, ``(segments,)``.
    has_times: else events are as long as their rows. foreign: counts of labels that are no code.
    """

    path: Path
    seconds: float
    events: pd.DataFrame
    labelled: np.ndarray
    has_times: bool
    foreign: Counter[str]


class _Labels(NamedTuple):
    """The labels of a table, or of one recording in it."""

    source: str  # for messages
    table: pd.DataFrame  # with _COLUMNS; the index is the line
    has_times: bool
    is_of_one: bool = False  # of the recording that the table is named after


def read_annotated_soundscapes(
    folder: Path, codes: Sequence[str], label_column: str | None = None
) -> list[AnnotatedSoundscape]:
    """Return the recordings below ``folder`` that tables label, by path.

    The tables are CSV files of one recording or of many (docs/evaluation.md lists the formats), and
    Raven and Audacity tables beside recordings; a published CSV may lie one folder above. A table
    with times labels its recordings from start to end. Labels become ``codes`` as by `match_code`.

    What has no labels, no recording, or is no code is left out and named in the log. Raises
    FileNotFoundError where ``folder`` is none or has no labels, and ValueError with file and line
    for an impossible row, a name that leaves the folder, and a recording with labels in two tables.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of labelled soundscapes")
    files = find_files(folder)
    sound = list(filter(is_sound, files))
    by_path: dict[Path, _Labels] = {}
    beside = read_labels_beside(sound, codes, label_column, is_strict=True)
    for path, events in beside.items():
        rows = [(path.name, event.onset, event.offset, event.ebird_code) for event in events]
        by_path[path] = _Labels("tables beside it", pd.DataFrame(rows, columns=_COLUMNS), True)
    _read_csv_tables(by_path, files, label_column)
    if not by_path:
        above = (folder.resolve().parent / name for name in PUBLISHED)
        _read_csv_tables(by_path, filter(Path.is_file, above), label_column, folder)
    if not by_path:
        raise FileNotFoundError(
            f"{folder}: neither example_test_audio_summary.csv nor a recording with a Raven "
            "selection table, an Audacity label track or a row in a CSV of labels"
        )
    if unlabelled := [path for path in sound if path not in by_path]:
        message = "%s: %d recordings have no labels and are left out: %s"
        logger.warning(message, folder, len(unlabelled), shorten_list(unlabelled))
    code_of = {
        text: UNKNOWN_BIRD if is_unknown_bird(text) else match_code(text, codes)
        for text in {text for labels in by_path.values() for text in labels.table["label"]}
    }
    items = (_annotate(path, by_path[path], code_of) for path in sorted(by_path))
    annotated = [item for item in items if item is not None]
    if foreign := sum((item.foreign for item in annotated), Counter[str]()):
        logger.warning("%s: labels of no species: %s", folder, describe_counts(foreign))
    return annotated


def _annotate(
    path: Path, labels: _Labels, code_of: Mapping[str, str | None]
) -> AnnotatedSoundscape | None:
    """Return the labels of a recording that lie in it; None, with a warning, if it has no sound."""
    try:
        seconds = probe_audio(path).seconds
    except (AudioError, OSError) as error:
        advice = conversion_advice(path)
        logger.warning("%s; this soundscape is left out%s", error, advice and f"; {advice}")
        return None
    n_segments = count_segments(round(seconds * 1000), 1000)
    table = labels.table[labels.table["label"] != NOCALL]
    code = table["label"].map(code_of)
    foreign = Counter(table.loc[code.isna(), "label"])
    events = table[["onset", "offset"]].assign(ebird_code=code)[code.notna()]
    labelled = np.full(n_segments, labels.has_times)
    if labels.has_times:
        is_late = (events["onset"] >= seconds) | (events["offset"] > seconds + _MAX_EXCESS)
        times = [f"{onset:g} to {offset:g} s" for onset, offset, _ in events[is_late].to_numpy()]
        if times:
            message = "%s: labels beyond the end of the recording (%g s) are cut or left out: %s"
            logger.warning(message, path, seconds, shorten_list(times))
        if len(events) and (events["onset"] >= seconds).all():
            logger.warning("%s is left out: all labels begin after it; are they seconds?", path)
            return None
    else:
        rows = (labels.table["onset"] // SEGMENT_SECONDS).astype(int).unique()
        if n_beyond := int((rows >= n_segments).sum()):
            logger.warning("%s: %d labelled rows lie beyond its end; left out", path, n_beyond)
        labelled[rows[rows < n_segments]] = True
    events = events[events["onset"] < seconds].reset_index(drop=True)
    events["offset"] = events["offset"].clip(upper=seconds)
    return AnnotatedSoundscape(
        path, seconds, events, labelled=labelled, has_times=labels.has_times, foreign=foreign
    )


# --- CSV tables -----------------------------------------------------------------------------------


def _read_csv_tables(
    by_path: dict[Path, _Labels],
    tables: Iterable[Path],
    label_column: str | None,
    audio: Path | None = None,
) -> None:
    """Add the labels in CSV ``tables`` of recordings in ``audio``; None: beside the table."""
    for path in (path for path in tables if path.suffix.lower() == ".csv"):
        read = _find_format(path)
        if read is None:
            logger.info("%s: no table of labels; left out", path)
            continue
        if _OF_MODELS.match(path.name):
            message = "%s: results of a model are left out; name what a person has checked %s"
            logger.warning(message, path, "selections.csv")
            continue
        labels = read(path, label_column)
        published = path.parent / PUBLISHED.get(path.name, "")
        beside = sorted(item for item in path.parent.iterdir() if item.is_dir())
        folders = [audio] if audio else [path.parent, published, *beside]
        found = list(_find_recordings(path, labels, folders))
        logger.info("%s: labels of %d recordings", path, len(found))
        for recording, rows in found:
            if recording in by_path:
                raise ValueError(
                    f"{path}: {recording} has labels in {by_path[recording].source} too; remove one"
                )
            by_path[recording] = _Labels(str(path), rows, labels.has_times)


def _find_recordings(
    path: Path, labels: _Labels, folders: Sequence[Path]
) -> Iterator[tuple[Path, pd.DataFrame]]:
    """Yield each recording of a table with its rows; those that are not there are logged."""
    listed = [(folder, list_audio(folder)) for folder in dict.fromkeys(folders)]
    groups = list(labels.table.groupby("name", sort=False))
    if labels.is_of_one:
        name = path.stem
        while not find_audio(path.parent, name, listed[0][1]) and "." in name:
            name = name.rpartition(".")[0]
        groups = [(name, labels.table)]
    lost, names = Counter[str](), dict[Path, str]()
    for name, rows in groups:
        try:
            recording = _find_recording(str(name), listed)
        except ValueError as error:
            raise ValueError(f"{path}, line {rows.index.min()}: {error}") from error
        if recording is None:
            lost[str(name)] = len(rows)
        elif recording in names:
            raise ValueError(f"{path}: {names[recording]!r} and {name!r} are both {recording}")
        else:
            names[recording] = str(name)
            yield recording, rows
    if lost:
        message = "%s: no recording of %d names, their %d rows are left out: %s"
        logger.warning(message, path, len(lost), lost.total(), shorten_list(list(lost)))


def _find_recording(
    name: str, listed: Sequence[tuple[Path, Mapping[str, Sequence[str]]]]
) -> Path | None:
    """Return the recording that a table calls ``name``; its suffix may be another.

    ``7019_COR``, of BirdCLEF 2021, is the file ``7019_COR_20190904.ogg``.
    """
    dated = re.compile(re.escape(name) + r"_\d{8}")
    if "/" in name and (path := inside(listed[0][0], name)).is_file():  # of `path_below`
        return path
    for folder, names in listed:
        if path := find_audio(folder, name if name in names else Path(name).stem, names):
            return path
        files = {file for beginning in filter(dated.fullmatch, names) for file in names[beginning]}
        if len(files) > 1:
            raise ValueError(f"{name!r} is {' and '.join(sorted(files))} in {folder}; keep one")
        if files:
            return inside(folder, files.pop())
    return None


def _find_format(path: Path) -> Callable[[Path, str | None], _Labels] | None:
    """Return the reader of a CSV by its header, or by its published name; None: no labels."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = set(map(letters_of, next(csv.reader(file), [])))
    if path.name == "train_soundscape_labels.csv" or {"audioid", "seconds", "birds"} <= header:
        return _read_rows_2021
    if path.name == "train_soundscapes_labels.csv" or {"start", "end", "primarylabel"} <= header:
        return _read_rows_2026
    has_times = all(header & set(map(letters_of, names)) for names in (_ONSETS, _OFFSETS))
    return _read_times if has_times or path.name == "annotations.csv" else None


def _read_times(path: Path, label_column: str | None) -> _Labels:
    """Read labels with times: the Cornell Lab's, BirdNET-Analyzer's, and those of `predict`."""
    table = read_loose_table(path)
    onset = _numbers(path, _column(path, table, _ONSETS))
    end = _column(path, table, _OFFSETS)
    offset = _numbers(path, end)
    _require(path, end, offset >= onset, "it ends before it begins")
    wanted = (label_column,) if label_column else LABEL_COLUMNS
    label = _column(path, table, wanted)
    for name in filter(set(table).__contains__, map(letters_of, wanted)):
        label = label.where(label != "", table[name])
    is_of_one = path.name not in PUBLISHED and not set(map(letters_of, _FILES)) & set(table)
    file: pd.Series | str = ""
    if not is_of_one:
        file = _column(path, table, _FILES)
        _require(path, file, file != "", "it must not be empty")
        if letters_of(file.name) != "filename":  # BirdNET-Analyzer and `predict` write paths
            file = file.map({name: path_below(path.parent, name) for name in file.unique()})
    labels = pd.DataFrame({"name": file, "onset": onset, "offset": offset, "label": label})
    return _Labels(str(path), _drop_duplicates(path, labels), True, is_of_one)


def _read_rows_2021(path: Path, _: str | None) -> _Labels:
    table = read_loose_table(path)
    audio_id, site, seconds, birds = (
        _column(path, table, [name]) for name in ("audio_id", "site", "seconds", "birds")
    )
    end = _numbers(path, seconds)
    _require(path, seconds, (end > 0) & (end % SEGMENT_SECONDS == 0), "it ends no row of 5 s")
    whole = audio_id + "_" + site
    row_id = _column(path, table, ["row_id"])
    expected = whole + "_" + end.map("{:.0f}".format)
    _require(path, row_id, row_id == expected, "it is not <audio_id>_<site>_<seconds> of its row")
    return _rows(path, whole, end, birds, separator=" ")


def _read_rows_2026(path: Path, _: str | None) -> _Labels:
    table = read_loose_table(path)
    name, start, end, label = (
        _column(path, table, [name]) for name in ("filename", "start", "end", "primary_label")
    )
    _require(path, name, name != "", "it must not be empty")
    begins, ends = _clock_seconds(path, start), _clock_seconds(path, end)
    _require(path, start, begins % SEGMENT_SECONDS == 0, "it begins no row of 5 s")
    _require(path, end, ends - begins == SEGMENT_SECONDS, f"it is not {SEGMENT_SECONDS} s later")
    return _rows(path, name, ends, label, separator=";")


def _rows(
    path: Path, name: pd.Series, end: pd.Series, birds: pd.Series, *, separator: str
) -> _Labels:
    """Return a label per bird and row; a row without birds has the label NOCALL."""
    labels = pd.DataFrame({"name": name, "onset": end - SEGMENT_SECONDS, "offset": end})
    labels = labels.assign(label=birds.str.split(separator)).explode("label")
    labels["label"] = labels["label"].str.strip().replace("", NOCALL)
    is_nocall = birds.str.contains(NOCALL, regex=False)
    _require(path, birds, ~is_nocall | (birds == NOCALL), f"it is {NOCALL} and birds at once")
    return _Labels(str(path), _drop_duplicates(path, labels), False)


def _drop_duplicates(path: Path, labels: pd.DataFrame) -> pd.DataFrame:
    again = labels.duplicated()
    if again.any():
        message = "%s: %d labels are there twice and count once, such as that of line %d"
        logger.warning(message, path, again.sum(), labels.index[again][0])
    return labels[~again]


def _column(path: Path, table: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    """Return the first of the columns ``names`` that a table has; ValueError if it has none."""
    header = table.attrs["header"]
    for name in map(letters_of, names):
        if name in table:
            return table[name].rename(header[name])
    raise ValueError(f"{path}: no column {' or '.join(names)}; it has {', '.join(header.values())}")


def _require(path: Path, cells: pd.Series, is_valid: pd.Series, why: str) -> None:
    """Raise ValueError for the first cell of a column that is not valid."""
    if not is_valid.all():
        line = is_valid.index[~is_valid.to_numpy(bool)][0]
        raise ValueError(f"{path}, line {line}: {cells.name} is {cells[line]!r}; {why}")


def _numbers(path: Path, cells: pd.Series) -> pd.Series:
    numbers = pd.to_numeric(cells, errors="coerce").astype(float)
    is_valid = np.isfinite(numbers) & (numbers >= 0)
    _require(path, cells, is_valid, "give seconds from the start of the recording, such as 12.5")
    return numbers


def _clock_seconds(path: Path, cells: pd.Series) -> pd.Series:
    parts = cells.str.extract(f"^{_CLOCK_TIME.pattern}$").astype(float)
    _require(path, cells, parts.notna().all(axis=1), "give a time such as 00:00:05")
    return parts @ np.array([3600.0, 60.0, 1.0])
