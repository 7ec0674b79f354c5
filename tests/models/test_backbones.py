"""Our CNN14 and ResNet38 are those of PANNs, and our BirdNET is BirdNET's: names, sums, size."""

import numpy as np
import pytest
import torch
from helpers import (
    BIRDNET_STAGES,
    CNN14_NAMES,
    birdnet_weights,
    needs_birdnet,
    resnet38_names,
)
from torch import nn
from torch.nn import functional

from birdcall.config import Experiment, ModelConfig
from birdcall.data.birdnet import open_birdnet, read_network
from birdcall.models import backbones
from birdcall.models.backbones import PANNS, BirdNETBackbone, Cnn14, ResNet38, birdnet_state
from birdcall.models.sed import build_model

# What the paper's table of parameters counts besides the backbone: the norm of 64 mel bins, a dense
# layer of 2048, and one to AudioSet's 527 classes.
REST = 2 * 64 + (2048 * 2048 + 2048) + (2048 * 527 + 527)


def randomised(network):
    """The network in evaluation mode, with norms as they are after a training."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.running_var):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
            for values in (module.bias.data, module.running_mean):
                values.copy_(torch.randn(values.shape, generator=generator) * 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def cnn14():
    torch.manual_seed(0)
    return randomised(Cnn14())


@pytest.fixture(scope="module")
def resnet38():
    torch.manual_seed(0)
    return randomised(ResNet38())


def shapes_of(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def test_cnn14_has_the_names_and_shapes_of_the_published_files(cnn14):
    assert shapes_of(cnn14) == CNN14_NAMES


def test_resnet38_has_the_names_and_shapes_of_the_published_files(resnet38):
    assert shapes_of(resnet38) == resnet38_names()


@pytest.mark.parametrize(("name", "published"), [("cnn14", 80_753_615), ("resnet38", 73_783_247)])
def test_with_panns_dense_layers_the_parameters_are_as_many_as_published(name, published, request):
    network = request.getfixturevalue(name)
    assert sum(parameter.numel() for parameter in network.parameters()) + REST == published


def apply_block(image, state, name):
    """Two convolutions as PANNs' `ConvBlock` has them, from its weights alone."""
    for number in (1, 2):
        image = functional.conv2d(image, state[f"{name}.conv{number}.weight"], padding=1)
        image = apply_norm(image, state, f"{name}.bn{number}").relu()
    return image


def apply_norm(image, state, name):
    values = (state[f"{name}.{what}"] for what in ("running_mean", "running_var", "weight", "bias"))
    return functional.batch_norm(image, *values)


def apply_residual(image, state, name, stride):
    hidden = functional.avg_pool2d(image, 2) if stride == 2 else image
    hidden = functional.conv2d(hidden, state[f"{name}.conv1.weight"], padding=1)
    hidden = apply_norm(hidden, state, f"{name}.bn1").relu()
    hidden = functional.conv2d(hidden, state[f"{name}.conv2.weight"], padding=1)
    hidden = apply_norm(hidden, state, f"{name}.bn2")
    if f"{name}.downsample.1.weight" in state:
        image = functional.conv2d(
            functional.avg_pool2d(image, 2), state[f"{name}.downsample.1.weight"]
        )
        image = apply_norm(image, state, f"{name}.downsample.2")
    return (hidden + image).relu()


def test_cnn14_sums_as_panns_does(cnn14):
    state, image = cnn14.state_dict(), torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected = image
        for number in range(1, 7):
            expected = apply_block(expected, state, f"conv_block{number}")
            if number < 6:
                expected = functional.avg_pool2d(expected, 2)
        features = cnn14.forward_features(image)
    assert features.shape == (1, 2048, 2, 2)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_resnet38_sums_as_panns_does(resnet38):
    state, image = resnet38.state_dict(), torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected = functional.avg_pool2d(apply_block(image, state, "conv_block1"), 2)
        for layer, depth in ((1, 3), (2, 4), (3, 6), (4, 3)):
            for number in range(depth):
                stride = 2 if layer > 1 and number == 0 else 1
                name = f"resnet.layer{layer}.{number}"
                expected = apply_residual(expected, state, name, stride)
        expected = apply_block(functional.avg_pool2d(expected, 2), state, "conv_block_after1")
        features = resnet38.forward_features(image)
    assert features.shape == (1, 2048, 2, 2)
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["cnn14", "resnet38"])
@pytest.mark.parametrize(("n_frames", "expected"), [(1, 1), (32, 1), (33, 2), (101, 4), (320, 10)])
def test_a_frame_comes_out_for_every_32_that_are_begun(name, n_frames, expected, request):
    with torch.no_grad():
        image = torch.zeros(1, 1, n_frames, 32)
        features = request.getfixturevalue(name).forward_features(image)
    assert features.shape == (1, 2048, expected, 1)


def test_the_last_frames_of_an_odd_length_have_an_effect(resnet38):
    image = torch.randn(1, 1, 65, 32)
    louder = image.clone()
    louder[:, :, -1] += 5
    with torch.no_grad():
        before, after = resnet38.forward_features(image), resnet38.forward_features(louder)
    assert not torch.allclose(before[:, :, -1], after[:, :, -1], atol=1e-3)


@pytest.mark.parametrize("name", ["cnn14", "resnet38"])
def test_dropout_is_on_while_training_only(name, request):
    network, image = request.getfixturevalue(name), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        still = network.forward_features(image)
        assert torch.equal(still, network.forward_features(image))
        network.training = True  # norms as in evaluation, so that nothing but dropout differs
        first = network.forward_features(image)
        network.training = False
        assert not torch.equal(first, still)
        dropped = (first == 0).float().mean() - (still == 0).float().mean()
    assert dropped > 0.05


@pytest.mark.parametrize("name", PANNS)
def test_images_may_have_several_channels(name):
    with torch.device("meta"):
        network = PANNS[name](in_chans=3)
        features = network.forward_features(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, network.num_features, 2, 2)


# --- BirdNET --------------------------------------------------------------------------------------


def apply_birdnet(weights, image):
    """BirdNET's features (1, 1024, 1, frames) of (1, 2, mels, frames), from its weights alone."""

    def find(layer, n_dims):
        names = [name for name in weights if name.startswith(f"model/{layer}/")]
        (value,) = [weights[name] for name in names if weights[name].ndim == n_dims]
        return torch.from_numpy(value)

    def norm(image, name):
        scale, offset = (
            torch.from_numpy(weights[f"model/BNORM_{name}_NOQUANT/FusedBatchNormV3{number}"])
            for number in ("1", "")
        )
        return image * scale[:, None, None] + offset[:, None, None]

    def convolve(image, layer, bias=None, **options):
        return functional.conv2d(image, find(layer, 4).permute(0, 3, 1, 2), bias, **options)

    image = functional.pad(norm(image, "SPEC"), (3, 3, 1, 1))
    image = convolve(image, "CONV_0", find("BNORM_0", 1), stride=2).relu()
    image = torch.cat(
        (functional.max_pool2d(image, (1, 2)), functional.avg_pool2d(image, (1, 2))), dim=1
    )
    image = convolve(image, "POOL_0_CONV", find("POOL_0_CONV", 1))
    for stage, (depth, _, width, squeezed) in enumerate(BIRDNET_STAGES, start=1):
        for number in range(1, depth + 1):
            block = f"BLOCK_{stage}-{number}"
            hidden = functional.silu(convolve(image, f"{block}_CONV_1", find(f"{block}_BN_1", 1)))
            kernel, bias = find(f"{block}_BN_2", 4).permute(3, 0, 1, 2), find(f"{block}_BN_2", 1)
            stride = 2 if number == 1 else 1
            hidden = functional.conv2d(hidden, kernel, bias, stride, padding=1, groups=width)
            hidden = functional.silu(hidden)
            if squeezed:
                mean = hidden.mean(dim=(2, 3), keepdim=True)
                squeeze = functional.silu(convolve(mean, f"{block}_SE_CONV_1"))
                hidden = hidden * torch.sigmoid(convolve(squeeze, f"{block}_SE_CONV_2"))
            hidden = convolve(hidden, f"{block}_CONV_3")
            image = hidden if number == 1 else image + hidden
    return convolve(norm(image, "POST").relu(), "POST_CONV_1", find("POST_BN_1", 1)).relu()


@pytest.fixture(scope="module")
def birdnet():
    network = BirdNETBackbone()
    network.load_state_dict(birdnet_state(birdnet_weights()))
    return network.eval()


def test_birdnet_sums_as_its_weights_say(birdnet):
    weights = birdnet_weights()
    decibels = 20 * torch.randn(1, 2, 512, 96, generator=torch.Generator().manual_seed(0)) - 40
    powers = torch.tensor([0.23, 0.19])[:, None, None]
    image = (10 ** (decibels / 10)).pow(powers).flip(3).transpose(2, 3)
    with torch.no_grad():
        expected = apply_birdnet(weights, image)  # without the frames at both ends
        features = birdnet.forward_features(decibels)
    assert expected.shape == (1, 1024, 1, 6) and expected.std() > 0.05
    assert features.shape == (1, 1024, 8, 1)
    torch.testing.assert_close(
        features[:, :, 1:-1, 0], expected[:, :, 0], rtol=1e-3, atol=1e-4 * float(expected.max())
    )


@pytest.mark.parametrize(("n_frames", "expected"), [(1, 1), (64, 1), (65, 2), (512, 8), (513, 9)])
def test_birdnet_gives_a_frame_for_every_64_that_are_begun(birdnet, n_frames, expected):
    with torch.no_grad():
        assert birdnet.forward_features(torch.zeros(1, 2, n_frames, 96)).shape[2] == expected


def test_the_image_is_mirrored_where_birdnets_last_frame_is_not_full(birdnet):
    image = 20 * torch.randn(1, 2, 128, 96) - 40
    mirrored = torch.cat((image[:, :, :100], image[:, :, 71:99].flip(2)), dim=2)
    with torch.no_grad():
        features = birdnet.forward_features(image[:, :, :100])
        assert torch.equal(features, birdnet.forward_features(mirrored))
        assert not torch.allclose(features, birdnet.forward_features(image))


def test_birdnet_refuses_images_of_another_front_end():
    with pytest.raises(ValueError, match="birdnet_low and birdnet_high"):
        build_model(Experiment("odd", "", model=ModelConfig(backbone="birdnet")), 3)


def test_the_stages_of_birdnet_can_be_frozen_one_by_one():
    trained = []
    for n_stages in range(7):
        network = BirdNETBackbone()
        backbones.freeze_stages(network, "birdnet", n_stages)
        names = [name for name, value in network.named_parameters() if value.requires_grad]
        trained.append(dict.fromkeys(name.split(".", 2)[0] for name in names))
    assert list(trained[0]) == ["stem", "stem_pool", "blocks", "post"]
    assert list(trained[1]) == list(trained[4]) == ["blocks", "post"]
    assert (list(trained[5]), list(trained[6])) == (["post"], [])


@needs_birdnet
def test_birdnets_embeddings_are_those_of_its_own_program(monkeypatch):
    network = BirdNETBackbone()
    weights, _ = read_network()
    network.load_state_dict(birdnet_state(weights))
    network.eval()
    seconds = np.arange(3 * 48_000) / 48_000
    generator = np.random.default_rng(0)
    song = np.sin(2 * np.pi * (3000 + 800 * np.sin(20 * seconds)) * seconds) * (seconds % 1 < 0.4)
    window = (0.5 * song + 0.05 * generator.standard_normal(len(seconds))).astype(np.float32)
    (embedding,) = open_birdnet().run(window[None])[1]
    scaled = 2 * (window - window.min()) / (np.ptp(window) + 1e-6) - 1
    images = []
    for number, hop in ((1, 278), (2, 280)):  # its own program, in NumPy
        hann = weights[f"model/MEL_SPEC{number}/stft/hann_window/sub_2"]
        frames = np.lib.stride_tricks.sliding_window_view(scaled, len(hann))[::hop]
        spectrum = np.fft.rfft(frames * hann).real
        images.append((spectrum @ weights[f"model/MEL_SPEC{number}/Tensordot/MatMul"].T) ** 2)
    decibels = torch.from_numpy(10 * np.log10(np.maximum(images, 1e-15))).float()[None]
    monkeypatch.setattr(backbones, "_BIRDNET_STRIDE", 1)  # 511 frames, not 512
    with torch.no_grad():
        features = network.forward_features(decibels)[0, :, 1:-1, 0].mean(dim=1)
    np.testing.assert_allclose(features.numpy(), embedding, atol=1e-3 * embedding.max())
