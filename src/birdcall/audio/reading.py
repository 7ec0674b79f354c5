"""Read any stretch of any sound file as a mono waveform at one sample rate, or say why not."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

log = logging.getLogger(__name__)

# soxr HQ looks at fewer than 160 samples of the lower rate to either side (measured: beyond them
# a seek differs from the full decode by less than 1e-6).
MARGIN_SAMPLES = 256
# An mp3 frame can lean on up to 511 bytes before it, eight frames at 32 kbit/s, and on the overlap
# of one more: a seek goes ten frames further back.
PREROLL_FRAMES = 10 * 1152
BLOCK_VALUES = 1 << 16  # frames x channels decoded at once; where decoding breaks, a block is lost
# What may lack, seconds plus share, of the promised length before a recording counts as cut: the
# seconds are what decoders drop at the start of an mp3 (encoder delay, the frame that leans on one
# before it), the share is how far an mp3's first frame can be from the mean of the others.
LENGTH_TOLERANCE = (0.25, 0.01)


class AudioError(ValueError):
    """A sound file that cannot be decoded as asked; the message starts with its path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (
            self.path,
            self.reason,
        )  # so that worker processes can hand it over


class _Stream(soundfile.SoundFile):
    """A sound file that is read on from where it stands."""

    def seekable(self) -> bool:
        """Say no: to a file that can, python-soundfile adds a seek after every read.

        mpg123 decodes what follows a seek slightly otherwise than what it reads in one go.
        """
        return False


class AudioInfo(NamedTuple):
    """What the header says (see `promised_frames`); damaged files keep the header of the whole."""

    sample_rate: int
    channels: int
    frames: int

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate


def probe_audio(path: Path) -> AudioInfo:
    """Read sample rate, channels and length from the header, which may promise too much."""
    with open_audio(path) as file:
        return AudioInfo(file.samplerate, file.channels, promised_frames(path, file))


def promised_frames(path: Path, file: soundfile.SoundFile) -> int:
    """Say how many frames the header of an open file promises.

    An mp3 states its length only in the Xing, Info or VBRI header that some encoders write to its
    first frame. Without one, libsndfile divides the size of the file by that of the first frame,
    with the tags (a picture, a licence) counted as sound; here they are not.
    """
    if file.format != "MP3":
        return file.frames
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = _leading_tag_bytes(stream.read(10))
        stream.seek(start)
        first_frame = stream.read(64)
        if any(first_frame.find(name, 4) > 0 for name in (b"Xing", b"Info", b"VBRI")):
            return file.frames
        stream.seek(max(start, size - 512))
        tags = start + _trailing_tag_bytes(stream.read())
    return max(1, round(file.frames * (size - tags) / size))


def is_cut(
    seconds: float, promised_seconds: float, tolerance: tuple[float, float] = LENGTH_TOLERANCE
) -> bool:
    """Say whether a recording that decodes to ``seconds`` lacks part of what was promised."""
    constant, share = tolerance
    return promised_seconds - seconds > constant + share * promised_seconds


def read_audio(
    path: Path,
    sample_rate: int,
    offset_seconds: float = 0.0,
    duration_seconds: float | None = None,
    downmix: float | None = None,
) -> np.ndarray:
    """Read a waveform, float32 mono ``(samples,)``, seeking to it and decoding no more than it.

    Channels are averaged, or the first has the share ``downmix`` (0 to 1) and the mean of the
    others the rest; of one channel it changes nothing. A stretch equals the same stretch of the
    whole file read at once: input and output samples coincide at its start, and the filter sees its
    neighbours on both sides.
    With ``duration_seconds`` exactly ``round(duration_seconds * sample_rate)`` samples come back
    or AudioError is raised, as it is for what does not decode. Without it, all that decodes comes
    back, and a warning is logged where the header promised more (see LENGTH_TOLERANCE).
    """
    return read_crops(
        path,
        sample_rate,
        offsets=[offset_seconds],
        duration_seconds=duration_seconds,
        downmix=downmix,
    )[0]


def read_crops(
    path: Path,
    sample_rate: int,
    offsets: Sequence[float],
    duration_seconds: float | None,
    downmix: float | None = None,
) -> list[np.ndarray]:
    """Read as `read_audio` does at each of ``offsets`` (seconds), but open the file once."""
    if downmix is not None and not 0 <= downmix <= 1:
        raise ValueError(f"downmix is {downmix}; it must be between 0 and 1, or None")
    for offset in offsets:
        _require_stretch(sample_rate, offset, duration_seconds)
    crops = []
    with open_audio(path) as file:
        promised = promised_frames(path, file) / file.samplerate
        for number, offset in enumerate(offsets):
            if number:
                file.seek(0)  # where it stood when it was opened
            crops.append(
                _read_stretch(
                    path,
                    file,
                    sample_rate=sample_rate,
                    offset=offset,
                    duration=duration_seconds,
                    promised=promised,
                    downmix=downmix,
                )
            )
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
        _require_stretch(rate, 0.0, block_seconds)
    n_total = n_yielded = 0
    with open_audio(path) as file:
        promised = promised_frames(path, file) / file.samplerate
        blocks = {rate: _Blocks(max(1, round(block_seconds * rate))) for rate in sample_rates}
        resamplers = {rate: _Resampler(file.samplerate, rate) for rate in sample_rates}
        for waveform in mono_blocks(path, file):
            n_total += len(waveform)
            for rate, resample in resamplers.items():
                blocks[rate].add(resample(waveform))
            while all(block.is_full for block in blocks.values()):
                n_yielded += 1
                yield {rate: block.take() for rate, block in blocks.items()}
        for rate, resample in resamplers.items():
            blocks[rate].add(resample.finish())
        while any(block.n_held for block in blocks.values()):
            n_yielded += 1
            yield {rate: block.take() for rate, block in blocks.items()}
        native_rate = file.samplerate
    if not n_yielded:
        raise AudioError(path, "has no samples; empty or damaged")
    if is_cut(n_total / native_rate, promised):
        log.warning(
            "%s: decodes only to %.2f s of %.2f s; truncated or damaged",
            path, n_total / native_rate, promised,
        )  # fmt: skip


class _Blocks:
    """Samples that wait until they are as many as a block has."""

    def __init__(self, n_block: int) -> None:
        self.n_block, self.n_held = n_block, 0
        self.held: list[np.ndarray] = []

    @property
    def is_full(self) -> bool:
        return self.n_held >= self.n_block

    def add(self, waveform: np.ndarray) -> None:
        self.held.append(waveform)
        self.n_held += len(waveform)

    def take(self) -> np.ndarray:
        """Return a block, or what there is of one."""
        joined = np.concatenate([np.zeros(0, np.float32), *self.held])
        self.held = [joined[self.n_block :]]
        self.n_held = len(self.held[0])
        return joined[: self.n_block]


def crop_or_pad(waveform: np.ndarray, n_samples: int, offset: int = 0) -> np.ndarray:
    """Return exactly ``n_samples`` of ``waveform`` from ``offset`` on, zeros after its end."""
    if n_samples < 0 or offset < 0:
        raise ValueError(f"n_samples {n_samples} and offset {offset} must not be negative")
    crop = waveform[..., offset : offset + n_samples]
    missing = n_samples - crop.shape[-1]
    if not missing:
        return crop
    return np.pad(crop, [(0, 0)] * (crop.ndim - 1) + [(0, missing)])


def resampled_length(n_samples: int, from_rate: int, to_rate: int) -> int:
    """Say how many samples soxr makes of ``n_samples``."""
    return (2 * n_samples * to_rate + from_rate) // (2 * from_rate)


@contextmanager
def open_audio(path: Path) -> Iterator[soundfile.SoundFile]:
    """Open a sound file; whatever libsndfile finds wrong with it becomes an AudioError."""
    require_regular_file(path)
    try:
        with _Stream(path) as file:
            if file.frames <= 0:
                raise AudioError(path, "has no samples; empty or damaged")
            yield file
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: .raw needs a description
        raise _decode_error(path, error) from error


def mono_blocks(
    path: Path,
    file: soundfile.SoundFile,
    n_frames: int | None = None,
    downmix: float | None = None,
) -> Iterator[np.ndarray]:
    """Yield up to ``n_frames`` from where ``file`` stands, mono as `read_audio` says, in blocks."""
    for block in frame_blocks(path, file, n_frames):
        if block.shape[1] == 1:
            yield block[:, 0]
        elif downmix is None:
            yield block.mean(axis=1, dtype=np.float32)
        else:
            share = np.float32(downmix)
            yield share * block[:, 0] + (1 - share) * block[:, 1:].mean(axis=1, dtype=np.float32)


def frame_blocks(
    path: Path, file: soundfile.SoundFile, n_frames: int | None = None
) -> Iterator[np.ndarray]:
    """Yield float32 ``(frames, channels)`` at the file's own rate until decoding stops."""
    remaining = file.frames if n_frames is None else n_frames
    n_block = max(1, BLOCK_VALUES // file.channels)
    while remaining > 0:
        try:
            block = file.read(min(remaining, n_block), dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise _decode_error(path, error) from error
        if not len(block):
            return
        if not np.isfinite(block).all():
            raise AudioError(path, "holds samples that are not finite numbers")
        remaining -= len(block)
        yield block


def resample_blocks(
    blocks: Iterator[np.ndarray], from_rate: int, to_rate: int
) -> Iterator[np.ndarray]:
    """Resample consecutive blocks as if they were one waveform (soxr HQ)."""
    resample = _Resampler(from_rate, to_rate)
    for block in blocks:
        yield resample(block)
    yield resample.finish()


class _Resampler:
    """Resamples a waveform that comes in blocks."""

    def __init__(self, from_rate: int, to_rate: int) -> None:
        self.stream = None
        if from_rate != to_rate:
            self.stream = soxr.ResampleStream(from_rate, to_rate, 1, dtype="float32", quality="HQ")

    def __call__(self, block: np.ndarray) -> np.ndarray:
        return block if self.stream is None else self.stream.resample_chunk(block)

    def finish(self) -> np.ndarray:
        """Return what the filter still holds."""
        nothing = np.zeros(0, np.float32)
        return nothing if self.stream is None else self.stream.resample_chunk(nothing, last=True)


def _read_stretch(
    path: Path,
    file: soundfile.SoundFile,
    sample_rate: int,
    offset: float,
    duration: float | None,
    promised: float,
    downmix: float | None,
) -> np.ndarray:
    """Read one stretch of a file that stands at its start and promises so many seconds."""
    start = round(offset * sample_rate)
    total = resampled_length(file.frames, file.samplerate, sample_rate)
    n_samples = total - start
    if duration is not None:
        n_samples = round(duration * sample_rate)
        if start + n_samples == total + 1:  # offset and duration were both rounded up
            start = max(0, start - 1)
    if start + n_samples > total or n_samples <= 0:
        asked = "its end" if duration is None else f"{duration:g} s"
        has = f"{total / sample_rate:g} s"
        raise AudioError(path, f"asked for {asked} from {offset:g} s, has {has}")
    waveform = _read_samples(
        path, file, sample_rate=sample_rate, start=start, stop=start + n_samples, downmix=downmix
    )
    if len(waveform) < n_samples:
        ends = (start + len(waveform)) / sample_rate
        reason = f"decodes only to {ends:.2f} s of {promised:.2f} s"
        reason += "; truncated or damaged" if is_cut(ends, promised) else ""
        if duration is not None or not len(waveform):
            raise AudioError(path, reason)
        if is_cut(ends, promised):
            log.warning("%s: %s", path, reason)
    return waveform


def _read_samples(
    path: Path,
    file: soundfile.SoundFile,
    sample_rate: int,
    start: int,
    stop: int,
    downmix: float | None,
) -> np.ndarray:
    """Read output samples ``start`` to ``stop`` with the neighbours that the filter needs."""
    rate = file.samplerate
    divisor = gcd(rate, sample_rate)
    in_step, out_step = rate // divisor, sample_rate // divisor
    margin = MARGIN_SAMPLES * max(1, -(-rate // sample_rate)) if rate != sample_rate else 0
    # The read starts where an input and an output sample fall on the same instant.
    step = max(0, (start * rate // sample_rate - max(margin, PREROLL_FRAMES)) // in_step)
    first, skip = step * in_step, start - step * out_step
    last = min(file.frames, -(-stop * rate // sample_rate) + margin)
    if first:
        file.seek(first)
    blocks = mono_blocks(path, file, last - first, downmix)
    waveform = np.concatenate(
        [np.zeros(0, np.float32), *resample_blocks(blocks, rate, sample_rate)]
    )
    return waveform[skip : skip + stop - start]


def _leading_tag_bytes(head: bytes) -> int:
    """Return the length of the ID3v2 tag that starts with these ten bytes, 0 where it is none."""
    if len(head) < 10 or not head.startswith(b"ID3"):
        return 0
    size = 0
    for byte in head[6:10]:  # 7 bits each
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if head[5] & 0x10 else 0)


def _trailing_tag_bytes(tail: bytes) -> int:
    """Return the length of the tags (ID3v1, Lyrics3, APEv2) that the end of a file tells of."""
    n_bytes = 128 if tail[-128:].startswith(b"TAG") and len(tail) >= 128 else 0
    rest = tail[: len(tail) - n_bytes]
    if rest.endswith(b"LYRICS200") and rest[-15:-9].isdigit():
        n_bytes += int(rest[-15:-9]) + 15
    elif len(rest) >= 32 and rest[-32:-24] == b"APETAGEX":
        has_header = int.from_bytes(rest[-12:-8], "little") >> 31
        n_bytes += int.from_bytes(rest[-20:-16], "little") + 32 * has_header
    return n_bytes


def _decode_error(path: Path, error: Exception) -> AudioError:
    reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
    if "not a regular file" in reason:  # what libsndfile says of an mp3 without any frame
        reason = "no sound in any known format; not an audio file, or wholly damaged"
    return AudioError(path, f"cannot be decoded: {reason}")


def _require_stretch(sample_rate: int, offset: float, duration: float | None) -> None:
    if sample_rate <= 0:
        raise ValueError(f"sample_rate is {sample_rate}; it must be above 0")
    if not (0 <= offset < float("inf")):
        raise ValueError(f"offset_seconds is {offset}; it must be 0 or more")
    if duration is not None and not (0 < duration < float("inf")):
        raise ValueError(f"duration_seconds is {duration}; it must be above 0, or None")


def require_regular_file(path: Path) -> None:
    """Raise FileNotFoundError or AudioError before libsndfile says "System error" about it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (
        OSError,
        ValueError,
    ) as error:  # a loop of links, no permission, a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AudioError(path, f"cannot be opened: {reason}") from error
    if not stat.S_ISREG(mode):  # a pipe would wait for ever
        raise AudioError(path, "is not a regular file")
