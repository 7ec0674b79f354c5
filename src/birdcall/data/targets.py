"""Make the targets of training clips from weak or strong labels, and draw the clips of an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from torch.utils.data import Sampler

from birdcall.config import SEGMENT_SECONDS, SamplingConfig, require
from birdcall.storage.files import read_table, shorten_list, write_atomically

# Target of a class that may or may not be in the clip: the loss and the metrics leave it out.
IGNORE_TARGET = -1.0
PRESENT, UNCERTAIN = "present", "uncertain"  # the states of a strong label
# Onset and offset are seconds from the start of the recording.
STRONG_LABEL_COLUMNS = ("filename", "ebird_code", "onset", "offset", "state", "probability")
MIN_OVERLAP_SECONDS = 0.5  # an interval counts in a clip with so much of it, or half of it
_END_TOLERANCE = 0.05  # seconds; offsets are rounded, and so are the lengths of recordings
_TIME_TOLERANCE = 1e-6  # seconds


def make_targets(
    recordings: pd.DataFrame, classes: Sequence[str], secondary_label_weight: float | None
) -> np.ndarray:
    """Return targets ``(recordings, classes)``, float32, from weak labels.

    1 for the primary label, ``secondary_label_weight`` for secondary labels (None: IGNORE_TARGET),
    0 for the other classes.
    """
    column = {code: index for index, code in enumerate(classes)}
    targets = np.zeros((len(recordings), len(classes)), dtype=np.float32)
    others = IGNORE_TARGET if secondary_label_weight is None else secondary_label_weight
    labels = zip(recordings["ebird_code"], recordings["secondary_codes"], strict=True)
    for row, (primary, secondary) in enumerate(labels):
        for code in secondary:
            targets[row, column[code]] = others
        targets[row, column[primary]] = 1.0
    return targets


class _TimedLabel(Protocol):
    """An event of `inference.events`, a simulated event, or a row of a table of annotations."""

    onset: float  # seconds from the start of its recording
    offset: float
    ebird_code: str


def describe_counts(labels: Counter[str]) -> str:
    """Return labels with how often each occurs, the most frequent first; 20 of them."""
    counts = [f"{label or '(no label)'} {count}" for label, count in labels.most_common()]
    return shorten_list(counts, 20)


def label_segments(
    events: Iterable[_TimedLabel], species: Sequence[str], n_segments: int
) -> np.ndarray:
    """Return which species are present in each segment, boolean, ``(segments, species)``.

    An event is present in a segment that holds half a second of it, or half of it. The code of each
    event must be in ``species``.
    """
    column_of = {code: column for column, code in enumerate(species)}
    rows = [(event.onset, event.offset, column_of[event.ebird_code]) for event in events]
    onset, offset, column = np.array(rows, dtype=float).reshape(-1, 3).T
    truth = np.zeros((n_segments, len(species)), dtype=bool)
    first = np.maximum(onset // SEGMENT_SECONDS, 0).astype(int)
    last = np.minimum(offset // SEGMENT_SECONDS, n_segments - 1).astype(int)
    n_touched = np.maximum(last - first + 1, 0)
    event = np.repeat(np.arange(len(rows)), n_touched)  # a pair for each segment that it touches
    number = np.arange(len(event)) - np.repeat(np.cumsum(n_touched) - n_touched, n_touched)
    segment = first[event] + number
    start = SEGMENT_SECONDS * segment
    ends = np.minimum(offset[event], start + SEGMENT_SECONDS)
    overlap = ends - np.maximum(onset[event], start)
    enough = np.minimum(MIN_OVERLAP_SECONDS, (offset - onset) / 2) - _TIME_TOLERANCE
    is_present = overlap >= enough[event]
    truth[segment[is_present], column[event[is_present]].astype(int)] = True
    return truth


class _Intervals(NamedTuple):
    """The strong labels of one recording, ``(intervals,)`` each."""

    column: np.ndarray  # of the class
    onset: np.ndarray
    offset: np.ndarray
    is_present: np.ndarray


class StrongTargets:
    """Targets of clips from strong labels: by what is present in the clip's part of a recording.

    A class is 1 where a present interval lies in the clip; IGNORE_TARGET where an uncertain one
    does, or only the edge of a present one (see MIN_OVERLAP_SECONDS); else 0. An interval of
    UNKNOWN_BIRD may be of any class. ``strong_labels`` is a table as `read_strong_labels` returns
    it; recordings that are not in it have weak labels only.
    """

    def __init__(
        self, recordings: pd.DataFrame, classes: Sequence[str], strong_labels: pd.DataFrame
    ) -> None:
        self.n_classes = len(classes)
        self.filenames = list(recordings["filename"])
        column = pd.Index(classes).get_indexer(strong_labels["ebird_code"])
        is_present = strong_labels["state"] == PRESENT
        table = strong_labels.assign(column=column, is_present=is_present)
        self.intervals = {
            filename: _Intervals(*(group[name].to_numpy() for name in _Intervals._fields))
            for filename, group in table.groupby("filename", sort=False)
        }

    def find(self, index: int, start_seconds: float, clip_seconds: float) -> np.ndarray | None:
        """Return the target ``(classes,)`` of a clip of recording ``index``; None: weak labels.

        A clip may start before its recording (``start_seconds`` below 0) and end after it: it is
        silent there.
        """
        intervals = self.intervals.get(self.filenames[index])
        if intervals is None:
            return None
        ends = np.minimum(intervals.offset, start_seconds + clip_seconds)
        overlap = ends - np.maximum(intervals.onset, start_seconds)
        length = intervals.offset - intervals.onset
        is_enough = overlap >= np.minimum(MIN_OVERLAP_SECONDS, length / 2)
        is_class = intervals.column >= 0
        unknown = IGNORE_TARGET if (overlap[~is_class] > 0).any() else 0
        target = np.full(self.n_classes, unknown, dtype=np.float32)
        target[intervals.column[is_class & (overlap > 0)]] = IGNORE_TARGET
        target[intervals.column[is_class & is_enough & intervals.is_present]] = 1.0
        return target

    def find_frames(
        self, index: int, start_seconds: float, n_frames: int, frame_seconds: float
    ) -> np.ndarray:
        """Return the targets of a clip's frames ``(classes, frames)``, with the states of `find`.

        A frame that an interval touches has its state.
        """
        frames = np.zeros((self.n_classes, n_frames), dtype=np.float32)
        intervals = self.intervals.get(self.filenames[index])
        if intervals is None:
            return frames
        edges = np.stack((intervals.onset, intervals.offset)) - start_seconds
        edges = (edges / frame_seconds).round(6)
        first = np.floor(edges[0]).clip(0, n_frames).astype(int)
        end = np.ceil(edges[1]).clip(0, n_frames).astype(int)
        touching = np.flatnonzero(end > first)
        # Unknown birds first, then uncertain classes: what is present is known in spite of them.
        certainty = np.where(intervals.column < 0, 0, 1 + intervals.is_present)
        for number in touching[np.argsort(certainty[touching], kind="stable")]:
            column = intervals.column[number]
            rows = slice(None) if column < 0 else column
            state = 1.0 if certainty[number] == 2 else IGNORE_TARGET
            frames[rows, first[number] : end[number]] = state
        return frames


def write_strong_labels(path: Path, strong_labels: pd.DataFrame) -> None:
    """Write strong labels, whole or not at all."""
    text = strong_labels[list(STRONG_LABEL_COLUMNS)].to_csv(index=False, lineterminator="\n")
    write_atomically(path, text)


def read_strong_labels(
    path: Path, recordings: pd.DataFrame, classes: Sequence[str]
) -> pd.DataFrame:
    """Read what `write_strong_labels` wrote, or what a person wrote by hand, and check each row.

    Raises FileNotFoundError or ValueError naming file, line and column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such labels; `birdcall pseudo-label` makes them")
    text = read_table(path, STRONG_LABEL_COLUMNS)[list(STRONG_LABEL_COLUMNS)]
    seconds = text["filename"].map(recordings.set_index("filename")["seconds"])
    onset, offset, probability = (
        pd.to_numeric(text[name], errors="coerce") for name in ("onset", "offset", "probability")
    )
    checks = (
        ("filename", seconds.notna(), "is no recording of the data"),
        ("ebird_code", text["ebird_code"].isin(classes), f"is none of the {len(classes)} classes"),
        (
            "state",
            text["state"].isin([PRESENT, UNCERTAIN]),
            f"is neither {PRESENT} nor {UNCERTAIN}",
        ),
        (
            "onset",
            (onset >= 0) & (onset < seconds),
            "lies outside its recording, in seconds",
        ),
        (
            "offset",
            (offset > onset) & (offset <= seconds + _END_TOLERANCE),
            "is not between the onset and the end of its recording, in seconds",
        ),
        ("probability", probability.between(0, 1), "is no probability from 0 to 1"),
    )
    for column, is_valid, reason in checks:
        if not is_valid.all():
            line = is_valid.index[~is_valid.to_numpy()][0]
            value = text.at[line, column]
            raise ValueError(f"{path}, line {line}, column {column}: {value!r} {reason}")
    table = text.assign(onset=onset, offset=offset, probability=probability)
    present = table[table["state"] == PRESENT]
    known = set(zip(present["filename"], present["ebird_code"], strict=True))
    listed = recordings[recordings["filename"].isin(table["filename"])]
    for filename, code in zip(listed["filename"], listed["ebird_code"], strict=True):
        if (filename, code) not in known:
            raise ValueError(
                f"{path}: {filename} has no row in which its primary label {code} is {PRESENT}; "
                "add one, or remove the recording from the file to keep its weak labels"
            )
    return table.reset_index(drop=True)


# --- sampling ---


_UNRATED = 0.0  # in xeno-canto's tables: nobody has rated the recording
_BEST_RATING = 5.0
_LOWEST_RATING_WEIGHT = 0.1  # of the best recordings' weight (2nd place of 2021)


class ClipRequest(NamedTuple):
    """Which clip to make: enough to draw the same clip in any worker of any run."""

    epoch: int
    position: int  # in the epoch
    index: int  # of the recording


def rating_weights(ratings: Sequence[float]) -> np.ndarray:
    """Return each recording's weight by xeno-canto's rating (E to A: 1 to 5), 1 for the best.

    The lowest weight is 0.1. An unrated recording need not be a bad one and gets the mean of the
    others; where none is rated, 1.
    """
    rating = pd.Series(np.asarray(ratings, dtype=np.float64)).replace(_UNRATED, np.nan)
    weights = (rating / _BEST_RATING).clip(_LOWEST_RATING_WEIGHT, 1)
    return weights.fillna(weights.mean()).fillna(1.0).to_numpy()


def recording_weights(recordings: pd.DataFrame, sampling: str) -> np.ndarray:
    """Return how often each recording is drawn, as shares of 1; see `config.SamplingConfig`.

    ``uniform``: all equally often. ``balanced``: every class equally often (1st place).
    ``rated``: in proportion to `rating_weights`. ``balanced+rated``: every class equally often, its
    better recordings more often than the others.
    """
    weights = pd.Series(np.ones(len(recordings)))
    if "rated" in sampling:
        require("rating" in recordings, f"sampling is {sampling!r}, but there are no ratings")
        weights = pd.Series(rating_weights(recordings["rating"]))
    if "balanced" in sampling:
        codes = recordings["ebird_code"].to_numpy(dtype=object)
        weights /= weights.groupby(codes).transform("sum")
    return (weights / weights.sum()).to_numpy()


@dataclass(frozen=True)
class ProcessShare:
    """Which of the processes that share each batch of a training."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        require(
            0 <= self.rank < self.world_size,
            f"rank is {self.rank}; with a world_size of {self.world_size} it is below that",
        )


class ClipSampler(Sampler[ClipRequest]):
    """Draw an epoch's clips from (seed, epoch) alone; call `set_epoch` before each epoch.

    An epoch consists of whole batches, unless it is smaller than one batch. Of the processes of
    ``share``, each gets its part of every batch.
    """

    def __init__(
        self,
        recordings: pd.DataFrame,
        config: SamplingConfig,
        seed: int,
        share: ProcessShare = ProcessShare(),
    ) -> None:
        self.weights = recording_weights(recordings, config.sampling)
        self.n_clips = config.clips_per_epoch or len(recordings)
        self.crops_per_recording = config.crops_per_recording
        self.batch_size = config.batch_size  # of all processes together
        self.seed = seed
        self.share = share
        if share.world_size > 1:
            require(
                self.batch_size % share.world_size == 0,
                f"a batch of {self.batch_size} cannot be shared by {share.world_size} processes; "
                f"choose a batch_size that is a multiple of {share.world_size}",
            )
            require(
                self.n_clips >= self.batch_size,
                f"an epoch of {self.n_clips} clips is less than one batch of {self.batch_size}, "
                f"which {share.world_size} processes cannot share; choose a higher clips_per_epoch",
            )
        self.n_whole = self.n_clips - self.n_clips % min(self.batch_size, self.n_clips)
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Draw ``epoch`` next, from its clip number ``start`` on: the rest of an interrupted epoch.

        ``start`` counts the clips of all processes, and is where a batch starts.
        """
        require(
            0 <= start <= self.n_clips,
            f"start is {start}; an epoch has {self.n_clips} clips, from 0 on",
        )
        require(
            start == self.n_clips or start % self.batch_size == 0,
            f"start is {start}, within a batch of {self.batch_size}; give where a batch starts",
        )
        self.epoch, self.start = epoch, min(start, self.n_whole)

    def __len__(self) -> int:
        return (self.n_whole - self.start) // self.share.world_size

    def __iter__(self) -> Iterator[ClipRequest]:
        generator = np.random.default_rng((self.seed, self.epoch))
        n_drawn = -(-self.n_clips // self.crops_per_recording)
        # Systematic sampling: an epoch has a recording as often as its weight requires, +-1.
        steps = (np.arange(n_drawn) + generator.random()) / n_drawn
        order = generator.permutation(len(self.weights))
        drawn = np.searchsorted(np.cumsum(self.weights[order]), steps).clip(max=len(order) - 1)
        indices = generator.permutation(order[drawn]).repeat(self.crops_per_recording)
        for position in range(self.start, self.n_whole):
            rank = position % self.batch_size * self.share.world_size // self.batch_size
            if rank == self.share.rank:
                yield ClipRequest(self.epoch, position, int(indices[position]))
