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
