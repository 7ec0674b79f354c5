"""TensorBoard shows the clips that the network is trained on, from the first step."""

import io
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from birdcall.config import replace_nested
from birdcall.data.targets import IGNORE_TARGET
from birdcall.models.checkpoint import read_checkpoint
from birdcall.training import runs as run_module
from birdcall.training.log import describe_clip, plot_preview
from birdcall.training.runs import TrainingInterrupted, train_run
from birdcall.training.step import BatchPreview
from birdcall.training.trainer import Run, RunOptions, start_training

OPTIONS = RunOptions(workers=0)
CLIPS_TAG = "training clips"
CLASSES = ("amecro", "blujay", "norcar", "robin")


def images(folder):
    if not (folder / "tensorboard").exists():
        return {}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    if CLIPS_TAG not in events.Tags()["images"]:
        return {}
    return {
        one.step: np.asarray(Image.open(io.BytesIO(one.encoded_image_string)))
        for one in events.Images(CLIPS_TAG)
    }


class FakeBatch(NamedTuple):
    recordings: str
    target: tuple = ()


def with_train(experiment, **changes):
    return replace_nested(experiment, train=changes)


def test_a_clip_is_described_by_target_and_prediction():
    target = np.array([1.0, 0.4, IGNORE_TARGET, 0.0])
    text = describe_clip(target, np.array([0.1, 0.7, 0.2, 0.05]), CLASSES)
    assert text.splitlines() == [
        "true: amecro, blujay 0.4, norcar?",
        "predicted: blujay 0.70, norcar 0.20, amecro 0.10",
    ]
    nothing = describe_clip(np.zeros(4), np.zeros(4), CLASSES)
    assert nothing.startswith("true: no bird\npredicted: amecro 0.00")
    classes = [f"bird{index}" for index in range(222)]
    soft = describe_clip(np.linspace(0.001, 0.5, 222), np.zeros(222), classes)
    first, *_, last = soft.splitlines()[0].split(", ")
    assert (first, last) == ("true: bird221 0.5", "218 more")


def test_the_epochs_that_are_drawn_become_rarer(training_data, tiny_experiment, tmp_path):
    """Of each epoch's first two batches; only the loss that previews are asked of is replaced."""
    experiment = with_train(tiny_experiment, epochs=40, validate_every=100)
    train_part, held_out = training_data.split(0)
    training = start_training(Run(experiment, 0, tmp_path), training_data, train_part, OPTIONS)
    weight = next(training.model.parameters())
    shown = []
    training.show_preview = lambda epoch, preview: shown.append((epoch, preview))

    def loss(batch, epoch, position, preview):
        if preview is not None:
            preview((batch, position))
        return 0 * weight.sum()

    training.batch_loss = loss
    for epoch in range(39):
        for batch in ("first", "second"):
            training.step([FakeBatch(batch)])
        assert training.end_epoch(held_out).epoch == epoch + 1
    assert [epoch for epoch, _ in shown] == [1, 2, 4, 8, 16, 32]
    assert {(batch.recordings, position) for _, (batch, position) in shown} == {("first", 0)}


def test_a_masked_band_is_visible():
    """What SpecAugment hides is one colour in the picture of that clip, and of no other."""
    generator = torch.Generator().manual_seed(0)
    log_mel = torch.rand(2, 1, 200, 40, generator=generator)
    log_mel[0, :, 50:150] = 0
    preview = BatchPreview(log_mel, torch.zeros(2, 4), torch.zeros(2, 4), ("a$b$", "b"))
    picture = plot_preview(preview, CLASSES)
    height, width = picture.shape[:2]
    left, right = picture[height // 2, : width // 4], picture[height // 2, width // 4 : width // 2]
    darkest = (left.astype(int).sum(axis=1) < 30).mean()
    assert darkest > 0.3
    assert (right.astype(int).sum(axis=1) < 30).mean() < 0.15


@pytest.fixture(scope="module")
def drawn(training_data, tiny_experiment, tmp_path_factory):
    """A run that was stopped after its first step and resumed, and its pictures at both times."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("drawn")
    run = Run(tiny_experiment, 0, folder)
    with pytest.raises(TrainingInterrupted):
        train_run(run, training_data, RunOptions(workers=0, deadline=0.0))
    before = images(folder)
    train_run(run, training_data, RunOptions(workers=0, resume=True))
    return folder, before, images(folder)


def test_the_first_step_is_drawn_at_once(drawn):
    """Stopped after its first step, a training has left a picture; resumed, one more."""
    _, before, found = drawn
    assert list(before) == [1]
    assert list(found) == [1, 2]
    assert all(one.shape[0] > 150 and one.shape[1] > 1000 for one in found.values())


def test_what_is_drawn_is_what_the_network_was_given(
    training_data, tiny_experiment, tmp_path, monkeypatch
):
    given, drawn = [], []
    monkeypatch.setattr(
        run_module,
        "plot_preview",
        lambda preview, classes: drawn.append(preview) or np.zeros((8, 8, 3), np.uint8),
    )
    from birdcall.models.sed import SEDModel

    detect = SEDModel.detect

    def record(model, log_mel):
        if model.training:
            given.append(log_mel.detach().clone())
        return detect(model, log_mel)

    monkeypatch.setattr(SEDModel, "detect", record)
    train_run(
        Run(with_train(tiny_experiment, epochs=1), 0, tmp_path),
        training_data,
        RunOptions(workers=0),
    )
    assert len(drawn) == 1
    assert torch.equal(drawn[0].log_mel, given[0][:8].float())
    assert drawn[0].target.shape[1] == drawn[0].clipwise.shape[1] == len(training_data.classes)
    assert ((drawn[0].clipwise >= 0) & (drawn[0].clipwise <= 1)).all()


def test_drawing_changes_no_weight(training_data, tiny_experiment, drawn, tmp_path):
    folder, _, found = drawn
    assert found
    train_part, held_out = training_data.split(0)
    run = Run(tiny_experiment, 0, tmp_path)
    training = start_training(run, training_data, train_part, OPTIONS)
    while not training.is_finished:
        for _ in training.steps():
            pass
        training.end_epoch(held_out)
    checkpoint = training.finish(held_out)
    assert not images(tmp_path)
    assert checkpoint.weights_sha256 == read_checkpoint(folder).weights_sha256
