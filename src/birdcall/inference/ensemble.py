"""Members that hear the same windows: one decode, one log-mel per front end, every device."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from birdcall.audio.frontend import LogMel
from birdcall.audio.spectrogram import exact_float32, worker_pool
from birdcall.config import SEGMENT_SECONDS, FrontendConfig, require
from birdcall.inference.export import find_export
from birdcall.inference.windows import SINGLE_SEGMENT, SegmentModel, SegmentOutput, WindowConfig
from birdcall.models.checkpoint import Checkpoint, load_model, require_same_classes
from birdcall.models.onnx import OnnxModel
from birdcall.models.sed import SEDModel

logger = logging.getLogger(__name__)

# Segments that a network hears in one call. More of them leave a CPU's cache; a GPU wants many.
CPU_BATCH, CUDA_BATCH = 4, 64
ALWAYS = ("clipwise", "framewise")
READING, FRONT_END = "reading", "front end"
MEMBER_FRAMES = "member_frames"

# log_mel (windows, channels, frames, n_mels), names of outputs → these of `SegmentOutput`
Detector = Callable[[Tensor, Sequence[str]], list[np.ndarray]]


@dataclass(frozen=True)
class Member:
    """One trained model of an ensemble; export: the same as `export` wrote it, for ONNX Runtime."""

    name: str
    model: SEDModel
    checkpoint: Checkpoint
    export: Path | None = None


class MemberError(ValueError):
    """A member that does not run, or whose scores are no numbers."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(f"{member}: {reason}")
        self.member = member


class BatchScores(NamedTuple):
    """What members say of a batch of windows.

    clipwise, framewise: ``(members, windows, segments, classes)``. frames, the members' mean over
    time: ``(windows, classes, segments * FRAMES_PER_SEGMENT)``; member_frames, each member's:
    ``(members, …)``. embedding, theirs one after the other: ``(windows, segments, sizes)``. None
    where not asked for.
    """

    clipwise: np.ndarray
    framewise: np.ndarray
    frames: np.ndarray | None
    embedding: np.ndarray | None
    member_frames: np.ndarray | None = None


class CostMeter:
    """What was spent on what: `READING`, `FRONT_END`, and members by name.

    seconds: of a thread's work, or of a GPU's; sound: how many seconds of it that was for.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.sound: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def measure(
        self, name: str, sound: float, clock: Callable[[], float] = time.thread_time
    ) -> Iterator[None]:
        start = clock()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] += clock() - start
                self.sound[name] += sound

    def estimate(self, members: Sequence[str], passed: float) -> float:
        """Return how many seconds it takes to hear a second of sound by these members.

        ``passed``: the time in which all was spent that was spent so far.
        """
        with self._lock:
            spent = sum(self.seconds.values())
            options = sum(
                self.seconds[name] / self.sound[name]
                for name in (READING, FRONT_END, *members)
                if self.sound[name]
            )
        return passed * options / spent if spent else 0.0


@dataclass(frozen=True)
class Lane:
    """Where batches are scored: a device with the members on it, and the threads that drive it."""

    device: torch.device
    frontends: Mapping[FrontendConfig, LogMel]
    detectors: tuple[Detector, ...]
    threads: Executor
    n_threads: int


class Ensemble:
    """Members of the same classes, ready on their devices, that hear as ``listening`` says.

    On a CPU each thread of torch's number scores batches of its own: by ONNX Runtime where a member
    has an export, else by torch. ``cuda`` without a number is all GPUs; each has all members.
    """

    def __init__(
        self,
        members: Sequence[Member],
        device: torch.device | str = "cpu",
        listening: WindowConfig = SINGLE_SEGMENT,
    ) -> None:
        require(len(members) > 0, "an ensemble needs at least one member")
        for member in members[1:]:
            require_same_classes(
                Path(member.name), member.checkpoint, members[0].checkpoint.classes
            )
        self.device = torch.device(device)
        self.members = list(members)
        self.listening = listening
        self.costs = CostMeter()
        batch = CPU_BATCH if self.device.type == "cpu" else CUDA_BATCH
        self.batch_windows = max(1, batch // listening.window_segments)
        self.mixes_sounds = self.device.type != "cpu"  # within a batch, see `inference`
        self.lanes = [self._open_lane(*place) for place in enumerate(_devices(self.device))]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.members[0].checkpoint.classes

    @property
    def sample_rates(self) -> tuple[int, ...]:
        return tuple(sorted({m.checkpoint.experiment.frontend.sample_rate for m in self.members}))

    @property
    def n_threads(self) -> int:
        """Return how many batches are scored at once."""
        return sum(lane.n_threads for lane in self.lanes)

    def for_members(self, members: Sequence[Member]) -> Ensemble:
        """Return an ensemble of some of the members."""
        return Ensemble(members, self.device, self.listening)

    def hearing(self, listening: WindowConfig) -> Ensemble:
        """Return the same members that hear otherwise; exports are for one way of hearing."""
        if listening == self.listening:
            return self
        members = [replace(member, export=None) for member in self.members]
        return Ensemble(members, self.device, listening)

    def _open_lane(self, number: int, device: torch.device) -> Lane:
        configs = {member.checkpoint.experiment.frontend for member in self.members}
        frontends = {config: LogMel(config).to(device) for config in configs}
        detectors = tuple(self._open_detector(member, number, device) for member in self.members)
        if device.type != "cpu":
            return Lane(
                device=device,
                frontends=frontends,
                detectors=detectors,
                threads=ThreadPoolExecutor(1),
                n_threads=1,
            )
        n_threads = torch.get_num_threads()
        return Lane(
            device=device,
            frontends=frontends,
            detectors=detectors,
            threads=worker_pool(n_threads),
            n_threads=n_threads,
        )

    def _open_detector(self, member: Member, number: int, device: torch.device) -> Detector:
        if member.export is not None and device.type == "cpu":
            run = OnnxModel(member.export)
            return lambda log_mel, outputs: run(log_mel.numpy(), outputs)
        model = member.model if number == 0 else copy.deepcopy(member.model)
        detector = SegmentModel(model.to(device).eval(), self.listening)

        def detect(log_mel: Tensor, outputs: Sequence[str]) -> list[np.ndarray]:
            with exact_float32(device):  # TF32 is off by 3e-3 in probability
                said: SegmentOutput = detector(log_mel)
            return [getattr(said, name).cpu().numpy() for name in outputs]

        return detect

    def predict_batch(
        self,
        lane: Lane,
        waveforms: Mapping[int, np.ndarray],
        n_members: int,
        extra: Sequence[str] = (),
    ) -> BatchScores:
        """Score up to ``batch_windows`` windows, ``(windows, samples)`` at each sample rate.

        The first ``n_members`` hear them. ``extra``: also "frames", "embedding", and with frames
        "member_frames". Raises
        MemberError for one that does not run, or says what is no number.
        """
        clock = time.thread_time if lane.device.type == "cpu" else time.perf_counter
        log_mels: dict[FrontendConfig, Tensor] = {}
        sound = (
            len(next(iter(waveforms.values()))) * self.listening.window_segments * SEGMENT_SECONDS
        )
        names = (*ALWAYS, *(name for name in extra if name != MEMBER_FRAMES))
        said: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for member, detect in zip(self.members[:n_members], lane.detectors, strict=False):
            frontend = member.checkpoint.experiment.frontend
            if frontend not in log_mels:
                with self.costs.measure(FRONT_END, sound, clock), torch.inference_mode():
                    log_mels[frontend] = _compute_log_mel(
                        lane.frontends[frontend], lane.device, waveforms[frontend.sample_rate]
                    )
            with self.costs.measure(member.name, sound, clock), torch.inference_mode():
                outputs = _run(member, detect, log_mels[frontend], names)
            for name, output in zip(names, outputs, strict=True):
                said[name].append(output)
        frames, embedding = said.get("frames"), said.get("embedding")
        return BatchScores(
            clipwise=np.stack(said["clipwise"]),
            framewise=np.stack(said["framewise"]),
            frames=None if frames is None else sum(frames[1:], frames[0]) / np.float32(len(frames)),
            embedding=None if embedding is None else np.concatenate(embedding, axis=2),
            member_frames=np.stack(frames) if MEMBER_FRAMES in extra else None,
        )


def _compute_log_mel(frontend: LogMel, device: torch.device, waveforms: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(waveforms)
    if device.type != "cpu":
        return frontend(tensor.to(device))
    # One by one: how a product is rounded depends on its shape, and what is repaired in double
    # precision on how much of it there is.
    return torch.cat([frontend(one) for one in tensor.split(1)])


def _run(
    member: Member, detect: Detector, log_mel: Tensor, names: Sequence[str]
) -> list[np.ndarray]:
    try:
        outputs = detect(log_mel, names)
    except Exception as error:  # whatever a runtime raises: the other members can go on
        raise MemberError(member.name, f"does not run: {error}") from error
    for name, output in zip(names, outputs, strict=True):
        if not np.isfinite(output).all():
            raise MemberError(
                member.name, f"its {name} output holds NaN or infinity: did its training diverge?"
            )
    return outputs


def _devices(device: torch.device) -> list[torch.device]:
    if device.type == "cuda" and device.index is None:
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    return [device]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_member(folder: Path, listening: WindowConfig = SINGLE_SEGMENT) -> Member:
    """Load the checkpoint in ``folder``, with its export where it can be used."""
    model, checkpoint = load_model(folder)
    return Member(checkpoint.name, model, checkpoint, find_export(folder, checkpoint, listening))


def load_ensemble(
    folders: Sequence[Path],
    device: torch.device | str = "cpu",
    listening: WindowConfig = SINGLE_SEGMENT,
) -> Ensemble:
    """Load the checkpoints in ``folders`` as one ensemble; their classes must agree."""
    return Ensemble([load_member(folder, listening) for folder in folders], device, listening)
