"""Put a page together: one file, its scripts named by hash, so that nothing else in it can run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from birdcall.files import write_atomically

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
    return resources.files("birdcall.pages").joinpath(name).read_text(encoding="utf-8")


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
