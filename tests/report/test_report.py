"""The report is one self-contained page with all results, in which no label can run a script."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from birdcall.evaluation.decision_search import THRESHOLDS
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.evaluation.scoring import describe_classes, evaluate, soundscape_table
from birdcall.inference.decision import Decision
from birdcall.report.charts import (
    chart_confusions,
    chart_reliability,
    chart_shares,
    chart_steps,
    chart_threshold_curves,
    chart_thresholds,
)
from birdcall.report.plots import plot_soundscape
from birdcall.report.report import describe_decision, find_weaknesses, write_report


@pytest.fixture(scope="module")
def page(evaluation, written_report):
    path, pages = written_report
    assert all(first_page.is_file() for first_page in pages.values())
    assert set(pages) == set(evaluation.labelled.paths)
    return path.read_text()


def test_the_page_needs_nothing_but_itself(evaluation, page):
    body = page.split("<body>")[1].split("<script")[0]
    links = re.findall(r"""(?:src|href)=['"]([^'"]*)""", body)
    assert links
    for link in links:
        assert link.startswith(
            ("data:image/webp;base64,", "data:audio/mpeg;base64,", "#")
        ) or link.startswith("soundscapes/")
    for name in ("tiny", "other", "ensemble", "all nocall", "prior", "American Crow"):
        assert name in body
    assert describe_decision(evaluation.ensemble.decision).replace(">", "&gt;") in body
    assert describe_classes(evaluation.scores) in body
    assert body.count("class='chart'") == 8
    assert "default-src 'none'" in page


def test_hostile_names_are_inert(evaluation, tmp_path):
    hostile = "<img src=x onerror=alert(1)>"
    foreign = replace(evaluation.labelled, foreign=Counter({hostile: 3}))
    scores = evaluation.scores.replace({"name": {"tiny": hostile}})
    changed = replace(evaluation, labelled=foreign, scores=scores)
    write_report(tmp_path / "r.html", hostile, changed)
    page = (tmp_path / "r.html").read_text()
    assert hostile not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 3


def test_segments_with_birds_that_nobody_could_name_are_counted(evaluation, page, tmp_path):
    unknown = replace(evaluation, labelled=replace(evaluation.labelled, n_unknown=123))
    write_report(tmp_path / "r.html", "unknown", unknown)
    assert "????" not in page
    assert re.search(r"123 segments[^<]*\?\?\?\?", (tmp_path / "r.html").read_text())


def test_the_curves_of_a_mistake_reach_the_top_at_the_probability_beside_the_name(page):
    """The scale is written; the highest point of a drawing of 44 pixels is at 7."""
    drawings = re.findall(r"<small>up to [\d.]+</small>(.*?)</svg>", page, flags=re.DOTALL)
    assert len(drawings) > 3
    for drawing in drawings:
        points = " ".join(re.findall("points='(.*?)'", drawing))
        assert min(float(y) for y in re.findall(r"\d+,([\d.]+)", points)) == 7.0


def test_a_report_without_labelled_soundscapes_is_a_page_too(write_report_of, held_out, tmp_path):
    without = replace(held_out, labelled=None)
    assert write_report_of(tmp_path / "r.html", "demo", without, evaluate(without)) == {}
    assert "Labelled soundscapes" not in (tmp_path / "r.html").read_text()


def test_a_report_without_a_search_is_a_page_too(write_report_of, held_out, evaluation, tmp_path):
    ensemble = replace(evaluation.ensemble, search=None, simulated=None)
    changed = replace(evaluation, ensemble=ensemble, votes=None, snr=None, reliability=None)
    write_report_of(tmp_path / "r.html", "demo", held_out, changed, 0)
    page = (tmp_path / "r.html").read_text()
    assert "Labelled soundscapes: " in page and "Simulated soundscapes: " not in page


def test_missing_audio_is_reported(write_report_of, held_out, evaluation, tmp_path):
    gone = {name: tmp_path / f"{name}.mp3" for name in evaluation.labelled.paths}
    without = replace(held_out, labelled=replace(evaluation.labelled, paths=gone))
    assert write_report_of(tmp_path / "r.html", "demo", without, evaluation) == {}
    assert ".mp3: no such file" in (tmp_path / "r.html").read_text()


def test_the_report_does_not_grow_with_the_soundscapes(
    write_report_of, held_out, evaluation, tmp_path
):
    """A line of a table each; audio is of a fixed number of mistakes."""
    sizes = []
    for n_times in (5, 10):
        folder = tmp_path / str(n_times)
        labelled = repeat(evaluation.labelled, n_times)
        table = soundscape_table(
            labelled.predictions, labelled.predictions.decide(evaluation.ensemble.decision)
        )
        changed = replace(evaluation, labelled=labelled, soundscapes=table)
        write_report_of(folder / "r.html", "demo", replace(held_out, labelled=labelled), changed, 1)
        sizes.append(len((folder / "r.html").read_text()))
        assert len(list((folder / "soundscapes").iterdir())) == 1
    n_more = 5 * len(evaluation.labelled.paths)
    assert 0 < sizes[1] - sizes[0] < 600 * n_more


def repeat(labelled, n_times):
    """The same soundscapes again and again, under other names."""
    scores = labelled.predictions
    segments = [
        scores.segments.assign(recording=scores.segments["recording"] + f"-{k}")
        for k in range(n_times)
    ]
    parts = [replace(scores, segments=table) for table in segments]
    many = LabelledPredictions.concatenate(parts)
    paths = {f"{name}-{k}": path for name, path in labelled.paths.items() for k in range(n_times)}
    return replace(labelled, predictions=many, paths=paths, frames={})


def test_the_decision_is_described_with_its_score_and_that_of_all_nocall(evaluation):
    text = describe_decision(evaluation.ensemble.decision)
    score = evaluation.ensemble.decision.score
    assert f"{score['cross_validated_row_wise_f1']:.3f} [{score['low']:.3f}, " in text
    assert f"{score['high']:.3f}]" in text
    assert f"all nocall {score['all_nocall']:.3f}" in text


def test_a_decision_of_threshold_1_is_said_to_name_nothing():
    for name in ("clip_threshold", "frame_threshold", "recording_threshold"):
        decision = Decision(**{name: 1.0})
        assert decision.names_nothing
        assert ">= 1" not in describe_decision(decision)
    assert not Decision(0.95, 0.95).names_nothing


@pytest.mark.parametrize(
    "f1, auc, low",
    [
        (0.589, 0.77, "ranking"),
        (0.417, 0.91, "decision"),
        (0.589, 0.91, "decision"),
        (0.589, np.nan, "ranking"),
        (0.62, 0.77, None),
    ],
)
def test_what_is_low_is_told_where_naming_no_bird_scores_as_much(
    evaluation, tmp_path, f1, auc, low
):
    """In the report under a fixed id, and with the score that says so."""
    values = {"row_wise_f1": f1, "macro_auc": auc, "nocall_share_named": float(f1 == 0.589)}
    scores = evaluation.scores.copy()
    of_labelled = scores["audio"] == "labelled"
    for metric, value in values.items():
        cell = of_labelled & (scores["metric"] == metric) & (scores["name"] == "ensemble")
        scores.loc[cell, "value"] = value
    is_silence = (
        of_labelled & (scores["name"] == "all nocall") & (scores["metric"] == "row_wise_f1")
    )
    scores.loc[is_silence, "value"] = 0.589
    weaknesses = {item.audio: item for item in find_weaknesses(scores)}
    assert (weaknesses["labelled"].low if "labelled" in weaknesses else None) == low
    write_report(tmp_path / "r.html", "real", replace(evaluation, scores=scores))
    page = (tmp_path / "r.html").read_text()
    assert (f"id='weakness-labelled' data-low='{low}'" in page) == (low is not None)
    if low:
        assert f"{f1:.3f}" in weaknesses["labelled"].text
        assert "nan" not in weaknesses["labelled"].text
        assert np.isnan(auc) or f"{auc:.2f}" in weaknesses["labelled"].text


def test_the_chosen_thresholds_are_marked_where_they_are(evaluation):
    search = evaluation.ensemble.search
    figure = chart_thresholds(search).figure
    clip, frame = search.grid_index
    assert (figure.data[1].x, figure.data[1].y) == ((THRESHOLDS[frame],), (THRESHOLDS[clip],))
    assert figure.data[0].z[clip][frame] == pytest.approx(search.grid_scores.max(), abs=0.1)
    curves = chart_threshold_curves(search).figure.data
    for curve, ring in (curves[:2], curves[2:]):
        assert ring.y[0] == pytest.approx(curve.y[curve.x.index(ring.x[0])], abs=1e-4)


def test_every_step_is_drawn_at_its_gain(evaluation):
    search = evaluation.ensemble.search
    figure = chart_steps(search).figure
    drawn = {name: gain for part in figure.data for name, gain in zip(part.y, part.x, strict=True)}
    steps = search.steps.iloc[1:]
    assert drawn == dict(zip(steps["alternative"], steps["gain"], strict=True))


def test_every_name_but_the_prior_is_drawn_over_the_share_of_nocall(evaluation):
    names = [part.name for part in chart_shares(evaluation.scores).figure.data]
    assert names == ["other", "tiny", "tiny+other", "ensemble", "all nocall"]


def test_reliability_is_drawn_before_and_after_beside_the_diagonal(evaluation):
    diagonal, before, after = chart_reliability(evaluation.reliability).figure.data
    assert (diagonal.x, diagonal.y) == ((0, 1), (0, 1))
    for line, name in ((before, "predicted"), (after, "calibrated")):
        table = evaluation.reliability[evaluation.reliability["probabilities"] == name]
        assert line.name == name
        np.testing.assert_equal(list(line.x), list(table["mean_probability"]))
        np.testing.assert_equal(list(line.y), list(table["share_true"]))


def test_confusions_are_drawn_by_name():
    columns = ["true_species", "predicted_species", "recordings", "rows", "only"]
    pairs = [("amecro", "blujay", 1, 2, "yes"), ("blujay", "amecro", 1, 0, "yes")]
    confusions = pd.DataFrame(pairs, columns=columns)
    grid = chart_confusions(confusions).figure.data[0]
    assert grid.y[0] == "American Crow" and grid.z[0][1] == 3
    assert chart_confusions(confusions.head(0)) is None


def test_a_soundscape_is_drawn_with_truth_and_predictions(evaluation):
    predictions = evaluation.labelled.predictions
    recordings = predictions.segments["recording"]
    first = predictions.select((recordings == recordings.iloc[0]).to_numpy())
    waveform = 0.1 * np.random.default_rng(0).standard_normal(30 * 32_000).astype("f4")
    n_classes = len(predictions.classes)
    figure = plot_soundscape(
        waveform,
        codes=first.classes,
        truth=first.truth[:, :n_classes],
        predicted=first.decide(Decision(clip_threshold=0, frame_threshold=0))[:, :n_classes],
        probability=first.framewise[0].T,
    )
    bottom = figure.axes[1]
    highest = first.framewise[0].max(axis=0)
    for label, top in zip(bottom.get_yticklabels(), highest, strict=True):
        assert f"up to {top:.2g}" in label.get_text()
    np.testing.assert_allclose(bottom.images[0].get_array().max(axis=1), 1, rtol=1e-6)
    assert len(bottom.patches) == first.truth[:, :n_classes].sum()
    dots = sum(line.get_marker() == "o" for line in bottom.lines)
    assert dots == len(first.truth) * min(3, n_classes)
