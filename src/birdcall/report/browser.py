"""Open pages in a headless browser: for pictures of them, and for tests."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from birdcall.storage.files import write_atomically

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = {"width": 1280, "height": 900}
WAIT_MILLISECONDS = 20_000


def find_browser() -> str | None:
    """Return where a Chromium is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def require_browser() -> str:
    """Return where Chromium is; raise FileNotFoundError where it or playwright is missing."""
    if find_spec("playwright") is None:
        raise FileNotFoundError("screenshots need playwright: pip install 'birdcall[browser]'")
    place = find_browser()
    if place is None:
        raise FileNotFoundError("screenshots need Chromium, on Debian `apt install chromium`")
    return place


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Run a headless Chromium; see `require_browser`."""
    place = require_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Where everything runs as root there is no sandbox; the pages are ours.
        browser = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Browser, path: Path, width: int = SIZE["width"]) -> Page:
    """Open a page of ours from disk, drawn to its end."""
    page = browser.new_page(viewport={"width": width, "height": SIZE["height"]})
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=WAIT_MILLISECONDS)
    return page


def take_screenshots(
    browser: Browser, report: Path, soundscape: Path | None, folder: Path
) -> list[Path]:
    """Write pictures of a report, its mistakes and a soundscape page; return their paths."""
    made = []
    page = open_page(browser, report)
    made.append(_keep(page.screenshot(), folder / "report.webp"))
    for name, shown in (("mistakes", ".cards"), ("confusions", "#confusions .chart")):
        if page.query_selector(shown):
            page.eval_on_selector(f"#{name}", "one => one.scrollIntoView()")
            page.wait_for_timeout(300)
            made.append(_keep(page.screenshot(), folder / f"{name}.webp"))
    if soundscape is not None:
        page = open_page(browser, soundscape)
        page.set_viewport_size({"width": SIZE["width"], "height": 1120})
        page.check("#members")
        page.wait_for_timeout(300)
        made.append(_keep(page.screenshot(), folder / "soundscape.webp"))
    return made


def _keep(picture: bytes, path: Path) -> Path:
    """Write a screenshot as WebP: a spectrogram's noise makes a PNG many times as large."""
    small = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(small, "WEBP", quality=85, method=6)
    write_atomically(path, small.getvalue())
    return path
