"""Keep all that an interrupted training needs to go on as if it had not been interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from birdcall import __version__
from birdcall.data.dataset import TrainingData
from birdcall.storage.files import digest, digest_table, write_atomically
from birdcall.storage.store import code_digest
from birdcall.training.distributed import DistributedContext

Values = dict[str, Any]  # what JSON can hold


def write_state(path: Path, tensors: Mapping[str, Tensor], values: Values) -> None:
    """Write tensors and plain values as one file, whole or not at all."""
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(own, {"values": json.dumps(values)}))


def read_state(path: Path) -> tuple[dict[str, Tensor], Values]:
    """Read what `write_state` wrote; ValueError names the file if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["values"])
            return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable state of a training: {error}") from error


def delete_state(path: Path) -> None:
    """Delete the state and what a killed process may have left of the next one."""
    path.unlink(missing_ok=True)
    for torn in path.parent.glob(f".{path.stem}.*{path.suffix}"):
        torn.unlink()


# --- optimiser and generators, as tensors -------------------------------------------------------


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state, as ``optimizer.<parameter>.<name>``."""
    return {
        f"optimizer.{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_tensors`; learning rates and the like stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def generator_tensors(device: torch.device, distributed: DistributedContext) -> dict[str, Tensor]:
    """Return the states of torch's generators in every process, as rows ``(distributed, bytes)``.

    Dropout draws from them. All else has generators of its own, made anew for each clip and batch.
    """
    states = {"generator.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["generator.cuda"] = torch.cuda.get_rng_state(device)
    return {name: distributed.gather(one[None].to(device)).cpu() for name, one in states.items()}


def restore_generators(
    tensors: Mapping[str, Tensor], device: torch.device, distributed: DistributedContext
) -> None:
    """Undo `generator_tensors`."""
    torch.set_rng_state(tensors["generator.cpu"][distributed.rank])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"][distributed.rank], device)


# --- what a state belongs to --------------------------------------------------------------------


def identity_of(
    experiment: Values, fold: int, data: TrainingData, distributed: DistributedContext
) -> dict[str, Any]:
    """Return what must be the same when a training goes on: experiment, data, code, processes."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "code": code_digest("training.trainer"),
        "processes": distributed.world_size,
        "fold": fold,
        "recordings": digest_table(data.recordings),
        "labels": None if data.strong_labels is None else digest_table(data.strong_labels),
        "noise": digest("\n".join(sorted(path.name for path in data.noise_files))),
        "classes": list(data.classes),
        "experiment": experiment,
    }


def require_same_identity(path: Path, there: Values, here: Values) -> None:
    """Raise a ValueError that says what differs between a state's identity and this training's."""
    # Tuples become lists in JSON.
    differences = list(_differences(there, json.loads(json.dumps(here))))
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"{path} is of another training, so it cannot go on: {'; '.join(differences[:5])}"
            f"{more}. --overwrite starts again"
        )


def _differences(there: Any, here: Any, place: str = "") -> Sequence[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        names = list(dict.fromkeys((*there, *here)))
        parts = [
            _differences(there.get(name), here.get(name), f"{place}.{name}" if place else name)
            for name in names
        ]
        return [one for part in parts for one in part]
    if there == here:
        return []
    kind, _, module = place.partition(".")
    if kind == "code":
        return [f"{module.replace('.', '/')}.py has changed"]
    if place in ("recordings", "labels", "noise", "classes"):
        return [f"the {place} are others"]
    return [f"{place} was {there!r}, is {here!r}"]


# --- averaging ---


def make_moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of ``model`` that follows it by ``update_parameters(model)``, buffers as well.

    The first steps count more, or random weights would stay in the mean for ``1 / (1 - decay)``
    steps: step n keeps ``min(decay, (1 + n) / (10 + n))``.
    """

    def follow(average: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        n_steps = int(n_averaged)
        keep = min(decay, (1 + n_steps) / (10 + n_steps))
        for mean, value in zip(average, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - keep)
            else:
                mean.copy_(value)  # how many batches a normalisation has seen

    @torch.no_grad()
    def follow_all(average: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        follow(average, current, n_averaged)

    return AveragedModel(model, multi_avg_fn=follow_all, use_buffers=True)


@dataclass
class BestWeights:
    """The weights of the ``n_best`` best epochs, as files in ``folder``.

    Every process knows which they are; the first one, which ``writes``, keeps their files.

    Nothing is deleted before `prune`: what an older state refers to must outlive the writing of
    the next one.
    """

    folder: Path
    n_best: int
    writes: bool = True
    scores: dict[int, float] = field(default_factory=dict)  # of the epochs that are kept

    def offer(self, epoch: int, score: float, model: nn.Module) -> None:
        """Keep the weights of ``model`` if ``score`` is among the best so far."""
        ranked = sorted(
            (self.scores | {epoch: score}).items(), key=lambda item: (-item[1], item[0])
        )
        kept = dict(ranked[: self.n_best])
        if epoch in kept and self.writes:
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            write_atomically(self._path(epoch), safetensors.torch.save(weights))
        self.scores = kept

    def prune(self) -> None:
        """Delete the files of epochs that are no longer among the best."""
        kept = {self._path(epoch) for epoch in self.scores}
        for path in self.folder.glob("*.safetensors"):
            if path not in kept:
                path.unlink()

    def delete(self) -> None:
        """Delete all files and their folder."""
        self.scores = {}
        self.prune()
        if self.folder.is_dir():
            self.folder.rmdir()

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the kept weights; whole numbers are those of the best epoch."""
        best_first = sorted(self.scores, key=lambda epoch: (-self.scores[epoch], epoch))
        parts = [safetensors.torch.load_file(self._path(epoch)) for epoch in best_first]
        return {
            name: torch.stack([part[name] for part in parts]).mean(dim=0)
            if value.is_floating_point()
            else value
            for name, value in parts[0].items()
        }

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch{epoch:04d}.safetensors"
