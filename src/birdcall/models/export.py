"""Export networks as ONNX, and in int8 or for bfloat16, where their labels stay the same."""

from __future__ import annotations

import io
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from birdcall.config import require
from birdcall.models.checkpoint import (
    BFLOAT16,
    CPU_BATCH,
    INT8,
    ExportedModel,
    OnnxModel,
    OpenVinoModel,
)
from birdcall.storage.files import UserError, write_atomically

_INT8_OPERATORS = ("Conv", "Add", "Mul", "Relu", "Clip", "MaxPool", "GlobalAveragePool", "Concat")
_FLOAT_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)  # of the backbone's convolutions, the first ones
_LABEL_THRESHOLDS = (0.3, 0.5, 0.7)  # of clipwise and framewise probability; labels at each count
_MIN_PARITY = 0.99
_MIN_LABELLED_ROWS = 20  # with a species at the lowest threshold: silence would always agree
_MIN_WINDOWS = 50  # to calibrate, and as many to compare labels
_SPEED_REPEATS = 11


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


# --- low precision: faster, where it predicts the same labels ---


class LowPrecisionError(UserError):
    """A network that predicts other labels in low precision, or recordings too few to tell."""


class LabelParity(NamedTuple):
    """How a network in low precision compares with float32, on windows of other recordings.

    In int8 it was not calibrated on them. rows_equal: the share of rows with the same labels.
    row_wise_f1: of low precision, float32 being the truth. Both are the lowest at several
    thresholds. speed: times as fast on one thread of this machine. float_share: of the backbone's
    convolutions, that of the first ones, still float32.
    """

    rows_equal: float
    row_wise_f1: float
    speed: float
    float_share: float = 0.0

    @property
    def lowest(self) -> float:
        return min(self.rows_equal, self.row_wise_f1)


def require_windows(source: str, calibration: np.ndarray, held_out: np.ndarray) -> None:
    """Raise LowPrecisionError where there is too little sound; ``source``: of it."""
    if min(len(calibration), len(held_out)) < _MIN_WINDOWS:
        raise LowPrecisionError(
            f"{source}: low precision needs {_MIN_WINDOWS} windows to calibrate, and as many of "
            f"other recordings to compare labels; there are {len(calibration)} and "
            f"{len(held_out)}: give more recordings"
        )


def quantize_onnx(path: Path, calibration: np.ndarray, held_out: np.ndarray) -> LabelParity:
    """Let the export at ``path`` compute the later layers of its backbone in int8.

    ``calibration`` and ``held_out`` are inputs ``(windows, ...)`` of other recordings. The first
    layers lose most by rounding: an eighth to three quarters of the convolutions stay float32,
    whichever is fastest on this machine where 99 % of the held-out rows have the same labels and
    their row-wise F1 is 0.99. LowPrecisionError if no share reaches that, or there is too little
    sound; the file stays as it is.
    """
    require_windows(str(path), calibration, held_out)
    comparison = _Comparison(path, held_out, INT8)
    with tempfile.TemporaryDirectory() as folder:
        candidates = {share: Path(folder) / f"{share}.onnx" for share in _FLOAT_SHARES}
        tried = []
        for share, candidate in candidates.items():
            _write_int8(path, candidate, calibration, share)
            tried.append(comparison.measure(OnnxModel(candidate), share))
        fastest = comparison.choose(tried)
        write_atomically(path, candidates[fastest.float_share].read_bytes())
    return fastest


def allow_bfloat16(path: Path, calibration: np.ndarray, held_out: np.ndarray) -> LabelParity:
    """Note in the export at ``path`` that OpenVINO may run it in bfloat16, if its labels are equal.

    Weights stay float32, for machines without OpenVINO or bfloat16. Inputs as for `quantize_onnx`,
    so that both are compared on the same rows; nothing is calibrated. LowPrecisionError, and the
    file stays as it is, where fewer than 99 % of the held-out rows have the same labels, their
    row-wise F1 is below 0.99, bfloat16 is not faster, or there is too little sound; ``ValueError``
    where OpenVINO cannot run the network in bfloat16.
    """
    require_windows(str(path), calibration, held_out)
    network = OpenVinoModel(path, slower=OnnxModel(path))
    comparison = _Comparison(path, held_out, BFLOAT16)
    try:
        parity = comparison.choose([comparison.measure(network)])
    except RuntimeError as error:
        raise ValueError(f"{path}: OpenVINO fails in bfloat16: {error}") from error
    if parity.speed <= 1:
        raise LowPrecisionError(
            f"{path}: in bfloat16 it is {parity.speed:.2f} x as fast as in float32, which it stays"
        )
    mark_bfloat16(path, f"{parity.rows_equal:.1%} of rows have the same labels")
    return parity


def mark_bfloat16(path: Path, reason: str) -> None:
    """Let OpenVINO run the export at ``path`` in bfloat16, whatever its labels are then."""
    import onnx

    network, current = onnx.load(path), OnnxModel(path)
    require(current.precision != INT8, f"{path}: it is in int8 already")
    onnx.helper.set_model_props(network, current.metadata | {BFLOAT16: reason})
    write_atomically(path, network.SerializeToString())


class _Comparison:
    """The labels of an export in float32, and how those in low precision compare.

    LowPrecisionError where too few rows have a label at the lowest threshold.
    """

    def __init__(self, path: Path, held_out: np.ndarray, precision: str) -> None:
        self.path, self.held_out, self.precision = path, held_out, precision
        self.reference = OnnxModel(path)
        self.expected = _predict_rows(self.reference, held_out)
        lowest = _LABEL_THRESHOLDS[0]
        n_labelled = int((self.expected >= lowest).any(axis=1).sum())
        if n_labelled < _MIN_LABELLED_ROWS:
            raise LowPrecisionError(
                f"{path}: {precision} is compared where a species reaches {lowest:g}, which are "
                f"{n_labelled} of {len(self.expected)} rows; {_MIN_LABELLED_ROWS} are needed: give "
                "recordings of the network's species"
            )

    def measure(self, network: ExportedModel, float_share: float = 0.0) -> LabelParity:
        actual = _predict_rows(network, self.held_out)
        speed = _compare_speed(self.reference, network, self.held_out[:CPU_BATCH])
        return LabelParity(*_compare_labels(self.expected, actual), speed, float_share)

    def choose(self, tried: Sequence[LabelParity]) -> LabelParity:
        """Return the fastest with the same labels; LowPrecisionError where there is none."""
        passed = [parity for parity in tried if parity.lowest >= _MIN_PARITY]
        if not passed:
            best = max(tried, key=lambda parity: parity.lowest)
            raise LowPrecisionError(
                f"{self.path}: in {self.precision} {best.rows_equal:.1%} of {len(self.expected)} "
                f"rows have the same labels, and their row-wise F1 is {best.row_wise_f1:.3f}; both "
                f"must be {_MIN_PARITY:g}: the export stays float32"
            )
        return max(passed, key=lambda parity: parity.speed)


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
        batches = iter(np.split(calibration, range(CPU_BATCH, len(calibration), CPU_BATCH)))
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
        metadata = OnnxModel(path).metadata | {INT8: f"from layer {first}"}
        onnx.helper.set_model_props(network, metadata)
        onnx.save(network, to)
    finally:
        logging.disable(disabled)


def _predict_rows(network: ExportedModel, inputs: np.ndarray) -> np.ndarray:
    """Return the lower of clipwise and framewise probability of each segment: (rows, classes)."""
    lower = []
    for start in range(0, len(inputs), CPU_BATCH):
        batch = inputs[start : start + CPU_BATCH]
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


def _compare_speed(reference: OnnxModel, network: ExportedModel, inputs: np.ndarray) -> float:
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
