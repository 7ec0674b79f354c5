"""A training that is interrupted, in any way and at any step, ends with the same weights."""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import birdcall
from birdcall.config import replace_nested
from birdcall.models.checkpoint import STATE_FILE
from birdcall.training.log import read_log
from birdcall.training.resume import identity_of, read_state, write_state
from birdcall.training.runs import TrainingInterrupted, train_run
from birdcall.training.trainer import Run, RunOptions, start_training

OPTIONS = RunOptions(workers=0)
RESUME = RunOptions(workers=0, resume=True)
pytestmark = pytest.mark.usefixtures("blank_previews")


@pytest.fixture(scope="module")
def rich_experiment(tiny_experiment):
    """All that has a state of its own: dropout, moving average, best epochs, accumulation."""
    return replace_nested(
        tiny_experiment,
        name="rich",
        model={"dropout": 0.3},
        train={
            "epochs": 3,
            "validate_every": 1,
            "data": {"clips_per_epoch": 20},
            "optimizer": {"accumulate": 2, "ema_decay": 0.9, "average_best": 2},
        },
    )


def train_step_by_step(run, data):
    """Interrupt a run after each of its steps and resume it; return the number of interruptions."""
    for n_interruptions in range(1000):
        try:
            train_run(run, data, replace(RESUME, deadline=time.monotonic()))
        except TrainingInterrupted:
            continue
        else:
            return n_interruptions
    raise AssertionError("it never ends")


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_interrupted_after_every_step_it_ends_with_the_same_bits(
    training_data, rich_experiment, tmp_path, precision
):
    experiment = replace(rich_experiment, train=replace(rich_experiment.train, precision=precision))
    whole, parts = (Run(experiment, 0, tmp_path / name) for name in ("whole", "parts"))
    train_run(whole, training_data, OPTIONS)
    assert train_step_by_step(parts, training_data) == 9  # three epochs of three steps
    for name in ("model.safetensors", "model.json"):
        assert (parts.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    first, second = (read_log(run.folder) for run in (whole, parts))
    for one, other in zip(first, second, strict=True):
        assert (one.epoch, one.loss, one.validation) == (other.epoch, other.loss, other.validation)


def test_an_epoch_that_was_left_in_its_middle_is_not_started_again(
    training_data, rich_experiment, tmp_path
):
    run = Run(rich_experiment, 0, tmp_path)
    with pytest.raises(TrainingInterrupted, match="stopped after step 1 of 9"):
        train_run(run, training_data, replace(OPTIONS, deadline=time.monotonic()))
    _, values = read_state(tmp_path / STATE_FILE)
    assert values["progress"]["epoch_step"] == 1
    assert values["progress"]["n_clips"] == 8
    assert not (tmp_path / "log.csv").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state_and_names_the_option_to_resume(
    training_data, tiny_experiment, tmp_path, number
):
    long = replace(tiny_experiment, train=replace(tiny_experiment.train, epochs=10_000))
    before = signal.getsignal(number)

    def signal_when_it_trains():
        while not (tmp_path / "log.csv").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=signal_when_it_trains, daemon=True).start()
    with pytest.raises(TrainingInterrupted, match="the same command with --resume") as caught:
        train_run(Run(long, 0, tmp_path), training_data, replace(OPTIONS, save_every=10**6))
    step = read_state(tmp_path / STATE_FILE)[1]["progress"]["step"]
    assert f"stopped after step {step} of 20000" in str(caught.value)
    assert signal.getsignal(number) == before


@pytest.fixture(scope="module")
def first_state(training_data, tiny_experiment, tmp_path_factory):
    """The state of a training that was interrupted after its first step."""
    folder = tmp_path_factory.mktemp("interrupted")
    options = replace(OPTIONS, deadline=time.monotonic())
    with pytest.raises(TrainingInterrupted):
        train_run(Run(tiny_experiment, 0, folder), training_data, options)
    return folder / STATE_FILE


@pytest.fixture
def state(first_state, tmp_path):
    """A copy of that state in the folder of a run."""
    return Path(shutil.copy(first_state, tmp_path))


def test_a_state_of_another_experiment_is_refused_with_the_differences(
    training_data, tiny_experiment, state, tmp_path
):
    before = state.read_bytes()
    other = replace_nested(
        tiny_experiment,
        train={"optimizer": {"learning_rate": 0.5}},
        frontend={"n_mels": 40},
    )
    with pytest.raises(ValueError, match="state of another training") as caught:
        train_run(Run(other, 0, tmp_path), training_data, RESUME)
    assert "experiment.frontend.n_mels was 32, is 40" in str(caught.value)
    assert "experiment.train.optimizer.learning_rate was 0.003, is 0.5" in str(caught.value)
    assert state.read_bytes() == before


def test_a_state_of_other_code_is_refused_and_names_the_module(
    training_data, tiny_experiment, state, tmp_path
):
    tensors, values = read_state(state)
    values["identity"]["code"]["training.step"] = "0" * 16
    values["identity"]["version"] = "0.0.1"
    write_state(state, tensors, values)
    with pytest.raises(ValueError, match=r"version was '0\.0\.1'.*training/step\.py has changed"):
        train_run(
            Run(tiny_experiment, 0, tmp_path), training_data, RunOptions(workers=0, resume=True)
        )


def test_a_state_of_another_kind_of_device_is_refused(
    training_data, tiny_experiment, state, tmp_path
):
    tensors, values = read_state(state)
    values["identity"]["device"] = "cuda"
    write_state(state, tensors, values)
    with pytest.raises(ValueError, match=r"device was 'cuda', is 'cpu'"):
        train_run(Run(tiny_experiment, 0, tmp_path), training_data, RESUME)


PACKAGE = Path(birdcall.__file__).parent


@pytest.fixture
def code_after(tmp_path, monkeypatch):
    """Digest the code of a training after a change of one file of a copy of the package."""
    copy = tmp_path / "birdcall"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def digest(name="config.py", old="", new=""):
        path = copy / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new) if old else text)
        # A module of its own, because a process reads each file only once.
        spec = importlib.util.spec_from_file_location("store_of_copy", copy / "storage/store.py")
        store = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, store)  # dataclasses look it up
        spec.loader.exec_module(store)
        result = store.code_digest("training.trainer")
        path.write_text(text)
        return result

    return digest


def test_the_code_of_the_loss_is_in_the_identity_of_a_training(
    training_data, tiny_experiment, code_after, tmp_path
):
    run = Run(tiny_experiment, 0, tmp_path / "run")
    training = start_training(run, training_data, training_data.recordings, OPTIONS)
    identity = identity_of(training.checkpoint)
    assert code_after() == identity["code"]
    changed = code_after("training/step.py", "config.framewise_weight *", "2 *")
    assert changed.keys() == identity["code"].keys()
    names = [name for name in changed if changed[name] != identity["code"][name]]
    assert names == ["training.step"]


def test_plots_comments_and_docstrings_are_not_in_the_identity_of_a_training(code_after):
    before = code_after()
    assert code_after("training/log.py", 'cmap="magma"', 'cmap="gray"') == before
    assert code_after("training/step.py", "Return the loss of a batch", "Return a loss") == before
    assert code_after("training/trainer.py", "# finished epochs", "# complete epochs") == before
    for name in before:
        assert not name.startswith(("report", "evaluation", "cli", "training.log", "training.runs"))
        source = (PACKAGE / f"{name.replace('.', '/')}.py").read_text()
        assert "matplotlib" not in source, name


def test_a_state_of_other_recordings_is_refused(training_data, tiny_experiment, state, tmp_path):
    fewer = replace(training_data, recordings=training_data.recordings.iloc[1:])
    with pytest.raises(ValueError, match="the tables of recordings are different"):
        train_run(Run(tiny_experiment, 0, tmp_path), fewer, RESUME)


def test_a_truncated_state_is_refused_in_one_line_with_its_path(
    training_data, tiny_experiment, state, tmp_path
):
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state\.safetensors: not a readable state"):
        train_run(
            Run(tiny_experiment, 0, tmp_path), training_data, RunOptions(workers=0, resume=True)
        )


def test_starting_again_leaves_nothing_of_the_old_state(
    training_data, tiny_experiment, state, tmp_path
):
    (tmp_path / ".state.0123456789abcdef.safetensors").write_bytes(b"written in part")
    train_run(Run(tiny_experiment, 0, tmp_path), training_data, OPTIONS)
    assert not list(tmp_path.glob("*state*"))
    assert not list(tmp_path.glob(".state*"))


def test_values_and_tensors_survive_the_file_to_the_bit(tmp_path):
    generator = np.random.default_rng(0)
    values = {"floats": list(generator.normal(size=100)), "infinite": -np.inf, "text": "é"}
    tensors = {"a": torch.randn(3, 4).t(), "step": torch.tensor(7.0), "whole": torch.arange(3)}
    write_state(tmp_path / STATE_FILE, tensors, values)
    read, again = read_state(tmp_path / STATE_FILE)
    assert again == values
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert all(read[name].dtype == tensors[name].dtype for name in tensors)


COMMAND = """
import sys
import birdcall.experiments as experiments
from birdcall.config import ModelConfig, replace_nested
small = experiments.EXPERIMENTS["small_gru"]
experiments.EXPERIMENTS["small_gru"] = replace_nested(
    small,
    frontend={"n_mels": 32, "hop_length": 1000},
    model=ModelConfig(
        backbone="test_byobnet", pretrained=False, temporal="gru+attention", temporal_size=16
    ),
    train={
        "epochs": 8, "validate_every": 2,
        "data": {"clip_seconds": 2.0, "clips_per_epoch": 64, "batch_size": 8},
        "optimizer": {"accumulate": 2, "ema_decay": 0.95, "average_best": 2},
    },
)
from birdcall.__main__ import main
main()
"""


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_it_ends_with_the_same_bits(
    demo_folder, training_data, tmp_path
):
    """The real command with a loader process, killed by SIGKILL, and resumed each time."""

    def command(*arguments, **options):
        line = [sys.executable, "-c", COMMAND, "--quiet", *map(str, arguments)]
        return subprocess.Popen(line, cwd=tmp_path, start_new_session=True, **options)

    output = tmp_path / "output" / demo_folder.name
    shutil.copytree(training_data.read_crops.folder.parent, output)
    run = output / "runs" / "small_gru" / "fold0"
    train = ("train", "--data", demo_folder, "--experiment", "small_gru", "--fold", 0)
    train = (*train, "--folds", output / "folds.csv", "--workers", 1, "--save-every", 3)
    assert command(*train, stderr=subprocess.DEVNULL).wait() == 0
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.json").unlink()
    (run / "model.safetensors").unlink()

    moments = random.Random(5)
    steps = []
    for _ in range(10):
        before = run / STATE_FILE
        seen = before.stat().st_mtime_ns if before.exists() else 0
        process = command(*train, "--resume", stderr=subprocess.DEVNULL)
        while not (before.exists() and before.stat().st_mtime_ns > seen):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        steps.append(read_state(run / STATE_FILE)[1]["progress"]["step"])
    assert steps == sorted(steps)
    assert not (run / "model.json").exists(), "all ten kills came before the end"
    assert command(*train, "--resume", stderr=subprocess.DEVNULL).wait() == 0
    assert (run / "model.safetensors").read_bytes() == whole
