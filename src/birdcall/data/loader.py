"""Load batches of training clips in worker processes, as many as fit into the memory."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from birdcall.config import Experiment
from birdcall.data.cache import MAX_TRIES, ReadFailure
from birdcall.data.clips import Clip, ClipDataset
from birdcall.data.targets import ClipSampler

logger = logging.getLogger(__name__)

# Of a worker without its batches: measured on Linux (Private_Dirty), rounded up. A forked worker
# shares torch and birdcall with its parent, until reference counts are written to shared pages.
_WORKER_BYTES = {"fork": 100_000_000, "forkserver": 350_000_000, "spawn": 350_000_000}
# Batches that a worker holds: two ready (torch's prefetch_factor), one handed over, and of the next
# one its single clips and their stack.
_BATCHES_PER_WORKER = 5
_SHARED_MEMORY = Path("/dev/shm")  # Linux; 64 MB in a container of Docker, if not told otherwise
# In addition where a clip may be encoded, or its pitch or tempo changed: audiomentations imports
# librosa and numba.
_AUDIOMENTATIONS_BYTES = 150_000_000
_MIN_ALLOWED_FAILURES = 3  # files that may fail, however few files there are
_NAMED_FAILURES = 3  # in the error that stops a run


class ClipBatch(NamedTuple):
    """Clips as the model takes them, all float32; see `clips.Clip`."""

    waveform: Tensor | None  # (batch, samples); None: one of the clips could not be made
    target: Tensor  # (batch, classes)
    weight: Tensor  # (batch,)
    recordings: tuple[str, ...]  # of each clip, to name a batch that goes wrong
    failures: tuple[ReadFailure, ...]
    embedding: Tensor | None = None  # (batch, size); None: no teacher
    frames: Tensor | None = None  # (batch, classes, frames), targets; None: there are none


def make_loader(
    dataset: ClipDataset,
    sampler: ClipSampler,
    workers: int,
    start_method: str | None = None,
    *,
    n_loaders: int = 1,
) -> DataLoader[ClipBatch]:
    """Load batches of clips with so many worker processes, 0: in this process.

    Where several processes share each batch, this one loads its part. ``loader.sampler`` and
    ``loader.dataset`` are the arguments. The last batch is left out where it would be
    smaller, unless it is the only one. Where the shared memory cannot hold the batches of
    ``n_loaders`` such loaders, workers send them through pipes: the same batches, more slowly.
    """
    experiment = dataset.experiment
    # Of each worker two are ready or in the making (prefetch_factor), the others are in use.
    n_batches = n_loaders * (2 * workers + 1 + experiment.train.optimizer.accumulate)
    needed = n_batches * sampler.batch_size * experiment.clip_samples * torch.float32.itemsize
    is_shared = workers == 0 or _has_shared_memory(needed)
    return DataLoader(
        dataset,
        batch_size=sampler.batch_size // sampler.share.world_size,
        sampler=sampler,
        drop_last=sampler.n_clips >= sampler.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=partial(_collate_clips, is_shared=is_shared),
        worker_init_fn=_prepare_worker,
        multiprocessing_context=start_method if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Each iterator draws a seed, which is not used: it must not be drawn from the generator
        # that dropout draws from, or a resumed epoch would differ from an uninterrupted one.
        generator=torch.Generator(),
    )


def _has_shared_memory(needed: int) -> bool:
    """Return whether shared memory has room for so many bytes; warn where it has not."""
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:  # another system
        return True
    if free < needed:
        logger.warning(
            "%s has %.2f GB free, the loader may need %.2f GB: its workers send batches through "
            "pipes, which is slower; in Docker give --shm-size=%dg, or fewer --workers",
            *(_SHARED_MEMORY, free / 1e9, needed / 1e9, needed // 1_000_000_000 + 1),
        )
    return free >= needed


class _Unshared:
    """A tensor of a worker that its parent receives as a copy: pickled, it becomes the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any]]:
        return torch.from_numpy, (self.tensor.numpy(),)


def _collate_clips(clips: Sequence[Clip], is_shared: bool) -> ClipBatch:
    """Stack clips; in a worker this is the only copy if the parent shares the memory."""
    readable = all(clip.waveform is not None for clip in clips)
    stack = default_collate if is_shared else (lambda tensors: _Unshared(torch.stack(tensors)))
    weight = torch.tensor([clip.weight for clip in clips], dtype=torch.float32)
    return ClipBatch(
        waveform=stack([clip.waveform for clip in clips]) if readable else None,
        target=stack([clip.target for clip in clips]),
        weight=weight if is_shared else _Unshared(weight),
        recordings=tuple(clip.recording for clip in clips),
        failures=tuple(failure for clip in clips for failure in clip.failures),
        embedding=None if clips[0].embedding is None else stack([clip.embedding for clip in clips]),
        frames=None if clips[0].frames is None else stack([clip.frames for clip in clips]),
    )


def _prepare_worker(_worker: int) -> None:
    """Keep a loader worker on one core, since the model needs the others; its parent ends it.

    A forked worker has inherited its parent's signal handlers. Ctrl-C reaches all processes: the
    parent uses the clips that are ready, finishes its step, and ends the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threadpool_limits(1)  # BLAS and OpenMP, whose number of threads was set before the fork


class FailureCounter:
    """Logs every file that fails during training, once, and stops the run at too many.

    Of each kind (recordings, noise files, soundscapes ...) the share ``max_failed_share`` may
    fail, in any case three files. ``failed`` maps the path to the failure.
    """

    def __init__(self, dataset: ClipDataset) -> None:
        share = dataset.experiment.train.data.max_failed_share
        self.totals = {"recording": len(dataset)}
        for files in (dataset.augment.noise, dataset.other_birds):
            self.totals[files.kind] = len(files.paths)
        if dataset.soundscapes is not None:
            self.totals["soundscape"] = len(dataset.soundscapes.labels.soundscapes)
        self.allowed = {
            kind: max(_MIN_ALLOWED_FAILURES, int(share * total))
            for kind, total in self.totals.items()
        }
        self.failed: dict[str, ReadFailure] = {}

    def count(self, batch: ClipBatch) -> None:
        """Add a batch's failures.

        Raises ValueError when there are too many, or a clip of the batch could not be made.
        """
        for failure in batch.failures:
            if failure.path not in self.failed:
                self.failed[failure.path] = failure
                logger.warning(
                    "%s cannot be read, another is taken: %s", failure.kind, failure.reason
                )
        for kind, allowed in self.allowed.items():
            if len(self.of_kind(kind)) > allowed:
                self._stop(kind, f"more than {allowed}")
        if batch.waveform is None:
            self._stop(batch.failures[-1].kind, f"the last {MAX_TRIES} tried or all there are")

    def of_kind(self, kind: str) -> list[ReadFailure]:
        return [failure for failure in self.failed.values() if failure.kind == kind]

    def _stop(self, kind: str, reason: str) -> NoReturn:
        failed = self.of_kind(kind)
        first = "; ".join(failure.reason for failure in failed[:_NAMED_FAILURES])
        raise ValueError(
            f"{len(failed)} of {self.totals[kind]} {kind}s could not be read while training "
            f"({reason}), so it stops; the first: {first}"
        )


def iterate_clips(loader: Iterable[ClipBatch], failures: FailureCounter) -> Iterator[ClipBatch]:
    """Yield each batch once its failures are counted."""
    for batch in loader:
        failures.count(batch)
        yield batch


# --- memory ---


def check_worker_memory(
    workers: int, experiment: Experiment, n_processes: int = 1, available: int | None = None
) -> None:
    """Raise ValueError where the loader's workers will not fit into the available memory.

    ``workers`` of each of ``n_processes`` on this machine. ``available``: bytes, None: what
    `available_memory` returns; where the system does not tell, nothing is refused.
    """
    available = available_memory() if available is None else available
    if available is None or workers == 0:
        return
    augment = experiment.augment
    batch_size = experiment.train.data.batch_size // n_processes
    batch_bytes = batch_size * experiment.clip_samples * torch.float32.itemsize
    each = _WORKER_BYTES[multiprocessing.get_start_method()] + _BATCHES_PER_WORKER * batch_bytes
    if any((augment.mp3_probability, augment.pitch_probability, augment.tempo_probability)):
        each += _AUDIOMENTATIONS_BYTES
    room = available // (each * n_processes)
    if workers > room:
        raise ValueError(
            f"{workers} workers need {workers * each * n_processes / 1e9:.1f} GB, "
            f"{each / 1e9:.2f} GB each, and {available / 1e9:.1f} GB of memory are left: "
            f"{room} would fit; give --workers {room}"
        )


class _GroupFiles(NamedTuple):
    """Where a version of control groups states its limit; all but ``mount`` are files of a group.

    The kernel takes ``reclaimable`` pages back when it needs them, though they count as used.
    """

    mount: str
    limit: str
    used: str
    reclaimable: str  # a line of memory.stat


_VERSION_1 = _GroupFiles(
    mount="sys/fs/cgroup/memory",
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    reclaimable="total_inactive_file",
)
_VERSION_2 = _GroupFiles(
    mount="sys/fs/cgroup",
    limit="memory.max",
    used="memory.current",
    reclaimable="inactive_file",
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be taken, None where the system does not tell.

    That is the smallest of the kernel's MemAvailable and of the room below the limits of the
    process's control groups (a container's, a batch job's; version 1 or 2). ``root``: where
    ``/proc`` and ``/sys`` are.
    """
    amounts = []
    for line in _read_lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            amounts.append(int(line.split()[1]) * 1024)
    for line in _read_lines(root / "proc/self/cgroup"):
        number, controllers, name = line.split(":", 2)
        if number == "0" and not controllers:
            amounts += _room_in_groups(root, name, _VERSION_2)
        elif "memory" in controllers.split(","):
            amounts += _room_in_groups(root, name, _VERSION_1)
    return max(0, min(amounts)) if amounts else None


def _room_in_groups(root: Path, name: str, files: _GroupFiles) -> Iterator[int]:
    """Yield the bytes below the limit of each group around the process, up to the outermost."""
    mount = root / files.mount
    # In a container the name may be the host's, and only the mount itself exist.
    group = mount / name.strip().lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(mount):
            return
        limit = next(iter(_read_lines(folder / files.limit)), "max")
        used = next(iter(_read_lines(folder / files.used)), "max")
        if "max" not in (limit, used):
            pairs = (line.split() for line in _read_lines(folder / "memory.stat"))
            stat = dict(pair for pair in pairs if len(pair) == 2)
            yield int(limit) - int(used) + int(stat.get(files.reclaimable, 0))


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:  # another system, or a group that is not visible here
        return []
