"""Receptive fields are those that can be worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from birdcall.experiments import find_experiment
from birdcall.models.backbones import Cnn14
from birdcall.models.sed import build_model
from birdcall.models.summary import (
    describe_model,
    experiments_table,
    measure_field,
    measure_frame_times,
    shortest_interval,
)


class Backbone(nn.Module):
    """Layers with the method that all backbones have."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward_features(self, image):
        return self.layers(image)


def box(size, **options):
    """A convolution that sums ``size`` x ``size`` points."""
    layer = nn.Conv2d(1, 1, size, bias=False, **options)
    nn.init.ones_(layer.weight)
    return layer


def test_of_single_points_the_field_is_one_point():
    field = measure_field(Backbone(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)), 2, 16, 64)
    assert field == (1, 1, 1, 1)


def test_the_field_of_one_convolution_is_its_kernel():
    field = measure_field(Backbone(box(11, padding=5)), 1, 32, 64)
    assert field == (1, 11, 11, 11)  # ten of eleven equal parts are less than 95 %


def test_fields_of_stacked_convolutions_are_their_kernels_convolved():
    n_layers = 12
    field = measure_field(Backbone(*(box(3, padding=1) for _ in range(n_layers))), 1, 64, 64)
    gradient = np.ones(1)
    for _ in range(n_layers):
        gradient = np.convolve(gradient, np.ones(3))
    energy = gradient**2 / (gradient**2).sum()
    centre = len(energy) // 2
    widths = [energy[centre - k : centre + k + 1].sum() for k in range(centre + 1)]
    expected = 2 * next(k for k, share in enumerate(widths) if share >= 0.95) + 1
    assert field == (1, expected, expected, 2 * n_layers + 1)
    assert expected < 2 * n_layers + 1


def test_strides_multiply_and_widen_what_follows():
    layers = [box(3, stride=2, padding=1), nn.AvgPool2d(2), box(3, padding=1)]
    field = measure_field(Backbone(*layers), 1, 64, 128)
    assert field.stride == 4
    assert field.reach == 1 + 2 + 2 + 8  # kernel less one, times the stride so far: 1, 2 and 4


def test_a_layer_that_depends_on_the_whole_clip_has_no_reach_but_a_narrow_field():
    class Squeeze(nn.Module):
        def forward(self, image):
            return image * torch.sigmoid(0.01 * image.mean(dim=(2, 3), keepdim=True))

    field = measure_field(Backbone(box(5, padding=2), Squeeze()), 1, 32, 64)
    assert field.reach is None
    assert field.frames == 5


def test_a_residual_branch_that_starts_closed_counts():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(()))
            self.branch = box(9, padding=4)

        def forward(self, image):
            return image + self.gain * self.branch(image)

    assert measure_field(Backbone(Residual()), 1, 32, 64).reach == 9


def test_cnn14_reaches_as_far_as_its_kernels_say():
    # Two kernels of 3 and a pooling of 2 in each block, at strides 1 to 16, then two at 32.
    expected = 1 + sum(2 * 2 * stride + stride for stride in (1, 2, 4, 8, 16)) + 2 * 2 * 32
    # An eighth of the channels: the same field, sixty times faster.
    backbone = Cnn14(widths=(8, 16, 32, 64, 128, 256))
    field = measure_field(backbone, 1, 64, 512)
    assert field.stride == 32
    assert field.reach == expected == 284
    assert 32 < field.frames < expected


def test_a_stride_is_measured_whatever_the_ends_of_the_image_lose():
    assert measure_field(Backbone(box(7, stride=4)), 1, 16, 96).stride == 4


@pytest.mark.parametrize(
    ("energy", "expected"), [([0, 0, 5, 0], 1), ([1, 1, 1, 1], 4), ([0.04, 1, 0, 1, 0.04], 3)]
)
def test_the_shortest_interval_that_holds_most_of_the_energy(energy, expected):
    assert shortest_interval(torch.tensor(energy)) == expected


def test_a_summary_counts_weights_and_turns_frames_into_seconds(tiny_experiment):
    summary = describe_model(tiny_experiment, 7)
    model = build_model(tiny_experiment, 7)
    assert summary.n_parameters == sum(p.numel() for p in model.parameters())
    frame_seconds = 1000 / 32_000
    assert summary.stride_seconds == pytest.approx(summary.stride_frames * frame_seconds)
    assert summary.field_seconds == pytest.approx(summary.field_frames * frame_seconds)
    frames = model(torch.zeros(1, 320_000)).framewise.shape[-1]
    assert summary.stride_frames == pytest.approx(321 / frames, rel=0.1)


def test_measuring_does_not_move_torchs_random_numbers_and_is_repeatable(tiny_experiment):
    wider = replace(tiny_experiment, frontend=replace(tiny_experiment.frontend, n_mels=40))
    torch.manual_seed(3)
    first = describe_model(wider, 7)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert describe_model(wider, 7) == first


def test_the_table_has_a_row_for_each_experiment_in_the_order_asked_for():
    names = ["small_gru", "lite0_plain"]
    table = experiments_table(names)
    assert list(table["experiment"]) == names
    assert list(table["description"]) == [find_experiment(name).description for name in names]
    assert table["parameters_m"].tolist() == [1.4, 3.8]
    assert (table["stride_frames"] == 32).all()
    assert table["field_frames"].is_monotonic_increasing  # kernels of 5 have a wider field


# --- the times of frames ---


class SamePaddedConv(nn.Conv2d):
    """Pads as TensorFlow does: an odd number of points is one more at the end."""

    def forward(self, image):
        sides = []
        for size, kernel, stride in zip(
            reversed(image.shape[2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            strict=True,
        ):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return super().forward(nn.functional.pad(image, sides))


def model_with(backbone, tiny_experiment):
    """The tiny model with another backbone, of one channel; its frames are 31.25 ms apart."""
    model = build_model(tiny_experiment, 3).eval()
    model.backbone = backbone
    return model


def same_padded(kernel_size, halvings=5):
    layers = [SamePaddedConv(1, 1, kernel_size, 2, bias=False) for _ in range(halvings)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    return Backbone(*layers)


@pytest.mark.parametrize(("kernel_size", "n_frames"), [(3, 161), (3, 160), (3, 150), (5, 481)])
def test_frames_are_centred_where_strides_and_paddings_say(kernel_size, n_frames, tiny_experiment):
    centre, stride, size = 0, 1, n_frames
    for _ in range(5):
        size_after = -(-size // 2)
        padding = (size_after - 1) * 2 + kernel_size - size
        centre += stride * ((kernel_size - 1) / 2 - padding // 2)
        stride, size = 2 * stride, size_after
    times = measure_frame_times(model_with(same_padded(kernel_size), tiny_experiment), n_frames)
    assert times.step == pytest.approx(32 / 32)  # 32 frames of 1000 samples
    assert times.start == pytest.approx(centre / 32, abs=0.02)


class Shortcut(nn.Module):
    """A ResNet-D block of stride 32: a mean of all frames beside a filter on the first of them."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, image):
        n_frames = image.shape[2] // 32 * 32
        mean = nn.functional.avg_pool2d(image[:, :, :n_frames], (32, 8))
        first = nn.functional.avg_pool2d(image[:, :, :n_frames:32], (1, 8))
        return (1 - self.share) * mean + self.share * first


def test_the_weights_decide_between_two_paths_of_different_times(tiny_experiment):
    for share in (0.0, 0.25, 1.0):
        model = model_with(Backbone(Shortcut(share)), tiny_experiment)
        start = measure_frame_times(model, 161).start * 32
        assert start == pytest.approx((1 - share) * 15.5, abs=0.6)


def pulse_centres(model, n_frames):
    """Return an output frame, and where pulses in the input change it and the next one most.

    The pulses are moved through an image of noise. An average of their positions, weighted by what
    they change, in input frames.
    """
    generator = torch.Generator().manual_seed(5)
    n_samples = (n_frames - 1) * model.frontend.config.hop_length
    with torch.inference_mode():
        image = model.frontend(0.01 * torch.randn(4, n_samples, generator=generator))
        before = model.extract(image)
        first = before.shape[2] // 2 - 1
        positions = torch.arange(32 * (first - 3), 32 * (first + 6), 3)
        changes = []
        for position in positions:
            pulsed = image.clone()
            pulsed[:, :, position] += 0.05  # dB
            changes.append((model.extract(pulsed) - before).abs().sum(dim=(0, 1)))
    weight = torch.stack(changes)[:, [first, first + 1]].double()
    weight = (weight - weight.median(dim=0).values).clamp(min=0)
    return first, ((weight * positions[:, None]).sum(dim=0) / weight.sum(dim=0)).tolist()


@pytest.mark.parametrize(
    "backbone", ["test_byobnet", "test_resnet", "test_efficientnet", "test_convnext"]
)
def test_frames_are_centred_where_a_pulse_changes_them_most(backbone, tiny_experiment):
    experiment = replace(
        tiny_experiment,
        frontend=replace(tiny_experiment.frontend, hop_length=640),  # 20 ms
        model=replace(tiny_experiment.model, backbone=backbone),
    )
    torch.manual_seed(0)
    model = build_model(experiment, 3)
    model.train()(0.01 * torch.randn(8, 64_000))  # statistics of noise
    model.eval()
    n_frames = 251  # five seconds
    times = measure_frame_times(model, n_frames)
    assert times.step == pytest.approx(32 * 0.02)
    first, centres = pulse_centres(model, n_frames + 4 * 32)
    start = np.mean([centre - 32 * (first + i) for i, centre in enumerate(centres)])
    assert times.start == pytest.approx(start * 0.02, abs=0.02)
