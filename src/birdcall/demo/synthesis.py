"""Turn the written description of a song into sound: syllables, phrases, songs, individuals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.interpolate import PchipInterpolator

PITCH_SPREAD = 0.08  # individuals of a species differ by up to this share
TEMPO_SPREAD = 0.15
RENDITION_PITCH_SD = 0.008  # one bird does not sing twice the same
RENDITION_TEMPO_SD = 0.015
SYLLABLE_PITCH_SD = 0.004
SYLLABLE_LEVEL_SD_DB = 0.8

CONTOUR_POINTS = 128
HIGHEST_SHARE_OF_RATE = 0.46  # harmonics above would alias, or be cut by an encoder anyway
FRAME_SECONDS = 0.02
ACTIVE_RANGE_DB = 20.0

WHISTLE = (0.0, -26.0, -40.0)  # levels of the harmonics of a nearly pure tone, dB
REEDY = (0.0, -9.0, -16.0, -24.0, -30.0)


@dataclass(frozen=True)
class Syllable:
    """One continuous sound of a bird, and the silence after it.

    ``contour_hz`` is the fundamental at evenly spaced moments. ``harmonics_db`` are the levels of
    the fundamental and its overtones. ``attack`` and ``release`` are shares of the length.
    ``vibrato_hz`` and ``vibrato_depth`` (a share of the pitch) make a warble, and above 50 Hz a
    buzz. ``roughness`` (0 to 1) is the share of the sound whose amplitude is noise of bandwidth
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
class Figure:
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
    """A named sequence of figures: what a bird has in its repertoire. ``kind`` is song or call."""

    name: str
    figures: tuple[Figure, ...]
    kind: str = "song"


@dataclass(frozen=True)
class Species:
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
    species: Species
    pitch: float
    tempo: float
    repertoire: tuple[Phrase, ...]


@dataclass(frozen=True)
class Note:
    """One syllable of a song, with all that chance decides."""

    onset_seconds: float
    syllable: Syllable
    pitch: float
    tempo: float
    gain_db: float

    @property
    def seconds(self) -> float:
        return self.syllable.seconds / self.tempo


@dataclass(frozen=True)
class Song:
    """A song written down; ``render_song`` makes the sound. ``kind`` is song or call."""

    notes: tuple[Note, ...]
    kind: str

    @property
    def seconds(self) -> float:
        return max(note.onset_seconds + note.seconds for note in self.notes)


def draw_individual(name: str, species: Species, generator: np.random.Generator) -> Individual:
    """Draw a bird of ``species``: pitch within 8 %, tempo within 15 %, its own repertoire."""
    fewest, most = species.repertoire
    n_known = generator.integers(fewest, min(most, len(species.phrases)) + 1)
    known = np.sort(generator.permutation(len(species.phrases))[:n_known])
    return Individual(
        name=name,
        species=species,
        pitch=float(1 + generator.uniform(-PITCH_SPREAD, PITCH_SPREAD)),
        tempo=float(1 + generator.uniform(-TEMPO_SPREAD, TEMPO_SPREAD)),
        repertoire=tuple(species.phrases[index] for index in known),
    )


def compose_song(individual: Individual, generator: np.random.Generator) -> Song:
    """Write down one song: which phrases, how many repeats, how pitch and level wander."""
    species = individual.species
    pitch = individual.pitch * (1 + RENDITION_PITCH_SD * generator.standard_normal())
    tempo = individual.tempo * (1 + RENDITION_TEMPO_SD * generator.standard_normal())
    notes: list[Note] = []
    onset = 0.0
    phrase = None
    for _ in range(_draw_integer(species.phrases_per_song, generator)):
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
        sound = _render_note(note, sample_rate, generator)
        start = int(note.onset_seconds * sample_rate)
        room = waveform[start : start + len(sound)]
        room += sound[: len(room)]
    peak = np.abs(waveform).max()
    return waveform / peak if peak > 0 else waveform


def sing(individual: Individual, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    """Return one song of ``individual`` as float32 ``(samples,)`` with a peak of 1."""
    return render_song(compose_song(individual, generator), sample_rate, generator)


def active_power(waveform: np.ndarray, sample_rate: int) -> float:
    """Return the mean power of the active part of a sound: the pauses in a song do not count.

    Active are the frames of 20 ms whose power is within 20 dB of the loudest frame's.
    """
    length = max(1, int(FRAME_SECONDS * sample_rate))
    n_frames = max(1, len(waveform) // length)
    power = np.mean(
        np.square(waveform[: n_frames * length], dtype=np.float64).reshape(n_frames, -1),
        1,
    )
    return float(power[power >= power.max() * 10 ** (-ACTIVE_RANGE_DB / 10)].mean())


def _draw_integer(bounds: tuple[int, int], generator: np.random.Generator) -> int:
    return int(generator.integers(bounds[0], bounds[1] + 1))


def _compose_phrase(
    phrase: Phrase,
    onset: float,
    pitch: float,
    tempo: float,
    generator: np.random.Generator,
) -> tuple[list[Note], float]:
    notes: list[Note] = []
    for figure in phrase.figures:
        repeats = _draw_integer(figure.repeats, generator)
        for repeat in range(repeats):
            progress = repeat / (repeats - 1) if repeats > 1 else 0.0
            speed = tempo * figure.accelerando**progress
            for syllable in figure.syllables:
                note = Note(
                    onset_seconds=onset,
                    syllable=syllable,
                    pitch=pitch
                    * figure.glide**progress
                    * float(1 + SYLLABLE_PITCH_SD * generator.standard_normal()),
                    tempo=speed,
                    gain_db=syllable.gain_db
                    + figure.crescendo_db * (progress - 1)
                    + SYLLABLE_LEVEL_SD_DB * float(generator.standard_normal()),
                )
                notes.append(note)
                onset += (syllable.seconds + syllable.gap_seconds) / speed
        onset += figure.pause_seconds / tempo
    return notes, onset


@lru_cache(maxsize=4096)
def _smooth_contour(contour_hz: tuple[float, ...]) -> np.ndarray:
    """Log frequency at ``CONTOUR_POINTS`` moments; monotone between the points (no overshoot)."""
    if len(contour_hz) == 1:
        return np.full(CONTOUR_POINTS, np.log(contour_hz[0]))
    knots = np.linspace(0, 1, len(contour_hz))
    return PchipInterpolator(knots, np.log(contour_hz))(np.linspace(0, 1, CONTOUR_POINTS))


def _render_note(note: Note, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    syllable = note.syllable
    n_samples = max(2, round(note.seconds * sample_rate))
    place = np.linspace(0, 1, n_samples)
    contour = _smooth_contour(syllable.contour_hz)
    frequency = note.pitch * np.exp(np.interp(place, np.linspace(0, 1, CONTOUR_POINTS), contour))
    if syllable.vibrato_depth:
        turns = syllable.vibrato_hz * note.seconds * place + generator.random()
        frequency *= 1 + syllable.vibrato_depth * np.sin(2 * np.pi * turns)
    phase = 2 * np.pi * np.cumsum(frequency) / sample_rate + generator.uniform(0, 2 * np.pi)
    highest = frequency.max()
    tone = np.zeros(n_samples)
    for number, level_db in enumerate(syllable.harmonics_db, start=1):
        if number * highest < HIGHEST_SHARE_OF_RATE * sample_rate:
            tone += 10 ** (level_db / 20) * np.sin(number * phase)
    if syllable.roughness:
        tone *= _rough_amplitude(syllable, note.seconds, place, generator)
    tone *= _envelope(place, syllable.attack, syllable.release) * 10 ** (note.gain_db / 20)
    return tone.astype(np.float32)


def _rough_amplitude(
    syllable: Syllable,
    seconds: float,
    place: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    n_knots = int(2 * syllable.rough_hz * seconds) + 4
    knots = generator.standard_normal(n_knots)
    noise = np.interp(place * (n_knots - 1), np.arange(n_knots), knots)
    return 1 - syllable.roughness + syllable.roughness * noise


def _envelope(place: np.ndarray, attack: float, release: float) -> np.ndarray:
    """Raised-cosine rise and fall over shares ``attack`` and ``release`` of the note."""
    rise = np.clip(place / max(attack, 1e-6), 0, 1)
    fall = np.clip((1 - place) / max(release, 1e-6), 0, 1)
    return (1 - np.cos(np.pi * np.minimum(rise, fall))) / 2
