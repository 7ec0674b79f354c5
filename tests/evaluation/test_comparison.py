"""Differences between experiments are paired, and their intervals hold what they promise."""

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from birdcall.evaluation.comparison import (
    Measure,
    Resampled,
    compare_all,
    resample_scores,
)


def mean_of(clusters):
    return Measure("mean", tuple(clusters), "soundscapes")


def cluster_per_row(n_rows):
    return mean_of(f"s{row}" for row in range(n_rows))


def difference(measure, ones, others, n_resamples=1000):
    scored, reference = (resample_scores(measure, values, n_resamples) for values in (ones, others))
    return scored.compare(reference)


def test_the_spread_of_a_paired_difference_is_that_of_its_mean():
    # Both sides share a large part that pairing takes out: var = var(difference) / n.
    generator = np.random.default_rng(0)
    shared, difference = generator.normal(0, 10, 200), generator.normal(0, 1, 200)
    measure = cluster_per_row(200)
    scored, reference = (
        resample_scores(measure, [values], 4000) for values in (shared + difference, shared)
    )
    paired = replace(scored, resampled=scored.resampled - reference.resampled)
    spread = paired.means().std()
    assert spread == pytest.approx(difference.std() / math.sqrt(200), rel=0.05)
    unpaired = scored.means().std()
    assert unpaired > 5 * spread


def test_rows_of_one_cluster_are_not_counted_as_independent():
    # Ten equal rows in each cluster: the spread is that of the clusters' mean.
    generator = np.random.default_rng(1)
    by_cluster = generator.normal(size=50)
    measure = mean_of(np.repeat([f"s{k}" for k in range(50)], 10))
    resampled = resample_scores(measure, [np.repeat(by_cluster, 10)], 4000)
    assert resampled.means().std() == pytest.approx(by_cluster.std() / 50**0.5, rel=0.05)


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_seeds_spread_as_the_unbiased_variance_of_their_mean(n_seeds):
    # All rows of a seed are equal, so that only seeds vary: var = s^2 / n with s^2 over n - 1.
    by_seed = np.random.default_rng(2).normal(size=n_seeds)
    values = [np.full(20, value) for value in by_seed]
    resampled = resample_scores(cluster_per_row(20), values, 8000)
    expected = by_seed.std(ddof=1) / math.sqrt(n_seeds)
    assert resampled.means().std() == pytest.approx(expected, rel=0.05)


def test_the_weights_of_seeds_sum_to_one_and_a_single_seed_always_counts():
    # The mean of resamples that are 1 for a single seed is the weight of this seed.
    ones = np.broadcast_to(np.eye(4)[:, None], (4, 500, 4))
    weights = np.stack([Resampled(one[0], one, 4).means() for one in ones], axis=1)
    assert weights.shape == (500, 4)
    assert np.allclose(weights.sum(axis=1), 1)
    assert np.allclose(weights.mean(axis=0), 1 / 4, atol=0.05)
    single = np.arange(10.0)[:, None]
    assert (Resampled(single[0], single, 4).means() == single[:, 0]).all()


def test_identical_experiments_do_not_differ():
    generator = np.random.default_rng(3)
    values = [generator.random((60, 4)) for _ in range(3)]
    truth = generator.random((60, 4)) < 0.3
    measure = Measure("ap", tuple(f"s{row // 5}" for row in range(60)), "soundscapes", truth)
    result = difference(measure, values, [value.copy() for value in values], 50)
    assert (result["difference"], result["low"], result["high"]) == (0.0, 0.0, 0.0)
    assert (result["seeds"], result["positive_seeds"], result["positive_share"]) == (3, 0, 0.0)


def test_a_planted_difference_is_detected_though_the_scores_spread_far_more():
    generator = np.random.default_rng(4)
    clusters = np.repeat(np.arange(40), 5)
    hard = np.repeat(generator.normal(0, 1, 40), 5)  # some soundscapes are hard for everybody
    ones = [hard + 0.1 + generator.normal(0, 0.1, 200) for _ in range(3)]
    others = [hard + generator.normal(0, 0.1, 200) for _ in range(3)]
    result = difference(mean_of(map(str, clusters)), ones, others)
    assert result["low"] < 0.1 < result["high"]
    assert result["low"] > 0.05
    assert result["positive_share"] == 1.0


def test_the_difference_is_the_mean_over_seeds_and_the_count_is_by_seed():
    measure = cluster_per_row(4)
    ones = [np.full(4, value) for value in (0.6, 0.5, 0.9)]
    others = [np.full(4, value) for value in (0.5, 0.6, 0.6)]
    result = difference(measure, ones, others, 10)
    assert result["difference"] == pytest.approx(0.1)
    assert (result["positive_seeds"], result["positive_share"]) == (2, pytest.approx(2 / 3))


@pytest.mark.parametrize(("n_clusters", "n_seeds", "least"), [(30, 6, 0.90), (10, 3, 0.84)])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(n_clusters, n_seeds, least):
    # Crossed effects as in an ablation: a soundscape's, a seed's, and both together.
    generator = np.random.default_rng(5)
    measure, covered, n_trials = cluster_per_row(n_clusters), 0, 300
    for _ in range(n_trials):
        by_cluster = generator.normal(0, 1, n_clusters)
        seeds = [
            by_cluster + generator.normal(0, 0.2) + generator.normal(0, 0.5, n_clusters)
            for _ in range(n_seeds)
        ]
        interval = resample_scores(measure, seeds, 200).interval()
        covered += interval.low <= 0 <= interval.high
    assert least <= covered / n_trials <= 0.98


def test_macro_ap_is_computed_anew_in_each_resample():
    generator = np.random.default_rng(6)
    truth, scores = generator.random((30, 3)) < 0.4, generator.random((30, 3))
    measure = Measure("ap", tuple(f"s{row // 3}" for row in range(30)), "soundscapes", truth)
    rows = np.array([0, 1, 2, 0, 1, 2, 9, 10, 11, 24, 25, 26])
    expected = [
        average_precision_score(truth[rows, k], scores[rows, k])
        for k in range(3)
        if truth[rows, k].any()
    ]
    assert measure.score(scores, rows) == pytest.approx(np.mean(expected))
    resampled = resample_scores(measure, [scores], 30).resampled
    assert len(np.unique(resampled)) > 20


def test_a_class_that_a_resample_lacks_is_left_out_of_its_macro_ap():
    truth = np.array([[True, False], [False, False], [True, True]])
    scores = np.array([[0.9, 0.2], [0.1, 0.3], [0.8, 0.1]])
    measure = Measure("ap", ("a", "b", "c"), "soundscapes", truth)
    assert measure.score(scores, np.array([0, 1, 1])) == 1.0
    assert math.isnan(measure.score(scores, np.array([1, 1, 1])))


def test_resamples_without_a_score_are_left_out():
    resampled = np.array([[0.5], [np.nan], [0.7]])
    assert sorted(Resampled(np.array([0.6]), resampled, 3).means()) == [0.5, 0.7]
    unknown = np.full((5, 1), np.nan)
    assert math.isnan(Resampled(unknown[0], unknown, 3).interval().low)


def test_a_single_cluster_has_no_interval():
    resampled = Resampled(np.array([0.5]), np.full((10, 1), 0.5), n_clusters=1)
    assert math.isnan(resampled.compare(resampled)["low"])


def test_scores_of_other_audio_are_refused():
    with pytest.raises(ValueError, match="have 3 rows instead of 4") as error:
        resample_scores(cluster_per_row(4), [np.zeros(4), np.zeros(3)], 10)
    assert "seed 1" in str(error.value)


def test_the_tables_have_each_experiment_and_differences_from_the_reference():
    measures = {"f1": cluster_per_row(6)}
    values = {"f1": {"a": [np.full(6, 0.5), np.full(6, 0.7)], "b": [np.full(6, 0.4)] * 2}}
    means, differences = compare_all(measures, values, "a", n_resamples=20)
    assert list(means["experiment"]) == ["a", "b"]
    assert list(means["mean"]) == pytest.approx([0.6, 0.4])
    assert list(means["sd"]) == pytest.approx([math.sqrt(0.02), 0.0])  # 0.1^2 * 2 / (2 - 1)
    (row,) = differences.to_dict("records")
    assert (row["experiment"], row["reference"], row["measure"]) == ("b", "a", "f1")
    assert row["difference"] == pytest.approx(-0.2)
    assert (row["rows"], row["clusters"], row["cluster_kind"]) == (6, 6, "soundscapes")


def test_the_spread_of_a_single_seed_is_unknown():
    means, differences = compare_all(
        {"f1": cluster_per_row(3)}, {"f1": {"a": [np.ones(3)]}}, "a", 5
    )
    assert math.isnan(means["sd"].iloc[0])
    assert differences.empty
