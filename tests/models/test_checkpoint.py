"""A checkpoint brings back the model, and is refused when it is not what it says."""

import json

import pytest
import torch

from birdcall.models.checkpoint import (
    Checkpoint,
    find_checkpoints,
    load_model,
    read_checkpoint,
    require_same_classes,
    save_checkpoint,
)
from birdcall.models.sed import build_model

CLASSES = ("amecro", "bkcchi", "norcar")


@pytest.fixture
def saved(tmp_path, tiny_experiment):
    torch.manual_seed(3)
    model = build_model(tiny_experiment, len(CLASSES)).eval()
    checkpoint = Checkpoint(tiny_experiment, CLASSES, 1, {"macro_ap": 0.5})
    save_checkpoint(tmp_path / "run", model, checkpoint)
    return model, checkpoint, tmp_path / "run"


def test_a_loaded_model_says_the_same(saved):
    model, checkpoint, folder = saved
    loaded, read = load_model(folder)
    waveform = torch.randn(2, 64_000)
    with torch.no_grad():
        assert torch.equal(model(waveform).framewise, loaded(waveform).framewise)
    assert read.experiment == checkpoint.experiment
    assert (read.classes, read.fold, read.score) == (CLASSES, 1, {"macro_ap": 0.5})
    assert read.name == "tiny-fold1"
    assert not loaded.training


def test_damaged_weights_are_refused(saved):
    path = saved[2] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: its sha256 differs"):
        load_model(saved[2])


def test_missing_weights_are_named(saved):
    (saved[2] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(saved[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: settings.pop("classes"),
        lambda settings: settings["experiment"]["model"].update(temporal="lstm"),
        lambda settings: settings.update(optimizer="adam"),
    ],
)
def test_settings_that_cannot_be_read_name_their_file(saved, change):
    path = saved[2] / "model.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"model\.json: not a readable checkpoint"):
        read_checkpoint(saved[2])


def test_a_checkpoint_of_other_classes_is_refused_with_the_difference(saved):
    with pytest.raises(ValueError, match=r"3 instead of 3.*checkpoint: norcar.*data: moudov"):
        require_same_classes(saved[2], saved[1], ("amecro", "bkcchi", "moudov"))
    require_same_classes(saved[2], saved[1], CLASSES)


def test_classes_in_another_order_are_other_classes(saved):
    with pytest.raises(ValueError, match="other classes"):
        require_same_classes(saved[2], saved[1], CLASSES[::-1])


def test_checkpoints_are_listed_in_order_of_name(tmp_path, saved):
    model, checkpoint, folder = saved
    save_checkpoint(tmp_path / "a" / "fold0", model, checkpoint)
    assert find_checkpoints(tmp_path) == [tmp_path / "a" / "fold0", folder]
