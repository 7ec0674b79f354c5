"""Turn members' scores into labels: the one rule that evaluation chooses and the kernel applies.

In this order: calibrate each member's probabilities, combine the members, smooth over neighbouring
segments, ask whether the bird is anywhere in the recording (gate), ask clip and frame of the
segment, keep the strongest birds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from birdcall.config import NOCALL, require, require_choice, require_share
from birdcall.inference.windows import WindowConfig
from birdcall.storage.files import write_atomically

COMBINATIONS = ("mean", "rms", "votes")
SMALLEST = 1e-7  # a probability of 0 or 1 has no logit


@dataclass(frozen=True)
class Calibration:
    """What makes scores probabilities, per class: sigmoid(scale * logit(score) + offset).

    A number for each of the model's classes, in their order, for clipwise and framewise scores.
    """

    clip_scale: tuple[float, ...]
    clip_offset: tuple[float, ...]
    frame_scale: tuple[float, ...]
    frame_offset: tuple[float, ...]

    def __post_init__(self) -> None:
        for item in fields(self):
            values = getattr(self, item.name)
            require(
                len(values) == len(self.clip_scale) and all(map(math.isfinite, values)),
                f"calibration: {item.name} must be a finite number for each class",
            )
        for name in ("clip_scale", "frame_scale"):
            require(
                min(getattr(self, name), default=1.0) > 0,
                f"calibration: {name} holds {min(getattr(self, name), default=1.0)}; "
                "a scale must be above 0, or it would turn the ranking round",
            )

    def apply(self, clipwise: np.ndarray, framewise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Calibrate scores ``(…, classes)``; the results have their dtype."""
        return (
            calibrate(clipwise, self.clip_scale, self.clip_offset),
            calibrate(framewise, self.frame_scale, self.frame_offset),
        )


def calibrate(scores: np.ndarray, scale: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """Return sigmoid(scale * logit(scores) + offset) for ``(…, classes)``, in the scores' dtype."""
    require(
        scores.shape[-1] == len(scale),
        f"the calibration is for {len(scale)} classes, the scores are of {scores.shape[-1]}",
    )
    dtype = scores.dtype
    clipped = np.clip(scores, SMALLEST, 1 - SMALLEST)
    logit = np.log(clipped / (1 - clipped))
    logit = logit * np.asarray(scale, dtype) + np.asarray(offset, dtype)
    return (1 / (1 + np.exp(-logit))).astype(dtype, copy=False)


@dataclass(frozen=True)
class Decision:
    """Which birds are in a segment, and in a whole recording.

    A bird is in a segment if clip and frames agree (1st place): its clipwise score reaches
    ``clip_threshold``, the highest of its framewise scores ``frame_threshold``, and, if there is a
    gate (7th place), its highest clipwise score in the whole recording ``recording_threshold``.
    Scores are the members' ``mean`` or root mean square (``rms``, 2nd place), or each member is
    asked alone and ``vote_share`` of them must say so (``votes``, 1st place). Before, a segment's
    scores are averaged with those of its neighbours, which weigh ``neighbour_weight`` each (3rd
    place).

    A row of site 3 is a whole recording: its birds are those of any segment whose highest clipwise
    score reaches ``file_threshold``.

    chosen_on says from what the rule comes; score what it got there, and what else is expected;
    classes those of the members, in order, or nothing where the decision would suit any.
    """

    clip_threshold: float = 0.5
    frame_threshold: float = 0.5
    combination: str = "mean"
    vote_share: float = 0.5
    recording_threshold: float = 0.0  # 0: no gate
    neighbour_weight: float = 0.0
    max_birds: int = 3
    file_threshold: float = 0.5
    file_max_birds: int = 10
    window_segments: int = 1  # how many segments the model hears at once,
    context_seconds: float = 0.0  # and how much sound before and after them
    calibration: Calibration | None = None
    classes: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    chosen_on: str = ""
    score: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("combination", self.combination, COMBINATIONS)
        for name in _SHARES:
            require_share(name, getattr(self, name))
        _ = self.window_config  # checks itself
        for name in ("max_birds", "file_max_birds"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= 1,
                f"{name} is {value}; give an integer above 0",
            )
        if self.calibration is not None and self.classes:
            n_calibrated = len(self.calibration.clip_scale)
            require(
                n_calibrated == len(self.classes),
                f"the calibration is for {n_calibrated} classes, the decision for "
                f"{len(self.classes)}",
            )

    @property
    def window_config(self) -> WindowConfig:
        """Return what the members' scores must come from."""
        return WindowConfig(self.window_segments, self.context_seconds)

    def n_votes(self, n_members: int) -> int:
        """Return how many of so many members must agree."""
        return max(1, math.ceil(round(self.vote_share * n_members, 9)))

    def describe(self) -> str:
        """Say the rule in words, for people."""
        if self.combination == "votes":
            n_members = len(self.members)
            half = {0.5: "half", 1.0: "all"}.get(self.vote_share, f"{self.vote_share:.0%}")
            of = f"{self.n_votes(n_members)} of {n_members}" if n_members else f"{half} of the"
            parts = [f"{of} members say clip"]
        else:
            parts = ["clip" if self.combination == "mean" else "root-mean-square clip"]
        parts[0] += f" probability >= {self.clip_threshold:g}"
        parts.append(f"and frame probability >= {self.frame_threshold:g}")
        if self.recording_threshold > 0:
            parts.append(f"(>= {self.recording_threshold:g} anywhere in the recording)")
        if self.neighbour_weight > 0:
            parts.append(f"smoothed over neighbours that weigh {self.neighbour_weight:g}")
        if self.calibration is not None:
            parts.append("of calibrated scores")
        if not self.window_config.is_single_segment:
            parts.append(f"of windows of {self.window_config.window_seconds:g} s")
        return f"{' '.join(parts)}, at most {self.max_birds} birds"


_SHARES = (
    *("vote_share", "clip_threshold", "frame_threshold", "recording_threshold"),
    *("neighbour_weight", "file_threshold"),
)


def write_decision(path: Path, decision: Decision) -> None:
    write_atomically(path, json.dumps(asdict(decision), indent=1) + "\n")


def read_decision(path: Path) -> Decision:
    """Read ``decision.json``; errors name the file and what is wrong in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such decision; `birdcall evaluate` makes one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("calibration") is not None:
            values["calibration"] = _restore(Calibration, values["calibration"])
        return _restore(Decision, values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable decision: {error}") from error


def _restore(kind: type, values: dict[str, Any]) -> Any:
    unknown = sorted(set(values) - {item.name for item in fields(kind)})
    require(not unknown, f"unknown field {', '.join(unknown)}")
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return kind(**(values | tuples))


# --- applying it --------------------------------------------------------------------------------


class Voters(NamedTuple):
    """What thresholds are asked of: each member, or all of them combined into one.

    clipwise, framewise: ``(voters, rows, classes)``; strength: ``(rows, classes)``; starts: the
    first row of each recording.
    """

    clipwise: np.ndarray
    framewise: np.ndarray
    strength: np.ndarray
    starts: np.ndarray

    @property
    def highest(self) -> np.ndarray:
        """Return each recording's highest clipwise scores, ``(voters, recordings, classes)``."""
        return np.maximum.reduceat(self.clipwise, self.starts, axis=1)


class WholeRecordings(NamedTuple):
    """What is asked of whole recordings: ``(recordings, classes)``, but highest as in `Voters`."""

    in_a_row: np.ndarray  # the bird is named in a row
    highest: np.ndarray
    strength: np.ndarray


def combine(scores: np.ndarray, combination: str = "mean") -> np.ndarray:
    """Average members' probabilities: ``(members, rows, classes)`` → ``(rows, classes)``.

    ``rms`` is the root of the mean of their squares: the surest member counts most.
    """
    require_choice("combination", combination, ("mean", "rms"))
    require(
        scores.ndim == 3,
        f"scores have shape {scores.shape}; want (members, rows, classes)",
    )
    require(bool(np.isfinite(scores).all()), "a member's scores hold NaN or infinity")
    if len(scores) == 1:
        return scores[0]
    # Sorted first, so that rounding does not depend on the order of the members.
    ordered = np.sort(scores, axis=0)
    if combination == "mean":
        return ordered.mean(axis=0)
    return np.sqrt(np.square(ordered).mean(axis=0))


def make_voters(
    clipwise: np.ndarray,
    framewise: np.ndarray,
    decision: Decision,
    starts: np.ndarray | None = None,
) -> Voters:
    """Do with ``(members, rows, classes)`` scores all that comes before the thresholds.

    Rows are all segments of one recording after another; ``starts`` are the recordings' first rows
    (None: there is one recording).
    """
    starts = np.zeros(1, np.intp) if starts is None else np.asarray(starts)
    if decision.calibration is not None:
        clipwise, framewise = decision.calibration.apply(clipwise, framewise)
    if decision.combination == "votes":
        # Sorted by nothing: votes are counted, and the strength sorts for itself.
        require(bool(np.isfinite(clipwise).all()), "a member's scores hold NaN or infinity")
        require(bool(np.isfinite(framewise).all()), "a member's scores hold NaN or infinity")
    else:
        clipwise = combine(clipwise, decision.combination)[None]
        framewise = combine(framewise, decision.combination)[None]
    clipwise = smooth_neighbours(clipwise, decision.neighbour_weight, starts)
    framewise = smooth_neighbours(framewise, decision.neighbour_weight, starts)
    return Voters(clipwise, framewise, combine(clipwise * framewise), starts)


def smooth_neighbours(scores: np.ndarray, weight: float, starts: np.ndarray) -> np.ndarray:
    """Average each row of ``(…, rows, classes)`` with the rows before and after it.

    Either neighbour weighs ``weight``, the row itself 1; other recordings are no neighbours.
    """
    n_rows = scores.shape[-2]
    if weight == 0 or n_rows == 1:
        return scores
    is_first = np.zeros(n_rows, dtype=bool)
    is_first[starts] = True
    joined = np.where(is_first[1:], 0, weight).astype(scores.dtype)[
        :, None
    ]  # row and the one after
    total = np.ones((n_rows, 1), scores.dtype)
    total[1:] += joined
    total[:-1] += joined
    smooth = scores.copy()
    smooth[..., 1:, :] += joined * scores[..., :-1, :]
    smooth[..., :-1, :] += joined * scores[..., 1:, :]
    smooth /= total
    return smooth


def decide(
    clipwise: np.ndarray,
    framewise: np.ndarray,
    decision: Decision,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """Say which birds are in each row: ``(members, rows, classes)`` scores → ``(rows, classes)``.

    ``framewise`` is the highest probability of any frame of the row. Rows are all segments of one
    recording after another; ``starts`` are the recordings' first rows (None: one recording).
    """
    return ask_rows(make_voters(clipwise, framewise, decision, starts), decision)


def decide_recordings(
    clipwise: np.ndarray,
    framewise: np.ndarray,
    decision: Decision,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """Say which birds are in each whole recording, as rows of site 3 want it.

    Takes what `decide` takes; returns ``(recordings, classes)``.
    """
    voters = make_voters(clipwise, framewise, decision, starts)
    return ask_recordings(gather_recordings(voters, decision), decision)


def ask_rows(voters: Voters, decision: Decision) -> np.ndarray:
    """Apply the thresholds of rows: return the birds of each, ``(rows, classes)``."""
    passed = pass_thresholds(voters, decision)
    if decision.recording_threshold > 0:
        passed &= passes_gate(voters, decision.recording_threshold)
    return keep_strongest(agree(passed, decision), voters.strength, decision.max_birds)


def pass_thresholds(voters: Voters, decision: Decision) -> np.ndarray:
    """Return which birds each voter hears in each row, the gate aside: as `Voters.clipwise`."""
    passed = voters.clipwise >= decision.clip_threshold
    passed &= voters.framewise >= decision.frame_threshold
    return passed


def agree(passed: np.ndarray, decision: Decision) -> np.ndarray:
    """Return for ``(voters, …)`` whether as many of them say so as the decision asks for."""
    return passed.sum(axis=0) >= _needed(len(passed), decision)


def passes_gate(voters: Voters, threshold: float) -> np.ndarray:
    """Return which birds are anywhere in the row's recording, ``(voters, rows, classes)``."""
    lengths = np.diff([*voters.starts, voters.clipwise.shape[1]])
    return np.repeat(voters.highest >= threshold, lengths, axis=1)


def gather_recordings(voters: Voters, decision: Decision) -> WholeRecordings:
    """Return what `ask_recordings` needs, which its own thresholds do not change."""
    return WholeRecordings(
        np.logical_or.reduceat(ask_rows(voters, decision), voters.starts, axis=0),
        voters.highest,
        np.maximum.reduceat(voters.strength, voters.starts, axis=0),
    )


def ask_recordings(gathered: WholeRecordings, decision: Decision) -> np.ndarray:
    """Apply the thresholds of whole recordings; see `decide_recordings`."""
    is_sure = gathered.highest >= decision.file_threshold
    agreed = agree(is_sure, decision)
    return keep_strongest(gathered.in_a_row & agreed, gathered.strength, decision.file_max_birds)


def _needed(n_voters: int, decision: Decision) -> int:
    return decision.n_votes(n_voters) if decision.combination == "votes" else 1


def keep_strongest(chosen: np.ndarray, strength: np.ndarray, max_birds: int) -> np.ndarray:
    if chosen.shape[1] <= max_birds or not (chosen.sum(axis=1) > max_birds).any():
        return chosen
    # Stable sorting: equal strengths go by class order, on every machine.
    order = np.argsort(np.where(chosen, -strength, np.inf), axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    return chosen & (rank < max_birds)


def label_rows(chosen: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Write each boolean row ``(rows, classes)`` as the competition does: codes, or ``nocall``."""
    names = np.asarray(classes, dtype=object)
    return [" ".join(names[row]) if row.any() else NOCALL for row in chosen]
