"""Turn waveforms into the images that networks take: log-mel, other features, SpecAugment."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from birdcall.audio.spectrogram import (
    FFTPower,
    Float32Module,
    Spectrogram,
    check_waveform,
    exact_float32,
    is_traced,
    map_clips,
    parameters_to_buffers,
)
from birdcall.config import FrontendConfig, require, require_share

logger = logging.getLogger(__name__)

_AMIN = 1e-10  # librosa's floor of power_to_db: silence is -100 dB
# Single precision errs by 1e-7 of a frame's mean amplitude, in quiet bins as in loud ones. Mel
# bins this far below the mean, but above _AUDIBLE_POWER, are computed in double precision. Of 200
# recordings, at 200 the largest error is 6e-4 dB, at 400 it is 1.2e-3 dB.
_SAFE_RATIO = 200
_AUDIBLE_POWER = 0.5e-8  # -83 dB
_BAND = 16  # mel filters to a product, see `_MelFilters`
_DELTA_WIDTH = 9  # frames; librosa.feature.delta's default
# PCEN as in the 6th place of 2020, which are librosa.pcen's defaults too.
_PCEN_GAIN, _PCEN_BIAS, _PCEN_POWER, _PCEN_SECONDS, _PCEN_EPS = 0.98, 2.0, 0.5, 0.4, 1e-6
_PCEN_BLOCK = 128  # frames smoothed by one matrix product
_FLAT_DB = 1e-3  # what varies by less is silence, and is not normalised
# BirdNET's two images: the lowest and the highest frequency in Hz, and n_fft at its sample rate.
_BIRDNET_BANDS = {"birdnet_low": (0, 3_000, 2048), "birdnet_high": (500, 15_000, 1024)}
_BIRDNET_RATE = 48_000
_BIRDNET_AMIN = 1e-15


class LogMel(Float32Module):
    """Waveform (batch, samples) to image (batch, len(features), frames, n_mels), float32.

    By default the one channel is the log_mel in dB, as by ``librosa.power_to_db``; BirdNET's
    features are those of `BirdNETFilters`. Computed in at least float32 under any autocast;
    differentiable; no clip influences another. The state dict is empty: everything follows from the
    configuration. ``frame_seconds`` is the time from one frame to the next.
    """

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.config = config
        self.frame_seconds = config.hop_length / config.sample_rate
        if config.features[0] in _BIRDNET_BANDS:
            self.filters = BirdNETFilters(config)
            return
        self.spectrogram = Spectrogram(config.n_fft, config.hop_length, config.implementation)
        if config.implementation == "torchlibrosa":
            from torchlibrosa.stft import LogmelFilterBank

            # is_log=False: decibels are those of `power_to_db`; torchlibrosa's top_db is of a batch
            self.mel = LogmelFilterBank(
                sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.n_mels,
                fmin=config.fmin, fmax=config.fmax, is_log=False,
            )  # fmt: skip
            parameters_to_buffers(self.mel)
        else:
            self.mel = _MelFilters(config)

    def forward(self, waveform: Tensor) -> Tensor:
        device = next(self.buffers()).device
        waveform = check_waveform(waveform, self.config.n_fft, device)
        with exact_float32(device):
            return map_clips(self._image, waveform)

    def _image(self, waveform: Tensor) -> Tensor:
        config = self.config
        to_image = self.filters if hasattr(self, "filters") else self._mel_image
        image = to_image(waveform)
        if config.normalization == "none":
            return image
        # Each channel of each clip, or each of its mel bins, gets mean 0 and standard deviation 1.
        dims = (2, 3) if config.normalization == "clip" else (2,)
        centred = image - image.mean(dims, keepdim=True)
        variance = centred.square().mean(dims, keepdim=True)
        return centred * (variance + _FLAT_DB**2).rsqrt()

    def _mel_image(self, waveform: Tensor) -> Tensor:
        config, power = self.config, self.spectrogram.power
        if isinstance(power, FFTPower):
            mel = power(waveform, self.mel, self.mel.is_inexact)
        else:
            mel = power(waveform, self.mel)
        log_mel = power_to_db(mel, config.top_db)
        makers = {
            "log_mel": lambda: log_mel,
            "log_mel_1.5": lambda: power_to_db(mel.pow(1.5), config.top_db),
            "pcen": lambda: pcen(mel, config.sample_rate / config.hop_length),
            "delta": lambda: delta(log_mel, order=1),
            "delta_delta": lambda: delta(log_mel, order=2),
        }
        channels = [makers[feature]() for feature in config.features]
        return torch.stack(channels, dim=1) if len(channels) > 1 else channels[0][:, None]


# --- power to mel --------------------------------------------------------------------------------


class _MelFilters(nn.Module):
    """Power (..., frames, bins) to mel (..., frames, n_mels).

    A mel filter covers few bins, the low ones fewest: products of 16 neighbouring filters with just
    their bins take less than half the time of one product with a matrix of zeros.
    """

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        filters = _mel_filters(config)
        self.bins: list[slice] = []
        for first in range(0, config.n_mels, _BAND):
            band = filters[:, first : first + _BAND]
            bins = band.any(dim=1).nonzero().flatten().tolist() or [0]
            self.bins.append(slice(bins[0], bins[-1] + 1))
            band = band[self.bins[-1]].contiguous()
            self.register_buffer(f"band{len(self.bins)}", band, persistent=False)
        self.register_buffer("doubtful", filters.norm(dim=0) / _SAFE_RATIO**2, persistent=False)

    def is_inexact(self, power: Tensor, mel: Tensor) -> Tensor:
        """Return in which frames single precision may be 1e-3 dB off: (clips, frames)."""
        limit = power.mean(dim=-1, keepdim=True) * self.doubtful
        return ((mel < limit) & (mel > _AUDIBLE_POWER)).any(dim=-1)

    def forward(self, power: Tensor) -> Tensor:
        bands = (getattr(self, f"band{number}") for number in range(1, len(self.bins) + 1))
        products = [power[..., bins] @ band for bins, band in zip(self.bins, bands, strict=True)]
        return torch.cat(products, dim=-1)


def _mel_filters(config: FrontendConfig) -> Tensor:
    """Return the mel filter bank (n_fft // 2 + 1, n_mels), float32.

    The triangles of ``librosa.filters.mel`` (Slaney's scale, unit area). The import of librosa for
    them would cost every process 1.5 s of processor time and 144 MB.
    """
    bin_hz = np.linspace(0, config.sample_rate / 2, config.n_fft // 2 + 1)[:, None]
    # Slaney's scale is linear up to 1 kHz (15 mel) and logarithmic above.
    lowest, highest = (
        hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) * 27 / math.log(6.4)
        for hz in (config.fmin, config.fmax)
    )
    edges_hz = np.array(
        [
            mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)
            for mel in np.linspace(lowest, highest, config.n_mels + 2)
        ]
    )
    lower, centre, upper = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising, falling = (bin_hz - lower) / (centre - lower), (upper - bin_hz) / (upper - centre)
    filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (upper - lower)
    if empty := int((filters.max(axis=0) == 0).sum()):
        logger.warning(
            "%d of n_mels %d filters lie between two bins of n_fft %d and are always 0: "
            "lower n_mels or raise n_fft or fmin", empty, config.n_mels, config.n_fft,
        )  # fmt: skip
    return torch.from_numpy(filters.astype(np.float32))


class BirdNETFilters(nn.Module):
    """Waveform (batch, samples) to BirdNET 2.4's images (batch, channels, frames, n_mels), in dB.

    BirdNET weights the real parts of a spectrum by mel filters and squares the sums: each mel bin
    is the power of a band-pass filter, which depends on the phase. "birdnet_low" has filters for 0
    to 3 kHz, "birdnet_high" for 0.5 to 15 kHz. BirdNET's frames begin every 278 and 280 samples
    at 48 kHz; here both images have one hop, and a frame is centred where a log_mel's is. The
    samples of each clip are scaled to [-1, 1].
    """

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        rate, n_fft = config.sample_rate, birdnet_n_fft(config.sample_rate)
        highest = max(_BIRDNET_BANDS[feature][1] for feature in config.features)
        require(
            rate >= 2 * highest, f"sample_rate is {rate}; {config.features[-1]} needs {2 * highest}"
        )
        require(
            config.n_fft == n_fft,
            f"n_fft is {config.n_fft}; BirdNET's longest filters have {n_fft} samples at {rate} Hz",
        )
        self.hop_length = config.hop_length
        for feature in config.features:
            self.register_buffer(feature, _birdnet_kernel(feature, config), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        lowest, highest = waveform.amin(1, keepdim=True), waveform.amax(1, keepdim=True)
        scaled = 2 * (waveform - lowest) / (highest - lowest + 1e-6) - 1
        n_frames = waveform.shape[1] // self.hop_length + 1
        images = []
        for kernel in self.buffers():
            half, n_samples = kernel.shape[2] // 2, kernel.shape[2]
            padded = functional.pad(scaled[:, None], (half, n_samples - half), mode="reflect")
            sums = functional.conv1d(padded, kernel, stride=self.hop_length)[..., :n_frames]
            images.append(sums.square().clamp(min=_BIRDNET_AMIN).log10().mul(10))
        return torch.stack(images, dim=1).transpose(2, 3)


def birdnet_n_fft(sample_rate: int) -> int:
    """Return the samples of BirdNET's longest filters, which are 2048 at 48 kHz."""
    return -(-2048 * sample_rate // _BIRDNET_RATE)


def _birdnet_kernel(feature: str, config: FrontendConfig) -> Tensor:
    """Return filters (n_mels, 1, samples): a Hann window times mel-weighted sums of cosines.

    BirdNET's filters at 48 kHz are functions of time; they are sampled at ``sample_rate``.
    """
    fmin, fmax, n_fft = _BIRDNET_BANDS[feature]
    bin_hz = np.arange(n_fft // 2 + 1) * _BIRDNET_RATE / n_fft
    bin_mel, band_mel = (  # HTK's scale, and triangles in mel, as in TensorFlow
        1127 * np.log1p(hz / 700) for hz in (bin_hz, np.array([fmin, fmax]))
    )
    edges = np.linspace(*band_mel, config.n_mels + 2)[:, None]
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bin_mel - lower) / (centre - lower), (upper - bin_mel) / (upper - centre)
    filters = np.maximum(0, np.minimum(rising, falling))
    filters[:, 0] = 0  # the constant part has no weight
    seconds = np.arange(-(-n_fft * config.sample_rate // _BIRDNET_RATE)) / config.sample_rate
    window = 0.5 - 0.5 * np.cos(2 * np.pi * seconds * _BIRDNET_RATE / n_fft)
    kernel = filters @ np.cos(2 * np.pi * np.outer(bin_hz, seconds)) * window
    return torch.from_numpy(kernel * _BIRDNET_RATE / config.sample_rate).float()[:, None]


# --- mel to features, (batch, frames, n_mels) each -----------------------------------------------


def power_to_db(power: Tensor, top_db: float | None = None) -> Tensor:
    """Return decibels as ``librosa.power_to_db(power, top_db=top_db)`` of each clip alone."""
    decibels = power.clamp(min=_AMIN).log10_().mul_(10)
    if top_db is None:
        return decibels
    return decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - top_db)


def pcen(mel: Tensor, frames_per_second: float) -> Tensor:
    """Return ``librosa.pcen`` of mel power, with its smoother started at the first frame.

    librosa starts it at 1 (its argument ``zi``), some 50 dB above a quiet site: five-second
    clips would spend most of their time fading in.
    """
    n_frames = _PCEN_SECONDS * frames_per_second
    weight = (math.sqrt(1 + 4 * n_frames**2) - 1) / (2 * n_frames**2)
    gain = (_smooth(mel, weight) + _PCEN_EPS).pow(-_PCEN_GAIN)
    return (mel * gain + _PCEN_BIAS).pow(_PCEN_POWER) - _PCEN_BIAS**_PCEN_POWER


def _smooth(mel: Tensor, weight: float) -> Tensor:
    """Return ``s[t] = (1 - weight) s[t - 1] + weight mel[t]``, from ``s[-1] = mel[0]``.

    One triangular matrix filters the frames of each block, another the states between blocks: no
    loop over frames, and memory that does not grow with their square.
    """
    n_frames = mel.shape[1]
    n_blocks = n_frames // _PCEN_BLOCK + 2  # never 1, which an exporter would make a constant
    padded = functional.pad(mel, (0, 0, 0, n_blocks * _PCEN_BLOCK - n_frames))
    blocks = padded.reshape(mel.shape[0], n_blocks, _PCEN_BLOCK, mel.shape[2])
    step = torch.arange(_PCEN_BLOCK, device=mel.device, dtype=torch.float32)
    block = torch.arange(n_blocks, device=mel.device, dtype=torch.float32)
    decay = 1 - weight  # in one step
    within = torch.tril(weight * decay ** (step[:, None] - step).clamp(min=0)) @ blocks
    between = decay ** (_PCEN_BLOCK * (block[:, None] - 1 - block)).clamp(min=0)
    start = decay ** (_PCEN_BLOCK * block)[:, None] * mel[:, 0, None]
    # The states in which the blocks start: (batch, blocks, n_mels).
    inherited = torch.tril(between, diagonal=-1) @ within[:, :, -1] + start
    smoothed = within + decay ** (step + 1)[:, None] * inherited[:, :, None]
    return smoothed.flatten(1, 2)[:, :n_frames]


def delta(log_mel: Tensor, order: int) -> Tensor:
    """Return ``librosa.feature.delta(log_mel, order=order)`` along frames, shape kept.

    Clips of fewer than nine frames, where librosa raises, follow its ``mode="nearest"``.
    """
    # A polynomial of degree `order` fitted to nine frames has one derivative, so that librosa's
    # "interp" at the edges is the derivative of the nearest whole fit.
    half = _DELTA_WIDTH // 2
    fit = np.linalg.pinv(np.vander(np.arange(-half, half + 1), order + 1, increasing=True))
    weights = fit[order] * math.factorial(order)
    whole = is_traced() or log_mel.shape[1] >= _DELTA_WIDTH
    frames = log_mel if whole else _repeat_edges(log_mel, half)
    n_fits = frames.shape[1] - 2 * half
    slopes = sum(float(w) * frames[:, k : k + n_fits] for k, w in enumerate(weights))
    return _repeat_edges(slopes, half) if whole else slopes


def _repeat_edges(image: Tensor, n_frames: int) -> Tensor:
    first, last = (image[:, frame, None].expand(-1, n_frames, -1) for frame in (0, -1))
    return torch.cat((first, image, last), dim=1)


# --- masks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpecAugment:
    """Random masks over intervals of frames and of mel bins of each clip.

    Each of ``n_masks`` masks per axis is 0 to ``share`` of that axis wide, uniformly; every clip
    has its own masks. Hidden points take the clip's mean (per channel): 0 dB would be a loud event
    at a site with noise at -60 dB, and the mean does not change under normalisation.
    """

    time_mask_share: float
    mel_mask_share: float
    n_masks: int

    def __post_init__(self) -> None:
        require_share("time_mask_share", self.time_mask_share)
        require_share("mel_mask_share", self.mel_mask_share)
        require(self.n_masks >= 0, f"n_masks is {self.n_masks}; it must not be negative")

    def draw(self, n_clips: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the masks of so many clips ``(n_clips, 2, 2, n_masks)``, on the CPU.

        Second dimension: frames, mel bins; third: width and start, as shares of what is possible.
        """
        return torch.rand(n_clips, 2, 2, self.n_masks, generator=generator)

    def hide(self, image: Tensor, draws: Tensor) -> Tensor:
        """Return a masked copy of ``image`` (batch, channels, frames, n_mels)."""
        if draws.shape[-1] == 0:
            return image
        hidden = []  # of each axis: (batch, length), True where a mask lies
        shares = (self.time_mask_share, self.mel_mask_share)
        axis_draws = draws.to(image.device)[..., None].unbind(1)
        for length, share, draw in zip(image.shape[2:], shares, axis_draws, strict=True):
            width_draw, start_draw = draw.unbind(1)  # (batch, n_masks, 1)
            width = (width_draw * (int(share * length) + 1)).floor()
            start = (start_draw * (length - width + 1)).floor()
            position = torch.arange(length, device=image.device)
            hidden.append(((position >= start) & (position < start + width)).any(dim=1))
        hidden_frames, hidden_mels = hidden
        point = hidden_frames[:, None, :, None] | hidden_mels[:, None, None, :]
        return torch.where(point, image.mean(dim=(2, 3), keepdim=True), image)
