"""Write data in the competition's layout: the demo with synthetic birds, and a whole season."""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import secrets
import shutil
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from tqdm import tqdm

from birdcall.audio.filters import crop_or_pad
from birdcall.audio.reading import AudioError, read_audio
from birdcall.config import NOCALL
from birdcall.data.recordings import read_recordings
from birdcall.demo.plan import (
    DemoConfig,
    DemoPlan,
    RecordingPlan,
    SoundscapePlan,
    draw_seed,
    pick,
)
from birdcall.demo.rendering import Plan, write_file
from birdcall.demo.schedule import plan_demo
from birdcall.storage.files import write_atomically
from birdcall.taxonomy import UNKNOWN_BIRD, all_species, species_of

TRAIN_COLUMNS = (
    *("rating", "playback_used", "ebird_code", "channels", "date", "pitch", "duration", "filename"),
    *("speed", "species", "number_of_notes", "title", "secondary_labels", "bird_seen", "sci_name"),
    *("location", "latitude", "sampling_rate", "type", "elevation", "description"),
    *("bitrate_of_mp3", "file_type", "volume", "background", "xc_id", "url", "country", "author"),
    *("primary_label", "longitude", "length", "time", "recordist", "license"),
)
_UNSPECIFIED_COLUMNS = ("pitch", "speed", "number_of_notes", "volume", "length")
_METADATA_COLUMNS = (
    *("file_id", "device", "date", "hour", "source", "ebird_code", "certainty", "vox_type"),
    *("time_start", "time_end", "channel"),
)
_MARKER = "demo.json"
_VERSION = 1  # raise it when the same config makes other data
_SECONDS_PER_WORKER = 120  # of audio; to start a process for less does not pay
_VISIBLE_ROWS = 3
_LICENSE = "made by birdcall demo, MIT"

logger = logging.getLogger(__name__)


def make_demo(
    data: Path,
    config: DemoConfig = DemoConfig(),
    workers: int | None = None,
    progress: bool = False,
) -> None:
    """Write the demo data to ``data``, whole or not at all; the same config, the same bytes.

    ``workers`` processes make the audio, by default as many as there are processors. A folder with
    the demo of this config is left as it is; any other folder that is not empty is an error.
    """
    content = {"made_by": "birdcall demo", "version": _VERSION, "config": asdict(config)}
    marker = json.dumps(content, indent=2) + "\n"
    if data.exists() and not (data.is_dir() and not any(data.iterdir())):
        path = data / _MARKER
        if path.is_file() and path.read_text(encoding="utf-8") == marker:
            logger.info("%s holds this demo already; it is left as it is", data)
            return
        state = "the demo of another config or version" if path.is_file() else "not empty, no demo"
        raise ValueError(f"{data} is {state}; remove it or give another folder")
    plan = plan_demo(config)
    data.parent.mkdir(parents=True, exist_ok=True)
    folder = data.parent / f".{data.name}.{secrets.token_hex(8)}"
    try:
        _write_audio(folder, plan, workers, progress)
        _write_tables(folder, plan, config)
        (folder / _MARKER).write_text(marker, encoding="utf-8")
        if data.is_dir():
            data.rmdir()  # it is empty, see above
        folder.rename(data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    n_soundscapes = len(plan.examples) + len(plan.tests)
    logger.info("%s: %d recordings, %d soundscapes", data, len(plan.recordings), n_soundscapes)


def write_annotations(folder: Path, n_annotations: int, n_recordings: int, hours: float) -> None:
    """Write random annotations of silent recordings, in the Cornell Lab's layout, to a new folder.

    The recordings are one file under many names: to read annotations, only its length counts.
    """
    folder.mkdir(parents=True)
    seconds, rate = round(3600 * hours / n_recordings), 8000
    names = [f"soundscape{number:04d}.wav" for number in range(n_recordings)]
    silence = np.zeros(seconds * rate, np.int16)
    soundfile.write(folder / names[0], silence, rate, subtype="PCM_U8")
    for name in names[1:]:
        (folder / name).hardlink_to(folder / names[0])
    generator = np.random.default_rng(0)
    codes = [*(species.ebird_code for species in all_species()), UNKNOWN_BIRD, "foreign"]
    onset = generator.uniform(0, seconds, n_annotations).round(3)
    table = {
        "Filename": generator.choice(names, n_annotations),
        "Start Time (s)": onset,
        "End Time (s)": (onset + generator.gamma(2, 1, n_annotations)).round(3),
        "Low Freq (Hz)": 0,
        "High Freq (Hz)": 4000,
        "Species eBird Code": generator.choice(codes, n_annotations),
    }
    pd.DataFrame(table).to_csv(folder / "annotations.csv", index=False)


def _write_audio(folder: Path, plan: DemoPlan, workers: int | None, progress: bool) -> None:
    plans: list[Plan] = [*plan.examples, *plan.tests, *plan.recordings, *plan.noises]
    for parent in ("example_test_audio", "test_audio", "noise"):
        (folder / parent).mkdir(parents=True)
    for item in plans:
        (folder / item.path).parent.mkdir(parents=True, exist_ok=True)
    if workers is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        n_processors = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        seconds = sum(item.seconds for item in plans)
        workers = max(1, min(n_processors, int(seconds // _SECONDS_PER_WORKER)))
    write = partial(write_file, folder)
    progress_bar = partial(tqdm, total=len(plans), desc="demo", unit="file", disable=not progress)
    if workers == 1:
        deque(progress_bar(map(write, plans)), maxlen=0)
        return
    # Not fork: the caller may have started torch's threads, which a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: it is for the caller
    with ProcessPoolExecutor(workers, context, signal.signal, ignore) as pool:
        try:
            deque(progress_bar(pool.map(write, plans)), maxlen=0)
        finally:
            pool.shutdown(cancel_futures=True)


# --- tables ---


def _write_tables(folder: Path, plan: DemoPlan, config: DemoConfig) -> None:
    _write_csv(
        folder / "train.csv",
        TRAIN_COLUMNS,
        (_train_row(recording, folder, config) for recording in plan.recordings),
    )
    tests = [
        {
            "site": soundscape.site,
            "row_id": f"{soundscape.site}_{soundscape.name}" + ("" if end is None else f"_{end}"),
            "seconds": "" if end is None else end,
            "audio_id": soundscape.name,
            "birds": " ".join(codes) or NOCALL,
        }
        for soundscape in plan.tests
        for end, codes in soundscape.labels()
    ]
    _write_csv(folder / "test.csv", ("site", "row_id", "seconds", "audio_id"), tests)
    _write_csv(folder / "solution.csv", ("row_id", "birds"), tests)
    sample = [{**row, "birds": NOCALL} for row in tests[:_VISIBLE_ROWS]]
    _write_csv(folder / "sample_submission.csv", ("row_id", "birds"), sample)
    _write_csv(
        folder / "example_test_audio_summary.csv",
        ("filename_seconds", "birds", "filename", "seconds"),
        (
            {
                "filename_seconds": f"{soundscape.name}_{end}",
                "birds": " ".join(codes),
                "filename": soundscape.name,
                "seconds": end,
            }
            for soundscape in plan.examples
            for end, codes in soundscape.labels(with_animals=True)
        ),
    )
    _write_csv(
        folder / "example_test_audio_metadata.csv",
        _METADATA_COLUMNS,
        (row for soundscape in plan.examples for row in _metadata_rows(soundscape)),
    )


def _write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _metadata_rows(soundscape: SoundscapePlan) -> Iterator[dict[str, object]]:
    device, day, hour = soundscape.name.split("_")
    for song in soundscape.labelled_songs():
        yield {
            "file_id": soundscape.name,
            "device": device,
            "date": day,
            "hour": int(hour),
            "source": "demo",
            "ebird_code": song.ebird_code,
            "certainty": "c" if song.snr_db > 5 else "l" if song.snr_db > 2 else "q",
            "vox_type": "chatter" if song.ebird_code == "squirrel" else song.song.kind,
            "time_start": round(song.onset_seconds, 6),
            "time_end": round(song.offset_seconds, 6),
            "channel": 1,
        }


def _train_row(recording: RecordingPlan, folder: Path, config: DemoConfig) -> dict[str, object]:
    """Return a row of train.csv, with the competition's quirks: units, gaps, lists as text."""
    generator = np.random.default_rng(draw_seed(config, "train row", recording.xc_id))
    species, recordist, xc_id = recording.species, recording.recordist, recording.xc_id
    # A better recording gets a better rating, more or less; some have none, which reads 0.
    stars = 1.5 + (recording.snr_db - 10) / 25 * 3 + 0.6 * generator.standard_normal()
    bits = round(8 * (folder / recording.path).stat().st_size / recording.seconds)
    return {
        **dict.fromkeys(_UNSPECIFIED_COLUMNS, "Not specified"),
        "rating": 0.0 if generator.random() < 0.04 else np.clip(round(2 * stars) / 2, 0.5, 5.0),
        "playback_used": pick(generator, ("no", "no", "no", "yes", "")),
        "ebird_code": species.ebird_code,
        "channels": "1 (mono)" if recordist.channels == 1 else "2 (stereo)",
        "date": f"20{generator.integers(8, 20):02d}-{generator.integers(4, 8):02d}"
        f"-{generator.integers(1, 31):02d}",
        "duration": round(recording.seconds),
        "filename": Path(recording.path).name,
        "species": species.common_name,
        "title": f"XC{xc_id} {species.common_name} ({species.scientific_name})",
        "secondary_labels": str([other.label for other in recording.listed]),
        "bird_seen": pick(generator, ("yes", "yes", "no", "")),
        "sci_name": species.scientific_name,
        "location": recordist.location,
        "latitude": recordist.latitude,
        "sampling_rate": f"{recordist.sample_rate} (Hz)",
        "type": recording.songs[0].song.kind if recording.songs else "song",
        "elevation": pick(generator, ("? m", f"{10 * generator.integers(1, 90)} m")),
        "description": pick(generator, ("", "", "Male singing from the top of a tree.")),
        "bitrate_of_mp3": "" if generator.random() < 0.01 else f"{bits} (bps)",
        "file_type": "mp3",
        "background": "; ".join(
            f"{other.common_name} ({other.scientific_name})" for other in recording.listed
        ),
        "xc_id": xc_id,
        "url": f"https://www.xeno-canto.org/{xc_id}",
        "country": recordist.country,
        "author": recordist.name,
        "primary_label": species.label,
        "longitude": recordist.longitude,
        "time": pick(generator, ("?", f"{generator.integers(4, 11)}:{generator.integers(60):02d}")),
        "recordist": recordist.name,
        "license": _LICENSE,
    }


# --- a season ---

_RATE = 48_000  # Hz; 128 kbit/s are whole frames of 384 bytes there, without padding
_FRAME_BYTES, _FRAME_SAMPLES = 384, 1152
_LEVEL = 0.65  # libsndfile's compression of 128 kbit/s
_MIN_SOUND, _MAX_SOUND = 26, 58  # frames: 0.6 to 1.4 s
_N_LENGTHS = _MAX_SOUND - _MIN_SOUND + 1


class SoundBank:
    """Short mp3 files of real sound, each unlike all others as the audit compares them.

    The sound of a recording repeats at another length. It is cut between frames, which takes no
    time, and so a season needs 1,332 encodings and no more.
    """

    def __init__(self, data: Path) -> None:
        self.paths = [data / path for path in read_recordings(data)["path"]]
        self._encode = cache(self._encode_crop)

    def sound(self, number: int) -> tuple[bytes, float]:
        """Return the mp3 of a recording by number, and its seconds."""
        crop, length = divmod(number, _N_LENGTHS)
        n_frames = _MIN_SOUND + length
        return self._encode(crop)[: n_frames * _FRAME_BYTES], n_frames * _FRAME_SAMPLES / _RATE

    def _encode_crop(self, crop: int) -> bytes:
        n_samples = _MAX_SOUND * _FRAME_SAMPLES
        generator = np.random.default_rng(crop)
        for attempt in range(crop, crop + len(self.paths)):
            try:
                waveform = read_audio(self.paths[attempt % len(self.paths)], _RATE)
            except AudioError:
                continue
            start = int(generator.integers(max(1, len(waveform) - n_samples)))
            waveform = crop_or_pad(waveform[start:], n_samples)
            if np.abs(waveform).max() < 1e-3:
                continue
            # A faint noise tells crops apart where a folder has few sounds.
            waveform = waveform + generator.normal(0, 1e-4, n_samples).astype(np.float32)
            file = BytesIO()
            soundfile.write(
                *(file, waveform, _RATE),
                format="MP3",
                bitrate_mode="CONSTANT",
                compression_level=_LEVEL,
            )
            content = file.getvalue()
            has_header = b"Info" in content[:_FRAME_BYTES]  # it states the length before the cut
            return content[_FRAME_BYTES if has_header else 0 :]
        raise ValueError(f"none of {len(self.paths)} recordings has sound, such as {self.paths[0]}")


def write_season(folder: Path, names: pd.DataFrame, bank: SoundBank, n_repeats: int = 1) -> float:
    """Write ``train.csv`` and the recordings of ``names``; return the hours of sound.

    With ``n_repeats`` each recording is so many times as long.
    """
    rows = []
    for code in names["ebird_code"].unique():
        (folder / "train_audio" / code).mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(names.itertuples()):
        content, seconds = bank.sound(number)
        (folder / "train_audio" / row.ebird_code / row.filename).write_bytes(content * n_repeats)
        species = [species_of(code) for code in row.background_codes.split()]
        primary = species_of(row.ebird_code)
        rows.append(
            {
                "filename": row.filename,
                "ebird_code": row.ebird_code,
                "recordist": row.recordist,
                "primary_label": primary.label if primary else row.ebird_code,
                "secondary_labels": str([item.label for item in species if item]),
                "rating": 4.0,
                "duration": seconds * n_repeats,
                "sampling_rate": f"{_RATE} (Hz)",
            }
        )
    table = pd.DataFrame(rows)
    write_atomically(folder / "train.csv", table.to_csv(index=False, lineterminator="\n"))
    return float(table["duration"].sum()) / 3600
