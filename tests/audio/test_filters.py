"""Filters have the magnitude of their curve, no delay, no seam; noise has its spectrum."""

import librosa
import numpy as np
import pytest
import scipy.signal
import scipy.stats

from birdcall.audio.filters import (
    NOISE_KINDS,
    NOISE_RMS,
    butterworth_curve,
    equalizer_curve,
    fade_curve,
    fade_ends,
    filter_waveform,
    make_noise,
    slope_curve,
)

RATE = 32_000
HZ = np.fft.rfftfreq(RATE, 1 / RATE)


def magnitude(curve):
    impulse = np.zeros(RATE, np.float32)
    impulse[RATE // 2] = 1
    return np.abs(np.fft.rfft(filter_waveform(impulse, RATE, [curve])))


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(
    "kind, cutoff_hz, tolerance",
    [
        ("low", 5000.0, 2e-4),
        ("low", 12_000.0, 1e-3),
        ("high", 600.0, 1e-3),
        ("high", 100.0, 0.025),  # its kernel is longer than ours
    ],
)
def test_low_and_high_pass_have_the_magnitude_of_butterworth_filters(
    kind, cutoff_hz, tolerance, order
):
    b, a = scipy.signal.butter(order, cutoff_hz, kind, analog=True)
    reference = np.abs(scipy.signal.freqs(b, a, HZ)[1])
    curve = butterworth_curve(kind, cutoff_hz, order)
    np.testing.assert_allclose(magnitude(curve), reference, atol=tolerance)


def test_the_fade_is_a_line_in_decibels():
    decibels = 20 * np.log10(magnitude(fade_curve(24.0, RATE)))
    np.testing.assert_allclose(decibels, -24 * HZ / 16_000, atol=0.05)


def test_fades_rise_and_fall_along_a_cosine():
    faded = fade_ends(np.ones(100, np.float32), 10)
    expected = np.sin(np.pi / 2 * (np.arange(10) + 0.5) / 10) ** 2
    np.testing.assert_allclose(faded[:10], expected, atol=1e-6)
    np.testing.assert_allclose(faded[-10:], expected[::-1], atol=1e-6)
    assert (faded[10:-10] == 1).all()
    assert fade_ends(np.ones(1, np.float32), 10).tolist() == [1.0]


def test_an_equalizer_has_its_gains_at_nodes_of_the_mel_scale_and_lines_between():
    gains_db = np.array([0.0, 6.0, -3.0, 2.0])
    decibels = 20 * np.log10(magnitude(equalizer_curve(gains_db, RATE)))
    mel = librosa.hz_to_mel(HZ, htk=True)
    nodes = np.linspace(0, librosa.hz_to_mel(16_000, htk=True), 4)
    expected = np.interp(mel, nodes, gains_db)
    np.testing.assert_allclose(decibels[50:], expected[50:], atol=0.35)


@pytest.mark.parametrize("slope_db", [-6.0, -3.0, 2.0])
def test_a_slope_is_flat_at_the_bottom_and_straight_above(slope_db):
    decibels = 20 * np.log10(magnitude(slope_curve(slope_db, 50.0)))
    expected = slope_db * np.log2(np.maximum(HZ, 50) / 50)
    np.testing.assert_allclose(decibels[100:], expected[100:], atol=0.3)
    assert decibels[:20] == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("n_samples", [1, 100, 3072, 4097, 160_000])
# Blocks have 4096 samples and overlap by 1024.
def test_block_by_block_equals_one_convolution(n_samples):
    waveform = np.random.default_rng(0).standard_normal(n_samples, dtype=np.float32)
    curves = [butterworth_curve("low", 5000.0, 3), butterworth_curve("high", 300.0, 2)]
    impulse = np.zeros(2001, np.float32)
    impulse[1000] = 1
    kernel = filter_waveform(impulse, RATE, curves)
    expected = np.convolve(waveform, kernel)[1000 : 1000 + n_samples]
    filtered = filter_waveform(waveform, RATE, curves)
    assert filtered.dtype == np.float32
    np.testing.assert_allclose(filtered, expected, atol=1e-5)


def test_nothing_is_delayed_and_the_end_does_not_reach_the_beginning():
    click = np.zeros(4000, np.float32)
    click[[2000, 3999]] = 1
    filtered = filter_waveform(click, RATE, [butterworth_curve("low", 4000.0, 2)])
    assert np.argmax(np.abs(filtered[:3000])) == 2000
    assert np.abs(filtered[:1000]).max() < 1e-4


def test_two_curves_are_their_product():
    both = filter_waveform(
        np.eye(1, 4000, 2000, dtype=np.float32)[0], RATE,
        [butterworth_curve("low", 5000.0, 2), fade_curve(10.0, RATE)],
    )  # fmt: skip
    hz = np.fft.rfftfreq(4000, 1 / RATE)
    expected = butterworth_curve("low", 5000.0, 2)(hz) * fade_curve(10.0, RATE)(hz)
    np.testing.assert_allclose(np.abs(np.fft.rfft(both)), expected, atol=1e-3)


# --- noise ---


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
    sample_rate = 4_000 if high_hz < 1_000 else RATE
    noise = make_noise(kind, 960_000, sample_rate, np.random.default_rng(3))
    frequency, power = scipy.signal.welch(noise, sample_rate, nperseg=4096)
    band = (frequency >= low_hz) & (frequency <= high_hz)
    slope = np.polyfit(np.log2(frequency[band]), 10 * np.log10(power[band]), 1)[0]
    assert slope == pytest.approx(db_per_octave, abs=0.35)


def test_hum_has_lines_at_the_multiples_of_60_hz_over_a_floor_20_db_below():
    n_samples = RATE * 10
    hum = make_noise("hum", n_samples, RATE, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(hum) / n_samples) ** 2 * 2
    lines = np.arange(1, 17) * 600  # bins of 0.1 Hz
    np.testing.assert_allclose(
        10 * np.log10(power[lines] / power[600]), -20 * np.log10(np.arange(1, 17)), atol=1.5
    )
    floor = power.sum() - power[lines].sum()
    assert 10 * np.log10(floor / power[lines].sum()) == pytest.approx(-20, abs=0.5)


def test_rain_has_drops_and_wind_has_gusts():
    rain, wind, white = (
        make_noise(kind, RATE * 20, RATE, np.random.default_rng(1))
        for kind in ("rain", "wind", "white")
    )
    assert scipy.stats.kurtosis(rain) > 1 > abs(scipy.stats.kurtosis(white))
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


def test_noise_of_one_length_rate_and_kind_is_shaped_by_no_curve_of_others():
    curves = {"pink": lambda hz: hz**-0.5, "brown": lambda hz: 1 / hz}
    items = [("pink", 64_000, RATE), ("pink", 64_000, 8_000), ("brown", 64_000, RATE)]
    for kind, n_samples, rate in [*items, ("pink", 50_000, RATE), *items]:
        noise = make_noise(kind, n_samples, rate, np.random.default_rng(2))
        spectrum = np.fft.rfft(np.random.default_rng(2).standard_normal(n_samples, np.float32))
        hz = np.maximum(np.fft.rfftfreq(n_samples, 1 / rate), 20)
        expected = np.fft.irfft(spectrum * curves[kind](hz))
        expected = (expected - expected.mean()) * (NOISE_RMS / expected.std())
        np.testing.assert_allclose(noise, expected, atol=1e-5)


@pytest.mark.parametrize("kind", NOISE_KINDS)
@pytest.mark.parametrize("n_samples", [1, 2, 127])
def test_very_short_noise_is_finite(kind, n_samples):
    noise = make_noise(kind, n_samples, 8_000, np.random.default_rng(0))
    assert noise.shape == (n_samples,)
    assert np.isfinite(noise).all()


def test_an_unknown_kind_or_no_samples_are_errors():
    with pytest.raises(ValueError, match=r"'purple'.*white, pink, brown, rain, wind, hum"):
        make_noise("purple", 10, RATE, np.random.default_rng(0))
    with pytest.raises(ValueError, match="n_samples 0"):
        make_noise("white", 0, RATE, np.random.default_rng(0))
