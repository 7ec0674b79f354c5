"""Find the salient segments of recordings, and render the audio of simulated soundscapes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import soxr
from scipy import fft
from scipy.signal.windows import hann

from birdcall.audio.filters import (
    butterworth_curve,
    fade_curve,
    fade_ends,
    filter_waveform,
    make_noise,
)
from birdcall.data.cache import CropRequest, ReadCrops, ReadFailure
from birdcall.data.dataset import TrainingData
from birdcall.data.noise import NoiseFiles
from birdcall.evaluation.simulation import (
    SalientSegment,
    SimulatedEvent,
    SimulatedSoundscape,
    SimulationConfig,
)

logger = logging.getLogger(__name__)

_SEARCHED_SECONDS = 30.0  # at the start of a recording
_WINDOW_SECONDS = 0.032
_HOP_SECONDS = 0.008
_LOWEST_HZ = 250.0  # below are wind and traffic; the calls of owls are above
_FLOOR_QUANTILE = 0.2  # of a frequency's power over time: the background without the bird
_FLOOR_RATIO = 4.0  # 6 dB above the floor
_ACTIVE_DB = -20.0  # relative to the loudest frames
_LOUDEST_QUANTILE = 0.99
_GAP_SECONDS = 0.5  # between the notes of a song
_MAX_SECONDS = 3.0  # the competition's example annotations last 0.3 to 2.7 s, 1.3 on average
_MIN_SECONDS = 0.2
_END_SECONDS = 0.001  # left out at the end of a recording
_BAND_SHARE = 0.95  # of a segment's power lies in its band

_BACKGROUND_RMS = 0.03
_BACKGROUND_LAYERS = 2
_NOISE_SECONDS = (8.0, 16.0)  # of a clip of noise in the background
_CROSSFADE_SECONDS = 1.0
_HISS_DB = -15.0  # of pink noise below the background, so that no part of it is silent
_EVENT_FADE_SECONDS = 0.05
_SKIRT_OCTAVES = 1 / 3  # outside an event's band; beyond it the recording's noise is filtered out
_SKIRT_ORDER = 4
_LEVEL_DB = (-38.0, -22.0)  # RMS of a soundscape relative to full scale: recorders differ


# --- salient segments ---


def salient_segment_finder(
    data: TrainingData, sample_rate: int
) -> Callable[[pd.Series], SalientSegment]:
    """Return a function from a recording (its row) to its salient segment, computed once.

    The function raises AudioError for a recording that does not decode.
    """
    segments: dict[str, SalientSegment] = {}

    def find_segment(recording: pd.Series) -> SalientSegment:
        path = recording["path"]
        if path not in segments:
            duration = _SEARCHED_SECONDS if recording["seconds"] > _SEARCHED_SECONDS else None
            (waveform,) = data.read_crops(CropRequest(path, sample_rate, seconds=duration))
            segments[path] = find_salient_segment(waveform, sample_rate)
        return segments[path]

    return find_segment


def find_salient_segment(waveform: np.ndarray, sample_rate: int) -> SalientSegment:
    """Return the segment of ``waveform (samples,)`` with most power above its background.

    It lasts at most ``_MAX_SECONDS``, and begins and ends at a frame above the background. Where no
    frame is, as in silence, it is the start of the waveform, with all frequencies.
    """
    # Times are rounded, and reading beyond the end would fail.
    seconds = max(0.0, len(waveform) / sample_rate - _END_SECONDS)
    excess, hertz = _excess_power(waveform, sample_rate)
    hop = round(_HOP_SECONDS * sample_rate) / sample_rate
    power = excess.sum(axis=0)
    loudest = np.quantile(power, _LOUDEST_QUANTILE) if len(power) else 0.0
    if loudest <= 0:
        return SalientSegment(0.0, min(seconds, _MAX_SECONDS), 0.0, sample_rate / 2)
    active = power >= loudest * 10 ** (_ACTIVE_DB / 10)
    first, end = _loudest_run(power, active, hop)
    onset, offset = first * hop, min(end * hop, seconds)
    missing = max(0.0, _MIN_SECONDS - (offset - onset))
    onset = max(0.0, onset - missing / 2)
    offset = min(seconds, max(offset, onset + _MIN_SECONDS))
    cumulated = np.cumsum(excess[:, first:end].sum(axis=1))
    cumulated /= cumulated[-1]
    low = hertz[np.searchsorted(cumulated, (1 - _BAND_SHARE) / 2)]
    high = hertz[min(np.searchsorted(cumulated, (1 + _BAND_SHARE) / 2), len(hertz) - 1)]
    step = hertz[1] - hertz[0]
    return SalientSegment(
        onset=round(float(onset), 4),
        offset=round(float(offset), 4),
        low_hz=max(0.0, float(low - step)),
        high_hz=min(float(high + step), sample_rate / 2),
    )


def _excess_power(waveform: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the power above the floor ``(frequencies, frames)``, and the frequencies in Hz."""
    hop = round(_HOP_SECONDS * sample_rate)
    window = hann(round(_WINDOW_SECONDS * sample_rate), sym=False)
    half, n_frames = len(window) // 2, max(1, round(len(waveform) / hop))
    padded = np.pad(waveform, (half, len(window)))
    # All frames in one transform: scipy's ShortTimeFFT takes one by one, in five times as long.
    frames = np.lib.stride_tricks.sliding_window_view(padded, len(window))[::hop][:n_frames]
    hertz = fft.rfftfreq(len(window), 1 / sample_rate)
    spectra = fft.rfft(frames * window)[:, hertz >= _LOWEST_HZ]
    power = np.square(np.abs(np.ascontiguousarray(spectra.T)))
    floor = np.quantile(power, _FLOOR_QUANTILE, axis=1, keepdims=True)
    return np.where(power > _FLOOR_RATIO * floor, power, 0.0), hertz[hertz >= _LOWEST_HZ]


def _loudest_run(power: np.ndarray, active: np.ndarray, hop: float) -> tuple[int, int]:
    """Return first and end frame of the run of active frames with most power.

    Short gaps are part of a run; a long run is cut to its loudest ``_MAX_SECONDS``.
    """
    frames = np.flatnonzero(active)
    breaks = np.flatnonzero(np.diff(frames) > round(_GAP_SECONDS / hop) + 1)
    firsts = frames[np.append(0, breaks + 1)]
    ends = frames[np.append(breaks, len(frames) - 1)] + 1
    n_max = round(_MAX_SECONDS / hop)
    runs = []
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        if end - first > n_max:
            total = np.concatenate([[0.0], np.cumsum(power[first:end])])
            first += int(np.argmax(total[n_max:] - total[:-n_max]))
            inside = first + np.flatnonzero(active[first : first + n_max])
            first, end = int(inside[0]), int(inside[-1]) + 1
        runs.append((first, end))
    return max(runs, key=lambda run: power[run[0] : run[1]].sum())


# --- rendering ---


@dataclass(frozen=True)
class SoundscapeRenderer:
    """Makes the waveforms of planned soundscapes from recordings and noise."""

    read_crops: ReadCrops
    noise: NoiseFiles
    config: SimulationConfig

    @classmethod
    def for_fold(
        cls, data: TrainingData, fold: int, config: SimulationConfig
    ) -> SoundscapeRenderer:
        """Return the renderer for a fold, with noise that no run of this fold has trained with."""
        training, held_out = data.split_noise(fold)
        if not held_out:
            logger.warning(
                "fold %d has no held-out noise: simulated with that of its training", fold
            )
        noise = NoiseFiles(held_out or training, config.sample_rate, data.noise_store)
        return cls(data.read_crops, noise, config)

    def render(
        self, soundscape: SimulatedSoundscape, sample_rates: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """Return the waveform ``(samples,)``, float32, at each of the sample rates.

        Rendered at the config's rate and resampled, so that all members get the same audio.
        Raises AudioError for a recording that does not decode.
        """
        mixture = self.mix(soundscape)
        level_db = np.random.default_rng((*soundscape.seed, 2)).uniform(*_LEVEL_DB)
        mixture = _scale_to_level(mixture, level_db - 20 * np.log10(_BACKGROUND_RMS))
        mixture /= max(1.0, float(np.abs(mixture).max()))
        rate = self.config.sample_rate
        return {
            other: mixture if other == rate else soxr.resample(mixture, rate, other)
            for other in sample_rates
        }

    def mix(self, soundscape: SimulatedSoundscape) -> np.ndarray:
        """Return background and events ``(samples,)``, before the level is set."""
        rate = self.config.sample_rate
        mixture = self.mix_background(soundscape)
        background = mixture.copy()
        for event in (*soundscape.events, *soundscape.distractors):
            start = round(event.onset * rate)
            waveform = self.read_event(event)[: len(mixture) - start]
            span = slice(start, start + len(waveform))
            # The powers are those in the event's band: over all frequencies the rumble of wind,
            # far below the event, would decide how audible the event is.
            power = _band_power(waveform, rate, event.band_hz)
            background_power = _band_power(background[span], rate, event.band_hz)
            if power > 0:
                gain = np.sqrt(10 ** (event.snr_db / 10) * background_power / power)
                mixture[span] += np.float32(gain) * waveform
        return mixture

    def mix_background(self, soundscape: SimulatedSoundscape) -> np.ndarray:
        """Return the background ``(samples,)``: layers of noise clips, each faded into the next.

        The level of each clip is drawn; faint pink noise lies below all of them.
        """
        rate = self.config.sample_rate
        generator = np.random.default_rng((*soundscape.seed, 1))
        n_samples = round(soundscape.seconds * rate)
        background = _scale_to_level(make_noise("pink", n_samples, rate, generator), _HISS_DB)
        n_fade = round(_CROSSFADE_SECONDS * rate)
        failures: list[ReadFailure] = []
        for _ in range(_BACKGROUND_LAYERS):
            start = -n_fade
            while start < n_samples:
                length = round(generator.uniform(*_NOISE_SECONDS) * rate)
                spread_db = self.config.noise_spread_db
                level_db = spread_db * np.clip(generator.standard_normal(), -2, 2)
                noise = self.noise.draw(length, generator, failures)
                clip = fade_ends(_scale_to_level(noise, level_db), n_fade)
                n_skipped = max(0, -start)
                span = background[max(0, start) : start + length]
                span += clip[n_skipped : n_skipped + len(span)]
                start += length - n_fade
        for failure in failures:
            logger.warning("%s; other noise replaces it", failure.reason)
        return background

    def read_event(self, event: SimulatedEvent) -> np.ndarray:
        """Return an event's waveform ``(samples,)``: its band only, high frequencies attenuated."""
        rate = self.config.sample_rate
        seconds = (event.offset - event.onset) * event.transposition
        request = CropRequest(event.path, rate, (event.recording_onset,), seconds)
        (waveform,) = self.read_crops(request)
        if event.transposition != 1:
            waveform = soxr.resample(waveform, event.transposition * rate, rate)
        # Without a band the recording's noise would begin and end with the event.
        low_hz, high_hz = event.band_hz
        curves = [
            fade_curve(event.fade_db, rate),
            butterworth_curve("high", max(low_hz, 1.0) * 2**-_SKIRT_OCTAVES, _SKIRT_ORDER),
            butterworth_curve("low", high_hz * 2**_SKIRT_OCTAVES, _SKIRT_ORDER),
        ]
        waveform = filter_waveform(waveform, rate, curves)
        return fade_ends(waveform, round(_EVENT_FADE_SECONDS * rate))


def _band_power(waveform: np.ndarray, sample_rate: int, band_hz: tuple[float, float]) -> float:
    """Return the mean power of a waveform ``(samples,)`` between two frequencies."""
    if not len(waveform):
        return 0.0
    spectrum = np.square(np.abs(np.fft.rfft(waveform)))
    hertz = np.fft.rfftfreq(len(waveform), 1 / sample_rate)
    inside = (hertz >= band_hz[0]) & (hertz <= band_hz[1])
    return float(2 * spectrum[inside].sum() / len(waveform) ** 2)


def _scale_to_level(waveform: np.ndarray, level_db: float) -> np.ndarray:
    """Return the waveform with an RMS of ``level_db`` relative to ``_BACKGROUND_RMS``."""
    rms = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    return waveform * np.float32(_BACKGROUND_RMS * 10 ** (level_db / 20) / max(rms, 1e-9))
