"""Scores become labels by one rule that is stored beside the members."""

import numpy as np
import pytest

from birdcall.decision import Decision, combine, decide, label_rows, read_decision, write_decision

CLASSES = ("amecro", "bkcchi", "norcar", "moudov")


def test_clip_and_frame_must_agree():
    clipwise = np.array([[0.9, 0.9, 0.1, 0.1]])
    framewise = np.array([[0.9, 0.1, 0.9, 0.1]])
    chosen = decide(clipwise, framewise, Decision(0.5, 0.5))
    assert chosen.tolist() == [[True, False, False, False]]


def test_a_threshold_is_reached_at_its_value():
    scores = np.array([[0.5, 0.4999, 0.0, 0.0]])
    assert decide(scores, scores, Decision(0.5, 0.5))[0].tolist() == [True, False, False, False]


def test_at_most_so_many_birds_and_the_strongest_of_them():
    scores = np.array([[0.6, 0.9, 0.7, 0.8]])
    chosen = decide(scores, scores, Decision(0.5, 0.5, max_birds=2))
    assert label_rows(chosen, CLASSES) == ["bkcchi moudov"]


def test_a_row_without_birds_says_nocall():
    assert label_rows(np.zeros((2, 4), dtype=bool), CLASSES) == ["nocall", "nocall"]


def test_an_ensemble_of_one_is_its_member():
    scores = np.random.default_rng(0).random((1, 6, 4), dtype=np.float32)
    assert np.array_equal(combine(scores), scores[0])


def test_the_order_of_members_does_not_change_a_bit():
    scores = np.random.default_rng(0).random((5, 60, 4), dtype=np.float32)
    assert np.array_equal(combine(scores), combine(scores[[3, 0, 4, 2, 1]]))


def test_a_member_with_nan_is_refused():
    scores = np.zeros((2, 3, 4))
    scores[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        combine(scores)


def test_a_decision_survives_its_file(tmp_path):
    decision = Decision(0.3, 0.25, 2, 6, ("a-fold0", "b-fold1"), "10 rows", {"row_wise_f1": 0.6})
    write_decision(tmp_path / "decision.json", decision)
    assert read_decision(tmp_path / "decision.json") == decision


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "not a readable decision"),
        ('{"clip_treshold": 0.3}', "unknown field clip_treshold"),
        ('{"clip_threshold": 3}', "clip_threshold is 3"),
        ('{"max_birds": 0}', "max_birds is 0"),
        ('{"clip_threshold": "high"}', "not a readable decision"),
    ],
)
def test_a_wrong_decision_names_its_file(tmp_path, text, complaint):
    path = tmp_path / "decision.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"decision\.json.*{complaint}"):
        read_decision(path)


def test_a_missing_decision_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="birdcall evaluate"):
        read_decision(tmp_path / "decision.json")
