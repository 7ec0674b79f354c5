"""Save the state of a training, so that an interrupted run ends with the same weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from birdcall.config import FULL, Experiment
from birdcall.data.dataset import TrainingData
from birdcall.models.checkpoint import (
    Checkpoint,
    read_checkpoint,
    read_weights,
    require_same_classes,
)
from birdcall.storage.files import digest, shorten_list, write_atomically
from birdcall.storage.store import code_digest
from birdcall.training.distributed import DistributedContext

logger = logging.getLogger(__name__)


def write_state(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors, and values that JSON can hold, to one file; a kill leaves no partial file."""
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(copies, {"values": json.dumps(values)}))


def read_state(
    path: Path, identity: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_state` wrote, and compare its identity with ``identity``, if given.

    ValueError names the file if it is damaged, and all differences if it is of another training.
    """
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a readable state of a training: {error}; --overwrite starts again"
        ) from error
    if identity is None:
        return tensors, values
    differences = describe_differences(values["identity"], identity)
    if differences:
        raise ValueError(
            f"{path} is the state of another training and cannot be resumed: {differences}. "
            "--overwrite starts again"
        )
    return tensors, values


@dataclass(frozen=True)
class TensorState:
    """The tensors that change from step to step: weights, optimizer, random generators.

    torch's global generators decide about dropout only. Everything else is drawn from generators
    that are seeded for each clip and batch.
    """

    modules: Mapping[str, nn.Module]  # by the first part of their tensors' names
    optimizer: Optimizer
    device: torch.device
    distributed: DistributedContext

    def collect(self) -> dict[str, Tensor]:
        """Return all tensors by name; generators have a row per process."""
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = value
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        for name, state in generators.items():
            states = self.distributed.gather(state[None].to(self.device))
            tensors[f"generator.{name}"] = states.cpu()
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set everything to what `collect` returned; learning rates stay as they are."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            group, _, key = name.partition(".")
            groups.setdefault(group, {})[key] = value
        for name, module in self.modules.items():
            module.load_state_dict(groups[name])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in groups.get("optimizer", {}).items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        parameters = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": parameters})
        rank = self.distributed.rank
        torch.set_rng_state(groups["generator"]["cpu"][rank])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(groups["generator"]["cuda"][rank], self.device)


# --- identity of a training ---

# How messages name what a run was trained on.
_NAMES = {
    "classes": "the classes",
    "recordings": "the tables of recordings",
    "audio": "the audio files",
    "lengths": "the lengths of recordings",
    "folds": "the folds",
    "noise": "the noise files (--noise)",
    "labels": "the strong labels (--labels)",
    "soundscapes": "the labels of soundscapes (--soundscape-labels)",
    "other_birds": "the sound of other birds (--other-birds)",
    "teacher": "the teacher's models (birdcall embed)",
    "init": "the initial weights (--init)",
}
# These change the rounding of the weights: a state cannot be resumed, a finished run can be kept.
_ROUNDING = ("version", "torch", "device", "processes")
# Which recordings a run has held out. Lengths depend on the decoder, too.
_HELD_OUT = ("audio", "folds")
_SCORED = ("recordings", *_HELD_OUT, "noise")  # what scores are about: labels and noise, too


def conditions_of(
    data: TrainingData,
    experiment: Experiment,
    init: Path | None,
    device: torch.device,
    *,
    distributed: DistributedContext,
) -> dict[str, Any]:
    """Return what decides about the weights of a run, beside experiment and fold, by name.

    Sound that ``experiment`` does not draw from has no part in it.
    """
    unused = dict.fromkeys([] if experiment.augment.other_birds_probability else ["other_birds"])
    unused |= dict.fromkeys([] if experiment.train.teacher.is_used else ["teacher"])
    if experiment.train.student.share == 0:
        unused |= dict.fromkeys(["soundscapes", "annotated", "round"])
    return {
        **data.digests,
        **unused,
        "init": None if init is None else digest(init.read_bytes()),
        "code": code_digest("training.trainer"),
        "torch": torch.__version__,
        "device": device.type,
        "processes": distributed.world_size,
    }


def identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything that decides about the weights of a run: all but its score and weights."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(checkpoint)))  # with lists for tuples
    for result in ("score", "weights_sha256"):
        del values[result]
    return values | values.pop("trained_on")


def describe_other_training(run: Checkpoint, other: Checkpoint) -> str:
    """Return in which way ``other`` was trained differently, beside fold, code and machine."""
    ignored = ("fold", "code", *_ROUNDING)
    return describe_differences(identity_of(run), identity_of(other), ignored)


def describe_differences(
    stored: Mapping[str, Any], current: Mapping[str, Any], ignored: Collection[str] = ()
) -> str:
    """Return the differences between two identities as text; empty if there are none."""
    return shorten_list(_find_differences(stored, current, ignored=ignored))


def _find_differences(
    stored: Any, current: Any, name: str = "", ignored: Collection[str] = ()
) -> list[str]:
    if isinstance(stored, dict) and isinstance(current, dict):
        differences = []
        for key in dict.fromkeys((*stored, *current)):
            nested = f"{name}.{key}" if name else key
            if nested not in ignored:
                differences += _find_differences(stored.get(key), current.get(key), nested)
        return differences
    if stored == current:
        return []
    kind, _, module = name.partition(".")
    if kind == "code":
        return [f"{module.replace('.', '/')}.py has changed"]
    if name in _NAMES:
        return [f"{_NAMES[name]} are different"]
    return [f"{name} was {stored!r}, is {current!r}"]


def require_finished(folder: Path, current: Checkpoint) -> Checkpoint:
    """Return the checkpoint in ``folder``, if a training of ``current`` would end with it.

    ValueError names what differs, or weights that are not those of the checkpoint.
    """
    stored = read_checkpoint(folder)
    _require_known(folder, stored)
    differences = describe_differences(identity_of(stored), identity_of(current), _ROUNDING)
    if differences:
        raise ValueError(
            f"{folder} was trained in another way: {differences}. --overwrite trains it again; in "
            "another output folder this run stays as it is"
        )
    read_weights(folder, stored)
    return stored


def read_runs(
    folders: Sequence[Path], data: TrainingData, *, is_scored: bool = False
) -> list[Checkpoint]:
    """Read the checkpoints of runs that predict what each of them held out of ``data``.

    ValueError names a run of other classes, audio or folds, or, with ``is_scored``, of other tables
    of recordings or other noise. A warning names runs that were trained with another network.
    """
    checkpoints = [read_checkpoint(folder) for folder in folders]
    code, changed = code_digest("models.sed"), {}
    network = [module for module in code if module.startswith(("models.", "audio."))]
    for folder, checkpoint in zip(folders, checkpoints, strict=True):
        require_same_classes(folder, checkpoint, data.classes)
        _require_known(folder, checkpoint)
        if checkpoint.fold == FULL:
            raise ValueError(f"{folder} held out nothing that it could be scored on: leave it out")
        names = _SCORED if is_scored else _HELD_OUT
        stored, current = (
            {name: digests.get(name) for name in names}
            for digests in (checkpoint.trained_on, data.digests)
        )
        differences = describe_differences(stored, current)
        if differences:
            raise ValueError(
                f"{folder} was trained on other data: {differences}. What it held out is not known "
                "here: train it again with --overwrite, or give the data, --folds and --noise that "
                "it was trained on"
            )
        for module in network:
            if checkpoint.trained_on.get("code", {}).get(module) != code[module]:
                changed.setdefault(folder, module)
    if changed:
        folder, module = next(iter(changed.items()))
        logger.warning(
            "the network of %d of %d runs has changed since they were trained, such as %s.py for "
            "%s: they may predict otherwise than at the end of their training",
            *(len(changed), len(folders), module.replace(".", "/"), folder),
        )
    return checkpoints


def _require_known(folder: Path, checkpoint: Checkpoint) -> None:
    if not checkpoint.trained_on:
        raise ValueError(
            f"{folder} is of an earlier version, which did not note the data and folds that it was "
            "trained on: train it again with --overwrite"
        )


# --- averages of weights ---


def make_moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return a moving average of the weights and buffers of ``model``.

    Step n keeps ``min(decay, (1 + n) / (10 + n))`` of the average. With a constant ``decay``, as in
    torch's ``get_ema_multi_avg_fn``, random weights would stay for ``1 / (1 - decay)`` steps.
    """

    @torch.no_grad()
    def update(average: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        n_steps = int(n_averaged)
        step_decay = min(decay, (1 + n_steps) / (10 + n_steps))
        for mean, value in zip(average, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - step_decay)
            else:
                mean.copy_(value)  # the number of batches that a normalisation has seen

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


@dataclass
class BestWeights:
    """The weights of the ``n_best`` best epochs, as files in ``folder``.

    All processes know the scores; only the process that ``writes`` has the files. A file is deleted
    by `prune` only: an older state must find its files until the next state is written.
    """

    folder: Path
    n_best: int
    writes: bool = True
    scores: dict[int, float] = field(default_factory=dict)  # of the stored epochs

    def offer(self, epoch: int, score: float, model: nn.Module) -> None:
        """Store the weights of ``model`` if ``score`` is among the best so far.

        Where scores are NaN, the last epochs count as the best.
        """
        candidates = (self.scores | {epoch: score}).items()
        ranked = sorted(candidates, key=lambda item: (-item[1], item[0]))
        if math.isnan(score):
            ranked = sorted(candidates, reverse=True)  # by epoch
        self.scores = dict(ranked[: self.n_best])
        if epoch in self.scores and self.writes:
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            write_atomically(self._path(epoch), safetensors.torch.save(weights))

    def prune(self) -> None:
        """Delete the files of epochs that are no longer among the best."""
        stored = {self._path(epoch) for epoch in self.scores}
        for path in self.folder.glob("*.safetensors"):
            if path not in stored:
                path.unlink()

    def delete(self) -> None:
        """Delete all files and their folder."""
        self.scores = {}
        self.prune()
        if self.folder.is_dir():
            self.folder.rmdir()

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the stored weights; whole numbers are those of the best epoch."""
        best_first = sorted(self.scores, key=lambda epoch: (-self.scores[epoch], epoch))
        states = [safetensors.torch.load_file(self._path(epoch)) for epoch in best_first]
        mean = dict(states[0])
        for name, value in mean.items():
            if value.is_floating_point():
                mean[name] = torch.stack([state[name] for state in states]).mean(dim=0)
        return mean

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch{epoch:04d}.safetensors"
