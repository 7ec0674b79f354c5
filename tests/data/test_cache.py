"""The cache gives back what was decoded, never what is stale, and survives a kill."""

import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from birdcall.audio.reading import AudioError, iterate_audio, read_audio
from birdcall.data.cache import (
    CropRequest,
    RecordingCache,
    as_cached,
    cached_samples,
    read_cached,
    write_waveform,
)

RATE = 32_000
NAME = "train_audio/aldfly/XC1 Ä.mp3"


@pytest.fixture(scope="module")
def mp3(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A recording of 7.7 s."""
    path = tmp_path_factory.mktemp("mp3") / "a.mp3"
    write_noise(path, 7.7)
    return path.read_bytes()


@pytest.fixture
def data(mp3: bytes, tmp_path: Path) -> Path:
    """Make a data folder with one recording."""
    path = tmp_path / "data" / NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(mp3)
    return tmp_path / "data"


def write_noise(path: Path, seconds: float, scale: float = 0.3, seed: int = 0) -> None:
    waveform = np.random.default_rng(seed).normal(0, scale, (round(seconds * 44_100), 2))
    soundfile.write(path, waveform, 44_100)


@pytest.fixture
def cache(data: Path, tmp_path: Path) -> RecordingCache:
    return RecordingCache(data, tmp_path / "cache")


def fill(cache: RecordingCache) -> Path:
    cache.write(NAME, iterate_audio(cache.data / NAME, RATE, 1.0))
    return cache.path(NAME)


def read(
    cache: RecordingCache, offset: float, seconds: float | None, downmix: float | None = None
) -> np.ndarray:
    return cache(CropRequest(NAME, RATE, (offset,), seconds, downmix=downmix))[0]


@pytest.mark.parametrize("offset, duration", [(0, None), (0, 5), (1.234, 5), (7.5, None), (2, 5.7)])
def test_a_cached_read_equals_the_decoded_stretch(
    cache: RecordingCache, data: Path, offset: float, duration: float | None
) -> None:
    fill(cache)
    expected = read_audio(data / NAME, RATE, offset, duration)
    cached = read(cache, offset, duration)
    assert cached.dtype == np.float32
    np.testing.assert_allclose(cached, expected, atol=1e-4)


@pytest.mark.parametrize("peak", [1e-5, 0.01, 1.0, 2.5])
def test_quiet_sound_keeps_its_detail_and_loud_sound_is_not_clipped(
    tmp_path: Path, peak: float
) -> None:
    waveform = peak * np.sin(np.arange(RATE)).astype(np.float32)
    assert write_waveform(tmp_path / "a.npy", [waveform[:999], waveform[999:]]) == RATE
    cached = read_cached(tmp_path / "a.npy")
    np.testing.assert_allclose(cached, waveform, atol=2e-5 * max(peak, 1e-3))


@pytest.mark.parametrize("peak", [0.0, 1e-5, 0.3, 2.5])
def test_what_would_be_cached_is_what_a_cached_file_gives_back(tmp_path: Path, peak: float) -> None:
    waveform = peak * np.sin(np.arange(RATE)).astype(np.float32)
    write_waveform(tmp_path / "a.npy", [waveform])
    samples, step = as_cached(waveform)
    assert samples.dtype == np.int16
    kept = np.multiply(samples, step, dtype=np.float32)
    np.testing.assert_array_equal(kept, read_cached(tmp_path / "a.npy"))
    assert cached_samples(tmp_path / "a.npy") == RATE


def test_a_downmix_is_for_files_and_cached_sound_is_mono_already(
    cache: RecordingCache, data: Path
) -> None:
    from_file = read(cache, 1, 2, 0.0)
    np.testing.assert_array_equal(
        from_file, read_audio(data / NAME, RATE, offset_seconds=1, duration_seconds=2, downmix=0.0)
    )
    assert not np.array_equal(from_file, read(cache, 1, 2, 1.0))
    fill(cache)
    mono = [read(cache, 1, 2, downmix) for downmix in (None, 0.0, 1.0)]
    np.testing.assert_array_equal(mono[1], mono[0])
    np.testing.assert_array_equal(mono[2], mono[0])


def test_a_cached_file_is_a_plain_npy(cache: RecordingCache, data: Path) -> None:
    samples = np.load(fill(cache), mmap_mode="r")
    assert (samples.dtype, samples.shape) == (np.int16, (len(read_audio(data / NAME, RATE)),))


def test_without_a_cached_file_the_recording_itself_is_read(
    cache: RecordingCache, data: Path
) -> None:
    assert not cache.path(NAME).is_file()
    np.testing.assert_array_equal(read(cache, 1, 2), read_audio(data / NAME, RATE, 1, 2))
    fill(cache)
    assert cache.path(NAME).is_file()


def test_a_changed_recording_is_read_anew_and_replaces_the_old_one(
    cache: RecordingCache, data: Path
) -> None:
    stale = fill(cache)
    write_noise(data / NAME, 3.0, seed=1)
    os.utime(data / NAME, ns=(0, 1))
    assert not cache.path(NAME).is_file()
    assert len(read(cache, 0, None)) < 4 * RATE
    fresh = fill(cache)
    assert fresh.is_file()
    assert not stale.exists()


def test_an_interrupted_write_leaves_nothing_behind(cache: RecordingCache, data: Path) -> None:
    def blocks() -> object:
        yield np.zeros(RATE, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(NAME, blocks())
    assert not [path for path in cache.folder.rglob("*") if path.is_file()]


def test_what_a_kill_left_is_cleared_away(cache: RecordingCache, data: Path) -> None:
    kept = fill(cache)
    left = kept.with_name(f".{kept.stem}.0123456789abcdef.npy")  # as `atomic_path` names them
    left.write_bytes(b"half")
    cache.prepare(0)
    assert [path for path in cache.folder.rglob("*") if path.is_file()] == [kept]


def test_sound_without_samples_is_not_kept(cache: RecordingCache, data: Path) -> None:
    with pytest.raises(AudioError, match="has no samples"):
        cache.write(NAME, [np.zeros(0, np.float32)])
    assert not cache.path(NAME).is_file()


def test_a_stretch_beyond_the_end_raises_with_the_path(cache: RecordingCache, data: Path) -> None:
    path = fill(cache)
    for offset, duration in [(5, 5), (9, None), (0, 7.8)]:
        with pytest.raises(AudioError, match="asked for") as caught:
            read(cache, offset, duration)
        assert str(path) in str(caught.value)


def test_a_stretch_that_ends_with_the_file_can_be_asked_for_in_rounded_seconds(
    tmp_path: Path,
) -> None:
    write_waveform(tmp_path / "a.npy", [np.ones(2 * RATE, np.float32)])
    assert len(read_cached(tmp_path / "a.npy", 1 + 0.6 / RATE, 1 - 0.4 / RATE)) == RATE


def test_the_disk_need_is_said_and_too_little_disk_raises(
    cache: RecordingCache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        cache.prepare(3600)
    assert "the cache needs 0.23 GB" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"needs 0\.23 GB, 0\.00 GB are free; make room") as caught:
        cache.prepare(3600)
    assert "\n" not in str(caught.value)
