"""Two processes with half a batch each train like one process with the whole batch."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from birdcall.config import replace_nested
from birdcall.training.distributed import DistributedContext

# Trains 20 steps and writes every loss; alone, or as one of those that torchrun starts.
SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from birdcall.config import Experiment, config_from_dict
from birdcall.data.dataset import load_training_data
from birdcall.training.distributed import distributed_context
from birdcall.training.trainer import Run, RunOptions, start_training
experiment = config_from_dict(Experiment, json.loads(sys.argv[1]))
folder, folds, audit, cache, out = map(Path, sys.argv[2:7])
data = load_training_data(folder, folds=folds, audit=audit, cache=cache)
train_part, validation_part = data.split(0)
with distributed_context(torch.device("cpu")) as (distributed, device):
    options = RunOptions(workers=0, device=device, distributed=distributed)
    training = start_training(Run(experiment, 0, out), data, train_part, options)
    losses, last = [], 0.0
    for _ in range(experiment.train.epochs):
        for _ in training.steps():
            losses.append(training.progress.loss_sum - last)
            last = training.progress.loss_sum
        last = 0.0
        training.end_epoch(validation_part)
        training.save()
    checkpoint = training.finish(validation_part)
    if distributed.is_first:
        (out / "losses.json").write_text(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def results(tiny_experiment, training_data, demo_folder, tmp_path_factory):
    """Losses, score and weights of 20 steps in one process and in two."""
    out = tmp_path_factory.mktemp("distributed")
    audited = training_data.read_crops.folder.parent
    # Only the draws of dropout differ between two processes and one.
    experiment = replace_nested(
        tiny_experiment,
        model={"dropout": 0.0, "temporal": "gru"},
        train={
            "epochs": 4,
            "validate_every": 1,
            "data": {"clips_per_epoch": 40, "batch_size": 8},
            # Each step triples the difference of rounding; at 3e-3 it would reach 1e-3.
            "optimizer": {"ema_decay": 0.9, "average_best": 2, "learning_rate": 1e-3},
        },
    )
    made = {}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    script = out / "script.py"
    script.write_text(SCRIPT)
    for name, start in (("one", ()), ("two", torchrun)):
        folder = out / name
        folder.mkdir()
        paths = (demo_folder, audited / "folds.csv", audited / "audit.csv", audited / "cache")
        line = [sys.executable, *start, script, json.dumps(asdict(experiment)), *paths, folder]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made[name] = folder
    return made


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_losses_are_those_of_one_process(results):
    one, two = (read(results[name], "losses.json") for name in ("one", "two"))
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, abs=1e-4)
    assert len(set(one)) == 20


def test_scores_are_those_of_one_process(results):
    one, two = (read(results[name], "model.json")["score"] for name in ("one", "two"))
    assert two == one


def test_weights_and_running_statistics_are_those_of_one_process(results):
    from safetensors.torch import load_file

    one, two = (load_file(results[name] / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-3)


def test_one_process_writes(results):
    names = {path.name for path in results["two"].iterdir()}
    assert names == {"losses.json", "model.json", "model.safetensors"}


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


def test_the_command_trains_under_torchrun(demo_folder, training_data, tmp_path):
    """`torchrun -m birdcall train`, as in the README; one process shows and writes."""
    few = (
        "import birdcall.experiments as e; from birdcall.config import replace_nested; "
        "e.EXPERIMENTS['small_gru'] = replace_nested(e.EXPERIMENTS['small_gru'], "
        "train={'epochs': 1, 'data': {'clips_per_epoch': 8, 'batch_size': 4}}); "
        "from birdcall.__main__ import main; main()"
    )
    script = tmp_path / "few_steps.py"
    script.write_text(few)

    def run(*line):
        done = subprocess.run(
            [sys.executable, *map(str, line)],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    output = tmp_path / "output" / demo_folder.name
    shutil.copytree(training_data.read_crops.folder.parent, output)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    table = run(
        *torchrun, script, "train", "--data", demo_folder, "--experiment", "small_gru",
        "--fold", "0", "--folds", output / "folds.csv", "--workers", "0",
    )  # fmt: skip
    assert table.count("small_gru") == 1
    folder = output / "runs" / "small_gru" / "fold0"
    assert (folder / "model.safetensors").is_file()
