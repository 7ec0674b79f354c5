"""Scores become labels by one rule that is stored beside the members."""

from dataclasses import replace

import numpy as np
import pytest

from birdcall.inference.decision import (
    Decision,
    average_members,
    combine_members,
    decide_recordings,
    decide_segments,
    label_strings,
    read_decision,
    write_decision,
)
from birdcall.inference.predictions import Calibration, calibrate

CLASSES = ("amecro", "bkcchi", "norcar", "moudov")
IDENTITY = Calibration((1.0,) * 4, (0.0,) * 4, (1.0,) * 4, (0.0,) * 4)


def one_member(*rows):
    """Scores of one member, ``(1, rows, classes)``."""
    return np.array([rows], dtype=float)


def names(scores, decision, starts=None):
    return label_strings(decide_segments(scores, scores, decision, starts), CLASSES)


def test_clip_and_frame_must_agree():
    clipwise = one_member([0.9, 0.9, 0.1, 0.1])
    framewise = one_member([0.9, 0.1, 0.9, 0.1])
    chosen = decide_segments(clipwise, framewise, Decision(0.5, 0.5))
    assert chosen.tolist() == [[True, False, False, False]]


def test_a_threshold_is_reached_at_its_value():
    scores = one_member([0.5, 0.4999, 0.0, 0.0])
    assert decide_segments(scores, scores, Decision(0.5, 0.5))[0].tolist() == [
        True,
        False,
        False,
        False,
    ]


def test_at_most_so_many_birds_and_the_strongest_of_them():
    scores = one_member([0.6, 0.9, 0.7, 0.8])
    assert names(scores, Decision(0.5, 0.5, max_birds=2)) == ["bkcchi moudov"]


def test_of_equally_strong_birds_the_first_classes_are_kept():
    scores = one_member([0.8, 0.8, 0.8, 0.8])
    assert names(scores, Decision(max_birds=2)) == ["amecro bkcchi"]


def test_a_row_without_birds_says_nocall():
    assert label_strings(np.zeros((2, 4), dtype=bool), CLASSES) == ["nocall", "nocall"]


# --- members -------------------------------------------------------------------------------------


def test_an_ensemble_of_one_is_its_member():
    scores = np.random.default_rng(0).random((1, 6, 4), dtype=np.float32)
    for combination in ("mean", "rms", "geometric"):
        assert np.allclose(average_members(scores, combination), scores[0], rtol=1e-6)


def test_the_root_mean_square_is_that():
    scores = np.array([[[0.3]], [[0.9]]])
    assert average_members(scores, "rms")[0, 0] == pytest.approx(np.sqrt((0.09 + 0.81) / 2))
    assert average_members(scores)[0, 0] == pytest.approx(0.6)


def test_the_geometric_mean_is_that_and_a_zero_leaves_it_finite():
    scores = np.array([[[0.3, 0.0]], [[0.9, 0.9]]])
    combined = average_members(scores, "geometric")[0]
    assert combined[0] == pytest.approx(np.sqrt(0.3 * 0.9))
    assert 0 < combined[1] < 1e-3
    chosen = decide_segments(scores, scores, Decision(combination="geometric"))
    assert chosen.tolist() == [[True, False]]


@pytest.mark.parametrize("combination", ["mean", "rms", "geometric", "votes"])
def test_the_order_of_members_does_not_change_a_row(combination):
    scores = np.random.default_rng(0).random((5, 60, 4), dtype=np.float32)
    decision = Decision(combination=combination, neighbour_weight=0.25, recording_threshold=0.6)
    turned = scores[[3, 0, 4, 2, 1]]
    assert np.array_equal(
        decide_segments(scores, scores, decision), decide_segments(turned, turned, decision)
    )
    if combination != "votes":
        assert np.array_equal(
            average_members(scores, combination), average_members(turned, combination)
        )


@pytest.mark.parametrize("share, expected", [(1 / 3, 3), (0.5, 2), (2 / 3, 2), (1.0, 1)])
def test_so_many_members_must_vote_for_a_bird(share, expected):
    # Bird k has k + 1 votes of three.
    scores = np.full((3, 1, 3), 0.1)
    for bird in range(3):
        scores[: bird + 1, 0, bird] = 0.9
    chosen = decide_segments(scores, scores, Decision(combination="votes", vote_share=share))
    assert chosen.sum() == expected


def test_a_vote_needs_clip_and_frame_of_the_same_member():
    clipwise = np.array([[[0.9]], [[0.1]]])
    framewise = np.array([[[0.1]], [[0.9]]])
    assert not decide_segments(
        clipwise, framewise, Decision(combination="votes", vote_share=0.5)
    ).any()


def test_a_third_of_three_members_is_one_whatever_floats_say():
    assert Decision(combination="votes", vote_share=1 / 3).n_votes(3) == 1
    assert Decision(combination="votes", vote_share=2 / 3).n_votes(3) == 2
    assert Decision(combination="votes", vote_share=0.5).n_votes(4) == 2
    assert Decision(combination="votes", vote_share=0.0).n_votes(4) == 1


@pytest.mark.parametrize("combination", ["mean", "rms", "geometric", "votes"])
def test_a_member_with_nan_is_refused(combination):
    scores = np.zeros((2, 3, 4))
    scores[1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        decide_segments(scores, scores, Decision(combination=combination))


# --- neighbours and recordings -------------------------------------------------------------------


def test_neighbours_are_averaged_within_a_recording_only():
    scores = np.array([0.0, 1.0, 0.0, 0.6, 0.0])[None, :, None]
    decision = Decision(neighbour_weight=0.5)
    voters = combine_members(scores, scores, decision, np.array([0, 3]))
    assert np.array_equal(voters.clipwise, voters.framewise)
    smooth = voters.clipwise[0, :, 0]
    assert smooth == pytest.approx([0.5 / 1.5, 1 / 2, 0.5 / 1.5, 0.6 / 1.5, 0.3 / 1.5])


def test_a_bird_between_two_sure_rows_is_named_by_smoothing():
    scores = one_member(*([[p, 0, 0, 0] for p in (0.9, 0.4, 0.9)]))
    assert names(scores, Decision())[1] == "nocall"
    assert names(scores, Decision(neighbour_weight=0.5))[1] == "amecro"


def test_the_gate_lets_a_low_threshold_name_only_birds_that_are_sure_somewhere():
    scores = one_member([0.95, 0.3, 0, 0], [0.3, 0.3, 0, 0])
    low = Decision(0.2, 0.2)
    assert names(scores, low) == ["amecro bkcchi"] * 2
    assert names(scores, replace(low, recording_threshold=0.9)) == ["amecro"] * 2


def test_the_gate_asks_each_recording_for_itself():
    scores = one_member([0.95, 0, 0, 0], [0.3, 0, 0, 0], [0.3, 0, 0, 0])
    gated = Decision(0.2, 0.2, recording_threshold=0.9)
    assert names(scores, gated, np.array([0, 2])) == ["amecro", "amecro", "nocall"]


def test_recordings_one_after_another_are_decided_as_each_alone():
    generator = np.random.default_rng(1)
    clipwise, framewise = generator.random((2, 3, 40, 4), dtype=np.float32)
    starts = np.array([0, 7, 8, 30])
    decision = Decision(
        0.4, 0.3, "votes", 0.5, recording_threshold=0.8, neighbour_weight=0.25, max_birds=2
    )
    together = decide_segments(clipwise, framewise, decision, starts)
    (whole,) = decide_recordings(clipwise, framewise, [decision], starts)
    ends = [*starts[1:], 40]
    for index, (first, end) in enumerate(zip(starts, ends, strict=True)):
        alone = clipwise[:, first:end], framewise[:, first:end]
        assert np.array_equal(together[first:end], decide_segments(*alone, decision))
        assert np.array_equal(whole[[index]], decide_recordings(*alone, [decision])[0])


def test_a_whole_recording_has_the_birds_of_its_rows_that_are_sure_enough():
    scores = one_member([0.9, 0.55, 0, 0], [0, 0.6, 0.7, 0])
    decisions = [Decision(file_threshold=0.65), Decision(file_threshold=0.5, file_max_birds=2)]
    for whole in decide_recordings(scores, scores, decisions):
        assert label_strings(whole, CLASSES) == ["amecro norcar"]
    strict = Decision(clip_threshold=1.0, file_threshold=0.1)
    (nobody,) = decide_recordings(scores, scores, [strict])
    assert label_strings(nobody, CLASSES) == ["nocall"]


# --- calibration ---------------------------------------------------------------------------------


def test_calibration_is_a_line_in_logits():
    score = np.array([[0.2, 0.5, 0.9]])
    logit = np.log(score / (1 - score))
    expected = 1 / (1 + np.exp(-(np.array([1, 2, 0.5]) * logit + np.array([0, -1, 1]))))
    assert calibrate(score, (1, 2, 0.5), (0, -1, 1)) == pytest.approx(expected)


def test_calibration_is_asked_before_thresholds():
    scores = one_member([0.6, 0.6, 0.1, 0.1])
    lower = replace(IDENTITY, clip_offset=(-2.0, 0.0, 0.0, 0.0))
    assert names(scores, Decision(calibration=IDENTITY)) == ["amecro bkcchi"]
    assert names(scores, Decision(calibration=lower)) == ["bkcchi"]


def test_certainty_stays_finite():
    scores = np.array([[0.0, 1.0]], dtype=np.float32)
    assert np.isfinite(calibrate(scores, (3, 3), (0, 0))).all()


def test_a_calibration_for_other_classes_is_refused():
    with pytest.raises(ValueError, match="for 4 classes, the probabilities are of 3"):
        IDENTITY.apply(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="for 4 classes, the decision for 2"):
        Decision(calibration=IDENTITY, classes=("a", "b"))


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"clip_scale": (1.0, 1.0, 0.0, 1.0)}, "clip_scale holds 0"),
        ({"frame_offset": (0.0, float("nan"), 0.0, 0.0)}, "frame_offset"),
        ({"frame_scale": (1.0,)}, "frame_scale must be a finite number for each class"),
    ],
)
def test_a_calibration_that_turns_the_ranking_round_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(IDENTITY, **changes)


# --- the file ------------------------------------------------------------------------------------


def test_a_decision_survives_its_file(tmp_path):
    decision = Decision(
        clip_threshold=0.3,
        frame_threshold=0.25,
        combination="votes",
        vote_share=2 / 3,
        recording_threshold=0.7,
        neighbour_weight=0.25,
        max_birds=2,
        file_threshold=0.6,
        file_max_birds=5,
        window_segments=6,
        context_seconds=2.5,
        calibration=IDENTITY,
        classes=CLASSES,
        members=("a-fold0", "b-fold1"),
        chosen_on="10 rows",
        score={"cross_validated_row_wise_f1": 0.6},
    )
    write_decision(tmp_path / "decision.json", decision)
    assert read_decision(tmp_path / "decision.json") == decision


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "not a readable decision"),
        ('{"clip_treshold": 0.3}', "no field clip_treshold"),
        ('{"clip_threshold": 30}', "clip_threshold"),
        ('{"max_birds": 0}', "max_birds is 0"),
        ('{"file_max_birds": 1.5}', "file_max_birds is 1.5"),
        ('{"combination": "median"}', "combination"),
        ('{"neighbour_weight": -1}', "neighbour_weight"),
        ('{"clip_threshold": "high"}', "not a readable decision"),
        ('{"calibration": {"clip_scale": [1]}}', "not a readable decision"),
        ('{"calibration": {"scale": [1]}}', "no field scale"),
        ("[]", "not a readable decision"),
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


@pytest.mark.parametrize(
    "decision, words",
    [
        (Decision(0.3, 0.4), "clip probability >= 0.3 and frame probability >= 0.4, at most 3"),
        (Decision(combination="votes", vote_share=0.5, members=tuple("abcd")), "2 of 4 members"),
        (Decision(combination="votes", vote_share=0.5), "half of the members"),
        (Decision(combination="rms"), "root-mean-square clip"),
        (Decision(recording_threshold=0.9), ">= 0.9 anywhere in the recording"),
        (Decision(neighbour_weight=0.25), "neighbours that weigh 0.25"),
        (Decision(calibration=IDENTITY), "after calibration"),
    ],
)
def test_the_rule_is_said_in_words(decision, words):
    assert words in decision.describe()


def test_an_offset_is_added_to_logits_before_the_calibration():
    """By hand: sigmoid(scale * (logit(p) + offset) + own offset)."""
    calibration = Calibration((2.0, 1.0), (0.5, 0.0), (1.0, 3.0), (0.0, -1.0))
    shifted = calibration.shifted(1.5)
    assert shifted.clip_offset == (0.5 + 2 * 1.5, 1.5)
    assert shifted.frame_offset == (1.5, -1 + 3 * 1.5)
    assert (shifted.clip_scale, shifted.frame_scale) == ((2.0, 1.0), (1.0, 3.0))
    even = np.array([0.5, 0.5])  # a logit of 0
    clipwise, framewise = Calibration.identity(2).shifted(1.5).apply(even, even)
    assert clipwise == pytest.approx(1 / (1 + np.exp(-1.5)))
    assert framewise == pytest.approx(1 / (1 + np.exp(-1.5)))


def test_the_rule_in_words_has_the_false_names_per_hour_and_in_how_many_hours():
    score = {"simulated_false_names_per_hour": 12.34, "simulated_nocall_hours": 0.9}
    assert "12.3 (in 0.9 h of simulated" in Decision(score=score).describe()
    assert "labelled" not in Decision(score=score).describe()
    score |= {"labelled_false_names_per_hour": 0.0, "labelled_nocall_hours": 0.04}
    assert "12.3 (in 0.9 h of simulated" in Decision(score=score).describe()
    assert "0 (in 0.04 h of labelled" in Decision(score=score).describe()
    assert "per hour" not in Decision().describe()


def test_a_name_must_reach_the_floor_of_its_class_and_the_threshold(tmp_path):
    decision = Decision(0.5, 0.1, classes=CLASSES, floor=(0.7, 0.2, 0.5, 1.0))
    scores = one_member([0.69, 0.49, 0.5, 0.9], [0.7, 0.5, 0.49, 1.0])
    assert names(scores, decision) == ["norcar", "amecro bkcchi moudov"]
    whole = decide_recordings(scores, scores, [decision])[0]
    assert whole.tolist() == [[True, True, True, True]]
    write_decision(tmp_path / "decision.json", decision)
    assert read_decision(tmp_path / "decision.json") == decision
    assert "floor of 2 classes" in decision.describe()


@pytest.mark.parametrize("floor", [(0.5,), (0.5, 0.5, 0.5, 1.1)])
def test_a_floor_of_other_classes_or_beyond_1_is_refused(floor):
    with pytest.raises(ValueError, match="floor"):
        Decision(classes=CLASSES, floor=floor)
