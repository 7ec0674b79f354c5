"""Labels of soundscapes in the formats of others: scored by hand-worked numbers, strictly read."""

import re
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from birdcall.data.targets import label_segments
from birdcall.evaluation.labelled import predict_labelled, read_truth
from birdcall.evaluation.metrics import row_f1_scores
from birdcall.evaluation.tables import LABELLED, ScoreSubject, decided_rows, ranked_rows
from birdcall.inference.decision import Decision
from birdcall.inference.ensemble import load_ensemble
from birdcall.inference.events import Event
from birdcall.inference.tables import (
    DETECTION_COLUMNS,
    write_audacity_labels,
    write_detections,
    write_raven_table,
)
from birdcall.taxonomy import all_species, known_species

KNOWN = [species.ebird_code for species in all_species()]
CORNELL = "Filename,Start Time (s),End Time (s),Low Freq (Hz),High Freq (Hz),Species eBird Code"
CLEF_2021 = "row_id,site,audio_id,seconds,birds"
CLEF_2026 = "filename,start,end,primary_label"


def write_noise(path, seconds=20.0, rate=8_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(len(str(path))).standard_normal(round(seconds * rate))
    soundfile.write(path, noise.astype("f4"), rate)
    return path


def write_csv(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return path


def rows_of(truth, recording=None):
    """The scored rows: the end of each in seconds, and its birds in order."""
    rows = truth.rows if recording is None else truth.rows[truth.rows["recording"] == recording]
    return [(row.seconds, sorted(row.birds)) for row in rows.itertuples()]


def events_of(truth):
    return list(truth.annotations.itertuples(index=False, name=None))


def mean_f1(truth, *predicted):
    """The row-wise F1 of sets of predicted codes, one per scored row."""
    matrices = (
        np.array([[code in birds for code in KNOWN] for birds in rows])
        for rows in (truth.rows["birds"], predicted)
    )
    return row_f1_scores(*matrices).mean()


# --- each format's small example ------------------------------------------------------------------


@pytest.fixture
def cornell(tmp_path):
    """20 s: amecro in the first segment, norcar in the second, a bird nobody named in the third."""
    write_noise(tmp_path / "soundscape_data" / "SSW_001.flac")
    write_csv(
        tmp_path / "annotations.csv",
        CORNELL,
        "SSW_001.flac,1.0,2.0,1000,4000,amecro",
        "SSW_001.flac,4.6,9.8,1000,4000,norcar",  # 0.4 s in the first segment
        "SSW_001.flac,10.0,14.0,1000,4000,aldfly",
        "SSW_001.flac,10.5,11.0,1000,4000,????",
    )
    return tmp_path


def test_annotations_of_the_cornell_lab_are_scored_by_hand(cornell, caplog):
    truth = read_truth([cornell], KNOWN)
    assert rows_of(truth) == [(5.0, ["amecro"]), (10.0, ["norcar"]), (20.0, [])]
    # Right, one of two right, wrong: (1 + 2 / 3 + 0) / 3.
    score = mean_f1(truth, {"amecro"}, {"amecro", "norcar"}, {"aldfly"})
    assert score == pytest.approx(5 / 9)
    assert mean_f1(truth, set(), set(), set()) == pytest.approx(1 / 3)


def test_a_bird_that_nobody_could_name_is_neither_right_nor_wrong(cornell, caplog):
    truth = read_truth([cornell], KNOWN)
    assert 15.0 not in [seconds for seconds, _ in rows_of(truth)]
    assert truth.n_unknown == 1 and not truth.foreign
    assert "????" in caplog.text
    assert not truth.annotated  # nobody knows which events are missing
    assert ("soundscape_data/SSW_001", 10.0, 14.0, "aldfly") in events_of(truth)


def test_a_segment_with_an_unknown_bird_is_predicted_and_not_scored(
    cornell, trained_runs, training_data
):
    soundscapes = predict_labelled(load_ensemble(trained_runs[:1]), [cornell])
    assert soundscapes.predictions.labelled.tolist() == [True, True, False, True]
    known = known_species(training_data.classes)
    truth = soundscapes.predictions.labelled_truth
    assert [[known[k] for k in np.flatnonzero(row)] for row in truth] == [
        ["amecro"],
        ["norcar"],
        [],
    ]
    assert soundscapes.n_unknown == 1 and not soundscapes.frames


def test_no_score_depends_on_what_is_predicted_where_a_bird_is_unknown(
    cornell, trained_runs, training_data
):
    predictions = predict_labelled(load_ensemble(trained_runs[:1]), [cornell]).predictions
    clipwise, framewise = predictions.clipwise.copy(), predictions.framewise.copy()
    clipwise[:, 2], framewise[:, 2] = 1 - clipwise[:, 2], 1 - framewise[:, 2]
    others = predictions.with_probabilities(clipwise, framewise)
    subject = ScoreSubject("x", 1, LABELLED)
    learnable = np.ones(len(predictions.classes), dtype=bool)
    decision = Decision(0.5, 0.5, max_birds=3, classes=predictions.classes)
    before, after = (
        pd.DataFrame(
            decided_rows(subject, item, item.decide(decision))
            + ranked_rows(subject, item, learnable)
        )
        for item in (predictions, others)
    )
    assert set(before["rows"]) == {3}
    pd.testing.assert_frame_equal(before, after)


def test_a_recording_whose_segments_all_have_unknown_birds_is_left_out(cornell, caplog):
    write_noise(cornell / "soundscape_data" / "SSW_002.flac", 5)
    with (cornell / "annotations.csv").open("a") as file:
        file.write("SSW_002.flac,0,5,0,8000,????\n")
    assert list(read_truth([cornell], KNOWN).paths) == ["soundscape_data/SSW_001"]
    assert "SSW_002" in caplog.text


@pytest.mark.parametrize("given", [".", "soundscape_data"])
def test_the_folder_of_the_table_or_of_its_recordings_is_given(cornell, given):
    assert len(rows_of(read_truth([cornell / given], KNOWN))) == 3


def test_annotations_may_lie_beside_their_recordings(cornell):
    shutil.move(cornell / "annotations.csv", cornell / "soundscape_data")
    assert len(rows_of(read_truth([cornell], KNOWN))) == 3


@pytest.fixture
def clef_2021(tmp_path):
    write_noise(tmp_path / "train_soundscapes" / "7019_COR_20190904.ogg", 15)
    write_csv(
        tmp_path / "train_soundscape_labels.csv",
        CLEF_2021,
        "7019_COR_5,COR,7019,5,nocall",
        "7019_COR_10,COR,7019,10,amecro norcar",
        "7019_COR_15,COR,7019,15,runwre1",  # no species of the competition
    )
    return tmp_path


@pytest.mark.parametrize("given", [".", "train_soundscapes"])
def test_labels_of_birdclef_2021_are_scored_by_hand(clef_2021, given):
    truth = read_truth([clef_2021 / given], KNOWN)
    assert rows_of(truth) == [(5.0, []), (10.0, ["amecro", "norcar"]), (15.0, [])]
    assert truth.foreign == Counter({"runwre1": 1})
    # Right, one of two found, a false one: (1 + 2 / 3 + 0) / 3.
    assert mean_f1(truth, set(), {"norcar"}, {"amecro"}) == pytest.approx(5 / 9)
    assert not len(truth.annotations)  # rows have no times


@pytest.fixture
def clef_2026(tmp_path):
    write_noise(tmp_path / "train_soundscapes" / "BC2026_1_S05_20250227_010002.ogg", 20)
    write_noise(tmp_path / "train_soundscapes" / "BC2026_2_S05_20250227_020002.ogg", 20)
    name = "BC2026_1_S05_20250227_010002.ogg"
    write_csv(
        tmp_path / "train_soundscapes_labels.csv",
        CLEF_2026,
        f"{name},00:00:00,00:00:05,amecro;norcar",
        f"{name},00:00:10,00:00:15,22961;amecro",
        f"{name},00:00:10,00:00:15,22961;amecro",  # rows are there twice
    )
    return tmp_path


@pytest.mark.parametrize("given", [".", "train_soundscapes"])
def test_labels_of_birdclef_2026_are_scored_by_hand(clef_2026, given, caplog):
    truth = read_truth([clef_2026 / given], KNOWN)
    assert rows_of(truth) == [(5.0, ["amecro", "norcar"]), (15.0, ["amecro"])]
    assert truth.foreign == Counter({"22961": 1})
    # One of two found with a false one beside it, right: (1 / 2 + 1) / 2.
    assert mean_f1(truth, {"amecro", "aldfly"}, {"amecro"}) == pytest.approx(3 / 4)
    assert "BC2026_2_S05" in caplog.text  # it has no rows
    assert "line 4" in caplog.text


def test_segments_without_rows_are_predicted_and_not_scored(clef_2026, trained_runs, training_data):
    soundscapes = predict_labelled(load_ensemble(trained_runs[:1]), [clef_2026])
    assert soundscapes.predictions.labelled.tolist() == [True, False, True, False]


EVENTS = [Event("amecro", 1.0, 2.0, 0.25), Event("norcar", 4.0, 6.0, 0.9)]
OF_EVENTS = [(5.0, ["amecro", "norcar"]), (10.0, ["norcar"]), (15.0, []), (20.0, [])]


def audacity(folder):
    write_audacity_labels(folder / "dawn.txt", EVENTS)


def audacity_by_hand(folder):
    text = "1.000000\t2.000000\tAmerican Crow\n\\\t1000.0\t4000.0\n4.0\t6.0\tnorcar\n"
    (folder / "dawn.labels.txt").write_text(text)


def audacity_of_birdnet(folder):
    """The text that BirdNET-Analyzer writes, checked by a person."""
    text = "1.0\t2.0\tCorvus brachyrhynchos, American Crow\t0.9010\n"
    text += "4.0\t6.0\tCardinalis cardinalis, Northern Cardinal\t0.2500\n"
    (folder / "dawn.BirdNET.selections.txt").write_text(text)


def csv_of_predict(folder):
    write_detections(folder / "selections.csv", {"dawn.wav": EVENTS})


def csv_of_birdnet(folder):
    write_csv(
        folder / "dawn.BirdNET.selections.csv",
        "Start (s),End (s),Scientific name,Common name,Confidence",
        "1.0,2.0,Corvus brachyrhynchos,American Crow,0.9010",
        "4.0,6.0,Cardinalis cardinalis,Northern Cardinal,0.2500",
    )


def csv_of_birdnet_with_files(folder):
    write_csv(
        folder / "selections.csv",
        "Start (s),End (s),Scientific name,Common name,Confidence,File",
        "1.0,2.0,Corvus brachyrhynchos,American Crow,0.9010,/home/me/field/dawn.wav",
        "4.0,6.0,Cardinalis cardinalis,Northern Cardinal,0.2500,C:\\field\\dawn.wav",
    )


def raven(folder):
    write_raven_table(folder / "dawn.Table.1.selections.txt", EVENTS)


@pytest.mark.parametrize(
    "write",
    [audacity, audacity_by_hand, audacity_of_birdnet]
    + [csv_of_predict, csv_of_birdnet, csv_of_birdnet_with_files, raven],
)
def test_labels_with_times_are_the_same_in_every_format(tmp_path, write):
    write_noise(tmp_path / "dawn.wav")
    write(tmp_path)
    truth = read_truth([tmp_path], KNOWN)
    assert rows_of(truth) == OF_EVENTS
    assert events_of(truth) == [("dawn", 1.0, 2.0, "amecro"), ("dawn", 4.0, 6.0, "norcar")]
    assert truth.annotated == ["dawn"]
    # Half of the birds, a bird too many, right, right: (2 / 3 + 2 / 3 + 1 + 1) / 4.
    score = mean_f1(truth, {"norcar"}, {"norcar", "aldfly"}, set(), set())
    assert score == pytest.approx(5 / 6)


def test_results_of_a_model_are_no_truth_until_they_are_renamed(tmp_path, caplog):
    write_noise(tmp_path / "dawn.wav")
    path = tmp_path / "detections.csv"
    write_detections(path, {"dawn.wav": EVENTS})
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        read_truth([tmp_path], KNOWN)
    assert "detections.csv" in caplog.text and "selections.csv" in caplog.text
    path.rename(tmp_path / "selections.csv")
    assert rows_of(read_truth([tmp_path], KNOWN)) == OF_EVENTS


def test_the_detections_that_a_page_saves_for_audacity_are_no_truth(tmp_path, caplog):
    write_noise(tmp_path / "dawn.wav")
    write_noise(tmp_path / "dusk.wav")
    write_audacity_labels(tmp_path / "dawn.audacity.txt", EVENTS)
    write_audacity_labels(tmp_path / "dusk.txt", EVENTS)
    assert list(read_truth([tmp_path], KNOWN).paths) == ["dusk"]
    assert "dawn.audacity.txt" in caplog.text


def test_a_table_without_rows_says_that_its_recording_has_no_bird(tmp_path):
    write_noise(tmp_path / "dawn.wav", 10)
    write_csv(tmp_path / "dawn.csv", "Start (s),End (s),Common name")
    assert rows_of(read_truth([tmp_path], KNOWN)) == [(5.0, []), (10.0, [])]


@pytest.mark.parametrize("path", ["site/dawn.wav", "field/site/dawn.wav", "/home/me/site/dawn.wav"])
def test_a_recording_may_be_called_by_its_path_on_any_machine(tmp_path, path):
    write_noise(tmp_path / "site" / "dawn.wav")
    write_noise(tmp_path / "dusk" / "dawn.wav")
    write_detections(tmp_path / "selections.csv", {path: EVENTS})
    assert rows_of(read_truth([tmp_path], KNOWN), "site/dawn") == OF_EVENTS


def test_a_path_that_leads_out_of_the_folder_names_nothing_there(tmp_path, caplog):
    write_noise(tmp_path / "mine" / "dusk.wav")
    write_noise(tmp_path / "dawn.wav")
    write_audacity_labels(tmp_path / "mine" / "dusk.txt", EVENTS)
    write_detections(tmp_path / "mine" / "selections.csv", {"../dawn.wav": EVENTS})
    assert list(read_truth([tmp_path / "mine"], KNOWN).paths) == ["dusk"]
    assert "dawn.wav" in caplog.text


def test_an_unknown_bird_is_unknown_in_other_formats_too(tmp_path):
    write_noise(tmp_path / "dawn.wav")
    write_raven_table(tmp_path / "dawn.txt", [*EVENTS, Event("????", 11, 12)])
    truth = read_truth([tmp_path], KNOWN)
    assert rows_of(truth) == [row for row in OF_EVENTS if row[0] != 15.0]
    assert truth.n_unknown == 1


# --- headers, codes, names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        CORNELL.replace("Start", "Begin"),
        CORNELL.upper(),
        CORNELL.replace(",", " , "),
        "\ufeff" + CORNELL,
        CORNELL.replace("Filename", '"Filename"'),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_headers_are_read_as_people_publish_them(tmp_path, header, end):
    write_noise(tmp_path / "a.flac", 5)
    rows = [header, " a.flac , 1.0,2.0,0,8000, amecro ", ""]
    (tmp_path / "annotations.csv").write_bytes(end.join(rows).encode())
    assert rows_of(read_truth([tmp_path], KNOWN)) == [(5.0, ["amecro"])]


def test_codes_of_later_taxonomies_are_those_of_2020(tmp_path):
    write_noise(tmp_path / "a.flac", 25)
    codes = ["reevir", "reevir1", "amhgul1", "wewvir2", "yelwar1"]
    rows = [f"a.flac,{5 * n},{5 * n + 2},0,8000,{code}" for n, code in enumerate(codes)]
    write_csv(tmp_path / "annotations.csv", CORNELL, *rows)
    birds = [birds for _, birds in rows_of(read_truth([tmp_path], KNOWN))]
    assert birds == [["reevir1"], ["reevir1"], ["hergul"], ["warvir"], ["yelwar"]]


def test_a_recording_is_found_in_another_format(cornell):
    flac = cornell / "soundscape_data" / "SSW_001.flac"
    waveform, rate = soundfile.read(flac)
    soundfile.write(flac.with_suffix(".wav"), waveform, rate)
    flac.unlink()
    assert len(rows_of(read_truth([cornell], KNOWN))) == 3


def test_doubled_annotations_count_once(cornell, caplog):
    path = cornell / "annotations.csv"
    *lines, _ = path.read_text().split("\n")
    path.write_text("\n".join([*lines, lines[1]]))
    assert len(events_of(read_truth([cornell], KNOWN))) == 3
    assert "line 6" in caplog.text


def test_rows_without_their_recording_are_counted_and_named(cornell, caplog):
    with (cornell / "annotations.csv").open("a") as file:
        file.write("SSW_404.flac,1,2,0,8000,amecro\nSSW_404.flac,3,4,0,8000,amecro\n")
    assert len(rows_of(read_truth([cornell], KNOWN))) == 3
    assert "SSW_404.flac" in caplog.text and "2 rows" in caplog.text


def test_a_damaged_recording_costs_only_its_own_rows(cornell, caplog):
    (cornell / "soundscape_data" / "SSW_002.flac").write_bytes(b"<html></html>")
    with (cornell / "annotations.csv").open("a") as file:
        file.write("SSW_002.flac,1,2,0,8000,amecro\n")
    assert len(rows_of(read_truth([cornell], KNOWN))) == 3
    assert "SSW_002.flac" in caplog.text


def test_annotations_beyond_the_end_are_cut_or_left_out_and_named(cornell, caplog):
    with (cornell / "annotations.csv").open("a") as file:
        file.write("SSW_001.flac,18,30,0,8000,amecro\nSSW_001.flac,40,41,0,8000,norcar\n")
    truth = read_truth([cornell], KNOWN)
    assert events_of(truth)[-1][1:] == (18.0, 20.0, "amecro")
    assert len(events_of(truth)) == 4
    assert "18 to 30 s" in caplog.text and "40 to 41 s" in caplog.text


def test_times_that_all_lie_beyond_the_end_are_no_truth(cornell, caplog):
    """Such as milliseconds: a recording would count as one without birds."""
    path = write_csv(cornell / "annotations.csv", CORNELL, "SSW_001.flac,1000,2000,0,8000,amecro")
    with pytest.raises(FileNotFoundError, match=re.escape(str(path.parent))):
        read_truth([cornell], KNOWN)
    assert "SSW_001.flac" in caplog.text


def test_rows_beyond_the_end_are_left_out_and_named(clef_2021, caplog):
    with (clef_2021 / "train_soundscape_labels.csv").open("a") as file:
        file.write("7019_COR_600,COR,7019,600,amecro\n")
    assert len(rows_of(read_truth([clef_2021], KNOWN))) == 3
    assert "7019_COR_20190904" in caplog.text


def test_other_tables_in_the_folder_are_no_labels(cornell):
    write_csv(cornell / "species.csv", "Species eBird Code,Common Name", "amecro,American Crow")
    write_csv(cornell / "sample_submission.csv", "row_id,birds", "a,nocall")
    assert len(rows_of(read_truth([cornell], KNOWN))) == 3


def test_two_formats_in_a_folder_are_both_read(cornell, caplog):
    write_noise(cornell / "mine" / "dawn.wav", 10)
    write_audacity_labels(cornell / "mine" / "dawn.txt", EVENTS)
    caplog.set_level("INFO")
    truth = read_truth([cornell], KNOWN)
    assert "annotations.csv" in caplog.text
    assert rows_of(truth, "mine/dawn") == OF_EVENTS[:2]
    assert len(rows_of(truth)) == 3 + 2


def test_a_recording_with_labels_in_two_tables_is_refused(cornell):
    write_audacity_labels(cornell / "soundscape_data" / "SSW_001.txt", EVENTS)
    with pytest.raises(ValueError, match=r"annotations\.csv.*SSW_001\.flac"):
        read_truth([cornell], KNOWN)


def test_the_examples_of_the_competition_are_read_alone_and_others_named(
    demo_folder, tmp_path, caplog
):
    folder = tmp_path / "copy"
    shutil.copytree(demo_folder / "example_test_audio", folder / "example_test_audio")
    shutil.copy(demo_folder / "example_test_audio_summary.csv", folder)
    write_csv(folder / "annotations.csv", CORNELL)
    assert len(read_truth([folder], KNOWN).paths) == 2
    assert "annotations.csv" in caplog.text


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("SSW_001.flac,9,8,0,8000,amecro", r"line 6: End Time \(s\) is '8'"),
        ("SSW_001.flac,soon,8,0,8000,amecro", r"line 6: .*'soon'"),
        ("SSW_001.flac,-1,8,0,8000,amecro", r"line 6: .*'-1'"),
        ("SSW_001.flac,inf,inf,0,8000,amecro", r"line 6: .*'inf'"),
        (",1,2,0,8000,amecro", r"line 6: .*''"),
        ("SSW_001.flac,1,2", r"line 6: 3 fields"),
        ("../outside.flac,1,2,0,8000,amecro", r"line 6: .*outside"),
        ("/etc/outside.flac,1,2,0,8000,amecro", r"line 6: .*outside"),
    ],
)
def test_an_impossible_annotation_is_named_with_its_line(cornell, row, complaint):
    write_noise(cornell.parent / "outside.flac", 5)
    with (cornell / "annotations.csv").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(ValueError, match=r"annotations\.csv, " + complaint):
        read_truth([cornell], KNOWN)


@pytest.mark.parametrize("column", ["Filename", "Start Time (s)", "Species eBird Code"])
def test_a_missing_column_of_annotations_is_named(cornell, column):
    path = cornell / "annotations.csv"
    path.write_text(path.read_text().replace(column, "Other", 1))
    with pytest.raises(ValueError, match=rf"annotations\.csv: .*{re.escape(column)}"):
        read_truth([cornell], KNOWN)


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("7019_COR_7,COR,7019,7,nocall", r"line 5: seconds is '7'"),
        ("7019_COR_0,COR,7019,0,nocall", r"line 5: seconds is '0'"),
        ("7019_COR_x,COR,7019,x,nocall", r"line 5: seconds is 'x'"),
        ("7019_COR_5,COR,7019,10,nocall", r"line 5: row_id is '7019_COR_5'"),
        ("7019_COR_10,COR,7019,10,nocall amecro", r"line 5: birds is 'nocall amecro'"),
    ],
)
def test_an_impossible_row_of_2021_is_named_with_its_line(clef_2021, row, complaint):
    with (clef_2021 / "train_soundscape_labels.csv").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(ValueError, match=r"train_soundscape_labels\.csv, " + complaint):
        read_truth([clef_2021], KNOWN)


@pytest.mark.parametrize(
    "start, end, complaint",
    [
        ("00:00:05", "00:00:00", r"end is '00:00:00'"),
        ("00:00:05", "00:00:15", r"end is '00:00:15'"),
        ("00:00:02", "00:00:07", r"start is '00:00:02'"),
        ("five", "00:00:10", r"start is 'five'"),
        ("00:00:60", "00:01:05", r"start is '00:00:60'"),
    ],
)
def test_an_impossible_clock_time_is_named_with_its_line(clef_2026, start, end, complaint):
    path = clef_2026 / "train_soundscapes_labels.csv"
    with path.open("a") as file:
        file.write(f"BC2026_1_S05_20250227_010002.ogg,{start},{end},amecro\n")
    with pytest.raises(ValueError, match=r"train_soundscapes_labels\.csv, line 5: " + complaint):
        read_truth([clef_2026], KNOWN)


def test_two_recordings_of_one_audio_id_are_refused(clef_2021):
    write_noise(clef_2021 / "train_soundscapes" / "7019_COR_20190905.ogg", 15)
    with pytest.raises(ValueError, match=r"7019_COR_20190904\.ogg.*7019_COR_20190905\.ogg"):
        read_truth([clef_2021], KNOWN)


# --- times to segments ----------------------------------------------------------------------------


def label_one_by_one(events, species, n_segments):
    """The definition: a segment has an event that it holds half a second of, or half of."""
    truth = np.zeros((n_segments, len(species)), dtype=bool)
    for event in events:
        for segment in range(n_segments):
            start, end = 5 * segment, 5 * segment + 5
            overlap = min(event.offset, end) - max(event.onset, start)
            touches = event.onset < end and event.offset >= start
            if touches and overlap >= min(0.5, (event.offset - event.onset) / 2) - 1e-6:
                truth[segment, species.index(event.ebird_code)] = True
    return truth


times = st.integers(0, 300).map(lambda tenths: tenths / 10)
events = st.builds(
    lambda code, onset, length: Event(code, onset, onset + length),
    st.sampled_from("abc"),
    times,
    times,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=8), st.integers(1, 8))
def test_many_events_are_matched_as_one_by_one(some, n_segments):
    expected = label_one_by_one(some, list("abc"), n_segments)
    assert np.array_equal(label_segments(some, list("abc"), n_segments), expected)


def test_the_columns_of_predict_are_those_that_are_read():
    assert {"recording", "onset", "offset", "ebird_code"} <= set(DETECTION_COLUMNS)


def test_no_annotation_is_lost_among_many(tmp_path):
    """Events at random times in three recordings: each is where its own overlap is."""
    generator = np.random.default_rng(0)
    onset = generator.uniform(0, 55, 300).round(2)
    table = pd.DataFrame(
        {
            "Filename": generator.choice(["a.wav", "b.wav", "c.wav"], 300),
            "Start Time (s)": onset,
            "End Time (s)": (onset + generator.uniform(0.1, 5, 300)).round(2),
            "Species eBird Code": generator.choice(KNOWN[:20], 300),
        }
    )
    for name in ("a", "b", "c"):
        write_noise(tmp_path / f"{name}.wav", 60)
    table.to_csv(tmp_path / "annotations.csv", index=False)
    truth = read_truth([tmp_path], KNOWN)
    assert len(truth.annotations) == 300
    for name in ("a", "b", "c"):
        rows = table[table["Filename"] == f"{name}.wav"].to_numpy()
        expected = label_one_by_one([Event(row[3], row[1], row[2]) for row in rows], KNOWN, 12)
        birds = [birds for _, birds in rows_of(truth, name)]
        assert birds == [[KNOWN[k] for k in np.flatnonzero(row)] for row in expected]
