"""The benchmark of the loader reads the same clips in every way, and counts the right times."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from birdcall.audio.reading import probe_audio, read_audio
from birdcall.benchmark.frontend import make_recordings
from birdcall.benchmark.loader import (
    LoaderRecordings,
    LoaderRun,
    benchmark_loader,
    time_loaders,
    time_readers,
    time_waiting,
)
from birdcall.config import NO_AUGMENT
from birdcall.data.cache import RecordingCache
from birdcall.data.recordings import read_recordings

RATE = 32_000
LIBROSA, SEEK, CACHE = "librosa.load, whole file", "birdcall, seek in the file", "birdcall, cache"
LOADER, TRAINING = "birdcall loader", "birdcall train, small_gru"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three recordings of seven seconds."""
    return make_recordings(tmp_path_factory.mktemp("made"), 3, 7.0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.pass_time` moves."""
    now = SimpleNamespace(seconds=0.0)
    now.pass_time = lambda seconds: setattr(now, "seconds", now.seconds + seconds)
    monkeypatch.setattr("time.perf_counter", lambda: now.seconds)
    return now


def recordings_of(n_recordings):
    table = pd.DataFrame({"path": [f"{i}.mp3" for i in range(n_recordings)], "seconds": 60})
    reader = RecordingCache(Path("data"), Path("cache"))
    return LoaderRecordings(table, Path("data"), files=reader, cached=reader, noise_files=[])


def test_the_table_compares_all_readers_and_is_written(data, tmp_path):
    output = tmp_path / "results"
    table = benchmark_loader(
        data, output, n_clips=32, repeats=1, workers=(0,), n_training_batches=1
    )
    sides = table.set_index("side")
    assert sides.index.unique().tolist() == [
        LIBROSA, "librosa.load, offset=", SEEK, CACHE, LOADER, TRAINING
    ]  # fmt: skip
    assert sides.loc[LIBROSA, "times_librosa"] == 1.0
    speed = sides["clips_per_second"]
    assert (speed > 0).all()
    assert speed[CACHE] > speed[LIBROSA]
    expected = (table["clips_per_second"] / speed[LIBROSA]).to_numpy()
    np.testing.assert_allclose(table["times_librosa"], expected, atol=0.1, rtol=0.02)
    assert sides.loc[SEEK, "max_difference"] < 1e-4
    assert sides.loc[CACHE, "max_difference"] < 1e-4
    loaders = table[table["side"] == LOADER]
    settings = loaders[["source", "augmented", "crops_per_recording", "workers"]]
    assert list(settings.itertuples(index=False, name=None)) == [
        ("file", False, 1, 0), ("file", True, 1, 0), ("cache", False, 1, 0),
        ("cache", True, 1, 0), ("file", False, 4, 0),
    ]  # fmt: skip
    assert (loaders["start_seconds"] > 0).all()
    assert table.loc[table["side"] == TRAINING, "waiting_share"].between(0, 1).all()
    written = pd.read_csv(output / "loader.csv")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    assert (output / "loader.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "loader.png").stat().st_size > 10_000


def test_recordings_made_for_the_purpose_are_what_was_asked_for(data):
    table = read_recordings(data)
    assert table["duration"].tolist() == [7, 7, 7]
    waveforms = [read_audio(data / path, RATE) for path in table["path"]]
    for path, waveform in zip(table["path"], waveforms, strict=True):
        assert probe_audio(data / path).sample_rate == 44_100
        assert len(waveform) == pytest.approx(7 * RATE, abs=RATE / 10)
        assert 0.005 < np.sqrt(np.mean(np.square(waveform))) < 0.2
    n_samples = min(map(len, waveforms))
    correlation = np.corrcoef([waveform[:n_samples] for waveform in waveforms])
    assert np.abs(correlation[~np.eye(3, dtype=bool)]).max() < 0.5, "each has its own sound"


def test_recordings_that_are_there_stay(tmp_path):
    made = make_recordings(tmp_path, 1, 6.0)
    path = made / "train_audio" / "comrav" / "XC100000.mp3"
    path.write_bytes(b"mine")
    make_recordings(tmp_path, 2, 6.0)
    assert path.read_bytes() == b"mine"
    assert len(read_recordings(tmp_path)) == 2


def test_a_table_of_other_recordings_is_not_overwritten(tmp_path):
    (tmp_path / "train.csv").write_text("filename,ebird_code\nXC1.mp3,comrav\n")
    with pytest.raises(ValueError, match=r"train\.csv lists other recordings"):
        make_recordings(tmp_path, 1, 6.0)
    assert (tmp_path / "train.csv").read_text().endswith("XC1.mp3,comrav\n")
    assert not (tmp_path / "train_audio").exists()


def test_damaged_and_short_recordings_are_left_out(tmp_path, caplog):
    data = make_recordings(tmp_path / "data", 3, 6.0)
    audio = data / "train_audio" / "comrav"
    (audio / "XC100000.mp3").write_bytes(b"<html>not found</html>")
    short = audio / "XC100001.mp3"
    short.write_bytes(short.read_bytes()[: short.stat().st_size // 3])
    recordings = LoaderRecordings.prepare(data, tmp_path, 10, seed=0)
    assert [Path(path).name for path in recordings.table["path"]] == ["XC100002.mp3"]
    assert recordings.table["seconds"].tolist() == [6]
    assert "XC100000.mp3" in caplog.text
    (audio / "XC100002.mp3").unlink()
    with pytest.raises(FileNotFoundError, match="XC100002"):
        LoaderRecordings.prepare(data, tmp_path, 10, seed=0)


def test_readers_take_turns_on_the_same_clips_and_the_median_counts(monkeypatch, clock):
    calls = []

    def read(name, costs, position):
        clock.pass_time(costs[len(calls) // 6])  # each run takes another time
        calls.append((name, *position))
        return np.full(5 * RATE, 0.5 if name == "fast" else 0.0)

    silence = np.zeros(60 * RATE)
    monkeypatch.setattr("birdcall.benchmark.loader.read_audio", lambda *_: silence)
    readers = {  # the first run is the comparison
        "slow": partial(read, "slow", [500.0, 1.0, 90.0, 2.0]),
        "fast": partial(read, "fast", [500.0, 0.25, 0.125, 7.0]),
    }
    table = time_readers(recordings_of(3), readers, repeats=3, seed=4)
    assert [name for name, *_ in calls] == ["slow", "fast"] * 12
    for slow, fast in zip(calls[::2], calls[1::2], strict=True):
        assert slow[1:] == fast[1:]
        assert 0 <= slow[2] <= 55
    assert {path for _, path, _ in calls} == {"0.mp3", "1.mp3", "2.mp3"}
    assert table["clips_per_second"].tolist() == pytest.approx([1 / 2.0, 1 / 0.25])
    assert table["max_difference"].tolist() == [0.0, 0.5]


def test_the_difference_is_from_the_full_decode_at_the_same_position(data, tmp_path):
    recordings = LoaderRecordings.prepare(data, tmp_path, 3, seed=0)
    wholes = {path: read_audio(data / path, RATE) for path in recordings.table["path"]}
    loudest = []

    def cut(shift, gain, position):
        path, offset = position
        start = round(offset * RATE)
        loudest.append(np.abs(wholes[path][start : start + 5 * RATE]).max())
        return wholes[path][start + shift : start + shift + 5 * RATE] * gain

    readers = {"same": partial(cut, 0, 1), "late": partial(cut, 1, 1), "loud": partial(cut, 0, 1.1)}
    table = time_readers(recordings, readers, repeats=1, seed=0)
    same, late, loud = table["max_difference"]
    assert same == 0
    assert late > 1e-3
    assert loud == pytest.approx(0.1 * max(loudest), rel=1e-3)


def test_an_epoch_counts_and_the_start_of_the_workers_does_not():
    order = []

    class FakeRun:
        n_clips = 64

        def __init__(self, source, workers, crops_per_recording):
            self.source, self.workers, self.augmented = source, workers, False
            self.crops_per_recording = crops_per_recording
            self.times = iter([(9.0, 99.0), (0.1, 2.0), (0.1, 50.0), (0.1, 4.0)])

        def run_epoch(self):
            order.append(self.workers)
            return next(self.times)

    runs = [FakeRun("cache", 1, 1), FakeRun("file", 2, 4)]
    table = time_loaders(runs, repeats=3)
    assert order == [1, 2] * 4
    assert table["start_seconds"].tolist() == [9.0, 9.0]
    assert table["clips_per_second"].tolist() == [16.0, 16.0]
    assert table["source"].tolist() == ["cache", "file"]
    assert table["crops_per_recording"].tolist() == [1, 4]


def test_a_run_serves_new_epochs_of_whole_batches(data, tmp_path):
    recordings = LoaderRecordings.prepare(data, tmp_path, 3, seed=0)
    run = LoaderRun(recordings, 70, cached=True, workers=0, augmented=False)
    assert run.n_clips == 64
    epochs = [[batch.waveform for batch in run.batches()] for _ in range(2)]
    assert [len(waveform) for waveform in epochs[0]] == [32, 32]
    assert epochs[0][0].shape == (32, 5 * RATE)
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    run.stop()
    assert not hasattr(run, "loader"), "its workers end with it"


def test_waiting_is_the_time_between_steps(clock):
    def batches():
        while True:
            clock.pass_time(1.0)
            yield "batch"

    steps = []

    def step(_):
        steps.append(clock.seconds)
        clock.pass_time(3.0)

    assert time_waiting(batches(), step, 5) == (5.0, 20.0)
    assert len(steps) == 7, "two steps of warm-up are not counted"


def test_a_run_without_augmentation_or_with_several_crops_trains_such_an_experiment(data, tmp_path):
    recordings = LoaderRecordings.prepare(data, tmp_path, 3, seed=0)
    start = partial(LoaderRun, recordings, 32, cached=False, workers=0)
    plain = start(augmented=False, crops_per_recording=4)
    assert plain.experiment.augment == NO_AUGMENT
    assert plain.experiment.train.data.crops_per_recording == 4
    augmented = start(augmented=True)
    assert augmented.experiment.augment != NO_AUGMENT
    assert augmented.experiment.train.data.crops_per_recording == 1


@pytest.mark.parametrize("values", [{"n_clips": 0}, {"repeats": -1}, {"n_recordings": 0}])
def test_impossible_requests_are_refused(data, tmp_path, values):
    with pytest.raises(ValueError, match="must be above 0"):
        benchmark_loader(data, tmp_path, **values)
    with pytest.raises(ValueError, match="seconds is 5; give more than 5"):
        make_recordings(tmp_path, 1, 5)
    with pytest.raises(ValueError, match="n_recordings is 0"):
        make_recordings(tmp_path, 0, 60)
