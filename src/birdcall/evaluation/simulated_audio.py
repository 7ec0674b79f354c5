"""Make the sound of simulated soundscapes as the members hear it, and keep what they heard."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import soxr

from birdcall.audio.filters import fade_curve, filter_waveform, high_pass_curve, low_pass_curve
from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS
from birdcall.data.augment import fade_ends
from birdcall.data.dataset import TrainingData
from birdcall.data.noise import NoiseFiles, ReadFailure, make_noise
from birdcall.evaluation.prediction_cache import PredictionCache, predict_cached
from birdcall.evaluation.predictions import LabelledPredictions, segments_of
from birdcall.evaluation.simulation import (
    SimulatedEvent,
    SimulatedSoundscape,
    SimulationConfig,
    describe_events,
    label_segments,
)
from birdcall.inference.ensemble import Ensemble
from birdcall.storage.files import digest, digest_files
from birdcall.storage.store import code_digest

logger = logging.getLogger(__name__)

BACKGROUND_RMS = 0.03
BACKGROUND_SECONDS = (8.0, 16.0)  # of one stretch of noise in the bed
CROSSFADE_SECONDS = 1.0
HISS_DB = -15.0  # pink noise below the bed: between two sounds no place is silent
BACKGROUND_LAYERS = 2
EVENT_FADE_SECONDS = 0.05
SKIRT_OCTAVES = 1 / 3  # beyond a bird's band, from where its recording's own noise is filtered out
SKIRT_ORDER = 4
LEVEL_DB = (-38.0, -22.0)  # RMS of a soundscape, of full scale: recorders differ


def predict_simulated(
    ensemble: Ensemble,
    soundscapes: Sequence[SimulatedSoundscape],
    data: TrainingData,
    config: SimulationConfig,
    known: Sequence[str],
    kept: Path | None = None,
    progress: bool = False,
) -> LabelledPredictions:
    """Let members hear soundscapes of the fold that all of them held out.

    The members' names are those of their experiments. ``known``: species of the truth, beginning
    with the classes.
    """
    fold = soundscapes[0].fold
    for member in ensemble.members:
        if member.checkpoint.fold != fold:
            raise ValueError(
                f"{member.name} has trained on the recordings of {soundscapes[0].name}"
            )
    noise = open_noise(data, fold, config.sample_rate)
    sounds = {one.name: partial(render, one, data, noise, config) for one in soundscapes}
    place = None
    if kept is not None:
        files = [data.folder / path for path in describe_events(soundscapes)["path"].unique()]
        made_from = (
            repr(soundscapes),
            digest_files(files),
            digest_files(noise.paths),
            code_digest("evaluation.simulated_audio"),
        )
        place = PredictionCache(kept, f"simulated-fold{fold}", digest(repr(made_from)))
    heard = predict_cached(ensemble, sounds, place, progress)
    for scores in heard.values():
        if isinstance(scores, AudioError):
            raise scores
    return LabelledPredictions(
        segments=pd.concat([_segments(one) for one in soundscapes], ignore_index=True),
        truth=np.concatenate([label_segments(one, known) for one in soundscapes]),
        clipwise=np.concatenate([heard[one.name].clipwise for one in soundscapes], axis=1),
        framewise=np.concatenate([heard[one.name].framewise for one in soundscapes], axis=1),
        member_names=tuple(member.checkpoint.experiment.name for member in ensemble.members),
        classes=ensemble.classes,
    )


def _segments(soundscape: SimulatedSoundscape) -> pd.DataFrame:
    n_segments = round(soundscape.seconds / SEGMENT_SECONDS)
    table = segments_of(soundscape.name, n_segments, is_labelled=True, group=soundscape.group)
    return table.assign(nocall_share=soundscape.nocall_share)


def open_noise(data: TrainingData, fold: int, sample_rate: int) -> NoiseFiles:
    """Open the noise that no run of this fold has trained with."""
    training, held_out = data.split_noise(fold)
    if not held_out:
        logger.warning("fold %d has no held-out noise: simulated with that of its training", fold)
    return NoiseFiles(held_out or training, sample_rate, data.noise_store)


def render(
    soundscape: SimulatedSoundscape,
    data: TrainingData,
    noise: NoiseFiles,
    config: SimulationConfig,
    sample_rates: Sequence[int],
) -> dict[int, np.ndarray]:
    """Return a soundscape's waveform ``(samples,)``, float32, at each of the sample rates.

    It is made at the config's rate and resampled, so that all members hear the same. Raises
    AudioError for a recording that does not decode.
    """
    mixture = mix_soundscape(soundscape, data, noise, config)
    level_db = np.random.default_rng((*soundscape.seed, 2)).uniform(*LEVEL_DB)
    mixture = _at_level(mixture, level_db - 20 * np.log10(BACKGROUND_RMS))
    mixture /= max(1.0, float(np.abs(mixture).max()))
    rate = config.sample_rate
    return {
        other: mixture if other == rate else soxr.resample(mixture, rate, other)
        for other in sample_rates
    }


def mix_soundscape(
    soundscape: SimulatedSoundscape,
    data: TrainingData,
    noise: NoiseFiles,
    config: SimulationConfig,
) -> np.ndarray:
    """Return noise and birds together, at no particular level."""
    mixture = mix_background(soundscape, noise, config)
    background = mixture.copy()
    for event in (*soundscape.events, *soundscape.others):
        start = round(event.onset * config.sample_rate)
        bird = read_event(event, data, config.sample_rate)[: len(mixture) - start]
        stretch = slice(start, start + len(bird))
        mixture[stretch] += event_gain(event, bird, background[stretch], config.sample_rate) * bird
    return mixture


def mix_background(
    soundscape: SimulatedSoundscape, noise: NoiseFiles, config: SimulationConfig
) -> np.ndarray:
    """Return what the place sounds like without birds: stretches of noise, one fading into another.

    Each has its own level; a little pink noise lies below all of them.
    """
    generator = np.random.default_rng((*soundscape.seed, 1))
    n_samples = round(soundscape.seconds * config.sample_rate)
    background = _at_level(make_noise("pink", n_samples, config.sample_rate, generator), HISS_DB)
    failures: list[ReadFailure] = []
    for _ in range(BACKGROUND_LAYERS):
        _add_layer(background, noise, config=config, generator=generator, failures=failures)
    for failure in failures:
        logger.warning("%s; other noise takes its place", failure.reason)
    return background


def _add_layer(
    background: np.ndarray,
    noise: NoiseFiles,
    config: SimulationConfig,
    generator: np.random.Generator,
    failures: list[ReadFailure],
) -> None:
    n_fade = round(CROSSFADE_SECONDS * config.sample_rate)
    start = -n_fade
    while start < len(background):
        length = round(generator.uniform(*BACKGROUND_SECONDS) * config.sample_rate)
        level_db = config.noise_level_db * np.clip(generator.standard_normal(), -2, 2)
        piece = fade_ends(_at_level(noise.draw(length, generator, failures), level_db), n_fade)
        skipped = max(0, -start)
        room = background[max(0, start) : start + length]
        room += piece[skipped : skipped + len(room)]
        start += length - n_fade


def _at_level(waveform: np.ndarray, level_db: float) -> np.ndarray:
    """Return a waveform so many decibels above ``BACKGROUND_RMS``."""
    rms = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    return waveform * np.float32(BACKGROUND_RMS * 10 ** (level_db / 20) / max(rms, 1e-9))


def read_event(event: SimulatedEvent, data: TrainingData, sample_rate: int) -> np.ndarray:
    """Return a bird as it arrives, ``(samples,)``: its stretch, its band, with less treble."""
    seconds = (event.offset - event.onset) * event.transposed
    (bird,) = data.read_clip(event.path, sample_rate, [event.recording_onset], seconds, None)
    if event.transposed != 1:
        bird = soxr.resample(bird, event.transposed * sample_rate, sample_rate)
    # Else the recording's own noise would begin and end with the bird, in all frequencies.
    low_hz, high_hz = event.band_hz
    curves = [
        fade_curve(event.fade_db, sample_rate),
        high_pass_curve(max(low_hz, 1.0) * 2**-SKIRT_OCTAVES, SKIRT_ORDER),
        low_pass_curve(high_hz * 2**SKIRT_OCTAVES, SKIRT_ORDER),
    ]
    bird = filter_waveform(bird, sample_rate, curves)
    return fade_ends(bird, round(EVENT_FADE_SECONDS * sample_rate))


def event_gain(
    event: SimulatedEvent, bird: np.ndarray, background: np.ndarray, sample_rate: int
) -> np.float32:
    """Return the gain that puts a bird at its SNR, both powers taken in the bird's band.

    Over all frequencies the rumble of wind, where no bird sings, would decide how well a bird is
    heard.
    """
    options = 10 ** (event.snr_db / 10)
    power = band_power(bird, sample_rate, event.band_hz)
    if power <= 0:
        return np.float32(0)
    return np.float32(np.sqrt(options * band_power(background, sample_rate, event.band_hz) / power))


def band_power(waveform: np.ndarray, sample_rate: int, band_hz: tuple[float, float]) -> float:
    """Return the mean power of a waveform ``(samples,)`` between two frequencies."""
    if not len(waveform):
        return 0.0
    spectrum = np.square(np.abs(np.fft.rfft(waveform)))
    hertz = np.fft.rfftfreq(len(waveform), 1 / sample_rate)
    inside = (hertz >= band_hz[0]) & (hertz <= band_hz[1])
    return float(2 * spectrum[inside].sum() / len(waveform) ** 2)
