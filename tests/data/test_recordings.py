"""Every published layout becomes one table, and what is wrong with one is said in one line."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from birdcall.data.recordings import check_recordings_exist, classes_of, read_recordings

# The competition's 35 columns, in order.
HEADER = """\
rating,playback_used,ebird_code,channels,date,pitch,duration,filename,speed,species,
number_of_notes,title,secondary_labels,bird_seen,sci_name,location,latitude,
sampling_rate,type,elevation,description,bitrate_of_mp3,file_type,volume,background,
xc_id,url,country,author,primary_label,longitude,length,time,recordist,license"""
TRAIN_COLUMNS = HEADER.replace("\n", "").split(",")
EXTENDED_COLUMNS = [
    name
    for name in TRAIN_COLUMNS
    if name not in ("pitch", "speed", "number_of_notes", "description", "volume", "length")
]
NAMES = {
    "aldfly": ("Empidonax alnorum", "Alder Flycatcher"),
    "amecro": ("Corvus brachyrhynchos", "American Crow"),
    "norcar": ("Cardinalis cardinalis", "Northern Cardinal"),
}
Row = dict[str, str]


def make_row(number: int, code: str = "aldfly", **changes: str) -> Row:
    scientific, common = NAMES.get(code, ("Avis nova", "New Bird"))
    row = dict.fromkeys(TRAIN_COLUMNS, "Not specified")
    row |= {
        "rating": "3.5",
        "ebird_code": code,
        "duration": "25",
        "filename": f"XC{number}.mp3",
        "species": common,
        "sci_name": scientific,
        "secondary_labels": "[]",
        "sampling_rate": "48000 (Hz)",
        "primary_label": f"{scientific}_{common}",
        "author": "Jo Doe",
        "recordist": "Jo Doe",
        "playback_used": "",
    }
    return row | changes


def write_table(path: Path, rows: list[Row], columns: list[str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or TRAIN_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a train.csv with the given rows into a data folder and return the folder."""

    def write_data(*rows: Row) -> Path:
        write_table(tmp_path / "train.csv", list(rows))
        return tmp_path

    return write_data


def test_the_competitions_table_is_read(write: Callable[..., Path]) -> None:
    others = '["Corvus brachyrhynchos_American Crow", "Parus major_Great Tit"]'
    data = write(
        make_row(1, secondary_labels=others, rating="0.5", duration="0"),
        make_row(2, "amecro", recordist="  Ana Åberg ", sampling_rate="44100 (Hz)"),
    )
    recordings = read_recordings(data)
    assert recordings.to_dict("records") == [
        {
            "filename": "XC1.mp3",
            "ebird_code": "aldfly",
            "secondary_codes": ("amecro",),
            "recordist": "Jo Doe",
            "rating": 0.5,
            "duration": 0.0,
            "sample_rate": 48_000,
            "path": "train_audio/aldfly/XC1.mp3",
            "label": "Empidonax alnorum_Alder Flycatcher",
        },
        {
            "filename": "XC2.mp3",
            "ebird_code": "amecro",
            "secondary_codes": (),
            "recordist": "Ana Åberg",
            "rating": 3.5,
            "duration": 25.0,
            "sample_rate": 44_100,
            "path": "train_audio/amecro/XC2.mp3",
            "label": "Corvus brachyrhynchos_American Crow",
        },
    ]
    assert classes_of(recordings) == ("aldfly", "amecro")


def test_the_real_sample_is_read(cornell_mini: Path) -> None:
    recordings = read_recordings(cornell_mini)
    check_recordings_exist(recordings, cornell_mini)
    assert len(recordings) == 100
    assert len(classes_of(recordings)) == 10
    assert recordings["recordist"].nunique() == 27
    assert set(recordings["sample_rate"]) == {44_100, 48_000}


def test_secondary_labels_are_known_by_the_names_of_both_tables_and_of_the_taxonomy(
    write: Callable[..., Path],
) -> None:
    renamed = "Empidonax novus_Alder Flycatcher"  # only the extension calls it that
    labels = [renamed, "empidonax alnorum", "Avis nova_New Bird", "NewBird ", "Corvus dubius_Rook"]
    data = write(
        make_row(1, "norcar", secondary_labels=repr(labels)),
        make_row(2, "newbird"),
        make_row(3, "amecro", secondary_labels="['Corvus brachyrhynchos_American Crow']"),
    )
    extended = make_row(4, "aldfly", primary_label=renamed)
    write_table(data / "train_extended.csv", [extended], EXTENDED_COLUMNS)
    secondary = read_recordings(data).set_index("filename")["secondary_codes"]
    assert secondary["XC1.mp3"] == ("aldfly", "newbird")  # known once each, unknown ones left out
    assert secondary["XC3.mp3"] == ()  # a recording's own species is not behind it


def test_the_extension_is_found_in_its_own_folders_or_in_the_merged_one(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    data = write(make_row(1), make_row(2, "norcar"))
    kaggle = "xeno-canto-bird-recordings-extended-"
    extended = [make_row(3), make_row(4, "norcar"), make_row(5, "amecro"), make_row(1)]
    for part in ("a-m", "n-z"):  # both parts come with the same table
        write_table(data / f"{kaggle}{part}/train_extended.csv", extended, EXTENDED_COLUMNS)
    touch(data / f"{kaggle}a-m/A-M/aldfly/XC3.mp3")
    touch(data / "N-Z/norcar/XC4.mp3")
    touch(data / "train_audio/amecro/XC5.mp3")
    recordings = read_recordings(data)
    assert list(recordings["path"]) == [
        "train_audio/aldfly/XC1.mp3",
        "train_audio/norcar/XC2.mp3",
        f"{kaggle}a-m/A-M/aldfly/XC3.mp3",
        "N-Z/norcar/XC4.mp3",
        "train_audio/amecro/XC5.mp3",
    ]
    assert "XC1.mp3 is in an earlier table too" in caplog.text


def test_the_resampled_layout_is_read_from_its_five_folders(tmp_path: Path) -> None:
    codes = ["amecro", "comrav", "norcar", "yetvir"]
    rows = [
        make_row(number, code, resampled_filename=f"XC{number}.wav")
        for number, code in enumerate(codes)
    ]
    columns = [*TRAIN_COLUMNS, "resampled_sampling_rate", "resampled_filename"]
    for part in ("00", "01", "03", "04"):
        folder = tmp_path / f"birdsong-resampled-train-audio-{part}"
        write_table(folder / "train_mod.csv", rows, columns)
    touch(tmp_path / "birdsong-resampled-train-audio-04/yetvir/XC3.wav")
    recordings = read_recordings(tmp_path)
    assert list(recordings["filename"]) == [f"XC{number}.mp3" for number in range(4)]
    assert list(recordings["path"]) == [
        f"birdsong-resampled-train-audio-{part}/{code}/XC{number}.wav"
        for number, (part, code) in enumerate(zip(("00", "01", "03", "04"), codes, strict=True))
    ]


def test_the_resampled_layout_is_read_from_one_merged_folder(tmp_path: Path) -> None:
    row = make_row(1) | {"resampled_filename": "XC1.wav"}
    write_table(tmp_path / "train_mod.csv", [row], [*TRAIN_COLUMNS, "resampled_filename"])
    touch(tmp_path / "aldfly/XC1.wav")
    recordings = read_recordings(tmp_path)
    assert list(recordings["path"]) == ["aldfly/XC1.wav"]
    check_recordings_exist(recordings, tmp_path)


@pytest.mark.parametrize("table", ["train_metadata.csv", "train.csv"])
@pytest.mark.parametrize("folder", ["train_audio", "train_short_audio"])
@pytest.mark.parametrize("filename", ["aldfly/XC1.ogg", "XC1.ogg"])
def test_birdclef_tables_are_read(tmp_path: Path, table: str, folder: str, filename: str) -> None:
    row = {
        "primary_label": "aldfly",
        "secondary_labels": "['1139490', 'unknow', '']",
        "author": "Jo Doe",
        "filename": filename,
        "rating": "4.0",
    }
    insect = row | {"primary_label": "1139490", "filename": "CSA2.ogg", "secondary_labels": "['']"}
    write_table(tmp_path / table, [row, insect], list(row))
    touch(tmp_path / folder / "aldfly/XC1.ogg")
    touch(tmp_path / folder / "1139490/CSA2.ogg")
    recordings = read_recordings(tmp_path)
    assert list(recordings["path"]) == [f"{folder}/aldfly/XC1.ogg", f"{folder}/1139490/CSA2.ogg"]
    assert list(recordings["filename"]) == [filename, "CSA2.ogg"]
    assert list(recordings["secondary_codes"]) == [("1139490",), ()]
    assert list(recordings["recordist"]) == ["Jo Doe", "Jo Doe"]
    assert list(recordings["duration"]) == [0, 0]  # unknown
    check_recordings_exist(recordings, tmp_path)


@pytest.mark.parametrize(
    "column, value, reason",
    [
        ("rating", "good", "is no number from 0 to 5"),
        ("rating", "5.5", "is no number from 0 to 5"),
        ("rating", "nan", "is no number from 0 to 5"),
        ("duration", "-3", "is no number from 0"),
        ("duration", "1:05", "is no number from 0"),
        ("sampling_rate", "fast", "is no sampling rate"),
        ("ebird_code", "", "is no eBird code"),
        ("ebird_code", "../test", "is no eBird code"),
        ("ebird_code", "al fly", "is no eBird code"),
        ("ebird_code", "nocall", "is no species"),
        ("filename", "", "is no file name"),
        ("filename", ".", "is no file name"),
        ("filename", "XC1\0.mp3", "is no file name"),
        ("filename", "../../test_audio/a.mp3", "leaves the data folder"),
        ("filename", "/etc/passwd", "leaves the data folder"),
        ("filename", "XC1.mp3", "is in line 2 already"),
        ("secondary_labels", "[", "is no list of labels"),
        ("secondary_labels", "['a", "is no list of labels"),
        ("secondary_labels", "{'a': 1}", "is no list of labels"),
        ("secondary_labels", "[1]", "is no list of labels"),
        ("secondary_labels", "__import__('os').abort()", "is no list of labels"),
        ("secondary_labels", "[" * 50_000, "is no list of labels"),
    ],
)
def test_a_bad_value_is_named_with_its_line_and_column(
    write: Callable[..., Path], column: str, value: str, reason: str
) -> None:
    data = write(make_row(1), make_row(2), make_row(3, **{column: value}))
    with pytest.raises(ValueError, match=reason) as caught:
        read_recordings(data)
    message = str(caught.value)
    assert message.startswith(f"{data / 'train.csv'}, line 4, column {column}: ")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("column", ["ebird_code", "filename", "secondary_labels", "recordist"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    columns = [name for name in TRAIN_COLUMNS if name != column]
    write_table(tmp_path / "train.csv", [make_row(1)], columns)
    with pytest.raises(ValueError, match=rf"train\.csv: no column '{column}'"):
        read_recordings(tmp_path)


def test_a_cut_table_and_an_empty_one_raise(tmp_path: Path) -> None:
    write_table(tmp_path / "train.csv", [make_row(1), make_row(2)])
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text[:-300])
    with pytest.raises(ValueError, match=r"train\.csv, line 3"):
        read_recordings(tmp_path)
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(ValueError, match=r"train\.csv: "):
        read_recordings(tmp_path)
    write_table(tmp_path / "train.csv", [])
    with pytest.raises(ValueError, match="no recordings"):
        read_recordings(tmp_path)
    (tmp_path / "train.csv").write_bytes(text.encode() + b"\xff\xfe")
    with pytest.raises(ValueError, match=r"train\.csv.* UTF-8"):
        read_recordings(tmp_path)


def test_a_folder_that_is_not_in_a_layout_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases = [("none", "no such folder"), ("file", "is not a folder"), (".", "contains no table")]
    for name, reason in cases:
        with pytest.raises(FileNotFoundError, match=rf"{reason}.*train\.csv with train_audio/"):
            read_recordings(tmp_path / name)


def test_missing_recordings_are_counted_and_the_first_is_named(write: Callable[..., Path]) -> None:
    data = write(make_row(1), make_row(2, "norcar"), make_row(3, "norcar"))
    touch(data / "train_audio/aldfly/XC1.mp3")
    touch(data / "train_audio/norcar/XC3.mp3")
    with pytest.raises(FileNotFoundError, match=r"norcar/XC2\.mp3: .* 1 of 3 recordings"):
        check_recordings_exist(read_recordings(data), data)
    touch(data / "train_audio/norcar/XC2.mp3")
    check_recordings_exist(read_recordings(data), data)


@pytest.mark.parametrize("link", ["train_audio/aldfly", "train_audio/aldfly/XC1.mp3"])
def test_a_link_out_of_the_data_folder_is_refused_with_its_line(tmp_path: Path, link: str) -> None:
    outside, data = tmp_path / "outside", tmp_path / "data"
    touch(outside / "XC1.mp3")
    write_table(data / "train.csv", [make_row(0, "norcar"), make_row(1)])
    (data / link).parent.mkdir(parents=True)
    (data / link).symlink_to(outside if link.endswith("aldfly") else outside / "XC1.mp3")
    with pytest.raises(ValueError, match=r"train\.csv, line 3: .*link"):
        read_recordings(data)


def test_the_folder_of_all_recordings_may_be_a_link_and_links_inside_are_fine(
    tmp_path: Path,
) -> None:
    disk, data = tmp_path / "disk", tmp_path / "data"
    touch(disk / "aldfly/XC1.mp3")
    (disk / "aldfly/XC2.mp3").symlink_to("XC1.mp3")
    (disk / "aldfly/XC3.mp3").symlink_to("XC3.mp3")  # a loop: the audit's business
    write_table(data / "train.csv", [make_row(1), make_row(2), make_row(3)])
    (data / "train_audio").symlink_to(disk)
    check_recordings_exist(read_recordings(data), data)


def test_a_table_of_the_competitions_size_is_read_in_seconds(tmp_path: Path) -> None:
    labels = "['Corvus brachyrhynchos_American Crow', 'Parus major_Great Tit']"
    rows = [make_row(number, secondary_labels=labels) for number in range(5_000)]
    write_table(tmp_path / "train.csv", rows)
    start = os.times().user
    assert len(read_recordings(tmp_path)) == 5_000
    assert os.times().user - start < 5


def read_or_refuse(data: Path) -> tuple[pd.DataFrame | None, str]:
    """Return the recordings or the error's message; any other exception fails the test."""
    try:
        return read_recordings(data), ""
    except ValueError as error:
        return None, str(error)


VALUES = st.one_of(
    st.text(max_size=30),
    st.floats().map(str),
    st.lists(st.text(max_size=10), max_size=4).map(repr),
    st.sampled_from(["", "[]", "..", "../x.mp3", "a/b.mp3", "XC0.mp3", "C:\\x", "\0", "nocall"]),
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example([(0, "filename", "a/b.mp3")])
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(TRAIN_COLUMNS), VALUES), min_size=1, max_size=4
    )
)
def test_mutated_rows_are_read_or_refused_with_their_line(
    tmp_path: Path, changes: list[tuple[int, str, str]]
) -> None:
    rows = [make_row(number) for number in range(5)]
    for number, column, value in changes:
        rows[number][column] = value
    write_table(tmp_path / "train.csv", rows)
    recordings, message = read_or_refuse(tmp_path)
    if recordings is None:
        assert message.startswith(f"{tmp_path / 'train.csv'}, line ")
        assert "\n" not in message
        return
    for row, recording in zip(rows, recordings.to_dict("records"), strict=True):
        assert recording["ebird_code"] == row["ebird_code"]
        assert recording["recordist"] == row["recordist"].strip()
        assert recording["rating"] == float(row["rating"].strip() or 0)
        path = Path(os.path.normpath(tmp_path / recording["path"]))
        # A name may bring its folder along, as BirdCLEF's do; else the folder is the species'.
        folder = "" if len(Path(row["filename"]).parts) > 1 else row["ebird_code"].split("/")[0]
        assert path.is_relative_to(tmp_path / "train_audio" / folder)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_mutated_bytes_are_read_or_refused(tmp_path: Path, draws: st.DataObject) -> None:
    table = tmp_path / "train.csv"
    write_table(table, [make_row(number) for number in range(3)])
    content = bytearray(table.read_bytes())
    for _ in range(draws.draw(st.integers(1, 3))):
        place = draws.draw(st.integers(0, len(content) - 1))
        content[place : place + draws.draw(st.integers(0, 40))] = draws.draw(st.binary(max_size=5))
    table.write_bytes(content)
    recordings, message = read_or_refuse(tmp_path)
    assert message.startswith(str(table)) if recordings is None else 1 <= len(recordings) <= 4
