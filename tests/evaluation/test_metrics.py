"""Metrics agree with hand-worked cases, scikit-learn, and independent implementations."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sklearn_metrics

from birdcall.evaluation import metrics
from birdcall.kaggle.test_set import read_labelled_soundscapes

CORNELL = Path(__file__).parents[3] / "shared" / "data" / "cornell-mini"
CLASSES = tuple(f"bird{index:02d}" for index in range(12))


def random_labels(n_rows: int, seed: int, max_birds: int = 4) -> list[str]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, max_birds + 1, size=n_rows)
    return [
        " ".join(rng.choice(CLASSES, size=count, replace=False)) or "nocall" for count in counts
    ]


def random_scores(n_rows: int = 400, n_classes: int = 12, seed: int = 0) -> tuple:
    """Return (truth, scores) with ties, rows without a bird and, last, a class without a row."""
    rng = np.random.default_rng(seed)
    truth = rng.random((n_rows, n_classes)) < 0.15
    truth[:, -1] = False
    scores = np.round(0.3 * truth + 0.7 * rng.random((n_rows, n_classes)), 2)
    return truth, scores.astype(np.float32)


def label_matrix(labels: list[str]) -> np.ndarray:
    """Return label strings as a boolean matrix ``(rows, classes)``; nocall is an all-False row."""
    return np.array([[code in text.split() for code in CLASSES] for text in labels])


def naive_row_wise_f1(truth: list[str], predicted: list[str]) -> float:
    """Count tokens one by one, as the competition's page words it."""
    total = 0.0
    for true_row, predicted_row in zip(truth, predicted, strict=True):
        true_tokens, predicted_tokens = true_row.split(" "), predicted_row.split(" ")
        tp = fp = fn = 0
        for token in predicted_tokens:
            if token in true_tokens:
                tp += 1
            else:
                fp += 1
        for token in true_tokens:
            if token not in predicted_tokens:
                fn += 1
        total += tp / (tp + (fp + fn) / 2)
    return total / len(truth)


# --- row-wise F1 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "predicted", "score"),
    [
        ("nocall", "nocall", 1.0),
        ("nocall", "aldfly", 0.0),  # a false bird costs the whole row
        ("aldfly", "nocall", 0.0),
        ("aldfly", "aldfly", 1.0),
        ("aldfly", "aldfly norcar", 2 / 3),
        ("aldfly norcar", "aldfly", 2 / 3),
        ("aldfly norcar", "norcar aldfly", 1.0),
        ("aldfly norcar", "aldfly amecro", 1 / 2),
        ("aldfly norcar amecro", "aldfly", 1 / 2),
        ("aldfly", "aldfly nocall", 2 / 3),  # nocall is a token like any other
    ],
)
def test_a_row_scores_what_it_does_by_hand(truth: str, predicted: str, score: float) -> None:
    assert metrics.row_wise_f1([truth], [predicted]) == pytest.approx(score)


def test_the_score_is_the_mean_over_rows_not_over_birds() -> None:
    truth = ["aldfly norcar amecro", "nocall", "nocall", "aldfly"]
    predicted = ["nocall", "nocall", "amecro", "aldfly"]
    assert metrics.row_wise_f1(truth, predicted) == pytest.approx((0 + 1 + 0 + 1) / 4)


def test_a_perfect_prediction_scores_one() -> None:
    labels = random_labels(200, seed=1)
    matrix = label_matrix(labels)
    assert metrics.row_wise_f1(labels, labels) == 1
    assert (metrics.row_f1_scores(matrix, matrix) == 1).all()


def test_all_nocall_scores_the_share_of_nocall_rows() -> None:
    labels = random_labels(500, seed=2)
    share = labels.count("nocall") / 500
    assert metrics.row_wise_f1(labels, ["nocall"] * 500) == pytest.approx(share)


def test_both_forms_equal_an_independent_count_on_10000_random_rows() -> None:
    truth, predicted = random_labels(10_000, seed=3), random_labels(10_000, seed=4)
    expected = naive_row_wise_f1(truth, predicted)
    scores = metrics.row_f1_scores(label_matrix(truth), label_matrix(predicted))
    assert metrics.row_wise_f1(truth, predicted) == pytest.approx(expected, abs=1e-12)
    assert scores.mean() == pytest.approx(expected, abs=1e-12)


def test_the_score_equals_the_samples_f1_of_sklearn_with_nocall_as_a_column() -> None:
    truth, predicted = random_labels(2_000, seed=5), random_labels(2_000, seed=6)
    true, guess = label_matrix(truth), label_matrix(predicted)
    with_nocall = [np.column_stack([matrix, ~matrix.any(axis=1)]) for matrix in (true, guess)]
    expected = sklearn_metrics.f1_score(*with_nocall, average="samples")
    assert metrics.row_wise_f1(truth, predicted) == pytest.approx(expected, abs=1e-12)
    assert metrics.row_f1_scores(true, guess).mean() == pytest.approx(expected, abs=1e-12)


def test_more_birds_than_a_byte_can_count_are_counted() -> None:
    every, single = np.ones((2, 300), dtype=bool), np.eye(2, 300, dtype=bool)
    assert metrics.row_f1_scores(every, single) == pytest.approx(2 / 301)


@pytest.mark.skipif(not CORNELL.is_dir(), reason="needs the real data of ../shared/data")
def test_all_nocall_scores_what_is_published_on_the_real_soundscapes() -> None:
    rows = read_labelled_soundscapes(CORNELL)
    for recording, share in (("ORANGE-7-CAP_20190606_093000", 0.533), ("SSW52", 0.617)):
        birds_of_rows = rows["birds"][rows["filename"] == recording]
        truth = [" ".join(birds) or "nocall" for birds in birds_of_rows]
        assert metrics.row_wise_f1(truth, ["nocall"] * len(truth)) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        (["nocall"], ["nocall", "nocall"], "1 rows of truth but 2 predicted"),
        ([], [], "no rows"),
        (["nocall"], [float("nan")], "row 0 of predicted is nan, not a string: an empty CSV cell"),
        (["nocall", ""], ["nocall", "nocall"], "row 1 of truth is empty"),
        ("nocall", "nocall", "truth is one string"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(
    truth: object, predicted: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.row_wise_f1(truth, predicted)


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        (np.ones((2, 3), bool), np.ones((3, 2), bool), "is one of them transposed"),
        (np.ones((2, 3), bool), np.ones((2, 4), bool), "same rows and the same classes"),
        (np.ones(3, bool), np.ones(3, bool), r"must be \(rows, classes\)"),
        (np.ones((0, 3), bool), np.ones((0, 3), bool), "no rows"),
        (np.ones((2, 3), bool), np.full((2, 3), 0.7), "still need a threshold"),
        (np.full((2, 3), np.nan), np.ones((2, 3), bool), "truth .* must be True or False"),
    ],
)
def test_matrices_that_cannot_be_scored_are_refused(
    truth: np.ndarray, predicted: np.ndarray, message: str
) -> None:
    for metric in (metrics.row_f1_scores, metrics.precision_recall):
        with pytest.raises(ValueError, match=message):
            metric(truth, predicted)


# --- what kind of mistakes ----------------------------------------------------------------------


def test_precision_and_recall_pool_all_rows_as_in_sklearn() -> None:
    truth, scores = random_scores()
    predicted = scores > 0.6
    precision, recall = metrics.precision_recall(truth, predicted)
    expected = sklearn_metrics.precision_score(truth, predicted, average="micro")
    assert precision == pytest.approx(expected)
    expected = sklearn_metrics.recall_score(truth, predicted, average="micro")
    assert recall == pytest.approx(expected)


def test_false_birds_are_counted_in_rows_without_birds_only() -> None:
    truth = np.array([[0, 0, 0], [0, 0, 0], [1, 0, 0]])
    predicted = np.array([[1, 1, 0], [0, 0, 1], [0, 1, 1]])
    assert metrics.false_birds_per_nocall_row(truth, predicted) == pytest.approx(3 / 2)


def test_a_share_of_nothing_is_undefined() -> None:
    some, none = np.ones((2, 3), bool), np.zeros((2, 3), bool)
    assert np.isnan(metrics.precision_recall(some, none)[0])
    assert np.isnan(metrics.precision_recall(none, some)[1])
    assert np.isnan(metrics.false_birds_per_nocall_row(some, none))


# --- ranking ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (metrics.average_precision, sklearn_metrics.average_precision_score),
        (metrics.roc_auc, sklearn_metrics.roc_auc_score),
    ],
)
def test_ranking_per_class_agrees_with_sklearn_and_skips_absent_classes(
    ours: object, theirs: object
) -> None:
    truth, scores = random_scores()
    values = ours(truth, scores)
    expected = [theirs(truth[:, k], scores[:, k]) for k in range(truth.shape[1] - 1)]
    np.testing.assert_allclose(values[:-1], expected, rtol=1e-12)
    assert np.isnan(values[-1])
    assert metrics.macro_average(values) == pytest.approx(np.mean(expected))


def test_lwlrap_agrees_with_sklearn_weighted_by_the_labels_of_each_row() -> None:
    truth, scores = random_scores()
    weights = truth.sum(axis=1)
    expected = sklearn_metrics.label_ranking_average_precision_score(
        truth[weights > 0], scores[weights > 0], sample_weight=weights[weights > 0]
    )
    assert metrics.lwlrap(truth, scores) == pytest.approx(expected, abs=1e-12)


def test_ranking_by_hand() -> None:
    truth = np.array([[1], [0], [1], [0]])
    scores = np.array([[0.9], [0.8], [0.7], [0.1]])
    assert metrics.average_precision(truth, scores) == pytest.approx([(1 + 2 / 3) / 2])
    assert metrics.roc_auc(truth, scores) == pytest.approx([3 / 4])
    assert metrics.lwlrap(truth.T, scores.T) == pytest.approx((1 + 2 / 3) / 2)


def test_a_perfect_ranking_scores_one_and_a_constant_one_is_chance() -> None:
    truth, _ = random_scores()
    occurring = truth[:, :-1]
    perfect = occurring.astype(float)
    for metric in (metrics.average_precision, metrics.roc_auc):
        assert metrics.macro_average(metric(occurring, perfect)) == 1
    assert metrics.lwlrap(occurring, perfect) == 1
    constant = np.zeros(occurring.shape)
    np.testing.assert_allclose(metrics.roc_auc(occurring, constant), 0.5)
    np.testing.assert_allclose(
        metrics.average_precision(occurring, constant), occurring.mean(axis=0)
    )


def test_what_no_class_defines_is_nan() -> None:
    nothing = np.zeros((3, 2), bool)
    assert np.isnan(metrics.macro_average(metrics.roc_auc(nothing, np.zeros((3, 2)))))
    assert np.isnan(metrics.roc_auc(~nothing, np.zeros((3, 2)))).all()
    assert np.isnan(metrics.lwlrap(nothing, np.zeros((3, 2))))


@pytest.mark.parametrize(
    "metric",
    [
        metrics.average_precision,
        metrics.roc_auc,
        metrics.lwlrap,
        metrics.expected_calibration_error,
    ],
)
def test_scores_that_are_no_numbers_are_refused_with_row_and_class(metric: object) -> None:
    truth, scores = random_scores()
    scores[7, 3] = np.nan
    with pytest.raises(ValueError, match="nan in row 7, class 3: did a model diverge"):
        metric(truth, scores)
    with pytest.raises(ValueError, match="truth has shape"):
        metric(truth, scores[:-1])


# --- calibration --------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    truth = np.array([[0], [0], [1], [1]])
    probabilities = np.array([[0.1], [0.3], [0.8], [1.0]])
    # Two bins: 0.2 predicted, 0 true; 0.9 predicted, 1 true.
    error = metrics.expected_calibration_error(truth, probabilities, n_bins=2)
    assert error == pytest.approx((0.2 + 0.1) / 2)


def test_probabilities_that_hold_have_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random((50_000, 4))
    truth = rng.random(probabilities.shape) < probabilities
    assert metrics.expected_calibration_error(truth, probabilities) < 0.01
    assert metrics.expected_calibration_error(truth, probabilities**3) > 0.1


def test_every_probability_is_in_one_bin_of_the_reliability_diagram() -> None:
    truth, scores = random_scores()
    scores[0, :2] = 0, 1
    _, share_true, count = metrics.reliability(truth, scores, n_bins=7)
    assert count.sum() == scores.size
    assert np.average(share_true, weights=count) == pytest.approx(truth.mean())


def test_logits_are_not_taken_for_probabilities() -> None:
    with pytest.raises(ValueError, match="are they logits"):
        metrics.expected_calibration_error([[1, 0]], [[3.0, -2.0]])


# --- bootstrap ----------------------------------------------------------------------------------


def test_groups_of_one_row_give_the_closed_form_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).random(400)
    low, high = metrics.bootstrap_interval(values, np.arange(400), n_resamples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_rows_that_repeat_their_recording_do_not_narrow_the_interval() -> None:
    per_recording = np.random.default_rng(0).random(20)
    names = [f"SSW{number}" for number in range(20)]
    once = metrics.bootstrap_interval(per_recording, names)
    repeated = metrics.bootstrap_interval(np.repeat(per_recording, 50), np.repeat(names, 50))
    as_if_independent = metrics.bootstrap_interval(np.repeat(per_recording, 50), np.arange(1000))
    assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high))
    width = repeated.high - repeated.low
    assert width > 4 * (as_if_independent.high - as_if_independent.low)


def test_a_seed_gives_one_interval_and_any_statistic_the_same_draws() -> None:
    values = np.random.default_rng(1).random(90)
    groups = np.repeat(["b", "a", "c", "d", "e"], [30, 10, 20, 5, 25])
    interval = metrics.bootstrap_interval(values, groups, seed=7)
    assert interval == metrics.bootstrap_interval(values, groups, seed=7)
    assert interval != metrics.bootstrap_interval(values, groups, seed=8)
    means = [values[rows].mean() for rows in metrics.bootstrap_rows(groups, 1000, seed=7)]
    assert np.quantile(means, [0.025, 0.975]) == pytest.approx(interval)


def test_a_resample_has_all_rows_of_a_drawn_recording() -> None:
    groups = ["b", "a", "b", "c", "a", "b"]
    for rows in metrics.bootstrap_rows(groups, n_resamples=20):
        drawn, counts = np.unique(np.array(groups)[rows], return_counts=True)
        size = {"a": 2, "b": 3, "c": 1}
        assert sum(count / size[name] for name, count in zip(drawn, counts, strict=True)) == 3


def test_one_recording_has_no_interval() -> None:
    assert np.isnan(metrics.bootstrap_interval([0.1, 0.9], ["SSW52", "SSW52"])).all()


@pytest.mark.parametrize(
    ("values", "groups", "options", "message"),
    [
        ([0.1, 0.2], ["a"], {}, "1 groups for 2 rows"),
        ([0.1, float("nan")], ["a", "b"], {}, "NaN"),
        ([], [], {}, "no rows"),
        ([0.1], ["a"], {"n_resamples": 0}, "n_resamples is 0"),
        ([0.1], ["a"], {"level": 95}, "level is 95"),
    ],
)
def test_a_bootstrap_of_wrong_input_is_refused(
    values: list, groups: list, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap_interval(values, groups, **options)


def test_cells_that_are_not_known_have_no_part_in_a_class_s_score() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random((60, 3)) < 0.4
    scores = generator.random((60, 3))
    known = generator.random((60, 3)) < 0.7
    known[:, 2] = False
    for metric, reference in (
        (metrics.average_precision, sklearn_metrics.average_precision_score),
        (metrics.roc_auc, sklearn_metrics.roc_auc_score),
    ):
        values = metric(truth, scores, known)
        for k in range(2):
            subset = known[:, k]
            assert values[k] == pytest.approx(reference(truth[subset, k], scores[subset, k]))
        assert np.isnan(values[2])
        np.testing.assert_array_equal(metric(truth, scores, truth | True), metric(truth, scores))


def test_a_weighted_interval_is_that_of_rows_repeated_as_often() -> None:
    generator = np.random.default_rng(0)
    values, groups = generator.random(40), np.repeat(np.arange(8), 5)
    weights = generator.integers(1, 4, 40)
    weighted = metrics.bootstrap_interval(values, groups, weights=weights)
    repeated = metrics.bootstrap_interval(np.repeat(values, weights), np.repeat(groups, weights))
    assert weighted == pytest.approx(repeated)
    assert metrics.bootstrap_interval(values, groups, weights=np.full(40, 3)) == pytest.approx(
        metrics.bootstrap_interval(values, groups)
    )


@pytest.mark.parametrize("weights", [np.ones(3), np.zeros(4), np.array([1, 1, 1, np.nan])])
def test_weights_that_are_none_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(ValueError, match="weights"):
        metrics.bootstrap_interval(np.ones(4), [0, 0, 1, 1], weights=weights)


# --- events --------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [metrics.segment_based_counts, metrics.event_based_counts])
def test_the_truth_itself_scores_one(counts: object) -> None:
    intervals, labels = [[0.5, 1.2], [0.7, 3.0], [5.0, 5.0]], ["aldfly", "norcar", "aldfly"]
    result = counts(intervals, labels, intervals[::-1], labels[::-1])
    assert result.f1 == 1
    assert (result.false_positives, result.false_negatives) == (0, 0)


def test_segments_by_hand() -> None:
    # aldfly is true in seconds 0, 1 and 2, predicted in 2 and 3; norcar is predicted in 0.
    counts = metrics.segment_based_counts(
        [[0.5, 2.1]], ["aldfly"], [[2, 4], [0, 1]], ["aldfly", "norcar"]
    )
    assert counts == metrics.DetectionCounts(true_positives=1, false_positives=2, false_negatives=2)
    assert counts.f1 == pytest.approx(2 / (2 + 4))


def test_two_events_in_one_segment_count_once() -> None:
    counts = metrics.segment_based_counts([[0.1, 0.2], [0.5, 0.9]], ["a", "a"], [[0.3, 0.4]], ["a"])
    assert counts == metrics.DetectionCounts(1, 0, 0)


def test_an_event_that_ends_on_a_boundary_is_not_in_the_next_segment() -> None:
    edge = 3 * 0.1  # a little above 0.3
    counts = metrics.segment_based_counts(
        [[0.0, edge]], ["a"], [[0.0, 0.3]], ["a"], segment_seconds=0.1
    )
    assert counts == metrics.DetectionCounts(3, 0, 0)


@pytest.mark.parametrize(
    ("onset", "offset", "label", "hit"),
    [
        (1.0, 2.0, "aldfly", True),
        (1.2, 2.0, "aldfly", True),  # on the edge of the onset collar
        (0.8, 2.0, "aldfly", True),
        (1.21, 2.0, "aldfly", False),
        (1.0, 2.5, "aldfly", True),  # half of the true length
        (1.0, 2.51, "aldfly", False),
        (1.0, 2.0, "norcar", False),
    ],
)
def test_events_match_within_their_collars(
    onset: float, offset: float, label: str, hit: bool
) -> None:
    counts = metrics.event_based_counts([[1.0, 2.0]], ["aldfly"], [[onset, offset]], [label])
    assert counts == metrics.DetectionCounts(int(hit), int(not hit), int(not hit))


def test_the_offset_collar_rules_short_events_and_can_be_switched_off() -> None:
    short = ([[1.0, 1.1]], ["a"], [[1.0, 1.3]], ["a"])
    assert metrics.event_based_counts(*short).f1 == 1
    assert metrics.event_based_counts(*short, offset_collar_seconds=0.1).f1 == 0
    onset_only = ([[1.0, 1.1]], ["a"], [[1.0, 60.0]], ["a"])
    assert metrics.event_based_counts(*onset_only, offset_collar_seconds=float("inf")).f1 == 1


def test_an_event_is_matched_once() -> None:
    counts = metrics.event_based_counts([[1, 2]], ["a"], [[1, 2], [1.1, 2]], ["a", "a"])
    assert counts == metrics.DetectionCounts(1, 1, 0)


def test_a_match_is_changed_where_that_allows_a_further_match() -> None:
    # 1.0 could take either prediction, 1.3 only that at 1.15: greedy in either order may lose one.
    truth = [[1.0, 2.0], [1.3, 2.0]]
    for predicted in ([[1.15, 2.0], [0.9, 2.0]], [[0.9, 2.0], [1.15, 2.0]]):
        assert (
            metrics.event_based_counts(truth, ["a", "a"], predicted, ["a", "a"]).true_positives == 2
        )


def test_as_many_events_match_as_in_an_optimal_assignment() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        true, guess = ([1, 4] + rng.random((40, 2)) * [1.5, 1.5] for _ in range(2))
        near = (np.abs(true[:, None] - guess[None]) <= 0.2).all(axis=2)
        n_expected = near[linear_sum_assignment(near, maximize=True)].sum()
        counts = metrics.event_based_counts(true, ["a"] * 40, guess, ["a"] * 40, offset_share=0)
        assert counts == metrics.DetectionCounts(n_expected, 40 - n_expected, 40 - n_expected)


def test_a_collar_includes_its_edge_whatever_floating_point_gives() -> None:
    assert 0.9 - 0.7 > 0.2
    assert metrics.event_based_counts([[0.7, 2]], ["a"], [[0.9, 2]], ["a"]).f1 == 1
    assert metrics.event_based_counts([[0, 0.7]], ["a"], [[0, 0.9]], ["a"], offset_share=0).f1 == 1


def test_an_event_without_length_is_in_one_segment() -> None:
    counts = metrics.segment_based_counts(
        [[5, 5], [1.5, 1.5]], ["a", "a"], [[5, 6], [1, 2]], ["a", "a"]
    )
    assert counts == metrics.DetectionCounts(2, 0, 0)


def test_recordings_are_pooled_by_adding_their_counts() -> None:
    first = metrics.event_based_counts([[1, 2]], ["a"], [[1, 2]], ["a"])
    second = metrics.event_based_counts([[1, 2], [3, 4]], ["a", "b"], [], [])
    pooled = sum([first, second], metrics.DetectionCounts())
    assert pooled == metrics.DetectionCounts(1, 0, 2)
    assert pooled.f1 == pytest.approx(2 / 4)


def test_neither_a_true_nor_a_predicted_event_is_undefined() -> None:
    assert np.isnan(metrics.event_based_counts([], [], [], []).f1)
    assert np.isnan(metrics.segment_based_counts([], [], [], []).f1)
    assert metrics.event_based_counts([], [], [[1, 2]], ["a"]).f1 == 0


@pytest.mark.parametrize("counts", [metrics.segment_based_counts, metrics.event_based_counts])
@pytest.mark.parametrize(
    ("intervals", "labels", "message"),
    [
        ([[2.0, 1.0]], ["a"], "true event 0 lasts from 2 to 1 s: are these"),
        ([[-1.0, 1.0]], ["a"], "from -1 to 1 s"),
        ([[0.0, float("nan")]], ["a"], "to nan s"),
        ([[0.0, 1.0]], ["a", "b"], "1 true intervals but 2 labels"),
        ([0.0, 1.0], ["a"], r"shape \(2,\)"),
    ],
)
def test_events_that_cannot_be_are_refused(
    counts: object, intervals: list, labels: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        counts(intervals, labels, [[0, 1]], ["a"])


def test_a_negative_collar_or_segment_is_refused() -> None:
    events = ([[0, 1]], ["a"], [[0, 1]], ["a"])
    with pytest.raises(ValueError, match="onset_collar_seconds is -1"):
        metrics.event_based_counts(*events, onset_collar_seconds=-1)
    with pytest.raises(ValueError, match="segment_seconds is 0"):
        metrics.segment_based_counts(*events, segment_seconds=0)
