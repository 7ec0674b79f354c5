"""Find bird-free noise in folders, split it into training and validation, and draw from it."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from birdcall.audio.filters import NOISE_KINDS
from birdcall.audio.reading import AudioError, probe_audio, read_audio
from birdcall.data.cache import (
    MAX_TRIES,
    NothingReadableError,
    ReadFailure,
    as_cached,
    cached_samples,
    cut_cached,
    file_state,
    read_cached,
    write_waveform,
)
from birdcall.storage.files import digest, find_files, read_table, readable_sound
from birdcall.storage.store import Store

logger = logging.getLogger(__name__)

# Of ESC-50's fifty categories, those with birds. Its frogs, insects and crickets stay in: a bird
# detector must learn to ignore them.
_ESC50_BIRDS = ("chirping_birds", "crow", "hen", "rooster")
_ESC50_NAME = re.compile(r"[1-5]-(?P<clip>[0-9]+)-[A-Z]-(?P<target>[0-9]+)")
_FREESOUND_NAME = re.compile(r"[0-9]{3,}")  # ff1010bird names its files by their Freesound number
_GENERATED_NAME = re.compile(
    rf"(?P<kind>{'|'.join(NOISE_KINDS)})_[0-9]+_[0-9.]+s_(?P<number>[0-9]+)"
)
_NUMBERED_NAME = re.compile(r"(?P<kind>[A-Za-z]+)_\w*[0-9]")  # rain_07, white_32000_20s_0
_PROBE_BYTES = 4096


@dataclass(frozen=True)
class _Collection:
    """A published collection of audio, recognised by its folder and its metadata.

    ``folder`` matches within a path; ``metadata`` matches a file name, "": the collection has no
    labels that tell which audio is bird-free. ``item`` and ``label`` are columns of the metadata:
    the file name (with or without suffix) and the label of birds.
    """

    name: str
    folder: str
    metadata: str
    item: str = "itemid"
    label: str = "hasbird"

    def read_labels(self, table: Path) -> Iterator[tuple[str, bool]]:
        """Yield the stem of each file that ``table`` lists, and whether it is bird-free."""
        rows = read_table(table, [self.item, self.label])
        if rows.empty:
            raise ValueError(f"{table}: has a header, but no rows")
        for line, item, label in rows[[self.item, self.label]].itertuples():
            name, where = item.strip(), f"{table}, line {line}, column"
            if not name or "/" in name or "\\" in name:
                raise ValueError(f"{where} {self.item}: {item!r} is no file name")
            if self.label == "category":
                is_valid = re.fullmatch(r"[a-z]+(_[a-z]+)*", label.strip())
                is_free, allowed = label.strip() not in _ESC50_BIRDS, "such as rain or hen"
            else:
                is_valid = label.strip() in ("0", "1")
                is_free, allowed = label.strip() == "0", "0 or 1"
            if not is_valid:
                raise ValueError(
                    f"{where} {self.label}: {label!r} is no {self.label}; expected {allowed}"
                )
            yield name.removesuffix(".wav"), is_free


_COLLECTIONS = (
    _Collection("ff1010bird", r"ff1010bird", r"ff1010bird_metadata.*\.csv"),
    _Collection("warblrb10k", r"warblrb10k|wabrlrb10k", r"warblrb10k.*metadata.*\.csv"),
    _Collection("BirdVox-DCASE-20k", r"birdvox-?dcase", r"BirdVox-?DCASE.*\.csv"),
    _Collection("ESC-50", r"esc-?50", r"esc50.*\.csv", item="filename", label="category"),
    _Collection("BirdVox-full-night", r"birdvox-full-night", ""),
)


def find_noise(folder: Path) -> list[Path]:
    """List the bird-free audio files below ``folder``, sorted; an absent folder has none.

    Published collections are read as they are distributed (docs/noise.md): where their metadata lie
    below ``folder``, the listed files are left out unless they are labelled bird-free, and so are
    files with the collection's name in their path that are not listed. All other sound is taken.

    Raises ValueError naming file, line and column for metadata that cannot be read, and
    FileNotFoundError for the audio of a collection without its metadata.
    """
    paths = [path for path in find_files(folder) if path.is_file()]
    audio = readable_sound(paths, "noise")
    above = len(str(folder)) - len(folder.name)  # the folder itself may have a collection's name
    left_out: set[Path] = set()
    for collection in _COLLECTIONS:
        pattern = re.compile(collection.metadata, re.IGNORECASE)
        tables = [path for path in paths if pattern.fullmatch(path.name)]
        is_free: dict[str, bool] = {}
        for table in tables:
            for name, free in collection.read_labels(table):
                is_free[name] = free and is_free.get(name, True)
        listed = [path for path in audio if path.stem in is_free]
        birds = [path for path in listed if not is_free[path.stem]]
        unlisted = [
            path
            for path in audio
            if path.stem not in is_free
            and re.search(collection.folder, str(path)[above:], re.IGNORECASE)
        ]
        if unlisted and collection.metadata and not tables:
            raise FileNotFoundError(
                f"{unlisted[0]}: audio of {collection.name} without the metadata that label birds; "
                f"put its CSV below {folder} (docs/noise.md names the source)"
            )
        left_out |= {*birds, *unlisted}
        if tables:
            n_free = len(listed) - len(birds)
            logger.info("%s: %d bird-free files, %d left out", collection.name, n_free, len(birds))
        if missing := sorted(set(is_free) - {path.stem for path in listed}):
            logger.warning(
                "%s: %d of %d listed files are missing, such as %s",
                *(collection.name, len(missing), len(is_free), missing[0]),
            )
        if unlisted:
            logger.warning(
                "%s: %d files are left out, because no metadata label them bird-free: %s ...",
                *(collection.name, len(unlisted), unlisted[0]),
            )
    return [path for path in audio if path not in left_out]


def split_noise(files: Sequence[Path], fold: int, n_folds: int) -> tuple[list[Path], list[Path]]:
    """Divide noise files into those for training and those for validation, for one fold.

    Files of one source stay together: clips of one Freesound recording (the names in ESC-50 and
    ff1010bird contain its number), and copies of one file. A hash of the source (of its number,
    else of its content) decides in which fold it is held out; so the split is the same on every
    machine, and other files do not change it. Kinds of noise (ESC-50's categories; ``rain`` of
    ``rain_07.wav``; else the folder) with two sources or more are on both sides: where the hash
    would hold out none or all, the source with the smallest hash of fold and name changes sides.
    A single source is all for training. Both lists are in the order of ``files``.
    """
    if not 0 <= fold < n_folds:
        raise ValueError(f"fold {fold} is out of range; it must be from 0 to {n_folds - 1}")
    origins = {path: _origin_of(path) for path in files}
    kind_of: dict[str, str] = {}
    for path in sorted(files):  # a source of several kinds counts as the first
        source, kind = origins[path]
        kind_of.setdefault(source, kind)
    kinds: dict[str, list[str]] = {}
    for source, kind in kind_of.items():
        kinds.setdefault(kind, []).append(source)
    held_out: set[str] = set()
    for members in kinds.values():
        held_out |= _hold_out(members, fold, n_folds)
    if not held_out:  # kinds of one source each
        held_out = _hold_out(list(kind_of), fold, n_folds)
    if files and not held_out:
        where = files[0].parent
        logger.warning("%s: all of one source, for training; none is for validation", where)
    training = [path for path in files if origins[path][0] not in held_out]
    return training, [path for path in files if origins[path][0] in held_out]


def digest_noise(files: Sequence[Path]) -> str:
    """Return a digest of noise files, wherever they lie: of their names, sizes and sources."""
    states = (f"{path.name} {path.stat().st_size} {_origin_of(path)[0]}" for path in files)
    return digest("\n".join(sorted(states)))


def _origin_of(path: Path) -> tuple[str, str]:
    """Name the source and the kind of ``path``.

    Where the name does not tell the source, the size and parts of the content do.
    """
    if match := _ESC50_NAME.fullmatch(path.stem):
        return f"freesound:{match['clip']}", f"ESC-50:{match['target']}"
    match = _NUMBERED_NAME.match(path.stem)
    kind = match["kind"] if match else str(path.parent)
    if _FREESOUND_NAME.fullmatch(path.stem):
        return f"freesound:{path.stem}", kind
    if match := _GENERATED_NAME.fullmatch(path.stem):  # its last bits differ between machines
        return f"generated:{match['kind']}_{match['number']}", kind
    size = path.stat().st_size
    content = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for eighth in (1, 3, 5, 7):  # not the start: a header can hold the time of writing
            file.seek(eighth * size // 8)
            content.update(file.read(_PROBE_BYTES))
    return f"content:{content.hexdigest()}", kind


def _hold_out(sources: list[str], fold: int, n_folds: int) -> set[str]:
    """Choose the sources to validate with: some and not all, where there are at least two."""
    if len(sources) < 2:
        return set()
    held_out = {source for source in sources if _hash(source) % n_folds == fold}
    first = min(sources, key=lambda source: _hash(f"{fold}:{source}"))
    if not held_out:
        return {first}
    return held_out - {first} if len(held_out) == len(sources) else held_out


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- drawing ---


@dataclass(frozen=True)
class NoiseLimits:
    """How noise files are divided, and how much decoded noise is stored."""

    piece_seconds: float = 60.0  # at least, of a long file; what is drawn lies within one piece
    store_bytes: int = 8 << 30  # 35 hours at 32 kHz
    min_free_bytes: int = 1 << 30  # of the store's disk
    check_every: int = 64  # writes of one process, between two checks of the store's size
    memory_bytes: int = 48 << 20  # of each process, where there is no store: 13 minutes


class _NoiseFile(NamedTuple):
    """A noise file that has been drawn from."""

    name: str  # in the store
    state: dict[str, int]
    seconds: float
    parts: tuple[str, ...]  # names of its pieces
    stored: list[Path]  # where they are stored, also before they are; empty: there is no store


class NoiseFiles:
    """Audio files without a bird of the classes, to be drawn from; ``kind``: their name in errors.

    A file is divided into pieces of a minute or more. A piece is decoded whole and rounded to int16
    as in `cache.write_waveform`. With a ``store`` (a folder) the first process that draws a piece
    stores it for all; else it is decoded again when it is no longer in memory: the same bits.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        sample_rate: int,
        store: Path | None = None,
        limits: NoiseLimits = NoiseLimits(),
        kind: str = "noise file",
    ) -> None:
        self.kind = kind
        self.paths = list(paths)
        self.sample_rate = sample_rate
        self.limits = limits
        self.store = (
            None if store is None else Store(store / str(sample_rate), ".npy", ["data.noise"])
        )
        self.can_write = True
        self.n_writes = 0
        self.files: dict[Path, _NoiseFile] = {}
        self.memory: OrderedDict[tuple[Path, int], tuple[np.ndarray, np.float32]] = OrderedDict()

    def draw(
        self, n_samples: int, generator: np.random.Generator, failures: list[ReadFailure]
    ) -> np.ndarray:
        """Read ``(samples,)``, float32, from a random position of a random file.

        Files that cannot be read are added to ``failures`` and another file is drawn. Raises
        NothingReadableError after ``MAX_TRIES`` of them.
        """
        position = generator.random()
        for index in self._candidates(generator):
            try:
                return self._read(self.paths[index], n_samples, position)
            except (AudioError, OSError) as error:
                failures.append(ReadFailure.of(self.kind, str(self.paths[index]), error))
        n_tries = min(len(self.paths), MAX_TRIES)
        raise NothingReadableError(f"none of {n_tries} {self.kind}s can be read")

    def _candidates(self, generator: np.random.Generator) -> Iterator[int]:
        """Yield a file, and others if it fails: a collection is not shuffled for each clip."""
        first = int(generator.integers(len(self.paths)))
        yield first
        others = generator.spawn(1)[0]  # the clip's later draws stay the same
        order = others.permutation(len(self.paths))
        yield from order[order != first][: MAX_TRIES - 1].tolist()

    def _read(self, path: Path, n_samples: int, position: float) -> np.ndarray:
        """Read at ``position``, a share of all positions that the file's pieces have."""
        if path not in self.files:
            length = probe_audio(path).seconds
            n_pieces = max(1, int(length / self.limits.piece_seconds))
            where = digest(str(path.resolve()))
            name, state = f"{where[:2]}/{where}", file_state(path)  # folders of a moderate size
            parts = tuple(f"{piece}-of-{n_pieces}" for piece in range(n_pieces))
            store = self.store
            stored = [store.path(name, state, part) for part in parts] if store else []
            self.files[path] = _NoiseFile(name, state, length, parts=parts, stored=stored)
        file = self.files[path]
        position *= len(file.parts)
        piece = min(int(position), len(file.parts) - 1)
        position -= piece
        if self.store is not None:
            try:
                spare = cached_samples(stored := file.stored[piece]) - n_samples
                if spare < 0:
                    return np.resize(read_cached(stored, sample_rate=self.sample_rate), n_samples)
                start = min(int(position * (spare + 1)), spare) / self.sample_rate
                return read_cached(stored, start, n_samples / self.sample_rate, self.sample_rate)
            except OSError:  # in most cases it is not there yet
                if self.can_write:
                    waveform = self._decode(path, piece)
                    self._write(file, piece, waveform)
                    return cut_cached(as_cached(waveform), n_samples, position)
        cached = self.memory.pop((path, piece), None)
        if cached is None:
            cached = as_cached(self._decode(path, piece))
        self.memory[path, piece] = cached
        # Forget the pieces that have not been used for longest.
        while sum(samples.nbytes for samples, _ in self.memory.values()) > self.limits.memory_bytes:
            self.memory.popitem(last=False)
        return cut_cached(cached, n_samples, position)

    def _decode(self, path: Path, piece: int) -> np.ndarray:
        """Decode one of the file's equal pieces; the last one as far as the file decodes."""
        file = self.files[path]
        seconds = file.seconds / len(file.parts)
        duration = seconds if piece + 1 < len(file.parts) else None
        return read_audio(path, self.sample_rate, piece * seconds, duration)

    def _write(self, file: _NoiseFile, piece: int, waveform: np.ndarray) -> None:
        """Store a piece if there is room; else nothing is written from now on."""
        try:
            if self.n_writes % self.limits.check_every == 0:
                self.store.require_space(self.limits.min_free_bytes, self.limits.store_bytes)
            self.n_writes += 1
            with self.store.writing(file.name, file.state, file.parts[piece]) as temporary:
                write_waveform(temporary, [waveform])
        except OSError as error:
            self.can_write = False
            text = "decoded noise is no longer stored in %s, which makes clips slower: %s"
            logger.warning(text, self.store.folder, error)
