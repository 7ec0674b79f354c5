"""Hold what the members of an ensemble predict for segments, and calibrate it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from birdcall.config import require
from birdcall.inference.windows import FRAMES_PER_SEGMENT

MIN_PROBABILITY = 1e-7  # a probability of 0 or 1 has no logit


@dataclass(frozen=True)
class OutputOptions:
    """Which outputs are computed beside the clipwise and framewise probabilities of segments.

    frames: the members' mean over time. member_frames: each member's. embedding: the features that
    the heads receive.
    """

    frames: bool = False
    member_frames: bool = False
    embedding: bool = False


SEGMENTS_ONLY = OutputOptions()


@dataclass(frozen=True, eq=False)
class SegmentPredictions:
    """What members predict for consecutive segments, of a recording or of several in a row.

    clipwise, framewise: ``(members, segments, classes)`` probabilities; framewise is the highest of
    the segment's frames. These are None where they were not asked for: frames ``(classes,
    segments * FRAMES_PER_SEGMENT)``, the members' mean over time; member_frames ``(members,
    classes, segments * FRAMES_PER_SEGMENT)``; embedding ``(segments, features)``, of all members
    one after the other.

    starts: the first segment of each recording that begins here; the later parts of a recording
    have none. recording_seconds: the length of each recording, empty where it is not known.
    """

    clipwise: np.ndarray
    framewise: np.ndarray
    frames: np.ndarray | None = None
    member_frames: np.ndarray | None = None
    embedding: np.ndarray | None = None
    starts: tuple[int, ...] = (0,)
    recording_seconds: tuple[float, ...] = ()

    @property
    def n_segments(self) -> int:
        return self.clipwise.shape[1]

    @property
    def seconds(self) -> float:
        """Return the length of the recording, or of all of them together."""
        return sum(self.recording_seconds)

    def select(self, segments: slice | np.ndarray) -> SegmentPredictions:
        """Return some segments, given by a slice, a mask or indices in ascending order.

        A recording of which no segment is selected is left out.
        """
        recording = np.searchsorted(self.starts, np.arange(self.n_segments), side="right") - 1
        recording = recording[segments]
        is_first = (np.diff(recording, prepend=-1) != 0) & (recording >= 0)
        seconds = self.recording_seconds
        if seconds:
            seconds = tuple(seconds[index] for index in recording[is_first])
        embedding = self.embedding
        return SegmentPredictions(
            clipwise=self.clipwise[:, segments],
            framewise=self.framewise[:, segments],
            frames=_select_frames(self.frames, segments),
            member_frames=_select_frames(self.member_frames, segments),
            embedding=None if embedding is None else embedding[segments],
            starts=tuple(np.flatnonzero(is_first).tolist()),
            recording_seconds=seconds,
        )

    def copy_from(self, first: int) -> SegmentPredictions:
        """Return copies of the segments from ``first`` on, so that the other arrays are freed."""
        rest = self.select(slice(first, None))
        arrays = ("clipwise", "framewise", "frames", "member_frames", "embedding")
        copies = {name: getattr(rest, name) for name in arrays}
        return replace(rest, **{k: None if v is None else v.copy() for k, v in copies.items()})

    def split(self) -> list[SegmentPredictions]:
        """Return the predictions of each recording, as views."""
        ends = [*self.starts[1:], self.n_segments]
        parts = []
        # Not by `select`, which looks at all recordings: there can be tens of thousands.
        for index, (start, end) in enumerate(zip(self.starts, ends, strict=True)):
            segments = slice(start, end)
            part = SegmentPredictions(
                clipwise=self.clipwise[:, segments],
                framewise=self.framewise[:, segments],
                frames=_select_frames(self.frames, segments),
                member_frames=_select_frames(self.member_frames, segments),
                embedding=None if self.embedding is None else self.embedding[segments],
                recording_seconds=self.recording_seconds[index : index + 1],
            )
            parts.append(part)
        return parts

    def for_members(self, positions: Sequence[int]) -> SegmentPredictions:
        """Return the predictions of some members, by position, without what is of all together."""
        chosen = list(positions)
        member_frames = self.member_frames
        return replace(
            self,
            clipwise=self.clipwise[chosen],
            framewise=self.framewise[chosen],
            frames=None,
            member_frames=None if member_frames is None else member_frames[chosen],
            embedding=None,
        )

    @staticmethod
    def concatenate(parts: Sequence[SegmentPredictions]) -> SegmentPredictions:
        """Join parts of a recording, or recordings, of the same members in the order given.

        An optional output is there if all parts have it.
        """
        if len(parts) == 1:
            return parts[0]
        lengths = [part.n_segments for part in parts]
        offsets = np.cumsum([0, *lengths[:-1]]).tolist()
        starts = [offset + start for offset, part in zip(offsets, parts, strict=True)
                  for start in part.starts]  # fmt: skip
        return SegmentPredictions(
            clipwise=np.concatenate([part.clipwise for part in parts], axis=1),
            framewise=np.concatenate([part.framewise for part in parts], axis=1),
            frames=_concatenate_optional([part.frames for part in parts], axis=1),
            member_frames=_concatenate_optional([part.member_frames for part in parts], axis=2),
            embedding=_concatenate_optional([part.embedding for part in parts], axis=0),
            starts=tuple(starts),
            recording_seconds=tuple(
                seconds for part in parts for seconds in part.recording_seconds
            ),
        )

    @staticmethod
    def stack_members(parts: Sequence[SegmentPredictions]) -> SegmentPredictions:
        """Join what different members predict for the same segments, in the order given."""
        return replace(
            parts[0],
            clipwise=np.concatenate([part.clipwise for part in parts]),
            framewise=np.concatenate([part.framewise for part in parts]),
            frames=None,
            member_frames=_concatenate_optional([part.member_frames for part in parts], axis=0),
            embedding=None,
        )


def join_outputs(
    by_output: Mapping[str, Sequence[np.ndarray]], outputs: OutputOptions
) -> SegmentPredictions:
    """Lay the segments of all windows in a row, given each network output of each member."""
    clipwise, framewise = (
        np.stack([array.reshape(-1, array.shape[-1]) for array in by_output[name]])
        for name in ("clipwise", "framewise")
    )
    mean_frames = member_frames = embedding = None
    # (windows, classes, frames) → (classes, all frames)
    frames = [
        array.transpose(1, 0, 2).reshape(array.shape[1], -1)
        for array in by_output.get("frames", [])
    ]
    if outputs.frames:
        mean_frames = sum(frames[1:], frames[0]) / np.float32(len(frames))
    if outputs.member_frames:
        member_frames = np.stack(frames)
    if outputs.embedding:
        embedding = np.concatenate(by_output["embedding"], axis=2)
        embedding = embedding.reshape(-1, embedding.shape[2])
    return SegmentPredictions(
        clipwise=clipwise,
        framewise=framewise,
        frames=mean_frames,
        member_frames=member_frames,
        embedding=embedding,
        starts=(),
    )


def average_windows(
    windows: SegmentPredictions, first: int, segments: range, shifts: int
) -> SegmentPredictions:
    """Return ``segments`` as means over ``windows``, of which ``first`` is the first one's number.

    Window number shifts * s begins with segment s.
    """
    n_windows, n_cells = windows.n_segments, FRAMES_PER_SEGMENT // shifts
    own = [shifts * segment - first for segment in segments]
    near = [slice(max(0, w - shifts + 1), min(n_windows, w + shifts)) for w in own]

    def mean_of(array: np.ndarray | None, axis: int) -> np.ndarray | None:
        if array is None:
            return None
        moved = np.moveaxis(array, axis, 0)
        return np.stack([moved[part].mean(axis=0) for part in near], axis=axis)

    def mean_over_time(frames: np.ndarray | None) -> np.ndarray | None:
        """Average each part of a segment's frames over the windows that hold it."""
        if frames is None:
            return None
        parts = frames.reshape(*frames.shape[:-1], n_windows, shifts, n_cells)
        means = []
        for window in own:
            for part in range(shifts):
                # Of window w the part k is where window w + 1 has its part k - 1.
                holders = [
                    parts[..., window + step, part - step, :]
                    for step in range(part - shifts + 1, part + 1)
                    if 0 <= window + step < n_windows
                ]
                means.append(np.mean(holders, axis=0))
        return np.concatenate(means, axis=-1)

    return SegmentPredictions(
        clipwise=mean_of(windows.clipwise, 1),
        framewise=mean_of(windows.framewise, 1),
        frames=mean_over_time(windows.frames),
        member_frames=mean_over_time(windows.member_frames),
        embedding=mean_of(windows.embedding, 0),
        starts=(),
    )


def _select_frames(frames: np.ndarray | None, segments: slice | np.ndarray) -> np.ndarray | None:
    if frames is None:
        return None
    by_segment = frames.reshape(*frames.shape[:-1], -1, FRAMES_PER_SEGMENT)
    selected = by_segment[..., segments, :]
    return selected.reshape(*frames.shape[:-1], -1)


def _concatenate_optional(arrays: Sequence[np.ndarray | None], axis: int) -> np.ndarray | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present, axis=axis) if len(present) == len(arrays) else None


# --- calibration ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Calibration by class: sigmoid(scale * logit(probability) + offset).

    A number for each of the model's classes, in their order, for clipwise and framewise output.
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
                "a scale must be above 0, or it would reverse the ranking",
            )

    @staticmethod
    def identity(n_classes: int) -> Calibration:
        """Return the calibration that changes nothing."""
        ones, zeros = (1.0,) * n_classes, (0.0,) * n_classes
        return Calibration(ones, zeros, ones, zeros)

    def shifted(self, offset: float) -> Calibration:
        """Return this calibration after an offset of all logits, as scores of a domain need it."""
        shifts = {
            f"{output}_offset": tuple(
                round(b + a * offset, 6)
                for a, b in zip(
                    getattr(self, f"{output}_scale"), getattr(self, f"{output}_offset"), strict=True
                )
            )
            for output in ("clip", "frame")
        }
        return replace(self, **shifts)

    def apply(self, clipwise: np.ndarray, framewise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Calibrate probabilities ``(…, classes)``; the results have their dtype."""
        return (
            calibrate(clipwise, self.clip_scale, self.clip_offset),
            calibrate(framewise, self.frame_scale, self.frame_offset),
        )

    def apply_over_time(self, frames: np.ndarray) -> np.ndarray:
        """Calibrate framewise probabilities ``(…, classes, frames)``."""
        over_classes = frames.swapaxes(-1, -2)
        return calibrate(over_classes, self.frame_scale, self.frame_offset).swapaxes(-1, -2)


def to_logits(probabilities: np.ndarray) -> np.ndarray:
    """Return finite logits of probabilities, also of 0 and 1, in their dtype."""
    clipped = np.clip(probabilities, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return np.log(clipped / (1 - clipped))


def to_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the sigmoid of ``logits``, in their dtype."""
    return 1 / (1 + np.exp(-logits))


def calibrate(
    probabilities: np.ndarray, scale: Sequence[float], offset: Sequence[float]
) -> np.ndarray:
    """Return sigmoid(scale * logit(p) + offset) for p ``(…, classes)``, in the same dtype."""
    n_classes = probabilities.shape[-1]
    require(
        n_classes == len(scale),
        f"the calibration is for {len(scale)} classes, the probabilities are of {n_classes}",
    )
    dtype = probabilities.dtype
    logits = to_logits(probabilities) * np.asarray(scale, dtype) + np.asarray(offset, dtype)
    return to_probabilities(logits).astype(dtype, copy=False)
