"""A Ray cluster: connect to it, and see whether its nodes have what this machine has."""

from __future__ import annotations

import logging
import math
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from birdcall import __version__
from birdcall.data.dataset import TrainingData
from birdcall.storage.store import code_digest

_CONNECTION_SECONDS = 10
_N_COMPARED_FILES = 100


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
        raise ValueError(f"--ray needs more: {error}; pip install birdcall[ray]") from error


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
        n_cores, n_gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        return n_cores >= self.n_cores and n_gpus >= self.n_gpus


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
    if with_gpus:
        n_cores = min(node.get("CPU", 0) / node["GPU"] for node in with_gpus) / jobs
    else:
        n_cores = min(with_cores) / jobs
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
        """Return those of this process, of ``data``, and of ``module`` with all that it imports."""
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
