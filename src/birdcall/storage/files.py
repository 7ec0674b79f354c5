"""Find files, read tables strictly, write files completely or not at all, keep names safe."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import logging
import os
import re
import secrets
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

logger = logging.getLogger(__name__)

_MAX_NAME_BYTES = 200  # of a file; what file systems take is 255
_NO_LETTER = re.compile(r"[\W_]+")
_SURROGATES = re.compile("[\ud800-\udfff]")

# What libsndfile reads, the usual formats first. Not .mat and .raw: most of those are no sound.
# fmt: off
SOUND_SUFFIXES = (
    ".mp3", ".wav", ".flac", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".aifc", ".wave", ".bwf",
    ".w64", ".rf64", ".caf", ".au", ".snd", ".mp2", ".mp1", ".mpga", ".voc", ".sph", ".nist",
    ".avr", ".htk", ".ircam", ".sf", ".paf", ".pvf", ".sd2", ".sds", ".svx", ".wve", ".xi",
)
# Sound that libsndfile does not read; video too, for its sound.
_FOREIGN_SUFFIXES = (
    ".m4a", ".m4b", ".mp4", ".aac", ".alac", ".wma", ".asf", ".webm", ".weba", ".mka", ".mkv",
    ".3gp", ".amr", ".ac3", ".ape", ".wv", ".tta", ".spx", ".ra", ".wac", ".mov", ".avi",
)
# fmt: on
# What systems leave in folders. ``._a.wav`` holds what macOS knows of ``a.wav``, and no sound.
OF_SYSTEMS = re.compile(
    r"\._.*|\.DS_Store|Thumbs\.db|\.Trash(es|-\d+)?|\$RECYCLE\.BIN", re.IGNORECASE
)


class UserError(ValueError):
    """An error in the user's input that its message, one line, tells how to correct."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes ``path`` only if the block succeeds.

    The temporary file is beside ``path`` (a rename across disks is not atomic) and has its suffix
    (pandas, torch and soundfile choose the format by it). Folders are created as needed; after an
    error, which names ``path``, the old file is as it was and the temporary one is deleted.
    """
    if path.is_dir():  # not after the work that makes its content
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        with errors_naming(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # else a power cut may leave the new name with no content
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Add ``path`` to an ``OSError`` that names no file: those of a full disk do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` completely or not at all; text as `utf8_text`, line ends as given."""
    data = utf8_text(content).encode() if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


# --- files in folders, and their names ---


def find_files(folder: Path) -> list[Path]:
    """Return the files below ``folder``, sorted; none where it is no folder.

    Links are followed. Each real file and folder counts once, by the path without a link if there
    is such a path. Left out are what systems leave in folders (``._*``, ``.DS_Store``,
    ``Thumbs.db``, deleted files) and folders that cannot be listed; the log names the latter.
    """
    waiting, links = deque([folder]), deque[Path]()
    files: dict[str, Path] = {}  # by real path
    visited: set[str] = set()
    while waiting or links:
        path = waiting.popleft() if waiting else links.popleft()
        real = os.path.realpath(path)
        if not os.path.isdir(path):  # noqa: PTH112 - without the right to look it is no error
            if path != folder:
                files.setdefault(real, path)
            continue
        if real in visited:
            continue
        visited.add(real)
        for entry in list_folder(path):
            if entry.is_symlink():
                links.append(Path(entry.path))
            elif entry.is_dir():
                waiting.append(Path(entry.path))
            else:
                files.setdefault(f"{real}{os.sep}{entry.name}", Path(entry.path))
    return sorted(files.values())


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder but for files of systems; nothing where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not OF_SYSTEMS.fullmatch(entry.name)]
    except OSError as error:
        logger.warning("%s: cannot be listed, its files are left out: %s", folder, error.strerror)
        return []


def is_sound(path: Path) -> bool:
    """Return whether a file's suffix, in any case, is that of sound, whether or not we read it."""
    return path.suffix.lower() in SOUND_SUFFIXES + _FOREIGN_SUFFIXES


def conversion_advice(path: Path) -> str:
    """Return what to do about sound in a format that is not read; empty for all other files."""
    advice = f"{path.suffix} is not read: convert to FLAC or WAV, for example with ffmpeg"
    return advice if path.suffix.lower() in _FOREIGN_SUFFIXES else ""


def readable_sound(paths: Iterable[Path], what: str) -> list[Path]:
    """Return the sound among ``paths``; the log names what is left out as its format is not read.

    ``what``: the word for the sound in the log.
    """
    sound = [path for path in paths if is_sound(path) and path.is_file()]
    if foreign := [path for path in sound if conversion_advice(path)]:
        advice = conversion_advice(foreign[0])
        logger.warning("%s is left out: %s; %s", what, shorten_list(foreign), advice)
    return [path for path in sound if not conversion_advice(path)]


def folded_name(name: str) -> str:
    """Return ``name`` as file systems compare names that tell neither case nor accents' forms."""
    return unicodedata.normalize("NFC", name).casefold()


def utf8_text(text: str) -> str:
    """Return ``text`` as UTF-8 can hold it: a byte of a file's name that is none is ``%FC``."""
    return _SURROGATES.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", text)


def shorten_list(items: Sequence[object], n_named: int = 5) -> str:
    """Return the first items as text, and how many more there are."""
    named = ", ".join(str(item) for item in items[:n_named])
    n_more = len(items) - n_named
    return f"{named} and {n_more} more" if n_more > 0 else named


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
        path.stat()
    except OSError as error:  # of other kinds: it need not exist
        if error.errno == errno.ELOOP:
            raise OSError(f"{name!r} leads nowhere in {folder}: its links form a circle") from error
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder} through a link, to {target}")
    return path


def path_below(folder: Path, name: str) -> str:
    """Return as much of the end of a path, of some machine, as there is below ``folder``."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    ends = ["/".join(parts[number:]) for number in range(len(parts))]
    return next((end for end in ends if inside(folder, end).is_file()), ends[-1] if ends else name)


def unique_names(names: Sequence[str]) -> list[str]:
    """Return ``names``, those that occur again with a number before them: ``2/a.wav``.

    Their case does not count: macOS and Windows write ``a.wav`` and ``A.wav`` to one file.
    """
    wanted = set(map(folded_name, names))
    numbers, used = Counter(wanted), set()
    unique = []
    for name in names:
        candidate, folded = name, folded_name(name)
        while folded in used or (candidate != name and folded in wanted):
            numbers[folded_name(name)] += 1
            candidate = f"{numbers[folded_name(name)]}/{name}"
            folded = folded_name(candidate)
        used.add(folded)
        unique.append(candidate)
    return unique


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


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
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
    reader = csv.reader(io.StringIO(text, newline=""))
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
    if len(header) < 2 and (not header or re.search("[;\t]", header[0])):
        raise ValueError(f"{path}: is empty, or its cells are not separated by commas")
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


def read_loose_table(path: Path) -> pd.DataFrame:
    """Read a CSV as `read_table`, whatever the case, blanks and signs in its header.

    Columns are called by `letters_of` their names (``attrs["header"]`` has them); cells have no
    blanks around them.
    """
    table = read_table(path, ())
    letters = list(map(letters_of, table))
    if again := [name for name in table if letters.count(letters_of(name)) > 1]:
        raise ValueError(f"{path}: more than one column {again[0]!r}")
    table.attrs["header"] = dict(zip(letters, table, strict=True))
    table.columns = letters
    return table.apply(lambda column: column.str.strip()) if len(table) else table


def letters_of(name: str) -> str:
    """Return the letters and digits of a column's name in lower case: R says Begin.Time..s."""
    return _NO_LETTER.sub("", name.casefold())


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    r"""Return rows as CSV with ``\n`` at their ends; in a cell every line end is quoted."""
    lines: list[str] = []
    csv.writer(SimpleNamespace(write=lines.append)).writerows(rows)  # with \r\n: it quotes both
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def read_tab_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Read a table with tabs, as Raven, Excel and R write it: line and cells of each row.

    The first row is the header. A quote is text, but quotes around a whole cell (R, Excel) are left
    out; so are spaces around a cell, and rows without text. Raises ``ValueError`` where the file is
    text neither in UTF-8, nor in UTF-16 with its mark, nor in Windows' Western code page.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    is_wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        if is_wide or b"\0" in content:
            raise ValueError(f"{path} is not text in UTF-8: {error}") from error
        text = content.decode("cp1252", "replace")
    rows = []
    for line, row in enumerate(re.split(r"\r\n|\r|\n", text), start=1):
        cells = [cell.strip() for cell in row.split("\t")]
        for index, cell in enumerate(cells):
            if re.fullmatch('".*"', cell):
                cells[index] = cell[1:-1].replace('""', '"').strip()
        if any(cells):
            rows.append((line, cells))
    return rows


# --- fingerprint ---


def digest(content: bytes | str) -> str:
    """Return the first 16 hexadecimal digits of the sha256."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def digest_files(paths: Iterable[Path]) -> str:
    """Return a digest of files by name, size and time of change: their content is not read."""
    stats = ((path, path.stat()) for path in paths)
    return digest("\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats))
