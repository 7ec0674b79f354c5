"""Every row of test.csv gets a label, in order, within the time there is."""

import json
import logging
import shutil
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from birdcall.inference.decision import Decision
from birdcall.inference.ensemble import CostMeter, Ensemble, Member, MemberError
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import FRAMES_PER_SEGMENT
from birdcall.kaggle import submission
from birdcall.kaggle.submission import (
    LoadedPackage,
    TimeBudget,
    label_recording,
    predict_rows,
    predict_test_set,
)
from birdcall.models.checkpoint import Checkpoint
from birdcall.models.sed import build_model

RATE = 32_000
CLASSES = ("amecro", "bkcchi", "norcar")
ANY_BIRD = Decision(0.0, 0.0, max_birds=2)


@pytest.fixture(scope="module")
def members(tiny_experiment):
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = build_model(tiny_experiment, len(CLASSES)).eval()
        members.append(Member(f"m{seed}", model, Checkpoint(tiny_experiment, CLASSES, seed)))
    return members


def predictions_of(clipwise):
    clipwise = np.asarray(clipwise, dtype=np.float32)[None]
    frames = np.repeat(clipwise[0].T, FRAMES_PER_SEGMENT, axis=1)
    return SegmentPredictions(
        clipwise, clipwise, frames, recording_seconds=(5.0 * clipwise.shape[1],)
    )


def test_rows_are_labelled_by_their_end_and_site_3_by_file():
    predictions = predictions_of([[0.9, 0, 0], [0, 0, 0], [0, 0.8, 0]])
    seconds = [15.0, 5.0, 10.0, float("nan"), 20.0]
    labels = label_recording(predictions, seconds, Decision(0.5, 0.5), CLASSES)
    assert labels == ["bkcchi", "amecro", "nocall", "amecro bkcchi", "nocall"]


@pytest.fixture
def competition(tmp_path, cornell_mini):
    """test.csv of the real stand-in with two of its recordings; all others are missing."""
    (tmp_path / "test_audio").mkdir()
    shutil.copyfile(cornell_mini / "test.csv", tmp_path / "test.csv")
    for path in sorted((cornell_mini / "test_audio").iterdir())[:2]:
        shutil.copyfile(path, tmp_path / "test_audio" / path.name)
    return tmp_path


def test_every_row_is_labelled_in_order_although_recordings_are_missing(
    competition, members, caplog
):
    submission = competition / "out" / "submission.csv"
    with caplog.at_level(logging.WARNING):
        summary = predict_test_set(
            competition, submission, lambda: LoadedPackage(Ensemble(members), ANY_BIRD)
        )
    rows = pd.read_csv(competition / "test.csv")
    written = pd.read_csv(submission)
    assert list(written["row_id"]) == list(rows["row_id"])
    present = {path.stem for path in (competition / "test_audio").iterdir()}
    missing = ~rows["audio_id"].isin(present)
    assert (written.loc[missing, "birds"] == "nocall").all()
    assert (written.loc[~missing, "birds"].str.split().map(len) == 2).all()
    assert summary.birds_per_row == {0: missing.sum(), 2: (~missing).sum()}
    assert summary.members == {"m0": 2, "m1": 2, "m2": 2}
    for name in set(rows.loc[missing, "audio_id"]):
        assert name in caplog.text
        assert name in summary.failed


def test_without_test_audio_every_row_is_nocall(competition, members):
    shutil.rmtree(competition / "test_audio")
    submission = competition / "submission.csv"
    predict_test_set(competition, submission, lambda: LoadedPackage(Ensemble(members), ANY_BIRD))
    assert (pd.read_csv(submission)["birds"] == "nocall").all()


@pytest.fixture
def recordings(tmp_path):
    """Rows of three recordings of 40 s, and the folder where they are."""
    for number in range(3):
        generator = np.random.default_rng(number)
        soundfile.write(tmp_path / f"r{number}.wav", generator.normal(0, 0.1, 40 * RATE), RATE)
    rows = [(f"{n}_{s}", f"r{n}", float(s)) for n in range(3) for s in range(5, 45, 5)]
    return pd.DataFrame(rows, columns=["row_id", "audio_id", "seconds"]), tmp_path


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\0b", ".."])
def test_a_name_that_leads_out_of_the_folder_is_not_followed(recordings, members, name, caplog):
    rows, folder = recordings
    soundfile.write(folder.parent / "secret.wav", np.zeros(5 * RATE), RATE)
    rows.loc[0, "audio_id"] = name
    labels, summary = predict_rows(rows, folder, LoadedPackage(Ensemble(members), ANY_BIRD))
    assert labels[0] == "nocall"
    assert set(labels[1:]) != {"nocall"}
    assert summary.failed == (name,)


def test_a_member_that_predicts_nan_is_left_out_and_the_others_predict(recordings, members, caplog):
    rows, folder = recordings
    torch.manual_seed(1)
    broken = replace(members[1], name="broken", model=build_model(*_like(members[1])))
    with torch.no_grad():
        broken.model.head.detection.bias.fill_(float("nan"))
    labels, summary = predict_rows(
        rows, folder, LoadedPackage(Ensemble([members[0], broken, members[2]]), ANY_BIRD)
    )
    expected, _ = predict_rows(
        rows, folder, LoadedPackage(Ensemble([members[0], members[2]]), ANY_BIRD)
    )
    assert labels == expected
    assert list(summary.left_out) == ["broken"]
    assert summary.members == {"m0": 3, "m2": 3}
    assert "holds NaN" in caplog.text


def test_without_any_member_that_runs_it_fails(recordings, members):
    rows, folder = recordings
    broken = replace(members[1], model=build_model(*_like(members[1])))
    with torch.no_grad():
        broken.model.project.weight.fill_(float("nan"))
    with pytest.raises(MemberError, match="holds NaN"):
        predict_rows(rows, folder, LoadedPackage(Ensemble([broken]), ANY_BIRD))


def test_a_member_that_fails_half_way_leaves_what_it_has_labelled(recordings, members, monkeypatch):
    rows, folder = recordings
    expected, _ = predict_rows(rows, folder, LoadedPackage(Ensemble(members[:1]), ANY_BIRD))
    soundfile.write(folder / "r1.wav", np.full(40 * RATE, 0.5), RATE)
    member, real = members[0], members[0].model.features

    def fail(log_mel):
        if float(log_mel.std()) < 1:  # of the constant recording
            raise RuntimeError("the device is gone")
        return real(log_mel)

    monkeypatch.setattr(member.model, "features", fail)
    labels, summary = predict_rows(rows, folder, LoadedPackage(Ensemble([member]), ANY_BIRD))
    assert labels == [*expected[:8], *["nocall"] * 16]
    assert summary.failed == ("r1", "r2")
    assert summary.members == {"m0": 1}
    assert "the device is gone" in summary.left_out["m0"]


def test_whatever_reading_a_recording_raises_the_others_are_labelled(
    recordings, members, monkeypatch
):
    rows, folder = recordings
    real = submission.open_recording

    def fail(path):
        if path.name == "r1.wav":
            raise MemoryError("9 PiB")
        return real(path)

    monkeypatch.setattr(submission, "open_recording", fail)
    labels, summary = predict_rows(rows, folder, LoadedPackage(Ensemble(members), ANY_BIRD))
    assert summary.failed == ("r1",)
    assert [label == "nocall" for label in labels] == [8 <= index < 16 for index in range(24)]
    assert summary.left_out == {}


def _like(member):
    return member.checkpoint.experiment, len(member.checkpoint.classes)


# --- the budget ----------------------------------------------------------------------------------


def test_a_budget_that_is_over_predicts_nothing(recordings, members):
    rows, folder = recordings
    labels, summary = predict_rows(rows, folder, LoadedPackage(Ensemble(members), ANY_BIRD), 0.0)
    assert set(labels) == {"nocall"}
    assert summary.late == ("r0", "r1", "r2")
    assert summary.members == {}


def test_a_large_budget_changes_nothing(recordings, members):
    rows, folder = recordings
    free, _ = predict_rows(rows, folder, LoadedPackage(Ensemble(members), ANY_BIRD))
    rich, summary = predict_rows(rows, folder, LoadedPackage(Ensemble(members), ANY_BIRD), 3600.0)
    assert rich == free
    assert summary.members == {"m0": 3, "m1": 3, "m2": 3}


def spend(costs, name, seconds, audio_seconds):
    """Let ``name`` have taken so many seconds for so many of audio, by a clock of the test."""
    times = iter((0.0, seconds))
    with costs.measure(name, audio_seconds, lambda: next(times)):
        pass


@pytest.fixture
def costs():
    """100 s of audio: each member took 20 s of a thread, all else 40 s; in 50 s, by two threads."""
    meter = CostMeter()
    spend(meter, "reading", 30.0, 100.0)
    spend(meter, "front end", 10.0, 100.0)
    for name in ("a", "b", "c"):
        spend(meter, name, 20.0, 100.0)
    return meter


def test_an_estimate_is_what_it_took_so_far(costs):
    assert costs.estimate(["a", "b", "c"], 50.0) == pytest.approx(0.5)
    assert costs.estimate(["a"], 50.0) == pytest.approx(0.5 * 60 / 100)
    assert CostMeter().estimate(["a"], 50.0) == 0


def test_each_front_end_of_the_members_costs_its_time_once():
    """100 s of audio in 100 s: 10 s reading, two front ends of 20 and 40 s, members of 10 s."""
    meter = CostMeter({"a": "front end", "b": "front end 2", "c": "front end 2"})
    spend(meter, "reading", 10.0, 100.0)
    spend(meter, "front end", 20.0, 100.0)
    spend(meter, "front end 2", 40.0, 100.0)
    for name in ("a", "b", "c"):
        spend(meter, name, 10.0, 100.0)
    assert meter.estimate(["a", "b", "c"], 100.0) == pytest.approx(1.0)
    assert meter.estimate(["a", "b"], 100.0) == pytest.approx(0.9)
    assert meter.estimate(["a"], 100.0) == pytest.approx(0.4)


@pytest.mark.parametrize(
    "left_seconds, n_members",
    [(0.5 / 0.9, 3), (0.499 / 0.9, 2), (0.35 / 0.9, 1), (0.01, 1), (0, 0)],
)
def test_as_many_members_predict_as_the_time_allows(costs, tmp_path, left_seconds, n_members):
    """A recording of one second is left; three members need 0.5 s for it, two 0.4, one 0.3."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(RATE), RATE)
    now = 0.0
    budget = TimeBudget({"a": path}, 50 + left_seconds, lambda: now)
    now = 50.0
    assert budget.limit_members(costs, ["a", "b", "c"], ["a"]) == n_members


def test_while_the_costs_are_unknown_all_members_predict(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(RATE), RATE)
    assert (
        TimeBudget({"a": path}, 1e-3, lambda: 0.0).limit_members(CostMeter(), ["a", "b"], ["a"])
        == 2
    )


def test_the_first_members_remain_where_the_time_is_short(recordings, members, monkeypatch):
    """The most valuable are the first; a recording is predicted by all its members or none."""
    rows, folder = recordings
    limits = iter((3, 1, 0))

    def choose(self, costs, names, remaining):
        return next(limits)

    monkeypatch.setattr(TimeBudget, "limit_members", choose)
    labels, summary = predict_rows(rows, folder, LoadedPackage(Ensemble(members), ANY_BIRD), 1e9)
    assert summary.members == {"m0": 2, "m1": 1, "m2": 1}
    assert summary.late == ("r2",)
    monkeypatch.undo()
    alone, _ = predict_rows(rows, folder, LoadedPackage(Ensemble(members[:1]), ANY_BIRD))
    assert labels[8:16] == alone[8:16]
    assert set(labels[16:]) == {"nocall"}


def test_a_summary_can_be_read_by_programs(recordings, members, tmp_path):
    rows, folder = recordings
    _, summary = predict_rows(rows, folder, LoadedPackage(Ensemble(members), ANY_BIRD))
    values = json.loads(json.dumps(asdict(summary)))
    assert values["n_rows"] == 24
    assert values["birds_per_row"] == {"2": 24}
    assert values["members"] == {"m0": 3, "m1": 3, "m2": 3}
    assert "24 rows: 24 with 2 birds; 3 members; 3 recordings, 0 failed" in str(summary)
