"""Keep decoded, resampled recordings on disk, so that training reads a clip in no time."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from birdcall.audio.reading import AudioError, read_crops
from birdcall.storage.files import atomic_path

log = logging.getLogger(__name__)

CACHE_SAMPLE_RATE = 32_000
HEADER_BYTES = 128  # of the .npy files here; numpy pads the header to it
MIN_PEAK, MAX_INT = 2**-10, 32767
SPOOL_BYTES = 64 << 20  # floats kept in memory until the peak is known: 8 minutes


@dataclass(frozen=True)
class Cache:
    """A folder of waveforms, int16 mono ``.npy`` each, named by path, size and time of the source.

    A source that changes gets another name, so what is stale is never read.
    """

    root: Path
    sample_rate: int = CACHE_SAMPLE_RATE

    def path_of(self, data: Path, name: str) -> Path:
        """Return where the recording ``data / name`` is kept, whether or not it is there yet."""
        state = (data / name).stat()
        return self.root / str(self.sample_rate) / f"{name}.{state.st_size}-{state.st_mtime_ns}.npy"

    def has(self, data: Path, name: str) -> bool:
        return self.path_of(data, name).is_file()

    def read_crops(
        self,
        data: Path,
        name: str,
        offsets: Sequence[float],
        duration_seconds: float | None,
        downmix: float | None = None,
    ) -> list[np.ndarray]:
        """Read as `audio.read_crops` does, from the cache where the recording is there.

        Cached sound is mono, its channels averaged: ``downmix`` has no effect on it.
        """
        path, rate = self.path_of(data, name), self.sample_rate
        try:
            return [read_cached(path, offset, duration_seconds, rate) for offset in offsets]
        except FileNotFoundError:
            return read_crops(data / name, rate, offsets, duration_seconds, downmix)

    def write(self, data: Path, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Keep the waveform that ``blocks`` make up; whole or not at all, in place of older ones.

        ``blocks`` are at the cache's sample rate. Raises AudioError where they hold no samples.
        """
        path = self.path_of(data, name)
        with atomic_path(path) as temporary:
            if not write_waveform(temporary, blocks):
                raise AudioError(data / name, "has no samples; empty or damaged")
        for older in path.parent.glob(f"{glob.escape(Path(name).name)}.*-*.npy"):
            if older != path:
                older.unlink(missing_ok=True)

    def require_space(self, seconds: float) -> None:
        """Log how much disk this much sound needs; raise OSError where there is less."""
        self.root.mkdir(parents=True, exist_ok=True)
        needed = seconds * self.sample_rate * np.dtype(np.int16).itemsize
        free = shutil.disk_usage(self.root).free
        text = f"the cache needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {self.root}"
        if needed > free:
            raise OSError(f"{text}; make room or do without the cache")
        log.info("%s", text)

    def remove_leftovers(self) -> None:
        """Delete what a killed run was writing."""
        for temporary in self.root.rglob(".*.npy"):
            temporary.unlink(missing_ok=True)


def write_waveform(path: Path, blocks: Iterable[np.ndarray]) -> int:
    """Write float blocks as one int16 ``.npy`` and return how many samples they had.

    The peak takes the highest number, whether it is far below full scale or, as in many an mp3,
    above: rounding costs less than 2e-5 of the peak. The step is a float32 behind the array.
    """
    peak = MIN_PEAK
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=path.parent) as spool:
        for block in blocks:
            spool.write(np.asarray(block, "<f4").tobytes())
            peak = max(peak, float(np.abs(block).max(initial=0)))
        n_samples = spool.tell() // 4
        spool.seek(0)
        step = np.array(peak / MAX_INT, "<f4")
        with path.open("wb") as file:
            header = {"descr": "<i2", "fortran_order": False, "shape": (n_samples,)}
            np.lib.format.write_array_header_1_0(file, header)
            if file.tell() != HEADER_BYTES:
                raise RuntimeError(f"{path}: numpy wrote {file.tell()} bytes of header")
            while chunk := spool.read(1 << 22):
                file.write(_to_integers(np.frombuffer(chunk, "<f4"), step).tobytes())
            file.write(step.tobytes())
    return n_samples


def as_cached(waveform: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Return what `write_waveform` would write: int16 ``(samples,)`` and their step, to the bit."""
    peak = max(MIN_PEAK, float(np.abs(waveform).max(initial=0)))
    step = np.array(peak / MAX_INT, "<f4")
    return _to_integers(waveform, step), step[()]


def _to_integers(waveform: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.rint(waveform / step).clip(-MAX_INT, MAX_INT).astype("<i2")


def cached_samples(path: Path) -> int:
    """Say how many samples a file of `write_waveform` has; raises FileNotFoundError."""
    return (path.stat().st_size - 4 - HEADER_BYTES) // 2


def read_cached(
    path: Path,
    offset_seconds: float = 0.0,
    duration_seconds: float | None = None,
    sample_rate: int = CACHE_SAMPLE_RATE,
) -> np.ndarray:
    """Read a stretch ``(samples,)``, float32, of a file that `Cache.write` made.

    Raises FileNotFoundError, or AudioError where the file is shorter than that.
    """
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        step = np.frombuffer(file.read(4), "<f4")[0]
        total = (file.tell() - 4 - HEADER_BYTES) // 2
        start = round(offset_seconds * sample_rate)
        n_samples = total - start
        if duration_seconds is not None:
            n_samples = round(duration_seconds * sample_rate)
            start -= start + n_samples == total + 1 and start > 0  # as in `read_audio`
        if start < 0 or n_samples <= 0 or start + n_samples > total:
            asked = "its end" if duration_seconds is None else f"{duration_seconds:g} s"
            has = f"{total / sample_rate:g} s"
            raise AudioError(path, f"asked for {asked} from {offset_seconds:g} s, has {has}")
        file.seek(HEADER_BYTES + 2 * start)
        samples = np.fromfile(file, "<i2", n_samples)  # faster than mapping the file to memory
    return np.multiply(samples, step, dtype=np.float32)
