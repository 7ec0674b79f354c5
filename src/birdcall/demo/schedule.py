"""Plan the demo's training recordings: who records which bird, how well, what sings behind it."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np

from birdcall.demo.ambience import LABELLED_ANIMALS, OTHER_ANIMALS
from birdcall.demo.plan import (
    BACKGROUND_KINDS,
    NOISE_FILE_KINDS,
    DemoConfig,
    Event,
    NoisePlan,
    RecordingPlan,
    Recordist,
    SoundscapePlan,
    draw_bird,
    draw_event,
    draw_seed,
    label_rows,
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


# --- soundscapes ---


MAX_BIRDS_PER_ROW = 3
TOGETHER_SHARE = 0.6  # of the bouts begin close to another: rows with 2 or 3 birds
SNR_DB = (0.0, 15.0)
OTHER_SNR_DB = (0.0, 18.0)
OTHER_EVERY_SECONDS = 9.0
EMPTY_SPREAD = 0.15  # soundscapes differ in their share of nocall rows by up to this
FAVOURED_SHARE = 0.3  # of the species at a site, which sing there three times as often
FAVOUR = 3.0
DEVICES = (
    ("BLKFR-10-CPL", date(2019, 6, 11), "093000.pt540"),
    ("ORANGE-7-CAP", date(2019, 6, 6), "093000.pt623"),
)
SITES = {  # how each place sounds: kinds of noise and their levels in dB
    "BLKFR-10-CPL": (("pink", 0.0), ("wind", -4.0), ("insects", -8.0)),
    "ORANGE-7-CAP": (("brown", 0.0), ("rain", -8.0), ("hum", -12.0), ("insects", -14.0)),
    "site_1": (("wind", 0.0), ("pink", -4.0), ("insects", -7.0)),
    "site_2": (("brown", 0.0), ("hum", -6.0), ("white", -16.0), ("insects", -9.0)),
    "site_3": (("rain", -2.0), ("pink", -3.0), ("wind", 0.0)),
}
SITE_RATES = {
    "BLKFR-10-CPL": 44_100,
    "ORANGE-7-CAP": 32_000,
    "site_1": 32_000,
    "site_2": 44_100,
    "site_3": 48_000,
}


def plan_examples(config: DemoConfig) -> list[SoundscapePlan]:
    plans = []
    for index, empty_share in enumerate(_empty_shares(config, config.n_examples, "example")):
        device, first, time = DEVICES[index % 2]
        day = first + timedelta(days=index // 2)
        name = f"{device}_{day:%Y%m%d}_{time}"
        path = f"example_test_audio/{name}.mp3"
        file_id = name.split(".")[0]
        key = ("example", index)
        seconds = config.soundscape_seconds
        plans.append(
            _plan_soundscape(
                config,
                key,
                path=path,
                site=device,
                name=file_id,
                seconds=seconds,
                empty_share=empty_share,
            )
        )
    return plans


def plan_tests(config: DemoConfig) -> list[SoundscapePlan]:
    long_sites = ["site_1"] * config.n_site_1 + ["site_2"] * config.n_site_2
    shares = _empty_shares(config, len(long_sites), "test")
    n_empty = round(config.nocall_share * config.n_site_3)
    empty = stream(config, "empty site_3").permutation(config.n_site_3) < n_empty
    sites = long_sites + ["site_3"] * config.n_site_3
    plans = []
    for index, (site, share) in enumerate(zip(sites, [*shares, *empty.astype(float)], strict=True)):
        generator = stream(config, "audio_id", index)
        audio_id = generator.bytes(16).hex()
        seconds = config.site_3_seconds if site == "site_3" else config.soundscape_seconds
        path = f"test_audio/{audio_id}.mp3"
        plans.append(
            _plan_soundscape(
                config,
                ("test", index),
                path=path,
                site=site,
                name=audio_id,
                seconds=seconds,
                empty_share=float(share),
            )
        )
    return plans


def _empty_shares(config: DemoConfig, n_files: int, key: str) -> list[float]:
    """Spread the share of nocall rows around the wanted one, so that files differ as places do."""
    spread = np.linspace(-EMPTY_SPREAD, EMPTY_SPREAD, n_files) if n_files > 1 else np.zeros(n_files)
    shares = np.clip(config.nocall_share + spread, 0, 1)
    return [float(share) for share in stream(config, "empty shares", key).permutation(shares)]


def _plan_soundscape(
    config: DemoConfig,
    key: tuple[str, int],
    path: str,
    site: str,
    name: str,
    seconds: float,
    empty_share: float,
) -> SoundscapePlan:
    generator = stream(config, "soundscape", *key)
    birds = _plan_birds(config, site, seconds=seconds, empty_share=empty_share, generator=generator)
    has_plane = seconds > 20 and generator.random() < 0.4
    plane_seconds = uniform(generator, 12, min(30, seconds - 4)) if has_plane else 0.0
    return SoundscapePlan(
        path=path,
        site=site,
        name=name,
        seconds=seconds,
        sample_rate=SITE_RATES[site],
        level_db=uniform(generator, -38, -22),
        background=tuple((kind, db + uniform(generator, -4, 4)) for kind, db in SITES[site]),
        birds=tuple(birds),
        others=tuple(_plan_others(config, site, seconds=seconds, birds=birds, generator=generator)),
        plane=(
            (
                uniform(generator, 0, seconds - plane_seconds),
                plane_seconds,
                uniform(generator, 0, 12),
            )
            if has_plane
            else None
        ),
        seed=draw_seed(config, "soundscape sound", *key),
    )


def _species_weights(config: DemoConfig, site: str) -> np.ndarray:
    """Every site has its own favoured species: the prior of training does not hold there."""
    generator = stream(config, "favoured species", site)
    weights = np.ones(config.n_species)
    n_favoured = max(1, round(FAVOURED_SHARE * config.n_species))
    weights[generator.permutation(config.n_species)[:n_favoured]] = FAVOUR
    return weights


def _plan_birds(
    config: DemoConfig,
    site: str,
    seconds: float,
    empty_share: float,
    generator: np.random.Generator,
) -> list[Event]:
    """Add bouts of song until no more than ``empty_share`` of the rows are nocall."""
    weights = _species_weights(config, site)
    whole = site == "site_3"
    n_rows = len(label_rows((), seconds, whole))
    events: list[Event] = []
    for _ in range(1_000):
        labels = label_rows(events, seconds, whole)
        if sum(not codes for _, codes in labels) <= empty_share * n_rows + 0.5 * (not whole):
            break
        species = pick(generator, config.species, weights)
        bird = draw_bird(config, f"{site}/{species.ebird_code}/{generator.integers(3)}", species)
        near = pick(generator, tuple(events)).onset_seconds if events else 0.0
        onset = (
            near + uniform(generator, -4, 4)
            if events and generator.random() < TOGETHER_SHARE
            else uniform(generator, 0, seconds)
        )
        proposed = events + _draw_bout(
            bird, max(0.0, onset), seconds=seconds, snr_db=SNR_DB, generator=generator
        )
        labels = label_rows(proposed, seconds, whole)
        fits = all(len(codes) <= MAX_BIRDS_PER_ROW for _, codes in labels)
        n_empty = sum(not codes for _, codes in labels)
        if fits and n_empty >= empty_share * n_rows - 1.5:
            events = proposed
    return sorted(events, key=lambda event: event.onset_seconds)


def _plan_others(
    config: DemoConfig,
    site: str,
    seconds: float,
    birds: list[Event],
    generator: np.random.Generator,
) -> list[Event]:
    """Let another animal call every 9 seconds or so, rather when no bird sings.

    Otherwise loudness would tell the rows with birds from those without.
    """
    events: list[Event] = []
    taken = [bird.onset_seconds for bird in birds]
    for _ in range(max(1, round(seconds / OTHER_EVERY_SECONDS))):
        animal = pick(generator, OTHER_ANIMALS)
        name = f"{site}/{animal.ebird_code}/{generator.integers(3)}"
        bird = draw_bird(config, name, animal)
        onsets = [uniform(generator, 0, seconds) for _ in range(3)]
        onset = max(onsets, key=lambda onset: min([abs(one - onset) for one in taken], default=0))
        events += _draw_bout(bird, onset, seconds=seconds, snr_db=OTHER_SNR_DB, generator=generator)
    return sorted(events, key=lambda event: event.onset_seconds)


def _draw_bout(
    bird: Individual,
    onset: float,
    seconds: float,
    snr_db: tuple[float, float],
    generator: np.random.Generator,
) -> list[Event]:
    """Draw 1 to 4 songs of one bird, all of them whole within the soundscape."""
    bout_snr_db = uniform(generator, *snr_db)
    distance = uniform(generator, 10, 80)
    events = []
    for _ in range(pick(generator, (1, 2, 3, 4))):
        song_snr_db = float(np.clip(bout_snr_db + generator.standard_normal(), *snr_db))
        event = draw_event(bird, onset, snr_db=song_snr_db, distance=distance, generator=generator)
        if event.offset_seconds > seconds:
            break
        events.append(event)
        onset = event.offset_seconds + uniform(generator, *bird.species.song_gap_seconds)
    return events


def plan_noises(config: DemoConfig) -> list[NoisePlan]:
    plans = []
    for index in range(config.n_noise):
        kind = NOISE_FILE_KINDS[index % len(NOISE_FILE_KINDS)]
        seed = draw_seed(config, "noise sound", index)
        seconds = uniform(stream(config, "noise", index), 10, 20)
        plans.append(NoisePlan(f"noise/{kind}_{index:02d}.wav", kind, seconds, seed))
    return plans
