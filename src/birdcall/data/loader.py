"""Say how much memory is left: the machine's, or less where a control group has a limit."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from birdcall.config import Experiment
from birdcall.data.dataset import Clip, ClipDataset
from birdcall.data.noise import MAX_TRIES, ReadFailure
from birdcall.data.targets import ClipRequest, ClipSampler

logger = logging.getLogger(__name__)


class _Names(NamedTuple):
    """A control group's files; ``reclaimable``: pages that the kernel gives back, of used ones."""

    limit: str
    used: str
    reclaimable: str


_VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Names("memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be taken, None where the system does not say.

    That is the least of the kernel's MemAvailable and of what the limits of the process's control
    groups (a container's, a batch job's; version 1 or 2) leave. ``root``: where ``/proc`` and
    ``/sys`` are.
    """
    found = [*_machine_memory(root / "proc/meminfo"), *_group_memory(root)]
    return max(0, min(found)) if found else None


def _machine_memory(path: Path) -> Iterator[int]:
    for line in _read_lines(path):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _group_memory(root: Path) -> Iterator[int]:
    """Yield what the limit of each group leaves that the process is in, up to the outermost."""
    for line in _read_lines(root / "proc/self/cgroup"):
        number, controllers, name = line.split(":", 2)
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        # In a container the name may be the host's, and only the mount itself be there.
        group = mount / name.strip().lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield from _left_in(folder, names)


def _left_in(folder: Path, names: _Names) -> Iterator[int]:
    limit, used = (next(iter(_read_lines(folder / name)), "max") for name in names[:2])
    if "max" in (limit, used):
        return
    pairs = (line.split() for line in _read_lines(folder / "memory.stat"))
    reclaimable = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    yield int(limit) - int(used) + reclaimable.get(names.reclaimable, 0)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system, or a group that is not shown here
        return []


# --- loader ---


MIN_FAILED = 3  # so many files may fail however few there are
NAMED_FAILURES = 3  # in the error that stops a run
# Of a worker without its batches: measured on Linux (Private_Dirty), rounded up. A forked one
# shares what torch and birdcall take, until reference counts are written to shared pages.
WORKER_BYTES = {"fork": 100_000_000, "forkserver": 350_000_000, "spawn": 350_000_000}
# More where a clip may be encoded, or its pitch or tempo changed: audiomentations brings librosa
# and numba along.
AUDIOMENTATIONS_BYTES = 150_000_000
# Batches that a worker holds: two ready (torch's prefetch_factor), one handed over, and of the one
# in the making its single clips and their stack.
BATCHES_PER_WORKER = 5


class ClipBatch(NamedTuple):
    """Clips as the model takes them; see `dataset.Clip` for what one is.

    waveform: ``(batch, samples)``; target: ``(batch, classes)``; weight: ``(batch,)``; float32.
    recordings: of each clip, so that a batch that goes wrong can be named.
    """

    waveform: Tensor | None  # None: one of the clips could not be made
    target: Tensor
    weight: Tensor
    recordings: tuple[str, ...]
    failures: tuple[ReadFailure, ...]


class _ClipBatches(Dataset[Clip]):
    """A `ClipDataset` whose clips a DataLoader asks for a batch at a time."""

    def __init__(self, clips: ClipDataset) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitems__(self, requests: list[ClipRequest]) -> list[Clip]:
        return self.clips.make_clips(requests)


def make_loader(
    dataset: ClipDataset,
    sampler: ClipSampler,
    workers: int,
    start_method: str | None = None,
    batch_size: int | None = None,
) -> DataLoader[ClipBatch]:
    """Load batches of ``batch_size`` clips with so many processes, 0: in this one.

    ``batch_size`` None: the experiment's; where several processes share a batch, each gives its
    part. ``loader.sampler`` and ``loader.dataset.clips`` are what was given. The last batch is left
    out where it would be smaller, unless it is the only one.
    """
    batch_size = batch_size or dataset.experiment.train.data.batch_size
    return DataLoader(
        _ClipBatches(dataset),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler.n_clips >= batch_size * sampler.world_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate_clips,
        worker_init_fn=prepare_worker,
        multiprocessing_context=start_method if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Each iterator draws a seed, which nobody uses: not from the generator that dropout draws
        # from, or an epoch taken up in its middle would go on otherwise.
        generator=torch.Generator(),
    )


def collate_clips(clips: Sequence[Clip]) -> ClipBatch:
    """Stack clips; in a worker this is the one copy, into memory that the parent shares."""
    failures = tuple(failure for clip in clips for failure in clip.failures)
    readable = all(clip.waveform is not None for clip in clips)
    return ClipBatch(
        waveform=default_collate([clip.waveform for clip in clips]) if readable else None,
        target=default_collate([clip.target for clip in clips]),
        weight=torch.tensor([clip.weight for clip in clips], dtype=torch.float32),
        recordings=tuple(clip.recording for clip in clips),
        failures=failures,
    )


def prepare_worker(_worker: int) -> None:
    """Keep a loader worker on one core, since the model needs the others; let its parent end it.

    A forked one has inherited how its parent hears signals. Ctrl-C reaches all of them: the parent
    takes what the workers have made, finishes its step, and ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threadpool_limits(1)  # BLAS and OpenMP, whose number of threads was set before the fork


class FailureCounter:
    """Names every file that fails while training, once, and stops the run at too many.

    Of each kind (recordings, noise files) as many as ``max_failed_share`` of them may fail, three
    in any case. Mapping ``failed``: from path to the line that says why.
    """

    def __init__(self, dataset: ClipDataset) -> None:
        share = dataset.experiment.train.data.max_failed_share
        self.totals = {"recording": len(dataset), "noise file": len(dataset.noise_files)}
        self.allowed = {kind: max(MIN_FAILED, int(share * n)) for kind, n in self.totals.items()}
        self.failed: dict[str, ReadFailure] = {}

    def count(self, batch: ClipBatch) -> None:
        """Take note of a batch's failures.

        Raises ValueError when there are too many, or a clip of the batch could not be made.
        """
        for failure in batch.failures:
            if failure.path not in self.failed:
                self.failed[failure.path] = failure
                logger.warning("%s cannot be read, another is taken: %s", *failure[::2])
        for kind, allowed in self.allowed.items():
            if len(self.of_kind(kind)) > allowed:
                self._stop(kind, f"more than {allowed}")
        if batch.waveform is None:
            self._stop(batch.failures[-1].kind, f"the last {MAX_TRIES} tried or all there are")

    def of_kind(self, kind: str) -> list[ReadFailure]:
        return [failure for failure in self.failed.values() if failure.kind == kind]

    def _stop(self, kind: str, why: str) -> NoReturn:
        failed = self.of_kind(kind)
        named = "; ".join(failure.reason for failure in failed[:NAMED_FAILURES])
        raise ValueError(
            f"{len(failed)} of {self.totals[kind]} {kind}s could not be read while training "
            f"({why}), so it stops; the first: {named}"
        )


def iterate_clips(loader: Iterable[ClipBatch], failures: FailureCounter) -> Iterator[ClipBatch]:
    """Yield each batch once its failures are counted."""
    for batch in loader:
        failures.count(batch)
        yield batch


def check_worker_memory(
    workers: int, experiment: Experiment, n_processes: int = 1, available: int | None = None
) -> None:
    """Raise ValueError where the loader's workers will not fit in the memory there is.

    ``workers`` of each of ``n_processes`` on this machine. ``available``: bytes, None: what
    `available_memory` finds; where the system does not say, nothing is refused.
    """
    available = available_memory() if available is None else available
    if available is None or workers == 0:
        return
    each = _worker_bytes(experiment, experiment.train.data.batch_size // n_processes)
    room = available // (each * n_processes)
    if workers > room:
        raise ValueError(
            f"{workers} workers need {workers * each * n_processes / 1e9:.1f} GB, "
            f"{each / 1e9:.2f} GB each, and {available / 1e9:.1f} GB of memory are left: "
            f"{room} would fit; give --workers {room}"
        )


def _worker_bytes(experiment: Experiment, batch_size: int) -> int:
    augment = experiment.augment
    used = (augment.mp3_probability, augment.pitch_probability, augment.tempo_probability)
    batch = batch_size * experiment.clip_samples * torch.float32.itemsize
    return (
        WORKER_BYTES[multiprocessing.get_start_method()]
        + AUDIOMENTATIONS_BYTES * any(used)
        + BATCHES_PER_WORKER * batch
    )
