"""Train noisy students in rounds: runs label soundscapes, other networks train on the labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS, Experiment, require
from birdcall.data.annotations import read_annotated_soundscapes
from birdcall.data.audit import Measurement
from birdcall.data.birdnet import NAME, BirdNET, WindowStore, find_columns, scientific_names
from birdcall.data.dataset import TrainingData
from birdcall.data.soundscapes import (
    PEOPLE,
    CollapseLimits,
    LabelStatistics,
    SoundscapeLabels,
    network_of,
)
from birdcall.data.targets import IGNORE_TARGET, label_segments
from birdcall.experiments import student_of
from birdcall.inference.background import remove_background
from birdcall.inference.engine import predict_files
from birdcall.models.checkpoint import Checkpoint, read_checkpoint, require_same_classes
from birdcall.storage.files import shorten_list
from birdcall.storage.store import read_arrays
from birdcall.taxonomy import UNKNOWN_BIRD, known_species
from birdcall.training.log import find_runs
from birdcall.training.pseudo_labels import load_with_context
from birdcall.training.runs import plan_runs, train_many
from birdcall.training.trainer import Run, RunOptions

logger = logging.getLogger(__name__)


# --- labels of unlabelled soundscapes ---


def labels_file(folder: Path, source: int | str) -> Path:
    """Return the path of the labels of a round, of BirdNET, or of people."""
    return folder / f"soundscape_labels_{source}.safetensors"


@dataclass(frozen=True)
class _Labellers:
    """The models that label soundscapes, as a file of labels describes them.

    predict: recordings by name to ``(families, segments, classes)`` each, or why not.
    """

    members: list[dict]
    families: list[str]
    round: int
    source: int | str  # of the labels: the round, or birdnet
    predict: Callable[[dict[str, Path]], Iterator[tuple[str, np.ndarray | AudioError]]]


def label_soundscapes(
    labellers: Sequence[Path] | BirdNET,
    data: TrainingData,
    folder: Path,
    output: Path,
    *,
    labelled: Sequence[Path] = (),
    limits: CollapseLimits = CollapseLimits(),
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Path, SoundscapeLabels]:
    """Label the soundscapes below ``folder``; write them to a file of their round in ``output``.

    Labels of the same soundscapes by the same members that are in the file already are used again.
    All runs label, whatever their folds: soundscapes are in no fold. Or BirdNET does, in a file of
    its own. Soundscapes that cannot be read whole are named and left out. ValueError where one has
    the same audio as a recording of the data or a labelled soundscape (the data's examples, and all
    sound below ``labelled``), and where the labels have collapsed: then nothing is written.
    """
    if isinstance(labellers, BirdNET):
        models = _birdnet_labeller(labellers, data)
    else:
        models = _labellers_of(labellers, data, device)
    measured = data.find_unlabelled(folder, labelled)
    described = {name: _describe(item) for name, item in measured.items()}
    path = labels_file(output, models.source)
    labels = _read_labels(path, data.classes, models)
    made_of = folder.resolve(), list(described.values())
    if labels is not None and (labels.folder, labels.soundscapes) == made_of:
        logger.info("%s: made by these members already, used again", path)
        return path, labels
    soundscapes, parts = [], []
    results = models.predict({name: folder / name for name in measured})
    for name, result in tqdm(results, total=len(measured), disable=not progress):
        if isinstance(result, AudioError):
            logger.warning("%s; it is left out", result)
            continue
        parts.append(result)
        soundscapes.append(described[name])
    require(len(parts) > 0, f"{folder}: none of {len(measured)} soundscapes can be read")
    lengths = [part.shape[1] for part in parts]
    sites = [Path(item["name"]).parent.as_posix() for item in soundscapes]  # a folder is a site
    sites = np.repeat(sites, lengths)
    predicted = np.concatenate(parts, axis=1)
    probabilities = np.stack([remove_background(part, sites) for part in predicted])
    probabilities = probabilities.astype(np.float32)
    statistics = LabelStatistics.of(probabilities.mean(axis=0), data.classes)
    labels = SoundscapeLabels(
        folder=folder,
        classes=data.classes,
        soundscapes=soundscapes,
        members=models.members,
        families=models.families,
        round=models.round,
        statistics=asdict(statistics),
        probabilities=probabilities,
        soundscape=np.repeat(np.arange(len(parts)), lengths),
    )
    earlier, previous = labels_file(output, models.round - 1), None
    if earlier.is_file():
        previous = LabelStatistics(**read_arrays(earlier)[1]["statistics"])
    statistics.require_no_collapse(f"all members in round {models.round}", limits, previous)
    for family, of_family in zip(models.families, probabilities, strict=True):
        names = shorten_list([item["name"] for item in models.members if item["network"] == family])
        of_members = LabelStatistics.of(of_family, data.classes)
        of_members.require_no_collapse(f"{names} in round {models.round}", limits)
    labels.write(path)
    return path, labels


def write_labels_of_people(
    data: TrainingData,
    folder: Path,
    output: Path,
    *,
    labelled: Sequence[Path] = (),
    label_column: str | None = None,
) -> tuple[Path, SoundscapeLabels]:
    """Write what people have labelled in the soundscapes below ``folder``; return file and labels.

    See `read_annotated_soundscapes`. Birds of no class are left out. ValueError as of
    `label_soundscapes`: what is trained on is not scored.
    """
    annotated = read_annotated_soundscapes(folder, known_species(data.classes), label_column)
    measured = data.find_unlabelled(folder, labelled)
    columns = [*data.classes, UNKNOWN_BIRD]
    soundscapes, probabilities, events = [], [], []
    for item in annotated:
        name = item.path.relative_to(folder).as_posix()
        if name not in measured:
            continue  # damaged, or there twice: the log names it
        starts = SEGMENT_SECONDS * np.flatnonzero(~item.labelled)
        nobody_knows = pd.DataFrame({"onset": starts, "offset": starts + SEGMENT_SECONDS})
        parts = [item.events, nobody_knows.assign(ebird_code=UNKNOWN_BIRD)]
        table = pd.concat([part for part in parts if len(part)] or parts)
        table = table[table["ebird_code"].isin(columns)]
        present = label_segments(table.itertuples(), columns, len(item.labelled))
        is_known = present[:, :-1].any(axis=1) | ~present[:, -1]
        probabilities.append(np.where(is_known[:, None], present[:, :-1], IGNORE_TARGET))
        column = pd.Index(data.classes).get_indexer(table["ebird_code"])
        number = np.full(len(table), len(soundscapes))
        events.append(np.column_stack([number, column, table["onset"], table["offset"]]))
        soundscapes.append(_describe(measured[name]) | {"has_times": item.has_times})
    require(len(soundscapes) > 0, f"{folder}: no labelled soundscape can be read")
    together = np.concatenate(probabilities).astype(np.float32)
    labels = SoundscapeLabels(
        folder=folder,
        classes=data.classes,
        soundscapes=soundscapes,
        members=[dict.fromkeys(("name", "experiment", "network", "weights_sha256"), PEOPLE)],
        families=[PEOPLE],
        round=0,
        statistics=asdict(LabelStatistics.of(together.clip(min=0), data.classes)),
        probabilities=together[None],
        soundscape=np.repeat(np.arange(len(soundscapes)), list(map(len, probabilities))),
        events=np.concatenate(events).astype(np.float64),
    )
    path = labels_file(output, PEOPLE)
    labels.write(path)
    return path, labels


def _describe(item: Measurement) -> dict:
    """Return what labels say about a soundscape."""
    values = {key: getattr(item, key) for key in ("seconds", "size", "audio_hash")}
    return {"name": item.path, **values}


def _read_labels(path: Path, classes: Sequence[str], models: _Labellers) -> SoundscapeLabels | None:
    """Return the labels in ``path`` if these models have made them, else None."""
    if not path.is_file():
        return None
    try:
        labels = SoundscapeLabels.read(path, classes)
    except (ValueError, OSError) as error:
        logger.warning("%s; the soundscapes are labelled again", error)
        return None
    made_by = (labels.members, labels.round)
    return labels if made_by == (models.members, models.round) else None


def _labellers_of(
    runs: Sequence[Path], data: TrainingData, device: torch.device | str
) -> _Labellers:
    """Return runs as labellers: a family has the mean of the members of one network."""
    checkpoints = [read_checkpoint(run) for run in runs]
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        require_same_classes(run, checkpoint, data.classes)
    networks = [network_of(checkpoint.experiment) for checkpoint in checkpoints]
    families = list(dict.fromkeys(networks))
    positions = [np.flatnonzero(np.array(networks) == family) for family in families]

    def predict(files: dict[str, Path]) -> Iterator[tuple[str, np.ndarray | AudioError]]:
        for name, result in predict_files(load_with_context(runs, device), files):
            if not isinstance(result, AudioError):
                means = [result.clipwise[members].mean(axis=0) for members in positions]
                result = np.stack(means)
            yield name, result

    number = 1 + max(checkpoint.trained_on.get("round") or 0 for checkpoint in checkpoints)
    members = [
        {"name": item.name, "experiment": item.experiment.name, "network": network}
        | {"weights_sha256": item.weights_sha256}
        for item, network in zip(checkpoints, networks, strict=True)
    ]
    return _Labellers(members, families, number, number, predict=predict)


def _birdnet_labeller(birdnet: BirdNET, data: TrainingData) -> _Labellers:
    """Return BirdNET as the only labeller; no experiment has its network."""
    store = data.birdnet or WindowStore(None, scientific_names(data.classes, data.recordings))

    def predict(files: dict[str, Path]) -> Iterator[tuple[str, np.ndarray | AudioError]]:
        for name, item in store.part("soundscapes").predict(birdnet, files):
            yield name, item if isinstance(item, AudioError) else item.of_segments()[None]

    find_columns(birdnet.labels, store.names)  # raises where it knows none of the classes
    member = {"name": NAME, "experiment": NAME, "network": birdnet.sha256}
    members = [member | {"weights_sha256": birdnet.sha256}]
    return _Labellers(members, [birdnet.sha256], 1, "birdnet", predict=predict)


def describe_labels(labels: SoundscapeLabels) -> str:
    """Return how many labels there are, by whom, and how they are distributed."""
    if labels.events is not None:
        return (
            f"{len(labels.events)} labels by people in {len(labels.soundscape)} segments of "
            f"{len(labels.soundscapes)} soundscapes; {LabelStatistics(**labels.statistics)}"
        )
    return (
        f"round {labels.round}: {len(labels.soundscape)} segments of {len(labels.soundscapes)} "
        f"soundscapes, by {len(labels.members)} members of {len(labels.families)} networks; "
        f"{LabelStatistics(**labels.statistics)}"
    )


# --- rounds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudentOptions:
    """How rounds are trained.

    soundscapes: the folder to label. labelled: folders that must share no sound with it. fold: as
    in `plan_runs`. limits: of what counts as collapsed labels.
    """

    soundscapes: Path
    n_rounds: int = 1
    fold: int | str | None = None
    labelled: Sequence[Path] = ()
    limits: CollapseLimits = CollapseLimits()
    training: RunOptions = RunOptions()


@dataclass(frozen=True)
class StudentRound:
    """A round: the labels that the members of the round before made, and the runs trained on it."""

    labels: SoundscapeLabels
    runs: Sequence[Run]
    checkpoints: Sequence[Checkpoint]


def train_rounds(
    experiments: Sequence[Experiment],
    data: TrainingData,
    *,
    output: Path,
    runs: Path,
    options: StudentOptions,
) -> Iterator[StudentRound]:
    """Train the students of trained ``experiments`` in rounds; yield each round when it is done.

    In round 1 all runs of ``experiments`` below ``runs`` label the soundscapes, in later rounds
    those of the students before. Labels are written to ``output``, see `label_soundscapes`, which
    raises where they have collapsed: the rounds before it stay. Raises ValueError where an
    experiment has no student of a round, or where no other network has labelled for its student.
    """
    require(options.n_rounds >= 1, f"rounds is {options.n_rounds}; give at least 1")
    rounds = [[student_of(item, n + 1) for item in experiments] for n in range(options.n_rounds)]
    teachers = experiments
    for students in rounds:
        members = find_runs(runs, [item.name for item in teachers])
        _, labels = label_soundscapes(
            members,
            data,
            options.soundscapes,
            output,
            labelled=options.labelled,
            limits=options.limits,
            device=options.training.device or torch.device("cpu"),
            progress=options.training.progress,
        )
        of_round = replace(data, soundscape_labels=labels)
        planned = plan_runs(students, of_round, options.fold, runs)
        checkpoints = train_many(planned, of_round, options.training)
        yield StudentRound(labels, planned, checkpoints)
        teachers = students
