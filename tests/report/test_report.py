"""The report is one page that says and draws what was found, and nothing in it can bite."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from birdcall.data.targets import IGNORE_TARGET
from birdcall.evaluation.decision_search import THRESHOLDS
from birdcall.evaluation.mistakes import FALSE, find_mistakes, predict_mistakes
from birdcall.evaluation.predictions import LabelledPredictions, segments_of
from birdcall.evaluation.scoring import evaluate
from birdcall.evaluation.tables import recall_over_snr
from birdcall.inference.decision import Decision
from birdcall.report.charts import (
    chart_confusions,
    chart_reliability,
    chart_shares,
    chart_steps,
    chart_threshold_curves,
    chart_thresholds,
    join_confusions,
    recording_confusions,
    row_confusions,
    vote_scores,
)
from birdcall.report.plots import plot_soundscape
from birdcall.report.report import describe_decision, write_report


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    pages = write_report(path, "demo", evaluation)
    assert all(one.is_file() for one in pages.values())
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
    assert describe_decision(evaluation).replace(">", "&gt;") in body
    assert body.count("class='chart'") == 8
    assert "default-src 'none'" in page


def test_hostile_names_are_inert(evaluation, tmp_path):
    hostile = "<img src=x onerror=alert(1)>"
    foreign = replace(evaluation.labelled, foreign=Counter({hostile: 3}))
    heard = replace(evaluation.heard, labelled=foreign)
    table = evaluation.table.replace({"name": {"tiny": hostile}})
    write_report(tmp_path / "r.html", hostile, replace(evaluation, heard=heard, table=table), 0)
    page = (tmp_path / "r.html").read_text()
    assert hostile not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 3


def test_a_report_without_labelled_soundscapes_is_a_page_too(evaluation, tmp_path):
    heard = replace(evaluation.heard, labelled=None)
    assert write_report(tmp_path / "r.html", "demo", evaluate(heard)) == {}
    assert "Labelled soundscapes" not in (tmp_path / "r.html").read_text()


def test_a_report_without_a_choice_is_a_page_too(evaluation, tmp_path):
    ensemble_decision = replace(
        evaluation.ensemble_decision, choice=None, simulated=None, calibration=None
    )
    found = replace(evaluation, ensemble_decision=ensemble_decision)
    write_report(tmp_path / "r.html", "demo", found, 0)
    page = (tmp_path / "r.html").read_text()
    assert "Labelled soundscapes: " in page and "Simulated soundscapes: " not in page


def test_missing_sound_is_said(evaluation, tmp_path):
    gone = {name: tmp_path / f"{name}.mp3" for name in evaluation.labelled.paths}
    heard = replace(evaluation.heard, labelled=replace(evaluation.labelled, paths=gone))
    pages = write_report(tmp_path / "r.html", "demo", replace(evaluation, heard=heard))
    assert pages == {}
    assert ".mp3: no such file" in (tmp_path / "r.html").read_text()


def test_the_report_does_not_grow_with_the_soundscapes(evaluation, tmp_path):
    """A line of a table each; sound is of so many mistakes, whatever there is."""
    sizes = []
    for n_times in (20, 40):
        folder = tmp_path / str(n_times)
        heard = replace(evaluation.heard, labelled=repeat(evaluation.labelled, n_times))
        write_report(folder / "r.html", "demo", replace(evaluation, heard=heard), 1)
        sizes.append(len((folder / "r.html").read_text()))
        assert len(list((folder / "soundscapes").iterdir())) == 1
    n_more = 20 * len(evaluation.labelled.paths)
    assert 0 < sizes[1] - sizes[0] < 600 * n_more


def repeat(labelled, n_times):
    """The same soundscapes again and again, under other names."""
    scores = labelled.scores
    segments = [
        scores.segments.assign(recording=scores.segments["recording"] + f"-{k}")
        for k in range(n_times)
    ]
    many = replace(
        scores,
        segments=pd.concat(segments, ignore_index=True),
        truth=np.tile(scores.truth, (n_times, 1)),
        clipwise=np.tile(scores.clipwise, (1, n_times, 1)),
        framewise=np.tile(scores.framewise, (1, n_times, 1)),
    )
    paths = {f"{name}-{k}": path for name, path in labelled.paths.items() for k in range(n_times)}
    return replace(labelled, scores=many, paths=paths, frames={})


def test_mistakes_are_mistakes_and_the_worst(evaluation):
    found = find_mistakes(evaluation)
    assert {one.sound for one in found} == {"simulated", "labelled"}
    scores = evaluation.labelled.scores
    named = scores.decide(evaluation.decision)
    ends = scores.segments["seconds"].to_numpy()
    names = scores.segments["recording"].to_numpy()
    for one in [one for one in found if one.sound == "labelled"]:
        row = np.flatnonzero((names == one.recording) & (ends == one.start + 5))
        column = scores.classes.index(one.ebird_code)
        assert named[row, column] == (one.kind == FALSE)
        assert scores.truth[row, column] == (one.kind != FALSE)
    for kind in {(one.sound, one.kind) for one in found}:
        own = [one for one in found if (one.sound, one.kind) == kind]
        assert [one.score for one in own] == sorted((one.score for one in own), reverse=True)
        assert len({(one.recording, one.ebird_code) for one in own}) == len(own) <= 6


def test_a_mistake_is_heard_as_it_was_scored(evaluation):
    """What a card draws comes to what the row's scores were, and its sound is the row's."""
    column = {code: place for place, code in enumerate(evaluation.classes)}
    for heard in predict_mistakes(evaluation, find_mistakes(evaluation, 2)):
        mistake = heard.mistake
        scores = evaluation.labelled.scores
        if mistake.sound == "simulated":
            scores = evaluation.ensemble_decision.simulated
        row = np.flatnonzero(
            (scores.segments["recording"] == mistake.recording)
            & (scores.segments["seconds"] == mistake.start + 5)
        )[0]
        members = heard.frames[1:, 0].max(axis=1)
        options = scores.framewise[:, row, column[mistake.ebird_code]]
        np.testing.assert_allclose(members, options, atol=1e-5)
        assert len(heard.waveform) == 5 * 32_000
        assert all(
            mistake.start <= one.onset <= one.offset <= mistake.start + 5 for one in heard.events
        )


def test_confusions_are_counted_by_hand():
    classes = ("amecro", "blujay", "norcar")
    targets = np.array([[1, 0, 0], [1, 0, IGNORE_TARGET], [0, 1, 0], [0, 0, 1]], float)
    scores = np.array([[0.2, 0.9, 0], [0.2, 0.1, 0.9], [0.9, 0.3, 0], [np.nan] * 3])
    of_recordings = recording_confusions(scores, targets, classes)
    truth = np.array([[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
    named = np.array([[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]], bool)
    of_rows = row_confusions(truth, named, classes)
    pairs = join_confusions(of_recordings, of_rows)
    assert [tuple(row) for row in pairs.itertuples(index=False)] == [
        ("amecro", "blujay", 1, 2, "yes"),
        ("blujay", "amecro", 1, 0, ""),
        ("blujay", "norcar", 0, 1, ""),
    ]
    grid = chart_confusions(pairs).figure.data[0]
    assert grid.y[0] == "American Crow" and grid.z[0][1] == 3
    assert chart_confusions(pairs.head(0)) is None


def test_votes_are_scored_as_the_rule_scores_them(evaluation):
    ensemble_decision = evaluation.ensemble_decision
    found = vote_scores(
        ensemble_decision.simulated, ensemble_decision.weights, ensemble_decision.choice
    )
    assert [n_votes for n_votes, _ in found] == [1, 2]
    rule = replace(
        ensemble_decision.choice.decision, combination="votes", vote_share=1.0, members=()
    )
    options = np.average(
        ensemble_decision.simulated.row_f1(rule), weights=ensemble_decision.weights
    )
    assert found[1][1] == pytest.approx(options)


def test_the_decision_is_said_with_its_score_and_silence_beside_it(evaluation):
    text = describe_decision(evaluation)
    score = evaluation.decision.score
    assert f"{score['nested_row_wise_f1']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in text
    assert f"all nocall {score['all_nocall']:.3f}" in text


def test_the_chosen_thresholds_are_marked_where_they_are(evaluation):
    choice = evaluation.ensemble_decision.choice
    figure = chart_thresholds(choice).figure
    clip, frame = choice.place
    assert (figure.data[1].x, figure.data[1].y) == ((THRESHOLDS[frame],), (THRESHOLDS[clip],))
    assert figure.data[0].z[clip][frame] == pytest.approx(choice.grid.max(), abs=0.1)
    curves = chart_threshold_curves(choice).figure.data
    for curve, ring in (curves[:2], curves[2:]):
        assert ring.y[0] == pytest.approx(curve.y[curve.x.index(ring.x[0])], abs=1e-4)


def test_every_step_is_drawn_at_its_gain(evaluation):
    choice = evaluation.ensemble_decision.choice
    figure = chart_steps(choice).figure
    drawn = {name: gain for part in figure.data for name, gain in zip(part.y, part.x, strict=True)}
    steps = choice.steps.iloc[1:]
    assert drawn == dict(zip(steps["alternative"], steps["gain"], strict=True))


def test_every_name_but_the_prior_is_drawn_over_the_share_of_nocall(evaluation):
    names = [part.name for part in chart_shares(evaluation.table).figure.data]
    assert names == ["other", "tiny", "ensemble", "all nocall"]


def test_reliability_is_drawn_before_and_after():
    generator = np.random.default_rng(0)
    scores = generator.random((400, 3))
    targets = (generator.random((400, 3)) < scores**2).astype(float)
    diagonal, before, after = chart_reliability(scores, scores**2, targets).figure.data
    errors = [np.abs(np.subtract(line.x, line.y)).mean() for line in (before, after)]
    assert errors[1] < 0.5 * errors[0]
    assert (diagonal.x, diagonal.y) == ((0, 1), (0, 1))


def test_recall_is_counted_by_level():
    segments = pd.concat(
        [segments_of(name, 2, is_labelled=True, group="g") for name in ("a", "b")],
        ignore_index=True,
    )
    truth = np.array([[True], [False], [True], [True]])
    nothing = np.zeros((1, 4, 1), np.float32)
    scores = LabelledPredictions(
        segments=segments,
        truth=truth,
        clipwise=nothing,
        framewise=nothing,
        member_names=("m",),
        classes=("amecro",),
    )
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
    figure = plot_soundscape(
        waveform, 32_000, scores=scores, recording=name, decision=Decision(0.0, 0.0)
    )
    own = (scores.segments["recording"] == name).to_numpy()
    bottom = figure.axes[1]
    assert len(bottom.patches) == scores.truth[own][:, : len(scores.classes)].sum()
    dots = sum(line.get_marker() == "o" for line in bottom.lines)
    assert dots == own.sum() * min(3, len(scores.classes))
