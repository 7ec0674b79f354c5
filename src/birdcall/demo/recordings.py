"""Plan the demo's training recordings: who records which bird, how well, what sings behind it."""

from __future__ import annotations

import numpy as np

from birdcall.demo.ambience import LABELLED_ANIMALS
from birdcall.demo.plan import (
    BACKGROUND_KINDS,
    DemoConfig,
    Event,
    RecordingPlan,
    Recordist,
    draw_bird,
    draw_event,
    draw_seed,
    pick,
    stream,
    uniform,
)
from birdcall.demo.synthesis import Individual, Species

RECORDER_RATES = (44_100, 32_000, 48_000, 44_100, 22_050)  # in turn: small demos have all
RECORDING_SNR_DB = (10.0, 35.0)
PLACES = (
    ("United States", "Ithaca, Tompkins, New York", 42.44, -76.50),
    ("United States", "Duluth, St. Louis, Minnesota", 46.79, -92.10),
    ("United States", "Blacksburg, Montgomery, Virginia", 37.23, -80.41),
    ("Canada", "Chaffeys Lock, Leeds and Grenville, Ontario", 44.58, -76.32),
    ("Canada", "Wolfville, Kings, Nova Scotia", 45.09, -64.37),
)


def plan_recordists(config: DemoConfig) -> tuple[Recordist, ...]:
    """Draw the recordists, the busiest first."""
    recordists = []
    for number in range(config.n_recordists):
        generator = stream(config, "recordist", number)
        country, location, latitude, longitude = pick(generator, PLACES)
        recordists.append(
            Recordist(
                name=f"Recordist {number + 1:02d}",
                country=country,
                location=location,
                latitude=round(latitude + uniform(generator, -0.3, 0.3), 3),
                longitude=round(longitude + uniform(generator, -0.3, 0.3), 3),
                sample_rate=RECORDER_RATES[number % len(RECORDER_RATES)],
                channels=2 if number % 4 == 3 else 1,
                gain_db=uniform(generator, -24, -1),
                equalizer_db=tuple(
                    uniform(generator, low, high)
                    for low, high in ((-18, 3), (-4, 4), (-2, 4), (-9, 3))
                ),
                background=pick(generator, BACKGROUND_KINDS),
                snr_db=uniform(generator, 14, 31),
            )
        )
    return tuple(recordists)


def plan_recordings(config: DemoConfig) -> list[RecordingPlan]:
    species = config.species
    generator = stream(config, "recordings")
    counts = np.linspace(*config.recordings_per_species, len(species)).round().astype(int)
    counts = generator.permutation(counts)
    recordists = plan_recordists(config)
    assigned = [
        (one, recordist)
        for one, count in zip(species, counts, strict=True)
        for recordist in _share_out(int(count), recordists, generator)
    ]
    # The damaged ones come on top, of the commonest species: nobody's last recording is lost.
    commonest = species[int(counts.argmax())]
    damages = ("garbage", "silent") if config.damaged else ()
    assigned += [(commonest, pick(generator, recordists)) for _ in damages]
    ids = stream(config, "xc_id").choice(400_000, len(assigned), replace=False) + 100_000
    intact = len(assigned) - len(damages)
    plans = [
        _plan_recording(config, index, xc_id=int(ids[index]), species=one, recordist=recordist)
        if index < intact
        else _plan_damaged(
            config,
            index,
            xc_id=int(ids[index]),
            species=one,
            recordist=recordist,
            damage=damages[index - intact],
        )
        for index, (one, recordist) in enumerate(assigned)
    ]
    return sorted(plans, key=lambda plan: (plan.species.ebird_code, plan.xc_id))


def _share_out(
    count: int, recordists: tuple[Recordist, ...], generator: np.random.Generator
) -> list[Recordist]:
    """Give ``count`` recordings of a species to people with a long tail, at least four if possible.

    Nobody has more than a third of a species, or recordists could not be split into folds.
    """
    weights = 1 / (np.arange(len(recordists)) + 2.0)
    n_people = min(len(recordists), count, max(4, round(0.55 * count)))
    people = generator.choice(len(recordists), n_people, False, weights / weights.sum())
    most = max(1, count // 3, -(-count // n_people))
    taken = np.ones(n_people, int)
    while taken.sum() < count:
        taken[pick(generator, tuple(np.flatnonzero(taken < most)))] += 1
    return [recordists[who] for who, times in zip(people, taken, strict=True) for _ in range(times)]


def _plan_recording(
    config: DemoConfig, index: int, xc_id: int, species: Species, recordist: Recordist
) -> RecordingPlan:
    generator = stream(config, "recording", index)
    low, high = config.recording_seconds
    seconds = (
        uniform(generator, 3, 5)
        if generator.random() < config.short_share
        else low + (high - low) * generator.random() ** 2.5  # short ones are the rule
    )
    snr_db = float(np.clip(recordist.snr_db + 4 * generator.standard_normal(), *RECORDING_SNR_DB))
    who = f"train/{recordist.name}/{species.ebird_code}/{generator.integers(2)}"
    bird = draw_bird(config, who, species)
    events = _sing_on(bird, seconds, 0.0, generator)
    listed: list[Species] = []
    if generator.random() < 0.3:
        others = tuple(one for one in (*config.species, *LABELLED_ANIMALS[1:3]) if one != species)
        for other in generator.permutation(len(others))[: pick(generator, (1, 1, 2))]:
            who = f"train/{recordist.name}/{others[other].ebird_code}/behind"
            level_db = -uniform(generator, 6, 15)
            quiet = draw_bird(config, who, others[other])
            events += _sing_on(
                quiet,
                seconds,
                level_db=level_db,
                generator=generator,
                first_seconds=uniform(generator, 0, 4),
            )
            if generator.random() < 2 / 3:
                listed.append(others[other])
    return RecordingPlan(
        xc_id=xc_id,
        species=species,
        recordist=recordist,
        seconds=seconds,
        snr_db=snr_db,
        events=tuple(events),
        listed=tuple(listed),
        seed=draw_seed(config, "recording sound", index),
    )


def _plan_damaged(
    config: DemoConfig, index: int, xc_id: int, species: Species, recordist: Recordist, damage: str
) -> RecordingPlan:
    return RecordingPlan(
        xc_id=xc_id,
        species=species,
        recordist=recordist,
        seconds=8.0,
        snr_db=RECORDING_SNR_DB[0],
        events=(),
        listed=(),
        seed=draw_seed(config, "recording sound", index),
        damage=damage,
    )


def _sing_on(
    bird: Individual,
    seconds: float,
    level_db: float,
    generator: np.random.Generator,
    first_seconds: float | None = None,
) -> list[Event]:
    """Let ``bird`` sing and pause until the recording ends, in the middle of a song if need be."""
    onset = uniform(generator, 0.1, 1.0) if first_seconds is None else first_seconds
    distance = uniform(generator, 2, 20) - 3 * level_db
    events: list[Event] = []
    while onset < seconds - 0.5:
        snr_db = level_db + float(generator.standard_normal())
        events.append(
            draw_event(bird, onset, snr_db=snr_db, distance=distance, generator=generator)
        )
        pause = uniform(generator, *bird.species.song_gap_seconds) / bird.tempo
        onset = events[-1].offset_seconds + pause
    return events
