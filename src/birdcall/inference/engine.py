"""Listen to sound of any length with an ensemble: the same for kernel, validation and `predict`.

Threads read ahead and cut windows, which are scored in batches, one on each core or GPU; what comes
out is in the order of the sounds. Memory does not grow with the length of a recording.

How a number is rounded depends on the shape of a batch and the place in it. On a CPU, where batches
are small, each is of one sound only: its scores are the same to the bit whatever is heard beside
it. A GPU wants large batches, of windows from whatever sounds come next.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from birdcall.audio.reading import AudioError, iterate_rates
from birdcall.config import SEGMENT_SECONDS
from birdcall.inference.ensemble import READING, BatchScores, Ensemble
from birdcall.inference.windows import (
    BLOCK_SECONDS,
    FRAMES_PER_SEGMENT,
    End,
    Sound,
    Waveforms,
    Window,
    cut_windows,
)

MAX_READERS = 8
READ_AHEAD_SEGMENTS = 32  # of each reader


class Piece(NamedTuple):
    """What the members heard in some consecutive segments of a sound.

    clipwise, framewise: ``(members, segments, classes)``. frames: ``(classes, segments *
    FRAMES_PER_SEGMENT)``; embedding: ``(segments, sizes)``; member_frames: ``(members, classes,
    segments * FRAMES_PER_SEGMENT)``; None where not asked for.
    """

    clipwise: np.ndarray
    framewise: np.ndarray
    frames: np.ndarray | None
    embedding: np.ndarray | None
    member_frames: np.ndarray | None = None


@dataclass(frozen=True)
class SegmentPredictions:
    """What the members heard in each segment of one recording.

    clipwise, framewise: ``(members, segments, classes)`` probabilities; framewise is the highest of
    the segment's frames. frames: ``(classes, segments * FRAMES_PER_SEGMENT)``, the members' mean
    over time, or ``(classes, 0)``. seconds: length of the recording.
    """

    clipwise: np.ndarray
    framewise: np.ndarray
    frames: np.ndarray
    seconds: float


# --- hearing, piece by piece ----------------------------------------------------------------------


def hear(
    ensemble: Ensemble,
    sounds: Mapping[str, Sound],
    extra: Sequence[str] = (),
    choose_n_members: Callable[[str], int] | None = None,
) -> Iterator[tuple[str, Piece | End | AudioError]]:
    """Yield what is heard in the sounds, in order: pieces of each, then its end.

    A sound that does not decode ends with its `AudioError`, perhaps after some pieces.
    ``extra``: also "frames", "embedding", and with frames "member_frames". ``choose_n_members`` is
    asked, when a sound begins, how many of the members hear it, the first ones; at 0 nothing more
    is heard.
    """
    scored: deque[tuple[_Batch, Future[BatchScores] | None]] = deque()
    with closing(_read_ahead(ensemble, sounds)) as windows:
        for number, batch in enumerate(_make_batches(ensemble, windows, choose_n_members)):
            lane = ensemble.lanes[number % len(ensemble.lanes)]
            scores = None
            if batch.n_windows:
                waveforms = batch.stack(ensemble)
                scores = lane.threads.submit(
                    ensemble.predict_batch, lane, waveforms, batch.n_members, extra
                )
            scored.append((batch, scores))
            if len(scored) > ensemble.n_threads + 1:
                yield from _take_apart(*scored.popleft())
        while scored:
            yield from _take_apart(*scored.popleft())


@dataclass
class _Batch:
    """Windows to be scored together, of one sound or several, with the ends between them."""

    n_members: int
    n_windows: int = 0
    items: list[tuple[str, Window | End | AudioError]] = field(default_factory=list)

    def stack(self, ensemble: Ensemble) -> dict[int, np.ndarray]:
        """Return all windows ``(windows, samples)`` at each rate."""
        windows = [item for _, item in self.items if isinstance(item, Window)]
        return {
            rate: np.stack([window.waveforms[rate] for window in windows])
            for rate in ensemble.sample_rates
        }


def _make_batches(
    ensemble: Ensemble,
    heard: Iterable[tuple[str, Window | End | AudioError]],
    choose_n_members: Callable[[str], int] | None,
) -> Iterator[_Batch]:
    batch = _Batch(len(ensemble.members))
    current, n_members = None, len(ensemble.members)
    for name, item in heard:
        if isinstance(item, Window):
            if name != current:
                current = name
                n_members = choose_n_members(name) if choose_n_members else n_members
            if not n_members:
                break
            if n_members != batch.n_members:
                yield batch
                batch = _Batch(n_members)
            batch.n_windows += 1
        batch.items.append((name, item))
        is_over = not isinstance(item, Window) and not ensemble.mixes_sounds
        if batch.n_windows == ensemble.batch_windows or is_over:
            yield batch
            batch = _Batch(n_members)
    yield batch


def _take_apart(
    batch: _Batch, future: Future[BatchScores] | None
) -> Iterator[tuple[str, Piece | End | AudioError]]:
    """Yield the pieces of each sound, and the ends between them, in order."""
    scores = None if future is None else future.result()
    n_taken = 0
    windows: list[Window] = []
    for place, (name, item) in enumerate(batch.items):
        if not isinstance(item, Window):
            yield name, item
            continue
        windows.append(item)
        following = batch.items[place + 1] if place + 1 < len(batch.items) else ("", None)
        if following[0] != name or not isinstance(following[1], Window):
            yield name, _cut_piece(scores, n_taken, windows)
            n_taken += len(windows)
            windows = []


def _cut_piece(scores: BatchScores, start: int, windows: Sequence[Window]) -> Piece:
    own = slice(start, start + len(windows))
    n_segments = sum(window.n_segments for window in windows)  # only the last can have fewer
    clipwise, framewise = (
        one[:, own].reshape(len(one), -1, one.shape[-1])[:, :n_segments]
        for one in (scores.clipwise, scores.framewise)
    )
    frames, embedding, member_frames = scores.frames, scores.embedding, scores.member_frames
    n_frames = n_segments * FRAMES_PER_SEGMENT
    if frames is not None:
        frames = _join_windows(frames[own])[:, :n_frames]
    if member_frames is not None:
        member_frames = np.stack([_join_windows(one[own])[:, :n_frames] for one in member_frames])
    if embedding is not None:
        embedding = embedding[own].reshape(-1, embedding.shape[2])[:n_segments]
    return Piece(
        clipwise=clipwise,
        framewise=framewise,
        frames=frames,
        embedding=embedding,
        member_frames=member_frames,
    )


def _join_windows(frames: np.ndarray) -> np.ndarray:
    """Lay windows one after another: ``(windows, classes, frames)`` → ``(classes, all)``."""
    return frames.transpose(1, 0, 2).reshape(frames.shape[1], -1)


# --- reading ahead --------------------------------------------------------------------------------


def _read_ahead(
    ensemble: Ensemble, sounds: Mapping[str, Sound]
) -> Iterator[tuple[str, Window | End | AudioError]]:
    """Yield the windows of the sounds in order, read in threads; each has every so manieth."""
    n_readers = min(len(sounds), max(1, torch.get_num_threads() // 2), MAX_READERS)
    n_ahead = max(2, READ_AHEAD_SEGMENTS // ensemble.listening.window_segments)
    readers = [_Reader(n_ahead) for _ in range(n_readers)]
    names = list(sounds)
    try:
        for number, reader in enumerate(readers):
            reader.start(ensemble, {name: sounds[name] for name in names[number::n_readers]})
        for place, name in enumerate(names):
            item: Window | End | AudioError | None = None
            while not isinstance(item, End | AudioError):
                item = readers[place % n_readers].get()
                yield name, item
    finally:
        for reader in readers:
            reader.stop()


class _Reader:
    """A thread that reads sounds into a queue until it is full, and stops when told to."""

    def __init__(self, n_ahead: int) -> None:
        self.queue: queue.Queue[Window | End | AudioError | _Crash] = queue.Queue(n_ahead)
        self.is_stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, ensemble: Ensemble, sounds: Mapping[str, Sound]) -> None:
        self.thread = threading.Thread(target=self._read, args=(ensemble, sounds), daemon=True)
        self.thread.start()

    def get(self) -> Window | End | AudioError:
        item = self.queue.get()
        if isinstance(item, _Crash):
            raise item.error
        return item

    def stop(self) -> None:
        self.is_stopped.set()
        while self.thread is not None and self.thread.is_alive():
            try:  # it may be waiting for a place
                self.queue.get(timeout=0.01)
            except queue.Empty:
                continue

    def _read(self, ensemble: Ensemble, sounds: Mapping[str, Sound]) -> None:
        sound_seconds = ensemble.listening.window_segments * SEGMENT_SECONDS
        for sound in sounds.values():
            windows = self._cut(ensemble, sound)
            while True:
                with ensemble.costs.measure(READING, sound_seconds):
                    item = next(windows, None)
                if item is None or self.is_stopped.is_set():
                    break
                self.queue.put(item)
            if self.is_stopped.is_set():
                return

    def _cut(
        self, ensemble: Ensemble, sound: Sound
    ) -> Iterator[Window | End | AudioError | _Crash]:
        try:
            yield from cut_windows(sound(ensemble.sample_rates), ensemble.listening)
        except AudioError as error:
            yield error
        except Exception as error:  # to be raised where somebody waits for it
            yield _Crash(error)


class _Crash(NamedTuple):
    error: Exception


def open_recording(path: Path, limit_seconds: float | None = None) -> Sound:
    """Return a recording, or its first ``limit_seconds``, as a sound."""
    return partial(_read_blocks, path, limit_seconds)


def _read_blocks(
    path: Path, limit_seconds: float | None, sample_rates: Sequence[int]
) -> Iterator[Waveforms]:
    n_read = dict.fromkeys(sample_rates, 0)
    try:
        with closing(iterate_rates(path, sample_rates, BLOCK_SECONDS)) as blocks:
            for block in blocks:
                if limit_seconds is not None:
                    left = {rate: round(limit_seconds * rate) - n_read[rate] for rate in block}
                    block = {rate: waveform[: left[rate]] for rate, waveform in block.items()}
                for rate, waveform in block.items():
                    n_read[rate] += len(waveform)
                yield block
                if limit_seconds is not None and all(
                    n_read[rate] >= round(limit_seconds * rate) for rate in n_read
                ):
                    return
    except OSError as error:  # a file that went away since it was listed, a disk that fails
        raise AudioError(path, f"cannot be read: {error.strerror or error}") from error


# --- whole recordings -----------------------------------------------------------------------------


def predict_audio(
    ensemble: Ensemble,
    sounds: Mapping[str, Sound],
    choose_n_members: Callable[[str], int] | None = None,
    with_frames: bool = True,
) -> Iterator[tuple[str, SegmentPredictions | AudioError]]:
    """Score sounds in order; see `hear`. What does not decode yields its `AudioError`."""
    extra = ("frames",) if with_frames else ()
    pieces: list[Piece] = []
    with closing(hear(ensemble, sounds, extra, choose_n_members)) as heard:
        for name, item in heard:
            if isinstance(item, Piece):
                pieces.append(item)
                continue
            if isinstance(item, AudioError):
                yield name, item
            else:
                yield name, _join(ensemble, pieces, item.seconds)
            pieces = []


def _join(ensemble: Ensemble, pieces: Sequence[Piece], seconds: float) -> SegmentPredictions:
    nothing = np.zeros((len(ensemble.classes), 0), np.float32)
    frames = [nothing if piece.frames is None else piece.frames for piece in pieces]
    return SegmentPredictions(
        np.concatenate([piece.clipwise for piece in pieces], axis=1),
        np.concatenate([piece.framewise for piece in pieces], axis=1),
        np.concatenate(frames, axis=1),
        seconds,
    )


def predict_files(
    ensemble: Ensemble, paths: Mapping[str, Path], limit_seconds: float | None = None
) -> Iterator[tuple[str, SegmentPredictions | AudioError]]:
    """Score recordings in order, the first ``limit_seconds`` of each; see `predict_audio`."""
    sounds = {name: open_recording(path, limit_seconds) for name, path in paths.items()}
    return predict_audio(ensemble, sounds)


def predict_waveforms(ensemble: Ensemble, waveforms: Waveforms) -> SegmentPredictions:
    """Score a sound given as ``{sample_rate: waveform (samples,)}``."""
    ((_, scores),) = predict_audio(ensemble, {"": lambda _: waveforms})
    return scores
