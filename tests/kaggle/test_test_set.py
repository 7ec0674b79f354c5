"""Test rows and labels are read as they are meant, or refused with file and line."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from birdcall.kaggle.test_set import (
    find_audio,
    find_recordings_of,
    read_annotations,
    read_example_rows,
    read_labelled_soundscapes,
    read_solution,
    read_test_rows,
)

CORNELL = Path(__file__).parents[3] / "shared" / "data" / "cornell-mini"
needs_cornell = pytest.mark.skipif(
    not CORNELL.is_dir(), reason="needs the real data of ../shared/data"
)

TEST_ROWS = """\
site,row_id,seconds,audio_id
site_1,site_1_0a99_5,5.0,0a99
site_1,site_1_0a99_10,10.0,0a99
site_3,site_3_f770,,f770
site_2,site_2_41e6_600,600,41e6
"""
LABELS = """\
filename_seconds,birds,filename,seconds
SSW52_5,aldfly norcar,SSW52,5
SSW52_10,,SSW52,10
SSW52_15,squirrel unk,SSW52,15
SSW52_20,unk norcar norcar,SSW52,20
SSW52_25,nocall,SSW52,25
"""
ANNOTATIONS = """\
file_id,device,ebird_code,certainty,time_start,time_end
SSW52,x,squirrel,c,0.4,1.4
SSW52,x,norcar,q,2.5,2.7
SSW52,x,aldfly,c,3.0,3.0
"""


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder


# --- test rows ----------------------------------------------------------------------------------


def test_test_rows_keep_their_order_and_site_3_has_no_seconds(tmp_path: Path) -> None:
    rows = read_test_rows(write(tmp_path, "test.csv", TEST_ROWS))
    assert rows.columns.tolist() == ["row_id", "site", "audio_id", "seconds"]
    assert rows["row_id"].tolist() == [
        "site_1_0a99_5", "site_1_0a99_10", "site_3_f770", "site_2_41e6_600",
    ]  # fmt: skip
    assert rows["audio_id"].tolist() == ["0a99", "0a99", "f770", "41e6"]
    np.testing.assert_array_equal(rows["seconds"], [5, 10, np.nan, 600])
    assert rows.index.tolist() == [0, 1, 2, 3]


def test_unknown_columns_are_tolerated_and_ids_stay_text(tmp_path: Path) -> None:
    text = "usage,audio_id,seconds,row_id,site\nPublic,007,5,0042,site_1\nPublic,NA,5,nan,site_2\n"
    rows = read_test_rows(write(tmp_path, "test.csv", text))
    assert rows["audio_id"].tolist() == ["007", "NA"]
    assert rows["row_id"].tolist() == ["0042", "nan"]


def test_rows_of_site_3_alone_and_no_rows_at_all_are_read(tmp_path: Path) -> None:
    text = "site,row_id,seconds,audio_id\nsite_3,a,,a\nsite_3,b,,b\n"
    assert read_test_rows(write(tmp_path, "test.csv", text))["seconds"].isna().all()
    assert len(read_test_rows(write(tmp_path, "test.csv", text.splitlines()[0]))) == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seconds,audio_id", "second,audio_id", "no column 'seconds'"),
        ("0a99_10,10.0", "0a99_5,10.0", "line 3: row_id is 'site_1_0a99_5'; an earlier row has it"),
        ("10.0", "12.5", "line 3: seconds is '12.5'; segments end at multiples of 5"),
        ("10.0", "0", "line 3: seconds is '0'"),
        ("10.0", "-5", "line 3: seconds is '-5'"),
        ("10.0", "inf", "line 3: seconds is 'inf'; it must be a number"),
        ("10.0", "ten", "line 3: seconds is 'ten'; it must be a number"),
        ("10.0", "", "line 3: seconds is ''; only site_3 is scored by file"),
        ("f770,,", "f770,5,", "line 4: seconds is '5'; site_3 has none"),
        (",41e6", ",", "line 5: audio_id is ''; it must not be empty"),
        ("site_1,site_1_0a99_5,", "site_1,,", "line 2: row_id is ''"),
        ("600,41e6", "600", "line 5: 3 fields where the header has 4"),
    ],
)
def test_a_bad_test_row_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in TEST_ROWS
    with pytest.raises(ValueError, match=message) as caught:
        read_test_rows(write(tmp_path, "test.csv", TEST_ROWS.replace(old, new)))
    assert str(tmp_path / "test.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_test_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test\.csv is missing"):
        read_test_rows(tmp_path)


@needs_cornell
def test_the_real_test_rows_are_read() -> None:
    rows = read_test_rows(CORNELL)
    assert len(rows) == 76
    assert rows["site"].value_counts().to_dict() == {"site_1": 32, "site_2": 39, "site_3": 5}
    assert rows["seconds"].isna().sum() == 5
    folder = CORNELL / "test_audio"
    lost = {name for name in rows["audio_id"] if find_audio(folder, name) is None}
    assert lost == {"9cc5d9646f344f1bbb52640a988fe902"}


# --- audio files --------------------------------------------------------------------------------


def test_a_recording_is_found_by_its_name_with_or_without_suffixes(tmp_path: Path) -> None:
    for name in ("SSW52.mp3", "ORANGE_0930.pt623.mp3", "f7.MP3", "SSW521.mp3", "SSW52.csv"):
        (tmp_path / name).touch()
    assert find_audio(tmp_path, "SSW52") == tmp_path / "SSW52.mp3"
    assert find_audio(tmp_path, "SSW52.mp3") == tmp_path / "SSW52.mp3"
    assert find_audio(tmp_path, "ORANGE_0930") == tmp_path / "ORANGE_0930.pt623.mp3"
    assert find_audio(tmp_path, "ORANGE_0930.pt623") == tmp_path / "ORANGE_0930.pt623.mp3"
    assert find_audio(tmp_path, "f7") == tmp_path / "f7.MP3"


def test_what_is_no_recording_of_that_name_is_not_found(tmp_path: Path) -> None:
    for name in ("SSW521.mp3", "SSW52.csv", "SSW52.part"):
        (tmp_path / name).touch()
    (tmp_path / "SSW52.wav").mkdir()
    for name in ("SSW52", "SSW52.csv", "SSW", "*", "[S]SW521"):
        assert find_audio(tmp_path, name) is None
    assert find_audio(tmp_path / "no folder", "SSW52") is None


def test_of_several_files_the_choice_is_always_the_same(tmp_path: Path) -> None:
    for name in ("a.wav", "a.pt1.mp3", "a.mp3", "b.pt22.mp3", "b.pt10.mp3", "b.pt9.mp3"):
        (tmp_path / name).touch()
    assert find_audio(tmp_path, "a") == tmp_path / "a.mp3"
    assert find_audio(tmp_path, "b") == tmp_path / "b.pt9.mp3"


def test_of_many_recordings_the_folder_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"S{number}" for number in range(40)]
    for name in names:
        (tmp_path / f"{name}.pt1.AIFF").touch()
    listings = []
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listings.append(path) or real(path))
    paths, missing = find_recordings_of(pd.DataFrame({"audio_id": [*names, "gone"]}), tmp_path)
    assert list(paths) == names and missing == ["gone"]
    assert listings == [tmp_path]


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "sub/a", "/a", "sub\\a", "a/", "a\0"])
def test_a_name_with_a_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.mp3").touch()
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "a.mp3").touch()
    with pytest.raises(ValueError, match=r"is not (a|the) name"):
        find_audio(tmp_path / "data", name)


@pytest.mark.parametrize("link", ["a.mp3", "a.pt1.mp3"])
def test_a_recording_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path, link: str) -> None:
    (tmp_path / "secret.mp3").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / link).symlink_to(tmp_path / "secret.mp3")
    with pytest.raises(ValueError, match="leads out of"):
        find_audio(tmp_path / "data", "a")


def test_without_its_folder_no_recording_is_there_and_the_log_names_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = read_test_rows(write(tmp_path, "test.csv", TEST_ROWS))
    names = ["0a99", "f770", "41e6"]
    assert find_recordings_of(rows, tmp_path / "test_audio") == ({}, names)
    assert "test_audio is not there: every row is nocall" in caplog.text
    (tmp_path / "test_audio").mkdir()
    (tmp_path / "test_audio" / "f770.mp3").touch()
    paths = {"f770": tmp_path / "test_audio" / "f770.mp3"}
    assert find_recordings_of(rows, tmp_path / "test_audio") == (paths, ["0a99", "41e6"])


# --- labels -------------------------------------------------------------------------------------


def test_labelled_segments_are_read_with_empty_and_nocall_as_no_bird(tmp_path: Path) -> None:
    rows = read_labelled_soundscapes(write(tmp_path, "example_test_audio_summary.csv", LABELS))
    assert rows["row_id"].tolist() == ["SSW52_5", "SSW52_10", "SSW52_15", "SSW52_20", "SSW52_25"]
    assert rows["filename"].unique().tolist() == ["SSW52"]
    assert rows["seconds"].tolist() == [5, 10, 15, 20, 25]
    expected = [("aldfly", "norcar"), (), ("squirrel", "unk"), ("unk", "norcar"), ()]
    assert rows["birds"].tolist() == expected
    assert rows["foreign_labels"].tolist() == [()] * 5


def test_labels_outside_the_classes_are_set_aside_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "example_test_audio_summary.csv", LABELS)
    with caplog.at_level(logging.WARNING):
        rows = read_labelled_soundscapes(tmp_path, ["aldfly", "norcar"])
    assert rows["birds"].tolist() == [("aldfly", "norcar"), (), (), ("norcar",), ()]
    assert rows["foreign_labels"].tolist() == [(), (), ("squirrel", "unk"), ("unk",), ()]
    assert "3 labels are no class and count as no bird: unk 2, squirrel 1" in caplog.text


def test_labels_count_in_any_case(tmp_path: Path) -> None:
    write(tmp_path, "example_test_audio_summary.csv", LABELS.replace("aldfly", "ALDFLY"))
    write(tmp_path, "example_test_audio_metadata.csv", ANNOTATIONS.replace("norcar", "NorCar"))
    rows = read_labelled_soundscapes(tmp_path, ["aldfly", "norcar"])
    assert rows["birds"].tolist() == [("aldfly", "norcar"), (), (), ("norcar",), ()]
    assert read_annotations(tmp_path, ["norcar"])["ebird_code"].tolist() == ["norcar"]


def test_labels_that_are_all_classes_are_not_worth_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "example_test_audio_summary.csv", LABELS)
    read_labelled_soundscapes(tmp_path, ["aldfly", "norcar", "squirrel", "unk"])
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("birds,", "bird,", "no column 'birds'"),
        ("SSW52_10", "SSW52_5", "line 3: filename_seconds is 'SSW52_5'; an earlier row has it"),
        ("SSW52,10", "SSW52,11", "line 3: seconds is '11'"),
        ("squirrel unk", "squirrel nocall", "line 4: birds 'squirrel nocall' is nocall and birds"),
    ],
)
def test_a_bad_labelled_segment_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in LABELS
    write(tmp_path, "example_test_audio_summary.csv", LABELS.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_labelled_soundscapes(tmp_path)


def test_the_labelled_segments_can_stand_in_for_test_rows(tmp_path: Path) -> None:
    write(tmp_path, "test.csv", TEST_ROWS)
    rows = read_example_rows(write(tmp_path, "example_test_audio_summary.csv", LABELS))
    assert rows.columns.tolist() == read_test_rows(tmp_path).columns.tolist()
    assert rows.dtypes["seconds"] == read_test_rows(tmp_path).dtypes["seconds"]
    assert rows["audio_id"].unique().tolist() == ["SSW52"]


@needs_cornell
def test_the_real_labels_have_the_published_share_of_nocall_and_their_audio() -> None:
    rows = read_labelled_soundscapes(CORNELL)
    assert len(rows) == 180
    assert sum(birds == () for birds in rows["birds"]) == 106
    for name in rows["filename"].unique():
        assert find_audio(CORNELL / "example_test_audio", name) is not None


@needs_cornell
def test_the_real_labels_follow_from_the_real_annotations() -> None:
    rows = read_labelled_soundscapes(CORNELL)
    codes = {code for birds in rows["birds"] for code in birds}
    events = read_annotations(CORNELL, codes)
    orange = rows[rows["filename"] == events["filename"].iloc[0]]
    for seconds, birds in zip(orange["seconds"], orange["birds"], strict=True):
        in_segment = events[(events["onset"] < seconds) & (events["offset"] > seconds - 5)]
        assert set(in_segment["ebird_code"]) == set(birds)


def test_annotations_are_read_and_foreign_ones_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "example_test_audio_metadata.csv", ANNOTATIONS)
    assert read_annotations(tmp_path).values.tolist() == [
        ["SSW52", 0.4, 1.4, "squirrel"],
        ["SSW52", 2.5, 2.7, "norcar"],
        ["SSW52", 3.0, 3.0, "aldfly"],
    ]
    with caplog.at_level(logging.WARNING):
        known = read_annotations(tmp_path, ["norcar", "aldfly"])
    assert known["ebird_code"].tolist() == ["norcar", "aldfly"]
    assert known.columns.tolist() == ["filename", "onset", "offset", "ebird_code"]
    assert "squirrel 1" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2.5,2.7", "2.5,2.4", "line 3: time_end is '2.4'; the annotation ends before it begins"),
        ("2.5,2.7", ",2.7", "line 3: time_start is ''; it must be a number"),
        ("2.5,2.7", "-1,2.7", "line 3: time_start is '-1'"),
        ("x,norcar", "x,", "line 3: ebird_code is ''"),
        ("time_end", "end", "no column 'time_end'"),
    ],
)
def test_a_bad_annotation_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    write(tmp_path, "example_test_audio_metadata.csv", ANNOTATIONS.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path)


def test_the_solution_has_label_strings(tmp_path: Path) -> None:
    write(tmp_path, "solution.csv", "row_id,birds\na_5,norcar aldfly\na_10,nocall\na_15,\n")
    solution = read_solution(tmp_path)
    assert solution["row_id"].tolist() == ["a_5", "a_10", "a_15"]
    assert solution["birds"].tolist() == ["norcar aldfly", "nocall", "nocall"]
    write(tmp_path, "solution.csv", "row_id,birds\na_5,norcar\na_5,nocall\n")
    with pytest.raises(ValueError, match=r"solution\.csv, line 3: row_id is 'a_5'; an earlier"):
        read_solution(tmp_path)


@pytest.mark.parametrize("birds", [(), ("aldfly",), ("norcar", "aldfly")])
def test_label_strings_and_birds_are_two_forms_of_the_same(
    tmp_path: Path, birds: tuple[str, ...]
) -> None:
    text = " ".join(birds) or "nocall"
    write(tmp_path, "solution.csv", f"row_id,birds\na_5,{text}\n")
    labels = f"filename_seconds,birds,filename,seconds\na_5,{text},a,5\n"
    write(tmp_path, "example_test_audio_summary.csv", labels)
    assert read_solution(tmp_path)["birds"].tolist() == [text]
    assert read_labelled_soundscapes(tmp_path)["birds"].tolist() == [birds]


def test_the_kernel_can_read_soundscapes_without_torch() -> None:
    code = "import sys, birdcall.kaggle.test_set; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
