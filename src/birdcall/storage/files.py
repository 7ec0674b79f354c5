"""Read tables strictly, write files completely or not at all, keep names inside their folder."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import os
import platform
import secrets
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

import pandas as pd

try:
    import fcntl
except ImportError:  # Windows: there a second process is not detected
    fcntl = None

logger = logging.getLogger(__name__)

_MAX_NAME_BYTES = 200  # of a file; what file systems take is 255


class UserError(ValueError):
    """An error in the user's input that its message, one line, tells how to correct."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes ``path`` only if the block succeeds.

    The temporary file is beside ``path`` (a rename across disks is not atomic) and has its suffix
    (pandas, torch and soundfile choose the format by it). Folders are created as needed; after an
    error the old ``path`` is as it was and the temporary file is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with no content
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` completely or not at all; text as UTF-8, line ends as given."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


# --- one process at a time ---

_locks: list[IO[str]] = []  # the files of the locks that this process has


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let no other process into a block like this for the same ``path``, a file or a folder.

    The lock is a file beside ``path``, ``.<name>.lock``, and ends with the process, however that
    ends. Nothing is locked where the system or the file system has no locks.

    Raises ``OSError`` that names the process which has the lock.
    """
    if fcntl is None:
        yield
        return
    target = path.resolve()  # one lock, whatever links lead to it
    lock = target.with_name(f".{target.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path, lock)
    _locks.append(file)
    try:
        since = f"{datetime.now():%Y-%m-%d %H:%M}"
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {since} ({command})")
        file.flush()
        yield
    finally:
        if not file.closed:
            lock.unlink(missing_ok=True)
            file.close()
            _locks.remove(file)


def _lock(path: Path, lock: Path) -> IO[str]:
    """Return the file ``lock``, open and locked."""
    while True:
        file = lock.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                owner = file.read() or "another process"
            raise OSError(
                f"{path}: {owner} writes to it; wait for its end, or give another folder"
            ) from error
        except OSError as error:  # some network file systems
            logger.warning("%s: cannot be locked (%s); start no second command on it", path, error)
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()  # another process has deleted it, and released it, since it was opened


def _close_locks() -> None:
    """Leave the locks to the parent: a forked child would have them beyond the parent's end."""
    while _locks:
        _locks.pop().close()


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_locks)


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name`` for a name that came from a file; it need not exist.

    Raises ``ValueError`` where the name would leave ``folder``: absolute, with ``..``, or through
    a symbolic link; ``OSError`` where its links lead in a circle. ``folder`` itself is trusted and
    may be a link.
    """
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} is not a name inside {folder}; give a relative path without ..")
    path = folder / name
    try:
        target = path.resolve()
    except RuntimeError as error:  # of Python 3.11 and 3.12, for a circle of links
        raise OSError(f"{name!r} leads nowhere in {folder}: its links form a circle") from error
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder} through a link, to {target}")
    return path


def fitting_name(name: str, suffix: str) -> str:
    """Return ``name`` with a suffix, as a path whose parts a file system takes.

    A part that is too long is cut, and told apart by a digest of all of it.
    """
    *folders, last = Path(name).parts
    return str(Path(*map(_fit, folders), _fit(last, len(suffix.encode())) + suffix))


def _fit(part: str, n_more: int = 0) -> str:
    content = part.encode("utf-8", "surrogateescape")
    if len(content) + n_more <= _MAX_NAME_BYTES:
        return part
    digest = hashlib.sha256(content).hexdigest()[:12]
    return content[: _MAX_NAME_BYTES - n_more - 13].decode("utf-8", "ignore") + "-" + digest


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",") -> pd.DataFrame:
    """Read a CSV as text, cell by cell as written; the index is the line in which each row starts.

    ``columns`` are required; others are returned as well. Unlike ``pandas.read_csv`` it guesses
    nothing: no value becomes NaN, and a row that is cut short is an error, not a row of NaN.

    Raises ``FileNotFoundError`` or ``ValueError`` that names the file and the line or column.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Excel writes a BOM
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        where = f"line {line}, byte 0x{error.object[error.start]:02x}"
        raise ValueError(f"{path}, {where}: is not a CSV in UTF-8") from error
    rows, lines = [], []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for row in reader:
            if row:
                rows.append(row)
                lines.append(line)
            line = reader.line_num + 1  # a cell can hold line ends, so a row several lines
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: is not a CSV: {error}") from error
    for column in columns:
        if header.count(column) != 1:
            problem = "no column" if column not in header else "more than one column"
            raise ValueError(f"{path}: {problem} {column!r}; its columns are {', '.join(header)}")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(row)} fields where the header has {len(header)}; "
                "is the file cut short?"
            )
    return pd.DataFrame(rows, columns=header, index=pd.Index(lines, name="line"), dtype=str)


# --- fingerprint ---


def digest(content: bytes | str) -> str:
    """Return the first 16 hexadecimal digits of the sha256."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def digest_files(paths: Iterable[Path]) -> str:
    """Return a digest of files by name, size and time of change: their content is not read."""
    stats = ((path, path.stat()) for path in paths)
    return digest("\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats))
