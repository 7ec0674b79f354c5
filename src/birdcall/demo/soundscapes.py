"""Plan the demo's soundscapes, labelled and hidden: which birds sing when, and what disturbs."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np

from birdcall.demo.ambience import OTHER_ANIMALS
from birdcall.demo.plan import (
    NOISE_FILE_KINDS,
    DemoConfig,
    Event,
    NoisePlan,
    SoundscapePlan,
    draw_bird,
    draw_event,
    draw_seed,
    label_rows,
    pick,
    stream,
    uniform,
)
from birdcall.demo.synthesis import Individual

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
