"""`import birdcall` is an API: tables of predictions and embeddings, and the parts of a model."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import RATE, ROOT, write_noise_file

import birdcall
from birdcall.audio.frontend import LogMel
from birdcall.inference.decision import average_members
from birdcall.inference.engine import predict_files
from birdcall.prediction.local import ResultOptions, write_results
from birdcall.prediction.package import detect_recordings, find_recordings


@pytest.fixture(scope="module")
def opened(package):
    return birdcall.load_package(package, "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recordings of 12 and 5 seconds, and a file that is no recording."""
    folder = tmp_path_factory.mktemp("recordings")
    write_noise_file(folder / "long.wav", 12.0)
    write_noise_file(folder / "short.wav", 5.0)
    (folder / "web page.mp3").write_text("<html>")
    return folder


@pytest.fixture(scope="module")
def predictions(opened, folder):
    return opened.predict(folder)


# --- tables -------------------------------------------------------------------------------------


def test_segments_have_a_row_for_each_five_seconds_and_a_column_for_each_species(
    predictions, opened, folder
):
    segments = predictions.segments
    assert segments.index.names == ["recording", "onset", "offset"]
    long, short = str(folder / "long.wav"), str(folder / "short.wav")
    assert segments.index.tolist() == [
        (long, 0.0, 5.0), (long, 5.0, 10.0), (long, 10.0, 15.0), (short, 0.0, 5.0)
    ]  # fmt: skip
    assert tuple(segments.columns) == opened.classes


def test_a_probability_is_the_mean_over_the_members(predictions, opened, folder):
    paths = {str(folder / name): folder / name for name in ("long.wav", "short.wav")}
    for path, expected in predict_files(opened.loaded.ensemble, paths):
        segments = predictions.segments.loc[path]
        np.testing.assert_array_equal(segments.to_numpy(), average_members(expected.clipwise))


def test_events_are_those_of_the_command(predictions, opened, folder, tmp_path):
    recordings = find_recordings([folder])
    results = dict(detect_recordings(recordings, opened.loaded))
    write_results(results, tmp_path, ResultOptions(("csv",)))
    written = pd.read_csv(tmp_path / "detections.csv")
    assert len(written)
    pd.testing.assert_frame_equal(predictions.events, written, check_dtype=False)


def test_a_bad_file_costs_its_own_rows_only_and_is_reported(predictions, folder, caplog):
    bad = str(folder / "web page.mp3")
    assert list(predictions.failed) == [bad]
    assert predictions.failed[bad]
    assert bad not in predictions.segments.index.get_level_values("recording")


def test_a_table_of_nothing_but_bad_files_has_its_columns(opened, folder):
    predictions = opened.predict(folder / "web page.mp3")
    assert predictions.segments.empty and predictions.events.empty
    assert tuple(predictions.segments.columns) == opened.classes
    assert predictions.segments.index.names == ["recording", "onset", "offset"]
    assert len(predictions.failed) == 1
    assert opened.embed([folder / "web page.mp3"]).empty


def test_embeddings_have_the_rows_of_the_segments(predictions, opened, folder):
    embeddings = opened.embed([str(folder / "long.wav"), folder / "*.mp3", folder / "short.wav"])
    assert embeddings.index.equals(predictions.segments.index)
    assert embeddings.shape[1] > 0
    assert np.isfinite(embeddings.to_numpy()).all()
    assert embeddings.to_numpy().std(axis=0).max() > 0
    assert list(embeddings.attrs["failed"]) == [str(folder / "web page.mp3")]


# --- bad input ----------------------------------------------------------------------------------


def test_a_path_without_a_recording_is_named(opened, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        opened.predict(tmp_path / "nowhere")


def test_a_folder_that_holds_no_package_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="birdcall package"):
        birdcall.load_package(tmp_path)


def test_a_member_that_is_not_as_packaged_is_refused(package, tmp_path):
    shutil.copytree(package, tmp_path / "package")
    weights = sorted((tmp_path / "package").rglob("model.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        birdcall.load_package(tmp_path / "package")


# --- the module ---------------------------------------------------------------------------------


def test_the_module_lists_its_names_and_has_them():
    assert set(birdcall.__all__) < set(dir(birdcall))
    assert birdcall.LogMel is LogMel
    assert all(hasattr(birdcall, name) for name in birdcall.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_packages'"):
        _ = birdcall.load_packages


def test_import_is_quick_because_it_loads_nothing():
    code = "import sys, birdcall; print({'torch', 'pandas', 'numpy', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_parts_fit_together(folder):
    experiment = birdcall.EXPERIMENTS["small_gru"]
    waveform = birdcall.read_audio(folder / "long.wav", RATE, duration_seconds=5)
    log_mel = birdcall.LogMel(experiment.frontend)(torch.from_numpy(waveform)[None])
    assert log_mel.shape[::3] == (1, experiment.frontend.n_mels)
    assert birdcall.build_model(experiment, 3)(torch.from_numpy(waveform)[None]).clipwise.shape == (
        1,
        3,
    )


def test_the_examples_of_the_page_run(package, folder, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) >= 4
    (tmp_path / "kernels" / "build").mkdir(parents=True)
    (tmp_path / "kernels" / "build" / "dataset").symlink_to(package)
    audio = tmp_path / "input" / "demo" / "test_audio"
    shutil.copytree(folder, audio)
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in examples:
        exec(example, names)
    printed = capsys.readouterr().out
    assert str(Path("input/demo/test_audio/web page.mp3")) in printed
    assert len(names["best"]) == len(names["features"]) == 4
