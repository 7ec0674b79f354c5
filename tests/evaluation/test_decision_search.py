"""The decision is found by a fast search that equals the rule, and scored on other groups."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birdcall.evaluation.calibration import calibrate_by_group
from birdcall.evaluation.decision_search import (
    THRESHOLDS,
    find_flat_optimum,
    score_threshold_pairs,
    search_decision,
)
from birdcall.evaluation.ensemble_decision import (
    compare_decisions,
    predict_with_best_windows,
)
from birdcall.evaluation.labelled import segment_table
from birdcall.evaluation.metrics import row_f1_scores
from birdcall.evaluation.predict import HeldOutOptions
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.decision import Decision
from birdcall.inference.predictions import Calibration, SegmentPredictions
from birdcall.inference.windows import WindowConfig


def soundscapes(truth, clipwise, framewise=None, n_groups=4, n_rows=12):
    """Recordings of ``n_rows`` segments each, given ``(members, segments, classes)`` scores."""
    n_recordings = len(truth) // n_rows
    parts = [
        segment_table(f"s{k}", n_rows, is_labelled=True, group=f"g{k % n_groups}")
        for k in range(n_recordings)
    ]
    n_classes = clipwise.shape[2]
    return LabelledPredictions(
        segments=pd.concat(parts, ignore_index=True),
        truth=truth,
        predictions=SegmentPredictions(
            clipwise,
            clipwise if framewise is None else framewise,
            starts=tuple(range(0, len(truth), n_rows)),
        ),
        member_names=tuple(f"m{k}" for k in range(len(clipwise))),
        classes=tuple(f"bird{k}" for k in range(n_classes)),
    )


def random_truth(generator, n_segments, n_classes, bird_share=0.46):
    """Rows of which some have 1 to 3 birds."""
    truth = np.zeros((n_segments, n_classes), dtype=bool)
    for row in np.flatnonzero(generator.random(n_segments) < bird_share):
        n_birds = generator.choice([1, 2, 3], p=[0.7, 0.25, 0.05])
        truth[row, generator.choice(n_classes, min(n_birds, n_classes), replace=False)] = True
    return truth


def noisy(generator, truth, n_members=2, skill=3.0, own=0.8):
    """Members that agree but for the noise of each."""
    base = generator.normal(-3, 1.2, truth.shape) + skill * truth
    logits = base + own * generator.normal(size=(n_members, *truth.shape))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def example(seed=0, n_recordings=16, n_classes=6, **how):
    generator = np.random.default_rng(seed)
    truth = random_truth(generator, 12 * n_recordings, n_classes)
    return soundscapes(truth, noisy(generator, truth, **how))


def ones(scores):
    return np.ones(int(scores.labelled.sum()))


# --- the fast search is the rule -----------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    combination=st.sampled_from(["mean", "rms", "geometric", "votes"]),
    vote_share=st.sampled_from([1 / 3, 0.5, 2 / 3, 1.0]),
    recording_threshold=st.sampled_from([0.0, 0.3, 0.7]),
    neighbour_weight=st.sampled_from([0.0, 0.25, 0.5]),
    max_birds=st.integers(1, 4),
    calibrated=st.booleans(),
    floor=st.sampled_from([(), (0.0, 0.3, 0.5, 0.9, 0.2)]),
)
def test_every_pair_of_thresholds_scores_what_decide_says(
    seed,
    combination,
    vote_share,
    recording_threshold,
    neighbour_weight,
    max_birds,
    calibrated,
    floor,
):
    generator = np.random.default_rng(seed)
    truth = random_truth(generator, 36, 6)
    clipwise, framewise = generator.random((2, 3, 36, 5), dtype=np.float32)
    clipwise[0, :12] = np.round(clipwise[0, :12], 1)  # scores on a threshold, and ties
    scores = soundscapes(truth, clipwise, framewise)
    scores.segments.loc[3:6, "is_labelled"] = False
    calibration = Calibration((1.3,) * 5, (0.4,) * 5, (0.8,) * 5, (-0.2,) * 5)
    rule = Decision(
        combination=combination, vote_share=vote_share, recording_threshold=recording_threshold,
        neighbour_weight=neighbour_weight, max_birds=max_birds,
        calibration=calibration if calibrated else None, floor=floor,
    )  # fmt: skip
    by_pair = list(score_threshold_pairs(scores, rule))
    for clip in range(0, len(THRESHOLDS), 3):
        for frame in range(1, len(THRESHOLDS), 3):
            exact = replace(
                rule, clip_threshold=THRESHOLDS[clip], frame_threshold=THRESHOLDS[frame]
            )
            expected = scores.row_f1(exact)
            assert by_pair[clip * len(THRESHOLDS) + frame] == pytest.approx(expected)


def test_the_decision_has_the_score_that_the_search_says():
    scores = example()
    weights = np.where(scores.labelled_truth.any(axis=1), 0.5, 1.5)
    choice = search_decision(scores, weights)
    assert choice.in_sample_f1 == pytest.approx(
        np.average(scores.row_f1(choice.decision), weights=weights)
    )
    assert choice.in_sample_f1 == choice.grid_scores[choice.grid_index]
    clip, frame = choice.grid_index
    assert choice.decision.clip_threshold == THRESHOLDS[clip]
    assert choice.decision.frame_threshold == THRESHOLDS[frame]


# --- honest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_classes", [6, 60])
def test_random_scores_get_no_more_than_all_nocall(seed, n_classes):
    generator = np.random.default_rng(seed)
    truth = random_truth(generator, 12 * 24, n_classes)
    if n_classes == 60:
        truth[:, 1:] &= generator.random((len(truth), 59)) < 0.5  # one bird is everywhere
        truth[generator.random(len(truth)) < 0.15, 0] = True
    chance = generator.random((3, *truth.shape), dtype=np.float32)
    scores = soundscapes(truth, chance, generator.random(chance.shape, dtype=np.float32))
    choice = search_decision(scores, ones(scores))
    nocall = row_f1_scores(truth, np.zeros_like(truth)).mean()
    assert choice.cross_validated_f1.mean() <= nocall + 0.005
    fresh = random_truth(generator, 12 * 24, n_classes)
    chance = generator.random((3, *fresh.shape), dtype=np.float32)
    elsewhere = soundscapes(fresh, chance).row_f1(choice.decision).mean()
    assert elsewhere <= row_f1_scores(fresh, np.zeros_like(fresh)).mean() + 0.005


def test_perfect_scores_get_one():
    generator = np.random.default_rng(0)
    truth = random_truth(generator, 12 * 8, 5)
    scores = soundscapes(truth, np.where(truth, 0.9, 0.05)[None].astype(np.float32))
    choice = search_decision(scores, ones(scores))
    assert choice.cross_validated_f1.mean() == 1.0
    assert choice.cross_validated_recording_f1.mean() == 1.0
    assert np.array_equal(choice.cross_validated, truth)


def test_a_group_s_own_labels_do_not_choose_its_decision():
    scores = example()
    first = scores.segments["group"].to_numpy() == "g0"
    generator = np.random.default_rng(5)
    spoilt = scores.truth.copy()
    spoilt[first] = random_truth(generator, int(first.sum()), 6, bird_share=0.99)
    before = search_decision(scores, ones(scores))
    after = search_decision(replace(scores, truth=spoilt), ones(scores))
    assert np.array_equal(before.cross_validated[first], after.cross_validated[first])
    assert before.by_group["g0"] == after.by_group["g0"]
    assert before.by_group["g1"] != after.by_group["g1"]  # the others must follow it


def test_each_group_is_decided_by_the_decision_chosen_on_the_others():
    scores = example(seed=3)
    choice = search_decision(scores, ones(scores))
    assert set(choice.by_group) == {"g0", "g1", "g2", "g3"}
    for group, decision in choice.by_group.items():
        own = scores.segments["group"].to_numpy() == group
        others = search_decision(scores.select(~own), ones(scores)[~own])
        assert decision == others.decision
        assert np.array_equal(choice.cross_validated[own], scores.select(own).decide(decision))


def test_the_nested_score_is_below_the_tuned_one_where_there_is_little_to_tune_on():
    gaps = []
    for seed in range(8):
        scores = example(seed=seed, n_recordings=4, skill=1.5)
        choice = search_decision(scores, ones(scores))
        gaps.append(choice.in_sample_f1 - choice.cross_validated_f1.mean())
    assert np.mean(gaps) > 0.01


def test_a_single_group_cannot_be_scored():
    scores = example(n_recordings=3)
    scores.segments["group"] = "only"
    with pytest.raises(ValueError, match="all soundscapes are of one group"):
        search_decision(scores, ones(scores))


def test_many_groups_are_merged_and_none_is_lost():
    scores = example(n_recordings=20)
    scores.segments["group"] = scores.segments["recording"]
    asked = []

    def fit(groups):
        asked.append(groups)

    choice = search_decision(scores, ones(scores), fit_calibration=fit, max_groups=3)
    assert len(choice.by_group) == 20
    assert sorted(map(len, asked)) == [0, 6, 7, 7]
    assert frozenset().union(*asked) == {f"s{k}" for k in range(20)}
    again = search_decision(scores, ones(scores), max_groups=3)
    assert np.array_equal(choice.cross_validated, again.cross_validated)


@pytest.mark.parametrize(
    "weights", [np.ones(3), np.full(192, np.nan), np.full(192, -1.0), np.zeros(192)]
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        search_decision(example(), weights)


# --- simple and flat -----------------------------------------------------------------------------


def test_a_plateau_is_preferred_to_a_peak():
    grid = np.full((9, 9), 0.5)
    grid[1, 1] = 0.72
    grid[5:8, 5:8] = 0.7
    assert find_flat_optimum(grid) == ((6, 6), pytest.approx(0.7))


def test_of_equals_the_highest_thresholds_are_taken():
    assert find_flat_optimum(np.full((20, 20), 0.6))[0] == (19, 19)
    assert THRESHOLDS[19] == 1.0


def test_the_simplest_rule_stays_where_nothing_is_better():
    decision = search_decision(example(own=0.0), ones(example())).decision
    assert decision.combination == "mean"
    assert decision.neighbour_weight == decision.recording_threshold == 0.0
    assert decision.max_birds == 3
    assert decision.calibration is None


def adopted(choice):
    steps = choice.steps
    return set(steps["step"][steps["adopted"]]) - {"begin"}


def test_smoothing_is_adopted_where_birds_sing_on_and_scores_flicker():
    generator = np.random.default_rng(0)
    truth = np.zeros((12 * 40, 3), dtype=bool)
    for start in range(0, len(truth), 12):
        truth[start + 3 : start + 9, generator.integers(3)] = True
    scores = soundscapes(truth, noisy(generator, truth, skill=2.5, own=1.0))
    assert "neighbours" in adopted(search_decision(scores, ones(scores)))


def test_the_gate_is_adopted_where_a_bird_is_once_sure_and_then_faint():
    generator = np.random.default_rng(0)
    truth = np.zeros((12 * 40, 8), dtype=bool)
    strength = np.full(truth.shape, 0.03)
    for start in range(0, len(truth), 12):
        bird, ghost = generator.choice(8, 2, replace=False)
        rows = start + generator.choice(12, 6, replace=False)
        truth[rows, bird] = True
        strength[rows, bird] = 0.35
        strength[rows[0], bird] = 0.95
        strength[start + generator.choice(12, 6, replace=False), ghost] = 0.4  # is never sure
    scores = soundscapes(truth, strength[None].astype(np.float32))
    choice = search_decision(scores, ones(scores))
    assert "gate" in adopted(choice)
    assert choice.cross_validated_f1.mean() > 0.95


def test_votes_are_adopted_where_one_member_shouts_and_another_misses_birds():
    generator = np.random.default_rng(0)
    truth = random_truth(generator, 12 * 40, 6)
    scores = np.where(truth, 0.3, 0.05) * np.ones((3, 1, 1))
    for row in range(len(truth)):
        # One member misses the birds, and one is sure of a bird that is perhaps not there.
        scores[generator.integers(3), row, truth[row]] = 0.0
        scores[generator.integers(3), row, generator.integers(6)] = 1.0
    scores = soundscapes(truth, scores.astype(np.float32))
    choice = search_decision(scores, ones(scores))
    assert choice.decision.combination == "votes"
    assert choice.cross_validated_f1.mean() > 0.95
    alone = replace(choice.decision, combination="mean")
    assert scores.row_f1(alone).mean() < 0.8


def test_the_geometric_mean_is_adopted_where_each_member_is_sure_of_other_wrong_birds():
    generator = np.random.default_rng(0)
    truth = random_truth(generator, 12 * 40, 6)
    scores = np.where(truth, 0.4, 0.02) * np.ones((2, 1, 1))
    for row in range(len(truth)):
        scores[generator.integers(2), row, generator.integers(6)] = 0.95
    scores = soundscapes(truth, scores.astype(np.float32))
    choice = search_decision(scores, ones(scores))
    assert choice.decision.combination == "geometric"
    assert choice.cross_validated_f1.mean() > 0.95


def test_calibration_is_adopted_where_classes_speak_at_different_levels():
    generator = np.random.default_rng(0)
    truth = random_truth(generator, 12 * 40, 6)
    offsets = np.array([-2.5, 2.5, 0, -2.5, 2.5, 0])
    logits = generator.normal(-3, 1, truth.shape) + 6 * truth + offsets
    scores = soundscapes(truth, (1 / (1 + np.exp(-logits)))[None].astype(np.float32))
    level = Calibration((1.0,) * 6, tuple(-offsets), (1.0,) * 6, tuple(-offsets))
    choice = search_decision(scores, ones(scores), fit_calibration=lambda groups: level)
    assert choice.decision.calibration == level
    without = search_decision(scores, ones(scores))
    assert without.decision.calibration is None
    assert choice.cross_validated_f1.mean() > without.cross_validated_f1.mean() + 0.02


def test_a_calibration_is_tried_only_on_recordings_that_it_has_not_seen():
    """One that knows its own group's answers, and no others, must not be adopted."""
    scores = example(seed=2, n_recordings=24)
    scores.segments["group"] = [f"g{k // 12 % 2}" for k in range(len(scores.segments))]
    good = Calibration((1.0,) * 6, (1.0,) * 6, (1.0,) * 6, (1.0,) * 6)
    bad = Calibration((0.05,) * 6, (-6.0,) * 6, (0.05,) * 6, (-6.0,) * 6)

    def overfitted(groups):
        return good if not groups else bad  # with all recordings it looks perfect

    choice = search_decision(scores, ones(scores), fit_calibration=overfitted)
    assert choice.decision.calibration is None
    tried = choice.steps.set_index("step").loc["calibration"]
    assert tried["gain"] < 0
    assert all(decision.calibration is None for decision in choice.by_group.values())


def test_a_group_is_calibrated_without_its_own_recordings():
    scores = example(n_recordings=8)
    levels = {"g0": 0.5, "g1": -0.5, "g2": 1.0, "g3": 0.0}

    def fit(groups):
        offset = levels[min(groups)] if groups else 9.0
        return Calibration((1.0,) * 6, (offset,) * 6, (1.0,) * 6, (offset,) * 6)

    cross = calibrate_by_group(scores, {name: fit(frozenset({name})) for name in levels})
    for group in levels:
        own = (scores.segments["group"] == group).to_numpy()
        expected, _ = fit(frozenset({group})).apply(
            scores.clipwise[:, own], scores.framewise[:, own]
        )
        assert np.array_equal(cross.clipwise[:, own], expected)


def test_whole_recordings_get_a_threshold_of_their_own():
    generator = np.random.default_rng(0)
    truth = np.zeros((12 * 32, 6), dtype=bool)
    strength = np.full(truth.shape, 0.03)
    for number, start in enumerate(range(0, len(truth), 12)):
        bird, *false = generator.choice(6, 3, replace=False)
        truth[start : start + 12 : 2, bird] = True
        # In every fourth recording the bird is faint in all rows: a gate would lose it.
        strength[start : start + 12 : 2, bird] = 0.9 if number % 4 else 0.5
        # Among twelve rows there is always one in which two others seem to be there and are not.
        strength[start + 1 + 2 * generator.integers(6), false] = 0.55
    scores = soundscapes(truth, strength[None].astype(np.float32))
    choice = search_decision(scores, ones(scores))
    decision = choice.decision
    assert adopted(choice) == set()
    assert decision.clip_threshold <= 0.5 < 0.55 < decision.file_threshold
    tuned = scores.recording_f1(decision).mean()
    assert tuned > scores.recording_f1(replace(decision, file_threshold=0.05)).mean() + 0.1


def test_every_step_is_told_with_its_gain():
    steps = search_decision(
        example(n_recordings=8, n_members=3), ones(example(n_recordings=8))
    ).steps
    assert list(dict.fromkeys(steps["step"])) == [
        "begin", "combination", "neighbours", "gate", "max_birds"
    ]  # fmt: skip
    assert list(steps["alternative"][1:5]) == [
        "rms", "geometric", "votes of 67%", "votes of 100%"
    ]  # fmt: skip
    kept = steps[steps["adopted"]].iloc[1:]
    assert (kept["gain"] > kept["standard_error"]).all()


# --- the matter that it works on -----------------------------------------------------------------


def test_a_species_that_the_members_cannot_name_counts_as_missed():
    scores = example()
    foreign = np.zeros((len(scores.truth), 1), dtype=bool)
    foreign[0] = True
    wider = replace(scores, truth=np.hstack([scores.truth, foreign]))
    before, after = scores.row_f1(Decision()), wider.row_f1(Decision())
    assert after[0] < max(before[0], 0.5)
    assert np.array_equal(after[1:], before[1:])


def test_rows_that_nobody_labelled_are_heard_and_not_scored():
    scores = example(n_recordings=2)
    scores.segments.loc[4, "is_labelled"] = False
    smooth = Decision(0.3, 0.3, neighbour_weight=0.5)
    named = scores.decide(smooth)
    assert len(named) == len(scores.truth) - 1
    everything = replace(scores, segments=scores.segments.assign(is_labelled=True)).decide(smooth)
    assert np.array_equal(named, np.delete(everything, 4, axis=0))


def test_scores_of_another_shape_are_refused():
    scores = example()
    with pytest.raises(ValueError, match="framewise has shape"):
        scores.with_probabilities(scores.clipwise, scores.framewise[:, :5])
    torn = scores.segments.sample(frac=1, random_state=0).reset_index(drop=True)
    with pytest.raises(ValueError, match="are not adjacent"):
        replace(scores, segments=torn)


def test_outputs_of_another_class_order_are_not_joined():
    scores = example(n_recordings=2)
    turned = replace(scores, classes=scores.classes[::-1])
    with pytest.raises(ValueError, match="classes of m0, m1 are not those of m0, m1"):
        LabelledPredictions.concatenate([scores, turned])


# --- windows --------------------------------------------------------------------------------------


def decided(f1, weights=(1, 1, 1, 1), recordings=("a", "a", "b", "b")):
    """A stand-in of a decision that was searched: its nested F1 of four rows of two recordings."""
    return SimpleNamespace(
        search=SimpleNamespace(cross_validated_f1=np.array(f1, float)),
        simulated=SimpleNamespace(recordings=np.array(recordings)),
        weights=np.array(weights, float),
    )


def test_the_gain_of_other_windows_is_a_mean_over_rows_with_the_error_of_recordings():
    first, second = decided([0, 0, 1, 1]), decided([1, 0, 1, 1])
    # Recordings gain 1/2 and 0, which is 1/4 on average; their standard deviation is sqrt(1/8).
    assert compare_decisions(first, second) == pytest.approx((0.25, 0.25))
    weighted = decided([0, 0, 1, 1], weights=(2, 0, 1, 1)), decided([1, 0, 1, 1])
    assert compare_decisions(*weighted)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="other simulated soundscapes"):
        compare_decisions(first, decided([1, 0, 1, 1], recordings=("a", "a", "c", "c")))


@pytest.mark.parametrize(
    "f1, chosen",
    [
        ({1: [0, 0, 0, 0], 2: [1, 1, 1, 1]}, 2),
        ({1: [0, 0, 0, 0], 2: [1, 0, 0, 0]}, 1),  # no more than its standard error
        ({1: [1, 1, 1, 1], 2: [0, 0, 0, 0]}, 1),
    ],
)
def test_shifted_windows_are_taken_where_they_score_clearly_higher(monkeypatch, f1, chosen):
    def predict(folders, data, options):
        return SimpleNamespace(shifts=options.window_config.shifts, experiments=("e",))

    module = "birdcall.evaluation.ensemble_decision"
    monkeypatch.setattr(f"{module}.predict_held_out", predict)
    monkeypatch.setattr(f"{module}.decide_ensemble", lambda held, *_: decided(f1[held.shifts]))
    candidates = [HeldOutOptions(window_config=WindowConfig(shifts=number)) for number in (1, 2)]
    assert predict_with_best_windows([], None, candidates).shifts == chosen
