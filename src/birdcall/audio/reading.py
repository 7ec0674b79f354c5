"""Read any interval of any sound file as a mono waveform at one sample rate, or tell why not."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import tee, zip_longest
from math import gcd, inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from birdcall.config import require
from birdcall.storage.files import UserError

logger = logging.getLogger(__name__)

# What may be missing of the promised length, seconds plus share, before a recording counts as cut.
# The seconds are what decoders drop at the start of an mp3 (encoder delay, a frame that needs the
# one before it); the share is how far an mp3's first frame can be from the mean of the others.
LENGTH_TOLERANCE = (0.25, 0.01)

# soxr HQ uses fewer than 160 samples of the lower rate on either side (measured: with more, a seek
# differs from the full decode by less than 1e-6).
_MARGIN_SAMPLES = 256
# An mp3 frame can need up to 511 bytes before it, eight frames at 32 kbit/s, and the overlap with
# one more: a seek goes ten frames further back.
_PREROLL_FRAMES = 10 * 1152
_BLOCK_VALUES = 1 << 16  # frames x channels decoded at once; where decoding fails, a block is lost


class AudioError(UserError):
    """A sound file that cannot be decoded as requested; the message begins with its path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both are arguments, so that the error can be pickled
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class AudioInfo(NamedTuple):
    """What the header states (see `AudioFile.promised_frames`), even where the file is cut."""

    sample_rate: int
    channels: int
    frames: int
    seconds: float


def probe_audio(path: Path) -> AudioInfo:
    """Read sample rate, channels and length from the header, which may promise too much."""
    with open_audio(path) as file:
        frames = file.promised_frames
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
        promised = file.promised_frames / file.samplerate
        decoded = tee(file.mono_blocks(), len(sample_rates))
        streams = []
        for blocks, rate in zip(decoded, sample_rates, strict=True):
            resampled = resample_blocks(blocks, file.samplerate, rate)
            streams.append(_rearrange_blocks(resampled, max(1, round(block_seconds * rate))))
        # The lengths at two rates differ by rounding: the last block can be empty at one of them.
        for parts in zip_longest(*streams, fillvalue=np.zeros(0, np.float32)):
            n_samples += len(parts[0])
            yield dict(zip(sample_rates, parts, strict=True))
    if not n_samples:
        raise AudioError(path, "has no samples; empty or damaged")
    seconds = n_samples / sample_rates[0]
    if is_cut(seconds, promised):
        message = "%s: decodes only to %.2f s of %.2f s; truncated or damaged"
        logger.warning(message, path, seconds, promised)


def resampled_length(n_samples: int, from_rate: int, to_rate: int) -> int:
    """Return how many samples soxr makes of ``n_samples``."""
    return (2 * n_samples * to_rate + from_rate) // (2 * from_rate)


def resample_blocks(
    blocks: Iterable[np.ndarray], from_rate: int, to_rate: int
) -> Iterator[np.ndarray]:
    """Resample consecutive blocks as if they were one waveform (soxr HQ)."""
    if from_rate == to_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _rearrange_blocks(blocks: Iterable[np.ndarray], n_block: int) -> Iterator[np.ndarray]:
    """Yield the same samples in blocks of ``n_block``, the last one shorter."""
    waiting: list[np.ndarray] = []
    n_waiting = 0
    for block in blocks:
        waiting.append(block)
        n_waiting += len(block)
        while n_waiting >= n_block:
            joined = np.concatenate(waiting)
            yield joined[:n_block]
            waiting = [joined[n_block:]]
            n_waiting -= n_block
    if n_waiting:
        yield np.concatenate(waiting)


def _read_crop(
    file: AudioFile,
    sample_rate: int,
    offset: float,
    *,
    duration: float | None,
    downmix: float | None,
) -> np.ndarray:
    """Read as `read_audio` does from an open file that is at its beginning."""
    path, rate = Path(file.name), file.samplerate
    total = resampled_length(file.frames, rate, sample_rate)
    start = round(offset * sample_rate)
    n_samples = total - start
    if duration is not None:
        n_samples = round(duration * sample_rate)
        if start + n_samples == total + 1:  # offset and duration were both rounded up
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
    last = min(file.frames, -(-(start + n_samples) * rate // sample_rate) + margin)
    if first:
        file.seek(first)
    blocks = resample_blocks(file.mono_blocks(last - first, downmix), rate, sample_rate)
    crop = np.concatenate([np.zeros(0, np.float32), *blocks])[skip : skip + n_samples]
    if len(crop) < n_samples:  # the file ends earlier, or decoding stops
        ends, promised = (start + len(crop)) / sample_rate, file.promised_frames / rate
        reason = f"decodes only to {ends:.2f} s of {promised:.2f} s"
        reason += "; truncated or damaged" if is_cut(ends, promised) else ""
        if duration is not None or not len(crop):
            raise AudioError(path, reason)
        if is_cut(ends, promised):
            logger.warning("%s: %s", path, reason)
    return crop


def _require_interval(sample_rate: int, offset: float, duration: float | None) -> None:
    require(sample_rate > 0, f"sample_rate is {sample_rate}; it must be above 0")
    require(0 <= offset < inf, f"offset_seconds is {offset}; it must be 0 or more")
    require(duration is None or 0 < duration < inf, f"duration_seconds is {duration}; give above 0")


# --- files ---


class AudioFile(soundfile.SoundFile):
    """A sound file that is read in order from its present position; see `open_audio`."""

    def seekable(self) -> bool:
        """Return False: after every read of a seekable file, python-soundfile seeks.

        mpg123 decodes what follows a seek slightly differently from what it reads in one go.
        """
        return False

    @property
    def promised_frames(self) -> int:
        """The number of frames that the header promises.

        An mp3 states its length only in the Xing, Info or VBRI header that some encoders write to
        its first frame. Without one, libsndfile divides the size of the file by that of the first
        frame and counts tags (a picture, a licence) as audio; here they are subtracted.

        Of 605 real mp3 files this is off the decoded length by at most 0.14 s, libsndfile by
        0.31 s, mutagen 1.48 by 7.7 s: a whole recording would count as cut.
        """
        if self.format != "MP3":
            return self.frames
        path = Path(self.name)
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = 0
            head = stream.read(10)
            if len(head) == 10 and head.startswith(b"ID3"):
                for byte in head[6:]:  # the size of the ID3v2 tag, 7 bits each
                    start = start << 7 | byte & 0x7F
                start += 20 if head[5] & 0x10 else 10  # a header, and with this flag a footer
            stream.seek(start)
            first_frame = stream.read(64)
            if any(first_frame.find(name, 4) > 0 for name in (b"Xing", b"Info", b"VBRI")):
                return self.frames
            stream.seek(max(start, size - 512))
            tail = stream.read()
        end = len(tail)  # of the audio in it: before ID3v1, then Lyrics3 or APEv2
        if end >= 128 and tail[-128:].startswith(b"TAG"):
            end -= 128
        rest = tail[:end]
        if rest.endswith(b"LYRICS200") and rest[-15:-9].isdigit():
            end -= int(rest[-15:-9]) + 15
        elif len(rest) >= 32 and rest[-32:-24] == b"APETAGEX":
            has_header = int.from_bytes(rest[-12:-8], "little") >> 31
            end -= int.from_bytes(rest[-20:-16], "little") + 32 * has_header
        tags = start + len(tail) - end
        return max(1, round(self.frames * (size - tags) / size))

    def frame_blocks(self, n_frames: int | None = None) -> Iterator[np.ndarray]:
        """Yield up to ``n_frames`` as float32 ``(frames, channels)`` until decoding stops."""
        remaining = self.frames if n_frames is None else n_frames
        n_block = max(1, _BLOCK_VALUES // self.channels)
        while remaining > 0:
            try:
                block = self.read(min(remaining, n_block), dtype="float32", always_2d=True)
            except soundfile.SoundFileError as error:
                raise _decode_error(Path(self.name), error) from error
            if not len(block):
                return
            if not np.isfinite(block).all():
                raise AudioError(Path(self.name), "holds samples that are not finite numbers")
            remaining -= len(block)
            yield block

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


@contextmanager
def open_audio(path: Path) -> Iterator[AudioFile]:
    """Open a sound file; every error of libsndfile becomes an AudioError."""
    require_regular_file(path)
    try:
        with AudioFile(path if os.name == "nt" else os.fsencode(path)) as file:  # perhaps no UTF-8
            file._name = str(path)
            if file.frames <= 0:
                raise AudioError(path, "has no samples; empty or damaged")
            yield file
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: .raw needs a description
        raise _decode_error(path, error) from error


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


def _decode_error(path: Path, error: Exception) -> AudioError:
    reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
    if "not a regular file" in reason:  # libsndfile's message for an mp3 without any frame
        reason = "no audio in any known format; not an audio file, or damaged as a whole"
    return AudioError(path, f"cannot be decoded: {reason}")
