"""Read tables strictly, write files whole or not at all, keep names inside, check packages.

The kernels import this module first: it needs nothing that the wheels of a package may bring.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

MANIFEST_FILE = "manifest.json"
WHEELS_FOLDER = "wheels"
_NOT_MOUNTED = (MANIFEST_FILE, "dataset-metadata.json")  # Kaggle does not mount the metadata

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


# --- pieces ---


Piece = bytes | range  # of a file: bytes as they are, or a range of another file's bytes


class PieceFile(io.RawIOBase):
    """Pieces of an open file and bytes between them, read as one file."""

    def __init__(self, stream: io.FileIO, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.stream, self.pieces, self.position = stream, pieces, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position}
        self.position = offset + start.get(whence, sum(map(len, self.pieces)))
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        start = n_filled = 0
        for piece in self.pieces:
            part = piece[max(0, self.position - start) :][: len(buffer) - n_filled]
            start += len(piece)
            if isinstance(part, range) and part:
                self.stream.seek(part.start)
                part = self.stream.read(len(part))
            buffer[n_filled : n_filled + len(part)] = bytes(part)
            n_filled += len(part)
            self.position += len(part)
        return n_filled


# --- what C libraries print ---


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


# --- fingerprint ---


def digest(content: bytes | str) -> str:
    """Return the first 16 hexadecimal digits of the sha256."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def digest_files(paths: Iterable[Path]) -> str:
    """Return a digest of files by name, size and time of change: their content is not read."""
    stats = ((path, path.stat()) for path in paths)
    return digest("\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats))


# --- packages ---


def make_manifest(package: Path) -> dict[str, str]:
    """Return the sha256 of every file below ``package``, by relative path."""
    files = sorted(path for path in package.rglob("*") if path.is_file())
    return {
        path.relative_to(package).as_posix(): _sha256(path)
        for path in files
        if path.name not in _NOT_MOUNTED and path.suffix != ".pyc"
    }


def find_changes(package: Path) -> dict[str, str]:
    """Return the files that are not as packaged, each with the reason."""
    path = package / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest; `birdcall package` writes one")
    try:
        digests = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable manifest: {error}") from error
    changed = {}
    for name, digest in digests.items():
        file = inside(package, name)
        if not file.is_file():
            changed[name] = f"{file}: in the manifest, but missing from the package"
        elif _sha256(file) != digest:
            changed[name] = f"{file}: its sha256 is not the manifest's; upload the package again"
    return changed


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def install_wheels(package: Path, scratch: Path) -> Path | None:
    """Install the package's wheels below ``scratch``, without a network; return where.

    None if there are none. Raises CalledProcessError, after pip's message, if one does not fit.
    """
    wheels = sorted((package / WHEELS_FOLDER).glob("*.whl"))
    if not wheels:
        return None
    site = scratch / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--upgrade", "--target", str(site), *map(str, wheels)], check=True)
    return site
