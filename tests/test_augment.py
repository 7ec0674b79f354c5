"""Augmentation does what its numbers say: realised SNR, union targets, one seed one batch."""

import random
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from birdcall.augment import ClipAugment, augment_batch, mix_up, seeded_globals
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


@pytest.mark.parametrize("snr_db", [0.0, 7.5, 15.0])
def test_background_noise_has_the_snr_that_was_asked_for(noise_file, snr_db):
    config = replace(NO_AUGMENT, noise_probability=1.0, noise_snr_db=(snr_db, snr_db))
    clip = tone()
    noisy = ClipAugment(config, RATE, [noise_file])(clip, np.random.default_rng(0))
    assert power_db(clip) - power_db(noisy - clip) == pytest.approx(snr_db, abs=0.1)


@pytest.mark.parametrize("snr_db", [3.0, 12.0])
def test_coloured_noise_has_the_snr_that_was_asked_for(snr_db):
    config = replace(NO_AUGMENT, color_noise_probability=1.0, color_noise_snr_db=(snr_db, snr_db))
    clip = tone()
    noisy = ClipAugment(config, RATE)(clip, np.random.default_rng(0))
    assert power_db(clip) - power_db(noisy - clip) == pytest.approx(snr_db, abs=0.1)


def test_the_low_pass_takes_the_high_frequencies_only():
    config = replace(NO_AUGMENT, low_pass_probability=1.0, low_pass_hz=(4000.0, 4000.0))
    augment = ClipAugment(config, RATE)
    low, high = tone(hz=500.0), tone(hz=12_000.0)
    generator = np.random.default_rng(0)
    assert power_db(augment(low, generator)) == pytest.approx(power_db(low), abs=0.5)
    assert power_db(augment(high, generator)) < power_db(high) - 12


def test_silent_noise_changes_nothing(tmp_path):
    path = tmp_path / "silence.wav"
    soundfile.write(path, np.zeros(5 * RATE), RATE)
    config = replace(NO_AUGMENT, noise_probability=1.0)
    clip = tone()
    with pytest.warns(UserWarning, match="too silent"):
        assert np.array_equal(
            ClipAugment(config, RATE, [path])(clip, np.random.default_rng(0)), clip
        )


def test_a_silent_clip_stays_finite(noise_file):
    config = replace(NO_AUGMENT, noise_probability=1.0, color_noise_probability=1.0)
    silence = np.zeros(RATE, dtype=np.float32)
    assert np.isfinite(
        ClipAugment(config, RATE, [noise_file])(silence, np.random.default_rng(0))
    ).all()


def test_one_seed_gives_one_clip_and_leaves_the_global_generators_alone(noise_file):
    config = replace(NO_AUGMENT, noise_probability=1.0, color_noise_probability=0.5)
    augment = ClipAugment(config, RATE, [noise_file])
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].copy()
    first = augment(tone(), np.random.default_rng(3))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    random.seed(6)
    assert np.array_equal(first, augment(tone(), np.random.default_rng(3)))
    assert not np.array_equal(first, augment(tone(), np.random.default_rng(4)))


def test_the_global_generators_come_back_after_an_error():
    state = random.getstate()

    def draw_and_fail():
        with seeded_globals(np.random.default_rng(0)):
            random.random()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        draw_and_fail()
    assert random.getstate() == state


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
    assert np.array_equal(ClipAugment(NO_AUGMENT, RATE)(clip, np.random.default_rng(0)), clip)
