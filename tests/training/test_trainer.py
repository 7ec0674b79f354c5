"""A run learns, repeats itself, and leaves a checkpoint that inference can use."""

import csv
import logging
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from birdcall.config import NO_AUGMENT, OptimizerConfig, replace_nested
from birdcall.data.loader import ClipBatch
from birdcall.inference.ensemble import load_ensemble
from birdcall.models.checkpoint import load_model, read_checkpoint
from birdcall.models.sed import build_model
from birdcall.training.log import read_log
from birdcall.training.runs import train_run
from birdcall.training.step import BatchLoss, validate, warmup_cosine
from birdcall.training.trainer import Run, RunOptions, start_training

PRECISIONS = ("float32", "bf16", "fp16")
OPTIONS = RunOptions(workers=0)
pytestmark = pytest.mark.usefixtures("blank_previews")


@pytest.fixture(scope="module")
def tiny_runs(trained_runs):
    """The folders of the tiny experiment's runs, in order of fold."""
    return [folder for folder in trained_runs if folder.parent.name == "tiny"]


def with_train(experiment, **changes):
    return replace_nested(experiment, train=changes)


def batch_of(waveform, target, weight=None):
    n_clips = len(waveform)
    names = tuple(f"clip{number}" for number in range(n_clips))
    weight = torch.ones(n_clips) if weight is None else weight
    return ClipBatch(waveform, target, weight, recordings=names, failures=())


def loss_of(model, waveform, target, experiment, position=0, weight=None):
    batch_loss = BatchLoss(model, experiment, torch.device("cpu"))
    return batch_loss(batch_of(waveform, target, weight), epoch=0, position=position)


def test_a_mix_weighs_as_the_ratings_of_its_parts_do_on_average(tiny_experiment):
    """Two clips, each mixed with the other: both have half of each part's weight."""
    torch.manual_seed(0)
    augment = replace(NO_AUGMENT, mixup_probability=1.0)
    experiment = with_train(replace(tiny_experiment, augment=augment), loss={"rating_weight": True})
    model = build_model(experiment, 3).eval()
    waveform, target = 0.1 * torch.randn(2, 64_000), torch.eye(3)[:2]
    whole = loss_of(model, waveform, target, experiment)
    mixed = loss_of(model, waveform, target, experiment, weight=torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(mixed, 0.5 * whole)
    # A clip that could not be read is silent, weighs nothing, and is added to no other.
    waveform[1] = 0
    alone = loss_of(model, waveform, target, experiment, weight=torch.tensor([0.8, 0.0]))
    twice = loss_of(model, waveform, target, experiment, weight=torch.tensor([0.4, 0.0]))
    torch.testing.assert_close(alone, 2 * twice)
    plain = with_train(experiment, loss={"rating_weight": False})
    expected = loss_of(model, waveform, target, plain, weight=torch.tensor([0.8, 0.0]))
    torch.testing.assert_close(alone, expected)


def test_a_model_can_learn_one_batch_by_heart(tiny_experiment):
    torch.manual_seed(0)
    experiment = replace(tiny_experiment, augment=NO_AUGMENT)
    model = build_model(experiment, 3).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    waveform, target = 0.1 * torch.randn(6, 32_000), torch.eye(3).repeat(2, 1)
    losses = []
    for _ in range(80):
        loss = loss_of(model, waveform, target, experiment)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_a_run_leaves_a_checkpoint_with_everything_that_is_known(
    training_data, tiny_experiment, tiny_runs
):
    model, read = load_model(tiny_runs[0])
    assert read.classes == training_data.classes
    assert read.experiment == tiny_experiment
    assert 0 <= read.score["macro_ap"] <= 1
    assert not model.training
    with (tiny_runs[0] / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert float(log[-1]["macro_ap"]) == read.score["macro_ap"]
    assert {path.name for path in tiny_runs[0].iterdir()} == {
        "model.json",
        "model.safetensors",
        "log.csv",
        "tensorboard",
    }


def test_tensorboard_holds_what_the_log_holds(tiny_runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tiny_runs[0] / "tensorboard")).Reload()
    log = read_log(tiny_runs[0])
    for name in ("loss", "learning_rate", "clips_per_second", "waiting_share"):
        written = [(one.step, one.value) for one in events.Scalars(name)]
        expected = [(entry.epoch, getattr(entry, name)) for entry in log]
        np.testing.assert_allclose(written, expected, rtol=1e-6)


def test_two_runs_of_one_seed_have_the_same_weights(
    training_data, tiny_experiment, tiny_runs, tmp_path
):
    """Whatever the number of loader processes; the first run had none."""
    run = Run(tiny_experiment, 1, tmp_path)
    checkpoint = train_run(run, training_data, RunOptions(workers=2))
    assert checkpoint == read_checkpoint(tmp_path)
    assert checkpoint.weights_sha256 == read_checkpoint(tiny_runs[1]).weights_sha256


def test_another_seed_has_other_weights(trained_runs):
    """The two experiments differ in nothing but the seed."""
    digests = [read_checkpoint(folder).weights_sha256 for folder in trained_runs]
    assert len(set(digests)) == len(trained_runs) == 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_silent_and_a_full_scale_clip_give_finite_gradients(tiny_experiment, precision):
    torch.manual_seed(0)
    experiment = with_train(tiny_experiment, precision=precision)
    model = build_model(experiment, 3).train()
    waveform = torch.zeros(4, 64_000)
    waveform[1] = torch.sign(torch.randn(64_000))
    waveform[2] = 1e-6 * torch.randn(64_000)
    waveform[3] = torch.sin(torch.arange(64_000) * 0.6)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=2.0**10)
    loss = loss_of(model, waveform, torch.eye(3)[[0, 1, 2, 0]], experiment)
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_precision_is_that_of_the_network_and_not_of_the_front_end(
    tiny_experiment,
):
    seen = {}
    experiment = with_train(tiny_experiment, precision="bf16")
    model = build_model(experiment, 3)
    model.project.register_forward_hook(lambda *args: seen.update(network=args[2].dtype))
    model.frontend.register_forward_hook(lambda *args: seen.update(frontend=args[2].dtype))
    loss_of(model, torch.randn(2, 64_000), torch.zeros(2, 3), experiment)
    assert seen == {"network": torch.bfloat16, "frontend": torch.float32}


def test_a_step_of_two_batches_has_the_gradient_of_one_of_both(
    training_data, tiny_experiment, tmp_path
):
    # Without batch normalisation, whose statistics are those of each batch.
    plain = replace(tiny_experiment, augment=NO_AUGMENT)
    train_part, _ = training_data.split(0)

    def gradients(accumulate, waveforms):
        experiment = with_train(plain, optimizer={"accumulate": accumulate, "gradient_clip": 1e9})
        run = Run(experiment, 0, tmp_path)
        training = start_training(run, training_data, train_part, OPTIONS)
        training.model.eval()
        kept = {}
        training.optimizer.step = lambda *_: kept.update(
            {name: p.grad.clone() for name, p in training.model.named_parameters()}
        )
        target = torch.eye(3)[[0, 1, 2, 0]]
        parts = zip(waveforms, target.chunk(len(waveforms)), strict=True)
        training.step([batch_of(waveform, part) for waveform, part in parts])
        return kept

    waveform = 0.1 * torch.randn(4, 64_000, generator=torch.Generator().manual_seed(1))
    whole, halves = gradients(1, [waveform]), gradients(2, waveform.chunk(2))
    for name, gradient in whole.items():
        torch.testing.assert_close(halves[name], gradient, rtol=1e-3, atol=1e-6)


def test_epochs_of_accumulated_batches_leave_none_out(training_data, tiny_experiment, tmp_path):
    experiment = with_train(
        tiny_experiment, epochs=1, data={"clips_per_epoch": 20}, optimizer={"accumulate": 2}
    )
    train_part, _ = training_data.split(0)
    training = start_training(Run(experiment, 0, tmp_path), training_data, train_part, OPTIONS)
    assert training.steps_per_epoch == 3  # of two, two and one batch
    assert len(list(training.steps())) == 3
    assert training.progress.n_clips == 20


def spoil(monkeypatch, at):
    """Make the loss of the batches at these positions of an epoch NaN."""
    real = BatchLoss.__call__

    def spoiled(self, batch, epoch, position, **options):
        loss = real(self, batch, epoch, position, **options)
        return loss * math.nan if position in at else loss

    monkeypatch.setattr(BatchLoss, "__call__", spoiled)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_recordings(
    training_data, tiny_experiment, tmp_path, monkeypatch
):
    spoil(monkeypatch, {1})
    experiment = replace(tiny_experiment, augment=NO_AUGMENT)
    with pytest.raises(
        ValueError, match=r"tiny, fold 0: the loss is not finite in a batch of .*/XC\d+\.mp3"
    ):
        train_run(Run(experiment, 0, tmp_path), training_data, OPTIONS)


def test_a_batch_whose_loss_is_not_finite_can_be_skipped(
    training_data, tiny_experiment, tmp_path, monkeypatch, caplog
):
    spoil(monkeypatch, {1})
    experiment = with_train(tiny_experiment, on_non_finite="skip")
    with caplog.at_level(logging.WARNING):
        train_run(Run(experiment, 0, tmp_path), training_data, OPTIONS)
    assert "the loss is not finite in a batch of" in caplog.text
    log = read_log(tmp_path)
    assert [entry.skipped for entry in log] == [1, 1]
    assert all(math.isfinite(entry.loss) for entry in log)
    model, _ = load_model(tmp_path)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_recording_that_cannot_be_read_is_named_and_not_part_of_the_validation(
    training_data, trained_runs, tmp_path, caplog
):
    ensemble, (_, held_out) = load_ensemble(trained_runs[:1]), training_data.split(0)
    shutil.copytree(training_data.folder / "train_audio", tmp_path / "train_audio")
    data = replace(training_data, folder=tmp_path)
    broken = held_out["path"].iloc[0]
    (tmp_path / broken).write_bytes(b"<html>no audio</html>")
    others = held_out[held_out["path"] != broken]
    assert validate(ensemble, held_out, data) == validate(ensemble, others, data)
    assert [broken in message for message in caplog.messages] == [True]
    with pytest.raises(ValueError, match="none of 1 "):
        validate(ensemble, held_out[held_out["path"] == broken], data)


def test_an_output_that_is_not_finite_has_no_finite_loss(tiny_experiment):
    model = build_model(tiny_experiment, 3)
    torch.nn.init.constant_(model.head.detection.bias, torch.nan)
    loss = loss_of(model, torch.randn(2, 64_000), torch.zeros(2, 3), tiny_experiment)
    assert not loss.isfinite()


def test_the_learning_rate_rises_then_falls_to_nothing():
    config = OptimizerConfig(warmup_share=0.1)
    steps = [warmup_cosine(config, step, 100) for step in range(100)]
    assert steps[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(steps) == 1.0
    assert steps[10:] == sorted(steps[10:], reverse=True)
    assert steps[-1] < 0.001


def test_training_ends_early_when_it_no_longer_gets_better(
    training_data, tiny_experiment, tmp_path, monkeypatch
):
    scores = iter([0.3, 0.5, 0.4, 0.5, 0.9, 0.9])
    monkeypatch.setattr("birdcall.training.trainer.validate", lambda *_: {"macro_ap": next(scores)})
    experiment = with_train(tiny_experiment, epochs=6, validate_every=1, patience=2)
    train_run(Run(experiment, 0, tmp_path), training_data, OPTIONS)
    assert [entry.validation["macro_ap"] for entry in read_log(tmp_path)] == [*(0.3, 0.5, 0.4, 0.5)]


def test_without_a_class_to_score_no_training_ends_early_and_the_last_epochs_are_averaged(
    training_data, tiny_experiment, tmp_path, monkeypatch
):
    kept = []

    def score(ensemble, *_):
        weight = ensemble.members[0].model.head.detection.weight
        kept.append(weight.detach().clone())
        return {"macro_ap": float("nan")}

    monkeypatch.setattr("birdcall.training.trainer.validate", score)
    experiment = with_train(
        tiny_experiment, epochs=4, validate_every=1, patience=1, optimizer={"average_best": 2}
    )
    train_run(Run(experiment, 0, tmp_path), training_data, OPTIONS)
    assert len(read_log(tmp_path)) == 4
    model, _ = load_model(tmp_path)
    torch.testing.assert_close(model.head.detection.weight, (kept[2] + kept[3]) / 2)


def test_the_moving_average_is_saved(training_data, tiny_experiment, tmp_path):
    train_part, _ = training_data.split(0)
    experiment = with_train(tiny_experiment, epochs=1, optimizer={"ema_decay": 0.9})
    training = start_training(Run(experiment, 0, tmp_path), training_data, train_part, OPTIONS)
    history = []
    for _ in training.steps():
        history.append(training.model.head.detection.weight.detach().clone())
    expected = history[0]
    for n_steps, weight in enumerate(history[1:], start=1):
        expected = torch.lerp(expected, weight, 1 - min(0.9, (1 + n_steps) / (10 + n_steps)))
    torch.testing.assert_close(training.validated_model.head.detection.weight, expected)
    assert not torch.equal(expected, history[-1])


def test_the_best_epochs_are_averaged(training_data, tiny_experiment, tmp_path, monkeypatch):
    kept, scores = [], iter([0.2, 0.9, 0.5, 0.7, 0.66])

    def score(ensemble, *_):
        state = ensemble.members[0].model.state_dict()
        kept.append({name: value.clone() for name, value in state.items()})
        return {"macro_ap": next(scores)}

    monkeypatch.setattr("birdcall.training.trainer.validate", score)
    experiment = with_train(
        tiny_experiment, epochs=4, validate_every=1, optimizer={"average_best": 2}
    )
    checkpoint = train_run(Run(experiment, 0, tmp_path), training_data, OPTIONS)
    model, _ = load_model(tmp_path)
    assert checkpoint.score == {"macro_ap": 0.66}  # that of the mean, not of its best part
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (kept[1][name] + kept[3][name]) / 2)
    assert not (tmp_path / "best").exists()
