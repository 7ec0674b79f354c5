"""Train noisy students: runs label soundscapes, other networks are trained on the labels, again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from birdcall.config import Experiment, require
from birdcall.data.dataset import TrainingData
from birdcall.data.targets import SoundscapeLabels
from birdcall.experiments import student_of
from birdcall.inference.predictions import CollapseLimits
from birdcall.models.checkpoint import Checkpoint, read_checkpoint
from birdcall.training.pseudo_labels import label_soundscapes, labels_file
from birdcall.training.runs import find_runs, plan_runs, train_many
from birdcall.training.trainer import Run, RunOptions

logger = logging.getLogger(__name__)


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
    raises where they have collapsed: the rounds before it stay. Labels that the same weights have
    made are used again. Raises ValueError where an experiment has no student of a round, or where
    its student has nobody to learn from.
    """
    require(options.n_rounds >= 1, f"rounds is {options.n_rounds}; give at least 1")
    rounds = [[student_of(item, n + 1) for item in experiments] for n in range(options.n_rounds)]
    teachers = experiments
    for number, students in enumerate(rounds, start=1):
        members = find_runs(runs, [item.name for item in teachers])
        labels = _find_labels(labels_file(output, number), members, data, options.soundscapes)
        if labels is None:
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


def _find_labels(
    path: Path, members: Sequence[Path], data: TrainingData, soundscapes: Path
) -> SoundscapeLabels | None:
    """Return the labels in ``path`` if these members made them; None if there are none."""
    if not path.is_file():
        return None
    labels = SoundscapeLabels.read(path, data.classes)
    weights = sorted(read_checkpoint(member).weights_sha256 for member in members)
    made_by = sorted(member["weights_sha256"] for member in labels.members)
    if made_by != weights or labels.folder != soundscapes.resolve():
        return None
    logger.info("%s: made by these members already, used again", path)
    return labels
