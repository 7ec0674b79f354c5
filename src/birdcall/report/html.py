"""Write self-contained pages from templates, put audio into them, and open them in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import itables.options
import numpy as np
import pandas as pd
import soundfile
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from plotly.offline import get_plotlyjs
from scipy.ndimage import median_filter

from birdcall.storage.files import write_atomically

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# The browser runs the scripts with these hashes and no other script. The page fetches nothing.
_POLICY = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
    "media-src data: blob:; connect-src data:; font-src data:; base-uri 'none'; form-action 'none'"
)
_DATATABLES, _PLOTLY = "datatables", "plotly"


# --- pages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageContent:
    """What a page holds beside the text of its template.

    scripts and styles: texts of our own JavaScript and CSS, in order. data: what the scripts read,
    by the id of the JSON element that holds it. has_tables: with tables to sort and filter
    (DataTables). has_charts: with charts (plotly).
    """

    title: str
    scripts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    has_tables: bool = False
    has_charts: bool = False


@dataclass(frozen=True)
class HtmlTable:
    """A table for the macro ``table`` of the templates.

    links: of the cells in the first column, from their text to the target.
    """

    frame: pd.DataFrame
    caption: str
    is_sortable: bool = False
    links: Mapping[str, str] = field(default_factory=dict)


def write_page(path: Path, template: str, content: PageContent, **context: Any) -> None:
    """Write a page from a template in ``templates``, which gets ``context``; all text is escaped.

    The page is one file: scripts, styles, data, pictures and audio are in it. Raises ValueError
    where a script contains the end of its own element.
    """
    scripts, styles, data = list(content.scripts), list(content.styles), dict(content.data)
    if content.has_tables:
        bundle = Path(itables.options.dt_bundle)
        data[_DATATABLES] = bundle.read_text(encoding="utf-8")
        scripts.insert(0, read_asset("tables.js"))
        styles.insert(0, bundle.with_suffix(".css").read_text(encoding="utf-8"))
    if content.has_charts:
        scripts.insert(0, get_plotlyjs())
    if any("</script" in script.lower() for script in scripts):
        raise ValueError(f"{path}: a script contains the end of its own element, </script")
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()) for script in scripts]
    sources = [f"'sha256-{digest.decode()}'" for digest in digests] or ["'none'"]
    if content.has_tables:
        # DataTables is a JavaScript module. A page opened from disk can import a module only from
        # a blob, and only a script that already runs can create a blob.
        sources.append("blob:")
    page = (
        _environment()
        .get_template(template)
        .render(
            title=content.title,
            policy=Markup(_POLICY.format(scripts=" ".join(sources))),
            styles=[Markup(style) for style in (read_asset("base.css"), *styles)],
            scripts=[Markup(script) for script in scripts],
            data={name: _json(values) for name, values in data.items()},
            **context,
        )
    )
    # A file name need not be UTF-8; the page is.
    write_atomically(path, page.encode("utf-8", "replace"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("birdcall", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _format_cell
    return environment


@cache
def read_asset(name: str) -> str:
    """Return the text of a script or style in ``assets``."""
    return resources.files("birdcall").joinpath("report", "assets", name).read_text("utf-8")


def _json(data: Any) -> Markup:
    """Return JSON that cannot end its script element, whatever its strings are; NaN is null."""
    text = json.dumps(_without_nan(data), ensure_ascii=False, separators=(",", ":"))
    return Markup(
        text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def _without_nan(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return data


def _format_cell(value: Any) -> tuple[str, str | None]:
    """Return the text of a table cell, and for a number the value by which it is sorted."""
    if value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "", "-1"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "", None
    if isinstance(value, float | np.floating):
        return f"{value:.3f}", f"{value:.9g}"
    if isinstance(value, int | np.integer):
        return str(value), f"{value:.9g}"
    return str(value), None


def describe_scale(highest: float) -> str:
    """Return the words beside the name of a species whose probabilities are drawn up to this."""
    return f"up to {highest:.2g}" if highest >= 0.001 else "below 0.001"


# --- audio ----------------------------------------------------------------------------------------

SAMPLE_RATE = 32_000
MAX_HZ = SAMPLE_RATE / 2
_N_FFT, _HOP_LENGTH = 1024, 640  # 50 columns a second
_N_ROWS = 256
_TILE_COLUMNS = 3000  # a minute; a WebP picture is at most 16,383 pixels wide
# The background of a frequency is the level that it exceeds for most of a minute. The median would
# be too high: a bird that is present in half of a five-second spectrogram would be background.
_BACKGROUND_PERCENTILE = 30.0
_LINE_ROWS = 9  # a whistle or a hum fills fewer than half of these rows, and is no background
_WHITE_DB = 4.0  # above the background; noise is lighter than the faintest bird
_CONTRAST_DB = (20.0, 35.0)  # from white to black, at least and at most
# A level further below the loudest point is no noise but the limit of the recorder or codec. Noise
# that passes the limit at times is compared with that below the limit, less 2 dB for each row.
_NOISE_DB, _LIMIT_DB = 90.0, 2.0
_PICTURE_QUALITY = 50
_MP3_COMPRESSION = 0.9  # 56 kbit/s, constant, so that a player can seek exactly


@dataclass(frozen=True)
class Tile:
    """A part of a spectrogram as a picture: low frequencies at the bottom, loud is dark."""

    start: float  # seconds
    seconds: float
    picture: str  # data URI


def draw_tiles(waveform: np.ndarray) -> list[Tile]:
    """Draw the spectrogram of a waveform ``(samples,)`` at `SAMPLE_RATE`, in tiles of a minute."""
    darkness = draw_spectrogram(waveform)
    tiles = []
    for first in range(0, darkness.shape[1], _TILE_COLUMNS):
        part = darkness[:, first : first + _TILE_COLUMNS]
        picture = Image.fromarray(np.round(255 * (1 - part)).astype(np.uint8))
        content = _encode_webp(picture, _PICTURE_QUALITY, method=4)
        uri = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
        start = first * _HOP_LENGTH
        seconds = min(_TILE_COLUMNS * _HOP_LENGTH, len(waveform) - start) / SAMPLE_RATE
        tiles.append(Tile(start / SAMPLE_RATE, seconds, uri))
    return tiles


def draw_spectrogram(waveform: np.ndarray) -> np.ndarray:
    """Return the picture of a waveform ``(samples,)`` at `SAMPLE_RATE` that people are shown.

    ``(256, columns)``, float32, high frequencies first, 50 columns a second: from 0, white, to 1.
    It shows by how much each frequency is above its background, so wind below 1 kHz does not hide
    a quiet bird at 7 kHz. Silence is white.
    """
    n_samples = _TILE_COLUMNS * _HOP_LENGTH  # all powers of a part at once would be 60 MB
    starts = range(0, len(waveform), n_samples)
    level = np.concatenate([_levels_db(waveform[at : at + n_samples]) for at in starts], axis=1)
    level = np.maximum(level, level.max() - _NOISE_DB)
    level -= _background_db(level) + _WHITE_DB
    contrast = np.clip(np.percentile(level, 99.9), *_CONTRAST_DB)
    return np.clip(level / contrast, 0, 1)


def _levels_db(waveform: np.ndarray) -> np.ndarray:
    """Return decibels ``(_N_ROWS, columns)``, high frequencies first."""
    import torch  # here: a figure without a spectrogram, such as that of the folds, needs none

    from birdcall.audio.spectrogram import Spectrogram

    padded = torch.from_numpy(np.pad(waveform, (0, max(0, _N_FFT - len(waveform)))))
    power = Spectrogram(n_fft=_N_FFT, hop_length=_HOP_LENGTH)(padded[None])[0, 0].numpy()
    # Tiles stand side by side, so a tile has no column for its padding.
    power = power[: max(1, -(-len(waveform) // _HOP_LENGTH)), :-1]
    rows = power.reshape(len(power), _N_ROWS, -1).mean(axis=2)
    return 10 * np.log10(np.maximum(rows, 1e-10)).T[::-1]


def _background_db(level: np.ndarray) -> np.ndarray:
    """Return the background of each frequency over time, for decibels ``(rows, columns)``.

    It is estimated for each minute, and changes from the middle of one to the middle of the next.
    """
    n_columns = level.shape[1]
    n_spans = max(1, round(n_columns / _TILE_COLUMNS))
    spans = np.array_split(level, n_spans, axis=1)
    background = np.stack([np.percentile(span, _BACKGROUND_PERCENTILE, axis=1) for span in spans])
    background = np.minimum(background, median_filter(background, (1, _LINE_ROWS), mode="nearest"))
    fall = _LIMIT_DB * np.arange(len(level))[::-1]
    below = np.maximum.accumulate((background + fall)[:, ::-1], axis=1)[:, ::-1] - fall
    background = np.where(background < level.min() + 10, np.maximum(background, below), background)
    middles = (np.arange(n_spans) + 0.5) * n_columns / n_spans
    over_time = (np.interp(np.arange(n_columns), middles, row) for row in background.T)
    return np.stack([row.astype(np.float32) for row in over_time])


def _encode_webp(picture: Image.Image, quality: int, method: int) -> bytes:
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=quality, method=method)
    return content.getvalue()


def encode_audio(waveform: np.ndarray) -> str:
    """Return a waveform ``(samples,)`` at `SAMPLE_RATE` as mp3, in base64.

    The waveform is scaled so that its loudest sample is near full scale: quiet recordings are
    audible too.
    """
    peak = float(np.abs(waveform).max(initial=0.0))
    content = io.BytesIO()
    soundfile.write(
        content, waveform / max(peak, 1e-4) * 0.95, SAMPLE_RATE, format="MP3",
        subtype="MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=_MP3_COMPRESSION,
    )  # fmt: skip
    return base64.b64encode(content.getvalue()).decode()


# --- a headless browser ---------------------------------------------------------------------------

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_WIDTH, _HEIGHT, _SOUNDSCAPE_HEIGHT = 1280, 900, 1120  # pixels
_WAIT_MILLISECONDS = 20_000


def require_browser() -> str:
    """Return the path of Chromium; raise FileNotFoundError without it or without playwright."""
    if find_spec("playwright") is None:
        raise FileNotFoundError("screenshots need playwright: pip install -e '.[browser]'")
    for name in _BROWSERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise FileNotFoundError("screenshots need Chromium, on Debian `apt install chromium`")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Run a headless Chromium; see `require_browser`."""
    path = require_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # A user who is root has no sandbox; we open only pages that we wrote. In a container the
        # shared memory may be too small.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Browser, path: Path, width: int = _WIDTH) -> Page:
    """Open a page of ours from disk and wait until its scripts have drawn it."""
    page = browser.new_page(viewport={"width": width, "height": _HEIGHT})
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=_WAIT_MILLISECONDS)
    return page


def take_screenshots(
    browser: Browser, report: Path, soundscape: Path | None, folder: Path
) -> list[Path]:
    """Write pictures of a report, its mistakes and a soundscape page; return their paths."""
    pictures: dict[str, bytes] = {}
    page = open_page(browser, report)
    pictures["report"] = page.screenshot()
    for name, selector in (("mistakes", ".cards"), ("confusions", "#confusions .chart")):
        if page.query_selector(selector):
            page.eval_on_selector(f"#{name}", "section => section.scrollIntoView()")
            page.wait_for_timeout(300)
            pictures[name] = page.screenshot()
    if soundscape is not None:
        page = open_page(browser, soundscape)
        page.set_viewport_size({"width": _WIDTH, "height": _SOUNDSCAPE_HEIGHT})
        page.check("#show-members")
        page.evaluate("showFullestView()")
        page.wait_for_timeout(300)
        pictures["soundscape"] = page.screenshot()
    paths = []
    for name, picture in pictures.items():
        # WebP, since noise in a spectrogram makes a PNG many times as large.
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        paths.append(folder / f"{name}.webp")
        write_atomically(paths[-1], _encode_webp(image, 85, method=6))
    return paths
