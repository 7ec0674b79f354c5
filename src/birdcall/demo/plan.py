"""Say what the demo data holds, before any sound is made: which files, who sings when, how loud."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from birdcall.audio.filters import NOISE_KINDS
from birdcall.config import SEGMENT_SECONDS, require, require_range, require_share
from birdcall.demo.ambience import BIRD_FREE_ANIMALS, LABELLED_ANIMALS
from birdcall.demo.songs import SPECIES
from birdcall.demo.synthesis import Individual, Song, Species, compose_song, draw_individual

BACKGROUND_KINDS = (*NOISE_KINDS, "insects")
# Insects twice: no two species sound alike, and a trill of theirs passes for a bird's.
NOISE_FILE_KINDS = (*BACKGROUND_KINDS, *BIRD_FREE_ANIMALS, "insects")
Item = TypeVar("Item")

MIN_OVERLAP_SECONDS = 0.5  # so much of a song, or half of it, must fall into a row to count there


@dataclass(frozen=True)
class DemoConfig:
    """How much demo data to make; the defaults are those of ``birdcall demo``."""

    seed: int = 0
    n_species: int = len(SPECIES)
    recordings_per_species: tuple[int, int] = (12, 32)
    recording_seconds: tuple[float, float] = (5.0, 18.0)  # a few are shorter, from 3 s
    short_share: float = 0.05
    n_recordists: int = 25
    n_examples: int = 4
    n_site_1: int = 2
    n_site_2: int = 2
    soundscape_seconds: float = 120.0
    n_site_3: int = 6
    site_3_seconds: float = 30.0
    n_noise: int = 33
    nocall_share: float = 0.54  # of the competition's rows
    damaged: bool = True  # one recording that does not decode, one that is silent

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed is {self.seed}; give 0 or more")
        require(
            2 <= self.n_species <= len(SPECIES),
            f"n_species is {self.n_species}; give 2 to {len(SPECIES)}",
        )
        require_range("recordings_per_species", self.recordings_per_species)
        require_range("recording_seconds", self.recording_seconds)
        require(self.recordings_per_species[0] >= 1, "recordings_per_species starts below 1")
        require(self.recording_seconds[0] >= 3, "recording_seconds starts below 3")
        require(self.n_recordists >= 1, f"n_recordists is {self.n_recordists}; give 1 or more")
        for name in ("n_examples", "n_site_1", "n_site_2", "n_site_3", "n_noise"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; give 0 or more")
        for name in ("soundscape_seconds", "site_3_seconds"):
            require(
                getattr(self, name) >= 4 * SEGMENT_SECONDS,
                f"{name} is {getattr(self, name)}; give {4 * SEGMENT_SECONDS} s or more",
            )
        require_share("short_share", self.short_share)
        require_share("nocall_share", self.nocall_share)

    @property
    def species(self) -> tuple[Species, ...]:
        """The demo's classes, spread over the table so that a small demo has variety too."""
        places = np.linspace(0, len(SPECIES) - 1, self.n_species).round().astype(int)
        return tuple(SPECIES[place] for place in places)


@dataclass(frozen=True)
class Event:
    """One song at its place. ``snr_db`` is over the background (see ``gain_for_snr``)."""

    individual: Individual
    song_seed: int
    onset_seconds: float
    seconds: float
    snr_db: float
    distance_metres: float

    @property
    def song(self) -> Song:
        return compose_song(self.individual, np.random.default_rng(self.song_seed))

    @property
    def ebird_code(self) -> str:
        return self.individual.species.ebird_code

    @property
    def offset_seconds(self) -> float:
        return self.onset_seconds + self.seconds

    def is_heard(self, start_seconds: float, end_seconds: float) -> bool:
        inside = min(self.offset_seconds, end_seconds) - max(self.onset_seconds, start_seconds)
        return inside >= min(MIN_OVERLAP_SECONDS, self.seconds / 2)


@dataclass(frozen=True)
class Recordist:
    """A person with a place and a recorder, which colour all their recordings."""

    name: str
    country: str
    location: str
    latitude: float
    longitude: float
    sample_rate: int
    channels: int
    gain_db: float  # of the peak, below full scale
    equalizer_db: tuple[float, ...]
    background: str
    snr_db: float


@dataclass(frozen=True)
class RecordingPlan:
    """One training recording. ``events``: levels relative to the primary bird's songs."""

    xc_id: int
    species: Species
    recordist: Recordist
    seconds: float
    snr_db: float
    events: tuple[Event, ...]
    listed: tuple[Species, ...]  # heard behind the primary species, and said so
    seed: int
    damage: str = ""  # or "garbage" or "silent"

    @property
    def path(self) -> str:
        return f"train_audio/{self.species.ebird_code}/XC{self.xc_id}.mp3"


@dataclass(frozen=True)
class SoundscapePlan:
    """One soundscape. ``background``: kinds of noise with their levels relative to each other."""

    path: str
    site: str
    name: str  # the audio_id or file_id
    seconds: float
    sample_rate: int
    level_db: float
    background: tuple[tuple[str, float], ...]
    birds: tuple[Event, ...]
    others: tuple[Event, ...]
    plane: tuple[float, float, float] | None  # onset, seconds, SNR in dB
    seed: int

    def labels(self) -> list[tuple[int | None, tuple[str, ...]]]:
        """Return (end of the row in seconds, sorted codes of the birds in it) for every row.

        Soundscapes of site_3 are one row, whose end is None.
        """
        return label_rows(self.birds, self.seconds, whole=self.site == "site_3")

    def named_events(self) -> tuple[Event, ...]:
        """Return the birds and those other animals that the competition's examples name."""
        codes = {animal.ebird_code for animal in LABELLED_ANIMALS}
        named = [event for event in self.others if event.ebird_code in codes]
        return tuple(sorted((*self.birds, *named), key=lambda event: event.onset_seconds))

    def labels_with_animals(self) -> list[tuple[int | None, tuple[str, ...]]]:
        """As ``labels``, for all ``named_events``."""
        return label_rows(self.named_events(), self.seconds, whole=self.site == "site_3")


@dataclass(frozen=True)
class NoisePlan:
    path: str
    kind: str
    seconds: float
    seed: int


@dataclass(frozen=True)
class DemoPlan:
    """All files of the demo data."""

    recordings: tuple[RecordingPlan, ...]
    examples: tuple[SoundscapePlan, ...]
    tests: tuple[SoundscapePlan, ...]
    noises: tuple[NoisePlan, ...]


def draw_seed(config: DemoConfig, *name: str | int) -> int:
    """Return the seed of the random stream of this name: names differ, so do streams."""
    text = "/".join(str(part) for part in (config.seed, *name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def stream(config: DemoConfig, *name: str | int) -> np.random.Generator:
    """Return the random stream of this name, at its beginning."""
    return np.random.default_rng(draw_seed(config, *name))


def uniform(generator: np.random.Generator, low: float, high: float) -> float:
    return float(generator.uniform(low, high))


def pick(
    generator: np.random.Generator, items: Sequence[Item], weights: np.ndarray | None = None
) -> Item:
    shares = None if weights is None else weights / weights.sum()
    return items[int(generator.choice(len(items), p=shares))]


def draw_bird(config: DemoConfig, who: str, species: Species) -> Individual:
    """Draw the bird of this name; every mention of the name is the same bird."""
    return draw_individual(who, species, stream(config, "bird", who))


def draw_event(
    bird: Individual, onset: float, snr_db: float, distance: float, generator: np.random.Generator
) -> Event:
    seed = int(generator.integers(2**62))
    seconds = compose_song(bird, np.random.default_rng(seed)).seconds
    return Event(
        individual=bird,
        song_seed=seed,
        onset_seconds=onset,
        seconds=seconds,
        snr_db=snr_db,
        distance_metres=distance,
    )


def label_rows(
    events: Sequence[Event], seconds: float, whole: bool
) -> list[tuple[int | None, tuple[str, ...]]]:
    """Return (end of the row, or None; sorted codes heard in it) for all rows of a soundscape."""
    if whole:
        return [(None, tuple(sorted({event.ebird_code for event in events})))]
    ends = range(SEGMENT_SECONDS, int(seconds) + 1, SEGMENT_SECONDS)
    rows = []
    for end in ends:
        heard = {e.ebird_code for e in events if e.is_heard(end - SEGMENT_SECONDS, end)}
        rows.append((end, tuple(sorted(heard))))
    return rows
