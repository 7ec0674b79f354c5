"""Make bird-free noise with a stated spectrum; find and split the bird-free sound a user has."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from scipy import fft

from birdcall.audio.reading import AudioError, probe_audio, read_audio
from birdcall.data.cache import as_cached, cached_samples, read_cached, write_waveform
from birdcall.storage.files import atomic_path, read_table

logger = logging.getLogger(__name__)


NOISE_KINDS = ("white", "pink", "brown", "rain", "wind", "hum")
AUDIO_SUFFIXES = (".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
NOISE_RMS = 0.1  # every kind has this level; mixing scales to the SNR that it wants

SHAPE_FROM_HZ = 20.0  # below it all spectra are flat, or brown noise would be one slow wave
RAIN_PEAK_HZ = 1_000.0
WIND_CORNER_HZ = 100.0
MAINS_HZ = 60  # North America
N_MAINS_HARMONICS = 16
HUM_FLOOR_DB = -20.0  # of the pink floor, below the lines together

FLUCTUATION_STEP = 64

# Of ESC-50's fifty categories, those that hold birds. Its frogs, insects and crickets are wanted:
# they are what a detector of birds must learn to ignore.
ESC50_BIRDS = ("chirping_birds", "crow", "hen", "rooster")
ESC50_NAME = re.compile(r"[1-5]-(?P<clip>[0-9]+)-[A-Z]-(?P<target>[0-9]+)")
FREESOUND_NAME = re.compile(r"[0-9]{3,}")  # ff1010bird names its files by their Freesound number
GENERATED_NAME = re.compile(
    rf"(?P<kind>{'|'.join(NOISE_KINDS)})_[0-9]+_[0-9.]+s_(?P<number>[0-9]+)"
)
NUMBERED_NAME = re.compile(r"(?P<kind>[A-Za-z]+)_\w*[0-9]")  # rain_07, white_32000_20s_0
PROBE_BYTES = 4096


@dataclass(frozen=True)
class Collection:
    """A published collection of sound, told by its folder's and its metadata's names.

    ``metadata`` matches file names; None: the collection says nowhere which sound is bird-free.
    ``item`` and ``label`` are columns: the file name (with or without suffix) and what tells birds.
    """

    name: str
    folder: re.Pattern[str]
    metadata: re.Pattern[str] | None
    item: str = "itemid"
    label: str = "hasbird"

    def is_bird_free(self, label: str) -> bool:
        """Read a label; raises ValueError, saying what is allowed, where it is none."""
        if self.label == "category":
            if not re.fullmatch(r"[a-z]+(_[a-z]+)*", label):
                raise ValueError("is no category; expected one such as rain or chirping_birds")
            return label not in ESC50_BIRDS
        if label not in ("0", "1"):
            raise ValueError("is no label; expected 0 or 1")
        return label == "0"


def _collection(name: str, folder: str, metadata: str | None, **columns: str) -> Collection:
    pattern = re.compile(metadata, re.IGNORECASE) if metadata else None
    return Collection(name, re.compile(folder, re.IGNORECASE), pattern, **columns)


COLLECTIONS = (
    _collection("ff1010bird", r"ff1010bird", r"ff1010bird_metadata.*\.csv"),
    _collection("warblrb10k", r"warblrb10k|wabrlrb10k", r"warblrb10k.*metadata.*\.csv"),
    _collection("BirdVox-DCASE-20k", r"birdvox-?dcase", r"BirdVox-?DCASE.*\.csv"),
    _collection("ESC-50", r"esc-?50", r"esc50.*\.csv", item="filename", label="category"),
    _collection("BirdVox-full-night", r"birdvox-full-night", None),
)


def make_noise(
    kind: str, n_samples: int, sample_rate: int, generator: np.random.Generator
) -> np.ndarray:
    """Return float32 noise ``(n_samples,)`` of zero mean and RMS ``NOISE_RMS``.

    The power spectral densities, all flat below 20 Hz:

    =====  ==========================================================================
    kind   spectrum
    =====  ==========================================================================
    white  flat (0 dB/octave), Gaussian
    pink   -3 dB/octave, Gaussian
    brown  -6 dB/octave, Gaussian
    rain   +6 dB/octave up to 1 kHz, -3 dB/octave above; half its power are single drops
    wind   -3 dB/octave up to 100 Hz, -9 dB/octave above; gusts swell and fade in seconds
    hum    lines at 60, 120, … 960 Hz falling by 6 dB/octave, and 20 dB below all of them
           together a floor of pink noise
    =====  ==========================================================================
    """
    if kind not in _MAKERS:
        raise ValueError(f"noise kind is {kind!r}; choose one of {', '.join(NOISE_KINDS)}")
    if n_samples < 1 or sample_rate < 1:
        raise ValueError(f"n_samples {n_samples} and sample_rate {sample_rate} must be above 0")
    noise = _MAKERS[kind](n_samples, sample_rate, generator)
    noise = noise - noise.mean()
    rms = np.sqrt(np.mean(np.square(noise)))
    return (noise * (NOISE_RMS / rms if rms > 0 else 1.0)).astype(np.float32)


def find_noise(folder: Path) -> list[Path]:
    """List the bird-free audio files below ``folder``, sorted; an absent folder has none.

    Collections are read as they are distributed: where a metadata file of `COLLECTIONS` lies
    anywhere below ``folder``, the files that it lists are left out unless they are bird-free. Files
    that it does not list, but with the collection's name in their path, are left out too. All other
    audio is taken. Links to folders are followed (noise is large and often linked), each real
    folder once, so that a link to a parent ends.

    Raises ValueError naming file, line and column for metadata that cannot be read, and
    FileNotFoundError for the sound of a collection without its metadata.
    """
    paths = sorted(_walk(folder))
    audio = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
    above = len(str(folder)) - len(folder.name)  # the folder itself may be named after one
    left_out: set[Path] = set()
    for collection in COLLECTIONS:
        tables = [path for path in paths if _is_metadata(collection, path)]
        listed: dict[str, bool] = {}
        for name, free in (label for table in tables for label in _read_labels(collection, table)):
            listed[name] = free and listed.get(name, True)
        named = [path for path in audio if path.stem in listed]
        birds = [path for path in named if not listed[path.stem]]
        strays = [
            path
            for path in audio
            if path.stem not in listed and collection.folder.search(str(path)[above:])
        ]
        if strays and collection.metadata and not tables:
            raise FileNotFoundError(
                f"{strays[0]}: sound of {collection.name} without the metadata that say where there"
                f" are birds; put its CSV below {folder} (docs/noise.md says where to get it)"
            )
        left_out |= {*birds, *strays}
        if tables or strays:
            _log_collection(collection, listed, named=named, birds=birds, strays=strays)
    return [path for path in audio if path not in left_out]


def split_noise(files: Sequence[Path], fold: int, n_folds: int) -> tuple[list[Path], list[Path]]:
    """Divide noise files into those to train with and those to validate with, for one fold.

    Files of one source stay together: clips of one Freesound recording (their number is in the
    names that ESC-50 and ff1010bird give), and copies of one sound under several names. A source is
    held out in the fold that a hash of it says (of its number, else of its content), so that the
    split is the same on every machine and other files do not change it. Kinds of noise (ESC-50's
    categories; ``rain`` of ``rain_07.wav``; else the folder) are on both sides where they have two
    sources or more: where the hash would hold out none or all, the source with the smallest hash of
    fold and name changes sides. A single source is all for training. Both lists are in the order of
    ``files``.
    """
    if not 0 <= fold < n_folds:
        raise ValueError(f"fold {fold} is out of range; it must be from 0 to {n_folds - 1}")
    sources = {path: _source_of(path) for path in files}
    kind_of: dict[str, str] = {}
    for path in sorted(files):  # a source of several kinds counts as the first
        kind_of.setdefault(sources[path], _kind_of(path))
    kinds: dict[str, list[str]] = {}
    for source, kind in kind_of.items():
        kinds.setdefault(kind, []).append(source)
    held_out: set[str] = set()
    for members in kinds.values():
        held_out |= _hold_out(members, fold, n_folds)
    if not held_out:  # kinds of one source each
        held_out = _hold_out(list(kind_of), fold, n_folds)
    if files and not held_out:
        logger.warning(
            "all noise is of one source; it is for training, none is left to validate with"
        )
    training = [path for path in files if sources[path] not in held_out]
    return training, [path for path in files if sources[path] in held_out]


def generate_noise(
    folder: Path, sample_rate: int = 32_000, seconds: float = 20.0, per_kind: int = 3
) -> list[Path]:
    """Write ``per_kind`` wav files of each kind of noise to ``folder``, unless they are there."""
    paths = []
    for kind in NOISE_KINDS:
        for number in range(per_kind):
            path = folder / f"{kind}_{sample_rate}_{seconds:g}s_{number}.wav"
            paths.append(path)
            if path.is_file():
                continue
            generator = np.random.default_rng((NOISE_KINDS.index(kind), number))
            noise = make_noise(kind, round(seconds * sample_rate), sample_rate, generator)
            with atomic_path(path) as temporary:
                soundfile.write(temporary, noise, sample_rate, subtype="FLOAT")
    return paths


def slow_fluctuation(
    n_samples: int, sample_rate: int, rate_hz: float, generator: np.random.Generator
) -> np.ndarray:
    """Draw a smooth random curve ``(n_samples,)`` of unit variance with changes at ``rate_hz``."""
    n_knots = max(4, int(np.ceil(n_samples / sample_rate * 2 * rate_hz)) + 3)
    knots = generator.standard_normal(n_knots)
    # Computed at every 64th sample and linear between them: long curves are slow otherwise.
    n_steps = -(-n_samples // FLUCTUATION_STEP)
    place = np.linspace(0, n_knots - 3, n_steps + 1) + generator.random()
    left = np.minimum(place.astype(np.int64), n_knots - 2)
    turn = (1 - np.cos(np.pi * np.clip(place - left, 0, 1))) / 2
    curve = knots[left] * (1 - turn) + knots[left + 1] * turn
    curve = (curve / np.sqrt(0.75)).astype(np.float32)  # between knots the sum varies less
    ramp = np.arange(FLUCTUATION_STEP, dtype=np.float32) / FLUCTUATION_STEP
    return (curve[:-1, None] + np.diff(curve)[:, None] * ramp).ravel()[:n_samples]


def shape_spectrum(
    waveform: np.ndarray,
    sample_rate: int,
    amplitude: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Filter ``waveform`` by ``amplitude(frequency_hz)``, without delay."""
    n_fft = fft.next_fast_len(len(waveform), real=True)
    spectrum = fft.rfft(waveform, n_fft)
    frequency = np.maximum(fft.rfftfreq(n_fft, 1 / sample_rate), SHAPE_FROM_HZ)
    spectrum *= amplitude(frequency).astype(np.float32)
    return fft.irfft(spectrum, n_fft)[: len(waveform)]


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = Path(root).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        # What macOS adds to zips: ._1.wav is no sound.
        names = (name for name in files if not name.startswith("._"))
        yield from (path for name in names if (path := Path(root, name)).is_file())


def _is_metadata(collection: Collection, path: Path) -> bool:
    return collection.metadata is not None and bool(collection.metadata.fullmatch(path.name))


def _read_labels(collection: Collection, table: Path) -> Iterator[tuple[str, bool]]:
    """Yield the stem of each file that ``table`` lists and whether it is bird-free."""
    rows = read_table(table, [collection.item, collection.label])
    if rows.empty:
        raise ValueError(f"{table}: has a header, but no rows")
    for line, item, label in rows[[collection.item, collection.label]].itertuples():
        name = item.strip()
        if not name or "/" in name or "\\" in name:
            raise ValueError(
                f"{table}, line {line}, column {collection.item}: {item!r} is no file name"
            )
        try:
            free = collection.is_bird_free(label.strip())
        except ValueError as error:
            where = f"{table}, line {line}, column {collection.label}"
            raise ValueError(f"{where}: {label!r} {error}") from None
        yield name.removesuffix(".wav"), free


def _log_collection(
    collection: Collection,
    listed: dict[str, bool],
    named: list[Path],
    birds: list[Path],
    strays: list[Path],
) -> None:
    n_free = len(named) - len(birds)
    logger.info("%s: %d bird-free files, %d left out", collection.name, n_free, len(birds))
    missing = sorted(set(listed) - {path.stem for path in named})
    if missing:
        logger.warning(
            "%s: %d of %d listed files are not there, such as %s",
            collection.name, len(missing), len(listed), missing[0],
        )  # fmt: skip
    if strays:
        logger.warning(
            "%s: %d files are left out, nothing says that they are bird-free: %s ...",
            collection.name, len(strays), strays[0],
        )  # fmt: skip


def _source_of(path: Path) -> str:
    """Name what ``path`` was cut from; where nothing tells, its size and parts of its content."""
    if match := ESC50_NAME.fullmatch(path.stem):
        return f"freesound:{match['clip']}"
    if FREESOUND_NAME.fullmatch(path.stem):
        return f"freesound:{path.stem}"
    if match := GENERATED_NAME.fullmatch(path.stem):  # its last bits differ between machines
        return f"generated:{match['kind']}_{match['number']}"
    size = path.stat().st_size
    content = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for eighth in (1, 3, 5, 7):  # not the start: a header can hold the time of writing
            file.seek(eighth * size // 8)
            content.update(file.read(PROBE_BYTES))
    return f"content:{content.hexdigest()}"


def _kind_of(path: Path) -> str:
    if match := ESC50_NAME.fullmatch(path.stem):
        return f"ESC-50:{match['target']}"
    match = NUMBERED_NAME.match(path.stem)
    return match["kind"] if match else str(path.parent)


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


def _white(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    return generator.standard_normal(n_samples, dtype=np.float32)


def _pink(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    return shape_spectrum(
        _white(n_samples, sample_rate, generator), sample_rate, lambda hz: hz**-0.5
    )


def _brown(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    return shape_spectrum(_white(n_samples, sample_rate, generator), sample_rate, lambda hz: 1 / hz)


def _rain(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    # Drops are a Poisson train of impulses, whose spectrum is flat: the shape stays as stated.
    drops = np.zeros(n_samples, np.float32)
    n_drops = generator.poisson(n_samples / sample_rate * generator.uniform(40, 200))
    size = generator.standard_normal(n_drops, dtype=np.float32)
    np.add.at(drops, generator.integers(0, n_samples, n_drops), size)
    power = np.mean(np.square(drops))
    patter = _white(n_samples, sample_rate, generator) + drops / np.sqrt(max(power, 1e-12))

    def amplitude(frequency: np.ndarray) -> np.ndarray:
        ratio = frequency / RAIN_PEAK_HZ
        return np.where(ratio < 1, ratio, np.maximum(ratio, 1e-9) ** -0.5)

    return shape_spectrum(patter, sample_rate, amplitude)


def _wind(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    def amplitude(frequency: np.ndarray) -> np.ndarray:
        ratio = frequency / WIND_CORNER_HZ
        return np.where(ratio < 1, ratio**-0.5, ratio**-1.5)

    breeze = shape_spectrum(_white(n_samples, sample_rate, generator), sample_rate, amplitude)
    rate_hz = generator.uniform(0.1, 0.4)
    gusts = slow_fluctuation(n_samples, sample_rate, rate_hz, generator)
    return breeze * 10 ** (np.clip(4 * gusts, -10, 10) / 20)  # 4 dB up and down


def _hum(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    period = sample_rate // math.gcd(sample_rate, MAINS_HZ)  # whole cycles in whole samples
    seconds = np.arange(period) / sample_rate
    lines = np.zeros(period)
    for harmonic in range(1, N_MAINS_HARMONICS + 1):
        if harmonic * MAINS_HZ < sample_rate / 2:
            phase = generator.uniform(0, 2 * np.pi)
            lines += np.sin(2 * np.pi * harmonic * MAINS_HZ * seconds + phase) / harmonic
    lines = np.resize(lines.astype(np.float32), n_samples)
    floor = _pink(n_samples, sample_rate, generator)
    level = np.sqrt(np.mean(np.square(lines)) / max(np.mean(np.square(floor)), 1e-12))
    return lines + floor * level * 10 ** (HUM_FLOOR_DB / 20)


_MAKERS = {
    "white": _white,
    "pink": _pink,
    "brown": _brown,
    "rain": _rain,
    "wind": _wind,
    "hum": _hum,
}


# --- noise files ---


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
