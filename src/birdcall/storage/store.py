"""Keep results on disk: a journal of finished work, and a store of what is computed once."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from birdcall.storage.files import atomic_path, digest, errors_naming, shorten_list
from birdcall.storage.locks import locked

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent.parent
DAMAGED = (SafetensorError, KeyError, TypeError, ValueError)  # what reading a damaged file raises

_canonical = partial(json.dumps, sort_keys=True, default=str)

_Values = dict[str, Any]  # whatever JSON can hold
_T = TypeVar("_T")


class Journal(AbstractContextManager):
    """A file of JSON lines: the first identifies the work, each other is a finished item.

    A line is on disk when `add` returns. An incomplete last line is removed when the journal is
    opened, damaged lines are skipped; the log names them, and their work is done again. Only one
    process at a time can have a journal open. ``fingerprint``: what JSON can hold. With
    ``overwrite`` the journal begins empty.

    Raises ``OSError`` where another process has it open; ``ValueError`` where its fingerprint is
    another or damaged, or, with ``restart``, logs that and begins an empty journal.
    """

    def __init__(
        self, path: Path, fingerprint: Any, *, restart: bool = False, overwrite: bool = False
    ) -> None:
        self.path = path
        self._done: dict[str, _Values] = {}
        with errors_naming(path), ExitStack() as stack:
            stack.enter_context(locked(path))
            self._file = stack.enter_context(path.open("ab+"))
            if overwrite:
                self._file.truncate(0)
            try:
                is_new = not self._read(fingerprint)
            except ValueError as error:
                if not restart:
                    raise
                logger.warning("%s; starting again", error)
                self._done.clear()
                self._file.truncate(0)
                is_new = True
            if is_new:
                self._write({"fingerprint": fingerprint})
            self.close = stack.pop_all().close

    def find(self, key: Mapping[str, Any]) -> _Values | None:
        """Return the value of the finished item ``key``, or None."""
        return self._done.get(_canonical(key))

    def items(self) -> Iterator[tuple[_Values, _Values]]:
        """Yield key and value of each finished item, in the order in which they were added."""
        for key, value in self._done.items():
            yield json.loads(key), value

    def add(self, key: Mapping[str, Any], value: _Values) -> None:
        """Write that ``key`` is finished; a second ``value`` of one key replaces the first."""
        if self.find(key) == value:
            return
        self._write({"key": dict(key), "value": value})
        self._done[_canonical(key)] = value

    def __exit__(self, *_: object) -> None:
        with errors_naming(self.path):  # it writes what a full disk has not taken
            self.close()

    def _write(self, entry: _Values) -> None:
        with errors_naming(self.path):
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self, fingerprint: Any) -> int:
        """Read the complete lines, remove an incomplete last one, return the number of lines."""
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            logger.warning("%s: its last line is incomplete; that item is done again", self.path)
            self._file.truncate(len(complete))
        lines = complete.splitlines()
        stored, damaged = fingerprint, []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    stored = entry["fingerprint"]
                else:
                    self._done[_canonical(entry["key"])] = dict(entry["value"])
            except (KeyError, TypeError, ValueError) as error:
                if number == 1:
                    message = f"{self.path}, line 1: not a line of a journal: {error!r}"
                    raise ValueError(f"{message}; --overwrite starts again") from error
                damaged.append(number)
        if damaged:
            message = "%s: damaged in line %s; what was finished there is done again"
            logger.warning(message, self.path, shorten_list(damaged))
        if stored != fingerprint:
            what = ""
            if isinstance(stored, dict) and isinstance(fingerprint, dict):
                names = sorted(stored.keys() | fingerprint.keys())
                differing = (name for name in names if stored.get(name) != fingerprint.get(name))
                what = f" ({', '.join(differing)})"
            raise ValueError(
                f"{self.path}: these results are of another model or of other parameters{what}; "
                "give another --output folder, or --overwrite to start again"
            )
        return len(lines)


@dataclass(frozen=True)
class Store:
    """A folder of files that are computed once and read many times.

    A file's name holds a digest of what the file is made from: the caller's ``made_from``, and the
    source code of ``modules`` (names as for `code_digest`) with all that they import. Where either
    changes, the name changes, so an outdated file is never read; writing deletes it.

    A ``name`` may contain ``/``. It can have several ``part`` files, which are outdated together;
    a part contains no dot. The ``suffix`` begins with a dot.
    """

    folder: Path
    suffix: str
    modules: Sequence[str]

    def path(self, name: str, made_from: Mapping[str, Any], part: str = "") -> Path:
        """Return the path of a file, whether or not it exists.

        ``made_from`` holds what JSON can hold; any other object counts by its ``str``.
        """
        state = _canonical({"made_from": made_from, "code": code_digest(*self.modules)})
        middle = f"{digest(state)}-{part}" if part else digest(state)
        return self.folder / f"{name}.{middle}{self.suffix}"

    def read(
        self,
        name: str,
        made_from: Mapping[str, Any],
        reader: Callable[[Path], _T],
        part: str = "",
    ) -> _T | None:
        """Return ``reader(path)``; None where the file is absent or, with a warning, damaged.

        Damaged means: ``reader`` raises ``SafetensorError``, ``KeyError``, ``TypeError`` or
        ``ValueError``.
        """
        path = self.path(name, made_from, part)
        try:
            return reader(path) if path.is_file() else None
        except FileNotFoundError:  # another process has just deleted it
            return None
        except DAMAGED as error:
            logger.warning("%s: not readable (%s); it is computed again", path, error)
            return None

    @contextmanager
    def writing(self, name: str, made_from: Mapping[str, Any], part: str = "") -> Iterator[Path]:
        """Yield a temporary path; if the block succeeds, it becomes the file of this name.

        Then the files of earlier states of ``name`` are deleted.
        """
        path = self.path(name, made_from, part)
        with atomic_path(path) as temporary:
            yield temporary
        current = self.path(name, made_from).name.removesuffix(self.suffix)
        beginning = f"{Path(name).name}."
        states = re.compile(
            rf"{re.escape(beginning)}[0-9a-f]{{16}}(-[^.]+)?{re.escape(self.suffix)}"
        )
        # A class has up to 1,789 recordings, all in one folder: a look at their beginning is quick.
        with os.scandir(path.parent) as entries:
            alike = [entry.name for entry in entries if entry.name.startswith(beginning)]
        for other in alike:
            if states.fullmatch(other) and not other.startswith(current):
                (path.parent / other).unlink(missing_ok=True)

    def require_space(self, n_bytes: float, max_bytes: float | None = None) -> int:
        """Return how many bytes the disk has free.

        Raises ``OSError`` where it has less than ``n_bytes``, or where all the files of the store
        together exceed ``max_bytes``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < n_bytes:
            raise OSError(
                f"{self.folder} needs {n_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                "make room, or do without this folder"
            )
        if max_bytes is not None:
            size = 0
            for path in self.folder.rglob(f"*{self.suffix}"):
                with suppress(FileNotFoundError):  # a temporary file has just got its final name
                    size += path.stat().st_size
            if size > max_bytes:
                raise OSError(f"{self.folder} has {size / 1e9:.1f} GB, which is its limit")
        return free

    def remove_leftovers(self) -> None:
        """Delete the temporary files that a killed process has left."""
        for temporary in self.folder.rglob(f".*{self.suffix}"):
            temporary.unlink(missing_ok=True)


# --- arrays with values ---


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], values: Mapping[str, Any]) -> None:
    """Write arrays, and values that JSON can hold, as one safetensors file at ``path``.

    Raises ``OSError``, where the disk is full for example.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        safetensors.numpy.save_file(contiguous, path, {"values": json.dumps(values)})
    except SafetensorError as error:
        raise OSError(f"{path.parent}: {path.name} cannot be written: {error}") from error


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], _Values]:
    """Read what `write_arrays` wrote.

    Raises ``SafetensorError``, ``KeyError``, ``TypeError`` or ``ValueError`` where it is damaged.
    """
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return arrays, json.loads(file.metadata()["values"])


# --- code ---


def code_digest(*modules: str) -> dict[str, str]:
    """Return a digest of the code of each of ``modules`` and of the birdcall modules they import.

    Names are those below ``birdcall``, such as ``"training.trainer"``. Imports inside functions
    count, those for type checking only do not. Comments, docstrings and layout are no part of the
    code. Package files (``__init__``) are not followed: they re-export, and would join all to all.
    Raises ``ValueError`` for an unknown module.
    """
    digests: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in digests and (code := _read_module(module)) is not None:
            digests[module], imports = code
            waiting += imports
    if unknown := [module for module in modules if module not in digests]:
        raise ValueError(f"{unknown[0]!r} is no module of birdcall")
    return dict(sorted(digests.items()))


@cache  # a running process keeps the code that it has loaded
def _read_module(module: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the digest of a module's code and what it imports from birdcall; None if no file."""
    path = _SOURCE.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return None
    tree = ast.parse(path.read_bytes())
    imports = tuple(_imports(tree))
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return digest(ast.unparse(tree)), imports


def _imports(node: ast.AST) -> Iterator[str]:
    """Yield all that the code below ``node`` imports from birdcall when it runs."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        # A module, as in `from birdcall.audio import reading`, or a name of a module.
        base = node.module or ""
        names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
    else:
        names = []
    for name in names:
        package, _, module = name.partition(".")
        if package == "birdcall" and module:
            yield module
    type_checking = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) in type_checking
    children = node.orelse if is_for_types else ast.iter_child_nodes(node)
    for child in children:
        yield from _imports(child)
