"""Find the audio in a file, whatever its header promises: parts joined, sizes wrong, damage."""

from __future__ import annotations

import io
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice, pairwise
from math import inf
from pathlib import Path
from typing import BinaryIO, NamedTuple

from birdcall.audio.mpeg import Layout, Part, Piece, is_chain, read_bytes, scan_mpeg, skip_tags

_READ_BYTES = 1 << 18
_HEAD_BYTES = 1 << 16  # in which a file begins
_STREAMS = rb"RIFF....WAVE|OggS\x00\x02|fLaC\x00\x00\x00\x22"  # also behind other bytes
_CHUNKED = rb"(?:RIFF|RF64|BW64|RIFX)....WAVE|FORM....AIF[FC]|caff\x00\x01|riff\x2e\x91|\.snd"
_NO_SIZE = b"\xff\xff\xff\xff"  # of a chunk: libsndfile reads to the end of the file
# Sizes that stand for "unknown" in a file that was piped: of 32 bits, and of 64.
_FIRST_PLACEHOLDER, _UNKNOWN = 0x7FFF0000, 1 << 39


class PieceFile(io.RawIOBase):
    """Pieces of an open file and bytes between them, read as one file.

    It ends where reading fails, and ``error`` says why: a C library cannot take an exception.
    """

    def __init__(self, stream: io.FileIO, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.stream, self.pieces, self.position = stream, pieces, 0
        self.starts = [0, *accumulate(map(len, pieces))]
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position}
        self.position = offset + start.get(whence, self.starts[-1])
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        n_filled = 0
        for piece in self.pieces_from(self.position):
            part = piece[: len(buffer) - n_filled]
            if isinstance(part, range) and part:
                try:
                    self.stream.seek(part.start)
                    part = self.stream.read(len(part))
                except OSError as error:
                    self.error = error
                    break
            buffer[n_filled : n_filled + len(part)] = bytes(part)
            n_filled += len(part)
            if n_filled == len(buffer):
                break
        self.position += n_filled
        return n_filled

    def pieces_from(self, position: int) -> Iterator[Piece]:
        """Yield the pieces of what is from ``position`` on."""
        index = bisect_right(self.starts, position) - 1
        if index < len(self.pieces):
            yield self.pieces[index][position - self.starts[index] :]
            yield from islice(self.pieces, index + 1, None)


@lru_cache(maxsize=1 << 14)
def find_layout(path: Path, size: int, _mtime_ns: int) -> Layout:
    """Return where the audio of a file is; raises OSError. A file that stays is scanned once."""
    with path.open("rb", buffering=_READ_BYTES) as file:
        first = skip_tags(file, 0)
        if first >= size:  # a wrong length
            first = 0
        head = read_bytes(file, first, _HEAD_BYTES)
        match = re.match(_CHUNKED, head, re.DOTALL)
        if match is None and not is_chain(file, first):
            match = re.search(_STREAMS, head, re.DOTALL)
        if match is None:
            return scan_mpeg(file, first, size)
        start, marker = first + match.start(), match[0]
        if marker.startswith(b"OggS"):
            parts, damage = _scan_ogg(file, start, size)
        elif marker.startswith(b"fLaC"):
            parts, damage = _split_flac(file, start, size), ""
        else:
            parts, damage = _scan_chunks(file, start, size), ""
        if len(parts) == 1 and parts[0].pieces == (range(size),):
            parts = (Part((), parts[0].seconds),)
        if start > first:
            damage = f"{start - first} bytes from byte {first} on are no audio; {damage}".strip(
                "; "
            )
        return Layout(parts, damage)


# --- FLAC -----------------------------------------------------------------------------------------

_FLAC_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_FLAC_HEADER_BYTES = 16  # at most
_FLAC_BITS = {8: 1, 12: 2, 16: 4, 20: 5, 24: 6, 32: 7}  # of a sample → code in a frame


class _StreamInfo(NamedTuple):
    """What the first 42 bytes of a FLAC say."""

    block_frames: int  # of a block, if all are alike
    channels: int
    bits: int  # of a sample
    n_frames: int  # 0: unknown

    @classmethod
    def of(cls, head: bytes) -> _StreamInfo:
        numbers = int.from_bytes(head[18:26], "big")  # rate, channels, bits, number of frames
        channels, bits = (numbers >> 41 & 7) + 1, (numbers >> 36 & 31) + 1
        return cls(int.from_bytes(head[10:12], "big"), channels, bits, numbers & (1 << 36) - 1)


def _split_flac(file: BinaryIO, begin: int, size: int) -> tuple[Part, ...]:
    """Return the parts of a file of FLACs; each as long as its last frame says, if not longer."""
    marker, starts, parts = read_bytes(file, begin, 8), [], []
    for offset in range(begin, size, _READ_BYTES):
        data = read_bytes(file, offset, _READ_BYTES + len(marker) - 1)
        starts += [offset + match.start() for match in re.finditer(re.escape(marker), data)]
    for start, end in pairwise([*starts, size]):
        head, last = read_bytes(file, start, 42), range(start, end)[-_READ_BYTES:]
        n_frames = max((sum(frame[:2]) for frame in _find_flac_frames(file, last, head)), default=0)
        if 0 < _StreamInfo.of(head).n_frames < n_frames:
            parts.append(Part((_state_frames(head, n_frames), range(start + len(head), end))))
        else:
            parts.append(Part((range(start, end),)))
    return tuple(parts)


def _state_frames(head: bytes, n_frames: int) -> bytes:
    numbers = int.from_bytes(head[18:26], "big") >> 36 << 36 | n_frames
    return head[:18] + numbers.to_bytes(8, "big") + head[26:]


def find_flac_tails(file: PieceFile) -> list[tuple[int, Part]]:
    """Return the first sample of each frame of a FLAC, in order, and the part from there on."""
    head = read_bytes(file, 0, 42)
    header = b"fLaC\x80" + _state_frames(head, 0)[5:]  # no further metadata
    frames = sorted(_find_flac_frames(file, range(file.starts[-1]), head))
    return [(first, Part((header, *file.pieces_from(at)))) for first, _, at in frames]


def _find_flac_frames(file: BinaryIO, places: range, head: bytes) -> list[tuple[int, int, int]]:
    """Return first sample, number of samples and position of each FLAC frame, by its header."""
    info = _StreamInfo.of(head)
    frames = []
    for offset in range(places.start, places.stop, _READ_BYTES):
        data = read_bytes(file, offset, min(_READ_BYTES, places.stop - offset) + _FLAC_HEADER_BYTES)
        for sync in _FLAC_SYNC.finditer(data, 0, _READ_BYTES + 1):
            frame = _parse_flac_frame(data[sync.start() :][:_FLAC_HEADER_BYTES], info)
            if frame is not None:
                frames.append((*frame, offset + sync.start()))
    return frames


def _parse_flac_frame(header: bytes, info: _StreamInfo) -> tuple[int, int] | None:
    """Return first sample and number of samples of a frame; None: these bytes are no header."""
    header = header.ljust(6, b"\0")
    n_number = max(1, 8 - (header[4] ^ 0xFF).bit_length())  # bytes, as of a letter in UTF-8
    block, rate, channels, bits = header[2] >> 4, header[2] & 15, header[3] >> 4, header[3] & 15
    at = 4 + n_number
    end = at + {6: 1, 7: 2}.get(block, 0) + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    is_right = channels == info.channels - 1 or (info.channels == 2 and 8 <= channels <= 10)
    is_right &= bits in (0, 2 * _FLAC_BITS.get(info.bits, 0)) and n_number < 8 and block > 0
    if not is_right or len(header) <= end or _crc8(header[:end]) != header[end]:
        return None
    if block in (6, 7):
        n_frames = int.from_bytes(header[at : at + block - 5], "big") + 1
    else:
        n_frames = 192 if block == 1 else 576 << block - 2 if block < 6 else 256 << block - 8
    number = header[4] & (0x7F if n_number == 1 else 0x7F >> n_number)
    for byte in header[5:at]:
        number = number << 6 | byte & 0x3F
    return (number if header[1] & 1 else number * info.block_frames), n_frames


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value << 1 ^ (0x107 if value & 0x80 else 0)
    return value


# --- Ogg ------------------------------------------------------------------------------------------

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # the bits of each byte
_NO_FRAME = bytes(64)  # the decoder of a FLAC fails where frames are missing
_OGG_FLAC = b"\x7fFLAC\1"
_OPUS = b"OpusHead"
_OGG_NAMES = (b"\1vorbis", _OPUS, _OGG_FLAC)  # of the streams that are read


class _Page(NamedTuple):
    """A page of an Ogg file."""

    whole: range  # its bytes
    payload: range
    flags: int
    end: int  # sample at which it ends; 0: a header; -1: it ends within a packet
    stream: int
    number: int


def _parse_page(file: BinaryIO, position: int) -> _Page | None:
    """Return the page at a position; None: there is none, or it is damaged."""
    head = read_bytes(file, position, 27)
    if len(head) < 27 or head[:5] != b"OggS\0":
        return None
    flags, end, stream, number = struct.unpack("<5xBqII", head[:22])
    lengths = file.read(head[26])
    content = head[:22] + bytes(4) + head[26:] + lengths + file.read(sum(lengths))
    whole = range(position, position + len(content))
    payload = whole[27 + len(lengths) :]
    # The checksum of Ogg is that of zlib with the bits in reverse order, and from 0 on.
    checksum = zlib.crc32(content.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    if checksum.to_bytes(4, "big").translate(_REVERSED) != head[22:26]:
        return None
    return _Page(whole, payload, flags, end, stream=stream, number=number)


class _Section(NamedTuple):
    """Pages of a stream between which none is missing, behind those of its header."""

    head: bytes  # of the content of its first page
    pages: list[_Page]

    def part_after(self, before: _Section | None) -> Part:
        """Return what libsndfile reads, which is no FLAC within Ogg."""
        if self.head.startswith(_OGG_FLAC):
            pieces: list[Piece] = [self.pages[0].payload[len(_OGG_FLAC) + 3 :]]
            for last, page in pairwise(self.pages):
                is_next = page.number == last.number + 1
                pieces += [page.payload] if is_next else [_NO_FRAME, page.payload]
            return Part(tuple(pieces))
        ranges = [page.whole for page in self.pages]
        seconds = 0.0
        if before is not None and before.pages[0] == self.pages[0]:
            n_missing = self.pages[-1].end - before.pages[-1].end
            rate = int.from_bytes(self.head[12:16], "little")
            if self.head.startswith(_OPUS):  # libsndfile leaves out as many frames as at the start
                rate, n_missing = 48_000, n_missing - int.from_bytes(self.head[10:12], "little")
            seconds = n_missing / max(1, rate)
        starts = [0, *(i for i, (a, b) in enumerate(pairwise(ranges), 1) if a.stop != b.start)]
        runs = [ranges[i:j] for i, j in pairwise([*starts, len(ranges)])]
        return Part(tuple(range(run[0].start, run[-1].stop) for run in runs), 0.0, seconds)


def _scan_ogg(file: BinaryIO, begin: int, size: int) -> tuple[tuple[Part, ...], str]:
    """Return the parts of an Ogg file, cut where pages are missing, and what is wrong with its end.

    A chained file has a part for each of its streams; of streams side by side the first is read.
    """
    sections: list[_Section] = []
    position, n_cut, n_others, damage = begin, 0, 0, []
    while position < size:
        page = _parse_page(file, position)
        if page is None:
            position = _find_bytes(file, b"OggS", position + 1, size)
            continue
        position = page.whole.stop
        head, pages = sections[-1] if sections else (b"", [])
        if page.flags & 2:  # the first of a stream
            content = read_bytes(file, page.payload.start, 16)
            if content.startswith(_OGG_NAMES) and (not pages or pages[-1].end):
                sections.append(_Section(content, [page]))
                n_cut += 1
            else:
                n_others += 1
        elif pages and page.stream == pages[0].stream:
            is_missing = page.number != pages[-1].number + 1
            if is_missing and not pages[-1].end:
                damage = ["pages are missing at its beginning"]
            elif is_missing and not head.startswith(_OGG_FLAC):
                sections.append(_Section(head, [item for item in pages if not item.end]))
            sections[-1].pages.append(page)
            n_cut -= page.flags >> 2 & 1  # the last of a stream
    pages = sections[-1].pages if sections else []
    is_wrong = len(pages) > 1 and 0 <= pages[-1].end < pages[-2].end
    if is_wrong:  # all would end there
        pages.pop()
        n_cut += 1
    parts = [item.part_after(before) for before, item in pairwise([None, *sections])]
    if n_cut > 0:
        damage.append("its last page is missing: it is cut at its end, or was never closed")
    is_flac = bool(sections) and sections[0].head.startswith(_OGG_FLAC)
    if not sections or (len(sections) == 1 and not (is_flac or is_wrong or n_others)):
        parts = [Part((range(begin, size),))]
    return tuple(parts), "; ".join(damage)


def _find_bytes(file: BinaryIO, content: bytes, position: int, size: int) -> int:
    """Return where ``content`` is next; ``size``: it does not occur."""
    for offset in range(position, size, _READ_BYTES):
        data = read_bytes(file, offset, _READ_BYTES + len(content) - 1)
        if content in data:
            return offset + data.index(content)
    return size


# --- files of chunks: WAV, AIFF, CAF, W64, AU -----------------------------------------------------


class _Chunks(NamedTuple):
    """How a format writes its chunks."""

    fields: str  # of name and length
    first: int  # position of the first chunk
    alignment: int
    n_counted: int = 0  # bytes of name and length that the length counts
    n_before: int = 0  # bytes of a chunk of samples before the samples


_FORMATS = {
    **dict.fromkeys((b"RIFF", b"RF64", b"BW64"), _Chunks("<4sI", 12, 2)),
    b"RIFX": _Chunks(">4sI", 12, 2),
    b"FORM": _Chunks(">4sI", 12, 2, n_before=8),
    b"caff": _Chunks(">4sQ", 8, 1, n_before=4),
    b"riff": _Chunks("<4s12xQ", 40, 8, n_counted=24),
}
_SAMPLES = (b"data", b"SSND")
_BLOCKED = (2, 0x11, 0x31)  # codings of a WAV that state how many frames a block has
_CONSTANT = (1, 3, 6, 7, 0xFFFE)  # those with one frame in a block: PCM, floats, A-law, mu-law
_PLAIN_AIFF = (b"NONE", b"sowt", b"twos", b"fl32", b"FL32", b"fl64", b"FL64", b"in24", b"in32")
_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}  # of a sample


def _scan_chunks(file: BinaryIO, start: int, size: int) -> tuple[Part, ...]:
    """Return the parts of a file; samples go to its end where their size is wrong."""
    parts: list[Part] = []
    begin = start
    while (form := read_bytes(file, begin, 4)) in _FORMATS:
        position, rate, length = _find_samples(file, begin, size)
        if position > size:
            break
        promised = length / rate if rate and not _is_placeholder(length) else 0.0
        end = position + length
        end_of_chunk = end + -length % _FORMATS[form].alignment
        follows, unread = _walk_chunks(file, end_of_chunk, size, form), size - end
        is_wrong = unread > 0 and not follows and (rate == 0 or unread > rate / 4 + length / 100)
        if is_wrong:
            promised, end = (size - position) / rate if rate else 0.0, size
        is_refused = form == b"BW64" or length >= _UNKNOWN or (form == b"caff" and unread < 0)
        if is_wrong or is_refused:  # by libsndfile
            content = range(position, min(end, size))
            parts.append(
                Part((_make_header(file, begin, position, len(content)), content), promised)
            )
            break
        end = min(max(follows, end), size)
        parts.append(Part((range(begin, end),), promised))
        begin = end
    if not parts and read_bytes(file, start, 4) == b".snd":
        return (_scan_au(file, start, size),)
    return tuple(parts) or (Part((range(start, size),)),)


def _find_samples(file: BinaryIO, begin: int, size: int) -> tuple[int, float, int]:
    """Return position of the samples, their bytes per second (0: unknown), and stated bytes.

    The position is beyond the file where it has none.
    """
    fields, first, alignment, n_counted, n_before = _FORMATS[read_bytes(file, begin, 4)]
    position, rate, long_size = begin + first, 0.0, None
    while position + struct.calcsize(fields) <= size:
        name, length = struct.unpack(fields, read_bytes(file, position, struct.calcsize(fields)))
        if not _is_name(name):
            break
        position += struct.calcsize(fields)
        length = max(0, length - n_counted)
        if name in _SAMPLES:
            if length == 0xFFFFFFFF and long_size is not None:
                length = long_size
            rate = rate if 0 < rate < inf else 0.0
            return position + n_before, rate, max(0, length - n_before)
        content = read_bytes(file, position, 40).ljust(40, b"\0")
        if name == b"fmt ":
            rate = _wav_rate(content, fields[0])
        elif name == b"COMM":
            channels, bits, exponent, mantissa, coding = struct.unpack(">h4xhHQ4s", content[:22])
            is_plain = length < 22 or coding in _PLAIN_AIFF
            rate = mantissa * 2.0 ** (min(exponent, 16446) - 16446)  # Hz
            rate *= channels * -(-bits // 8) * is_plain
        elif name == b"desc":
            rate, packet_bytes, packet_frames = struct.unpack(">d8xII", content[:24])
            rate *= packet_bytes / max(1, packet_frames)
        elif name == b"ds64":
            long_size = int.from_bytes(content[8:16], "little")
        position += length + -length % alignment
    return size + 1, 0.0, 0


def _wav_rate(content: bytes, order: str) -> float:
    """Return the bytes per second of what a chunk ``fmt `` describes; 0: they are not constant."""
    coding, rate, block_bytes, block_frames = struct.unpack(order + "H2xI4xH4xH", content[:20])
    if coding in _CONSTANT:
        block_frames = 1
    elif coding not in _BLOCKED:
        return 0.0
    return rate * block_bytes / max(1, block_frames)


def _make_header(file: BinaryIO, begin: int, position: int, n_bytes: int) -> bytes:
    """Return what is before ``position``, the samples, but stating the right size of them."""
    form, header = read_bytes(file, begin, 4), read_bytes(file, begin, position - begin)
    fields, first, _, n_counted, n_before = _FORMATS[form]
    if form in (b"RIFF", b"RF64", b"BW64"):
        chunks = header[first:-8]
        if chunks[:4] == b"ds64":
            chunks = chunks[8 + int.from_bytes(chunks[4:8], "little") :]
        form = b"RIFF"
        if n_bytes >= 0xFFFFFFFF:
            form = b"RF64"
            sizes = struct.pack("<QQQI", n_bytes + 72 + len(chunks), n_bytes, 0, 0)
            chunks = b"ds64" + struct.pack("<I", len(sizes)) + sizes + chunks
        return form + _NO_SIZE + b"WAVE" + chunks + b"data" + _NO_SIZE
    kind = fields[0] + fields[-1]
    stated = min(n_bytes + n_counted + n_before, 0xFFFFFFFF if kind[1] == "I" else _UNKNOWN)
    at = len(header) - n_before - struct.calcsize(kind)
    return header[:at] + struct.pack(kind, stated) + header[at + struct.calcsize(kind) :]


def _scan_au(file: BinaryIO, start: int, size: int) -> Part:
    first, length, coding, rate, channels = struct.unpack(
        ">4x5I", read_bytes(file, start, 24).ljust(24, b"\0")
    )
    rate *= channels * _AU_BYTES.get(coding, 0)  # bytes per second; 0: not constant
    position, unread = start + first, size - start - first - length
    is_wrong = unread > rate / 4 + length / 100 or unread < 0
    if not is_wrong:
        return Part((range(start, size),), length / rate if rate else 0.0)
    if unread > 0 or _is_placeholder(length):
        length = max(0, size - position)
    header = read_bytes(file, start, min(first, _HEAD_BYTES))
    header = header[:8] + _NO_SIZE + header[12:]
    return Part((header, range(position, size)), length / rate if rate else 0.0)


def _is_name(name: bytes) -> bool:
    return all(32 <= byte < 127 for byte in name)


def _is_placeholder(length: int) -> bool:
    return _FIRST_PLACEHOLDER <= length <= 0xFFFFFFFF or length >= _UNKNOWN


def _walk_chunks(file: BinaryIO, position: int, size: int, form: bytes) -> int:
    """Return the end of the chunks from ``position``, a further file or this one's; 0: none are."""
    fields, _, alignment, n_counted, _ = _FORMATS[form]
    n_bytes = struct.calcsize(fields)
    while position + n_bytes <= size:
        name, length = struct.unpack(fields, read_bytes(file, position, n_bytes))
        if name in _FORMATS:
            return position
        if not _is_name(name):
            return 0
        length = max(0, length - n_counted)
        position += n_bytes + length + -length % alignment
    return size if position <= size + 1 else 0
