"""Keep all that an interrupted training needs to go on as if it had not been interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from birdcall import __version__
from birdcall.data.dataset import TrainingData
from birdcall.files import write_atomically
from birdcall.fingerprint import digest, digest_code, digest_table
from birdcall.training.distributed import Processes

# What decides over a run's weights: all that `training.run` imports. A test keeps the list true.
CODE = (
    *(
        "config",
        "files",
        "fingerprint",
        "style",
        "taxonomy",
        "audio",
        "threads",
        "windows",
        "spectrogram",
        "frontend",
        "panns",
    ),
    *("models", "checkpoint", "onnx_detector", "ensemble", "inference", "metrics"),
    *("data.recordings", "data.cache", "data.audit", "data.folds", "data.noise", "data.memory"),
    *("data.filters", "data.noise_files", "data.augment", "data.batch_augment", "data.targets"),
    *("data.sampling", "data.dataset", "data.loader", "training.losses", "training.initialisation"),
    *("training.distributed", "training.averaging", "training.resume", "training.log"),
    *("training.validation", "training.step", "training.trainer", "training.run"),
    "training.pictures",
)

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


def generator_tensors(device: torch.device, processes: Processes) -> dict[str, Tensor]:
    """Return the states of torch's generators in every process, as rows ``(processes, bytes)``.

    Dropout draws from them. All else has generators of its own, made anew for each clip and batch.
    """
    states = {"generator.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["generator.cuda"] = torch.cuda.get_rng_state(device)
    return {name: processes.gather(one[None].to(device)).cpu() for name, one in states.items()}


def restore_generators(
    tensors: Mapping[str, Tensor], device: torch.device, processes: Processes
) -> None:
    """Undo `generator_tensors`."""
    torch.set_rng_state(tensors["generator.cpu"][processes.rank])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["generator.cuda"][processes.rank], device)


# --- what a state belongs to --------------------------------------------------------------------


def identity_of(
    experiment: Values, fold: int, data: TrainingData, processes: Processes
) -> dict[str, Any]:
    """Return what must be the same when a training goes on: experiment, data, code, processes."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "code": digest_code(CODE),
        "processes": processes.world_size,
        "fold": fold,
        "recordings": digest_table(data.recordings),
        "labels": None if data.relabelled is None else digest_table(data.relabelled),
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
