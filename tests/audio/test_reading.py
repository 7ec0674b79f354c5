"""Any interval of any audio file is read as it is, or refused with its path."""

import errno
import io
import logging
import os
import platform
import struct
import subprocess
import sys
import time
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import soxr

from birdcall.audio.decoder import AudioFile
from birdcall.audio.filters import crop_or_pad
from birdcall.audio.reading import (
    AudioError,
    hash_parts,
    iterate_audio,
    probe_audio,
    read_audio,
    read_crops,
    resampled_length,
)

RATE = 32_000
# Kinds of file: suffix, sampling rate, channels.
KINDS = [
    ("mp3", 44_100, 2),
    ("mp3", 48_000, 1),
    ("mp3", 22_050, 1),
    ("ogg", 44_100, 1),
    ("flac", 96_000, 8),
    ("wav", 44_101, 1),  # has no common divisor with 32 kHz
    ("wav", 8_000, 1),
    ("wav", 32_000, 2),
]


def write_audio(path: Path, waveform: np.ndarray, sample_rate: int) -> Path:
    """Write second by second: libsndfile crashes on long ogg at once."""
    channels = 1 if waveform.ndim == 1 else waveform.shape[1]
    with soundfile.SoundFile(path, "w", sample_rate, channels) as file:
        for start in range(0, len(waveform), sample_rate):
            file.write(waveform[start : start + sample_rate])
    return path


def write_noise(path: Path, sample_rate: int, channels: int, seconds: float = 12.3) -> Path:
    """Write white noise, of which LAME makes some mp3 frames that do not decode alone."""
    shape = (round(seconds * sample_rate), channels)
    waveform = np.random.default_rng(0).normal(0, 0.2, shape).clip(-1, 1)
    return write_audio(path, waveform, sample_rate)


@pytest.fixture(scope="module")
def mp3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noise(tmp_path_factory.mktemp("audio") / "noise.mp3", 44_100, 2)


@pytest.mark.parametrize("suffix, sample_rate, channels", KINDS)
def test_a_seek_equals_the_same_interval_of_the_full_decode(
    tmp_path: Path, suffix: str, sample_rate: int, channels: int
) -> None:
    path = write_noise(tmp_path / f"noise.{suffix}", sample_rate, channels)
    full = read_audio(path, RATE)
    for offset, duration in [(0, 5), (0.3, 5), (1.23456, 5), (7.3, 5), (7, 0.01), (0, 12.3)]:
        clip = read_audio(path, RATE, offset, duration)
        start = round(offset * RATE)
        assert len(clip) == round(duration * RATE)
        np.testing.assert_allclose(clip, full[start : start + len(clip)], atol=1e-4)
    rest = read_audio(path, RATE, 3.21)
    np.testing.assert_allclose(rest, full[round(3.21 * RATE) :], atol=1e-4)


def test_a_seek_in_an_mp3_of_low_bit_rate_finds_what_its_frames_need(tmp_path: Path) -> None:
    seconds = np.arange(20 * 16_000) / 16_000
    sweep = 0.5 * np.sin(2 * np.pi * (500 * seconds + 150 * seconds**2))
    path = tmp_path / "low.mp3"
    lowest = {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.99}
    soundfile.write(path, sweep, 16_000, **lowest)
    assert path.stat().st_size < 20 * 10_000 / 8  # 8 kbit/s: frames need several before them
    full = read_audio(path, RATE)
    offsets = np.random.default_rng(0).uniform(1, 14, 60)
    for offset, crop in zip(offsets, read_crops(path, RATE, offsets, 5), strict=True):
        start = round(offset * RATE)
        np.testing.assert_allclose(crop, full[start : start + len(crop)], atol=1e-4)
        np.testing.assert_allclose(crop, read_audio(path, RATE, offset, 5), atol=1e-6)


@pytest.mark.parametrize("suffix, sample_rate, channels", KINDS)
def test_blocks_joined_equal_the_full_read(
    tmp_path: Path, suffix: str, sample_rate: int, channels: int
) -> None:
    path = write_noise(tmp_path / f"noise.{suffix}", sample_rate, channels, 3.3)
    blocks = list(iterate_audio(path, RATE, block_seconds=0.77))
    assert {len(block) for block in blocks[:-1]} == {round(0.77 * RATE)}
    np.testing.assert_array_equal(np.concatenate(blocks), read_audio(path, RATE))


def test_a_full_read_equals_librosa(mp3: Path) -> None:
    expected, _ = librosa.load(mp3, sr=RATE, res_type="soxr_hq")
    waveform = read_audio(mp3, RATE)
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, expected[: len(waveform)], atol=1e-5)
    assert abs(len(waveform) - len(expected)) <= 1


@pytest.mark.parametrize("sample_rate", [8_000, 44_100, 48_000, 192_000])
def test_a_tone_stays_where_it_is_through_resampling(tmp_path: Path, sample_rate: int) -> None:
    times = np.arange(2 * sample_rate) / sample_rate
    tone = write_audio(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1000 * times), sample_rate)
    waveform = read_audio(tone, RATE)
    assert len(waveform) == 2 * RATE
    assert np.abs(np.fft.rfft(waveform)).argmax() == 2000  # bins of half a hertz


@pytest.mark.parametrize("downmix", [0.0, 0.25, 1.0])
def test_the_first_channel_has_the_share_that_was_asked_for(tmp_path: Path, downmix: float) -> None:
    channels = np.random.default_rng(0).uniform(-0.9, 0.9, (3 * RATE, 2)).astype(np.float32)
    path = tmp_path / "a.wav"
    soundfile.write(path, channels, RATE, subtype="FLOAT")
    expected = downmix * channels[:, 0] + (1 - downmix) * channels[:, 1]
    np.testing.assert_allclose(read_audio(path, RATE, downmix=downmix), expected, atol=1e-6)
    for offset, crop in zip(
        (0.5, 1.0), read_crops(path, RATE, [0.5, 1.0], 2, downmix), strict=True
    ):
        start = round(offset * RATE)
        np.testing.assert_allclose(crop, expected[start : start + 2 * RATE], atol=1e-6)
    resampled = read_audio(path, 16_000, offset_seconds=1.0, duration_seconds=1.0, downmix=downmix)
    np.testing.assert_allclose(
        resampled, soxr.resample(expected, RATE, 16_000)[16_000:32_000], atol=1e-4
    )


def test_of_more_channels_the_others_share_the_rest_and_mono_stays(tmp_path: Path) -> None:
    channels = np.random.default_rng(0).uniform(-0.9, 0.9, (RATE, 4)).astype(np.float32)
    path = tmp_path / "a.wav"
    soundfile.write(path, channels, RATE, subtype="FLOAT")
    expected = 0.4 * channels[:, 0] + 0.2 * channels[:, 1:].sum(axis=1)
    np.testing.assert_allclose(read_audio(path, RATE, downmix=0.4), expected, atol=1e-6)
    soundfile.write(path, channels[:, 0], RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(path, RATE, downmix=0.4), channels[:, 0])
    with pytest.raises(ValueError, match=r"downmix .*1\.5"):
        read_audio(path, RATE, downmix=1.5)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = np.random.default_rng(0).uniform(-1, 1, RATE).astype(np.float32)
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([left, np.zeros(RATE)], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path, RATE), left / 2, atol=1e-7)


def test_a_interval_that_ends_with_the_file_can_be_asked_for_in_rounded_seconds(
    tmp_path: Path,
) -> None:
    path = write_noise(tmp_path / "a.wav", RATE, 1, 2.0)
    half_a_sample = 0.5 / RATE
    offset, duration = 1 + 1.2 * half_a_sample, 1 - 0.8 * half_a_sample
    assert round(offset * RATE) + round(duration * RATE) == 2 * RATE + 1
    assert len(read_audio(path, RATE, offset, duration)) == RATE


def test_the_header_is_read_without_decoding(mp3: Path) -> None:
    info = probe_audio(mp3)
    assert (info.sample_rate, info.channels) == (44_100, 2)
    assert info.seconds == pytest.approx(12.3, abs=0.1)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "cannot be decoded"),
        (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>" * 99, "cannot be decoded"),
        (np.random.default_rng(0).bytes(50_000), "cannot be decoded"),
    ],
    ids=["empty", "html", "garbage"],
)
@pytest.mark.parametrize("suffix", ["mp3", "wav", "ogg", "raw"])
def test_what_is_no_audio_raises_with_its_path(
    tmp_path: Path, content: bytes, reason: str, suffix: str
) -> None:
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    for read in (
        lambda: read_audio(path, RATE),
        lambda: read_audio(path, RATE, 1.0, 5.0),
        lambda: list(iterate_audio(path, RATE)),
        lambda: probe_audio(path),
    ):
        with pytest.raises(AudioError, match=reason) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_a_truncated_mp3_raises_although_its_header_promises_all(
    tmp_path: Path, mp3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "truncated.mp3"
    path.write_bytes(mp3.read_bytes()[: mp3.stat().st_size // 3])
    assert probe_audio(path).frames == probe_audio(mp3).frames
    with pytest.raises(AudioError, match=r"truncated\.mp3: decodes only to"):
        read_audio(path, RATE, 0, 12)
    with pytest.raises(AudioError, match="truncated or damaged"):
        read_audio(path, RATE, 9, 2)
    np.testing.assert_allclose(  # what is there is still read
        read_audio(path, RATE, 1, 2), read_audio(mp3, RATE, 1, 2), atol=1e-4
    )
    with caplog.at_level(logging.WARNING):
        waveform = read_audio(path, RATE)
        blocks = list(iterate_audio(path, RATE, 1))
    assert len(waveform) == sum(map(len, blocks)) == pytest.approx(4.1 * RATE, abs=RATE / 10)
    assert [str(path) in message for message in caplog.messages] == [True]  # once for both


@pytest.fixture(scope="module")
def chirps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve seconds of chirps, loud at first and quiet later, in several formats."""
    folder = tmp_path_factory.mktemp("chirps")
    seconds = np.arange(12 * RATE) / RATE
    waveform = 0.3 * np.sin(2 * np.pi * (2000 + 300 * (seconds % 1)) * seconds)
    waveform[6 * RATE :] *= 0.01
    return {
        suffix: write_audio(folder / f"chirps.{suffix}", waveform, RATE)
        for suffix in ("mp3", "flac", "ogg", "wav", "aiff", "caf", "au")
    }


def overwrite(path: Path, content: bytes, share: float, n_bytes: int) -> Path:
    damaged = bytearray(content)
    start = int(share * len(content))
    damaged[start : start + n_bytes] = np.random.default_rng(0).bytes(n_bytes)
    path.write_bytes(damaged)
    return path


@pytest.mark.parametrize("n_bytes", [300, 4_000])
@pytest.mark.parametrize("suffix", ["mp3", "flac"])
def test_what_is_before_and_behind_damage_is_read_at_its_time(
    tmp_path: Path,
    chirps: dict[str, Path],
    suffix: str,
    n_bytes: int,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = chirps[suffix]
    path = overwrite(tmp_path / f"damaged.{suffix}", whole.read_bytes(), 0.2, n_bytes)
    expected, waveform = read_audio(whole, RATE), read_audio(path, RATE)
    blocks = np.concatenate(list(iterate_audio(path, RATE, 1)))
    assert len(waveform) == pytest.approx(len(expected), abs=0.1 * RATE)
    np.testing.assert_array_equal(blocks, waveform)
    is_same = np.isclose(waveform, expected[: len(waveform)], atol=1e-3)
    assert is_same[: int(0.9 * RATE)].all()
    assert is_same[6 * RATE : int(11.5 * RATE)].all()
    assert (~is_same).sum() < 2.5 * RATE
    np.testing.assert_allclose(
        read_audio(path, RATE, 7, 4), waveform[7 * RATE : 11 * RATE], atol=1e-3
    )
    assert [str(path) in message for message in caplog.messages] == [True]
    assert "mpg123" not in capfd.readouterr().err  # nor any other line of a decoder


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_what_follows_a_damaged_page_of_an_ogg_is_read_at_its_time(
    tmp_path: Path, subtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    rate = 48_000
    waveform = np.random.default_rng(0).normal(0, 0.2, 12 * rate)
    whole = tmp_path / "whole.ogg"
    with soundfile.SoundFile(whole, "w", rate, 1, subtype) as file:
        for second in waveform.reshape(12, rate):
            file.write(second)
    path = overwrite(tmp_path / "damaged.ogg", whole.read_bytes(), 0.3, 20)
    expected, damaged = read_audio(whole, RATE), read_audio(path, RATE)
    assert len(damaged) == pytest.approx(len(expected), abs=RATE / 100)
    assert probe_audio(path).seconds == pytest.approx(12, abs=0.01)
    is_silent = damaged == 0
    assert 0.1 * RATE < is_silent.sum() < 3 * RATE
    first, last = np.flatnonzero(is_silent)[[0, -1]]
    assert 2 * RATE < first < 4 * RATE
    for part in (slice(0, first - RATE // 10), slice(last + RATE // 5, 11 * RATE)):
        np.testing.assert_allclose(damaged[part], expected[part], atol=0.02)
    for start in (RATE, 8 * RATE):
        crop = read_audio(path, RATE, start / RATE, 2)
        np.testing.assert_allclose(crop, damaged[start : start + 2 * RATE], atol=1e-3)
    assert [str(path) in message for message in caplog.messages] == [True]


def test_of_a_flac_that_is_damaged_in_many_places_only_the_damaged_frames_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_noise(tmp_path / "whole.flac", RATE, 1)
    content = bytearray(whole.read_bytes())
    n_damaged = len(range(20_000, len(content) - 20_000, 30_000))
    for position in range(20_000, len(content) - 20_000, 30_000):
        content[position] ^= 0x40
    path = tmp_path / "damaged.flac"
    path.write_bytes(content)
    expected, waveform = read_audio(whole, RATE), read_audio(path, RATE)
    assert len(waveform) == len(expected)
    is_lost = waveform != expected
    assert is_lost.sum() <= n_damaged * 4096
    assert not waveform[is_lost].any()
    np.testing.assert_array_equal(read_audio(path, RATE, 5, 3), waveform[5 * RATE : 8 * RATE])
    (message,) = caplog.messages
    assert str(path) in message and len(message) < 1000


def test_a_damaged_frame_is_named_by_us_and_not_by_the_decoder(
    tmp_path: Path,
    chirps: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = bytearray(chirps["mp3"].read_bytes())
    frame = content.find(content[:2], len(content) // 5)
    content[frame + 4 : frame + 30] = b"\x55" * 26  # side information; all headers are whole
    path = tmp_path / "damaged.mp3"
    path.write_bytes(content)
    os.write(2, b"something else\n")
    read_audio(path, RATE)
    list(iterate_audio(path, RATE))
    assert capfd.readouterr().err == "something else\n"
    assert [str(path) in message for message in caplog.messages] == [True]


def without_length(mp3: bytes) -> bytes:
    """Cut off the first frame, the Xing or Info header."""
    assert {b"Xing", b"Info"} & {mp3[36:40], mp3[21:25], mp3[13:17]}
    return mp3[mp3.find(mp3[:2], 4) :]


def put_sizes(wav: bytes, riff: int, data: int) -> bytes:
    at = wav.find(b"data")
    sizes = riff.to_bytes(4, "little"), data.to_bytes(4, "little")
    return wav[:4] + sizes[0] + wav[8 : at + 4] + sizes[1] + wav[at + 8 :]


def put_number(content: bytes, name: bytes, offset: int, number: int, n_bytes: int = 4) -> bytes:
    """Replace a big-endian number that is so many bytes behind the first byte of a name."""
    at = content.find(name) + offset
    return content[:at] + number.to_bytes(n_bytes, "big") + content[at + n_bytes :]


def promising_too_little(kind: str, chirps: dict[str, Path]) -> tuple[bytes, int]:
    """Make a file whose header states a shorter length than it has, and the number of its parts."""
    content = {suffix: path.read_bytes() for suffix, path in chirps.items()}
    match kind:
        case "joined.mp3" | "joined.flac" | "joined.ogg" | "joined.wav":
            return 3 * content[kind.rpartition(".")[2]], 3
        case "no length.mp3":  # its first frame is larger than most
            return without_length(content["mp3"]), 1
        case "wrapped.wav":
            return put_sizes(content["wav"], 100_036, 100_000), 1
        case "never closed.wav":
            return put_sizes(content["wav"], 0, 0), 1
        case "never closed.rf64.wav":
            sizes = b"ds64" + (28).to_bytes(4, "little") + bytes(28)
            wav = put_sizes(content["wav"], 0xFFFFFFFF, 0xFFFFFFFF)
            return b"RF64" + wav[4:12] + sizes + wav[12:], 1
        case "wrapped.aiff":
            return put_number(content["aiff"], b"SSND", 4, 1000), 1
        case "wrapped.au":
            return put_number(content["au"], b".snd", 8, 1000), 1
        case "never closed.au":
            return put_number(content["au"], b".snd", 8, 0), 1
        case "wrapped.caf":
            return put_number(content["caf"], b"data", 8, 1000), 1
        case "never closed.caf":
            return put_number(content["caf"], b"data", 4, 0xFFFFFFFF_FFFFFFFF, 8), 1
        case "short.flac":  # the lowest 32 bits of the number of samples
            return put_number(content["flac"], b"fLaC", 22, RATE), 1
        case "vbri.mp3":
            mp3 = content["mp3"]
            frame = mp3[:4].ljust(mp3.find(mp3[:2], 4), b"\0")
            numbers = struct.pack(">4sHHHII", b"VBRI", 1, 0, 75, len(mp3), 12 * RATE // 1152)
            return frame[:36] + numbers + frame[54:] + without_length(mp3), 1


@pytest.mark.parametrize(
    "kind",
    [
        *("joined.mp3", "joined.flac", "joined.ogg", "joined.wav"),
        *("no length.mp3", "wrapped.wav", "never closed.wav", "never closed.rf64.wav"),
        *("wrapped.aiff", "wrapped.au", "never closed.au", "wrapped.caf", "never closed.caf"),
        *("short.flac", "vbri.mp3"),
    ],
)
def test_a_file_longer_than_its_header_says_is_read_to_its_end(
    tmp_path: Path, chirps: dict[str, Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, n_parts = promising_too_little(kind, chirps)
    path = tmp_path / kind
    path.write_bytes(content)
    expected = np.tile(read_audio(chirps[kind.rpartition(".")[2]], RATE), n_parts)
    waveform = read_audio(path, RATE)
    # Without its first frame an mp3 has the encoder's delay at the start.
    assert len(waveform) == pytest.approx(len(expected), abs=3 * 1152)
    if n_parts > 1 or "mp3" not in kind:
        np.testing.assert_allclose(waveform, expected, atol=1e-4)
    np.testing.assert_array_equal(np.concatenate(list(iterate_audio(path, RATE, 1))), waveform)
    assert probe_audio(path).seconds == pytest.approx(len(waveform) / RATE, abs=0.05)
    start = len(waveform) - 4 * RATE
    crop = read_audio(path, RATE, start / RATE, 2)
    np.testing.assert_allclose(crop, waveform[start : start + 2 * RATE], atol=1e-4)
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["flac", "mp3"])
def test_a_file_that_promises_absurdly_much_is_as_long_as_it_is(
    tmp_path: Path, chirps: dict[str, Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = chirps[kind].read_bytes()
    if kind == "mp3":
        name = b"Xing" if b"Xing" in content[:40] else b"Info"
        content = put_number(content, name, 8, 0xFFFFFFFF)
    else:
        content = content[:21] + bytes([content[21] | 15]) + b"\xff" * 4 + content[26:]
    path = tmp_path / f"absurd.{kind}"
    path.write_bytes(content)
    assert probe_audio(path).seconds == pytest.approx(12, abs=0.05)
    assert len(read_audio(path, RATE)) == pytest.approx(12 * RATE, abs=1152)
    assert not caplog.messages


@pytest.mark.parametrize("suffix", ["wav", "aiff", "caf", "au", "ogg"])
def test_a_file_that_ends_too_early_is_named_in_every_format(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    subtype = {"wav": "ALAW"}.get(suffix)
    whole = tmp_path / f"whole.{suffix}"
    with soundfile.SoundFile(whole, "w", RATE, 1, subtype) as file:
        for _ in range(6):
            file.write(np.random.default_rng(0).normal(0, 0.1, RATE))
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    waveform = read_audio(path, RATE)
    assert 2 * RATE < len(waveform) < 3.2 * RATE
    assert probe_audio(path).seconds == pytest.approx(len(waveform) / RATE, abs=0.1)
    assert [str(path) in message for message in caplog.messages] == [True]


def test_behind_a_joined_file_that_is_cut_the_next_is_at_its_promised_time(
    tmp_path: Path, chirps: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    content, expected = chirps["flac"].read_bytes(), read_audio(chirps["flac"], RATE)
    path = tmp_path / "joined.flac"
    path.write_bytes(content[: len(content) // 4] + content)
    waveform = read_audio(path, RATE)
    np.testing.assert_array_equal(waveform[12 * RATE :], expected)
    for start in (RATE, 9 * RATE, 11 * RATE, 15 * RATE):
        crop = read_audio(path, RATE, start / RATE, 2)
        np.testing.assert_allclose(crop, waveform[start : start + 2 * RATE], atol=1e-6)
    assert {str(path) in message for message in caplog.messages} == {True}


def test_joined_mp3_without_a_stated_length_are_sought_as_they_are_read(tmp_path: Path) -> None:
    content = b""
    for channels in (1, 2, 1):
        path = tmp_path / f"{channels}.mp3"
        noise = np.random.default_rng(0).normal(0, 0.2, (4 * 44_100, channels))
        options = {"bitrate_mode": "CONSTANT", "compression_level": 0.7}
        soundfile.write(path, noise, 44_100, **options)
        content += without_length(path.read_bytes())
    path = tmp_path / "joined.mp3"
    path.write_bytes(content)
    waveform = read_audio(path, RATE)
    assert len(waveform) == pytest.approx(12 * RATE, abs=6 * 1152)
    for start in (5 * RATE, 9 * RATE):
        crop = read_audio(path, RATE, start / RATE, 2)
        np.testing.assert_allclose(crop, waveform[start : start + 2 * RATE], atol=1e-3)


def id3_tag(length: int, stated: int) -> bytes:
    sizes = [stated >> shift & 0x7F for shift in (21, 14, 7, 0)]
    return b"ID3\4\0\x10" + bytes(sizes) + bytes(length) + b"3DI\4\0\x10" + bytes(sizes)


@pytest.mark.parametrize("suffix", ["mp3", "flac", "ogg", "wav"])
@pytest.mark.parametrize(
    "before",
    [id3_tag(3000, 3000), id3_tag(300, 9_999_999), b"HTTP/1.1 200 OK\r\n\r\n", bytes(30_000)],
    ids=["tag", "tag of a wrong length", "text", "zeros"],
)
def test_audio_begins_behind_what_is_no_audio(
    tmp_path: Path, chirps: dict[str, Path], suffix: str, before: bytes
) -> None:
    path = tmp_path / f"behind.{suffix}"
    path.write_bytes(before + chirps[suffix].read_bytes())
    np.testing.assert_array_equal(read_audio(path, RATE), read_audio(chirps[suffix], RATE))


def test_a_tag_behind_a_flac_is_no_damage(
    tmp_path: Path, chirps: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tagged.flac"
    path.write_bytes(chirps["flac"].read_bytes() + b"TAG".ljust(128, b"x"))
    waveform = np.concatenate(list(iterate_audio(path, RATE)))
    np.testing.assert_array_equal(waveform, read_audio(chirps["flac"], RATE))
    assert not caplog.messages


def ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = value << 1 ^ (0x1_04C1_1DB7 if value >> 31 else 0)
    return value


@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "without a page"])
def test_a_flac_within_an_ogg_is_read(tmp_path: Path, is_damaged: bool) -> None:
    flac = write_noise(tmp_path / "a.flac", RATE, 1, 1.0)
    content, expected = flac.read_bytes(), read_audio(flac, RATE)
    contents = [b"\x7fFLAC\1\0\0\0" + content[:42]]
    contents += [content[start : start + 8_000] for start in range(42, len(content), 8_000)]
    pages = []
    for number, payload in enumerate(contents):
        lengths = bytes([255] * (len(payload) // 255) + [len(payload) % 255])
        flags = 2 * (number == 0) + 4 * (number == len(contents) - 1)
        head = struct.pack(
            "<5sBqIIIB", b"OggS\0", flags, min(number, 1), 7, number, 0, len(lengths)
        )
        page = head + lengths + payload
        pages.append(page[:22] + struct.pack("<I", ogg_checksum(page)) + page[26:])
    if is_damaged:
        del pages[len(pages) // 2]
    path = tmp_path / "a.oga"
    path.write_bytes(b"".join(pages))
    waveform = read_audio(path, RATE)
    assert len(waveform) == len(expected)
    is_lost = waveform != expected
    assert is_lost.sum() <= 3 * 4096 * is_damaged
    assert not waveform[is_lost].any()


def test_a_coding_that_cannot_be_sought_is_read_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "gsm.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 8_000 * 9), 8_000, "GSM610")
    waveform = read_audio(path, 8_000)
    assert len(waveform) == pytest.approx(9 * 8_000, abs=320)
    np.testing.assert_array_equal(read_audio(path, 8_000, 7, 1), waveform[56_000:64_000])


@pytest.mark.parametrize("rate", [1, 0x7FFFFFFF])
def test_a_sample_rate_that_no_recorder_has_is_damage(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "rate.wav"
    soundfile.write(path, np.zeros(RATE), RATE)
    wav = path.read_bytes()
    path.write_bytes(wav[:24] + rate.to_bytes(4, "little") + wav[28:])
    for read in (read_audio, lambda *_: probe_audio(path)):
        with pytest.raises(AudioError, match=rf"rate\.wav: .* {rate} Hz"):
            read(path, RATE)


def test_what_follows_a_part_of_unknown_length_is_named_by_its_number(
    tmp_path: Path, chirps: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    content = bytearray(chirps["flac"].read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    other = write_noise(tmp_path / "other.flac", 44_100, 1, 1.0)
    path = tmp_path / "joined.flac"
    path.write_bytes(2 * content + other.read_bytes())
    waveform = read_audio(path, RATE)
    assert len(waveform) == 24 * RATE
    crop = read_audio(path, RATE, 15, 2)
    np.testing.assert_allclose(crop, waveform[15 * RATE : 17 * RATE], atol=1e-6)
    (message,) = caplog.messages
    assert str(path) in message and "part 3" in message and "inf" not in message


def test_a_disk_that_fails_while_parts_are_read_is_named_in_one_line(
    tmp_path: Path, chirps: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "joined.flac"
    path.write_bytes(2 * chirps["flac"].read_bytes())

    class FailingFile(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            if self.tell() > path.stat().st_size // 4:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    with FailingFile(path) as stream:
        file = AudioFile(path, stream)
        assert 3 * RATE < sum(map(len, file.frame_blocks(12 * RATE))) < 9 * RATE
    assert any(os.strerror(errno.EIO) in problem for problem in file.problems)
    assert not capfd.readouterr().err


def test_a_joined_file_of_two_sample_rates_is_said_to_be_cut(
    tmp_path: Path, chirps: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = write_noise(tmp_path / "other.mp3", 44_100, 1, 5.0)
    path = tmp_path / "joined.mp3"
    path.write_bytes(chirps["mp3"].read_bytes() + other.read_bytes())
    assert len(read_audio(path, RATE)) == 12 * RATE
    (message,) = caplog.messages
    assert str(path) in message and "12.00 s of 17.00 s" in message


def test_a_file_that_states_no_length_is_read_and_measured(
    tmp_path: Path, chirps: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    content = bytearray(chirps["flac"].read_bytes())
    content[21] &= 0xF0  # the number of samples in the header of a FLAC that was piped
    content[22:26] = bytes(4)
    path = tmp_path / "piped.flac"
    path.write_bytes(content)
    expected = read_audio(chirps["flac"], RATE)
    assert probe_audio(path).seconds == 12
    np.testing.assert_array_equal(read_audio(path, RATE), expected)
    np.testing.assert_array_equal(np.concatenate(list(iterate_audio(path, RATE))), expected)
    np.testing.assert_allclose(
        read_audio(path, RATE, 7, 4), expected[7 * RATE : 11 * RATE], atol=1e-6
    )
    np.testing.assert_allclose(read_audio(path, RATE, 9), expected[9 * RATE :], atol=1e-6)
    with pytest.raises(AudioError, match=r"piped\.flac"):
        read_audio(path, RATE, 10, 5)
    assert not caplog.messages


def test_a_file_is_read_whatever_lies_beside_it(tmp_path: Path, mp3: Path) -> None:
    path = tmp_path / "noise.mp3"
    path.write_bytes(mp3.read_bytes())
    apple_double = bytes.fromhex("0005160700020000") + b"Mac OS X        "
    (tmp_path / "._noise.mp3").write_bytes(apple_double.ljust(4096, b"\0"))
    np.testing.assert_array_equal(read_audio(path, RATE, 3, 2), read_audio(mp3, RATE, 3, 2))
    latin = Path(os.fsdecode(bytes(tmp_path) + b"/gr\xfcn.mp3"))
    path.rename(latin)
    assert len(read_audio(latin, RATE, 3, 2)) == 2 * RATE


def test_samples_beyond_reason_are_silent_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    waveform = np.random.default_rng(0).normal(0, 0.1, 12 * RATE).astype(np.float32)
    damaged = waveform.copy()
    damaged[7 * RATE : 7 * RATE + 4] = (3e29, -1e18, np.nan, 200)
    path = tmp_path / "damaged.wav"
    soundfile.write(path, damaged, RATE, subtype="FLOAT")
    waveform[7 * RATE : 7 * RATE + 4] = 0
    np.testing.assert_array_equal(read_audio(path, RATE), waveform)
    np.testing.assert_array_equal(np.concatenate(list(iterate_audio(path, RATE))), waveform)
    (message,) = caplog.messages
    assert str(path) in message and "7.00 s" in message


def test_floats_with_the_values_of_integers_are_refused(tmp_path: Path) -> None:
    waveform = np.random.default_rng(0).normal(0, 0.1, 3 * RATE)
    path = tmp_path / "integers.wav"
    soundfile.write(path, waveform * 32768, RATE, subtype="FLOAT")
    for read in (lambda: read_audio(path, RATE), lambda: list(iterate_audio(path, RATE))):
        with pytest.raises(AudioError, match=r"integers\.wav: 9.% of its samples"):
            read()


@pytest.mark.parametrize("value", [0.0, 0.2])
def test_a_recording_without_any_sound_is_named(
    tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "constant.wav"
    soundfile.write(path, np.full(3 * RATE, value), RATE, subtype="FLOAT")
    assert len(read_audio(path, RATE)) == 3 * RATE
    assert [str(path) in message for message in caplog.messages] == [True]


def test_samples_that_are_no_numbers_raise(tmp_path: Path) -> None:
    path = tmp_path / "nan.wav"
    soundfile.write(path, np.array([0.1, np.nan, 0.2] * 99), RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="not finite"):
        read_audio(path, RATE)


def test_what_is_no_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.mp3: no such file"):
        read_audio(tmp_path / "none.mp3", RATE)
    (tmp_path / "loop.mp3").symlink_to(tmp_path / "loop.mp3")
    with pytest.raises(AudioError, match="symbolic links"):
        read_audio(tmp_path / "loop.mp3", RATE)
    with pytest.raises(AudioError, match="not a regular file"):
        read_audio(tmp_path, RATE)
    os.mkfifo(tmp_path / "pipe.mp3")
    with pytest.raises(AudioError, match="not a regular file"):
        probe_audio(tmp_path / "pipe.mp3")


def test_names_with_spaces_and_letters_of_any_script_are_read(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "Größe 鳥 № 1 '.mp3", 44_100, 1, 1.0)
    assert len(read_audio(path, RATE, 0.2, 0.5)) == RATE // 2


def test_a_interval_beyond_the_end_and_impossible_ones_raise(mp3: Path) -> None:
    for offset, duration in [(10, 5), (12.4, None), (99, 1)]:
        with pytest.raises(AudioError, match=r"noise\.mp3: asked for .* has 12.3"):
            read_audio(mp3, RATE, offset, duration)
    for offset, duration in [(-1, 1), (float("nan"), 1), (0, 0), (0, -1), (0, float("inf"))]:
        with pytest.raises(ValueError, match="_seconds is"):
            read_audio(mp3, RATE, offset, duration)
    with pytest.raises(ValueError, match="sample_rate is 0"):
        read_audio(mp3, 0)


def test_a_clip_has_exactly_the_samples_asked_for() -> None:
    waveform = np.arange(10.0)
    np.testing.assert_array_equal(crop_or_pad(waveform, 4, 3), [3, 4, 5, 6])
    np.testing.assert_array_equal(crop_or_pad(waveform, 4, 8), [8, 9, 0, 0])
    np.testing.assert_array_equal(crop_or_pad(waveform, 2, 99), [0, 0])
    assert crop_or_pad(np.ones((3, 10)), 16).shape == (3, 16)
    with pytest.raises(ValueError, match="must not be negative"):
        crop_or_pad(waveform, 4, -1)


@pytest.mark.parametrize("n_samples", [1, 2, 137, 44_100, 1_323_077])
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 44_101, 48_000, 192_000])
def test_the_length_after_resampling_is_known_before(n_samples: int, rate: int) -> None:
    resampled = soxr.resample(np.zeros(n_samples, np.float32), rate, RATE)
    assert resampled_length(n_samples, rate, RATE) == len(resampled)


def test_reading_sound_imports_neither_librosa_nor_torch() -> None:
    code = "import sys, birdcall.audio.reading; "
    code += "sys.exit(bool({'librosa', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_crops_of_three_epochs_are_five_times_as_fast_as_librosa_on_whole_files(
    tmp_path: Path,
) -> None:
    """The first read of an mp3 looks for damage in all of its frames, later ones do not."""
    paths = [write_noise(tmp_path / f"{i}.mp3", 44_100, 1, 60) for i in range(10)]
    librosa.load(paths[0], sr=RATE)  # imports what it loads late

    def seconds(read: object) -> float:
        start = time.perf_counter()
        for path in paths * 3:
            read(path)
        return time.perf_counter() - start

    whole = seconds(lambda path: librosa.load(path, sr=RATE))
    assert seconds(lambda path: read_audio(path, RATE, 30, 5)) * 5 < whole


def test_no_whole_recording_of_the_real_ones_is_called_truncated(
    cornell_mini: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Most of test_audio/ states no length and ends with tags; libsndfile promises 0.3 s too much.
    paths = sorted((cornell_mini / "test_audio").glob("*.mp3"))
    assert len(paths) == 14
    for path in paths:
        waveform = read_audio(path, 32_000)
        assert probe_audio(path).seconds == pytest.approx(len(waveform) / 32_000, abs=0.05)
    assert not caplog.records


def test_a_cut_shares_hashes_with_its_file_and_other_files_share_none(tmp_path):
    generator = np.random.default_rng(0)
    sound, other = (0.2 * generator.standard_normal((2, 70 * RATE))).clip(-1, 1)
    sound[: 3 * RATE] = other[: 3 * RATE] = 0.0  # digital silence is no shared sound
    whole = hash_parts(write_audio(tmp_path / "whole.wav", sound, RATE))
    # Of the samples as they are stored, from anywhere, over the decoder's block of a minute.
    stored, _ = soundfile.read(tmp_path / "whole.wav", dtype="int16")
    cut = hash_parts(write_audio(tmp_path / "cut.flac", stored[57 * RATE + 7 : 63 * RATE], RATE))
    assert len(whole & cut) >= 3
    assert not whole & hash_parts(write_audio(tmp_path / "other.wav", other, RATE))
    short = write_audio(tmp_path / "short.wav", sound[: RATE // 100], RATE)
    assert hash_parts(short) == hash_parts(write_audio(tmp_path / "copy.flac", sound[:320], RATE))


# --- memory ---------------------------------------------------------------------------------------

FAULTS = """
import resource
import numpy as np
from birdcall.audio.reading import reuse_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(160_000, np.float32) for _ in range(32)]
    del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
mapped = faults()
reuse_freed_memory()
faults()
print(mapped, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_memory_of_freed_arrays_is_used_again_without_page_faults():
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    mapped, reused = map(int, run.stdout.split())
    assert mapped > 3_000  # 20 MB: 5,000 pages
    assert reused < 100
