"""Export a checkpoint as ONNX and refuse an export whose predictions differ; find it again."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from birdcall.audio.frontend import LogMel
from birdcall.config import require_choice
from birdcall.inference.windows import SINGLE_SEGMENT, SegmentModel, SegmentOutput, WindowConfig
from birdcall.models.checkpoint import Checkpoint, load_model
from birdcall.models.onnx import OnnxModel, export_onnx, is_onnx_installed, largest_difference
from birdcall.models.sed import SEDModel
from birdcall.storage.files import UserError, atomic_path

logger = logging.getLogger(__name__)

SOURCES = ("log_mel", "waveform")
ONNX_FILE = "model.onnx"  # beside a checkpoint's weights
METADATA_KEY = "birdcall"
TOLERANCE = 1e-4  # in probability, and of an embedding's largest value
N_PROBES = 6


class ExportError(UserError):
    """An exported model whose predictions differ from those of its checkpoint."""


def export_checkpoint(
    folder: Path,
    path: Path,
    window_config: WindowConfig = SINGLE_SEGMENT,
    source: str = "log_mel",
) -> float:
    """Write the checkpoint in ``folder`` to ``path``; return by how much it differs from torch.

    The file takes any number of windows of `window_config`: their ``log_mel`` ``(windows, channels,
    frames, n_mels)``, as the kernel wants it, or the ``waveform`` ``(windows, samples)``, for other
    programs. Its outputs are those of `SegmentOutput`; its metadata names the weights.
    ExportError if a probability differs by more than `TOLERANCE`; then nothing is written.
    """
    require_choice("source", source, SOURCES)
    model, checkpoint = load_model(folder)
    waveforms = probe_windows(checkpoint.experiment.frontend.sample_rate, window_config)
    with torch.inference_mode():
        log_mel = model.frontend(waveforms)
        outputs = SegmentModel(model, window_config)(log_mel)
    expected = {name: value.numpy() for name, value in outputs._asdict().items()}
    inputs = log_mel if source == "log_mel" else waveforms
    with atomic_path(path) as temporary:
        export_onnx(
            _Exported(model, checkpoint, window_config, source).eval(),
            inputs,
            temporary,
            metadata=describe_export(checkpoint, window_config, source),
            input_name=source,
            output_names=SegmentOutput._fields,
        )
        difference = largest_difference(OnnxModel(temporary), inputs.numpy(), expected)
        if not difference <= TOLERANCE:  # NaN too
            raise ExportError(
                f"{folder}: ONNX Runtime's probabilities differ from torch's by {difference:.2g}, "
                f"more than {TOLERANCE:g}; nothing is written"
            )
    return difference


class _Exported(nn.Module):
    """A detector, behind its front end's twin by convolution where waveforms go in."""

    def __init__(
        self, model: SEDModel, checkpoint: Checkpoint, window_config: WindowConfig, source: str
    ) -> None:
        super().__init__()
        twin = replace(checkpoint.experiment.frontend, implementation="conv")
        self.frontend = LogMel(twin) if source == "waveform" else nn.Identity()
        self.detector = SegmentModel(model, window_config)

    def forward(self, windows: Tensor) -> SegmentOutput:
        return self.detector(self.frontend(windows))


def describe_export(
    checkpoint: Checkpoint, window_config: WindowConfig, source: str
) -> dict[str, str]:
    """Return an exported file's metadata, text by key as ONNX requires.

    ``source`` is the name of the input: log_mel or waveform.
    """
    about = {
        "weights_sha256": checkpoint.weights_sha256,
        "experiment": checkpoint.experiment.to_dict(),
        "fold": checkpoint.fold,
        "classes": checkpoint.classes,
        "window_config": asdict(window_config),
        "input": source,
    }
    return {METADATA_KEY: json.dumps(about)}


def find_export(folder: Path, checkpoint: Checkpoint, window_config: WindowConfig) -> Path | None:
    """Return the checkpoint's exported model, if it is of these weights and these windows."""
    path = folder / ONNX_FILE
    if not path.is_file() or not is_onnx_installed():
        return None
    expected = describe_export(checkpoint, window_config, "log_mel")
    if OnnxModel(path).metadata.get(METADATA_KEY) != expected[METADATA_KEY]:
        logger.warning("%s: of other weights or other windows; torch runs in its place", path)
        return None
    return path


def probe_windows(rate: int, window_config: WindowConfig = SINGLE_SEGMENT) -> Tensor:
    """Return ``(N_PROBES, samples)`` of noise, tones, clicks and silence, loud and quiet."""
    generator = torch.Generator().manual_seed(0)
    n_samples = window_config.window_samples(rate)
    noise = torch.randn(N_PROBES, n_samples, generator=generator)
    seconds = torch.arange(n_samples) / rate
    chirp = torch.sin(2 * torch.pi * (1000 + 300 * seconds) * seconds)
    song = chirp * (torch.sin(2 * torch.pi * 6 * seconds) > 0)
    clicks = torch.zeros(n_samples)
    clicks[:: rate // 3] = 1.0
    made = [0.3 * noise[0], 0.5 * chirp, song + 0.01 * noise[1], clicks, 1e-3 * noise[2]]
    return torch.stack([*made, torch.zeros(n_samples)])
