"""Simulated soundscapes hold what their plan says, and nothing that a run has trained on."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS
from birdcall.data.audit import audit_recordings, usable_recordings
from birdcall.data.dataset import load_training_data
from birdcall.data.folds import make_folds, write_folds
from birdcall.data.recordings import read_recordings
from birdcall.evaluation.salient_segments import MAX_SECONDS, find_salient_segment
from birdcall.evaluation.simulated_audio import (
    band_power,
    event_gain,
    mix_background,
    mix_soundscape,
    open_noise,
    predict_simulated,
    read_event,
    render,
)
from birdcall.evaluation.simulation import (
    SimulatedEvent,
    SimulatedSoundscape,
    SimulationConfig,
    describe_events,
    label_segments,
    plan_soundscapes,
    recording_groups,
)
from birdcall.inference.engine import predict_waveforms
from birdcall.inference.ensemble import load_ensemble

RATE = 32_000
CONFIG = SimulationConfig(soundscapes=4, soundscape_seconds=30.0)


@pytest.fixture(scope="module")
def planned(training_data):
    return plan_soundscapes(training_data, 0, CONFIG)


@pytest.fixture(scope="module")
def noise(training_data):
    return open_noise(training_data, 0, RATE)


# --- where the bird is ---------------------------------------------------------------------------


def tone(onset, seconds, hertz, total=8.0, level=0.3, background=0.003):
    """A tone in faint noise, ``(samples,)``."""
    generator = np.random.default_rng(0)
    waveform = background * generator.standard_normal(round(total * RATE))
    place = slice(round(onset * RATE), round((onset + seconds) * RATE))
    time = np.arange(place.stop - place.start) / RATE
    waveform[place] += level * np.sin(2 * np.pi * hertz * time)
    return waveform.astype(np.float32)


@pytest.mark.parametrize(
    "onset, seconds, hertz", [(1.0, 0.5, 3000), (5.2, 2.0, 700), (0.0, 1, 9000)]
)
def test_a_burst_is_found_with_its_times_and_its_band(onset, seconds, hertz):
    found = find_salient_segment(tone(onset, seconds, hertz), RATE)
    assert found.onset == pytest.approx(onset, abs=0.05)
    assert found.offset == pytest.approx(onset + seconds, abs=0.05)
    assert found.low_hz < hertz < found.high_hz
    assert found.high_hz - found.low_hz < 300


def test_notes_of_a_song_are_one_stretch_and_other_songs_are_not():
    song = sum(tone(start, 0.3, 4000, background=0.001) for start in (2.0, 2.6, 3.2))
    other = tone(6.5, 0.3, 4000, level=0.1, background=0.0)
    found = find_salient_segment(song + other, RATE)
    assert (found.onset, found.offset) == pytest.approx((2.0, 3.5), abs=0.05)


def test_a_long_song_is_cut_to_its_loudest_part():
    long = tone(0.5, 7.0, 3000, level=0.1)
    loud = tone(4.0, 2.0, 3000, background=0.0)
    found = find_salient_segment(long + loud, RATE)
    assert found.offset - found.onset <= MAX_SECONDS + 0.01
    assert found.onset <= 4.05
    assert found.offset >= 5.95


def test_rumble_is_no_bird():
    rumble = tone(0.5, 3.0, 60, level=0.9, background=0.003)
    found = find_salient_segment(rumble + tone(6.0, 0.5, 4000, background=0.0), RATE)
    assert found.onset == pytest.approx(6.0, abs=0.05)


@pytest.mark.parametrize("factor", [1.0, 2**0.4, 2**0.8, 2**-0.63])
@pytest.mark.parametrize("total", [3 + k / RATE for k in range(0, 12)])
def test_a_stretch_at_the_end_can_be_read_wherever_it_is_placed(
    training_data, tmp_path, total, factor
):
    path = "train_audio/amecro/XC1.wav"
    (tmp_path / path).parent.mkdir(parents=True)
    waveform = tone(1.5, total - 1.5, 3000, total=total)
    soundfile.write(tmp_path / path, waveform, RATE)
    reader = replace(training_data.read_clip, folder=tmp_path, cache=tmp_path / "cache")
    data = replace(training_data, folder=tmp_path, read_clip=reader)
    found = find_salient_segment(waveform, RATE)
    seconds = (found.offset - found.onset) / factor
    for onset in (0.0, 7.77777, 12.34567, 5.00004, 5.00006):
        event = SimulatedEvent(
            path=path,
            ebird_code="amecro",
            recording_onset=found.onset,
            onset=round(onset, 4),
            offset=round(onset + seconds, 4),
            band_hz=(2900.0, 3100.0),
            snr_db=10.0,
            fade_db=0.0,
            transposed=factor,
        )
        assert len(read_event(event, data, RATE)) == pytest.approx(seconds * RATE, abs=10)


@pytest.mark.parametrize("waveform", [np.zeros(RATE, np.float32), np.zeros(100, np.float32)])
def test_silence_has_a_stretch_too(waveform):
    found = find_salient_segment(waveform, RATE)
    assert 0 <= found.onset <= found.offset <= len(waveform) / RATE
    assert (found.low_hz, found.high_hz) == (0.0, RATE / 2)


# --- the plan ------------------------------------------------------------------------------------


def test_the_share_of_nocall_is_within_a_row_of_each_soundscape(planned, training_data):
    for share in CONFIG.nocall_shares:
        own = [one for one in planned if one.nocall_share == share]
        assert len(own) == CONFIG.soundscapes
        truth = np.concatenate([label_segments(one, training_data.classes) for one in own])
        n_empty = (~truth.any(axis=1)).sum()
        assert abs(n_empty - share * len(truth)) <= len(own)


def test_only_recordings_of_the_held_out_fold_are_heard(planned, training_data):
    folds = training_data.recordings.set_index("path")["fold"]
    assert {folds[event.path] for one in planned for event in one.events} == {0}


def test_no_recordist_is_in_two_groups(training_data):
    recordings = training_data.recordings
    groups = recording_groups(recordings, CONFIG)
    of_recordist = {}
    for name, fold, group in zip(recordings["recordist"], recordings["fold"], groups, strict=True):
        assert group.startswith(f"fold{fold}-part")
        assert of_recordist.setdefault(name, group) == group
    assert len(set(groups)) > 2


def test_a_soundscape_is_made_from_its_own_group(training_data):
    # Recordings with secondary labels are left out, and do not change who is in which group.
    recordings = training_data.recordings.copy()
    others = [("norcar",) if k % 2 else () for k in range(len(recordings))]
    recordings["secondary_codes"] = others
    planned = plan_soundscapes(replace(training_data, recordings=recordings), 0, CONFIG)
    groups = dict(zip(recordings["path"], recording_groups(recordings, CONFIG), strict=True))
    for one in planned:
        assert {groups[event.path] for event in one.events} <= {one.group}
    assert len({one.group for one in planned}) > 1


def test_a_recording_comes_again_only_when_all_of_its_group_have_been_used(training_data):
    many = plan_soundscapes(training_data, 0, replace(CONFIG, soundscapes=12, nocall_shares=(0.5,)))
    for group in {one.group for one in many}:
        used = Counter(e.path for one in many if one.group == group for e in one.events)
        assert max(used.values()) - min(used.values()) <= 2  # one may be too long for what is left


def test_a_recording_with_others_in_it_is_left_out_where_its_species_has_one_without(
    training_data,
):
    recordings = training_data.recordings.copy()
    first = recordings[recordings["fold"] == 0].groupby("ebird_code").head(1).index
    recordings.loc[:, "secondary_codes"] = [("norcar",)] * len(recordings)
    recordings.loc[first, "secondary_codes"] = [()] * len(first)
    planned = plan_soundscapes(replace(training_data, recordings=recordings), 0, CONFIG)
    used = {event.path for one in planned for event in one.events}
    assert used <= set(recordings.loc[first, "path"])
    recordings["secondary_codes"] = [("norcar",)] * len(recordings)
    planned = plan_soundscapes(replace(training_data, recordings=recordings), 0, CONFIG)
    assert any(one.events for one in planned)


def test_the_plan_does_not_depend_on_the_order_of_recordings_or_folds(planned, training_data):
    turned = training_data.recordings.sample(frac=1, random_state=1).reset_index(drop=True)
    other = replace(training_data, recordings=turned)
    plan_soundscapes(other, 1, CONFIG)
    assert plan_soundscapes(other, 0, CONFIG) == planned


def test_another_seed_plans_other_soundscapes(planned, training_data):
    assert plan_soundscapes(training_data, 0, replace(CONFIG, seed=1)) != planned


def test_events_lie_inside_their_soundscape_at_drawn_levels(planned):
    events = [event for one in planned for event in one.events]
    assert all(0 <= e.onset < e.offset <= CONFIG.soundscape_seconds for e in events)
    assert all(CONFIG.snr_db[0] <= e.snr_db <= CONFIG.snr_db[1] for e in events)
    assert len({e.snr_db for e in events}) > len(events) / 2


def test_labels_are_those_of_an_independent_count(planned, training_data):
    for one in planned:
        expected = np.zeros((6, len(training_data.classes)), dtype=bool)
        for event in one.events:
            # A hundredth of a second at a time.
            times = np.arange(round(100 * event.onset), round(100 * event.offset))
            for segment, count in Counter(times // (100 * SEGMENT_SECONDS)).items():
                if count >= min(50, len(times) / 2) + 1:
                    column = training_data.classes.index(event.ebird_code)
                    expected[int(segment), column] = True
        found = label_segments(one, training_data.classes)
        assert not (expected & ~found).any()
        assert (expected != found).sum() <= 1  # on the edge of the rule by less than 10 ms


def test_at_most_three_birds_are_in_a_segment(training_data):
    full = replace(CONFIG, nocall_shares=(0.0,), soundscapes=6)
    planned = plan_soundscapes(training_data, 0, full)
    counts = np.concatenate([label_segments(one, training_data.classes).sum(1) for one in planned])
    assert counts.max() <= 3
    assert (counts == 0).mean() < 0.2


def test_other_animals_sing_where_no_bird_of_the_classes_does(training_data):
    often = replace(CONFIG, other_every_seconds=3.0)
    planned = plan_soundscapes(training_data, 0, often)
    others = [event for one in planned for event in one.others]
    assert len(others) == pytest.approx(30 / 3 * len(planned), rel=0.4)
    octaves = np.abs(np.log2([event.transposed for event in others]))
    assert (octaves >= often.other_octaves[0]).all()
    assert (octaves <= often.other_octaves[1]).all()
    for one in planned:
        alone = replace(one, others=())
        labels = label_segments(one, training_data.classes)
        assert np.array_equal(labels, label_segments(alone, training_data.classes))


def test_another_animal_sounds_at_its_transposed_pitch(training_data, tmp_path):
    path = "train_audio/amecro/XC1.wav"
    (tmp_path / path).parent.mkdir(parents=True)
    time = np.arange(4 * RATE) / RATE
    soundfile.write(tmp_path / path, 0.3 * np.sin(2 * np.pi * 3000 * time), RATE)
    reader = replace(training_data.read_clip, folder=tmp_path, cache=tmp_path / "cache")
    data = replace(training_data, folder=tmp_path, read_clip=reader)
    event = SimulatedEvent(
        path=path,
        ebird_code="amecro",
        recording_onset=0.0,
        onset=1.0,
        offset=3.0,
        band_hz=(4200.0, 4800.0),
        snr_db=10.0,
        fade_db=0.0,
        transposed=1.5,
    )
    heard = read_event(event, data, RATE)
    assert len(heard) == pytest.approx(2 * RATE, abs=2)
    peak = np.abs(np.fft.rfft(heard)).argmax() * RATE / len(heard)
    assert peak == pytest.approx(4500, abs=5)


def test_events_are_described_one_a_row(planned):
    table = describe_events(planned)
    assert len(table) == sum(len(one.events) for one in planned)
    assert list(table) == ["recording", "onset", "offset", "ebird_code", "snr_db", "path"]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"soundscape_seconds": 12.0}, "multiple of 5"),
        ({"soundscapes": 0}, "soundscapes is 0"),
        ({"nocall_shares": (1.2,)}, "nocall_shares"),
        ({"nocall_shares": ()}, "empty"),
        ({"snr_db": (9.0, 1.0)}, "snr_db"),
        ({"seed": -1}, "seed is -1"),
        ({"other_every_seconds": 0}, "other_every_seconds"),
        ({"other_octaves": (0.8, 0.2)}, "other_octaves"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(CONFIG, **changes)


# --- the sound -----------------------------------------------------------------------------------


def busiest(planned):
    return max(planned, key=lambda one: len(one.events))


def test_a_bird_has_its_snr_in_its_own_band(planned, training_data, noise):
    one = busiest(planned)
    background = mix_background(one, noise, CONFIG)
    assert one.events
    for event in (*one.events, *one.others):
        bird = read_event(event, training_data, RATE)
        start = round(event.onset * RATE)
        place = slice(start, start + len(bird))
        gain = event_gain(event, bird, background[place], RATE)
        low, high = event.band_hz
        spectra = [np.abs(np.fft.rfft(sound)) ** 2 for sound in (gain * bird, background[place])]
        hertz = np.fft.rfftfreq(len(bird), 1 / RATE)
        inside = (hertz >= low) & (hertz <= high)
        snr_db = 10 * np.log10(spectra[0][inside].sum() / spectra[1][inside].sum())
        assert snr_db == pytest.approx(event.snr_db, abs=0.1)


def test_a_mixture_is_its_bed_where_nothing_sings_and_louder_where_something_does(
    planned, training_data, noise
):
    one = busiest(planned)
    difference = mix_soundscape(one, training_data, noise, CONFIG) - mix_background(
        one, noise, CONFIG
    )
    sings = np.zeros(len(difference), dtype=bool)
    for event in (*one.events, *one.others):
        sings[round(event.onset * RATE) : round(event.offset * RATE) + 1] = True
        place = slice(round(event.onset * RATE), round(event.offset * RATE))
        assert np.abs(difference[place]).max() > 0
    assert not difference[~sings].any()


def test_band_power_of_a_tone_is_that_of_a_tone():
    time = np.arange(RATE) / RATE
    waveform = 0.5 * np.sin(2 * np.pi * 1000 * time) + 0.1 * np.sin(2 * np.pi * 5000 * time)
    assert band_power(waveform, RATE, (900, 1100)) == pytest.approx(0.125, rel=1e-3)
    assert band_power(waveform, RATE, (4900, 5100)) == pytest.approx(0.005, rel=1e-3)


def test_the_recording_s_own_noise_outside_the_bird_s_band_is_taken_out(training_data):
    path = training_data.recordings["path"].iloc[0]
    event = SimulatedEvent(
        path=path,
        ebird_code="amecro",
        recording_onset=0.0,
        onset=1.0,
        offset=3.0,
        band_hz=(3000.0, 4000.0),
        snr_db=10.0,
        fade_db=0.0,
    )
    (whole,) = training_data.read_clip(path, RATE, [0.0], 2.0, None)
    heard = read_event(event, training_data, RATE)
    for band in ((300, 1500), (8000, 14000)):
        assert band_power(heard, RATE, band) < 0.03 * band_power(whole, RATE, band)


def test_what_is_rendered_does_not_depend_on_other_rates_or_soundscapes(
    planned, training_data, noise
):
    one = busiest(planned)
    alone = render(one, training_data, noise=noise, config=CONFIG, sample_rates=[RATE])
    both = render(one, training_data, noise=noise, config=CONFIG, sample_rates=[16_000, RATE])
    assert np.array_equal(alone[RATE], both[RATE])
    assert len(both[16_000]) == 30 * 16_000
    render(planned[0], training_data, noise=noise, config=CONFIG, sample_rates=[RATE])
    assert np.array_equal(
        alone[RATE],
        render(one, training_data, noise=noise, config=CONFIG, sample_rates=[RATE])[RATE],
    )
    assert alone[RATE].dtype == np.float32
    assert 0.01 < np.abs(alone[RATE]).max() <= 1.0


def test_only_noise_that_no_run_has_trained_with_is_heard(training_data):
    _, held_out = training_data.split_noise(0)
    assert held_out
    assert open_noise(training_data, 0, RATE).paths == held_out
    alone = replace(training_data, noise_files=training_data.noise_files[:1])
    assert open_noise(alone, 0, RATE).paths == list(training_data.noise_files[:1])


def test_the_bed_is_never_silent_and_has_no_clicks(planned, noise):
    background = mix_background(planned[0], noise, CONFIG)
    power = np.square(background).reshape(-1, RATE // 10).mean(axis=1)
    assert power.min() > 1e-8
    # A crossfade's end that is cut would be a step above all that the noise itself does.
    steps = np.abs(np.diff(background))
    assert steps.max() < 20 * np.quantile(steps, 0.99)


def test_a_damaged_recording_is_named(training_data, noise, tmp_path):
    path = "train_audio/amecro/XC1.mp3"
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(b"<html>no sound</html>" * 50)
    event = SimulatedEvent(
        path=path,
        ebird_code="amecro",
        recording_onset=0.0,
        onset=1.0,
        offset=3.0,
        band_hz=(3000.0, 4000.0),
        snr_db=10.0,
        fade_db=0.0,
    )
    one = SimulatedSoundscape(
        name="s",
        fold=0,
        group="fold0-part0",
        nocall_share=0.5,
        seconds=30.0,
        seed=(0, 1),
        events=(event,),
        others=(),
    )
    reader = replace(training_data.read_clip, folder=tmp_path)
    broken = replace(training_data, folder=tmp_path, read_clip=reader)
    with pytest.raises(AudioError, match=r"XC1\.mp3"):
        render(one, broken, noise=noise, config=CONFIG, sample_rates=[RATE])


# --- what members hear ---------------------------------------------------------------------------


def test_members_hear_only_soundscapes_of_their_own_fold(training_data, trained_runs, planned):
    known = [*training_data.classes, "norcar", "extra"]
    of_fold = [folder for folder in trained_runs if folder.name == "fold0"]
    heard = predict_simulated(
        load_ensemble(of_fold), planned, data=training_data, config=CONFIG, known=known
    )
    assert heard.member_names == ("other", "tiny")
    assert heard.truth.shape == (len(planned) * 6, len(known))
    assert heard.labelled.all()
    assert set(heard.segments["nocall_share"]) == set(CONFIG.nocall_shares)
    assert (
        heard.segments["seconds"].to_numpy() == np.tile(np.arange(5.0, 31, 5), len(planned))
    ).all()
    wrong = load_ensemble([folder for folder in trained_runs if folder.name == "fold1"])
    with pytest.raises(ValueError, match="has trained on the recordings of simulated-fold0"):
        predict_simulated(wrong, planned, data=training_data, config=CONFIG, known=known)


def test_what_is_heard_is_what_is_rendered(training_data, trained_runs, planned, noise):
    ensemble = load_ensemble([trained_runs[0]])
    heard = predict_simulated(
        ensemble, planned[:2], data=training_data, config=CONFIG, known=list(training_data.classes)
    )
    waveforms = render(planned[1], training_data, noise=noise, config=CONFIG, sample_rates=[RATE])
    expected = predict_waveforms(ensemble, waveforms)
    np.testing.assert_allclose(heard.clipwise[:, 6:], expected.clipwise, atol=1e-6)


SECOND_PROCESS = """
import sys
from pathlib import Path
from birdcall.data.dataset import load_training_data
from birdcall.evaluation.simulation import SimulationConfig, plan_soundscapes
data = load_training_data(*map(Path, sys.argv[1:5]))
config = SimulationConfig(soundscapes=4, soundscape_seconds=30.0)
print(repr(plan_soundscapes(data, 0, config)))
"""


@pytest.fixture(scope="module")
def real_data(cornell_mini, tmp_path_factory):
    """The real recordings' audit and folds."""
    folder = tmp_path_factory.mktemp("real")
    recordings = read_recordings(cornell_mini)
    audit = audit_recordings(cornell_mini, recordings, folder / "audit.csv", workers=2)
    write_folds(make_folds(usable_recordings(recordings, audit), 2), folder / "folds.csv")
    return cornell_mini, folder / "folds.csv", folder / "audit.csv", folder / "cache"


def test_real_recordings_make_the_same_plan_in_a_second_process(real_data):
    data = load_training_data(*real_data)
    planned = plan_soundscapes(data, 0, CONFIG)
    assert sum(len(one.events) for one in planned) > 20
    lengths = [event.offset - event.onset for one in planned for event in one.events]
    assert 0.5 < np.mean(lengths) < 3
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, *map(str, real_data)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == repr(planned)
    noise = open_noise(data, 0, RATE)
    waveform = render(busiest(planned), data, noise=noise, config=CONFIG, sample_rates=[RATE])[RATE]
    assert np.isfinite(waveform).all()
