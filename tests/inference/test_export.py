"""An exported model says what the model says, or there is no file."""

import json
import logging
import shutil
import time
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import soundfile
import torch
from helpers import NETWORKS

import birdcall.inference.windows as windows_module
import birdcall.models.checkpoint as checkpoint_module
import birdcall.models.export as export_module
from birdcall.__main__ import main
from birdcall.benchmark.inference import spread_outputs
from birdcall.evaluation.predictions import PredictionCache
from birdcall.experiments import EXPERIMENTS, find_experiment
from birdcall.inference.engine import predict_audio, predict_waveforms, sample_log_mels
from birdcall.inference.ensemble import Ensemble, load_ensemble, load_member
from birdcall.inference.windows import (
    FRAMES_PER_SEGMENT,
    ONNX_FILE,
    ExportError,
    SegmentOutput,
    WindowConfig,
    export_checkpoint,
    probe_windows,
)
from birdcall.models.checkpoint import (
    Checkpoint,
    OnnxModel,
    OpenVinoModel,
    load_model,
    open_export,
    save_checkpoint,
)
from birdcall.models.export import (
    LowPrecisionError,
    allow_bfloat16,
    mark_bfloat16,
    quantize_onnx,
)
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
    windows = WindowConfig(2) if change == "window_config" else WindowConfig()
    (member,) = load_ensemble([exported], window_config=windows).members
    assert member.export is None
    assert "torch runs in its place" in caplog.text


@pytest.fixture
def pair(package, tmp_path):
    """Two members with an export each, and what torch alone predicts of a sound."""
    folders = [tmp_path / folder.name for folder in (package / "members").iterdir()]
    for folder in folders:
        shutil.copytree(package / "members" / folder.name, folder)
    members = [load_member(folder, with_export=False) for folder in folders]
    return folders, predict_waveforms(Ensemble(members), {RATE: noise(12)})


def require_torch_alone(ensemble, expected, caplog):
    """One warning for both members, and what torch predicts, to the bit."""
    predictions = predict_waveforms(ensemble, {RATE: noise(12)})
    for name in ("clipwise", "framewise", "frames"):
        assert np.array_equal(getattr(predictions, name), getattr(expected, name))
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "torch runs in its place" in record.message
    return record.message


def test_a_runtime_that_is_missing_is_named_once_and_torch_takes_over(pair, monkeypatch, caplog):
    folders, expected = pair
    monkeypatch.setattr(windows_module, "find_onnx_fault", lambda: "onnxruntime is not installed")
    message = require_torch_alone(load_ensemble(folders), expected, caplog)
    assert "onnxruntime is not installed" in message
    assert str(folders[0] / ONNX_FILE) in message


def test_a_runtime_older_than_the_opset_is_named_once_and_torch_takes_over(pair, caplog):
    onnx = pytest.importorskip("onnx")
    folders, expected = pair
    for folder in folders:
        network = onnx.load(folder / ONNX_FILE)
        network.opset_import[0].version = 99
        onnx.save(network, folder / ONNX_FILE)
    assert "99" in require_torch_alone(load_ensemble(folders), expected, caplog)


def test_a_runtime_that_fails_at_work_is_named_once_and_torch_takes_over(pair, monkeypatch, caplog):
    def fail(self, inputs, outputs):
        raise RuntimeError("illegal instruction")

    folders, expected = pair
    monkeypatch.setattr(OnnxModel, "__call__", fail)
    assert "illegal instruction" in require_torch_alone(load_ensemble(folders), expected, caplog)


def test_the_log_names_the_runtime_once(pair, caplog):
    folders, _ = pair
    caplog.set_level(logging.INFO)
    load_ensemble(folders)
    (record,) = caplog.records
    assert version("onnxruntime") in record.message


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


# --- int8 -----------------------------------------------------------------------------------------

THRESHOLDS = np.array([0.3, 0.5, 0.7])


def log_mels_of(path, n_windows):
    """Random log-mels in decibels, loud and quiet, even and uneven."""
    generator = np.random.default_rng(n_windows)
    levels = generator.uniform(-60, -10, (n_windows, 1, 1, 1))
    scales = generator.uniform(2, 22, (n_windows, 1, 1, 1))
    frontend = load_model(path.parent)[0].frontend
    shape = frontend(torch.zeros(1, 5 * RATE)).shape
    return (levels + scales * generator.standard_normal((n_windows, *shape[1:]))).astype("f4")


def lowest(path, log_mels):
    """The lower of clipwise and framewise probability, (windows, classes): labels exceed it."""
    outputs = [OnnxModel(path)(window[None], ["clipwise", "framewise"]) for window in log_mels]
    return np.stack([np.minimum(clip[0, 0], frame[0, 0]) for clip, frame in outputs])


def test_int8_predicts_the_same_labels_from_a_smaller_file(exported, caplog):
    path = exported / ONNX_FILE
    size, log_mels = path.stat().st_size, log_mels_of(path, 200)
    expected = lowest(path, log_mels)
    is_clear = (np.abs(expected[..., None] - THRESHOLDS) > 0.02).all(axis=(1, 2))
    assert is_clear.sum() > 50
    parity = quantize_onnx(path, log_mels[~is_clear], log_mels[is_clear])
    actual = lowest(path, log_mels[is_clear])
    assert 1e-6 < np.abs(actual - expected[is_clear]).max() < 0.1
    for threshold in THRESHOLDS:
        is_equal = ((actual >= threshold) == (expected[is_clear] >= threshold)).all(axis=1)
        assert is_equal.mean() >= parity.rows_equal >= 0.99
    assert path.stat().st_size < size
    caplog.set_level(logging.INFO)
    ensemble = load_ensemble([exported])
    assert ensemble.members[0].export.precision == "int8"
    assert "in int8" in caplog.text
    one = predict_waveforms(ensemble, {RATE: noise(42)})
    other = dict(
        predict_audio(ensemble, {"a": lambda _: {RATE: noise(7)}, "b": lambda _: {RATE: noise(42)}})
    )
    assert np.array_equal(one.clipwise, other["b"].clipwise)


def test_int8_that_predicts_other_labels_is_refused_and_the_export_stays(exported):
    """The held-out rows are those whose probabilities are nearest to a threshold."""
    path = exported / ONNX_FILE
    before, log_mels = path.read_bytes(), log_mels_of(path, 600)
    distances = np.abs(lowest(path, log_mels)[..., None] - THRESHOLDS).min(axis=(1, 2))
    held_out = log_mels[np.argsort(distances)[:60]]
    with pytest.raises(LowPrecisionError, match=r"% of 60 rows"):
        quantize_onnx(path, log_mels_of(path, 50), held_out)
    assert path.read_bytes() == before
    assert load_member(exported).export.identity == "onnx"


def test_a_calibration_set_that_is_too_small_is_refused(exported, tmp_path):
    path = exported / ONNX_FILE
    before = path.read_bytes()
    for number in range(6):  # of 40 s: three recordings and 24 windows in each half
        soundfile.write(tmp_path / f"{number}.wav", noise(40, number), RATE)
    recordings = sorted(tmp_path.glob("*.wav"))
    frontend = load_model(exported)[1].experiment.frontend
    halves = sample_log_mels(recordings, frontend, WindowConfig())
    assert [len(half) for half in halves] == [24, 24]
    with pytest.raises(LowPrecisionError, match="24 and 24"):
        quantize_onnx(path, *halves)
    assert path.read_bytes() == before


def test_labels_are_not_compared_where_no_species_is_predicted(exported):
    onnx = pytest.importorskip("onnx")
    path = exported / ONNX_FILE
    network = onnx.load(path)
    (bias,) = (t for t in network.graph.initializer if t.name.endswith("detection.bias"))
    values = onnx.numpy_helper.to_array(bias) - np.float32(9)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(network, path)
    log_mels = log_mels_of(path, 60)
    with pytest.raises(LowPrecisionError, match="0 of 60 rows"):
        quantize_onnx(path, log_mels, log_mels)


def test_both_halves_of_a_sample_are_of_other_recordings(tmp_path):
    for number in range(2):  # a constant level tells the recordings apart
        soundfile.write(tmp_path / f"{number}.wav", noise(20, number) * 10.0**-number, RATE)
    config = find_experiment("small_gru").frontend
    recordings = sorted(tmp_path.glob("*.wav"))
    levels = [half.mean() for half in sample_log_mels(recordings, config, WindowConfig())]
    assert abs(levels[0] - levels[1]) == pytest.approx(20, abs=0.5)  # decibels
    again = [half.mean() for half in sample_log_mels(recordings, config, WindowConfig())]
    assert again == levels


# --- bfloat16 -------------------------------------------------------------------------------------


@pytest.fixture
def openvino(monkeypatch):
    """OpenVINO, also on a processor without bfloat16: there it computes in float32."""
    pytest.importorskip("openvino")
    monkeypatch.setattr(checkpoint_module, "find_bfloat16_fault", lambda: "")
    monkeypatch.setattr(export_module, "_compare_speed", lambda *_: 2.0)


@pytest.fixture
def marked(exported, openvino):
    mark_bfloat16(exported / ONNX_FILE, "for a test")
    return exported


def clear_rows(path, n_windows=200):
    """Random log-mels whose probabilities are not near a threshold of the comparison."""
    log_mels = log_mels_of(path, n_windows)
    is_clear = (np.abs(lowest(path, log_mels)[..., None] - THRESHOLDS) > 0.02).all(axis=(1, 2))
    return log_mels[is_clear]


def test_openvino_predicts_the_labels_of_float32(exported, openvino, caplog):
    path = exported / ONNX_FILE
    log_mels = clear_rows(path)
    parity = allow_bfloat16(path, log_mels, log_mels)
    assert parity.rows_equal >= 0.99 and parity.row_wise_f1 >= 0.99
    caplog.set_level(logging.INFO)
    ensemble = load_ensemble([exported])
    assert isinstance(ensemble.members[0].export, OpenVinoModel)
    assert "OpenVINO" in caplog.text and "bfloat16" in caplog.text
    batch = log_mels[:3]
    outputs = list(SegmentOutput._fields)
    expected = OnnxModel(path)(batch, outputs)
    for name, one, other in zip(
        outputs, ensemble.members[0].export(batch, outputs), expected, strict=True
    ):
        assert one.dtype == np.float32
        np.testing.assert_allclose(
            one, other, atol=0.05 * max(1, np.abs(other).max()), err_msg=name
        )


def test_bfloat16_predicts_the_same_to_the_bit_in_any_company(marked, caplog):
    ensemble = load_ensemble([marked])
    one = predict_waveforms(ensemble, {RATE: noise(42)})
    sources = {"a": lambda _: {RATE: noise(7)}, "b": lambda _: {RATE: noise(42)}}
    torch.set_num_threads(3)
    other = dict(predict_audio(load_ensemble([marked]), sources))
    assert np.array_equal(one.clipwise, other["b"].clipwise)
    assert not ensemble.fallen_back and not caplog.records  # it was OpenVINO


def test_openvino_runs_on_the_thread_that_calls_it(marked):
    """The cost of a member is the time of that thread."""
    network = open_export(marked / ONNX_FILE)
    batch = log_mels_of(marked / ONNX_FILE, 4)
    network(batch, ["clipwise"])  # compiles
    start, thread_start = time.process_time(), time.thread_time()
    for _ in range(20):
        network(batch, ["clipwise"])
    assert time.thread_time() - thread_start > 0.5 * (time.process_time() - start)


def test_a_batch_of_any_size_has_the_outputs_of_its_windows(marked):
    network, batch = open_export(marked / ONNX_FILE), log_mels_of(marked / ONNX_FILE, 7)
    (alone,) = network(batch[:1], ["clipwise"])
    for size in (2, 4, 7):
        (clipwise,) = network(batch[:size], ["clipwise"])
        assert clipwise.shape == (size, *alone.shape[1:])
        np.testing.assert_allclose(clipwise[:1], alone, atol=0.02)
        assert not np.allclose(clipwise[1], clipwise[0], atol=1e-3)


def test_a_slower_bfloat16_is_refused(exported, openvino, monkeypatch):
    monkeypatch.setattr(export_module, "_compare_speed", lambda *_: 0.9)
    path = exported / ONNX_FILE
    before, log_mels = path.read_bytes(), clear_rows(path)
    with pytest.raises(LowPrecisionError, match=r"0\.90 x"):
        allow_bfloat16(path, log_mels, log_mels)
    assert path.read_bytes() == before


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_export_writes_what_is_asked_for(run, openvino, tmp_path, capsys, monkeypatch, precision):
    """The recordings are replaced, and every comparison of labels passes."""
    monkeypatch.setattr("birdcall.storage.files.find_files", lambda folder: [folder / "a.wav"])
    monkeypatch.setattr("birdcall.storage.files.readable_sound", lambda files, _: files)
    log_mels = log_mels_of(run / ONNX_FILE, 60)
    monkeypatch.setattr(
        "birdcall.inference.engine.sample_log_mels", lambda *_: [log_mels, log_mels]
    )
    monkeypatch.setattr(export_module, "_MIN_PARITY", 0.0)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), f"--{precision}", str(tmp_path)])
    assert ended.value.code == 0
    assert f"in {precision} 2.00 x" in capsys.readouterr().out
    assert OnnxModel(run / ONNX_FILE).low_precision == precision


def test_bfloat16_that_predicts_other_labels_is_refused(exported, openvino, monkeypatch):
    """Another network's probabilities in place of those in bfloat16."""
    path = exported / ONNX_FILE
    before, log_mels = path.read_bytes(), clear_rows(path)
    run = OpenVinoModel.__call__
    monkeypatch.setattr(
        OpenVinoModel, "__call__", lambda self, inputs, names: run(self, inputs[::-1] + 20, names)
    )
    with pytest.raises(LowPrecisionError, match="bfloat16"):
        allow_bfloat16(path, log_mels, log_mels)
    assert path.read_bytes() == before
    assert open_export(path).runtime == "ONNX Runtime"


@pytest.mark.parametrize("fault", ["openvino is not installed", "no instructions for bfloat16"])
def test_onnx_runtime_takes_over_where_bfloat16_cannot_run(marked, fault, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_module, "find_bfloat16_fault", lambda: fault)
    (member,) = load_ensemble([marked]).members
    assert member.runtime_identity == "onnx"
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert fault in record.message and str(marked / ONNX_FILE) in record.message
    log_mels = log_mels_of(marked / ONNX_FILE, 60)
    with pytest.raises(ValueError, match=fault):
        allow_bfloat16(marked / ONNX_FILE, log_mels, log_mels)


def test_onnx_runtime_takes_over_where_openvino_fails_at_work(marked, monkeypatch, caplog):
    def fail(self, inputs, outputs):
        raise RuntimeError("illegal instruction")

    expected = predict_waveforms(
        Ensemble([replace(load_member(marked), export=OnnxModel(marked / ONNX_FILE))]),
        {RATE: noise(12)},
    )
    monkeypatch.setattr(OpenVinoModel, "__call__", fail)
    predictions = predict_waveforms(load_ensemble([marked]), {RATE: noise(12)})
    assert np.array_equal(predictions.clipwise, expected.clipwise)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "illegal instruction" in record.message and "ONNX Runtime" in record.message


def test_bfloat16_does_not_run_a_network_in_int8(exported, openvino):
    """OpenVINO computes such a network differently."""
    onnx, path = pytest.importorskip("onnx"), exported / ONNX_FILE
    network = onnx.load(path)
    network.metadata_props.add(key="int8", value="as if it were")
    onnx.save(network, path)
    with pytest.raises(ValueError, match="int8"):
        mark_bfloat16(path, "for a test")
    network.metadata_props.add(key="bfloat16", value="before it was in int8")
    onnx.save(network, path)
    export = open_export(path)
    assert (export.runtime, export.precision) == ("ONNX Runtime", "int8")
    with pytest.raises(ValueError, match="int8"):
        OpenVinoModel(path, slower=export)


def test_predictions_of_two_runtimes_are_not_stored(marked, tmp_path, monkeypatch):
    cache = PredictionCache(tmp_path / "cache", "sound", "made of noise")
    sources = {"a": lambda _: {RATE: noise(12)}}
    whole = load_ensemble([marked])
    cache.predict(whole, sources)
    cache.predict_frames(whole, sources)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    shutil.rmtree(tmp_path / "cache")

    def fail(self, inputs, outputs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(OpenVinoModel, "__call__", fail)
    ensemble = load_ensemble([marked])
    assert cache.predict(ensemble, sources)["a"].n_segments == 3
    assert cache.predict_frames(ensemble, sources)["a"].shape[1] == 3 * FRAMES_PER_SEGMENT
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_one_file_is_for_one_low_precision(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), "--int8", str(tmp_path), "--bfloat16", str(tmp_path)])
    assert ended.value.code != 0
    assert "no more than one of" in capsys.readouterr().err
    assert not (run / ONNX_FILE).exists()
