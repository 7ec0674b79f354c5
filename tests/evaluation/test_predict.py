"""Runs predict the recordings that they were not trained on, and all of it can be read back."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import soundfile

from birdcall.audio.reading import AudioError, read_audio
from birdcall.data.folds import TRAINING_ONLY
from birdcall.data.targets import IGNORE_TARGET, make_targets
from birdcall.evaluation.metrics import average_precision, macro_average
from birdcall.evaluation.predict import (
    find_all_unlabelled,
    held_out_birds,
    predict_held_out,
    predict_out_of_fold,
    predict_unlabelled,
    write_oof_parquet,
)
from birdcall.evaluation.scoring import evaluate
from birdcall.evaluation.simulated_audio import SoundscapeRenderer, salient_segment_finder
from birdcall.evaluation.simulation import (
    SalientSegment,
    SimulationConfig,
    describe_events,
    plan_soundscapes,
)
from birdcall.evaluation.tables import RECORDINGS
from birdcall.inference.engine import predict_files, predict_waveforms
from birdcall.inference.ensemble import load_ensemble
from birdcall.models.checkpoint import SETTINGS_FILE, read_checkpoint
from birdcall.training.resume import read_runs
from birdcall.training.step import VALIDATION_SECONDS, validate

RATE = 32_000


@pytest.fixture(scope="module")
def predicted(held_out):
    return held_out.out_of_fold


def test_every_recording_is_predicted_by_the_run_that_did_not_train_on_it(
    predicted, training_data, trained_runs
):
    assert list(predicted) == ["other", "tiny"]
    part = predicted["tiny"]
    rng = np.random.default_rng(0)
    for row in rng.choice(len(training_data.recordings), 6, replace=False):
        recording = training_data.recordings.iloc[row]
        (folder,) = [
            run for run in trained_runs if run.parts[-2:] == ("tiny", f"fold{recording['fold']}")
        ]
        waveform = read_audio(training_data.folder / recording["path"], 32_000)
        assert len(waveform) < VALIDATION_SECONDS * 32_000
        expected = predict_waveforms(load_ensemble([folder]), {32_000: waveform})
        subset = (part.segments["row"] == row).to_numpy()
        assert set(part.segments["path"][subset]) == {recording["path"]}
        assert set(part.segments["fold"][subset]) == {recording["fold"]}
        assert list(part.segments["seconds"][subset]) == [
            5.0 * (k + 1) for k in range(expected.clipwise.shape[1])
        ]
        np.testing.assert_allclose(
            part.predictions.clipwise[0, subset], expected.clipwise[0], atol=1e-5
        )
        np.testing.assert_allclose(
            part.predictions.framewise[0, subset], expected.framewise[0], atol=1e-5
        )


def test_the_maximum_by_recording_is_the_highest_segment_as_in_training(
    predicted, training_data, trained_runs
):
    clipwise, framewise = predicted["tiny"].max_by_recording(len(training_data.recordings))
    assert not np.isnan(clipwise).any()
    assert (framewise >= clipwise - 1e-6).mean() > 0.5
    of_fold = (training_data.recordings["fold"] == 0).to_numpy()
    (folder,) = [run for run in trained_runs if run.parts[-2:] == ("tiny", "fold0")]
    held_out, ensemble = training_data.recordings[of_fold], load_ensemble([folder])
    paths = {path: training_data.folder / path for path in held_out["path"]}
    results = predict_files(ensemble, paths, limit_seconds=VALIDATION_SECONDS)
    expected = [result.clipwise.mean(axis=0).max(axis=0) for _, result in results]
    np.testing.assert_allclose(clipwise[of_fold], expected, atol=1e-5)
    targets = make_targets(held_out, training_data.classes, None)
    known = average_precision(targets > 0, clipwise[of_fold], targets != IGNORE_TARGET)
    score = validate(ensemble, held_out, training_data)
    assert score["macro_ap"] == pytest.approx(macro_average(known), abs=1e-4)
    assert (score["classes"], score["left_out"]) == (len(training_data.classes), 0)
    assert read_checkpoint(folder).score == score


def test_a_validation_leaves_out_classes_that_the_training_part_lacks(training_data, trained_runs):
    (folder,) = [run for run in trained_runs if run.parts[-2:] == ("tiny", "fold0")]
    first, second, *others = training_data.classes
    recordings = training_data.recordings
    is_moved = (recordings["ebird_code"] == first) & (recordings["fold"] == 1)
    recordings = recordings.assign(ebird_code=recordings["ebird_code"].mask(is_moved, second))
    data, held_out = replace(training_data, recordings=recordings), recordings[recordings.fold == 0]
    ensemble = load_ensemble([folder])
    paths = {path: data.folder / path for path in held_out["path"]}
    results = predict_files(ensemble, paths, limit_seconds=VALIDATION_SECONDS)
    probabilities = np.array([item.clipwise.mean(axis=0).max(axis=0) for _, item in results])
    targets = make_targets(held_out, data.classes, None)
    expected = average_precision(targets > 0, probabilities, targets != IGNORE_TARGET)[1:]
    score = validate(ensemble, held_out, data)
    assert score["macro_ap"] == pytest.approx(expected.mean(), abs=1e-4)
    assert (score["classes"], score["left_out"]) == (1 + len(others), 1)


@pytest.mark.parametrize(
    ("column", "change", "name"),
    [
        ("fold", lambda fold: 1 - fold, "folds"),
        ("ebird_code", lambda code: code.to_numpy()[::-1], "tables of recordings"),
        ("sha256", lambda sha256: "1" + sha256.str[1:], "audio files"),
    ],
)
def test_runs_that_were_trained_on_other_data_are_refused(
    training_data, trained_runs, held_out_options, column, change, name
):
    recordings = training_data.recordings
    other = recordings.assign(**{column: change(recordings[column])})
    with pytest.raises(ValueError, match=rf"other.fold0 .*{name}"):
        predict_held_out(trained_runs, replace(training_data, recordings=other), held_out_options)


def test_runs_that_were_trained_on_other_noise_are_refused(
    training_data, trained_runs, held_out_options
):
    other = replace(training_data, noise_files=training_data.noise_files[1:])
    with pytest.raises(ValueError, match=r"other.fold0 .*noise"):
        predict_held_out(trained_runs, other, held_out_options)


def test_a_run_that_does_not_know_its_data_is_refused(
    training_data, trained_runs, held_out_options, tmp_path
):
    run = tmp_path / "fold0"
    shutil.copytree(trained_runs[0], run)
    settings = json.loads((run / SETTINGS_FILE).read_text())
    del settings["trained_on"]
    (run / SETTINGS_FILE).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"fold0 .*--overwrite"):
        predict_held_out([run], training_data, held_out_options)


def test_a_run_of_another_network_is_named_in_a_warning(
    training_data, trained_runs, tmp_path, caplog
):
    run = tmp_path / "fold0"
    shutil.copytree(trained_runs[0], run)
    settings = json.loads((run / SETTINGS_FILE).read_text())
    settings["trained_on"]["code"]["models.sed"] = "0" * 16
    (run / SETTINGS_FILE).write_text(json.dumps(settings))
    assert [checkpoint.fold for checkpoint in read_runs([run], training_data)] == [0]
    (record,) = caplog.records
    assert str(run) in record.getMessage()
    assert "models/sed.py" in record.getMessage()


def test_recordings_that_no_run_held_out_are_nan(training_data, trained_runs):
    of_fold = [folder for folder in trained_runs if folder.name == "fold1"]
    predicted = predict_out_of_fold(load_ensemble(of_fold), training_data)
    clipwise, _ = predicted["other"].max_by_recording(len(training_data.recordings))
    missing = np.isnan(clipwise).all(axis=1)
    assert np.array_equal(missing, (training_data.recordings["fold"] == 0).to_numpy())
    assert not np.isnan(clipwise[~missing]).any()


def test_a_second_time_no_audio_is_read(
    training_data, trained_runs, predicted, tmp_path, monkeypatch
):
    ensemble = load_ensemble(trained_runs)
    predict_out_of_fold(ensemble, training_data, cache_folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr("birdcall.evaluation.predictions.predict_audio", None)
    again = predict_out_of_fold(ensemble, training_data, cache_folder=tmp_path)
    for name, part in predicted.items():
        np.testing.assert_allclose(
            again[name].predictions.clipwise, part.predictions.clipwise, atol=1e-6
        )
        pd.testing.assert_frame_equal(again[name].segments, part.segments)


def test_a_recording_that_does_not_decode_is_named_and_costs_its_own_rows(
    training_data, trained_runs, monkeypatch, caplog, tmp_path
):
    broken = training_data.recordings["path"].iloc[0]

    def open_recording(path, limit_seconds):
        def read(sample_rates):
            if str(path).endswith(broken):
                raise AudioError(path, "is no audio")
            return {32_000: np.zeros(32_000, np.float32)}

        return read

    monkeypatch.setattr("birdcall.evaluation.predict.open_recording", open_recording)
    ensemble = load_ensemble(trained_runs)
    predicted = predict_out_of_fold(ensemble, training_data, cache_folder=tmp_path)
    others = set(training_data.recordings["path"]) - {broken}
    for part in predicted.values():
        assert set(part.segments["path"]) == others
        assert np.isnan(part.max_by_recording(len(training_data.recordings))[0][0]).all()
    assert any(broken in message for message in caplog.messages)
    is_broken, broken = broken, "none"  # what failed is tried again, though it is stored
    again = predict_out_of_fold(ensemble, training_data, cache_folder=tmp_path)
    for part in again.values():
        assert set(part.segments["path"]) == others | {is_broken}


def test_the_parquet_has_every_segment_and_every_class(predicted, training_data, tmp_path):
    path = tmp_path / "oof.parquet"
    write_oof_parquet(path, list(predicted.values()), training_data.classes)
    table = pd.read_parquet(path)
    keys = ["experiment", "fold", "path", "ebird_code", "seconds", "output"]
    assert list(table.columns) == [*keys, *training_data.classes]
    assert len(table) == 2 * sum(len(part.segments) for part in predicted.values())
    for name, part in predicted.items():
        for output in ("clipwise", "framewise"):
            subset = table[(table["experiment"] == name) & (table["output"] == output)]
            assert np.array_equal(
                subset[list(training_data.classes)], getattr(part.predictions, output)[0]
            )
            assert np.array_equal(subset["seconds"], part.segments["seconds"])
            assert list(subset["path"]) == list(part.segments["path"])
    assert pq.ParquetFile(path).num_row_groups >= 4  # an experiment at a time
    assert [path.name for path in tmp_path.iterdir()] == ["oof.parquet"]


def test_recordings_of_every_training_part_are_scored_nowhere(held_out, training_data):
    recordings = training_data.recordings
    fold = recordings["fold"].where(recordings.index != 0, TRAINING_ONLY)
    data = replace(training_data, recordings=recordings.assign(fold=fold))
    predicted = predict_out_of_fold(held_out.ensemble, data)
    assert recordings["path"][0] not in set(predicted["tiny"].segments["path"])
    scored = evaluate(replace(held_out, data=data, out_of_fold=predicted)).scores
    rows = scored[(scored["audio"] == RECORDINGS) & (scored["metric"] == "macro_ap")]
    assert set(rows["rows"]) == {len(recordings) - 1}
    segment = SalientSegment(onset=0.0, offset=1.0, low_hz=1000.0, high_hz=2000.0)
    soundscapes = plan_soundscapes(data.recordings, 0, held_out.config, lambda _: segment)
    assert recordings["path"][0] not in set(describe_events(soundscapes)["path"])


# --- unlabelled soundscapes ---


@pytest.fixture
def site(demo_folder, tmp_path):
    """A folder with a soundscape, and one that does not decode."""
    example, *_ = sorted((demo_folder / "test_audio").iterdir())
    (tmp_path / "site").mkdir()
    shutil.copy(example, tmp_path / "site" / f"night{example.suffix}")
    (tmp_path / "site" / "torn.wav").write_bytes(b"RIFF")
    return tmp_path / "site"


def test_unlabelled_soundscapes_are_predicted_except_those_that_do_not_decode(
    training_data, trained_runs, site, caplog
):
    ensemble = load_ensemble(trained_runs[:1])
    files = find_all_unlabelled([site.parent, site], training_data, [])  # each file once
    assert "torn.wav" in caplog.text
    predicted = predict_unlabelled(ensemble, files)
    assert predicted.starts == (0,)
    (path,) = site.glob("night*")
    expected = dict(predict_files(ensemble, {"night": path}))["night"]
    np.testing.assert_allclose(predicted.clipwise, expected.clipwise, atol=1e-6)
    assert predict_unlabelled(ensemble, {}) is None


def test_an_unlabelled_soundscape_that_is_labelled_is_refused(training_data, demo_folder, tmp_path):
    path, *_ = sorted((demo_folder / "example_test_audio").iterdir())
    shutil.copy(path, tmp_path / f"renamed{path.suffix}")
    with pytest.raises(ValueError, match=rf"renamed.*{path.name}"):
        find_all_unlabelled([tmp_path], training_data, [])


def test_a_folder_of_unlabelled_soundscapes_without_sound_is_refused(training_data, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        find_all_unlabelled([tmp_path], training_data, [])


def test_distractors_are_other_birds_that_no_run_of_the_fold_has_heard(
    training_data, tmp_path, caplog
):
    files = [tmp_path / "bird1" / f"{number}.wav" for number in range(6)]
    files[0].parent.mkdir()
    time = np.arange(RATE) / RATE
    for number, file in enumerate(files):
        soundfile.write(file, np.sin(2 * np.pi * (2000 + 300 * number) * time), RATE)
    files[0].write_bytes(b"<html>no audio</html>" * 50)
    data = replace(training_data, other_birds=files)
    find_segment = salient_segment_finder(data, RATE)
    of_folds = []
    for fold in data.folds:
        birds = held_out_birds(data, fold, find_segment)
        used = {(data.folder / path).resolve() for path in birds["path"]}
        assert used == set(data.split_other_birds(fold)[1]) - {files[0]}
        of_folds.append(birds)
    assert "0.wav" in caplog.text
    config = SimulationConfig(n_soundscapes=8, distractor_every_seconds=5.0)
    birds = of_folds[1]
    planned = plan_soundscapes(data.recordings, 1, config, find_segment, other_birds=birds)
    distractors = [event for item in planned for event in item.distractors]
    assert {event.path for event in distractors} == set(birds["path"])
    assert {event.transposition for event in distractors} == {1.0}
    renderer = SoundscapeRenderer.for_fold(data, 1, config)
    assert np.abs(renderer.read_event(distractors[0])).max() > 0.1
