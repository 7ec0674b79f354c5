"""Predict audio that was held out from each run: recordings, simulated and labelled soundscapes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from birdcall.audio.reading import AudioError, probe_audio
from birdcall.config import SEGMENT_SECONDS, require
from birdcall.data.birdnet import NAME, BirdNET, WindowStore, scientific_names
from birdcall.data.dataset import TrainingData
from birdcall.data.folds import TRAINING_ONLY
from birdcall.data.targets import label_segments
from birdcall.evaluation.labelled import LabelledSoundscapes, predict_labelled, segment_table
from birdcall.evaluation.predictions import LabelledPredictions, PredictionCache
from birdcall.evaluation.simulated_audio import SoundscapeRenderer, salient_segment_finder
from birdcall.evaluation.simulation import (
    SalientSegment,
    SimulatedSoundscape,
    SimulationConfig,
    describe_events,
    group_recordings,
    plan_soundscapes,
)
from birdcall.inference.engine import open_recording
from birdcall.inference.ensemble import Ensemble, load_ensemble
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import SINGLE_SEGMENT, AudioSource, WindowConfig
from birdcall.kaggle.test_set import CompetitionFile
from birdcall.storage.files import (
    atomic_path,
    digest,
    digest_files,
    unique_names,
    utf8_text,
)
from birdcall.taxonomy import known_species
from birdcall.training.resume import read_runs
from birdcall.training.step import VALIDATION_SECONDS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutOptions:
    """How and for which audio runs predict.

    labelled_folders: of labelled soundscapes; without any, the examples in the data folder.
    label_column: of their Raven and CSV tables. unlabelled_folders: of soundscapes without labels
    of the same sites, or of other birds: see `find_floor`. yardstick: BirdNET, if it predicts the
    labelled soundscapes too, for comparison.
    cache_folder: where predictions are stored; a second call for the same audio reads them there.
    """

    device: torch.device | str = "cpu"
    window_config: WindowConfig = SINGLE_SEGMENT
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    labelled_folders: Sequence[Path] = ()
    label_column: str | None = None
    unlabelled_folders: Sequence[Path] = ()
    cache_folder: Path | None = None
    progress: bool = False
    yardstick: BirdNET | None = None


_DEFAULTS = HeldOutOptions()


@dataclass(frozen=True, eq=False)
class OutOfFoldPredictions:
    """Predictions of the runs of one experiment for the recordings that each held out.

    segments: a row per segment with ``row`` (the recording's index in the data), ``path``,
    ``ebird_code``, ``fold`` and ``seconds`` (the segment's end). predictions: of one member, the
    run that held the recording out.
    """

    experiment: str
    segments: pd.DataFrame
    predictions: SegmentPredictions

    def max_by_recording(self, n_recordings: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each recording's highest clipwise and framewise probabilities.

        ``(recordings, classes)`` each; NaN for recordings that no run held out.
        """
        rows = self.segments["row"].to_numpy()
        results = []
        for (probabilities,) in (self.predictions.clipwise, self.predictions.framewise):
            highest = np.full((n_recordings, probabilities.shape[1]), -np.inf, np.float32)
            np.maximum.at(highest, rows, probabilities)
            highest[np.isinf(highest).all(axis=1)] = np.nan
            results.append(highest)
        return results[0], results[1]


@dataclass(frozen=True, eq=False)
class HeldOutPredictions:
    """Predictions of runs, each only for audio that it was not trained on.

    runs: experiment and fold. experiments: in the order of the runs. out_of_fold: by experiment.
    simulated: by fold, with the runs of that fold, named as their experiments. events: of the
    simulated soundscapes. groups: the group of each recording of the data, as in the simulated
    soundscapes. labelled: with all runs, named as their checkpoints. soundscapes, config: of the
    simulation. ensemble: all runs. unlabelled: of all runs; None without such soundscapes.
    yardstick: the labelled soundscapes as BirdNET predicts them; None without BirdNET.
    """

    data: TrainingData
    runs: tuple[tuple[str, int], ...]
    experiments: tuple[str, ...]
    out_of_fold: Mapping[str, OutOfFoldPredictions]
    simulated: Mapping[int, LabelledPredictions]
    events: pd.DataFrame
    groups: np.ndarray
    labelled: LabelledSoundscapes | None
    soundscapes: tuple[SimulatedSoundscape, ...]
    config: SimulationConfig
    ensemble: Ensemble
    unlabelled: SegmentPredictions | None = None
    yardstick: LabelledPredictions | None = None

    def member_names(self, experiments: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the runs of ``experiments``, as in their checkpoints."""
        return tuple(f"{name}-fold{fold}" for name, fold in self.runs if name in experiments)

    @cached_property
    def learnable(self) -> np.ndarray:
        """What runs that hold a recording out could learn, boolean ``(recordings, classes)``.

        Nothing where no run does.
        """
        by_fold = {fold: self.data.learnable_classes(fold) for fold in self.data.folds}
        by_fold[TRAINING_ONLY] = np.zeros(len(self.data.classes), dtype=bool)
        return np.array([by_fold[fold] for fold in self.data.recordings["fold"]])

    def ensemble_of(self, experiments: Sequence[str]) -> Ensemble:
        """Return the runs of ``experiments``."""
        members = self.ensemble.members
        return self.ensemble.for_members([members[n] for n in self._positions(experiments)])

    def learnable_by(self, experiments: Sequence[str]) -> np.ndarray:
        """Return which classes at least one run of ``experiments`` could learn, ``(classes,)``."""
        folds = {fold for name, fold in self.runs if name in experiments}
        return np.any([self.data.learnable_classes(fold) for fold in folds], axis=0)

    def simulated_for(self, experiments: Sequence[str]) -> LabelledPredictions | None:
        """Return the soundscapes of the folds that all of ``experiments`` held out."""
        parts = []
        for predictions in self.simulated.values():
            names = predictions.member_names
            if all(name in names for name in experiments):
                parts.append(predictions.for_members([names.index(name) for name in experiments]))
        return LabelledPredictions.concatenate(parts) if parts else None

    def labelled_for(self, experiments: Sequence[str]) -> LabelledPredictions | None:
        """Return the labelled soundscapes as predicted by all runs of ``experiments``."""
        if self.labelled is None:
            return None
        return self.labelled.predictions.for_members(self._positions(experiments))

    def unlabelled_for(self, experiments: Sequence[str]) -> SegmentPredictions | None:
        """Return the unlabelled soundscapes as predicted by all runs of ``experiments``."""
        if self.unlabelled is None:
            return None
        return self.unlabelled.for_members(self._positions(experiments))

    def _positions(self, experiments: Sequence[str]) -> list[int]:
        return [position for position, (name, _) in enumerate(self.runs) if name in experiments]

    def out_of_fold_for(self, experiments: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return clipwise and framewise means over experiments, ``(recordings, classes)`` each.

        NaN for recordings that not all of them held out.
        """
        n_recordings = len(self.data.recordings)
        total = np.zeros((2, n_recordings, len(self.data.classes)), np.float32)
        for name in experiments:  # in turn: each takes 93 MB for a season
            total += self.out_of_fold[name].max_by_recording(n_recordings)
        clipwise, framewise = total / len(experiments)
        return clipwise, framewise


def predict_held_out(
    folders: Sequence[Path], data: TrainingData, options: HeldOutOptions = _DEFAULTS
) -> HeldOutPredictions:
    """Predict recordings, simulated and labelled soundscapes with the runs in ``folders``.

    ValueError names a run that was trained on other data, folds or noise: see `read_runs`.
    """
    read_runs(folders, data, is_scored=True)
    ensemble = load_ensemble(folders, options.device, options.window_config)
    config = options.simulation
    storage = {"cache_folder": options.cache_folder, "progress": options.progress}
    examples = [data.folder] if (data.folder / CompetitionFile.EXAMPLE_LABELS).is_file() else []
    # First: a table that is refused should not cost the hour of all other predictions.
    labelled = predict_labelled(
        ensemble, options.labelled_folders or examples, options.label_column, **storage
    )
    yardstick = None
    if options.yardstick is not None:
        names = scientific_names(data.classes, data.recordings)
        yardstick = predict_yardstick(options.yardstick, labelled, names, **storage)
    files = find_all_unlabelled(options.unlabelled_folders, data, options.labelled_folders)
    unlabelled = predict_unlabelled(ensemble, files, **storage)
    out_of_fold = predict_out_of_fold(ensemble, data, **storage)
    readable = set().union(*(part.segments["path"] for part in out_of_fold.values()))
    planned, simulated = [], {}
    for fold, subset in _by_fold(ensemble).items():
        logger.info("fold %d: simulating soundscapes for %d members", fold, len(subset.members))
        find_segment = salient_segment_finder(data, config.sample_rate)
        soundscapes = plan_soundscapes(
            data.recordings,
            fold,
            config,
            find_segment=find_segment,
            readable=readable,
            other_birds=held_out_birds(data, fold, find_segment),
        )
        if not soundscapes:
            logger.warning("fold %d: nothing is simulated: no other fold has its species", fold)
            continue
        planned += soundscapes
        simulated[fold] = predict_simulated(subset, soundscapes, data, config, **storage)
    checkpoints = [member.checkpoint for member in ensemble.members]
    return HeldOutPredictions(
        data=data,
        runs=tuple((checkpoint.experiment.name, checkpoint.fold) for checkpoint in checkpoints),
        experiments=tuple(out_of_fold),
        out_of_fold=out_of_fold,
        simulated=simulated,
        events=describe_events(planned),
        groups=group_recordings(data.recordings, config.groups_per_fold),
        labelled=labelled,
        soundscapes=tuple(planned),
        config=config,
        ensemble=ensemble,
        unlabelled=unlabelled,
        yardstick=yardstick,
    )


def _by_fold(ensemble: Ensemble) -> dict[int, Ensemble]:
    """Return the members of each fold, in order of the folds."""
    folds = [member.checkpoint.fold for member in ensemble.members]
    return {
        fold: ensemble.for_members(
            [member for member in ensemble.members if member.checkpoint.fold == fold]
        )
        for fold in sorted(set(folds))
    }


# --- recordings ---


def predict_out_of_fold(
    ensemble: Ensemble,
    data: TrainingData,
    *,
    cache_folder: Path | None = None,
    progress: bool = False,
) -> dict[str, OutOfFoldPredictions]:
    """Predict the first ``VALIDATION_SECONDS`` of each recording with the runs that held it out.

    Returns the predictions by experiment, in the order of the members. A recording that cannot be
    read any more (the audit has decoded it) is named and left out.
    """
    experiments = [member.checkpoint.experiment.name for member in ensemble.members]
    parts: dict[str, list[OutOfFoldPredictions]] = {name: [] for name in experiments}
    for fold, subset in _by_fold(ensemble).items():
        rows = np.flatnonzero(data.recordings["fold"] == fold)
        recordings = data.recordings.iloc[rows]
        paths = {name: data.folder / name for name in recordings["path"]}
        sources = {name: open_recording(path, VALIDATION_SECONDS) for name, path in paths.items()}
        cache = recordings_cache(cache_folder, fold, paths.values())
        readable = _predict_readable(subset, sources, cache, progress=progress)
        is_readable = recordings["path"].isin(readable.keys()).to_numpy()
        rows, recordings = rows[is_readable], recordings[is_readable]
        predictions = SegmentPredictions.concatenate(list(readable.values()))
        lengths = np.diff([*predictions.starts, predictions.n_segments])
        segments = pd.DataFrame(
            {
                "row": np.repeat(rows, lengths),
                "path": np.repeat(recordings["path"].to_numpy(), lengths),
                "ebird_code": np.repeat(recordings["ebird_code"].to_numpy(), lengths),
                "fold": fold,
                "seconds": SEGMENT_SECONDS
                * np.concatenate([np.arange(1.0, n + 1) for n in lengths]),
            }
        )
        for position, member in enumerate(subset.members):
            name = member.checkpoint.experiment.name
            part = OutOfFoldPredictions(name, segments, predictions.for_members([position]))
            parts[name].append(part)
    return {
        name: OutOfFoldPredictions(
            experiment=name,
            segments=pd.concat([part.segments for part in folds], ignore_index=True),
            predictions=SegmentPredictions.concatenate([part.predictions for part in folds]),
        )
        for name, folds in parts.items()
    }


def recordings_cache(folder: Path | None, fold: int, paths: Iterable[Path]) -> PredictionCache:
    """Return the store of what is predicted for the recordings that a fold holds out."""
    made_from = digest(f"{VALIDATION_SECONDS} {digest_files(paths)}")
    return PredictionCache(folder, f"recordings-fold{fold}", made_from)


def _predict_readable(
    ensemble: Ensemble,
    sources: Mapping[str, AudioSource],
    cache: PredictionCache,
    *,
    progress: bool,
) -> dict[str, SegmentPredictions]:
    """Return the predictions for the recordings that can be read; raise AudioError if none can."""
    readable = {}
    for name, item in cache.predict(ensemble, sources, progress=progress).items():
        if isinstance(item, AudioError):
            logger.warning("%s; %s is not scored", item, name)
            error = item
        else:
            readable[name] = item
    if not readable:
        raise error
    return readable


def write_oof_parquet(
    path: Path, parts: Sequence[OutOfFoldPredictions], classes: Sequence[str]
) -> None:
    """Write every segment: keys, then a column of probabilities per class.

    Each segment has two rows, for its clipwise and its framewise output. Experiments are written in
    turn, so that memory holds the table of a single experiment.
    """
    keys = {
        "experiment": pa.string(),
        "fold": pa.int32(),
        "path": pa.string(),
        "ebird_code": pa.string(),
        "seconds": pa.float32(),
        "output": pa.string(),
    }
    schema = pa.schema([*keys.items(), *((code, pa.float32()) for code in classes)])
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,  # of a path that is no UTF-8, too
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for part in parts:
            for output in ("clipwise", "framewise"):
                table = part.segments.assign(experiment=part.experiment, output=output)
                (probabilities,) = getattr(part.predictions, output)
                columns = [pa.array(table[name], kind) for name, kind in keys.items()]
                columns += [pa.array(column) for column in probabilities.T]
                writer.write_table(pa.table(columns, schema=schema))


# --- soundscapes ---


def predict_yardstick(
    birdnet: BirdNET,
    labelled: LabelledSoundscapes | None,
    names: tuple[str, ...],
    *,
    cache_folder: Path | None = None,
    progress: bool = False,
) -> LabelledPredictions:
    """Predict labelled soundscapes with BirdNET, in place of all members.

    names: the scientific names of the classes.
    Raises ValueError without labelled soundscapes, or where BirdNET knows none of the classes.
    """
    require(labelled is not None, f"{NAME} is a yardstick for labelled soundscapes: there are none")
    ours = labelled.predictions
    recordings = ours.segments["recording"].iloc[ours.starts]
    folder = None if cache_folder is None else cache_folder / "birdnet"
    store = WindowStore(folder, names, birdnet.sha256)
    paths = {recording: labelled.paths[recording] for recording in recordings}
    lengths = np.diff([*ours.starts, len(ours.segments)])
    parts = []
    results = store.predict(birdnet, paths, progress=progress)
    for n_segments, (_, result) in zip(lengths, results, strict=True):
        if isinstance(result, AudioError):
            raise result
        parts.append(result.of_segments(n_segments))
    probabilities = np.concatenate(parts)[None]
    return ours.with_probabilities(probabilities, probabilities, [NAME])


def find_all_unlabelled(
    folders: Sequence[Path], data: TrainingData, labelled: Sequence[Path]
) -> dict[str, Path]:
    """Return the soundscapes below ``folders``, each once, by a name that no other has.

    Raises as `data.soundscapes.find_unlabelled`, which decodes them.
    """
    paths: dict[Path, None] = {}
    for folder in folders:
        names = data.find_unlabelled(folder, labelled)
        paths |= dict.fromkeys((folder / name).resolve() for name in names)
    return dict(zip(unique_names([utf8_text(path.name) for path in paths]), paths, strict=True))


def predict_unlabelled(
    ensemble: Ensemble,
    files: Mapping[str, Path],
    *,
    cache_folder: Path | None = None,
    progress: bool = False,
) -> SegmentPredictions | None:
    """Predict soundscapes without labels, by name; None where there are none.

    One that does not decode is left out with a warning.
    """
    if not files:
        return None
    sources = {name: open_recording(path) for name, path in files.items()}
    cache = PredictionCache(cache_folder, "unlabelled", digest_files(files.values()))
    readable = _predict_readable(ensemble, sources, cache, progress=progress)
    return SegmentPredictions.concatenate(list(readable.values()))


def held_out_birds(
    data: TrainingData, fold: int, find_segment: Callable[[pd.Series], SalientSegment]
) -> pd.DataFrame:
    """Return the recordings of other birds that no run of ``fold`` has trained with.

    With ``path`` (from the data folder), ``ebird_code`` (the folder's name) and ``seconds``. Those
    that cannot be read are left out with a warning.
    """
    rows = []
    for file in data.split_other_birds(fold)[1]:
        path = os.path.relpath(file, data.folder)
        try:
            seconds = probe_audio(file).seconds
            row = {"path": path, "ebird_code": file.parent.name, "seconds": seconds}
            find_segment(pd.Series(row))
            rows.append(row)
        except (AudioError, OSError) as error:
            logger.warning("%s; no soundscape is simulated with it", error)
    return pd.DataFrame(rows, columns=["path", "ebird_code", "seconds"])


def predict_simulated(
    ensemble: Ensemble,
    soundscapes: Sequence[SimulatedSoundscape],
    data: TrainingData,
    config: SimulationConfig,
    *,
    cache_folder: Path | None = None,
    progress: bool = False,
) -> LabelledPredictions:
    """Predict simulated soundscapes of the fold that all members held out.

    The members are named as their experiments.
    """
    fold = soundscapes[0].fold
    for member in ensemble.members:
        if member.checkpoint.fold != fold:
            raise ValueError(
                f"{member.name} has trained on the recordings of {soundscapes[0].name}"
            )
    renderer = SoundscapeRenderer.for_fold(data, fold, config)
    events = [event for item in soundscapes for event in (*item.events, *item.distractors)]
    files = [data.folder / path for path in dict.fromkeys(event.path for event in events)]
    made_from = repr(soundscapes), digest_files(files), digest_files(renderer.noise.paths)
    name, modules = f"simulated-fold{fold}", ("evaluation.simulated_audio",)
    cache = PredictionCache(cache_folder, name, digest(repr(made_from)), modules)
    sources = {item.name: partial(renderer.render, item) for item in soundscapes}
    readable = _predict_readable(ensemble, sources, cache, progress=progress)
    species = known_species(ensemble.classes)
    tables, labels = [], []
    for item in (item for item in soundscapes if item.name in readable):
        n_segments = round(item.seconds / SEGMENT_SECONDS)
        labels.append(label_segments(item.events, species, n_segments))
        table = segment_table(item.name, n_segments, is_labelled=True, group=item.group)
        tables.append(table.assign(nocall_share=item.nocall_share))
    return LabelledPredictions(
        segments=pd.concat(tables, ignore_index=True),
        truth=np.concatenate(labels),
        predictions=SegmentPredictions.concatenate(list(readable.values())),
        member_names=tuple(member.checkpoint.experiment.name for member in ensemble.members),
        classes=ensemble.classes,
    )
