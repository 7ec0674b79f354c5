"""Draw stretches of bird-free sound from files, each of which is decoded once per data set."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from birdcall.audio import AudioError, probe_audio, read_audio
from birdcall.data.cache import as_cached, cached_samples, read_cached, write_waveform
from birdcall.files import atomic_path

logger = logging.getLogger(__name__)

MAX_TRIES = 8  # other files that are tried for one that fails; if none of them reads, none will
PIECE_SECONDS = 60.0  # at least, of a long file; a stretch lies within one piece
STORE_BYTES = 8 << 30  # 35 hours at 32 kHz
MIN_FREE_BYTES = 1 << 30  # of the store's disk
LOOK_EVERY = 64  # writes, between two looks at what all workers have written
MEMORY_BYTES = 48 << 20  # of each process, where there is no store: 13 minutes


class ReadFailure(NamedTuple):
    """A file that could not be read while training, and why: one line that names the file."""

    kind: str  # "recording" or "noise file"
    path: str
    reason: str

    @classmethod
    def of(cls, kind: str, path: str, error: Exception) -> ReadFailure:
        reason = " ".join(str(error).split())
        return cls(kind, path, reason if path in reason else f"{path}: {reason}")


class NothingReadableError(ValueError):
    """Neither a file nor any that was tried in its place could be read."""


class NoiseFiles:
    """Bird-free sound files, to be drawn from.

    A file is cut into pieces of a minute or more. A piece is decoded whole and rounded to int16
    steps of its peak, as `cache.Cache` does it. With a ``store``, a folder, that is done once: the
    first process to draw a piece leaves it there for all. Without one, or where the store is full
    (`STORE_BYTES`) or cannot be written, pieces are decoded again when they are no longer in
    memory. What is drawn is the same to the bit in every case.
    """

    def __init__(self, paths: Sequence[Path], sample_rate: int, store: Path | None = None) -> None:
        self.paths = list(paths)
        self.sample_rate = sample_rate
        self.store = _Store(store / str(sample_rate)) if store is not None else None
        self.folders: dict[Path, tuple[str, int]] = {}  # of those drawn: name in the store, pieces
        self.memory: OrderedDict[tuple[Path, int], tuple[np.ndarray, np.float32]] = OrderedDict()

    def draw(
        self, n_samples: int, generator: np.random.Generator, failures: list[ReadFailure]
    ) -> np.ndarray:
        """Read a random stretch ``(n_samples,)``, float32, of a random file.

        Files that cannot be read are added to ``failures`` and another is drawn. Raises
        NothingReadableError after ``MAX_TRIES`` of them.
        """
        place = generator.random()
        for index in self._candidates(generator):
            try:
                return self._read(self.paths[index], n_samples, place)
            except (AudioError, OSError) as error:
                failures.append(ReadFailure.of("noise file", str(self.paths[index]), error))
        n_tries = min(len(self.paths), MAX_TRIES)
        raise NothingReadableError(f"none of {n_tries} noise files can be read")

    def _candidates(self, generator: np.random.Generator) -> Iterator[int]:
        """Yield a file, and others where it fails: a collection is not shuffled for each clip."""
        first = int(generator.integers(len(self.paths)))
        yield first
        others = generator.spawn(1)[0]  # what the clip draws next stays the same
        order = others.permutation(len(self.paths))
        yield from order[order != first][: MAX_TRIES - 1].tolist()

    def _read(self, path: Path, n_samples: int, place: float) -> np.ndarray:
        """Read at ``place``, a share of all that the file's pieces have to choose from."""
        if path not in self.folders:
            n_pieces = max(1, int(probe_audio(path).seconds / PIECE_SECONDS))
            self.folders[path] = _name_of(path), n_pieces
        folder, n_pieces = self.folders[path]
        piece = min(int(place * n_pieces), n_pieces - 1)
        place = place * n_pieces - piece
        if self.store is not None:
            stored = self.store.root / folder / f"{piece}-of-{n_pieces}.npy"
            try:
                return _cut_stored(stored, n_samples, place, self.sample_rate)
            except OSError:  # most often it is not there yet
                if self.store.is_open:
                    waveform = self._decode(path, piece, n_pieces)
                    self.store.write(stored, waveform)
                    return _cut(*as_cached(waveform), n_samples, place)
        return _cut(*self._remember(path, piece, n_pieces), n_samples, place)

    def _remember(self, path: Path, piece: int, n_pieces: int) -> tuple[np.ndarray, np.float32]:
        """Return a piece from memory, or decode it and forget those not used for longest."""
        kept = self.memory.pop((path, piece), None)
        kept = as_cached(self._decode(path, piece, n_pieces)) if kept is None else kept
        self.memory[path, piece] = kept
        while sum(samples.nbytes for samples, _ in self.memory.values()) > MEMORY_BYTES:
            self.memory.popitem(last=False)
        return kept

    def _decode(self, path: Path, piece: int, n_pieces: int) -> np.ndarray:
        """Decode one of ``n_pieces`` of equal length; the last one goes on to where the file ends.

        By what decodes, that is: the header of an mp3 can promise a little more.
        """
        seconds = probe_audio(path).seconds / n_pieces
        duration = seconds if piece + 1 < n_pieces else None
        return read_audio(path, self.sample_rate, piece * seconds, duration)


class _Store:
    """A folder of pieces, shared by the workers of all runs, within a limit of bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.n_writes = 0
        self.is_open = True

    def write(self, path: Path, waveform: np.ndarray) -> None:
        """Keep a piece, in place of those of an older state of its file, if there is room."""
        if not self.is_open:
            return
        try:
            if self.n_writes % LOOK_EVERY == 0 and (reason := self._why_full()):
                self._close(reason)
                return
            self.n_writes += 1
            with atomic_path(path) as temporary:
                write_waveform(temporary, [waveform])
            for older in path.parent.parent.iterdir():
                if older != path.parent:
                    shutil.rmtree(older, ignore_errors=True)
        except OSError as error:
            self._close(str(error))

    def _why_full(self) -> str:
        self.root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.root).free < MIN_FREE_BYTES:
            return f"less than {MIN_FREE_BYTES / 1e9:.1f} GB of disk are left"
        n_bytes = sum(map(_size_of, self.root.rglob("*.npy")))
        return f"it has {n_bytes / 1e9:.1f} GB" if n_bytes > STORE_BYTES else ""

    def _close(self, reason: str) -> None:
        self.is_open = False
        text = "decoded noise is no longer kept in %s, which makes clips slower: %s"
        logger.warning(text, self.root, reason)


def _name_of(path: Path) -> str:
    """Name a file's folder in the store by where it is and its present state."""
    state = path.stat()
    where = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return f"{where}/{state.st_size}-{state.st_mtime_ns}"


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process has given it its final name
        return 0


def _cut_stored(stored: Path, n_samples: int, place: float, sample_rate: int) -> np.ndarray:
    spare = cached_samples(stored) - n_samples
    if spare < 0:
        return np.resize(read_cached(stored, sample_rate=sample_rate), n_samples)
    start = min(int(place * (spare + 1)), spare)
    return read_cached(stored, start / sample_rate, n_samples / sample_rate, sample_rate)


def _cut(samples: np.ndarray, step: np.float32, n_samples: int, place: float) -> np.ndarray:
    spare = len(samples) - n_samples
    start = min(int(place * (spare + 1)), spare) if spare > 0 else 0
    cut = np.multiply(samples[start : start + n_samples], step, dtype=np.float32)
    # Noise has no beginning: a short file is repeated until the clip is full.
    return cut if spare >= 0 else np.resize(cut, n_samples)
