"""Augmentation does what its numbers say: realised SNR, union targets, one seed one batch."""

import random
from dataclasses import replace

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

from birdcall.augment import (
    ClipAugment,
    NoiseFiles,
    NothingReadableError,
    augment_batch,
    low_pass,
    mix_up,
)
from birdcall.config import NO_AUGMENT

RATE = 32_000


def tone(seconds=2.0, hz=3000.0):
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.1 * np.sin(2 * np.pi * hz * time)).astype(np.float32)


def power_db(waveform):
    return 10 * np.log10(np.mean(np.square(waveform, dtype=np.float64)))


@pytest.fixture
def noise_file(tmp_path):
    path = tmp_path / "wind.wav"
    noise = 0.05 * np.random.default_rng(1).standard_normal(5 * RATE)
    soundfile.write(path, noise, RATE, subtype="FLOAT")
    return path


def augment_clip(config, clip, noise_files=(), seed=0):
    """Augment one clip whose noise files all have to be readable."""
    failures = []
    made = ClipAugment(config, RATE, noise_files)(clip, np.random.default_rng(seed), failures)
    assert not failures
    return made


@pytest.mark.parametrize("snr_db", [0.0, 7.5, 15.0])
def test_background_noise_has_the_snr_that_was_asked_for(noise_file, snr_db):
    config = replace(NO_AUGMENT, noise_probability=1.0, noise_snr_db=(snr_db, snr_db))
    clip = tone()
    noisy = augment_clip(config, clip, [noise_file])
    assert power_db(clip) - power_db(noisy - clip) == pytest.approx(snr_db, abs=0.1)


@pytest.mark.parametrize("snr_db", [3.0, 12.0])
def test_coloured_noise_has_the_snr_that_was_asked_for(snr_db):
    config = replace(NO_AUGMENT, color_noise_probability=1.0, color_noise_snr_db=(snr_db, snr_db))
    clip = tone()
    noisy = augment_clip(config, clip)
    assert power_db(clip) - power_db(noisy - clip) == pytest.approx(snr_db, abs=0.1)


def test_drawn_snrs_fill_their_range(noise_file):
    config = replace(NO_AUGMENT, noise_probability=1.0, noise_snr_db=(2.0, 10.0))
    clip = tone()
    noisy = [augment_clip(config, clip, [noise_file], seed) for seed in range(40)]
    snrs = [power_db(clip) - power_db(item - clip) for item in noisy]
    assert 1.9 < min(snrs) < 4
    assert 8 < max(snrs) < 10.1


def test_coloured_noise_is_pink():
    config = replace(NO_AUGMENT, color_noise_probability=1.0)
    clip = tone(20.0)
    noise = augment_clip(config, clip) - clip
    hz, density = scipy.signal.welch(noise, RATE, nperseg=4096)
    octaves = np.log2(hz[20:1600])
    slope = np.polyfit(octaves, 10 * np.log10(density[20:1600]), 1)[0]
    assert slope == pytest.approx(-3.01, abs=0.2)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_low_pass_has_the_magnitude_of_a_butterworth_filter(order):
    impulse = np.zeros(RATE, np.float32)
    impulse[RATE // 2] = 1
    ours = np.abs(np.fft.rfft(low_pass(impulse, RATE, 5000.0, order)))
    hz = np.fft.rfftfreq(RATE, 1 / RATE)
    b, a = scipy.signal.butter(order, 5000.0, analog=True)
    reference = np.abs(scipy.signal.freqs(b, a, hz)[1])
    np.testing.assert_allclose(ours[20:], reference[20:], atol=1e-4)


def test_the_low_pass_does_not_delay_and_its_end_does_not_reach_its_beginning():
    click = np.zeros(4000, np.float32)
    click[[2000, 3999]] = 1
    filtered = low_pass(click, RATE, 4000.0, 2)
    assert np.argmax(np.abs(filtered[:3000])) == 2000
    assert np.abs(filtered[:1000]).max() < 1e-4


def test_the_low_pass_takes_the_high_frequencies_only():
    config = replace(NO_AUGMENT, low_pass_probability=1.0, low_pass_hz=(4000.0, 4000.0))
    low, high = tone(hz=500.0), tone(hz=12_000.0)
    assert power_db(augment_clip(config, low)) == pytest.approx(power_db(low), abs=0.5)
    assert power_db(augment_clip(config, high)) < power_db(high) - 12


def test_silent_noise_changes_nothing(tmp_path):
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(5 * RATE), RATE)
    config = replace(NO_AUGMENT, noise_probability=1.0)
    clip = tone()
    assert np.array_equal(augment_clip(config, clip, [path]), clip)


def test_a_silent_clip_stays_silent(noise_file):
    config = replace(NO_AUGMENT, noise_probability=1.0, color_noise_probability=1.0)
    silence = np.zeros(RATE, dtype=np.float32)
    assert np.array_equal(augment_clip(config, silence, [noise_file]), silence)


def test_short_noise_is_repeated_and_long_noise_starts_anywhere(tmp_path):
    path = tmp_path / "ramp.wav"
    soundfile.write(path, np.arange(RATE) / RATE, RATE, subtype="FLOAT")
    noise = NoiseFiles([path], RATE)
    whole = noise.draw(3 * RATE, np.random.default_rng(0), [])
    assert np.array_equal(whole, np.tile(np.float32(np.arange(RATE) / RATE), 3))
    starts = [noise.draw(RATE // 4, np.random.default_rng(seed), [])[0] for seed in range(30)]
    assert min(starts) < 0.1
    assert 0.6 < max(starts) < 0.76


def test_one_seed_gives_one_clip_and_leaves_the_global_generators_alone(noise_file):
    config = replace(NO_AUGMENT, noise_probability=1.0, color_noise_probability=0.5)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy()
    clip = tone()
    first = augment_clip(config, clip, [noise_file], seed=3)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    random.seed(6)
    np.random.seed(6)
    assert np.array_equal(first, augment_clip(config, clip, [noise_file], seed=3))
    assert not np.array_equal(first, augment_clip(config, clip, [noise_file], seed=4))
    assert np.array_equal(clip, tone()), "the clip itself is left as it is"


def test_a_broken_noise_file_is_named_and_another_taken(noise_file, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"<html>not found</html>")
    noise = NoiseFiles([broken, noise_file], RATE)
    drawn = []
    for seed in range(20):
        failures = []
        assert power_db(noise.draw(RATE, np.random.default_rng(seed), failures)) > -40
        drawn.append([failure.path for failure in failures])
    assert [str(broken)] in drawn
    assert [] in drawn


def test_noise_of_which_nothing_can_be_read_is_an_error(tmp_path):
    failures = []
    absent = NoiseFiles([tmp_path / "a.wav", tmp_path / "b.wav"], RATE)
    with pytest.raises(NothingReadableError, match="none of 2 noise files can be read"):
        absent.draw(RATE, np.random.default_rng(0), failures)
    assert {failure.reason for failure in failures} == {
        f"{tmp_path / name}: no such file" for name in ("a.wav", "b.wav")
    }


def batch(n_clips=8, n_classes=4):
    generator = torch.Generator().manual_seed(0)
    waveform = (
        torch.randn(n_clips, 1000, generator=generator) * torch.arange(1, n_clips + 1)[:, None]
    )
    return waveform, torch.eye(n_classes).repeat(n_clips // n_classes, 1)


def test_mixup_adds_one_other_clip_at_the_drawn_power_and_unites_the_targets():
    config = replace(NO_AUGMENT, mixup_probability=1.0, mixup_gain_db=(-3.0, -3.0))
    waveform, target = batch()
    mixed, union = mix_up(waveform, target, config, torch.Generator().manual_seed(1))
    for clip, old, new, was in zip(mixed, waveform, union, target, strict=True):
        added = clip - old
        if not added.any():
            assert torch.equal(new, was)
            continue
        ratio = 10 * torch.log10(added.square().mean() / old.square().mean())
        assert ratio.item() == pytest.approx(-3.0, abs=0.01)
        scale = [torch.dot(added, other) / other.square().sum() for other in waveform]
        partner = int(torch.stack(scale).mul(waveform.norm(dim=1)).argmax())
        torch.testing.assert_close(added, scale[partner] * waveform[partner])
        assert torch.equal(new, torch.maximum(was, target[partner]))
    assert (union.sum(1) > 1).any()


def test_a_silent_clip_takes_no_label_from_mixup():
    config = replace(NO_AUGMENT, mixup_probability=1.0)
    waveform, target = batch()
    waveform[2] = 0
    mixed, union = mix_up(waveform, target, config, torch.Generator().manual_seed(1))
    assert mixed.isfinite().all()
    assert torch.equal(union[2], target[2])


def test_gain_stays_in_its_range_and_one_seed_gives_one_batch():
    config = replace(NO_AUGMENT, gain_probability=1.0, gain_db=(-12.0, 3.0))
    waveform, target = batch()
    louder, same = augment_batch(waveform, target, config, torch.Generator().manual_seed(2))
    gain_db = 20 * torch.log10(louder.norm(dim=1) / waveform.norm(dim=1))
    assert gain_db.min() >= -12.001
    assert gain_db.max() <= 3.001
    assert gain_db.std() > 1
    assert torch.equal(same, target)
    again, _ = augment_batch(waveform, target, config, torch.Generator().manual_seed(2))
    assert torch.equal(again, louder)


def test_no_augmentation_changes_nothing():
    waveform, target = batch()
    same, labels = augment_batch(waveform, target, NO_AUGMENT, torch.Generator().manual_seed(0))
    assert torch.equal(same, waveform)
    assert torch.equal(labels, target)
    clip = tone()
    assert np.array_equal(augment_clip(NO_AUGMENT, clip), clip)
