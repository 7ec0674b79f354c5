"""Predict audio of any length with an ensemble: the same for kernel, validation and `predict`.

Threads read ahead and cut windows; batches of windows run at once, one on each core or GPU; results
are in the order of the sources. Memory does not grow with the length of a recording.

The rounding of a number depends on the shape of a batch and on the position in it. On a CPU, where
batches are small, each batch holds windows of one recording only: its predictions are the same to
the bit whatever else is predicted. A GPU needs large batches: they mix recordings.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from birdcall.audio.frontend import LogMel
from birdcall.audio.reading import AudioError, iterate_rates, reuse_freed_memory
from birdcall.config import FrontendConfig
from birdcall.inference.ensemble import READING, Ensemble
from birdcall.inference.predictions import (
    SEGMENTS_ONLY,
    OutputOptions,
    SegmentPredictions,
    average_windows,
)
from birdcall.inference.windows import (
    AudioSource,
    End,
    Waveforms,
    Window,
    WindowConfig,
    cut_windows,
)

_WITH_FRAMES = OutputOptions(frames=True)
_MAX_READERS = 8
_READ_AHEAD_SEGMENTS = 32  # of each reader
_N_SAMPLED, _MIN_EACH = 200, 4  # windows of `sample_log_mels`, and of each recording

# Returns how many members predict a recording that begins, the first ones; at 0 all ends there.
_MemberLimit = Callable[[str], int]


# --- a stream of parts of recordings --------------------------------------------------------------


def predict_stream(
    ensemble: Ensemble,
    sources: Mapping[str, AudioSource],
    outputs: OutputOptions = SEGMENTS_ONLY,
    limit_members: _MemberLimit | None = None,
) -> Iterator[tuple[str, SegmentPredictions | End | AudioError]]:
    """Yield the predictions of the sources, in order: consecutive parts of each, then its end.

    A source that does not decode ends with its `AudioError`, perhaps after some parts.
    """
    shifts = ensemble.window_config.shifts
    with closing(_predict_windows(ensemble, sources, outputs, limit_members)) as stream:
        yield from stream if shifts == 1 else average_shifted(stream, shifts)


def _predict_windows(
    ensemble: Ensemble,
    sources: Mapping[str, AudioSource],
    outputs: OutputOptions,
    limit_members: _MemberLimit | None,
) -> Iterator[tuple[str, SegmentPredictions | End | AudioError]]:
    """Yield what `predict_stream` yields, or with shifts a segment for each window."""
    running: deque[tuple[_Batch, Future[SegmentPredictions] | None]] = deque()
    with closing(_read_ahead(ensemble, sources)) as items:
        for number, batch in enumerate(_make_batches(ensemble, items, limit_members)):
            replica = ensemble.replicas[number % len(ensemble.replicas)]
            future = None
            if batch.n_windows:
                windows = [item for _, item in batch.items if isinstance(item, Window)]
                waveforms = {
                    rate: np.stack([window.waveforms[rate] for window in windows])
                    for rate in ensemble.sample_rates
                }
                future = replica.threads.submit(
                    ensemble.predict_batch,
                    replica=replica,
                    waveforms=waveforms,
                    n_members=batch.n_members,
                    outputs=outputs,
                )
            running.append((batch, future))
            if len(running) > ensemble.n_threads + 1:
                yield from _split_batch(ensemble, *running.popleft())
        while running:
            yield from _split_batch(ensemble, *running.popleft())


def average_shifted(
    stream: Iterable[tuple[str, SegmentPredictions | End | AudioError]], shifts: int
) -> Iterator[tuple[str, SegmentPredictions | End | AudioError]]:
    """Yield the segments of a stream whose windows begin ``shifts`` times in a segment's length.

    A segment's probabilities and embedding are the mean over the windows that overlap with it, by
    more than nothing: 2 * shifts - 1 of them, fewer at the beginning and the end of a recording.
    Its frames are the mean over the windows that hold them. Memory holds a few windows.
    """
    windows: SegmentPredictions | None = None  # those that later segments need
    first = n_yielded = 0  # number of the first of them; segments that have been yielded
    for name, item in stream:
        if isinstance(item, SegmentPredictions):
            parts = [item] if windows is None else [windows, item]
            windows = SegmentPredictions.concatenate(parts)
            n_windows = first + windows.n_segments
            n_complete = n_windows // shifts  # the last window that it needs is there
        else:
            n_complete = 0 if windows is None else (first + windows.n_segments - 1) // shifts + 1
        if n_complete > n_yielded:
            yield name, average_windows(windows, first, range(n_yielded, n_complete), shifts)
            n_yielded = n_complete
            n_unneeded = max(0, shifts * (n_yielded - 1) + 1 - first)
            windows, first = windows.copy_from(n_unneeded), first + n_unneeded
        if not isinstance(item, SegmentPredictions):
            yield name, item
            windows, first, n_yielded = None, 0, 0


@dataclass
class _Batch:
    """Windows that run together, of one source or several, with the ends between them."""

    n_members: int
    n_windows: int = 0
    items: list[tuple[str, Window | End | AudioError]] = field(default_factory=list)


def _make_batches(
    ensemble: Ensemble,
    items: Iterable[tuple[str, Window | End | AudioError]],
    limit_members: _MemberLimit | None,
) -> Iterator[_Batch]:
    n_members = len(ensemble.members)
    batch = _Batch(n_members)
    current_name = None
    for name, item in items:
        if isinstance(item, Window):
            if name != current_name:
                current_name = name
                n_members = limit_members(name) if limit_members else n_members
            if n_members == 0:
                break
            if n_members != batch.n_members:
                yield batch
                batch = _Batch(n_members)
            batch.n_windows += 1
        batch.items.append((name, item))
        source_ended = not isinstance(item, Window)
        is_full = batch.n_windows == ensemble.batch_windows
        if is_full or (source_ended and not ensemble.mixes_recordings):
            yield batch
            batch = _Batch(n_members)
    yield batch


def _split_batch(
    ensemble: Ensemble, batch: _Batch, future: Future[SegmentPredictions] | None
) -> Iterator[tuple[str, SegmentPredictions | End | AudioError]]:
    """Yield the predictions of each source in a batch, and the ends between them, in order."""
    predictions = None if future is None else future.result()
    start = n_segments = 0  # of the source's part, in the batch
    for index, (name, item) in enumerate(batch.items):
        if not isinstance(item, Window):
            yield name, item
            continue
        n_segments += item.n_segments
        following = batch.items[index + 1 : index + 2]
        if following and following[0][0] == name and isinstance(following[0][1], Window):
            continue
        yield name, predictions.select(slice(start, start + n_segments))
        # Only the last window of a source can have fewer segments than the network predicts.
        n_windows = -(-n_segments // ensemble.window_config.window_segments)
        start += n_windows * ensemble.window_config.window_segments
        n_segments = 0


# --- reading ahead --------------------------------------------------------------------------------


def _read_ahead(
    ensemble: Ensemble, sources: Mapping[str, AudioSource]
) -> Iterator[tuple[str, Window | End | AudioError]]:
    """Yield the windows of the sources in order, read in threads.

    The first of n readers reads the sources 0, n, 2n, …, the second 1, n + 1, 2n + 1, …
    """
    reuse_freed_memory()
    n_readers = min(len(sources), max(1, torch.get_num_threads() // 2), _MAX_READERS)
    n_ahead = max(2, _READ_AHEAD_SEGMENTS // ensemble.window_config.window_segments)
    names = list(sources)
    readers: list[_Reader] = []
    try:
        for number in range(n_readers):
            to_read = [sources[name] for name in names[number::n_readers]]
            readers.append(_Reader(ensemble, to_read, n_ahead))
        for index, name in enumerate(names):
            item: Window | End | AudioError | _Crash | None = None
            while not isinstance(item, End | AudioError):
                item = readers[index % n_readers].queue.get()
                if isinstance(item, _Crash):
                    raise item.error
                yield name, item
    finally:
        for reader in readers:
            reader.is_stopped.set()
            while reader.thread.is_alive():
                try:  # the thread may be waiting for room in the queue
                    reader.queue.get(timeout=0.01)
                except queue.Empty:
                    continue


class _Crash(NamedTuple):
    error: Exception


class _Reader:
    """A thread that reads sources into a queue until it is full, and ends when it is stopped."""

    def __init__(self, ensemble: Ensemble, sources: Sequence[AudioSource], n_ahead: int) -> None:
        self.ensemble, self.sources = ensemble, sources
        self.queue: queue.Queue[Window | End | AudioError | _Crash] = queue.Queue(n_ahead)
        self.is_stopped = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        window_seconds = self.ensemble.window_config.hop_seconds
        for source in self.sources:
            windows = self._cut(source)
            while True:
                with self.ensemble.costs.measure(READING, window_seconds):
                    item = next(windows, None)
                if self.is_stopped.is_set():
                    return
                if item is None:
                    break
                self.queue.put(item)

    def _cut(self, source: AudioSource) -> Iterator[Window | End | AudioError | _Crash]:
        try:
            audio = source(self.ensemble.sample_rates)
            yield from cut_windows(audio, self.ensemble.window_config)
        except AudioError as error:
            yield error
        except Exception as error:  # raised again in the thread that waits for the window
            yield _Crash(error)


def open_recording(path: Path, limit_seconds: float | None = None) -> AudioSource:
    """Return a recording, or its first ``limit_seconds``, as a source."""
    return partial(_read_blocks, path, limit_seconds)


def _read_blocks(
    path: Path, limit_seconds: float | None, sample_rates: Sequence[int]
) -> Iterator[Waveforms]:
    n_read = dict.fromkeys(sample_rates, 0)
    try:
        with closing(iterate_rates(path, sample_rates)) as blocks:
            for block in blocks:
                if limit_seconds is not None:
                    n_left = {rate: round(limit_seconds * rate) - n_read[rate] for rate in block}
                    block = {rate: waveform[: n_left[rate]] for rate, waveform in block.items()}
                for rate, waveform in block.items():
                    n_read[rate] += len(waveform)
                yield block
                if limit_seconds is not None and all(
                    n_read[rate] >= round(limit_seconds * rate) for rate in n_read
                ):
                    return
    except OSError as error:  # a file that was removed since it was listed, a disk that fails
        raise AudioError(path, f"cannot be read: {error.strerror or error}") from error


# --- whole recordings -----------------------------------------------------------------------------


def predict_audio(
    ensemble: Ensemble,
    sources: Mapping[str, AudioSource],
    outputs: OutputOptions = _WITH_FRAMES,
    limit_members: _MemberLimit | None = None,
) -> Iterator[tuple[str, SegmentPredictions | AudioError]]:
    """Yield the predictions of each source, in order; see `predict_stream`.

    A source that does not decode yields its `AudioError`.
    """
    parts: list[SegmentPredictions] = []
    with closing(predict_stream(ensemble, sources, outputs, limit_members)) as stream:
        for name, item in stream:
            if isinstance(item, SegmentPredictions):
                parts.append(item)
                continue
            if isinstance(item, AudioError):
                yield name, item
            else:
                whole = SegmentPredictions.concatenate(parts)
                yield name, replace(whole, starts=(0,), recording_seconds=(item.seconds,))
            parts = []


def predict_files(
    ensemble: Ensemble, paths: Mapping[str, Path], limit_seconds: float | None = None
) -> Iterator[tuple[str, SegmentPredictions | AudioError]]:
    """Yield the predictions of recordings, the first ``limit_seconds`` of each, with frames."""
    sources = {name: open_recording(path, limit_seconds) for name, path in paths.items()}
    return predict_audio(ensemble, sources)


def predict_waveforms(ensemble: Ensemble, waveforms: Waveforms) -> SegmentPredictions:
    """Return the predictions, with frames, of ``{sample_rate: waveform (samples,)}``."""
    ((_, predictions),) = predict_audio(ensemble, {"": lambda _: waveforms})
    return predictions


@torch.inference_mode()
def sample_log_mels(
    paths: Sequence[Path], config: FrontendConfig, window_config: WindowConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return log-mels of 200 windows of some recordings, and of other ones, or of all there are."""
    frontend, halves = LogMel(config), ([], [])
    n_each = max(_MIN_EACH, -(-2 * _N_SAMPLED // max(1, len(paths))))
    for index in np.random.default_rng(0).permutation(len(paths)):
        half = min(halves, key=len)
        with closing(open_recording(paths[index])([config.sample_rate])) as blocks:
            for window in islice(cut_windows(blocks, window_config), n_each):
                if isinstance(window, Window) and len(half) < _N_SAMPLED:
                    waveform = torch.from_numpy(window.waveforms[config.sample_rate])
                    half.append(frontend(waveform[None]).numpy())
        if min(map(len, halves)) == _N_SAMPLED:
            break
    first, second = (np.concatenate(half) if half else np.empty(0) for half in halves)
    return first, second
