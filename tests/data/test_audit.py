"""Every recording gets the right verdict, whatever is wrong with it; a kill costs no result."""

import io
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from birdcall.__main__ import main
from birdcall.data import audit as audit_module
from birdcall.data.audit import (
    audit_recordings,
    describe_audit,
    measure_recording,
    read_audit,
)
from birdcall.data.cache import CropRequest, RecordingCache
from birdcall.data.recordings import audio_hashes, usable_recordings

RATE = 44_100
FOLDER = "train_audio/aldfly"


def make_noise(seconds: float, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, (round(seconds * rate), channels))


def encode(waveform: np.ndarray, rate: int = RATE, kind: str = "MP3") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format=kind)
    return file.getvalue()


def encode_constant(waveform: np.ndarray) -> bytes:
    """Encode an mp3 at 44.1 kHz whose frames are all of 160 kbit/s."""
    file = io.BytesIO()
    options = {"bitrate_mode": "CONSTANT", "compression_level": 0.6}
    soundfile.write(file, waveform, RATE, format="MP3", **options)
    return file.getvalue()


def without_length(mp3: bytes) -> bytes:
    """Cut off the first frame, the Info header, which states the length."""
    length = 144 * 160_000 // RATE + (mp3[2] >> 1 & 1)
    assert b"Info" in mp3[:length]
    assert mp3[length : length + 2] == mp3[:2]
    return mp3[length:]


def make_table(names: list[str], duration: float = 0.0) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "filename": names,
            "ebird_code": "aldfly",
            "duration": duration,
            "path": [f"{FOLDER}/{name}" for name in names],
        }
    )


def write_files(data: Path, files: dict[str, bytes]) -> pd.DataFrame:
    """Write files into a data folder and return the table that names them."""
    (data / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (data / FOLDER / name).write_bytes(content)
    return make_table(list(files))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """Make a data folder with every kind of damage."""
    data = tmp_path_factory.mktemp("damaged")
    sound = encode(make_noise(12))
    garbage = bytearray(sound)
    garbage[len(sound) // 2 : len(sound) // 2 + 20_000] = np.random.default_rng(1).bytes(20_000)
    files = {
        "a good one.mp3": sound,
        "truncated.mp3": sound[: len(sound) // 3],
        "stump.mp3": sound[: len(sound) // 40],
        "truncated.wav": encode(make_noise(12, seed=3), kind="WAV")[:500_000],
        "truncated.flac": encode(make_noise(12, seed=4), kind="FLAC")[:500_000],
        "garbage.mp3": bytes(garbage),
        "noise.mp3": np.random.default_rng(2).bytes(30_000),
        "empty.mp3": b"",
        "html.mp3": b"<!DOCTYPE html><html><body>Not found</body></html>" * 50,
        "header only.wav": encode(make_noise(0), kind="WAV"),
        "192 kHz.wav": encode(make_noise(2, 192_000, seed=5), 192_000, "WAV"),
        "8 channels.wav": encode(make_noise(2, RATE, 8, seed=6), RATE, "WAV"),
        "click.mp3": encode(make_noise(0.1, seed=7)),
        "Größe 鳥 № 1.mp3": encode(make_noise(3, seed=8)),
        "silent.mp3": encode(np.zeros(3 * RATE)),
        "whisper.wav": encode(1e-3 * make_noise(3, seed=9), kind="FLAC"),
        "twin.mp3": sound + b"TAG" + b"another title".ljust(125, b"\0"),
    }
    table = write_files(data, files)
    (data / FOLDER / "loop.mp3").symlink_to("loop.mp3")
    (data / FOLDER / "folder.mp3").mkdir()
    os.mkfifo(data / FOLDER / "pipe.mp3")
    table = make_table([*table["filename"], "loop.mp3", "folder.mp3", "pipe.mp3", "gone.mp3"])
    table.loc[table["filename"] == "truncated.wav", "duration"] = 12.0
    return data, table


EXPECTED = {
    "a good one.mp3": ("ok", True, "^$"),
    "truncated.mp3": ("truncated", True, "its header says 12 s, 3.9 s decode"),
    "stump.mp3": ("truncated", False, "its header says 12 s, 0.2 s decode"),
    "truncated.wav": ("truncated", True, "its header says 12 s, 5.7 s decode"),
    "truncated.flac": (
        "truncated",
        True,
        r"its header .*\(cannot be decoded: .*lost sync at 6\.50 s\)",
    ),
    "garbage.mp3": ("damaged", True, r"2\.30 s, from 5\.98 s on, are damaged"),
    "noise.mp3": ("unreadable", False, "cannot be decoded"),
    "empty.mp3": ("unreadable", False, "cannot be decoded"),
    "html.mp3": ("unreadable", False, "cannot be decoded"),
    "header only.wav": ("unreadable", False, "has no samples"),
    "192 kHz.wav": ("ok", True, "^$"),
    "8 channels.wav": ("ok", True, "^$"),
    "click.mp3": ("too_short", False, "0.1. s, less than 0.5 s"),
    "Größe 鳥 № 1.mp3": ("ok", True, "^$"),
    "silent.mp3": ("silent", False, "never louder than -80 dB"),
    "whisper.wav": ("ok", True, "^$"),
    "twin.mp3": ("duplicate", False, f"the same audio as {FOLDER}/a good one.mp3"),
    "loop.mp3": ("unreadable", False, "symbolic links"),
    "folder.mp3": ("unreadable", False, "not a regular file"),
    "pipe.mp3": ("unreadable", False, "not a regular file"),
    "gone.mp3": ("unreadable", False, "No such file"),
}


@pytest.fixture(scope="module")
def verdicts(
    damaged: tuple[Path, pd.DataFrame], tmp_path_factory: pytest.TempPathFactory
) -> pd.DataFrame:
    """Audit the damaged folder in this process; the command does it in two workers."""
    data, table = damaged
    audit = audit_recordings(data, table, tmp_path_factory.mktemp("out") / "audit.csv", workers=0)
    return audit.assign(name=[Path(path).name for path in audit["path"]]).set_index("name")


def test_no_recording_is_skipped(verdicts: pd.DataFrame) -> None:
    assert sorted(verdicts.index) == sorted(EXPECTED)
    assert list(verdicts["path"]) == sorted(verdicts["path"])


@pytest.mark.parametrize("name", EXPECTED)
def test_every_kind_of_damage_gets_the_right_verdict(verdicts: pd.DataFrame, name: str) -> None:
    status, usable, reason = EXPECTED[name]
    row = verdicts.loc[name]
    assert (row["status"], row["usable"]) == (status, usable)
    assert re.search(reason, row["reason"])


def test_the_true_length_rate_and_channels_are_told(verdicts: pd.DataFrame) -> None:
    row = verdicts.loc["8 channels.wav"]
    assert (row["sample_rate"], row["channels"], row["seconds"]) == (RATE, 8, 2.0)
    assert verdicts.loc["192 kHz.wav", ["sample_rate", "seconds"]].to_list() == [192_000, 2.0]
    row = verdicts.loc["truncated.mp3"]
    assert row["header_seconds"] == pytest.approx(12, abs=0.1)
    assert row["seconds"] == pytest.approx(4, abs=0.2)


def test_a_description_lists_what_is_left_out_and_what_is_cut_short(
    verdicts: pd.DataFrame,
) -> None:
    text = describe_audit(verdicts)
    assert text.startswith("21 recordings, ")
    assert "12 are left out:" in text
    assert f"  {FOLDER}/html.mp3: unreadable, cannot be decoded" in text
    assert "4 are used as far as they decode:" in text


def test_only_usable_recordings_are_kept_with_their_true_length(
    damaged: tuple[Path, pd.DataFrame], verdicts: pd.DataFrame
) -> None:
    _, table = damaged
    usable = usable_recordings(table, verdicts)
    assert list(usable["filename"]) == [name for name in EXPECTED if EXPECTED[name][1]]
    seconds = usable.set_index("filename")["seconds"]
    assert seconds["truncated.mp3"] == pytest.approx(4, abs=0.2)
    sounds = dict(zip(table["filename"], audio_hashes(table, verdicts), strict=True))
    assert sounds["twin.mp3"] == sounds["a good one.mp3"] != sounds["8 channels.wav"]
    assert sounds["empty.mp3"] == ""
    with pytest.raises(ValueError, match=r"does not know .*new\.mp3 .* run `birdcall audit`"):
        usable_recordings(make_table(["new.mp3"]), verdicts)


def test_absurd_levels_constants_and_offsets_have_verdicts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir(parents=True)
    sound = make_noise(3)
    bursts = sound.copy()
    bursts[RATE : RATE + 3] = 1e29
    waveforms = {
        "bursts.wav": bursts,
        "constant.wav": np.full((3 * RATE, 1), 0.2),
        "integers.wav": 32768 * sound,
        "offset.wav": sound + 0.5,
        "slight offset.wav": make_noise(3, seed=1) + 0.04,
        "sound then constant.wav": np.concatenate([make_noise(1, seed=2), np.full((RATE, 1), 0.2)]),
    }
    for name, waveform in waveforms.items():
        soundfile.write(tmp_path / FOLDER / name, waveform, RATE, subtype="FLOAT")
    table = make_table(list(waveforms))
    audit = audit_recordings(tmp_path, table, tmp_path / "audit.csv", workers=0)
    verdicts = {Path(row.path).name: (row.status, row.usable) for row in audit.itertuples()}
    assert verdicts == {
        "bursts.wav": ("damaged", True),
        "constant.wav": ("constant", False),
        "integers.wav": ("absurd_level", False),
        "offset.wav": ("dc_offset", True),
        "slight offset.wav": ("ok", True),
        "sound then constant.wav": ("ok", True),
    }
    rows = audit.set_index("path")
    assert rows.loc[f"{FOLDER}/sound then constant.wav", "silent_share"] == pytest.approx(0.5, 0.1)
    assert "1.00 s" in rows.loc[f"{FOLDER}/bursts.wav", "reason"]
    assert "0.2" in rows.loc[f"{FOLDER}/constant.wav", "reason"]
    text = describe_audit(audit)
    assert all(name in text for name, (status, _) in verdicts.items() if status != "ok")


def test_of_a_damaged_recording_at_least_a_second_of_sound_must_be_left(tmp_path: Path) -> None:
    sound = encode_constant(make_noise(12))
    frame = 144 * 160_000 // RATE
    damage = np.random.default_rng(1).bytes(len(sound))
    files = {
        "half.mp3": sound[: 200 * frame] + damage[200 * frame : 400 * frame] + sound[400 * frame :],
        "none.mp3": sound[: 20 * frame] + damage[20 * frame : -20 * frame] + sound[-20 * frame :],
    }
    table = write_files(tmp_path, files)
    audit = audit_recordings(tmp_path, table, tmp_path / "audit.csv", workers=0)
    assert list(audit["status"]) == ["damaged", "damaged"]
    assert list(audit["usable"]) == [True, False]


def tag(size: int) -> bytes:
    """Make an ID3v2 tag with a picture of ``size`` bytes."""
    length = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\0\0" + length + bytes(size)


APE = (
    b"URL" * 100 + b"APETAGEX" + b"".join(n.to_bytes(4, "little") for n in (2000, 332, 4, 0, 0, 0))
)


def test_tags_do_not_make_an_mp3_without_a_stated_length_look_truncated(tmp_path: Path) -> None:
    stated = encode_constant(make_noise(10))
    sound = without_length(stated)
    files = {
        "plain.mp3": sound,
        "picture.mp3": tag(500_000) + sound,
        "licence.mp3": tag(4096) + sound + APE,
        "old.mp3": sound + APE + b"TAG".ljust(128, b" "),
        "stated.mp3": tag(500_000) + stated,
        "stated cut.mp3": tag(500_000) + stated[:60_000],
    }
    table = write_files(tmp_path, files)
    audit = audit_recordings(tmp_path, table, tmp_path / "audit.csv", workers=0)
    assert [(Path(row.path).name, row.status) for row in audit.itertuples()] == [
        ("licence.mp3", "ok"),
        ("old.mp3", "duplicate"),  # of each other: one sound with different tags
        ("picture.mp3", "duplicate"),
        ("plain.mp3", "duplicate"),
        ("stated cut.mp3", "truncated"),
        ("stated.mp3", "ok"),
    ]
    lacking = (audit["header_seconds"] - audit["seconds"])[audit["status"] != "truncated"]
    assert lacking.abs().max() < 0.05


def test_levels_are_those_of_a_known_waveform(tmp_path: Path) -> None:
    times = np.arange(4 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 1000 * times)
    tone[2 * RATE :] = 0  # the second half is silent
    soundfile.write(tmp_path / "a.wav", tone, RATE, subtype="FLOAT")
    found = measure_recording(tmp_path, "a.wav")
    assert found.peak_db == pytest.approx(20 * np.log10(0.5), abs=0.01)
    assert found.rms_db == pytest.approx(10 * np.log10(0.25 / 2 / 2), abs=0.01)
    assert found.silent_share == pytest.approx(0.5, abs=0.1 / 4)  # a window of 0.1 s
    assert found.clipped_share == 0
    assert found.bandwidth_hz == pytest.approx(1000, abs=300)  # it ends with a click
    clipped = np.clip(3 * np.sin(2 * np.pi * 1000 * times), -1, 1)
    soundfile.write(tmp_path / "a.wav", clipped, RATE, subtype="FLOAT")
    share = 2 * np.arccos(1 / 3) / np.pi
    assert measure_recording(tmp_path, "a.wav").clipped_share == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("bandwidth", [4_000, 8_000, 16_000])
def test_bandwidth_tells_what_an_upsampled_recording_lacks(tmp_path: Path, bandwidth: int) -> None:
    spectrum = np.fft.rfft(make_noise(5)[:, 0])
    spectrum[bandwidth * 5 :] = 0
    soundfile.write(tmp_path / "a.wav", np.fft.irfft(spectrum), RATE, subtype="PCM_24")
    assert measure_recording(tmp_path, "a.wav").bandwidth_hz == pytest.approx(bandwidth, abs=200)


def test_sound_in_opposite_phase_is_silent_once_it_is_mono(tmp_path: Path) -> None:
    left = make_noise(2)
    soundfile.write(tmp_path / "a.wav", np.hstack([left, -left]), RATE)
    assert measure_recording(tmp_path, "a.wav").silent_share == 1


@pytest.fixture
def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the names of the recordings that are decoded in this process."""
    names: list[str] = []

    def measure(data: Path, name: str, cache: RecordingCache | None = None) -> object:
        names.append(Path(name).name)
        return measure_recording(data, name, cache)

    monkeypatch.setattr(audit_module, "measure_recording", measure)
    return names


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, pd.DataFrame, Path]:
    """Make three recordings; return data folder, table and where the audit goes."""
    files = {f"XC{seed}.mp3": encode(make_noise(2, seed=seed)) for seed in range(3)}
    return tmp_path / "data", write_files(tmp_path / "data", files), tmp_path / "out/audit.csv"


def test_what_is_known_is_not_decoded_again_and_what_changed_is(
    three: tuple[Path, pd.DataFrame, Path], count_decodes: list[str]
) -> None:
    data, table, path = three
    first = audit_recordings(data, table, path, workers=0)
    content = path.read_bytes()
    assert read_audit(path).equals(first)
    path.write_text(path.read_text().replace(",True,", ",TRUE,"))  # as Excel writes it
    assert read_audit(path).equals(first)
    path.write_bytes(content)
    audit_recordings(data, table, path, workers=0)
    assert count_decodes == ["XC0.mp3", "XC1.mp3", "XC2.mp3"]
    assert path.read_bytes() == content
    (data / FOLDER / "XC1.mp3").write_bytes(encode(make_noise(3, seed=9)))
    audit = audit_recordings(data, table, path, workers=0)
    assert count_decodes[3:] == ["XC1.mp3"]
    assert audit["seconds"][1] == pytest.approx(3, abs=0.1)
    assert len(audit_recordings(data, table.iloc[:2], path, workers=0)) == 2
    assert count_decodes[4:] == []


def test_no_second_audit_begins_before_the_table_of_the_first_is_written(
    three: tuple[Path, pd.DataFrame, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fcntl")
    data, table, path = three
    write = audit_module.write_atomically

    def write_late(target: Path, content: str) -> None:
        with pytest.raises(OSError, match=f"process {os.getpid()}"):
            audit_recordings(data, table, path, workers=0)
        write(target, content)

    monkeypatch.setattr(audit_module, "write_atomically", write_late)
    audit_recordings(data, table, path, workers=0)
    assert list(read_audit(path)["status"]) == ["ok", "ok", "ok"]
    assert [file.name for file in path.parent.iterdir()] == ["audit.csv"]


def test_a_recording_that_could_not_be_read_is_tried_again(
    three: tuple[Path, pd.DataFrame, Path],
    count_decodes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The permission is given, or the disk answers again: the file itself has not changed."""
    data, table, path = three
    opened = audit_module.open_audio

    def refuse(file: Path) -> object:
        if file.name == "XC1.mp3":
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file)

    monkeypatch.setattr(audit_module, "open_audio", refuse)
    audit = audit_recordings(data, table, path, workers=0)
    assert list(audit["status"]) == ["ok", "unreadable", "ok"]
    monkeypatch.setattr(audit_module, "open_audio", opened)
    audit = audit_recordings(data, table, path, workers=0)
    assert list(audit["status"]) == ["ok", "ok", "ok"]
    assert count_decodes[3:] == ["XC1.mp3"]


def test_an_interrupted_audit_resumes_where_it_was(
    three: tuple[Path, pd.DataFrame, Path],
    count_decodes: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, table, path = three
    expected = audit_recordings(data, table, path, workers=0)
    path.unlink()
    count_decodes.clear()
    measure = audit_module.measure_recording

    def interrupt(data: Path, name: str, cache: RecordingCache | None = None) -> object:
        if name.endswith("XC2.mp3"):
            raise KeyboardInterrupt
        return measure(data, name, cache)

    monkeypatch.setattr(audit_module, "measure_recording", interrupt)
    with pytest.raises(KeyboardInterrupt):
        audit_recordings(data, table, path, workers=0)
    assert not path.exists()
    journal = path.with_suffix(".journal")
    journal.write_bytes(journal.read_bytes() + b'{"path": "train_au')  # cut by a power failure
    monkeypatch.setattr(audit_module, "measure_recording", measure)
    assert audit_recordings(data, table, path, workers=0).equals(expected)
    assert count_decodes == ["XC0.mp3", "XC1.mp3", "XC2.mp3"]
    assert not journal.exists()


def test_an_audit_that_is_no_audit_is_made_anew(
    three: tuple[Path, pd.DataFrame, Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, table, path = three
    expected = audit_recordings(data, table, path, workers=0)
    path.write_text(path.read_text().replace(",True,", ",True,surprise,", 1))
    with caplog.at_level(logging.WARNING):
        assert audit_recordings(data, table, path, workers=0).equals(expected)
    assert "starting over" in caplog.text
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"audit\.csv: no audit yet; .*birdcall audit"):
        read_audit(path)


def test_the_cache_is_filled_on_the_way_and_rebuilt_where_it_is_gone_or_stale(
    three: tuple[Path, pd.DataFrame, Path], count_decodes: list[str]
) -> None:
    data, table, path = three
    cache = RecordingCache(data, path.parent / "cache")
    audit_recordings(data, table, path, workers=0)
    audit_recordings(data, table, path, workers=0, cache=cache)
    assert len(count_decodes) == 6
    assert all(cache.path(name).is_file() for name in table["path"])
    cache.path(table["path"][0]).unlink()
    os.utime(data / table["path"][1], ns=(1, 1))
    audit_recordings(data, table, path, workers=0, cache=cache)
    assert count_decodes[6:] == ["XC0.mp3", "XC1.mp3"]
    assert len([file for file in cache.folder.rglob("*") if file.is_file()]) == 3


def test_what_cannot_be_decoded_is_not_cached_and_a_cut_recording_as_far_as_it_goes(
    damaged: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    data, _ = damaged
    table = make_table(["empty.mp3", "truncated.mp3"])
    cache = RecordingCache(data, tmp_path / "cache")
    audit = audit_recordings(data, table, tmp_path / "audit.csv", workers=0, cache=cache)
    assert not cache.path(table["path"][0]).is_file()
    waveform = cache(CropRequest(table["path"][1], cache.sample_rate))[0]
    assert len(waveform) == pytest.approx(audit["seconds"][1] * cache.sample_rate, abs=1)


def test_a_full_disk_stops_the_audit_instead_of_blaming_the_recording(
    three: tuple[Path, pd.DataFrame, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, table, path = three

    def write(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordingCache, "write", write)
    with pytest.raises(OSError, match="No space left"):
        audit_recordings(
            data, table, path, workers=0, cache=RecordingCache(data, path.parent / "cache")
        )


CRASHING = """
import os, sys
from pathlib import Path
import birdcall.data.audit as audit
measure = audit.measure_recording
def crash(data, name, cache=None):
    if "1" in name:
        os.abort()
    return measure(data, name, cache)
audit.measure_recording = crash
if __name__ == "__main__":
    import pandas as pd
    table = pd.read_csv(sys.argv[2]).assign(duration=0.0)
    audit.audit_recordings(Path(sys.argv[1]), table, Path(sys.argv[3]), workers=2)
"""


def test_a_recording_that_crashes_the_decoder_is_named_and_the_others_are_measured(
    three: tuple[Path, pd.DataFrame, Path], tmp_path: Path
) -> None:
    data, table, path = three
    table.to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "crashing.py").write_text(CRASHING)
    command = [sys.executable, "crashing.py", str(data), "table.csv", str(path)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    audit = read_audit(path)
    assert list(audit["status"]) == ["ok", "unreadable", "ok"]
    assert audit["reason"][1] == "crashes the decoder"


def test_a_pool_that_breaks_before_it_takes_a_recording_loses_none(
    three: tuple[Path, pd.DataFrame, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = []

    class Pool:
        """The first breaks after one recording, unnoticed until the next is submitted."""

        def __init__(self, *_args: object, **_options: object) -> None:
            pools.append(self)
            self.n_submitted = 0

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_error: object) -> None:
            pass

        def submit(self, function: Callable[..., object], *arguments: object) -> Future[object]:
            self.n_submitted += 1
            if self is pools[0] and self.n_submitted > 1:
                raise BrokenProcessPool
            future: Future[object] = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(audit_module, "ProcessPoolExecutor", Pool)
    data, table, path = three
    audit = audit_recordings(data, table, path, workers=1)
    assert list(audit["status"]) == ["ok", "ok", "ok"]
    assert len(pools) > 1


COLUMNS = "filename,ebird_code,duration,secondary_labels,recordist,rating,primary_label"


def write_train_csv(data: Path, table: pd.DataFrame) -> None:
    """Write what the real command reads."""
    rows = [
        f'"{row.filename}",aldfly,{row.duration},[],A,4,Empidonax' for row in table.itertuples()
    ]
    (data / "train.csv").write_text("\n".join([COLUMNS, *rows, ""]), encoding="utf-8")


def audit_command(data: Path, output: Path) -> list[str]:
    options = ["--data", str(data), "--output", str(output), "--cache", "--workers", "2"]
    return [sys.executable, "-m", "birdcall", "audit", *options]


def test_the_command_gives_every_kind_of_damage_the_same_verdicts_and_says_what_is_left_out(
    damaged: tuple[Path, pd.DataFrame],
    verdicts: pd.DataFrame,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, table = damaged
    write_train_csv(data, table[table["filename"] != "gone.mp3"])
    done = subprocess.run(audit_command(data, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20 recordings, ")
    assert "11 are left out:" in done.stdout
    audit = read_audit(tmp_path / "audit.csv")
    expected = verdicts[verdicts.index != "gone.mp3"].reset_index(drop=True)
    pd.testing.assert_frame_equal(audit, expected[audit.columns], check_dtype=False)
    cached = {path.name.split(".mp3.")[0] for path in (tmp_path / "cache").rglob("*.mp3.*.npy")}
    assert {"a good one", "truncated", "Größe 鳥 № 1"} <= cached
    assert not {"empty", "html", "noise", "loop"} & cached
    write_train_csv(data, table)
    with pytest.raises(SystemExit, match="2"):  # here: a fresh process takes seconds to start
        main(audit_command(data, tmp_path)[3:])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "gone.mp3: no such file, though the table" in last


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_gives_the_same_table_and_cache(
    damaged: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(damaged[0] / FOLDER, data / FOLDER, symlinks=True, ignore=ignore_pipes)
    write_files(data, {f"XC{n}.mp3": encode(make_noise(20, seed=n)) for n in range(60)})
    names = sorted(path.name for path in (data / FOLDER).iterdir())
    write_train_csv(data, make_table(names))

    def start(output: str) -> subprocess.Popen[bytes]:
        command = audit_command(data, tmp_path / output)
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start("whole").wait() == 0
    took = time.monotonic() - began
    generator, n_killed, n_partial = random.Random(0), 0, 0
    for attempt in range(10):
        # Each run of the first half starts from nothing, the others go on with what they find.
        process = start(f"killed {min(attempt, 5)}")
        try:
            process.wait(generator.uniform(0.4 * took, took))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            n_killed += 1
            n_partial += (tmp_path / f"killed {min(attempt, 5)}" / "audit.journal").is_file()
    assert n_killed >= 5
    assert n_partial >= 3
    expected = files_below(tmp_path / "whole")
    assert len(expected) > 60
    for attempt in range(6):
        assert start(f"killed {attempt}").wait() == 0
        assert files_below(tmp_path / f"killed {attempt}") == expected


def ignore_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in ("pipe.mp3", "folder.mp3")]


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def write_long(path: Path, rate: int, channels: int, minutes: int) -> None:
    """Write the same minute over and over."""
    minute = make_noise(60, rate, channels).astype(np.float32)
    if path.suffix == ".mp3":
        path.write_bytes(without_length(encode_constant(minute)) * minutes)
        return
    with soundfile.SoundFile(path, "w", rate, channels) as file:
        for _ in range(minutes):
            file.write(minute)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
@pytest.mark.parametrize(
    "name, rate, channels, minutes",
    [
        ("long.mp3", RATE, 1, 180),
        ("long.flac", 32_000, 1, 180),
        ("long.wav", 32_000, 1, 180),
        ("wide.flac", 192_000, 8, 3),
    ],
)
def test_a_recording_of_three_hours_is_audited_with_500_mb_in_every_process(
    tmp_path: Path, name: str, rate: int, channels: int, minutes: int
) -> None:
    table = write_files(tmp_path / "data", {name: b""})
    write_long(tmp_path / "data" / FOLDER / name, rate, channels, minutes)
    write_train_csv(tmp_path / "data", table)
    command = audit_command(tmp_path / "data", tmp_path / "out")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *command], check=True, capture_output=True, text=True
    )
    audit = read_audit(tmp_path / "out" / "audit.csv")
    assert list(audit["status"]) == ["ok"]
    assert audit["seconds"][0] == pytest.approx(60 * minutes, rel=1e-3)
    assert float(result.stdout) < 500
    shutil.rmtree(tmp_path)  # gigabytes
