"""A row's label depends on its sound alone, and every row of test.csv gets one."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from birdcall.checkpoint import Checkpoint
from birdcall.decision import Calibration, Decision
from birdcall.inference import (
    FRAMES_PER_SEGMENT,
    Ensemble,
    Member,
    SegmentScores,
    detect_events,
    label_recording,
    score_recordings,
    split_windows,
    write_predictions,
)
from birdcall.models import build_model

RATE = 32_000
CLASSES = ("amecro", "bkcchi", "norcar")


@pytest.fixture(scope="module")
def members(tiny_experiment):
    made = []
    for seed, hop_length in enumerate((1000, 1000, 800)):
        torch.manual_seed(seed)
        frontend = replace(tiny_experiment.frontend, hop_length=hop_length)
        experiment = replace(tiny_experiment, frontend=frontend)
        model = build_model(experiment, len(CLASSES))
        # Statistics of real spectrograms, or every score is about one half.
        model.train()(0.1 * torch.randn(8, 2 * RATE))
        made.append(Member(f"m{seed}", model.eval(), Checkpoint(experiment, CLASSES, seed)))
    return made


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)).astype("f4")


def test_twelve_seconds_are_three_segments_the_last_one_padded():
    windows = split_windows(noise(12.3), RATE, 1, 3)
    assert windows.shape == (3, 5 * RATE)
    assert np.array_equal(windows.ravel()[: round(12.3 * RATE)], noise(12.3))
    assert not windows.ravel()[round(12.3 * RATE) :].any()


def test_scores_have_a_place_for_every_member_segment_and_class(members):
    scores = Ensemble(members).score({RATE: noise(12.3)})
    assert scores.clipwise.shape == scores.framewise.shape == (3, 3, 3)
    assert scores.frames.shape == (3, 3 * FRAMES_PER_SEGMENT)
    assert scores.seconds == pytest.approx(12.3)


def test_a_member_says_the_same_alone_and_in_company(members):
    together = Ensemble(members).score({RATE: noise(12.3)})
    for position, member in enumerate(members):
        alone = Ensemble([member]).score({RATE: noise(12.3)})
        np.testing.assert_allclose(alone.clipwise[0], together.clipwise[position], atol=1e-6)
        np.testing.assert_allclose(alone.framewise[0], together.framewise[position], atol=1e-6)


def test_members_that_share_a_front_end_share_its_log_mel(members, monkeypatch):
    calls = []
    for member in members:
        frontend = member.model.frontend
        original = frontend.forward
        monkeypatch.setattr(
            frontend, "forward", lambda w, f=original, m=member: calls.append(m.name) or f(w)
        )
    Ensemble(members).score({RATE: noise(5)})
    assert calls == ["m0", "m2"]


def test_a_segment_does_not_depend_on_what_is_heard_beside_it(members, monkeypatch):
    ensemble = Ensemble(members)
    whole = ensemble.score({RATE: noise(40)})
    alone = ensemble.score({RATE: noise(40)[10 * RATE : 15 * RATE]})
    np.testing.assert_allclose(whole.clipwise[:, 2], alone.clipwise[:, 0], atol=1e-5)
    monkeypatch.setattr("birdcall.inference.BATCH_SEGMENTS", 3)
    small_batches = ensemble.score({RATE: noise(40)})
    np.testing.assert_allclose(whole.clipwise, small_batches.clipwise, atol=1e-5)
    np.testing.assert_allclose(whole.framewise, small_batches.framewise, atol=1e-5)


def test_the_number_of_threads_does_not_change_a_score(members):
    ensemble = Ensemble(members)
    one = ensemble.score({RATE: noise(12)})
    torch.set_num_threads(2)
    two = ensemble.score({RATE: noise(12)})
    np.testing.assert_allclose(one.clipwise, two.clipwise, atol=1e-5)


def test_a_long_window_gives_every_segment_its_own_frames(members):
    scores = Ensemble(members[:1]).score({RATE: noise(23)}, window_segments=3)
    assert scores.framewise.shape == (1, 5, 3)
    # Segments of one window share its clipwise output; their loudest frames are their own.
    assert np.array_equal(scores.clipwise[0, 0], scores.clipwise[0, 2])
    assert not np.array_equal(scores.clipwise[0, 2], scores.clipwise[0, 3])
    assert not np.array_equal(scores.framewise[0, 0], scores.framewise[0, 1])


def test_members_of_other_classes_do_not_make_an_ensemble(members):
    other = replace(members[1], checkpoint=replace(members[1].checkpoint, classes=("a", "b", "c")))
    with pytest.raises(ValueError, match="other classes"):
        Ensemble([members[0], other])


def scores_of(clipwise, framewise=None):
    clipwise = np.asarray(clipwise, dtype=np.float32)[None]
    framewise = clipwise if framewise is None else np.asarray(framewise, dtype=np.float32)[None]
    frames = np.repeat(framewise[0].T, FRAMES_PER_SEGMENT, axis=1)
    return SegmentScores(clipwise, framewise, frames, 5.0 * clipwise.shape[1])


def test_rows_are_labelled_by_their_end_and_site_3_by_file():
    scores = scores_of([[0.9, 0, 0], [0, 0, 0], [0, 0.8, 0]])
    seconds = [15.0, 5.0, 10.0, float("nan"), 20.0]
    labels = label_recording(scores, seconds, Decision(0.5, 0.5), CLASSES)
    assert labels == ["bkcchi", "amecro", "nocall", "amecro bkcchi", "nocall"]


def test_every_decided_bird_has_an_event_in_its_segment():
    scores = scores_of([[0.9, 0.6, 0], [0.9, 0, 0], [0, 0, 0]])
    frames = scores.frames.copy()
    frames[0, :20] = 0.1  # the crow begins after two seconds
    frames[1, :FRAMES_PER_SEGMENT] = 0.3  # its members peak in different frames
    frames[1, 10] = 0.4
    events = detect_events(replace(scores, frames=frames), Decision(0.5, 0.5), CLASSES)
    assert [(e.ebird_code, e.onset, e.offset) for e in events] == [
        ("bkcchi", 1.0, 1.1),
        ("amecro", 2.0, 10.0),
    ]


def test_events_are_as_long_as_calibrated_frames_say():
    scores = scores_of([[0.9, 0, 0]])
    frames = scores.frames.copy()
    frames[0, :20] = 0.3  # 0.3 is 0.5 where calibrated
    nothing = (0.0,) * 3
    calibration = Calibration((1.0,) * 3, nothing, (1.0,) * 3, (np.log(0.7 / 0.3) + 1e-3, 0, 0))
    events = [
        detect_events(replace(scores, frames=frames), Decision(calibration=one), CLASSES)
        for one in (None, calibration)
    ]
    assert [(e.onset, e.offset) for (e,) in events] == [(2.0, 5.0), (0.0, 5.0)]


def test_a_recording_that_does_not_decode_does_not_stop_the_others(members, tmp_path):
    good, bad = tmp_path / "good.wav", tmp_path / "bad.mp3"
    soundfile.write(good, noise(6), RATE)
    bad.write_bytes(b"<html>not found</html>")
    results = dict(score_recordings(Ensemble(members[:1]), {"bad": bad, "good": good}))
    assert "bad.mp3" in str(results["bad"])
    assert results["good"].clipwise.shape == (1, 2, 3)


def test_a_limit_hears_the_beginning_only(members, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(21), RATE)
    ((_, scores),) = score_recordings(Ensemble(members[:1]), {"a": path}, limit_seconds=10.0)
    assert scores.clipwise.shape[1] == 2
    ((_, whole),) = score_recordings(Ensemble(members[:1]), {"a": path}, limit_seconds=30.0)
    assert whole.clipwise.shape[1] == 5


@pytest.fixture
def competition(tmp_path, cornell_mini):
    """test.csv of the real stand-in with two of its recordings; all others are missing."""
    (tmp_path / "test_audio").mkdir()
    shutil.copyfile(cornell_mini / "test.csv", tmp_path / "test.csv")
    for path in sorted((cornell_mini / "test_audio").iterdir())[:2]:
        shutil.copyfile(path, tmp_path / "test_audio" / path.name)
    return tmp_path


def test_every_row_is_answered_in_order_although_recordings_are_missing(
    competition, members, caplog
):
    submission = competition / "out" / "submission.csv"
    with caplog.at_level(logging.WARNING):
        summary = write_predictions(
            competition, Ensemble(members), Decision(0.0, 0.0, max_birds=2), submission
        )
    rows = pd.read_csv(competition / "test.csv")
    written = pd.read_csv(submission)
    assert list(written["row_id"]) == list(rows["row_id"])
    present = {path.stem for path in (competition / "test_audio").iterdir()}
    missing = ~rows["audio_id"].isin(present)
    assert (written.loc[missing, "birds"] == "nocall").all()
    assert (written.loc[~missing, "birds"].str.split().map(len) == 2).all()
    assert summary.n_rows_with_birds == (~missing).sum()
    for name in set(rows.loc[missing, "audio_id"]):
        assert name in caplog.text
        assert name in summary.failed


def test_without_test_audio_every_row_says_nocall(competition, members):
    shutil.rmtree(competition / "test_audio")
    submission = competition / "submission.csv"
    write_predictions(competition, Ensemble(members), Decision(0.0, 0.0), submission)
    assert (pd.read_csv(submission)["birds"] == "nocall").all()
