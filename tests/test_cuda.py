"""On a GPU: the same scores as on a CPU, a kernel that uses it, trainings in every precision.

`pytest -m cuda` runs these; without a GPU they are not selected.
"""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import RATE, SCRIPT, read_labels, read_summary, rows_of, write_noise_file, write_rows
from torch.profiler import ProfilerActivity, profile

import birdcall.inference.ensemble as ensemble_module
from birdcall.config import replace_nested
from birdcall.data.birdnet import EMBEDDING_SIZE
from birdcall.data.loader import ClipBatch
from birdcall.experiments import EXPERIMENTS, find_experiment
from birdcall.inference.decision import Decision
from birdcall.inference.engine import predict_audio, predict_waveforms
from birdcall.inference.ensemble import Ensemble, default_device, load_ensemble
from birdcall.inference.windows import WindowConfig
from birdcall.kaggle.dry_run import run_as_kaggle
from birdcall.kaggle.packaging import StagingOptions, stage_package
from birdcall.models.checkpoint import (
    STATE_FILE,
    Checkpoint,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from birdcall.models.sed import build_model
from birdcall.training.runs import TrainingInterrupted, plan_runs, train_many, train_run
from birdcall.training.step import BatchLoss
from birdcall.training.trainer import Run, RunOptions

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.fail("`-m cuda` was asked for, and there is no GPU")


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype("f4")


SOUNDS = {name: (lambda rates, s=s: {RATE: noise(3 + 9 * s, s)}) for s, name in enumerate("abcdef")}


@pytest.mark.parametrize(
    "window_config", [WindowConfig(), WindowConfig(2, 2.5)], ids=["plain", "wide"]
)
def test_a_gpu_scores_as_a_cpu_does(trained_runs, window_config):
    on_gpu = dict(predict_audio(load_ensemble(trained_runs, "cuda", window_config), SOUNDS))
    on_cpu = dict(predict_audio(load_ensemble(trained_runs, "cpu", window_config), SOUNDS))
    for name in SOUNDS:
        for output in ("clipwise", "framewise", "frames"):
            one, other = (getattr(found[name], output) for found in (on_gpu, on_cpu))
            np.testing.assert_allclose(one, other, atol=1e-3)


def test_batches_go_to_all_gpus_in_turn(trained_runs, monkeypatch):
    """Where there is one GPU, it stands for two: each has its own copy of the networks."""
    expected = dict(predict_audio(load_ensemble(trained_runs, "cuda"), SOUNDS))
    both = [torch.device("cuda", 0), torch.device("cuda", torch.cuda.device_count() - 1)]
    monkeypatch.setattr(ensemble_module, "list_devices", lambda device: both)
    found = load_ensemble(trained_runs, "cuda")
    found.batch_windows = 3
    assert len(found.replicas) == 2
    for name, scores in predict_audio(found, SOUNDS):
        np.testing.assert_allclose(scores.clipwise, expected[name].clipwise, atol=1e-4)


def test_the_kernel_runs_on_the_gpu(trained_runs, tmp_path):
    runs = trained_runs[:2]
    checkpoints = [read_checkpoint(run) for run in runs]
    decision = Decision(
        0.0,
        0.0,
        max_birds=2,
        classes=checkpoints[0].classes,
        members=tuple(one.name for one in checkpoints),
        weights={one.name: one.weights_sha256 for one in checkpoints},
    )
    stage_package(runs, decision, StagingOptions(SCRIPT, tmp_path / "build", "somebody"))
    (tmp_path / "data").mkdir()
    write_noise_file(tmp_path / "data" / "test_audio" / "aa.wav", 60)
    write_rows(tmp_path / "data", rows_of("aa", 60))
    log = run_as_kaggle(tmp_path / "build", tmp_path / "data", tmp_path / "working")
    assert "2 members on cuda" in log
    assert "nocall" not in read_labels(tmp_path / "working", tmp_path / "data").values()
    assert read_summary(tmp_path / "working")["left_out"] == {}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_a_training_on_the_gpu_ends_with_a_checkpoint_that_scores_on_a_cpu(
    training_data, tiny_experiment, tmp_path, precision
):
    train = {"precision": precision, "optimizer": {"ema_decay": 0.9}}
    experiment = replace_nested(tiny_experiment, name=f"tiny_{precision}", train=train)
    runs = plan_runs([experiment], training_data, 0, tmp_path)
    train_many(runs, training_data, RunOptions(workers=0, device=default_device()))
    model, checkpoint = load_model(runs[0].folder)
    assert np.isfinite(checkpoint.score["macro_ap"])
    assert predict_waveforms(load_ensemble([runs[0].folder]), {RATE: noise(12)}).seconds == 12
    assert not any(tensor.is_cuda for tensor in model.state_dict().values())


@pytest.mark.parametrize("kinds", [("cpu", "cuda"), ("cuda", "cpu")], ids="-".join)
def test_a_training_continues_on_the_kind_of_device_that_saved_its_state(
    training_data, tiny_experiment, tmp_path, kinds
):
    first, second = (RunOptions(workers=0, device=torch.device(kind)) for kind in kinds)
    run = Run(tiny_experiment, 0, tmp_path)
    with pytest.raises(TrainingInterrupted):
        train_run(run, training_data, replace(first, deadline=time.monotonic()))
    state = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(ValueError, match=f"device was '{kinds[0]}', is '{kinds[1]}'"):
        train_run(run, training_data, replace(second, resume=True))
    assert (tmp_path / STATE_FILE).read_bytes() == state
    assert np.isfinite(train_run(run, training_data, replace(first, resume=True)).score["macro_ap"])


GPU_EXPERIMENTS = [name for name in EXPERIMENTS if not name.startswith(("small", "lite0"))]


@pytest.mark.parametrize("name", GPU_EXPERIMENTS)
def test_an_experiment_for_a_gpu_scores_there_as_on_a_cpu(name, tmp_path):
    experiment = find_experiment(name)
    classes = tuple(f"bird{number}" for number in range(264))
    torch.manual_seed(0)
    model = build_model(experiment, 264).cuda()
    with torch.no_grad():  # statistics of sound
        windows = torch.from_numpy(noise(60)).view(12, -1).cuda()
        for _ in range(30):
            model.train()(windows)
    save_checkpoint(tmp_path, model.eval(), Checkpoint(experiment, classes, 0))
    scores = [
        predict_waveforms(load_ensemble([tmp_path], device), {RATE: noise(30, 1)})
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(scores[0].clipwise, scores[1].clipwise, atol=1e-3)
    assert isinstance(load_ensemble([tmp_path], "cuda"), Ensemble)


@pytest.mark.parametrize(
    "name", [*GPU_EXPERIMENTS, "lite0_gru", "lite0_gru_distilled", "birdnet_gru"]
)
def test_steps_of_a_recorded_graph_have_the_losses_of_kernels_launched_one_by_one(name):
    losses, n_replays = {}, {}
    for is_recorded in (True, False):
        train = {"cuda_graph": is_recorded, "data": {"clip_seconds": 5.0, "batch_size": 4}}
        experiment = replace_nested(find_experiment(name), train=train)
        torch.manual_seed(0)
        model = build_model(experiment, 12).cuda().train()
        compute_loss = BatchLoss(model, experiment, torch.device("cuda"))
        optimizer = torch.optim.SGD(compute_loss.parameters(), 1e-3)
        clips = torch.from_numpy(np.stack([noise(5, seed) for seed in range(4)]))
        names, embedding = tuple("abcd"), torch.ones(4, EMBEDDING_SIZE)
        batch = ClipBatch(clips, torch.eye(4, 12), torch.ones(4), names, (), embedding)
        losses[is_recorded] = []
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for position in range(6):
                loss = compute_loss(batch, 0, position)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[is_recorded].append(loss.item())
        n_replays[is_recorded] = sum(
            event.count for event in profiler.key_averages() if event.key == "cudaGraphLaunch"
        )
    np.testing.assert_allclose(losses[True], losses[False], rtol=5e-3)
    assert n_replays == {True: 12, False: 0}  # forward and backward pass of six steps
