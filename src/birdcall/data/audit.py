"""Decode every recording once: measure what it holds, and decide which ones are left out."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from birdcall.audio.decoder import (
    LENGTH_TOLERANCE,
    AudioError,
    AudioFile,
    is_cut,
    open_audio,
    require_regular_file,
)
from birdcall.audio.filters import MAX_BEYOND_SHARE, resample_blocks
from birdcall.data.cache import RecordingCache, file_state
from birdcall.storage.files import digest, read_table, write_atomically
from birdcall.storage.store import Journal, code_digest

logger = logging.getLogger(__name__)

_STATUSES = ("ok", "dc_offset", "damaged", "truncated", "too_short", "silent", "constant")
_STATUSES += ("absurd_level", "unreadable", "duplicate")
_MIN_SECONDS = 0.5  # less is a click, or the rest of a broken upload
_MIN_TRUNCATED_SECONDS = 1.0
# How much shorter than in the table (whole seconds) a recording may be: seconds plus share.
_TABLE_TOLERANCE = (2.0, 0.1)
_CLIPPED = 0.999  # of full scale
_MIN_OFFSET = 0.05  # of full scale; less is common
_SILENT_DB = -80.0  # full scale is 0 dB; the quietest real recordings stay above -70
_FLOOR_DB = -200.0
_WINDOW_SECONDS = 0.1
_N_FFT = 2048
_FFT_HOP = 4 * _N_FFT  # a quarter of the recording is enough to measure its bandwidth
_BANDWIDTH_DB = 70.0  # below the strongest bin; an encoder's low-pass is deeper
_MAX_LISTED = 20
_BYTES_PER_SECOND = 16_000  # of most mp3


@dataclass
class Measurement:
    """What decoding one recording showed; of a file that breaks off, of what decodes.

    Levels are of the mono waveform. For identical audio under two file names, or with other tags,
    ``audio_hash`` is the same and ``sha256`` is not.
    """

    path: str
    size: int = 0  # bytes
    mtime_ns: int = 0
    error: str = ""  # what could not be read as it should; empty: nothing
    seconds: float = 0.0
    header_seconds: float = 0.0  # that file and header promise; 0: not stated
    sample_rate: int = 0  # Hz
    channels: int = 0
    peak_db: float = _FLOOR_DB
    rms_db: float = _FLOOR_DB
    clipped_share: float = 0.0  # of the samples of all channels
    silent_share: float = 0.0  # without the constant offset
    beyond_share: float = 0.0  # of the samples; not finite, or far above full scale
    offset: float = 0.0  # the mean of the waveform
    bandwidth_hz: float = 0.0  # where the spectrum last comes within 70 dB of its strongest bin
    sha256: str = ""  # of the file
    audio_hash: str = ""  # of the decoded waveform and its sample rate


_MEASURED = [item.name for item in fields(Measurement)]
_AUDIT_COLUMNS = ["path", "status", "usable", "reason", *_MEASURED[1:]]


def audit_recordings(
    data: Path,
    recordings: pd.DataFrame,
    audit_csv: Path,
    *,
    workers: int | None = None,
    cache: RecordingCache | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Decode all recordings, write ``audit_csv`` and return it: one row per recording, by path.

    Columns: the fields of `Measurement`, and status, usable and reason. An unchanged file is not
    measured again where an earlier audit, finished or killed, did so. ``workers`` processes decode
    (None: one per core; 0: this process alone). With ``cache``, the decoded audio is stored there.
    """
    durations = recordings.set_index("path")["duration"].to_dict()
    names = sorted(durations)
    journal_path = audit_csv.with_suffix(".journal")
    fingerprint = digest(json.dumps(code_digest("data.audit")))
    with Journal(journal_path, fingerprint, restart=True) as journal:
        known: dict[str, Measurement] = {}
        if audit_csv.is_file():
            try:
                rows = read_audit(audit_csv)[_MEASURED]
                known = {row["path"]: Measurement(**row) for row in rows.to_dict("records")}
            except ValueError as error:
                logger.warning("starting over: %s", error)
        known |= {key["path"]: Measurement(**values) for key, values in journal.items()}
        earlier = [known[name] for name in names if name in known]
        measured = {item.path: item for item in earlier if _is_current(data, item, cache)}
        pending = [name for name in names if name not in measured]
        if cache is not None:
            seconds = sum(durations[name] for name in pending)
            unknown = [data / name for name in pending if not durations[name]]
            n_bytes = sum(path.stat().st_size for path in unknown if path.is_file())
            cache.prepare(seconds + n_bytes / _BYTES_PER_SECOND)
        logger.info("%s: %d recordings to decode, %d known", data, len(pending), len(measured))
        results = _measure_all(data, pending, workers, cache)
        if progress and pending:
            results = tqdm(results, "audit", total=len(pending), unit="recording", smoothing=0.05)
        for measurement in results:
            journal.add({"path": measurement.path}, asdict(measurement))
            measured[measurement.path] = measurement
        audit = _judge([measured[name] for name in names], durations)
        write_atomically(audit_csv, audit.to_csv(index=False, lineterminator="\n"))
        journal_path.unlink(missing_ok=True)  # while no other process can have it open
    return audit


def read_audit(path: Path) -> pd.DataFrame:
    """Read what `audit_recordings` wrote; FileNotFoundError says to run it first."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no audit yet; make it with `birdcall audit`")
    column = "columns"
    try:
        audit = read_table(path, _AUDIT_COLUMNS)[_AUDIT_COLUMNS].reset_index(drop=True)
        for item in fields(Measurement):
            column = f"column {item.name}"
            kind = {"int": "int64", "float": "float64"}.get(str(item.type), "str")
            audit[item.name] = audit[item.name].astype(kind)
    except ValueError as error:
        raise ValueError(f"{path}, {column}: {error}; run `birdcall audit` again") from error
    return audit.assign(usable=audit["usable"].str.lower() == "true")  # Excel writes TRUE


def describe_audit(audit: pd.DataFrame) -> str:
    """Return a few lines: how many recordings have which status, what is left out, and why."""
    hours = audit["seconds"].sum() / 3600
    counts = audit["status"].value_counts()
    parts = [f"{counts[status]} {status}" for status in _STATUSES if status in counts]
    lines = [f"{len(audit)} recordings, {hours:.2f} hours: {', '.join(parts)}"]
    for usable, verdict in ((False, "left out"), (True, "used as far as they decode")):
        rows = audit[(audit["status"] != "ok") & (audit["usable"] == usable)]
        if len(rows):
            lines.append(f"{len(rows)} are {verdict}:")
        for row in rows.head(_MAX_LISTED).itertuples():
            lines.append(f"  {row.path}: {row.status}, {row.reason}")
        if len(rows) > _MAX_LISTED:
            lines.append(f"  and {len(rows) - _MAX_LISTED} more")
    return "\n".join(lines)


def measure_recording(data: Path, name: str, cache: RecordingCache | None = None) -> Measurement:
    """Decode ``data / name`` block by block and measure it; what is wrong is in ``error``."""
    path = data / name
    result = Measurement(name)
    try:
        state = file_state(path)
        result.size, result.mtime_ns = state["size"], state["mtime_ns"]
        require_regular_file(path)
        with path.open("rb") as file:
            result.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with open_audio(path) as file:
            result.sample_rate, result.channels = file.samplerate, file.channels
            result.header_seconds = round((file.promised_frames or 0) / file.samplerate, 6)
            blocks = _measure_blocks(result, file)
            if cache is None:
                deque(blocks, maxlen=0)
            else:
                cache.write(name, resample_blocks(blocks, file.samplerate, cache.sample_rate))
    except AudioError as error:
        result.error = result.error or error.reason
    except OSError as error:
        if error.filename is None or Path(error.filename) != path:
            raise  # the disk of the cache is full, the recording is not damaged
        result.error = error.strerror or str(error)
    return result


def _measure_blocks(result: Measurement, file: AudioFile) -> Iterator[np.ndarray]:
    """Yield the mono waveform of each block; note what is wrong."""
    n_frames = n_clipped = n_silent = 0
    peak = total = sum_of_squares = 0.0
    spectrum = np.zeros(_N_FFT // 2 + 1)
    hann = np.hanning(_N_FFT).astype(np.float32)
    audio_hash = hashlib.blake2b(str(result.sample_rate).encode(), digest_size=16)
    n_window = max(1, round(_WINDOW_SECONDS * result.sample_rate))
    try:
        for block in file.frame_blocks():
            mono = block.mean(axis=1, dtype=np.float32)
            n_frames += len(mono)
            n_clipped += int(np.count_nonzero(np.abs(block) >= _CLIPPED))
            peak = max(peak, float(np.abs(mono).max()))
            samples = mono.astype(np.float64)
            squares = samples**2
            total += float(samples.sum())
            sum_of_squares += float(squares.sum())
            starts = np.arange(0, len(mono), n_window)
            lengths = np.diff(np.append(starts, len(mono)))
            variances = np.add.reduceat(squares, starts) / lengths
            variances -= (np.add.reduceat(samples, starts) / lengths) ** 2
            n_silent += int(lengths[variances < 10 ** (_SILENT_DB / 10)].sum())
            padded = np.pad(mono, (0, max(0, _N_FFT - len(mono))))
            windows = np.lib.stride_tricks.sliding_window_view(padded, _N_FFT)[::_FFT_HOP]
            spectrum += (np.abs(np.fft.rfft(windows * hann)) ** 2).sum(axis=0)
            audio_hash.update(np.rint(mono.clip(-1, 1) * 32767).astype("<i2").tobytes())
            yield mono
        result.error = "; ".join(file.problems)
    except AudioError as error:
        result.error = error.reason
    if not n_frames:
        return
    result.seconds = round(n_frames / result.sample_rate, 6)
    result.peak_db = _decibels(peak**2)
    result.rms_db = _decibels(sum_of_squares / n_frames)
    result.clipped_share = round(n_clipped / n_frames / result.channels, 6)
    result.silent_share = round(n_silent / n_frames, 6)
    result.beyond_share = round(file.levels.beyond_share, 6)
    result.offset = round(total / n_frames, 6)
    bin_hz = result.sample_rate / _N_FFT
    spectrum[: max(1, round(50 / bin_hz))] = 0  # a constant offset is no signal
    loud = np.flatnonzero(spectrum > spectrum.max() * 10 ** (-_BANDWIDTH_DB / 10))
    result.bandwidth_hz = round(float(loud[-1]) * bin_hz, 1) if len(loud) else 0.0
    result.audio_hash = audio_hash.hexdigest()


def _decibels(power: float) -> float:
    return round(10 * float(np.log10(max(power, 10 ** (_FLOOR_DB / 10)))), 2)


def _measure_all(
    data: Path, names: list[str], workers: int | None, cache: RecordingCache | None
) -> Iterator[Measurement]:
    """Measure recordings in worker processes, in the order in which they finish.

    A file that crashes the decoder ends its worker and the pool. The recordings that were being
    decoded are measured again, each in a new process; what crashes again is unreadable.
    """
    if workers == 0:
        yield from (measure_recording(data, name, cache) for name in names)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
    make_pool = partial(ProcessPoolExecutor, mp_context=context, initializer=_start_worker)
    queue = deque(names)
    workers = min(workers or os.cpu_count() or 1, max(1, len(names)))
    while queue:
        running: dict[Future[Measurement], str] = {}
        try:
            with make_pool(workers) as pool:
                while queue or running:
                    while queue and len(running) < 2 * workers:
                        name = queue[0]  # it stays there if the pool is broken already
                        running[pool.submit(measure_recording, data, name, cache)] = name
                        queue.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        measurement = future.result()
                        del running[future]
                        yield measurement
        except BrokenProcessPool:
            for name in list(running.values()) or [queue.popleft()]:
                try:
                    with make_pool(1) as pool:
                        yield pool.submit(measure_recording, data, name, cache).result()
                except BrokenProcessPool:
                    yield Measurement(name, error="crashes the decoder")


def _start_worker() -> None:
    """End a worker with its parent, leave Ctrl-C to the parent, and silence libmpg123."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its warnings would break the progress bar
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        parent.join()
        os._exit(1)  # a killed parent cannot tell its workers to stop

    threading.Thread(target=follow_parent, daemon=True).start()


def _is_current(data: Path, measurement: Measurement, cache: RecordingCache | None) -> bool:
    """Return whether the file is as measured, and cached if need be; an error may have passed."""
    try:
        state = file_state(data / measurement.path)
        is_cached = cache is None or cache.path(measurement.path).is_file()
    except OSError:
        return False
    is_same = state == {"size": measurement.size, "mtime_ns": measurement.mtime_ns}
    return is_same and not measurement.error and (is_cached or not measurement.seconds)


def _judge(measured: list[Measurement], durations: dict[str, float]) -> pd.DataFrame:
    """Add verdicts; of identical audio under several paths the first usable one stays."""
    first_of: dict[str, str] = {}
    rows = []
    for item in measured:
        status, reason = _verdict(item, durations[item.path])
        is_long_enough = item.seconds * (1 - item.silent_share) >= _MIN_TRUNCATED_SECONDS
        is_part = status in ("truncated", "damaged")
        usable = status in ("ok", "dc_offset") or (is_part and is_long_enough)
        if usable and first_of.setdefault(item.audio_hash, item.path) != item.path:
            status, usable = "duplicate", False
            reason = f"the same audio as {first_of[item.audio_hash]}"
        rows.append(asdict(item) | {"status": status, "usable": usable, "reason": reason})
    return pd.DataFrame(rows, columns=_AUDIT_COLUMNS)


def _verdict(item: Measurement, duration: float) -> tuple[str, str]:
    """Return status and reason of one recording; ``duration`` is the table's, 0 if unknown."""
    if not item.seconds:
        return "unreadable", item.error or "has no samples"
    if item.beyond_share > MAX_BEYOND_SHARE:
        return "absurd_level", item.error
    if item.silent_share == 1:
        if abs(item.offset) >= _MIN_OFFSET:
            return "constant", f"all samples are near {item.offset:g}, without any sound"
        return "silent", f"never louder than {_SILENT_DB:g} dB"
    promises = (
        ("its header", item.header_seconds, LENGTH_TOLERANCE),
        ("the table of recordings", duration, _TABLE_TOLERANCE),
    )
    for source, promised, tolerance in promises:
        if is_cut(item.seconds, promised, tolerance):
            reason = f"{source} says {promised:g} s, {item.seconds:.1f} s decode"
            return "truncated", reason + (f" ({item.error})" if item.error else "")
    if item.error:
        return "damaged", item.error
    if item.seconds < _MIN_SECONDS:
        return "too_short", f"{item.seconds:.2f} s, less than {_MIN_SECONDS:g} s"
    if abs(item.offset) >= _MIN_OFFSET and 10 ** (item.rms_db / 10) < 2 * item.offset**2:
        return "dc_offset", f"a constant {item.offset:g}, louder than the sound, is added to it"
    return "ok", ""
