"""A clip's target comes from its recording's labels, or from strong labels at its position."""

import pandas as pd
import pytest

from birdcall.data.targets import (
    IGNORE_TARGET,
    StrongTargets,
    make_targets,
    read_strong_labels,
    write_strong_labels,
)

CLASSES = ("amecro", "bkcchi", "norcar")
HEADER = "filename,ebird_code,onset,offset,state,probability\n"


@pytest.fixture
def recordings():
    return pd.DataFrame(
        {
            "filename": ["XC1.mp3", "XC2.mp3", "XC3.mp3"],
            "ebird_code": ["amecro", "bkcchi", "norcar"],
            "secondary_codes": [("norcar",), (), ()],
            "seconds": [20.0, 3.0, 9.0],
        }
    )


def timed_table(*rows):
    return pd.DataFrame([("XC1.mp3", *row, 0.9) for row in rows], columns=HEADER.strip().split(","))


def test_targets_hold_primary_and_weighted_secondary_labels(recordings):
    assert make_targets(recordings, CLASSES, 0.25).tolist() == [
        [1.0, 0.0, 0.25],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0],
    ]


def test_secondary_labels_without_a_weight_are_unknown(recordings):
    assert make_targets(recordings, CLASSES, None)[0].tolist() == [1.0, 0.0, IGNORE_TARGET]


@pytest.mark.parametrize(
    "start, end, expected",
    [
        (0.0, 5.0, 0.0),  # silence before the first song
        (2.0, 5.6, 1.0),  # 0.6 s of it
        (2.0, 5.4, IGNORE_TARGET),  # its edge only
        (6.0, 7.0, 1.0),
        (9.6, 12.0, IGNORE_TARGET),
        (10.0, 12.0, 0.0),
        (11.0, 12.9, 1.0),  # half of a call of 0.2 s
        (11.0, 12.85, IGNORE_TARGET),
        (14.0, 16.0, IGNORE_TARGET),  # an uncertain interval
        (18.0, 20.0, 0.0),
        (-4.0, 1.0, 0.0),
    ],
)
def test_a_class_is_present_where_a_present_interval_lies_in_the_clip(
    recordings, start, end, expected
):
    table = timed_table(
        ("amecro", 5.0, 10.0, "present"),
        ("amecro", 12.8, 13.0, "present"),
        ("amecro", 15.0, 18.0, "uncertain"),
    )
    target = StrongTargets(recordings, CLASSES, table).find(0, start, end - start)
    assert target.tolist() == [expected, 0.0, 0.0]


def test_present_intervals_outweigh_uncertain_ones(recordings):
    table = timed_table(("amecro", 0.0, 20.0, "uncertain"), ("amecro", 5.0, 10.0, "present"))
    targets = StrongTargets(recordings, CLASSES, table)
    assert targets.find(0, 4.0, 5.0).tolist() == [1.0, 0.0, 0.0]
    assert targets.find(0, 14.0, 5.0).tolist() == [IGNORE_TARGET, 0.0, 0.0]


def test_a_short_recording_within_its_clip_counts_whole(recordings):
    table = timed_table(("bkcchi", 0.5, 1.0, "present")).assign(filename="XC2.mp3")
    targets = StrongTargets(recordings, CLASSES, table)
    assert targets.find(1, -7.0, 10.0).tolist() == [0.0, 1.0, 0.0]


def test_a_recording_without_times_keeps_its_labels(recordings):
    table = timed_table(("amecro", 5.0, 10.0, "present"))
    assert StrongTargets(recordings, CLASSES, table).find(1, 0.0, 5.0) is None


def test_what_is_written_is_read_again(recordings, tmp_path):
    table = timed_table(("amecro", 0.25, 20.0, "present"), ("norcar", 1.0, 2.0, "uncertain"))
    write_strong_labels(tmp_path / "relabelled.csv", table)
    read = read_strong_labels(tmp_path / "relabelled.csv", recordings, CLASSES)
    pd.testing.assert_frame_equal(read, table, check_dtype=False)


@pytest.mark.parametrize(
    "row, message",
    [
        ("XC9.mp3,amecro,0,1,present,1", "line 3, column filename: 'XC9.mp3' is no recording of"),
        ("XC1.mp3,Raven,0,1,present,1", "line 3, column ebird_code: 'Raven' is none of the 3"),
        ("XC1.mp3,amecro,0,1,maybe,1", "line 3, column state: 'maybe' is neither present nor"),
        ("XC1.mp3,amecro,-1,1,present,1", "line 3, column onset: '-1' lies outside its recording"),
        ("XC1.mp3,amecro,nan,1,present,1", "line 3, column onset: 'nan' lies outside"),
        ("XC1.mp3,amecro,2,1,present,1", "line 3, column offset: '1' is not between the onset"),
        ("XC1.mp3,amecro,19,21,present,1", "line 3, column offset: '21' is not between"),
        ("XC1.mp3,amecro,0,1,present,1.1", "line 3, column probability: '1.1' is no"),
        ("XC1.mp3,amecro,0", "line 3: 3 fields where the header has 6"),
        (
            "XC2.mp3,bkcchi,0,1,uncertain,1",
            "XC2.mp3 has no row in which its primary label bkcchi",
        ),
    ],
)
def test_a_wrong_row_is_named(recordings, tmp_path, row, message):
    path = tmp_path / "relabelled.csv"
    path.write_text(f"{HEADER}XC1.mp3,amecro,1,2,present,0.9\n{row}\n")
    with pytest.raises(ValueError, match=r"relabelled\.csv") as raised:
        read_strong_labels(path, recordings, CLASSES)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_or_column_is_named(recordings, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_strong_labels(tmp_path / "none.csv", recordings, CLASSES)
    (tmp_path / "some.csv").write_text("filename,ebird_code\nXC1.mp3,amecro\n")
    with pytest.raises(ValueError, match=r"some\.csv: no column 'onset'"):
        read_strong_labels(tmp_path / "some.csv", recordings, CLASSES)
