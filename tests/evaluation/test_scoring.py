"""Runs are scored on three kinds of audio; the decision is searched on simulated soundscapes."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

import birdcall.evaluation.scoring as scoring
from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation.calibration import fit_calibration
from birdcall.evaluation.comparison import measure_held_out, score_submission
from birdcall.evaluation.ensemble_decision import decide_ensemble
from birdcall.evaluation.metrics import row_f1_scores, row_wise_f1
from birdcall.evaluation.mistakes import MISSED, find_mistakes
from birdcall.evaluation.predict import predict_held_out
from birdcall.evaluation.scoring import describe_classes, evaluate
from birdcall.evaluation.simulation import plan_soundscapes
from birdcall.inference.decision import (
    Decision,
    decide_segments,
    read_decision,
    write_decision,
)
from birdcall.inference.ensemble import load_ensemble
from birdcall.kaggle.submission import LoadedPackage, predict_test_set
from birdcall.kaggle.test_set import (
    read_labelled_soundscapes,
    read_submission,
    read_test_rows,
    write_submission,
)

NOCALL_SHARE = 0.54  # of the competition's public rows


def value(evaluation, name, audio, metric):
    table = evaluation.scores
    is_row = (table["name"] == name) & (table["audio"] == audio) & (table["metric"] == metric)
    return table.loc[is_row, "value"].item()


def test_every_name_has_all_three_kinds_of_audio_together(evaluation):
    table = evaluation.scores
    names = ["other", "tiny", "tiny+other", "ensemble", "all nocall", "prior"]
    assert list(dict.fromkeys(table["name"])) == names
    kinds = {"simulated", "simulated 50%", "simulated 60%", "simulated 80%", "labelled"}
    for name in names:
        subset = table[table["name"] == name]
        expected = kinds if name == "all nocall" else kinds | {"recordings"}
        assert set(subset["audio"]) == expected
    assert not table.duplicated(["name", "audio", "metric"]).any()
    members = table.drop_duplicates("name").set_index("name")["members"]
    assert members.to_dict() == dict(zip(names, (2, 2, 4, 4, 0, 0), strict=True))


def test_all_nocall_gets_the_share_of_rows_without_a_bird(evaluation, demo_folder):
    rows = read_labelled_soundscapes(demo_folder, evaluation.labelled.predictions.classes)
    truth = [" ".join(birds) or "nocall" for birds in rows["birds"]]
    nocall = row_wise_f1(truth, ["nocall"] * len(truth))
    assert value(evaluation, "all nocall", "labelled", "row_wise_f1") == pytest.approx(nocall)
    simulated = value(evaluation, "all nocall", "simulated", "row_wise_f1")
    assert simulated == pytest.approx(NOCALL_SHARE)
    for share in (0.5, 0.6, 0.8):
        simulated = value(evaluation, "all nocall", f"simulated {share:.0%}", "row_wise_f1")
        assert simulated == pytest.approx(share, abs=1 / 6)


def test_the_prior_scores_no_more_than_all_nocall(evaluation):
    for audio in ("simulated", "labelled"):
        nocall = value(evaluation, "all nocall", audio, "row_wise_f1")
        assert value(evaluation, "prior", audio, "row_wise_f1") <= nocall + 1e-9
    assert value(evaluation, "prior", "recordings", "macro_auc") == 0.5


def test_an_experiment_is_simulated_only_by_runs_that_held_the_recordings_out(held_out):
    simulated = held_out.simulated_for(["tiny"])
    folds = held_out.data.recordings.set_index("path")["fold"]
    groups = held_out.groups
    for fold, predictions in held_out.simulated.items():
        names = set(predictions.recordings)
        paths = held_out.events["path"][held_out.events["recording"].isin(names)]
        assert set(folds[paths]) == {fold}
        assert predictions.member_names == ("other", "tiny")
    n_segments = sum(len(part.segments) for part in held_out.simulated.values())
    assert len(simulated.segments) == n_segments
    assert set(simulated.segments["group"]) <= set(groups)


def test_thresholds_are_not_chosen_on_the_labelled_soundscapes(held_out, evaluation):
    labelled = held_out.labelled
    reversed_truth = replace(labelled.predictions, truth=labelled.predictions.truth[::-1])
    changed = replace(held_out, labelled=replace(labelled, predictions=reversed_truth))
    search = decide_ensemble(changed, changed.experiments).search
    assert search.decision == decide_ensemble(held_out, held_out.experiments).search.decision
    alone = decide_ensemble(replace(held_out, labelled=None), held_out.experiments)
    assert replace(alone.decision, score={}, chosen_on="") == search.decision
    assert not any(key.startswith("labelled") for key in alone.decision.score)


def test_a_labelled_soundscape_is_scored_by_what_the_others_chose(held_out, evaluation):
    """Where all others are loud at times and empty, the first is silent, whatever it is."""
    predictions = held_out.labelled.predictions
    first = predictions.segments["recording"] == predictions.recordings[0]
    truth, high = predictions.truth.copy(), np.zeros_like(predictions.clipwise)
    high[:, ::2] = 0.99  # in every second row, so that it is no background
    truth[~first] = False
    high[:, first] = np.where(truth[first, : high.shape[2]], 0.99, 0.0)
    predictions = replace(predictions, truth=truth).with_probabilities(high, high)
    changed = replace(held_out, labelled=replace(held_out.labelled, predictions=predictions))
    ensemble = decide_ensemble(changed, changed.experiments, 0.0)
    choice, rows = ensemble.on_labelled, predictions.recordings == predictions.recordings[0]
    assert not choice.predicted[rows].any()
    assert predictions.decide(choice.by_group[predictions.recordings[-1]])[rows].any()
    f1 = row_f1_scores(predictions.labelled_truth, choice.predicted)
    assert ensemble.decision.score["labelled_row_wise_f1"] == pytest.approx(f1.mean(), abs=1e-4)


@pytest.mark.parametrize("is_labelled", [True, False])
def test_members_that_name_everything_are_silent_where_labelled_soundscapes_tell_of_it(
    held_out, caplog, is_labelled
):
    predictions = held_out.labelled.predictions
    high = np.zeros_like(predictions.clipwise)
    high[:, ::2] = 0.99  # all species in every second segment, so that it is no background
    predictions = predictions.with_probabilities(high, high)
    labelled = replace(held_out.labelled, predictions=predictions) if is_labelled else None
    changed = replace(held_out, labelled=labelled)
    ensemble = decide_ensemble(changed, changed.experiments, 0.0)
    assert not ensemble.search.decision.names_nothing
    assert ensemble.decision.names_nothing == is_labelled
    if is_labelled:
        nocall = 1 - predictions.labelled_truth.any(axis=1).mean()
        score = ensemble.decision.score
        assert score["labelled_all_nocall"] == pytest.approx(nocall, abs=1e-4)
        assert score["labelled_row_wise_f1"] == score["labelled_all_nocall"]
        assert not predictions.decide(ensemble.decision).any()
    assert "less than naming no bird" not in caplog.text


def test_the_labelled_score_is_that_of_the_nested_decisions(held_out, evaluation, tmp_path):
    write_decision(tmp_path / "decision.json", evaluation.ensemble.decision)
    decision = read_decision(tmp_path / "decision.json")
    assert decision == evaluation.ensemble.decision
    predictions, expected = held_out.labelled.predictions, []
    for name, nested in evaluation.ensemble.on_labelled.by_group.items():
        is_soundscape = (predictions.segments["recording"] == name).to_numpy()
        expected.extend(predictions.select(is_soundscape).row_f1(nested))
    expected = np.mean(expected)
    assert value(evaluation, "ensemble", "labelled", "row_wise_f1") == pytest.approx(expected)


def test_the_decision_states_its_origin_and_its_score(evaluation, training_data, held_out):
    decision, search = evaluation.ensemble.decision, evaluation.ensemble.search
    assert decision.weights == {
        member.name: member.checkpoint.weights_sha256 for member in held_out.ensemble.members
    }
    assert sorted(decision.members) == ["other-fold0", "other-fold1", "tiny-fold0", "tiny-fold1"]
    assert decision.classes == training_data.classes
    assert decision.chosen_on.startswith("144 rows of 24 soundscapes simulated from held-out")
    weights = evaluation.ensemble.weights
    nested = np.average(search.cross_validated_f1, weights=weights)
    assert decision.score["cross_validated_row_wise_f1"] == pytest.approx(nested, abs=1e-4)
    assert decision.score["in_sample_row_wise_f1"] == pytest.approx(search.in_sample_f1, abs=1e-4)
    assert (
        decision.score["low"]
        <= decision.score["cross_validated_row_wise_f1"]
        <= decision.score["high"]
    )
    assert decision.score["nocall_share_expected"] == NOCALL_SHARE
    in_table = value(evaluation, "ensemble", "simulated", "row_wise_f1")
    assert decision.score["cross_validated_row_wise_f1"] == pytest.approx(in_table, abs=1e-4)


@pytest.mark.parametrize("best", ["tiny", "other"])
def test_members_of_the_best_experiment_come_first(held_out, best, monkeypatch):
    """A kernel that is short of time uses the first ones."""
    real = scoring.decide_ensemble

    def decide_ensemble(held_out, experiments, nocall_share, name):
        result = real(held_out, experiments, nocall_share, name)
        score = {"cross_validated_row_wise_f1": 0.6 + 0.1 * (name == best)}
        decision = replace(result.decision, score=result.decision.score | score)
        return replace(result, decision=decision)

    monkeypatch.setattr(scoring, "decide_ensemble", decide_ensemble)
    members = evaluate(held_out).ensemble.decision.members
    worse = {"tiny": "other", "other": "tiny"}[best]
    assert members == tuple(f"{name}-fold{fold}" for name in (best, worse) for fold in (0, 1))


def test_calibration_is_fitted_on_the_segments_of_the_other_groups(held_out, monkeypatch):
    fitted = []
    real = fit_calibration

    def fit(clipwise, framewise, targets):
        fitted.append((clipwise, targets))
        return real(clipwise, framewise, targets)

    monkeypatch.setattr("birdcall.evaluation.ensemble_decision.fit_calibration", fit)
    simulated = held_out.simulated_for(held_out.experiments)
    # The first class is in one row: a fit without that row has nothing to tell of it.
    truth = simulated.truth.copy()
    truth[np.flatnonzero(truth[:, 0])[1:], 0] = False
    changed = replace(simulated, truth=truth)
    monkeypatch.setattr(type(held_out), "simulated_for", lambda self, names: changed)
    decide_ensemble(held_out, held_out.experiments)
    groups = simulated.segments["group"]
    n_rows = {len(groups) - size for size in groups.value_counts()}
    assert {len(clipwise) for clipwise, _ in fitted} == n_rows | {len(groups)}
    everything, *_ = [item for item in fitted if len(item[0]) == len(groups)]
    assert np.array_equal(everything[0], simulated.clipwise.mean(axis=0))
    assert np.array_equal(everything[1] > 0, truth[:, : len(simulated.classes)])
    without = [targets for _, targets in fitted if not (targets[:, 0] > 0).any()]
    assert without and all((targets[:, 0] == IGNORE_TARGET).all() for targets in without)


def test_false_names_are_counted_per_hour_of_sound_without_known_birds(held_out, evaluation):
    ensemble, predictions = evaluation.ensemble, held_out.labelled.predictions
    counted = (
        ("simulated", ensemble.simulated.labelled_truth, ensemble.search.cross_validated),
        ("labelled", predictions.labelled_truth, ensemble.on_labelled.predicted),
    )
    for audio, truth, predicted in counted:
        empty = ~truth.any(axis=1)
        hours = empty.sum() * 5 / 3600
        score = ensemble.decision.score
        assert score[f"{audio}_nocall_hours"] == pytest.approx(hours, abs=1e-4)
        per_hour = predicted[empty].sum() / hours
        assert score[f"{audio}_false_names_per_hour"] == pytest.approx(per_hour, abs=1e-4)


def test_unlabelled_soundscapes_set_a_floor(held_out):
    """Here they are those that are labelled; names per hour are those of the decision in them."""
    unlabelled = held_out.labelled.predictions.predictions
    changed = replace(held_out, unlabelled=unlabelled, labelled=None)
    decision = decide_ensemble(changed, ["tiny"]).decision
    assert len(decision.floor) == len(decision.classes)
    positions = [index for index, (name, _) in enumerate(held_out.runs) if name == "tiny"]
    arrays = unlabelled.clipwise[positions], unlabelled.framewise[positions]
    named = decide_segments(*arrays, decision, np.array(unlabelled.starts))
    per_hour = named.sum() / (len(named) * 5 / 3600)
    assert decision.score["unlabelled_names_per_hour"] == pytest.approx(per_hour, abs=1e-4)
    assert decide_ensemble(held_out, ["tiny"]).decision.floor == ()


def test_the_decision_is_searched_for_the_expected_share_of_nocall(held_out):
    few, many = (decide_ensemble(held_out, held_out.experiments, share) for share in (0.0, 1.0))
    assert many.decision.score["nocall_share_named"] == pytest.approx(1.0)
    assert many.decision.score["cross_validated_row_wise_f1"] == pytest.approx(1.0)
    assert few.decision.score["all_nocall"] == pytest.approx(0.0)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_0_to_1_is_refused(held_out, share):
    with pytest.raises(ValueError, match="nocall share is"):
        evaluate(held_out, nocall_share=share)


def test_an_ensemble_of_runs_that_do_not_exist_is_refused(held_out):
    with pytest.raises(ValueError, match="no run of norun; there are runs of other, tiny"):
        evaluate(held_out, [("tiny", "norun")])


def test_experiments_that_share_no_fold_are_scored_alone(
    trained_runs, training_data, held_out_options
):
    runs = [
        run for run in trained_runs if run.parts[-2:] in (("tiny", "fold0"), ("other", "fold1"))
    ]
    evaluation = evaluate(predict_held_out(runs, training_data, held_out_options))
    assert evaluation.ensemble.search is None
    assert evaluation.ensemble.decision.chosen_on.startswith("nothing")
    table = evaluation.scores
    assert set(table[table["audio"] == "simulated"]["name"]) == {"other", "tiny"}
    labelled = set(table[table["audio"] == "labelled"]["name"])
    assert labelled == {"other", "tiny", "ensemble", "all nocall", "prior"}


def test_a_run_of_a_fold_that_the_data_lacks_is_named(trained_runs, training_data):
    one_fold = replace(training_data, recordings=training_data.recordings.assign(fold=0))
    with pytest.raises(ValueError, match=r"other/fold0 .*folds"):
        predict_held_out(trained_runs, one_fold)


def test_one_fold_is_enough_for_a_search(trained_runs, training_data, held_out_options):
    runs = [run for run in trained_runs if run.name == "fold0"]
    evaluation = evaluate(predict_held_out(runs, training_data, held_out_options))
    assert evaluation.ensemble.search is not None
    assert set(evaluation.ensemble.decision.members) == {"other-fold0", "tiny-fold0"}
    scores = evaluation.scores
    recordings = scores[scores["audio"] == "recordings"]["recordings"]
    assert set(recordings) == {int((training_data.recordings["fold"] == 0).sum())}


# --- classes that nobody could learn ---


@pytest.fixture(scope="module")
def with_rare_class(held_out):
    """The predictions, where all recordings of the first class, two or more, are in fold 0."""
    data = held_out.data
    first, second, *_ = data.classes
    codes = data.recordings["ebird_code"]
    is_moved = (codes == first) & (data.recordings["fold"] == 1)
    recordings = data.recordings.assign(ebird_code=codes.mask(is_moved, second))
    return replace(held_out, data=replace(data, recordings=recordings))


def test_a_class_of_one_fold_only_is_scored_by_no_run_of_that_fold(with_rare_class):
    data = with_rare_class.data
    evaluation = evaluate(with_rare_class)
    clipwise, _ = with_rare_class.out_of_fold_for(["tiny"])
    truth = (data.recordings["ebird_code"].to_numpy()[:, None] == data.classes).astype(int)
    secondary = [set(codes) for codes in data.recordings["secondary_codes"]]
    expected = []
    for k, code in list(enumerate(data.classes))[1:]:
        known = np.array([code not in codes for codes in secondary]) | (truth[:, k] == 1)
        expected.append(average_precision_score(truth[known, k], clipwise[known, k]))
    assert value(evaluation, "tiny", "recordings", "macro_ap") == pytest.approx(np.mean(expected))
    table = evaluation.scores.set_index(["name", "audio", "metric"])
    for name in ("tiny", "ensemble", "prior"):
        for metric in ("macro_ap", "macro_auc"):
            row = table.loc[name, "recordings", metric]
            assert (row["classes"], row["left_out"]) == (len(data.classes) - 1, 1)
    confusions = evaluation.confusions
    of_class = confusions[confusions["true_species"] == data.classes[0]]
    assert not of_class["recordings"].any()  # its simulated rows are of the unchanged fixture
    measured = measure_held_out(
        with_rare_class, decide_ensemble(with_rare_class, ["tiny", "other"]), None
    )
    measure, values = measured["oof_ap"]
    assert (measure.n_classes, measure.n_left_out) == (len(data.classes) - 1, 1)
    in_table = value(evaluation, "ensemble", "recordings", "macro_ap")
    assert measure.score(values) == pytest.approx(in_table)
    measure, values = measured["oof_top1"]
    in_table = value(evaluation, "ensemble", "recordings", "top1")
    assert measure.score(values) == pytest.approx(in_table)


def test_labelled_soundscapes_are_scored_over_what_any_member_could_learn(with_rare_class):
    """The runs that held fold 1 out have trained on the class, those of fold 0 have not."""
    first = with_rare_class.data.classes[0]
    predictions = with_rare_class.labelled.predictions
    occurs = predictions.labelled_truth.any(axis=0)
    assert occurs[0]
    both = evaluate(with_rare_class).scores.set_index(["name", "audio", "metric"])
    row = both.loc["ensemble", "labelled", "macro_ap"]
    n_classes = int(occurs[: len(predictions.classes)].sum())
    assert (row["classes"], row["left_out"]) == (n_classes, occurs.sum() - n_classes)
    runs = tuple(run for run in with_rare_class.runs if run[1] == 0)
    fold_0 = replace(with_rare_class, runs=runs, simulated={0: with_rare_class.simulated[0]})
    kept = [k for k, run in enumerate(with_rare_class.runs) if run[1] == 0]
    labelled = replace(fold_0.labelled, predictions=predictions.for_members(kept), frames={})
    fold_0 = replace(fold_0, labelled=labelled)
    evaluation = evaluate(fold_0)
    row = evaluation.scores.set_index(["name", "audio", "metric"]).loc[
        "ensemble", "labelled", "macro_ap"
    ]
    assert (row["classes"], row["left_out"]) == (n_classes - 1, occurs.sum() - n_classes + 1)
    expected = [
        average_precision_score(
            predictions.labelled_truth[:, k],
            labelled.predictions.framewise.mean(axis=0)[predictions.labelled, k],
        )
        for k in np.flatnonzero(occurs[: len(predictions.classes)])[1:]
    ]
    assert row["value"] == pytest.approx(np.mean(expected))
    missed = find_mistakes(fold_0, evaluation.ensemble, 1000)
    missed = {item.ebird_code for item in missed if item.kind == MISSED}
    assert missed
    assert first not in missed


def test_where_no_run_could_learn_what_it_held_out_there_is_no_score_and_no_error(held_out):
    """Fold 0 has recordings of the first class only, fold 1 of the second."""
    data = held_out.data
    codes = np.where(data.recordings["fold"] == 0, data.classes[0], data.classes[1])
    recordings = data.recordings.assign(
        ebird_code=codes, secondary_codes=[() for _ in data.recordings.index]
    )
    assert all(
        plan_soundscapes(recordings, fold, held_out.config, find_segment=None) == []
        for fold in data.folds
    )
    changed = replace(held_out, data=replace(data, recordings=recordings), simulated={})
    evaluation = evaluate(changed)
    assert evaluation.ensemble.decision.chosen_on.startswith("nothing")
    row = evaluation.scores.set_index(["name", "audio", "metric"]).loc[
        "tiny", "recordings", "macro_ap"
    ]
    assert pd.isna(row["value"])
    assert (row["classes"], row["left_out"]) == (0, 2)
    assert "recordings 0 classes, 2 left out;" in describe_classes(evaluation.scores)


def test_a_sentence_says_over_how_many_classes_the_macro_scores_are(evaluation, with_rare_class):
    n_classes = len(with_rare_class.data.classes)
    assert f"recordings {n_classes} classes;" in describe_classes(evaluation.scores)
    text = describe_classes(evaluate(with_rare_class).scores)
    assert f"recordings {n_classes - 1} classes, 1 left out;" in text


def test_random_predictions_score_no_more_than_all_nocall(held_out):
    """The whole procedure on random probabilities: search, calibration, scores, of four draws.

    Of a single draw scores are up to 0.03 higher by chance: these soundscapes are few.
    """

    def evaluate_at_random(generator):
        def randomize(part):
            shape = part.predictions.clipwise.shape
            clipwise = generator.random(shape, dtype=np.float32)
            framewise = generator.random(shape, dtype=np.float32)
            predictions = replace(part.predictions, clipwise=clipwise, framewise=framewise)
            return replace(part, predictions=predictions)

        labelled = randomize(held_out.labelled.predictions)
        return evaluate(
            replace(
                held_out,
                out_of_fold={name: randomize(part) for name, part in held_out.out_of_fold.items()},
                labelled=replace(held_out.labelled, predictions=labelled, frames={}),
                simulated={fold: randomize(part) for fold, part in held_out.simulated.items()},
            )
        )

    evaluations = [evaluate_at_random(np.random.default_rng(seed)) for seed in range(4)]
    for name in ("tiny", "other", "ensemble"):
        for audio in ("simulated", "labelled"):
            gains = [
                value(evaluation, name, audio, "row_wise_f1")
                - value(evaluation, "all nocall", audio, "row_wise_f1")
                for evaluation in evaluations
            ]
            assert np.mean(gains) <= 0.01


def test_a_second_evaluation_predicts_nothing_again(
    trained_runs, training_data, held_out, evaluation, held_out_options, monkeypatch
):
    monkeypatch.setattr("birdcall.evaluation.predictions.predict_audio", None)
    again = predict_held_out(trained_runs, training_data, held_out_options)
    for fold, predictions in held_out.simulated.items():
        stored = again.simulated[fold]
        np.testing.assert_allclose(stored.clipwise, predictions.clipwise, atol=1e-6)
    scores = evaluate(again, [("tiny", "other")]).scores
    pd.testing.assert_frame_equal(scores, evaluation.scores, atol=1e-6)


def test_the_kernel_s_inference_applies_the_decision(
    trained_runs, demo_folder, evaluation, tmp_path
):
    ensemble = load_ensemble(trained_runs)
    decision = replace(
        evaluation.ensemble.decision, combination="votes", vote_share=0.5, clip_threshold=0.3,
        frame_threshold=0.4, neighbour_weight=0.25, recording_threshold=0.35, file_threshold=0.36,
    )  # fmt: skip
    path = tmp_path / "submission.csv"
    predict_test_set(demo_folder, path, lambda: LoadedPackage(ensemble, decision))
    rows = read_test_rows(demo_folder)
    birds = read_submission(path, list(rows["row_id"]))["birds"]
    assert (birds != "nocall").any()
    changed = replace(decision, clip_threshold=1.0)
    predict_test_set(demo_folder, path, lambda: LoadedPackage(ensemble, changed))
    assert (read_submission(path, list(rows["row_id"]))["birds"] == "nocall").all()


def test_a_decision_for_other_classes_is_refused(trained_runs, demo_folder, tmp_path):
    decision = Decision(classes=("a", "b", "c"))
    ensemble = load_ensemble(trained_runs)
    path = tmp_path / "submission.csv"
    with pytest.raises(ValueError, match="decision is for other classes"):
        predict_test_set(demo_folder, path, lambda: LoadedPackage(ensemble, decision))


def test_a_submission_is_scored_by_the_solution_with_all_nocall_beside_it(demo_folder, tmp_path):
    submission = tmp_path / "submission.csv"
    row_ids = list(read_test_rows(demo_folder)["row_id"])
    write_submission(submission, row_ids, ["nocall"] * len(row_ids))
    score = score_submission(demo_folder, submission)
    assert score.row_wise_f1 == score.all_nocall
    solution = pd.read_csv(demo_folder / "solution.csv")
    solution.to_csv(submission, index=False)
    perfect = score_submission(demo_folder, submission)
    assert (perfect.row_wise_f1, len(perfect.f1)) == (1.0, len(solution))
    assert perfect.all_nocall == pytest.approx((solution["birds"] == "nocall").mean())
    assert "row-wise F1 1.000" in str(perfect)


def test_scores_can_be_read_back_from_json(evaluation):
    assert (
        json.loads(json.dumps(evaluation.ensemble.decision.score))
        == evaluation.ensemble.decision.score
    )
