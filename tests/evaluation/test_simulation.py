"""Simulated soundscapes hold what their plan says, and nothing that a run has trained on."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile

from birdcall.audio.reading import AudioError
from birdcall.config import SEGMENT_SECONDS
from birdcall.data.audit import audit_recordings
from birdcall.data.cache import CropRequest
from birdcall.data.dataset import load_training_data
from birdcall.data.folds import make_folds, write_folds
from birdcall.data.recordings import read_recordings, usable_recordings
from birdcall.data.targets import label_segments
from birdcall.evaluation.predict import predict_simulated
from birdcall.evaluation.simulated_audio import (
    SoundscapeRenderer,
    find_salient_segment,
    salient_segment_finder,
)
from birdcall.evaluation.simulation import (
    SimulatedEvent,
    SimulatedSoundscape,
    SimulationConfig,
    describe_events,
    group_recordings,
    plan_soundscapes,
)
from birdcall.inference.engine import predict_waveforms
from birdcall.inference.ensemble import load_ensemble
from birdcall.taxonomy import all_species

RATE = 32_000
CONFIG = SimulationConfig(n_soundscapes=4, soundscape_seconds=30.0)
EVENT = SimulatedEvent(
    path="train_audio/amecro/XC1.wav",
    ebird_code="amecro",
    recording_onset=0.0,
    onset=1.0,
    offset=3.0,
    band_hz=(3000.0, 4000.0),
    snr_db=10.0,
    fade_db=0.0,
)


@pytest.fixture(scope="module")
def find_segment(training_data):
    """The salient segments of the recordings, each computed once for all tests."""
    return salient_segment_finder(training_data, RATE)


@pytest.fixture(scope="module")
def plan(training_data, find_segment):
    """A function that plans the soundscapes of a fold."""

    def plan(recordings=training_data.recordings, fold=0, config=CONFIG):
        return plan_soundscapes(recordings, fold, config, find_segment)

    return plan


@pytest.fixture(scope="module")
def planned(plan):
    return plan()


@pytest.fixture(scope="module")
def renderer(training_data):
    return SoundscapeRenderer.for_fold(training_data, 0, CONFIG)


def test_species_that_no_other_fold_has_are_no_events(plan, training_data):
    recordings = training_data.recordings
    first, second, *_ = training_data.classes
    is_moved = (recordings["ebird_code"] == first) & (recordings["fold"] == 1)
    changed = recordings.assign(ebird_code=recordings["ebird_code"].mask(is_moved, second))
    codes = {event.ebird_code for soundscape in plan(changed) for event in soundscape.events}
    assert codes == set(training_data.classes) - {first}
    assert plan(recordings[recordings["fold"] == 0]) == []


def reader_in(renderer, folder):
    """Return the renderer with the recordings of another folder."""
    reader = replace(renderer.read_crops, data=folder, folder=folder / "cache")
    return replace(renderer, read_crops=reader)


# --- salient segments ---------------------------------------------------------------------------


def tone(onset, seconds, hertz, total=8.0, level=0.3, background=0.003):
    """A tone in faint noise, ``(samples,)``."""
    generator = np.random.default_rng(0)
    waveform = background * generator.standard_normal(round(total * RATE))
    span = slice(round(onset * RATE), round((onset + seconds) * RATE))
    time = np.arange(span.stop - span.start) / RATE
    waveform[span] += level * np.sin(2 * np.pi * hertz * time)
    return waveform.astype(np.float32)


@pytest.mark.parametrize(
    "onset, seconds, hertz", [(1.0, 0.5, 3000), (5.2, 2.0, 700), (0.0, 1, 9000)]
)
def test_the_salient_segment_of_a_burst_has_its_times_and_its_band(onset, seconds, hertz):
    segment = find_salient_segment(tone(onset, seconds, hertz), RATE)
    assert segment.onset == pytest.approx(onset, abs=0.05)
    assert segment.offset == pytest.approx(onset + seconds, abs=0.05)
    assert segment.low_hz < hertz < segment.high_hz
    assert segment.high_hz - segment.low_hz < 300


def test_notes_of_a_song_are_one_segment_and_other_songs_are_not():
    song = sum(tone(start, 0.3, 4000, background=0.001) for start in (2.0, 2.6, 3.2))
    other = tone(6.5, 0.3, 4000, level=0.1, background=0.0)
    segment = find_salient_segment(song + other, RATE)
    assert (segment.onset, segment.offset) == pytest.approx((2.0, 3.5), abs=0.05)


def test_a_long_song_is_cut_to_its_loudest_part():
    long = tone(0.5, 7.0, 3000, level=0.1)
    loud = tone(4.0, 2.0, 3000, background=0.0)
    segment = find_salient_segment(long + loud, RATE)
    assert segment.offset - segment.onset <= 3.01
    assert segment.onset <= 4.05
    assert segment.offset >= 5.95


def test_rumble_is_no_bird():
    rumble = tone(0.5, 3.0, 60, level=0.9, background=0.003)
    segment = find_salient_segment(rumble + tone(6.0, 0.5, 4000, background=0.0), RATE)
    assert segment.onset == pytest.approx(6.0, abs=0.05)


@pytest.mark.parametrize("n_more", range(12))
def test_a_segment_at_the_end_can_be_read_at_any_time_of_a_soundscape(renderer, tmp_path, n_more):
    total = 3 + n_more / RATE
    (tmp_path / EVENT.path).parent.mkdir(parents=True)
    waveform = tone(1.5, total - 1.5, 3000, total=total)
    soundfile.write(tmp_path / EVENT.path, waveform, RATE)
    local = reader_in(renderer, tmp_path)
    segment = find_salient_segment(waveform, RATE)
    for factor in (1.0, 2**0.4, 2**0.8, 2**-0.63):
        seconds = (segment.offset - segment.onset) / factor
        for onset in (0.0, 7.77777, 12.34567, 5.00004, 5.00006):
            event = replace(
                EVENT,
                recording_onset=segment.onset,
                onset=round(onset, 4),
                offset=round(onset + seconds, 4),
                band_hz=(2900.0, 3100.0),
                transposition=factor,
            )
            assert len(local.read_event(event)) == pytest.approx(seconds * RATE, abs=10)


@pytest.mark.parametrize("waveform", [np.zeros(RATE, np.float32), np.zeros(100, np.float32)])
def test_silence_has_a_salient_segment_too(waveform):
    segment = find_salient_segment(waveform, RATE)
    assert 0 <= segment.onset <= segment.offset <= len(waveform) / RATE
    assert (segment.low_hz, segment.high_hz) == (0.0, RATE / 2)


# --- the plan ------------------------------------------------------------------------------------


def test_the_share_of_nocall_is_within_a_row_of_each_soundscape(planned, training_data):
    for share in CONFIG.nocall_shares:
        subset = [soundscape for soundscape in planned if soundscape.nocall_share == share]
        assert len(subset) == CONFIG.n_soundscapes
        truth = np.concatenate(
            [label_segments(soundscape.events, training_data.classes, 6) for soundscape in subset]
        )
        n_empty = (~truth.any(axis=1)).sum()
        assert abs(n_empty - share * len(truth)) <= len(subset)


def test_only_recordings_of_the_held_out_fold_are_used(planned, training_data):
    folds = training_data.recordings.set_index("path")["fold"]
    assert {folds[event.path] for soundscape in planned for event in soundscape.events} == {0}


def test_no_recordist_is_in_two_groups(training_data):
    recordings = training_data.recordings
    groups = group_recordings(recordings, CONFIG.groups_per_fold)
    of_recordist = {}
    for name, fold, group in zip(recordings["recordist"], recordings["fold"], groups, strict=True):
        assert group.startswith(f"fold{fold}-part")
        assert of_recordist.setdefault(name, group) == group
    assert len(set(groups)) > 2


def test_a_fold_of_one_recordist_is_divided_by_species(training_data):
    recordings = training_data.recordings
    alone = recordings.assign(author="me", recordist="me", fold=0)
    groups = pd.Series(group_recordings(alone, 3), index=alone.index)
    assert groups.nunique() == 3
    assert (groups.groupby(alone["ebird_code"]).nunique() == 1).all()


def test_a_soundscape_is_made_from_its_group_alone(training_data, plan):
    # Recordings with secondary labels are left out, and do not change who is in which group.
    recordings = training_data.recordings.copy()
    secondary = [("norcar",) if k % 2 else () for k in range(len(recordings))]
    recordings["secondary_codes"] = secondary
    planned = plan(recordings)
    groups = dict(
        zip(recordings["path"], group_recordings(recordings, CONFIG.groups_per_fold), strict=True)
    )
    for soundscape in planned:
        assert {groups[event.path] for event in soundscape.events} <= {soundscape.group}
    assert len({soundscape.group for soundscape in planned}) > 1


def test_a_recording_repeats_only_when_all_of_its_group_have_been_used(plan):
    many = plan(config=replace(CONFIG, n_soundscapes=12, nocall_shares=(0.5,)))
    for group in {soundscape.group for soundscape in many}:
        used = Counter(
            e.path for soundscape in many if soundscape.group == group for e in soundscape.events
        )
        assert max(used.values()) - min(used.values()) <= 2  # one may be too long for what is left


def test_a_recording_with_secondary_labels_is_left_out_where_its_species_has_one_without(
    training_data, plan
):
    recordings = training_data.recordings.copy()
    first = recordings[recordings["fold"] == 0].groupby("ebird_code").head(1).index
    recordings.loc[:, "secondary_codes"] = [("norcar",)] * len(recordings)
    recordings.loc[first, "secondary_codes"] = pd.Series([()] * len(first), index=first)
    planned = plan(recordings)
    used = {event.path for soundscape in planned for event in soundscape.events}
    assert used <= set(recordings.loc[first, "path"])
    recordings["secondary_codes"] = [("norcar",)] * len(recordings)
    planned = plan(recordings)
    assert any(soundscape.events for soundscape in planned)


def test_the_plan_does_not_depend_on_the_order_of_recordings_or_folds(planned, training_data, plan):
    shuffled = training_data.recordings.sample(frac=1, random_state=1).reset_index(drop=True)
    plan(shuffled, fold=1)
    assert plan(shuffled) == planned


def test_another_seed_plans_other_soundscapes(planned, plan):
    assert plan(config=replace(CONFIG, seed=1)) != planned


def test_events_lie_inside_their_soundscape_at_drawn_levels(planned):
    events = [event for soundscape in planned for event in soundscape.events]
    assert all(0 <= e.onset < e.offset <= CONFIG.soundscape_seconds for e in events)
    assert all(CONFIG.snr_db[0] <= e.snr_db <= CONFIG.snr_db[1] for e in events)
    assert len({e.snr_db for e in events}) > len(events) / 2


def test_labels_are_those_of_an_independent_count(planned, training_data):
    for soundscape in planned:
        expected = np.zeros((6, len(training_data.classes)), dtype=bool)
        for event in soundscape.events:
            # A hundredth of a second at a time.
            times = np.arange(round(100 * event.onset), round(100 * event.offset))
            for segment, count in Counter(times // (100 * SEGMENT_SECONDS)).items():
                if count >= min(50, len(times) / 2) + 1:
                    column = training_data.classes.index(event.ebird_code)
                    expected[int(segment), column] = True
        labels = label_segments(soundscape.events, training_data.classes, 6)
        assert not (expected & ~labels).any()
        assert (expected != labels).sum() <= 1  # on the edge of the rule by less than 10 ms


def test_at_most_three_species_are_in_a_segment(training_data, plan):
    planned = plan(config=replace(CONFIG, nocall_shares=(0.0,), n_soundscapes=6))
    counts = np.concatenate(
        [
            label_segments(soundscape.events, training_data.classes, 6).sum(1)
            for soundscape in planned
        ]
    )
    assert counts.max() <= 3
    assert (counts == 0).mean() < 0.2


def test_distractors_are_birds_at_a_pitch_of_no_class_and_have_no_label(training_data, plan):
    often = replace(CONFIG, distractor_every_seconds=3.0)
    planned = plan(config=often)
    distractors = [event for soundscape in planned for event in soundscape.distractors]
    assert len(distractors) == pytest.approx(30 / 3 * len(planned), rel=0.4)
    octaves = np.abs(np.log2([event.transposition for event in distractors]))
    assert (octaves >= often.distractor_octaves[0]).all()
    assert (octaves <= often.distractor_octaves[1]).all()
    for soundscape in planned:
        alone = replace(soundscape, distractors=())
        labels = label_segments(soundscape.events, training_data.classes, 6)
        assert np.array_equal(labels, label_segments(alone.events, training_data.classes, 6))


def test_a_distractor_has_its_transposed_pitch(renderer, tmp_path):
    (tmp_path / EVENT.path).parent.mkdir(parents=True)
    time = np.arange(4 * RATE) / RATE
    soundfile.write(tmp_path / EVENT.path, 0.3 * np.sin(2 * np.pi * 3000 * time), RATE)
    local = reader_in(renderer, tmp_path)
    event = replace(EVENT, band_hz=(4200.0, 4800.0), transposition=1.5)
    waveform = local.read_event(event)
    assert len(waveform) == pytest.approx(2 * RATE, abs=2)
    peak = np.abs(np.fft.rfft(waveform)).argmax() * RATE / len(waveform)
    assert peak == pytest.approx(4500, abs=5)


def test_events_are_described_one_a_row(planned):
    table = describe_events(planned)
    assert len(table) == sum(len(soundscape.events) for soundscape in planned)
    assert list(table) == ["recording", "onset", "offset", "ebird_code", "snr_db", "path"]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"soundscape_seconds": 12.0}, "multiple of 5"),
        ({"n_soundscapes": 0}, "n_soundscapes is 0"),
        ({"nocall_shares": (1.2,)}, "nocall_shares"),
        ({"nocall_shares": ()}, "empty"),
        ({"snr_db": (9.0, 1.0)}, "snr_db"),
        ({"seed": -1}, "seed is -1"),
        ({"distractor_every_seconds": 0}, "distractor_every_seconds"),
        ({"distractor_octaves": (0.8, 0.2)}, "distractor_octaves"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(CONFIG, **changes)


# --- the audio -----------------------------------------------------------------------------------


def busiest(planned):
    return max(planned, key=lambda soundscape: len(soundscape.events))


def band_power(waveform, band_hz):
    spectrum = np.abs(np.fft.rfft(waveform)) ** 2
    hertz = np.fft.rfftfreq(len(waveform), 1 / RATE)
    return spectrum[(hertz >= band_hz[0]) & (hertz <= band_hz[1])].sum()


def test_an_event_has_its_snr_in_its_frequency_band(planned, renderer):
    soundscape = busiest(planned)
    background = renderer.mix_background(soundscape)
    assert soundscape.events
    for event in (*soundscape.events, *soundscape.distractors):
        alone = replace(soundscape, events=(event,), distractors=())
        difference = renderer.mix(alone) - background
        start = round(event.onset * RATE)
        span = slice(start, start + len(renderer.read_event(event)))
        powers = [band_power(part[span], event.band_hz) for part in (difference, background)]
        assert 10 * np.log10(powers[0] / powers[1]) == pytest.approx(event.snr_db, abs=0.1)


def test_a_mixture_is_its_background_outside_events_and_differs_within_them(planned, renderer):
    soundscape = busiest(planned)
    difference = renderer.mix(soundscape) - renderer.mix_background(soundscape)
    is_event = np.zeros(len(difference), dtype=bool)
    for event in (*soundscape.events, *soundscape.distractors):
        is_event[round(event.onset * RATE) : round(event.offset * RATE) + 1] = True
        span = slice(round(event.onset * RATE), round(event.offset * RATE))
        assert np.abs(difference[span]).max() > 0
    assert not difference[~is_event].any()


def test_the_recording_s_noise_outside_the_event_s_band_is_taken_out(training_data, renderer):
    path = training_data.recordings["path"].iloc[0]
    event = replace(EVENT, path=path)
    (whole,) = training_data.read_crops(CropRequest(path, RATE, seconds=2.0))
    waveform = renderer.read_event(event)
    for band in ((300, 1500), (8000, 14000)):
        assert band_power(waveform, band) < 0.03 * band_power(whole, band)


def test_what_is_rendered_does_not_depend_on_other_rates_or_soundscapes(planned, renderer):
    soundscape = busiest(planned)
    alone = renderer.render(soundscape, [RATE])
    both = renderer.render(soundscape, [16_000, RATE])
    assert np.array_equal(alone[RATE], both[RATE])
    assert len(both[16_000]) == 30 * 16_000
    renderer.render(planned[0], [RATE])
    assert np.array_equal(alone[RATE], renderer.render(soundscape, [RATE])[RATE])
    assert alone[RATE].dtype == np.float32
    assert 0.01 < np.abs(alone[RATE]).max() <= 1.0


def test_only_noise_that_no_run_has_trained_with_is_used(training_data):
    _, held_out = training_data.split_noise(0)
    assert held_out
    assert SoundscapeRenderer.for_fold(training_data, 0, CONFIG).noise.paths == held_out
    alone = replace(training_data, noise_files=training_data.noise_files[:1])
    assert SoundscapeRenderer.for_fold(alone, 0, CONFIG).noise.paths == list(
        training_data.noise_files[:1]
    )


def test_the_background_is_never_silent_and_has_no_clicks(planned, renderer):
    background = renderer.mix_background(planned[0])
    power = np.square(background).reshape(-1, RATE // 10).mean(axis=1)
    assert power.min() > 1e-8
    # A crossfade's end that is cut would be a step above all that the noise itself does.
    steps = np.abs(np.diff(background))
    assert steps.max() < 20 * np.quantile(steps, 0.99)


def test_a_damaged_recording_is_named(renderer, tmp_path):
    path = "train_audio/amecro/XC1.mp3"
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(b"<html>no audio</html>" * 50)
    event = replace(EVENT, path=path)
    soundscape = SimulatedSoundscape(
        name="s",
        fold=0,
        group="fold0-part0",
        nocall_share=0.5,
        seconds=30.0,
        seed=(0, 1),
        events=(event,),
        distractors=(),
    )
    with pytest.raises(AudioError, match=r"XC1\.mp3"):
        reader_in(renderer, tmp_path).render(soundscape, [RATE])


# --- what members predict ------------------------------------------------------------------------


def test_members_predict_only_soundscapes_of_the_fold_that_they_held_out(
    training_data, trained_runs, planned
):
    one_per_share = planned[:: CONFIG.n_soundscapes]
    of_fold = [folder for folder in trained_runs if folder.name == "fold0"]
    predictions = predict_simulated(load_ensemble(of_fold), one_per_share, training_data, CONFIG)
    assert predictions.member_names == ("other", "tiny")
    assert predictions.truth.shape == (len(one_per_share) * 6, len(all_species()))
    assert predictions.labelled.all()
    assert set(predictions.segments["nocall_share"]) == set(CONFIG.nocall_shares)
    assert (
        predictions.segments["seconds"].to_numpy()
        == np.tile(np.arange(5.0, 31, 5), len(one_per_share))
    ).all()
    wrong = load_ensemble([folder for folder in trained_runs if folder.name == "fold1"])
    with pytest.raises(ValueError, match="has trained on the recordings of simulated-fold0"):
        predict_simulated(wrong, planned, training_data, CONFIG)


def test_the_predictions_are_those_for_the_rendered_audio(
    training_data, trained_runs, planned, renderer
):
    ensemble = load_ensemble([trained_runs[0]])
    predictions = predict_simulated(ensemble, planned[:2], training_data, CONFIG)
    expected = predict_waveforms(ensemble, renderer.render(planned[1], [RATE]))
    np.testing.assert_allclose(predictions.clipwise[:, 6:], expected.clipwise, atol=1e-6)


SECOND_PROCESS = """
import sys
from pathlib import Path
from birdcall.data.dataset import load_training_data
from birdcall.evaluation.simulated_audio import salient_segment_finder
from birdcall.evaluation.simulation import SimulationConfig, plan_soundscapes
folder, folds, audit, cache = map(Path, sys.argv[1:5])
data = load_training_data(folder, folds=folds, audit=audit, cache=cache)
config = SimulationConfig(n_soundscapes=4, soundscape_seconds=30.0, nocall_shares=(0.2,))
find_segment = salient_segment_finder(data, config.sample_rate)
print(repr(plan_soundscapes(data.recordings, 0, config, find_segment)))
"""


@pytest.fixture(scope="module")
def real_data(cornell_mini, tmp_path_factory):
    """The real recordings' audit and folds."""
    folder = tmp_path_factory.mktemp("real")
    recordings = read_recordings(cornell_mini)
    audit = audit_recordings(cornell_mini, recordings, folder / "audit.csv", workers=0)
    write_folds(make_folds(usable_recordings(recordings, audit), 2), folder / "folds.csv")
    return cornell_mini, folder / "folds.csv", folder / "audit.csv", folder / "cache"


def test_real_recordings_make_the_same_plan_in_a_second_process(real_data):
    folder, folds, audit, cache = real_data
    data = load_training_data(folder, folds=folds, audit=audit, cache=cache)
    find_segment = salient_segment_finder(data, RATE)
    config = replace(CONFIG, nocall_shares=(0.2,))
    planned = plan_soundscapes(data.recordings, 0, config, find_segment)
    assert sum(len(soundscape.events) for soundscape in planned) > 20
    lengths = [event.offset - event.onset for soundscape in planned for event in soundscape.events]
    assert 0.5 < np.mean(lengths) < 3
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, *map(str, real_data)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == repr(planned)
    waveform = SoundscapeRenderer.for_fold(data, 0, CONFIG).render(busiest(planned), [RATE])[RATE]
    assert np.isfinite(waveform).all()
