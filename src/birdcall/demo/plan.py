"""What the demo data holds, before any audio is made: which files, who sings when, how loud."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from birdcall.audio.filters import NOISE_KINDS
from birdcall.config import SEGMENT_SECONDS, require, require_range, require_share
from birdcall.demo.songs import SPECIES
from birdcall.demo.synthesis import (
    BIRD_FREE_ANIMALS,
    LABELLED_ANIMALS,
    Individual,
    Song,
    SyntheticSpecies,
    compose_song,
    draw_individual,
)

_BACKGROUND_KINDS = (*NOISE_KINDS, "insects")
# Insects twice: no two species are alike, and their trill can be taken for a bird's.
NOISE_FILE_KINDS = (*_BACKGROUND_KINDS, *BIRD_FREE_ANIMALS, "insects")

_RECORDER_RATES = (44_100, 32_000, 48_000, 44_100, 22_050)  # in turn: small demos have all
_HOMES = (
    ("United States", "Ithaca, Tompkins, New York", 42.44, -76.50),
    ("United States", "Duluth, St. Louis, Minnesota", 46.79, -92.10),
    ("United States", "Blacksburg, Montgomery, Virginia", 37.23, -80.41),
    ("Canada", "Chaffeys Lock, Leeds and Grenville, Ontario", 44.58, -76.32),
    ("Canada", "Wolfville, Kings, Nova Scotia", 45.09, -64.37),
)
_EQUALIZER_BOUNDS_DB = ((-18, 3), (-4, 4), (-2, 4), (-9, 3))

_Item = TypeVar("_Item")
_MIN_OVERLAP_SECONDS = 0.5  # a song counts in a row with so much of it, or half of it


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
    def species(self) -> tuple[SyntheticSpecies, ...]:
        """The demo's classes, spread over the table so that a small demo has variety too."""
        indices = np.linspace(0, len(SPECIES) - 1, self.n_species).round().astype(int)
        return tuple(SPECIES[index] for index in indices)


@dataclass(frozen=True)
class PlannedSong:
    """One song of one individual in a file."""

    individual: Individual
    song: Song
    song_seed: int
    onset_seconds: float
    seconds: float
    snr_db: float  # over the background, see `rendering.mix_soundscape`
    distance_metres: float

    @classmethod
    def draw(
        cls,
        individual: Individual,
        generator: np.random.Generator,
        *,
        onset_seconds: float,
        snr_db: float,
        distance_metres: float,
    ) -> PlannedSong:
        seed = int(generator.integers(2**62))
        song = compose_song(individual, np.random.default_rng(seed))
        return cls(
            individual=individual,
            song=song,
            song_seed=seed,
            onset_seconds=onset_seconds,
            seconds=song.seconds,
            snr_db=snr_db,
            distance_metres=distance_metres,
        )

    @property
    def ebird_code(self) -> str:
        return self.individual.species.ebird_code

    @property
    def offset_seconds(self) -> float:
        return self.onset_seconds + self.seconds

    def counts_in(self, start_seconds: float, end_seconds: float) -> bool:
        """Return whether enough of the song is between two times for a label."""
        inside = min(self.offset_seconds, end_seconds) - max(self.onset_seconds, start_seconds)
        return inside >= min(_MIN_OVERLAP_SECONDS, self.seconds / 2)


class RowLabels(NamedTuple):
    """The species in one row of a soundscape."""

    end: int | None  # of the row, seconds; None: the row is the whole soundscape
    ebird_codes: tuple[str, ...]  # sorted


@dataclass(frozen=True)
class Recordist:
    """A person with a place and a recorder, which show in all their recordings."""

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
    """One training recording; ``songs`` have levels relative to the primary bird's."""

    path: str
    xc_id: int
    species: SyntheticSpecies
    recordist: Recordist
    seconds: float
    snr_db: float
    songs: tuple[PlannedSong, ...]
    listed: tuple[SyntheticSpecies, ...]  # secondary labels
    seed: int
    damage: str = ""  # or "garbage" or "silent"


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
    birds: tuple[PlannedSong, ...]
    others: tuple[PlannedSong, ...]
    plane: tuple[float, float, float] | None  # onset, seconds, SNR in dB
    seed: int

    def labels(self, *, with_animals: bool = False) -> list[RowLabels]:
        """Return the birds in each row, and on request the labelled other animals."""
        songs = self.labelled_songs() if with_animals else self.birds
        return label_rows(songs, self.seconds, is_single_row=self.site == "site_3")

    def labelled_songs(self) -> tuple[PlannedSong, ...]:
        """Return birds and other animals that the competition's example annotations name."""
        codes = {animal.ebird_code for animal in LABELLED_ANIMALS}
        labelled = [song for song in self.others if song.ebird_code in codes]
        return tuple(sorted((*self.birds, *labelled), key=lambda song: song.onset_seconds))


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


def pick(
    generator: np.random.Generator, items: Sequence[_Item], weights: np.ndarray | None = None
) -> _Item:
    shares = None if weights is None else weights / weights.sum()
    return items[int(generator.choice(len(items), p=shares))]


def draw_bird(config: DemoConfig, who: str, species: SyntheticSpecies) -> Individual:
    """Draw the bird of this name; every mention of the name is the same bird."""
    return draw_individual(who, species, stream(config, "bird", who))


def label_rows(
    songs: Sequence[PlannedSong], seconds: float, is_single_row: bool
) -> list[RowLabels]:
    """Return the labels of all rows of a soundscape; a row has `SEGMENT_SECONDS`, or all of it."""
    if is_single_row:
        return [RowLabels(None, tuple(sorted({song.ebird_code for song in songs})))]
    rows = []
    for end in range(SEGMENT_SECONDS, int(seconds) + 1, SEGMENT_SECONDS):
        codes = {song.ebird_code for song in songs if song.counts_in(end - SEGMENT_SECONDS, end)}
        rows.append(RowLabels(end, tuple(sorted(codes))))
    return rows


def plan_recordists(config: DemoConfig) -> tuple[Recordist, ...]:
    """Draw the recordists, the busiest first."""
    recordists = []
    for number in range(config.n_recordists):
        generator = stream(config, "recordist", number)
        country, location, latitude, longitude = pick(generator, _HOMES)
        recordists.append(
            Recordist(
                name=f"Recordist {number + 1:02d}",
                country=country,
                location=location,
                latitude=round(latitude + generator.uniform(-0.3, 0.3), 3),
                longitude=round(longitude + generator.uniform(-0.3, 0.3), 3),
                sample_rate=_RECORDER_RATES[number % len(_RECORDER_RATES)],
                channels=2 if number % 4 == 3 else 1,
                gain_db=generator.uniform(-24, -1),
                equalizer_db=tuple(generator.uniform(*bounds) for bounds in _EQUALIZER_BOUNDS_DB),
                background=pick(generator, _BACKGROUND_KINDS),
                snr_db=generator.uniform(14, 31),
            )
        )
    return tuple(recordists)
