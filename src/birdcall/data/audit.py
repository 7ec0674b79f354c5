"""Decode every recording once, to know what each really holds and which ones to leave out."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from birdcall.audio.reading import (
    LENGTH_TOLERANCE,
    AudioError,
    frame_blocks,
    is_cut,
    open_audio,
    promised_frames,
    require_regular_file,
    resample_blocks,
)
from birdcall.data.cache import Cache
from birdcall.storage.files import read_table, write_atomically

log = logging.getLogger(__name__)

STATUSES = ("ok", "truncated", "too_short", "silent", "unreadable", "duplicate")
MIN_SECONDS = 0.5  # less is a click, or what is left of a broken upload
MIN_TRUNCATED_SECONDS = 1.0
# What a recording may lack, seconds plus share, of the length in the table of recordings (whole
# seconds, sometimes of another edit); of that in its own header: LENGTH_TOLERANCE.
TABLE_TOLERANCE = (2.0, 0.1)
CLIPPED = 0.999  # of full scale
SILENT_DB = -80.0  # full scale is 0 dB; the quietest real recordings stay above -70
FLOOR_DB = -200.0
WINDOW_SECONDS = 0.1
N_FFT = 2048
FFT_HOP = 4 * N_FFT  # a quarter of the sound says enough about its bandwidth
BANDWIDTH_DB = 70.0  # below the strongest bin; the encoder's low-pass goes deeper
MAX_LISTED = 20


@dataclass
class Measurement:
    """What decoding one recording told; of a file that breaks off, of the part before that.

    ``error`` is empty where all decoded. ``audio_hash`` is a hash of the decoded waveform and its
    sample rate, the same under two file names or with other tags; ``sha256`` is that of the file.
    Levels are of the mono waveform, ``clipped_share`` of all channels. ``bandwidth_hz`` is where
    the spectrum last comes within 70 dB of its strongest bin.
    """

    path: str
    size: int = 0
    mtime_ns: int = 0
    error: str = ""
    seconds: float = 0.0
    header_seconds: float = 0.0
    sample_rate: int = 0
    channels: int = 0
    peak_db: float = FLOOR_DB
    rms_db: float = FLOOR_DB
    clipped_share: float = 0.0
    silent_share: float = 0.0
    bandwidth_hz: float = 0.0
    sha256: str = ""
    audio_hash: str = ""


COLUMNS = ("path", "status", "usable", "reason", *[item.name for item in fields(Measurement)][1:])


def audit_recordings(
    data: Path,
    recordings: pd.DataFrame,
    audit_csv: Path,
    workers: int | None = None,
    cache: Cache | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Decode all recordings, write ``audit_csv`` and return it: one row per recording, by path.

    Columns: path, status (see STATUSES), usable, reason and those of `Measurement`. What an earlier
    audit, finished or killed, measured of unchanged files is not measured again. ``workers``
    processes decode (None: one per core; 0: none but this one). With ``cache``, what decodes is
    kept there as well.
    """
    names = sorted(set(recordings["path"]))
    durations = recordings.set_index("path")["duration"].to_dict()
    journal = audit_csv.with_suffix(".journal")
    known = {name: found for name, found in _known(audit_csv, journal).items() if name in durations}
    measured = {name: found for name, found in known.items() if _is_current(data, found, cache)}
    pending = [name for name in names if name not in measured]
    if cache is not None:
        cache.remove_leftovers()
        cache.require_space(
            sum(_expected_seconds(data / name, durations[name]) for name in pending)
        )
    log.info("%s: %d recordings to decode, %d known", data, len(pending), len(measured))
    results = _measure_all(data, pending, workers, cache)
    if progress and pending:
        results = tqdm(results, "audit", total=len(pending), unit="recording", smoothing=0.05)
    for found in _keep(results, journal):
        measured[found.path] = found
    audit = _judge([measured[name] for name in names], durations)
    write_atomically(audit_csv, audit.to_csv(index=False, lineterminator="\n"))
    journal.unlink(missing_ok=True)
    return audit


def read_audit(path: Path) -> pd.DataFrame:
    """Read what `audit_recordings` wrote; FileNotFoundError says to run it first."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no audit yet; make it with `birdcall audit`")
    audit = read_table(path, COLUMNS)[list(COLUMNS)].reset_index(drop=True)
    try:
        for item in fields(Measurement):
            kind = {"int": "int64", "float": "float64"}.get(str(item.type), "str")
            audit[item.name] = audit[item.name].astype(kind)
    except ValueError as error:
        raise ValueError(f"{path}, column {item.name}: {error}; delete it to start over") from error
    return audit.assign(usable=audit["usable"] == "True")


def usable_recordings(recordings: pd.DataFrame, audit: pd.DataFrame) -> pd.DataFrame:
    """Leave out what the audit says to, and add ``seconds``, the true length.

    Raises ValueError for a recording that was not there when the audit was made.
    """
    found = audit.set_index("path")[["usable", "seconds"]].reindex(recordings["path"])
    unknown = recordings.loc[found["seconds"].isna().to_numpy(), "path"]
    if len(unknown):
        raise ValueError(
            f"the audit does not know {unknown.iloc[0]} and {len(unknown) - 1} other recordings; "
            "run `birdcall audit` again"
        )
    recordings = recordings.assign(seconds=found["seconds"].to_numpy())
    return recordings[found["usable"].to_numpy(dtype=bool)].reset_index(drop=True)


def audio_hashes(recordings: pd.DataFrame, audit: pd.DataFrame) -> list[str]:
    """Return the hash of the decoded audio of each recording, for `make_folds`."""
    return list(recordings["path"].map(audit.set_index("path")["audio_hash"]).fillna(""))


def describe_audit(audit: pd.DataFrame) -> str:
    """Say in a few lines what was found and what will be left out, and why."""
    hours = audit["seconds"].sum() / 3600
    counts = audit["status"].value_counts()
    parts = [f"{counts[status]} {status}" for status in STATUSES if status in counts]
    lines = [f"{len(audit)} recordings, {hours:.2f} hours: {', '.join(parts)}"]
    for usable, what in ((False, "left out"), (True, "kept as far as they decode")):
        rows = audit[(audit["status"] != "ok") & (audit["usable"] == usable)]
        lines += [f"{len(rows)} are {what}:"] if len(rows) else []
        for row in rows.head(MAX_LISTED).itertuples():
            lines.append(f"  {row.path}: {row.status}, {row.reason}")
        lines += [f"  and {len(rows) - MAX_LISTED} more"] if len(rows) > MAX_LISTED else []
    return "\n".join(lines)


def measure_recording(data: Path, name: str, cache: Cache | None = None) -> Measurement:
    """Decode ``data / name`` block by block and measure it; whatever is wrong is in ``error``."""
    path = data / name
    found = Measurement(name)
    try:
        found.size, found.mtime_ns = _state(path)
        require_regular_file(path)
        with path.open("rb") as file:
            found.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with open_audio(path) as file:
            found.sample_rate, found.channels = file.samplerate, file.channels
            found.header_seconds = round(promised_frames(path, file) / file.samplerate, 6)
            blocks = _Meter(found).watch(frame_blocks(path, file))
            if cache is None:
                deque(blocks, maxlen=0)
            else:
                resampled = resample_blocks(blocks, file.samplerate, cache.sample_rate)
                cache.write(data, name, resampled)
    except AudioError as error:
        found.error = found.error or error.reason
    except OSError as error:
        if error.filename is None or Path(error.filename) != path:
            raise  # the disk of the cache is full, not the recording damaged
        found.error = error.strerror or str(error)
    return found


class _Meter:
    """Measures a recording while its blocks pass by."""

    def __init__(self, found: Measurement) -> None:
        self.found = found
        self.n_frames = self.n_clipped = self.n_silent = 0
        self.peak = self.squares = 0.0
        self.power = np.zeros(N_FFT // 2 + 1)
        self.hann = np.hanning(N_FFT).astype(np.float32)
        self.sound = hashlib.blake2b(str(found.sample_rate).encode(), digest_size=16)

    def watch(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the mono waveform of each block; stop, and note it, where decoding breaks."""
        try:
            for block in blocks:
                mono = block.mean(axis=1, dtype=np.float32)
                self._add(block, mono)
                yield mono
        except AudioError as error:
            self.found.error = error.reason
        if self.n_frames:
            self._finish()

    def _add(self, block: np.ndarray, mono: np.ndarray) -> None:
        self.n_frames += len(mono)
        self.n_clipped += int(np.count_nonzero(np.abs(block) >= CLIPPED))
        self.peak = max(self.peak, float(np.abs(mono).max()))
        squares = mono.astype(np.float64) ** 2
        self.squares += float(squares.sum())
        n_window = max(1, round(WINDOW_SECONDS * self.found.sample_rate))
        starts = np.arange(0, len(mono), n_window)
        lengths = np.diff(np.append(starts, len(mono)))
        quiet = np.add.reduceat(squares, starts) / lengths < 10 ** (SILENT_DB / 10)
        self.n_silent += int(lengths[quiet].sum())
        padded = np.pad(mono, (0, max(0, N_FFT - len(mono))))
        windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::FFT_HOP]
        self.power += (np.abs(np.fft.rfft(windows * self.hann)) ** 2).sum(axis=0)
        self.sound.update(np.rint(mono.clip(-1, 1) * 32767).astype("<i2").tobytes())

    def _finish(self) -> None:
        found, bin_hz = self.found, self.found.sample_rate / N_FFT
        found.seconds = round(self.n_frames / found.sample_rate, 6)
        found.peak_db = _decibels(self.peak**2)
        found.rms_db = _decibels(self.squares / self.n_frames)
        found.clipped_share = round(self.n_clipped / self.n_frames / found.channels, 6)
        found.silent_share = round(self.n_silent / self.n_frames, 6)
        self.power[: max(1, round(50 / bin_hz))] = 0  # a constant offset is no sound
        loud = np.flatnonzero(self.power > self.power.max() * 10 ** (-BANDWIDTH_DB / 10))
        found.bandwidth_hz = round(float(loud[-1]) * bin_hz, 1) if len(loud) else 0.0
        found.audio_hash = self.sound.hexdigest()


def _decibels(power: float) -> float:
    return round(10 * float(np.log10(max(power, 10 ** (FLOOR_DB / 10)))), 2)


def _measure_all(
    data: Path, names: list[str], workers: int | None, cache: Cache | None
) -> Iterator[Measurement]:
    """Measure recordings in worker processes, in whatever order they finish.

    A file that crashes the decoder takes the workers with it: what they were at is then measured
    again, each in a process of its own, and the one that crashes again is unreadable.
    """
    if workers == 0:
        yield from (measure_recording(data, name, cache) for name in names)
        return
    queue = deque(names)
    workers = min(workers or os.cpu_count() or 1, max(1, len(names)))
    while queue:
        running: dict[Future[Measurement], str] = {}
        try:
            with _pool(workers) as pool:
                while queue or running:
                    while queue and len(running) < 2 * workers:
                        name = queue.popleft()
                        running[pool.submit(measure_recording, data, name, cache)] = name
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        del running[future]
                        yield found
        except BrokenProcessPool:
            yield from (_measure_alone(data, name, cache) for name in running.values())


def _measure_alone(data: Path, name: str, cache: Cache | None) -> Measurement:
    try:
        with _pool(1) as pool:
            return pool.submit(measure_recording, data, name, cache).result()
    except BrokenProcessPool:
        size, mtime_ns = _state(data / name)
        return Measurement(name, size, mtime_ns, error="crashes the decoder")


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def _start_worker() -> None:
    """Make a worker end with its parent, leave Ctrl-C to it, and keep libmpg123 quiet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its warnings would break the progress bar
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        parent.join()
        os._exit(1)  # a killed parent cannot tell its workers to stop

    threading.Thread(target=follow_parent, daemon=True).start()


def _keep(results: Iterable[Measurement], journal: Path) -> Iterator[Measurement]:
    """Append each result to the journal before passing it on, so that a kill costs no result."""
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that a kill has cut
        for found in results:
            file.write(json.dumps(asdict(found)) + "\n")
            file.flush()
            yield found


def _known(audit_csv: Path, journal: Path) -> dict[str, Measurement]:
    """Read what an earlier audit has measured; what cannot be read will be measured again."""
    known: dict[str, Measurement] = {}
    if audit_csv.is_file():
        try:
            audit = read_audit(audit_csv)
        except ValueError as error:
            log.warning("starting over: %s", error)
        else:
            names = [item.name for item in fields(Measurement)]
            records: list[dict[str, Any]] = audit[names].to_dict("records")
            known = {record["path"]: Measurement(**record) for record in records}
    if journal.is_file():
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found = Measurement(**json.loads(line))
            except (ValueError, TypeError):
                continue  # cut by a kill, or of another version
            known[found.path] = found
    return known


def _is_current(data: Path, found: Measurement, cache: Cache | None) -> bool:
    """Say whether the file is still the one that was measured, and cached if it is to be."""
    try:
        if _state(data / found.path) != (found.size, found.mtime_ns):
            return False
        return cache is None or not found.seconds or cache.has(data, found.path)
    except OSError:
        return False


def _expected_seconds(path: Path, duration: float) -> float:
    """Guess a length that the table does not know: most mp3 have 16 kB for each second."""
    return duration or (path.stat().st_size / 16_000 if path.is_file() else 0.0)


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _judge(measured: list[Measurement], durations: dict[str, float]) -> pd.DataFrame:
    """Add verdicts; of one sound under several paths the first usable one stays."""
    first_of: dict[str, str] = {}
    rows = []
    for found in measured:
        status, reason = _verdict(found, durations[found.path])
        usable = status == "ok" or (
            status == "truncated" and found.seconds >= MIN_TRUNCATED_SECONDS
        )
        if usable and first_of.setdefault(found.audio_hash, found.path) != found.path:
            status, usable = "duplicate", False
            reason = f"the same audio as {first_of[found.audio_hash]}"
        rows.append(asdict(found) | {"status": status, "usable": usable, "reason": reason})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _verdict(found: Measurement, duration: float) -> tuple[str, str]:
    """Return status and reason of one recording; ``duration`` is the table's, 0 if unknown."""
    if not found.seconds:
        return "unreadable", found.error or "has no samples"
    if found.silent_share == 1:
        return "silent", f"never louder than {SILENT_DB:g} dB"
    promises = (
        ("its header", found.header_seconds, LENGTH_TOLERANCE),
        ("the table of recordings", duration, TABLE_TOLERANCE),
    )
    for who, promised, tolerance in promises:
        if is_cut(found.seconds, promised, tolerance):
            because = f" ({found.error})" if found.error else ""
            return "truncated", f"{who} says {promised:g} s, {found.seconds:.1f} s decode{because}"
    if found.error:
        return "truncated", found.error
    if found.seconds < MIN_SECONDS:
        return "too_short", f"{found.seconds:.2f} s, less than {MIN_SECONDS:g} s"
    return "ok", ""
