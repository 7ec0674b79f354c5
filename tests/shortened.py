"""Short forms of what commands do at length: small networks, few steps, little simulated sound."""

from functools import partial

import numpy as np
import pytest

from birdcall.config import replace_nested
from birdcall.experiments import EXPERIMENTS


def shorten_training(patch: pytest.MonkeyPatch) -> None:
    """Let the small experiments train a few thousand weights for two steps.

    Their front ends and temporal layers stay two different ones.
    """
    for name in ("small_gru", "small_attention_normed"):
        shortened = replace_nested(
            EXPERIMENTS[name],
            model={"backbone": "test_byobnet", "backbone_options": (), "temporal_size": 16},
            train={"epochs": 1, "data": {"clips_per_epoch": 8, "batch_size": 4}},
        )
        patch.setitem(EXPERIMENTS, name, shortened)


def shorten_previews(patch: pytest.MonkeyPatch) -> None:
    """Leave TensorBoard's pictures of clips blank: a tiny training is faster than their drawing."""
    blank = np.zeros((8, 8, 3), np.uint8)
    patch.setattr("birdcall.training.runs.plot_preview", lambda *_: blank)


def shorten_simulation(patch: pytest.MonkeyPatch) -> None:
    """Let `birdcall evaluate` simulate one minute of each fold and share."""
    from birdcall.evaluation import predict
    from birdcall.evaluation.simulation import SimulationConfig

    simulation = SimulationConfig(n_soundscapes=2, soundscape_seconds=30.0)
    options = partial(predict.HeldOutOptions, simulation=simulation)
    patch.setattr(predict, "HeldOutOptions", options)


def shorten_packaging(patch: pytest.MonkeyPatch) -> None:
    """Let `birdcall package` export no member: it takes seconds for each; see test_kernel.py."""
    patch.setattr("birdcall.kaggle.packaging.is_onnx_installed", lambda: False)
