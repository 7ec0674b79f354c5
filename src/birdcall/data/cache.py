"""Store decoded and resampled recordings on disk, so that training reads a clip quickly."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from birdcall.audio.reading import AudioError, read_crops
from birdcall.storage.store import Store

logger = logging.getLogger(__name__)

_SAMPLE_RATE = 32_000
_SUFFIX, _MODULES = ".npy", ("data.cache",)  # of the store
_HEADER_BYTES = 128  # of the .npy files here; numpy pads the header to it
_STEP_BYTES = 4  # a float32 after the array: what one integer step is worth
_MIN_PEAK, _MAX_INT = 2**-10, 32767
_SPOOL_BYTES = 64 << 20  # floats in memory until the peak is known: 8 minutes


@dataclass(frozen=True)
class CropRequest:
    """Crops of one recording, which is opened once for all of them."""

    path: str  # of the recording, below the data folder
    sample_rate: int  # Hz, of the crops
    offsets: tuple[float, ...] = (0.0,)  # seconds, one per crop
    seconds: float | None = None  # of each crop; None: to the end of the recording
    downmix: float | None = None  # share of the first channel; None: the mean of all channels


# Returns a waveform (samples,), float32, for each offset.
ReadCrops = Callable[[CropRequest], list[np.ndarray]]


@dataclass(frozen=True)
class RecordingCache:
    """A store of decoded recordings, int16 mono ``.npy`` each; called, it reads crops.

    A file's name contains a digest of the size and time of its recording and of the code that
    decodes: an outdated file is never read.
    """

    data: Path  # the data folder, with the recordings
    folder: Path  # of the cache
    sample_rate: int = _SAMPLE_RATE

    def __call__(self, request: CropRequest) -> list[np.ndarray]:
        """Read crops as `audio.read_crops` does, from the cache where the recording is there.

        Cached audio is mono, the mean of its channels: ``downmix`` has no effect on it.
        """
        rate = request.sample_rate
        path = self.path(request.path, rate)
        try:
            return [read_cached(path, offset, request.seconds, rate) for offset in request.offsets]
        except FileNotFoundError:
            return read_crops(
                self.data / request.path,
                rate,
                offsets=request.offsets,
                duration_seconds=request.seconds,
                downmix=request.downmix,
            )

    def path(self, name: str, sample_rate: int | None = None) -> Path:
        """Return where the recording ``name`` is cached, whether or not the file exists.

        Raises OSError where the recording itself is missing.
        """
        state = file_state(self.data / name)
        return _cached_path(self._store(sample_rate).folder, name, **state)

    def write(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Store the waveform that ``blocks`` make up, whole or not at all; delete outdated files.

        ``blocks`` are at the cache's sample rate. Raises AudioError where they have no samples.
        """
        with self._store().writing(name, file_state(self.data / name)) as temporary:
            if not write_waveform(temporary, blocks):
                raise AudioError(self.data / name, "has no samples; empty or damaged")

    def count_missing(self, names: Iterable[str]) -> int:
        """Return how many recordings would be decoded for each clip; 0 where nothing is cached."""
        if not (self.folder / str(self.sample_rate)).is_dir():
            return 0
        return sum(not self.path(name).is_file() for name in names)

    def prepare(self, seconds: float) -> None:
        """Delete temporary files that a killed process has left, and check the free space.

        Log how much disk so much audio needs; raise OSError where less is free.
        """
        self._store().remove_leftovers()
        needed = seconds * self.sample_rate * np.dtype(np.int16).itemsize
        free = self._store().require_space(needed)
        logger.info(
            "the cache needs %.2f GB, %.2f GB are free in %s",
            *(needed / 1e9, free / 1e9, self.folder),
        )

    def _store(self, sample_rate: int | None = None) -> Store:
        folder = self.folder / str(sample_rate or self.sample_rate)
        return Store(folder, _SUFFIX, _MODULES)


@lru_cache(maxsize=1 << 16)  # every epoch reads the same recordings, and the digest takes 0.1 ms
def _cached_path(folder: Path, name: str, size: int, mtime_ns: int) -> Path:
    return Store(folder, _SUFFIX, _MODULES).path(name, {"size": size, "mtime_ns": mtime_ns})


def file_state(path: Path) -> dict[str, int]:
    """Return a file's size and time of change: another content has another state."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def write_waveform(path: Path, blocks: Iterable[np.ndarray]) -> int:
    """Write float blocks as one int16 ``.npy`` and return the number of samples.

    The peak becomes the highest integer, whether it is far below full scale or, as in many mp3
    files, above it: rounding costs less than 2e-5 of the peak. The step is a float32 after the
    array.
    """
    peak = _MIN_PEAK
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES, dir=path.parent) as spool:
        for block in blocks:
            spool.write(np.asarray(block, "<f4").tobytes())
            peak = max(peak, float(np.abs(block).max(initial=0)))
        n_samples = spool.tell() // 4
        spool.seek(0)
        step = np.array(peak / _MAX_INT, "<f4")
        with path.open("wb") as file:
            header = {"descr": "<i2", "fortran_order": False, "shape": (n_samples,)}
            np.lib.format.write_array_header_1_0(file, header)
            if file.tell() != _HEADER_BYTES:
                raise RuntimeError(f"{path}: numpy wrote {file.tell()} bytes of header")
            while chunk := spool.read(1 << 22):
                file.write(_to_integers(np.frombuffer(chunk, "<f4"), step).tobytes())
            file.write(step.tobytes())
    return n_samples


def as_cached(waveform: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Return what `write_waveform` would write: int16 ``(samples,)`` and their step, to the bit."""
    peak = max(_MIN_PEAK, float(np.abs(waveform).max(initial=0)))
    step = np.array(peak / _MAX_INT, "<f4")
    return _to_integers(waveform, step), step[()]


def _to_integers(waveform: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.rint(waveform / step).clip(-_MAX_INT, _MAX_INT).astype("<i2")


def cached_samples(path: Path) -> int:
    """Return the number of samples in a file of `write_waveform`; raises FileNotFoundError."""
    return (path.stat().st_size - _STEP_BYTES - _HEADER_BYTES) // 2


def read_cached(
    path: Path,
    offset_seconds: float = 0.0,
    duration_seconds: float | None = None,
    sample_rate: int = _SAMPLE_RATE,
) -> np.ndarray:
    """Read a part ``(samples,)``, float32, of a file of `write_waveform`; None: to its end.

    Raises FileNotFoundError, or AudioError where the file is shorter.
    """
    with path.open("rb", buffering=0) as file:  # a buffer would be filled for each of the two parts
        file.seek(-_STEP_BYTES, os.SEEK_END)
        total = (file.tell() - _HEADER_BYTES) // 2
        step = np.frombuffer(file.read(_STEP_BYTES), "<f4")[0]
        start = round(offset_seconds * sample_rate)
        n_samples = total - start
        if duration_seconds is not None:
            n_samples = round(duration_seconds * sample_rate)
            is_one_too_late = start + n_samples == total + 1 and start > 0
            if is_one_too_late:  # both were rounded up; as in `read_audio`
                start -= 1
        if start < 0 or n_samples <= 0 or start + n_samples > total:
            asked = "its end" if duration_seconds is None else f"{duration_seconds:g} s"
            has = f"{total / sample_rate:g} s"
            raise AudioError(path, f"asked for {asked} from {offset_seconds:g} s, has {has}")
        file.seek(_HEADER_BYTES + 2 * start)
        samples = np.empty(n_samples, "<i2")
        missing = memoryview(samples).cast("B")
        while missing.nbytes and (n_read := file.readinto(missing)):  # a disk may return less
            missing = missing[n_read:]
        if missing.nbytes:
            raise AudioError(path, "was cut while it was read")
    return np.multiply(samples, step, dtype=np.float32)


def cut_cached(
    cached: tuple[np.ndarray, np.float32], n_samples: int, position: float
) -> np.ndarray:
    """Return ``(n_samples,)`` of what `as_cached` returned, at a share of all its positions."""
    samples, step = cached
    spare = len(samples) - n_samples
    start = min(int(position * (spare + 1)), spare) if spare > 0 else 0
    cut = np.multiply(samples[start : start + n_samples], step, dtype=np.float32)
    # Noise has no beginning: a short file is repeated until the clip is full.
    return cut if spare >= 0 else np.resize(cut, n_samples)


# --- what cannot be read ---


MAX_TRIES = 8  # files that are tried for one that fails; if none of them can be read, none can


class ReadFailure(NamedTuple):
    """A file that could not be read during training, and why, in one line that names the file."""

    kind: str  # "recording" or "noise file"
    path: str
    reason: str

    @classmethod
    def of(cls, kind: str, path: str, error: Exception) -> ReadFailure:
        reason = " ".join(str(error).split())
        return cls(kind, path, reason if path in reason else f"{path}: {reason}")


class NothingReadableError(ValueError):
    """Neither a file nor any that was tried in its place could be read."""
