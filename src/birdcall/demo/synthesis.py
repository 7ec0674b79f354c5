"""Turn the written description of a song into a waveform: syllables, phrases, songs, animals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from scipy.interpolate import PchipInterpolator

_PITCH_SPREAD = 0.08  # individuals of a species differ by up to this share
_TEMPO_SPREAD = 0.15
_RENDITION_PITCH_SD = 0.008  # one bird does not sing twice the same
_RENDITION_TEMPO_SD = 0.015
_SYLLABLE_PITCH_SD = 0.004
_SYLLABLE_LEVEL_SD_DB = 0.8

_CONTOUR_POINTS = 128
_HIGHEST_SHARE_OF_RATE = 0.46  # harmonics above would alias, or be cut by an encoder anyway

WHISTLE = (0.0, -26.0, -40.0)  # levels of the harmonics of a nearly pure tone, dB
REEDY = (0.0, -9.0, -16.0, -24.0, -30.0)


@dataclass(frozen=True)
class Syllable:
    """One continuous note of a bird, and the silence after it.

    ``contour_hz`` is the fundamental at evenly spaced moments. ``harmonics_db`` are the levels of
    the fundamental and its overtones. ``attack`` and ``release`` are shares of the length.
    ``vibrato_hz`` and ``vibrato_depth`` (a share of the pitch) make a warble, and above 50 Hz a
    buzz. ``roughness`` (0 to 1) is the share of the note whose amplitude is noise of bandwidth
    ``rough_hz``: what makes a voice hoarse.
    """

    contour_hz: tuple[float, ...]
    seconds: float
    gap_seconds: float = 0.03
    gain_db: float = 0.0
    harmonics_db: tuple[float, ...] = WHISTLE
    attack: float = 0.15
    release: float = 0.3
    vibrato_hz: float = 0.0
    vibrato_depth: float = 0.0
    roughness: float = 0.0
    rough_hz: float = 250.0

    def __post_init__(self) -> None:
        if not self.contour_hz or min(self.contour_hz) <= 0 or self.seconds <= 0:
            raise ValueError(f"{self}: a syllable needs a contour and a length above 0")


@dataclass(frozen=True)
class Motif:
    """Syllables repeated ``repeats`` (fewest, most) times: a trill, a series, or just one note.

    Over the repeats the level rises by ``crescendo_db``, the pitch changes by the factor
    ``glide``, and the tempo by the factor ``accelerando``.
    """

    syllables: tuple[Syllable, ...]
    repeats: tuple[int, int] = (1, 1)
    crescendo_db: float = 0.0
    glide: float = 1.0
    accelerando: float = 1.0
    pause_seconds: float = 0.0


@dataclass(frozen=True)
class Phrase:
    """A named sequence of motifs: what a bird has in its repertoire. ``kind`` is song or call."""

    name: str
    motifs: tuple[Motif, ...]
    kind: str = "song"


@dataclass(frozen=True)
class SyntheticSpecies:
    """What all birds of a species share, and where that is written down.

    An individual knows ``repertoire`` (fewest, most) of the phrases. A song is
    ``phrases_per_song`` of them, ``phrase_gap_seconds`` apart; the next song follows after
    ``song_gap_seconds``. ``band_hz`` holds the fundamentals of the average bird's song.
    """

    ebird_code: str
    scientific_name: str
    common_name: str
    description: str
    source: str
    band_hz: tuple[float, float]
    phrases: tuple[Phrase, ...]
    repertoire: tuple[int, int] = (1, 1)
    phrases_per_song: tuple[int, int] = (1, 1)
    phrase_gap_seconds: tuple[float, float] = (0.1, 0.3)
    song_gap_seconds: tuple[float, float] = (2.0, 6.0)

    @property
    def label(self) -> str:
        """The competition's ``primary_label``."""
        return f"{self.scientific_name}_{self.common_name}"


@dataclass(frozen=True)
class Individual:
    """One bird: its name, pitch and tempo relative to the species, and the phrases it knows."""

    name: str
    species: SyntheticSpecies
    pitch: float
    tempo: float
    repertoire: tuple[Phrase, ...]


@dataclass(frozen=True)
class Note:
    """One syllable of a song, with all that chance decides."""

    onset_seconds: float
    seconds: float
    syllable: Syllable
    pitch: float
    gain_db: float


@dataclass(frozen=True)
class Song:
    """A song written down; ``render_song`` makes the waveform. ``kind`` is song or call."""

    notes: tuple[Note, ...]
    kind: str

    @property
    def seconds(self) -> float:
        return max(note.onset_seconds + note.seconds for note in self.notes)


def draw_individual(
    name: str, species: SyntheticSpecies, generator: np.random.Generator
) -> Individual:
    """Draw a bird of ``species``: pitch within 8 %, tempo within 15 %, its own repertoire."""
    fewest, most = species.repertoire
    n_known = generator.integers(fewest, min(most, len(species.phrases)) + 1)
    known = np.sort(generator.permutation(len(species.phrases))[:n_known])
    return Individual(
        name=name,
        species=species,
        pitch=float(1 + generator.uniform(-_PITCH_SPREAD, _PITCH_SPREAD)),
        tempo=float(1 + generator.uniform(-_TEMPO_SPREAD, _TEMPO_SPREAD)),
        repertoire=tuple(species.phrases[index] for index in known),
    )


def compose_song(individual: Individual, generator: np.random.Generator) -> Song:
    """Write down one song: which phrases, how many repeats, how pitch and level wander."""
    species = individual.species
    pitch = individual.pitch * (1 + _RENDITION_PITCH_SD * generator.standard_normal())
    tempo = individual.tempo * (1 + _RENDITION_TEMPO_SD * generator.standard_normal())
    notes: list[Note] = []
    onset = 0.0
    phrase = None
    fewest, most = species.phrases_per_song
    for _ in range(generator.integers(fewest, most + 1)):
        choices = [item for item in individual.repertoire if item is not phrase]
        phrase = choices[generator.integers(len(choices))] if choices else phrase
        assert phrase is not None  # a repertoire is never empty
        written, onset = _compose_phrase(
            phrase, onset, pitch=pitch, tempo=tempo, generator=generator
        )
        notes += written
        onset += float(generator.uniform(*species.phrase_gap_seconds)) / tempo
    assert phrase is not None
    return Song(notes=tuple(notes), kind=phrase.kind)


def render_song(song: Song, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    """Return the song as float32 ``(samples,)`` with a peak of 1."""
    waveform = np.zeros(max(1, int(np.ceil(song.seconds * sample_rate))), np.float32)
    for note in song.notes:
        rendered = _render_note(note, sample_rate, generator)
        start = int(note.onset_seconds * sample_rate)
        room = waveform[start : start + len(rendered)]
        room += rendered[: len(room)]
    peak = np.abs(waveform).max()
    return waveform / peak if peak > 0 else waveform


def _compose_phrase(
    phrase: Phrase,
    onset: float,
    pitch: float,
    tempo: float,
    generator: np.random.Generator,
) -> tuple[list[Note], float]:
    notes: list[Note] = []
    for motif in phrase.motifs:
        fewest, most = motif.repeats
        repeats = int(generator.integers(fewest, most + 1))
        for repeat in range(repeats):
            progress = repeat / (repeats - 1) if repeats > 1 else 0.0
            speed = tempo * motif.accelerando**progress
            for syllable in motif.syllables:
                note = Note(
                    onset_seconds=onset,
                    seconds=syllable.seconds / speed,
                    syllable=syllable,
                    pitch=pitch
                    * motif.glide**progress
                    * float(1 + _SYLLABLE_PITCH_SD * generator.standard_normal()),
                    gain_db=syllable.gain_db
                    + motif.crescendo_db * (progress - 1)
                    + _SYLLABLE_LEVEL_SD_DB * float(generator.standard_normal()),
                )
                notes.append(note)
                onset += (syllable.seconds + syllable.gap_seconds) / speed
        onset += motif.pause_seconds / tempo
    return notes, onset


@lru_cache(maxsize=4096)
def _smooth_contour(contour_hz: tuple[float, ...]) -> np.ndarray:
    """Log frequency at ``_CONTOUR_POINTS`` moments; monotone between the points (no overshoot)."""
    if len(contour_hz) == 1:
        return np.full(_CONTOUR_POINTS, np.log(contour_hz[0]))
    knots = np.linspace(0, 1, len(contour_hz))
    return PchipInterpolator(knots, np.log(contour_hz))(np.linspace(0, 1, _CONTOUR_POINTS))


def _render_note(note: Note, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    syllable = note.syllable
    n_samples = max(2, round(note.seconds * sample_rate))
    position = np.linspace(0, 1, n_samples)
    contour = _smooth_contour(syllable.contour_hz)
    frequency = note.pitch * np.exp(
        np.interp(position, np.linspace(0, 1, _CONTOUR_POINTS), contour)
    )
    if syllable.vibrato_depth:
        turns = syllable.vibrato_hz * note.seconds * position + generator.random()
        frequency *= 1 + syllable.vibrato_depth * np.sin(2 * np.pi * turns)
    phase = 2 * np.pi * np.cumsum(frequency) / sample_rate + generator.uniform(0, 2 * np.pi)
    highest = frequency.max()
    tone = np.zeros(n_samples)
    for number, level_db in enumerate(syllable.harmonics_db, start=1):
        if number * highest < _HIGHEST_SHARE_OF_RATE * sample_rate:
            tone += 10 ** (level_db / 20) * np.sin(number * phase)
    if syllable.roughness:
        n_knots = int(2 * syllable.rough_hz * note.seconds) + 4
        knots = generator.standard_normal(n_knots)
        noise = np.interp(position * (n_knots - 1), np.arange(n_knots), knots)
        tone *= 1 - syllable.roughness + syllable.roughness * noise
    rise = np.clip(position / max(syllable.attack, 1e-6), 0, 1)
    fall = np.clip((1 - position) / max(syllable.release, 1e-6), 0, 1)
    envelope = (1 - np.cos(np.pi * np.minimum(rise, fall))) / 2  # raised cosines
    tone *= envelope * 10 ** (note.gain_db / 20)
    return tone.astype(np.float32)


# --- animals that are no bird of the demo's classes ---


_ROUGH = (-6.0, 0.0, -3.0, -6.0, -9.0, -14.0)  # levels of the harmonics, dB


def _animal(
    names: tuple[str, str, str], description: str, motifs: list[Motif], gap: tuple[float, float]
) -> SyntheticSpecies:
    """Make an animal of ``names``: code, scientific name, common name."""
    code, scientific_name, common_name = names
    phrases = tuple(
        Phrase(f"{common_name} {index}", (motif,), "call") for index, motif in enumerate(motifs)
    )
    return SyntheticSpecies(
        ebird_code=code,
        scientific_name=scientific_name,
        common_name=common_name,
        description=description,
        source="general knowledge; a distractor, nothing is measured on it",
        band_hz=(300.0, 8_000.0),
        phrases=phrases,
        repertoire=(1, len(phrases)),
        song_gap_seconds=gap,
    )


_rough_call = partial(Syllable, harmonics_db=_ROUGH)


_SQUIRREL = _animal(
    ("squirrel", "Tamiasciurus douglasii", "Douglas Squirrel"),
    "A long, hoarse chatter of short barks.",
    [
        Motif((_rough_call((1_500, 1_250, 900), 0.05, 0.07, roughness=0.6),), (8, 25)),
        Motif((_rough_call((2_600, 2_100), 0.07, 0.13, roughness=0.7),), (3, 9)),
    ],
    gap=(1.0, 4.0),
)
_MOUNTAIN_QUAIL = _animal(
    ("mouqua", "Oreortyx pictus", "Mountain Quail"),
    "A single loud, resonant, falling whistle, quark.",
    [Motif((Syllable((1_300, 1_750, 1_500, 1_250), 0.24, harmonics_db=REEDY),))],
    gap=(3.0, 8.0),
)
_WHITE_HEADED_WOODPECKER = _animal(
    ("whhwoo", "Dryobates albolarvatus", "White-headed Woodpecker"),
    "A sharp, rattling double or triple peek.",
    [Motif((Syllable((3_400, 4_200, 2_900), 0.035, 0.035, harmonics_db=REEDY),), (2, 4))],
    gap=(1.5, 5.0),
)
_UNKNOWN_BIRD = _animal(
    ("unk", "Aves sp.", "unknown bird"),
    "A thin seep, a hard chip or a buzz that nobody could name.",
    [
        Motif((Syllable((7_800, 7_300), 0.25, 0.2),), (1, 3)),
        Motif((Syllable((5_600, 4_200), 0.03, 0.4),), (1, 5)),
        Motif((Syllable((4_700, 4_500), 0.35, 0.2, vibrato_hz=70, vibrato_depth=0.12),), (1, 2)),
    ],
    gap=(2.0, 6.0),
)
_DOG = _animal(
    ("dog", "Canis familiaris", "Dog"),
    "Hoarse barks, two to six in a row.",
    [Motif((_rough_call((420, 560, 380), 0.17, 0.3, roughness=0.5, rough_hz=90),), (2, 6))],
    gap=(2.0, 6.0),
)
_SPRING_PEEPER = _animal(
    ("frog", "Pseudacris crucifer", "Spring Peeper"),
    "A short, clear, rising whistle close to 3 kHz, about once a second.",
    [Motif((Syllable((2_700, 2_850, 3_050), 0.14, 0.75, harmonics_db=WHISTLE),), (3, 9))],
    gap=(1.0, 3.0),
)
# Those that the competition's example annotations name.
LABELLED_ANIMALS = (_SQUIRREL, _MOUNTAIN_QUAIL, _WHITE_HEADED_WOODPECKER, _UNKNOWN_BIRD)
OTHER_ANIMALS = (*LABELLED_ANIMALS, _DOG, _SPRING_PEEPER)
# Collections of bird-free noise contain them too (ESC-50 has dogs and frogs).
BIRD_FREE_ANIMALS = {"dog": _DOG, "frog": _SPRING_PEEPER, "squirrel": _SQUIRREL}
