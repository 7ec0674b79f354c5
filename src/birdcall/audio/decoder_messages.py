"""Take away what C libraries print to the terminal, so that our own message stands alone."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class PrintedLines:
    """Takes away the lines that match ``pattern`` from what is printed to standard error.

    C libraries print to descriptor 2, whatever Python does. All else that is printed meanwhile, by
    other threads too, is passed on.
    """

    def __init__(self, pattern: bytes) -> None:
        self.pattern = re.compile(pattern)
        self.lock = threading.Lock()
        self.n_active = 0  # threads
        self.original = self.spool = -1  # descriptors
        os.register_at_fork(after_in_child=self._reset)

    @contextmanager
    def taken(self) -> Iterator[list[bytes]]:
        """Yield a list that has the matching lines after the block, those of other threads too."""
        lines: list[bytes] = []
        with self.lock:
            if not self.n_active:
                try:
                    self.original = os.dup(2)
                except OSError:  # a process without standard error
                    self.original = -1
                else:
                    if self.spool < 0:
                        with tempfile.TemporaryFile() as file:
                            self.spool = os.dup(file.fileno())
                    os.dup2(self.spool, 2)
            self.n_active += 1
            start = os.lseek(self.spool, 0, os.SEEK_CUR) if self.original >= 0 else 0
        try:
            yield lines
        finally:
            with self.lock:
                self.n_active -= 1
                if self.original >= 0:
                    end = os.lseek(self.spool, 0, os.SEEK_CUR)
                    lines += self.pattern.findall(os.pread(self.spool, end - start, start))
                if self.original >= 0 and not self.n_active:
                    os.dup2(self.original, 2)
                    os.close(self.original)
                    self.original = -1
                    rest = self.pattern.sub(b"", os.pread(self.spool, end, 0)) if end else b""
                    os.ftruncate(self.spool, 0)
                    os.lseek(self.spool, 0, os.SEEK_SET)
                    if rest.strip():
                        os.write(2, rest)

    def _reset(self) -> None:
        if self.original >= 0:  # a thread of the parent was in a block
            os.dup2(self.original, 2)
        self.lock, self.n_active, self.original, self.spool = threading.Lock(), 0, -1, -1
