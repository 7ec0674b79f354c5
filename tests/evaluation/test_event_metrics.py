"""Event metrics agree with hand-worked cases and with scipy's maximum matching."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from birdcall.evaluation.metrics import DetectionCounts, event_based_counts, segment_based_counts


@pytest.mark.parametrize("counts", [segment_based_counts, event_based_counts])
def test_the_truth_itself_scores_one(counts: object) -> None:
    intervals, labels = [[0.5, 1.2], [0.7, 3.0], [5.0, 5.0]], ["aldfly", "norcar", "aldfly"]
    result = counts(intervals, labels, intervals[::-1], labels[::-1])
    assert (result.f1, result.precision, result.recall) == (1, 1, 1)


def test_segments_by_hand() -> None:
    # aldfly is true in seconds 0, 1 and 2 and said in 2 and 3; norcar is said in second 0.
    counts = segment_based_counts([[0.5, 2.1]], ["aldfly"], [[2, 4], [0, 1]], ["aldfly", "norcar"])
    assert counts == DetectionCounts(true_positives=1, false_positives=2, false_negatives=2)
    assert counts.f1 == pytest.approx(2 / (2 + 4))


def test_two_events_in_one_segment_count_once() -> None:
    counts = segment_based_counts([[0.1, 0.2], [0.5, 0.9]], ["a", "a"], [[0.3, 0.4]], ["a"])
    assert counts == DetectionCounts(1, 0, 0)


def test_an_event_that_ends_on_a_boundary_is_not_in_the_next_segment() -> None:
    edge = 3 * 0.1  # a little above 0.3
    counts = segment_based_counts([[0.0, edge]], ["a"], [[0.0, 0.3]], ["a"], segment_seconds=0.1)
    assert counts == DetectionCounts(3, 0, 0)


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
    counts = event_based_counts([[1.0, 2.0]], ["aldfly"], [[onset, offset]], [label])
    assert counts == DetectionCounts(int(hit), int(not hit), int(not hit))


def test_the_offset_collar_rules_short_events_and_can_be_switched_off() -> None:
    short = ([[1.0, 1.1]], ["a"], [[1.0, 1.3]], ["a"])
    assert event_based_counts(*short).f1 == 1
    assert event_based_counts(*short, offset_collar_seconds=0.1).f1 == 0
    onset_only = ([[1.0, 1.1]], ["a"], [[1.0, 60.0]], ["a"])
    assert event_based_counts(*onset_only, offset_collar_seconds=float("inf")).f1 == 1


def test_an_event_is_matched_once() -> None:
    counts = event_based_counts([[1, 2]], ["a"], [[1, 2], [1.1, 2]], ["a", "a"])
    assert counts == DetectionCounts(1, 1, 0)


def test_a_match_gives_way_where_that_finds_one_more() -> None:
    # 1.0 could take either prediction, 1.3 only that at 1.15: greedy in either order may lose one.
    truth = [[1.0, 2.0], [1.3, 2.0]]
    for predicted in ([[1.15, 2.0], [0.9, 2.0]], [[0.9, 2.0], [1.15, 2.0]]):
        assert event_based_counts(truth, ["a", "a"], predicted, ["a", "a"]).true_positives == 2


def test_as_many_events_match_as_in_the_maximum_matching_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        true, guess = ([1, 4] + rng.random((40, 2)) * [1.5, 1.5] for _ in range(2))
        near = (np.abs(true[:, None] - guess[None]) <= 0.2).all(axis=2)
        n_expected = (maximum_bipartite_matching(csr_array(near)) >= 0).sum()
        counts = event_based_counts(true, ["a"] * 40, guess, ["a"] * 40, offset_share=0)
        assert counts == DetectionCounts(n_expected, 40 - n_expected, 40 - n_expected)


def test_a_collar_includes_its_edge_whatever_floating_point_says() -> None:
    assert 0.9 - 0.7 > 0.2
    assert event_based_counts([[0.7, 2]], ["a"], [[0.9, 2]], ["a"]).f1 == 1
    assert event_based_counts([[0, 0.7]], ["a"], [[0, 0.9]], ["a"], offset_share=0).f1 == 1


def test_an_event_without_length_is_in_one_segment() -> None:
    counts = segment_based_counts([[5, 5], [1.5, 1.5]], ["a", "a"], [[5, 6], [1, 2]], ["a", "a"])
    assert counts == DetectionCounts(2, 0, 0)


def test_recordings_are_pooled_by_adding_their_counts() -> None:
    first = event_based_counts([[1, 2]], ["a"], [[1, 2]], ["a"])
    second = event_based_counts([[1, 2], [3, 4]], ["a", "b"], [], [])
    pooled = sum([first, second], DetectionCounts())
    assert pooled == DetectionCounts(1, 0, 2)
    assert pooled.f1 == pytest.approx(2 / 4)


def test_nothing_there_and_nothing_said_is_undefined() -> None:
    assert np.isnan(event_based_counts([], [], [], []).f1)
    assert np.isnan(segment_based_counts([], [], [], []).f1)
    assert event_based_counts([], [], [[1, 2]], ["a"]).f1 == 0


@pytest.mark.parametrize("counts", [segment_based_counts, event_based_counts])
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
        event_based_counts(*events, onset_collar_seconds=-1)
    with pytest.raises(ValueError, match="segment_seconds is 0"):
        segment_based_counts(*events, segment_seconds=0)
