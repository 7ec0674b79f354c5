"""Put a page together: one file, its scripts named by hash, so that nothing else in it can run."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile
import torch
from PIL import Image

from birdcall.audio.spectrogram import Spectrogram
from birdcall.storage.files import write_atomically

# The browser runs the scripts of these hashes, and no other: no handler in a name, no eval. It
# fetches nothing at all.
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
    "media-src data: blob:; connect-src data:; font-src data:; base-uri 'none'; form-action 'none'"
)
MAX_NAME_BYTES = 200  # of a file; what file systems take is 255


def write_page(
    path: Path,
    title: str,
    body: str,
    *,
    scripts: tuple[str, ...] = (),
    styles: tuple[str, ...] = (),
    data: Any = None,
) -> None:
    """Write a page whose ``body`` is HTML, with ``scripts`` run in order at its end.

    ``data`` is for them: JSON in an element of the id ``data``. NaN becomes null.
    """
    sources = "".join(f"<script>{script}</script>" for script in scripts)
    if any("</script" in script.lower() for script in scripts):
        raise ValueError(f"{path}: a script holds its own end")
    policy = POLICY.format(scripts=" ".join(map(_hash, scripts)) or "'none'")
    held = (
        "" if data is None else f"<script type='application/json' id='data'>{_json(data)}</script>"
    )
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><link rel='icon' href='data:,'>"
        f"<style>{read_asset('base.css')}{''.join(styles)}</style></head>"
        f"<body>{body}{held}{sources}</body></html>\n"
    )
    write_atomically(path, page)


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _json(data: Any) -> str:
    """Return JSON that cannot end its script element, whatever its strings are."""
    text = json.dumps(_without_nan(data), ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate, from a file name that is not UTF-8, has no UTF-8.
    text = text.encode("utf-8", "replace").decode()
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _without_nan(data: Any) -> Any:
    if isinstance(data, float):
        return data if abs(data) < float("inf") else None
    if isinstance(data, dict):
        return {str(key): _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return data


def readable(text: str) -> str:
    """Return text that has a UTF-8: a file name need not."""
    return text.encode("utf-8", "replace").decode()


@cache
def read_asset(name: str) -> str:
    """Return a script or style of ours that lies beside this module."""
    return (
        resources.files("birdcall").joinpath("report", "assets", name).read_text(encoding="utf-8")
    )


@cache
def table_scripts() -> tuple[str, ...]:
    """Return DataTables as itables brings it, and what makes every ``table.sortable`` one of it."""
    source = resources.files("itables").joinpath("html/dt_bundle.js").read_text(encoding="utf-8")
    # It is a module; a page from disk cannot import one, nor does a policy by hash allow it.
    exports = list(re.finditer(r"export\s*\{([^{}]*)\}\s*;?", source))
    if len(exports) != 1:
        raise ValueError("itables' bundle is not as this version of birdcall knows it")
    names = dict(reversed(re.split(r"\s+as\s+", pair.strip())) for pair in exports[0][1].split(","))
    kept = f"window.birdcallTables={names['jQuery']};"  # jQuery with DataTables in it
    source = source[: exports[0].start()] + kept + source[exports[0].end() :]
    return f"(function(){{'use strict';{source}\n}})();", read_asset("tables.js")


@cache
def table_style() -> str:
    return resources.files("itables").joinpath("html/dt_bundle.css").read_text(encoding="utf-8")


@cache
def chart_script() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def html_table(
    table: pd.DataFrame,
    caption: str,
    *,
    sortable: bool = False,
    links: dict[str, str] | None = None,
) -> str:
    """Return a table; numbers sort as numbers, and are shown with three digits.

    links: of the first column, from its text to where it leads.
    """
    head = "".join(f"<th scope='col'>{escape(str(name))}</th>" for name in table.columns)
    rows = "".join(
        f"<tr>{_cell(first, links)}{''.join(map(_cell, others))}</tr>"
        for first, *others in table.itertuples(index=False)
    )
    kind = " class='sortable'" if sortable else ""
    label = escape(caption[:80], quote=True)
    # What can scroll must be reached by the keyboard too.
    return (
        f"<div class='wide' tabindex='0' role='region' aria-label='{label}'>"
        f"<table{kind}><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(value: Any, links: dict[str, str] | None = None) -> str:
    if value is pd.NA or (isinstance(value, float) and value != value):
        return "<td class='number' data-order='-1'></td>"
    if isinstance(value, bool | np.bool_):
        return f"<td>{'yes' if value else ''}</td>"
    if isinstance(value, int | float | np.number):
        shown = f"{value:.3f}" if isinstance(value, float | np.floating) else str(value)
        return f"<td class='number' data-order='{float(value):.9g}'>{shown}</td>"
    text = escape(readable(str(value)))
    if links and str(value) in links:
        target = escape(links[str(value)], quote=True)
        text = f"<a href='{target}'>{text}</a>"
    return f"<td>{text}</td>"


def fitting_name(name: str, suffix: str) -> str:
    """Return ``name`` with a suffix, as a path whose parts a file system takes.

    A part that is too long is cut, and told apart by a digest of all of it.
    """
    *folders, last = Path(name).parts
    return str(Path(*map(_fit, folders), _fit(last, len(suffix.encode())) + suffix))


def _fit(part: str, n_more: int = 0) -> str:
    content = part.encode("utf-8", "surrogateescape")
    if len(content) + n_more <= MAX_NAME_BYTES:
        return part
    digest = hashlib.sha256(content).hexdigest()[:12]
    return content[: MAX_NAME_BYTES - n_more - 13].decode("utf-8", "ignore") + "-" + digest


# --- sound ---


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
