"""Train in several processes, one per GPU or machine, with the results of a single process."""

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
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(minutes=30)  # one process may read slower than another


@dataclass(frozen=True)
class DistributedContext:
    """The rank of this process, and the number of processes that train one run together."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def part(self, n_items: int) -> slice:
        """Return this process's part of a batch of ``n_items``, which all processes share.

        Raises ValueError where the batch cannot be divided equally.
        """
        if n_items % self.world_size:
            raise ValueError(
                f"a batch of {n_items} clips cannot be shared by {self.world_size} processes: "
                "their number must divide the experiment's batch_size"
            )
        size = n_items // self.world_size
        return slice(self.rank * size, (self.rank + 1) * size)

    def gather(self, part: Tensor) -> Tensor:
        """Return the concatenation of all processes' parts ``(n, ...)``, in order of rank."""
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

    def any(self, condition: bool, device: torch.device) -> bool:
        """Return whether ``condition`` holds in any process; all processes get the same answer."""
        if self.world_size == 1:
            return condition
        return bool(self.sum(torch.tensor(float(condition), device=device)) > 0)

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return ``network`` so that it is trained on the batches of all processes together.

        Gradients are averaged, and batch normalisations use the statistics of the whole batch.
        The names of its weights stay. Alone, it is returned unchanged.
        """
        if self.world_size == 1:
            return network
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                original = type(module)
                bases = (_SharedBatchNorm, original)
                module.__class__ = type(f"Shared{original.__name__}", bases, {})
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(network, devices, broadcast_buffers=False)


@contextmanager
def distributed_context(device: torch.device) -> Iterator[tuple[DistributedContext, torch.device]]:
    """Join the processes that torchrun has started; yield the context and this process's device.

    ``torchrun --nproc_per_node=2 -m birdcall train …`` sets RANK, LOCAL_RANK and WORLD_SIZE. GPUs
    communicate through NCCL, CPUs through gloo. Without torchrun there is a single process.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield DistributedContext(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield DistributedContext(dist.get_rank(), world_size), device
    finally:
        dist.destroy_process_group()


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, with a gradient that is summed as well.

    torch.distributed.nn.functional.all_reduce does the same, but is deprecated.
    """

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
    """Batch normalisation with the statistics of the batch of all processes.

    torch's SyncBatchNorm works on GPUs only, so tests on a CPU could not cover it.
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
        self.num_batches_tracked += 1
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean.detach(), momentum)
        unbiased = variance.detach() * (n_values / max(n_values - 1, 1))
        self.running_var.lerp_(unbiased, momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        normalised = centred * scale.view(shape) + self.bias.view(shape)
        # timm's BatchNormAct2d is a normalisation followed by these two layers.
        for name in ("drop", "act"):
            normalised = getattr(self, name, nn.Identity())(normalised)
        return normalised.to(features.dtype)
