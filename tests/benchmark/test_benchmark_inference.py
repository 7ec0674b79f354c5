"""The benchmark of inference compares implementations that predict the same."""

import numpy as np
import pandas as pd
import pytest
import torch

from birdcall.benchmark.frontend import torchlibrosa_frontend
from birdcall.benchmark.inference import (
    benchmark_inference,
    cut_segments,
    make_members,
    predict_naively,
    write_long,
    write_soundscapes,
)
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import load_ensemble


def test_both_predict_the_same_and_are_timed(tiny_experiment, demo_folder, tmp_path):
    table = benchmark_inference(
        demo_folder, tmp_path, n_members=2, minutes=0.5, repeats=1, experiment=tiny_experiment
    )
    assert list(table["members"]) == [1, 2]
    assert (table["largest_difference"] < 1e-3).all()
    assert (table[["ratio", "x_real_time", "model_alone_x_real_time"]] > 0).all(axis=None)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "inference.csv"), table)


def test_the_naive_kernel_gives_the_same_probabilities(tiny_experiment, demo_folder, tmp_path):
    paths = write_soundscapes(demo_folder, tmp_path / "soundscapes", 0.6)
    ensemble = load_ensemble(make_members(tmp_path / "members", paths, 1, tiny_experiment))
    frontends = [
        torchlibrosa_frontend(member.checkpoint.experiment.frontend) for member in ensemble.members
    ]
    naive = predict_naively(ensemble.members, frontends, paths)
    for clipwise, (_, ours) in zip(naive, predict_files(ensemble, paths), strict=True):
        np.testing.assert_allclose(clipwise, ours.clipwise, atol=1e-3)
        assert clipwise.std(axis=1).mean() > 0.02  # segments differ


def test_segments_hold_the_whole_waveform():
    waveform = np.arange(23, dtype="f4")
    windows = cut_segments(waveform, 2)
    assert windows.shape == (3, 10)
    assert torch.equal(windows.flatten()[:23], torch.from_numpy(waveform))


def test_a_long_recording_is_as_long_as_it_was_asked_for(demo_folder, tmp_path):
    import soundfile

    paths = write_soundscapes(demo_folder, tmp_path / "soundscapes", 0.2)
    write_long(tmp_path / "long.wav", list(paths.values()), 100.0)
    assert soundfile.info(tmp_path / "long.wav").duration == 100


def test_data_without_soundscapes_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no soundscapes"):
        write_soundscapes(tmp_path, tmp_path / "out", 1)
