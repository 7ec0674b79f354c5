"""Pseudo-labels come from runs that held the recording out, and keep what is uncertain."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from birdcall.config import config_from_dict, replace_nested
from birdcall.data.targets import IGNORE_TARGET, StrongTargets, make_targets, read_strong_labels
from birdcall.demo.plan import DemoConfig
from birdcall.demo.schedule import plan_demo
from birdcall.experiments import find_experiment
from birdcall.inference.predictions import SegmentPredictions
from birdcall.inference.windows import FRAMES_PER_SEGMENT
from birdcall.models.checkpoint import Checkpoint, save_checkpoint
from birdcall.models.sed import build_model
from birdcall.training.pseudo_labels import (
    PseudoLabelConfig,
    PseudoLabelSummary,
    find_label_intervals,
    write_pseudo_labels,
)
from birdcall.training.runs import plan_runs, train_many
from birdcall.training.trainer import RunOptions

CLASSES = ("amecro", "bkcchi", "norcar")
CONFIG = PseudoLabelConfig()


def predictions_of(seconds=15.0, clipwise=1.0, **species):
    """Predictions for a recording with intervals of (onset, offset, probability) for each species.

    Clipwise is the same for all.
    """
    n_segments = -(-int(seconds) // 5)
    frames = np.zeros((3, n_segments * FRAMES_PER_SEGMENT), np.float32)
    for code, intervals in species.items():
        for onset, offset, probability in intervals:
            frames[CLASSES.index(code), round(onset * 10) : round(offset * 10)] = probability
    clips = np.full((2, n_segments, 3), clipwise, np.float32)
    return SegmentPredictions(clips, clips, frames, recording_seconds=(seconds,))


def intervals_of(predictions, *given, config=CONFIG):
    return [
        (event.ebird_code, event.onset, event.offset, state)
        for event, state in find_label_intervals(predictions, given, CLASSES, config)
    ]


def test_a_present_interval_lies_within_an_uncertain_one():
    predictions = predictions_of(amecro=[(2, 8, 0.2), (4, 6, 0.8)])
    assert intervals_of(predictions, "amecro") == [
        ("amecro", 2.0, 8.0, "uncertain"),
        ("amecro", 4.0, 6.0, "present"),
    ]


def test_the_silence_around_a_song_is_silence():
    table = as_table(predictions_of(amecro=[(4, 6, 0.8)]), "amecro")
    targets = StrongTargets(pd.DataFrame({"filename": ["XC1.mp3"]}), CLASSES, table)
    assert targets.find(0, 3.0, 5.0).tolist() == [1.0, 0.0, 0.0]
    assert targets.find(0, 8.0, 5.0).tolist() == [0.0, 0.0, 0.0]


def as_table(predictions, *given):
    rows = [("XC1.mp3", *row, 1.0) for row in intervals_of(predictions, *given)]
    names = ["filename", "ebird_code", "onset", "offset", "state", "probability"]
    return pd.DataFrame(rows, columns=names)


def test_a_pause_within_a_song_is_no_absence():
    found = intervals_of(predictions_of(amecro=[(1, 2, 0.9), (2.5, 4, 0.9), (6, 7, 0.9)]), "amecro")
    present = [row for row in found if row[3] == "present"]
    assert present == [("amecro", 1.0, 4.0, "present"), ("amecro", 6.0, 7.0, "present")]


def test_the_primary_label_never_vanishes():
    found = intervals_of(predictions_of(amecro=[(9, 9.2, 0.02)]), "amecro")
    assert found == [("amecro", 0.0, 15.0, "uncertain"), ("amecro", 6.55, 11.55, "present")]
    nowhere = intervals_of(predictions_of(), "amecro")
    assert nowhere == [("amecro", 0.0, 5.0, "present"), ("amecro", 0.0, 15.0, "uncertain")]
    at_end = intervals_of(predictions_of(amecro=[(14.9, 15, 0.02)]), "amecro")
    assert ("amecro", 10.0, 15.0, "present") in at_end
    short = intervals_of(predictions_of(2.3, amecro=[(1, 2, 0.02)]), "amecro")
    assert set(short) == {("amecro", 0.0, 2.3, "present"), ("amecro", 0.0, 2.3, "uncertain")}


def test_a_secondary_label_that_is_missed_is_uncertain_everywhere():
    predictions = predictions_of(amecro=[(0, 5, 0.9)], norcar=[(3, 4, 0.3)])
    assert ("norcar", 0.0, 15.0, "uncertain") in intervals_of(predictions, "amecro", "norcar")


def test_a_secondary_label_without_a_trace_is_dropped():
    predictions = predictions_of(amecro=[(0, 5, 0.9)], norcar=[(3, 4, 0.04)])
    assert {row[0] for row in intervals_of(predictions, "amecro", "norcar")} == {"amecro"}


def test_a_bird_that_is_not_listed_is_added_only_where_clip_and_frame_are_sure():
    species = {"amecro": [(0, 5, 0.9)], "bkcchi": [(6, 8, 0.95), (10, 11, 0.7), (12, 13, 0.4)]}
    others = [
        row for row in intervals_of(predictions_of(**species), "amecro") if row[0] == "bkcchi"
    ]
    assert others == [
        ("bkcchi", 6.0, 8.0, "present"),
        ("bkcchi", 6.0, 8.0, "uncertain"),
        ("bkcchi", 10.0, 11.0, "uncertain"),
    ]
    quiet = intervals_of(predictions_of(clipwise=0.6, **species), "amecro")
    assert [row[3] for row in quiet if row[0] == "bkcchi"] == ["uncertain", "uncertain"]
    assert {row[0] for row in intervals_of(predictions_of(clipwise=0.4, **species), "amecro")} == {
        "amecro"
    }


def test_no_interval_is_in_the_padding_behind_the_recording():
    found = intervals_of(predictions_of(12.34, amecro=[(11, 15, 0.9)]), "amecro")
    assert max(row[2] for row in found) == 12.3


def test_thresholds_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"uncertain_threshold 0\.7, present_threshold 0\.5 and"):
        PseudoLabelConfig(uncertain_threshold=0.7)
    with pytest.raises(ValueError, match=r"present_threshold is 1\.5; a probability"):
        PseudoLabelConfig(present_threshold=1.5)


@pytest.fixture
def runs(training_data, tiny_experiment, tmp_path):
    """A run per fold: that of fold 0 predicts only the first class, that of fold 1 the second."""
    folders = []
    for fold in training_data.folds:
        model = build_model(tiny_experiment, len(training_data.classes))
        torch.nn.init.zeros_(model.head.detection.weight)
        with torch.no_grad():
            model.head.detection.bias[:] = torch.tensor([-9.0, -9.0, -9.0])
            model.head.detection.bias[fold] = 9.0
        folders.append(tmp_path / "runs" / f"fold{fold}")
        known = {**training_data.digests, "code": {}}
        checkpoint = Checkpoint(tiny_experiment, training_data.classes, fold, trained_on=known)
        save_checkpoint(folders[-1], model, checkpoint)
    return folders


def test_a_recording_is_predicted_only_by_runs_that_did_not_train_on_it(
    runs, training_data, tmp_path
):
    summary = write_pseudo_labels(runs, training_data, tmp_path / "pseudo_labels.csv")
    recordings = training_data.recordings
    timed = read_strong_labels(tmp_path / "pseudo_labels.csv", recordings, training_data.classes)
    assert set(timed["filename"]) == set(recordings["filename"])
    fold = timed["filename"].map(recordings.set_index("filename")["fold"])
    sure = timed[timed["probability"] > 0.9]
    by_fold = sure.groupby(fold[sure.index])["ebird_code"].unique()
    assert by_fold[0].tolist() == [training_data.classes[0]]
    assert by_fold[1].tolist() == [training_data.classes[1]]
    ends = sure.groupby("filename")["offset"].max()
    seconds = recordings.set_index("filename")["seconds"][ends.index]
    assert np.allclose(ends, seconds, atol=0.06), "each is predicted to its end"
    assert summary.n_recordings == len(recordings)
    assert sum(summary.primary.values()) == len(recordings)
    predicted = [training_data.classes[fold] for fold in recordings["fold"]]
    assert summary.primary["confirmed"] == (recordings["ebird_code"] == predicted).sum() > 0


def test_folds_without_a_run_keep_their_labels(runs, training_data, tmp_path, caplog):
    summary = write_pseudo_labels(runs[:1], training_data, tmp_path / "pseudo_labels.csv")
    in_fold = (training_data.recordings["fold"] == 0).sum()
    assert summary.n_recordings == in_fold
    assert summary.n_unchanged == len(training_data.recordings) - in_fold
    assert "no run held out fold 1: " in caplog.text


def test_a_recording_that_cannot_be_read_keeps_its_labels(runs, training_data, tmp_path, caplog):
    broken = tmp_path / "broken.mp3"
    broken.write_bytes(b"<html>" * 100)
    recordings = training_data.recordings.copy()
    recordings.loc[recordings.index[0], "path"] = str(broken)
    data = replace(training_data, recordings=recordings)
    summary = write_pseudo_labels(runs, data, tmp_path / "pseudo_labels.csv")
    assert summary.n_unchanged == 1
    assert "broken.mp3" in caplog.text
    assert "its labels stay unchanged" in caplog.text


def test_runs_of_other_data_are_refused(runs, training_data, tmp_path):
    path = tmp_path / "pseudo_labels.csv"
    with pytest.raises(ValueError, match="checkpoint of other classes"):
        write_pseudo_labels(runs, replace(training_data, classes=("amecro", "zzz")), path)
    recordings = training_data.recordings[training_data.recordings["fold"] == 0]
    with pytest.raises(ValueError, match=r"fold0 .*the folds are different"):
        write_pseudo_labels(runs, replace(training_data, recordings=recordings), path)
    assert not path.exists()


def test_the_summary_counts_each_label_once():
    recordings = pd.DataFrame(
        {
            "filename": ["XC1.mp3", "XC2.mp3", "XC3.mp3"],
            "ebird_code": ["amecro", "bkcchi", "norcar"],
            "secondary_codes": [("bkcchi", "norcar"), ("amecro",), ("amecro",)],
            "seconds": [10.0, 20.0, 10.0],
        }
    )
    rows = [
        ("XC1.mp3", "amecro", 0.0, 9.0, "uncertain", 0.9),
        ("XC1.mp3", "amecro", 1.0, 2.0, "present", 0.9),
        ("XC1.mp3", "amecro", 4.0, 7.0, "present", 0.9),
        ("XC1.mp3", "bkcchi", 0.0, 9.0, "uncertain", 0.3),
        ("XC3.mp3", "norcar", 0.0, 5.0, "present", 0.2),
        ("XC3.mp3", "norcar", 0.0, 10.0, "uncertain", 0.2),
        ("XC3.mp3", "amecro", 0.0, 2.0, "present", 0.6),
        ("XC3.mp3", "bkcchi", 0.0, 2.0, "present", 0.95),
    ]
    names = ["filename", "ebird_code", "onset", "offset", "state", "probability"]
    labels = pd.DataFrame(rows, columns=names)
    summary = PseudoLabelSummary.of(labels, recordings, CONFIG)
    assert summary == PseudoLabelSummary(
        n_recordings=2,
        n_unchanged=1,
        primary={"confirmed": 1, "uncertain": 1, "dropped": 0},
        secondary={"confirmed": 1, "uncertain": 1, "dropped": 1},
        added={"present": 1, "uncertain": 0},
        primary_share=0.45,
    )
    assert "primary labels: 1 confirmed, 1 uncertain, 0 dropped" in str(summary)
    assert "45%" in str(summary)


@pytest.mark.slow
def test_pseudo_labels_are_nearer_to_the_truth_than_labels_of_whole_recordings(
    training_data, demo_folder, tiny_experiment, tmp_path
):
    """Every third recording gets a secondary label of a species that is not in it."""
    data, truth = with_wrong_labels(training_data, demo_folder)
    small = find_experiment("small_plain")
    data_config = {"clips_per_epoch": 128, "batch_size": 16}
    experiment = replace_nested(
        small, train={"epochs": 10, "validate_every": 10, "data": data_config}
    )
    runs = plan_runs([experiment], training_data, None, tmp_path / "runs")
    train_many(runs, training_data, RunOptions(workers=0))
    path = tmp_path / "pseudo_labels.csv"
    summary = write_pseudo_labels([run.folder for run in runs], data, path)
    timed = StrongTargets(
        data.recordings, data.classes, read_strong_labels(path, data.recordings, data.classes)
    )
    weak = make_targets(data.recordings, data.classes, 1.0)
    there, given, timed_targets = [], [], []
    for row, filename in enumerate(data.recordings["filename"]):
        for start in np.arange(0, data.recordings["seconds"].iloc[row] - 2, 0.5):
            there.append([is_heard(truth[filename], code, start) for code in data.classes])
            given.append(weak[row])
            timed_targets.append(timed.find(row, start, 2.0))
    there, given, target = np.array(there), np.array(given), np.array(timed_targets)
    known = target != IGNORE_TARGET
    assert known.mean() > 0.75, str(summary)
    assert (target != there)[known].sum() < (given != there)[known].sum()
    assert (target != there)[known].sum() < 0.5 * (given != there).sum()


def with_wrong_labels(data, folder):
    """Return the data with wrong secondary labels, and the songs of each recording."""
    settings = json.loads((folder / "demo.json").read_text())["config"]
    plans = plan_demo(config_from_dict(DemoConfig, settings)).recordings
    truth = {f"XC{plan.xc_id}.mp3": plan.songs for plan in plans}
    recordings, generator = data.recordings.copy(), np.random.default_rng(0)
    labels = []
    for filename, codes in zip(recordings["filename"], recordings["secondary_codes"], strict=True):
        absent = set(data.classes) - {event.ebird_code for event in truth[filename]}
        added = generator.permutation(sorted(absent))[: generator.random() < 1 / 3]
        labels.append((*codes, *added))
    recordings["secondary_codes"] = labels
    return replace(data, recordings=recordings), truth


def is_heard(events, code, start):
    return any(event.ebird_code == code and event.counts_in(start, start + 2) for event in events)
