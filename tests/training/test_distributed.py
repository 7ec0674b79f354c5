"""Two processes with half a batch each train like one process with the whole batch."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import fake_birdnet
from shortened import shorten_previews

from birdcall.config import replace_nested
from birdcall.models.checkpoint import WEIGHTS_FILE, read_checkpoint
from birdcall.training.distributed import DistributedContext
from birdcall.training.runs import train_run
from birdcall.training.trainer import Run, RunOptions, Training

# What torchrun does for `birdcall` with an experiment of its own, but by two forks of one process,
# which imports all that takes seconds. The first of them writes the loss of every step.
COMMAND = """
import json, os, sys
from pathlib import Path
import numpy as np
import timm
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
import birdcall.experiments as experiments
import birdcall.training.runs as runs
from birdcall.__main__ import main
from birdcall.config import Experiment, config_from_dict
from birdcall.training.trainer import Training
experiment = config_from_dict(Experiment, json.loads(Path("experiment.json").read_text()))
experiments.EXPERIMENTS[experiment.name] = experiment
step, losses = Training.step, []
def recorded(training, batches):
    before = training.progress.loss_sum
    step(training, batches)
    losses.append(training.progress.loss_sum - before)
Training.step = recorded
runs.plot_preview = lambda *_: np.zeros((8, 8, 3), np.uint8)
def run():
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code
    if os.environ["RANK"] == "0":
        Path("losses.json").write_text(json.dumps(losses))
config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    start_method="fork", max_restarts=0,
)
elastic_launch(config, run)()
"""


@pytest.fixture(scope="module")
def experiment(tiny_experiment):
    """Twenty steps. Only the draws of dropout differ between two processes and one: none here."""
    return replace_nested(
        replace(tiny_experiment, name="small_gru"),
        model={"dropout": 0.0, "temporal": "gru"},
        train={
            "epochs": 4,
            "validate_every": 1,
            "data": {"clips_per_epoch": 40, "batch_size": 8},
            "teacher": {"weight": 1.0},
            # Each step triples the difference of rounding; at 3e-3 it would reach 1e-3.
            "optimizer": {"ema_decay": 0.9, "average_best": 2, "learning_rate": 1e-3},
        },
    )


@pytest.fixture(scope="module")
def embedded(training_data):
    """The tiny demo with a teacher's embeddings beside its audit, where `birdcall train` looks."""
    labels = [f"{name}_Bird" for name in training_data.birdnet.names]
    teacher = replace(fake_birdnet(labels), sha256=training_data.birdnet.sha256)
    for kind, files in training_data.files_to_embed().items():
        dict(training_data.birdnet.part(kind).predict(teacher, files))
    return training_data


@pytest.fixture(scope="module")
def one(experiment, embedded, tmp_path_factory):
    """The run's folder and the losses of the training in this process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("one")
    step, losses = Training.step, []

    def recorded(training, batches):
        before = training.progress.loss_sum
        step(training, batches)
        losses.append(training.progress.loss_sum - before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", recorded)
        shorten_previews(patch)
        options = RunOptions(workers=0, device=torch.device("cpu"))
        train_run(Run(experiment, 0, folder), embedded, options)
    return SimpleNamespace(folder=folder, losses=losses)


@pytest.fixture(scope="module")
def two(experiment, embedded, demo_folder, tmp_path_factory):
    """The same of `birdcall train` in two processes, and what it printed."""
    home = tmp_path_factory.mktemp("two")
    output = home / "output" / demo_folder.name
    shutil.copytree(embedded.read_crops.folder.parent, output)
    (home / "experiment.json").write_text(json.dumps(asdict(experiment)))
    (home / "command.py").write_text(COMMAND)
    line = (
        *(sys.executable, "command.py", "train", "--data", demo_folder),
        *("--experiment", experiment.name),
        *("--fold", "0", "--folds", output / "folds.csv", "--workers", "0"),
    )
    done = subprocess.run(
        list(map(str, line)),
        cwd=home,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(
        folder=output / "runs" / experiment.name / "fold0",
        losses=json.loads((home / "losses.json").read_text()),
        printed=done.stdout,
    )


def test_losses_are_those_of_one_process(one, two):
    assert len(one.losses) == len(two.losses) == 20
    assert two.losses == pytest.approx(one.losses, abs=1e-4)
    assert len(set(one.losses)) == 20


def test_scores_are_those_of_one_process(one, two):
    assert read_checkpoint(two.folder).score == read_checkpoint(one.folder).score


def test_weights_and_running_statistics_are_those_of_one_process(one, two):
    from safetensors.torch import load_file

    expected, weights = (load_file(run.folder / WEIGHTS_FILE) for run in (one, two))
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-3)


def test_one_process_shows_and_writes(one, two):
    names = {path.name for path in two.folder.iterdir()}
    assert names == {"log.csv", "model.json", "model.safetensors", "tensorboard"}
    assert len(list((two.folder / "tensorboard").iterdir())) == 1
    assert two.printed.count("small_gru") == 1


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="a batch of 9 clips cannot be shared by 2 processes"):
        DistributedContext(0, 2).part(9)
    assert [DistributedContext(rank, 3).part(9) for rank in range(3)] == [
        *(slice(0, 3), slice(3, 6), slice(6, 9))
    ]


def test_a_process_alone_has_the_whole_batch():
    value = torch.arange(4.0)
    assert DistributedContext().part(5) == slice(0, 5)
    assert DistributedContext().gather(value) is value
    assert DistributedContext().sum(value) is value
    cpu = torch.device("cpu")
    assert (DistributedContext().any(True, cpu), DistributedContext().any(False, cpu)) == (
        True,
        False,
    )
    network = torch.nn.BatchNorm1d(2)
    assert DistributedContext().wrap(network, cpu) is network
