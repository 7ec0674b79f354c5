"""An exported model says what the model says, or there is no file."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import NETWORKS

import birdcall.inference.windows as windows_module
from birdcall.__main__ import main
from birdcall.benchmark.inference import spread_outputs
from birdcall.experiments import EXPERIMENTS
from birdcall.inference.engine import predict_waveforms
from birdcall.inference.ensemble import load_ensemble, load_member
from birdcall.inference.windows import (
    ONNX_FILE,
    ExportError,
    WindowConfig,
    export_checkpoint,
    probe_windows,
)
from birdcall.models.checkpoint import Checkpoint, OnnxModel, load_model, save_checkpoint
from birdcall.models.sed import build_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RATE = 32_000


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype("f4")


@pytest.fixture
def exported(package, tmp_path):
    """A copy of a member with its export, of the windows that are the default."""
    shutil.copytree(next((package / "members").iterdir()), tmp_path / "exported")
    return tmp_path / "exported"


@pytest.fixture
def run(exported, tmp_path):
    """A copy of the same member without an export; a test may add files to it."""
    shutil.copytree(exported, tmp_path / "run", ignore=shutil.ignore_patterns(ONNX_FILE))
    return tmp_path / "run"


@pytest.fixture
def export_with_damage(exported, monkeypatch):
    """Let `export_checkpoint` write the package's export again, with a number added to its bias."""
    onnx = pytest.importorskip("onnx")
    network = onnx.load(exported / ONNX_FILE)
    (bias,) = (t for t in network.graph.initializer if t.name.endswith("detection.bias"))

    def export(folder, damage):
        values = onnx.numpy_helper.to_array(bias) + np.float32(damage)

        def write(_network, _inputs, path, **names):
            bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
            onnx.save(network, path)

        monkeypatch.setattr(windows_module, "export_onnx", write)
        return export_checkpoint(folder, folder / ONNX_FILE)

    return export


@pytest.mark.parametrize(
    "window_config", [WindowConfig(), WindowConfig(3, 1.5)], ids=["plain", "wide"]
)
def test_an_ensemble_takes_the_export_and_scores_as_torch_does(
    run, window_config, export_with_damage
):
    torch_scores = predict_waveforms(
        load_ensemble([run], window_config=window_config), {RATE: noise(33)}
    )
    if window_config == WindowConfig():  # the package's export
        assert export_with_damage(run, 0.0) < 1e-5
    else:
        assert export_checkpoint(run, run / ONNX_FILE, window_config) < 1e-5
    ensemble = load_ensemble([run], window_config=window_config)
    assert ensemble.members[0].export is not None
    scores = predict_waveforms(ensemble, {RATE: noise(33)})
    for name in ("clipwise", "framewise", "frames"):
        np.testing.assert_allclose(
            getattr(scores, name), getattr(torch_scores, name), atol=1e-5, err_msg=name
        )
        assert not np.array_equal(getattr(scores, name), np.zeros_like(getattr(scores, name)))


def test_the_runtime_and_not_torch_scores_where_there_is_an_export(exported, monkeypatch):
    ensemble = load_ensemble([exported])
    monkeypatch.setattr(ensemble.members[0].model, "features", None)
    assert predict_waveforms(ensemble, {RATE: noise(12)}).clipwise.shape[1] == 3


def test_an_export_scores_the_same_to_the_bit_in_any_company(exported):
    ensemble = load_ensemble([exported])
    one = predict_waveforms(ensemble, {RATE: noise(42)})
    torch.set_num_threads(3)
    other = predict_waveforms(load_ensemble([exported]), {RATE: noise(42)})
    assert np.array_equal(one.clipwise, other.clipwise)
    assert np.array_equal(one.frames, other.frames)


@pytest.mark.parametrize("change", ["weights", "window_config"])
def test_an_export_of_another_state_is_not_taken(exported, change, caplog):
    assert load_member(exported).export is not None
    if change == "weights":
        model, checkpoint = load_model(exported)
        with torch.no_grad():
            model.head.detection.bias.add_(1)
        save_checkpoint(exported, model, checkpoint)
    member = load_member(exported, WindowConfig(2) if change == "window_config" else WindowConfig())
    assert member.export is None
    assert "torch runs in its place" in caplog.text


def test_torch_takes_over_where_the_export_is_no_model(run, caplog):
    expected = predict_waveforms(load_ensemble([run]), {RATE: noise(12)})
    (run / ONNX_FILE).write_bytes(b"<html>")
    ensemble = load_ensemble([run])
    (record,) = caplog.records
    assert str(run / ONNX_FILE) in record.message
    predictions = predict_waveforms(ensemble, {RATE: noise(12)})
    assert np.array_equal(predictions.clipwise, expected.clipwise)


def test_an_export_is_not_opened_for_a_device_that_runs_torch(run, caplog):
    (run / ONNX_FILE).write_bytes(b"<html>")
    assert load_ensemble([run], "meta").members[0].export is None  # as a GPU, without its memory
    assert not caplog.records


def test_a_waveform_goes_in_where_that_is_asked_for(run, tmp_path, capsys):
    """As another program would use it: nothing but ONNX Runtime and samples."""
    path = tmp_path / "whole.onnx"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), "--input", "waveform", "--to", str(path)])
    assert ended.value.code == 0
    assert f"{path}: " in (printed := capsys.readouterr().out) and "torch" in printed
    waveforms = np.stack([noise(5, seed) for seed in range(3)])
    network = OnnxModel(path)
    clipwise, framewise = network(waveforms, ["clipwise", "framewise"])
    with torch.inference_mode():
        said = load_model(run)[0](torch.from_numpy(waveforms))
    np.testing.assert_allclose(clipwise[:, 0], said.clipwise, atol=1e-4)
    np.testing.assert_allclose(framewise[:, 0], said.framewise.amax(dim=2), atol=1e-4)
    about = json.loads(network.metadata["birdcall"])
    assert about["classes"] == list(load_model(run)[1].classes)
    assert about["input"] == "waveform"


@pytest.mark.parametrize("damage", [4e-3, float("nan")])
def test_an_export_that_says_something_else_is_refused_and_not_written(
    run, damage, export_with_damage
):
    """The exported copy has other weights than torch runs."""
    with pytest.raises(ExportError, match="differ from torch's by"):
        export_with_damage(run, damage)
    assert not list(run.glob("*.onnx"))
    assert not list(run.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_experiment_can_be_exported(name, tmp_path):
    experiment = EXPERIMENTS[name]
    torch.manual_seed(0)
    classes = tuple(f"bird{number}" for number in range(264))
    model = build_model(experiment, len(classes))
    spread_outputs(model, probe_windows(experiment.frontend.sample_rate))
    save_checkpoint(tmp_path, model, Checkpoint(experiment, classes, 0))
    assert export_checkpoint(tmp_path, tmp_path / ONNX_FILE) <= 1e-4
