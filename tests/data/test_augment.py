"""A clip's augmentation does what its numbers say: levels, spectra, one request one clip."""

import random
from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.signal
import soundfile

from birdcall.config import NO_AUGMENT, AugmentConfig
from birdcall.data.augment import (
    ClipAugment,
    color_noise,
    encode_mp3,
)
from birdcall.data.noise import NoiseFiles

RATE = 32_000
IN_BATCH = {"shift", "mixup", "mixup_third", "gain"}  # tests/data/test_batch_augment.py
IN_DATASET = {"noise_only", "other_birds"}  # tests/data/test_dataset.py
AT_READING = {"downmix"}
NAMES = [
    item.name.removesuffix("_probability")
    for item in fields(AugmentConfig)
    if item.name.endswith("_probability")
]
OF_A_CLIP = [name for name in NAMES if name not in IN_BATCH | IN_DATASET | AT_READING]


def only(name, **ranges):
    """Return a config in which one thing is done to every clip."""
    return replace(NO_AUGMENT, **{f"{name}_probability": 1.0}, **ranges)


def tone(seconds=2.0, hz=3000.0):
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.1 * np.sin(2 * np.pi * hz * time)).astype(np.float32)


def chirps(seconds=3.0):
    """Sweeps of half a second, each unlike the others and far from silence at both ends."""
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * scipy.signal.chirp(time, 500, seconds, 6000)).astype(np.float32)


def power_db(waveform):
    return 10 * np.log10(np.mean(np.square(waveform, dtype=np.float64)))


def slope_of(noise, low_hz=100, high_hz=15_000):
    hz, density = scipy.signal.welch(noise, RATE, nperseg=4096)
    band = (hz > low_hz) & (hz < high_hz)
    return np.polyfit(np.log2(hz[band]), 10 * np.log10(density[band]), 1)[0]


@pytest.fixture
def noise_file(tmp_path):
    path = tmp_path / "wind.wav"
    noise = 0.05 * np.random.default_rng(1).standard_normal(5 * RATE)
    soundfile.write(path, noise, RATE, subtype="FLOAT")
    return path


def augment_clip(config, clip, noise_files=(), seed=0):
    """Augment one clip whose noise files all have to be readable."""
    failures = []
    augment = ClipAugment(config, NoiseFiles(noise_files, RATE))
    made = augment(clip, np.random.default_rng(seed), failures)
    assert not failures
    assert made.dtype == np.float32
    assert made.shape == clip.shape
    return made


# --- every field ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_A_CLIP)
def test_at_probability_one_every_clip_changes_and_at_zero_none(name, noise_file):
    clip = chirps()
    before = clip.copy()
    made = augment_clip(only(name), clip, [noise_file])
    assert np.abs(made - clip).max() > 1e-3
    assert np.array_equal(clip, before), "the clip itself is left as it is"
    at_zero = replace(AugmentConfig(), **{f"{other}_probability": 0.0 for other in NAMES})
    assert np.array_equal(augment_clip(at_zero, clip, [noise_file]), clip)


@pytest.mark.parametrize("name", OF_A_CLIP)
def test_at_a_probability_between_some_clips_change(name, noise_file):
    clip = chirps(0.5)
    config = replace(NO_AUGMENT, **{f"{name}_probability": 0.5})
    changed = [
        not np.array_equal(augment_clip(config, clip, [noise_file], seed), clip)
        for seed in range(30)
    ]
    assert 5 <= sum(changed) <= 25


@pytest.mark.parametrize("name", OF_A_CLIP)
def test_silence_stays_silent_and_a_full_scale_clip_finite(name, noise_file):
    silence = np.zeros(RATE, np.float32)
    assert not augment_clip(only(name), silence, [noise_file]).any()
    assert not augment_clip(only(name), silence).any()
    loud = np.sign(tone()).astype(np.float32)
    assert np.isfinite(augment_clip(only(name), loud, [noise_file])).all()


def test_everything_at_once_follows_the_seed_and_leaves_the_global_generators_alone(noise_file):
    config = replace(AugmentConfig(), **{f"{name}_probability": 1.0 for name in OF_A_CLIP})
    clip = chirps()
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy()
    first = augment_clip(config, clip, [noise_file], seed=3)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    random.seed(6)
    np.random.seed(6)
    assert np.array_equal(first, augment_clip(config, clip, [noise_file], seed=3))
    assert not np.array_equal(first, augment_clip(config, clip, [noise_file], seed=4))


def test_the_downmix_is_drawn_in_its_share_of_the_clips():
    for probability, share in ((0.0, 0.0), (0.2, 0.2), (1.0, 1.0)):
        config = replace(NO_AUGMENT, downmix_probability=probability)
        augment = ClipAugment(config, NoiseFiles([], RATE))
        generator = np.random.default_rng(0)
        drawn = [augment.draw_downmix(generator) for _ in range(1000)]
        mixed = [value for value in drawn if value is not None]
        assert len(mixed) / len(drawn) == pytest.approx(share, abs=0.04)
        assert all(0 <= value <= 1 for value in mixed)
        assert not mixed or (min(mixed) < 0.05 and max(mixed) > 0.95)


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", [0.0, 7.5, 15.0])
@pytest.mark.parametrize("name", ["noise", "color_noise"])
def test_noise_has_the_snr_that_was_asked_for(noise_file, name, snr_db):
    clip = tone()
    noisy = augment_clip(only(name, **{f"{name}_snr_db": (snr_db, snr_db)}), clip, [noise_file])
    assert power_db(clip) - power_db(noisy - clip) == pytest.approx(snr_db, abs=0.1)


def test_drawn_snrs_fill_their_range(noise_file):
    config, clip = only("noise", noise_snr_db=(2.0, 10.0)), tone()
    noisy = [augment_clip(config, clip, [noise_file], seed) for seed in range(40)]
    snrs = [power_db(clip) - power_db(item - clip) for item in noisy]
    assert 1.9 < min(snrs) < 4
    assert 8 < max(snrs) < 10.1


@pytest.mark.parametrize("slope_db", [-6.0, -3.0, -1.0, 0.0, 3.0])
def test_coloured_noise_has_the_slope_that_was_asked_for(slope_db):
    config = only("color_noise", color_noise_slope_db=(slope_db, slope_db))
    clip = tone(5.0)
    noise = augment_clip(config, clip) - clip
    assert slope_of(noise) == pytest.approx(slope_db, abs=0.25)


def test_drawn_slopes_fill_their_range():
    config, clip = only("color_noise", color_noise_slope_db=(-6.0, -1.0)), tone(1.0)
    slopes = [slope_of(augment_clip(config, clip, seed=seed) - clip) for seed in range(25)]
    assert min(slopes) < -5
    assert -2 < max(slopes) < -0.5


def test_coloured_noise_is_gaussian_stationary_and_never_the_same():
    drawn = [color_noise(2 * RATE, RATE, -3.0, np.random.default_rng(seed)) for seed in range(20)]
    for noise in drawn:
        shares = [np.mean(np.abs(noise) < k * noise.std()) for k in (1, 2, 3)]
        np.testing.assert_allclose(shares, [0.683, 0.954, 0.997], atol=0.03)
        halves = [power_db(half) for half in np.split(noise, 2)]
        assert abs(halves[0] - halves[1]) < 1.5
    correlation = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 0.1


def test_noise_at_the_end_of_the_pool_continues_at_its_start():
    # 6 dB per octave: a jump would stand out.
    n_pool = 1 << 19
    noise = color_noise(n_pool + RATE, RATE, -6.0, np.random.default_rng(0))
    np.testing.assert_allclose(noise[:RATE], noise[n_pool:])
    steps = np.diff(noise)
    assert np.abs(steps).max() < 8 * steps.std()


def test_silent_noise_changes_nothing(tmp_path):
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(5 * RATE), RATE)
    clip = tone()
    for name in ("noise", "short_noise"):
        assert np.array_equal(augment_clip(only(name), clip, [path]), clip)


@pytest.mark.parametrize("snr_db", [0.0, 12.0])
@pytest.mark.parametrize("has_files", [True, False])
def test_a_burst_has_its_length_and_its_snr_to_the_whole_clip(noise_file, snr_db, has_files):
    config = only(
        "short_noise", short_noise_snr_db=(snr_db, snr_db),
        short_noise_seconds=(0.25, 0.25), short_noise_count=(1, 1),
    )  # fmt: skip
    clip = tone()
    starts = []
    for seed in range(20):
        added = augment_clip(config, clip, [noise_file] * has_files, seed) - clip
        places = np.flatnonzero(np.abs(added) > 1e-7)
        starts.append(places[0] / RATE)
        assert np.ptp(places) == pytest.approx(0.25 * RATE, abs=0.003 * RATE)
        burst = added[places[0] : places[0] + RATE // 4]
        assert power_db(clip) - power_db(burst) == pytest.approx(snr_db, abs=0.1)
        assert np.abs(burst[:100]).max() < np.abs(burst).max() / 5, "it fades in"
        assert np.abs(burst[-100:]).max() < np.abs(burst).max() / 5
    assert min(starts) < 0.4 and max(starts) > 1.3


def test_the_number_of_bursts_is_drawn_from_its_range(noise_file):
    config = only("short_noise", short_noise_seconds=(0.01, 0.01), short_noise_count=(1, 4))
    clip = tone(20.0)
    counts = set()
    for seed in range(30):
        there = np.abs(augment_clip(config, clip, [noise_file], seed) - clip) > 1e-7
        gaps = np.diff(np.flatnonzero(there)) > RATE // 50
        counts.add(1 + int(gaps.sum()))
    assert counts == {1, 2, 3, 4}


def test_a_burst_longer_than_the_clip_is_cut_to_it(noise_file):
    config = only("short_noise", short_noise_seconds=(9.0, 9.0))
    assert np.isfinite(augment_clip(config, tone(0.5), [noise_file])).all()


def test_an_equalizer_changes_the_whole_clip_by_a_smooth_curve_of_the_stated_deviation():
    noise = color_noise(5 * RATE, RATE, 0.0, np.random.default_rng(0))
    config = only("equalizer", equalizer_db=3.0)
    bands = []
    for seed in range(60):
        changed = augment_clip(config, noise, seed=seed)
        _, before = scipy.signal.welch(noise, RATE, nperseg=2048)
        hz, after = scipy.signal.welch(changed, RATE, nperseg=2048)
        gain_db = 10 * np.log10(after / before)
        # The second node of six: a fifth of the mel scale up to half the sample rate.
        node_hz = 700 * (10 ** (np.log10(1 + 16_000 / 700) / 5) - 1)
        bands.append(gain_db[np.abs(hz - node_hz).argmin()])
    assert np.std(bands) == pytest.approx(3.0, rel=0.25)
    assert np.mean(bands) == pytest.approx(0, abs=1.2)


# --- spectrum ------------------------------------------------------------------------------------


def gain_db(config, hz):
    return power_db(augment_clip(config, tone(hz=hz))) - power_db(tone(hz=hz))


@pytest.mark.parametrize("hz", [250.0, 1000.0, 4000.0, 8000.0, 14_000.0])
def test_the_fade_is_a_line_in_decibels_over_frequency(hz):
    config = only("high_fade", high_fade_db=(20.0, 20.0))
    assert gain_db(config, hz) == pytest.approx(-20 * hz / 16_000, abs=0.1)


def test_low_pass_and_high_pass_take_their_side_only():
    low, high = only("low_pass", low_pass_hz=(4e3, 4e3)), only("high_pass", high_pass_hz=(600, 600))
    assert gain_db(low, 500.0) == pytest.approx(0, abs=0.1)
    assert gain_db(low, 12_000.0) < -18
    assert gain_db(high, 150.0) < -20
    assert gain_db(high, 4_000.0) == pytest.approx(0, abs=0.1)


def test_all_that_is_done_to_the_spectrum_is_the_sum_of_its_decibels():
    ranges = {
        "low_pass_hz": (6e3, 6e3), "high_pass_hz": (500, 500), "high_fade_db": (10.0, 10.0),
    }  # fmt: skip
    together = replace(
        NO_AUGMENT, **ranges,
        low_pass_probability=1.0, high_pass_probability=1.0, high_fade_probability=1.0,
    )  # fmt: skip
    fade = only("high_fade", high_fade_db=(10.0, 10.0))
    middle = gain_db(together, 1700.0) - gain_db(fade, 1700.0)
    assert middle == pytest.approx(0, abs=0.4)
    assert gain_db(together, 200.0) < -12
    assert gain_db(together, 14_000.0) < -20


# --- by audiomentations --------------------------------------------------------------------------


def shift_of(made, clip):
    """Return by how many samples ``made`` comes later, and how like it is then."""
    correlation = scipy.signal.correlate(made, clip, method="fft")
    best = int(correlation.argmax())
    return best - len(clip) + 1, correlation[best] / np.linalg.norm(made) / np.linalg.norm(clip)


@pytest.mark.parametrize("kbps", [32, 64, 128])
def test_mp3_keeps_every_sample_in_its_place_and_the_level(kbps):
    clip = chirps()
    made = augment_clip(only("mp3", mp3_kbps=(kbps, kbps)), clip)
    shift, likeness = shift_of(made, clip)
    assert shift == 0
    assert likeness > 0.99
    # LAME takes 0.45 dB off, against overload.
    assert power_db(made) == pytest.approx(power_db(clip) + 20 * np.log10(0.95), abs=0.1)
    assert not np.array_equal(made, clip)


def test_fewer_bits_are_further_from_the_clip():
    clip = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
    errors = [
        power_db(augment_clip(only("mp3", mp3_kbps=(kbps, kbps)), clip) - clip)
        for kbps in (32, 128)
    ]
    assert errors[0] > errors[1] + 3


def test_mp3_takes_clips_beyond_full_scale_and_shorter_than_its_frames():
    loud = 5 * chirps()
    made = augment_clip(only("mp3", mp3_kbps=(128, 128)), loud)
    assert np.abs(made).max() > 1.2
    assert shift_of(made, loud)[0] == 0
    short = tone(0.02)
    assert len(encode_mp3(short, RATE, (64, 64), np.random.default_rng(0))) == len(short)


@pytest.mark.parametrize("semitones", [-2.0, 2.0])
def test_pitch_moves_by_so_many_semitones_and_the_tempo_stays(semitones):
    config = only("pitch", pitch_semitones=(semitones, semitones))
    made = augment_clip(config, tone(2.0, 2000.0))
    peak_hz = np.abs(np.fft.rfft(made)).argmax() / 2
    assert peak_hz == pytest.approx(2000 * 2 ** (semitones / 12), rel=0.005)


@pytest.mark.parametrize("rate", [0.9, 1.1])
def test_tempo_moves_what_happens_and_neither_pitch_nor_length(rate):
    clip = tone(2.0, 2000.0)
    clip[RATE:] = 0  # the tone ends after one second
    made = augment_clip(only("tempo", tempo_rate=(rate, rate)), clip)
    assert np.abs(np.fft.rfft(made)).argmax() / 2 == pytest.approx(2000, rel=0.005)
    loud = np.flatnonzero(np.abs(made) > 0.03)
    assert loud[-1] / RATE == pytest.approx(1 / rate, abs=0.06)
