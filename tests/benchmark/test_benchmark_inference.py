"""The benchmark compares what says the same, and its parts add up."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import birdcall.benchmark.inference as benchmark
from birdcall.benchmark.inference import (
    NaiveKernel,
    benchmark_inference,
    cut_by_hand,
    make_members,
    write_long,
    write_soundscapes,
)
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import load_ensemble


@pytest.fixture
def small(monkeypatch, tiny_experiment):
    """A network of a few weights in place of EfficientNet-B0."""
    monkeypatch.setattr(benchmark, "benchmarked_experiment", lambda: tiny_experiment)


def test_both_sides_say_the_same_and_are_timed(small, demo_folder, tmp_path):
    table = benchmark_inference(demo_folder, tmp_path, n_members=2, minutes=0.5, repeats=1)
    assert list(table["members"]) == [1, 2]
    assert (table["largest_difference"] < 1e-3).all()
    assert (table[["ratio", "x_real_time", "model_alone_x_real_time"]] > 0).all(axis=None)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "inference.csv"), table)


def test_the_naive_kernel_is_another_way_to_the_same_scores(small, demo_folder, tmp_path):
    sounds = write_soundscapes(demo_folder, tmp_path / "sounds", 0.6)
    ensemble = load_ensemble(make_members(tmp_path / "members", sounds, 2))
    naive = NaiveKernel(ensemble.members).hear(sounds)
    for one, (_, other) in zip(naive, predict_files(ensemble, sounds), strict=True):
        np.testing.assert_allclose(one, other.clipwise, atol=1e-3)
        assert one.std(axis=1).mean() > 0.02  # it says other things of other segments


def test_windows_cut_by_hand_are_all_of_the_sound():
    waveform = np.arange(23, dtype="f4")
    windows = cut_by_hand(waveform, 2)
    assert windows.shape == (3, 10)
    assert torch.equal(windows.flatten()[:23], torch.from_numpy(waveform))


def test_a_long_recording_is_as_long_as_it_was_asked_for(demo_folder, tmp_path):
    import soundfile

    sounds = write_soundscapes(demo_folder, tmp_path / "sounds", 0.2)
    write_long(tmp_path / "long.wav", list(sounds.values()), 100.0)
    assert soundfile.info(tmp_path / "long.wav").duration == 100


TAKE = """
from birdcall.benchmark.timing import peak_megabytes
import numpy as np
before = peak_megabytes()
taken = np.ones(2**25)
print(before, peak_megabytes() - before, taken.nbytes / 2**20)
"""


def test_memory_is_what_the_process_takes_and_not_what_its_parent_has():
    parent = np.ones(2**27)  # a gigabyte
    command = [sys.executable, "-c", TAKE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, gained, taken = map(float, done.stdout.split())
    assert before < 0.5 * parent.nbytes / 2**20
    assert gained == pytest.approx(taken, rel=0.05)


def test_data_without_soundscapes_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no soundscapes"):
        write_soundscapes(tmp_path, tmp_path / "out", 1)
