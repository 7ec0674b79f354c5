"""Run members on the same windows: one decode, one log-mel per front end, every device."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from birdcall.audio.frontend import LogMel
from birdcall.audio.spectrogram import exact_float32, worker_pool
from birdcall.config import FrontendConfig, require
from birdcall.inference.predictions import (
    SEGMENTS_ONLY,
    OutputOptions,
    SegmentPredictions,
    join_outputs,
)
from birdcall.inference.windows import (
    SINGLE_SEGMENT,
    SegmentModel,
    SegmentOutput,
    WindowConfig,
    find_export,
)
from birdcall.models.checkpoint import (
    CPU_BATCH,
    Checkpoint,
    ExportedModel,
    load_model,
    require_same_classes,
)
from birdcall.models.sed import SEDModel
from birdcall.storage.files import UserError

logger = logging.getLogger(__name__)

_CUDA_BATCH = 64  # segments in one call of a network
# Entries of a `CostMeter` beside the members. Further front ends are numbered: "front end 2".
READING, FRONT_END = "reading", "front end"

# log_mel (windows, channels, frames, n_mels), names of outputs → these fields of `SegmentOutput`
_SegmentNetwork = Callable[[Tensor, Sequence[str]], list[np.ndarray]]


@dataclass(frozen=True)
class Member:
    """One trained model of an ensemble; export: the same for another runtime, where there is one.

    export_fault: the file of an export that is not used, a colon, and why.
    """

    name: str
    model: SEDModel
    checkpoint: Checkpoint
    export: ExportedModel | None = None
    export_fault: str = ""

    @property
    def runtime_identity(self) -> str:
        """Return on what predictions on a CPU depend beside weights and torch: such as "onnx"."""
        return "torch" if self.export is None else self.export.identity


class MemberError(UserError):
    """A member that fits no device, does not run, or predicts what are no finite numbers."""

    def __init__(self, member: str, reason: str) -> None:
        super().__init__(f"{member}: {reason}")
        self.member = member


@dataclass(eq=False)
class CostMeter:
    """Measures the time spent on `READING`, on each front end and on each member, by name.

    front_ends: the entry of each member's front end, `FRONT_END` where it is not given. seconds: of
    a thread's work, or of a GPU's. audio_seconds: the length of the audio that was processed in
    this time.
    """

    front_ends: Mapping[str, str] = field(default_factory=dict)
    seconds: Counter[str] = field(default_factory=Counter)
    audio_seconds: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @contextmanager
    def measure(
        self, name: str, audio_seconds: float, clock: Callable[[], float] = time.thread_time
    ) -> Iterator[None]:
        start = clock()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] += clock() - start
                self.audio_seconds[name] += audio_seconds

    def estimate(self, members: Sequence[str], elapsed: float) -> float:
        """Return how many seconds these members need for one second of audio.

        Members with the same front end share its log-mel: each front end counts once.
        ``elapsed``: the time on the clock in which all that was measured so far was spent. Several
        threads work at once, so it is less than the sum. 0 where nothing was measured.
        """
        front_ends = {self.front_ends.get(member, FRONT_END) for member in members}
        with self._lock:
            total = sum(self.seconds.values())
            needed = sum(
                self.seconds[name] / self.audio_seconds[name]
                for name in (READING, *front_ends, *members)
                if self.audio_seconds[name]
            )
        return elapsed * needed / total if total else 0.0


@dataclass(frozen=True)
class _Replica:
    """The members on one device, and the threads that run batches there."""

    device: torch.device
    frontends: Mapping[FrontendConfig, LogMel]
    networks: tuple[_SegmentNetwork, ...]
    threads: Executor
    n_threads: int


class Ensemble:
    """Members of the same classes, ready on their devices, for windows as ``window_config`` says.

    On a CPU each of torch's threads runs batches of its own: by a member's export, where there is
    one that does not fail, else by torch. ``cuda`` without a number is all GPUs; each has all
    members. Raises MemberError for a member that a device does not take. fallen_back: the members
    whose export has failed at work, so that their predictions are of more than one runtime.
    """

    def __init__(
        self,
        members: Sequence[Member],
        device: torch.device | str = "cpu",
        window_config: WindowConfig = SINGLE_SEGMENT,
    ) -> None:
        require(len(members) > 0, "an ensemble needs at least one member")
        for member in members[1:]:
            require_same_classes(
                Path(member.name), member.checkpoint, members[0].checkpoint.classes
            )
        self.device = torch.device(device)
        self.members = list(members)
        self.classes = members[0].checkpoint.classes
        configs = list(dict.fromkeys(item.checkpoint.experiment.frontend for item in members))
        self.sample_rates = tuple(sorted({config.sample_rate for config in configs}))
        self.window_config = window_config
        names = [FRONT_END, *(f"{FRONT_END} {number}" for number in range(2, len(configs) + 1))]
        name_of = dict(zip(configs, names, strict=True))
        self.costs = CostMeter(
            {item.name: name_of[item.checkpoint.experiment.frontend] for item in members}
        )
        batch = CPU_BATCH if self.device.type == "cpu" else _CUDA_BATCH
        self.batch_windows = max(1, batch // window_config.window_segments)
        self.mixes_recordings = self.device.type != "cpu"  # within a batch, see `engine`
        n_threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        self.fallen_back: set[str] = set()
        self._runtime_faults: dict[tuple[str, str], object] = {}  # each is named once
        self.replicas = []
        for index, device in enumerate(list_devices(self.device)):
            replica = _Replica(
                device=device,
                frontends={config: LogMel(config).to(device) for config in configs},
                networks=tuple(
                    self._open_network(member, device, is_first=index == 0) for member in members
                ),
                threads=worker_pool(n_threads) if device.type == "cpu" else ThreadPoolExecutor(1),
                n_threads=n_threads,
            )
            self.replicas.append(replica)
        self.n_threads = sum(replica.n_threads for replica in self.replicas)  # batches at once

    def for_members(self, members: Sequence[Member]) -> Ensemble:
        """Return an ensemble of some of the members."""
        return Ensemble(members, self.device, self.window_config)

    def with_windows(self, window_config: WindowConfig) -> Ensemble:
        """Return the same members on other windows; exports are for windows of one length."""
        if window_config == self.window_config:
            return self
        members = self.members
        if replace(window_config, shifts=self.window_config.shifts) != self.window_config:
            members = [replace(member, export=None) for member in members]
        return Ensemble(members, self.device, window_config)

    def _open_network(
        self, member: Member, device: torch.device, is_first: bool
    ) -> _SegmentNetwork:
        try:
            model = member.model if is_first else copy.deepcopy(member.model)
            network = SegmentModel(model.to(device).eval(), self.window_config)
        except Exception as error:  # such as no memory left on a GPU
            raise MemberError(member.name, f"cannot be put on {device}: {error}") from error
        export = member.export if device.type == "cpu" else None

        def predict(log_mel: Tensor, outputs: Sequence[str]) -> list[np.ndarray]:
            nonlocal export
            while (current := export) is not None:
                try:
                    return current(log_mel.numpy(), outputs)
                except Exception as error:  # whatever the runtime raises: the weights are the same
                    export = current.slower
                    self._fall_back(member, current, error)
            with exact_float32(device):  # TF32 is off by 3e-3 in probability
                result: SegmentOutput = network(log_mel, with_frames="frames" in outputs)
            return [getattr(result, name).cpu().numpy() for name in outputs]

        return predict

    def _fall_back(self, member: Member, export: ExportedModel, error: Exception) -> None:
        self.fallen_back.add(member.name)
        this_call, text = object(), "%s: %s fails; where it does, %s runs in its place: %s"
        if self._runtime_faults.setdefault((export.runtime, str(error)), this_call) is this_call:
            next_runtime = "torch" if export.slower is None else export.slower.runtime
            logger.warning(text, member.name, export.runtime, next_runtime, error)

    def predict_batch(
        self,
        replica: _Replica,
        waveforms: Mapping[int, np.ndarray],
        n_members: int,
        outputs: OutputOptions = SEGMENTS_ONLY,
    ) -> SegmentPredictions:
        """Predict up to ``batch_windows`` windows, ``(windows, samples)`` at each sample rate.

        Only the first ``n_members`` run. Returns the segments of all windows in a row. Raises
        MemberError for a member that does not run, or predicts what is not finite.
        """
        clock = time.thread_time if replica.device.type == "cpu" else time.perf_counter
        n_windows = len(next(iter(waveforms.values())))
        audio_seconds = n_windows * self.window_config.hop_seconds
        log_mels: dict[FrontendConfig, Tensor] = {}
        names = ["clipwise", "framewise"]
        if outputs.frames or outputs.member_frames:
            names.append("frames")
        if outputs.embedding:
            names.append("embedding")
        by_output: dict[str, list[np.ndarray]] = {name: [] for name in names}
        members = self.members[:n_members]
        for member, network in zip(members, replica.networks, strict=False):
            config = member.checkpoint.experiment.frontend
            try:
                if config not in log_mels:
                    windows = torch.from_numpy(waveforms[config.sample_rate])
                    name = self.costs.front_ends[member.name]
                    with self.costs.measure(name, audio_seconds, clock):
                        log_mels[config] = _compute_log_mel(replica, config, windows)
                with self.costs.measure(member.name, audio_seconds, clock), torch.inference_mode():
                    arrays = network(log_mels[config], names)
            except Exception as error:  # whatever a runtime raises: the other members can still run
                raise MemberError(member.name, f"does not run: {error}") from error
            _require_finite(member, names, arrays)
            for name, array in zip(names, arrays, strict=True):
                by_output[name].append(array)
        return join_outputs(by_output, outputs)


@torch.inference_mode()
def _compute_log_mel(replica: _Replica, config: FrontendConfig, windows: Tensor) -> Tensor:
    frontend = replica.frontends[config]
    if replica.device.type != "cpu":
        return frontend(windows.to(replica.device))
    # Window by window: the rounding of a product depends on its shape, and the repair in double
    # precision on how many values need it.
    return torch.cat([frontend(window) for window in windows.split(1)])


def _require_finite(member: Member, names: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
    for name, array in zip(names, arrays, strict=True):
        if not np.isfinite(array).all():
            raise MemberError(
                member.name, f"its {name} output holds NaN or infinity: did its training diverge?"
            )


def list_devices(device: torch.device) -> list[torch.device]:
    """Return ``device``, or all GPUs where it is ``cuda`` without a number."""
    if device.type == "cuda" and device.index is None:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_member(
    folder: Path, window_config: WindowConfig = SINGLE_SEGMENT, *, with_export: bool = True
) -> Member:
    """Load the checkpoint in ``folder``; also its export, where it can be used."""
    model, checkpoint = load_model(folder)
    export, fault = None, ""
    if with_export:
        try:
            export = find_export(folder, checkpoint, window_config)
        except ValueError as error:
            fault = str(error)
    return Member(checkpoint.name, model, checkpoint, export, export_fault=fault)


def log_runtimes(members: Sequence[Member]) -> None:
    """Log which runtimes run exports, and each reason once why another one runs in their place."""
    exports = [member.export for member in members if member.export is not None]
    faults = [(member.export_fault, "torch runs in its place") for member in members]
    faults += [(export.bfloat16_fault, "it runs in float32 instead") for export in exports]
    by_reason: dict[str, list[str]] = {}
    for fault, remedy in faults:
        path, _, reason = fault.partition(": ")
        if reason:
            by_reason.setdefault(f"{reason}; {remedy}", []).append(path)
    for reason, (first, *others) in by_reason.items():
        more = f" and {len(others)} more" if others else ""
        logger.warning("%s%s: %s", first, more, reason)
    runtimes = Counter((item.runtime, item.version, item.precision) for item in exports)
    for (runtime, version, precision), count in runtimes.items():
        text = "%s %s runs %d of %d members in %s: faster than torch on a CPU"
        logger.info(text, runtime, version, count, len(members), precision)


def load_ensemble(
    folders: Sequence[Path],
    device: torch.device | str = "cpu",
    window_config: WindowConfig = SINGLE_SEGMENT,
) -> Ensemble:
    """Load the checkpoints in ``folders`` as one ensemble; their classes must agree."""
    on_cpu = torch.device(device).type == "cpu"  # exports do not run elsewhere
    members = [load_member(folder, window_config, with_export=on_cpu) for folder in folders]
    log_runtimes(members)
    return Ensemble(members, device, window_config)
