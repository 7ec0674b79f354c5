"""Say what a training clip's target is: from labels of the recording, or labels with times."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch.utils.data import Sampler

from birdcall.config import Sampling, require, require_choice
from birdcall.storage.files import read_table, write_atomically

# Target of a class that may or may not be in the clip: the loss and the metrics leave it out.
IGNORE_TARGET = -1.0
PRESENT, UNCERTAIN = "present", "uncertain"  # the states of a strong label
# Of a file of labels with times; seconds from the start of the recording.
STRONG_LABEL_COLUMNS = ("filename", "ebird_code", "onset", "offset", "state", "probability")
MIN_OVERLAP_SECONDS = (
    0.5  # so much of a stretch, or half of it, must lie in a clip to be heard there
)
END_TOLERANCE = 0.05  # seconds; ends are rounded, and so is the recording's length


def make_targets(
    recordings: pd.DataFrame, classes: Sequence[str], secondary_label_weight: float | None
) -> np.ndarray:
    """Return targets ``(recordings, classes)``: 1 for the primary label, less for others.

    ``secondary_label_weight`` None: others are UNKNOWN.
    """
    column = {code: position for position, code in enumerate(classes)}
    targets = np.zeros((len(recordings), len(classes)), dtype=np.float32)
    others = IGNORE_TARGET if secondary_label_weight is None else secondary_label_weight
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


class StrongTargets:
    """Targets of clips by what is heard in their stretch of a recording.

    A class is 1 where a heard stretch lies in the clip; UNKNOWN where an unsure one does, or only
    the edge of a heard one (see HEARD_SECONDS); 0 elsewhere. ``timed`` is a table as
    `read_strong_labels` returns it; recordings that are not in it keep their own labels.
    """

    def __init__(
        self, recordings: pd.DataFrame, classes: Sequence[str], timed: pd.DataFrame
    ) -> None:
        self.n_classes = len(classes)
        self.filenames = list(recordings["filename"])
        column = pd.Index(classes).get_indexer(timed["ebird_code"])
        numbered = timed.assign(column=column, heard=timed["state"] == PRESENT)
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
        enough = overlap >= np.minimum(MIN_OVERLAP_SECONDS, (offset - onset) / 2)
        target = np.zeros(self.n_classes, dtype=np.float32)
        target[column[overlap > 0]] = IGNORE_TARGET
        target[column[enough & heard]] = 1.0
        return target


def write_strong_labels(path: Path, timed: pd.DataFrame) -> None:
    """Write labels with times, whole or not at all."""
    text = timed[list(STRONG_LABEL_COLUMNS)].to_csv(index=False, lineterminator="\n")
    write_atomically(path, text)


def read_strong_labels(
    path: Path, recordings: pd.DataFrame, classes: Sequence[str]
) -> pd.DataFrame:
    """Read what `write_strong_labels` wrote, or what a person wrote by hand, and check each row.

    Raises FileNotFoundError or ValueError naming file, line and column.
    """
    text = read_table(path, STRONG_LABEL_COLUMNS)[list(STRONG_LABEL_COLUMNS)]
    seconds = text["filename"].map(recordings.set_index("filename")["seconds"])
    numbers = {
        name: pd.to_numeric(text[name], errors="coerce") for name in STRONG_LABEL_COLUMNS[2:4]
    }
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
        valid=text["state"].isin([PRESENT, UNCERTAIN]),
        reason=f"is neither {PRESENT} nor {UNCERTAIN}",
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
    heard = timed[timed["state"] == PRESENT]
    known = set(zip(heard["filename"], heard["ebird_code"], strict=True))
    listed = recordings[recordings["filename"].isin(timed["filename"])]
    for filename, code in zip(listed["filename"], listed["ebird_code"], strict=True):
        if (filename, code) not in known:
            raise ValueError(
                f"{path}: {filename} has no row in which its primary label {code} is {PRESENT}; "
                "add one, or leave the recording out to keep its labels as they are"
            )


# --- sampling ---


UNRATED = 0.0  # in xeno-canto's tables: nobody has rated the recording
BEST_RATING = 5.0
LOWEST_RATING_WEIGHT = 0.1  # of the best recordings' weight (2nd place of 2021)


class ClipRequest(NamedTuple):
    """Which clip to make: enough to draw the same one in any worker of any run."""

    epoch: int
    position: int  # in the epoch
    index: int  # of the recording


def rating_weights(ratings: Sequence[float]) -> np.ndarray:
    """Return each recording's weight by xeno-canto's rating (E to A: 1 to 5), 1 for the best.

    At least LOWEST_RATING_WEIGHT. An unrated recording is not a bad one and counts as the mean of
    the others; where none is rated, as 1.
    """
    rating = pd.Series(np.asarray(ratings, dtype=np.float64)).replace(UNRATED, np.nan)
    weights = (rating / BEST_RATING).clip(LOWEST_RATING_WEIGHT, 1)
    return weights.fillna(weights.mean()).fillna(1.0).to_numpy()


def recording_weights(
    ebird_codes: Sequence[str], sampling: str, ratings: Sequence[float] | None = None
) -> np.ndarray:
    """Return how often each recording is drawn, as shares of one.

    ``uniform``: all equally often. ``balanced``: every class equally often (1st place).
    ``rated``: in proportion to `rating_weights`. ``balanced+rated``: every class equally often, its
    better recordings more often than the others.
    """
    require_choice("sampling", sampling, typing.get_args(Sampling))
    weights = pd.Series(np.ones(len(ebird_codes)))
    if "rated" in sampling:
        require(ratings is not None, f"sampling is {sampling!r}, but there are no ratings")
        weights = pd.Series(rating_weights(ratings))
    if "balanced" in sampling:
        weights /= weights.groupby(np.asarray(ebird_codes, dtype=object)).transform("sum")
    return (weights / weights.sum()).to_numpy()


class ClipSampler(Sampler[ClipRequest]):
    """Draw an epoch's clips from (seed, epoch) alone; call `set_epoch` before each epoch.

    ``crops_per_recording`` clips in a row come from one recording. ``n_clips`` None: as many as
    there are recordings. See `recording_weights` for ``sampling``.

    With ``batch_size``, of all processes together, an epoch is whole batches, unless it is less
    than one. Of ``world_size`` processes that share each batch, ``rank`` gets its part of it.
    """

    def __init__(
        self,
        ebird_codes: Sequence[str],
        n_clips: int | None,
        sampling: str,
        seed: int,
        ratings: Sequence[float] | None = None,
        crops_per_recording: int = 1,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
    ) -> None:
        self.weights = recording_weights(ebird_codes, sampling, ratings)
        self.n_clips = n_clips or len(ebird_codes)
        self.crops_per_recording = crops_per_recording
        self.seed = seed
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self._check_shares()
        self.n_whole = self.n_clips - self.n_clips % min(batch_size or 1, self.n_clips)
        self.epoch = self.start = 0

    def _check_shares(self) -> None:
        rank, world_size, batch_size = self.rank, self.world_size, self.batch_size
        require(0 <= rank < world_size, f"rank is {rank}; with {world_size} it is below that")
        if world_size == 1:
            return
        require(
            batch_size is not None and batch_size % world_size == 0,
            f"a batch of {batch_size} cannot be shared by {world_size} processes; "
            f"choose a batch_size that is a multiple of {world_size}",
        )
        require(
            self.n_clips >= batch_size,
            f"an epoch of {self.n_clips} clips is less than one batch of {batch_size}, which "
            f"{world_size} processes cannot share; choose a higher clips_per_epoch",
        )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw ``epoch`` next, from its clip number ``start`` on: what an interrupted one lacks.

        ``start`` counts the clips of all processes, and is where a batch starts.
        """
        require(
            0 <= start <= self.n_clips,
            f"start is {start}; an epoch has {self.n_clips} clips, from 0 on",
        )
        require(
            start == self.n_clips or start % (self.batch_size or 1) == 0,
            f"start is {start}, within a batch of {self.batch_size}; give where a batch starts",
        )
        self.epoch, self.start = epoch, min(start, self.n_whole)

    def __len__(self) -> int:
        return (self.n_whole - self.start) // self.world_size

    def __iter__(self) -> Iterator[ClipRequest]:
        generator = np.random.default_rng((self.seed, self.epoch))
        n_drawn = -(-self.n_clips // self.crops_per_recording)
        # Systematic sampling: in an epoch a recording comes up as often as its weight says, +-1.
        steps = (np.arange(n_drawn) + generator.random()) / n_drawn
        order = generator.permutation(len(self.weights))
        drawn = np.searchsorted(np.cumsum(self.weights[order]), steps).clip(max=len(order) - 1)
        indices = generator.permutation(order[drawn]).repeat(self.crops_per_recording)
        batch = self.batch_size or 1
        for position in range(self.start, self.n_whole):
            if position % batch * self.world_size // batch == self.rank:
                yield ClipRequest(self.epoch, position, int(indices[position]))
