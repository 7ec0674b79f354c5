"""Turn sound into what a browser shows and plays: spectrogram pictures and mp3."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
from PIL import Image

from birdcall.spectrogram import Spectrogram

SAMPLE_RATE = 32_000
MAX_HZ = SAMPLE_RATE / 2
N_FFT, HOP_LENGTH = 1024, 640  # 50 columns a second
N_ROWS = 256
TILE_SECONDS = 60  # a WebP picture is at most 16,383 pixels wide
# Levels of white and black: of a noisy place, and of its loudest birds.
PERCENTILES = (20.0, 99.9)
FLOOR_DB = 30.0  # between them, at least: silence is no noise to look at
# What lies further below the loudest point is no noise of the place, but a recorder's or codec's
# limit in frequency; counted in, it would make all noise black.
NOISE_DB = 90.0
PICTURE_QUALITY = 50
MP3_COMPRESSION = 0.9  # 56 kbit/s, constant, so that a player can seek exactly


@dataclass(frozen=True)
class Tile:
    """A stretch of a spectrogram as a picture, low frequencies at the bottom, loud is dark."""

    start: float
    seconds: float
    picture: str  # data URI


def draw_tiles(waveform: np.ndarray) -> list[Tile]:
    """Draw a spectrogram ``(samples,)`` at `SAMPLE_RATE`, in tiles of a minute.

    All have the same levels. Silence is white.
    """
    n_tile = TILE_SECONDS * SAMPLE_RATE
    levels = [
        _levels(waveform[start : start + n_tile]) for start in range(0, len(waveform), n_tile)
    ]
    together = np.concatenate(levels, axis=1)
    low, high = np.percentile(together[together >= together.max() - NOISE_DB], PERCENTILES)
    high = max(high, low + FLOOR_DB)
    tiles = []
    for number, level in enumerate(levels):
        dark = np.clip((level - low) / (high - low), 0, 1)
        picture = Image.fromarray(np.round(255 * (1 - dark)).astype(np.uint8))
        content = io.BytesIO()
        picture.save(content, "WEBP", quality=PICTURE_QUALITY, method=4)
        seconds = min(n_tile, len(waveform) - number * n_tile) / SAMPLE_RATE
        uri = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
        tiles.append(Tile(float(number * TILE_SECONDS), seconds, uri))
    return tiles


def _levels(waveform: np.ndarray) -> np.ndarray:
    """Return decibels ``(N_ROWS, columns)``, high frequencies first."""
    padded = np.pad(waveform, (0, max(0, N_FFT - len(waveform))))
    spectrogram = Spectrogram(n_fft=N_FFT, hop_length=HOP_LENGTH)
    power = spectrogram(torch.from_numpy(padded)[None])[0, 0].numpy()
    # As many columns as the stretch has: tiles stand side by side.
    power = power[: max(1, -(-len(waveform) // HOP_LENGTH)), :-1]
    rows = power.reshape(len(power), N_ROWS, -1).max(axis=2)
    return 10 * np.log10(np.maximum(rows, 1e-10)).T[::-1]


def encode_mp3(waveform: np.ndarray) -> str:
    """Return a waveform ``(samples,)`` at `SAMPLE_RATE` as mp3, in base64.

    Quiet recordings are raised to be heard: their loudest sample is full scale.
    """
    peak = float(np.abs(waveform).max(initial=0.0))
    content = io.BytesIO()
    soundfile.write(
        content, waveform / max(peak, 1e-4) * 0.95, SAMPLE_RATE, format="MP3",
        subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=MP3_COMPRESSION,
    )  # fmt: skip
    return base64.b64encode(content.getvalue()).decode()
