"""Read and write the competition's tables: test rows, labels, submissions; find the recordings."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
import pandas as pd

from birdcall.config import NOCALL, SEGMENT_SECONDS
from birdcall.storage.files import (
    SOUND_SUFFIXES,
    inside,
    is_sound,
    read_table,
    shorten_list,
    write_atomically,
)
from birdcall.taxonomy import match_code

COMPETITION = "birdsong-recognition"  # its name in addresses and mounts
_FILE_SITE = "site_3"  # its recordings are labelled as a whole: rows without seconds

_SUBMISSION_COLUMNS = ["row_id", "birds"]

logger = logging.getLogger(__name__)


class CompetitionFile(StrEnum):
    """The files and folders of soundscapes in the data folder of the competition."""

    TEST_ROWS = "test.csv"
    TEST_AUDIO = "test_audio"  # on Kaggle only on the rerun that is scored
    EXAMPLE_AUDIO = "example_test_audio"
    EXAMPLE_LABELS = "example_test_audio_summary.csv"
    EXAMPLE_ANNOTATIONS = "example_test_audio_metadata.csv"
    SOLUTION = "solution.csv"  # only synthetic data has it


# --- which rows to predict, and from which files ------------------------------------------------


def read_test_rows(data: Path) -> pd.DataFrame:
    """Read ``test.csv``: columns row_id, site, audio_id, seconds, in the order of the file.

    ``seconds`` is the end of the scored segment, or NaN for a row of site_3, scored by file. Other
    columns are dropped. Raises ``ValueError`` with the line of an invalid row.
    """
    path = data / CompetitionFile.TEST_ROWS
    frame = read_table(path, ["row_id", "site", "audio_id", "seconds"])
    _require_keys(path, frame, ["row_id", "audio_id"], distinct="row_id")
    by_file = frame["site"] == _FILE_SITE
    _refuse(
        frame["seconds"],
        path,
        where=by_file & (frame["seconds"] != ""),
        why=f"{_FILE_SITE} has none",
    )
    _refuse(
        frame["seconds"],
        path,
        where=~by_file & (frame["seconds"] == ""),
        why=f"only {_FILE_SITE} is scored by file",
    )
    seconds = pd.Series(np.nan, index=frame.index)
    seconds[~by_file] = _segment_ends(path, frame[~by_file])
    frame = frame[["row_id", "site", "audio_id"]].assign(seconds=seconds)
    return frame.reset_index(drop=True)


def read_example_rows(data: Path) -> pd.DataFrame:
    """Return the labelled example segments in the columns of ``read_test_rows``.

    Their recordings lie in ``CompetitionFile.EXAMPLE_AUDIO``.
    """
    rows = read_labelled_soundscapes(data)
    return rows.assign(site="example", audio_id=rows["filename"])[
        ["row_id", "site", "audio_id", "seconds"]
    ]


def list_audio(folder: Path) -> dict[str, list[str]]:
    """Return the names of the sound files in a folder by each of their beginnings up to a dot."""
    listed: dict[str, list[str]] = {}
    for path in filter(is_sound, folder.iterdir() if folder.is_dir() else ()):
        beginning = path.name
        while beginning:
            listed.setdefault(beginning, []).append(path.name)
            beginning = beginning.rpartition(".")[0]
    return listed


def find_audio(
    folder: Path, name: str, listed: Mapping[str, Sequence[str]] | None = None
) -> Path | None:
    """Return the recording that a CSV calls ``name``, or None where there is none.

    ``name`` may be the file name, or its beginning up to a dot: the example soundscape
    ORANGE-7-CAP_20190606_093000 is the file ``ORANGE-7-CAP_20190606_093000.pt623.mp3``. Of several
    files, that of the first suffix in ``SOUND_SUFFIXES`` is taken, else the one with the shortest
    name. For many names, ``listed`` is what `list_audio` returns. Raises ``ValueError`` if ``name``
    has a path, or is a link that leaves ``folder``.
    """
    if Path(name).name != name or "\\" in name:
        raise ValueError(f"{name!r} is not the name of a recording in {folder}: it has a path")
    inside(folder, name)
    listed = list_audio(folder) if listed is None else listed
    names = sorted(listed.get(name, ()), key=lambda file: (len(file), file))
    direct = [name, *(name + suffix for suffix in SOUND_SUFFIXES)]
    names = [file for file in direct if file in names] + names
    paths = (inside(folder, file) for file in names)
    return next((path for path in paths if path.is_file()), None)


def find_recordings_of(rows: pd.DataFrame, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the recording of each audio_id of ``rows``, and the audio_ids that have none.

    The log names those, and why.
    """
    names = list(dict.fromkeys(rows["audio_id"]))
    if not folder.is_dir():
        logger.warning("%s is not there: every row is nocall", folder.name)
        return {}, names
    paths: dict[str, Path] = {}
    missing = []
    listed = list_audio(folder)
    for name in names:
        try:
            path = find_audio(folder, name, listed)
            reason = f"{folder / name}: no recording of this audio_id"
        except (ValueError, OSError) as error:  # a name that leads out of the folder
            path, reason = None, str(error)
        if path is None:
            logger.warning("%s; its rows are nocall", reason)
            missing.append(name)
        else:
            paths[name] = path
    return paths, missing


# --- labelled soundscapes -------------------------------------------------------------------------


def read_labelled_soundscapes(data: Path, classes: Collection[str] | None = None) -> pd.DataFrame:
    """Read the labelled segments: columns filename, seconds, row_id, birds, foreign_labels.

    ``birds`` is a tuple of ebird codes, empty for nocall. Labels outside ``classes`` (the example
    files have squirrel, unk, ...) are moved to the tuple ``foreign_labels``, counted and logged:
    the competition scores a row with none but these as nocall.
    """
    path = data / CompetitionFile.EXAMPLE_LABELS
    frame = read_table(path, ["filename_seconds", "birds", "filename", "seconds"])
    _require_keys(path, frame, ["filename_seconds", "filename"], distinct="filename_seconds")
    seconds = _segment_ends(path, frame)
    again = pd.DataFrame({"filename": frame["filename"], "seconds": seconds}).duplicated()
    _refuse(
        frame["seconds"], path, where=again, why="an earlier row has this segment of the same file"
    )
    labels = _parse_birds(path, frame)
    texts = {text for row in labels for text in row}
    code_of = {text: text if classes is None else match_code(text, classes) for text in texts}
    known = [tuple(dict.fromkeys(filter(None, map(code_of.get, row)))) for row in labels]
    foreign = [tuple(text for text in row if code_of[text] is None) for row in labels]
    _log_foreign(path, [code for row in foreign for code in row])
    return pd.DataFrame(
        {
            "filename": frame["filename"].to_numpy(),
            "seconds": seconds.to_numpy(),
            "row_id": frame["filename_seconds"].to_numpy(),
            "birds": pd.Series(known, dtype=object),
            "foreign_labels": pd.Series(foreign, dtype=object),
        }
    )


def read_annotations(data: Path, classes: Collection[str] | None = None) -> pd.DataFrame:
    """Read the time-stamped annotations: columns filename, onset, offset (seconds), ebird_code.

    Those outside ``classes`` are dropped, counted and logged. Raises ``ValueError`` with the line
    for an annotation that ends before it begins.
    """
    path = data / CompetitionFile.EXAMPLE_ANNOTATIONS
    frame = read_table(path, ["file_id", "ebird_code", "time_start", "time_end"])
    _require_keys(path, frame, ["file_id", "ebird_code"])
    onset, offset = (_numbers(path, frame, column) for column in ("time_start", "time_end"))
    _refuse(
        frame["time_start"],
        path,
        where=onset < 0,
        why="give seconds from the start of the recording",
    )
    _refuse(
        frame["time_end"], path, where=offset < onset, why="the annotation ends before it begins"
    )
    annotations = pd.DataFrame(
        {
            "filename": frame["file_id"],
            "onset": onset,
            "offset": offset,
            "ebird_code": frame["ebird_code"],
        }
    )
    if classes is not None:
        codes = annotations["ebird_code"].map(lambda text: match_code(text, classes))
        _log_foreign(path, annotations.loc[codes.isna(), "ebird_code"])
        annotations = annotations.assign(ebird_code=codes)[codes.notna()]
    return annotations.reset_index(drop=True)


def read_solution(data: Path) -> pd.DataFrame:
    """Read the truth of the hidden test rows, which only synthetic data has: row_id, birds.

    ``birds`` are label strings, ready for ``row_wise_f1``; an empty cell is read as nocall.
    """
    path = data / CompetitionFile.SOLUTION
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; only Kaggle has the competition's")
    frame = read_table(path, ["row_id", "birds"])
    _require_keys(path, frame, ["row_id"], distinct="row_id")
    labels = [" ".join(birds) or NOCALL for birds in _parse_birds(path, frame)]
    return pd.DataFrame({"row_id": frame["row_id"].to_numpy(), "birds": labels})


# --- the submission -----------------------------------------------------------------------------


def write_submission(path: Path, row_ids: Sequence[str], birds: Sequence[str]) -> None:
    """Write the columns row_id, birds in the order given; ``birds`` are label strings.

    Raises ``ValueError`` for what Kaggle would score wrongly: a row twice, a row without label,
    ``nocall`` beside birds.
    """
    if len(row_ids) != len(birds):
        raise ValueError(f"{path}: {len(row_ids)} row_ids but {len(birds)} predictions")
    _check_submission(path, row_ids, birds)
    table = pd.DataFrame(zip(row_ids, birds, strict=True), columns=_SUBMISSION_COLUMNS)
    write_atomically(path, table.to_csv(index=False, lineterminator="\n"))


def read_submission(path: Path, row_ids: Sequence[str]) -> pd.DataFrame:
    """Read a submission, columns row_id, birds; its rows must be ``row_ids``, in this order."""
    frame = read_table(path, _SUBMISSION_COLUMNS)
    if frame.columns.tolist() != _SUBMISSION_COLUMNS:
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


# --- checks -------------------------------------------------------------------------------------


def _parse_birds(path: Path, frame: pd.DataFrame) -> list[tuple[str, ...]]:
    """Return the distinct birds of each label string, none for nocall or nothing at all."""
    rows = []
    for line, text in frame["birds"].items():
        # Real labels name a bird twice: "cangoo purfin purfin".
        birds = tuple(dict.fromkeys(text.split()))
        if NOCALL in birds and len(birds) > 1:
            raise ValueError(f"{path}, line {line}: birds {text!r} is {NOCALL} and birds at once")
        rows.append(() if birds == (NOCALL,) else birds)
    return rows


def _refuse(cells: pd.Series, path: Path, *, where: pd.Series, why: str) -> None:
    """Raise for the first cell of a column of `read_table` at which ``where`` is true."""
    if where.any():
        line = where.idxmax()
        raise ValueError(f"{path}, line {line}: {cells.name} is {cells[line]!r}; {why}")


def _require_keys(
    path: Path, frame: pd.DataFrame, columns: list[str], distinct: str | None = None
) -> None:
    """Raise for the first empty cell of ``columns``, then for the first repetition in a column."""
    for name in columns:
        is_empty = frame[name].str.strip() == ""
        _refuse(frame[name], path, where=is_empty, why="it must not be empty")
    if distinct is not None:
        again = frame[distinct].duplicated()
        _refuse(frame[distinct], path, where=again, why="an earlier row has it already")


def _numbers(path: Path, frame: pd.DataFrame, column: str) -> pd.Series:
    numbers = pd.to_numeric(frame[column], errors="coerce").astype(float)
    is_bad = ~np.isfinite(numbers)
    _refuse(frame[column], path, where=is_bad, why="it must be a number of seconds")
    return numbers


def _segment_ends(path: Path, frame: pd.DataFrame) -> pd.Series:
    seconds = _numbers(path, frame, "seconds")
    wrong = (seconds <= 0) | (seconds % SEGMENT_SECONDS != 0)
    why = f"segments end at multiples of {SEGMENT_SECONDS} s: {SEGMENT_SECONDS}, ..."
    _refuse(frame["seconds"], path, where=wrong, why=why)
    return seconds


def _log_foreign(path: Path, labels: Iterable[str]) -> None:
    counts = Counter(labels)
    if counts:
        named = shorten_list([f"{code} {count}" for code, count in counts.most_common()])
        logger.warning(
            "%s: %d labels are no class and count as no bird: %s", path.name, counts.total(), named
        )
