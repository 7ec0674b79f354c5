"""Run a member's exported network with ONNX Runtime: on a CPU at least twice as fast as torch."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from birdcall.inference.windows import WindowConfig
from birdcall.models.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

ONNX_FILE = "model.onnx"  # beside a checkpoint's weights
METADATA_KEY = "birdcall"


class OnnxDetector:
    """What `models.SegmentModel` is, on the CPU: log-mels in, segments' probabilities out.

    It runs on the caller's thread alone; several threads may call it at once.
    """

    def __init__(self, path: Path) -> None:
        self.session = open_session(path)

    def __call__(self, log_mel: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Return the named ones of `models.SegmentOutput`."""
        return self.session.run(list(outputs), {"log_mel": log_mel})


def is_onnx_installed() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def open_session(path: Path) -> Any:
    """Open an exported model for one thread; ``ValueError`` if the file is not one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's errors have no common class of their own
        raise ValueError(f"{path}: not a model that ONNX Runtime reads: {error}") from error


def describe_export(checkpoint: Checkpoint, listening: WindowConfig, source: str) -> dict[str, str]:
    """Return what an exported file says of itself, as ONNX wants it: text by key.

    ``source`` is what goes in: log_mel or waveform.
    """
    about = {
        "weights_sha256": checkpoint.weights_sha256,
        "experiment": checkpoint.experiment.to_dict(),
        "fold": checkpoint.fold,
        "classes": checkpoint.classes,
        "listening": asdict(listening),
        "input": source,
    }
    return {METADATA_KEY: json.dumps(about)}


def find_export(folder: Path, checkpoint: Checkpoint, listening: WindowConfig) -> Path | None:
    """Return the checkpoint's exported model, if it is of these weights and this listening."""
    path = folder / ONNX_FILE
    if not path.is_file() or not is_onnx_installed():
        return None
    found = open_session(path).get_modelmeta().custom_metadata_map
    expected = describe_export(checkpoint, listening, "log_mel")
    if found.get(METADATA_KEY) != expected[METADATA_KEY]:
        logger.warning("%s: of other weights or other windows; torch runs in its place", path)
        return None
    return path
