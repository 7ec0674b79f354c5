"""The demo data has the competition's layout and quirks, is deterministic, its truth is true."""

from __future__ import annotations

import ast
import csv
import json
import logging
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from scipy.signal import periodogram
from sklearn.metrics import roc_auc_score

from birdcall.demo import rendering
from birdcall.demo.plan import DemoConfig, SoundscapePlan, plan_recordists
from birdcall.demo.rendering import (
    active_power,
    make_background,
    make_plane,
    mix_soundscape,
    propagate,
    render_background,
    render_noise,
    render_recording,
    render_soundscape,
)
from birdcall.demo.schedule import plan_demo
from birdcall.demo.writer import TRAIN_COLUMNS, make_demo

TINY = DemoConfig(
    n_species=4,
    recordings_per_species=(4, 5),
    recording_seconds=(3, 6),
    n_recordists=5,
    n_examples=1,
    n_site_1=1,
    n_site_2=0,
    soundscape_seconds=20,
    n_site_3=1,
    site_3_seconds=20,
    n_noise=2,
)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    data = tmp_path_factory.mktemp("demo") / "data"
    make_demo(data, TINY, workers=1)
    return data


@pytest.fixture(scope="module")
def plan():
    """The default demo, without audio."""
    return plan_demo()


# --- layout and quirks --------------------------------------------------------------------------


def test_the_folder_has_all_files_of_the_competition(tiny):
    names = {path.name for path in tiny.iterdir()}
    assert names == {
        *("train.csv", "test.csv", "sample_submission.csv", "solution.csv", "demo.json"),
        *("example_test_audio_summary.csv", "example_test_audio_metadata.csv"),
        *("train_audio", "example_test_audio", "test_audio", "noise"),
    }
    assert not [path for path in tiny.parent.iterdir() if path != tiny], "temporary files are left"


def test_train_csv_has_the_35_columns_in_order(tiny):
    header = (tiny / "train.csv").read_text().splitlines()[0].split(",")
    assert len(header) == 35
    assert header == list(TRAIN_COLUMNS)


@pytest.mark.parametrize(
    "name",
    [
        "train.csv",
        "test.csv",
        "sample_submission.csv",
        "example_test_audio_summary.csv",
        "example_test_audio_metadata.csv",
    ],
)
def test_the_tables_have_the_columns_of_the_real_ones(tiny, cornell_mini, name):
    real, demo = ((folder / name).read_text().splitlines()[0] for folder in (cornell_mini, tiny))
    assert demo == real


def test_the_rows_of_train_csv_have_the_competition_s_quirks(tiny):
    rows = read_csv(tiny / "train.csv")
    assert len({row["xc_id"] for row in rows}) == len(rows)
    for row in rows:
        path = tiny / "train_audio" / row["ebird_code"] / row["filename"]
        assert row["filename"] == f"XC{row['xc_id']}.mp3"
        assert path.is_file()
        assert row["sampling_rate"].endswith(" (Hz)")
        assert row["channels"] in ("1 (mono)", "2 (stereo)")
        assert row["elevation"].endswith(" m")
        assert row["pitch"] == row["speed"] == row["volume"] == "Not specified"
        assert row["author"] == row["recordist"]
        assert row["primary_label"] == f"{row['sci_name']}_{row['species']}"
        assert 0 <= float(row["rating"]) <= 5
        labels = ast.literal_eval(row["secondary_labels"])
        background = [label.split("_") for label in labels]
        assert row["background"] == "; ".join(f"{name} ({latin})" for latin, name in background)
        assert int(row["duration"]) >= 3
    listed = {path.name for path in (tiny / "train_audio").rglob("*.mp3")}
    assert listed == {row["filename"] for row in rows}


def test_recordings_have_the_rate_channels_and_length_that_train_csv_states(tiny):
    readable = 0
    for row in read_csv(tiny / "train.csv"):
        try:
            info = soundfile.info(tiny / "train_audio" / row["ebird_code"] / row["filename"])
        except soundfile.LibsndfileError:
            continue
        readable += 1
        assert f"{info.samplerate} (Hz)" == row["sampling_rate"]
        assert row["channels"].startswith(str(info.channels))
        assert info.duration == pytest.approx(int(row["duration"]), abs=0.51)
    assert readable == len(read_csv(tiny / "train.csv")) - 1


def test_one_recording_does_not_decode_and_one_is_silent(tiny):
    broken, silent = [], []
    for path in sorted((tiny / "train_audio").rglob("*.mp3")):
        try:
            waveform, _ = soundfile.read(path)
        except soundfile.LibsndfileError:
            broken.append(path)
            continue
        assert np.abs(waveform).max() <= 1.01
        if np.abs(waveform).max() < 1e-4:
            silent.append(path)
    assert len(broken) == len(silent) == 1
    assert broken[0].stat().st_size > 1_000


def test_noise_files_are_mono_16_bit_wav_at_32_khz(tiny):
    paths = sorted((tiny / "noise").iterdir())
    assert len(paths) == TINY.n_noise
    for path in paths:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (32_000, 1, "PCM_16")
        assert 10 <= info.duration <= 20


def test_noise_files_hold_animals_that_are_no_birds(plan):
    kinds = Counter(item.kind for item in plan.noises)
    assert {"dog", "frog", "squirrel"} <= set(kinds)
    item = next(item for item in plan.noises if item.kind == "frog")
    noise = render_noise(item)
    level, hertz = periodogram(noise, 32_000)[::-1]
    band = (hertz > 2_300) & (hertz < 3_500)
    beside = (hertz > 4_000) & (hertz < 5_200)
    assert level[band].max() > 30 * level[beside].max()
    assert np.array_equal(noise, render_noise(item))


def test_the_summary_has_a_row_for_every_five_seconds(tiny):
    rows = read_csv(tiny / "example_test_audio_summary.csv")
    assert [row["seconds"] for row in rows] == ["5", "10", "15", "20"]
    for row in rows:
        assert row["filename_seconds"] == f"{row['filename']}_{row['seconds']}"
        assert row["birds"].split() == sorted(set(row["birds"].split()))
        assert "nocall" not in row["birds"]


def test_the_metadata_agree_with_the_summary(tiny):
    labelled = {}
    for row in read_csv(tiny / "example_test_audio_metadata.csv"):
        start, end = float(row["time_start"]), float(row["time_end"])
        for last in range(5, 25, 5):
            inside = min(end, last) - max(start, last - 5)
            if inside >= min(0.5, (end - start) / 2):
                labelled.setdefault(last, set()).add(row["ebird_code"])
    for row in read_csv(tiny / "example_test_audio_summary.csv"):
        assert set(row["birds"].split()) == labelled.get(int(row["seconds"]), set())


def test_the_hidden_test_is_named_as_in_the_competition(tiny):
    rows = read_csv(tiny / "test.csv")
    assert [row["site"] for row in rows] == ["site_1"] * 4 + ["site_3"]
    for row in rows:
        assert (tiny / "test_audio" / f"{row['audio_id']}.mp3").is_file()
        assert len(bytes.fromhex(row["audio_id"])) == 16
        suffix = "" if row["site"] == "site_3" else f"_{row['seconds']}"
        assert row["row_id"] == f"{row['site']}_{row['audio_id']}{suffix}"
    assert rows[-1]["seconds"] == ""
    solution = read_csv(tiny / "solution.csv")
    assert [row["row_id"] for row in solution] == [row["row_id"] for row in rows]
    sample = read_csv(tiny / "sample_submission.csv")
    assert [(row["row_id"], row["birds"]) for row in sample] == [
        (row["row_id"], "nocall") for row in rows[:3]
    ]


def test_example_files_are_named_as_in_the_competition(plan):
    assert [item.path for item in plan.examples[:2]] == [
        "example_test_audio/BLKFR-10-CPL_20190611_093000.pt540.mp3",
        "example_test_audio/ORANGE-7-CAP_20190606_093000.pt623.mp3",
    ]
    assert [item.name for item in plan.examples[:2]] == [
        "BLKFR-10-CPL_20190611_093000",
        "ORANGE-7-CAP_20190606_093000",
    ]


# --- the same config, the same bytes ------------------------------------------------------------


def test_two_runs_are_byte_identical_whatever_the_number_of_workers(tmp_path):
    # Few files, but some of each kind.
    config = replace(TINY, n_species=2, recordings_per_species=(1, 1), n_site_1=0, n_noise=1)
    make_demo(tmp_path / "first", config, workers=1)
    make_demo(tmp_path / "again", config, workers=2)
    first, again = files_of(tmp_path / "first"), files_of(tmp_path / "again")
    assert {name.split("/")[0] for name in first} >= {
        *("train_audio", "example_test_audio", "test_audio", "noise", "train.csv")
    }
    assert list(first) == list(again)
    assert [name for name in first if first[name] != again[name]] == []


def test_another_seed_makes_another_demo():
    assert plan_demo(TINY) == plan_demo(TINY)
    other = plan_demo(replace(TINY, seed=1))
    assert {item.xc_id for item in other.recordings}.isdisjoint(
        item.xc_id for item in plan_demo(TINY).recordings
    )
    assert other.tests[0].birds != plan_demo(TINY).tests[0].birds


def test_a_demo_that_is_there_is_left_as_it_is(tiny, caplog):
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    with caplog.at_level(logging.INFO):
        make_demo(tiny, TINY)
    assert "left as it is" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    with pytest.raises(ValueError, match="another config or version"):
        make_demo(tiny, replace(TINY, seed=1))


def test_a_folder_with_other_things_in_it_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path.name} is not empty, no demo"):
        make_demo(tmp_path, TINY)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        make_demo(tmp_path / "file", TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "file"}


def test_a_run_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(csv, "DictWriter", fail)  # the tables come after the audio
    few = {"n_species": 2, "recordings_per_species": (1, 1)}
    config = replace(TINY, **few, n_examples=0, n_site_1=0, n_noise=0)
    with pytest.raises(OSError, match="no space"):
        make_demo(tmp_path / "data", config, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_the_config_refuses_what_cannot_be_made():
    with pytest.raises(ValueError, match="n_species is 15; give 2 to 14"):
        DemoConfig(n_species=15)
    with pytest.raises(ValueError, match=r"nocall_share is 1\.5"):
        DemoConfig(nocall_share=1.5)
    with pytest.raises(ValueError, match="soundscape_seconds is 10"):
        DemoConfig(soundscape_seconds=10)
    with pytest.raises(ValueError, match="seed is -1"):
        DemoConfig(seed=-1)


def test_the_marker_states_the_config(tiny):
    assert json.loads((tiny / "demo.json").read_text())["config"]["n_species"] == 4


# --- what is planned ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_about_54_percent_of_the_hidden_rows_are_nocall_and_some_have_several_birds(seed):
    tests = plan_demo(DemoConfig(seed=seed)).tests
    sizes = [len(codes) for soundscape in tests for _, codes in soundscape.labels()]
    assert len(sizes) == 4 * 24 + 6
    assert 0.45 <= np.mean(np.array(sizes) == 0) <= 0.63
    assert max(sizes) <= 3
    assert 0.15 <= np.mean(np.array(sizes) >= 2) / np.mean(np.array(sizes) >= 1) <= 0.55


def test_there_are_about_310_recordings_of_14_species_unequally_many(plan):
    counts = Counter(item.species.ebird_code for item in plan.recordings)
    assert 300 <= len(plan.recordings) <= 320
    assert len(counts) == 14
    assert min(counts.values()) == 12
    assert max(counts.values()) == 32 + 2  # the damaged ones are of the commonest
    seconds = np.array([item.seconds for item in plan.recordings])
    assert 3 <= seconds.min() < 5 < 16 < seconds.max() <= 18
    assert 0.02 <= np.mean(seconds < 5) <= 0.1


@pytest.mark.parametrize("seed", range(4))
def test_every_species_has_four_recordists_and_nobody_most_of_a_species(seed):
    recordings = plan_demo(DemoConfig(seed=seed)).recordings
    for code in {item.species.ebird_code for item in recordings}:
        people = Counter(
            item.recordist.name
            for item in recordings
            if item.species.ebird_code == code and not item.damage
        )
        assert len(people) >= 4
        assert max(people.values()) <= max(people.total() / 3, 2)
    everyone = Counter(item.recordist.name for item in recordings)
    several = [
        len({item.species for item in recordings if item.recordist.name == name})
        for name in everyone
    ]
    assert everyone.most_common(1)[0][1] > 3 * np.median(sorted(everyone.values())[:5])  # long tail
    assert np.mean(np.array(several) >= 3) > 0.5


def test_recordists_differ_in_all_that_colours_a_recording():
    people = plan_recordists(DemoConfig())
    assert len(people) == 25
    assert {person.sample_rate for person in people} == {22_050, 32_000, 44_100, 48_000}
    assert {person.channels for person in people} == {1, 2}
    assert len({person.background for person in people}) >= 5
    assert (
        len({person.equalizer_db for person in people})
        == len({person.gain_db for person in people})
        == 25
    )
    assert people[6].name == "Recordist 07"


def test_a_third_of_the_birds_behind_is_not_listed(plan):
    behind = listed = with_others = 0
    for item in plan.recordings:
        others = {event.ebird_code for event in item.songs} - {item.species.ebird_code}
        assert {other.ebird_code for other in item.listed} <= others
        behind, listed = behind + len(others), listed + len(item.listed)
        with_others += bool(others)
    assert 0.2 <= with_others / len(plan.recordings) <= 0.4
    assert 0.5 <= listed / behind <= 0.83


def test_no_bird_of_a_soundscape_sings_in_training_and_no_noise_is_used_twice(plan):
    def birds(plans):
        return {
            (event.individual.name, event.individual.pitch)
            for item in plans
            for event in item.songs
        }

    def soundscape_birds(plans):
        return {
            (event.individual.name, event.individual.pitch)
            for item in plans
            for event in (*item.birds, *item.others)
        }

    groups = [birds(plan.recordings), soundscape_birds(plan.examples), soundscape_birds(plan.tests)]
    for field in (0, 1):  # neither a name nor a pitch is shared
        values = [{bird[field] for bird in group} for group in groups]
        assert values[0].isdisjoint(values[1] | values[2])
        assert values[1].isdisjoint(values[2])
    seeds = [item.seed for item in (*plan.recordings, *plan.examples, *plan.tests, *plan.noises)]
    assert len(set(seeds)) == len(seeds)


def test_sites_favour_other_species_than_training(plan):
    trained = Counter(item.species.ebird_code for item in plan.recordings)
    for site in ("site_1", "site_2", "BLKFR-10-CPL", "ORANGE-7-CAP"):
        sung = Counter(
            event.ebird_code
            for item in (*plan.examples, *plan.tests)
            if item.site == site
            for event in item.birds
        )
        code, most = sung.most_common(1)[0]
        assert most / sung.total() > 1.5 * trained[code] / trained.total()


def test_example_labels_name_animals_that_are_no_class(plan):
    classes = {item.species.ebird_code for item in plan.recordings}
    named = {
        code
        for item in plan.examples
        for _, codes in item.labels(with_animals=True)
        for code in codes
    }
    assert "squirrel" in named
    assert len(named - classes) >= 3
    assert not {"dog", "frog"} & named
    assert {code for item in plan.tests for _, codes in item.labels() for code in codes} <= classes


# --- the audio ---


def power_of_active_part(waveform, sample_rate):
    """By the definition, in plain words: 20-ms frames no more than 20 dB below the loudest."""
    n = int(0.02 * sample_rate)
    frames = [np.mean(waveform[i : i + n] ** 2) for i in range(0, len(waveform) - n + 1, n)]
    return np.mean([power for power in frames if power >= max(frames) / 100])


def only(plan: SoundscapePlan, *events) -> SoundscapePlan:
    return replace(plan, birds=events, others=(), plane=None)


@pytest.fixture
def render_background_once(monkeypatch):
    """Render the background of a soundscape; its mixtures of this test take the same."""

    def render(soundscape):
        background = render_background(soundscape)
        assert np.array_equal(background, render_background(only(soundscape)))
        monkeypatch.setattr(rendering, "render_background", lambda _: background.copy())
        return background

    return render


@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_song_in_a_soundscape_has_the_snr_and_the_onset_that_were_drawn(
    plan, index, render_background_once
):
    soundscape = replace(plan.tests[index], seconds=60.0, sample_rate=22_050)
    rate = soundscape.sample_rate
    background = render_background_once(soundscape).astype(float)
    events = [event for event in plan.tests[0].birds if event.offset_seconds < 59][:4]
    for event in events:
        song = mix_soundscape(only(soundscape, event)) - background
        audible = np.flatnonzero(np.abs(song) > 1e-3 * np.abs(song).max())
        start = int(event.onset_seconds * rate)
        assert audible[0] / rate == pytest.approx(event.onset_seconds, abs=0.1)
        stop = np.flatnonzero(np.abs(song) > 1e-7)[-1] + 1
        snr = power_of_active_part(song[start:stop], rate) / np.mean(background[start:stop] ** 2)
        assert 10 * np.log10(snr) == pytest.approx(event.snr_db, abs=0.1)
        assert 0 <= event.snr_db <= 15


def test_the_truth_of_a_row_is_what_is_planted_in_it(render_background_once):
    soundscape = plan_demo(DemoConfig(soundscape_seconds=40)).tests[1]
    soundscape = replace(soundscape, sample_rate=22_050)
    rate = soundscape.sample_rate
    background = render_background_once(soundscape)
    shares_of = {}
    for event in soundscape.birds:
        song = mix_soundscape(only(soundscape, event)) - background
        for end, _ in soundscape.labels():
            part = song[(end - 5) * rate : end * rate]
            share = np.sum(np.square(part, dtype=float)) / np.sum(np.square(song, dtype=float))
            shares_of.setdefault(end, {}).setdefault(event.ebird_code, []).append(share)
    for end, codes in soundscape.labels():
        shares = {code: max(values) for code, values in shares_of[end].items()}
        assert all(shares[code] > 0.02 for code in codes)
        absent = set(shares) - set(codes)
        assert all(shares[code] < 0.5 for code in absent), "most of a song, but no label"
    assert sum(len(codes) for _, codes in soundscape.labels()) >= 3


def test_a_song_counts_where_half_a_second_or_half_of_it_falls_into_the_row(plan):
    event = replace(plan.tests[0].birds[0], onset_seconds=4.4, seconds=2.0)
    rows = replace(only(plan.tests[0], event), seconds=10.0).labels()
    assert [bool(codes) for _, codes in rows] == [True, True]
    for onset, seconds, expected in (
        (4.6, 2.0, [False, True]),
        (4.7, 0.4, [True, False]),
        (4.9, 0.4, [False, True]),
    ):
        moved = replace(event, onset_seconds=onset, seconds=seconds)
        rows = replace(only(plan.tests[0], moved), seconds=10.0).labels()
        assert [bool(codes) for _, codes in rows] == expected


def test_the_loudness_of_a_row_does_not_tell_whether_a_bird_sings():
    config = DemoConfig(soundscape_seconds=60)
    loudness, birds = [], []
    demo = plan_demo(config)
    for item in (*demo.examples, *demo.tests[:4]):
        item = replace(item, sample_rate=22_050)
        waveform = render_soundscape(item)
        for end, codes in item.labels():
            row = waveform[(end - 5) * item.sample_rate : end * item.sample_rate]
            loudness.append(float(np.mean(np.square(row))))
            birds.append(bool(codes))
    assert roc_auc_score(birds, loudness) < 0.75


def test_recordings_are_cleaner_than_soundscapes(plan):
    item = next(item for item in plan.recordings if not item.damage and 20 < item.snr_db < 30)
    item = replace(
        item, songs=tuple(song for song in item.songs if song.ebird_code == item.species.ebird_code)
    )
    flat = replace(
        item.recordist, equalizer_db=(0.0, 0.0, 0.0, 0.0), channels=1, background="white"
    )
    recording = render_recording(replace(item, recordist=flat))[:, 0]
    frames = np.square(recording[: len(recording) // 441 * 441].reshape(-1, 441)).mean(axis=1)
    floor = np.quantile(frames, 0.05)
    ratio_db = 10 * np.log10(active_power(recording, flat.sample_rate) / floor)
    assert ratio_db == pytest.approx(item.snr_db, abs=5)
    assert all(10 <= item.snr_db <= 35 for item in plan.recordings)


def test_songs_are_in_their_recordings_from_the_first_second_on(plan):
    for item in plan.recordings:
        primary = [song for song in item.songs if song.ebird_code == item.species.ebird_code]
        if item.damage:
            assert primary == []
            continue
        assert 0 <= primary[0].onset_seconds <= 1
        assert all(a.offset_seconds <= b.onset_seconds for a, b in pairwise(primary))
    many = [len(item.songs) for item in plan.recordings if item.seconds > 15]
    assert np.median(many) >= 3


def test_distance_takes_the_highs_and_adds_an_echo():
    rate = 32_000
    click = np.zeros(rate, np.float32)
    click[100] = 1
    near, far = (propagate(click, rate, metres, np.random.default_rng(0)) for metres in (5, 80))
    spectra = [np.abs(np.fft.rfft(clip[:200])) for clip in (near, far)]
    high, low = 50, 6  # bins of 160 Hz: 8 kHz and about 1 kHz
    loss_db = [20 * np.log10(spectrum[low] / spectrum[high]) for spectrum in spectra]
    assert loss_db[1] - loss_db[0] == pytest.approx(75 * 0.02 * 7, abs=2)
    assert np.sum(far[200:] ** 2) / np.sum(far**2) > 4 * np.sum(near[200:] ** 2) / np.sum(near**2)
    assert len(far) > rate


def test_insects_and_planes_have_the_frequencies_of_their_docstrings():
    rate = 32_000
    for seed in range(6):
        insect = make_background("insects", rate * 10, rate, np.random.default_rng(seed))
        power = np.abs(np.fft.rfft(insect)) ** 2
        frequency = np.fft.rfftfreq(len(insect), 1 / rate)
        assert power[(frequency > 2_500) & (frequency < 9_500)].sum() > 0.9 * power.sum()
    plane = make_plane(rate * 12, rate, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(plane)) ** 2
    assert power[np.fft.rfftfreq(len(plane), 1 / rate) < 1_000].sum() > 0.9 * power.sum()
    assert np.mean(plane[:rate] ** 2) < 0.05 * np.mean(plane[5 * rate : 7 * rate] ** 2)
