"""The kernel on data and packages with faults, once as the real script in a fresh process.

Each fault ends in a valid submission, or in a non-zero exit code with a line that says why; where a
file can be written at all, a valid all-nocall one lies there even then.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import soundfile
import torch
from helpers import (
    RATE,
    SCRIPT,
    read_labels,
    read_summary,
    rows_of,
    run_script_here,
    write_noise_file,
    write_rows,
)
from shortened import shorten_packaging

from birdcall.config import FULL
from birdcall.evaluation.ensemble_decision import decide_for_full_runs
from birdcall.inference.decision import Decision, write_decision
from birdcall.inference.ensemble import load_member
from birdcall.inference.windows import ONNX_FILE
from birdcall.kaggle import submission
from birdcall.kaggle.dry_run import dry_run_submission, run_as_kaggle
from birdcall.kaggle.manifest import MANIFEST_FILE, find_changes, make_manifest
from birdcall.kaggle.packaging import StagingOptions, stage_package
from birdcall.kaggle.submission import DECISION_FILE, open_package, run_kernel
from birdcall.models.checkpoint import (
    SETTINGS_FILE,
    OnnxModel,
    find_onnx_fault,
    is_onnx_installed,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from birdcall.models.sed import SEDModel
from birdcall.training.runs import plan_runs, train_many
from birdcall.training.trainer import RunOptions

needs_onnx = pytest.mark.skipif(
    not is_onnx_installed(), reason="members are exported with onnx, onnxscript and onnxruntime"
)


@pytest.fixture(scope="module")
def built(package, tmp_path_factory):
    """The package with a decision that names two species in each row; its members in no order."""
    build = tmp_path_factory.mktemp("build") / "build"
    shutil.copytree(package.parent, build)
    checkpoints = [read_checkpoint(folder) for folder in member_folders(build)[::-1]]
    members = tuple(checkpoint.name for checkpoint in checkpoints)
    decision = Decision(
        0.0, 0.0, max_birds=2, file_threshold=0.0, classes=checkpoints[0].classes, members=members
    )
    write_decision(build / "dataset" / DECISION_FILE, decision)
    sign(build)
    return build


@pytest.fixture
def build(built, tmp_path):
    """A copy of the package that a test may damage."""
    shutil.copytree(built, tmp_path / "build")
    return tmp_path / "build"


@pytest.fixture
def data(tmp_path):
    """Two recordings of ten seconds, and one of site 3."""
    folder = tmp_path / "data"
    folder.mkdir()
    names = ("aa", "bb", "cc")
    for name in names:
        write_noise_file(folder / "test_audio" / f"{name}.wav")
    rows = [*rows_of("aa"), *rows_of("bb"), ("site_3", "site_3_cc", None, "cc")]
    write_rows(folder, rows)
    return folder


def run(build, data, working, budget_seconds=None):
    """Do what the script does, in this process."""
    return run_kernel(build / "dataset", data, working / "submission.csv", budget_seconds)


def fails(build, data, working, message):
    """Run the kernel here, which must end with an error of this message."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(build, data, working)
    assert message in str(caught.value)


@contextmanager
def script_here(max_bytes=None):
    """Let `run_as_kaggle` run the script in this process: a fresh one takes seconds to start.

    ``max_bytes`` of each file that the script writes: as on a full disk.
    """
    with pytest.MonkeyPatch.context() as patch:
        run_script = partial(run_script_here, max_bytes=max_bytes)
        patch.setattr("birdcall.kaggle.dry_run.subprocess.run", run_script)
        yield


def exits(build, data, working, message, **options):
    """Run the script, which must exit with an error whose last line has this message."""
    with pytest.raises(ValueError, match=r"kernel failed with exit code [1-9]") as caught:
        run_as_kaggle(build, data, working, **options)
    assert message in str(caught.value)


def test_a_kernel_without_faults_labels_every_row_and_logs_each_recording(built, data, tmp_path):
    log = run_as_kaggle(built, data, tmp_path / "working")
    labels = read_labels(tmp_path / "working", data)
    assert all(len(text.split()) == 2 for text in labels.values())
    summary = read_summary(tmp_path / "working")
    assert summary["failed"] == summary["late"] == []
    assert summary["left_out"] == {}
    assert summary["birds_per_row"] == {"2": 5}
    members = json.loads((built / "dataset" / DECISION_FILE).read_text())["members"]
    assert list(summary["members"]) == members  # in the decision's order: the best one first
    for name in ("aa", "bb", "cc"):
        (line,) = (line for line in log.splitlines() if f" {name}: " in line)
        assert "x real time" in line
    assert "5 rows: 5 with 2 birds; 2 members; 3 recordings, 0 failed" in log


def test_members_are_not_packaged_with_a_decision_on_other_weights(trained_runs, tmp_path):
    first, other = (read_checkpoint(run) for run in trained_runs[:2])
    staging = StagingOptions(SCRIPT, tmp_path, "somebody")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "old").touch()
    for weights in ({first.name: other.weights_sha256}, {}):
        decision = Decision(members=(first.name,), weights=weights)
        with pytest.raises(ValueError, match=rf"other weights of {first.name}"):
            stage_package(trained_runs[:1], decision, staging)
    with pytest.raises(ValueError, match="no members"):
        stage_package([], Decision(), staging)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["old"]


# --- the data ------------------------------------------------------------------------------------

FAULTY = {
    "missing": "no recording of this audio_id",
    "empty": "cannot be decoded",
    "html": "cannot be decoded",
    "outside": "leads out of",
    "integers": "of its samples",
}
READABLE = ("truncated", "tenth", "stereo", "good", "damaged", "bursts", "piped")


def test_full_runs_are_packaged_with_the_decision_that_was_chosen_on_folds(
    trained_runs, training_data, tiny_experiment, tmp_path, monkeypatch, blank_previews
):
    runs = tmp_path / "runs"
    shutil.copytree(trained_runs[0].parents[1], runs)
    train_many(
        plan_runs([tiny_experiment], training_data, FULL, runs),
        training_data,
        RunOptions(workers=0),
    )
    checkpoints = [read_checkpoint(runs / "tiny" / name) for name in ("fold0", "fold1", FULL)]
    weights = {item.name: item.weights_sha256 for item in checkpoints[:2]}
    chosen = Decision(0.3, 0.3, members=tuple(weights), weights=weights, chosen_on="simulated rows")
    decision = decide_for_full_runs(chosen, runs)
    assert decision.weights == {"tiny-full": checkpoints[2].weights_sha256}
    assert "tiny-fold0, tiny-fold1" in decision.chosen_on
    assert decision.clip_threshold == chosen.clip_threshold
    shorten_packaging(monkeypatch)
    options = StagingOptions(SCRIPT, tmp_path / "build", "somebody")
    dataset = stage_package([runs / "tiny" / FULL], decision, options)
    opened = open_package(dataset, "cpu", all_members=True)
    assert [member.name for member in opened.ensemble.members] == ["tiny-full"]
    assert opened.decision.chosen_on == decision.chosen_on
    with pytest.raises(ValueError, match="other weights of tiny-fold0"):
        decide_for_full_runs(replace(chosen, weights={}), runs)
    settings = runs / "tiny" / FULL / SETTINGS_FILE
    changed = json.loads(settings.read_text())
    changed["experiment"]["train"]["epochs"] = 3
    settings.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"tiny.full: .*epochs was 2, is 3"):
        decide_for_full_runs(chosen, runs)


@needs_onnx
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_an_export_for_low_precision_is_packaged(trained_runs, package, tmp_path, precision):
    onnx = pytest.importorskip("onnx")
    run = tmp_path / "run"
    shutil.copytree(trained_runs[0], run)
    checkpoint = read_checkpoint(run)
    network = onnx.load(package / "members" / checkpoint.name / ONNX_FILE)
    network.metadata_props.add(key=precision, value="as if it were")
    onnx.save(network, run / ONNX_FILE)
    decision = Decision(
        members=(checkpoint.name,), weights={checkpoint.name: checkpoint.weights_sha256}
    )
    dataset = stage_package([run], decision, StagingOptions(SCRIPT, tmp_path / "build", "somebody"))
    packaged = dataset / "members" / checkpoint.name / ONNX_FILE
    assert packaged.read_bytes() == (run / ONNX_FILE).read_bytes()
    (member,) = open_package(dataset, "cpu", all_members=True).ensemble.members
    assert member.export.low_precision == precision
    assert member.export.identity.startswith("onnx int8 ") == (precision == "int8")


@pytest.fixture(scope="module")
def faulty(built, tmp_path_factory):
    """One run over recordings with each of the faults, and a good one among them."""
    folder = tmp_path_factory.mktemp("faulty")
    data, working = folder / "data", folder / "working"
    audio = data / "test_audio"
    audio.mkdir(parents=True)
    (audio / "empty.mp3").touch()
    (audio / "html.mp3").write_text("<html>no such page</html>")
    write_noise_file(audio / "tenth.wav", 0.1)
    write_noise_file(audio / "stereo.wav", 10, 192_000, 2)
    write_noise_file(audio / "good.wav")
    write_noise_file(audio / "whole.mp3", 30)
    content = (audio / "whole.mp3").read_bytes()
    (audio / "truncated.mp3").write_bytes(content[: len(content) // 3])
    three_quarters = 3 * len(content) // 4
    random = np.random.default_rng(0).bytes(4_000)
    damaged = content[:three_quarters] + random + content[three_quarters + len(random) :]
    (audio / "damaged.mp3").write_bytes(damaged)
    waveform = np.random.default_rng(0).normal(0, 0.1, 10 * RATE)
    soundfile.write(audio / "integers.wav", 32768 * waveform, RATE, subtype="FLOAT")
    soundfile.write(audio / "piped.flac", waveform, RATE)
    piped = bytearray((audio / "piped.flac").read_bytes())
    piped[21:26] = bytes([piped[21] & 0xF0, 0, 0, 0, 0])  # the header states no length
    (audio / "piped.flac").write_bytes(piped)
    waveform[5 * RATE : 5 * RATE + 3] = (3e29, -2e30, 1e25)
    soundfile.write(audio / "bursts.wav", waveform, RATE, subtype="FLOAT")
    write_noise_file(folder / "secret.wav")
    (audio / "outside.wav").symlink_to(folder / "secret.wav")
    write_rows(data, [row for name in (*FAULTY, *READABLE) for row in rows_of(name, 30)])
    with script_here():
        log = run_as_kaggle(built, data, working)
    return read_labels(working, data), read_summary(working), log


@pytest.mark.parametrize("name", FAULTY)
def test_a_recording_that_cannot_be_decoded_is_nocall_and_is_named(faulty, name):
    labels, summary, log = faulty
    assert {labels[row[1]] for row in rows_of(name, 30)} == {"nocall"}
    assert name in summary["failed"]
    (line,) = (line for line in log.splitlines() if FAULTY[name] in line and name in line)
    assert "its rows are nocall" in line


@pytest.mark.parametrize(
    "name, n_rows",
    [
        *(("truncated", 2), ("tenth", 1), ("stereo", 2), ("good", 2)),
        *(("damaged", 6), ("bursts", 2), ("piped", 2)),
    ],
)
def test_what_there_is_of_a_recording_is_labelled(faulty, name, n_rows):
    labels, summary, log = faulty
    texts = [labels[row[1]] for row in rows_of(name, 30)]
    assert all(len(text.split()) == 2 for text in texts[:n_rows])
    assert set(texts[n_rows:]) <= {"nocall"}
    assert name not in summary["failed"]
    warnings = [line for line in log.splitlines() if f"{name}." in line]
    assert len(warnings) == (name in ("truncated", "damaged", "bursts"))
    told = f"{name}: {6 - n_rows} rows lie beyond"
    beyond = [line for line in log.splitlines() if line.startswith(told)]
    assert len(beyond) == (n_rows < 6)
    assert not summary["left_out"]  # no member is blamed
    assert "mpg123" not in log


def test_without_test_audio_the_examples_are_predicted(built, data, demo_folder, tmp_path, caplog):
    """As when the kernel is saved on Kaggle, before it is scored."""
    caplog.set_level(logging.INFO)
    shutil.rmtree(data / "test_audio")
    for name in ("example_test_audio", "example_test_audio_summary.csv"):
        (data / name).symlink_to(demo_folder / name)
    run(built, data, tmp_path / "working")
    assert set(read_labels(tmp_path / "working", data).values()) == {"nocall"}
    examples = pd.read_csv(tmp_path / "working" / "example_submission.csv")
    truth = pd.read_csv(demo_folder / "example_test_audio_summary.csv")
    assert list(examples["row_id"]) == list(truth["filename_seconds"])
    assert (examples["birds"] != "nocall").all()
    assert "test_audio is not there" in caplog.text
    assert len(read_summary(tmp_path / "working")["members"]) == 2


def test_without_any_audio_it_fails(built, data, tmp_path):
    shutil.rmtree(data / "test_audio")
    fails(built, data, tmp_path / "working", "nothing to run the models on")
    assert set(read_labels(tmp_path / "working", data).values()) == {"nocall"}


def test_recordings_that_all_fail_are_no_success(built, data, tmp_path):
    for path in (data / "test_audio").iterdir():
        path.write_text("<html>")
    fails(
        built, data, tmp_path / "working", "no member has predicted anything (3 recordings failed"
    )
    assert set(read_labels(tmp_path / "working", data).values()) == {"nocall"}


def test_three_rows_with_columns_that_nobody_knows(built, data, tmp_path):
    table = pd.read_csv(data / "test.csv", dtype=str)[:3]
    table.insert(0, "filename_seconds", "x")
    table["new"] = "<b>"
    table.to_csv(data / "test.csv", index=False)
    run(built, data, tmp_path / "working")
    assert "nocall" not in read_labels(tmp_path / "working", data).values()


def test_site_3_alone(built, data, tmp_path):
    write_rows(data, [("site_3", "site_3_cc", None, "cc"), ("site_3", "site_3_aa", None, "aa")])
    run(built, data, tmp_path / "working")
    labels = read_labels(tmp_path / "working", data)
    assert "nocall" not in labels.values()


# --- the package ---------------------------------------------------------------------------------


def member_folders(build):
    return sorted((build / "dataset" / "members").iterdir())


def sign(build):
    """Make the manifest anew, as if the package had been staged so."""
    dataset = build / "dataset"
    (dataset / MANIFEST_FILE).write_text(json.dumps(make_manifest(dataset)))


@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_a_member_that_is_not_as_packaged_is_left_out(build, data, tmp_path, fault, caplog):
    caplog.set_level(logging.INFO)
    folder = member_folders(build)[0]
    weights = folder / "model.safetensors"
    if fault == "missing":
        weights.unlink()
    else:
        content = bytearray(weights.read_bytes())
        content[-9] ^= 255
        weights.write_bytes(content)
    run(build, data, tmp_path / "working")
    labels = read_labels(tmp_path / "working", data)
    assert all(len(text.split()) == 2 for text in labels.values())
    summary = read_summary(tmp_path / "working")
    assert list(summary["left_out"]) == [folder.name]
    assert list(summary["members"]) == [member_folders(build)[1].name]
    assert f"{folder.name}: left out" in caplog.text
    reason = "missing from the package" if fault == "missing" else "its sha256 is not"
    assert reason in summary["left_out"][folder.name]


def require_all_members(build, data, working):
    """Every row must be labelled, by both members."""
    assert all(len(text.split()) == 2 for text in read_labels(working, data).values())
    summary = read_summary(working)
    assert summary["left_out"] == {}
    assert sorted(summary["members"]) == [folder.name for folder in member_folders(build)]


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@needs_onnx
@pytest.mark.parametrize("fault", ["as packaged", "changed", "missing"])
def test_an_export_that_cannot_be_used_costs_no_member(build, data, tmp_path, fault, caplog):
    export = member_folders(build)[0] / "model.onnx"
    export.write_bytes(b"<html>")
    if fault == "as packaged":
        sign(build)
    elif fault == "missing":
        export.unlink()
    run(build, data, tmp_path / "working")
    require_all_members(build, data, tmp_path / "working")
    (warning,) = warnings_of(caplog)
    assert str(export) in warning


@needs_onnx
def test_a_runtime_that_cannot_be_imported_costs_no_member(
    built, data, tmp_path, caplog, monkeypatch
):
    (tmp_path / "fake" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "fake" / "onnxruntime" / "__init__.py").write_text("raise ImportError('libfoo.so')")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    find_onnx_fault.cache_clear()
    run(built, data, tmp_path / "working")
    find_onnx_fault.cache_clear()
    require_all_members(built, data, tmp_path / "working")
    (warning,) = warnings_of(caplog)
    assert "libfoo.so" in warning


@needs_onnx
def test_a_runtime_that_fails_at_work_costs_no_member(built, data, tmp_path, caplog, monkeypatch):
    def fail(self, inputs, outputs):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(OnnxModel, "__call__", fail)
    run(built, data, tmp_path / "working")
    require_all_members(built, data, tmp_path / "working")
    (warning,) = warnings_of(caplog)  # the same fault of both members
    assert warning.startswith(next(iter(read_summary(tmp_path / "working")["members"])))
    assert "illegal instruction" in warning


@pytest.mark.parametrize("fault", ["memory", "classes", "device"])
def test_whatever_a_member_raises_the_others_run(build, data, tmp_path, fault, monkeypatch):
    folder, other = member_folders(build)
    if fault == "classes":
        model, checkpoint = load_model(folder)
        save_checkpoint(folder, model, replace(checkpoint, classes=checkpoint.classes[::-1]))
        sign(build)
    elif fault == "memory":
        real = load_member

        def load(path, *rest, **named):
            if path == folder:
                raise MemoryError
            return real(path, *rest, **named)

        monkeypatch.setattr(submission, "load_member", load)
    else:
        real_to = SEDModel.to

        def to(model, device):
            if torch.equal(model.head.detection.bias, load_model(folder)[0].head.detection.bias):
                raise RuntimeError("out of memory")
            return real_to(model, device)

        monkeypatch.setattr(SEDModel, "to", to)
    run(build, data, tmp_path / "working")
    assert "nocall" not in read_labels(tmp_path / "working", data).values()
    summary = read_summary(tmp_path / "working")
    assert (list(summary["left_out"]), list(summary["members"])) == ([folder.name], [other.name])


def test_a_dry_run_with_a_member_left_out_is_a_failure(build, data, tmp_path):
    (member_folders(build)[0] / "model.safetensors").unlink()
    left_out = pytest.raises(ValueError, match=r"left out .*missing from the package")
    with script_here(), left_out:
        dry_run_submission(build, data, tmp_path / "submission.csv")
    assert not (tmp_path / "submission.csv").exists()


def test_without_any_member_it_fails(build, data, tmp_path):
    for folder in member_folders(build):
        (folder / "model.safetensors").write_bytes(b"")
    fails(build, data, tmp_path / "working", "no member can be used")
    assert set(read_labels(tmp_path / "working", data).values()) == {"nocall"}


def test_a_member_that_returns_nan_is_left_out(build, data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = member_folders(build)[1]
    model, checkpoint = load_model(folder)
    with torch.no_grad():
        model.head.detection.bias.fill_(float("nan"))
    save_checkpoint(folder, model, checkpoint)
    (folder / "model.onnx").unlink(missing_ok=True)
    sign(build)
    run(build, data, tmp_path / "working")
    assert all(len(t.split()) == 2 for t in read_labels(tmp_path / "working", data).values())
    summary = read_summary(tmp_path / "working")
    assert "holds NaN" in summary["left_out"][folder.name]
    assert list(summary["members"]) == [member_folders(build)[0].name]
    assert "holds NaN" in caplog.text


class _Bomb:
    def __reduce__(self):
        return os.mkdir, (self.target,)

    def __init__(self, target):
        self.target = target


def test_a_pickle_in_place_of_weights_is_not_unpickled(build, data, tmp_path):
    """Its manifest and its settings are right: whoever made it could write those too."""
    exploded = tmp_path / "exploded"
    folder = member_folders(build)[0]
    payload = pickle.dumps(_Bomb(str(exploded)))
    weights = folder / "model.safetensors"
    weights.write_bytes(payload)
    settings = json.loads((folder / "model.json").read_text())
    settings["weights_sha256"] = hashlib.sha256(payload).hexdigest()
    (folder / "model.json").write_text(json.dumps(settings))
    sign(build)
    run(build, data, tmp_path / "working")
    assert not exploded.exists()
    assert list(read_summary(tmp_path / "working")["left_out"]) == [folder.name]
    pickle.loads(payload)  # it would have
    assert exploded.exists()


def test_code_that_is_not_as_packaged_is_not_run_on_any_member(build, data, tmp_path):
    module = build / "dataset" / "birdcall" / "taxonomy.py"
    module.write_text(module.read_text() + "\n")
    fails(build, data, tmp_path / "working", "taxonomy.py: its sha256 is not the manifest's")
    assert set(read_labels(tmp_path / "working", data).values()) == {"nocall"}


def test_a_manifest_cannot_name_files_elsewhere(build):
    dataset = build / "dataset"
    manifest = make_manifest(dataset)
    manifest["files"]["../../etc/passwd"] = "0"
    (dataset / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="give a relative path"):
        find_changes(dataset)


def test_a_decision_of_other_classes_fails(build, data, tmp_path):
    write_decision(build / "dataset" / DECISION_FILE, Decision(classes=("aldfly", "ameavo")))
    sign(build)
    fails(build, data, tmp_path / "working", "checkpoint of other classes")
    assert set(read_labels(tmp_path / "working", data).values()) == {"nocall"}


# --- time and disk -------------------------------------------------------------------------------


def test_a_budget_of_zero_fails_and_leaves_nocall(built, data, tmp_path):
    message = "no member has predicted anything"
    with script_here():
        exits(built, data, tmp_path / "working", message, time_limit_seconds=0)
    assert set(read_labels(tmp_path / "working", data).values()) == {"nocall"}
    assert read_summary(tmp_path / "working")["late"] == ["aa", "bb", "cc"]


def test_a_disk_that_is_full_when_all_is_labelled_leaves_nocall(built, data, tmp_path):
    write_rows(data, [row for name in ("aa", "bb") for row in rows_of(name, 300)])
    run(built, data, tmp_path / "first")  # the recordings last ten seconds
    for name in ("aa", "bb"):
        write_noise_file(data / "test_audio" / f"{name}.wav", 300)
    size = (tmp_path / "first" / "submission.csv").stat().st_size
    with script_here(max_bytes=size):
        exits(built, data, tmp_path / "working", "File too large")
    assert set(read_labels(tmp_path / "working", data).values()) == {"nocall"}
    assert [path.name for path in (tmp_path / "working").iterdir()] == ["submission.csv"]


def test_a_disk_that_is_full_from_the_beginning_fails(built, data, tmp_path):
    write_rows(data, [row for name in ("aa", "bb") for row in rows_of(name, 300)])
    with script_here(max_bytes=512):
        exits(built, data, tmp_path / "working", "File too large")
    assert list((tmp_path / "working").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that even root cannot write")
def test_a_working_folder_that_cannot_be_written_fails(built, data):
    with script_here():
        exits(built, data, Path("/proc"), "submission")


@needs_onnx
def test_members_are_safetensors_and_onnx_alone(built):
    """What is uploaded holds nothing that would have to be unpickled."""
    suffixes = {path.suffix for path in (built / "dataset" / "members").rglob("*.*")}
    assert suffixes == {".json", ".safetensors", ".onnx"}
    for path in (built / "dataset").rglob("*.safetensors"):
        assert safetensors.torch.load_file(path)
