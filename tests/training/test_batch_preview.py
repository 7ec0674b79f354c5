"""TensorBoard shows the clips that the network hears, from the first step on."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from birdcall.config import replace_nested
from birdcall.data.targets import IGNORE_TARGET
from birdcall.models.checkpoint import read_checkpoint
from birdcall.training import runs as run_module
from birdcall.training.log import (
    CLIPS_TAG,
    BatchPreview,
    TrainingInterrupted,
    describe_clip,
    is_previewed,
    plot_batch_preview,
)
from birdcall.training.runs import train_run
from birdcall.training.trainer import Run

CLASSES = ("amecro", "blujay", "norcar", "robin")


def images(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    if CLIPS_TAG not in events.Tags()["images"]:
        return {}
    return {
        one.step: np.asarray(Image.open(io.BytesIO(one.encoded_image_string)))
        for one in events.Images(CLIPS_TAG)
    }


def with_train(experiment, **changes):
    return replace_nested(experiment, train=changes)


def test_a_clip_is_described_by_target_and_prediction():
    target = np.array([1.0, 0.4, IGNORE_TARGET, 0.0])
    text = describe_clip(target, np.array([0.1, 0.7, 0.2, 0.05]), CLASSES)
    assert text == "is amecro, blujay 0.4, norcar?\nsaid blujay 0.70, norcar 0.20, amecro 0.10"
    nothing = describe_clip(np.zeros(4), np.zeros(4), CLASSES)
    assert nothing.startswith("is no bird\nsaid amecro 0.00")


def test_the_epochs_that_are_drawn_become_rarer():
    assert [epoch + 1 for epoch in range(40) if is_previewed(epoch)] == [1, 2, 4, 8, 16, 32]


def test_a_masked_band_is_seen():
    """What SpecAugment hides is one colour in the picture of that clip, and of no other."""
    generator = torch.Generator().manual_seed(0)
    log_mel = torch.rand(2, 1, 200, 40, generator=generator)
    log_mel[0, :, 50:150] = 0
    preview = BatchPreview(log_mel, torch.zeros(2, 4), torch.zeros(2, 4), ("a$b$", "b"))
    picture = plot_batch_preview(preview, CLASSES)
    height, width = picture.shape[:2]
    left, right = picture[height // 2, : width // 4], picture[height // 2, width // 4 : width // 2]
    darkest = (left.astype(int).sum(axis=1) < 30).mean()
    assert darkest > 0.3
    assert (right.astype(int).sum(axis=1) < 30).mean() < 0.15


def test_the_first_step_is_drawn_before_the_training_goes_on(
    training_data, tiny_experiment, tmp_path
):
    """Stopped after its first step, a training has left a picture; resumed, one more."""
    run = Run(tiny_experiment, 0, tmp_path)
    with pytest.raises(TrainingInterrupted):
        train_run(run, training_data, workers=0, deadline=0.0)
    assert list(images(tmp_path)) == [1]
    train_run(run, training_data, workers=0, resume=True)
    found = images(tmp_path)
    assert list(found) == [1, 2]
    assert all(one.shape[0] > 150 and one.shape[1] > 1000 for one in found.values())


def test_what_is_drawn_is_what_the_network_was_given(
    training_data, tiny_experiment, tmp_path, monkeypatch
):
    heard, drawn = [], []
    monkeypatch.setattr(
        run_module,
        "draw_clips",
        lambda preview, classes: drawn.append(preview) or np.zeros((8, 8, 3), np.uint8),
    )
    from birdcall.models.sed import SEDModel

    detect = SEDModel.detect

    def listen(model, log_mel):
        if model.training:
            heard.append(log_mel.detach().clone())
        return detect(model, log_mel)

    monkeypatch.setattr(SEDModel, "detect", listen)
    train_run(Run(with_train(tiny_experiment, epochs=1), 0, tmp_path), training_data, workers=0)
    assert len(drawn) == 1
    assert torch.equal(drawn[0].log_mel, heard[0][:8].float())
    assert drawn[0].target.shape[1] == drawn[0].clipwise.shape[1] == len(training_data.classes)
    assert ((drawn[0].clipwise >= 0) & (drawn[0].clipwise <= 1)).all()


def test_drawing_changes_no_weight(training_data, tiny_experiment, tmp_path, monkeypatch):
    train_run(Run(tiny_experiment, 0, tmp_path / "a"), training_data, workers=0)
    monkeypatch.setattr("birdcall.training.trainer.Training._watch_at", lambda *_: None)
    train_run(Run(tiny_experiment, 0, tmp_path / "b"), training_data, workers=0)
    assert not images(tmp_path / "b")
    one, other = (read_checkpoint(tmp_path / name).weights_sha256 for name in "ab")
    assert one == other
