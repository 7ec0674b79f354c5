"""Bring each class's background in a recording to the level that the decision was chosen at.

A site's wind, insects or other birds raise the probabilities of some classes in all of its rows, so
that rows of one site come before the birds of another. The background of a class is the lower
quartile of its logits: a species that is in three of four rows hardly moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from birdcall.config import require
from birdcall.inference.predictions import SegmentPredictions, to_logits, to_probabilities
from birdcall.inference.windows import FRAMES_PER_SEGMENT

BLOCK_SEGMENTS = 120  # ten minutes: the background changes over a day
_QUANTILE = 0.25
# A short recording may be full of one species: the background of 12 segments counts half.
_PRIOR_SEGMENTS = 12


@dataclass(frozen=True)
class Background:
    """The background of each class, in logits, that recordings are brought to.

    clip, frame: of clipwise and framewise probabilities, a number for each of the model's classes.
    """

    clip: tuple[float, ...]
    frame: tuple[float, ...]

    def __post_init__(self) -> None:
        for item in fields(self):
            values = getattr(self, item.name)
            require(
                len(values) == len(self.clip) and all(map(math.isfinite, values)),
                f"background: {item.name} must be a finite number for each class",
            )

    @staticmethod
    def of(clipwise: np.ndarray, framewise: np.ndarray, starts: Sequence[int]) -> Background:
        """Return the mean background of members and recordings.

        ``(members, segments, classes)``, all segments of one recording after another; ``starts``:
        the recordings' first segments.
        """
        levels = []
        for probabilities in (clipwise, framewise):
            blocks = [
                np.quantile(block, _QUANTILE, axis=1).mean(axis=0)
                for block in _blocks(to_logits(probabilities), starts)
            ]
            levels.append(tuple(np.mean(blocks, axis=0).astype(float).round(6).tolist()))
        return Background(*levels)

    def apply(
        self, clipwise: np.ndarray, framewise: np.ndarray, starts: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Shift the logits of each class, member and block of ten minutes of each recording.

        Shapes as in `of`; the results have the same dtype.
        """
        return (
            _align(clipwise, self.clip, starts),
            _align(framewise, self.frame, starts),
        )


@dataclass(eq=False)
class BackgroundAligner:
    """Takes a recording part by part and returns its blocks aligned, as `Background.apply` does.

    A part is returned as it is where there is no background. Else memory holds up to ten minutes of
    predictions, with frames.
    """

    background: Background | None
    pending: SegmentPredictions | None = None  # of a block that is not complete

    def add(self, part: SegmentPredictions) -> list[SegmentPredictions]:
        """Take the next segments; return the complete blocks, together."""
        if self.background is None:
            return [part]
        rows = part
        if self.pending is not None:
            rows = SegmentPredictions.concatenate([self.pending, part])
        n_complete = rows.n_segments // BLOCK_SEGMENTS * BLOCK_SEGMENTS
        self.pending = rows.copy_from(n_complete) if n_complete < rows.n_segments else None
        return [self._align(rows.select(slice(0, n_complete)))] if n_complete else []

    def finish(self) -> list[SegmentPredictions]:
        """Return what is left."""
        rest, self.pending = self.pending, None
        return [] if rest is None else [self._align(rest)]

    def _align(self, rows: SegmentPredictions) -> SegmentPredictions:
        """Align complete blocks, or the rest of a recording.

        Frames are shifted as each member's highest ones are, their mean as these are on average.
        """
        clipwise, framewise = self.background.apply(rows.clipwise, rows.framewise, [0])
        shifts = to_logits(framewise) - to_logits(rows.framewise)
        shifts = np.repeat(shifts.swapaxes(1, 2), FRAMES_PER_SEGMENT, axis=2)
        frames, member_frames = rows.frames, rows.member_frames
        if frames is not None:
            frames = to_probabilities(to_logits(frames) + shifts.mean(axis=0))
        if member_frames is not None:
            member_frames = to_probabilities(to_logits(member_frames) + shifts)
        return replace(
            rows,
            clipwise=clipwise,
            framewise=framewise,
            frames=frames,
            member_frames=member_frames,
        )


def remove_background(probabilities: np.ndarray, sites: Sequence[str]) -> np.ndarray:
    """Lower the classes that a site raises in all of its segments, ``(segments, classes)``.

    sites: of each segment. A class whose background at a site is above that of the median class is
    brought down to it, by the part that `Background.apply` shifts of so many segments.
    """
    logits, sites = to_logits(probabilities), np.array(sites)
    for site in np.unique(sites):
        of_site = logits[sites == site]
        background, weight = _measure(of_site)
        excess = np.maximum(0, background - np.median(background))
        logits[sites == site] = of_site - weight * excess
    return to_probabilities(logits)


def _measure(logits: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the background of ``(…, segments, classes)``, and the part of it that counts."""
    n_segments = logits.shape[-2]
    background = np.quantile(logits, _QUANTILE, axis=-2, keepdims=True)
    return background, n_segments / (n_segments + _PRIOR_SEGMENTS)


def _align(probabilities: np.ndarray, level: Sequence[float], starts: Sequence[int]) -> np.ndarray:
    n_classes = probabilities.shape[2]
    require(
        n_classes == len(level),
        f"the background is of {len(level)} classes, the probabilities are of {n_classes}",
    )
    dtype = probabilities.dtype
    aligned = []
    for block in _blocks(to_logits(probabilities), starts):
        background, weight = _measure(block)
        shift = (weight * (background - np.array(level))).astype(dtype)
        aligned.append(to_probabilities(block - shift))
    return np.concatenate(aligned, axis=1) if aligned else probabilities


def _blocks(logits: np.ndarray, starts: Sequence[int]) -> list[np.ndarray]:
    """Split ``(members, segments, classes)`` into recordings, and these into blocks."""
    ends = [*starts[1:], logits.shape[1]]
    return [
        logits[:, first : min(first + BLOCK_SEGMENTS, end)]
        for start, end in zip(starts, ends, strict=True)
        for first in range(start, end, BLOCK_SEGMENTS)
    ]
