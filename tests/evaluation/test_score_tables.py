"""Tables hold what independent computations give, and leave out what is not known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    label_ranking_average_precision_score,
    roc_auc_score,
)

from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation.ensemble_decision import share_weights, votes_table
from birdcall.evaluation.labelled import LabelledSoundscapes, segment_table
from birdcall.evaluation.metrics import row_f1_scores
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.tables import (
    ScoreSubject,
    confusion_table,
    decided_rows,
    event_rows,
    out_of_fold_rows,
    per_class_table,
    ranked_rows,
    reliability_table,
    snr_table,
    wide_table,
)
from birdcall.inference.decision import Decision
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import FRAMES_PER_SEGMENT
from birdcall.report.charts import confusion_matrix

LABELLED_X = ScoreSubject("x", 2, "labelled")
RECORDINGS_X = ScoreSubject("x", 1, "recordings")
ALL_FIVE = np.ones(5, bool)


def scores_of(seed=0, n_recordings=6, n_rows=12, n_classes=5, n_known=6):
    """Two members that know something."""
    generator = np.random.default_rng(seed)
    total = n_recordings * n_rows
    truth = generator.random((total, n_known)) < 0.12
    logits = generator.normal(-2, 1, (2, total, n_classes)) + 3 * truth[:, :n_classes]
    clipwise = (1 / (1 + np.exp(-logits))).astype(np.float32)
    parts = [
        segment_table(f"s{k}", n_rows, is_labelled=True, group=f"s{k}") for k in range(n_recordings)
    ]
    return LabelledPredictions(
        segments=pd.concat(parts, ignore_index=True),
        truth=truth,
        predictions=SegmentPredictions(
            clipwise, clipwise**0.8, starts=tuple(range(0, total, n_rows))
        ),
        member_names=("a", "b"),
        classes=tuple(f"bird{k}" for k in range(n_classes)),
    )


def values_of(rows):
    return {row["metric"]: row["value"] for row in rows}


@pytest.fixture
def scores():
    return scores_of()


def test_what_was_named_is_scored_as_scikit_learn_does(scores):
    named = scores.decide(Decision(0.4, 0.4))
    truth = scores.labelled_truth
    found = values_of(decided_rows(LABELLED_X, scores, named))
    with_nocall = [np.hstack([m, ~m.any(axis=1, keepdims=True)]) for m in (truth, named)]
    assert found["row_wise_f1"] == pytest.approx(f1_score(*with_nocall, average="samples"))
    assert found["precision"] == pytest.approx((truth & named).sum() / named.sum())
    assert found["recall"] == pytest.approx((truth & named).sum() / truth.sum())
    empty = ~truth.any(axis=1)
    expected = named[empty].sum() / empty.sum()
    assert found["false_birds_per_nocall_row"] == pytest.approx(expected)
    assert found["nocall_share_named"] == pytest.approx((~named.any(axis=1)).mean())


def test_f1_has_an_interval_that_holds_it(scores):
    rows = decided_rows(LABELLED_X, scores, scores.decide(Decision()))
    assert rows[0]["low"] < rows[0]["value"] < rows[0]["high"]
    assert (rows[0]["rows"], rows[0]["recordings"]) == (72, 6)


@pytest.mark.parametrize("share", [0.2, 0.54, 0.9])
def test_weights_give_the_score_at_another_share_of_nocall(scores, share):
    truth = scores.labelled_truth
    weights = share_weights(truth, share)
    named = scores.decide(Decision())
    f1 = row_f1_scores(truth, named)
    empty = ~truth.any(axis=1)
    mixed = share * f1[empty].mean() + (1 - share) * f1[~empty].mean()
    found = values_of(decided_rows(LABELLED_X, scores, named, weights))
    assert found["row_wise_f1"] == pytest.approx(mixed)
    nothing = values_of(decided_rows(LABELLED_X, scores, named & False, weights))
    assert nothing["row_wise_f1"] == pytest.approx(share)
    assert weights.mean() == pytest.approx(1)


def test_rows_of_one_kind_weigh_the_same():
    assert (share_weights(np.zeros((4, 2), bool), 0.5) == 1).all()
    assert (share_weights(np.ones((4, 2), bool), 0.5) == 1).all()


def test_rankings_are_those_of_scikit_learn_over_classes_that_occur(scores):
    scores.truth[:, 3:5] = False
    scores.truth[[7, 30], 4] = True
    found = values_of(ranked_rows(LABELLED_X, scores, ALL_FIVE))
    truth = scores.labelled_truth[:, :5]
    probability = scores.framewise.mean(axis=0)
    occurs = [0, 1, 2, 4]
    expected = np.mean([average_precision_score(truth[:, k], probability[:, k]) for k in occurs])
    assert found["macro_ap"] == pytest.approx(expected)
    expected = np.mean([roc_auc_score(truth[:, k], probability[:, k]) for k in occurs])
    assert found["macro_auc"] == pytest.approx(expected)
    frequent = [k for k in occurs if truth[:, k].sum() >= 3]
    assert 0 < len(frequent) < len(occurs)
    expected = np.mean([average_precision_score(truth[:, k], probability[:, k]) for k in frequent])
    assert found["macro_ap_min3"] == pytest.approx(expected)
    expected = np.mean([roc_auc_score(truth[:, k], probability[:, k]) for k in frequent])
    assert found["macro_auc_min3"] == pytest.approx(expected)
    some = truth.any(axis=1)
    expected = label_ranking_average_precision_score(
        truth[some], probability[some], sample_weight=truth[some].sum(axis=1)
    )
    assert found["lwlrap"] == pytest.approx(expected)


def test_the_ranking_of_a_decision_is_that_of_smoothed_and_combined_probabilities(scores):
    decision = Decision(combination="geometric", neighbour_weight=1.0)
    decisions = dict.fromkeys(scores.groups, decision)
    found = values_of(ranked_rows(LABELLED_X, scores, ALL_FIVE, decisions=decisions))
    strengths = []
    for probability in (scores.clipwise, scores.framewise):
        combined = np.exp(np.log(probability.astype(float)).mean(axis=0))
        smooth = []
        for part in np.split(combined, scores.starts[1:]):
            padded = np.pad(part, ((1, 1), (0, 0)), constant_values=np.nan)
            smooth.append(np.nanmean([padded[:-2], padded[1:-1], padded[2:]], axis=0))
        strengths.append(np.concatenate(smooth))
    strength = (strengths[0] * strengths[1])[scores.labelled]
    truth = scores.labelled_truth[:, :5]
    occurs = np.flatnonzero(truth.any(axis=0))
    expected = np.mean([average_precision_score(truth[:, k], strength[:, k]) for k in occurs])
    assert found["decision_macro_ap"] == pytest.approx(expected)
    expected = np.mean([roc_auc_score(truth[:, k], strength[:, k]) for k in occurs])
    assert found["decision_macro_auc"] == pytest.approx(expected)
    assert found["decision_macro_ap"] != pytest.approx(found["macro_ap"], abs=1e-3)


def test_the_calibration_error_of_rows_is_told_before_and_after(scores):
    exact = scores.truth[None, :, :5].astype(np.float32)
    calibrated = scores.with_probabilities(exact, exact, ["exact"])
    found = values_of(ranked_rows(LABELLED_X, scores, ALL_FIVE, calibrated=calibrated))
    assert found["ece_calibrated"] == 0 < found["ece"]
    assert "ece_calibrated" not in values_of(ranked_rows(LABELLED_X, scores, ALL_FIVE))


def test_secondary_labels_are_no_mistakes_of_a_class():
    generator = np.random.default_rng(0)
    targets = (generator.random((40, 3)) < 0.3).astype(float)
    targets[targets.sum(axis=1) == 0, 0] = 1
    scores = generator.random((40, 3)).astype(np.float32)
    unknown = (targets == 0) & (generator.random((40, 3)) < 0.2)
    marked = np.where(unknown, IGNORE_TARGET, targets)
    expected = [
        average_precision_score(targets[~unknown[:, k], k] > 0, scores[~unknown[:, k], k])
        for k in range(3)
    ]
    found = values_of(out_of_fold_rows(RECORDINGS_X, scores, marked, learnable=marked > -2))
    assert found["macro_ap"] == pytest.approx(np.mean(expected))
    spoilt = np.where(unknown, 1 - scores, scores)
    again = values_of(out_of_fold_rows(RECORDINGS_X, spoilt, marked, learnable=marked > -2))
    for metric in ("macro_ap", "macro_auc", "ece"):
        assert again[metric] == pytest.approx(found[metric])


def test_recordings_that_nobody_held_out_are_not_counted():
    generator = np.random.default_rng(0)
    targets = np.eye(3)[generator.integers(3, size=30)]
    scores = np.clip(targets * 0.6 + 0.3 * generator.random((30, 3)), 0, 1)
    scores[::5] = np.nan
    learnable = np.ones((30, 3), bool)
    found = out_of_fold_rows(RECORDINGS_X, scores, targets, learnable=learnable)
    assert found[0]["recordings"] == 24
    values = values_of(found)
    assert values["top1"] == values["macro_ap"] == values["macro_auc"] == 1.0


def test_a_class_that_its_run_could_not_learn_is_in_no_score_of_the_recordings():
    """Worked by hand: recordings of a, a, b, c, held out by a run that has trained on no c."""
    targets = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], float)
    probabilities = np.array([[0.9, 0.1, 0], [0.2, 0.3, 0], [0.5, 0.8, 0], [0.1, 0.2, 0]])
    rows = out_of_fold_rows(
        RECORDINGS_X, probabilities, targets, learnable=np.array([[True, True, False]] * 4)
    )
    values = values_of(rows)
    assert values["macro_ap"] == pytest.approx(np.mean([(1 + 2 / 3) / 2, 1]))
    assert values["macro_auc"] == pytest.approx(np.mean([3 / 4, 1]))
    assert values["top1"] == pytest.approx(2 / 3)  # the second recording is taken for b
    assert values["lwlrap"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    for row in rows:
        is_macro = row["metric"].startswith("macro")
        expected = (2, 1) if is_macro else (pd.NA, pd.NA)
        assert (row["classes"], row["left_out"]) == expected
    nothing = out_of_fold_rows(
        RECORDINGS_X, probabilities, targets, learnable=np.zeros((4, 3), bool)
    )
    assert (nothing[0]["classes"], nothing[0]["left_out"]) == (0, 3)
    assert np.isnan(nothing[0]["value"])


def test_soundscapes_are_scored_over_the_classes_that_a_member_could_learn(scores):
    scores.truth[:, 3] = False
    learnable = np.array([True, False, True, True, True])
    rows = {row["metric"]: row for row in ranked_rows(LABELLED_X, scores, learnable)}
    truth, probability = scores.labelled_truth, scores.framewise.mean(axis=0)
    measures = {"macro_ap": average_precision_score, "macro_auc": roc_auc_score}
    for row, metric in ((rows[name], measure) for name, measure in measures.items()):
        expected = np.mean([metric(truth[:, k], probability[:, k]) for k in (0, 2, 4)])
        assert row["value"] == pytest.approx(expected)
        # The second class, and the sixth species, which is no class; the fourth does not occur.
        assert (row["classes"], row["left_out"]) == (3, 2)
    learnt = truth[:, :5] & learnable
    some = learnt.any(axis=1)
    expected = label_ranking_average_precision_score(
        learnt[some], probability[some], sample_weight=learnt[some].sum(axis=1)
    )
    assert rows["lwlrap"]["value"] == pytest.approx(expected)


def test_a_class_tells_how_many_of_its_recordings_are_not_scored(scores):
    generator = np.random.default_rng(0)
    targets = np.eye(5)[np.arange(40) % 5]
    out_of_fold = generator.random((40, 5))
    learnable = np.ones((40, 5), bool)
    learnable[:, 2] = False
    table = per_class_table(
        scores.classes, targets=targets, learnable=learnable, out_of_fold=out_of_fold,
        simulated=None, predicted=None, labelled=None, decision=Decision(),
    )  # fmt: skip
    assert list(table["left_out"]) == [0, 0, 8, 0, 0]
    assert list(table["oof_ap"].isna()) == [False, False, True, False, False]


def labelled_events():
    """One recording of two segments with an event from 1 to 3 s, which is predicted exactly."""
    frames = np.zeros((2, 2 * FRAMES_PER_SEGMENT), np.float32)
    frames[0, FRAMES_PER_SEGMENT // 5 : 3 * FRAMES_PER_SEGMENT // 5] = 0.9
    clipwise = np.array([[[0.9, 0.1], [0.1, 0.1]]], np.float32)
    segments = segment_table("s", 2, is_labelled=True, group="s")
    truth = np.array([[True, False], [False, False]])
    scores = LabelledPredictions(
        segments=segments,
        truth=truth,
        predictions=SegmentPredictions(clipwise, clipwise),
        member_names=("a",),
        classes=("bird0", "bird1"),
    )
    annotations = pd.DataFrame(
        [("s", 1.0, 3.0, "bird0")], columns=["recording", "onset", "offset", "ebird_code"]
    )
    predicted = SegmentPredictions(clipwise, clipwise, frames, recording_seconds=(10.0,))
    return LabelledSoundscapes(
        predictions=scores, annotations=annotations, frames={"s": predicted}, foreign=None, paths={}
    )


def test_detected_events_are_scored_by_annotations():
    labelled = labelled_events()
    assert values_of(event_rows("x", labelled, {"s": Decision()})) == {
        "segment_f1": 1.0,
        "event_f1": 1.0,
    }
    late = labelled.annotations.assign(onset=1.6, offset=3.6)
    found = values_of(event_rows("x", replace(labelled, annotations=late), {"s": Decision()}))
    assert found["event_f1"] == 0.0  # 0.6 s off, and the collar is half a second
    # Segments 1 and 2 are named, 1, 2 and 3 are true.
    assert found["segment_f1"] == pytest.approx(2 * 2 / (2 + 3))
    near = labelled.annotations.assign(onset=1.4, offset=3.4)
    found = values_of(event_rows("x", replace(labelled, annotations=near), {"s": Decision()}))
    assert found["event_f1"] == 1.0


def test_the_short_table_has_a_line_per_name_and_fits_a_terminal(scores):
    rows = []
    for name in ("small_gru", "small_attention_normed", "ensemble", "all nocall"):
        named = scores.decide(Decision())
        for audio in ("simulated", "simulated 50%", "simulated 60%", "simulated 80%", "labelled"):
            rows += decided_rows(ScoreSubject(name, 2, audio), scores, named)
        rows += ranked_rows(ScoreSubject(name, 2, "labelled"), scores, ALL_FIVE)
    table = pd.DataFrame(rows)
    wide = wide_table(table)
    assert list(wide["name"]) == ["small_gru", "small_attention_normed", "ensemble", "all nocall"]
    assert "recordings: AP" not in wide  # nothing is known of it
    text = wide.to_string(index=False)
    assert max(map(len, text.splitlines())) <= 160
    low, high = rows[0]["low"], rows[0]["high"]
    assert f"{rows[0]['value']:.3f} [{low:.3f}, {high:.3f}]" in text


def test_a_class_has_its_support_and_its_share_of_right_names(scores):
    generator = np.random.default_rng(0)
    targets = np.eye(5)[generator.integers(5, size=40)]
    out_of_fold = generator.random((40, 5))
    named = scores.decide(Decision(0.4, 0.4))
    table = per_class_table(
        scores.classes,
        targets=targets,
        learnable=np.ones((40, 5), bool),
        out_of_fold=out_of_fold,
        simulated=scores,
        predicted=named,
        labelled=scores,
        decision=Decision(),
    )
    truth = scores.labelled_truth[:, :5]
    assert list(table["recordings"]) == targets.sum(axis=0).tolist()
    assert list(table["simulated_rows"]) == truth.sum(axis=0).tolist()
    k = 2
    expected = (truth[:, k] & named[:, k]).sum() / named[:, k].sum()
    assert table["simulated_precision"][k] == pytest.approx(expected)
    expected = average_precision_score(truth[:, k], scores.framewise.mean(axis=0)[:, k])
    assert table["labelled_ap"][k] == pytest.approx(expected)
    means = scores.clipwise.mean(axis=0) * scores.framewise.mean(axis=0)
    strength = means[scores.labelled][:, k]
    expected = average_precision_score(truth[:, k], strength)
    assert table["labelled_decision_ap"][k] == pytest.approx(expected)
    assert table["labelled_decision_auc"][k] == pytest.approx(roc_auc_score(truth[:, k], strength))


def test_confusions_are_counted_by_hand():
    classes = ("amecro", "blujay", "norcar")
    targets = np.array([[1, 0, 0], [1, 0, IGNORE_TARGET], [0, 1, 0], [0, 0, 1]], float)
    probabilities = np.array([[0.2, 0.9, 0], [0.2, 0.1, 0.9], [0.9, 0.3, 0], [np.nan] * 3])
    truth = np.array([[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
    predicted = np.array([[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]], bool)
    pairs = confusion_table(
        classes, probabilities=probabilities, targets=targets, truth=truth, predicted=predicted
    )
    assert [tuple(row) for row in pairs.itertuples(index=False)] == [
        ("amecro", "blujay", 1, 2, "yes"),
        ("blujay", "amecro", 1, 0, ""),
        ("blujay", "norcar", 0, 1, ""),
    ]
    counts = confusion_matrix(pairs)
    assert list(counts.index) == list(counts.columns) == list(classes)
    assert counts.to_numpy().tolist() == [[0, 3, 0], [1, 0, 1], [0, 0, 0]]
    assert confusion_matrix(pairs, 2).to_numpy().tolist() == [[0, 3], [1, 0]]
    assert confusion_matrix(pairs.head(0)).empty


def test_votes_are_scored_as_the_rule_scores_them(scores):
    weights = share_weights(scores.labelled_truth, 0.7)
    decision = Decision(0.4, 0.4, members=scores.member_names)
    table = votes_table(scores, weights, decision)
    assert list(table["votes"]) == [1, 2]
    rule = replace(decision, combination="votes", vote_share=1.0)
    expected = np.average(scores.row_f1(rule), weights=weights)
    assert table["row_wise_f1"][1] == pytest.approx(expected)


def test_reliability_is_measured_before_and_after_calibration():
    generator = np.random.default_rng(0)
    probabilities = generator.random((400, 3))
    targets = (generator.random((400, 3)) < probabilities**2).astype(float)
    table = reliability_table(probabilities, probabilities**2, targets)
    error = (table["mean_probability"] - table["share_true"]).abs()
    errors = error.groupby(table["probabilities"]).mean()
    assert errors["calibrated"] < 0.5 * errors["predicted"]
    only = reliability_table(probabilities, None, targets)
    assert set(only["probabilities"]) == {"predicted"}
    assert only["cells"].sum() == targets.size


def test_recall_is_counted_by_level():
    segments = pd.concat(
        [segment_table(name, 2, is_labelled=True, group="g") for name in ("a", "b")],
        ignore_index=True,
    )
    nothing = np.zeros((1, 4, 1), np.float32)
    predictions = LabelledPredictions(
        segments=segments,
        truth=np.array([[True], [False], [True], [True]]),
        predictions=SegmentPredictions(nothing, nothing, starts=(0, 2)),
        member_names=("m",),
        classes=("amecro",),
    )
    events = pd.DataFrame(
        [("a", 1.0, 2.0, 10.0), ("b", 3.0, 4.0, 11.0), ("b", 6.0, 7.0, 25.0)],
        columns=["recording", "onset", "offset", "snr_db"],
    ).assign(ebird_code="amecro")
    predicted = np.array([[True], [False], [False], [True]])
    table = snr_table(events, predictions, predicted)
    assert table.to_dict("list") == {
        "snr_db": [9.0, 24.0], "events": [2, 1], "recall": [0.5, 1.0],
        "standard_error": [pytest.approx((0.5 * 0.5 / 2) ** 0.5), 0.0], "centre_db": [10.5, 25.5],
    }  # fmt: skip
