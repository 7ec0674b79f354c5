"""Make what is heard around the demo's birds: insects, planes, other animals, distance, echo."""

from __future__ import annotations

import numpy as np
from scipy.signal import fftconvolve

from birdcall.audio.filters import NOISE_RMS, make_noise, shape_spectrum, slow_fluctuation
from birdcall.demo.synthesis import REEDY, WHISTLE, Figure, Phrase, Species, Syllable, active_power

AIR_DB_PER_KHZ_AND_METRE = 0.02  # air and leaves: at 50 m a song loses 1 dB per kHz
ECHO_SECONDS = (0.2, 0.5)  # time in which the echo of a forest falls by 60 dB
EQUALIZER_HZ = (125.0, 500.0, 2_000.0, 8_000.0)


# --- animals that are no bird of the demo's classes ---------------------------------------------


def _animal(
    code: str, latin: str, name: str, description: str, *figures: Figure, gap: tuple[float, float]
) -> Species:
    phrases = tuple(Phrase(f"{name} {i}", (figure,), "call") for i, figure in enumerate(figures))
    return Species(
        ebird_code=code,
        scientific_name=latin,
        common_name=name,
        description=description,
        source="general knowledge; a distractor, nothing is measured on it",
        band_hz=(300.0, 8_000.0),
        phrases=phrases,
        repertoire=(1, len(phrases)),
        song_gap_seconds=gap,
    )


_ROUGH = (-6.0, 0.0, -3.0, -6.0, -9.0, -14.0)

SQUIRREL = _animal(
    "squirrel",
    "Tamiasciurus douglasii",
    "Douglas Squirrel",
    "A long, hoarse chatter of short barks.",
    Figure(
        (Syllable((1_500, 1_250, 900), 0.05, 0.07, harmonics_db=_ROUGH, roughness=0.6),), (8, 25)
    ),
    Figure((Syllable((2_600, 2_100), 0.07, 0.13, harmonics_db=_ROUGH, roughness=0.7),), (3, 9)),
    gap=(1.0, 4.0),
)
MOUNTAIN_QUAIL = _animal(
    "mouqua",
    "Oreortyx pictus",
    "Mountain Quail",
    "A single loud, resonant, falling whistle, quark.",
    Figure((Syllable((1_300, 1_750, 1_500, 1_250), 0.24, harmonics_db=REEDY),)),
    gap=(3.0, 8.0),
)
WHITE_HEADED_WOODPECKER = _animal(
    "whhwoo",
    "Dryobates albolarvatus",
    "White-headed Woodpecker",
    "A sharp, rattling double or triple peek.",
    Figure((Syllable((3_400, 4_200, 2_900), 0.035, 0.035, harmonics_db=REEDY),), (2, 4)),
    gap=(1.5, 5.0),
)
UNKNOWN_BIRD = _animal(
    "unk",
    "Aves sp.",
    "unknown bird",
    "A thin seep, a hard chip or a buzz that nobody could name.",
    Figure((Syllable((7_800, 7_300), 0.25, 0.2),), (1, 3)),
    Figure((Syllable((5_600, 4_200), 0.03, 0.4),), (1, 5)),
    Figure((Syllable((4_700, 4_500), 0.35, 0.2, vibrato_hz=70, vibrato_depth=0.12),), (1, 2)),
    gap=(2.0, 6.0),
)
DOG = _animal(
    "dog",
    "Canis familiaris",
    "Dog",
    "Hoarse barks, two to six in a row.",
    Figure(
        (Syllable((420, 560, 380), 0.17, 0.3, harmonics_db=_ROUGH, roughness=0.5, rough_hz=90),),
        (2, 6),
    ),
    gap=(2.0, 6.0),
)
SPRING_PEEPER = _animal(
    "frog",
    "Pseudacris crucifer",
    "Spring Peeper",
    "A short, clear, rising whistle close to 3 kHz, about once a second.",
    Figure((Syllable((2_700, 2_850, 3_050), 0.14, 0.75, harmonics_db=WHISTLE),), (3, 9)),
    gap=(1.0, 3.0),
)
LABELLED_ANIMALS = (SQUIRREL, MOUNTAIN_QUAIL, WHITE_HEADED_WOODPECKER, UNKNOWN_BIRD)
OTHER_ANIMALS = (*LABELLED_ANIMALS, DOG, SPRING_PEEPER)
# What collections of bird-free sound hold too (ESC-50 has dogs and frogs).
BIRD_FREE_ANIMALS = {"dog": DOG, "frog": SPRING_PEEPER, "squirrel": SQUIRREL}


# --- background sounds --------------------------------------------------------------------------


def make_background(
    kind: str, n_samples: int, sample_rate: int, generator: np.random.Generator
) -> np.ndarray:
    """Return ``make_noise`` of this kind, or insects; float32 ``(n_samples,)``, RMS 0.1."""
    if kind != "insects":
        return make_noise(kind, n_samples, sample_rate, generator)
    return make_insects(n_samples, sample_rate, generator)


def make_insects(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    """Return one insect that calls in bouts, with a faint hiss; float32, RMS ``NOISE_RMS``.

    A cricket (2 to 4 chirps a second of 3 or 4 pulses, 4 to 5.5 kHz), a conehead (an even train
    of 8 to 25 pulses a second, 3.5 to 7 kHz, where sparrows trill) or a cicada (a buzz).
    """
    seconds = np.arange(n_samples, dtype=np.float32) / sample_rate
    kind = generator.choice(("cricket", "conehead", "cicada"))
    if kind == "cricket":
        hz = generator.uniform(4_000, 5_500)
        chirp = (seconds * generator.uniform(2, 4)) % 1 < generator.uniform(0.3, 0.5)
        pulses = _pulses(seconds * generator.uniform(22, 35)) * chirp
    elif kind == "conehead":
        hz = generator.uniform(3_500, 7_000)
        pulses = _pulses(seconds * generator.uniform(8, 25))
    else:
        hz = generator.uniform(4_500, 7_500)
        pulses = 0.6 + 0.4 * np.sin(2 * np.pi * generator.uniform(60, 150) * seconds)
    width_hz = hz * (0.15 if kind == "cicada" else 0.02)
    carrier = shape_spectrum(
        generator.standard_normal(n_samples, dtype=np.float32),
        sample_rate,
        lambda frequency: np.exp(-0.5 * ((frequency - hz) / width_hz) ** 2),
    )
    calling = slow_fluctuation(n_samples, sample_rate, generator.uniform(0.05, 0.15), generator)
    insect = carrier * pulses / (1 + np.exp(-8 * (calling + 0.5)))
    insect /= np.sqrt(np.mean(np.square(insect))) + 1e-9
    insect += make_noise("pink", n_samples, sample_rate, generator)  # 20 dB below
    return (insect * (NOISE_RMS / np.sqrt(np.mean(np.square(insect))))).astype(np.float32)


def make_plane(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    """Return a propeller plane that comes, passes and goes; float32, active power 1."""
    place = np.linspace(-1, 1, n_samples)
    hz = generator.uniform(75, 120) * (1 - 0.06 * np.tanh(3 * place))  # Doppler
    phase = 2 * np.pi * np.cumsum(hz) / sample_rate
    engine = sum(np.sin(k * phase + k) / k**0.7 for k in range(1, 9))
    roar = make_noise("brown", n_samples, sample_rate, generator) / NOISE_RMS
    plane = (engine + 2 * roar) * np.exp(-4 * place**2) * np.cos(np.pi / 2 * place)
    return (plane / np.sqrt(active_power(plane, sample_rate))).astype(np.float32)


def _pulses(turns: np.ndarray) -> np.ndarray:
    """Smooth pulses in the first 55 % of every turn."""
    place = turns % 1 / 0.55
    return np.where(place < 1, np.sin(np.pi * place) ** 2, 0)


# --- the way from the bird to the microphone ----------------------------------------------------


def propagate(
    waveform: np.ndarray, sample_rate: int, distance_metres: float, generator: np.random.Generator
) -> np.ndarray:
    """Return a sound as heard from afar: highs damped, an echo added; longer by the echo.

    The echo is noise that decays by 60 dB in 0.2 to 0.5 s; its level grows with the distance, from
    18 dB below the direct sound near by to 8 dB below it at 80 m.
    """
    echo_seconds = generator.uniform(*ECHO_SECONDS)
    n_echo = int(echo_seconds * sample_rate)
    decay = 10 ** (-3 * np.arange(n_echo) / n_echo)
    echo = generator.standard_normal(n_echo) * decay
    echo_db = np.clip(-18 + distance_metres / 8, -18, -8)
    echo *= 10 ** (echo_db / 20) / np.sqrt(np.sum(np.square(echo)))
    echo[0] = 1.0  # the direct sound
    heard = fftconvolve(waveform, echo.astype(np.float32))
    loss_db = AIR_DB_PER_KHZ_AND_METRE * distance_metres

    def amplitude(frequency: np.ndarray) -> np.ndarray:
        return 10 ** (-loss_db * frequency / 1_000 / 20)

    return shape_spectrum(heard, sample_rate, amplitude).astype(np.float32)


def equalize(waveform: np.ndarray, sample_rate: int, gains_db: tuple[float, ...]) -> np.ndarray:
    """Apply a recorder's colour: gains at 125, 500, 2,000 and 8,000 Hz, between them smooth."""

    def amplitude(frequency: np.ndarray) -> np.ndarray:
        octave = np.log2(np.maximum(frequency, 1.0))
        return 10 ** (np.interp(octave, np.log2(EQUALIZER_HZ), gains_db) / 20)

    return shape_spectrum(waveform, sample_rate, amplitude).astype(np.float32)


def gain_for_snr(
    sound: np.ndarray, background: np.ndarray, snr_db: float, sample_rate: int
) -> float:
    """Return the gain that puts ``sound`` at ``snr_db`` over ``background``.

    The SNR is the power of the sound's active part (``active_power``) over the mean power of the
    background in the stretch where the sound is, both over all frequencies.
    """
    background_power = float(np.mean(np.square(background, dtype=np.float64)))
    power = active_power(sound, sample_rate)
    return float(np.sqrt(10 ** (snr_db / 10) * background_power / power)) if power > 0 else 0.0
