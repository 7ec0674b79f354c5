"""Peers are measured on the same sound and scored over the same classes, those of them that run."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import fake_birdnet

import birdcall.benchmark.peers as peers
from birdcall.benchmark.peers import (
    PEERS,
    Setting,
    benchmark_peers,
    join_windows,
    open_peer,
    score_rows,
)
from birdcall.data.birdnet import scientific_names
from birdcall.evaluation.labelled import segment_table
from birdcall.evaluation.predictions import LabelledPredictions
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import ONNX_FILE

ONNX, BFLOAT16, TORCH, NAIVE, OPENSOUNDSCAPE, SPARSE, DENSE = PEERS


@pytest.fixture
def no_processes(monkeypatch):
    """In place of a new process for each peer: its name decides about the megabytes."""

    def run(command, check):
        file = Path(command[-1])
        name = json.loads(file.read_text())["name"]
        file.write_text(json.dumps({"peak_megabytes": len(name)}))

    monkeypatch.setattr("subprocess.run", run)


def test_a_row_for_each_peer_and_the_reason_where_one_does_not_run(
    trained_runs, training_data, tmp_path, monkeypatch, no_processes
):
    names = scientific_names(training_data.classes, training_data.recordings)
    model = fake_birdnet([f"{name}_Bird" for name in names[:-1]])
    monkeypatch.setattr("birdcall.data.birdnet.open_birdnet", lambda: model)
    monkeypatch.setattr(peers, "is_onnx_installed", lambda: False)  # an export takes seconds

    def fail(_):
        raise RuntimeError("out of paper\nand ink")

    monkeypatch.setattr(peers, "PEERS", PEERS | {DENSE: lambda _: (fail, None)})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # nothing optional is there
    table = benchmark_peers(
        training_data.folder, trained_runs[0], tmp_path, minutes=0.4, repeats=2
    ).set_index("peer")
    assert list(table.index) == list(PEERS)
    assert "pip install -e '.[peers]'" in table.loc[OPENSOUNDSCAPE, "state"]
    for name in (ONNX, BFLOAT16):
        assert "pip install -e '.[onnx]'" in table.loc[name, "state"]
    assert "out of paper" in table.loc[DENSE, "state"]
    assert "ink" not in table.loc[DENSE, "state"]
    ran = [TORCH, NAIVE, SPARSE]
    measured = table.loc[ran]
    assert (measured["state"] == "measured").all()
    assert (measured[["x_real_time", "core_seconds_per_hour"]] > 0).all(axis=None)
    assert list(measured["peak_megabytes"]) == [len(name) for name in ran]
    assert measured["macro_ap"].between(0, 1).all()
    assert measured["macro_auc"].between(0, 1).all()
    # The same weights: the same scores, whoever cuts, reads and transforms.
    scores = ["rows", "classes", "macro_ap", "macro_auc", "row_wise_f1"]
    assert np.allclose(*table.loc[[TORCH, NAIVE], scores].to_numpy(float), atol=0.02)
    assert table.drop(index=ran).drop(columns="state").isna().all(axis=None)
    written = pd.read_csv(tmp_path / "peers.csv").set_index("peer")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)


def test_an_export_runs_in_the_runtime_that_its_row_names(package, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr("birdcall.models.checkpoint.find_bfloat16_fault", lambda: "")
    member = sorted((package / "members").iterdir())[0]
    if not (member / ONNX_FILE).is_file():
        pytest.skip("the package has no exports")
    opened = []
    monkeypatch.setattr(peers, "Ensemble", lambda members: opened.extend(members))
    for name in (ONNX, BFLOAT16):
        PEERS[name](Setting(member, ()))
    assert [item.export.runtime for item in opened] == ["ONNX Runtime", "OpenVINO"]


def test_scores_are_of_the_labelled_rows_and_the_classes_that_all_know():
    """Three labelled rows; the third class is unknown to a peer, the fourth no member's."""
    segments = segment_table("a", 4, is_labelled=np.array([True, True, False, True]), group="a")
    truth = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]], bool)
    clipwise = np.array([[0.9, 0.6, 1.0], [0.2, 0.1, 0.0], [0.0, 0.0, 0.0], [0.95, 0.7, 0.9]])
    predictions = SegmentPredictions(clipwise[None], clipwise[None], starts=(0,))
    labelled = LabelledPredictions(segments, truth, predictions, ("peer",), ("a", "b", "c"))
    known = np.array([True, True, False])
    scores = score_rows(labelled, clipwise, known, 0.5)
    assert scores == {
        "rows": 3,
        "classes": 2,
        "macro_ap": 0.75,  # a is second of three, b first
        "macro_auc": 0.75,  # a has won one of two pairs, b both
        # {a} against {a, b}: 2/3; nocall, since c and d do not count; {b} against {a, b}: 2/3
        "row_wise_f1": round((2 / 3 + 1 + 2 / 3) / 3, 3),
    }
    assert score_rows(labelled, clipwise, known, 0.65)["row_wise_f1"] == round(
        (1 + 1 + 2 / 3) / 3, 3
    )


def test_a_segment_has_the_highest_of_the_windows_that_overlap_by_a_second():
    # Windows 0-3, 3-6, 6-9 and 9-12 s of a recording of 10 s.
    windows = np.array([[0.1], [0.2], [0.3], [0.9]])
    # 0-5 s: the first two. 5-10 s: a second each of 3-6 and of 9-12, all of 6-9.
    assert join_windows(windows, 10.0).tolist() == [[0.2], [0.9]]
    assert join_windows(windows[::-1], 10.0).tolist() == [[0.9], [0.3]]
    assert join_windows(windows[:1], 2.0).tolist() == [[0.1]]


@pytest.mark.slow
def test_opensoundscape_predicts_as_the_engine_with_the_same_network(
    trained_runs, training_data, demo_folder
):
    pytest.importorskip("opensoundscape")
    setting = Setting(trained_runs[0], training_data.classes)
    path = sorted((demo_folder / "example_test_audio").iterdir())[0]
    (theirs,) = open_peer(OPENSOUNDSCAPE, setting).run([path])
    (ours,) = open_peer(TORCH, setting).run([path])
    assert np.allclose(theirs, ours, atol=0.05)
