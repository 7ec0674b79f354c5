"""Clips are the same in any worker of any run, as long as they should be, and fairly drawn."""

import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from birdcall.audio.reading import AudioError, read_audio
from birdcall.config import FULL, NO_AUGMENT, AugmentConfig, SamplingConfig, replace_nested
from birdcall.data import loader as loader_module
from birdcall.data.cache import CropRequest, ReadFailure, RecordingCache
from birdcall.data.clips import ClipDataset
from birdcall.data.dataset import TrainingData, check_classes, load_training_data
from birdcall.data.folds import TRAINING_ONLY
from birdcall.data.loader import (
    ClipBatch,
    FailureCounter,
    check_worker_memory,
    iterate_clips,
    make_loader,
)
from birdcall.data.targets import (
    IGNORE_TARGET,
    ClipRequest,
    ClipSampler,
    ProcessShare,
    recording_weights,
)

RATE = 32_000
CLASSES = ("amecro", "bkcchi", "norcar")


def ramp(seconds):
    """A waveform whose value says where in the recording it is: seconds / 100."""
    return (np.arange(round(seconds * RATE)) / RATE / 100).astype(np.float32)


LENGTHS = {"a.wav": 10.0, "b.wav": 1.0, "c.wav": 2.0}


def read_ramp(request):
    waveform, seconds = ramp(LENGTHS[request.path]), request.seconds
    starts = [round(offset * request.sample_rate) for offset in request.offsets]
    n_samples = None if seconds is None else round(seconds * request.sample_rate)
    return [waveform[start:][:n_samples] for start in starts]


@pytest.fixture
def noise_file(tmp_path):
    path = tmp_path / "noise.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(RATE), RATE)
    return path


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


def make_clip(clips, request):
    """The one clip of a request."""
    return clips.make_clips([request])[0]


def data_of(recordings, read=read_ramp, **fields):
    return TrainingData(Path("unused"), recordings, CLASSES, read, **fields)


def dataset(recordings, experiment, noise_files=(), augment=NO_AUGMENT):
    data = data_of(recordings, noise_files=noise_files)
    return ClipDataset(data, replace(experiment, augment=augment))


def test_recordings_of_no_fold_are_in_every_training_part(training_data):
    folds = training_data.recordings["fold"].copy()
    folds[folds[folds == 0].index[0]] = TRAINING_ONLY
    recordings = training_data.recordings.assign(fold=folds)
    data = replace(training_data, recordings=recordings)
    assert data.folds == [0, 1]
    for fold in data.folds:
        training, held_out = data.split(fold)
        assert (training["fold"] == TRAINING_ONLY).sum() == 1
        assert len(training) + len(held_out) == len(recordings)
    with pytest.raises(ValueError, match="the folds are 0, 1"):
        data.split(TRAINING_ONLY)
    assert data.digests["folds"] != training_data.digests["folds"]


def test_a_full_run_trains_on_everything_and_holds_out_nothing(training_data):
    training, held_out = training_data.split(FULL)
    assert list(training["path"]) == list(training_data.recordings["path"])
    assert len(held_out) == 0
    assert training_data.split_noise(FULL) == (list(training_data.noise_files), [])
    assert training_data.learnable_classes(FULL).all()


def test_clips_are_exactly_as_long_as_the_experiment_says(recordings, tiny_experiment):
    clips = dataset(recordings, tiny_experiment)
    for index in range(3):
        clip = make_clip(clips, ClipRequest(0, index, index))
        waveform, target = clip.waveform, clip.target
        assert waveform.shape == (2 * RATE,)
        assert waveform.dtype == target.dtype == torch.float32


def test_a_crop_is_a_random_stretch_inside_the_recording(recordings, tiny_experiment):
    clips = dataset(recordings, tiny_experiment)
    made = clips.make_clips([ClipRequest(0, position, 0) for position in range(60)])
    starts = [clip.waveform[0].item() * 100 for clip in made]
    assert 0 <= min(starts) < 1.5
    assert 6.5 < max(starts) <= 8.001
    waveform = make_clip(clips, ClipRequest(0, 0, 0)).waveform
    assert (waveform[-1] - waveform[0]).item() * 100 == pytest.approx(2.0, abs=1e-3)


def test_a_short_recording_lies_whole_in_silence(recordings, tiny_experiment):
    clips = dataset(recordings, tiny_experiment)
    places = set()
    for position in range(5):
        waveform = make_clip(clips, ClipRequest(0, position, 1)).waveform.numpy()
        first = int(np.flatnonzero(waveform)[0])
        places.add(first)
        assert np.array_equal(waveform[first : first + RATE - 1], ramp(1.0)[1:])
        assert np.count_nonzero(waveform) == RATE - 1
    assert len(places) > 1


def make_sampler(recordings, n_clips, crops=1, sampling="balanced"):
    config = SamplingConfig(
        clips_per_epoch=n_clips, batch_size=4, sampling=sampling, crops_per_recording=crops
    )
    return ClipSampler(recordings, config, seed=1)


def epoch_of(clips, sampler, workers=0):
    """All batches of an epoch, and what failed."""
    failures = FailureCounter(clips)
    return list(iterate_clips(make_loader(clips, sampler, workers), failures)), failures


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.waveform, other.waveform)
        assert torch.equal(batch.target, other.target)
        assert torch.equal(batch.weight, other.weight)
        assert batch.recordings == other.recordings


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("crops", [1, 3])
def test_the_number_of_workers_changes_no_clip(recordings, tiny_experiment, noise_file, crops):
    augment = AugmentConfig(noise_only_probability=0.3)
    clips = dataset(recordings, tiny_experiment, [noise_file], augment)
    sampler = make_sampler(recordings, 16, crops)
    alone, _ = epoch_of(clips, sampler)
    assert [len(batch.waveform) for batch in alone] == [4, 4, 4, 4]
    for workers in (1, 2, 4):
        assert_same(alone, epoch_of(clips, sampler, workers)[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_without_room_in_shared_memory_workers_send_the_same_batches(
    recordings, tiny_experiment, monkeypatch, caplog
):
    clips = dataset(recordings, tiny_experiment)
    sampler = make_sampler(recordings, 16)
    alone, _ = epoch_of(clips, sampler)
    batch_bytes = 4 * tiny_experiment.clip_samples * 4
    free = {"bytes": (2 * 2 + 2) * batch_bytes}
    monkeypatch.setattr(
        loader_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["bytes"])
    )
    shared, _ = epoch_of(clips, sampler, 2)
    assert not caplog.records
    assert all(batch.waveform.is_shared() for batch in shared)
    free["bytes"] -= 1
    sent, _ = epoch_of(clips, sampler, 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--shm-size=1g" in caplog.text
    assert not any(tensor.is_shared() for batch in sent for tensor in batch[:3])
    assert_same(alone, sent)
    epoch_of(clips, sampler, 0)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_epoch_goes_on_where_it_stopped(
    recordings, tiny_experiment, noise_file, workers
):
    clips = dataset(recordings, tiny_experiment, [noise_file], AugmentConfig())
    sampler = make_sampler(recordings, 16, crops=3)
    sampler.set_epoch(5)
    whole, _ = epoch_of(clips, sampler)
    resumed = make_sampler(recordings, 16, crops=3)
    resumed.set_epoch(5, start=8)
    assert len(make_loader(clips, resumed, workers)) == 2
    assert_same(whole[2:], epoch_of(clips, resumed, workers)[0])


def test_a_kept_loader_serves_the_epoch_that_is_set(recordings, tiny_experiment):
    clips = dataset(recordings, tiny_experiment)
    sampler = make_sampler(recordings, 8)
    loader = make_loader(clips, sampler, 1)
    failures = FailureCounter(clips)
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(list(iterate_clips(loader, failures)))
    assert_same(epochs[0], epochs[2])
    assert not torch.equal(epochs[0][0].waveform, epochs[1][0].waveform)


def test_a_start_outside_the_epoch_is_refused(recordings):
    with pytest.raises(ValueError, match="start is 17; an epoch has 16 clips"):
        make_sampler(recordings, 16).set_epoch(0, start=17)


def test_neighbouring_crops_of_a_recording_are_read_in_one_go(recordings, tiny_experiment):
    reads = []

    def read(request):
        reads.append((request.path, len(request.offsets)))
        return read_ramp(request)

    experiment = replace(tiny_experiment, augment=NO_AUGMENT)
    clips = ClipDataset(data_of(recordings, read), experiment)
    requests = [ClipRequest(0, position, index) for position, index in enumerate([0, 0, 0, 2, 0])]
    together = clips.make_clips(requests)
    assert reads == [("a.wav", 3), ("c.wav", 1), ("a.wav", 1)]
    starts = {clip.waveform[0].item() for clip in together}
    assert len(starts) == 5, "each crop has its own place"
    for request, clip in zip(requests, together, strict=True):
        assert torch.equal(clip.waveform, make_clip(clips, request).waveform)


@pytest.mark.parametrize("cached", [False, True])
def test_crops_of_one_opened_mp3_equal_the_whole_decode(tmp_path, cached):
    noise = 0.2 * np.random.default_rng(0).standard_normal(20 * 44_100)
    soundfile.write(tmp_path / "a.mp3", noise, 44_100, format="MP3")
    whole = read_audio(tmp_path / "a.mp3", RATE)
    cache = RecordingCache(tmp_path, tmp_path / "cache", RATE)
    if cached:
        cache.write("a.mp3", [whole])
    offsets = (12.3456, 0.0, 7.7, len(whole) / RATE - 2)
    crops = cache(CropRequest("a.mp3", RATE, offsets, 2.0))
    assert len(crops) == 4
    for offset, crop in zip(offsets, crops, strict=True):
        start = round(offset * RATE)
        np.testing.assert_allclose(crop, whole[start : start + 2 * RATE], atol=1e-4)
    with pytest.raises(AudioError, match=r"asked for 2 s from 19"):
        cache(CropRequest("a.mp3", RATE, (0.0, 19.0), 2.0))


def test_noise_only_clips_have_no_target(recordings, tiny_experiment, tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, np.full(RATE // 2, 0.25), RATE, subtype="FLOAT")
    always = replace(NO_AUGMENT, noise_only_probability=1.0)
    clips = dataset(recordings, tiny_experiment, [path], always)
    clip = make_clip(clips, ClipRequest(0, 0, 0))
    assert torch.equal(clip.waveform, torch.full((2 * RATE,), 0.25))
    assert not clip.target.any()
    assert (clip.weight, clip.recording) == (1.0, "noise")


def test_without_noise_files_every_clip_has_its_bird(recordings, tiny_experiment):
    always = replace(NO_AUGMENT, noise_only_probability=1.0)
    clip = make_clip(dataset(recordings, tiny_experiment, (), always), ClipRequest(0, 0, 0))
    assert clip.target[0] == 1
    assert clip.recording == "a.wav"


@pytest.fixture
def other_birds(tmp_path):
    """A folder of four recordings of four birds: constant sound of 0.1 to 0.4."""
    folder = tmp_path / "other_birds"
    for number in range(1, 5):
        (folder / f"bird{number}").mkdir(parents=True)
        sound = np.full(RATE, number / 10)
        soundfile.write(folder / f"bird{number}" / f"{number}.wav", sound, RATE, subtype="FLOAT")
    return folder


def test_a_share_of_the_clips_are_other_birds_without_a_target(
    recordings, tiny_experiment, other_birds
):
    files = sorted(other_birds.rglob("*.wav"))
    data = data_of(recordings, other_birds=files)
    requests = [ClipRequest(0, position, position % 3) for position in range(200)]
    plain, mixed = (
        ClipDataset(data, replace(tiny_experiment, augment=augment)).make_clips(requests)
        for augment in (NO_AUGMENT, replace(NO_AUGMENT, other_birds_probability=0.25))
    )
    is_other = np.array([clip.recording == "other birds" for clip in mixed])
    assert 30 <= is_other.sum() <= 70
    levels = {
        round(clip.waveform[0].item(), 4)
        for clip, other in zip(mixed, is_other, strict=True)
        if other
    }
    assert levels == {0.1, 0.2, 0.3, 0.4}
    for clip, before, other in zip(mixed, plain, is_other, strict=True):
        if other:
            assert not clip.target.any()
            assert clip.weight == 1.0
        else:
            assert torch.equal(clip.waveform, before.waveform), "the others stay the same"
            assert torch.equal(clip.target, before.target)


def test_clips_of_other_birds_are_changed_as_recordings_are(
    recordings, tiny_experiment, other_birds, noise_file
):
    augment = replace(NO_AUGMENT, other_birds_probability=1.0, noise_probability=1.0)
    files = sorted(other_birds.rglob("*.wav"))
    data = data_of(recordings, other_birds=files, noise_files=[noise_file])
    clip = make_clip(
        ClipDataset(data, replace(tiny_experiment, augment=augment)), ClipRequest(0, 0, 0)
    )
    assert clip.waveform.std() > 0.01, "constant sound, and noise"


def test_other_birds_are_no_class_and_no_recording_of_the_data(
    training_data, demo_folder, tables, other_birds, caplog
):
    code, copied = training_data.classes[0], training_data.recordings["path"][0]
    (other_birds / code).mkdir()
    (other_birds / "bird1" / "1.wav").rename(other_birds / code / "1.wav")
    (other_birds / "bird2" / "2.wav").unlink()
    shutil.copyfile(demo_folder / copied, other_birds / "bird2" / "copy.mp3")
    (other_birds / "bird4" / "4.m4a").touch()
    (other_birds / "bird4" / "other_birds.csv").touch()
    data = load_training_data(
        demo_folder,
        folds=tables[0],
        audit=tables[1],
        cache=tables[1].parent / "cache",
        other_birds=other_birds,
    )
    assert [path.name for path in data.other_birds] == ["3.wav", "4.wav"]
    for left_out in ("copy.mp3", f"{code}/1.wav", "4.m4a"):
        assert left_out in caplog.text
    training, held_out = data.split_other_birds(0)
    assert sorted(training + held_out) == list(data.other_birds)
    assert training == list(data.training_part(0, data.split(0)[0]).other_birds)
    assert data.digests["other_birds"] != training_data.digests["other_birds"] is None


def test_a_folder_of_other_birds_without_sound_is_refused(demo_folder, tables, tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "list.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"birds: no sound"):
        load_training_data(
            demo_folder,
            folds=tables[0],
            audit=tables[1],
            cache=tmp_path / "cache",
            other_birds=tmp_path / "birds",
        )


def sample(codes, sampling, n_clips=None, ratings=None, crops=1):
    """A sampler of recordings with these codes; its batches are single clips."""
    recordings = pd.DataFrame({"ebird_code": codes})
    if ratings is not None:
        recordings["rating"] = ratings
    config = SamplingConfig(
        clips_per_epoch=n_clips, batch_size=1, sampling=sampling, crops_per_recording=crops
    )
    return ClipSampler(recordings, config, seed=0)


def weights_of(codes, sampling, ratings):
    return recording_weights(pd.DataFrame({"ebird_code": codes, "rating": ratings}), sampling)


def test_balanced_sampling_draws_every_class_equally_often():
    codes = ["amecro"] * 90 + ["bkcchi"] * 9 + ["norcar"]
    sampler = sample(codes, "balanced", n_clips=300)
    drawn = pd.Series([codes[request.index] for request in sampler]).value_counts()
    assert (drawn.sub(100).abs() <= 1).all()


def test_uniform_sampling_draws_every_recording_once_in_an_epoch():
    sampler = sample(["amecro"] * 5 + ["bkcchi"] * 2, "uniform")
    assert sorted(request.index for request in sampler) == list(range(7))


def test_rated_sampling_takes_unrated_recordings_as_average_ones():
    weights = weights_of(["amecro"] * 4, "rated", [5.0, 2.5, 0.0, 0.25])
    mean = (1.0 + 0.5 + 0.1) / 3
    np.testing.assert_allclose(weights / weights[0], [1.0, 0.5, mean, 0.1])
    np.testing.assert_allclose(weights_of(["amecro"] * 4, "rated", [0.0] * 4), 0.25)


def test_ratings_and_balance_combine():
    codes, ratings = ["amecro", "amecro", "bkcchi"], [5.0, 1.0, 1.0]
    np.testing.assert_allclose(
        weights_of(codes, "balanced+rated", ratings), [5 / 12, 1 / 12, 1 / 2]
    )
    sampler = sample(codes, "balanced+rated", n_clips=120, ratings=ratings)
    drawn = np.bincount([request.index for request in sampler])
    assert (np.abs(drawn - [50, 10, 60]) <= 1).all()


def test_impossible_sampling_is_refused():
    with pytest.raises(ValueError, match="sampling is 'best'; choose one of uniform, balanced"):
        sample(["amecro"], "best")
    with pytest.raises(ValueError, match="sampling is 'rated', but there are no ratings"):
        sample(["amecro"], "rated")


def test_crops_of_a_recording_come_in_a_row_and_the_epoch_keeps_its_length():
    sampler = sample([f"c{i}" for i in range(50)], "uniform", n_clips=32, crops=5)
    requests = list(sampler)
    assert [request.position for request in requests] == list(range(32))
    indices = [request.index for request in requests]
    assert all(len(set(indices[i : i + 5])) == 1 for i in range(0, 32, 5))
    assert len(set(indices)) == 7


def test_epochs_differ_and_can_be_asked_for_again():
    sampler = sample(["amecro"] * 20, "uniform")
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [r.index for r in first] != [r.index for r in second]
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_classes_that_a_fold_lacks_are_named_once(recordings, caplog, tmp_path):
    table = tmp_path / "run" / "missing.csv"
    training, validation = recordings.iloc[:1], recordings.iloc[1:]
    check_classes(training, validation, classes=CLASSES, fold=3, table=table)
    training, validation = (record.message for record in caplog.records)
    assert training.startswith(
        "fold 3 has no training recording of 2 of 3 classes (bkcchi, norcar)"
    )
    assert validation.startswith("fold 3 has no validation recording of 1 of 3 classes (amecro)")


def test_of_many_classes_that_a_fold_lacks_five_are_named_and_a_table_lists_all(
    recordings, caplog, tmp_path
):
    classes = sorted({*CLASSES, *(f"bird{number:03}" for number in range(199))})
    table = tmp_path / "run" / "missing.csv"
    check_classes(recordings, recordings, classes=classes, fold=3, table=table)
    for record in caplog.records:
        named = [code for code in classes if code in record.message.split("/")[0]]
        assert named == classes[classes.index("bird000") :][:5]
        assert "199 of 202" in record.message
        assert str(table) in record.message
    listed = pd.read_csv(table)
    for part in ("training", "validation"):
        missing = list(listed.loc[listed["part"] == part, "ebird_code"])
        assert missing == [code for code in classes if code.startswith("bird")]


def test_a_fold_with_all_classes_warns_of_nothing(recordings, caplog, tmp_path):
    table = tmp_path / "missing.csv"
    table.write_text("part,ebird_code\ntraining,of an earlier training\n")
    check_classes(recordings, recordings, classes=CLASSES, fold=0, table=table)
    assert not caplog.records
    assert not table.exists()


# --- several processes ---------------------------------------------------------------------------


def shared_samplers(world_size, batch_size=8, n_clips=30, crops=3, n_recordings=20):
    codes = [f"c{number % 4}" for number in range(n_recordings)]
    recordings = pd.DataFrame({"ebird_code": codes})
    config = SamplingConfig(
        clips_per_epoch=n_clips, batch_size=batch_size, crops_per_recording=crops
    )
    shares = [ProcessShare(rank, world_size) for rank in range(world_size)]
    return [ClipSampler(recordings, config, 1, share) for share in shares]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 8, 24])
def test_processes_share_each_batch_of_the_one_epoch(world_size, start):
    samplers = shared_samplers(world_size)
    (whole,) = shared_samplers(1, batch_size=1)
    for sampler in (whole, *samplers):
        sampler.set_epoch(2, start if sampler is not whole else 0)
    parts = [list(sampler) for sampler in samplers]
    assert [len(part) for part in parts] == [len(sampler) for sampler in samplers]
    share = 8 // world_size
    joined = [
        request
        for first in range(0, len(parts[0]), share)
        for part in parts
        for request in part[first : first + share]
    ]
    assert joined == list(whole)[start:24], "in order, and without the batch that is not full"


def test_processes_load_the_batches_of_one(recordings, tiny_experiment, noise_file):
    clips = dataset(recordings, tiny_experiment, [noise_file], AugmentConfig())
    config = SamplingConfig(clips_per_epoch=10, batch_size=4)
    alone, _ = epoch_of(clips, ClipSampler(recordings, config, 1))
    samplers = [ClipSampler(recordings, config, 1, ProcessShare(rank, 2)) for rank in (0, 1)]
    loaders = [make_loader(clips, sampler, 0) for sampler in samplers]
    failures = FailureCounter(clips)
    halves = [list(iterate_clips(loader, failures)) for loader in loaders]
    assert [len(half) for half in halves] == [2, 2] == [len(alone), len(loaders[0])]
    for batch, first, second in zip(alone, *halves, strict=True):
        assert torch.equal(batch.waveform, torch.cat([first.waveform, second.waveform]))
        assert torch.equal(batch.target, torch.cat([first.target, second.target]))
        assert batch.recordings == first.recordings + second.recordings


def test_batches_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared by 3 processes"):
        shared_samplers(3)
    with pytest.raises(ValueError, match="an epoch of 6 clips is less than one batch of 8"):
        shared_samplers(2, n_clips=None, n_recordings=6)
    with pytest.raises(ValueError, match="rank is 2; with a world_size of 2 it is below that"):
        ProcessShare(rank=2, world_size=2)


def test_an_epoch_goes_on_only_where_a_batch_starts():
    sampler = shared_samplers(2)[1]
    with pytest.raises(ValueError, match="start is 9, within a batch of 8"):
        sampler.set_epoch(0, start=9)
    sampler.set_epoch(0, start=30)
    assert len(sampler) == len(list(sampler)) == 0


def test_an_epoch_of_less_than_a_batch_is_one_small_batch(recordings, tiny_experiment):
    config = SamplingConfig(batch_size=4, sampling="uniform")
    sampler = ClipSampler(recordings, config, seed=0)
    batches, _ = epoch_of(dataset(recordings, tiny_experiment), sampler)
    assert [len(batch.waveform) for batch in batches] == [3]


# --- the weight of a clip, and its channels ------------------------------------------------------


def test_a_clips_loss_counts_as_its_recordings_rating(recordings, tiny_experiment):
    recordings = recordings.assign(rating=[5.0, 2.0, 0.0])
    rated_loss = {"loss": {"rating_weight": True}}
    rated = dataset(recordings, replace_nested(tiny_experiment, train=rated_loss))
    requests = [ClipRequest(0, position, position) for position in range(3)]
    weights = [clip.weight for clip in rated.make_clips(requests)]
    assert weights == pytest.approx([1.0, 0.4, 0.7])
    plain = dataset(recordings, tiny_experiment)
    assert [clip.weight for clip in plain.make_clips(requests)] == [1.0] * 3
    config = SamplingConfig(batch_size=4, sampling="uniform")
    sampler = ClipSampler(recordings, config, seed=0)
    batch = epoch_of(rated, sampler)[0][0]
    expected = dict(zip(recordings["path"], weights, strict=True))
    assert batch.weight.dtype == torch.float32
    assert batch.weight.tolist() == pytest.approx([expected[path] for path in batch.recordings])


def test_the_recording_that_took_anothers_place_is_named(many, tiny_experiment):
    clip = make_clip(good_clips(many, tiny_experiment), ClipRequest(0, 0, 3))
    number = int(clip.recording.removeprefix("good").removesuffix(".wav"))
    assert clip.waveform[0].item() * 100 == pytest.approx(number + 1, abs=0.1)


def test_each_clip_has_its_own_downmix_and_neighbours_with_one_are_read_together(
    recordings, tiny_experiment
):
    reads = []

    def read(request):
        reads.append((len(request.offsets), request.downmix))
        shift = np.float32(0 if request.downmix is None else 1 + request.downmix)
        return [crop + shift for crop in read_ramp(request)]

    augment = replace(NO_AUGMENT, downmix_probability=0.5)
    clips = ClipDataset(data_of(recordings, read), replace(tiny_experiment, augment=augment))
    requests = [ClipRequest(0, position, 0) for position in range(40)]
    together = clips.make_clips(requests)
    assert sum(n for n, _ in reads) == 40
    plain = sum(n for n, downmix in reads if downmix is None)
    assert 10 <= plain <= 30
    assert any(n > 1 for n, downmix in reads if downmix is None)
    assert len({downmix for _, downmix in reads if downmix is not None}) == 40 - plain
    for request, clip in zip(requests, together, strict=True):
        assert torch.equal(clip.waveform, make_clip(clips, request).waveform)


def test_a_downmix_is_the_share_of_the_first_channel(tmp_path):
    channels = np.repeat([[0.5, 0.1]], RATE, axis=0)
    soundfile.write(tmp_path / "stereo.wav", channels, RATE, subtype="FLOAT")
    cache = RecordingCache(tmp_path, tmp_path / "cache")
    for downmix, level in ((None, 0.3), (1.0, 0.5), (0.0, 0.1), (0.25, 0.2)):
        crop = cache(CropRequest("stereo.wav", RATE, (0.25,), 0.5, downmix=downmix))[0]
        assert crop == pytest.approx(np.full(RATE // 2, level), abs=1e-6)


def test_decoded_noise_is_kept_where_the_training_data_says(
    training_data, recordings, tiny_experiment, noise_file, tmp_path
):
    assert training_data.noise_store == training_data.read_crops.folder / "noise"
    always = replace(NO_AUGMENT, noise_only_probability=1.0)
    experiment = replace(tiny_experiment, augment=always)
    made = []
    for store in (None, tmp_path / "store"):
        data = data_of(recordings, noise_files=[noise_file], noise_store=store)
        clips = ClipDataset(data, experiment)
        made.append(make_clip(clips, ClipRequest(0, 0, 0)).waveform)
    assert torch.equal(*made)
    assert list((tmp_path / "store").rglob("*.npy"))


# --- labels with times ---------------------------------------------------------------------------


def test_a_clip_has_the_labels_of_its_own_stretch(recordings, tiny_experiment):
    recordings = recordings.assign(filename=["XC1.mp3", "XC2.mp3", "XC3.mp3"])
    rows = [
        ("XC1.mp3", "amecro", 0.0, 5.0, "present", 0.9),
        ("XC1.mp3", "bkcchi", 6.0, 10.0, "present", 0.9),
        ("XC2.mp3", "bkcchi", 0.0, 1.0, "present", 0.9),
    ]
    names = ["filename", "ebird_code", "onset", "offset", "state", "probability"]
    table = pd.DataFrame(rows, columns=names)
    experiment = replace(tiny_experiment, augment=NO_AUGMENT)
    clips = ClipDataset(data_of(recordings, strong_labels=table), experiment)
    made = clips.make_clips([ClipRequest(0, position, 0) for position in range(60)])
    starts = np.array([clip.waveform[0].item() * 100 for clip in made])  # of two seconds each
    targets = np.array([clip.target.tolist() for clip in made])
    first = np.select([starts <= 4.5, starts < 5], [1.0, IGNORE_TARGET], 0.0)
    second = np.select([starts >= 4.5, starts > 4], [1.0, IGNORE_TARGET], 0.0)
    assert np.array_equal(targets, np.stack([first, second, 0 * first], axis=1))
    assert len(np.unique(targets, axis=0)) >= 4
    short = make_clip(clips, ClipRequest(0, 0, 1))
    assert short.target.tolist() == [0.0, 1.0, 0.0], "wherever it lies in its clip"
    assert make_clip(clips, ClipRequest(0, 0, 2)).target.tolist() == [0.0, 0.0, 1.0]


def test_training_data_reads_labels_with_times(training_data, demo_folder, tmp_path):
    names = ["filename", "ebird_code", "onset", "offset", "state", "probability"]
    first = training_data.recordings.iloc[0]
    row = (first["filename"], first["ebird_code"], 0.0, 1.0, "present", 1.0)
    labels, cache = tmp_path / "labels.csv", training_data.read_crops.folder
    pd.DataFrame([row], columns=names).to_csv(labels, index=False)
    folds, audit = cache.parent / "folds.csv", cache.parent / "audit.csv"
    data = load_training_data(demo_folder, folds=folds, audit=audit, cache=cache, labels=labels)
    assert data.strong_labels["filename"].tolist() == [first["filename"]]
    assert training_data.strong_labels is None


def test_recordings_that_changed_since_the_audit_are_counted_in_one_warning(
    demo_folder, tables, tmp_path, caplog
):
    folds, audit = tables
    load = partial(load_training_data, demo_folder, folds=folds, cache=tmp_path)
    load(audit=audit)
    assert not caplog.records
    table = pd.read_csv(audit, keep_default_na=False)
    names = list(table.loc[table["usable"], "path"].iloc[:2])
    table.loc[table["path"].isin(names), "size"] += 1
    table.to_csv(tmp_path / "audit.csv", index=False)
    load(audit=tmp_path / "audit.csv")
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of ")
    assert any(name in record.getMessage() for name in names)


def test_a_fold_out_of_range_lists_the_folds(recordings):
    data = data_of(recordings)
    with pytest.raises(ValueError, match="fold 7 is out of range; the folds are 0, 1"):
        data.split(7)
    training, validation = data.split(0)
    assert set(training["path"]) == {"b.wav", "c.wav"}
    assert set(validation["path"]) == {"a.wav"}


# --- recordings that fail ------------------------------------------------------------------------


@pytest.fixture
def many():
    """Twenty recordings of two classes; the name says which will fail."""
    names = [f"{'bad' if number in (3, 7) else 'good'}{number}.wav" for number in range(20)]
    return pd.DataFrame(
        {
            "path": names,
            "ebird_code": ["amecro"] * 10 + ["bkcchi"] * 10,
            "secondary_codes": [()] * 20,
            "seconds": 10.0,
        }
    )


def read_good(request):
    path = request.path
    if path.startswith("bad"):
        raise AudioError(Path(path), "cannot be decoded: lost sync")
    number = int("".join(filter(str.isdigit, path)))
    n_samples = round(request.seconds * request.sample_rate)
    level = np.full(n_samples, (number + 1) / 100, dtype=np.float32)
    return [level + np.float32(offset / 1e5) for offset in request.offsets]


def good_clips(many, experiment, read=read_good, **data):
    experiment = replace_nested(experiment, augment=NO_AUGMENT, train={"data": data})
    return ClipDataset(data_of(many, read), experiment)


@pytest.mark.parametrize("crops", [1, 2])
def test_a_failing_recording_is_replaced_alike_by_any_number_of_workers(
    many, tiny_experiment, caplog, crops
):
    clips = good_clips(many, tiny_experiment)
    sampler = make_sampler(many, 40, crops, "uniform")
    alone, failures = epoch_of(clips, sampler)
    named = [record.message for record in caplog.records]
    assert sorted(failures.failed) == ["bad3.wav", "bad7.wav"]
    assert len(named) == 2, "each once, however often it was drawn"
    assert "recording cannot be read, another is taken: bad" in named[0]
    assert "cannot be decoded: lost sync" in named[0]
    assert all(batch.waveform.shape == (4, 2 * RATE) for batch in alone)
    assert all(batch.waveform.abs().min() > 0 for batch in alone), "no silence in their place"
    assert not [name for batch in alone for name in batch.recordings if name.startswith("bad")]
    for workers in (1, 2):
        others, failed = epoch_of(clips, sampler, workers)
        assert_same(alone, others)
        assert sorted(failed.failed) == sorted(failures.failed)


def test_the_others_of_a_batch_do_not_change(many, tiny_experiment):
    requests = [ClipRequest(0, position, index) for position, index in enumerate([2, 3, 3, 4])]
    made = good_clips(many, tiny_experiment).make_clips(requests)
    many = many.assign(path=many["path"].str.replace("bad", "good"))
    healthy = good_clips(many, tiny_experiment).make_clips(requests)
    for position in (0, 3):
        assert torch.equal(made[position].waveform, healthy[position].waveform)
    for position in (1, 2):
        assert not torch.equal(made[position].waveform, healthy[position].waveform)
        assert torch.equal(made[position].target, healthy[position].target), "of the same class"
        assert {failure.path for failure in made[position].failures} <= {"bad3.wav", "bad7.wav"}
        assert made[position].failures[0].path == "bad3.wav"


def test_where_one_crop_of_several_fails_the_others_are_kept(many, tiny_experiment):
    def read(request):
        if request.path == "good2.wav" and max(request.offsets) > 4:
            raise AudioError(Path(request.path), "decodes only to 4 s of 10 s")
        return read_good(replace(request, path=request.path.replace("bad", "good")))

    clips = good_clips(many, tiny_experiment, read)
    made = clips.make_clips([ClipRequest(0, position, 2) for position in range(8)])
    levels = np.array([clip.waveform[0].item() * 100 for clip in made])
    own = np.array([not clip.failures for clip in made])
    assert 0 < own.sum() < 8
    assert (levels[own].round(1) == 3.0).all()
    assert (levels[~own].round(1) != 3.0).all()


def test_too_many_failures_stop_the_run_and_name_the_first(many, tiny_experiment):
    many = many.assign(path=[f"bad{number}.wav" for number in range(10)] + list(many["path"][10:]))
    clips = good_clips(many, tiny_experiment)
    with pytest.raises(ValueError) as stopped:
        epoch_of(clips, make_sampler(many, 40, sampling="uniform"), workers=1)
    message = str(stopped.value)
    assert "of 20 recordings could not be read while training (more than 3), so it stops" in message
    assert message.count(".wav: cannot be decoded: lost sync") == 3
    assert "\n" not in message


def test_the_share_that_may_fail_is_the_experiments(many, tiny_experiment):
    many = many.assign(path=[f"bad{number}.wav" for number in range(5)] + list(many["path"][5:]))
    sampler = make_sampler(many, 40, sampling="uniform")
    _, failures = epoch_of(good_clips(many, tiny_experiment, max_failed_share=0.3), sampler)
    assert len(failures.failed) == 6
    with pytest.raises(ValueError, match=r"6 of 20 recordings|4 of 20|5 of 20"):
        epoch_of(good_clips(many, tiny_experiment, max_failed_share=0.2), sampler)


def test_a_clip_that_nothing_can_be_read_for_stops_the_run(many, tiny_experiment):
    many = many.head(2).assign(path=["bad0.wav", "bad1.wav"])
    with pytest.raises(ValueError, match=r"2 of 2 recordings could not be read.*bad"):
        epoch_of(good_clips(many, tiny_experiment), make_sampler(many, 8), workers=1)


def test_a_recording_that_vanished_or_shrank_fails_too(tiny_experiment, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.full(RATE // 2, 0.5), RATE, subtype="FLOAT")
    recordings = pd.DataFrame(
        {
            "path": ["gone.wav", "short.wav"],
            "ebird_code": ["amecro", "bkcchi"],
            "secondary_codes": [(), ()],
            "seconds": [10.0, 1.5],
        }
    )
    cache = RecordingCache(tmp_path, tmp_path / "cache")
    experiment = replace(tiny_experiment, augment=NO_AUGMENT)
    clips = ClipDataset(data_of(recordings, cache), experiment)
    clip = make_clip(clips, ClipRequest(0, 0, 0))
    assert (clip.waveform, clip.recording) == (None, "gone.wav")
    gone, short = (failure.reason for failure in clip.failures)
    assert re.search(r"No such file.*gone\.wav", gone)
    assert re.search(r"short\.wav.*has 0\.5 s, had 1\.5 s", short)


def test_noise_files_that_fail_are_counted_apart(recordings, tiny_experiment, tmp_path, caplog):
    noise_files = [tmp_path / f"noise{number}.wav" for number in range(6)]
    for path in noise_files:
        path.write_bytes(b"<html>")
    soundfile.write(noise_files[0], np.full(RATE, 0.25), RATE, subtype="FLOAT")
    always = replace(NO_AUGMENT, noise_only_probability=1.0)
    clips = dataset(recordings, tiny_experiment, noise_files, always)
    with pytest.raises(ValueError, match=r"\d of 6 noise files could not be read.*more than 3"):
        epoch_of(clips, make_sampler(recordings, 12), workers=1)
    assert "noise file cannot be read, another is taken: " in caplog.text
    clips = dataset(recordings, tiny_experiment, noise_files[:2], always)
    batches, failures = epoch_of(clips, make_sampler(recordings, 12))
    assert list(failures.failed) == [str(noise_files[1])]
    assert all((batch.waveform == 0.25).all() for batch in batches)


def test_failures_are_counted_once_over_epochs(many, tiny_experiment):
    failures = FailureCounter(good_clips(many, tiny_experiment))
    failure = ReadFailure("recording", "bad3.wav", "bad3.wav: lost sync")
    for _ in range(10):
        zeros = torch.zeros(1, 1)
        failures.count(
            ClipBatch(
                waveform=zeros,
                target=zeros,
                weight=zeros[0],
                recordings=("bad3.wav",),
                failures=(failure,),
            )
        )
    assert len(failures.failed) == 1


# --- memory --------------------------------------------------------------------------------------

WORKER_BYTES = {"fork": 100_000_000, "forkserver": 350_000_000, "spawn": 350_000_000}


def test_workers_that_do_not_fit_are_refused_with_the_number_that_would(tiny_experiment):
    data = {"batch_size": 100, "clips_per_epoch": None}
    experiment = replace_nested(tiny_experiment, train={"data": data})
    batches = 5 * 100 * 2 * RATE * 4  # clips of 2 s, float32
    each = WORKER_BYTES[multiprocessing.get_start_method()] + batches
    check_worker_memory(4, experiment, available=4 * each)
    with pytest.raises(ValueError, match=r"^5 workers need .* GB each.*: 4 would fit; give"):
        check_worker_memory(5, experiment, available=5 * each - 1)
    with pytest.raises(ValueError, match="0 would fit; give --workers 0"):
        check_worker_memory(1, experiment, available=10)
    check_worker_memory(0, experiment, available=10)


def test_workers_that_encode_clips_take_more(tiny_experiment):
    plain = replace(tiny_experiment, augment=NO_AUGMENT)
    each = WORKER_BYTES[multiprocessing.get_start_method()] + 5 * 4 * 2 * RATE * 4
    check_worker_memory(2, plain, available=2 * each)
    for name in ("mp3", "pitch", "tempo"):
        augment = replace(NO_AUGMENT, **{f"{name}_probability": 0.1})
        with pytest.raises(ValueError, match=r"give --workers \d$"):
            check_worker_memory(2, replace(plain, augment=augment), available=2 * each)


def test_processes_that_share_a_batch_have_workers_each(tiny_experiment):
    data = {"batch_size": 100, "clips_per_epoch": None}
    experiment = replace_nested(tiny_experiment, train={"data": data})
    each = WORKER_BYTES[multiprocessing.get_start_method()] + 5 * 50 * 2 * RATE * 4
    check_worker_memory(3, experiment, n_processes=2, available=6 * each)
    with pytest.raises(ValueError, match="3 would fit"):
        check_worker_memory(4, experiment, n_processes=2, available=8 * each - 1)


def test_a_worker_takes_no_more_than_is_reckoned_with(recordings, tiny_experiment):
    """What a forked worker has of its own, beside what it shares (Private_Dirty of Linux)."""
    if not Path("/proc/self/smaps_rollup").exists() or sys.platform != "linux":
        pytest.skip("the kernel does not say what a process has of its own")
    data = {"batch_size": 64, "clips_per_epoch": None}
    clips = dataset(recordings, replace_nested(tiny_experiment, train={"data": data}))
    config = SamplingConfig(clips_per_epoch=64 * 6, batch_size=64, sampling="uniform")
    sampler = ClipSampler(recordings, config, seed=0)
    loader = make_loader(clips, sampler, 1, "fork")
    own = 0
    for _ in iterate_clips(loader, FailureCounter(clips)):
        rollup = Path(f"/proc/{loader._iterator._workers[0].pid}/smaps_rollup").read_text()
        own = max(own, int(re.search(r"Private_Dirty: +(\d+) kB", rollup)[1]) * 1024)
    batches = 5 * 64 * 2 * RATE * 4
    assert batches / 5 < own < WORKER_BYTES["fork"] + batches


# --- what a worker is ----------------------------------------------------------------------------

WORKER = """
import json, os, sys
from pathlib import Path
import numpy as np, pandas as pd, torch
from threadpoolctl import threadpool_info
from birdcall.config import AugmentConfig, SamplingConfig, replace_nested
from birdcall.experiments import find_experiment
from birdcall.data.clips import ClipDataset
from birdcall.data.dataset import TrainingData
from birdcall.data.targets import ClipSampler
from birdcall.data.loader import (FailureCounter, iterate_clips, make_loader)

NOISE, FOUND = map(Path, sys.argv[1:3])

def read(request):
    found = {
        "modules": sorted(sys.modules), "pid": os.getpid(), "torch": torch.get_num_threads(),
        "pools": [pool["num_threads"] for pool in threadpool_info()],
    }
    FOUND.write_text(json.dumps(found))
    n_samples = round(request.seconds * request.sample_rate)
    return [np.full(n_samples, 0.1, np.float32) for _ in request.offsets]

if __name__ == "__main__":
    recordings = pd.DataFrame({"path": ["a"] * 4, "ebird_code": ["amecro"] * 4,
                               "secondary_codes": [()] * 4, "seconds": [99.0] * 4})
    augment = AugmentConfig(
        noise_probability=1, noise_only_probability=0, color_noise_probability=1,
        low_pass_probability=1, short_noise_probability=1, mp3_probability=0,
    )
    experiment = find_experiment("small_gru")
    experiment = replace_nested(experiment, augment=augment, train={"data": {"batch_size": 2}})
    data = TrainingData(Path("unused"), recordings, ("amecro",), read, [NOISE])
    clips = ClipDataset(data, experiment)
    config = SamplingConfig(clips_per_epoch=8, batch_size=2, sampling="uniform")
    sampler = ClipSampler(recordings, config, seed=0)
    print(os.getpid())
    for start_method in ("spawn", "fork"):
        loader = make_loader(clips, sampler, 1, start_method)
        batches = list(iterate_clips(loader, FailureCounter(clips)))
        assert len(batches) == 4
        print(FOUND.read_text())
        del loader
"""


def test_a_worker_imports_no_librosa_and_has_one_thread(noise_file, tmp_path):
    script, found = tmp_path / "load.py", tmp_path / "found.json"
    script.write_text(WORKER)
    command = [sys.executable, str(script), str(noise_file), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parent, *workers = done.stdout.splitlines()
    assert len(workers) == 2
    heavy = {"librosa", "numba", "audiomentations", "scipy.signal", "sklearn", "timm", "matplotlib"}
    for worker in map(json.loads, workers):  # spawned and forked
        assert worker["pid"] != int(parent)
        assert not heavy & set(worker["modules"])
        assert "birdcall.data.augment" in worker["modules"]
        assert worker["torch"] == 1
        assert worker["pools"]
        assert set(worker["pools"]) == {1}


def test_recordings_that_the_cache_lacks_are_counted(demo_folder, tables, tmp_path, caplog):
    folds, audit = tables
    places = {"folds": folds, "audit": audit, "cache": tmp_path / "cache"}
    data = load_training_data(demo_folder, **places)
    count = f"1 of {len(data.recordings)} recordings"
    first, *others = data.recordings["path"]
    assert "cache" not in caplog.text  # nobody has asked for one
    for path in others:
        data.read_crops.write(path, [np.ones(10, np.float32)])
    caplog.clear()
    load_training_data(demo_folder, **places)
    assert count in caplog.text
    data.read_crops.write(first, [np.ones(10, np.float32)])
    caplog.clear()
    load_training_data(demo_folder, **places)
    assert "cache" not in caplog.text
