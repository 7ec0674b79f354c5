"""Turn waveforms into the image that the network sees: log-mel, its relatives, its masks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from birdcall.audio.spectrogram import (
    FFTPower,
    Spectrogram,
    check_waveform,
    exact_float32,
    is_traced,
    keep_float32,
    map_clips,
    parameters_to_buffers,
)
from birdcall.config import FrontendConfig, require, require_share

__all__ = ["LogMel", "SpecAugment", "Spectrogram"]

log = logging.getLogger(__name__)

AMIN = 1e-10  # librosa's floor of power_to_db: silence is -100 dB
# Single precision errs by 1e-7 of a frame's mean amplitude, in quiet bins as in loud ones. What
# lies this far below the mean, but can be heard, is computed in double precision. Of 200
# recordings, at 200 the largest error is 6e-4 dB, at 400 it is 1.2e-3 dB.
SAFE_RATIO = 200
AUDIBLE_POWER = 0.5e-8  # -83 dB
BAND = 16  # mel filters to a product, see `MelFilters`
DELTA_WIDTH = 9  # frames; librosa.feature.delta's default
# PCEN as in the 6th place of 2020, which are librosa.pcen's defaults too.
PCEN_GAIN, PCEN_BIAS, PCEN_POWER, PCEN_SECONDS, PCEN_EPS = 0.98, 2.0, 0.5, 0.4, 1e-6
PCEN_BLOCK = 128  # frames smoothed by one matrix product
FLAT_DB = 1e-3  # normalisation leaves what varies by less than this alone: it is silence


class LogMel(nn.Module):
    """Waveform (batch, samples) to image (batch, len(features), frames, n_mels), float32.

    By default the one channel is the log_mel in dB, as ``librosa.power_to_db`` has it. Never less
    than float32 inside, whatever autocast says; differentiable; no clip influences another. The
    state dict is empty: the configuration says it all.
    """

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.config = config
        self.spectrogram = Spectrogram(config.n_fft, config.hop_length, config.implementation)
        own = config.implementation != "torchlibrosa"
        self.mel = MelFilters(config) if own else _torchlibrosa_mel(config)

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return self.config.hop_length / self.config.sample_rate

    def frames(self, n_samples: int) -> int:
        """Return the number of frames of a waveform of ``n_samples``."""
        return self.spectrogram.frames(n_samples)

    def forward(self, waveform: Tensor) -> Tensor:
        device = next(self.mel.buffers()).device
        waveform = check_waveform(waveform, self.config.n_fft, device)
        with exact_float32(device):
            return map_clips(self._image, waveform)

    def _image(self, waveform: Tensor) -> Tensor:
        power = self.spectrogram.power
        if isinstance(power, FFTPower):
            mel = power.repaired(waveform, self.mel, self.mel.is_inexact)
        else:
            mel = power(waveform, self.mel)
        return normalize(self._features(mel), self.config.normalization)

    def _features(self, mel: Tensor) -> Tensor:
        config, log_mel = self.config, power_to_db(mel, self.config.top_db)
        makers: dict[str, Callable[[], Tensor]] = {
            "log_mel": lambda: log_mel,
            "log_mel_1.5": lambda: power_to_db(mel.pow(1.5), config.top_db),
            "pcen": lambda: pcen(mel, config.sample_rate / config.hop_length),
            "delta": lambda: delta(log_mel, order=1),
            "delta_delta": lambda: delta(log_mel, order=2),
        }
        channels = [makers[feature]() for feature in config.features]
        return torch.stack(channels, dim=1) if len(channels) > 1 else channels[0][:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogMel:
        return super()._apply(keep_float32(fn), recurse)


# --- power to mel --------------------------------------------------------------------------------


class MelFilters(nn.Module):
    """Power (..., frames, bins) to mel (..., frames, n_mels).

    A mel filter covers few bins, the low ones fewest: products of 16 neighbouring filters with just
    their bins take less than half the time of one product with a matrix of zeros.
    """

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        filters = mel_filters(config)
        self.bins: list[slice] = []
        for first in range(0, config.n_mels, BAND):
            band = filters[:, first : first + BAND]
            bins = band.any(dim=1).nonzero().flatten().tolist() or [0]
            self.bins.append(slice(bins[0], bins[-1] + 1))
            band = band[self.bins[-1]].contiguous()
            self.register_buffer(f"band{len(self.bins)}", band, persistent=False)
        self.register_buffer("doubtful", filters.norm(dim=0) / SAFE_RATIO**2, persistent=False)

    def is_inexact(self, power: Tensor, mel: Tensor) -> Tensor:
        """Return in which frames single precision may be 1e-3 dB off: (clips, frames)."""
        limit = power.mean(dim=-1, keepdim=True) * self.doubtful
        return ((mel < limit) & (mel > AUDIBLE_POWER)).any(dim=-1)

    def forward(self, power: Tensor) -> Tensor:
        bands = (getattr(self, f"band{number}") for number in range(1, len(self.bins) + 1))
        products = [power[..., bins] @ band for bins, band in zip(self.bins, bands, strict=True)]
        return torch.cat(products, dim=-1)


def mel_filters(config: FrontendConfig) -> Tensor:
    """Return the mel filter bank (n_fft // 2 + 1, n_mels), float32.

    The triangles of ``librosa.filters.mel`` (Slaney's scale, unit area), without the import of
    librosa, which costs every loader worker seconds.
    """
    bin_hz = np.linspace(0, config.sample_rate / 2, config.n_fft // 2 + 1)[:, None]
    mels = np.linspace(_hz_to_mel(config.fmin), _hz_to_mel(config.fmax), config.n_mels + 2)
    edges_hz = np.array([_mel_to_hz(mel) for mel in mels])
    lower, centre, upper = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising, falling = (bin_hz - lower) / (centre - lower), (upper - bin_hz) / (upper - centre)
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (upper - lower)
    if empty := int((filters.max(axis=0) == 0).sum()):
        log.warning(
            "%d of n_mels %d filters lie between two bins of n_fft %d and stay silent: "
            "lower n_mels or raise n_fft or fmin", empty, config.n_mels, config.n_fft,
        )  # fmt: skip
    return torch.from_numpy(filters.astype(np.float32))


def _hz_to_mel(hz: float) -> float:
    return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) * 27 / math.log(6.4)


def _mel_to_hz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)


def _torchlibrosa_mel(config: FrontendConfig) -> nn.Module:
    from torchlibrosa.stft import LogmelFilterBank

    # is_log=False leaves the decibels to `power_to_db`: torchlibrosa's top_db clamps by the batch.
    bank = LogmelFilterBank(
        sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels,
        fmin=config.fmin, fmax=config.fmax, is_log=False,
    )  # fmt: skip
    parameters_to_buffers(bank)
    return bank


# --- mel to features, (batch, frames, n_mels) each -----------------------------------------------


def power_to_db(power: Tensor, top_db: float | None = None) -> Tensor:
    """Return decibels as ``librosa.power_to_db(power, top_db=top_db)`` of each clip alone."""
    decibels = power.clamp(min=AMIN).log10_().mul_(10)
    if top_db is None:
        return decibels
    return decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - top_db)


def pcen(mel: Tensor, frames_per_second: float) -> Tensor:
    """Return ``librosa.pcen`` of mel power, with its smoother started at the first frame.

    librosa starts it at 1 (its argument ``zi``), some 50 dB above a quiet site: five-second
    clips would spend most of their time fading in.
    """
    n_frames = PCEN_SECONDS * frames_per_second
    weight = (math.sqrt(1 + 4 * n_frames**2) - 1) / (2 * n_frames**2)
    gain = (smooth(mel, weight) + PCEN_EPS).pow(-PCEN_GAIN)
    return (mel * gain + PCEN_BIAS).pow(PCEN_POWER) - PCEN_BIAS**PCEN_POWER


def smooth(mel: Tensor, weight: float) -> Tensor:
    """Return ``s[t] = (1 - weight) s[t - 1] + weight mel[t]``, from ``s[-1] = mel[0]``.

    Blocks of frames are filtered by a triangular matrix, and the state that a block hands on by
    another one: no loop over frames, and memory that does not grow with their square.
    """
    n_frames = mel.shape[1]
    n_blocks = n_frames // PCEN_BLOCK + 2  # never 1, which an exporter would take for fixed
    padded = functional.pad(mel, (0, 0, 0, n_blocks * PCEN_BLOCK - n_frames))
    blocks = padded.reshape(mel.shape[0], n_blocks, PCEN_BLOCK, mel.shape[2])
    step = torch.arange(PCEN_BLOCK, device=mel.device)
    block = torch.arange(n_blocks, device=mel.device)

    def decay(steps: Tensor) -> Tensor:
        return (1 - weight) ** steps.clamp(min=0).float()

    within = torch.tril(weight * decay(step[:, None] - step)) @ blocks
    between = torch.tril(decay(PCEN_BLOCK * (block[:, None] - 1 - block)), diagonal=-1)
    start = decay(PCEN_BLOCK * block)[:, None] * mel[:, 0, None]
    inherited = between @ within[:, :, -1] + start  # (batch, blocks, n_mels)
    smoothed = within + decay(step + 1)[:, None] * inherited[:, :, None]
    return smoothed.flatten(1, 2)[:, :n_frames]


def delta(log_mel: Tensor, order: int) -> Tensor:
    """Return ``librosa.feature.delta(log_mel, order=order)`` along frames, shape kept.

    Clips of fewer than nine frames, where librosa raises, follow its ``mode="nearest"``.
    """
    # A polynomial of degree `order` fitted to nine frames has one derivative, so that librosa's
    # "interp" at the edges is the derivative of the nearest whole fit.
    half = DELTA_WIDTH // 2
    fit = np.linalg.pinv(np.vander(np.arange(-half, half + 1), order + 1, increasing=True))
    weights = fit[order] * math.factorial(order)
    whole = is_traced() or log_mel.shape[1] >= DELTA_WIDTH
    frames = log_mel if whole else _repeat_edges(log_mel, half)
    n_fits = frames.shape[1] - 2 * half
    slopes = sum(float(w) * frames[:, k : k + n_fits] for k, w in enumerate(weights))
    return _repeat_edges(slopes, half) if whole else slopes


def _repeat_edges(image: Tensor, n_frames: int) -> Tensor:
    first, last = (image[:, frame, None].expand(-1, n_frames, -1) for frame in (0, -1))
    return torch.cat((first, image, last), dim=1)


def normalize(image: Tensor, normalization: str) -> Tensor:
    """Bring each channel of each clip ("clip"), or each of its mel bins ("bin"), to mean 0, std 1.

    image (batch, channels, frames, n_mels); "none" returns it as it is.
    """
    if normalization == "none":
        return image
    dims = (2, 3) if normalization == "clip" else (2,)
    centred = image - image.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    return centred * (variance + FLAT_DB**2).rsqrt()


# --- masks ---------------------------------------------------------------------------------------


class SpecAugment(nn.Module):
    """Hide stretches of frames and of mel bins of each clip, in training mode only.

    Each of ``n_masks`` masks per axis is 0 to ``share`` of that axis wide, uniformly; every clip
    has its own. Hidden points take the clip's mean (per channel): 0 dB would be a shout where a
    site hums at -60 dB, and the mean stays the mean under normalisation.
    """

    def __init__(self, time_mask_share: float, mel_mask_share: float, n_masks: int) -> None:
        super().__init__()
        require_share("time_mask_share", time_mask_share)
        require_share("mel_mask_share", mel_mask_share)
        require(n_masks >= 0, f"n_masks is {n_masks}; it must not be negative")
        self.time_mask_share, self.mel_mask_share = time_mask_share, mel_mask_share
        self.n_masks = n_masks

    def draw(self, n_clips: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the masks of so many clips ``(n_clips, 2, 2, n_masks)``, on the CPU.

        Second dimension: frames, mel bins; third: width and start, as shares of what is possible.
        """
        return torch.rand(n_clips, 2, 2, self.n_masks, generator=generator)

    def hide(self, image: Tensor, draws: Tensor) -> Tensor:
        """Return a masked copy of ``image`` (batch, channels, frames, n_mels), in any mode."""
        if draws.shape[-1] == 0:
            return image
        draws = draws.to(image.device)[..., None].unbind(1)
        hidden_frames = _masks(image.shape[2], self.time_mask_share, *draws[0].unbind(1))
        hidden_mels = _masks(image.shape[3], self.mel_mask_share, *draws[1].unbind(1))
        hidden = hidden_frames[:, None, :, None] | hidden_mels[:, None, None, :]
        return torch.where(hidden, image.mean(dim=(2, 3), keepdim=True), image)

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Hide what is drawn now, in training mode; ``generator`` is one of the CPU."""
        return self.hide(image, self.draw(len(image), generator)) if self.training else image


def _masks(length: int, share: float, width_draw: Tensor, start_draw: Tensor) -> Tensor:
    """Return (batch, length), True where one of the masks drawn in (batch, n_masks, 1) lies."""
    width = (width_draw * (int(share * length) + 1)).floor()
    start = (start_draw * (length - width + 1)).floor()
    position = torch.arange(length, device=width.device)
    return ((position >= start) & (position < start + width)).any(dim=1)
