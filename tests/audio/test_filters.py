"""Filters have the magnitude that their curve says, no delay, and no seam between blocks."""

import numpy as np
import pytest
import scipy.signal

from birdcall.audio.filters import (
    BLOCK_SAMPLES,
    STEP_SAMPLES,
    fade_curve,
    filter_waveform,
    high_pass_curve,
    low_pass_curve,
    slope_curve,
)

RATE = 32_000
HZ = np.fft.rfftfreq(RATE, 1 / RATE)


def magnitude(curve, place=RATE // 2):
    impulse = np.zeros(RATE, np.float32)
    impulse[place] = 1
    return np.abs(np.fft.rfft(filter_waveform(impulse, RATE, [curve])))


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(
    "curve, kind, cutoff_hz, tolerance",
    [
        (low_pass_curve, "low", 5000.0, 2e-4),
        (low_pass_curve, "low", 12_000.0, 1e-3),
        (high_pass_curve, "high", 600.0, 1e-3),
        (high_pass_curve, "high", 100.0, 0.025),  # its kernel is longer than ours
    ],
)
def test_low_and_high_pass_have_the_magnitude_of_butterworth_filters(
    curve, kind, cutoff_hz, tolerance, order
):
    b, a = scipy.signal.butter(order, cutoff_hz, kind, analog=True)
    reference = np.abs(scipy.signal.freqs(b, a, HZ)[1])
    np.testing.assert_allclose(magnitude(curve(cutoff_hz, order)), reference, atol=tolerance)


def test_the_fade_is_a_line_in_decibels():
    decibels = 20 * np.log10(magnitude(fade_curve(24.0, RATE)))
    np.testing.assert_allclose(decibels, -24 * HZ / 16_000, atol=0.05)


@pytest.mark.parametrize("slope_db", [-6.0, -3.0, 2.0])
def test_a_slope_is_flat_at_the_bottom_and_straight_above(slope_db):
    decibels = 20 * np.log10(magnitude(slope_curve(slope_db, 50.0)))
    expected = slope_db * np.log2(np.maximum(HZ, 50) / 50)
    np.testing.assert_allclose(decibels[100:], expected[100:], atol=0.3)
    assert decibels[:20] == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("n_samples", [1, 100, STEP_SAMPLES, BLOCK_SAMPLES + 1, 160_000])
def test_block_by_block_equals_one_convolution(n_samples):
    waveform = np.random.default_rng(0).standard_normal(n_samples, dtype=np.float32)
    curves = [low_pass_curve(5000.0, 3), high_pass_curve(300.0, 2)]
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
    filtered = filter_waveform(click, RATE, [low_pass_curve(4000.0, 2)])
    assert np.argmax(np.abs(filtered[:3000])) == 2000
    assert np.abs(filtered[:1000]).max() < 1e-4


def test_two_curves_are_their_product():
    both = filter_waveform(
        np.eye(1, 4000, 2000, dtype=np.float32)[0], RATE,
        [low_pass_curve(5000.0, 2), fade_curve(10.0, RATE)],
    )  # fmt: skip
    hz = np.fft.rfftfreq(4000, 1 / RATE)
    expected = low_pass_curve(5000.0, 2)(hz) * fade_curve(10.0, RATE)(hz)
    np.testing.assert_allclose(np.abs(np.fft.rfft(both)), expected, atol=1e-3)
