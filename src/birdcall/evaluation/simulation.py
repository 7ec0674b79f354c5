"""Plan simulated soundscapes: recordings of a held-out fold at known places, in held-out noise.

Everything is drawn from generators that are seeded with what it is for, so that a plan is the same
in every run, on every machine and in any order. `simulated_sound` makes the sound of a plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from birdcall.config import SEGMENT_SECONDS, require, require_range, require_share
from birdcall.data.dataset import TrainingData
from birdcall.data.folds import recordist_clusters
from birdcall.evaluation.predictions import label_times
from birdcall.evaluation.salient_segments import SalientSegment, find_salient_segment

# How many birds begin together; among the rows with birds of the competition's example soundscapes
# 54, 20 and 4 have one, two and three.
TOGETHER = (0.70, 0.25, 0.05)
TOGETHER_SECONDS = 3.0  # apart at most
SEARCHED_SECONDS = 30.0  # of a recording, in which its bird is looked for
MAX_TRIES = 50
SHARE_SPREAD = 0.2  # soundscapes differ by so much from their set's share of nocall


@dataclass(frozen=True)
class SimulationConfig:
    """How soundscapes are simulated.

    With these values networks trained on the demo get on simulated soundscapes what they get on its
    labelled ones, at the same fixed thresholds: see docs/evaluation.md.

    snr_db: of an event, in the bird's own band: people label what stands out. high_fade_db: what
    air and leaves take at half the sample rate, falling to nothing at 0 Hz. noise_level_db: spread
    (standard deviation) of the noise's stretches. other_every_seconds: between animals that are no
    bird of the classes, on average; other_octaves: by which birds are transposed to be one.
    """

    seed: int = 0
    sample_rate: int = 32_000
    soundscape_seconds: float = 60.0
    soundscapes: int = 16  # of each fold and share
    nocall_shares: tuple[float, ...] = (0.5, 0.6, 0.8)
    snr_db: tuple[float, float] = (10.0, 25.0)
    high_fade_db: tuple[float, float] = (0.0, 12.0)
    noise_level_db: float = 5.0
    other_every_seconds: float = 40.0
    other_octaves: tuple[float, float] = (0.4, 0.8)
    max_birds: int = 3  # in a segment
    groups_per_fold: int = 3

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}; give 0 or more")
        require(self.sample_rate > 0, f"sample_rate is {self.sample_rate}; it must be above 0")
        for name in ("soundscapes", "max_birds", "groups_per_fold"):
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
        require_range("snr_db", self.snr_db)
        require_range("high_fade_db", self.high_fade_db)
        require_range("other_octaves", self.other_octaves)
        require(
            self.other_every_seconds > 0,
            f"other_every_seconds is {self.other_every_seconds}; it must be above 0",
        )
        require(self.noise_level_db >= 0, f"noise_level_db is {self.noise_level_db}; 0 or more")

    @property
    def segments(self) -> int:
        """Return how many segments a soundscape has."""
        return round(self.soundscape_seconds / SEGMENT_SECONDS)


@dataclass(frozen=True)
class SimulatedEvent:
    """A stretch of a recording at its place in a soundscape; times in seconds."""

    path: str  # below the data folder
    ebird_code: str
    recording_onset: float
    onset: float
    offset: float
    band_hz: tuple[float, float]
    snr_db: float
    fade_db: float
    transposed: float = 1.0  # factor on all frequencies; the recording's stretch is as much longer


@dataclass(frozen=True)
class SimulatedSoundscape:
    """One soundscape: whose fold and group it is, and all that is heard in it."""

    name: str
    fold: int
    group: str
    nocall_share: float  # of the set that it belongs to
    seconds: float
    seed: tuple[int, ...]
    events: tuple[SimulatedEvent, ...]
    others: tuple[SimulatedEvent, ...]  # which are no bird of the classes


def plan_soundscapes(
    data: TrainingData, fold: int, config: SimulationConfig
) -> list[SimulatedSoundscape]:
    """Plan the soundscapes of a held-out fold, for each share of nocall.

    Recordings with secondary labels are taken only of species that have no others. Within a share
    a recording comes again only when all of its group have been used, and species take turns.
    Raises AudioError for a recording that does not decode.
    """
    grouped = data.recordings.assign(group=recording_groups(data.recordings, config))
    recordings = _candidates(grouped[grouped["fold"] == fold])
    stretches = _Stretches(data, config.sample_rate)
    planned = []
    for share in config.nocall_shares:
        key = (config.seed, fold, round(1000 * share))
        birds, others = (_turns_of_groups(recordings, (*key, k)) for k in (0, 1))
        n_empty = _empty_segments(config, share, np.random.default_rng((*key, 2)))
        for index, empty in enumerate(n_empty):
            group = sorted(birds)[index % len(birds)]
            seed = (*key, 3, index)
            generator = np.random.default_rng(seed)
            planned.append(
                SimulatedSoundscape(
                    name=f"simulated-fold{fold}-{share:.0%}-{index:03d}",
                    fold=fold,
                    group=group,
                    nocall_share=share,
                    seconds=config.soundscape_seconds,
                    seed=seed,
                    events=tuple(
                        _plan_events(
                            birds[group],
                            stretches,
                            config=config,
                            n_empty=empty,
                            generator=generator,
                        )
                    ),
                    others=tuple(_plan_others(others[group], stretches, config, generator)),
                )
            )
    return planned


def recording_groups(recordings: pd.DataFrame, config: SimulationConfig) -> np.ndarray:
    """Return the group of each recording, ``(recordings,)``: parts of its fold, by recordist.

    Recordists with many recordings are placed first, each where there are fewest so far. One
    without a name is taken for a recordist of his own.
    """
    names = recordist_clusters(recordings)
    groups = pd.Series("", index=recordings.index)
    for fold, own in names.groupby(recordings["fold"]):
        counts = own.value_counts()
        sizes = [0] * min(config.groups_per_fold, len(counts))
        part = {}
        for name in sorted(counts.index, key=lambda name: (-counts[name], name)):
            part[name] = int(np.argmin(sizes))
            sizes[part[name]] += counts[name]
        groups[own.index] = [f"fold{fold}-part{part[name]}" for name in own]
    return groups.to_numpy()


def label_segments(soundscape: SimulatedSoundscape, known: Sequence[str]) -> np.ndarray:
    """Return the truth ``(segments, known species)``."""
    column = {code: place for place, code in enumerate(known)}
    return label_times(
        np.array([event.onset for event in soundscape.events]),
        np.array([event.offset for event in soundscape.events]),
        columns=[column[event.ebird_code] for event in soundscape.events],
        n_segments=round(soundscape.seconds / SEGMENT_SECONDS),
        n_known=len(known),
    )


def describe_events(soundscapes: Sequence[SimulatedSoundscape]) -> pd.DataFrame:
    """Return a row per event: recording (the soundscape), its times, species, level and source."""
    return pd.DataFrame(
        [
            (one.name, e.onset, e.offset, e.ebird_code, e.snr_db, e.path)
            for one in soundscapes
            for e in one.events
        ],
        columns=["recording", "onset", "offset", "ebird_code", "snr_db", "path"],
    )


# --- which recordings ---------------------------------------------------------------------------


def _candidates(recordings: pd.DataFrame) -> pd.DataFrame:
    """Leave out recordings in which others are heard too, of species that have enough without."""
    alone = recordings["secondary_codes"].map(len) == 0
    has_alone = alone.groupby(recordings["ebird_code"]).transform("any")
    # The plan does not depend on the order of the table.
    return recordings[alone | ~has_alone].sort_values("path")


class _Turns:
    """Recordings for ever: species in turns, each recording once before any comes again."""

    def __init__(self, recordings: pd.DataFrame, generator: np.random.Generator) -> None:
        self.recordings = recordings.iloc[generator.permutation(len(recordings))]
        self.generator = generator
        self.waiting: deque[pd.Series] = deque()

    def take(self) -> pd.Series:
        if not self.waiting:
            turn = self.recordings.groupby("ebird_code").cumcount().to_numpy()
            order = np.lexsort((self.generator.random(len(turn)), turn))
            self.waiting.extend(self.recordings.iloc[place] for place in order)
        return self.waiting.popleft()

    def take_distinct(self, n_birds: int) -> list[pd.Series]:
        """Take birds of different species, fewer where the next ones are of the same."""
        birds = [self.take()]
        for _ in range(n_birds - 1):
            bird = self.take()
            if bird["ebird_code"] in {one["ebird_code"] for one in birds}:
                self.waiting.appendleft(bird)
                break
            birds.append(bird)
        return birds

    def put_back(self, birds: Sequence[pd.Series]) -> None:
        """Let birds for which there was no place wait for the next turn."""
        self.waiting.extend(birds)


def _turns_of_groups(recordings: pd.DataFrame, seed: tuple[int, ...]) -> dict[str, _Turns]:
    return {
        group: _Turns(own, np.random.default_rng((*seed, place)))
        for place, (group, own) in enumerate(recordings.groupby("group"))
    }


class _Stretches:
    """Where each recording's bird is, found when it is first asked for."""

    def __init__(self, data: TrainingData, sample_rate: int) -> None:
        self.data, self.sample_rate = data, sample_rate
        self.found: dict[str, SalientSegment] = {}

    def of(self, recording: pd.Series) -> SalientSegment:
        path = recording["path"]
        if path not in self.found:
            duration = SEARCHED_SECONDS if recording["seconds"] > SEARCHED_SECONDS else None
            (waveform,) = self.data.read_clip(path, self.sample_rate, [0.0], duration, None)
            self.found[path] = find_salient_segment(waveform, self.sample_rate)
        return self.found[path]


# --- what happens when --------------------------------------------------------------------------


def _empty_segments(
    config: SimulationConfig, share: float, generator: np.random.Generator
) -> list[int]:
    """Return how many segments of each soundscape stay empty; together it is the share."""
    spread = np.linspace(-SHARE_SPREAD, SHARE_SPREAD, config.soundscapes)
    if config.soundscapes == 1:
        spread = np.zeros(1)
    # No wider than leaves the mean where it is.
    spread *= min(1.0, share / SHARE_SPREAD, (1 - share) / SHARE_SPREAD)
    options = config.segments * (share + generator.permutation(spread))
    # The sums are rounded, not each: errors would add up.
    rounded = np.diff(np.round(np.cumsum(options)), prepend=0)
    return [int(empty) for empty in rounded.clip(0, config.segments)]


def _plan_events(
    queue: _Turns,
    stretches: _Stretches,
    config: SimulationConfig,
    n_empty: int,
    generator: np.random.Generator,
) -> list[SimulatedEvent]:
    """Add birds, alone and together, until ``n_empty`` segments are left empty, or one more."""
    events: list[SimulatedEvent] = []
    heard = _heard(events, config)
    failures = 0
    while (heard == 0).sum() > n_empty and failures < MAX_TRIES:
        n_birds = int(generator.choice(len(TOGETHER), p=TOGETHER)) + 1
        birds = queue.take_distinct(n_birds)
        found = _find_place(
            birds, events, stretches=stretches, config=config, n_empty=n_empty, generator=generator
        )
        if found is not None:
            events, failures = found, 0
            heard = _heard(events, config)
            continue
        queue.put_back(birds)
        failures += 1
        if (heard == 0).sum() == n_empty + 1:
            break  # for the single segment that is left this bird is too long
    return sorted(events, key=lambda event: (event.onset, event.path))


def _plan_others(
    queue: _Turns,
    stretches: _Stretches,
    config: SimulationConfig,
    generator: np.random.Generator,
) -> list[SimulatedEvent]:
    """Add animals that no class stands for: birds at a pitch at which theirs does not sing."""
    others = []
    for _ in range(generator.poisson(config.soundscape_seconds / config.other_every_seconds)):
        bird = queue.take()
        moment = generator.uniform(0, config.soundscape_seconds)
        event = _place(bird, stretches.of(bird), moment=moment, config=config, generator=generator)
        factor = 2 ** float(generator.choice([-1, 1]) * generator.uniform(*config.other_octaves))
        seconds = (event.offset - event.onset) / factor
        others.append(
            replace(
                event,
                offset=round(min(event.onset + seconds, config.soundscape_seconds), 4),
                band_hz=(event.band_hz[0] * factor, event.band_hz[1] * factor),
                transposed=factor,
            )
        )
    return others


def _find_place(
    birds: Sequence[pd.Series],
    events: list[SimulatedEvent],
    stretches: _Stretches,
    config: SimulationConfig,
    n_empty: int,
    generator: np.random.Generator,
) -> list[SimulatedEvent] | None:
    """Return ``events`` and these birds about one moment, or None where they do not fit."""
    for _ in range(MAX_TRIES):
        moment = generator.uniform(0, config.soundscape_seconds)
        apart = generator.uniform(-TOGETHER_SECONDS, TOGETHER_SECONDS, len(birds))
        placed = [
            _place(
                bird, stretches.of(bird), moment=moment + later, config=config, generator=generator
            )
            for bird, later in zip(birds, apart, strict=True)
        ]
        heard = _heard([*events, *placed], config)
        if (heard == 0).sum() >= n_empty and heard.max() <= config.max_birds:
            return [*events, *placed]
    return None


def _place(
    bird: pd.Series,
    stretch: SalientSegment,
    moment: float,
    config: SimulationConfig,
    generator: np.random.Generator,
) -> SimulatedEvent:
    """Let a bird begin at about ``moment``, so that the soundscape holds all of it."""
    seconds = min(stretch.offset - stretch.onset, config.soundscape_seconds)
    onset = float(np.clip(moment, 0, config.soundscape_seconds - seconds))
    return SimulatedEvent(
        path=bird["path"],
        ebird_code=bird["ebird_code"],
        recording_onset=stretch.onset,
        onset=round(onset, 4),
        offset=round(onset + seconds, 4),
        band_hz=(stretch.low_hz, stretch.high_hz),
        snr_db=round(float(generator.uniform(*config.snr_db)), 2),
        fade_db=round(float(generator.uniform(*config.high_fade_db)), 2),
    )


def _heard(events: Sequence[SimulatedEvent], config: SimulationConfig) -> np.ndarray:
    """Return how many species are in each segment."""
    codes = sorted({event.ebird_code for event in events})
    truth = label_times(
        np.array([event.onset for event in events]),
        np.array([event.offset for event in events]),
        columns=[codes.index(event.ebird_code) for event in events],
        n_segments=config.segments,
        n_known=len(codes),
    )
    return truth.sum(axis=1)
