"""Say what a training clip's target is: from labels of the recording, or labels with times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from birdcall.data.augment import UNKNOWN
from birdcall.files import read_table, write_atomically

HEARD, UNSURE = "heard", "unsure"
STATES = (HEARD, UNSURE)
# Of a file of labels with times; seconds from the start of the recording.
TIMED_COLUMNS = ("filename", "ebird_code", "onset", "offset", "state", "probability")
HEARD_SECONDS = 0.5  # so much of a stretch, or half of it, must lie in a clip to be heard there
END_TOLERANCE = 0.05  # seconds; ends are rounded, and so is the recording's length


def make_targets(
    recordings: pd.DataFrame, classes: Sequence[str], secondary_label_weight: float | None
) -> np.ndarray:
    """Return targets ``(recordings, classes)``: 1 for the primary label, less for others.

    ``secondary_label_weight`` None: others are UNKNOWN.
    """
    column = {code: position for position, code in enumerate(classes)}
    targets = np.zeros((len(recordings), len(classes)), dtype=np.float32)
    others = UNKNOWN if secondary_label_weight is None else secondary_label_weight
    rows = zip(recordings["ebird_code"], recordings["secondary_codes"], strict=True)
    for row, (primary, secondary) in enumerate(rows):
        for code in secondary:
            targets[row, column[code]] = others
        targets[row, column[primary]] = 1.0
    return targets


class _Stretches(NamedTuple):
    """One recording's labels with times, ``(stretches,)`` each."""

    column: np.ndarray  # of the class
    onset: np.ndarray
    offset: np.ndarray
    heard: np.ndarray


class TimedTargets:
    """Targets of clips by what is heard in their stretch of a recording.

    A class is 1 where a heard stretch lies in the clip; UNKNOWN where an unsure one does, or only
    the edge of a heard one (see HEARD_SECONDS); 0 elsewhere. ``timed`` is a table as
    `read_timed_labels` returns it; recordings that are not in it keep their own labels.
    """

    def __init__(
        self, recordings: pd.DataFrame, classes: Sequence[str], timed: pd.DataFrame
    ) -> None:
        self.n_classes = len(classes)
        self.filenames = list(recordings["filename"])
        column = pd.Index(classes).get_indexer(timed["ebird_code"])
        numbered = timed.assign(column=column, heard=timed["state"] == HEARD)
        self.stretches = {
            filename: _Stretches(*(group[name].to_numpy() for name in _Stretches._fields))
            for filename, group in numbered.groupby("filename", sort=False)
        }

    def find(self, index: int, start_seconds: float, clip_seconds: float) -> np.ndarray | None:
        """Return the target ``(classes,)`` of a clip of recording ``index``, or None.

        A clip may start before its recording (``start_seconds`` below 0) and end behind it: there
        it is silent.
        """
        stretches = self.stretches.get(self.filenames[index])
        if stretches is None:
            return None
        column, onset, offset, heard = stretches
        ends = np.minimum(offset, start_seconds + clip_seconds)
        overlap = ends - np.maximum(onset, start_seconds)
        enough = overlap >= np.minimum(HEARD_SECONDS, (offset - onset) / 2)
        target = np.zeros(self.n_classes, dtype=np.float32)
        target[column[overlap > 0]] = UNKNOWN
        target[column[enough & heard]] = 1.0
        return target


def write_timed_labels(path: Path, timed: pd.DataFrame) -> None:
    """Write labels with times, whole or not at all."""
    text = timed[list(TIMED_COLUMNS)].to_csv(index=False, lineterminator="\n")
    write_atomically(path, text)


def read_timed_labels(path: Path, recordings: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Read what `write_timed_labels` wrote, or what a person wrote by hand, and check each row.

    Raises FileNotFoundError or ValueError naming file, line and column.
    """
    text = read_table(path, TIMED_COLUMNS)[list(TIMED_COLUMNS)]
    seconds = text["filename"].map(recordings.set_index("filename")["seconds"])
    numbers = {name: pd.to_numeric(text[name], errors="coerce") for name in TIMED_COLUMNS[2:4]}
    probability = pd.to_numeric(text["probability"], errors="coerce")
    onset, offset = numbers["onset"], numbers["offset"]
    _require_rows(
        path, text, column="filename", valid=seconds.notna(), reason="is no recording of the data"
    )
    codes = text["ebird_code"].isin(classes)
    _require_rows(
        path,
        text,
        column="ebird_code",
        valid=codes,
        reason=f"is none of the {len(classes)} classes",
    )
    _require_rows(
        path,
        text,
        column="state",
        valid=text["state"].isin(STATES),
        reason="is neither heard nor unsure",
    )
    inside = (onset >= 0) & (onset < seconds)
    _require_rows(
        path, text, column="onset", valid=inside, reason="lies outside its recording, in seconds"
    )
    inside = (offset > onset) & (offset <= seconds + END_TOLERANCE)
    reason = "is not between the onset and the end of its recording, in seconds"
    _require_rows(path, text, column="offset", valid=inside, reason=reason)
    share = probability.between(0, 1)
    _require_rows(
        path, text, column="probability", valid=share, reason="is no probability from 0 to 1"
    )
    timed = text.assign(**numbers, probability=probability).reset_index(drop=True)
    _require_primaries(path, timed, recordings)
    return timed


def _require_rows(
    path: Path, text: pd.DataFrame, column: str, valid: pd.Series, reason: str
) -> None:
    if valid.all():
        return
    line = valid.index[~valid.to_numpy()][0]
    value = text.at[line, column]
    raise ValueError(f"{path}, line {line}, column {column}: {value!r} {reason}")


def _require_primaries(path: Path, timed: pd.DataFrame, recordings: pd.DataFrame) -> None:
    """Refuse a table in which a recording's primary label is heard nowhere."""
    heard = timed[timed["state"] == HEARD]
    known = set(zip(heard["filename"], heard["ebird_code"], strict=True))
    listed = recordings[recordings["filename"].isin(timed["filename"])]
    for filename, code in zip(listed["filename"], listed["ebird_code"], strict=True):
        if (filename, code) not in known:
            raise ValueError(
                f"{path}: {filename} has no row in which its primary label {code} is {HEARD}; "
                "add one, or leave the recording out to keep its labels as they are"
            )
