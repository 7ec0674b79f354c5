"""Make the sound of one planned file of the demo and write it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from birdcall.audio.filters import slow_fluctuation
from birdcall.demo.ambience import (
    BIRD_FREE_ANIMALS,
    equalize,
    gain_for_snr,
    make_background,
    make_plane,
    propagate,
)
from birdcall.demo.plan import Event, NoisePlan, RecordingPlan, SoundscapePlan
from birdcall.demo.synthesis import active_power, draw_individual, render_song, sing

NOISE_SAMPLE_RATE = 32_000
GARBAGE_BYTES = 20_000
HIGHEST_PEAK = 0.95
SWELL_HZ = 0.1  # a place is now louder, now softer, so that loudness does not tell of birds
SWELL_DB = 5.0  # standard deviation

Plan = RecordingPlan | SoundscapePlan | NoisePlan


def write_file(folder: Path, plan: Plan) -> str:
    """Write the file that ``plan`` describes below ``folder``; return its relative path."""
    path = folder / plan.path
    if isinstance(plan, NoisePlan):
        waveform = render_noise(plan)
        soundfile.write(path, waveform, NOISE_SAMPLE_RATE, subtype="PCM_16")
    elif isinstance(plan, SoundscapePlan):
        soundfile.write(path, render_soundscape(plan), plan.sample_rate, format="MP3")
    elif plan.damage == "garbage":
        # No byte is 255, so that no decoder finds the beginning of a frame by chance.
        generator = np.random.default_rng(plan.seed)
        path.write_bytes(generator.integers(0, 255, GARBAGE_BYTES, dtype=np.uint8).tobytes())
    else:
        soundfile.write(path, render_recording(plan), plan.recordist.sample_rate, format="MP3")
    return plan.path


def render_noise(plan: NoisePlan) -> np.ndarray:
    """Return bird-free noise, float32 ``(samples,)`` at 32 kHz, its RMS drawn from 0.02 to 0.1."""
    generator = np.random.default_rng(plan.seed)
    n_samples = round(plan.seconds * NOISE_SAMPLE_RATE)
    if plan.kind in BIRD_FREE_ANIMALS:
        noise = _render_animal(plan, n_samples, generator)
    else:
        noise = make_background(plan.kind, n_samples, NOISE_SAMPLE_RATE, generator)
    return _limit(noise * generator.uniform(0.2, 1.0))


def _render_animal(plan: NoisePlan, n_samples: int, generator: np.random.Generator) -> np.ndarray:
    """Return an animal that is no bird, calling now and then 5 to 20 dB above a breeze."""
    species = BIRD_FREE_ANIMALS[plan.kind]
    animal = draw_individual(plan.path, species, generator)
    breeze = make_background("pink", n_samples, NOISE_SAMPLE_RATE, generator)
    noise = np.float32(0.2) * breeze  # an RMS of 0.02
    level = 0.02 * 10 ** (generator.uniform(5, 20) / 20)
    place = generator.uniform(0, 1)
    while place < plan.seconds:
        call = sing(animal, NOISE_SAMPLE_RATE, generator)
        gain = level / np.sqrt(max(active_power(call, NOISE_SAMPLE_RATE), 1e-12))
        _add(noise, gain * call, place, NOISE_SAMPLE_RATE)
        place += len(call) / NOISE_SAMPLE_RATE + generator.uniform(*species.song_gap_seconds)
    return noise


def render_recording(plan: RecordingPlan) -> np.ndarray:
    """Return a training recording, float32 ``(samples, channels)``.

    ``snr_db`` is the active power of the primary bird's average song over the mean power of the
    background, before the recordist's equalizer.
    """
    who = plan.recordist
    generator = np.random.default_rng(plan.seed)
    n_samples = round(plan.seconds * who.sample_rate)
    if plan.damage == "silent":
        return np.zeros((n_samples, who.channels), np.float32)
    birds = np.zeros(n_samples, np.float32)
    for event in plan.events:
        sound = _render_event(event, who.sample_rate)
        power = active_power(sound, who.sample_rate)
        gain = 10 ** (event.snr_db / 20) / np.sqrt(max(power, 1e-12))
        _add(birds, gain * sound, event.onset_seconds, who.sample_rate)
    noise_gain = 10 ** (-plan.snr_db / 20)
    channels = []
    for channel in range(who.channels):
        noise = make_background(who.background, n_samples, who.sample_rate, generator)
        noise = noise * (noise_gain / np.sqrt(np.mean(np.square(noise)) + 1e-12))
        side = birds if channel == 0 else _other_side(birds, generator)
        channels.append(equalize(side + noise, who.sample_rate, who.equalizer_db))
    recording = np.stack(channels, axis=1)
    peak_db = min(-0.5, who.gain_db + generator.uniform(-4, 4))
    return recording * (10 ** (peak_db / 20) / max(float(np.abs(recording).max()), 1e-9))


def render_soundscape(plan: SoundscapePlan) -> np.ndarray:
    """Return a soundscape at its level, float32 ``(samples,)`` at ``plan.sample_rate``."""
    mixture = mix_soundscape(plan)
    level = max(float(np.sqrt(np.mean(np.square(mixture)))), 1e-9)
    return _limit(mixture * (10 ** (plan.level_db / 20) / level))


def mix_soundscape(plan: SoundscapePlan) -> np.ndarray:
    """Return the background with all songs, calls and planes added, float32 ``(samples,)``."""
    background = render_background(plan)
    mixture = background.copy()
    for event in (*plan.birds, *plan.others):
        _add(mixture, *place_event(event, background, plan.sample_rate))
    if plan.plane is not None:
        onset, seconds, snr_db = plan.plane
        generator = np.random.default_rng(plan.seed + 1)
        plane = make_plane(round(seconds * plan.sample_rate), plan.sample_rate, generator)
        stretch = _stretch(background, onset, len(plane), plan.sample_rate)
        gain = gain_for_snr(plane, stretch, snr_db, plan.sample_rate)
        _add(mixture, gain * plane, onset, plan.sample_rate)
    return mixture


def render_background(plan: SoundscapePlan) -> np.ndarray:
    """Return what a soundscape's place sounds like when nothing calls, float32 ``(samples,)``."""
    generator = np.random.default_rng(plan.seed)
    n_samples = round(plan.seconds * plan.sample_rate)
    background = np.zeros(n_samples, np.float32)
    for kind, level_db in plan.background:
        noise = make_background(kind, n_samples, plan.sample_rate, generator)
        background += noise * np.float32(10 ** (level_db / 20))
    swell = slow_fluctuation(n_samples, plan.sample_rate, SWELL_HZ, generator)
    return (background * 10 ** (SWELL_DB * np.clip(swell, -2, 2) / 20)).astype(np.float32)


def place_event(
    event: Event, background: np.ndarray, sample_rate: int
) -> tuple[np.ndarray, float, int]:
    """Return the song at its SNR over ``background``, its onset in seconds, and the rate.

    The song is cut where the soundscape ends.
    """
    sound = _render_event(event, sample_rate)
    stretch = _stretch(background, event.onset_seconds, len(sound), sample_rate)
    sound = sound[: len(stretch)]
    gain = gain_for_snr(sound, stretch, event.snr_db, sample_rate)
    return gain * sound, event.onset_seconds, sample_rate


def _render_event(event: Event, sample_rate: int) -> np.ndarray:
    generator = np.random.default_rng((event.song_seed, 1))
    song = render_song(event.song, sample_rate, generator)
    return propagate(song, sample_rate, event.distance_metres, generator)


def _stretch(waveform: np.ndarray, onset: float, length: int, sample_rate: int) -> np.ndarray:
    start = int(onset * sample_rate)
    return waveform[start : start + length]


def _add(mixture: np.ndarray, sound: np.ndarray, onset: float, sample_rate: int) -> None:
    room = _stretch(mixture, onset, len(sound), sample_rate)
    room += sound[: len(room)].astype(np.float32)


def _other_side(birds: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return what the second microphone hears: a little later (20 cm) and softer, or louder."""
    delay = int(generator.integers(0, 25))
    gain = np.float32(10 ** (generator.uniform(-4, 2) / 20))
    return gain * np.concatenate([np.zeros(delay, np.float32), birds[: len(birds) - delay]])


def _limit(waveform: np.ndarray) -> np.ndarray:
    peak = float(np.abs(waveform).max())
    return (waveform * min(1.0, HIGHEST_PEAK / max(peak, 1e-9))).astype(np.float32)
