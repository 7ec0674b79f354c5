"""Make the audio of one planned file of the demo and write it: songs, noise, distance, echo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import fftconvolve

from birdcall.audio.filters import NOISE_RMS, make_noise, shape_spectrum, slow_fluctuation
from birdcall.demo.plan import NoisePlan, PlannedSong, RecordingPlan, SoundscapePlan
from birdcall.demo.synthesis import BIRD_FREE_ANIMALS, compose_song, draw_individual, render_song

_NOISE_SAMPLE_RATE = 32_000
_GARBAGE_BYTES = 20_000
_HIGHEST_PEAK = 0.95
_AIR_DB_PER_KHZ_AND_METRE = 0.02  # air and leaves: at 50 m a song loses 1 dB per kHz
_ECHO_SECONDS = (0.2, 0.5)  # in which the echo of a forest falls by 60 dB
_EQUALIZER_HZ = (125.0, 500.0, 2_000.0, 8_000.0)
_SWELL_HZ = 0.1  # the background is now louder, now softer: loudness does not reveal birds
_SWELL_DB = 5.0  # standard deviation
_FRAME_SECONDS = 0.02
_ACTIVE_RANGE_DB = 20.0

Plan = RecordingPlan | SoundscapePlan | NoisePlan


def write_file(folder: Path, plan: Plan) -> str:
    """Write the file that ``plan`` describes below ``folder``; return its relative path."""
    path = folder / plan.path
    if isinstance(plan, NoisePlan):
        waveform = render_noise(plan)
        soundfile.write(path, waveform, _NOISE_SAMPLE_RATE, subtype="PCM_16")
    elif isinstance(plan, SoundscapePlan):
        soundfile.write(path, render_soundscape(plan), plan.sample_rate, format="MP3")
    elif plan.damage == "garbage":
        # No byte is 255, so that no decoder finds the beginning of a frame by chance.
        generator = np.random.default_rng(plan.seed)
        path.write_bytes(generator.integers(0, 255, _GARBAGE_BYTES, dtype=np.uint8).tobytes())
    else:
        soundfile.write(path, render_recording(plan), plan.recordist.sample_rate, format="MP3")
    return plan.path


def render_noise(plan: NoisePlan) -> np.ndarray:
    """Return bird-free noise, float32 ``(samples,)`` at 32 kHz, its RMS drawn from 0.02 to 0.1.

    Animals that are no birds call now and then, 5 to 20 dB above a breeze.
    """
    rate = _NOISE_SAMPLE_RATE
    generator = np.random.default_rng(plan.seed)
    n_samples = round(plan.seconds * rate)
    if plan.kind not in BIRD_FREE_ANIMALS:
        noise = make_background(plan.kind, n_samples, rate, generator)
        return _limit(noise * generator.uniform(0.2, 1.0))
    species = BIRD_FREE_ANIMALS[plan.kind]
    animal = draw_individual(plan.path, species, generator)
    noise = np.float32(0.2) * make_background("pink", n_samples, rate, generator)  # an RMS of 0.02
    level = 0.02 * 10 ** (generator.uniform(5, 20) / 20)
    onset = generator.uniform(0, 1)
    while onset < plan.seconds:
        call = render_song(compose_song(animal, generator), rate, generator)
        gain = level / np.sqrt(max(active_power(call, rate), 1e-12))
        _add(noise, gain * call, int(onset * rate))
        onset += len(call) / rate + generator.uniform(*species.song_gap_seconds)
    return _limit(noise * generator.uniform(0.2, 1.0))


def render_recording(plan: RecordingPlan) -> np.ndarray:
    """Return a training recording, float32 ``(samples, channels)``.

    ``snr_db`` is the active power of the primary bird's average song over the mean power of the
    background, before the recordist's equalizer.
    """
    recordist, rate = plan.recordist, plan.recordist.sample_rate
    generator = np.random.default_rng(plan.seed)
    n_samples = round(plan.seconds * rate)
    if plan.damage == "silent":
        return np.zeros((n_samples, recordist.channels), np.float32)
    birds = np.zeros(n_samples, np.float32)
    for song in plan.songs:
        waveform = _render_song(song, rate)
        gain = 10 ** (song.snr_db / 20) / np.sqrt(max(active_power(waveform, rate), 1e-12))
        _add(birds, gain * waveform, int(song.onset_seconds * rate))
    noise_gain = 10 ** (-plan.snr_db / 20)
    channels = []
    for channel in range(recordist.channels):
        noise = make_background(recordist.background, n_samples, rate, generator)
        noise = noise * (noise_gain / np.sqrt(np.mean(np.square(noise)) + 1e-12))
        if channel > 0:  # the second microphone gets the birds a little later (20 cm)
            delay = int(generator.integers(0, 25))
            gain = np.float32(10 ** (generator.uniform(-4, 2) / 20))
            start = np.zeros(delay, np.float32)
            side = gain * np.concatenate([start, birds[: len(birds) - delay]])
        else:
            side = birds
        channels.append(_equalize(side + noise, rate, recordist.equalizer_db))
    recording = np.stack(channels, axis=1)
    peak_db = min(-0.5, recordist.gain_db + generator.uniform(-4, 4))
    return recording * (10 ** (peak_db / 20) / max(float(np.abs(recording).max()), 1e-9))


def render_soundscape(plan: SoundscapePlan) -> np.ndarray:
    """Return a soundscape at its level, float32 ``(samples,)`` at ``plan.sample_rate``."""
    mixture = mix_soundscape(plan)
    level = max(float(np.sqrt(np.mean(np.square(mixture)))), 1e-9)
    return _limit(mixture * (10 ** (plan.level_db / 20) / level))


def mix_soundscape(plan: SoundscapePlan) -> np.ndarray:
    """Return the background with all songs, calls and planes added, float32 ``(samples,)``.

    The SNR of each is the power of its active part (`active_power`) over the mean power of the
    background at the same time, both over all frequencies.
    """
    rate = plan.sample_rate
    background = render_background(plan)
    mixture = background.copy()
    added = [
        (_render_song(song, rate), song.onset_seconds, song.snr_db)
        for song in (*plan.birds, *plan.others)
    ]
    if plan.plane is not None:
        onset, seconds, snr_db = plan.plane
        generator = np.random.default_rng(plan.seed + 1)
        added.append((make_plane(round(seconds * rate), rate, generator), onset, snr_db))
    for waveform, onset, snr_db in added:
        start = int(onset * rate)
        span = background[start : start + len(waveform)]
        waveform = waveform[: len(span)]  # cut where the soundscape ends
        background_power = float(np.mean(np.square(span, dtype=np.float64)))
        power = active_power(waveform, rate)
        if power > 0:
            gain = float(np.sqrt(10 ** (snr_db / 10) * background_power / power))
            _add(mixture, gain * waveform, start)
    return mixture


def render_background(plan: SoundscapePlan) -> np.ndarray:
    """Return a soundscape without songs, calls and planes, float32 ``(samples,)``."""
    generator = np.random.default_rng(plan.seed)
    n_samples = round(plan.seconds * plan.sample_rate)
    background = np.zeros(n_samples, np.float32)
    for kind, level_db in plan.background:
        noise = make_background(kind, n_samples, plan.sample_rate, generator)
        background += noise * np.float32(10 ** (level_db / 20))
    swell = slow_fluctuation(n_samples, plan.sample_rate, _SWELL_HZ, generator)
    return (background * 10 ** (_SWELL_DB * np.clip(swell, -2, 2) / 20)).astype(np.float32)


def _render_song(song: PlannedSong, sample_rate: int) -> np.ndarray:
    generator = np.random.default_rng((song.song_seed, 1))
    waveform = render_song(song.song, sample_rate, generator)
    return propagate(waveform, sample_rate, song.distance_metres, generator)


def _add(mixture: np.ndarray, waveform: np.ndarray, start: int) -> None:
    """Add ``waveform`` to ``mixture`` from the sample ``start`` on, as far as it fits."""
    span = mixture[start : start + len(waveform)]
    span += waveform[: len(span)].astype(np.float32)


def _limit(waveform: np.ndarray) -> np.ndarray:
    peak = float(np.abs(waveform).max())
    return (waveform * min(1.0, _HIGHEST_PEAK / max(peak, 1e-9))).astype(np.float32)


# --- backgrounds ---


def make_background(
    kind: str, n_samples: int, sample_rate: int, generator: np.random.Generator
) -> np.ndarray:
    """Return `make_noise` of this kind, or insects; float32 ``(n_samples,)``, RMS 0.1.

    ``insects`` is one insect that calls in bouts, with a faint hiss: a cricket (2 to 4 chirps a
    second of 3 or 4 pulses, 4 to 5.5 kHz), a conehead (an even train of 8 to 25 pulses a second,
    3.5 to 7 kHz, where sparrows trill) or a cicada (a buzz).
    """
    if kind != "insects":
        return make_noise(kind, n_samples, sample_rate, generator)
    seconds = np.arange(n_samples, dtype=np.float32) / sample_rate
    insect_kind = generator.choice(("cricket", "conehead", "cicada"))
    if insect_kind == "cricket":
        hz = generator.uniform(4_000, 5_500)
        chirp = (seconds * generator.uniform(2, 4)) % 1 < generator.uniform(0.3, 0.5)
        pulses = _pulses(seconds * generator.uniform(22, 35)) * chirp
    elif insect_kind == "conehead":
        hz = generator.uniform(3_500, 7_000)
        pulses = _pulses(seconds * generator.uniform(8, 25))
    else:
        hz = generator.uniform(4_500, 7_500)
        pulses = 0.6 + 0.4 * np.sin(2 * np.pi * generator.uniform(60, 150) * seconds)
    width_hz = hz * (0.15 if insect_kind == "cicada" else 0.02)
    carrier = shape_spectrum(
        generator.standard_normal(n_samples, dtype=np.float32),
        sample_rate,
        lambda frequency: np.exp(-0.5 * ((frequency - hz) / width_hz) ** 2),
    )
    calling = slow_fluctuation(n_samples, sample_rate, generator.uniform(0.05, 0.15), generator)
    insect = carrier * pulses / (1 + np.exp(-8 * (calling + 0.5)))
    insect /= np.sqrt(np.mean(np.square(insect))) + 1e-9
    insect += make_noise("pink", n_samples, sample_rate, generator)  # 20 dB below
    return (insect * (NOISE_RMS / np.sqrt(np.mean(np.square(insect))))).astype(np.float32)


def make_plane(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    """Return a propeller plane that comes, passes and goes; float32, active power 1."""
    position = np.linspace(-1, 1, n_samples)
    hz = generator.uniform(75, 120) * (1 - 0.06 * np.tanh(3 * position))  # Doppler
    phase = 2 * np.pi * np.cumsum(hz) / sample_rate
    engine = sum(np.sin(k * phase + k) / k**0.7 for k in range(1, 9))
    roar = make_noise("brown", n_samples, sample_rate, generator) / NOISE_RMS
    plane = (engine + 2 * roar) * np.exp(-4 * position**2) * np.cos(np.pi / 2 * position)
    return (plane / np.sqrt(active_power(plane, sample_rate))).astype(np.float32)


def _pulses(turns: np.ndarray) -> np.ndarray:
    """Smooth pulses in the first 55 % of every turn."""
    position = turns % 1 / 0.55
    return np.where(position < 1, np.sin(np.pi * position) ** 2, 0)


# --- from the bird to the microphone ---


def propagate(
    waveform: np.ndarray, sample_rate: int, distance_metres: float, generator: np.random.Generator
) -> np.ndarray:
    """Return ``waveform`` from a distance: highs damped, an echo added; longer by the echo.

    The echo is noise that decays by 60 dB in 0.2 to 0.5 s; its level grows with the distance, from
    18 dB below the direct signal near by to 8 dB below it at 80 m.
    """
    echo_seconds = generator.uniform(*_ECHO_SECONDS)
    n_echo = int(echo_seconds * sample_rate)
    decay = 10 ** (-3 * np.arange(n_echo) / n_echo)
    echo = generator.standard_normal(n_echo) * decay
    echo_db = np.clip(-18 + distance_metres / 8, -18, -8)
    echo *= 10 ** (echo_db / 20) / np.sqrt(np.sum(np.square(echo)))
    echo[0] = 1.0  # the direct signal
    echoing = fftconvolve(waveform, echo.astype(np.float32))
    loss_db = _AIR_DB_PER_KHZ_AND_METRE * distance_metres
    damped = shape_spectrum(echoing, sample_rate, lambda hz: 10 ** (-loss_db * hz / 1_000 / 20))
    return damped.astype(np.float32)


def _equalize(waveform: np.ndarray, sample_rate: int, gains_db: tuple[float, ...]) -> np.ndarray:
    """Apply a recorder's frequency response: gains at 125, 500, 2,000 and 8,000 Hz."""
    octaves = np.log2(_EQUALIZER_HZ)
    equalized = shape_spectrum(
        waveform,
        sample_rate,
        lambda hz: 10 ** (np.interp(np.log2(np.maximum(hz, 1.0)), octaves, gains_db) / 20),
    )
    return equalized.astype(np.float32)


def active_power(waveform: np.ndarray, sample_rate: int) -> float:
    """Return the mean power of the active part of ``waveform``, without the pauses in a song.

    Active are the frames of 20 ms whose power is within 20 dB of the loudest frame's.
    """
    length = max(1, int(_FRAME_SECONDS * sample_rate))
    n_frames = max(1, len(waveform) // length)
    power = np.mean(
        np.square(waveform[: n_frames * length], dtype=np.float64).reshape(n_frames, -1),
        1,
    )
    return float(power[power >= power.max() * 10 ** (-_ACTIVE_RANGE_DB / 10)].mean())
