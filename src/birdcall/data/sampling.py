"""Draw which recordings an epoch is made of, from the seed and the epoch's number alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch.utils.data import Sampler

from birdcall.config import SAMPLINGS, require, require_choice

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
    require_choice("sampling", sampling, SAMPLINGS)
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
