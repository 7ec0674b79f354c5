"""Let one process at a time write to a file or folder, and tell the others who does."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: there a second process is not detected
    fcntl = None

logger = logging.getLogger(__name__)

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
        owner = f"process {os.getpid()} on {platform.node()} since {since} ({command})"
        with suppress(OSError):  # on a full disk what is locked will say so
            file.truncate(0)
            os.write(file.fileno(), owner.encode("utf-8", "replace"))
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
