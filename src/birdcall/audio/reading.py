"""Read any interval of any sound file as a mono waveform at one sample rate, or tell why not."""

from __future__ import annotations

import io
import logging
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import tee, zip_longest
from math import gcd, inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from birdcall.audio.containers import Layout, Part, PieceFile, find_layout
from birdcall.audio.decoder_messages import PrintedLines
from birdcall.audio.filters import rearrange_blocks, resample_blocks, resampled_length
from birdcall.config import require
from birdcall.storage.files import UserError

logger = logging.getLogger(__name__)

# What may be missing of the promised length, seconds plus share, before a recording counts as cut:
# decoders drop some of the start of an mp3 (encoder delay, a frame that needs the one before it).
# Of 725 real mp3 files nothing was missing.
LENGTH_TOLERANCE = (0.1, 0.0)

# soxr HQ uses fewer than 160 samples of the lower rate on either side (measured: with more, a seek
# differs from the full decode by less than 1e-6).
_MARGIN_SAMPLES = 256
# An mp3 frame can need up to 511 bytes before it, eight frames at 32 kbit/s, and the overlap with
# one more: a seek goes ten frames further back.
_PREROLL_FRAMES = 10 * 1152
_BLOCK_VALUES = 1 << 16  # frames x channels decoded at once
# libmpg123 prints these lines to standard error; those with "error:" are of frames that it mutes.
_DECODER_LINES = PrintedLines(
    rb"(?:\[[^\n]*libmpg123[^\n]*|Note: [^\n]*|Warning: Xing[^\n]*)\n|\n(?=Note: |\[|Warning: Xing)"
)
_UNKNOWN_FRAMES = 1 << 62  # what libsndfile says of a length that is not stated is above it
# Frames that are skipped where decoding fails: so many, then twice as many, up to the last number.
_FIRST_SKIP, _LAST_SKIP = 4096, 1 << 22
# Of full scale: 40 dB above it, where floats of field recorders stay below 24 dB. Integers written
# as floats are above it, and squares of samples below it are far from overflow.
MAX_LEVEL = 100.0
MAX_BEYOND_SHARE = 0.1  # of the samples; of more, the file is refused
_BEYOND_REASON = f"not finite numbers, or beyond {MAX_LEVEL:g} times full scale"
_NO_SAMPLES = "has no samples; empty or damaged"
_MIN_RANGE = 2e-4  # of samples from lowest to highest; -80 dB


class AudioError(UserError):
    """A sound file that cannot be decoded as requested; the message begins with its path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both are arguments, so that the error can be pickled
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AudioInfo(NamedTuple):
    """What a file promises, even where it is cut."""

    sample_rate: int
    channels: int
    frames: int
    seconds: float


def probe_audio(path: Path) -> AudioInfo:
    """Return sample rate, channels and length, which a cut file promises but does not have.

    A file that states no length (a FLAC that was piped) is decoded to measure it.
    """
    with open_audio(path) as file:
        frames = file.promised_frames
        if frames is None:
            frames = sum(map(len, file.frame_blocks()))
        return AudioInfo(file.samplerate, file.channels, frames, frames / file.samplerate)


def is_cut(
    seconds: float, promised_seconds: float, tolerance: tuple[float, float] = LENGTH_TOLERANCE
) -> bool:
    """Return whether a recording that decodes to ``seconds`` lacks part of what was promised."""
    constant, share = tolerance
    return promised_seconds - seconds > constant + share * promised_seconds


def read_audio(
    path: Path,
    sample_rate: int,
    offset_seconds: float = 0.0,
    duration_seconds: float | None = None,
    downmix: float | None = None,
) -> np.ndarray:
    """Read a waveform, float32 mono ``(samples,)``, decoding no more than the requested interval.

    Channels are averaged, or the first has the share ``downmix`` (0 to 1) and the mean of the
    others the rest; of one channel it changes nothing. An interval equals the same interval of the
    whole file: input and output samples coincide at its start, and the resampling filter gets its
    neighbours on both sides.
    With ``duration_seconds`` exactly ``round(duration_seconds * sample_rate)`` samples are
    returned. Without it, all that decodes is returned, and a warning is logged where the header
    promised more (see LENGTH_TOLERANCE).

    Raises ``FileNotFoundError``, or ``AudioError`` where the interval does not decode.
    """
    return read_crops(path, sample_rate, [offset_seconds], duration_seconds, downmix=downmix)[0]


def read_crops(
    path: Path,
    sample_rate: int,
    offsets: Sequence[float],
    duration_seconds: float | None,
    downmix: float | None = None,
) -> list[np.ndarray]:
    """Read as `read_audio` does at each of ``offsets`` (seconds), but open the file once."""
    require(downmix is None or 0 <= downmix <= 1, f"downmix is {downmix}; give 0 to 1, or None")
    for offset in offsets:
        _require_interval(sample_rate, offset, duration_seconds)
    crops = []
    with open_audio(path) as file:
        for number, offset in enumerate(offsets):
            if number:
                file.seek(0)  # its position when it was opened
            crop = _read_crop(file, sample_rate, offset, duration=duration_seconds, downmix=downmix)
            crops.append(crop)
    return crops


def iterate_audio(
    path: Path, sample_rate: int, block_seconds: float = 60.0
) -> Iterator[np.ndarray]:
    """Yield a whole waveform in blocks of ``block_seconds``, the last one shorter.

    Their concatenation equals ``read_audio(path, sample_rate)``; memory does not grow with length.
    """
    for block in iterate_rates(path, [sample_rate], block_seconds):
        yield block[sample_rate]


def iterate_rates(
    path: Path, sample_rates: Sequence[int], block_seconds: float = 60.0
) -> Iterator[dict[int, np.ndarray]]:
    """Yield what `iterate_audio` does at each of the sample rates, decoding once."""
    for rate in sample_rates:
        _require_interval(rate, 0.0, block_seconds)
    n_samples = 0  # at the first rate
    with open_audio(path) as file:
        decoded = tee(file.mono_blocks(), len(sample_rates))
        streams = []
        for blocks, rate in zip(decoded, sample_rates, strict=True):
            resampled = resample_blocks(blocks, file.samplerate, rate)
            streams.append(rearrange_blocks(resampled, max(1, round(block_seconds * rate))))
        # The lengths at two rates differ by rounding: the last block can be empty at one of them.
        for parts in zip_longest(*streams, fillvalue=np.zeros(0, np.float32)):
            n_samples += len(parts[0])
            yield dict(zip(sample_rates, parts, strict=True))
        if not n_samples:
            raise AudioError(path, file.problems[-1] if file.problems else _NO_SAMPLES)
        file.report_whole(n_samples / sample_rates[0])


def _read_crop(
    file: AudioFile,
    sample_rate: int,
    offset: float,
    *,
    duration: float | None,
    downmix: float | None,
) -> np.ndarray:
    """Read as `read_audio` does from an open file that is at its beginning."""
    path, rate = file.path, file.samplerate
    start = round(offset * sample_rate)
    n_samples = None if duration is None else round(duration * sample_rate)
    if file.frames is not None:
        total = resampled_length(file.frames, rate, sample_rate)
        if n_samples is None:
            n_samples = total - start
        elif start + n_samples == total + 1:  # offset and duration were both rounded up
            start = max(0, start - 1)
        if start + n_samples > total or n_samples <= 0:
            asked = "its end" if duration is None else f"{duration:g} s"
            has = f"{total / sample_rate:g} s"
            raise AudioError(path, f"asked for {asked} from {offset:g} s, has {has}")
    divisor = gcd(rate, sample_rate)
    in_step, out_step = rate // divisor, sample_rate // divisor
    margin = _MARGIN_SAMPLES * max(1, -(-rate // sample_rate)) if rate != sample_rate else 0
    # The read starts where an input and an output sample fall on the same instant.
    step = max(0, (start * rate // sample_rate - max(margin, _PREROLL_FRAMES)) // in_step)
    first, skip = step * in_step, start - step * out_step
    if first:
        file.seek(first)
    n_frames = None
    if n_samples is not None:
        n_frames = -(-(start + n_samples) * rate // sample_rate) + margin - first
    blocks = resample_blocks(file.mono_blocks(n_frames, downmix), rate, sample_rate)
    crop = np.concatenate([np.zeros(0, np.float32), *blocks])[skip:][:n_samples]
    is_short = n_samples is not None and len(crop) < n_samples
    if not len(crop) or (is_short and duration is not None):  # it ends earlier, or is damaged
        reasons = list(file.problems)
        if file.promised_frames is not None:
            ends, promised = (start + len(crop)) / sample_rate, file.promised_frames / rate
            reasons.insert(0, f"decodes only to {ends:.2f} s of {promised:.2f} s")
            reasons[0] += "; truncated or damaged" if is_cut(ends, promised) else ""
        raise AudioError(path, "; ".join(reasons) or f"has no sound at {offset:g} s")
    if duration is None:
        file.report_whole((start + len(crop)) / sample_rate)
    return crop


def _require_interval(sample_rate: int, offset: float, duration: float | None) -> None:
    require(sample_rate > 0, f"sample_rate is {sample_rate}; it must be above 0")
    require(0 <= offset < inf, f"offset_seconds is {offset}; it must be 0 or more")
    require(duration is None or 0 < duration < inf, f"duration_seconds is {duration}; give above 0")


# --- files ---


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
        layout = find_layout(path, state.st_size, state.st_mtime_ns)
        if layout.parts[0].pieces:
            try:
                self._open(layout.parts[0])
            except soundfile.SoundFileError:  # it only looked like that
                layout = Layout()
        self.problems = [layout.damage] if layout.damage else []
        self._is_noted = bool(layout.damage)
        self.n_read = self.n_beyond = 0  # samples of all channels, so far
        self.lowest, self.highest = inf, -inf
        self._parts: list[tuple[Part, float]] = []  # with their number of frames
        seconds = promised_seconds = 0.0
        for part in layout.parts:
            try:
                file = self._open(part)
            except soundfile.SoundFileError as error:
                if not self._parts:
                    raise
                self.problems.append(f"the part from {seconds:.2f} s on {_decode_reason(error)}")
                continue
            if not self._parts:
                self.samplerate, self.channels = file.samplerate, file.channels
            n_frames = file.frames if file.frames < _UNKNOWN_FRAMES else inf
            promised_seconds += part.seconds or n_frames / file.samplerate
            if file.samplerate != self.samplerate:
                text = f"its sample rate changes from {self.samplerate} to {file.samplerate} Hz"
                self.problems.append(f"{text} at {seconds:.2f} s, the end of what is read")
                break
            self._parts.append((part, n_frames))
            seconds += n_frames / file.samplerate
        total = sum(n_frames for _, n_frames in self._parts)
        self.frames = None if total == inf else int(total)
        self.promised_frames = None
        if promised_seconds < inf:
            self.promised_frames = round(promised_seconds * self.samplerate)
        self._index, self._start = len(layout.parts) - 1, 0  # of the present part; start in frames
        self._failed_at: int | None = None  # frame of the part, where decoding stopped
        if len(layout.parts) > 1:
            self.seek(0)

    def _open(self, part: Part) -> _PartFile:
        """Open a part in place of the present one.

        By descriptor: given a path, libsndfile takes a macOS file ``._name`` beside it for a part
        of the recording, and refuses names that are not UTF-8.
        """
        with _DECODER_LINES.taken():
            if part.pieces:
                self._file = _PartFile(PieceFile(self._stream, part.pieces))
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
            self._open(self._parts[self._index][0])
            self._failed_at = None
        self._is_noted |= frame > self._start
        with _DECODER_LINES.taken():
            self._file.seek(frame - self._start)

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
            block = self._judge(block[: int(min(remaining, len(block)))])
            remaining -= len(block)
            if block.shape[1] != self.channels:  # another part of a joined file
                block = block.mean(axis=1, dtype=np.float32, keepdims=True)
                block = block.repeat(self.channels, axis=1)
            yield block
        if self.n_beyond > MAX_BEYOND_SHARE * self.n_read:
            share, reason = self.n_beyond / self.n_read, f"of its samples are {_BEYOND_REASON}"
            raise AudioError(self.path, f"{share:.0%} {reason}; floats must be from -1 to 1")

    def _next_block(self, n_frames: int) -> np.ndarray | None:
        """Return the next frames ``(frames, channels)``, with channels of their part; None: end."""
        while True:
            if self._failed_at is not None:
                block = self._read_behind_damage(n_frames)
            else:
                start, block = self._file.tell(), np.empty((n_frames, self._file.channels), "<f4")
                with _DECODER_LINES.taken() as lines:
                    try:
                        block = self._file.read(out=block)
                    except soundfile.SoundFileError as error:
                        block = block[: self._file.tell() - start]
                        self._failed_at, self._reason = start + len(block), _decode_reason(error)
                errors = [line for line in lines if b"error:" in line]
                if errors and not self._is_noted:  # after a seek it misses bytes of other frames
                    self._is_noted = True
                    reason = errors[0].split(b"error:")[1].strip(b" !\n").decode(errors="replace")
                    seconds = (self._start + start) / self.samplerate
                    self.problems.append(f"frames after {seconds:.2f} s do not decode ({reason})")
            if len(block):
                return block
            if self._failed_at is None:
                if self._index + 1 == len(self._parts):
                    return None
                self._start = self._end_of_part
                self._index += 1
                self._open(self._parts[self._index][0])

    def _read_behind_damage(self, n_frames: int) -> np.ndarray:
        """Return silence in place of what does not decode, and what follows; empty: nothing does.

        The decoder is opened again further and further on: one that has failed does not seek.
        """
        part, n_part_frames = self._parts[self._index]
        failed_at, self._failed_at = self._failed_at, None
        seconds, n_silent = (self._start + failed_at) / self.samplerate, _FIRST_SKIP
        while n_silent <= _LAST_SKIP and failed_at + n_silent < n_part_frames:
            with _DECODER_LINES.taken():
                try:
                    self._open(part).seek(failed_at + n_silent)
                    block = self._file.read(n_frames, dtype="float32", always_2d=True)
                except soundfile.SoundFileError:
                    block = np.zeros((0, 1), np.float32)
            if len(block):
                text = f"{n_silent / self.samplerate:.2f} s from {seconds:.2f} s on"
                self.problems.append(f"{text} are damaged and read as silence ({self._reason})")
                return np.concatenate([np.zeros((n_silent, block.shape[1]), np.float32), block])
            n_silent *= 2
        self.problems.append(f"{self._reason} at {seconds:.2f} s")
        return np.zeros((0, 1), np.float32)

    def _judge(self, block: np.ndarray) -> np.ndarray:
        """Return frames whose samples are sound: those beyond reason are silent."""
        lowest, highest = block.min(), block.max()
        self.n_read += block.size
        if not (lowest >= -MAX_LEVEL and highest <= MAX_LEVEL):  # NaN too
            is_beyond = ~(np.abs(block) <= MAX_LEVEL)
            if not self.n_beyond:
                frame = (
                    self._start + self._file.tell() - len(block) + is_beyond.any(axis=1).argmax()
                )
                text = f"samples from {frame / self.samplerate:.2f} s on are {_BEYOND_REASON}"
                self.problems.append(f"{text}, and read as silence")
            self.n_beyond += int(is_beyond.sum())
            block[is_beyond] = 0
            lowest, highest = block.min(), block.max()
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        return block

    def report_whole(self, seconds: float) -> None:
        """Log, once, what is wrong with a file of which so much decoded, the whole of it."""
        problems = list(self.problems)
        if self.promised_frames is not None:
            promised = self.promised_frames / self.samplerate
            if is_cut(seconds, promised):
                text = f"decodes only to {seconds:.2f} s of {promised:.2f} s"
                problems.insert(0, f"{text}; truncated or damaged")
        if self.highest - self.lowest <= _MIN_RANGE:
            problems.append(f"holds no sound: all samples are {self.highest:.3g}")
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
        except (soundfile.SoundFileError, TypeError) as error:  # TypeError: .raw needs more
            raise AudioError(path, _decode_reason(error)) from error
        if file.frames == 0:
            raise AudioError(path, _NO_SAMPLES)
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
