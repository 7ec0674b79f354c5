"""Clips are the same in any worker of any run, as long as they should be, and fairly drawn."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from birdcall.config import NO_AUGMENT, AugmentConfig
from birdcall.dataset import ClipDataset, ClipRequest, ClipSampler, TrainingData, make_targets

RATE = 32_000
CLASSES = ("amecro", "bkcchi", "norcar")


def ramp(seconds):
    """A waveform whose value says where in the recording it is: seconds / 100."""
    return (np.arange(round(seconds * RATE)) / RATE / 100).astype(np.float32)


LENGTHS = {"a.wav": 10.0, "b.wav": 1.0, "c.wav": 2.0}


def read_ramp(path, sample_rate, offset, duration):
    waveform = ramp(LENGTHS[path])
    start = round(offset * sample_rate)
    end = None if duration is None else start + round(duration * sample_rate)
    return waveform[start:end]


@pytest.fixture
def recordings():
    return pd.DataFrame(
        {
            "path": list(LENGTHS),
            "ebird_code": ["amecro", "bkcchi", "norcar"],
            "secondary_codes": [("norcar",), (), ()],
            "seconds": list(LENGTHS.values()),
            "fold": [0, 1, 1],
        }
    )


def dataset(recordings, experiment, noise_files=(), augment=NO_AUGMENT):
    experiment = replace(experiment, augment=augment)
    return ClipDataset(recordings, CLASSES, experiment, read_ramp, noise_files)


def test_clips_are_exactly_as_long_as_the_experiment_says(recordings, tiny_experiment):
    clips = dataset(recordings, tiny_experiment)
    for index in range(3):
        waveform, target = clips[ClipRequest(0, index, index)]
        assert waveform.shape == (2 * RATE,)
        assert waveform.dtype == target.dtype == torch.float32


def test_a_crop_is_a_random_stretch_inside_the_recording(recordings, tiny_experiment):
    clips = dataset(recordings, tiny_experiment)
    starts = [clips[ClipRequest(0, position, 0)][0][0].item() * 100 for position in range(60)]
    assert 0 <= min(starts) < 1.5
    assert 6.5 < max(starts) <= 8.001
    waveform = clips[ClipRequest(0, 0, 0)][0]
    assert (waveform[-1] - waveform[0]).item() * 100 == pytest.approx(2.0, abs=1e-3)


def test_a_short_recording_lies_whole_in_silence(recordings, tiny_experiment):
    clips = dataset(recordings, tiny_experiment)
    places = set()
    for position in range(5):
        waveform = clips[ClipRequest(0, position, 1)][0].numpy()
        first = int(np.flatnonzero(waveform)[0])
        places.add(first)
        assert np.array_equal(waveform[first : first + RATE - 1], ramp(1.0)[1:])
        assert np.count_nonzero(waveform) == RATE - 1
    assert len(places) > 1


def test_the_number_of_workers_changes_no_clip(recordings, tiny_experiment, tmp_path):
    path = tmp_path / "noise.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    clips = dataset(recordings, tiny_experiment, [path], AugmentConfig(noise_only_probability=0.3))
    sampler = ClipSampler(list(recordings["ebird_code"]), 12, "balanced", seed=1)
    epochs = []
    for workers in (0, 2):
        loader = DataLoader(clips, batch_size=4, sampler=sampler, num_workers=workers)
        epochs.append([torch.cat(parts) for parts in zip(*loader, strict=True)])
    assert torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(epochs[0][1], epochs[1][1])


def test_noise_only_clips_have_no_target(recordings, tiny_experiment, tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, np.full(RATE // 2, 0.25), RATE, subtype="FLOAT")
    always = replace(NO_AUGMENT, noise_only_probability=1.0)
    clips = dataset(recordings, tiny_experiment, [path], always)
    waveform, target = clips[ClipRequest(0, 0, 0)]
    assert torch.equal(waveform, torch.full((2 * RATE,), 0.25))
    assert not target.any()


def test_without_noise_files_every_clip_has_its_bird(recordings, tiny_experiment):
    always = replace(NO_AUGMENT, noise_only_probability=1.0)
    _, target = dataset(recordings, tiny_experiment, (), always)[ClipRequest(0, 0, 0)]
    assert target[0] == 1


def test_targets_hold_primary_and_weighted_secondary_labels(recordings):
    assert make_targets(recordings, CLASSES, 0.25).tolist() == [
        [1.0, 0.0, 0.25],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0],
    ]


def test_balanced_sampling_draws_every_class_equally_often():
    codes = ["amecro"] * 90 + ["bkcchi"] * 9 + ["norcar"]
    sampler = ClipSampler(codes, 300, "balanced", seed=0)
    drawn = pd.Series([codes[request.index] for request in sampler]).value_counts()
    assert (drawn.sub(100).abs() <= 1).all()


def test_uniform_sampling_draws_every_recording_once_in_an_epoch():
    sampler = ClipSampler(["amecro"] * 5 + ["bkcchi"] * 2, None, "uniform", seed=0)
    assert sorted(request.index for request in sampler) == list(range(7))


def test_epochs_differ_and_can_be_asked_for_again():
    sampler = ClipSampler(["amecro"] * 20, None, "uniform", seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [r.index for r in first] != [r.index for r in second]
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_fold_out_of_range_lists_the_folds(recordings, tmp_path):
    data = TrainingData(tmp_path, recordings, CLASSES, read_ramp)
    with pytest.raises(ValueError, match="fold 7 is out of range; the folds are 0, 1"):
        data.split(7)
    training, validation = data.split(0)
    assert set(training["path"]) == {"b.wav", "c.wav"}
    assert set(validation["path"]) == {"a.wav"}
