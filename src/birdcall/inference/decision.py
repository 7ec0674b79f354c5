"""Turn probabilities into labels: the one rule that evaluation chooses and the kernel applies.

In this order: bring each class's background to a common level, calibrate each member, combine the
members, smooth over neighbouring segments, compare each segment's clipwise and framewise
probability with thresholds, and the highest one of the whole recording (the gate), limit the
number of species.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from birdcall.config import NOCALL, config_from_dict, require, require_choice, require_share
from birdcall.inference.background import Background
from birdcall.inference.predictions import MIN_PROBABILITY, Calibration
from birdcall.inference.windows import SINGLE_SEGMENT, WindowConfig
from birdcall.storage.files import write_atomically

_AVERAGES = ("mean", "rms", "geometric")
_COMBINATIONS = (*_AVERAGES, "votes")


@dataclass(frozen=True)
class Decision:
    """The rule that decides which species are in a segment, and in a whole recording.

    A species is in a segment if clip and frames agree (1st place): its clipwise probability reaches
    ``clip_threshold``, its framewise one ``frame_threshold``, and, if there is a gate (7th place),
    its highest clipwise probability in the whole recording ``recording_threshold``. Probabilities
    are the members' ``mean``, root mean square (``rms``, 2nd place) or ``geometric`` mean, or
    thresholds apply to each member alone and ``vote_share`` of the members must agree (``votes``,
    1st place). Before, a segment is averaged with its neighbours' ``neighbour_weight`` (3rd place).

    A row of site 3 is a whole recording: its species are those of any segment whose highest
    clipwise probability reaches ``file_threshold``.

    floor: a clipwise probability of each class that sound of the site reaches without it (see
    `evaluation.calibration.find_floor`): a name must reach this, too; empty where it is not known.

    classes: those of the members, in order; empty where the decision suits any. weights: the sha256
    of each member's weights. chosen_on: the rows that the rule was chosen on; score: its scores
    there, with the names per hour of sound that has no known bird.
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
    window_segments: int = 1  # these three are the `WindowConfig` of the members
    context_seconds: float = 0.0
    shifts: int = 1
    background: Background | None = None
    calibration: Calibration | None = None
    floor: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    weights: dict[str, str] = field(default_factory=dict)  # by member
    chosen_on: str = ""
    score: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_choice("combination", self.combination, _COMBINATIONS)
        for name in _SHARES:
            require_share(name, getattr(self, name))
        _ = self.window_config  # raises for wrong values
        for name in ("max_birds", "file_max_birds"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and value >= 1,
                f"{name} is {value}; give an integer above 0",
            )
        for value in self.floor:
            require_share("floor", value)
        parts = {
            "floor": self.floor or None,
            "calibration": self.calibration and self.calibration.clip_scale,
            "background": self.background and self.background.clip,
        }
        for name, values in parts.items():
            n_own, n_classes = len(values or ()), len(self.classes)
            require(
                values is None or n_classes in (0, n_own),
                f"the {name} is for {n_own} classes, the decision for {n_classes}",
            )

    @property
    def window_config(self) -> WindowConfig:
        """Return the windows that the members must predict."""
        return WindowConfig(self.window_segments, self.context_seconds, self.shifts)

    def n_votes(self, n_voters: int) -> int:
        """Return how many of ``n_voters`` must agree; 1 where members do not vote."""
        if self.combination != "votes":
            return 1
        return max(1, math.ceil(round(self.vote_share * n_voters, 9)))

    def clip_thresholds(self, dtype: np.dtype) -> np.ndarray:
        """Return the clip threshold ``()``, or with a floor that of each class ``(classes,)``."""
        if not self.floor:
            return np.asarray(self.clip_threshold, dtype)
        return np.maximum(self.clip_threshold, self.floor).astype(dtype)

    @property
    def names_nothing(self) -> bool:
        """Return whether a threshold is 1, which the search chooses where silence scores best."""
        return max(self.clip_threshold, self.frame_threshold, self.recording_threshold) >= 1

    def describe(self) -> str:
        """Return the rule in words."""
        if self.names_nothing:
            return "names no bird, since only a probability of 1 would pass"
        if self.combination == "votes":
            if n_members := len(self.members):
                share = f"{self.n_votes(n_members)} of {n_members}"
            else:
                names = {0.5: "half of the", 1.0: "all"}
                share = names.get(self.vote_share, f"{self.vote_share:.0%} of the")
            parts = [f"{share} members have clip"]
        else:
            kind = {"mean": "", "rms": "root-mean-square ", "geometric": "geometric-mean "}
            parts = [f"{kind[self.combination]}clip"]
        parts[0] += f" probability >= {self.clip_threshold:g}"
        if n_above := sum(value > self.clip_threshold for value in self.floor):
            parts.append(f"(the floor of {n_above} classes is higher, up to {max(self.floor):.2g})")
        parts.append(f"and frame probability >= {self.frame_threshold:g}")
        if self.recording_threshold > 0:
            parts.append(f"(>= {self.recording_threshold:g} anywhere in the recording)")
        if self.neighbour_weight > 0:
            parts.append(f"smoothed over neighbours that weigh {self.neighbour_weight:g}")
        if self.background is not None:
            parts.append("above each class's background in the recording")
        if self.calibration is not None:
            parts.append("after calibration")
        if self.window_config != SINGLE_SEGMENT:
            length, hop = self.window_config.window_seconds, self.window_config.hop_seconds
            parts.append(f"in windows of {length:g} s every {hop:g} s")
        parts[-1] += f", at most {self.max_birds} species"
        counts = [
            f"{self.score[key]:.3g} (in {self.score[f'{audio}_nocall_hours']:.2g} h of {audio} "
            "soundscapes)"
            for audio in ("simulated", "labelled")
            if (key := f"{audio}_false_names_per_hour") in self.score
        ]
        if counts:
            parts[-1] += ", false names per hour without known birds: " + " and ".join(counts)
        if "unlabelled_names_per_hour" in self.score:
            count = self.score["unlabelled_names_per_hour"]
            parts[-1] += f", names per hour of unlabelled soundscapes: {count:.3g}"
        return " ".join(parts)


_SHARES = (
    *("vote_share", "clip_threshold", "frame_threshold", "recording_threshold"),
    *("neighbour_weight", "file_threshold"),
)


def write_decision(path: Path, decision: Decision) -> None:
    write_atomically(path, json.dumps(asdict(decision), indent=1) + "\n")


def read_decision(path: Path) -> Decision:
    """Read ``decision.json``; errors name the file and what is wrong in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such decision; `birdcall evaluate` writes one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, kind in (("calibration", Calibration), ("background", Background)):
            if values.get(name) is not None:
                values[name] = config_from_dict(kind, values[name])
        return config_from_dict(Decision, values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable decision: {error}") from error


# --- applying it ----------------------------------------------------------------------------------


class VoterPredictions(NamedTuple):
    """What the thresholds are compared with: each member's probabilities, or all combined into one.

    A voter is a member where members vote; else there is one voter, their average. clipwise,
    framewise: ``(voters, rows, classes)``, calibrated and smoothed. strength: ``(rows, classes)``,
    ranks the species of a row. starts: the first row of each recording.
    """

    clipwise: np.ndarray
    framewise: np.ndarray
    strength: np.ndarray
    starts: np.ndarray

    def highest(self) -> np.ndarray:
        """Return each recording's highest clipwise values, ``(voters, recordings, classes)``."""
        return np.maximum.reduceat(self.clipwise, self.starts, axis=1)

    def passes_gate(self, threshold: float) -> np.ndarray:
        """Return which species are anywhere in the row's recording, ``(voters, rows, classes)``."""
        lengths = np.diff([*self.starts, self.clipwise.shape[1]])
        return np.repeat(self.highest() >= threshold, lengths, axis=1)


def average_members(probabilities: np.ndarray, combination: str = "mean") -> np.ndarray:
    """Average members' probabilities: ``(members, rows, classes)`` → ``(rows, classes)``.

    ``rms`` is the root of the mean of their squares: the most certain member counts most. In the
    ``geometric`` mean the least certain member counts most: a class needs all members.
    """
    require_choice("combination", combination, _AVERAGES)
    require(
        probabilities.ndim == 3,
        f"probabilities have shape {probabilities.shape}; give (members, rows, classes)",
    )
    require(
        bool(np.isfinite(probabilities).all()),
        "the probabilities of a member hold NaN or infinity",
    )
    if len(probabilities) == 1:
        return probabilities[0]
    # Sorted first, so that rounding does not depend on the order of the members.
    ordered = np.sort(probabilities, axis=0)
    if combination == "mean":
        return ordered.mean(axis=0)
    if combination == "geometric":
        return np.exp(np.log(np.maximum(ordered, MIN_PROBABILITY)).mean(axis=0))
    return np.sqrt(np.square(ordered).mean(axis=0))


def combine_members(
    clipwise: np.ndarray,
    framewise: np.ndarray,
    decision: Decision,
    starts: np.ndarray | None = None,
) -> VoterPredictions:
    """Align, calibrate, combine and smooth ``(members, rows, classes)``: all before thresholds.

    Rows are all segments of one recording after another; ``starts`` are the recordings' first rows
    (None: there is one recording).
    """
    starts = np.zeros(1, np.intp) if starts is None else np.asarray(starts)
    if decision.background is not None:
        clipwise, framewise = decision.background.apply(clipwise, framewise, starts)
    if decision.calibration is not None:
        clipwise, framewise = decision.calibration.apply(clipwise, framewise)
    if decision.combination != "votes":
        clipwise = average_members(clipwise, decision.combination)[None]
        framewise = average_members(framewise, decision.combination)[None]
    clipwise = _smooth_neighbours(clipwise, decision.neighbour_weight, starts)
    framewise = _smooth_neighbours(framewise, decision.neighbour_weight, starts)
    strength = average_members(clipwise * framewise)  # raises for NaN or infinity in either
    return VoterPredictions(clipwise, framewise, strength, starts)


def _smooth_neighbours(probabilities: np.ndarray, weight: float, starts: np.ndarray) -> np.ndarray:
    """Average each row of ``(…, rows, classes)`` with the rows before and after it.

    Each neighbour weighs ``weight``, the row itself 1; other recordings are no neighbours.
    """
    n_rows = probabilities.shape[-2]
    if weight == 0 or n_rows == 1:
        return probabilities
    is_first = np.zeros(n_rows, dtype=bool)
    is_first[starts] = True
    # The weight between each row and the next, ``(rows - 1, 1)``.
    between = np.where(is_first[1:], 0, weight).astype(probabilities.dtype)[:, None]
    total = np.ones((n_rows, 1), probabilities.dtype)
    total[1:] += between
    total[:-1] += between
    smooth = probabilities.copy()
    smooth[..., 1:, :] += between * probabilities[..., :-1, :]
    smooth[..., :-1, :] += between * probabilities[..., 1:, :]
    smooth /= total
    return smooth


def decide_segments(
    clipwise: np.ndarray,
    framewise: np.ndarray,
    decision: Decision,
    starts: np.ndarray | None = None,
) -> np.ndarray:
    """Return which species are in each row: ``(members, rows, classes)`` → ``(rows, classes)``.

    ``framewise`` is the highest probability of any frame of the row. Rows are all segments of one
    recording after another; ``starts`` are the recordings' first rows (None: one recording).
    """
    voters = combine_members(clipwise, framewise, decision, starts)
    return _apply_segment_thresholds(voters, decision)


def decide_recordings(
    clipwise: np.ndarray,
    framewise: np.ndarray,
    decisions: Sequence[Decision],
    starts: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Return which species are in each whole recording, as rows of site 3 need it.

    Takes what `decide_segments` takes, but several decisions, which differ only in their thresholds
    of whole recordings; returns ``(recordings, classes)`` for each of them.
    """
    voters = combine_members(clipwise, framewise, decisions[0], starts)
    in_a_row = _apply_segment_thresholds(voters, decisions[0])
    in_a_segment = np.logical_or.reduceat(in_a_row, voters.starts, axis=0)
    highest = voters.highest()
    strength = np.maximum.reduceat(voters.strength, voters.starts, axis=0)
    decided = []
    for decision in decisions:
        passed = highest >= decision.file_threshold
        agreed = passed.sum(axis=0) >= decision.n_votes(len(passed))
        decided.append(limit_species(in_a_segment & agreed, strength, decision.file_max_birds))
    return decided


def _apply_segment_thresholds(voters: VoterPredictions, decision: Decision) -> np.ndarray:
    """Return the species of each row, ``(rows, classes)``."""
    passed = voters.clipwise >= decision.clip_thresholds(voters.clipwise.dtype)
    passed &= voters.framewise >= decision.frame_threshold
    if decision.recording_threshold > 0:
        passed &= voters.passes_gate(decision.recording_threshold)
    agreed = passed.sum(axis=0) >= decision.n_votes(len(passed))
    return limit_species(agreed, voters.strength, decision.max_birds)


def limit_species(chosen: np.ndarray, strength: np.ndarray, max_species: int) -> np.ndarray:
    """Return ``chosen`` ``(rows, classes)`` with no more than the strongest species of each row."""
    if chosen.shape[1] <= max_species or not (chosen.sum(axis=1) > max_species).any():
        return chosen
    # Stable sorting: equal strengths go by class order, on every machine.
    order = np.argsort(np.where(chosen, -strength, np.inf), axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    return chosen & (rank < max_species)


def label_strings(chosen: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Return each boolean row ``(rows, classes)`` as the competition writes it, or ``nocall``."""
    names = np.asarray(classes, dtype=object)
    return [" ".join(names[row]) if row.any() else NOCALL for row in chosen]
