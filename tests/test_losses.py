"""The loss is binary cross-entropy of the clip and of its loudest frame."""

import pytest
import torch

from birdcall.losses import sed_loss
from birdcall.models import SEDOutput


def entropy(p, t):
    return -(t * torch.log(p) + (1 - t) * torch.log(1 - p)).mean()


def test_the_loss_equals_its_formula():
    generator = torch.Generator().manual_seed(0)
    framewise = 0.02 + 0.96 * torch.rand(3, 4, 6, generator=generator)
    clipwise = framewise.mean(-1)
    target = torch.tensor([[1.0, 0, 0, 0.3], [0, 0, 0, 0], [0, 1, 1, 0]])
    expected = entropy(clipwise, target) + 0.5 * entropy(framewise.amax(-1), target)
    torch.testing.assert_close(sed_loss(SEDOutput(clipwise, framewise), target, 0.5), expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_certain_and_wrong_is_dear_but_finite(value):
    certain = torch.full((2, 3), value)
    loss = sed_loss(SEDOutput(certain, certain[..., None]), 1 - certain, 1.0)
    assert loss.isfinite()
    assert loss > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_give_a_float32_loss(dtype):
    output = SEDOutput(torch.rand(2, 3).to(dtype), torch.rand(2, 3, 4).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sed_loss(output, torch.zeros(2, 3), 0.5)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
