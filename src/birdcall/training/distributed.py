"""Let several processes, one per GPU or machine, train as if they were one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TIMEOUT = timedelta(minutes=30)  # one process may read slower than another


@dataclass(frozen=True)
class DistributedContext:
    """This process among those that train together; alone where nobody started others."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Is this the one that writes files and shows progress?"""
        return self.rank == 0

    def part(self, n_items: int) -> slice:
        """Return this process's share of a batch; ``n_items`` are those of all together."""
        if n_items % self.world_size:
            raise ValueError(
                f"a batch of {n_items} clips cannot be shared by {self.world_size} processes: "
                "their number must divide the experiment's batch_size"
            )
        share = n_items // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts ``(n, ...)`` of all processes behind one another, by rank."""
        if self.world_size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.world_size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world_size > 1:
            dist.barrier()


SINGLE_PROCESS = DistributedContext()


@contextmanager
def distributed_context(device: torch.device) -> Iterator[tuple[DistributedContext, torch.device]]:
    """Join the processes that torchrun has started; yields them and this one's device.

    ``torchrun --nproc_per_node=2 -m birdcall train …`` sets RANK, LOCAL_RANK and WORLD_SIZE. GPUs
    talk through NCCL, CPUs through gloo. Without torchrun this process is alone.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield SINGLE_PROCESS, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield DistributedContext(dist.get_rank(), world_size), device
    finally:
        dist.destroy_process_group()


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(_context: object, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class _SharedBatchNorm(_BatchNorm):
    """Batch normalisation by the statistics of the whole batch, which lies in several processes.

    torch's own SyncBatchNorm works on GPUs only, and would leave this untested without one.
    """

    def forward(self, features: Tensor) -> Tensor:
        if not self.training:
            return super().forward(features)
        values = features.float()
        dims = [dim for dim in range(values.ndim) if dim != 1]
        shape = [1, -1] + [1] * (values.ndim - 2)
        n_values = values.numel() // values.shape[1] * dist.get_world_size()
        mean = _SumOverProcesses.apply(values.sum(dims)) / n_values
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / n_values
        self._follow(mean.detach(), variance.detach() * (n_values / max(n_values - 1, 1)))
        scale = self.weight * (variance + self.eps).rsqrt()
        normed = centred * scale.view(shape) + self.bias.view(shape)
        # timm's BatchNormAct2d is a normalisation with these two behind it.
        for name in ("drop", "act"):
            normed = getattr(self, name, nn.Identity())(normed)
        return normed.to(features.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked += 1
        share = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def convert_sync_batch_norm(model: nn.Module) -> None:
    """Let the batch normalisations of ``model`` see the whole batch; names of weights stay."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            kind = type(module)
            module.__class__ = type(f"Shared{kind.__name__}", (_SharedBatchNorm, kind), {})
