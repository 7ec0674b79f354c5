"""Calibration makes scores probabilities, class by class, and moves rare classes little."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation.calibration import (
    choose_on_labelled,
    find_floor,
    fit_calibration,
    fit_scale_and_offset,
)
from birdcall.evaluation.labelled import segment_table
from birdcall.evaluation.metrics import expected_calibration_error, row_f1_scores
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.background import Background
from birdcall.inference.decision import Decision, decide_segments
from birdcall.inference.predictions import Calibration, SegmentPredictions, calibrate


def distorted(n_recordings=2000, n_classes=20, seed=0):
    """Targets, and scores that say them at the wrong level, differently in each class."""
    generator = np.random.default_rng(seed)
    true_logit = generator.normal(-3, 2, (n_recordings, n_classes))
    targets = (generator.random(true_logit.shape) < expit(true_logit)).astype(np.float32)
    scale = np.exp(generator.normal(0.3, 0.2, n_classes))
    offset = generator.normal(0.8, 0.5, n_classes)
    scores = expit((true_logit - offset) / scale)
    return scores.astype(np.float32), targets, scale, offset


def log_loss(scores, targets):
    clipped = np.clip(scores, 1e-7, 1 - 1e-7)
    return -np.mean(targets * np.log(clipped) + (1 - targets) * np.log(1 - clipped))


def test_a_known_distortion_is_found():
    scores, targets, scale, offset = distorted(20_000)
    found_scale, found_offset = fit_scale_and_offset(scores, targets)
    assert found_scale == pytest.approx(scale, rel=0.1)
    assert found_offset == pytest.approx(offset, abs=0.2)


def test_error_and_loss_fall_on_recordings_that_it_was_not_fitted_on():
    scores, targets, _, _ = distorted()
    found = fit_scale_and_offset(scores[:1000], targets[:1000])
    before, after = scores[1000:], calibrate(scores[1000:], *found)
    truth = targets[1000:] > 0
    errors = [expected_calibration_error(truth, one) for one in (before, after)]
    assert errors[1] < 0.3 * errors[0]
    assert log_loss(after, truth) < log_loss(before, truth)


def test_the_ranking_within_a_class_stays():
    scores, targets, _, _ = distorted()
    after = calibrate(scores, *fit_scale_and_offset(scores, targets))
    for column in range(scores.shape[1]):
        order = np.argsort(scores[:, column], kind="stable")
        assert (np.diff(after[order, column]) >= 0).all()


def test_with_a_wide_prior_it_is_a_logistic_regression_of_each_class():
    scores, targets, _, _ = distorted(1500, 3)
    scale, offset = fit_scale_and_offset(scores, targets, log_scale_spread=50.0, offset_spread=50.0)
    for column in range(3):
        reference = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000)
        z = logit(np.clip(scores[:, [column]].astype(float), 1e-7, 1 - 1e-7))
        reference.fit(z, targets[:, column])
        assert scale[column] == pytest.approx(reference.coef_[0, 0], rel=0.01)
        assert offset[column] == pytest.approx(reference.intercept_[0], abs=0.02)


def highest_posterior(scores, targets, log_scale_spread=0.2, offset_spread=0.5):
    """Scale and offset by a general method and a gradient by differences of the definition."""
    n_classes = scores.shape[1]
    z = logit(np.clip(scores.astype(float), 1e-7, 1 - 1e-7))

    def unpack(values):
        deviations = values[2:].reshape(2, n_classes)
        scale = np.exp(values[0] + log_scale_spread * deviations[0])
        return scale, values[1] + offset_spread * deviations[1], deviations

    def loss(values):
        scale, offset, deviations = unpack(values)
        x = scale * z + offset
        likelihood = (np.logaddexp(0, x) - targets * x).sum()
        return likelihood + 0.5 * np.square(deviations).sum()

    start = np.zeros(2 + 2 * n_classes)
    bounds = [(-3, 3)] + [(None, None)] * (1 + 2 * n_classes)
    options = {"maxiter": 10_000, "maxfun": 1_000_000, "ftol": 1e-14, "gtol": 1e-6}
    found = minimize(loss, start, method="L-BFGS-B", bounds=bounds, options=options)
    return unpack(found.x)[:2]


@pytest.mark.parametrize("kind", ["distorted", "few rows", "at random", "the wrong way round"])
def test_it_is_the_highest_posterior(kind):
    scores, targets, _, _ = distorted(40 if kind == "few rows" else 400, 4)
    if kind == "at random":
        scores = np.random.default_rng(1).random(scores.shape)
    elif kind == "the wrong way round":
        scores = 1 - scores
    expected = highest_posterior(scores, targets)
    assert np.allclose(fit_scale_and_offset(scores, targets), expected, atol=1e-3)


def test_a_class_without_birds_moves_less_than_its_data_alone_would_say():
    scores, targets, _, _ = distorted(300)
    targets[:, 0] = 0
    scale, offset = fit_scale_and_offset(scores, targets)
    shared_scale, shared_offset = np.exp(np.log(scale[1:]).mean()), offset[1:].mean()
    assert abs(np.log(scale[0] / shared_scale)) < 3 * 0.2
    assert abs(offset[0] - shared_offset) < 4 * 0.5
    assert np.isfinite([*scale, *offset]).all()


def test_a_class_that_no_recording_tells_of_gets_what_all_share():
    scores, targets, _, _ = distorted(500, 4)
    targets[:, 0] = IGNORE_TARGET
    scale, offset = fit_scale_and_offset(scores, targets)
    rest_scale, rest_offset = fit_scale_and_offset(scores[:, 1:], targets[:, 1:])
    assert scale[1:] == pytest.approx(rest_scale, rel=1e-3)
    assert offset[1:] == pytest.approx(rest_offset, abs=1e-3)
    assert min(rest_scale) < scale[0] < max(rest_scale)
    assert min(rest_offset) < offset[0] < max(rest_offset)


def test_cells_that_may_be_either_and_rows_of_nobody_are_left_out():
    scores, targets, _, _ = distorted(400, 5)
    generator = np.random.default_rng(0)
    unknown = generator.random(targets.shape) < 0.1
    nobody = np.arange(400) % 7 == 0
    marked, missing = targets.copy(), scores.copy()
    marked[unknown] = IGNORE_TARGET
    missing[nobody] = np.nan
    spoilt = np.where(unknown, 1 - scores, missing)
    first = fit_scale_and_offset(missing, marked)
    second = fit_scale_and_offset(spoilt, marked)
    assert np.allclose(first, second)
    kept = fit_scale_and_offset(scores[~nobody], marked[~nobody])
    assert np.allclose(first, kept, atol=1e-3)


def test_clip_and_frame_are_fitted_apart():
    scores, targets, _, _ = distorted(400, 3)
    found = fit_calibration(scores, calibrate(scores, (2.0,) * 3, (1.0,) * 3), targets)
    assert found.frame_scale == pytest.approx(np.array(found.clip_scale) / 2, rel=0.05)
    assert found.frame_offset != found.clip_offset


def test_nothing_to_fit_on_is_an_error():
    with pytest.raises(ValueError, match="no row to fit"):
        fit_scale_and_offset(np.full((3, 2), np.nan), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="framewise has shape"):
        fit_calibration(np.zeros((3, 2)), np.zeros((3, 3)), np.zeros((3, 2)))


@pytest.mark.parametrize("penalty", [1.0, np.inf])
def test_with_few_recordings_its_loss_is_below_that_of_a_regression_of_each_class(penalty):
    """Why it is not scikit-learn's: most classes have too few recordings for a fit of their own."""
    losses = []
    for seed in range(3):
        scores, targets, _, _ = distorted(1100, 20, seed)
        few, rest = slice(0, 100), slice(100, None)
        ours = calibrate(scores[rest], *fit_scale_and_offset(scores[few], targets[few]))
        theirs = np.empty_like(ours)
        z = logit(np.clip(scores.astype(float), 1e-7, 1 - 1e-7))
        for column in range(20):
            regression = LogisticRegression(C=penalty, max_iter=1000)
            regression.fit(z[few][:, [column]], targets[few, column])
            theirs[:, column] = regression.predict_proba(z[rest][:, [column]])[:, 1]
        losses.append([log_loss(one, targets[rest]) for one in (ours, theirs)])
    ours, theirs = np.mean(losses, axis=0)
    assert ours < theirs


# --- labelled soundscapes ---


def soundscapes(truth, logits, n_rows=12):
    """Soundscapes of ``n_rows`` segments as a single member predicts them."""
    names = [f"s{index}" for index in range(len(truth) // n_rows)]
    tables = [segment_table(name, n_rows, is_labelled=True, group=name) for name in names]
    probabilities = expit(np.asarray(logits, np.float32))[None]
    return LabelledPredictions(
        segments=pd.concat(tables, ignore_index=True),
        truth=truth,
        predictions=SegmentPredictions(
            probabilities, probabilities, starts=tuple(range(0, len(truth), n_rows))
        ),
        member_names=("m",),
        classes=tuple(f"bird{index}" for index in range(truth.shape[1])),
    )


def ranked(n_soundscapes, shift=0.0, skill=5.0, seed=0):
    """Soundscapes whose scores rank well, at a level that is lower by ``shift`` logits."""
    generator = np.random.default_rng(seed)
    truth = generator.random((12 * n_soundscapes, 5)) < 0.12
    logits = generator.normal(-3, 1, truth.shape) + skill * truth - shift
    return soundscapes(truth, logits)


def calibration_of(simulated):
    return fit_calibration(simulated.clipwise[0], simulated.framewise[0], simulated.truth)


@pytest.mark.parametrize("shift", [-1.5, 0.0, 2.0, 4.0])
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_a_shift_between_simulated_and_labelled_scores_is_learned(shift, is_calibrated):
    calibration = calibration_of(ranked(40))
    labelled = ranked(8, shift, seed=1)
    decision = Decision(calibration=calibration if is_calibrated else None)
    choice = choose_on_labelled(decision, labelled, calibration)
    assert choice.offset == pytest.approx(shift, abs=0.5)
    assert not choice.is_silent
    if abs(shift) >= 2:
        nested = row_f1_scores(labelled.truth, choice.predicted).mean()
        assert nested > labelled.row_f1(decision).mean() + 0.1
    if choice.offset:
        base = decision.calibration or Calibration.identity(5)
        assert choice.decision == replace(decision, calibration=base.shifted(choice.offset))


def test_each_soundscape_is_decided_without_its_own_labels():
    calibration, labelled = calibration_of(ranked(40)), ranked(6, 2.0, seed=1)
    spoilt = labelled.truth.copy()
    spoilt[:12] = ~spoilt[:12]
    before = choose_on_labelled(Decision(), labelled, calibration)
    after = choose_on_labelled(Decision(), replace(labelled, truth=spoilt), calibration)
    assert before.by_group["s0"] == after.by_group["s0"]
    assert np.array_equal(before.predicted[:12], after.predicted[:12])
    for index, name in enumerate(before.by_group):
        rows = slice(12 * index, 12 * index + 12)
        alone = labelled.select(np.isin(np.arange(72), np.arange(72)[rows]))
        assert np.array_equal(alone.decide(before.by_group[name]), before.predicted[rows])
        others = labelled.select(~np.isin(np.arange(72), np.arange(72)[rows]))
        assert choose_on_labelled(Decision(), others, calibration).decision == before.by_group[name]


def test_names_that_are_worth_less_than_silence_are_not_given():
    """Of six soundscapes without a bird, each of which a bird seems to be in, at any level."""
    truth = np.zeros((72, 2), dtype=bool)
    truth[::12, 0] = True  # and one row of each with a bird that seems absent
    labelled = soundscapes(truth, np.where(truth, -4.0, 3.0))
    choice = choose_on_labelled(Decision(), labelled)
    assert choice.is_silent and choice.decision.names_nothing
    assert not choice.predicted.any() and not labelled.decide(choice.decision).any()
    # By hand: silence has 11 of 12 rows right; the decision none, and half of no row.
    assert choice.gain == pytest.approx(-11 / 12)


def test_a_decision_that_named_none_of_the_birds_names_nothing_elsewhere():
    """Without labelled birds, a decision that names none stays as it is."""
    truth = np.zeros((24, 2), dtype=bool)
    truth[:6, 0] = True
    seems = np.full((24, 2), -4.0)
    seems[15, 1] = 3.0  # one false name in the second soundscape; none of the birds in the first
    choice = choose_on_labelled(Decision(), soundscapes(truth, seems))
    assert choice.by_group["s1"].names_nothing and not choice.predicted.any()
    without_birds = choose_on_labelled(Decision(), soundscapes(truth & False, seems - 9.0))
    assert not without_birds.is_silent


def test_each_soundscape_is_decided_by_the_other_whatever_both_together_choose():
    """By hand: +6/12 on one soundscape, -3/12 on the other, so the interval is [-0.25, 0.5]."""
    truth = np.zeros((24, 2), dtype=bool)
    truth[:6, 0] = True
    seems = truth.copy()
    seems[12:15, 1] = True
    labelled = soundscapes(truth, np.where(seems, 3.0, -3.0))
    choice = choose_on_labelled(Decision(), labelled)
    assert choice.gain == pytest.approx(0.125)
    assert choice.interval == pytest.approx((-0.25, 0.5))
    assert not choice.is_silent
    # Each is decided by the other alone: the first falls silent, the second names birds.
    assert not choice.predicted[:12].any()
    assert choice.predicted[12:].sum() == 3


@pytest.mark.parametrize("seed", range(5))
def test_scores_by_chance_stay_near_silence(seed):
    generator = np.random.default_rng(seed)
    truth = generator.random((120, 5)) < 0.12
    labelled = soundscapes(truth, generator.normal(0, 2, truth.shape))
    choice = choose_on_labelled(Decision(0.3, 0.3), labelled, calibration_of(ranked(40)))
    silence = (~truth.any(axis=1)).mean()
    assert row_f1_scores(truth, choice.predicted).mean() >= silence - 0.01


def test_classes_that_a_site_raises_are_brought_to_their_background():
    """Two sites raise another class each by four logits in all rows."""
    simulated = ranked(40)
    background = Background.of(simulated.clipwise, simulated.framewise, simulated.starts)
    generator = np.random.default_rng(1)
    truth = generator.random((480, 5)) < 0.08
    logits = generator.normal(-3, 1, truth.shape) + 5.0 * truth
    logits[:240, 0] += 4
    logits[240:, 1] += 4
    labelled = soundscapes(truth, logits, n_rows=120)
    given = (Decision(0.4, 0.4), labelled, calibration_of(simulated))
    raw, choice = choose_on_labelled(*given), choose_on_labelled(*given, background=background)
    assert raw.decision.background is None and choice.decision.background == background
    assert all(decision.background for decision in choice.by_group.values())
    f1 = [row_f1_scores(truth, item.predicted).mean() for item in (raw, choice)]
    assert f1[1] > f1[0] + 0.1
    unshifted = ranked(4, seed=3)
    given = (Decision(0.4, 0.4), unshifted, calibration_of(simulated))
    kept, aligned = choose_on_labelled(*given), choose_on_labelled(*given, background=background)
    f1 = [
        row_f1_scores(unshifted.labelled_truth, item.predicted).mean() for item in (kept, aligned)
    ]
    assert f1[1] >= f1[0] - 0.02


def test_a_single_soundscape_is_scored_by_the_decision_as_it_was():
    labelled = ranked(1, 0.0, seed=1)
    choice = choose_on_labelled(Decision(), labelled, calibration_of(ranked(40)))
    assert choice.by_group == {"s0": Decision()}
    assert np.array_equal(choice.predicted, labelled.decide(Decision()))


def test_a_soundscape_without_labelled_rows_is_decided_as_all_others_chose():
    labelled = ranked(4, 2.0, seed=1)
    labelled.segments.loc[labelled.segments["recording"] == "s3", "is_labelled"] = False
    labelled = replace(labelled)
    choice = choose_on_labelled(Decision(), labelled, calibration_of(ranked(40)))
    assert choice.predicted.shape == (36, 5)
    assert choice.by_group["s3"] == choice.decision


# --- the floor of unlabelled soundscapes ---


def unlabelled(logits):
    probabilities = expit(np.asarray(logits, float))[None]
    return SegmentPredictions(probabilities, probabilities)


def test_the_floor_is_worked_by_hand():
    """Median -4, lower quartile -5: one row of 720 is 2.991 / 0.6745 times as far up as that."""
    floor = find_floor(Decision(), unlabelled(np.array([[-6.0], [-5], [-4], [-3], [9]]))).floor
    assert floor == pytest.approx([expit(-4 + 2.991 / 0.6745)], abs=1e-3)
    assert find_floor(Decision(), None) == Decision()


def test_a_species_is_named_about_once_an_hour_in_sound_like_the_unlabelled():
    generator = np.random.default_rng(0)
    means = np.array([-6.0, -2.0, 1.0])  # the last is above the threshold in most rows
    logits = means + generator.normal(0, 1, (720 * 20, 3))
    decision = find_floor(Decision(0.3, 0.3), unlabelled(logits))
    fresh = means + generator.normal(0, 1, (720 * 20, 3))
    fresh = expit(fresh)[None]
    quiet, medium, loud = decide_segments(fresh, fresh, decision).sum(axis=0) / 20  # per hour
    assert quiet == 0
    assert 0.4 < medium < 2 and 0.4 < loud < 2
    without = decide_segments(fresh, fresh, Decision(0.3, 0.3)).sum(axis=0) / 20
    assert without[2] > 600


def test_birds_in_some_unlabelled_rows_do_not_silence_their_class():
    generator = np.random.default_rng(0)
    logits = generator.normal(-5, 1, (2000, 2))
    logits[:200, 0] = generator.normal(3, 1, 200)  # one row in ten
    decision = find_floor(Decision(), unlabelled(logits))
    with_birds, without = logit(decision.floor)
    assert without < with_birds < -1
    probabilities = expit(logits)[None]
    named = decide_segments(probabilities, probabilities, decision)
    assert named[:200, 0].mean() > 0.95


def test_the_floor_is_of_the_scores_that_a_decision_compares():
    """After its offset, and where members vote of the one that decides."""
    generator = np.random.default_rng(0)
    probabilities = expit(generator.normal(-4, 1, (3, 500, 2)))
    noise = SegmentPredictions(probabilities, probabilities)
    shifted = Decision(calibration=Calibration.identity(2).shifted(1.5))
    plain = logit(find_floor(Decision(), noise).floor)
    assert logit(find_floor(shifted, noise).floor) == pytest.approx(plain + 1.5, abs=0.3)
    votes = Decision(combination="votes", vote_share=1.0)
    lowest = SegmentPredictions(*2 * (probabilities.min(axis=0)[None],))
    assert find_floor(votes, noise).floor == find_floor(Decision(), lowest).floor


def test_the_floor_stays_unless_labelled_soundscapes_lose_by_it():
    generator = np.random.default_rng(0)
    labelled, quiet = ranked(4, seed=1), unlabelled(generator.normal(-4, 1, (500, 5)))
    choice = choose_on_labelled(Decision(), labelled, unlabelled=quiet)
    assert choice.decision == find_floor(Decision(), quiet)
    loud = unlabelled(np.full((100, 5), 12.0))  # no name reaches what is everywhere
    assert not labelled.decide(find_floor(Decision(), loud)).any()
    choice = choose_on_labelled(Decision(), labelled, unlabelled=loud)
    assert choice.decision == Decision()
    assert all(decision == Decision() for decision in choice.by_group.values())
    one = choose_on_labelled(Decision(), ranked(1, seed=1), unlabelled=loud)
    assert one.by_group["s0"] == find_floor(Decision(), loud)  # no other soundscape tells of it
