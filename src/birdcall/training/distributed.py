"""Train in several processes, one per GPU or machine; connect to a Ray cluster and check its nodes.

Processes that train one run together get the results of a single process. `training.cluster`
trains runs on the nodes of a Ray cluster, `prediction.ray_cluster` predicts recordings there.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from birdcall import __version__
from birdcall.data.dataset import TrainingData
from birdcall.storage.store import code_digest

_TIMEOUT = timedelta(minutes=30)  # one process may read slower than another
_CONNECTION_SECONDS = 10  # to a Ray cluster
_N_COMPARED_FILES = 100
# Pages of 2 MB: beside `reuse_freed_memory` steps take 0.92 to 0.98 times as long.
_GLIBC_TUNABLES = "glibc.malloc.hugetlb=1"


def process_context() -> BaseContext:
    """Return how new processes that train start: never as a fork of one with torch's threads.

    On Linux they are forks of a server that has imported torch and timm, which would take each of
    them four seconds of a core, and has no threads of torch.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "birdcall.training.runs"])
    os.environ.setdefault("GLIBC_TUNABLES", _GLIBC_TUNABLES)  # read when the server starts
    in_main_thread = threading.current_thread() is threading.main_thread()
    # A signal to all processes, as a terminal and batch systems send it, must not end the server.
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return context


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
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.detach(), momentum)
        unbiased = variance.detach() * (n_values / max(n_values - 1, 1))
        self.running_var.lerp_(unbiased, momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        normalised = centred * scale.view(shape) + self.bias.view(shape)
        # timm's BatchNormAct2d is a normalisation followed by these two layers.
        for name in ("drop", "act"):
            normalised = getattr(self, name, nn.Identity())(normalised)
        return normalised.to(features.dtype)


# --- a Ray cluster ---


def connect_to_ray(address: str) -> None:
    """Connect this process to the cluster at ``address``, if it is connected to none.

    ``address``: HOST:PORT, ray://HOST:PORT, auto (the cluster of this machine), or local (a new
    one of this machine alone). Raises ConnectionError where no cluster answers, or one of another
    version of Ray or Python.
    """
    require_ray()
    import ray

    if ray.is_initialized():
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():  # else a kind of address that Ray knows
        try:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=_CONNECTION_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"--ray {address}: no cluster answers there: {error}") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except RuntimeError as error:  # of another version
        raise ConnectionError(f"--ray {address}: {error}") from error


def require_ray() -> None:
    """Raise ValueError where Ray is not installed; let it report nothing over the network."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--ray needs more: {error}; pip install -e '.[ray]'") from error


def live_nodes() -> list[dict[str, Any]]:
    """Return the nodes of the connected cluster that are alive, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


# --- what a node must have ---


@dataclass(frozen=True)
class Share:
    """What one run takes of its node: the same on all, since threads decide about rounding."""

    n_cores: float
    n_gpus: float

    @property
    def n_threads(self) -> int:
        """The number of torch's threads."""
        return max(1, int(self.n_cores))

    def __str__(self) -> str:
        cores = f"{self.n_cores:g} {'core' if self.n_cores == 1 else 'cores'}"
        return f"{self.n_gpus:g} GPU, {cores}" if self.n_gpus else cores

    def fits(self, resources: Mapping[str, float]) -> bool:
        """Whether a node of these resources, as Ray names them, can train a run."""
        return resources.get("CPU", 0) >= self.n_cores and resources.get("GPU", 0) >= self.n_gpus


def choose_share(nodes: Sequence[Mapping[str, float]], jobs: int) -> Share:
    """Return the share of a run where the smallest of the ``nodes`` trains ``jobs`` runs at once.

    Where nodes have GPUs, ``jobs`` runs share one of them, with its part of the node's cores, and
    the other nodes have no part. ``nodes``: their resources. Raises ValueError where none has a
    core or GPU.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    with_cores = [node["CPU"] for node in nodes if node.get("CPU", 0) >= 1]
    if not with_gpus and not with_cores:
        raise ValueError("the Ray cluster has no node with a core or a GPU")
    n_cores = min([node.get("CPU", 0) / node["GPU"] for node in with_gpus] or with_cores) / jobs
    return Share(
        n_cores=int(n_cores) if n_cores >= 1 else _round_down(n_cores),
        n_gpus=_round_down(1 / jobs) if with_gpus else 0,
    )


def _round_down(value: float) -> float:
    return math.floor(value * 1e4) / 1e4  # Ray's resolution: three thirds must fit


@dataclass(frozen=True)
class Requirements:
    """What must be the same on a node as on the machine where the command was started."""

    versions: Mapping[str, str]  # of Python, torch and birdcall
    code: Mapping[str, str]  # digests of modules that decide about results
    tokens: Mapping[str, str]  # contents of files in the folders of results, by absolute path
    sizes: Mapping[str, int]  # in bytes, of some of the files that are read, by absolute path
    needs_gpu: bool

    @classmethod
    def of(
        cls, data: TrainingData, module: str, *, tokens: Mapping[str, str], needs_gpu: bool
    ) -> Requirements:
        """Return the requirements of ``data`` and ``module``, with its imports, on this machine."""
        paths = [file for files in data.files_to_embed().values() for file in files.values()]
        paths += [*data.noise_files, *data.other_birds]
        compared = paths[:: -(-len(paths) // _N_COMPARED_FILES)]
        sizes = {str(path.absolute()): path.stat().st_size for path in compared}
        return cls(_versions(), code_digest(module), tokens, sizes=sizes, needs_gpu=needs_gpu)

    def describe_fault(self) -> str:
        """Return what this machine lacks; empty if it has everything."""
        for name, version in _versions().items():
            if version != self.versions[name]:
                return f"{name} is {version} there, {self.versions[name]} here"
        here = code_digest(*self.code)
        if changed := [name for name, digest in self.code.items() if here[name] != digest]:
            return f"the code of birdcall is another there: {changed[0].replace('.', '/')}.py"
        for name, token in self.tokens.items():
            path = Path(name)
            if not path.is_file() or path.read_text(encoding="utf-8") != token:
                return f"{path.parent} is not the same folder there: give --output in a shared one"
        for name, size in self.sizes.items():
            path = Path(name)
            if not path.is_file() or path.stat().st_size != size:
                return f"{path} is missing or another file there: --data must be in a shared folder"
        if self.needs_gpu and not torch.cuda.is_available():
            return "Ray knows of a GPU there, torch finds none"
        return ""


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    return versions | {"birdcall": __version__}


def describe_node(name: str = "", node_id: str = "") -> str:
    """Return the name of a node for messages: of the one that this task runs on, or a given one."""
    import ray

    node_id = node_id or ray.get_runtime_context().get_node_id()
    return f"{name or platform.node()} ({node_id[:6]})"  # a machine may have several nodes
