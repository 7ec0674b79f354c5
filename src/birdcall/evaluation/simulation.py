"""Plan simulated soundscapes: recordings of a held-out fold at drawn times, in held-out noise.

Every generator is seeded with its purpose, so that a plan is the same in every run, on every
machine and in any order. `simulated_audio` renders the audio of a plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from birdcall.config import SEGMENT_SECONDS, require, require_range, require_share
from birdcall.data.folds import recordist_clusters
from birdcall.data.targets import label_segments

# Of a chorus of 1, 2 and 3 species: in the competition's examples these are 54, 20 and 4 rows.
_CHORUS_PROBABILITIES = (0.70, 0.25, 0.05)
_CHORUS_SECONDS = 3.0  # the onsets of a chorus lie at most this far from its moment
_MAX_TRIES = 50
_SHARE_SPREAD = 0.2  # largest distance of a soundscape's share of nocall from its set's share


@dataclass(frozen=True)
class SimulationConfig:
    """How soundscapes are simulated.

    With the defaults, models trained on the demo get the same score on simulated soundscapes as on
    the demo's labelled ones, at the same fixed thresholds: see docs/evaluation.md.
    """

    seed: int = 0
    sample_rate: int = 32_000
    soundscape_seconds: float = 60.0
    n_soundscapes: int = 16  # of each fold and share
    nocall_shares: tuple[float, ...] = (0.5, 0.6, 0.8)
    # Of an event, in its frequency band: people label only birds well above the noise.
    snr_db: tuple[float, float] = (10.0, 25.0)
    # Attenuation by air and leaves at half the sample rate, falling to 0 dB at 0 Hz.
    high_fade_db: tuple[float, float] = (0.0, 12.0)
    noise_spread_db: float = 5.0  # standard deviation of the levels of noise clips
    # A distractor is an animal of no class: another bird, else one of a class, transposed.
    distractor_every_seconds: float = 40.0  # on average
    distractor_octaves: tuple[float, float] = (0.4, 0.8)  # of transposition, up or down
    max_species: int = 3  # in a segment
    groups_per_fold: int = 3

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}; give 0 or more")
        require(self.sample_rate > 0, f"sample_rate is {self.sample_rate}; it must be above 0")
        for name in ("n_soundscapes", "max_species", "groups_per_fold"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; give 1 or more")
        require(
            self.soundscape_seconds > 0 and self.soundscape_seconds % SEGMENT_SECONDS == 0,
            f"soundscape_seconds is {self.soundscape_seconds}; give a multiple of "
            f"{SEGMENT_SECONDS}",
        )
        require(len(self.nocall_shares) > 0, "nocall_shares is empty")
        for share in self.nocall_shares:
            require_share("nocall_shares", share)
        for name in ("snr_db", "high_fade_db", "distractor_octaves"):
            require_range(name, getattr(self, name))
        interval = self.distractor_every_seconds
        require(interval > 0, f"distractor_every_seconds is {interval}; it must be above 0")
        require(self.noise_spread_db >= 0, f"noise_spread_db is {self.noise_spread_db}; 0 or more")


class SalientSegment(NamedTuple):
    """The most salient part of a recording: seconds from its start, and its band in Hz."""

    onset: float
    offset: float
    low_hz: float
    high_hz: float


@dataclass(frozen=True)
class SimulatedEvent:
    """A part of a recording at a time in a soundscape; times in seconds."""

    path: str  # below the data folder
    ebird_code: str
    recording_onset: float
    onset: float
    offset: float
    band_hz: tuple[float, float]
    snr_db: float
    fade_db: float  # attenuation at half the sample rate
    transposition: float = 1.0  # factor of all frequencies; the recording's part is longer by it


@dataclass(frozen=True)
class SimulatedSoundscape:
    """A planned soundscape: its fold and group, and all events in it."""

    name: str
    fold: int
    group: str
    nocall_share: float  # of its set
    seconds: float
    seed: tuple[int, ...]
    events: tuple[SimulatedEvent, ...]
    distractors: tuple[SimulatedEvent, ...]  # of no class


def plan_soundscapes(
    recordings: pd.DataFrame,
    fold: int,
    config: SimulationConfig,
    find_segment: Callable[[pd.Series], SalientSegment],
    readable: Container[str] | None = None,
    other_birds: pd.DataFrame | None = None,
) -> list[SimulatedSoundscape]:
    """Plan the soundscapes of a held-out fold, for each share of nocall.

    ``find_segment`` returns the salient segment of a recording, given its row of the table.
    ``readable``: the paths of recordings to use, None for all. ``other_birds``: recordings of birds
    that are no class, for the distractors, with ``path``, ``ebird_code`` and ``seconds``.
    Recordings with secondary labels are used only for species that have no others. Within a share
    a recording is used again only after all of its group, and species alternate. Species that no
    other fold has are no events: no run of this fold could learn them. Where there are no others,
    nothing is planned. Raises AudioError for a recording that does not decode.
    """
    is_learnable = recordings["ebird_code"].isin(
        recordings.loc[recordings["fold"] != fold, "ebird_code"]
    )
    grouped = recordings.assign(group=group_recordings(recordings, config.groups_per_fold))
    grouped = grouped[grouped["fold"] == fold]
    if readable is not None:
        grouped = grouped[[path in readable for path in grouped["path"]]]
    is_single = grouped["secondary_codes"].map(len) == 0
    has_single = is_single.groupby(grouped["ebird_code"]).transform("any")
    # Sorted, so that the plan does not depend on the order of the table.
    candidates = grouped[is_single | ~has_single].sort_values("path")
    of_events = candidates[is_learnable[candidates.index]]
    planned: list[SimulatedSoundscape] = []
    if of_events.empty:
        return planned
    others = candidates[:0] if other_birds is None else other_birds
    of_groups = [others.assign(group=group) for group in of_events["group"].unique()]
    of_distractors = candidates if others.empty else pd.concat(of_groups)
    for share in config.nocall_shares:
        key = (config.seed, fold, round(1000 * share))
        event_queues = _open_queues(of_events, (*key, 0))
        distractor_queues = _open_queues(of_distractors, (*key, 1))
        n_empty = _draw_empty_segments(config, share, np.random.default_rng((*key, 2)))
        for index, n_empty_segments in enumerate(n_empty):
            group = sorted(event_queues)[index % len(event_queues)]
            seed = (*key, 3, index)
            generator = np.random.default_rng(seed)
            planner = _EventPlanner(config, find_segment, generator, transposes=others.empty)
            events = planner.plan_events(event_queues[group], n_empty_segments)
            distractors = planner.plan_distractors(distractor_queues[group])
            soundscape = SimulatedSoundscape(
                name=f"simulated-fold{fold}-{share:.0%}-{index:03d}",
                fold=fold,
                group=group,
                nocall_share=share,
                seconds=config.soundscape_seconds,
                seed=seed,
                events=tuple(events),
                distractors=tuple(distractors),
            )
            planned.append(soundscape)
    return planned


def group_recordings(recordings: pd.DataFrame, groups_per_fold: int) -> np.ndarray:
    """Return the group of each recording, ``(recordings,)``: a part of its fold, by recordist.

    Recordists with many recordings are assigned first, each to the smallest group so far. Without a
    name each counts as a further one. A fold of one recordist is divided by species instead.
    """
    names = recordist_clusters(recordings)
    groups = pd.Series("", index=recordings.index)
    for fold, recordists in names.groupby(recordings["fold"]):
        if recordists.nunique() == 1:
            recordists = recordings["ebird_code"][recordists.index]
        counts = recordists.value_counts()
        sizes = [0] * min(groups_per_fold, len(counts))
        group_of = {}
        for name in sorted(counts.index, key=lambda name: (-counts[name], name)):
            group_of[name] = int(np.argmin(sizes))
            sizes[group_of[name]] += counts[name]
        groups[recordists.index] = [f"fold{fold}-part{group_of[name]}" for name in recordists]
    return groups.to_numpy()


def describe_events(soundscapes: Sequence[SimulatedSoundscape]) -> pd.DataFrame:
    """Return a row per event: recording (the soundscape), its times, species, SNR and source."""
    rows = [
        (soundscape.name, event.onset, event.offset, event.ebird_code, event.snr_db, event.path)
        for soundscape in soundscapes
        for event in soundscape.events
    ]
    columns = ["recording", "onset", "offset", "ebird_code", "snr_db", "path"]
    return pd.DataFrame(rows, columns=columns)


# --- which recordings ---------------------------------------------------------------------------


@dataclass
class _RecordingQueue:
    """An endless queue of recordings: species alternate, no recording repeats within a round."""

    recordings: pd.DataFrame  # in an order drawn once
    generator: np.random.Generator
    waiting: deque[pd.Series] = field(default_factory=deque)

    def take(self) -> pd.Series:
        if not self.waiting:
            turn = self.recordings.groupby("ebird_code").cumcount().to_numpy()
            order = np.lexsort((self.generator.random(len(turn)), turn))
            self.waiting.extend(self.recordings.iloc[index] for index in order)
        return self.waiting.popleft()

    def take_distinct(self, n_species: int) -> list[pd.Series]:
        """Take recordings of different species, fewer where the next has a species again."""
        recordings = [self.take()]
        for _ in range(n_species - 1):
            following = self.take()
            if following["ebird_code"] in {recording["ebird_code"] for recording in recordings}:
                self.waiting.appendleft(following)
                break
            recordings.append(following)
        return recordings


def _open_queues(recordings: pd.DataFrame, seed: tuple[int, ...]) -> dict[str, _RecordingQueue]:
    """Return a queue for each group of recordings."""
    queues = {}
    for index, (group, members) in enumerate(recordings.groupby("group")):
        generator = np.random.default_rng((*seed, index))
        shuffled = members.iloc[generator.permutation(len(members))]
        queues[group] = _RecordingQueue(shuffled, generator)
    return queues


# --- events -------------------------------------------------------------------------------------


def _draw_empty_segments(
    config: SimulationConfig, share: float, generator: np.random.Generator
) -> list[int]:
    """Return the number of empty segments of each soundscape; in all they are the share."""
    spread = np.linspace(-_SHARE_SPREAD, _SHARE_SPREAD, config.n_soundscapes)
    if config.n_soundscapes == 1:
        spread = np.zeros(1)
    # Shares below 0 or above 1 would be clipped, and shift the mean.
    spread *= min(1.0, share / _SHARE_SPREAD, (1 - share) / _SHARE_SPREAD)
    n_segments = round(config.soundscape_seconds / SEGMENT_SECONDS)
    expected = n_segments * (share + generator.permutation(spread))
    # The cumulated sum is rounded: errors of the single values would add up.
    rounded = np.diff(np.round(np.cumsum(expected)), prepend=0)
    return [int(n_empty) for n_empty in rounded.clip(0, n_segments)]


@dataclass
class _EventPlanner:
    """Draws the events of one soundscape."""

    config: SimulationConfig
    find_segment: Callable[[pd.Series], SalientSegment]
    generator: np.random.Generator
    transposes: bool  # distractors

    def plan_events(self, queue: _RecordingQueue, n_empty: int) -> list[SimulatedEvent]:
        """Add choruses until ``n_empty`` or ``n_empty + 1`` segments are empty."""
        events: list[SimulatedEvent] = []
        n_still_empty = round(self.config.soundscape_seconds / SEGMENT_SECONDS)
        n_failures = 0
        while n_still_empty > n_empty and n_failures < _MAX_TRIES:
            n_species = 1 + int(self.generator.choice(3, p=_CHORUS_PROBABILITIES))
            recordings = queue.take_distinct(n_species)
            extended = self._add_chorus(events, recordings, n_empty)
            if extended is not None:
                events, n_still_empty = extended
                n_failures = 0
                continue
            queue.waiting.extend(recordings)
            n_failures += 1
            if n_still_empty == n_empty + 1:
                break  # these events are too long for the single segment that is left
        return sorted(events, key=lambda event: (event.onset, event.path))

    def plan_distractors(self, queue: _RecordingQueue) -> list[SimulatedEvent]:
        """Draw events of no class: of other birds, or of birds transposed in frequency."""
        config, generator = self.config, self.generator
        distractors = []
        n_expected = config.soundscape_seconds / config.distractor_every_seconds
        for _ in range(generator.poisson(n_expected)):
            recording = queue.take()
            event = self._draw_event(recording, generator.uniform(0, config.soundscape_seconds))
            if not self.transposes:
                distractors.append(event)
                continue
            direction = generator.choice([-1, 1])
            octaves = direction * generator.uniform(*config.distractor_octaves)
            factor = 2 ** float(octaves)
            seconds = (event.offset - event.onset) / factor
            offset = round(min(event.onset + seconds, config.soundscape_seconds), 4)
            band_hz = (event.band_hz[0] * factor, event.band_hz[1] * factor)
            distractors.append(replace(event, offset=offset, band_hz=band_hz, transposition=factor))
        return distractors

    def _add_chorus(
        self, events: list[SimulatedEvent], recordings: Sequence[pd.Series], n_empty: int
    ) -> tuple[list[SimulatedEvent], int] | None:
        """Add the recordings around a drawn moment; return None where they do not fit.

        Returns all events, and the number of segments that are then empty.
        """
        n_segments = round(self.config.soundscape_seconds / SEGMENT_SECONDS)
        for _ in range(_MAX_TRIES):
            moment = self.generator.uniform(0, self.config.soundscape_seconds)
            delays = self.generator.uniform(-_CHORUS_SECONDS, _CHORUS_SECONDS, len(recordings))
            chorus = [
                self._draw_event(recording, moment + delay)
                for recording, delay in zip(recordings, delays, strict=True)
            ]
            extended = [*events, *chorus]
            codes = sorted({event.ebird_code for event in extended})
            n_species = label_segments(extended, codes, n_segments).sum(axis=1)
            n_still_empty = int((n_species == 0).sum())
            if n_still_empty >= n_empty and n_species.max() <= self.config.max_species:
                return extended, n_still_empty
        return None

    def _draw_event(self, recording: pd.Series, moment: float) -> SimulatedEvent:
        """Return an event that begins at about ``moment`` and ends within the soundscape."""
        segment = self.find_segment(recording)
        total = self.config.soundscape_seconds
        seconds = min(segment.offset - segment.onset, total)
        onset = float(np.clip(moment, 0, total - seconds))
        return SimulatedEvent(
            path=recording["path"],
            ebird_code=recording["ebird_code"],
            recording_onset=segment.onset,
            onset=round(onset, 4),
            offset=round(onset + seconds, 4),
            band_hz=(segment.low_hz, segment.high_hz),
            snr_db=round(float(self.generator.uniform(*self.config.snr_db)), 2),
            fade_db=round(float(self.generator.uniform(*self.config.high_fade_db)), 2),
        )
