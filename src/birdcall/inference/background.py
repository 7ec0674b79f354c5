"""Bring each class's background in a recording to the level that the decision was chosen at.

A site's wind, insects or other birds raise the probabilities of some classes in all of its rows, so
that rows of one site come before the birds of another. The background of a class is the lower
quartile of its logits: a species that is in three of four rows hardly moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from birdcall.config import require
from birdcall.inference.predictions import to_logits, to_probabilities

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


def _align(probabilities: np.ndarray, level: Sequence[float], starts: Sequence[int]) -> np.ndarray:
    n_classes = probabilities.shape[2]
    require(
        n_classes == len(level),
        f"the background is of {len(level)} classes, the probabilities are of {n_classes}",
    )
    dtype = probabilities.dtype
    aligned = []
    for block in _blocks(to_logits(probabilities), starts):
        weight = block.shape[1] / (block.shape[1] + _PRIOR_SEGMENTS)
        background = np.quantile(block, _QUANTILE, axis=1, keepdims=True)
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
