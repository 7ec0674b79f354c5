"""Export a network as ONNX and run it by ONNX Runtime, on a CPU twice as fast as torch."""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def is_onnx_installed() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


class OnnxModel:
    """An exported network with one input, run by ONNX Runtime on the caller's thread alone.

    Several threads may call it at once. ``ValueError`` if the file is not such a network.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                path.read_bytes(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's errors have no common base class
            raise ValueError(f"{path}: not a model that ONNX Runtime reads: {error}") from error
        self._input = self._session.get_inputs()[0].name
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

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
