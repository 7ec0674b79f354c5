"""Noise is drawn from anywhere in any file, the same with a store, without one, or a full one."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from birdcall.audio.reading import read_audio
from birdcall.data import noise as noise_files
from birdcall.data.cache import NothingReadableError
from birdcall.data.noise import NoiseFiles, NoiseLimits

RATE = 32_000


def power_db(waveform):
    return 10 * np.log10(np.mean(np.square(waveform, dtype=np.float64)))


def write_noise(path: Path, seconds: float, sample_rate: int = RATE, seed: int = 1) -> Path:
    noise = 0.05 * np.random.default_rng(seed).standard_normal(round(seconds * sample_rate))
    soundfile.write(path, noise, sample_rate)
    return path


@pytest.fixture
def files(tmp_path):
    """A short file, one of another rate and an mp3 long enough for three pieces."""
    write_noise(tmp_path / "a.wav", 1.0)
    write_noise(tmp_path / "b.flac", 5.0, 44_100, seed=2)
    write_noise(tmp_path / "c.mp3", 9.5, 22_050, seed=3)
    return [tmp_path / name for name in ("a.wav", "b.flac", "c.mp3")]


LIMITS = NoiseLimits(piece_seconds=3.0)


def open_noise(paths, store=None, limits=LIMITS):
    return NoiseFiles(paths, RATE, store, limits)


def draw(noise, n_clips=30, n_samples=2 * RATE):
    failures = []
    drawn = [noise.draw(n_samples, np.random.default_rng(n), failures) for n in range(n_clips)]
    assert not failures
    assert all(stretch.dtype == np.float32 and stretch.shape == (n_samples,) for stretch in drawn)
    return np.stack(drawn)


def test_store_or_none_empty_or_full_or_not_to_be_written_gives_the_same_to_the_bit(
    files, tmp_path, caplog
):
    expected = draw(open_noise(files))
    store = tmp_path / "store"
    for _ in range(2):  # it fills, then it is there
        assert np.array_equal(draw(open_noise(files, store)), expected)
    assert len(list(store.rglob("*.npy"))) == 1 + 1 + 3
    assert not caplog.records
    closed = tmp_path / "closed"
    closed.write_text("a file in the store's place")
    assert np.array_equal(draw(open_noise(files, closed)), expected)
    assert caplog.text.count("decoded noise is no longer stored") == 1
    for name, value in (("store_bytes", -1), ("min_free_bytes", 1 << 60)):
        full, limits = tmp_path / f"full by {name}", replace(LIMITS, **{name: value})
        assert np.array_equal(draw(open_noise(files, full, limits)), expected)
        assert bool(list(full.rglob("*.npy"))) is False
    forgetful = open_noise(files, limits=replace(LIMITS, memory_bytes=0))
    assert np.array_equal(draw(forgetful), expected)


def test_what_is_drawn_is_a_stretch_of_the_file_in_its_right_place(files, tmp_path):
    whole = read_audio(files[1], RATE)
    for stretch in draw(open_noise(files[1:2], tmp_path / "store"), 5, RATE):
        spectrum = np.fft.rfft(whole, 1 << 19) * np.fft.rfft(stretch, 1 << 19).conj()
        start = int(np.fft.irfft(spectrum).argmax())
        # mp3, another rate: read by a seek, and rounded to 16 bits
        np.testing.assert_allclose(stretch, whole[start : start + RATE], atol=1e-4)


def test_a_decoded_file_is_not_opened_again(files, tmp_path, monkeypatch):
    store = tmp_path / "store"
    for noise in (open_noise(files, store), open_noise(files)):
        expected = draw(noise)
        with monkeypatch.context() as patch:
            patch.setattr(noise_files, "read_audio", None)
            assert np.array_equal(draw(noise), expected)
    monkeypatch.setattr(noise_files, "read_audio", None)
    assert np.array_equal(draw(open_noise(files, store)), expected), "another process"


def test_a_changed_file_is_decoded_anew_and_the_old_one_leaves_the_store(files, tmp_path):
    store = tmp_path / "store"
    before = draw(open_noise(files[:1], store))
    write_noise(files[0], 2.5, seed=9)
    after = draw(open_noise(files[:1], store))
    assert not np.array_equal(before, after)
    assert np.array_equal(after, draw(open_noise(files[:1])))
    assert len(list(store.rglob("*.npy"))) == 1


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        write_noise(tmp_path / str(number) / "a.wav", 2.0, seed=number)
    paths = [tmp_path / str(number) / "a.wav" for number in range(2)]
    drawn = [draw(open_noise([path], tmp_path / "store"), 1) for path in paths]
    assert not np.array_equal(*drawn)


def test_memory_without_a_store_is_bounded(files):
    noise = open_noise(files, limits=replace(LIMITS, memory_bytes=5 * RATE * 2))
    draw(noise)
    assert 0 < sum(samples.nbytes for samples, _ in noise.memory.values()) <= 5 * RATE * 2


def test_short_noise_is_repeated_and_long_noise_starts_anywhere(tmp_path):
    path = tmp_path / "ramp.wav"
    ramp = np.float32(np.arange(RATE) / RATE)
    soundfile.write(path, ramp, RATE, subtype="FLOAT")
    for store in (None, tmp_path / "store"):
        noise = open_noise([path], store)
        whole = noise.draw(3 * RATE, np.random.default_rng(0), [])
        np.testing.assert_allclose(whole, np.tile(ramp, 3), atol=2e-5)
        starts = [noise.draw(RATE // 4, np.random.default_rng(seed), [])[0] for seed in range(30)]
        assert min(starts) < 0.1
        assert 0.6 < max(starts) < 0.76


def test_all_pieces_of_a_long_file_are_drawn_from(tmp_path):
    path = tmp_path / "ramp.wav"
    soundfile.write(path, np.arange(10 * RATE) / (10 * RATE), RATE, subtype="FLOAT")
    starts = 10 * draw(open_noise([path]), 80, RATE)[:, 0]
    counts = np.histogram(starts, bins=[0, 10 / 3, 20 / 3, 10])[0]
    assert counts.min() > 15
    assert starts.max() <= 9


def test_a_broken_noise_file_is_named_and_another_taken(tmp_path):
    good, broken = write_noise(tmp_path / "good.wav", 5.0), tmp_path / "broken.wav"
    broken.write_bytes(b"<html>not found</html>")
    noise = open_noise([broken, good], tmp_path / "store")
    drawn = []
    for seed in range(20):
        failures = []
        assert power_db(noise.draw(RATE, np.random.default_rng(seed), failures)) > -40
        drawn.append([failure.path for failure in failures])
    assert [str(broken)] in drawn
    assert [] in drawn


def test_noise_of_which_nothing_can_be_read_is_an_error(tmp_path):
    failures = []
    absent = open_noise([tmp_path / "a.wav", tmp_path / "b.wav"])
    with pytest.raises(NothingReadableError, match="none of 2 noise files can be read"):
        absent.draw(RATE, np.random.default_rng(0), failures)
    assert {failure.reason for failure in failures} == {
        f"{tmp_path / name}: no such file" for name in ("a.wav", "b.wav")
    }


def test_a_look_at_the_store_comes_after_so_many_writes(files, tmp_path, caplog):
    limits = replace(LIMITS, check_every=2, store_bytes=1000)
    with caplog.at_level(logging.WARNING):
        draw(open_noise(files, tmp_path / "store", limits))
    assert len(list((tmp_path / "store").rglob("*.npy"))) == 2
    assert "has 0.0 GB" in caplog.text


def test_noise_that_states_no_length_is_drawn_as_if_it_did(files, tmp_path):
    content = bytearray(files[1].read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # a FLAC that was piped
    piped = tmp_path / "piped.flac"
    piped.write_bytes(content)
    assert np.array_equal(draw(open_noise([piped])), draw(open_noise([files[1]])))
