"""Turn members' scores into labels: the one rule that evaluation chooses and the kernel applies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from birdcall.config import NOCALL, require
from birdcall.files import write_atomically


@dataclass(frozen=True)
class Decision:
    """A bird is in a segment if clip and frames agree (1st place), for at most `max_birds` birds.

    Members are averaged first. ``chosen_on`` and ``score`` say where the thresholds come from.
    """

    clip_threshold: float = 0.5
    frame_threshold: float = 0.5
    max_birds: int = 3
    window_segments: int = 1  # how many segments the model hears at once
    members: tuple[str, ...] = ()
    chosen_on: str = ""
    score: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("clip_threshold", "frame_threshold"):
            value = getattr(self, name)
            require(
                0 <= value <= 1,
                f"{name} is {value}; give a probability between 0 and 1",
            )
        for name in ("max_birds", "window_segments"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= 1,
                f"{name} is {value}; give an integer above 0",
            )


def write_decision(path: Path, decision: Decision) -> None:
    write_atomically(path, json.dumps(asdict(decision), indent=1) + "\n")


def read_decision(path: Path) -> Decision:
    """Read ``decision.json``; errors name the file and what is wrong in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such decision; `birdcall evaluate` makes one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        unknown = sorted(set(values) - {item.name for item in fields(Decision)})
        require(not unknown, f"unknown field {', '.join(unknown)}")
        return Decision(**(values | {"members": tuple(values.get("members", ()))}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable decision: {error}") from error


def combine(scores: np.ndarray) -> np.ndarray:
    """Average members' probabilities: ``(members, rows, classes)`` → ``(rows, classes)``."""
    require(
        scores.ndim == 3,
        f"scores have shape {scores.shape}; want (members, rows, classes)",
    )
    require(bool(np.isfinite(scores).all()), "a member's scores hold NaN or infinity")
    # Sorted first, so that rounding does not depend on the order of the members.
    return np.sort(scores, axis=0).mean(axis=0)


def decide(clipwise: np.ndarray, framewise: np.ndarray, decision: Decision) -> np.ndarray:
    """Say which birds are in each row: two times ``(rows, classes)`` scores → boolean, same shape.

    ``framewise`` is the highest probability of any frame of the row.
    """
    chosen = (clipwise >= decision.clip_threshold) & (framewise >= decision.frame_threshold)
    if clipwise.shape[1] <= decision.max_birds:
        return chosen
    strength = np.where(chosen, clipwise * framewise, -1.0)
    # Stable sorting: equal strengths go by class order, on every machine.
    rank = np.argsort(np.argsort(-strength, axis=1, kind="stable"), axis=1, kind="stable")
    return chosen & (rank < decision.max_birds)


def label_rows(chosen: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Write each boolean row ``(rows, classes)`` as the competition does: codes, or ``nocall``."""
    names = np.asarray(classes, dtype=object)
    return [" ".join(names[row]) if row.any() else NOCALL for row in chosen]
