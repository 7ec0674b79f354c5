"""Decode a sound file in order, around damage and from part to part, and tell what is lost."""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import struct
import tempfile
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from math import inf
from operator import itemgetter
from pathlib import Path

import numpy as np
import soundfile

from birdcall.audio.containers import PieceFile, find_flac_tails, find_layout
from birdcall.audio.filters import BEYOND_REASON, MAX_BEYOND_SHARE, LevelCheck
from birdcall.audio.mpeg import Layout, Part
from birdcall.storage.files import UserError

logger = logging.getLogger(__name__)

# What may be missing of the promised length, seconds plus share, before a recording counts as cut:
# decoders drop some of the start of an mp3 (encoder delay, a frame that needs the one before it).
# Of 725 real mp3 files nothing was missing.
LENGTH_TOLERANCE = (0.1, 0.0)

_BLOCK_VALUES = 1 << 16  # frames x channels decoded at once
# No coding has so many frames in a byte: a length above it is not stated, or nonsense.
_MAX_FRAMES_PER_BYTE = 4096
NO_SAMPLES = "has no samples; empty or damaged"
_SAMPLE_RATES = (1_000, 4_000_000)  # others are of a damaged header, and would fill the memory
_MAX_PROBLEMS = 5  # in a message


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


# libmpg123 prints these lines to standard error; those with "error:" are of frames that it mutes.
_DECODER_LINES = PrintedLines(
    rb"(?:\[[^\n]*libmpg123[^\n]*|Note: [^\n]*|Warning: Xing[^\n]*)\n|\n(?=Note: |\[|Warning: Xing)"
)


class AudioError(UserError):
    """A sound file that cannot be decoded as requested; the message begins with its path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both are arguments, so that the error can be pickled
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def is_cut(
    seconds: float, promised_seconds: float, tolerance: tuple[float, float] = LENGTH_TOLERANCE
) -> bool:
    """Return whether a recording that decodes to ``seconds`` lacks part of what was promised."""
    constant, share = tolerance
    return promised_seconds - seconds > constant + share * promised_seconds


class _PartFile(soundfile.SoundFile):
    """A file, or a part of one, that libsndfile reads."""

    def seekable(self) -> bool:
        """Return False: after every read of a seekable file, python-soundfile seeks.

        mpg123 decodes what follows a seek slightly differently from what it reads in one go.
        """
        return False


class AudioFile:
    """A sound file that is read in order from its present position; see `open_audio`.

    samplerate, channels: of all blocks. frames: what its parts promise to hold; None: that is not
    known before they are decoded. promised_frames: the same, also where the file is cut. problems:
    what could not be read as it should be, so far.
    """

    def __init__(self, path: Path, stream: io.FileIO) -> None:
        self.path, self._stream = path, stream
        state = path.stat()
        self._n_bytes = state.st_size
        layout = find_layout(path, state.st_size, state.st_mtime_ns)
        if layout.parts[0].pieces:
            try:
                self._open(layout.parts[0])
            except soundfile.SoundFileError:  # it only looked like that
                layout = Layout()
        self.problems = [layout.damage] if layout.damage else []
        self._is_noted = bool(layout.damage)
        self.levels = LevelCheck()
        self._parts: list[tuple[Part, float]] = []  # with their number of frames
        promised_seconds = self._open_all(layout.parts)
        total = sum(n_frames for _, n_frames in self._parts)
        self.frames = None if total == inf else int(total)
        self.promised_frames = None
        if promised_seconds < inf:
            self.promised_frames = round(promised_seconds * self.samplerate)
        self._index, self._start = len(layout.parts) - 1, 0  # of the present part; start in frames
        self._position = self._n_silent = 0  # frames: of the part, the next; silent, from there on
        self._decoded = np.zeros((0, 1), np.float32)  # the frames behind them, if not empty
        self._opened_at = 0  # frame of the part, the first of the decoder
        self._tails: list[tuple[int, Part]] = []  # of a damaged FLAC
        self._tails_of = -1  # index of the part
        self._failed_at: int | None = None  # frame of the part, where decoding stopped
        if len(layout.parts) > 1:
            self.seek(0)

    def _open_all(self, parts: Sequence[Part]) -> float:
        """Note the parts that can be read as one; return the seconds that all parts promise."""
        promised_seconds, place = 0.0, ""
        for part in parts:
            try:
                file = self._open(part)
            except soundfile.SoundFileError as error:
                if not self._parts:
                    raise
                self.problems.append(f"the part from {place} on {_decode_reason(error)}")
                continue
            if not self._parts:
                self.samplerate, self.channels = file.samplerate, file.channels
                if not _SAMPLE_RATES[0] <= self.samplerate <= _SAMPLE_RATES[1]:
                    reason = f"its header states a sample rate of {self.samplerate} Hz"
                    raise AudioError(self.path, reason)
            is_known = file.frames < _MAX_FRAMES_PER_BYTE * self._n_bytes
            n_frames, n_missing = file.frames if is_known else inf, 0
            if part.seconds_since_last and self._parts:  # pages between the two
                n_missing = round(part.seconds_since_last * self.samplerate) - n_frames
                n_missing = max(0, n_missing)
            promised_seconds += part.seconds or (n_missing + n_frames) / file.samplerate
            if file.samplerate != self.samplerate:
                text = f"its sample rate changes from {self.samplerate} to {file.samplerate} Hz"
                self.problems.append(f"{text} at {place}, the end of what is read")
                break
            if n_missing:
                before, n_before = self._parts.pop()
                self._parts.append((before, n_before + n_missing))
            self._parts.append((part, n_frames))
            seconds = sum(n_frames for _, n_frames in self._parts) / self.samplerate
            place = f"{seconds:.2f} s" if seconds < inf else f"part {len(self._parts) + 1}"
        return promised_seconds

    def _open(self, part: Part) -> _PartFile:
        """Open a part in place of the present one.

        By descriptor: given a path, libsndfile takes a macOS file ``._name`` beside it for a part
        of the recording, and refuses names that are not UTF-8.
        """
        with _DECODER_LINES.taken():
            self._source = PieceFile(self._stream, part.pieces)
            if part.pieces:
                self._file = _PartFile(self._source)
            else:
                self._stream.seek(0)
                self._file = _PartFile(self._stream.fileno(), closefd=False)
        return self._file

    def seek(self, frame: int) -> None:
        """Continue at a frame, counted from the beginning of the first part."""
        before, self._index, self._start = self._index, 0, 0
        while self._index + 1 < len(self._parts) and frame >= self._end_of_part:
            self._start = self._end_of_part
            self._index += 1
        if self._index != before or self.problems:  # a decoder that has failed does not seek
            self._open_part()
        self._n_silent, self._decoded = 0, self._decoded[:0]
        self._is_noted |= frame > self._start
        try:
            if self._parts[self._index][0].seconds_since_last:  # Opus would go elsewhere
                raise soundfile.SoundFileRuntimeError("begins in the middle of a stream")
            with _DECODER_LINES.taken():
                self._file.seek(frame - self._start)
            self._position = frame - self._start
        except soundfile.SoundFileError:  # as with GSM; or behind damage
            self._open_part()
            while self._start + self._position < frame:
                n_frames = min(_BLOCK_VALUES, frame - self._start - self._position)
                if self._next_block(n_frames) is None:
                    break

    def _open_part(self) -> None:
        self._open(self._parts[self._index][0])
        self._position = self._opened_at = 0
        self._failed_at = None

    @property
    def _end_of_part(self) -> int:
        return self._start + self._parts[self._index][1]

    def frame_blocks(self, n_frames: int | None = None) -> Iterator[np.ndarray]:
        """Yield up to ``n_frames`` as float32 ``(frames, channels)``; None: all there are.

        Frames that do not decode are silent, if any after them decode; else they are the end.
        Raises AudioError where most of all samples are no sound.
        """
        remaining = inf if n_frames is None else n_frames
        n_block = max(1, _BLOCK_VALUES // self.channels)
        while remaining > 0:
            block = self._next_block(int(min(remaining, n_block)))
            if block is None:
                break
            first_beyond = self.levels.silence_beyond(block)
            if first_beyond is not None:
                seconds = self._seconds(self._position - len(block) + first_beyond)
                self._note(f"samples from {seconds} on are {BEYOND_REASON}, and read as silence")
            remaining -= len(block)
            if block.shape[1] != self.channels:  # another part of a joined file
                block = block.mean(axis=1, dtype=np.float32, keepdims=True)
                block = block.repeat(self.channels, axis=1)
            yield block
        if (share := self.levels.beyond_share) > MAX_BEYOND_SHARE:
            reason = f"{share:.0%} of its samples are {BEYOND_REASON}"
            raise AudioError(self.path, f"{reason}; floats must be from -1 to 1")

    def _next_block(self, n_frames: int) -> np.ndarray | None:
        """Return up to ``n_frames`` ``(frames, channels)``, channels of their part; None: end."""
        while True:
            n_silent = min(self._n_silent, n_frames)
            if n_silent:
                block = np.zeros((n_silent, self._file.channels), np.float32)
                self._n_silent -= n_silent
            elif len(self._decoded):
                block, self._decoded = self._decoded[:n_frames], self._decoded[n_frames:]
            elif self._failed_at is not None:
                self._search_behind_damage()
                continue
            else:
                block = self._decode(n_frames)
            self._position += len(block)
            if len(block):
                return block
            if self._failed_at is not None:
                continue
            if self._index + 1 == len(self._parts):
                return None
            n_missing = self._end_of_part - self._start - self._position
            if 0 < n_missing < inf:  # the next part keeps its time
                self._n_silent = n_missing
                if is_cut(0, self._n_silent / self.samplerate):
                    self._note_silence("missing and read as silence")
            else:
                self._start += self._position
                self._index += 1
                self._open_part()

    def _decode(self, n_frames: int) -> np.ndarray:
        """Return what the decoder has next; empty at its end, and where it fails."""
        block = np.empty((n_frames, self._file.channels), np.float32)
        with _DECODER_LINES.taken() as lines:
            try:
                block = self._file.read(out=block)
            except soundfile.SoundFileError as error:
                # The decoder counts from where it was opened.
                block = block[: max(0, self._opened_at + self._file.tell() - self._position)]
                self._failed_at, self._reason = self._position + len(block), _decode_reason(error)
        if error := self._source.error:
            self._note(f"cannot be read after {self._seconds(self._position)}: {error.strerror}")
        errors = [line for line in lines if b"error:" in line]
        if errors and not self._is_noted:  # after a seek it misses bytes of other frames
            self._is_noted = True
            reason = errors[0].split(b"error:")[1].strip(b" !\n").decode(errors="replace")
            self._note(f"frames after {self._seconds(self._position)} do not decode ({reason})")
        return block

    def _search_behind_damage(self) -> None:
        """Continue at the next frame of a FLAC that decodes, with silence before it."""
        part, n_part_frames = self._parts[self._index]
        failed_at, self._failed_at = self._failed_at, None
        if failed_at >= n_part_frames:  # all is read; tags follow, or junk
            return
        if self._tails_of != self._index and self._file.format == "FLAC":
            pieces = part.pieces or (range(self._n_bytes),)
            self._tails, self._tails_of = (
                find_flac_tails(PieceFile(self._stream, pieces)),
                self._index,
            )
        tails = self._tails if self._tails_of == self._index else []
        for frame, tail in tails[bisect_left(tails, failed_at, key=itemgetter(0)) :]:
            with _DECODER_LINES.taken(), suppress(soundfile.SoundFileError):
                self._open(tail)
                self._decoded = self._file.read(1, dtype="float32", always_2d=True)
            if len(self._decoded):
                self._opened_at, self._n_silent = frame, frame - failed_at
                if self._n_silent:
                    self._note_silence(f"damaged and read as silence ({self._reason})")
                else:  # the decoder did so itself
                    text = f"frames before {self._seconds(frame)} are damaged or silent"
                    self._note(f"{text} ({self._reason})")
                return
        self._note(f"{self._reason} at {self._seconds(failed_at)}")

    def _note(self, text: str) -> None:
        """Add a problem, but each once, and only the first of many."""
        if len(self.problems) == _MAX_PROBLEMS:
            self.problems.append("…")
        elif text not in self.problems and len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)

    def _note_silence(self, what: str) -> None:
        seconds = self._n_silent / self.samplerate
        self._note(f"{seconds:.2f} s from {self._seconds(self._position)} on are {what}")

    def _seconds(self, frame: int) -> str:
        return f"{(self._start + frame) / self.samplerate:.2f} s"

    def report_whole(self, seconds: float) -> None:
        """Log, once, what is wrong with a file of which so much decoded, the whole of it."""
        problems = list(self.problems)
        if self.promised_frames is not None:
            promised = self.promised_frames / self.samplerate
            if is_cut(seconds, promised):
                text = f"decodes only to {seconds:.2f} s of {promised:.2f} s"
                problems.insert(0, f"{text}; truncated or damaged")
        if self.levels.is_constant:
            problems.append(f"holds no sound: all samples are {self.levels.highest:.3g}")
        if problems:
            warn_once(f"{self.path}: {'; '.join(problems)}")

    def mono_blocks(
        self, n_frames: int | None = None, downmix: float | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the same blocks mixed to mono ``(frames,)``; ``downmix`` as in `read_audio`."""
        for block in self.frame_blocks(n_frames):
            if block.shape[1] == 1:
                yield block[:, 0]
            elif downmix is None:
                yield block.mean(axis=1, dtype=np.float32)
            else:
                share, others = np.float32(downmix), block[:, 1:].mean(axis=1, dtype=np.float32)
                yield share * block[:, 0] + (1 - share) * others


@lru_cache(maxsize=1 << 14)
def warn_once(text: str) -> None:
    """Log a warning: a file that is read in every epoch is named once."""
    logger.warning("%s", text)


@contextmanager
def open_audio(path: Path) -> Iterator[AudioFile]:
    """Open a sound file; every error of libsndfile becomes an AudioError."""
    require_regular_file(path)
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb", buffering=0))
            file = AudioFile(path, stream)
        except OSError as error:  # no permission, a disk that fails
            raise AudioError(path, f"cannot be read: {error.strerror or error}") from error
        # TypeError: .raw needs more. struct.error: the file has become shorter meanwhile.
        except (soundfile.SoundFileError, TypeError, struct.error) as error:
            raise AudioError(path, _decode_reason(error)) from error
        if file.frames == 0:
            raise AudioError(path, NO_SAMPLES)
        try:
            yield file
        except soundfile.SoundFileError as error:
            raise AudioError(path, _decode_reason(error)) from error


def require_regular_file(path: Path) -> None:
    """Raise FileNotFoundError or AudioError, where libsndfile would report a "System error"."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a circle of links, no permission, a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AudioError(path, f"cannot be opened: {reason}") from error
    if not stat.S_ISREG(mode):  # opening a pipe would never return
        raise AudioError(path, "is not a regular file")


def _decode_reason(error: Exception) -> str:
    reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
    if "not a regular file" in reason or "Format not recognised" in reason:
        reason = "no audio in any known format; not an audio file, or damaged as a whole"
    return f"cannot be decoded: {reason}"
