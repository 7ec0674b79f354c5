"""Turn waveforms into power spectrograms: checked, exact, and as fast as the cache allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from birdcall.config import require, require_choice
from birdcall.threads import map_threads

INT16_SCALE = 1 / 32_768
# Framed samples handled at once. On a CPU a block (4 MB) stays in the cache and its memory is used
# again; whole batches take thrice as long. A GPU wants large blocks.
CPU_BLOCK, GPU_BLOCK = 2**19, 2**26
CLIPS_AT_ONCE = 4

# Who multiplies in TF32 or bfloat16 when allowed to. torch before 2.9 cannot be told one by one:
# there, leave `float32_matmul_precision` at "highest".
_BACKENDS = torch.backends
_ADJUSTABLE = hasattr(_BACKENDS.cudnn, "conv")
_CUDA_PRODUCTS = (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv) if _ADJUSTABLE else ()
_CPU_PRODUCTS = (_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv) if _ADJUSTABLE else ()


class Spectrogram(nn.Module):
    """Power spectrogram: waveform (batch, samples) to (batch, 1, frames, n_fft // 2 + 1).

    Equals ``abs(librosa.stft(waveform, pad_mode="reflect")) ** 2``, in torchlibrosa's layout.
    Its tables follow from its arguments and stay out of the state dict. ``power(waveform, f)`` is
    ``f(power)`` for a function of frames, (clips, frames, bins) to (clips, frames, ...): called
    block by block, it never sees the power of a whole batch.
    """

    def __init__(self, n_fft: int, hop_length: int, implementation: str = "fft") -> None:
        super().__init__()
        require(0 < hop_length <= n_fft, f"hop_length {hop_length} must be in 1..n_fft ({n_fft})")
        require_choice("implementation", implementation, tuple(POWERS))
        self.n_fft, self.hop_length = n_fft, hop_length
        self.power = POWERS[implementation](n_fft, hop_length)

    def frames(self, n_samples: int) -> int:
        """Return the number of frames of a waveform of ``n_samples``."""
        return count_frames(n_samples + 2 * (self.n_fft // 2), self.n_fft, self.hop_length)

    def forward(self, waveform: Tensor) -> Tensor:
        device = next(self.buffers(), waveform).device
        waveform = check_waveform(waveform, self.n_fft, device)
        with exact_float32(device):
            power = map_clips(lambda clips: self.power(clips, lambda power: power), waveform)
        return power[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Spectrogram:
        return super()._apply(keep_float32(fn), recurse)


class FFTPower(nn.Module):
    """Power by FFT in double precision, like librosa's; blocks of frames fit the cache.

    A float32 FFT errs by 1e-7 of the loudest bin in every bin: up to 2e-2 dB at the -80 dB of a
    recording with wind. It would save a third of the time.
    """

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length

    def forward(self, waveform: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        # Made here, not kept as a buffer: a model with float64 in it cannot move to Apple's GPUs.
        dtype = torch.float32 if waveform.device.type == "mps" else torch.float64
        window = torch.hann_window(self.n_fft, dtype=dtype, device=waveform.device)
        padded = reflect_pad(waveform, self.n_fft // 2)
        edges = self._edges(*padded.shape, waveform.device)
        parts = [
            padded[:, first * self.hop_length : (end - 1) * self.hop_length + self.n_fft]
            for first, end in pairwise(edges)
        ]
        return torch.cat([function(self._power(part, window)) for part in parts], dim=1)

    def _edges(self, n_clips: int, n_padded: int, device: torch.device) -> list[int]:
        """Return where parts small enough begin and end, in frames: three at least, equally long.

        Three, so that double precision needs no more memory than the complex spectrogram of all.
        """
        n_frames = count_frames(n_padded, self.n_fft, self.hop_length)
        block = CPU_BLOCK if device.type == "cpu" else GPU_BLOCK
        n_parts = max(3, -(-n_frames // max(1, block // (self.n_fft * n_clips))))
        n_parts = min(n_parts, n_frames)
        return [n_frames * part // n_parts for part in range(n_parts + 1)]

    def _power(self, samples: Tensor, window: Tensor) -> Tensor:
        frames = samples.to(window.dtype).unfold(-1, self.n_fft, self.hop_length)
        spectrum = torch.view_as_real(torch.fft.rfft(frames * window).to(torch.complex64))
        # Not abs().square(): the square root costs as much as everything else.
        return spectrum[..., 0].square().add_(spectrum[..., 1].square())


class ConvPower(nn.Module):
    """Power by a convolution with sines and cosines, for ONNX, which has no usable STFT."""

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        turns = np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) % n_fft / n_fft
        waves = np.concatenate([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)])
        kernel = torch.from_numpy(waves * hann(n_fft)).float()
        self.register_buffer("kernel", kernel[:, None], persistent=False)

    def forward(self, waveform: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        pad = self.n_fft // 2
        padded = functional.pad(waveform[:, None], (pad, pad), mode="reflect")
        cosines, sines = functional.conv1d(padded, self.kernel, stride=self.hop_length).chunk(
            2, dim=1
        )
        return function((cosines.square() + sines.square()).transpose(1, 2))


class TorchlibrosaPower(nn.Module):
    """Power by torchlibrosa's own module, without its weights in the state dict."""

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        from torchlibrosa.stft import Spectrogram as TorchlibrosaSpectrogram

        self.module = TorchlibrosaSpectrogram(n_fft=n_fft, hop_length=hop_length)
        del self.module.stft.W  # 67 MB of complex128 at n_fft 2048, never read again
        parameters_to_buffers(self.module)

    def forward(self, waveform: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(self.module(waveform)[:, 0])


POWERS: dict[str, Callable[[int, int], nn.Module]] = {
    "fft": FFTPower,
    "conv": ConvPower,
    "torchlibrosa": TorchlibrosaPower,
}


def count_frames(n_padded: int, n_fft: int, hop_length: int) -> int:
    """Return how many whole frames lie in ``n_padded`` samples."""
    return 1 + (n_padded - n_fft) // hop_length


def hann(n_fft: int) -> np.ndarray:
    """Return the periodic Hann window, float64."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def reflect_pad(waveform: Tensor, n_samples: int) -> Tensor:
    """Mirror ``n_samples`` at either end; six times as fast as ``functional.pad`` on a CPU."""
    start, end = waveform[:, 1 : n_samples + 1], waveform[:, -n_samples - 1 : -1]
    return torch.cat((start.flip(1), waveform, end.flip(1)), dim=1)


def map_clips(function: Callable[[Tensor], Tensor], waveform: Tensor) -> Tensor:
    """Return ``function(waveform)`` of a function that treats every clip alone.

    On a CPU it is called with a few clips at a time: they stay in the cache and have a thread for
    themselves. A few, because threads of Python wait for each other at every call of torch.
    """
    if waveform.device.type != "cpu" or is_traced():
        return function(waveform)
    n_clips = min(CLIPS_AT_ONCE, -(-len(waveform) // (2 * torch.get_num_threads())))
    groups = waveform.split(n_clips)
    if torch.is_grad_enabled() and waveform.requires_grad:  # the graph would not cross threads
        return torch.cat([function(group) for group in groups])
    results = map_threads(function, groups)
    # torch would share each group's copy among its threads, which a thread of ours does not.
    return results[0] if len(results) == 1 else map_threads(torch.cat, [results])[0]


def parameters_to_buffers(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            delattr(owner, name)
            owner.register_buffer(name, parameter.detach().contiguous(), persistent=False)


def check_waveform(waveform: Tensor, n_fft: int, device: torch.device) -> Tensor:
    """Return the waveform (batch, samples) as float32, or raise ValueError saying what is wrong.

    int16 is scaled by 1 / 32768 (what soundfile and librosa do), float64 and half precision are
    converted. Other integers have no one scale, so they are refused.
    """
    require(isinstance(waveform, Tensor), f"waveform is a {type(waveform).__name__}; give a tensor")
    if not is_traced():
        _check_shape(tuple(waveform.shape), n_fft)
    require(
        waveform.device == device,
        f"waveform is on {waveform.device}, the front end on {device}; move one with .to(device)",
    )
    if waveform.dtype == torch.int16:
        waveform = waveform.float() * INT16_SCALE
    require(
        waveform.is_floating_point(),
        f"waveform is {waveform.dtype}; give float32 in [-1, 1] or int16",
    )
    waveform = waveform.float()
    if not is_traced():
        _check_finite(waveform)
    return waveform


def _check_shape(shape: tuple[int, ...], n_fft: int) -> None:
    require(
        len(shape) == 2,
        f"waveform has shape {shape}; give (batch, samples): one mono clip is waveform[None], "
        "stereo is averaged first",
    )
    batch, n_samples = shape
    require(batch > 0 and n_samples > 0, f"waveform has shape {shape}; it is empty")
    require(
        n_samples > n_fft // 2,
        f"waveform has {n_samples} samples (shape {shape}); n_fft {n_fft} needs at least "
        f"{n_fft // 2 + 1} to mirror at the edges: pad it, or transpose (samples, channels)",
    )


def _check_finite(waveform: Tensor) -> None:
    # One sum is the cheapest pass that sees every NaN; only what it suspects is looked at closely.
    if not bool(waveform.detach().sum().isfinite()):
        bad = (~waveform.detach().isfinite()).any(dim=1).nonzero().flatten().tolist()
        require(not bad, f"waveform has NaN or infinite samples in clips {bad} of the batch")


def is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Keep autocast, TF32 and bfloat16 products out: each costs more than 1e-3 dB.

    cuDNN convolves in TF32 unless told otherwise, and matrix products do where a training script
    asked for ``torch.set_float32_matmul_precision("high")``.
    """
    if is_traced():  # settings of the exporting process do not travel with the graph
        yield
        return
    operators = _CUDA_PRODUCTS if device.type == "cuda" else _CPU_PRODUCTS
    changed = [(op, op.fp32_precision) for op in operators if op.fp32_precision in ("tf32", "bf16")]
    try:
        for operator, _ in changed:
            operator.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for operator, precision in changed:
            operator.fp32_precision = precision


def keep_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let ``.to(device)`` through, but not ``.half()``, which would round window and filters."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move
