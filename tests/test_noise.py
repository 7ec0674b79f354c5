"""Noise has the spectrum that its docstring states, and noise folders are listed completely."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from scipy.signal import welch
from scipy.stats import kurtosis

from birdcall.noise import NOISE_KINDS, NOISE_RMS, find_noise, generate_noise, make_noise

SAMPLE_RATE = 32_000


@pytest.mark.parametrize(
    ("kind", "low_hz", "high_hz", "db_per_octave"),
    [
        ("white", 50, 15_000, 0.0),
        ("pink", 50, 15_000, -3.01),
        ("brown", 50, 10_000, -6.02),
        ("rain", 50, 900, 6.02),
        ("rain", 1_200, 15_000, -3.01),
        ("wind", 24, 90, -3.01),
        ("wind", 120, 4_000, -9.03),
    ],
)
def test_the_slope_is_the_stated_one(kind, low_hz, high_hz, db_per_octave):
    # Low bands at a low rate: more segments to average, so that chance moves the slope little.
    sample_rate = 4_000 if high_hz < 1_000 else SAMPLE_RATE
    noise = make_noise(kind, 960_000, sample_rate, np.random.default_rng(3))
    frequency, power = welch(noise, sample_rate, nperseg=4096)
    band = (frequency >= low_hz) & (frequency <= high_hz)
    slope = np.polyfit(np.log2(frequency[band]), 10 * np.log10(power[band]), 1)[0]
    assert slope == pytest.approx(db_per_octave, abs=0.35)


def test_hum_has_lines_at_the_multiples_of_60_hz_over_a_floor_20_db_below():
    n_samples = SAMPLE_RATE * 10
    hum = make_noise("hum", n_samples, SAMPLE_RATE, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(hum) / n_samples) ** 2 * 2
    lines = np.arange(1, 17) * 600  # bins of 0.1 Hz
    np.testing.assert_allclose(
        10 * np.log10(power[lines] / power[600]), -20 * np.log10(np.arange(1, 17)), atol=1.5
    )
    floor = power.sum() - power[lines].sum()
    assert 10 * np.log10(floor / power[lines].sum()) == pytest.approx(-20, abs=0.5)


def test_rain_has_drops_and_wind_has_gusts():
    rain, wind, white = (
        make_noise(kind, SAMPLE_RATE * 20, SAMPLE_RATE, np.random.default_rng(1))
        for kind in ("rain", "wind", "white")
    )
    assert kurtosis(rain) > 1 > abs(kurtosis(white))
    level_db = [
        10 * np.log10(np.mean(np.square(noise.reshape(20, -1)), axis=1)) for noise in (wind, white)
    ]
    assert np.std(level_db[0]) > 2 > 5 * np.std(level_db[1])


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_every_kind_has_the_same_level_no_offset_and_follows_its_seed(kind):
    first, again, other = (
        make_noise(kind, 50_001, 22_050, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert first.dtype == np.float32
    assert first.shape == (50_001,)
    assert np.sqrt(np.mean(first.astype(float) ** 2)) == pytest.approx(NOISE_RMS, rel=1e-3)
    assert abs(first.mean()) < 1e-4
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("n_samples", [1, 2, 127])
def test_very_short_noise_is_finite(kind, n_samples):
    noise = make_noise(kind, n_samples, 8_000, np.random.default_rng(0))
    assert noise.shape == (n_samples,)
    assert np.isfinite(noise).all()


def test_an_unknown_kind_or_no_samples_are_errors():
    with pytest.raises(ValueError, match=r"'purple'.*white, pink, brown, rain, wind, hum"):
        make_noise("purple", 10, SAMPLE_RATE, np.random.default_rng(0))
    with pytest.raises(ValueError, match="n_samples 0"):
        make_noise("white", 0, SAMPLE_RATE, np.random.default_rng(0))


def test_noise_files_are_found_in_all_subfolders_sorted_and_nothing_else(tmp_path):
    for name in ("b/rain.WAV", "a.flac", "b/c/wind.ogg", "notes.txt", "b/list.csv", "z.mp3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in find_noise(tmp_path)]
    assert names == ["a.flac", "b/c/wind.ogg", "b/rain.WAV", "z.mp3"]


def test_a_link_to_a_parent_ends_and_a_link_elsewhere_is_followed(tmp_path):
    folder, elsewhere = tmp_path / "noise", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "wind.wav").touch()
    (elsewhere / "rain.wav").touch()
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "far").symlink_to(elsewhere, target_is_directory=True)
    (folder / "gone.wav").symlink_to(tmp_path / "nothing.wav")
    names = [path.relative_to(folder).as_posix() for path in find_noise(folder)]
    assert names == ["far/rain.wav", "wind.wav"]


def test_an_absent_folder_has_no_noise(tmp_path):
    assert find_noise(tmp_path / "nowhere") == []


def test_generated_noise_has_every_kind_and_is_written_once(tmp_path):
    paths = generate_noise(tmp_path / "noise", seconds=1.0, per_kind=2)
    assert find_noise(tmp_path / "noise") == sorted(paths)
    assert len(paths) == 2 * len(NOISE_KINDS)
    first = {path: path.stat().st_mtime_ns for path in paths}
    for path in paths:
        noise, sample_rate = soundfile.read(path)
        assert (len(noise), sample_rate) == (32_000, 32_000)
        assert np.sqrt(np.mean(np.square(noise))) == pytest.approx(0.1, rel=1e-3)
    assert generate_noise(tmp_path / "noise", seconds=1.0, per_kind=2) == paths
    assert {path: path.stat().st_mtime_ns for path in paths} == first
