"""Score a model on recordings that it was not trained on, with the kernel's own inference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from birdcall.audio.reading import AudioError
from birdcall.data.dataset import TrainingData
from birdcall.data.targets import IGNORE_TARGET, make_targets
from birdcall.evaluation.metrics import average_precision, macro_average
from birdcall.inference.engine import predict_files
from birdcall.inference.ensemble import Ensemble, Member
from birdcall.models.checkpoint import Checkpoint
from birdcall.models.sed import SEDModel
from birdcall.training.distributed import SINGLE_PROCESS, DistributedContext

VALIDATION_SECONDS = 30.0  # of each recording: most sing early on, and some last an hour


def validate(
    model: SEDModel,
    checkpoint: Checkpoint,
    recordings: pd.DataFrame,
    data: TrainingData,
    device: torch.device,
    distributed: DistributedContext = SINGLE_PROCESS,
) -> dict[str, float]:
    """Return the scores of ``model`` on recordings of a fold that it was not trained on.

    ``checkpoint`` says what the model is. Several processes hear every so manieth recording each.
    """
    ensemble = Ensemble([Member(checkpoint.name, model, checkpoint)], device)
    scores = torch.zeros(len(recordings), len(data.classes), device=device)
    own = slice(distributed.rank, None, distributed.world_size)
    if len(recordings.iloc[own]):
        heard = score_out_of_fold(ensemble, recordings.iloc[own], data.folder)
        scores[own] = torch.from_numpy(heard).to(device)
    scores = distributed.sum(scores).cpu().numpy()
    # Whether a secondary label is heard is not known: no mistake either way.
    targets = make_targets(recordings, data.classes, None)
    found = average_precision(targets > 0, scores, targets != IGNORE_TARGET)
    return {"macro_ap": round(macro_average(found), 4)}


def score_out_of_fold(ensemble: Ensemble, recordings: pd.DataFrame, folder: Path) -> np.ndarray:
    """Return the highest clipwise probability of any segment, ``(recordings, classes)``."""
    paths = {name: folder / name for name in recordings["path"]}
    scores = np.zeros((len(paths), len(ensemble.classes)), dtype=np.float32)
    heard = predict_files(ensemble, paths, limit_seconds=VALIDATION_SECONDS)
    for row, (_, result) in enumerate(heard):
        if isinstance(result, AudioError):
            raise result
        scores[row] = result.clipwise.mean(axis=0).max(axis=0)
    return scores
