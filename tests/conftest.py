"""Shared test data: a tiny demo data set, models too small to be good, the real recordings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from birdcall.config import Experiment, ModelConfig

CORNELL_MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "cornell-mini"


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run side by side; more threads than cores make each of them many times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cornell_mini() -> Path:
    """The real recordings beside the project; skips where they are absent."""
    if not CORNELL_MINI.is_dir():
        pytest.skip("the real recordings (cornell-mini) are not beside this checkout")
    return CORNELL_MINI


@pytest.fixture(scope="session")
def tiny_experiment() -> Experiment:
    """A network of a few thousand weights on two-second clips."""
    small = Experiment.named("small_gru")
    return replace(
        small,
        name="tiny",
        frontend=replace(small.frontend, n_mels=32, hop_length=1000),
        model=ModelConfig(
            backbone="test_byobnet", pretrained=False, temporal="gru", temporal_size=16, dropout=0.0
        ),
        train=replace(small.train, clip_seconds=2.0, epochs=2, batch_size=4, clips_per_epoch=8),
    )
