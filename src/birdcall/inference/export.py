"""Write a trained model as ONNX, for CPUs and other programs, and refuse what says other things."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from birdcall.audio.frontend import LogMel
from birdcall.config import require_choice
from birdcall.inference.windows import SINGLE_SEGMENT, WindowConfig
from birdcall.models.checkpoint import Checkpoint, load_model
from birdcall.models.onnx import describe_export, open_session
from birdcall.models.sed import SEDModel, SegmentModel, SegmentOutput
from birdcall.storage.files import atomic_path

SOURCES = ("log_mel", "waveform")
TOLERANCE = 1e-4  # in probability, and of an embedding's largest value
N_PROBES = 6


class ExportError(ValueError):
    """A model whose exported twin says something else."""


def export_onnx(
    folder: Path,
    path: Path,
    listening: WindowConfig = SINGLE_SEGMENT,
    source: str = "log_mel",
) -> float:
    """Write the checkpoint in ``folder`` to ``path``; return by how much it differs from torch.

    The file takes any number of windows of `listening`: their ``log_mel`` ``(windows, channels,
    frames, n_mels)``, as the kernel wants it, or the ``waveform`` ``(windows, samples)``, for other
    programs. It gives what `SegmentOutput` names, and says in its metadata of which weights it is.
    ExportError if a probability differs by more than `TOLERANCE`; then nothing is written.
    """
    require_choice("source", source, SOURCES)
    model, checkpoint = load_model(folder)
    network = _Exported(model, checkpoint, listening, source).eval()
    inputs = probe_windows(checkpoint.experiment.frontend.sample_rate, listening)
    if source == "log_mel":
        with torch.inference_mode():
            inputs = model.frontend(inputs)
    inputs = inputs.clone()  # no tensor of inference mode can be traced
    with atomic_path(path) as temporary:
        _write(
            network,
            inputs,
            path=temporary,
            about=describe_export(checkpoint, listening, source),
            source=source,
        )
        difference = _compare(SegmentModel(model, listening), inputs, temporary, source)
        if not difference <= TOLERANCE:  # NaN too
            raise ExportError(
                f"{folder}: ONNX Runtime's probabilities differ from torch's by {difference:.2g}, "
                f"more than {TOLERANCE:g}; nothing is written"
            )
    return difference


class _Exported(nn.Module):
    """A detector, behind its front end's twin by convolution where waveforms go in."""

    def __init__(
        self, model: SEDModel, checkpoint: Checkpoint, listening: WindowConfig, source: str
    ) -> None:
        super().__init__()
        twin = replace(checkpoint.experiment.frontend, implementation="conv")
        self.frontend = LogMel(twin) if source == "waveform" else nn.Identity()
        self.detector = SegmentModel(model, listening)

    def forward(self, windows: Tensor) -> SegmentOutput:
        return self.detector(self.frontend(windows))


def _write(
    network: nn.Module, inputs: Tensor, path: Path, about: dict[str, str], source: str
) -> None:
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with torch.no_grad(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how a GRU keeps its weights
            program = torch.onnx.export(
                network,
                (inputs,),
                dynamo=True,
                input_names=[source],
                output_names=list(SegmentOutput._fields),
                dynamic_shapes=({0: batch},),
                external_data=False,
                verbose=False,
            )
    except ImportError as error:
        raise ValueError(f"export needs more: {error}; pip install birdcall[onnx]") from error
    program.model.metadata_props.update(about)
    program.save(path)


def _compare(detector: SegmentModel, inputs: Tensor, path: Path, source: str) -> float:
    """Return the largest difference between torch's outputs and ONNX Runtime's, on all probes."""
    expected_input = inputs
    if source == "waveform":
        with torch.inference_mode():
            expected_input = detector.model.frontend(inputs)
    with torch.inference_mode():
        expected = [one.numpy() for one in detector(expected_input)]
    session = open_session(path)
    differences = []
    for n_windows in (1, len(inputs)):  # any number must do
        found = session.run(list(SegmentOutput._fields), {source: inputs[:n_windows].numpy()})
        for name, ours, theirs in zip(SegmentOutput._fields, found, expected, strict=True):
            scale = max(1.0, float(np.abs(theirs).max())) if name == "embedding" else 1.0
            differences.append(np.abs(ours - theirs[:n_windows]).max() / scale)
    return float(np.max(differences))  # NaN if any is


def probe_windows(rate: int, listening: WindowConfig = SINGLE_SEGMENT) -> Tensor:
    """Return ``(N_PROBES, samples)`` of noise, tones, clicks and silence, loud and quiet."""
    generator = torch.Generator().manual_seed(0)
    n_samples = listening.window_samples(rate)
    noise = torch.randn(N_PROBES, n_samples, generator=generator)
    seconds = torch.arange(n_samples) / rate
    chirp = torch.sin(2 * torch.pi * (1000 + 300 * seconds) * seconds)
    song = chirp * (torch.sin(2 * torch.pi * 6 * seconds) > 0)
    clicks = torch.zeros(n_samples)
    clicks[:: rate // 3] = 1.0
    made = [0.3 * noise[0], 0.5 * chirp, song + 0.01 * noise[1], clicks, 1e-3 * noise[2]]
    return torch.stack([*made, torch.zeros(n_samples)])
