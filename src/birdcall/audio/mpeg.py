"""Put the frames of a damaged or joined mp3 in order, for a decoder that expects no such thing."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import BinaryIO, NamedTuple

_READ_BYTES = 1 << 18
_CHAIN = 4  # mp3 frames that must follow one another: random bytes look like one once in 2 kB
_MAX_JUNK = 1 << 24  # before the first frame
_NAMED = 5  # places of damage in a message
_FRAMES_OFF = 8  # of an mp3, more than its header states: a joined file has more
_KILOBITS = {  # by version (1 or 2) and layer, for the 14 indices from 1
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_KILOBITS[2, 2] = _KILOBITS[2, 3] = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)

Piece = bytes | range  # of a file: bytes as they are, or a range of another file's bytes


class Part(NamedTuple):
    """Audio of one format, as a file that libsndfile reads; no pieces: the real file as it is."""

    pieces: tuple[Piece, ...] = ()
    seconds: float = 0.0  # that its header or its frames promise; 0: what libsndfile says
    seconds_since_last: float = 0.0  # from the end of the part before to its own; 0: unknown


class Layout(NamedTuple):
    """The parts of a file, one after another, and what is damaged in it ("": nothing)."""

    parts: tuple[Part, ...] = (Part(),)
    damage: str = ""


def read_bytes(file: BinaryIO, position: int, n_bytes: int) -> bytes:
    file.seek(position)
    return file.read(n_bytes)


_SYNC = re.compile(b"\xff")  # the first byte of a frame
_VBRI_AT = 36  # the place of this name in a first frame
_XING, _NAMES = (b"Xing", b"Info"), (b"Xing", b"Info", b"VBRI")
_STATEMENT_BYTES = 64  # no first frame states anything behind them
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


class _Statement(NamedTuple):
    """What the first frame of a file states, if it has no sound."""

    name: bytes
    n_frames: int
    n_bytes: int  # 0: not stated


@dataclass
class _Run:
    """Consecutive frames of one kind, from a first frame that may state how many there are."""

    frame: _Frame
    stated: _Statement | None
    n_frames: int  # with sound: the first frame is none, if it states their number
    pieces: list[Piece] = field(default_factory=list)
    bit_rates: set[int] = field(default_factory=set)
    n_bytes: int = 0  # of the frames that there are
    n_lost: int = 0  # frames in all gaps
    last_bytes: int = 0  # of the last frame
    gaps: dict[int, int] = field(default_factory=dict)  # index of the piece → frames lost there
    silent: bytes = b""  # a frame

    @property
    def seconds(self) -> float:
        return self.n_frames * self.frame.n_samples / self.frame.kind[2]

    @property
    def mean_bytes(self) -> float:
        return self.n_bytes / max(1, self.n_frames - self.n_lost)

    @property
    def n_stated(self) -> int:
        """Return the stated number of frames, or the real one where the frames would be absurd."""
        if self.stated is None:
            return self.n_frames
        if not self.stated.n_bytes:
            return self.stated.n_frames
        share = self.mean_bytes / (self.stated.n_bytes / max(1, self.stated.n_frames))
        return self.stated.n_frames if 0.5 < share < 2 else self.n_frames

    @property
    def is_misleading(self) -> bool:
        """Return whether a decoder would stop before the last frame, or promise far more."""
        if self.stated is None or self.stated.name == b"VBRI":  # libmpg123 does not read it
            return len(self.bit_rates) > 1
        is_more = self.n_frames > self.stated.n_frames + _FRAMES_OFF
        return is_more or self.n_stated != self.stated.n_frames

    def add(self, position: int, frame: _Frame, bit_rate: int) -> None:
        if self.n_frames >= 0:
            self.bit_rates.add(bit_rate)
        self._extend(position, position + frame.n_bytes, 1)
        self.last_bytes = frame.n_bytes

    def _extend(self, start: int, end: int, n_frames: int) -> None:
        self.n_frames += n_frames
        self.n_bytes += end - start
        if self.pieces and isinstance(last := self.pieces[-1], range) and last.stop == start:
            start = self.pieces.pop().start
        self.pieces.append(range(start, end))

    def add_following(self, file: BinaryIO, position: int, size: int) -> int:
        """Add the whole frames of the same kind that follow, and state nothing; return their end.

        The last ones of the file are left. A minute has 2,300 frames: this is the loop that counts.
        """
        start, n_frames, is_end = position, 0, False
        lengths: dict[bytes, int] = {}  # by header, of this kind: a file has few of them
        while not is_end:
            data, at = read_bytes(file, position, _READ_BYTES), 0
            has_names = any(name in data for name in _NAMES)
            while at + _STATEMENT_BYTES <= len(data):
                header = data[at : at + 4]
                n_bytes = lengths.get(header)
                if n_bytes is None:
                    frame = _parse_frame(header)
                    is_end = frame is None or frame.kind != self.frame.kind
                    n_bytes = 0 if is_end else frame.n_bytes
                is_end = is_end or position + at + n_bytes > size
                if is_end or (has_names and self._states_something(data, at)):
                    is_end = True
                    break
                lengths[header] = self.last_bytes = n_bytes
                n_frames += 1
                at += n_bytes
            position += at
            is_end |= at == 0 or len(data) < _READ_BYTES
        self.bit_rates |= {header[2] >> 4 for header in lengths}
        if n_frames:
            self._extend(start, position, n_frames)
        return position

    def _states_something(self, data: bytes, at: int) -> bool:
        name_at = at + _parse_frame(data[at : at + 4]).name_at
        return data.startswith(_XING, name_at) or data.startswith(b"VBRI", at + _VBRI_AT)

    def add_gap(self, header: bytes, n_bytes: int) -> None:
        """Add silent frames for so many damaged bytes; the damage begins in the last frame."""
        if self.n_frames > 1:
            self.pieces[-1] = self.pieces[-1][: -self.last_bytes]
            self.n_frames -= 1
            self.n_bytes -= self.last_bytes
            n_bytes += self.last_bytes
        silent = bytes([header[0], header[1] | 1, *header[2:]])  # no checksum follows
        self.silent = silent.ljust(_parse_frame(silent).n_bytes, b"\0")
        n_lost = max(1, round(n_bytes / max(1, self.mean_bytes)))
        self.gaps[len(self.pieces)] = n_lost
        self.pieces.append(b"")
        self.n_frames += n_lost
        self.n_lost += n_lost

    def fill_gaps(self, is_whole: bool) -> float:
        """Fill the gaps with silence; return its seconds. ``is_whole``: the end is not missing."""
        n_more = self.n_stated - self.n_frames
        if self.gaps and is_whole and n_more <= 2 * self.n_frames:  # it says how many are lost
            last = max(self.gaps)
            n_more = max(1 - self.gaps[last], n_more)
            self.n_frames += n_more
            self.n_lost += n_more
            self.gaps[last] += n_more
        for index, n_lost in self.gaps.items():
            self.pieces[index] = self.silent * n_lost
        return self.n_lost * self.frame.n_samples / self.frame.kind[2]


def scan_mpeg(file: BinaryIO, first: int, size: int) -> Layout:
    """Return the parts of an mp3, by its frames from a byte on; silent ones replace lost ones."""
    start = _find_chain(file, first, min(size, first + _MAX_JUNK))
    if start is None:  # not an mp3, or one that only libmpg123 understands
        return Layout()
    runs: list[_Run] = []
    end, is_cut, damage = start, False, []
    while True:
        header = read_bytes(file, end, 4)
        frame, run = _parse_frame(header), runs[-1] if runs else None
        is_next = frame is not None and run is not None and frame.kind == run.frame.kind
        if not is_next and not is_chain(file, end):
            position = _find_chain(file, skip_tags(file, end), size)
            if position is None:
                break
            if position > skip_tags(file, end):
                damage.append(f"from {sum(item.seconds for item in runs):.2f} s on")
                position = _skip_dependent(file, position)
                run.add_gap(read_bytes(file, position, 4), position - end)
            end = position
            continue
        if is_cut := end + frame.n_bytes > size:
            break
        stated = _read_statement(file, end, frame)
        if not is_next or stated is not None:
            run = _Run(frame, stated, n_frames=0 if stated is None else -1)
            runs.append(run)
        run.add(end, frame, header[2] >> 4)
        end = run.add_following(file, end + frame.n_bytes, size)
    lost = sum(run.fill_gaps(is_whole=not is_cut or run is not runs[-1]) for run in runs)
    if damage:
        places = ", ".join(damage[:_NAMED]) + (", …" if damage[_NAMED:] else "")
        damage = [f"{lost:.2f} s, {places}, are damaged and read as silence"]
    for begin, stop in ((first, start), (end, size)):
        content = read_bytes(file, begin, stop - begin).strip(b"\0")
        if len(content) > 2 * runs[0].frame.n_bytes and not any(name in content for name in _TAGS):
            damage.append(f"{len(content)} bytes from byte {begin} on are no audio")
    parts = tuple(_mpeg_part(file, run) for run in runs)
    is_plain = len(runs) == 1 and not damage and not runs[0].is_misleading
    # libsndfile skips a tag of ID3, but no second head of it at its end, and no zeros behind it.
    if is_plain and start == first and read_bytes(file, max(0, start - 10), 3) != b"3DI":
        parts = (Part((), 0.0 if runs[0].stated else runs[0].seconds),)
    return Layout(parts, "; ".join(damage))


def _mpeg_part(file: BinaryIO, run: _Run) -> Part:
    """Return a run as an mp3 whose first frame states how many frames there are."""
    pieces, first, frame, n_frames = list(run.pieces), run.pieces[0], run.frame, run.n_frames
    if run.stated is None or (run.stated.name == b"VBRI" and run.is_misleading):
        stating = bytearray(read_bytes(file, first.start, 4).ljust(frame.n_bytes, b"\0"))
        stating[1] |= 1  # no checksum follows
        name_at = _parse_frame(bytes(stating[:4])).name_at
        stating[name_at : name_at + 12] = b"Xing" + struct.pack(">II", 1, n_frames)
        n_bytes = 0 if run.stated is None else frame.n_bytes
        return Part((bytes(stating), range(first.start + n_bytes, first.stop), *pieces[1:]))
    stating = bytearray(read_bytes(file, first.start, frame.n_bytes))
    numbers = (max(run.n_stated, n_frames), sum(map(len, pieces)))
    if run.stated.name == b"VBRI":
        stating[_VBRI_AT + 10 : _VBRI_AT + 18] = struct.pack(">II", *reversed(numbers))
    else:
        n_bytes = 8 if run.stated.n_bytes else 4
        numbers_at = slice(frame.name_at + 8, frame.name_at + 8 + n_bytes)
        stating[numbers_at] = struct.pack(">II", *numbers)[:n_bytes]
    return Part((bytes(stating), range(first.start + frame.n_bytes, first.stop), *pieces[1:]))


def _read_statement(file: BinaryIO, position: int, frame: _Frame) -> _Statement | None:
    """Return what a first frame states; None: it is no such frame."""
    if read_bytes(file, position + _VBRI_AT, 4) == b"VBRI":
        numbers = read_bytes(file, position + _VBRI_AT + 10, 8).ljust(8, b"\0")
        return _Statement(b"VBRI", *reversed(struct.unpack(">II", numbers)))
    fields = read_bytes(file, position + frame.name_at, 16).ljust(16, b"\0")
    name, flags, n_frames, n_bytes = struct.unpack(">4sIII", fields)
    if name not in _XING or not flags & 1:
        return None
    return _Statement(name, n_frames, n_bytes if flags & 2 else 0)


def is_chain(file: BinaryIO, position: int) -> bool:
    """Return whether frames of one kind follow one another from ``position``."""
    kind = None
    for _ in range(_CHAIN):
        frame = _parse_frame(read_bytes(file, position, 4))
        if frame is None or kind not in (None, frame.kind):
            return False
        kind, position = frame.kind, position + frame.n_bytes
    return True


def _find_chain(file: BinaryIO, position: int, end: int) -> int | None:
    """Return the first position before ``end`` where frames follow one another."""
    while position < end:
        data = read_bytes(file, position, min(_READ_BYTES // 4, end - position))
        for sync in _SYNC.finditer(data):
            if is_chain(file, position + sync.start()):
                return position + sync.start()
        position += max(1, len(data))
    return None


def _skip_dependent(file: BinaryIO, position: int) -> int:
    """Return the first frame from ``position`` on that needs no bytes of frames before it."""
    start, n_bytes = position, 0
    while frame := _parse_frame(read_bytes(file, position, 4)):
        side_at = 4 + 2 * (1 - (read_bytes(file, position + 1, 1)[0] & 1))  # behind a checksum
        needed = int.from_bytes(read_bytes(file, position + side_at, 2), "big")
        needed >>= 7 if frame.kind[0] == 1 else 8
        if frame.kind[1] != 3 or needed <= n_bytes:
            return position
        n_bytes += frame.n_bytes - frame.name_at
        position += frame.n_bytes
    return start


def skip_tags(file: BinaryIO, position: int) -> int:
    """Return the position behind ID3, APEv2 and Lyrics3 tags that begin at ``position``."""
    while True:
        head = read_bytes(file, position, 32)
        if head[:3] == b"ID3" and len(head) >= 10:
            length = 0
            for byte in head[6:10]:  # 7 bits each
                length = length << 7 | byte & 0x7F
            position += length + (20 if head[5] & 0x10 else 10)
        elif head[:3] == b"TAG":
            position += 128
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            length = int.from_bytes(head[12:16], "little")
            position += max(32, length + 32 * (head[23] >> 7))
        else:
            return position
