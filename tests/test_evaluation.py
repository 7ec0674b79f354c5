"""Thresholds are chosen without the sound they are scored on, and all-nocall stands beside."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.scoring import (
    THRESHOLDS,
    LabelledScores,
    choose_thresholds,
    evaluate_runs,
    nested_row_scores,
    row_scores_on_grid,
    score_submission,
)
from birdcall.inference import write_nocall
from birdcall.metrics import row_f1_scores, row_wise_f1
from birdcall.training.runs import plan_runs, train_many


def labelled(n_recordings=4, n_rows=20, n_classes=3, skill=1.0, seed=0):
    """Scores of one member that knows the truth as well as ``skill`` says."""
    generator = np.random.default_rng(seed)
    total = n_recordings * n_rows
    truth = generator.random((total, n_classes)) < 0.2
    chance = generator.random((total, n_classes))
    scores = (skill * (0.2 + 0.6 * truth) + (1 - skill) * chance)[None]
    rows = pd.DataFrame(
        {
            "filename": np.repeat([f"s{k}" for k in range(n_recordings)], n_rows),
            "seconds": np.tile(SEGMENT_SECONDS * np.arange(1.0, n_rows + 1), n_recordings),
        }
    )
    return LabelledScores(rows, truth, scores, scores, ("m",))


def nested_mean(scores):
    return nested_row_scores(row_scores_on_grid(scores), scores.recordings).mean()


def test_perfect_scores_get_one():
    assert nested_mean(labelled(skill=1.0)) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_random_scores_get_no_more_than_all_nocall(seed):
    scores = labelled(skill=0.0, n_recordings=6, seed=seed)
    nocall = row_f1_scores(scores.truth, np.zeros_like(scores.truth)).mean()
    assert nested_mean(scores) <= nocall + 0.01


def test_a_recording_s_own_labels_do_not_choose_its_thresholds():
    scores = labelled(skill=0.5)
    grid = row_scores_on_grid(scores)
    first = np.asarray(scores.recordings) == "s0"
    spoilt = grid.copy()
    spoilt[:, :, first] = 0
    spoilt[1:4, 12:15, first] = 100  # now the others' choice must follow it
    nested, other = (nested_row_scores(g, scores.recordings) for g in (grid, spoilt))
    clip, frame = choose_thresholds(grid[:, :, ~first].mean(axis=2))
    assert np.array_equal(nested[first], grid[clip, frame, first])
    assert np.array_equal(other[first], spoilt[clip, frame, first])
    for name in ("s1", "s2", "s3"):
        rows = np.asarray(scores.recordings) == name
        assert np.array_equal(other[rows], spoilt[2, 13, rows])
        assert not np.array_equal(nested[rows], other[rows])


def test_a_plateau_is_preferred_to_a_peak():
    grid = np.full((9, 9), 0.5)
    grid[1, 1] = 0.72
    grid[5:8, 5:8] = 0.7
    assert choose_thresholds(grid) == (6, 6)


def test_of_equals_the_highest_thresholds_are_taken():
    assert choose_thresholds(np.full((20, 20), 0.6)) == (19, 19)
    assert THRESHOLDS[19] == 1.0


def test_a_species_that_the_model_cannot_name_counts_as_missed():
    scores = labelled()
    foreign = np.zeros((len(scores.truth), 1), dtype=bool)
    foreign[0] = True
    wider = replace(scores, truth=np.hstack([scores.truth, foreign]))
    before, after = row_scores_on_grid(scores), row_scores_on_grid(wider)
    assert (after[:, :, 0] < before[:, :, 0]).any()
    assert np.array_equal(after[:, :, 1:], before[:, :, 1:])


@pytest.fixture(scope="module")
def evaluation(training_data, tiny_experiment, tmp_path_factory):
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("runs")
    other = replace(tiny_experiment, name="other", train=replace(tiny_experiment.train, seed=4))
    planned = plan_runs([tiny_experiment, other], training_data, None, runs)
    train_many(planned, training_data, workers=0)
    folders = sorted(path for path in runs.glob("*/*"))
    return evaluate_runs(folders, training_data)


def test_the_table_has_each_experiment_the_ensemble_and_all_nocall(evaluation, training_data):
    table = evaluation.table.set_index("name")
    assert list(table.index) == ["other", "tiny", "ensemble", "all nocall"]
    assert list(table["members"]) == [2, 2, 4, 0]
    assert (table["oof_recordings"].iloc[:3] == len(training_data.recordings)).all()
    truth = evaluation.labelled.rows["birds"].map(" ".join).replace("", "nocall")
    nocall = row_wise_f1(list(truth), ["nocall"] * len(truth))
    assert table.loc["all nocall", "soundscape_f1"] == pytest.approx(nocall)


def test_every_recording_is_scored_by_the_member_that_did_not_train_on_it(
    evaluation, training_data
):
    table = evaluation.out_of_fold
    assert not table[list(training_data.classes)].isna().any(axis=None)
    assert len(table) == 2 * len(training_data.recordings)
    assert set(table["experiment"]) == {"tiny", "other"}


def test_the_decision_names_its_members_and_what_it_was_chosen_on(evaluation):
    decision = evaluation.decision
    assert decision.members == ("other-fold0", "other-fold1", "tiny-fold0", "tiny-fold1")
    assert decision.chosen_on == f"{len(evaluation.labelled.rows)} rows of 2 labelled soundscapes"
    assert set(decision.score) == {"row_wise_f1", "nested_row_wise_f1"}


def test_the_order_of_members_does_not_change_the_decision(evaluation):
    labelled_scores = evaluation.labelled
    turned = labelled_scores.of_members([3, 1, 0, 2])
    assert np.array_equal(row_scores_on_grid(labelled_scores), row_scores_on_grid(turned))


def test_a_submission_is_scored_by_the_solution_with_all_nocall_beside_it(demo_folder, tmp_path):
    submission = tmp_path / "submission.csv"
    write_nocall(demo_folder, submission)
    score = score_submission(demo_folder, submission)
    assert score.row_wise_f1 == score.all_nocall
    solution = pd.read_csv(demo_folder / "solution.csv")
    solution.to_csv(submission, index=False)
    perfect = score_submission(demo_folder, submission)
    assert (perfect.row_wise_f1, perfect.n_rows) == (1.0, len(solution))
    assert perfect.all_nocall == pytest.approx((solution["birds"] == "nocall").mean())
