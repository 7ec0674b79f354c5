"""Save and load a trained model with its experiment, classes, fold and score; export it as ONNX."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from birdcall import __version__
from birdcall.config import FULL, Experiment, config_from_dict, require
from birdcall.models.sed import SEDModel, build_model
from birdcall.storage.files import UserError, shorten_list, write_atomically

WEIGHTS_FILE = "model.safetensors"
SETTINGS_FILE = "model.json"
STATE_FILE = "state.safetensors"  # of an unfinished run: see `training.resume`

_INT8 = "int8"  # in an export's metadata
_INT8_OPERATORS = ("Conv", "Add", "Mul", "Relu", "Clip", "MaxPool", "GlobalAveragePool", "Concat")
_FLOAT_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)  # of the backbone's convolutions, the first ones
_LABEL_THRESHOLDS = (0.3, 0.5, 0.7)  # of clipwise and framewise probability; labels at each count
_MIN_PARITY = 0.99
_MIN_LABELLED_ROWS = 20  # with a species at the lowest threshold: silence would always agree
_MIN_WINDOWS = 50  # to calibrate, and as many to compare labels
_BATCH = 4  # windows
_SPEED_REPEATS = 11


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


class OnnxModel:
    """An exported network with one input, run by ONNX Runtime on the caller's thread alone.

    Several threads may call it at once. ``ValueError`` if the file is not such a network, or of a
    newer opset than the runtime knows. version: of ONNX Runtime. identity: "onnx", and for int8 the
    digest of the file, since its probabilities are its own.
    """

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
        self.is_int8 = _INT8 in self.metadata
        digest = hashlib.sha256(content).hexdigest()
        self.identity = f"onnx int8 {digest}" if self.is_int8 else "onnx"

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
        raise ValueError(f"export needs more: {error}; pip install -e '.[onnx]'") from error
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


# --- int8: half as fast again without special instructions, if it predicts the same labels --------


class QuantizationError(UserError):
    """A network that predicts other labels in int8, or recordings too few to tell."""


class LabelParity(NamedTuple):
    """How an int8 network compares with float32, on windows that it was not calibrated on.

    rows_equal: the share of rows with the same labels. row_wise_f1: of int8, float32 being the
    truth. Both are the lowest at several thresholds. speed: times as fast on one thread of this
    machine. float_share: of the backbone's convolutions, that of the first ones, still float32.
    """

    rows_equal: float
    row_wise_f1: float
    speed: float
    float_share: float

    @property
    def lowest(self) -> float:
        return min(self.rows_equal, self.row_wise_f1)


def require_windows(source: str, calibration: np.ndarray, held_out: np.ndarray) -> None:
    """Raise QuantizationError where `quantize_onnx` has too little sound; ``source``: of it."""
    if min(len(calibration), len(held_out)) < _MIN_WINDOWS:
        raise QuantizationError(
            f"{source}: int8 needs {_MIN_WINDOWS} windows to calibrate, and as many of other "
            f"recordings to compare labels; there are {len(calibration)} and {len(held_out)}: "
            "give more recordings"
        )


def quantize_onnx(path: Path, calibration: np.ndarray, held_out: np.ndarray) -> LabelParity:
    """Let the export at ``path`` compute the later layers of its backbone in int8.

    ``calibration`` and ``held_out`` are inputs ``(windows, ...)`` of other recordings. The first
    layers lose most by rounding: an eighth to three quarters of the convolutions stay float32,
    whichever is fastest on this machine where 99 % of the held-out rows have the same labels and
    their row-wise F1 is 0.99. QuantizationError if no share reaches that, or there is too little
    sound; the file stays as it is.
    """
    require_windows(str(path), calibration, held_out)
    reference = OnnxModel(path)
    expected = _predict_rows(reference, held_out)
    n_labelled = int((expected >= _LABEL_THRESHOLDS[0]).any(axis=1).sum())
    if n_labelled < _MIN_LABELLED_ROWS:
        raise QuantizationError(
            f"{path}: int8 is compared where a species reaches {_LABEL_THRESHOLDS[0]:g}, which are "
            f"{n_labelled} of {len(expected)} rows; {_MIN_LABELLED_ROWS} are needed: give "
            "recordings of the network's species"
        )
    tried = []
    with tempfile.TemporaryDirectory() as folder:
        for share in _FLOAT_SHARES:
            candidate = Path(folder) / f"{share}.onnx"
            _write_int8(path, candidate, calibration, share)
            network = OnnxModel(candidate)
            rows_equal, row_wise_f1 = _compare_labels(expected, _predict_rows(network, held_out))
            speed = _compare_speed(reference, network, held_out[:_BATCH])
            tried.append(LabelParity(rows_equal, row_wise_f1, speed, share))
        passed = [parity for parity in tried if parity.lowest >= _MIN_PARITY]
        if not passed:
            best = max(tried, key=lambda parity: parity.lowest)
            raise QuantizationError(
                f"{path}: in int8 {best.rows_equal:.1%} of {len(expected)} rows have the same "
                f"labels, and their row-wise F1 is {best.row_wise_f1:.3f}; both must be "
                f"{_MIN_PARITY:g}: the export stays float32"
            )
        fastest = max(passed, key=lambda parity: parity.speed)
        write_atomically(path, (Path(folder) / f"{fastest.float_share}.onnx").read_bytes())
    return fastest


def _write_int8(path: Path, to: Path, calibration: np.ndarray, float_share: float) -> None:
    """Write the export at ``path`` to ``to`` with the later layers of its backbone in int8.

    Weights have seven bits, and a scale for each channel: with eight, sums overflow on processors
    without instructions for int8. ``ValueError`` where there is no backbone to quantise.
    """
    try:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ValueError(f"int8 needs more: {error}; pip install -e '.[onnx]'") from error
    folded = to.with_name("folded.onnx")  # batch normalisation is in the weights of convolutions
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of each tensor that is no float
    try:
        quant_pre_process(path, folded, skip_symbolic_shape=True)
        graph = onnx.load(folded).graph
        n_dimensions = {item.name: len(item.dims) for item in graph.initializer}
        convolutions = [  # in two dimensions: those of the head have one
            number
            for number, node in enumerate(graph.node)
            if node.op_type == "Conv" and n_dimensions.get(node.input[1]) == 4
        ]
        require(len(convolutions) > 1, f"{path}: no backbone with convolutions to run in int8")
        first = convolutions[round(float_share * len(convolutions))]
        batches = iter(np.split(calibration, range(_BATCH, len(calibration), _BATCH)))
        inputs = ({graph.input[0].name: batch} for batch in batches)
        quantize_static(
            folded,
            to,
            SimpleNamespace(get_next=lambda: next(inputs, None)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_INT8_OPERATORS),
            nodes_to_quantize=[node.name for node in graph.node[first : convolutions[-1] + 1]],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        network = onnx.load(to)
        metadata = OnnxModel(path).metadata | {_INT8: f"from layer {first}"}
        onnx.helper.set_model_props(network, metadata)
        onnx.save(network, to)
    finally:
        logging.disable(disabled)


def _predict_rows(network: OnnxModel, inputs: np.ndarray) -> np.ndarray:
    """Return the lower of clipwise and framewise probability of each segment: (rows, classes)."""
    lower = []
    for start in range(0, len(inputs), _BATCH):
        batch = inputs[start : start + _BATCH]
        clipwise, framewise = network(batch, ["clipwise", "framewise"])
        lower.append(np.minimum(clipwise, framewise).reshape(-1, clipwise.shape[-1]))
    return np.concatenate(lower)


def _compare_labels(expected: np.ndarray, actual: np.ndarray) -> tuple[float, float]:
    """Return the share of equal rows and row-wise F1, each at the threshold where it is lowest."""
    rows_equal, row_wise_f1 = [], []
    for threshold in _LABEL_THRESHOLDS:
        truth, labels = (expected >= threshold), (actual >= threshold)
        # A row without a species has one label, nocall.
        n_labels = np.maximum(truth.sum(axis=1), 1) + np.maximum(labels.sum(axis=1), 1)
        hits = (truth & labels).sum(axis=1) + ~(truth | labels).any(axis=1)
        rows_equal.append((truth == labels).all(axis=1).mean())
        row_wise_f1.append((2 * hits / n_labels).mean())
    return float(min(rows_equal)), float(min(row_wise_f1))


def _compare_speed(reference: OnnxModel, network: OnnxModel, inputs: np.ndarray) -> float:
    """Return how many times as fast ``network`` is: the median of runs in turns."""
    ratios = []
    for _ in range(_SPEED_REPEATS):
        seconds = []
        for model in (reference, network):
            start = time.thread_time()
            model(inputs, ["clipwise", "framewise"])
            seconds.append(time.thread_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return float(np.median(ratios))
