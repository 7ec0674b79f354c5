"""Every synthetic song is what its description says, and birds of a species differ as stated."""

from __future__ import annotations

import csv
from importlib import resources

import numpy as np
import pytest
from scipy.signal import spectrogram, welch

from birdcall.demo.rendering import active_power
from birdcall.demo.songs import SPECIES
from birdcall.demo.synthesis import (
    Syllable,
    compose_song,
    draw_individual,
    render_song,
)

SAMPLE_RATE = 32_000
BY_CODE = {species.ebird_code: species for species in SPECIES}
LOUDEST_ABOVE_FUNDAMENTAL = {"amecro", "blujay"}  # most energy is in the overtones


def individual(code, seed=0, phrase=None):
    """Return a bird that knows only ``phrase``, or a drawn repertoire."""
    bird = draw_individual("test", BY_CODE[code], np.random.default_rng(seed))
    if phrase is None:
        return bird
    known = tuple(item for item in bird.species.phrases if item.name == phrase)
    return type(bird)(bird.name, bird.species, bird.pitch, bird.tempo, known)


def sing(bird, sample_rate, generator):
    return render_song(compose_song(bird, generator), sample_rate, generator)


def peak_hz(waveform, sample_rate=SAMPLE_RATE):
    frequency, power = welch(waveform, sample_rate, nperseg=min(8192, len(waveform)))
    return frequency[power.argmax()]


def note_rate_hz(waveform, low_hz=4, high_hz=25):
    """Return the strongest rhythm of the envelopes of all frequencies: how often a note returns.

    The envelope of the whole would count a note of two parts twice.
    """
    hop = 64
    frequency, _, power = spectrogram(waveform, SAMPLE_RATE, nperseg=512, noverlap=512 - hop)
    envelope = np.sqrt(power[frequency > 2_000])
    envelope = (envelope - envelope.mean(axis=1, keepdims=True)) * np.hanning(envelope.shape[1])
    rhythm = (np.abs(np.fft.rfft(envelope, 1 << 14, axis=1)) ** 2).sum(axis=0)
    rate = np.fft.rfftfreq(1 << 14, hop / SAMPLE_RATE)
    band = (rate > low_hz) & (rate < high_hz)
    return rate[band][rhythm[band].argmax()]


def test_the_species_are_of_the_competition_with_its_names():
    with resources.files("birdcall").joinpath("ebird_codes.csv").open() as file:
        rows = {row["ebird_code"]: row for row in csv.DictReader(file)}
    assert len(SPECIES) >= 12
    assert [species.ebird_code for species in SPECIES] == sorted(BY_CODE)
    for species in SPECIES:
        row = rows[species.ebird_code]
        assert (species.scientific_name, species.common_name) == (
            row["scientific_name"],
            row["common_name"],
        )
        assert species.description
        assert "BNA" in species.source


@pytest.mark.parametrize("code", sorted(set(BY_CODE) - LOUDEST_ABOVE_FUNDAMENTAL))
@pytest.mark.parametrize("seed", range(4))
def test_the_loudest_pitch_of_a_song_lies_in_the_stated_band(code, seed):
    species = BY_CODE[code]
    bird = individual(code, seed, next(p.name for p in species.phrases))
    low, high = species.band_hz
    assert low * 0.9 <= peak_hz(sing(bird, SAMPLE_RATE, np.random.default_rng(seed))) <= high * 1.1


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_the_stated_band_holds_the_contours_of_the_songs(code):
    species = BY_CODE[code]
    contours = [
        hz
        for phrase in species.phrases[: 1 if code == "bkcchi" else None]
        for motif in phrase.motifs
        for syllable in motif.syllables
        for hz in syllable.contour_hz
    ]
    assert species.band_hz[0] <= min(contours) * 1.05
    assert species.band_hz[1] >= max(contours) * 0.95


@pytest.mark.parametrize("seed", range(6))
def test_a_chipping_sparrow_trills_at_11_to_16_and_a_junco_slower(seed):
    sparrow = sing(individual("chispa", seed), SAMPLE_RATE, np.random.default_rng(seed))
    assert 10.7 <= note_rate_hz(sparrow) <= 16.3
    assert 1.7 <= len(sparrow) / SAMPLE_RATE <= 4.3
    junco = sing(individual("daejun", seed), SAMPLE_RATE, np.random.default_rng(seed))
    assert 6.3 <= note_rate_hz(junco) <= 9.7
    assert len(junco) / SAMPLE_RATE <= 2.4


@pytest.mark.parametrize("seed", range(4))
def test_fee_is_above_bee_by_the_same_ratio_in_every_chickadee(seed):
    song = sing(individual("bkcchi", seed, "fee-bee"), SAMPLE_RATE, np.random.default_rng(seed))
    fee, bee = song[: int(len(song) * 0.35)], song[int(len(song) * 0.6) :]
    assert peak_hz(fee) / peak_hz(bee) == pytest.approx(1.17, abs=0.03)


def test_an_ovenbird_gets_louder_and_a_yellowthroat_does_not():
    def rise_db(code):
        song = sing(individual(code), SAMPLE_RATE, np.random.default_rng(0))
        third = len(song) // 3
        return 10 * np.log10(
            active_power(song[-third:], SAMPLE_RATE) / active_power(song[:third], SAMPLE_RATE)
        )

    assert rise_db("ovenbi1") > 8
    assert abs(rise_db("comyel")) < 3


def test_a_dove_coos_five_or_six_times_at_500_hz():
    song = compose_song(individual("moudov"), np.random.default_rng(0))
    assert len(song.notes) in (5, 6)
    waveform = render_song(song, SAMPLE_RATE, np.random.default_rng(0))
    assert 400 < peak_hz(waveform) < 700
    assert 2.5 < song.seconds < 4.8


def test_a_crow_is_a_stack_of_harmonics_strongest_above_its_fundamental():
    bird = individual("amecro", 0, "caw")
    frequency, power = welch(
        sing(bird, SAMPLE_RATE, np.random.default_rng(0)), SAMPLE_RATE, nperseg=2048
    )
    stack = [
        power[(frequency > k * 400 * bird.pitch) & (frequency < k * 620 * bird.pitch)].max()
        for k in (1, 2, 3, 4)
    ]
    assert 900 < frequency[power.argmax()] < 2_100
    assert min(stack) > 0.03 * max(stack)


def test_several_species_share_a_band_so_that_energy_in_it_names_none():
    def rivals(species):
        low, high = species.band_hz
        return [
            other.ebird_code
            for other in SPECIES
            if other is not species and other.band_hz[0] < high and other.band_hz[1] > low
        ]

    assert all(len(rivals(species)) >= 1 for species in SPECIES)
    assert sum(len(rivals(species)) >= 5 for species in SPECIES) >= 9


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_individuals_differ_within_8_percent_of_pitch_and_15_of_tempo(code):
    birds = [individual(code, seed) for seed in range(100)]
    pitch, tempo = np.array([(bird.pitch, bird.tempo) for bird in birds]).T
    assert 0.92 <= pitch.min() < 0.94 < 1.06 < pitch.max() <= 1.08
    assert 0.85 <= tempo.min() < 0.88 < 1.12 < tempo.max() <= 1.15
    sizes = {len(bird.repertoire) for bird in birds}
    assert sizes == set(range(BY_CODE[code].repertoire[0], BY_CODE[code].repertoire[1] + 1))
    sung = {phrase.name for bird in birds for phrase in bird.repertoire}
    assert sung == {phrase.name for phrase in BY_CODE[code].phrases}


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_a_song_follows_its_seed_and_no_two_renditions_are_the_same(code):
    bird = individual(code)
    first, again, other = (sing(bird, 22_050, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    shortest = min(len(first), len(other))
    assert len(first) != len(other) or np.abs(first[:shortest] - other[:shortest]).max() > 0.05
    assert first.dtype == np.float32
    assert np.abs(first).max() == pytest.approx(1)
    assert np.isfinite(first).all()


def test_a_song_is_the_same_at_every_sample_rate_and_nothing_is_aliased():
    song = compose_song(individual("ovenbi1"), np.random.default_rng(3))
    for sample_rate in (22_050, 32_000, 48_000):
        waveform = render_song(song, sample_rate, np.random.default_rng(0))
        assert len(waveform) / sample_rate == pytest.approx(song.seconds, abs=0.001)
        frequency, power = welch(waveform, sample_rate, nperseg=1024)
        assert power[frequency < 2_000].sum() < 1e-3 * power.sum()


def test_silence_between_notes_does_not_count_as_active():
    tone = np.sin(2 * np.pi * 1_000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    song = np.concatenate([tone, np.zeros(5 * SAMPLE_RATE), tone])
    assert active_power(song, SAMPLE_RATE) == pytest.approx(0.5, rel=1e-3)
    assert active_power(tone[:100], SAMPLE_RATE) == pytest.approx(0.5, rel=0.1)


def test_a_syllable_without_a_contour_is_an_error():
    with pytest.raises(ValueError, match="a syllable needs a contour"):
        Syllable((), 0.1)
