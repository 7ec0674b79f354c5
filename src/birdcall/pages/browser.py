"""Open pages in a headless browser: for pictures of them, and for tests."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from birdcall.files import write_atomically

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = {"width": 1280, "height": 900}
WAIT_MILLISECONDS = 20_000


def find_browser() -> str | None:
    """Return where a Chromium is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Run a headless Chromium. Raises FileNotFoundError where it or playwright is missing."""
    place = find_browser()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise FileNotFoundError(
            "screenshots need playwright: pip install 'birdcall[browser]'"
        ) from error
    if place is None:
        raise FileNotFoundError("screenshots need Chromium, on Debian `apt install chromium`")
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


def take_screenshots(report: Path, soundscape: Path | None, folder: Path) -> list[Path]:
    """Write pictures of a report, its mistakes and a soundscape page; return their paths."""
    made = []
    with open_browser() as browser:
        page = open_page(browser, report)
        made.append(_keep(page.screenshot(), folder / "report.webp"))
        if page.query_selector(".cards"):
            page.eval_on_selector("#mistakes", "one => one.scrollIntoView()")
            page.wait_for_timeout(300)
            made.append(_keep(page.screenshot(), folder / "mistakes.webp"))
        if page.query_selector("#confusions .chart"):
            page.eval_on_selector("#confusions", "one => one.scrollIntoView()")
            page.wait_for_timeout(300)
            made.append(_keep(page.screenshot(), folder / "confusions.webp"))
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
