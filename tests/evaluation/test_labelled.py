"""Labelled soundscapes: the competition's example files, and anyone's Raven selection tables."""

import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile

from birdcall.config import SEGMENT_SECONDS
from birdcall.evaluation.labelled import (
    known_species,
    label_segments,
    predict_labelled,
    read_truth,
)
from birdcall.evaluation.metrics import row_f1_scores
from birdcall.evaluation.tables import event_rows
from birdcall.inference.decision import Decision
from birdcall.inference.ensemble import load_ensemble
from birdcall.inference.events import Event
from birdcall.inference.tables import read_labels_beside, write_raven_table
from birdcall.kaggle.test_set import find_audio, read_labelled_soundscapes
from birdcall.taxonomy import all_species

KNOWN = [species.ebird_code for species in all_species()]
HEADER = "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tSpecies Code\n"


def write_noise(path, seconds, rate=32_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(len(path.name)).standard_normal(round(seconds * rate))
    soundfile.write(path, noise.astype("f4"), rate)


@pytest.fixture
def ravens(tmp_path):
    """Two recordings with Raven tables, one without."""
    folder = tmp_path / "mine"
    write_noise(folder / "dawn.wav", 23.0)
    write_noise(folder / "night" / "quiet.flac", 12.0)
    write_noise(folder / "unlabelled.wav", 6.0)
    events = [Event("amecro", 1.0, 2.0, 1.0), Event("norcar", 4.0, 6.0, 1.0)]
    write_raven_table(folder / "dawn.Table.1.selections.txt", events)
    (folder / "night" / "quiet.txt").write_text(HEADER)
    return folder


# --- times to rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "onset, offset, segments",
    [
        (1.0, 2.0, [0]),
        (4.0, 6.0, [0, 1]),
        (4.6, 7.0, [1]),  # 0.4 s in the first
        (4.5, 7.0, [0, 1]),  # half a second in the first
        (4.8, 5.2, [0, 1]),  # half of it in either
        (4.9, 5.2, [1]),
        (3.0, 16.0, [0, 1, 2, 3]),
        (5.0, 5.0, [1]),  # a click
        (14.9, 30.0, [3]),
    ],
)
def test_half_a_second_or_half_of_an_event_counts(onset, offset, segments):
    truth = label_segments([Event("b", onset, offset)], ["a", "b", "c"], 4)
    assert np.flatnonzero(truth[:, 1]).tolist() == segments
    assert not truth[:, [0, 2]].any()


def test_the_example_s_rows_follow_from_its_annotations_in_the_demo(demo_folder):
    truth = read_truth([demo_folder], KNOWN)
    for name, rows in truth.rows.groupby("recording"):
        subset = truth.annotations[truth.annotations["recording"] == name]
        truth_rows = label_segments(subset.itertuples(), KNOWN, len(rows))
        expected = [sorted(birds) for birds in rows["birds"]]
        assert [sorted(KNOWN[k] for k in np.flatnonzero(row)) for row in truth_rows] == expected


# --- what members predict ------------------------------------------------------------------------


def test_the_examples_are_predicted_and_every_label_is_at_its_segment(
    demo_folder, training_data, held_out
):
    known = known_species(training_data.classes)
    soundscapes = held_out.labelled
    rows = read_labelled_soundscapes(demo_folder, KNOWN)
    scores = soundscapes.predictions
    assert scores.member_names == ("other-fold0", "other-fold1", "tiny-fold0", "tiny-fold1")
    assert scores.labelled.sum() == len(rows)
    assert set(scores.segments["group"]) == set(rows["filename"])
    row_of = {
        (recording, seconds): row
        for row, (recording, seconds) in enumerate(
            zip(scores.segments["recording"], scores.segments["seconds"], strict=True)
        )
    }
    for row in rows.itertuples():
        birds = {known[k] for k in np.flatnonzero(scores.truth[row_of[row.filename, row.seconds]])}
        assert birds == set(row.birds)
    in_rows = Counter(label for labels in rows["foreign_labels"] for label in labels)
    table = pd.read_csv(demo_folder / "example_test_audio_metadata.csv")
    in_annotations = Counter(code for code in table["ebird_code"] if code not in known)
    assert in_rows != in_annotations
    assert soundscapes.foreign == in_rows | in_annotations
    assert set(soundscapes.frames) == set(soundscapes.annotations["recording"])
    name = rows["filename"].iloc[0]
    path = find_audio(demo_folder / "example_test_audio", name)
    assert soundscapes.paths[name] == path
    subset = (scores.segments["recording"] == name).to_numpy()
    np.testing.assert_allclose(
        scores.clipwise[:, subset], soundscapes.frames[name].clipwise, atol=1e-6
    )


def test_raven_tables_label_recordings_as_a_whole(ravens, trained_runs, training_data, caplog):
    soundscapes = predict_labelled(load_ensemble(trained_runs[:1]), [ravens])
    scores = soundscapes.predictions
    assert list(scores.segments["recording"]) == ["dawn"] * 5 + ["night/quiet"] * 3
    assert scores.labelled.all()
    known = known_species(training_data.classes)
    birds = [{known[k] for k in np.flatnonzero(row)} for row in scores.truth]
    assert birds == [{"amecro", "norcar"}, {"norcar"}, *[set()] * 6]
    assert "unlabelled.wav" in caplog.text
    assert list(soundscapes.annotations["ebird_code"]) == ["amecro", "norcar"]


def test_both_layouts_are_predicted_together(ravens, demo_folder, trained_runs, training_data):
    known = known_species(training_data.classes)
    soundscapes = predict_labelled(load_ensemble(trained_runs[:1]), [demo_folder, ravens])
    assert soundscapes.predictions.segments["recording"].nunique() == 2 + 2
    truth = read_truth([ravens, ravens.parent, ravens / "night" / ".."], known)
    assert list(truth.paths) == ["dawn", "night/quiet"]  # each once
    assert len(truth.rows) == 5 + 3


def test_names_of_species_are_known_and_others_counted(ravens):
    (ravens / "dawn.Table.1.selections.txt").write_text(
        HEADER.replace("Species Code", "Species")
        + "1\tSpectrogram 1\t1\t1.0\t2.0\tAmerican Crow\n"
        + "2\tSpectrogram 1\t1\t6.0\t7.0\tred squirrel\n"
        + "3\tSpectrogram 1\t1\t11.0\t12.0\tCardinalis cardinalis\n"
    )
    truth = read_truth([ravens], KNOWN)
    birds = truth.rows[truth.rows["recording"] == "dawn"]["birds"]
    assert list(birds) == [("amecro",), (), ("norcar",), (), ()]
    assert truth.foreign == Counter({"red squirrel": 1})


def test_a_selection_after_the_end_is_left_out_with_a_warning(ravens, caplog):
    late = [Event("amecro", 22.0, 40.0, 1.0), Event("norcar", 30.0, 31.0, 1.0)]
    write_raven_table(ravens / "dawn.Table.1.selections.txt", late)
    truth = read_truth([ravens], KNOWN)
    assert truth.annotations[["onset", "offset"]].to_numpy().tolist() == [[22.0, 23.0]]
    assert "dawn.wav" in caplog.text and "22 to 40 s, 30 to 31 s" in caplog.text


def write_table(path, *rows, columns=("Species Code",)):
    """Write a Raven table with rows of onset, offset and the cells of ``columns``."""
    lines = [("Begin Time (s)", "End Time (s)", *columns), *rows]
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))


def annotated(truth):
    """The annotations as tuples."""
    return list(truth.annotations.itertuples(index=False, name=None))


def test_a_table_belongs_to_the_recording_with_the_longest_name_that_it_begins_with(tmp_path):
    for name in ("dawn.wav", "dawn.2.wav", "dawn.2.flac"):
        write_noise(tmp_path / name, 6)
    write_table(tmp_path / "dawn.late.selections.txt", (0, 1, "amecro"))
    write_table(tmp_path / "dawn.2.Table.1.selections.txt", (1, 2, "norcar"))
    write_table(tmp_path / "dawn.2.wav.selections.txt", (2, 3, "aldfly"))
    assert annotated(read_truth([tmp_path], KNOWN)) == [
        ("dawn.2", 1, 2, "norcar"),  # the .flac
        ("2/dawn.2", 1, 2, "norcar"),
        ("2/dawn.2", 2, 3, "aldfly"),
        ("dawn", 0, 1, "amecro"),
    ]


def test_results_of_models_and_notes_are_no_truth_and_are_named(ravens, caplog):
    for name in ("dawn.BirdNET.selection.table.txt", "unlabelled.detections.txt"):
        write_table(ravens / name, (10, 11, "aldfly"))
    (ravens / "dawn.notes.txt").write_text("windy\n")
    (ravens / "readme.txt").write_text("of no recording\n")
    truth = read_truth([ravens], KNOWN)
    assert [code for *_, code in annotated(truth)] == ["amecro", "norcar"]
    for name in ("dawn.BirdNET", "unlabelled.detections", "dawn.notes"):
        assert name in caplog.text
    assert "readme" not in caplog.text


def test_a_selection_table_with_other_columns_is_refused_with_its_columns(ravens):
    table = ravens / "dawn.mine.selections.txt"
    table.write_text("Selection\tBegin\tEnd\tBird\n1\t0\t1\tamecro\n")
    with pytest.raises(ValueError, match=r"dawn\.mine\.selections\.txt.*Begin Time \(s\).*Bird"):
        read_truth([ravens], KNOWN)


SEQUENCE = ("Begin File", "File Offset (s)", "Species")


@pytest.mark.parametrize(
    "sound, table",
    [
        ("Robin-78-2024-05-05-birdnet-0512.wav", "Robin-78-2024-05-05-birdnet-0512.Table.1.txt"),
        ("a.detections.wav", "a.detections.selections.txt"),
        ("dawn.wav", "dawn.BirdNET.selections.txt"),  # as the warning says
        ("DAWN.WAV", "dawn.Table.1.selections.txt"),
        ("Gr\u00fcn.wav", "Gru\u0308n.txt"),  # as macOS writes it
    ],
)
def test_a_table_of_a_person_is_truth_whatever_the_recording_is_called(tmp_path, sound, table):
    write_noise(tmp_path / sound, 6)
    write_table(tmp_path / table, (1, 2, "amecro"))
    assert len(read_truth([tmp_path], KNOWN).annotations) == 1


def test_names_that_differ_by_case_only_are_two_recordings(tmp_path):
    for name in ("a", "A"):
        write_noise(tmp_path / f"{name}.wav", 6)
    write_table(tmp_path / "a.txt", (1, 2, "amecro"))
    write_table(tmp_path / "A.txt", (1, 2, "norcar"))
    truth = read_truth([tmp_path], KNOWN)
    codes = {
        truth.paths[row.recording].stem: row.ebird_code for row in truth.annotations.itertuples()
    }
    assert codes == {"a": "amecro", "A": "norcar"}


def write_sequence(folder, *rows, names=("rec1", "rec2", "rec3"), columns=SEQUENCE):
    """Write files of ten seconds, and the table of all that Raven names after the first."""
    for name in names:
        write_noise(folder / f"{name}.wav", 10)
    write_table(folder / f"{names[0]}.Table.1.selections.txt", *rows, columns=columns)


def test_a_table_of_several_files_labels_each_in_its_times(tmp_path):
    rows = [
        (1, 3, "rec1.wav", 1, "amecro"),
        (11, 14, "REC2.WAV", 1, "norcar"),
        (29, 31, "rec3.flac", 9, "aldfly"),  # converted since
    ]
    write_sequence(tmp_path, *rows)
    for name in ("rec2", "rec3"):  # as people copy it
        shutil.copy(tmp_path / "rec1.Table.1.selections.txt", tmp_path / f"{name}.Table.1.txt")
    expected = [("rec1", 1, 3, "amecro"), ("rec2", 1, 4, "norcar"), ("rec3", 9, 10, "aldfly")]
    assert annotated(read_truth([tmp_path], KNOWN)) == expected


def test_a_selection_across_two_files_is_in_both(tmp_path):
    rows = [(8, 12.5, "rec1.wav", 8, "amecro"), (15, 16, "rec2.wav", 5, "norcar")]
    write_sequence(tmp_path, *rows)
    assert annotated(read_truth([tmp_path], KNOWN)) == [
        ("rec1", 8, 10, "amecro"),
        ("rec2", 0, 2.5, "amecro"),
        ("rec2", 5, 6, "norcar"),
    ]


def test_a_recording_is_labelled_by_a_table_that_only_its_rows_name(tmp_path, caplog):
    rows = [(1, 2, "rec1.wav", 1, "amecro"), (11, 12, "gone.wav", 1, "norcar")]
    write_sequence(tmp_path, *rows)
    (tmp_path / "rec1.Table.1.selections.txt").rename(tmp_path / "all of May.txt")
    assert annotated(read_truth([tmp_path], KNOWN)) == [("rec1", 1, 2, "amecro")]
    assert "gone.wav" in caplog.text and "rec2.wav" in caplog.text


def test_a_table_of_one_renamed_file_labels_the_recording_beside_it(tmp_path):
    write_sequence(tmp_path, (1, 2, "20240501.WAV", 1, "amecro"), names=["dawn"])
    assert annotated(read_truth([tmp_path], KNOWN)) == [("dawn", 1, 2, "amecro")]


def test_a_table_of_one_recording_by_its_name_and_another_by_its_rows_is_refused(tmp_path):
    write_noise(tmp_path / "dusk.wav", 10)
    write_sequence(tmp_path, (1, 2, "dusk.wav", 1, "amecro"), names=["dawn"])
    with pytest.raises(ValueError, match=r"dawn\.Table.*dawn\.wav.*dusk\.wav"):
        read_truth([tmp_path], KNOWN)
    (tmp_path / "dawn.Table.1.selections.txt").rename(tmp_path / "dusk.txt")
    assert list(read_truth([tmp_path], KNOWN).paths) == ["dusk"]


def test_several_files_without_their_offsets_are_refused(tmp_path):
    rows = [(1, 2, "rec1.wav", "amecro"), (11, 12, "rec2.wav", "norcar")]
    write_sequence(tmp_path, *rows, columns=("Begin File", "Species"))
    with pytest.raises(ValueError, match=r"rec1\.Table.*File Offset"):
        read_truth([tmp_path], KNOWN)


def test_codes_and_names_of_labels_count_in_any_case(ravens):
    labels = ["amecro ", "AMECRO", '"amecro "', "American crow", " corvus  brachyrhynchos", ""]
    rows = [(3 * number, 3 * number + 1, label) for number, label in enumerate(labels)]
    write_table(ravens / "dawn.Table.1.selections.txt", *rows)
    truth = read_truth([ravens], KNOWN)
    assert [code for *_, code in annotated(truth)] == ["amecro"] * 5
    assert truth.foreign == Counter({"": 1})


def test_labels_are_in_the_column_that_is_given(ravens):
    rows = [(1, 2, "amecro", "norcar")]
    write_table(ravens / "dawn.Table.1.selections.txt", *rows, columns=("Species", "Second look"))
    assert read_truth([ravens], KNOWN).annotations["ebird_code"].tolist() == ["amecro"]
    truth = read_truth([ravens], KNOWN, "second look")
    assert truth.annotations["ebird_code"].tolist() == ["norcar"]


def test_recordings_of_one_name_are_told_apart(tmp_path):
    """Recorders name files by the time: those of two sites have the same names."""
    for site, code in (("a", "amecro"), ("b", "norcar")):
        write_noise(tmp_path / site / "0500.wav", 6)
        write_table(tmp_path / site / "0500.txt", (0, 1, code))
    truth = read_truth([tmp_path / "a", tmp_path / "b"], KNOWN)
    assert annotated(truth) == [("0500", 0, 1, "amecro"), ("2/0500", 0, 1, "norcar")]
    assert truth.annotated == list(truth.paths) == ["0500", "2/0500"]
    assert list(truth.rows["recording"]) == ["0500"] * 2 + ["2/0500"] * 2


def test_sound_in_a_format_that_is_not_read_is_left_out_with_advice(ravens, caplog):
    (ravens / "phone.m4a").write_bytes(b"no sound that is read")
    write_table(ravens / "phone.txt", (0, 1, "amecro"))
    assert "phone" not in read_truth([ravens], KNOWN).paths
    assert "phone.m4a" in caplog.text and "convert" in caplog.text


def test_a_folder_is_listed_once_however_many_recordings_are_in_it(tmp_path, monkeypatch):
    for number in range(40):
        (tmp_path / f"{number}.wav").touch()
        write_table(tmp_path / f"{number}.txt", (0, 1, "amecro"))
    paths = sorted(tmp_path.glob("*.wav"))
    listings = []
    for name in ("scandir", "listdir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *path, real=real: listings.append(path) or real(*path))
    labels = read_labels_beside(paths, KNOWN)
    assert [len(labels[path]) for path in paths] == [1] * 40
    assert 0 < len(listings) <= 2


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("1\tS\t1\t5.0\t4.0\tamecro\n", r"dawn\.Table\.1\.selections\.txt, line 2: .*end before"),
        ("1\tS\t1\tearly\t4.0\tamecro\n", r"selections\.txt, line 2: .*early"),
        ("1\tS\t1\t-1.0\t4.0\tamecro\n", r"selections\.txt, line 2: .*begin before 0"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_named(ravens, line, complaint):
    (ravens / "dawn.Table.1.selections.txt").write_text(HEADER + line)
    with pytest.raises(ValueError, match=complaint):
        read_truth([ravens], KNOWN)


def test_a_folder_without_labels_is_named(tmp_path):
    write_noise(tmp_path / "some" / "a.wav", 5)
    with pytest.raises(FileNotFoundError, match=r"neither example_test_audio_summary\.csv nor"):
        read_truth([tmp_path / "some"], KNOWN)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_truth([tmp_path / "nowhere"], KNOWN)
    assert predict_labelled(None, []) is None


def test_a_second_time_no_audio_is_read(
    ravens, demo_folder, trained_runs, training_data, tmp_path, monkeypatch
):
    ensemble = load_ensemble(trained_runs[:2])
    first = predict_labelled(ensemble, [demo_folder, ravens], cache_folder=tmp_path)
    monkeypatch.setattr("birdcall.evaluation.predictions.predict_audio", None)
    again = predict_labelled(ensemble, [demo_folder, ravens], cache_folder=tmp_path)
    assert np.array_equal(again.predictions.clipwise, first.predictions.clipwise)
    assert list(again.frames) == list(first.frames)
    for name, scores in first.frames.items():
        assert np.array_equal(again.frames[name].frames, scores.frames)
        assert np.array_equal(again.frames[name].framewise, scores.framewise)


def test_birds_named_where_a_table_is_empty_are_false_events(ravens, trained_runs, training_data):
    soundscapes = predict_labelled(load_ensemble(trained_runs[:1]), [ravens])
    assert list(soundscapes.frames) == ["dawn", "night/quiet"]
    of_dawn = replace(soundscapes, frames={"dawn": soundscapes.frames["dawn"]})
    everything = dict.fromkeys(soundscapes.frames, Decision(0.0, 0.0, max_birds=3))
    with_quiet, without = (event_rows("x", item, everything) for item in (soundscapes, of_dawn))
    # Three birds in each second of twelve more, none of them there.
    assert with_quiet[0]["metric"] == "segment_f1"
    assert 0 < with_quiet[0]["value"] < without[0]["value"]
    assert (with_quiet[0]["recordings"], without[0]["recordings"]) == (2, 1)


# --- rows that are missing, doubled or too many --------------------------------------------------


@pytest.fixture
def examples(demo_folder, tmp_path):
    """A copy of the demo's labelled soundscapes, to be spoilt."""
    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copytree(demo_folder / "example_test_audio", folder / "example_test_audio")
    for name in ("example_test_audio_summary.csv", "example_test_audio_metadata.csv"):
        shutil.copy(demo_folder / name, folder / name)
    return folder


def change_rows(folder, change, name="example_test_audio_summary.csv"):
    table = pd.read_csv(folder / name, keep_default_na=False, dtype=str)
    change(table).to_csv(folder / name, index=False)


def test_rows_that_are_missing_are_predicted_and_not_scored(
    examples, trained_runs, training_data, caplog
):
    change_rows(examples, lambda table: table.drop(index=[1, 2]))
    soundscapes = predict_labelled(load_ensemble(trained_runs[:1]), [examples])
    assert (~soundscapes.predictions.labelled).sum() == 2
    assert "2 of its 6 segments are not labelled and not scored" in caplog.text


def test_rows_beyond_the_end_are_left_out_and_counted(
    examples, trained_runs, training_data, caplog
):
    def longer(table):
        last = table.iloc[[0]].assign(filename_seconds="beyond", seconds="500")
        return pd.concat([table, last])

    change_rows(examples, longer)
    soundscapes = predict_labelled(load_ensemble(trained_runs[:1]), [examples])
    assert soundscapes.predictions.labelled.sum() == len(read_labelled_soundscapes(examples)) - 1
    assert "1 labelled rows lie beyond its end" in caplog.text


def test_a_doubled_row_is_named_with_its_line(examples, trained_runs, training_data):
    change_rows(examples, lambda table: pd.concat([table, table.iloc[[0]]]))
    n_lines = len(pd.read_csv(examples / "example_test_audio_summary.csv")) + 1
    with pytest.raises(ValueError, match=rf"summary\.csv, line {n_lines}: filename_seconds"):
        predict_labelled(load_ensemble(trained_runs[:1]), [examples])


def test_the_same_segment_under_two_names_is_named_with_its_line(examples):
    def again(table):
        return pd.concat([table, table.iloc[[0]].assign(filename_seconds="other name")])

    change_rows(examples, again)
    with pytest.raises(ValueError, match=r"summary\.csv, line \d+: seconds is '5'"):
        read_truth([examples], KNOWN)


def test_an_annotation_that_ends_before_it_begins_is_named_with_its_line(examples):
    def turn(table):
        table.loc[3, ["time_start", "time_end"]] = ["9.0", "8.0"]
        return table

    change_rows(examples, turn, "example_test_audio_metadata.csv")
    with pytest.raises(ValueError, match=r"metadata\.csv, line 5: time_end is '8\.0'; the ann"):
        read_truth([examples], KNOWN)


def test_a_soundscape_without_its_recording_is_left_out_and_named(
    examples, trained_runs, training_data, caplog
):
    gone, damaged = sorted((examples / "example_test_audio").iterdir())
    gone.unlink()
    soundscapes = predict_labelled(load_ensemble(trained_runs[:1]), [examples])
    assert soundscapes.predictions.segments["recording"].nunique() == 1
    assert gone.name.split(".")[0] in caplog.text
    damaged.write_bytes(b"<html></html>")
    assert predict_labelled(load_ensemble(trained_runs[:1]), [examples]) is None
    assert damaged.name in caplog.text


# --- the real ones -------------------------------------------------------------------------------


def test_all_nocall_scores_what_is_known_of_the_real_soundscapes(cornell_mini):
    truth = read_truth([cornell_mini], KNOWN)
    expected = {"ORANGE-7-CAP_20190606_093000": 0.533, "SSW52": 0.617}
    assert set(truth.paths) == set(expected)
    for name, rows in truth.rows.groupby("recording"):
        matrix = np.array([[code in birds for code in KNOWN] for birds in rows["birds"]])
        score = row_f1_scores(matrix, np.zeros_like(matrix)).mean()
        assert score == pytest.approx(expected[name], abs=0.0005)


def test_labels_outside_the_classes_are_counted_in_the_real_annotations(cornell_mini):
    foreign = read_truth([cornell_mini], KNOWN).foreign
    assert foreign == Counter({"squirrel": 66, "mouqua": 44, "unk": 7, "hawo": 1})


def test_the_real_annotations_agree_with_the_real_rows(cornell_mini):
    truth = read_truth([cornell_mini], KNOWN)
    rows = truth.rows[truth.rows["recording"].str.startswith("ORANGE")]
    touched = {
        (int(seconds // SEGMENT_SECONDS), item.ebird_code)
        for item in truth.annotations.itertuples()
        for seconds in np.arange(item.onset, item.offset, 0.05)
    }
    labelled = {
        (int(row.seconds // SEGMENT_SECONDS) - 1, bird)
        for row in rows.itertuples()
        for bird in row.birds
    }
    assert labelled
    assert len(labelled & touched) / len(labelled) > 0.9
