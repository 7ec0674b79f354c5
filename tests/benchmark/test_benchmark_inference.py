"""The benchmark of inference compares implementations that predict the same."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from birdcall.benchmark.frontend import torchlibrosa_frontend
from birdcall.benchmark.inference import (
    benchmark_inference,
    benchmark_memory,
    make_members,
    predict_naively,
    write_soundscapes,
)
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import load_ensemble


def export_members(monkeypatch, *is_exported):
    """Export only some of the members in their order: each export takes seconds."""
    answers = iter(is_exported)
    monkeypatch.setattr("birdcall.benchmark.inference.is_onnx_installed", lambda: next(answers))


def test_both_predict_the_same_and_are_timed(tiny_experiment, demo_folder, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    export_members(monkeypatch, True, False)
    table = benchmark_inference(
        demo_folder, tmp_path, n_members=2, minutes=0.5, repeats=1, experiment=tiny_experiment
    )
    assert list(table["members"]) == [1, 2]
    assert list(table["runtime"]) == ["onnx", "onnx"]  # of the first member
    assert (table["largest_difference"] < 1e-3).all()
    assert (table[["ratio", "x_real_time", "model_alone_x_real_time"]] > 0).all(axis=None)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "inference.csv"), table)


def test_networks_are_timed_in_bfloat16_where_that_is_asked_for(
    tiny_experiment, demo_folder, tmp_path, monkeypatch
):
    pytest.importorskip("openvino")
    monkeypatch.setattr("birdcall.models.checkpoint.find_bfloat16_fault", lambda: "")
    options = {"minutes": 0.5, "repeats": 1, "experiment": tiny_experiment, "in_bfloat16": True}
    table = benchmark_inference(demo_folder, tmp_path, n_members=1, **options)
    assert table["runtime"].str.endswith("bfloat16").all()
    assert (table["largest_difference"] < 0.1).all()
    monkeypatch.setattr(
        "birdcall.models.checkpoint.find_bfloat16_fault", lambda: "an old processor"
    )
    with pytest.raises(ValueError, match="an old processor"):
        benchmark_inference(demo_folder, tmp_path, n_members=1, **options)


def test_the_naive_kernel_gives_the_same_probabilities(
    tiny_experiment, demo_folder, tmp_path, monkeypatch
):
    export_members(monkeypatch, False)
    paths = write_soundscapes(demo_folder, tmp_path / "soundscapes", 0.6)
    ensemble = load_ensemble(make_members(tmp_path / "members", paths, 1, tiny_experiment))
    frontends = [
        torchlibrosa_frontend(member.checkpoint.experiment.frontend) for member in ensemble.members
    ]
    naive = predict_naively(ensemble.members, frontends, paths)
    for clipwise, (_, ours) in zip(naive, predict_files(ensemble, paths), strict=True):
        np.testing.assert_allclose(clipwise, ours.clipwise, atol=1e-3)
        assert clipwise.std(axis=1).mean() > 0.02  # segments differ


def test_the_segments_of_the_naive_kernel_hold_the_whole_waveform(tmp_path):
    waveform = np.random.default_rng(0).uniform(-1, 1, 93_000).astype("f4")
    soundfile.write(tmp_path / "a.wav", waveform, 2000, subtype="FLOAT")
    echo = SimpleNamespace(detect=lambda windows: SimpleNamespace(clipwise=windows))
    frontend = SimpleNamespace(sample_rate=2000)
    checkpoint = SimpleNamespace(experiment=SimpleNamespace(frontend=frontend))
    member = SimpleNamespace(checkpoint=checkpoint, model=echo)
    (segments,) = predict_naively([member], [torch.nn.Identity()], {"a": tmp_path / "a.wav"})
    assert segments.shape == (1, 10, 10_000)
    assert np.array_equal(segments.flatten()[:93_000], waveform)
    assert not segments.flatten()[93_000:].any()


def test_memory_is_measured_on_recordings_of_the_given_lengths(demo_folder, tmp_path, monkeypatch):
    def run(command, check):
        *_, path, _, scratch = command
        result = {"peak_megabytes": soundfile.info(path).duration}
        (Path(scratch) / "result.json").write_text(json.dumps(result))

    monkeypatch.setattr("birdcall.benchmark.inference.make_members", lambda *_: [tmp_path])
    monkeypatch.setattr("subprocess.run", run)
    table = benchmark_memory(demo_folder, tmp_path, short_seconds=12, long_seconds=100)
    assert table["peak_megabytes"].tolist() == [12, 100]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "memory.csv"), table, check_dtype=False)


def test_data_without_soundscapes_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no soundscapes"):
        write_soundscapes(tmp_path, tmp_path / "out", 1)
