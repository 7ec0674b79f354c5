"""Training learns, repeats itself, and leaves a checkpoint that inference can use."""

import csv
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from birdcall.checkpoint import load_model
from birdcall.config import NO_AUGMENT, TrainConfig
from birdcall.models import build_model
from birdcall.training import load_backbone, train_run, train_runs, training_step


def test_a_model_can_learn_one_batch_by_heart(tiny_experiment):
    torch.manual_seed(0)
    experiment = replace(tiny_experiment, augment=NO_AUGMENT)
    model = build_model(experiment, 3).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    waveform = 0.1 * torch.randn(6, 32_000)
    target = torch.eye(3).repeat(2, 1)
    generator = torch.Generator().manual_seed(0)
    losses = [
        training_step(model, waveform, target, experiment, optimizer, generator) for _ in range(80)
    ]
    assert losses[-1] < 0.1 * losses[0]


def test_a_run_leaves_a_checkpoint_with_all_that_is_known(training_data, tiny_experiment, tmp_path):
    checkpoint = train_run(tiny_experiment, 0, training_data, tmp_path, workers=0)
    model, read = load_model(tmp_path)
    assert read == checkpoint
    assert read.classes == training_data.classes
    assert read.experiment == tiny_experiment
    assert 0 <= read.score["macro_ap"] <= 1
    assert not model.training
    with (tmp_path / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert float(log[-1]["macro_ap"]) == read.score["macro_ap"]


def test_two_runs_of_one_seed_have_the_same_weights(training_data, tiny_experiment, tmp_path):
    digests = {
        train_run(
            tiny_experiment, 1, training_data, tmp_path / name, workers=workers
        ).weights_sha256
        for name, workers in (("a", 0), ("b", 0), ("c", 2))
    }
    assert len(digests) == 1


def test_another_seed_has_other_weights(training_data, tiny_experiment, tmp_path):
    other = replace(tiny_experiment, train=replace(tiny_experiment.train, seed=9))
    first = train_run(tiny_experiment, 1, training_data, tmp_path / "a", workers=0)
    second = train_run(other, 1, training_data, tmp_path / "b", workers=0)
    assert first.weights_sha256 != second.weights_sha256


def test_a_trained_run_is_not_overwritten_unasked(training_data, tiny_experiment, tmp_path):
    train_runs([tiny_experiment], training_data, 0, tmp_path, workers=0)
    with pytest.raises(ValueError, match="holds a trained run already; --overwrite"):
        train_runs([tiny_experiment], training_data, None, tmp_path, workers=0)
    assert not (tmp_path / "tiny" / "fold1").exists()
    train_runs([tiny_experiment], training_data, 0, tmp_path, workers=0, overwrite=True)


def test_runs_trained_at_once_have_the_weights_of_runs_trained_in_turn(
    training_data, tiny_experiment, tmp_path
):
    def digests(folder, jobs):
        made = train_runs([tiny_experiment], training_data, None, folder, workers=0, jobs=jobs)
        return [(one.fold, one.weights_sha256) for one in made]

    assert digests(tmp_path / "a", 1) == digests(tmp_path / "b", 2)


def test_a_fold_out_of_range_is_refused_before_anything_is_trained(
    training_data, tiny_experiment, tmp_path
):
    with pytest.raises(ValueError, match=r"fold 5 is out of range; the folds are 0, 1"):
        train_runs([tiny_experiment], training_data, 5, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_not_finite_stops_the_run(tiny_experiment):
    model = build_model(tiny_experiment, 3)
    torch.nn.init.constant_(model.head.detection.bias, torch.nan)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="output is not finite"):
        training_step(
            model,
            torch.randn(2, 32_000),
            torch.zeros(2, 3),
            tiny_experiment,
            optimizer,
            torch.Generator(),
        )


def test_the_learning_rate_rises_then_falls_to_nothing():
    from birdcall.training import _warmup_cosine

    factor = _warmup_cosine(TrainConfig(warmup_share=0.1), 100)
    steps = [factor(step) for step in range(100)]
    assert steps[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(steps) == 1.0
    assert steps[10:] == sorted(steps[10:], reverse=True)
    assert steps[-1] < 0.001


def test_three_channel_weights_are_summed_for_a_one_channel_input(tiny_experiment, tmp_path):
    import timm

    source = timm.create_model("test_byobnet", pretrained=False, in_chans=3)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        model = build_model(tiny_experiment, 3)
        load_backbone(model, tmp_path / name)
        own, theirs = model.backbone.state_dict(), source.state_dict()
        first = next(key for key in own if own[key].shape != theirs[key].shape)
        torch.testing.assert_close(own[first], theirs[first].sum(1, keepdim=True))
        rest = [key for key in own if key != first]
        assert all(torch.equal(own[key], theirs[key]) for key in rest)


def test_weights_of_another_architecture_list_what_differs(tiny_experiment, tmp_path):
    import timm

    source = timm.create_model("test_resnet", pretrained=False)
    save_file(source.state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"resnet\.safetensors: weights of another architecture.*"):
        load_backbone(build_model(tiny_experiment, 3), tmp_path / "resnet.safetensors")


def test_pretrained_weights_that_cannot_be_fetched_ask_for_init(
    training_data, tiny_experiment, tmp_path, monkeypatch
):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    experiment = replace(
        tiny_experiment,
        model=replace(tiny_experiment.model, backbone="test_resnet", pretrained=True),
    )
    with pytest.raises(ValueError, match=r"pretrained weights of test_resnet.*--init FILE"):
        train_run(experiment, 0, training_data, tmp_path, workers=0)
