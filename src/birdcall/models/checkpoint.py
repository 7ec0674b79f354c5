"""Save and load a trained model with its experiment, classes, fold and score; run its export."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from safetensors import SafetensorError

from birdcall import __version__
from birdcall.config import FULL, Experiment, config_from_dict, require
from birdcall.models.sed import SEDModel, build_model
from birdcall.storage.files import shorten_list, write_atomically

WEIGHTS_FILE = "model.safetensors"
SETTINGS_FILE = "model.json"
FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"  # the last two in an export's metadata
CPU_BATCH = 4  # windows in one call of a network; more of them leave a CPU's cache
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


# --- exports: on a CPU, ONNX Runtime is twice as fast as torch ---


@cache
def find_onnx_fault() -> str:
    """Return why ONNX Runtime cannot be used here; empty where it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    try:
        importlib.import_module("onnxruntime")
    except Exception as error:  # a library of its own that is missing or of another version
        return f"onnxruntime cannot be imported: {error}"
    return ""


def is_onnx_installed() -> bool:
    """Return whether ONNX Runtime is installed and can be imported."""
    return not find_onnx_fault()


@cache
def find_bfloat16_fault() -> str:
    """Return why OpenVINO cannot run a network in bfloat16 here; empty where it can."""
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed (pip install -e '.[openvino]')"
    try:
        openvino = importlib.import_module("openvino")
        abilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except Exception as error:  # a library of its own that is missing or of another version
        return f"openvino cannot be used: {error}"
    return "" if "BF16" in abilities else "this processor has no instructions for bfloat16"


class OnnxModel:
    """An exported network with one input, run by ONNX Runtime on the caller's thread alone.

    Several threads may call it at once. ``ValueError`` if the file is not such a network, or of a
    newer opset than the runtime knows. version: of ONNX Runtime. identity: "onnx", and for int8 the
    digest of the file, since its probabilities are its own. low_precision: in which the file may
    run, empty for float32 alone. bfloat16_fault: why a file that may run in bfloat16 runs in
    float32. slower: what runs where this fails; None: torch.
    """

    runtime, slower = "ONNX Runtime", None

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime

            self.version = onnxruntime.__version__
            content = path.read_bytes()
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
            self._input = self._session.get_inputs()[0].name
            self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        except Exception as error:  # the runtime's errors have no common base class
            raise ValueError(f"{path}: not a model that ONNX Runtime reads: {error}") from error
        self.low_precision = next((name for name in (INT8, BFLOAT16) if name in self.metadata), "")
        self.bfloat16_fault = ""
        self.precision = INT8 if self.low_precision == INT8 else FLOAT32
        digest = hashlib.sha256(content).hexdigest()
        self.identity = f"onnx int8 {digest}" if self.precision == INT8 else "onnx"

    def __call__(self, inputs: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Return the named outputs for a batch of inputs."""
        return self._session.run(list(outputs), {self._input: inputs})


class OpenVinoModel:
    """An exported network with one input, run by OpenVINO in bfloat16 on the caller's thread alone.

    Several threads may call it at once: each compiles the network for itself at its first call, for
    four inputs and for one (0.3 s each for an EfficientNet-B0). With a fixed number it runs 1.3
    times as fast as with any number. slower: the same for ONNX Runtime, in float32, which takes
    over where OpenVINO fails. Other attributes: see `OnnxModel`. ``ValueError`` where OpenVINO
    cannot read the file, or not run it in bfloat16.
    """

    runtime, precision, low_precision, bfloat16_fault = "OpenVINO", BFLOAT16, BFLOAT16, ""

    def __init__(self, path: Path, slower: OnnxModel) -> None:
        if fault := find_bfloat16_fault():
            raise ValueError(f"{path}: {fault}")
        require(slower.precision == FLOAT32, f"{path}: it is in {slower.precision}")
        try:
            import openvino

            self._core = openvino.Core()
            self._network = self._core.read_model(path)
        except Exception as error:  # the runtime's errors have no common base class
            raise ValueError(f"{path}: not a model that OpenVINO reads: {error}") from error
        self.version = openvino.__version__.partition("-")[0]
        self.identity = f"openvino {self.version} {BFLOAT16}"
        self.slower, self.metadata = slower, slower.metadata
        self._compiling = threading.Lock()
        self._of_thread = threading.local()

    def __call__(self, inputs: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Return the named outputs for a batch of inputs."""
        n_together = CPU_BATCH if len(inputs) % CPU_BATCH == 0 else 1
        parts = np.split(np.ascontiguousarray(inputs), len(inputs) // n_together)
        results = [self._run(part, outputs) for part in parts]
        return [np.concatenate(arrays) for arrays in zip(*results, strict=True)]

    def _run(self, inputs: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        requests: dict[tuple[int, ...], Any] = self._of_thread.__dict__.setdefault("requests", {})
        if inputs.shape not in requests:
            requests[inputs.shape] = self._compile(inputs.shape)
        request = requests[inputs.shape]
        request.infer({0: inputs}, share_inputs=True, share_outputs=True)
        return [request.get_tensor(name).data.copy() for name in outputs]

    def _compile(self, shape: tuple[int, ...]) -> Any:
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": 1,
            "NUM_STREAMS": 1,  # it is the caller's thread, and that of no other caller
            "ENABLE_CPU_PINNING": False,
        }
        with self._compiling:
            network = self._network.clone()
            network.reshape({0: list(shape)})
            return self._core.compile_model(network, "CPU", settings).create_infer_request()


ExportedModel = OnnxModel | OpenVinoModel


def open_export(path: Path) -> ExportedModel:
    """Open an exported network: for OpenVINO where that may run it, else for ONNX Runtime."""
    network = OnnxModel(path)
    if network.low_precision != BFLOAT16:
        return network
    try:
        return OpenVinoModel(path, slower=network)
    except ValueError as error:
        network.bfloat16_fault = str(error)
        return network
