"""The loss of clips and of their loudest frames; the score of a validation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from birdcall.config import LossConfig
from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation.metrics import average_precision, macro_average
from birdcall.models.sed import SEDOutput
from birdcall.training.step import macro_average_precision, sed_loss

BCE = LossConfig(name="bce", framewise_weight=0.5)
FOCAL = replace(BCE, name="focal", focal_gamma=2.0)
TARGET = torch.tensor([[1.0, 0, 0, 0.3], [0, 0, 0, 0], [0, 1, 1, 0], [0.3, 0, 0, 1]])


def draw_logits(scale=2.0):
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(4, 4, 6, generator=generator)


def output_of(logits):
    """Clipwise is the middle frame here, so that both terms have logits of their own."""
    framewise = logits.sigmoid()
    return SEDOutput(framewise[..., 3], framewise)


def test_cross_entropy_is_that_of_clip_and_loudest_frame():
    logits = draw_logits()
    expected = functional.binary_cross_entropy_with_logits(logits[..., 3], TARGET)
    peak = functional.binary_cross_entropy_with_logits(logits.amax(-1), TARGET)
    torch.testing.assert_close(sed_loss(output_of(logits), TARGET, BCE), expected + 0.5 * peak)


def test_the_softmax_loss_is_torchs_cross_entropy_of_targets_that_sum_to_one():
    logits = draw_logits()
    config = replace(BCE, softmax_weight=2.0)
    sums = TARGET.sum(dim=1, keepdim=True)
    has_bird = sums[:, 0] > 0
    ranking = torch.zeros(4)
    ranking[has_bird] = functional.cross_entropy(
        logits[has_bird][..., 3], (TARGET / sums)[has_bird], reduction="none"
    )
    for settings in (config, replace(config, label_smoothing=0.1)):
        without = sed_loss(output_of(logits), TARGET, replace(settings, softmax_weight=0.0))
        expected = without + 2 / 4 * ranking.mean()
        torch.testing.assert_close(sed_loss(output_of(logits), TARGET, settings), expected)
    faint = torch.full((4, 4), 0.1)  # targets below 1 count by their sum
    faint_loss = sed_loss(output_of(logits), faint, config)
    without = sed_loss(output_of(logits), faint, BCE)
    assert faint_loss - without == pytest.approx(
        0.5 * functional.cross_entropy(logits[..., 3], faint).item(), abs=1e-6
    )


def test_unknown_classes_take_no_part_in_the_softmax_and_its_gradient_is_finite():
    logits = draw_logits().requires_grad_()
    config = replace(BCE, framewise_weight=0.0, softmax_weight=1.0)
    target = TARGET.clone()
    target[:, 1] = IGNORE_TARGET
    target[3] = IGNORE_TARGET
    sed_loss(output_of(logits), target, config).backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[:, 1].any() and not logits.grad[3].any()
    certain = draw_logits().detach()
    certain[0, 0] = 100.0  # a probability of one, and its class is there
    loss = sed_loss(output_of(certain), target, config)
    assert loss.isfinite()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_equals_torchvisions_on_logits(gamma):
    logits = draw_logits()
    clip, peak = (
        sigmoid_focal_loss(one, TARGET, alpha=-1, gamma=gamma, reduction="mean")
        for one in (logits[..., 3], logits.amax(-1))
    )
    config = replace(FOCAL, focal_gamma=gamma)
    torch.testing.assert_close(sed_loss(output_of(logits), TARGET, config), clip + 0.5 * peak)


def test_focal_loss_has_torchvisions_gradient():
    logits, reference = (draw_logits().requires_grad_() for _ in range(2))
    sed_loss(output_of(logits), TARGET, replace(FOCAL, framewise_weight=0.0)).backward()
    loss = sigmoid_focal_loss(reference[..., 3], TARGET, alpha=-1, gamma=2.0, reduction="mean")
    loss.backward()
    torch.testing.assert_close(logits.grad, reference.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("config", [BCE, FOCAL, replace(FOCAL, focal_gamma=0.5)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certainty_is_finite_and_dear_only_where_it_is_wrong(config, value):
    certain = torch.full((2, 3), value, requires_grad=True)
    output = SEDOutput(certain, certain[..., None])
    wrong = sed_loss(output, 1 - certain.detach(), config)
    right = sed_loss(output, certain.detach(), config)
    assert wrong > 10
    assert right == 0
    (wrong + right).backward()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("config", [BCE, FOCAL, replace(BCE, label_smoothing=0.1)])
def test_a_class_that_is_unknown_adds_nothing_and_learns_nothing(config):
    logits = draw_logits().requires_grad_()
    target = TARGET.clone()
    target[0, 1] = target[2, 2] = IGNORE_TARGET
    masked = sed_loss(output_of(logits), target, config)
    masked.backward()
    assert (logits.grad[0, 1] == 0).all()
    assert (logits.grad[2, 2] == 0).all()
    assert (logits.grad.abs().sum(-1) > 0).sum() == 14
    alone = [
        sed_loss(output_of(logits[row : row + 1, [k]]), TARGET[row : row + 1, [k]], config)
        for row, k in ((0, 1), (2, 2))
    ]
    whole = sed_loss(output_of(logits), TARGET, config)
    torch.testing.assert_close(masked, whole - sum(alone) / 16)


def test_a_masked_loss_worked_by_hand():
    half = torch.full((1, 4), 0.5)
    target = torch.tensor([[1.0, IGNORE_TARGET, IGNORE_TARGET, 0.0]])
    loss = sed_loss(SEDOutput(half, half[..., None]), target, BCE)
    # Two of four classes are known, each log 2 for the clip and half of that for the frame.
    torch.testing.assert_close(loss, 2 / 4 * 1.5 * torch.tensor(2.0).log())


def test_a_clip_with_nothing_known_costs_nothing():
    output = output_of(draw_logits())
    assert sed_loss(output, torch.full((4, 4), IGNORE_TARGET), BCE) == 0


def test_the_mean_of_two_halves_is_the_whole():
    output, target = output_of(draw_logits()), TARGET.clone()
    target[0] = IGNORE_TARGET
    weight = torch.tensor([1.0, 0.2, 0.5, 0.7])
    halves = [
        sed_loss(SEDOutput(*(part[rows] for part in output)), target[rows], FOCAL, weight[rows])
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves) / 2, sed_loss(output, target, FOCAL, weight))


def test_each_clip_counts_by_its_weight():
    output = output_of(draw_logits())
    weight = torch.tensor([1.0, 0.2, 0.5, 0.0])
    alone = [
        sed_loss(SEDOutput(*(part[[row]] for part in output)), TARGET[[row]], BCE)
        for row in range(4)
    ]
    expected = (torch.stack(alone) * weight).mean()
    torch.testing.assert_close(sed_loss(output, TARGET, BCE, weight), expected)
    ones = sed_loss(output, TARGET, BCE, torch.ones(4))
    torch.testing.assert_close(ones, sed_loss(output, TARGET, BCE))


def test_smoothing_moves_targets_towards_one_half():
    half, target = torch.full((1, 4), 0.5), torch.tensor([[0.0, 1.0, 0.3, 0.5]])
    probability = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    by_hand = torch.tensor([[0.05, 0.95, 0.32, 0.5]])
    for output in (
        SEDOutput(probability, half[..., None]),
        SEDOutput(half, probability[..., None]),
    ):
        smoothed = sed_loss(output, target, replace(BCE, label_smoothing=0.1))
        torch.testing.assert_close(smoothed, sed_loss(output, by_hand, BCE))
    logits = draw_logits()
    smoothed = sed_loss(output_of(logits), TARGET, replace(BCE, label_smoothing=0.1))
    by_hand = sed_loss(output_of(logits), 0.9 * TARGET + 0.05, BCE)
    torch.testing.assert_close(smoothed, by_hand)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [BCE, FOCAL])
def test_half_precision_outputs_give_a_float32_loss(dtype, config):
    output = SEDOutput(torch.rand(2, 3).to(dtype), torch.rand(2, 3, 4).to(dtype))
    target = torch.zeros(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sed_loss(output, target, config, torch.ones(2, dtype=dtype))
    assert loss.dtype == torch.float32
    exact = sed_loss(SEDOutput(*(part.float() for part in output)), target, config)
    torch.testing.assert_close(loss, exact)


# --- validation ---


@pytest.mark.parametrize("decimals", [None, 2, 1])
def test_average_precision_ignores_what_is_not_known(decimals):
    """Rounded probabilities have ties; the same values as the evaluation's own metric."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        probabilities = generator.random((60, 7)).astype(np.float32)
        if decimals is not None:
            probabilities = probabilities.round(decimals)
        targets = generator.choice([0.0, 1.0, IGNORE_TARGET], (60, 7), p=[0.8, 0.1, 0.1])
        targets[:, 0] = 0  # a class that does not occur
        targets[:, 1] = IGNORE_TARGET
        expected = average_precision(targets > 0, probabilities, targets != IGNORE_TARGET)
        assert np.isnan(expected[:2]).all()
        score = macro_average_precision(targets, probabilities)
        assert score == pytest.approx(macro_average(expected), rel=1e-9)


def test_average_precision_of_nothing_is_not_a_number():
    assert np.isnan(macro_average_precision(np.zeros((3, 2)), np.ones((3, 2))))
