"""Say in a few characters what something was made from, so that a change of it is noticed."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

import pandas as pd


def digest(content: bytes | str) -> str:
    """Return the first 16 hexadecimal digits of the sha256."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def digest_table(table: pd.DataFrame) -> str:
    return digest(table.to_csv(index=False))


def digest_code(modules: Iterable[str]) -> dict[str, str]:
    """Return the digest of each module's source; names are those below ``birdcall``."""
    return {module: digest(_source(module)) for module in modules}


def digest_files(paths: Iterable[Path]) -> str:
    """Return a digest of files by name, size and time of change: their content is not read."""
    stats = ((path, path.stat()) for path in paths)
    return digest("\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats))


def _source(module: str) -> bytes:
    spec = importlib.util.find_spec(f"birdcall.{module}")
    return Path(spec.origin).read_bytes() if spec and spec.origin else b""
