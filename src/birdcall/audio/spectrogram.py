"""Compute power spectrograms exactly, in little memory, with one thread per group of clips."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, backends, nn
from torch.nn import functional

from birdcall.config import require, require_choice

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_CLIPS_AT_ONCE = 4  # of a thread, see `map_clips`


class Float32Module(nn.Module):
    """A module whose buffers stay in float32 where ``.half()`` would round window and filters."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Spectrogram(Float32Module):
    """Power spectrogram: waveform (batch, samples) to (batch, 1, frames, n_fft // 2 + 1).

    Equals ``abs(librosa.stft(waveform, pad_mode="reflect")) ** 2``, in torchlibrosa's layout.
    Its tables follow from its arguments and stay out of the state dict. ``power(waveform, f)`` is
    ``f(power)`` for a function of frames, (clips, frames, bins) to (clips, frames, ...): called
    block by block, so the power of a whole batch is never in memory.
    """

    def __init__(self, n_fft: int, hop_length: int, implementation: str = "fft") -> None:
        super().__init__()
        require(0 < hop_length <= n_fft, f"hop_length {hop_length} must be in 1..n_fft ({n_fft})")
        require_choice("implementation", implementation, tuple(_POWERS))
        self.n_fft, self.hop_length = n_fft, hop_length
        self.power = _POWERS[implementation](n_fft, hop_length)

    def forward(self, waveform: Tensor) -> Tensor:
        device = next(self.buffers(), waveform).device
        waveform = check_waveform(waveform, self.n_fft, device)
        with exact_float32(device):
            power = map_clips(lambda clips: self.power(clips, lambda power: power), waveform)
        return power[:, None]


class FFTPower(nn.Module):
    """Power by FFT, in blocks of frames.

    On a CPU a block stays in the cache and its memory is used again; whole batches take three
    times as long. A GPU needs large blocks.
    """

    cpu_block_bytes, cpu_double_block_bytes, gpu_block_bytes = 3 * 2**20, 2**20, 2**28

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length

    def forward(
        self,
        waveform: Tensor,
        function: Callable[[Tensor], Tensor],
        is_inexact: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return ``function(power)``, the power in double precision like librosa's.

        With ``is_inexact`` the power is in single precision, and in double where that is inexact:
        ``is_inexact(power, function(power))`` returns for which frames it is, (clips, frames).
        While they are one in five, this is faster than double precision everywhere.
        """
        pad = self.n_fft // 2
        # On a CPU six times as fast as `functional.pad` with mode "reflect".
        start, end = waveform[:, 1 : pad + 1], waveform[:, -pad - 1 : -1]
        mirrored = torch.cat((start.flip(1), waveform, end.flip(1)), dim=1)
        framed = mirrored.unfold(-1, self.n_fft, self.hop_length)  # (clips, frames, n_fft)
        has_double = waveform.device.type != "mps"  # Apple's GPUs lack float64
        if is_inexact is None or is_traced() or not has_double:
            dtype = torch.float64 if has_double else torch.float32
            parts = framed.split(self._block(framed, dtype), dim=1)
            return torch.cat([function(self._power(part, dtype)) for part in parts], dim=1)

        def single(frames: Tensor) -> tuple[Tensor, Tensor]:
            power = self._power(frames, torch.float32)
            value = function(power)
            return value, is_inexact(power, value)

        # Clip by clip on a CPU: products of other shapes are rounded differently, and a frame that
        # is inexact in a batch must be inexact alone.
        clips = framed.split(1 if framed.device.type == "cpu" else len(framed))
        n_part = self._block(clips[0], torch.float32)
        rows = [[single(part) for part in clip.split(n_part, dim=1)] for clip in clips]
        joined = [[torch.cat(parts, dim=1) for parts in zip(*row, strict=True)] for row in rows]
        value, inexact = (torch.cat(results) for results in zip(*joined, strict=True))
        at_clip, at_frame = inexact.nonzero(as_tuple=True)
        n_part = self._block(framed[:1], torch.float64)
        for first in range(0, len(at_clip), n_part):
            at = at_clip[first : first + n_part], at_frame[first : first + n_part]
            value = value.index_put(at, function(self._power(framed[at], torch.float64)))
        return value

    def _block(self, framed: Tensor, dtype: torch.dtype) -> int:
        """Return how many frames of each clip to compute at once."""
        is_double = dtype == torch.float64
        block_bytes = self.gpu_block_bytes
        if framed.device.type == "cpu":
            block_bytes = self.cpu_double_block_bytes if is_double else self.cpu_block_bytes
        fitting = block_bytes // (dtype.itemsize * self.n_fft * len(framed))
        # In double precision a third of the frames needs no more memory than the complex
        # spectrogram of all.
        return max(1, min(fitting, framed.shape[1] // (3 if is_double else 1)))

    def _power(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        window = _hann(self.n_fft, dtype, frames.device)
        spectrum = torch.fft.rfft(frames.to(dtype) * window).to(torch.complex64)
        # Not abs().square(): the square root costs as much as everything else.
        squares = torch.view_as_real(spectrum).square_()
        return squares[..., 0] + squares[..., 1]


class _ConvPower(nn.Module):
    """Power by a convolution with sines and cosines, for ONNX, which has no usable STFT."""

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        turns = np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) % n_fft / n_fft
        waves = np.concatenate([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)])
        window = _hann(n_fft, torch.float64, torch.device("cpu"))
        kernel = (torch.from_numpy(waves) * window).float()
        self.register_buffer("kernel", kernel[:, None], persistent=False)

    def forward(self, waveform: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        pad = self.n_fft // 2
        padded = functional.pad(waveform[:, None], (pad, pad), mode="reflect")
        products = functional.conv1d(padded, self.kernel, stride=self.hop_length)
        cosines, sines = products.chunk(2, dim=1)
        return function((cosines.square() + sines.square()).transpose(1, 2))


class _TorchlibrosaPower(nn.Module):
    """Power by the module of torchlibrosa, without its weights in the state dict."""

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        from torchlibrosa.stft import Spectrogram as TorchlibrosaSpectrogram

        self.module = TorchlibrosaSpectrogram(n_fft=n_fft, hop_length=hop_length)
        del self.module.stft.W  # 67 MB of complex128 at n_fft 2048, never read again
        parameters_to_buffers(self.module)

    def forward(self, waveform: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(self.module(waveform)[:, 0])


_POWERS: dict[str, Callable[[int, int], nn.Module]] = {
    "fft": FFTPower,
    "conv": _ConvPower,
    "torchlibrosa": _TorchlibrosaPower,
}


@cache
def _hann(n_fft: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the periodic Hann window, computed in float64.

    The import of scipy.signal takes 1 s; torch's window in float32 is off by 2e-7, too coarse near
    its ends. No buffer of a module: a model with float64 in it cannot move to Apple's GPUs.
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    with torch.inference_mode(False):  # the next caller may need gradients
        return torch.from_numpy(window).to(device, dtype)


def parameters_to_buffers(module: nn.Module) -> None:
    """Make constants of a module's parameters, which are neither trained nor saved."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            delattr(owner, name)
            owner.register_buffer(name, parameter.detach().contiguous(), persistent=False)


def is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def check_waveform(waveform: Tensor, n_fft: int, device: torch.device) -> Tensor:
    """Return the waveform (batch, samples) as float32, or raise ValueError naming what is wrong.

    int16 is scaled by 1 / 32768 (as soundfile and librosa do), float64 and half precision are
    converted. Other integers have no one scale, so they are refused.
    """
    require(isinstance(waveform, Tensor), f"waveform is a {type(waveform).__name__}; give a tensor")
    if not is_traced():
        shape, needed = tuple(waveform.shape), n_fft // 2 + 1
        require(
            len(shape) == 2,
            f"waveform has shape {shape}; give (batch, samples): one mono clip is waveform[None], "
            "stereo is averaged first",
        )
        require(min(shape) > 0, f"waveform has shape {shape}; it is empty")
        require(
            shape[1] >= needed,
            f"waveform has {shape[1]} samples (shape {shape}); n_fft {n_fft} needs at least "
            f"{needed} to mirror at the edges: pad it, or transpose (samples, channels)",
        )
    message = (
        f"waveform is on {waveform.device}, the front end on {device}; move one with .to(device)"
    )
    require(waveform.device == device, message)
    if waveform.dtype == torch.int16:
        waveform = waveform.float() / 32_768
    message = f"waveform is {waveform.dtype}; give float32 in [-1, 1] or int16"
    require(waveform.is_floating_point(), message)
    return waveform.float()


# --- threads ---


def map_clips(function: Callable[[Tensor], Tensor], waveform: Tensor) -> Tensor:
    """Return ``function(waveform)`` of a function that treats every clip alone.

    On a CPU it is called with a few clips at a time: they stay in the cache and have a thread for
    themselves. A few, because Python's threads wait for each other at every operation of torch.
    Raises ValueError for samples that are NaN or infinite.
    """
    if is_traced():
        return function(waveform)

    def compute(clips: Tensor) -> tuple[Tensor, bool]:
        # A sum is the cheapest pass that any NaN changes; which clips have one is searched later.
        return function(clips), bool(clips.detach().sum().isfinite())

    on_cpu = waveform.device.type == "cpu"
    in_graph = torch.is_grad_enabled() and waveform.requires_grad  # it does not cross threads
    use_threads = on_cpu and not in_graph
    n_clips = len(waveform)
    if on_cpu:
        n_clips = min(_CLIPS_AT_ONCE, -(-n_clips // (2 * torch.get_num_threads())))
    groups = waveform.split(n_clips)
    results = map_threads(compute, groups) if use_threads else [compute(clips) for clips in groups]
    images, finite = zip(*results, strict=True)
    if not all(finite):
        bad = (~waveform.detach().isfinite()).any(dim=1).nonzero().flatten().tolist()
        require(not bad, f"waveform has NaN or infinite samples in clips {bad} of the batch")
    if len(images) == 1:
        return images[0]
    # Joined in a thread as well: torch's own threads would wait for more work in a loop, for
    # milliseconds, on the cores that these need.
    return map_threads(torch.cat, [images])[0] if use_threads else torch.cat(images)


def map_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Return ``[function(item) for item in items]``, each item on one of torch's number of threads.

    torch itself splits every single operation and waits for the slowest thread. Where other
    processes hold a core, each of hundreds of waits costs a time slice: 2 s in place of 0.08 s for
    the log-mel of 16 clips. Threads that work alone meet once.

    For the CPU and without a graph: the caller's autograd, autocast and other modes do not reach
    the threads.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        return [function(item) for item in items]
    return list(worker_pool(n_threads).map(function, items))  # one item too: no thread waits


@cache
def worker_pool(n_threads: int) -> ThreadPoolExecutor:
    """Return so many threads in which torch works alone; there is one such pool of each size."""
    pool = ThreadPoolExecutor(n_threads, "birdcall", initializer=_use_one_thread)
    all_started = threading.Barrier(n_threads)
    list(pool.map(lambda _: all_started.wait(), range(n_threads)))
    torch.set_num_threads(n_threads)  # `_use_one_thread` has changed it for threads started later
    return pool


def _use_one_thread() -> None:
    torch.get_num_threads()  # the first call in a thread would undo the next line
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: their pool would never return
    os.register_at_fork(after_in_child=worker_pool.cache_clear)


# --- precision ---


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Disable autocast, TF32 and bfloat16 products: each costs more than 1e-3 dB.

    cuDNN convolves in TF32 unless told otherwise, and matrix products do where a training script
    asked for ``torch.set_float32_matmul_precision("high")``.
    """
    if is_traced():  # settings of the exporting process do not travel with the graph
        yield
        return
    products = _CUDA_PRODUCTS if device.type == "cuda" else _CPU_PRODUCTS
    with products.lock:
        if not products.n_users:
            settings = [(operator, operator.fp32_precision) for operator in products.operators]
            products.changed = [pair for pair in settings if pair[1] in ("tf32", "bf16")]
            for operator, _ in products.changed:
                operator.fp32_precision = "ieee"
        products.n_users += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with products.lock:
            products.n_users -= 1
            if not products.n_users:
                for operator, precision in products.changed:
                    operator.fp32_precision = precision


@dataclass
class _Products:
    """How one kind of device multiplies: a global setting, exact while any thread needs it."""

    operators: Sequence[Any]
    n_users: int = 0
    changed: list[tuple[Any, str]] = field(default_factory=list)  # operators, their old precision
    lock: threading.Lock = field(default_factory=threading.Lock)


# What multiplies in TF32 or bfloat16 where that is allowed. Before 2.9, torch has no setting of
# each: there, leave `float32_matmul_precision` at "highest".
_ADJUSTABLE = hasattr(backends.cudnn, "conv")
_CUDA_PRODUCTS = _Products((backends.cuda.matmul, backends.cudnn.conv) if _ADJUSTABLE else ())
_CPU_PRODUCTS = _Products((backends.mkldnn.matmul, backends.mkldnn.conv) if _ADJUSTABLE else ())
