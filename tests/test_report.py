"""The report is one page that says and draws what was found, and nothing in it can bite."""

import re
from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from birdcall.decision import Decision
from birdcall.evaluation.choosing import THRESHOLDS
from birdcall.evaluation.figures import (
    plot_reliability,
    plot_shares,
    plot_soundscape,
    plot_steps,
    plot_thresholds,
    recall_over_snr,
)
from birdcall.evaluation.hearing import hear
from birdcall.evaluation.held_out import HeldOutScores, segments_of
from birdcall.evaluation.report import describe_decision, write_report
from birdcall.evaluation.scoring import evaluate
from birdcall.evaluation.simulation import SimulationConfig


@pytest.fixture(scope="module")
def evaluation(trained_runs, training_data):
    config = SimulationConfig(soundscapes=4, soundscape_seconds=30.0)
    return evaluate(hear(trained_runs, training_data, config=config))


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_the_page_needs_nothing_but_itself(evaluation, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, "demo", evaluation)
    page = path.read_text()
    assert not re.search(r"(src|href)=(?!'data:image/png;base64,)", page)
    assert "<script" not in page
    assert page.count("<img") == 6
    assert page.count("alt='") == 6
    for name in ("tiny", "other", "ensemble", "all nocall", "prior", "American Crow"):
        assert name in page
    assert describe_decision(evaluation).replace(">", "&gt;") in page


def test_hostile_names_are_inert(evaluation, tmp_path):
    hostile = "<img src=x onerror=alert(1)>"
    foreign = replace(evaluation.labelled, foreign=Counter({hostile: 3}))
    heard = replace(evaluation.heard, labelled=foreign)
    table = evaluation.table.replace({"name": {"tiny": hostile}})
    write_report(tmp_path / "r.html", hostile, replace(evaluation, heard=heard, table=table))
    page = (tmp_path / "r.html").read_text()
    assert hostile not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 3


def test_a_report_without_labelled_soundscapes_is_a_page_too(evaluation, tmp_path):
    heard = replace(evaluation.heard, labelled=None)
    write_report(tmp_path / "r.html", "demo", evaluate(heard))
    assert "A labelled soundscape" not in (tmp_path / "r.html").read_text()


def test_a_report_without_a_choice_is_a_page_too(evaluation, tmp_path):
    judgement = replace(evaluation.judgement, choice=None, simulated=None, calibration=None)
    found = replace(evaluation, judgement=judgement)
    write_report(tmp_path / "r.html", "demo", found)
    assert (tmp_path / "r.html").read_text().count("<img") == 1


def test_missing_sound_is_said(evaluation, tmp_path):
    gone = {name: tmp_path / f"{name}.mp3" for name in evaluation.labelled.paths}
    heard = replace(evaluation.heard, labelled=replace(evaluation.labelled, paths=gone))
    write_report(tmp_path / "r.html", "demo", replace(evaluation, heard=heard))
    assert ".mp3" in (tmp_path / "r.html").read_text()


def test_the_decision_is_said_with_its_score_and_silence_beside_it(evaluation):
    text = describe_decision(evaluation)
    score = evaluation.decision.score
    assert f"{score['nested_row_wise_f1']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in text
    assert f"all nocall {score['all_nocall']:.3f}" in text


def test_the_chosen_thresholds_are_marked_where_they_are(evaluation):
    choice = evaluation.judgement.choice
    figure = plot_thresholds(choice)
    (point,) = figure.axes[0].lines
    clip, frame = choice.place
    assert point.get_xydata().tolist() == [[THRESHOLDS[frame], THRESHOLDS[clip]]]


def test_every_step_is_drawn_at_its_gain(evaluation):
    choice = evaluation.judgement.choice
    axes = plot_steps(choice).axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert len(labels) == len(choice.steps) - 1
    drawn = np.concatenate(
        [line.get_xdata() for line in axes.lines if line.get_marker() in ("o", "D")]
    )
    assert sorted(drawn) == pytest.approx(sorted(choice.steps["gain"][1:]))


def test_every_name_but_the_prior_is_drawn_over_the_share_of_nocall(evaluation):
    figure = plot_shares(evaluation.table)
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["other", "tiny", "ensemble", "all nocall"]


def test_reliability_is_drawn_before_and_after():
    generator = np.random.default_rng(0)
    scores = generator.random((400, 3))
    targets = (generator.random((400, 3)) < scores**2).astype(float)
    figure = plot_reliability(scores, scores**2, targets)
    diagonal, before, after = figure.axes[0].lines
    errors = [np.abs(np.diff(line.get_xydata())).mean() for line in (before, after)]
    assert errors[1] < 0.5 * errors[0]
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]


def test_recall_is_counted_by_level():
    segments = pd.concat(
        [segments_of(name, 2, is_labelled=True, group="g") for name in ("a", "b")],
        ignore_index=True,
    )
    truth = np.array([[True], [False], [True], [True]])
    nothing = np.zeros((1, 4, 1), np.float32)
    scores = HeldOutScores(segments, truth, nothing, nothing, ("m",), ("amecro",))
    events = pd.DataFrame(
        [("a", 1.0, 2.0, 10.0), ("b", 3.0, 4.0, 11.0), ("b", 6.0, 7.0, 25.0)],
        columns=["recording", "onset", "offset", "snr_db"],
    ).assign(ebird_code="amecro")
    named = np.array([[True], [False], [False], [True]])
    table = recall_over_snr(events, scores, named)
    assert table.to_dict("list") == {
        "snr_db": [9.0, 24.0], "events": [2, 1], "recall": [0.5, 1.0]
    }  # fmt: skip


def test_a_soundscape_is_drawn_with_what_is_there_and_what_was_named(evaluation):
    scores = evaluation.labelled.scores
    name = scores.segments["recording"].iloc[0]
    waveform = 0.1 * np.random.default_rng(0).standard_normal(30 * 32_000).astype("f4")
    figure = plot_soundscape(waveform, 32_000, scores, name, Decision(0.0, 0.0))
    own = (scores.segments["recording"] == name).to_numpy()
    bottom = figure.axes[1]
    assert len(bottom.patches) == scores.truth[own][:, : len(scores.classes)].sum()
    dots = sum(line.get_marker() == "o" for line in bottom.lines)
    assert dots == own.sum() * min(3, len(scores.classes))
