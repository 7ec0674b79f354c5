"""Our CNN14 and ResNet38 are those of PANNs: the names in their files, their sums, their size."""

import pytest
import torch
from helpers import CNN14_NAMES, resnet38_names
from torch import nn
from torch.nn import functional

from birdcall.models.backbones import PANNS, Cnn14, ResNet38

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
