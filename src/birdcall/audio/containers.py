"""Find the audio in a file, whatever its header promises: parts joined, sizes wrong, damage."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

_READ_BYTES = 1 << 18
_CHAIN = 4  # mp3 frames that must follow one another: random bytes look like one once in 2 kB
_MAX_JUNK = 1 << 16  # before the first frame
_NAMED = 5  # places of damage in a message
_FRAMES_OFF = 8  # of an mp3, more than its header states: a joined file has more
_KILOBITS = {  # by version (1 or 2) and layer, for the 14 indices from 1
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_KILOBITS[2, 2] = _KILOBITS[2, 3] = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_WAV = (b"RIFF", b"RF64")
_FIRST_BYTES = (b"OggS\0\2", b"fLaC\0\0\0\x22")  # of each stream of a chained Ogg or joined FLAC
_NO_SIZE = b"\xff\xff\xff\xff"  # of a chunk: libsndfile reads to the end of the file
_PCM = (1, 3, 0xFFFE)  # codings with a constant number of bytes per second
_MAX_PLACEHOLDER = 0x7FFF0000  # sizes above it stand for "unknown" in a WAV that was piped


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


class Part(NamedTuple):
    """Audio of one format, as a file that libsndfile reads; no pieces: the real file as it is."""

    pieces: tuple[Piece, ...] = ()
    seconds: float = 0.0  # that its header or its frames promise; 0: what libsndfile says


class Layout(NamedTuple):
    """The parts of a file, one after another, and what is damaged in it ("": nothing)."""

    parts: tuple[Part, ...] = (Part(),)
    damage: str = ""


@lru_cache(maxsize=1 << 14)
def find_layout(path: Path, size: int, _mtime_ns: int) -> Layout:
    """Return where the audio of a file is; raises OSError. A file that stays is scanned once."""
    with path.open("rb", buffering=_READ_BYTES) as file:
        head = file.read(8)
        if head[:4] in _WAV:
            return Layout(_scan_riff(file, size))
        for marker in _FIRST_BYTES:
            if head.startswith(marker):
                return _split(file, size, marker)
        return _scan_mpeg(file, size)


def _read(file: BinaryIO, position: int, n_bytes: int) -> bytes:
    file.seek(position)
    return file.read(n_bytes)


def _split(file: BinaryIO, size: int, marker: bytes) -> Layout:
    """Return the parts of a file that begin with ``marker``, as the file does."""
    starts = []
    for start in range(0, size, _READ_BYTES):
        data = _read(file, start, _READ_BYTES + len(marker) - 1)
        starts += [start + match.start() for match in re.finditer(re.escape(marker), data)]
    if len(starts) == 1:
        return Layout()
    return Layout(tuple(Part((range(*ends),)) for ends in pairwise([*starts, size])))


# --- WAV ------------------------------------------------------------------------------------------


def _scan_riff(file: BinaryIO, size: int) -> tuple[Part, ...]:
    """Return the parts of a WAV; data go to the end of the file where their size is wrong."""
    parts: list[Part] = []
    start = 0
    while _read(file, start, 4) in _WAV:
        position, rate, long_size = start + 12, 0, None  # rate: bytes per second
        name, length = b"", 0
        while name != b"data" and position + 8 <= size:
            position += length + length % 2
            name, length = struct.unpack("<4sI", _read(file, position, 8).ljust(8, b"\0"))
            position += 8
            if name == b"fmt ":
                fields = _read(file, position, 14).ljust(14, b"\0")
                coding, rate, frame_bytes = struct.unpack("<H2xI4xH", fields)
                rate *= frame_bytes * (coding in _PCM)
            if name == b"ds64":
                long_size = int.from_bytes(_read(file, position + 8, 8), "little")
        if name != b"data":
            break
        if length == 0xFFFFFFFF and long_size is not None:
            length = long_size
        promised = length / rate if rate and length < _MAX_PLACEHOLDER else 0.0
        end = position + length
        follows, unread = _walk_chunks(file, end + end % 2, size), size - end
        if unread > 0 and not follows and (rate == 0 or unread > rate / 4 + length / 100):
            header = _read(file, start + 8, position - start - 12)
            wav = b"RIFF" + _NO_SIZE + header + _NO_SIZE
            promised = (size - position) / rate if rate else 0.0
            parts.append(Part((wav, range(position, size)), promised))
            break
        end = min(max(follows, end), size)
        parts.append(Part(() if start == 0 and end == size else (range(start, end),), promised))
        start = end
    return tuple(parts) or (Part(),)


def _walk_chunks(file: BinaryIO, position: int, size: int) -> int:
    """Return the end of the chunks from ``position``, a further WAV or the file's; 0: none are."""
    while position + 8 <= size:
        name, length = struct.unpack("<4sI", _read(file, position, 8))
        if name in _WAV:
            return position
        if not all(32 <= byte < 127 for byte in name):
            return 0
        position += 8 + length + length % 2
    return size if position <= size + 1 else 0


# --- mp3 ------------------------------------------------------------------------------------------

_SYNC = re.compile(b"\xff")  # the first byte of a frame
_VBRI_AT = 36  # the place of this name in a first frame
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICS", b"3DI")


class _Frame(NamedTuple):
    n_bytes: int
    n_samples: int
    kind: tuple[int, int, int, bool]  # version, layer, sample rate, mono: decoders expect one kind
    name_at: int  # where a first frame that states the number of frames has "Xing" or "Info"


@lru_cache(maxsize=1 << 12)
def _parse_frame(header: bytes) -> _Frame | None:
    """Return what the first four bytes of a frame of layer 2 or 3 say; None: they are no such."""
    if len(header) < 4 or header[0] != 0xFF or header[1] < 0xE0:
        return None
    divisor = {0: 4, 2: 2, 3: 1}.get(header[1] >> 3 & 3)  # of the rates: MPEG 2.5, 2 and 1
    layer, index, rate_index = 4 - (header[1] >> 1 & 3), header[2] >> 4, header[2] >> 2 & 3
    if divisor is None or layer in (1, 4) or index in (0, 15) or rate_index == 3:
        return None
    rate = (44_100, 48_000, 32_000)[rate_index] // divisor
    n_samples = 576 if layer == 3 and divisor > 1 else 1152
    bits_per_second = 1000 * _KILOBITS[min(2, divisor), layer][index - 1]
    n_bytes = n_samples // 8 * bits_per_second // rate + (header[2] >> 1 & 1)
    is_mono = header[3] >> 6 == 3
    side_bytes = (17, 9) if is_mono else (32, 17)
    name_at = 4 + side_bytes[divisor > 1] + 2 * (1 - (header[1] & 1))
    return _Frame(n_bytes, n_samples, (divisor, layer, rate, is_mono), name_at)


@dataclass
class _Run:
    """Consecutive frames of one kind, from a first frame that may state how many there are."""

    frame: _Frame
    stated: int | None
    n_frames: int  # with sound: the first frame is none, if it states their number
    pieces: list[Piece] = field(default_factory=list)
    bit_rates: set[int] = field(default_factory=set)
    last_bytes: int = 0  # of the last frame
    gaps: dict[int, int] = field(default_factory=dict)  # index of the piece → frames lost there
    silent: bytes = b""  # a frame

    @property
    def seconds(self) -> float:
        return self.n_frames * self.frame.n_samples / self.frame.kind[2]

    def add(self, position: int, frame: _Frame, bit_rate: int) -> None:
        start, last = position, self.pieces[-1] if self.pieces else b""
        if isinstance(last, range) and last.stop == position:
            start = self.pieces.pop().start
        self.pieces.append(range(start, position + frame.n_bytes))
        if self.n_frames >= 0:
            self.bit_rates.add(bit_rate)
        self.n_frames += 1
        self.last_bytes = frame.n_bytes

    def add_gap(self, header: bytes, n_bytes: int) -> None:
        """Add silent frames for so many damaged bytes; the damage begins in the last frame."""
        mean = sum(map(len, self.pieces)) / max(1, self.n_frames)
        if self.n_frames > 1:
            self.pieces[-1] = self.pieces[-1][: -self.last_bytes]
            self.n_frames -= 1
            n_bytes += self.last_bytes
        silent = bytes([header[0], header[1] | 1, *header[2:]])  # no checksum follows
        self.silent = silent.ljust(_parse_frame(silent).n_bytes, b"\0")
        self.gaps[len(self.pieces)] = max(1, round(n_bytes / mean))
        self.pieces.append(b"")
        self.n_frames += self.gaps[len(self.pieces) - 1]

    def fill_gaps(self, is_whole: bool) -> float:
        """Fill the gaps with silence; return its seconds. ``is_whole``: the end is not missing."""
        if self.gaps and is_whole and self.stated is not None:  # it says how many are lost
            last = max(self.gaps)
            n_more = max(1 - self.gaps[last], self.stated - self.n_frames)
            self.n_frames += n_more
            self.gaps[last] += n_more
        for index, n_lost in self.gaps.items():
            self.pieces[index] = self.silent * n_lost
        return sum(self.gaps.values()) * self.frame.n_samples / self.frame.kind[2]


def _scan_mpeg(file: BinaryIO, size: int) -> Layout:
    """Return the parts of an mp3, by its frames; silent ones replace those that are lost."""
    first = _skip_tags(file, 0)
    start = _find_chain(file, first, min(size, first + _MAX_JUNK))
    if start is None:  # not an mp3, or one that only libmpg123 understands
        return Layout()
    runs: list[_Run] = []
    end, is_cut, damage = start, False, []
    while True:
        header = _read(file, end, 4)
        frame, run = _parse_frame(header), runs[-1] if runs else None
        is_next = frame is not None and run is not None and frame.kind == run.frame.kind
        if not is_next and not _is_chain(file, end):
            position = _find_chain(file, _skip_tags(file, end), size)
            if position is None:
                break
            if position > _skip_tags(file, end):
                damage.append(f"from {sum(item.seconds for item in runs):.2f} s on")
                position = _skip_dependent(file, position)
                run.add_gap(_read(file, position, 4), position - end)
            end = position
            continue
        if is_cut := end + frame.n_bytes > size:
            break
        stated = _stated_frames(file, end, frame)
        if not is_next or stated is not None:
            run = _Run(frame, stated, n_frames=0 if stated is None else -1)
            runs.append(run)
        run.add(end, frame, header[2] >> 4)
        end += frame.n_bytes
    lost = sum(run.fill_gaps(is_whole=not is_cut or run is not runs[-1]) for run in runs)
    if damage:
        places = ", ".join(damage[:_NAMED]) + (", …" if damage[_NAMED:] else "")
        damage = [f"{lost:.2f} s, {places}, are damaged and read as silence"]
    for begin, stop in ((first, start), (end, size)):
        content = _read(file, begin, stop - begin).strip(b"\0")
        if len(content) > 2 * runs[0].frame.n_bytes and not any(name in content for name in _TAGS):
            damage.append(f"{len(content)} bytes from byte {begin} on are no audio")
    parts = tuple(_mpeg_part(file, run) for run in runs)
    is_plain = len(runs) == 1 and not damage and not _is_misleading(runs[0])
    if is_plain and (first > 0 or start == 0):  # libsndfile recognises it by the first bytes
        parts = (Part((), 0.0 if runs[0].stated else runs[0].seconds),)
    return Layout(parts, "; ".join(damage))


def _is_misleading(run: _Run) -> bool:
    """Return whether a decoder would stop before the last frame."""
    if run.stated is None:
        return len(run.bit_rates) > 1
    return run.n_frames > run.stated + _FRAMES_OFF


def _mpeg_part(file: BinaryIO, run: _Run) -> Part:
    """Return a run as an mp3 whose first frame states how many frames there are, if one does."""
    pieces, first, frame = list(run.pieces), run.pieces[0], run.frame
    if run.stated is None:
        if len(run.bit_rates) < 2:
            return Part(tuple(pieces), run.seconds)
        stating = bytearray(_read(file, first.start, 4).ljust(frame.n_bytes, b"\0"))
        stating[1] |= 1  # no checksum follows
        name_at = _parse_frame(bytes(stating[:4])).name_at
        stating[name_at : name_at + 12] = b"Xing" + struct.pack(">II", 1, run.n_frames)
        return Part((bytes(stating), *pieces))
    stating = bytearray(_read(file, first.start, frame.n_bytes))
    numbers = (max(run.stated, run.n_frames), sum(map(len, pieces)))
    if stating[_VBRI_AT : _VBRI_AT + 4] == b"VBRI":
        stating[_VBRI_AT + 10 : _VBRI_AT + 18] = struct.pack(">II", *reversed(numbers))
    else:
        n_bytes = 8 if stating[frame.name_at + 7] & 2 else 4  # it may not state its bytes
        numbers_at = slice(frame.name_at + 8, frame.name_at + 8 + n_bytes)
        stating[numbers_at] = struct.pack(">II", *numbers)[:n_bytes]
    return Part((bytes(stating), range(first.start + frame.n_bytes, first.stop), *pieces[1:]))


def _stated_frames(file: BinaryIO, position: int, frame: _Frame) -> int | None:
    """Return the number of frames that a first frame states; None: it is no such frame."""
    if _read(file, position + _VBRI_AT, 4) == b"VBRI":
        return int.from_bytes(_read(file, position + _VBRI_AT + 14, 4), "big")
    fields = _read(file, position + frame.name_at, 12).ljust(12)
    name, flags, n_frames = struct.unpack(">4sII", fields)
    return n_frames if name in (b"Xing", b"Info") and flags & 1 else None


def _is_chain(file: BinaryIO, position: int) -> bool:
    """Return whether frames of one kind follow one another from ``position``."""
    kind = None
    for _ in range(_CHAIN):
        frame = _parse_frame(_read(file, position, 4))
        if frame is None or kind not in (None, frame.kind):
            return False
        kind, position = frame.kind, position + frame.n_bytes
    return True


def _find_chain(file: BinaryIO, position: int, end: int) -> int | None:
    """Return the first position before ``end`` where frames follow one another."""
    while position < end:
        data = _read(file, position, min(_READ_BYTES // 4, end - position))
        for sync in _SYNC.finditer(data):
            if _is_chain(file, position + sync.start()):
                return position + sync.start()
        position += max(1, len(data))
    return None


def _skip_dependent(file: BinaryIO, position: int) -> int:
    """Return the first frame from ``position`` on that needs no bytes of frames before it."""
    start, n_bytes = position, 0
    while frame := _parse_frame(_read(file, position, 4)):
        side_at = 4 + 2 * (1 - (_read(file, position + 1, 1)[0] & 1))  # behind a checksum
        needed = int.from_bytes(_read(file, position + side_at, 2), "big")
        needed >>= 7 if frame.kind[0] == 1 else 8
        if frame.kind[1] != 3 or needed <= n_bytes:
            return position
        n_bytes += frame.n_bytes - frame.name_at
        position += frame.n_bytes
    return start


def _skip_tags(file: BinaryIO, position: int) -> int:
    """Return the position behind ID3, APEv2 and Lyrics3 tags that begin at ``position``."""
    while True:
        head = _read(file, position, 32)
        if head[:3] == b"ID3" and len(head) >= 10:
            length = 0
            for byte in head[6:10]:  # 7 bits each
                length = length << 7 | byte & 0x7F
            position += length + (20 if head[5] & 0x10 else 10)
        elif head[:3] == b"TAG":
            position += 128
        elif head[:8] == b"APETAGEX":
            position += int.from_bytes(head[12:16], "little") + 32 * (head[23] >> 7)
        else:
            return position
