"""Find where the bird of a recording is loudest: what is placed in a simulated soundscape."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.signal import ShortTimeFFT
from scipy.signal.windows import hann

WINDOW_SECONDS = 0.032
HOP_SECONDS = 0.008
LOWEST_HZ = 250.0  # below, wind and traffic; owls hoot above
FLOOR_QUANTILE = 0.2  # of each frequency's power over time: what is there without the bird
FLOOR_RATIO = 4.0  # 6 dB above the floor
ACTIVE_DB = -20.0  # below the loudest frames a bird is no longer active
LOUDEST_QUANTILE = 0.99
GAP_SECONDS = 0.5  # between the notes of a song
MAX_SECONDS = 3.0  # the competition's example annotations last 0.3 to 2.7 s, 1.3 on average
MIN_SECONDS = 0.2
END_SECONDS = 0.001  # left out at the end
BAND_SHARE = 0.95  # of the bird's power lies in its band


class SalientSegment(NamedTuple):
    """Seconds from the start of the recording, and the bird's band in Hz."""

    onset: float
    offset: float
    low_hz: float
    high_hz: float


def find_salient_segment(waveform: np.ndarray, sample_rate: int) -> SalientSegment:
    """Return the stretch of ``waveform (samples,)`` with most power above its own background.

    At most ``MAX_SECONDS`` long, it begins and ends where something stands out: its onset is one.
    Where nothing does, as in silence, it is the beginning, in all frequencies.
    """
    # Times are rounded, and nobody can read beyond the end.
    seconds = max(0.0, len(waveform) / sample_rate - END_SECONDS)
    excess, hertz, hop = _excess(waveform, sample_rate)
    power = excess.sum(axis=0)
    loudest = np.quantile(power, LOUDEST_QUANTILE) if len(power) else 0.0
    if loudest <= 0:
        return SalientSegment(0.0, min(seconds, MAX_SECONDS), 0.0, sample_rate / 2)
    active = power >= loudest * 10 ** (ACTIVE_DB / 10)
    first, last = max(
        (_cut(*run, power, active, hop) for run in _runs(active, round(GAP_SECONDS / hop))),
        key=lambda run: power[run[0] : run[1]].sum(),
    )
    onset, offset = first * hop, min(last * hop, seconds)
    missing = max(0.0, MIN_SECONDS - (offset - onset))
    onset = max(0.0, onset - missing / 2)
    offset = min(seconds, max(offset, onset + MIN_SECONDS))
    share = np.cumsum(excess[:, first:last].sum(axis=1))
    share /= share[-1]
    low = hertz[np.searchsorted(share, (1 - BAND_SHARE) / 2)]
    high = hertz[min(np.searchsorted(share, (1 + BAND_SHARE) / 2), len(hertz) - 1)]
    step = hertz[1] - hertz[0]
    band = max(0.0, float(low - step)), min(float(high + step), sample_rate / 2)
    return SalientSegment(round(float(onset), 4), round(float(offset), 4), *band)


def _excess(waveform: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return power above the floor ``(frequencies, frames)``, the frequencies and the hop."""
    hop = round(HOP_SECONDS * sample_rate)
    window = hann(round(WINDOW_SECONDS * sample_rate), sym=False)
    padded = np.pad(waveform, (0, max(0, 2 * len(window) - len(waveform))))
    transform = ShortTimeFFT(window, hop, sample_rate)
    power = np.square(np.abs(transform.stft(padded)[:, -transform.p_min :]))
    hertz = transform.f
    power, hertz = power[hertz >= LOWEST_HZ], hertz[hertz >= LOWEST_HZ]
    n_frames = max(1, round(len(waveform) / hop))
    power = power[:, :n_frames]
    floor = np.quantile(power, FLOOR_QUANTILE, axis=1, keepdims=True)
    return np.where(power > FLOOR_RATIO * floor, power, 0.0), hertz, hop / sample_rate


def _runs(active: np.ndarray, max_gap: int) -> list[tuple[int, int]]:
    """Return first and end of each run of active frames, gaps of at most ``max_gap`` closed."""
    places = np.flatnonzero(active)
    breaks = np.flatnonzero(np.diff(places) > max_gap + 1)
    firsts = places[np.append(0, breaks + 1)]
    ends = places[np.append(breaks, len(places) - 1)] + 1
    return [(int(a), int(b)) for a, b in zip(firsts, ends, strict=True)]


def _cut(
    first: int, end: int, power: np.ndarray, active: np.ndarray, hop: float
) -> tuple[int, int]:
    """Cut a run to its loudest ``MAX_SECONDS``, from an active frame to an active frame."""
    n_most = round(MAX_SECONDS / hop)
    if end - first <= n_most:
        return first, end
    total = np.concatenate([[0.0], np.cumsum(power[first:end])])
    start = first + int(np.argmax(total[n_most:] - total[:-n_most]))
    places = start + np.flatnonzero(active[start : start + n_most])
    return int(places[0]), int(places[-1]) + 1
