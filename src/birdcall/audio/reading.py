"""Read any interval of any sound file as a mono waveform at one sample rate, or tell why not."""

from __future__ import annotations

import ctypes
import hashlib
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import tee, zip_longest
from math import gcd, inf
from pathlib import Path
from typing import NamedTuple

import numpy as np

from birdcall.audio.decoder import NO_SAMPLES, AudioError, AudioFile, is_cut, open_audio
from birdcall.audio.filters import rearrange_blocks, resample_blocks, resampled_length
from birdcall.config import require

# soxr HQ uses fewer than 160 samples of the lower rate on either side (measured: with more, a seek
# differs from the full decode by less than 1e-6).
_MARGIN_SAMPLES = 256
# An mp3 frame can need up to 511 bytes before it, eight frames at 32 kbit/s, and the overlap with
# one more: a seek goes ten frames further back.
_PREROLL_FRAMES = 10 * 1152


class AudioInfo(NamedTuple):
    """What a file holds; one that is cut and compressed: what it promises."""

    sample_rate: int
    channels: int
    frames: int
    seconds: float


def probe_audio(path: Path) -> AudioInfo:
    """Return sample rate, channels and length.

    A file that states no length (a FLAC that was piped) is decoded to measure it.
    """
    with open_audio(path) as file:
        frames = file.promised_frames
        if frames is None:
            frames = sum(map(len, file.frame_blocks()))
        elif file.frames is not None:
            frames = min(frames, file.frames)
        return AudioInfo(file.samplerate, file.channels, frames, frames / file.samplerate)


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
    _require_interval(sample_rate, 0.0, block_seconds)
    blocks = (block[sample_rate] for block in iterate_rates(path, [sample_rate]))
    yield from rearrange_blocks(blocks, max(1, round(block_seconds * sample_rate)))


def iterate_rates(path: Path, sample_rates: Sequence[int]) -> Iterator[dict[int, np.ndarray]]:
    """Yield a whole waveform at each of the sample rates, decoded once, block by block.

    Blocks are as long as decoder and resampler make them, at most 65,536 frames of the file; those
    of two rates begin and end at different times.
    """
    for rate in sample_rates:
        _require_interval(rate, 0.0, None)
    n_samples = 0  # at the first rate
    with open_audio(path) as file:
        decoded = tee(file.mono_blocks(), len(sample_rates))
        streams = [
            resample_blocks(blocks, file.samplerate, rate)
            for blocks, rate in zip(decoded, sample_rates, strict=True)
        ]
        # At the file's own rate there is one block less: nothing is left in a resampler.
        for parts in zip_longest(*streams, fillvalue=np.zeros(0, np.float32)):
            n_samples += len(parts[0])
            yield dict(zip(sample_rates, parts, strict=True))
        if not n_samples:
            raise AudioError(path, file.problems[-1] if file.problems else NO_SAMPLES)
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


# --- memory ---


# Parameters of glibc's mallopt and their values: what is freed at the end of the heap is never
# returned, and only blocks of more than 32 MiB, the most that it accepts, are no part of the heap.
_MALLOPT = {"M_TRIM_THRESHOLD": (-1, -1), "M_MMAP_THRESHOLD": (-3, 32 << 20)}


@cache
def reuse_freed_memory() -> None:
    """Make this process keep the memory of freed arrays, for the next ones, where libc is glibc.

    Else it returns larger blocks to the system, and every page of the next block is a fault: 160
    faults, 0.1 to 0.3 ms, for each array of 5 s of sound, more than most computations on it.
    """
    if platform.libc_ver()[0] == "glibc":
        for parameter, value in _MALLOPT.values():
            ctypes.CDLL(None).mallopt(parameter, value)


# --- sound that files share ---


_ANCHOR_WEIGHTS = np.array([2654435761, 2246822519, 3266489917, 668265263], np.uint32)
_ANCHOR_BITS = 14  # so many samples lie between two anchors: 2 ** 14, three anchors a second
_PART_SAMPLES = 1024
_MIN_RANGE = 16  # of 16-bit steps within a part: digital silence is in many files


def hash_parts(path: Path) -> set[int]:
    """Return hashes of the decoded sound: of all of it, and of parts where the samples choose.

    A cut of a file shares hashes with it, whatever its name, its start and its lossless format.
    They hold within one process. Raises AudioError as `read_audio`.
    """
    hashes: set[int] = set()
    whole = hashlib.blake2b()
    with open_audio(path) as file:
        for block in file.frame_blocks():
            mono = block.mean(axis=1, dtype=np.float32).clip(-1, 1)
            samples = np.rint(mono * 32767).astype("<i2")
            whole.update(samples.tobytes())
            n_anchors = len(samples) - _PART_SAMPLES
            if n_anchors <= 0:
                continue
            mixed = np.zeros(n_anchors, np.uint32)
            for number, weight in enumerate(_ANCHOR_WEIGHTS):
                mixed += samples[number:][:n_anchors].astype(np.uint32) * weight
            mixed ^= mixed >> np.uint32(15)
            mixed *= _ANCHOR_WEIGHTS[1]
            for anchor in np.flatnonzero(mixed >> np.uint32(32 - _ANCHOR_BITS) == 0):
                part = samples[anchor : anchor + _PART_SAMPLES]
                if np.ptp(part.astype(np.int32)) >= _MIN_RANGE:
                    hashes.add(hash(part.tobytes()))
    return hashes | {hash(whole.digest())}
