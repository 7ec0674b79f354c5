"""Save and load a trained model with its experiment, classes, fold and score; export it as ONNX."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from birdcall import __version__
from birdcall.config import FULL, Experiment, config_from_dict
from birdcall.models.sed import SEDModel, build_model
from birdcall.storage.files import shorten_list, write_atomically

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
SETTINGS_FILE = "model.json"
STATE_FILE = "state.safetensors"  # of an unfinished run: see `training.resume`


@dataclass(frozen=True)
class Checkpoint:
    """A trained model without its weights: what ``model.json`` holds.

    fold: the number of what it held out, or FULL. trained_on: digests of data, code and initial
    weights, and where it was trained, by name; empty where that is not known. See
    `training.resume.conditions_of`.
    """

    experiment: Experiment
    classes: tuple[str, ...]  # ebird_codes, in the order of the model's outputs
    fold: int | str
    score: dict[str, float] = field(default_factory=dict)
    trained_on: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    weights_sha256: str = ""

    @property
    def name(self) -> str:
        return f"{self.experiment.name}-{fold_name(self.fold)}"


def fold_name(fold: int | str) -> str:
    """Return ``fold<k>`` or ``full``: the name of a run's folder, and the end of a member's."""
    return FULL if fold == FULL else f"fold{fold}"


def save_checkpoint(folder: Path, model: SEDModel, checkpoint: Checkpoint) -> Checkpoint:
    """Write ``model.safetensors``, then ``model.json`` with its hash.

    So `load_model` notices weights and settings that do not belong together.
    """
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    weights = safetensors.torch.save(tensors)
    digest = hashlib.sha256(weights).hexdigest()
    settings = asdict(checkpoint) | {"weights_sha256": digest}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS_FILE, weights)
    write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
    return read_checkpoint(folder)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read ``model.json``; ``FileNotFoundError`` or ``ValueError`` names the file and the error."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; `birdcall train` makes one")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings["experiment"] = config_from_dict(Experiment, settings["experiment"])
        settings["classes"] = tuple(settings["classes"])
        return Checkpoint(**settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable checkpoint: {error}") from error


def read_weights(folder: Path, checkpoint: Checkpoint) -> bytes:
    """Read ``model.safetensors``; an error names it if it is missing or not the checkpoint's."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the checkpoint's weights are missing")
    weights = path.read_bytes()
    if hashlib.sha256(weights).hexdigest() != checkpoint.weights_sha256:
        raise ValueError(
            f"{path}: its sha256 differs from the one in {SETTINGS_FILE}; the file is damaged, or "
            "of another checkpoint"
        )
    return weights


def load_model(folder: Path) -> tuple[SEDModel, Checkpoint]:
    """Rebuild the model of a checkpoint on the CPU, in evaluation mode.

    Weights are read as safetensors (nothing is unpickled) and refused if their hash differs.
    """
    checkpoint = read_checkpoint(folder)
    weights, path = read_weights(folder, checkpoint), folder / WEIGHTS_FILE
    model = build_model(checkpoint.experiment, len(checkpoint.classes))
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: weights do not fit the experiment: {error}") from error
    return model.eval(), checkpoint


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the folders with a checkpoint below ``folder``, in order of name."""
    return sorted(path.parent for path in folder.rglob(SETTINGS_FILE))


def require_same_classes(folder: Path, checkpoint: Checkpoint, classes: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming differences if the checkpoint has other classes."""
    if checkpoint.classes == classes:
        return
    only_here = sorted(set(checkpoint.classes) - set(classes))
    only_there = sorted(set(classes) - set(checkpoint.classes))
    if not only_here and not only_there:
        raise ValueError(f"{folder}: checkpoint of other classes: the same in another order")
    raise ValueError(
        f"{folder}: checkpoint of other classes: {len(checkpoint.classes)} instead of "
        f"{len(classes)}; only in the checkpoint: {shorten_list(only_here) or 'none'}; "
        f"only in the data: {shorten_list(only_there) or 'none'}"
    )


# --- ONNX: on a CPU, ONNX Runtime is twice as fast as torch ---


@cache  # one warning, however many models ask
def is_onnx_installed() -> bool:
    """Return whether ONNX Runtime is installed and can be imported."""
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    try:
        importlib.import_module("onnxruntime")
    except Exception as error:  # a library of its own that is missing or of another version
        logger.warning("onnxruntime cannot be imported; torch runs in its place: %s", error)
        return False
    return True


class OnnxModel:
    """An exported network with one input, run by ONNX Runtime on the caller's thread alone.

    Several threads may call it at once. ``ValueError`` if the file is not such a network.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(
                path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
            self._input = self._session.get_inputs()[0].name
            self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        except Exception as error:  # the runtime's errors have no common base class
            raise ValueError(f"{path}: not a model that ONNX Runtime reads: {error}") from error

    def __call__(self, inputs: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Return the named outputs for a batch of inputs."""
        return self._session.run(list(outputs), {self._input: inputs})


def export_onnx(
    network: nn.Module,
    inputs: Tensor,
    path: Path,
    *,
    metadata: Mapping[str, str],
    input_name: str,
    output_names: Sequence[str],
) -> None:
    """Write ``network``, traced with ``inputs`` ``(batch, ...)``, to ``path``; any batch size runs.

    Raises ``ValueError`` where the packages that exporting needs are not installed.
    """
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with torch.no_grad(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the layout of a GRU's weights
            program = torch.onnx.export(
                network,
                (inputs.clone(),),  # a tensor of inference mode cannot be traced
                dynamo=True,
                input_names=[input_name],
                output_names=list(output_names),
                dynamic_shapes=({0: batch},),
                external_data=False,
                verbose=False,
            )
    except ImportError as error:
        raise ValueError(f"export needs more: {error}; pip install birdcall[onnx]") from error
    program.model.metadata_props.update(metadata)
    program.save(path)


def largest_difference(
    model: OnnxModel, inputs: np.ndarray, expected: Mapping[str, np.ndarray]
) -> float:
    """Return by how much outputs of ``model`` differ from ``expected``, at most.

    The batch is compared, and its first item alone. Outputs above 1 are compared relative to
    their largest value. NaN where an output is NaN.
    """
    differences = []
    for n_items in (1, len(inputs)):
        outputs = model(inputs[:n_items], list(expected))
        for output, reference in zip(outputs, expected.values(), strict=True):
            scale = max(1.0, float(np.abs(reference).max()))
            differences.append(np.abs(output - reference[:n_items]).max() / scale)
    return float(np.max(differences))
