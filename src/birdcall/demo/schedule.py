"""Plan the demo's files: who records which bird, and which animals sing when in a soundscape."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np

from birdcall.demo.plan import (
    NOISE_FILE_KINDS,
    DemoConfig,
    DemoPlan,
    NoisePlan,
    PlannedSong,
    RecordingPlan,
    Recordist,
    SoundscapePlan,
    draw_bird,
    draw_seed,
    label_rows,
    pick,
    plan_recordists,
    stream,
)
from birdcall.demo.synthesis import LABELLED_ANIMALS, OTHER_ANIMALS, Individual, SyntheticSpecies

_RECORDING_SNR_DB = (10.0, 35.0)


def plan_demo(config: DemoConfig = DemoConfig()) -> DemoPlan:
    """Draw the whole demo without making any audio; the same config gives the same plan."""
    noises = []
    for index in range(config.n_noise):
        kind = NOISE_FILE_KINDS[index % len(NOISE_FILE_KINDS)]
        seconds = stream(config, "noise", index).uniform(10, 20)
        seed = draw_seed(config, "noise sound", index)
        noises.append(NoisePlan(f"noise/{kind}_{index:02d}.wav", kind, seconds, seed))
    return DemoPlan(
        recordings=tuple(_plan_recordings(config)),
        examples=tuple(_plan_examples(config)),
        tests=tuple(_plan_tests(config)),
        noises=tuple(noises),
    )


# --- recordings ---


def _plan_recordings(config: DemoConfig) -> list[RecordingPlan]:
    species = config.species
    generator = stream(config, "recordings")
    counts = np.linspace(*config.recordings_per_species, len(species)).round().astype(int)
    counts = generator.permutation(counts)
    recordists = plan_recordists(config)
    assigned = [
        (item, recordist, "")
        for item, count in zip(species, counts, strict=True)
        for recordist in _share_out(int(count), recordists, generator)
    ]
    # The damaged ones are added to the most frequent species: nobody's last recording is lost.
    most_frequent = species[int(counts.argmax())]
    damages = ("garbage", "silent") if config.damaged else ()
    assigned += [(most_frequent, pick(generator, recordists), damage) for damage in damages]
    ids = stream(config, "xc_id").choice(400_000, len(assigned), replace=False) + 100_000
    plans = []
    for index, (item, recordist, damage) in enumerate(assigned):
        content = _plan_content(config, index, item, recordist)
        if damage:
            content = {"seconds": 8.0, "snr_db": _RECORDING_SNR_DB[0], "songs": (), "listed": ()}
        plans.append(
            RecordingPlan(
                path=f"train_audio/{item.ebird_code}/XC{ids[index]}.mp3",
                xc_id=int(ids[index]),
                species=item,
                recordist=recordist,
                seed=draw_seed(config, "recording sound", index),
                damage=damage,
                **content,
            )
        )
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
    shares = zip(people, taken, strict=True)
    return [recordists[person] for person, times in shares for _ in range(times)]


def _plan_content(
    config: DemoConfig, index: int, species: SyntheticSpecies, recordist: Recordist
) -> dict[str, object]:
    """Draw length, SNR, songs and secondary labels of a recording."""
    generator = stream(config, "recording", index)
    low, high = config.recording_seconds
    seconds = (
        generator.uniform(3, 5)
        if generator.random() < config.short_share
        else low + (high - low) * generator.random() ** 2.5  # short ones are the rule
    )
    snr_db = float(np.clip(recordist.snr_db + 4 * generator.standard_normal(), *_RECORDING_SNR_DB))
    name = f"train/{recordist.name}/{species.ebird_code}/{generator.integers(2)}"
    bird = draw_bird(config, name, species)
    songs = _plan_songs(bird, seconds, 0.0, generator)
    listed: list[SyntheticSpecies] = []
    if generator.random() < 0.3:
        others = [item for item in (*config.species, *LABELLED_ANIMALS[1:3]) if item != species]
        for other in generator.permutation(len(others))[: pick(generator, (1, 1, 2))]:
            name = f"train/{recordist.name}/{others[other].ebird_code}/behind"
            level_db = -generator.uniform(6, 15)
            quiet = draw_bird(config, name, others[other])
            onset = generator.uniform(0, 4)
            songs += _plan_songs(quiet, seconds, level_db, generator, first_seconds=onset)
            if generator.random() < 2 / 3:
                listed.append(others[other])
    return {"seconds": seconds, "snr_db": snr_db, "songs": tuple(songs), "listed": tuple(listed)}


def _plan_songs(
    bird: Individual,
    seconds: float,
    level_db: float,
    generator: np.random.Generator,
    *,
    first_seconds: float | None = None,
) -> list[PlannedSong]:
    """Plan songs and pauses to the end of the recording, which may cut a song."""
    onset = generator.uniform(0.1, 1.0) if first_seconds is None else first_seconds
    distance = generator.uniform(2, 20) - 3 * level_db
    songs: list[PlannedSong] = []
    while onset < seconds - 0.5:
        snr_db = level_db + float(generator.standard_normal())
        song = PlannedSong.draw(
            bird, generator, onset_seconds=onset, snr_db=snr_db, distance_metres=distance
        )
        songs.append(song)
        pause = generator.uniform(*bird.species.song_gap_seconds) / bird.tempo
        onset = song.offset_seconds + pause
    return songs


# --- soundscapes ---


_DEVICES = (
    ("BLKFR-10-CPL", date(2019, 6, 11), "093000.pt540"),
    ("ORANGE-7-CAP", date(2019, 6, 6), "093000.pt623"),
)
_MAX_BIRDS_PER_ROW = 3
_TOGETHER_SHARE = 0.6  # of the bouts begin close to another: rows with 2 or 3 birds
_SNR_DB = (0.0, 15.0)
_OTHER_SNR_DB = (0.0, 18.0)
_OTHER_EVERY_SECONDS = 9.0
_EMPTY_SPREAD = 0.15  # soundscapes differ in their share of nocall rows by up to this
_FAVOURED_SHARE = 0.3  # of the species at a site, which sing there three times as often
_FAVOUR = 3.0
# Of each site the sample rate, and the background: kinds of noise and their levels in dB.
_SITES = {
    "BLKFR-10-CPL": (44_100, (("pink", 0.0), ("wind", -4.0), ("insects", -8.0))),
    "ORANGE-7-CAP": (32_000, (("brown", 0.0), ("rain", -8.0), ("hum", -12.0), ("insects", -14.0))),
    "site_1": (32_000, (("wind", 0.0), ("pink", -4.0), ("insects", -7.0))),
    "site_2": (44_100, (("brown", 0.0), ("hum", -6.0), ("white", -16.0), ("insects", -9.0))),
    "site_3": (48_000, (("rain", -2.0), ("pink", -3.0), ("wind", 0.0))),
}


@dataclass(frozen=True)
class _SoundscapeFile:
    """What is fixed of a soundscape before its songs are drawn."""

    key: tuple[str, int]  # of its random stream
    path: str
    site: str
    name: str
    seconds: float
    empty_share: float  # of its rows


def _plan_examples(config: DemoConfig) -> list[SoundscapePlan]:
    plans = []
    for index, empty_share in enumerate(_empty_shares(config, config.n_examples, "example")):
        device, first_day, time = _DEVICES[index % 2]
        name = f"{device}_{first_day + timedelta(days=index // 2):%Y%m%d}_{time}"
        file = _SoundscapeFile(
            key=("example", index),
            path=f"example_test_audio/{name}.mp3",
            site=device,
            name=name.split(".")[0],
            seconds=config.soundscape_seconds,
            empty_share=empty_share,
        )
        plans.append(_plan_soundscape(config, file))
    return plans


def _plan_tests(config: DemoConfig) -> list[SoundscapePlan]:
    long_sites = ["site_1"] * config.n_site_1 + ["site_2"] * config.n_site_2
    shares = _empty_shares(config, len(long_sites), "test")
    n_empty = round(config.nocall_share * config.n_site_3)
    empty = stream(config, "empty site_3").permutation(config.n_site_3) < n_empty
    sites = long_sites + ["site_3"] * config.n_site_3
    plans = []
    for index, (site, share) in enumerate(zip(sites, [*shares, *empty.astype(float)], strict=True)):
        audio_id = stream(config, "audio_id", index).bytes(16).hex()
        file = _SoundscapeFile(
            key=("test", index),
            path=f"test_audio/{audio_id}.mp3",
            site=site,
            name=audio_id,
            seconds=config.site_3_seconds if site == "site_3" else config.soundscape_seconds,
            empty_share=float(share),
        )
        plans.append(_plan_soundscape(config, file))
    return plans


def _empty_shares(config: DemoConfig, n_files: int, key: str) -> list[float]:
    """Spread the share of nocall rows around the configured share, as sites differ too."""
    spread = np.linspace(-_EMPTY_SPREAD, _EMPTY_SPREAD, n_files) if n_files > 1 else 0
    shares = np.clip(np.full(n_files, config.nocall_share) + spread, 0, 1)
    return [float(share) for share in stream(config, "empty shares", key).permutation(shares)]


def _plan_soundscape(config: DemoConfig, file: _SoundscapeFile) -> SoundscapePlan:
    generator = stream(config, "soundscape", *file.key)
    sample_rate, noises = _SITES[file.site]
    birds = _plan_birds(config, file, generator)
    has_plane = file.seconds > 20 and generator.random() < 0.4
    plane_seconds = generator.uniform(12, min(30, file.seconds - 4)) if has_plane else 0.0
    level_db = generator.uniform(-38, -22)
    background = tuple((kind, db + generator.uniform(-4, 4)) for kind, db in noises)
    others = _plan_others(config, file, birds, generator)
    plane = None
    if has_plane:
        onset = generator.uniform(0, file.seconds - plane_seconds)
        plane = onset, plane_seconds, generator.uniform(0, 12)
    return SoundscapePlan(
        path=file.path,
        site=file.site,
        name=file.name,
        seconds=file.seconds,
        sample_rate=sample_rate,
        level_db=level_db,
        background=background,
        birds=tuple(birds),
        others=tuple(others),
        plane=plane,
        seed=draw_seed(config, "soundscape sound", *file.key),
    )


def _plan_birds(
    config: DemoConfig, file: _SoundscapeFile, generator: np.random.Generator
) -> list[PlannedSong]:
    """Add bouts of song until no more than ``empty_share`` of the rows are nocall."""
    # Every site has its own favoured species: the prior of training does not hold there.
    weights = np.ones(config.n_species)
    n_favoured = max(1, round(_FAVOURED_SHARE * config.n_species))
    order = stream(config, "favoured species", file.site).permutation(config.n_species)
    weights[order[:n_favoured]] = _FAVOUR
    is_single_row = file.site == "site_3"
    n_wanted_empty = file.empty_share * len(label_rows((), file.seconds, is_single_row))
    songs: list[PlannedSong] = []
    for _ in range(1_000):
        rows = label_rows(songs, file.seconds, is_single_row)
        n_empty = sum(not row.ebird_codes for row in rows)
        if n_empty <= n_wanted_empty + 0.5 * (not is_single_row):
            break
        species = pick(generator, config.species, weights)
        name = f"{file.site}/{species.ebird_code}/{generator.integers(3)}"
        bird = draw_bird(config, name, species)
        near = pick(generator, tuple(songs)).onset_seconds if songs else 0.0
        onset = (
            near + generator.uniform(-4, 4)
            if songs and generator.random() < _TOGETHER_SHARE
            else generator.uniform(0, file.seconds)
        )
        proposed = songs + _draw_bout(
            bird, generator, onset=max(0.0, onset), end=file.seconds, snr_bounds_db=_SNR_DB
        )
        rows = label_rows(proposed, file.seconds, is_single_row)
        fits = all(len(row.ebird_codes) <= _MAX_BIRDS_PER_ROW for row in rows)
        n_empty = sum(not row.ebird_codes for row in rows)
        if fits and n_empty >= n_wanted_empty - 1.5:
            songs = proposed
    return sorted(songs, key=lambda song: song.onset_seconds)


def _plan_others(
    config: DemoConfig,
    file: _SoundscapeFile,
    birds: list[PlannedSong],
    generator: np.random.Generator,
) -> list[PlannedSong]:
    """Plan calls of other animals, every 9 seconds or so, rather when no bird sings.

    Otherwise loudness would tell the rows with birds from those without.
    """
    songs: list[PlannedSong] = []
    bird_onsets = [bird.onset_seconds for bird in birds]
    for _ in range(max(1, round(file.seconds / _OTHER_EVERY_SECONDS))):
        species = pick(generator, OTHER_ANIMALS)
        name = f"{file.site}/{species.ebird_code}/{generator.integers(3)}"
        animal = draw_bird(config, name, species)
        onsets = [generator.uniform(0, file.seconds) for _ in range(3)]
        distances = [
            min([abs(bird - onset) for bird in bird_onsets], default=0) for onset in onsets
        ]
        onset = onsets[distances.index(max(distances))]
        songs += _draw_bout(
            animal, generator, onset=onset, end=file.seconds, snr_bounds_db=_OTHER_SNR_DB
        )
    return sorted(songs, key=lambda song: song.onset_seconds)


def _draw_bout(
    bird: Individual,
    generator: np.random.Generator,
    *,
    onset: float,
    end: float,
    snr_bounds_db: tuple[float, float],
) -> list[PlannedSong]:
    """Draw 1 to 4 songs of one bird, all of them complete within the soundscape."""
    bout_snr_db = generator.uniform(*snr_bounds_db)
    distance = generator.uniform(10, 80)
    songs = []
    for _ in range(pick(generator, (1, 2, 3, 4))):
        snr_db = float(np.clip(bout_snr_db + generator.standard_normal(), *snr_bounds_db))
        song = PlannedSong.draw(
            bird, generator, onset_seconds=onset, snr_db=snr_db, distance_metres=distance
        )
        if song.offset_seconds > end:
            break
        songs.append(song)
        onset = song.offset_seconds + generator.uniform(*bird.species.song_gap_seconds)
    return songs
