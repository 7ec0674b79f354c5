"""Keep what is finished, line by line, so that a process can be killed at any moment."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Journal:
    """A file of JSON lines: first for what model and parameters it is, then what is finished.

    A line is on disk when `add` returns. A last line that was cut off is dropped when the journal
    is opened, and its work is done again. ``ValueError`` if the file is of another fingerprint.
    One process at a time: a second is refused.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._lock()
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            logger.warning("%s: its last line was cut off; it is done again", path)
            self._file.truncate(len(whole))
        self._done: dict[str, dict[str, Any]] = {}
        lines = whole.splitlines()
        if not lines:
            self._write({"fingerprint": fingerprint})
        for number, line in enumerate(lines, start=1):
            entry = self._read(number, line)
            if number == 1:
                self._require_fingerprint(entry, fingerprint)
            else:
                self._done[_key(entry["key"])] = entry["value"]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is finished of ``key``, or None."""
        return self._done.get(_key(key))

    def add(self, key: Mapping[str, Any], value: dict[str, Any]) -> None:
        """Write down that ``key`` is finished, with ``value``."""
        self._write({"key": dict(key), "value": value})
        self._done[_key(key)] = value

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
            if number > 1 and not {"key", "value"} <= entry.keys():
                raise ValueError("neither key nor value")
            return entry
        except (AttributeError, ValueError) as error:
            raise ValueError(f"{self.path}, line {number}: not of a journal: {error}") from error

    def _require_fingerprint(self, entry: dict[str, Any], fingerprint: str) -> None:
        if entry.get("fingerprint") != fingerprint:
            self.close()
            raise ValueError(
                f"{self.path}: these results are of another model, or of other parameters; give "
                "another --output, or --overwrite to begin again"
            )

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: nothing keeps a second process away
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise OSError(f"{self.path}: another process writes to it") from error


def _key(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
