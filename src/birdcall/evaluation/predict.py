"""Let runs hear all sound that was held out from them, once, and keep what they heard."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from birdcall.data.dataset import TrainingData
from birdcall.evaluation.labelled import Labelled, predict_labelled
from birdcall.evaluation.out_of_fold import OutOfFoldPredictions, predict_out_of_fold
from birdcall.evaluation.predictions import LabelledPredictions, concatenate
from birdcall.evaluation.simulated_audio import predict_simulated
from birdcall.evaluation.simulation import (
    SimulatedSoundscape,
    SimulationConfig,
    describe_events,
    plan_soundscapes,
    recording_groups,
)
from birdcall.inference.ensemble import Ensemble, load_ensemble
from birdcall.inference.windows import SINGLE_SEGMENT, WindowConfig
from birdcall.kaggle.test_set import EXAMPLE_LABELS
from birdcall.models.checkpoint import read_checkpoint, require_same_classes
from birdcall.taxonomy import all_species

logger = logging.getLogger(__name__)

DEFAULTS = SimulationConfig()


@dataclass(frozen=True, eq=False)
class HeldOutPredictions:
    """What runs heard, each only sound that it was not trained on.

    out_of_fold: by experiment. simulated: by fold, each with the runs of that fold, whose names
    there are the experiments'. events: of the simulated soundscapes. groups: of each recording of
    the data, as in the simulated soundscapes. labelled: with all runs, named as in ``runs``.
    soundscapes, config: of the simulation. ensemble: all runs, that can hear more.
    """

    data: TrainingData
    runs: tuple[tuple[str, int], ...]  # experiment and fold
    out_of_fold: Mapping[str, OutOfFoldPredictions]
    simulated: Mapping[int, LabelledPredictions]
    events: pd.DataFrame
    groups: np.ndarray
    labelled: Labelled | None
    soundscapes: tuple[SimulatedSoundscape, ...]
    config: SimulationConfig
    ensemble: Ensemble
    listening: WindowConfig = SINGLE_SEGMENT

    @property
    def experiments(self) -> tuple[str, ...]:
        """Return the experiments, in the order of the runs."""
        return tuple(dict.fromkeys(name for name, _ in self.runs))

    def member_names(self, experiments: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the runs of ``experiments``, as their checkpoints have them."""
        return tuple(f"{name}-fold{fold}" for name, fold in self.runs if name in experiments)

    def simulated_for(self, experiments: Sequence[str]) -> LabelledPredictions | None:
        """Return the soundscapes of the folds that all of ``experiments`` held out."""
        parts = []
        for scores in self.simulated.values():
            places = {name: place for place, name in enumerate(scores.member_names)}
            if all(name in places for name in experiments):
                parts.append(scores.for_members([places[name] for name in experiments]))
        return concatenate(parts) if parts else None

    def labelled_for(self, experiments: Sequence[str]) -> LabelledPredictions | None:
        """Return the labelled soundscapes as all runs of ``experiments`` heard them."""
        if self.labelled is None:
            return None
        return self.labelled.scores.for_members(self.positions(experiments))

    def positions(self, experiments: Sequence[str]) -> list[int]:
        """Return which runs are of ``experiments``."""
        return [place for place, (name, _) in enumerate(self.runs) if name in experiments]

    def out_of_fold_for(self, experiments: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return clipwise and framewise means over experiments, ``(recordings, classes)`` each.

        NaN for recordings that not all of them held out.
        """
        n_recordings = len(self.data.recordings)
        scores = [self.out_of_fold[name].of_recordings(n_recordings) for name in experiments]
        clipwise, framewise = zip(*scores, strict=True)
        return np.mean(clipwise, axis=0), np.mean(framewise, axis=0)


def hear(
    folders: Sequence[Path],
    data: TrainingData,
    device: torch.device | str = "cpu",
    *,
    labelled_folders: Sequence[Path] = (),
    listening: WindowConfig = SINGLE_SEGMENT,
    kept: Path | None = None,
    config: SimulationConfig = DEFAULTS,
    progress: bool = False,
) -> HeldOutPredictions:
    """Let the runs in ``folders`` hear recordings, simulated and labelled soundscapes.

    ``labelled_folders``: of labelled soundscapes (none: the data's examples, if it has any).
    ``listening``: how much they hear at once. ``kept``: where outputs are kept, so that a second
    call for the same sound reads them.
    """
    for folder in folders:
        checkpoint = read_checkpoint(folder)
        require_same_classes(folder, checkpoint, data.classes)
        if checkpoint.fold not in data.folds:
            known_folds = ", ".join(map(str, data.folds))
            raise ValueError(f"{folder}: of fold {checkpoint.fold}; the folds are {known_folds}")
    ensemble = load_ensemble(folders, device, listening)
    known = list(dict.fromkeys((*data.classes, *(one.ebird_code for one in all_species()))))
    planned, simulated = [], {}
    out_of_fold = predict_out_of_fold(ensemble, data, kept, progress)
    for fold in sorted({member.checkpoint.fold for member in ensemble.members}):
        members = [member for member in ensemble.members if member.checkpoint.fold == fold]
        logger.info("fold %d: simulating soundscapes for %d members", fold, len(members))
        soundscapes = plan_soundscapes(data, fold, config)
        planned += soundscapes
        own = ensemble.for_members(members)
        simulated[fold] = predict_simulated(
            own, soundscapes, data=data, config=config, known=known, kept=kept, progress=progress
        )
    if not labelled_folders and (data.folder / EXAMPLE_LABELS).is_file():
        labelled_folders = [data.folder]
    return HeldOutPredictions(
        data=data,
        runs=tuple((m.checkpoint.experiment.name, m.checkpoint.fold) for m in ensemble.members),
        out_of_fold=out_of_fold,
        simulated=simulated,
        events=describe_events(planned),
        groups=recording_groups(data.recordings, config),
        labelled=predict_labelled(
            ensemble, labelled_folders, known=known, kept=kept, progress=progress
        ),
        soundscapes=tuple(planned),
        config=config,
        ensemble=ensemble,
        listening=listening,
    )
