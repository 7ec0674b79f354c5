"""A compiled network trains as the plain one does."""

import shutil
from dataclasses import replace

import pytest
import torch

from birdcall.config import NO_AUGMENT
from birdcall.data.loader import ClipBatch
from birdcall.models.sed import build_model
from birdcall.training.step import BatchLoss


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_losses_and_gradients_are_those_of_the_plain_network(tiny_experiment):
    waveform = 0.1 * torch.randn(4, 64_000, generator=torch.Generator().manual_seed(1))
    batch = ClipBatch(
        waveform=waveform,
        target=torch.eye(3)[[0, 1, 2, 0]],
        weight=torch.ones(4),
        recordings=("a",) * 4,
        failures=(),
    )
    found = []
    for compiled in (False, True):
        train = replace(tiny_experiment.train, compile=compiled)
        experiment = replace(tiny_experiment, augment=NO_AUGMENT, train=train)
        torch.manual_seed(0)
        model, cpu = build_model(experiment, 3).train(), torch.device("cpu")
        loss = BatchLoss(model, experiment, cpu)(batch, epoch=0, position=0)
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()]))
    (plain, gradients), (made, others) = found
    assert made == pytest.approx(plain, rel=1e-4)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-2, atol=1e-4)
