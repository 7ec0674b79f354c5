"""Cut audio into windows, in constant memory, and predict their segments, by torch or ONNX."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from birdcall.audio.frontend import LogMel
from birdcall.config import SEGMENT_SECONDS, require, require_choice
from birdcall.models.checkpoint import (
    Checkpoint,
    ExportedModel,
    OnnxModel,
    find_onnx_fault,
    load_model,
    open_export,
)
from birdcall.models.export import export_onnx, largest_difference
from birdcall.models.sed import SEDModel
from birdcall.models.summary import FrameTimes, measure_frame_times
from birdcall.storage.files import UserError, atomic_path

FRAMES_PER_SEGMENT = 50  # of predictions over time: finer than the frames of any member
FRAME_SECONDS = SEGMENT_SECONDS / FRAMES_PER_SEGMENT

ONNX_FILE = "model.onnx"  # beside a checkpoint's weights
_SOURCES = ("log_mel", "waveform")  # inputs of an exported model
_METADATA_KEY = "birdcall"
_TOLERANCE = 1e-4  # in probability, and of an embedding's largest value
_N_PROBES = 6
_MAX_WINDOW_SECONDS = 600.0  # as long as the longest soundscapes of the competition

Waveforms = Mapping[int, np.ndarray]  # sample rate → the same audio at this rate, (samples,)
# sample rates → short audio at once, long audio in blocks; raises AudioError
AudioSource = Callable[[Sequence[int]], Waveforms | Iterator[Waveforms]]


@dataclass(frozen=True)
class WindowConfig:
    """The length of a window: a number of segments, and context before and after them.

    The network takes the context as input, but nothing is predicted for it. Before the beginning
    and after the end of a recording the context is silence.

    With ``shifts`` above 1 windows of one segment begin so many times in each segment's length, and
    a segment's prediction is the mean of the windows that overlap with it (test-time augmentation):
    see `engine.average_shifted`. Only windows that begin within the recording's segments count.
    """

    window_segments: int = 1
    context_seconds: float = 0.0
    shifts: int = 1

    def __post_init__(self) -> None:
        require(
            isinstance(self.window_segments, int) and self.window_segments >= 1,
            f"window_segments is {self.window_segments}; give an integer above 0",
        )
        frames = self.context_seconds / FRAME_SECONDS
        require(
            0 <= frames < float("inf") and abs(frames - round(frames)) < 1e-6,
            f"context_seconds is {self.context_seconds}; give a multiple of {FRAME_SECONDS:g}, "
            "0 or more",
        )
        require(
            isinstance(self.shifts, int)
            and self.shifts >= 1
            and FRAMES_PER_SEGMENT % self.shifts == 0,
            f"shifts is {self.shifts}; give a divisor of {FRAMES_PER_SEGMENT}, such as 1, 2 or 5",
        )
        require(
            self.shifts == 1 or self.window_segments == 1,
            f"shifts is {self.shifts}, window_segments {self.window_segments}: one of them must be "
            "1, since windows of several segments are not shifted",
        )
        require(
            self.window_seconds <= _MAX_WINDOW_SECONDS,
            f"window_segments is {self.window_segments}, context_seconds {self.context_seconds:g}: "
            f"a window of {self.window_seconds:g} s; give one of {_MAX_WINDOW_SECONDS:g} s at most",
        )

    @property
    def window_seconds(self) -> float:
        return self.window_segments * SEGMENT_SECONDS + 2 * self.context_seconds

    @property
    def hop_seconds(self) -> float:
        """Return the time between the starts of two windows."""
        return self.window_segments * SEGMENT_SECONDS / self.shifts

    def count_windows(self, n_segments: int) -> int:
        """Return how many windows a recording of ``n_segments`` has."""
        if self.shifts > 1:
            return self.shifts * (n_segments - 1) + 1
        return -(-n_segments // self.window_segments)


SINGLE_SEGMENT = WindowConfig()


class Window(NamedTuple):
    """The input of a network, ``(samples,)`` at each rate; n_segments: those not all padding.

    A shifted window counts as one segment, until `engine.average_shifted`.
    """

    waveforms: dict[int, np.ndarray]
    n_segments: int


class End(NamedTuple):
    """The end of a source, and its length."""

    seconds: float


def count_segments(n_samples: int, sample_rate: int) -> int:
    """Return how many segments a recording has; the last one may be padded, and there is one."""
    return max(1, -(-n_samples // (SEGMENT_SECONDS * sample_rate)))


def cut_windows(
    audio: Waveforms | Iterator[Waveforms], window_config: WindowConfig = SINGLE_SEGMENT
) -> Iterator[Window | End]:
    """Yield the windows of audio, the last one padded with zeros, and its end.

    Windows of all rates begin at the same time. Memory holds a block and a window, whatever the
    length of the audio.
    """
    buffers: dict[int, _Buffer] = {}
    for waveforms in [audio] if isinstance(audio, Mapping) else audio:
        for rate, waveform in waveforms.items():
            if rate not in buffers:
                buffers[rate] = _Buffer(rate, window_config)
            buffers[rate].held.append(waveform)
            buffers[rate].n_held += len(waveform)
            buffers[rate].n_added += len(waveform)
        while all(buffer.n_held >= buffer.n_window for buffer in buffers.values()):
            windows = {rate: buffer.take() for rate, buffer in buffers.items()}
            yield Window(windows, window_config.window_segments)
    rate, leader = next(iter(buffers.items()))  # lengths at other rates differ by rounding
    seconds = leader.n_added / rate
    n_segments = count_segments(leader.n_added, rate)
    n_windows, n_own = window_config.count_windows(n_segments), window_config.window_segments
    for number in range(leader.n_taken, n_windows):
        windows = {rate: buffer.take() for rate, buffer in buffers.items()}
        n_left = n_segments - number * window_config.window_segments
        yield Window(windows, 1 if window_config.shifts > 1 else min(n_left, n_own))
    yield End(seconds)


class _Buffer:
    """What has been read at one sample rate and is not in a window yet."""

    def __init__(self, sample_rate: int, window_config: WindowConfig) -> None:
        self.n_window = round(window_config.window_seconds * sample_rate)
        self.n_hop = round(window_config.hop_seconds * sample_rate)
        self.n_added = self.n_taken = 0  # samples, windows
        self.n_held = round(window_config.context_seconds * sample_rate)
        self.held = deque([np.zeros(self.n_held, np.float32)])

    def take(self) -> np.ndarray:
        """Return the next window, zeros where nothing is left."""
        window, n_filled = np.zeros(self.n_window, np.float32), 0
        for part in self.held:
            room = window[n_filled:]
            room[: len(part)] = part[: len(room)]
            n_filled += len(part)
        n_left = self.n_hop
        while self.held and n_left >= len(self.held[0]):
            n_left -= len(self.held.popleft())
        if self.held:
            self.held[0] = self.held[0][n_left:]
        self.n_held = max(0, self.n_held - self.n_hop)
        self.n_taken += 1
        return window


# --- predictions by segments ----------------------------------------------------------------------


class SegmentOutput(NamedTuple):
    """The output of a network for the segments of its windows, float32.

    clipwise, framewise: ``(windows, segments, classes)`` probabilities; framewise is the highest of
    the network's frames in the segment. frames: ``(windows, classes, segments *
    FRAMES_PER_SEGMENT)``, interpolated between the network's, at even distances. embedding:
    ``(windows, segments, temporal_size)``, the mean over the segment of what the head receives.
    """

    clipwise: Tensor
    framewise: Tensor
    frames: Tensor
    embedding: Tensor


class SegmentModel(nn.Module):
    """A model that takes windows of ``window_config`` and predicts their segments.

    log_mel ``(windows, channels, frames, n_mels)`` → `SegmentOutput`. The network receives the
    whole window; the head pools the frames of each segment apart, so that a species of the next
    segment is not in it. The frames of a segment are interpolated between the network's frames;
    when those are is measured once, at the first call.
    """

    def __init__(self, model: SEDModel, window_config: WindowConfig = SINGLE_SEGMENT) -> None:
        super().__init__()
        self.model, self.window_config = model, window_config
        self._is_single = replace(window_config, shifts=1) == SINGLE_SEGMENT
        self._times: FrameTimes | None = None

    def forward(self, log_mel: Tensor, *, with_frames: bool = True) -> SegmentOutput:
        """with_frames: if not, ``frames`` may be empty, and no times need to be measured."""
        n_segments = self.window_config.window_segments
        features = self.model.features(log_mel)
        if not self._is_single:
            parts = self._resample(features, log_mel).unflatten(2, (n_segments, -1))
            features = parts.transpose(1, 2).flatten(0, 1)
        clipwise, framewise = self.model.head(features)
        if not self._is_single:
            frames = framewise
        else:
            frames = self._resample(framewise, log_mel) if with_frames else framewise[..., :0]
        return SegmentOutput(
            clipwise.unflatten(0, (-1, n_segments)),
            framewise.amax(dim=2).unflatten(0, (-1, n_segments)),
            frames.unflatten(0, (-1, n_segments)).transpose(1, 2).flatten(2),
            features.mean(dim=2).unflatten(0, (-1, n_segments)).float(),
        )

    def _resample(self, frames: Tensor, log_mel: Tensor) -> Tensor:
        """Return the network's ``frames`` at the middles of the frames of all segments."""
        if self._times is None:
            self._times = measure_frame_times(self.model, log_mel.shape[2])
        number = np.arange(self.window_config.window_segments * FRAMES_PER_SEGMENT)
        moments = self.window_config.context_seconds + (number + 0.5) * FRAME_SECONDS
        return self._times.interpolate(frames, moments)


# --- export as ONNX -------------------------------------------------------------------------------


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
    frames, n_mels)``, as the kernel needs it, or the ``waveform`` ``(windows, samples)``, for other
    programs. Its outputs are those of `SegmentOutput`; its metadata names the weights.
    ExportError if a probability differs by more than 1e-4; then nothing is written.
    """
    require_choice("input", source, _SOURCES)
    model, checkpoint = load_model(folder)
    waveforms = probe_windows(checkpoint.experiment.frontend.sample_rate, window_config)
    detector = SegmentModel(model, window_config)
    with torch.inference_mode():
        log_mel = model.frontend(waveforms)
        outputs = detector(log_mel)  # it measures the times of the frames, which are exported
    expected = {name: value.numpy() for name, value in outputs._asdict().items()}
    if source == "log_mel":
        inputs, frontend = log_mel, nn.Identity()
    else:  # the exported front end computes its spectra by convolution
        inputs = waveforms
        frontend = LogMel(replace(checkpoint.experiment.frontend, implementation="conv"))
    network = nn.Sequential(OrderedDict(frontend=frontend, detector=detector))
    with atomic_path(path) as temporary:
        export_onnx(
            network.eval(),
            inputs,
            temporary,
            metadata=_describe_export(checkpoint, window_config, source),
            input_name=source,
            output_names=SegmentOutput._fields,
        )
        difference = largest_difference(OnnxModel(temporary), inputs.numpy(), expected)
        if not difference <= _TOLERANCE:  # NaN too
            raise ExportError(
                f"{folder}: ONNX Runtime's probabilities differ from torch's by {difference:.2g}, "
                f"more than {_TOLERANCE:g}; nothing is written"
            )
    return difference


def _describe_export(
    checkpoint: Checkpoint, window_config: WindowConfig, source: str
) -> dict[str, str]:
    """Return an exported file's metadata, text by key as ONNX requires.

    ``source`` is the name of the input: log_mel or waveform.
    """
    windows = asdict(window_config)
    del windows["shifts"]  # of the starts of windows, which an export knows nothing of
    about = {
        "weights_sha256": checkpoint.weights_sha256,
        "experiment": asdict(checkpoint.experiment),
        "fold": checkpoint.fold,
        "classes": checkpoint.classes,
        "window_config": windows,
        "input": source,
        "frame_times": "measured",  # exports without this have the times of equal parts
    }
    return {_METADATA_KEY: json.dumps(about)}


def find_export(
    folder: Path, checkpoint: Checkpoint, window_config: WindowConfig
) -> ExportedModel | None:
    """Load the checkpoint's exported model; None where there is none.

    ``ValueError`` if it is of other weights or windows, or no runtime can run it.
    """
    if not (path := folder / ONNX_FILE).is_file():
        return None
    if fault := find_onnx_fault():
        raise ValueError(f"{path}: {fault}")
    export = open_export(path)
    expected = _describe_export(checkpoint, window_config, "log_mel")
    if export.metadata.get(_METADATA_KEY) != expected[_METADATA_KEY]:
        raise ValueError(f"{path}: of other weights or other windows")
    return export


def probe_windows(rate: int, window_config: WindowConfig = SINGLE_SEGMENT) -> Tensor:
    """Return ``(probes, samples)`` of noise, tones, clicks and silence, loud and quiet."""
    generator = torch.Generator().manual_seed(0)
    n_samples = round(window_config.window_seconds * rate)
    noise = torch.randn(_N_PROBES, n_samples, generator=generator)
    seconds = torch.arange(n_samples) / rate
    chirp = torch.sin(2 * torch.pi * (1000 + 300 * seconds) * seconds)
    song = chirp * (torch.sin(2 * torch.pi * 6 * seconds) > 0)
    clicks = torch.zeros(n_samples)
    clicks[:: rate // 3] = 1.0
    audible = [0.3 * noise[0], 0.5 * chirp, song + 0.01 * noise[1], clicks, 1e-3 * noise[2]]
    return torch.stack([*audible, torch.zeros(n_samples)])
