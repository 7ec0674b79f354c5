"""Staging a training for Kaggle, and its dry run in two sessions."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
from helpers import write_noise_file

from birdcall.config import replace_nested
from birdcall.data.noise import find_noise, split_noise
from birdcall.experiments import EXPERIMENTS, find_experiment
from birdcall.inference.decision import Decision
from birdcall.kaggle.dry_run import dry_run_training, run_as_kaggle
from birdcall.kaggle.manifest import MANIFEST_FILE, find_changes, make_manifest
from birdcall.kaggle.packaging import (
    StagingOptions,
    TrainingFiles,
    Upload,
    stage_package,
    stage_training,
)
from birdcall.kaggle.training_kernel import TrainingSettings, read_settings
from birdcall.models.checkpoint import STATE_FILE, load_model, read_checkpoint
from birdcall.models.sed import build_model
from birdcall.storage.locks import locked
from birdcall.training.initialisation import initialise
from birdcall.training.resume import write_state

SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "training" / "training.py"
SETTINGS = TrainingSettings("small_gru", 1, workers=0)
# Two steps in all, so that one session stops half-way.
SHORTENED = """
from birdcall.config import replace_nested as _replace
_few = {"epochs": 2, "data": {"clips_per_epoch": 8, "batch_size": 8}}
EXPERIMENTS["small_gru"] = _replace(EXPERIMENTS["small_gru"], train=_few)
"""
# Stands for `birdcall train`: a state that counts sessions.
STAND_IN = """
import pathlib, sys
import safetensors.numpy
argv = sys.argv[1:]
run = pathlib.Path(argv[argv.index("--output") + 1], "runs", "small_gru", "fold1")
run.mkdir(parents=True, exist_ok=True)
state = run / "state.safetensors"
n_sessions = 1 + state.is_file()
print("session", n_sessions, "of", pathlib.Path(__file__).parent.parent.name)
def save(step):
    values = '{"progress": {"step": %d}}' % step
    state.write_bytes(safetensors.numpy.save({}, {"values": values}))
"""
CONNECTIONS = """
import os, socket
for family, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, f"{os.getpid()}")):
    server = socket.socket(family)
    server.bind(address)
    server.listen()  # the method of a socket
    socket.socket(family).connect(server.getsockname())
for refused in (
    lambda: socket.getaddrinfo("pypi.org", 443),
    lambda: socket.create_connection(("192.0.2.1", 80), 1),
    lambda: socket.socket().connect_ex(("192.0.2.1", 80)),
):
    try:
        refused()
    except OSError as error:
        print(str(error).split(":")[0])
"""


@pytest.fixture
def stage(demo_folder, tables, tmp_path):
    """Stage ``small_gru`` on the tiny demo, or what the test says."""

    def stage(settings=SETTINGS, wheels=None, owner="someone", **options) -> Path:
        files = TrainingFiles(
            **{"data": demo_folder, "folds": tables[0], "audit": tables[1]} | options
        )
        staging = StagingOptions(SCRIPT, tmp_path / "build", owner, wheels)
        return stage_training(settings, files, staging)

    return stage


def change_code(dataset: Path, module: str, code: str) -> None:
    """Replace a module of the staged package, as if it had been staged so."""
    (dataset / "birdcall" / f"{module}.py").write_text(code)
    (dataset / MANIFEST_FILE).unlink()
    (dataset / MANIFEST_FILE).write_text(json.dumps(make_manifest(dataset)))


# --- staging ------------------------------------------------------------------------------------


def test_the_kernel_sees_its_own_output_and_has_a_gpu_and_no_network(stage):
    dataset = stage()
    kernel = dataset.parent / "kernel"
    metadata = json.loads((kernel / "kernel-metadata.json").read_text())
    assert metadata["id"] == "someone/birdcall-small-gru-fold1"
    assert metadata["title"].replace(" ", "-") == "birdcall-small-gru-fold1"
    assert metadata["kernel_sources"] == [metadata["id"]]
    assert (metadata["enable_gpu"], metadata["enable_internet"]) == (True, False)
    assert metadata["docker_image_pinning_type"] == "original"
    assert metadata["competition_sources"] == ["birdsong-recognition"]
    of_dataset = json.loads((dataset / "dataset-metadata.json").read_text())
    assert metadata["dataset_sources"] == [of_dataset["id"]]
    assert of_dataset["id"] != metadata["id"]  # the old mounts tell them apart by their slugs alone
    assert (kernel / metadata["code_file"]).read_bytes() == SCRIPT.read_bytes()


def test_the_dataset_holds_all_that_training_needs(stage, tables, demo_folder):
    dataset = stage()
    assert find_changes(dataset) == {}
    assert read_settings(dataset) == SETTINGS
    assert (dataset / "folds.csv").read_bytes() == tables[0].read_bytes()
    assert (dataset / "audit.csv").read_bytes() == tables[1].read_bytes()
    assert not list(dataset.rglob("__pycache__"))
    staged = find_noise(dataset / "noise")
    original = find_noise(demo_folder / "noise")
    assert [path.read_bytes() for path in staged] == [path.read_bytes() for path in original]


def test_noise_of_a_collection_is_staged_without_birds_and_split_as_here(stage, tmp_path):
    clips = tmp_path / "noise" / "ff1010bird" / "wav"
    clips.mkdir(parents=True)
    for number in range(20):
        (clips / f"{1000 + number}.wav").write_bytes(b"audio %d" % number)
    table = pd.DataFrame({"itemid": range(1000, 1020), "hasbird": [0, 1] * 10})
    table.to_csv(tmp_path / "noise" / "ff1010bird_metadata_2018.csv", index=False)
    staged = find_noise(stage(noise=tmp_path / "noise") / "noise")
    assert [path.name for path in staged] == [f"{1000 + n}.wav" for n in range(0, 20, 2)]
    here = split_noise(find_noise(tmp_path / "noise"), 1, 5)
    for mine, theirs in zip(here, split_noise(staged, 1, 5), strict=True):
        assert [path.name for path in mine] == [path.name for path in theirs]


def test_other_birds_are_staged_for_an_experiment_that_draws_from_them(
    stage, tmp_path, monkeypatch
):
    write_noise_file(tmp_path / "birds" / "one.wav", 1.0)
    assert not (stage(other_birds=tmp_path / "birds") / "other_birds").exists()
    open_set = replace_nested(
        find_experiment("small_gru"), augment={"other_birds_probability": 0.1}
    )
    monkeypatch.setitem(EXPERIMENTS, "small_gru", open_set)
    dataset = stage(other_birds=tmp_path / "birds")
    assert (dataset / "other_birds" / "000" / "one.wav").is_file()
    with pytest.raises(ValueError, match="--other-birds"):
        stage()


def test_weights_to_start_from_come_with_the_settings_of_their_run(stage, tmp_path):
    init = tmp_path / "init" / "mine.safetensors"
    init.parent.mkdir()
    weights = initialise(find_experiment("small_gru"), 3, None).state_dict()
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, init)
    (init.parent / "model.json").write_text("{")
    with pytest.raises(ValueError, match=r"model\.json"):
        stage(init=init)
    (init.parent / "model.json").unlink()
    dataset = stage(init=init)
    assert (dataset / read_settings(dataset).init).read_bytes() == init.read_bytes()


def test_pretrained_weights_are_fetched_here_because_the_kernel_cannot(stage, monkeypatch):
    experiment = find_experiment("small_gru")
    pretrained = replace(experiment, model=replace(experiment.model, pretrained=True))
    monkeypatch.setitem(EXPERIMENTS, "small_gru", pretrained)
    torch.manual_seed(5)
    fetched = initialise(experiment, 3, None)
    monkeypatch.setattr("birdcall.kaggle.packaging.initialise", lambda *a, **k: fetched)
    dataset = stage()
    torch.manual_seed(6)
    model = initialise(pretrained, 3, dataset / read_settings(dataset).init)
    for name, value in fetched.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name


def test_birdnets_last_layer_is_fetched_with_its_convolutions(stage, training_data, monkeypatch):
    plain, classes = find_experiment("birdnet_plain"), training_data.classes
    torch.manual_seed(5)
    fetched = build_model(plain, len(classes))
    outputs = {}
    monkeypatch.setattr(
        "birdcall.kaggle.packaging.initialise", lambda *a, **k: outputs.update(k) or fetched
    )
    dataset = stage(replace(SETTINGS, experiment="birdnet_plain"))
    assert outputs == {"classes": classes, "names": training_data.scientific_names}
    torch.manual_seed(6)
    init = dataset / read_settings(dataset).init
    model = initialise(plain, len(classes), init, classes=classes)
    for name, value in fetched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_what_cannot_run_is_not_staged(stage, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="fold 7 is out of range; the folds are 0, 1"):
        stage(replace(SETTINGS, fold=7))
    with pytest.raises(ValueError, match="unknown experiment 'resnet'"):
        stage(replace(SETTINGS, experiment="resnet"))
    with pytest.raises(FileNotFoundError, match="no such file to initialise from"):
        stage(init=tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="no wheels"):
        stage(wheels=tmp_path)
    small = find_experiment("small_gru")
    odd = replace_nested(small, train={"data": {"batch_size": 15}})
    monkeypatch.setitem(EXPERIMENTS, "small_gru", odd)
    with pytest.raises(ValueError, match="batch_size of 15"):
        stage()
    taught = replace_nested(small, train={"teacher": {"weight": 1.0}})
    monkeypatch.setitem(EXPERIMENTS, "small_gru", taught)
    with pytest.raises(ValueError, match="small_gru cannot be taught in a kernel"):
        stage()
    assert not (tmp_path / "build").exists()


def test_what_kaggles_image_lacks_is_named_unless_it_comes_along(
    stage, tmp_path, monkeypatch, caplog
):
    small = find_experiment("small_gru")
    stage()
    assert "--wheels" not in caplog.text
    encoded = replace(small, augment=replace(small.augment, mp3_probability=0.1))
    monkeypatch.setitem(EXPERIMENTS, "small_gru", encoded)
    stage()
    assert "audiomentations" in caplog.text
    caplog.clear()
    (tmp_path / "audiomentations-0.43.1-py3-none-any.whl").write_bytes(b"wheel")
    dataset = stage(wheels=tmp_path)
    assert (dataset / "wheels" / "audiomentations-0.43.1-py3-none-any.whl").is_file()
    assert not caplog.text


def test_recordings_that_the_audit_does_not_know_or_has_twice_are_refused(stage, tables, tmp_path):
    audit = pd.read_csv(tables[1])
    audit.iloc[1:].to_csv(tmp_path / "audit.csv", index=False)
    with pytest.raises(ValueError, match="the audit does not know"):
        stage(audit=tmp_path / "audit.csv")
    pd.concat([audit, audit[:1]]).to_csv(tmp_path / "audit.csv", index=False)
    with pytest.raises(ValueError, match=rf"{audit['path'][0]} twice"):
        stage(audit=tmp_path / "audit.csv")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_name_and_a_batch_that_kaggle_takes(name):
    upload = Upload.of_training(TrainingSettings(name, 4), EXPERIMENTS[name], "someone")
    assert "_" not in upload.kernel + upload.dataset


@pytest.mark.parametrize("slug", ["a" * 51, "small_gru", "Birdcall", "my data", "-a", "a--b", ""])
def test_a_name_that_kaggle_would_refuse_is_refused_here(slug):
    for names in ((slug, "birdcall"), ("birdcall", slug)):
        with pytest.raises(ValueError, match="50 characters") as caught:
            Upload("someone", *names)
        assert repr(slug) in str(caught.value)


@pytest.mark.parametrize("owner", ["", "a/b", "My Name", "Jane_Doe", "..", "jané", "a\n", "-a"])
def test_an_owner_that_kaggle_would_refuse_is_refused_before_anything_is_staged(
    stage, tmp_path, owner
):
    staging = StagingOptions(SCRIPT, tmp_path / "build", owner)
    with pytest.raises(ValueError, match="--owner") as caught:
        stage_package([tmp_path / "run"], Decision(), staging)
    assert repr(owner) in str(caught.value)
    with pytest.raises(ValueError, match="--owner"):
        stage(owner=owner)
    assert not (tmp_path / "build").exists()


def test_a_script_that_is_missing_is_named_before_anything_is_staged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"kernel\.py"):
        StagingOptions(tmp_path / "kernel.py", tmp_path / "build", "someone")
    assert not (tmp_path / "build").exists()


def test_staging_again_replaces_what_was_staged_and_nothing_else(stage, tmp_path):
    dataset = stage()
    (dataset / "birdcall" / "__pycache__").mkdir()
    (dataset / "birdcall" / "__pycache__" / "config.pyc").touch()
    (tmp_path / "build" / "other").mkdir()
    (tmp_path / "build" / ".birdcall-staging-1" / "dataset").mkdir(parents=True)  # of a killed one
    stage(replace(SETTINGS, fold=0))
    assert read_settings(dataset).fold == 0
    assert not (dataset / "birdcall" / "__pycache__").exists()
    folders = sorted(path.name for path in (tmp_path / "build").iterdir())
    assert folders == ["dataset", "kernel", "other"]


def test_two_processes_do_not_stage_in_one_folder_at_once(stage, tmp_path):
    pytest.importorskip("fcntl")
    with locked(tmp_path / "build"), pytest.raises(OSError, match=rf"build: process {os.getpid()}"):
        stage()
    assert not list((tmp_path / "build").iterdir())


@pytest.mark.parametrize(
    "name", ["dataset/old.txt", "dataset/birdcall/old.txt", "kernel/other.py", "dataset/.hidden"]
)
def test_a_file_that_was_not_staged_is_named_and_nothing_is_replaced(stage, tmp_path, name):
    dataset = stage()
    path = tmp_path / "build" / name
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"--build") as caught:
        stage(replace(SETTINGS, fold=0))
    assert str(path) in str(caught.value)
    assert path.read_text() == "mine"
    assert read_settings(dataset).fold == SETTINGS.fold
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["dataset", "kernel"]


@pytest.mark.parametrize("name", ["dataset", "kernel"])
@pytest.mark.parametrize("kind", ["files", "of another program", "link", "file"])
def test_folders_of_others_stay_as_they_are(stage, tmp_path, name, kind):
    target = tmp_path / "build" / name
    target.parent.mkdir()
    folder = tmp_path / "precious" if kind == "link" else target
    if kind == "file":
        target.write_text("mine")
    else:
        folder.mkdir()
        (folder / "train.csv").write_text("mine")
    if kind == "of another program":
        (folder / "manifest.json").write_text(json.dumps({"name": "x", "files": {"train.csv": 0}}))
        metadata = {"id": "me/my-kernel", "code_file": "train.csv"}
        (folder / "kernel-metadata.json").write_text(json.dumps(metadata))
    elif kind == "link":
        target.symlink_to(folder)
    with pytest.raises(ValueError, match=r"--build") as caught:
        stage()
    assert str(target) in str(caught.value)
    assert (target if kind == "file" else folder / "train.csv").read_text() == "mine"
    assert [path.name for path in target.parent.iterdir()] == [name]


def test_a_package_of_an_earlier_version_is_replaced(stage):
    dataset = stage()
    manifest = json.loads((dataset / MANIFEST_FILE).read_text())
    (dataset / MANIFEST_FILE).write_text(json.dumps(manifest["files"]))  # the digests alone
    assert find_changes(dataset) == {}
    stage()
    assert json.loads((dataset / MANIFEST_FILE).read_text()) == manifest


def test_a_staging_that_fails_leaves_the_one_before(stage, tmp_path, monkeypatch):
    dataset = stage()
    monkeypatch.setattr("birdcall.kaggle.packaging._MAX_DATASET_BYTES", 1000)
    with pytest.raises(ValueError, match="GiB"):
        stage(replace(SETTINGS, fold=0))
    assert read_settings(dataset) == SETTINGS
    assert find_changes(dataset) == {}
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["dataset", "kernel"]


# --- dry run ------------------------------------------------------------------------------------


def test_two_sessions_the_second_of_which_gets_further(stage, demo_folder, tmp_path):
    dataset = stage()
    change_code(dataset, "__main__", STAND_IN + "save(10 * n_sessions)\n")
    output = tmp_path / "dry_run"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    log = dry_run_training(dataset.parent, demo_folder, output)
    assert (output / "notes.txt").read_text() == "mine"
    assert log.count("session 1") == log.count("session 2") == 1
    assert "session 1 of dataset" in log  # the staged code ran, not this checkout's
    assert (output / "runs" / "small_gru" / "fold1" / STATE_FILE).is_file()


def test_a_session_that_fails_ends_the_dry_run_with_its_last_line(stage, demo_folder, tmp_path):
    dataset = stage()
    kernel = dataset.parent / "kernel" / SCRIPT.name
    kernel.write_text("print('no birds')\nraise SystemExit(3)\n")
    with pytest.raises(ValueError, match=r"exit code 3: no birds$"):
        dry_run_training(dataset.parent, demo_folder, tmp_path / "dry_run")
    assert not (tmp_path / "dry_run").exists()


@pytest.mark.parametrize(
    "steps, reason",
    [
        ([None], "no state.*: the last line"),
        ([10, 10], "past step 10: the last line"),
        ([1, 0], "1"),
    ],
)
def test_a_session_that_makes_no_step_ends_the_dry_run(
    stage, demo_folder, tmp_path, monkeypatch, steps, reason
):
    left = iter(steps)

    def run(build, data, working, *session, **named):
        step = next(left)
        if step is not None:
            write_state(working / SETTINGS.run / STATE_FILE, {}, {"progress": {"step": step}})
        return "the first line\nthe last line\n"

    monkeypatch.setattr("birdcall.kaggle.dry_run.run_as_kaggle", run)
    with pytest.raises(ValueError, match=reason):
        dry_run_training(stage().parent, demo_folder, tmp_path / "dry_run")
    assert not (tmp_path / "dry_run").exists()


def test_processes_of_a_dry_run_connect_to_each_other_and_to_no_host(tmp_path):
    for name in ("kernel", "dataset"):
        (tmp_path / name).mkdir()
    (tmp_path / "kernel" / "script.py").write_text(
        "import subprocess, sys\n"
        f"code = {CONNECTIONS!r}\n"
        "exec(code)\n"
        "subprocess.run([sys.executable, '-c', code], check=True)\n"
    )
    log = run_as_kaggle(tmp_path, tmp_path / "dataset", tmp_path / "working")
    assert log.splitlines() == ["the kernel has no network"] * 6


@pytest.mark.slow
def test_a_real_training_stops_at_its_limit_and_is_finished_by_the_next_session(
    stage, demo_folder, tmp_path
):
    dataset = stage()
    code = (dataset / "birdcall" / "experiments.py").read_text()
    change_code(dataset, "experiments", code + SHORTENED)
    output = tmp_path / "dry_run"
    log = dry_run_training(dataset.parent, demo_folder, output)
    assert "resumed after step 1" in log
    assert "small_gru-fold1 is finished" in log
    run = output / "runs" / "small_gru" / "fold1"
    assert [path.name for path in output.iterdir()] == ["runs"]
    assert not (run / STATE_FILE).exists()
    assert len(pd.read_csv(run / "log.csv")) == 2
    load_model(run)
    assert read_checkpoint(run).fold == 1
