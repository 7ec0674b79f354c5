"""Load batches of training clips with worker processes, and count the files that fail."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from birdcall.augment import MAX_TRIES, ReadFailure
from birdcall.dataset import Clip, ClipDataset, ClipRequest, ClipSampler

logger = logging.getLogger(__name__)

MIN_FAILED = 3  # so many files may fail however few there are
NAMED_FAILURES = 3  # in the error that stops a run


class ClipBatch(NamedTuple):
    """Clips as the model takes them: ``(batch, samples)`` and ``(batch, classes)``, float32."""

    waveform: Tensor | None  # None: one of the clips could not be made
    target: Tensor
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
    dataset: ClipDataset, sampler: ClipSampler, workers: int, start_method: str | None = None
) -> DataLoader[ClipBatch]:
    """Load batches of the experiment's ``batch_size`` with so many processes, 0: in this one.

    ``loader.sampler`` and ``loader.dataset.clips`` are what was given. The last batch is left out
    where it would be smaller, unless it is the only one.
    """
    batch_size = dataset.experiment.train.batch_size
    return DataLoader(
        _ClipBatches(dataset),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler.n_clips >= batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate_clips,
        worker_init_fn=limit_worker_threads,
        multiprocessing_context=start_method if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def collate_clips(clips: Sequence[Clip]) -> ClipBatch:
    """Stack clips; in a worker this is the one copy, into memory that the parent shares."""
    failures = tuple(failure for clip in clips for failure in clip.failures)
    target = default_collate([clip.target for clip in clips])
    if any(clip.waveform is None for clip in clips):
        return ClipBatch(None, target, failures)
    return ClipBatch(default_collate([clip.waveform for clip in clips]), target, failures)


def limit_worker_threads(_worker: int) -> None:
    """Keep each loader worker on one core; the model needs the others."""
    torch.set_num_threads(1)
    threadpool_limits(1)  # BLAS and OpenMP, whose number of threads was set before the fork


class FailureCounter:
    """Names every file that fails while training, once, and stops the run at too many.

    Of each kind (recordings, noise files) as many as ``max_failed_share`` of them may fail, three
    in any case. Mapping ``failed``: from path to the line that says why.
    """

    def __init__(self, dataset: ClipDataset) -> None:
        share = dataset.experiment.train.max_failed_share
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


def iterate_clips(
    loader: Iterable[ClipBatch], failures: FailureCounter
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each batch's waveform and target once its failures are counted."""
    for batch in loader:
        failures.count(batch)
        yield batch.waveform, batch.target
