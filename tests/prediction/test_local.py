"""Your own recordings: a bad file stops nothing, no result is lost, none is predicted twice."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
from helpers import RATE, read_audacity_labels, read_detections

from birdcall.__main__ import main
from birdcall.audio.reading import AudioError
from birdcall.evaluation.labelled import read_truth
from birdcall.inference import engine
from birdcall.inference import engine as engine_module
from birdcall.inference.ensemble import load_ensemble
from birdcall.inference.events import Event
from birdcall.inference.predictions import OutputOptions, SegmentPredictions
from birdcall.inference.tables import read_labels_beside, read_raven_table
from birdcall.kaggle.submission import LoadedPackage, open_package
from birdcall.prediction import local as local_module
from birdcall.prediction import package as package_module
from birdcall.prediction.local import (
    ResultOptions,
    fingerprint_of,
    predict_locally,
    predict_recordings,
    write_results,
)
from birdcall.prediction.package import (
    EmbeddingWriter,
    Recording,
    RecordingResult,
    detect_recordings,
    find_recordings,
)
from birdcall.report.soundscape import SoundscapePageWriter
from birdcall.storage.files import write_atomically
from birdcall.storage.store import Journal


@pytest.fixture(scope="module")
def opened(package):
    return open_package(package, "cpu")


def write_recording(path, seconds, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    envelope = np.repeat(generator.random(round(seconds * 4) + 1), RATE // 4)
    n_samples = round(seconds * RATE)
    waveform = generator.normal(0, 0.2, n_samples) * envelope[:n_samples]
    soundfile.write(path, waveform.astype("f4"), RATE)


# --- which recordings ----------------------------------------------------------------------------


def test_recordings_of_files_folders_and_globs_are_listed_once_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.wav", "a/deep/y.mp3", "b/x.wav", "b/notes.txt", "z.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    recordings = find_recordings(["a", "*/x.wav", "z.flac", tmp_path / "b"])
    assert [(str(recording.path), recording.name) for recording in recordings[:4]] == [
        ("a/deep/y.mp3", "deep/y.mp3"),
        ("a/x.wav", "x.wav"),
        ("b/x.wav", "2/x.wav"),  # another recording of the same name
        ("z.flac", "z.flac"),
    ]
    assert len({recording.name for recording in recordings}) == len(recordings)


def names_of(recordings):
    return {recording.name: recording.path for recording in recordings}


def test_numbers_of_recordings_with_one_name_do_not_collide(tmp_path):
    for name in ("cardA/rec.wav", "cardA/2/rec.wav", "cardB/rec.wav", "cardC/rec.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = names_of(find_recordings([tmp_path / f"card{card}" for card in "ABC"]))
    assert names == {
        "rec.wav": tmp_path / "cardA" / "rec.wav",
        "2/rec.wav": tmp_path / "cardA" / "2" / "rec.wav",
        "3/rec.wav": tmp_path / "cardB" / "rec.wav",
        "4/rec.wav": tmp_path / "cardC" / "rec.wav",
    }


def test_names_that_a_disk_may_take_for_one_are_told_apart(tmp_path):
    """macOS and Windows write their results to one file."""
    for name in ("1/a.wav", "2/A.wav", "3/Gr\u00fcn.wav", "4/Gru\u0308n.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    names = [recording.name for recording in find_recordings([tmp_path / n for n in "1234"])]
    assert names == ["a.wav", "2/A.wav", "Gr\u00fcn.wav", "2/Gru\u0308n.wav"]


def test_a_file_under_several_spellings_is_one_recording(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.wav").touch()
    (tmp_path / "link.wav").symlink_to("a.wav")
    spellings = ["./a.wav", tmp_path / "a.wav", "deep/../a.wav", "link.wav", "*.wav", "."]
    assert names_of(find_recordings(spellings)) == {"a.wav": Path("a.wav")}


def test_of_a_glob_sound_is_taken_and_folders_are_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.wav", "in/a.txt", "in/deep/b.flac", "in/phone.m4a", "in/odd.dat"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(names_of(find_recordings(["in/*"]))) == ["a.wav", "b.flac", "phone.m4a"]
    assert list(names_of(find_recordings(["in/*.dat"]))) == ["odd.dat"]


@pytest.mark.parametrize("path", ["nowhere", "no*.wav"])
def test_a_path_without_recordings_is_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match="no such recording or folder, nor does any match"):
        find_recordings([tmp_path / path])
    with pytest.raises(FileNotFoundError, match=r"no recording; known are \.mp3"):
        find_recordings([tmp_path])


# --- results -------------------------------------------------------------------------------------


def test_a_bad_file_is_reported_and_the_others_are_predicted(opened, tmp_path):
    write_recording(tmp_path / "a.wav", 12)
    (tmp_path / "b.mp3").write_text("<html>")
    (tmp_path / "c.wav").touch()
    write_recording(tmp_path / "d.wav", 0.3)
    results = {
        recording.name: result
        for recording, result in detect_recordings(find_recordings([tmp_path]), opened)
    }
    assert "cannot be decoded" in results["b.mp3"].reason
    assert results["c.wav"].reason
    assert results["a.wav"].seconds == 12
    assert results["d.wav"].seconds == pytest.approx(0.3)
    assert results["a.wav"].events


def test_events_stay_where_they_are_in_a_longer_recording(opened, tmp_path):
    """The same audio, 20 minutes later: the same events, 20 minutes later."""
    write_recording(tmp_path / "short.wav", 60, seed=3)
    short, _ = soundfile.read(tmp_path / "short.wav")
    quiet = np.zeros(20 * 60 * RATE)
    soundfile.write(tmp_path / "long.wav", np.concatenate([quiet, short]), RATE)
    results = {
        recording.name: result
        for recording, result in detect_recordings(find_recordings([tmp_path]), opened)
    }
    late = [event for event in results["long.wav"].events if event.onset >= 1210]
    early = [event for event in results["short.wav"].events if event.onset >= 10]
    assert len(early) > 3
    assert [(e.ebird_code, e.onset + 1200, e.offset + 1200) for e in early] == [
        (e.ebird_code, pytest.approx(e.onset), pytest.approx(e.offset)) for e in late
    ]


# --- tables --------------------------------------------------------------------------------------

EVENTS = (Event("amecro", 0.5, 2.0, 0.9), Event("norcar", 3.0, 4.5, 0.4))


@pytest.fixture
def results():
    """Two recordings, one without a bird, and one that failed."""
    return {
        Recording(Path("in/dawn <1>.mp3"), "dawn <1>.mp3"): RecordingResult(5.0, EVENTS),
        Recording(Path("in/quiet.wav"), "deep/quiet.wav"): RecordingResult(5.0),
        Recording(Path('in/"bad".wav'), "bad.wav"): RecordingResult(
            0.0, reason='is "no" audio,\nat all'
        ),
    }


def test_every_format_has_the_same_events(results, tmp_path):
    summary = write_results(
        results, tmp_path, ResultOptions(("csv", "parquet", "jsonl", "raven", "audacity"))
    )
    assert "2 detections in 2 recordings" in summary
    assert "1 failed" in summary
    expected = {"in/dawn <1>.mp3": list(EVENTS)}
    assert read_detections(tmp_path / "detections.csv") == expected
    assert read_detections(tmp_path / "detections.jsonl") == expected
    parquet = pd.read_parquet(tmp_path / "detections.parquet")
    csv = pd.read_csv(tmp_path / "detections.csv")
    pd.testing.assert_frame_equal(parquet.astype(csv.dtypes), csv)
    assert read_raven_table(tmp_path / "raven" / "dawn <1>.mp3.selections.txt") == list(EVENTS)
    assert read_audacity_labels(tmp_path / "audacity" / "dawn <1>.mp3.labels.txt") == list(EVENTS)
    assert read_raven_table(tmp_path / "raven" / "deep" / "quiet.wav.selections.txt") == []
    failed = pd.read_csv(tmp_path / "failed.csv")
    assert failed.to_numpy().tolist() == [['in/"bad".wav', 'is "no" audio,\nat all']]


def test_raven_tables_are_truth_that_evaluate_reads(tmp_path):
    """They lie beside the recordings, corrected by hand, when they are read again."""
    write_recording(tmp_path / "mine" / "dawn.wav", 5)
    (recording,) = find_recordings([tmp_path / "mine"])
    write_results({recording: RecordingResult(5.0, EVENTS)}, tmp_path / "out", ResultOptions())
    table = tmp_path / "out" / "raven" / "dawn.wav.selections.txt"
    shutil.copyfile(table, tmp_path / "mine" / "dawn.selections.txt")
    truth = read_truth([tmp_path / "mine"], ["amecro", "norcar"])
    assert list(truth.annotations["ebird_code"]) == ["amecro", "norcar"]


def test_events_that_the_options_exclude_are_left_out(results, tmp_path):
    write_results(results, tmp_path, ResultOptions(("csv",), min_confidence=0.5))
    assert read_detections(tmp_path / "detections.csv") == {"in/dawn <1>.mp3": [EVENTS[0]]}
    write_results(results, tmp_path, ResultOptions(("csv",), species=("norcar",)))
    assert read_detections(tmp_path / "detections.csv") == {"in/dawn <1>.mp3": [EVENTS[1]]}
    assert {path.name for path in tmp_path.iterdir()} == {"detections.csv", "failed.csv"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"formats": ("excel",)}, "format is 'excel'"),
        ({"min_confidence": 1.5}, "min_confidence is 1.5"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ResultOptions(**options)


def test_a_species_that_the_model_does_not_know_is_refused():
    with pytest.raises(ValueError, match="knows no species aldfly"):
        ResultOptions(species=("norcar", "aldfly")).for_classes(("amecro", "norcar"))


@pytest.mark.parametrize("name", ["amecro", "AMECRO", ' "amecro "', "American crow"])
def test_species_are_given_by_code_or_name_in_any_case(name):
    options = ResultOptions(species=(name,)).for_classes(("amecro", "norcar"))
    assert options.species == ("amecro",)


def test_names_do_not_lead_out_of_the_output(tmp_path):
    outside = {Recording(Path("x.wav"), "../../x.wav"): RecordingResult(5.0, EVENTS)}
    with pytest.raises(ValueError, match="give a relative path"):
        write_results(outside, tmp_path / "out", ResultOptions())
    assert not list(tmp_path.rglob("*x.wav*"))


def test_embeddings_are_the_input_of_the_heads_for_each_segment(opened, tmp_path):
    write_recording(tmp_path / "in" / "a.wav", 32)
    (tmp_path / "in" / "bad.wav").touch()
    ensemble = opened.ensemble
    recordings = find_recordings([tmp_path / "in"])
    outputs = OutputOptions(frames=True, embedding=True)
    list(detect_recordings(recordings, opened, [EmbeddingWriter(tmp_path)], outputs))
    assert [path.name for path in (tmp_path / "embeddings").iterdir()] == ["a.wav.parquet"]
    table = pd.read_parquet(tmp_path / "embeddings" / "a.wav.parquet")
    assert list(table["onset"]) == [5.0 * number for number in range(7)]
    vectors = np.stack(table["embedding"])
    sizes = [m.checkpoint.experiment.model.temporal_size for m in ensemble.members]
    assert vectors.shape == (7, sum(sizes))
    import torch

    waveform, _ = soundfile.read(tmp_path / "in" / "a.wav", dtype="float32")
    with torch.inference_mode():
        model = ensemble.members[1].model
        segment = torch.from_numpy(waveform[5 * RATE : 10 * RATE])[None]
        expected = model.features(model.frontend(segment)).mean(dim=2)[0]
    np.testing.assert_allclose(vectors[1, sizes[0] :], expected, atol=1e-4)


def test_results_in_float32_are_not_taken_up_where_bfloat16_runs(package, opened):
    runtimes = []
    for precision in ("float32", "bfloat16"):
        export = SimpleNamespace(runtime="OpenVINO", version="1", precision=precision)
        members = [replace(member, export=export) for member in opened.ensemble.members]
        ensemble = SimpleNamespace(members=members, device=opened.ensemble.device)
        fingerprint = fingerprint_of(package, ResultOptions(), opened._replace(ensemble=ensemble))
        runtimes.append(fingerprint.pop("runtimes"))
    assert runtimes == [["OpenVINO 1 float32"], ["OpenVINO 1 bfloat16"]]


@pytest.mark.parametrize("n_times", [1, 600])
def test_a_recording_that_breaks_off_leaves_no_embeddings_and_the_others_do(
    opened, tmp_path, monkeypatch, n_times
):
    """It breaks off early, or after a thousand segments: the first are in a file already."""
    for name in "abc":
        write_recording(tmp_path / "in" / f"{name}.wav", 7, ord(name))
    recordings = find_recordings([tmp_path / "in"])
    real = package_module.predict_stream

    def break_off(ensemble, sources, outputs):
        for name, item in real(ensemble, sources, outputs):
            if name != "b.wav":
                yield name, item
            elif isinstance(item, SegmentPredictions):
                yield name, replace(item, embedding=np.repeat(item.embedding, n_times, axis=0))
                has_file = bool(list((tmp_path / "embeddings").glob(".*")))
                assert has_file == (n_times > 1)
            else:
                yield name, AudioError(tmp_path / "in" / name, "breaks off")

    monkeypatch.setattr(package_module, "predict_stream", break_off)
    outputs = OutputOptions(embedding=True)
    results = dict(detect_recordings(recordings, opened, [EmbeddingWriter(tmp_path)], outputs))
    assert [result.reason for result in results.values()] == ["", "breaks off", ""]
    written = sorted((tmp_path / "embeddings").iterdir())
    assert [path.name for path in written] == ["a.wav.parquet", "c.wav.parquet"]
    for path in written:
        assert list(pd.read_parquet(path)["onset"]) == [0.0, 5.0]


# --- resuming ------------------------------------------------------------------------------------


def predict(paths, output, package, opened, options=ResultOptions(("csv",)), predicted=None):  # noqa: B008
    """Predict as the command does; ``predicted`` collects the names of what is predicted now."""
    recordings = find_recordings(paths)
    pages = None
    if options.view:
        pages = SoundscapePageWriter(
            output / "view",
            opened.decision,
            classes=opened.ensemble.classes,
            members=tuple(member.name for member in opened.ensemble.members),
        )
    paths = [recording.path for recording in recordings] if options.view else []
    labels = read_labels_beside(paths, opened.ensemble.classes)
    predictor = predict_locally(opened, output, options, pages=pages, labels=labels)

    def counted(remaining):
        if predicted is not None:
            predicted.extend(recording.name for recording in remaining)
        return predictor(remaining)

    with Journal(output / "journal.jsonl", fingerprint_of(package, options, opened)) as journal:
        return predict_recordings(
            recordings, counted, journal, output, options=options, pages=pages, labels=labels
        )


def page_data(path):
    return json.loads(path.read_text().split("id='data'>")[1].split("</script>")[0])


def test_a_page_of_each_recording_shows_the_events_of_the_tables(opened, package, tmp_path):
    write_recording(tmp_path / "in" / "<b>&.wav", 12)
    write_recording(tmp_path / "in" / "deep" / "a.wav", 0.5)
    (tmp_path / "in" / "bad.mp3").write_text("<html>")
    options = ResultOptions(("csv",), view=True)
    summary = predict(
        [tmp_path / "in"], tmp_path / "out", package=package, opened=opened, options=options
    )
    view = tmp_path / "out" / "view"
    assert f"look at {view / 'index.html'}" in summary
    tables = read_detections(tmp_path / "out" / "detections.csv")
    for name in ("<b>&.wav", "deep/a.wav"):
        data = page_data(view / f"{name}.html")
        events = tables.get(str(tmp_path / "in" / name), [])
        assert [tuple(event) for event in data["detections"]] == [
            (event.ebird_code, event.onset, event.offset, event.confidence) for event in events
        ]
        assert data["outputs"] == ["ensemble", *(member.name for member in opened.ensemble.members)]
        assert data["nFrames"] == 50 * max(1, -(-int(data["seconds"]) // 5))
    index = (view / "index.html").read_text()
    assert "href='deep/a.wav.html'" in index and "cannot be decoded" in index
    assert "%3Cb%3E%26.wav.html" in index and "<b>&" not in index
    assert not (view / "bad.mp3.html").exists()


def test_a_name_that_is_no_utf8_is_a_name_like_others(opened, package, tmp_path):
    name = os.fsdecode(b"Gr\xfcnspecht.wav")
    write_recording(tmp_path / "in" / "a.wav", 6, 1)
    write_recording(tmp_path / "in" / "b.wav", 6, 1)
    (tmp_path / "in" / "b.wav").rename(tmp_path / "in" / name)
    (tmp_path / "in" / os.fsdecode(b"Gr\xfcnspecht.txt")).write_text(
        "Begin Time (s)\tEnd Time (s)\tSpecies\n1\t2\tAmerican crow\n"
    )
    formats, output = ("csv", "jsonl", "parquet", "raven"), tmp_path / os.fsdecode(b"\xf6ut")
    options, predicted = ResultOptions(formats, embeddings=True, view=True), []
    for _ in range(2):
        predict([tmp_path / "in"], output, package, opened, options=options, predicted=predicted)
    assert sorted(predicted) == ["Gr%FCnspecht.wav", "a.wav"]  # once
    events = read_detections(output / "detections.csv")
    assert read_detections(output / "detections.jsonl") == events
    with (output / "detections.parquet").open("rb") as file:  # pyarrow takes no such path
        assert set(pd.read_parquet(file)["recording"]) == set(events)
    other, plain = (events[str(tmp_path / "in" / name)] for name in ("Gr%FCnspecht.wav", "a.wav"))
    assert other == plain
    assert read_raven_table(output / "raven" / "Gr%FCnspecht.wav.selections.txt") == other
    assert (output / "embeddings" / "Gr%FCnspecht.wav.parquet").is_file()
    page = page_data(output / "view" / "Gr%FCnspecht.wav.html")
    assert page["truth"] == [["amecro", 1.0, 2.0]]
    assert "href='Gr%25FCnspecht.wav.html'" in (output / "view" / "index.html").read_text()


def test_sound_in_a_format_that_is_not_read_has_a_reason_with_advice(opened, package, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "phone.M4A").write_bytes(b"no sound that is read")
    with pytest.raises(ValueError, match=r"phone\.M4A"):  # it is all that there is
        predict([tmp_path / "in"], tmp_path / "out", package, opened)
    ((path, reason),) = pd.read_csv(tmp_path / "out" / "failed.csv").to_numpy()
    assert path == str(tmp_path / "in" / "phone.M4A") and "convert" in reason


def test_labels_beside_a_recording_are_shown_once_they_are_there(opened, package, tmp_path):
    write_recording(tmp_path / "in" / "a.wav", 7)
    write_recording(tmp_path / "in" / "b.wav", 7)
    options, predicted = ResultOptions(("csv",), view=True), []

    def run():
        predict(
            [tmp_path / "in"],
            tmp_path / "out",
            package=package,
            opened=opened,
            options=options,
            predicted=predicted,
        )

    run()
    (tmp_path / "in" / "a.selections.txt").write_text(
        "Selection\tBegin Time (s)\tEnd Time (s)\tSpecies Code\tNotes\n1\t1.5\t2\tamecro\tfar\n"
    )
    (tmp_path / "in" / "b.readme.txt").write_text("no table\n")
    run()
    assert predicted == ["a.wav", "b.wav", "a.wav"]
    page = tmp_path / "out" / "view" / "a.wav.html"
    assert page_data(page)["labels"] == [["amecro", 1.5, 2.0, "far"]]
    assert page_data(page)["truth"] == [["amecro", 1.5, 2.0]]
    page.unlink()
    run()
    run()
    assert predicted[3:] == ["a.wav"]
    assert page.is_file()


def test_frames_of_members_average_to_those_of_the_ensemble(opened, tmp_path):
    from birdcall.inference.engine import open_recording, predict_stream

    write_recording(tmp_path / "a.wav", 23)
    sources = {"a": open_recording(tmp_path / "a.wav")}
    outputs = OutputOptions(frames=True, member_frames=True)
    for _, item in predict_stream(opened.ensemble, sources, outputs):
        if isinstance(item, SegmentPredictions):
            np.testing.assert_allclose(item.member_frames.mean(axis=0), item.frames, atol=1e-6)
            by_segment = item.member_frames.reshape(*item.member_frames.shape[:2], -1, 50)
            highest = by_segment.max(axis=3).swapaxes(1, 2)
            assert (highest <= item.framewise + 1e-6).all()
            assert np.abs(highest - item.framewise).max() < 0.05


def test_finished_recordings_are_not_predicted_again_unless_they_change(opened, package, tmp_path):
    for number in range(3):
        write_recording(tmp_path / "in" / f"{number}.wav", 7, number)
    first, again, changed = [], [], []
    predict([tmp_path / "in"], tmp_path / "out", package, opened, predicted=first)
    table = (tmp_path / "out" / "detections.csv").read_bytes()
    predict([tmp_path / "in"], tmp_path / "out", package, opened, predicted=again)
    assert first == ["0.wav", "1.wav", "2.wav"]
    assert again == []
    assert (tmp_path / "out" / "detections.csv").read_bytes() == table
    write_recording(tmp_path / "in" / "1.wav", 9, 1)
    write_recording(tmp_path / "in" / "3.wav", 5, 1)
    predict([tmp_path / "in"], tmp_path / "out", package, opened, predicted=changed)
    assert changed == ["1.wav", "3.wav"]


def test_a_recording_that_failed_is_predicted_once_it_can_be_read(
    opened, package, tmp_path, monkeypatch
):
    """A permission is given, a disk answers again: size and time of the file are the same."""
    for name in "ab":
        write_recording(tmp_path / "in" / f"{name}.wav", 7)
    real, predicted = engine_module.iterate_rates, []

    def refuse(path, *rest):
        if path.name == "a.wav":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest)

    def run():
        predict([tmp_path / "in"], tmp_path / "out", package, opened, predicted=predicted)
        return pd.read_csv(tmp_path / "out" / "failed.csv")["recording"].tolist()

    monkeypatch.setattr(engine_module, "iterate_rates", refuse)
    assert run() == [str(tmp_path / "in" / "a.wav")]
    n_lines = len((tmp_path / "out" / "journal.jsonl").read_text().splitlines())
    assert run() == [str(tmp_path / "in" / "a.wav")]
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == n_lines
    monkeypatch.setattr(engine_module, "iterate_rates", real)
    assert run() == []
    assert predicted == ["a.wav", "b.wav", "a.wav", "a.wav"]
    tables = read_detections(tmp_path / "out" / "detections.csv")
    assert tables[str(tmp_path / "in" / "a.wav")] == tables[str(tmp_path / "in" / "b.wav")]


def test_a_file_that_is_given_and_may_not_be_read_costs_its_rows_only(
    package, tmp_path, monkeypatch, capsys
):
    for name in "ab":
        write_recording(tmp_path / f"{name}.wav", 5)
    real = engine_module.iterate_rates

    def refuse(path, *rest):
        if path.name == "a.wav":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest)

    monkeypatch.setattr(engine_module, "iterate_rates", refuse)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, *rest: Path(path).name != "a.wav" and access(path, *rest)
    )
    command = ["predict", tmp_path / "a.wav", tmp_path / "b.wav", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match="0"):
        main(list(map(str, [*command, "--package", package])))
    assert "in 1 recordings" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "out" / "failed.csv")["recording"].tolist() == [str(command[1])]


@pytest.mark.parametrize("n_bytes", [None, 0, 200])
def test_embeddings_that_were_deleted_or_cut_are_written_again(opened, package, tmp_path, n_bytes):
    for name in "ab":
        write_recording(tmp_path / "in" / f"{name}.wav", 7)
    options, predicted = ResultOptions(("csv",), embeddings=True), []

    def run():
        predict(
            [tmp_path / "in"], tmp_path / "out", package=package, opened=opened, options=options,
            predicted=predicted,
        )  # fmt: skip

    run()
    part = tmp_path / "out" / "embeddings" / "a.wav.parquet"
    before = pd.read_parquet(part)
    if n_bytes is None:
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:n_bytes])
    run()
    run()
    assert predicted == ["a.wav", "b.wav", "a.wav"]
    pd.testing.assert_frame_equal(pd.read_parquet(part), before)


def test_a_shard_that_was_deleted_is_written_again(tmp_path):
    """A cluster writes shards of several recordings."""
    recordings = [Recording(Path(f"{name}.wav"), f"{name}.wav") for name in "abc"]
    predicted = []

    def predictor(remaining):
        for recording in remaining:
            predicted.append(recording.name)
            part = "1.parquet" if recording.name == "c.wav" else "0.parquet"
            (tmp_path / part).write_bytes(b"PAR1")
            yield recording, RecordingResult(5.0, EVENTS, parts=(part,))

    def run():
        with Journal(tmp_path / "journal.jsonl", "x") as journal:
            predict_recordings(
                recordings, predictor, journal, tmp_path, options=ResultOptions(("csv",))
            )

    run()
    run()
    (tmp_path / "0.parquet").unlink()
    run()
    assert predicted == ["a.wav", "b.wav", "c.wav", "a.wav", "b.wav"]
    assert (tmp_path / "0.parquet").exists()


def test_results_of_other_code_are_refused(opened, package, tmp_path, monkeypatch):
    write_recording(tmp_path / "in" / "a.wav", 5)
    predict([tmp_path / "in"], tmp_path / "out", package, opened)
    monkeypatch.setattr(local_module, "code_digest", lambda *modules: {"audio.reading": "0"})
    with pytest.raises(ValueError, match=r"\(code\).*--overwrite"):
        predict([tmp_path / "in"], tmp_path / "out", package, opened)


def test_to_overwrite_leaves_the_journal_that_another_process_has(package, tmp_path, capsys):
    pytest.importorskip("fcntl")
    write_recording(tmp_path / "in" / "a.wav", 5)
    output = tmp_path / "out"
    command = ["predict", tmp_path / "in", "--package", package, "--output", output, "--overwrite"]
    with Journal(output / "journal.jsonl", "x") as journal:
        journal.add({"recording": "a"}, {"seconds": 1.0})
        before = journal.path.read_bytes()
        with pytest.raises(SystemExit, match="2"):
            main(list(map(str, command)))
        assert journal.path.read_bytes() == before
    assert f"process {os.getpid()}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(list(map(str, command)))
    assert "in 1 recordings" in capsys.readouterr().out


def test_other_formats_and_filters_need_no_prediction(opened, package, tmp_path):
    write_recording(tmp_path / "in" / "a.wav", 20)
    predict([tmp_path / "in"], tmp_path / "out", package, opened)
    predicted = []
    options = ResultOptions(("jsonl", "audacity"), min_confidence=0.99)
    predict(
        [tmp_path / "in"],
        tmp_path / "out",
        package=package,
        opened=opened,
        options=options,
        predicted=predicted,
    )
    assert predicted == []
    assert (tmp_path / "out" / "detections.jsonl").exists()


def test_results_of_another_package_are_not_mixed_with_these(opened, package, tmp_path):
    write_recording(tmp_path / "in" / "a.wav", 5)
    predict([tmp_path / "in"], tmp_path / "out", package, opened)
    other = tmp_path / "other"
    shutil.copytree(package, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["decision.json"] = "0"
    write_atomically(other / "manifest.json", json.dumps(manifest))
    with pytest.raises(ValueError, match=r"another model or of other parameters.*--overwrite"):
        predict([tmp_path / "in"], tmp_path / "out", other, opened)


# Runs the real command; each recording that is opened to be decoded is written down, with the
# recordings that the journal had when the command began.
SPY = """
import sys
from pathlib import Path
import birdcall.inference.engine as engine
log, journal = Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
finished = journal.read_text(errors="replace").split("\\n")[1:-1] if journal.exists() else []
real = engine.iterate_rates
def spy(path, *rest):
    with log.open("a") as file:
        is_finished = any(f'"{path}"' in line for line in finished)
        file.write(f"{path.name} {is_finished}\\n")
    return real(path, *rest)
engine.iterate_rates = spy
from birdcall.__main__ import main
main()
"""


def spied_command(folder, package, output, log):
    command = ["-c", log, output / "journal.jsonl", "--quiet", "predict", folder]
    command += ["--package", package, "--output", output, "--format", "csv"]
    return list(map(str, command))


def start(*arguments):
    """Start the command in a process that can be killed."""
    command = spied_command(*arguments)
    return subprocess.Popen(
        [sys.executable, "-c", SPY, *command[1:]],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(*arguments):
    """Run the command to its end, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("birdcall.inference.engine.iterate_rates", engine.iterate_rates)  # undone
        patch.setattr(sys, "argv", spied_command(*arguments))
        with pytest.raises(SystemExit) as end:
            exec(SPY, {})
    assert end.value.code == 0


def kill_and_resume(package, tmp_path, n_recordings, n_kills, seconds):
    """Kill predict at ``n_kills`` random moments; return the kills and the opened files."""
    folder, output, log = tmp_path / "in", tmp_path / "out", tmp_path / "opened.txt"
    for number in range(n_recordings):
        write_recording(folder / f"{number:02}.wav", seconds, number)
    (folder / "bad.mp3").write_text("<html>")
    random.seed(0)
    journal = output / "journal.jsonl"
    n_killed = 0
    while n_killed < n_kills:
        before = journal.stat().st_size if journal.exists() else 0
        process = start(folder, package, output, log)
        while process.poll() is None and (not journal.exists() or journal.stat().st_size == before):
            time.sleep(0.002)  # it is still starting
        time.sleep(random.random() * 0.1)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            n_killed += 1
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode == 0:
            break
    finish(folder, package, output, log)
    whole = tmp_path / "whole"
    finish(folder, package, whole, tmp_path / "whole.txt")
    assert (output / "detections.csv").read_bytes() == (whole / "detections.csv").read_bytes()
    assert (output / "failed.csv").read_bytes() == (whole / "failed.csv").read_bytes()
    assert len((output / "detections.csv").read_text().splitlines()) > n_recordings
    opened = [line.split() for line in log.read_text().splitlines()]
    assert {name for name, is_finished in opened if is_finished == "True"} <= {"bad.mp3"}
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    finished = [Path(line["key"]["recording"]).name for line in lines]
    assert len(finished) == len(set(finished)) == n_recordings + 1
    return n_killed, len(opened)


def test_killed_once_it_resumes_to_the_same_results(package, tmp_path):
    n_killed, n_opened = kill_and_resume(
        package, tmp_path, n_recordings=12, n_kills=1, seconds=20.0
    )
    assert n_killed == 1
    assert n_opened >= 13


@pytest.mark.slow
def test_killed_at_twenty_moments_it_resumes_to_the_same_results(package, tmp_path):
    """Fifty recordings; each run finishes some of them before it is killed."""
    n_killed, _ = kill_and_resume(package, tmp_path, n_recordings=50, n_kills=20, seconds=120.0)
    assert n_killed == 20


def test_progress_shows_the_share_and_the_speed(opened, tmp_path, capsys):
    """Most segments of these are padding: more is predicted than there is."""
    for number, seconds in enumerate((0.3, 0.4, 12.0, 5.1)):
        write_recording(tmp_path / f"{number}.wav", seconds)
    (tmp_path / "bad.mp3").touch()
    recordings = find_recordings([tmp_path])
    predictor = predict_locally(opened, tmp_path / "out", ResultOptions(), progress=True)
    assert len(list(predictor(recordings))) == 5
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100 % of 18 s, 5 of 5 recordings, " in last
    assert " x real time, 00:00 left" in last
    bad = [recording for recording in recordings if recording.name == "bad.mp3"]
    assert len(list(predictor(bad))) == 1  # nothing that has a length


def test_an_ensemble_of_a_package_is_that_of_its_runs(opened, trained_runs, tmp_path):
    write_recording(tmp_path / "a.wav", 12)
    recordings = find_recordings([tmp_path])
    ((_, packaged),) = detect_recordings(recordings, opened)
    ((_, by_torch),) = detect_recordings(
        recordings, LoadedPackage(load_ensemble(trained_runs[:2]), opened.decision)
    )
    assert [(e.ebird_code, e.onset, e.offset) for e in packaged.events] == [
        (e.ebird_code, e.onset, e.offset) for e in by_torch.events
    ]
