"""The benchmark of evaluation scores stored predictions in a new process."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from birdcall.benchmark import scale
from birdcall.benchmark.frontend import peak_megabytes
from birdcall.benchmark.scale import benchmark_evaluation, benchmark_labels, random_truth


def run_in_this_process(command, check):
    """In place of `subprocess.run` for a command ``python -c code ...``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[1:2] + command[3:])
        exec(command[2], {})


def test_a_small_evaluation_gives_time_memory_and_scores(tmp_path, monkeypatch):
    table = benchmark_evaluation(tmp_path, n_soundscapes=12, seconds=60, n_classes=10, n_members=2)
    row = table.iloc[0]
    assert (row["rows"], row["members"], row["classes"]) == (144, 2, 10)
    assert row["seconds"] > 0
    assert 0.05 < row["peak_gigabytes"] < 4
    assert row["ensemble"] > row["all_nocall"] == 0.54
    result = json.loads((tmp_path / "stored" / "evaluation.json").read_text())
    assert "member 1" in result["table"]
    # A second, smaller evaluation does not use the files of the first.
    monkeypatch.setattr(scale, "subprocess", SimpleNamespace(run=run_in_this_process))
    table = benchmark_evaluation(tmp_path, n_soundscapes=6, seconds=30, n_classes=4, n_members=1)
    assert table["members"].item() == 1


def test_random_truth_resembles_the_rows_of_the_competition():
    truth = random_truth(40 * 60, 50)
    counts = truth.sum(axis=1)
    assert (counts == 0).mean() == pytest.approx(0.54, abs=0.03)
    shares = np.bincount(counts[counts > 0], minlength=4)[1:4] / (counts > 0).sum()
    assert shares == pytest.approx([0.7, 0.25, 0.05], abs=0.03)
    support = np.sort(truth.sum(axis=0))
    assert support[-5:].sum() > 5 * support[:5].sum()  # species are uneven


def test_more_classes_than_species_are_refused(tmp_path):
    with pytest.raises(ValueError, match="n_classes is 300; there are 264 species"):
        benchmark_evaluation(tmp_path, n_classes=300)


def test_annotations_are_read_and_matched_in_little_memory(tmp_path):
    """A hundredth of 100,000 annotations of 300 hours; the command measures all of them."""
    before = peak_megabytes()  # of the tests that ran in this process
    table = benchmark_labels(tmp_path / "labels", 1000, n_recordings=3, hours=3.0)
    row = table.iloc[0]
    # Of 266 labels one is a bird that nobody could name: some 4 of the annotations.
    assert 2140 < row["rows"] < 3 * 720
    assert row["seconds"] > 0
    assert 0 < row["peak_gigabytes"] < before / 1000 + 0.5
