"""Let runs hear all sound that was held out from them, once, and keep what they heard."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS
from birdcall.data.dataset import TrainingData
from birdcall.evaluation.labelled import Labelled, predict_labelled
from birdcall.evaluation.out_of_fold import OutOfFoldPredictions, predict_out_of_fold
from birdcall.evaluation.prediction_cache import PredictionCache, predict_cached
from birdcall.evaluation.predictions import LabelledPredictions, concatenate, segment_table
from birdcall.evaluation.simulated_audio import open_renderer, salient_segment_finder
from birdcall.evaluation.simulation import (
    SimulatedSoundscape,
    SimulationConfig,
    describe_events,
    group_recordings,
    label_segments,
    plan_soundscapes,
)
from birdcall.inference.ensemble import Ensemble, load_ensemble
from birdcall.inference.windows import SINGLE_SEGMENT, WindowConfig
from birdcall.kaggle.test_set import EXAMPLE_LABELS
from birdcall.models.checkpoint import read_checkpoint, require_same_classes
from birdcall.storage.files import digest, digest_files
from birdcall.storage.store import code_digest
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
    window_config: WindowConfig = SINGLE_SEGMENT

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
    window_config: WindowConfig = SINGLE_SEGMENT,
    kept: Path | None = None,
    config: SimulationConfig = DEFAULTS,
    progress: bool = False,
) -> HeldOutPredictions:
    """Let the runs in ``folders`` hear recordings, simulated and labelled soundscapes.

    ``labelled_folders``: of labelled soundscapes (none: the data's examples, if it has any).
    ``window_config``: the windows of the members. ``kept``: the folder of the prediction cache; a
    second call for the same audio reads from it.
    """
    for folder in folders:
        checkpoint = read_checkpoint(folder)
        require_same_classes(folder, checkpoint, data.classes)
        if checkpoint.fold not in data.folds:
            known_folds = ", ".join(map(str, data.folds))
            raise ValueError(f"{folder}: of fold {checkpoint.fold}; the folds are {known_folds}")
    ensemble = load_ensemble(folders, device, window_config)
    known = list(dict.fromkeys((*data.classes, *(one.ebird_code for one in all_species()))))
    planned, simulated = [], {}
    out_of_fold = predict_out_of_fold(ensemble, data, kept, progress)
    for fold in sorted({member.checkpoint.fold for member in ensemble.members}):
        members = [member for member in ensemble.members if member.checkpoint.fold == fold]
        logger.info("fold %d: simulating soundscapes for %d members", fold, len(members))
        find_segment = salient_segment_finder(data, config.sample_rate)
        soundscapes = plan_soundscapes(data.recordings, fold, config, find_segment)
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
        groups=group_recordings(data.recordings, config.groups_per_fold),
        labelled=predict_labelled(
            ensemble, labelled_folders, known=known, kept=kept, progress=progress
        ),
        soundscapes=tuple(planned),
        config=config,
        ensemble=ensemble,
        window_config=window_config,
    )


def predict_simulated(
    ensemble: Ensemble,
    soundscapes: Sequence[SimulatedSoundscape],
    data: TrainingData,
    config: SimulationConfig,
    known: Sequence[str],
    kept: Path | None = None,
    progress: bool = False,
) -> LabelledPredictions:
    """Return what members predict for simulated soundscapes of the fold that all of them held out.

    The members' names are those of their experiments. ``known``: species of the truth, beginning
    with the classes.
    """
    fold = soundscapes[0].fold
    for member in ensemble.members:
        if member.checkpoint.fold != fold:
            raise ValueError(
                f"{member.name} has trained on the recordings of {soundscapes[0].name}"
            )
    renderer = open_renderer(data, fold, config)
    sources = {one.name: partial(renderer.render, one) for one in soundscapes}
    cache = None
    if kept is not None:
        files = [data.folder / path for path in describe_events(soundscapes)["path"].unique()]
        made_from = (
            repr(soundscapes),
            digest_files(files),
            digest_files(renderer.noise.paths),
            code_digest("evaluation.simulated_audio"),
        )
        cache = PredictionCache(kept, f"simulated-fold{fold}", digest(repr(made_from)))
    predictions = predict_cached(ensemble, sources, cache, progress)
    for scores in predictions.values():
        if isinstance(scores, AudioError):
            raise scores
    return LabelledPredictions(
        segments=pd.concat([_segments(one) for one in soundscapes], ignore_index=True),
        truth=np.concatenate([label_segments(one, known) for one in soundscapes]),
        clipwise=np.concatenate([predictions[one.name].clipwise for one in soundscapes], axis=1),
        framewise=np.concatenate([predictions[one.name].framewise for one in soundscapes], axis=1),
        member_names=tuple(member.checkpoint.experiment.name for member in ensemble.members),
        classes=ensemble.classes,
    )


def _segments(soundscape: SimulatedSoundscape) -> pd.DataFrame:
    n_segments = round(soundscape.seconds / SEGMENT_SECONDS)
    table = segment_table(soundscape.name, n_segments, is_labelled=True, group=soundscape.group)
    return table.assign(nocall_share=soundscape.nocall_share)
