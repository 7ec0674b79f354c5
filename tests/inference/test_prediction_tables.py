"""What is written is read back equal by its reader, and a wrong submission is never written."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import read_audacity_labels, read_detections

from birdcall.inference import tables as outputs
from birdcall.inference.events import Event, frames_to_events, merge_events
from birdcall.kaggle.test_set import read_submission, write_submission

EVENTS = [
    Event("norcar", 0.0, 1.25, 1.0),
    Event("aldfly", 0.1 + 0.2, 7.123456789, 0.98765432101),
    Event("norcar", 86_399.99, 86_400.0, 1e-05),
]
DETECTIONS = {'b, "quoted" é.wav': EVENTS, "folder/a.mp3": EVENTS[:1]}
NAMES = {"norcar": "Northern Cardinal"}


# --- submission ---------------------------------------------------------------------------------


def test_a_submission_has_exactly_the_rows_given_in_order(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    write_submission(path, ["b_5", "a,1", "c"], ["norcar aldfly", "nocall", "amecro"])
    expected = 'row_id,birds\nb_5,norcar aldfly\n"a,1",nocall\nc,amecro\n'
    assert path.read_text() == expected
    assert pd.read_csv(path).values.tolist()[1] == ["a,1", "nocall"]
    read = read_submission(path, ["b_5", "a,1", "c"])
    assert read["birds"].tolist() == ["norcar aldfly", "nocall", "amecro"]
    assert [file.name for file in tmp_path.iterdir()] == ["submission.csv"]


@pytest.mark.parametrize(
    ("row_ids", "birds", "message"),
    [
        (["a", "b"], ["nocall"], "2 row_ids but 1 predictions"),
        (["a", "a"], ["nocall", "nocall"], r"row 2 \('a'\): row_id is empty or occurs twice"),
        (["a", ""], ["nocall", "nocall"], "row 2 .*empty or occurs twice"),
        (["a"], [""], r"row 1 \('a'\): birds is ''"),
        (["a"], [float("nan")], "birds is nan"),
        (["a"], [" "], "birds is ' '"),
        (["a"], ["aldfly  norcar"], "codes with a space between"),
        (["a"], ["aldfly nocall"], "nocall cannot be combined with species"),
        (["a"], ["aldfly aldfly"], "names a species twice"),
    ],
)
def test_a_wrong_submission_is_not_written_over_a_right_one(
    tmp_path: Path, row_ids: list, birds: list, message: str
) -> None:
    path = tmp_path / "submission.csv"
    write_submission(path, ["a"], ["nocall"])
    with pytest.raises(ValueError, match=message) as caught:
        write_submission(path, row_ids, birds)
    assert str(path) in str(caught.value)
    assert path.read_text() == "row_id,birds\na,nocall\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row_id,birds\na,nocall\n", "1 rows where 2 were expected"),
        ("row_id,birds\na,nocall\nb,nocall\nc,nocall\n", "3 rows where 2 were expected"),
        ("row_id,birds\nb,nocall\na,nocall\n", "line 2: row_id is 'b'; expected 'a'"),
        ("row_id,birds\na,nocall\na,nocall\n", "row 2 .* occurs twice"),
        ("row_id,birds\na,nocall\nb,\n", r"row 2 \('b'\): birds is ''"),
        ("birds,row_id\nnocall,a\nnocall,b\n", "the columns are birds, row_id"),
        ("row_id,birds,site\na,nocall,1\nb,nocall,1\n", "the columns are row_id, birds, site"),
        ("row_id,bird\na,nocall\n", "no column 'birds'"),
        ("row_id,birds\na,nocall\nb", "line 3: 1 fields"),
    ],
)
def test_a_submission_that_kaggle_would_misread_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "submission.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_submission(path, ["a", "b"])
    assert str(path) in str(caught.value)


# --- events -------------------------------------------------------------------------------------


def test_runs_of_frames_become_events_with_exact_times_and_their_highest_score() -> None:
    framewise = np.zeros((2, 10), np.float32)
    framewise[0, 3:6] = 0.6, 0.9, 0.5
    framewise[1, 0] = framewise[1, 9] = 0.7  # at both edges
    events = frames_to_events(framewise, ["norcar", "aldfly"], 0.1, threshold=0.5)
    assert events == [
        Event("aldfly", 0.0, 0.1, 0.7),
        Event("norcar", 0.3, 0.6, 0.9),
        Event("aldfly", 0.9, 1.0, 0.7),
    ]


def test_each_class_may_have_its_own_threshold() -> None:
    framewise = np.full((2, 4), 0.5)
    events = frames_to_events(framewise, ["a", "b"], 1.0, threshold=[0.4, 0.6])
    assert events == [Event("a", 0, 4, 0.5)]


@pytest.mark.parametrize(("max_gap", "n_events"), [(0.0, 3), (0.1, 2), (0.29, 2), (0.3, 1)])
def test_gaps_up_to_the_limit_are_closed(max_gap: float, n_events: int) -> None:
    active = np.array([[1, 0, 1, 0, 0, 0, 1]], float)
    events = frames_to_events(active, ["a"], 0.1, 0.5, max_gap_seconds=max_gap)
    assert len(events) == n_events
    assert (events[0].onset, events[-1].offset) == (0, 0.7)


def test_short_events_are_dropped_after_gaps_are_closed() -> None:
    active = np.array([[1, 0, 1, 0, 0, 0, 1]], float)
    events = frames_to_events(active, ["a"], 0.1, 0.5, min_seconds=0.3, max_gap_seconds=0.1)
    assert events == [Event("a", 0, 0.3, 1)]


def test_limits_include_their_edge_whatever_floating_point_says() -> None:
    assert 0.7 - 0.4 < 0.3 and 0.9 - 0.7 > 0.2
    assert merge_events([Event("a", 0.4, 0.7)], min_seconds=0.3) == [Event("a", 0.4, 0.7)]
    apart = [Event("a", 0.5, 0.7), Event("a", 0.9, 1.0)]
    assert merge_events(apart, max_gap_seconds=0.2) == [Event("a", 0.5, 1.0)]


def test_an_event_within_another_does_not_shorten_it() -> None:
    events = [Event("a", 0, 9, 0.5), Event("a", 2, 3, 0.9)]
    assert merge_events(events) == [Event("a", 0, 9, 0.9)]


def test_events_of_different_birds_are_not_joined() -> None:
    active = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], float)
    events = frames_to_events(active, ["a", "b"], 1, 0.5, max_gap_seconds=5)
    assert events == [Event("a", 0, 2), Event("b", 2, 4)]


def test_a_recording_in_pieces_has_the_events_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    framewise = np.repeat(rng.random((5, 400)), 3, axis=1)
    classes, limits = list("abcde"), {"min_seconds": 0.2, "max_gap_seconds": 0.1}
    whole = frames_to_events(framewise, classes, 0.032, 0.5, **limits)
    pieces = [
        event
        for start in range(0, 1200, 77)
        for event in frames_to_events(
            framewise[:, start : start + 77], classes, 0.032, 0.5, start_seconds=start * 0.032
        )
    ]
    assert len(whole) > 50
    assert merge_events(pieces, **limits) == whole


def test_frames_without_a_bird_give_no_event() -> None:
    assert frames_to_events(np.zeros((2, 50)), ["a", "b"], 0.1, 0.5) == []
    assert frames_to_events(np.zeros((2, 0)), ["a", "b"], 0.1, 0.5) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 4)), ["a", "b"], 0.1, 0.5), r"must be \(2 classes, frames\)"),
        ((np.full((1, 4), np.nan), ["a"], 0.1, 0.5), "NaN"),
        ((np.zeros((1, 4)), ["a"], 0.0, 0.5), "frame_seconds is 0"),
        ((np.zeros((1, 4)), ["a"], 0.1, 0.5, -1), "min_seconds is -1"),
    ],
)
def test_frames_that_make_no_sense_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frames_to_events(*arguments)


def test_an_event_cannot_end_before_it_begins() -> None:
    for times in ((2.0, 1.0), (-1.0, 1.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="must not end before it begins"):
            Event("a", *times)
    with pytest.raises(ValueError, match="confidence of a is nan"):
        Event("a", 0, 1, float("nan"))


# --- files --------------------------------------------------------------------------------------


def test_the_combined_table_is_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "detections.csv"
    outputs.write_detections(path, DETECTIONS, NAMES)
    assert read_detections(path) == DETECTIONS
    table = pd.read_csv(path)
    assert tuple(table.columns) == outputs.DETECTION_COLUMNS
    assert table["common_name"].fillna("").tolist()[:2] == ["Northern Cardinal", ""]


def test_json_lines_are_read_back_equal_and_have_the_columns_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "detections.jsonl"
    outputs.write_detections(path, DETECTIONS, NAMES)
    assert read_detections(path) == DETECTIONS
    first = json.loads(path.read_text().splitlines()[0])
    assert tuple(first) == outputs.DETECTION_COLUMNS
    assert first["common_name"] == "Northern Cardinal"


def test_a_raven_table_has_ravens_columns_and_is_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "a.selections.txt"
    outputs.write_raven_table(path, EVENTS, NAMES, band_hz=(50, 14_000))
    table = pd.read_csv(path, sep="\t")
    assert tuple(table.columns[:7]) == (
        "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)",
        "High Freq (Hz)",
    )  # fmt: skip
    assert table["Selection"].tolist() == [1, 2, 3]
    assert set(zip(table["Low Freq (Hz)"], table["High Freq (Hz)"], strict=True)) == {(50, 14_000)}
    assert "e-05" not in path.read_text()
    assert outputs.read_raven_table(path) == EVENTS


def test_a_table_drawn_by_hand_in_raven_is_read_once_per_selection(tmp_path: Path) -> None:
    path = tmp_path / "hand.txt"
    path.write_text(
        "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\t"
        "Species\tnotes\n"
        "1\tWaveform 1\t1\t0.5\t1.5\t0\t9000\tnorcar\tloud\n"
        "1\tSpectrogram 1\t1\t0.5\t1.5\t0\t9000\tnorcar\tloud\n"
        "2\tSpectrogram 1\t1\t3\t4\t0\t9000\taldfly\t\n"
    )
    events = [Event("norcar", 0.5, 1.5, 1.0, "loud"), Event("aldfly", 3, 4, 1.0)]
    assert outputs.read_raven_table(path) == events
    assert outputs.read_raven_table(path, "notes")[0].ebird_code == "loud"


def write_raven(path: Path, header: list[str], *rows: list[str], encoding: str = "utf-8") -> Path:
    """Write a table whose header begins as Raven's, and whose rows have one number."""
    lines = [["Selection", "Begin Time (s)", "End Time (s)", *header], *rows]
    path.write_bytes("".join("\t".join(line) + "\n" for line in lines).encode(encoding))
    return path


def test_selections_with_one_number_but_other_times_or_labels_are_several(tmp_path: Path) -> None:
    rows = [["1", "0", "1", "norcar"], ["1", "0", "1", "aldfly"], ["1", "5", "6", "norcar"]]
    path = write_raven(tmp_path / "two_annotators.txt", ["Species"], *rows, rows[0])
    expected = [Event("norcar", 0, 1), Event("aldfly", 0, 1), Event("norcar", 5, 6)]
    assert outputs.read_raven_table(path) == expected


def test_a_quote_in_a_note_is_text_and_quotes_around_a_cell_are_not(tmp_path: Path) -> None:
    rows = [
        ["1", "0", "1", "norcar", '"seet" then trill'],
        ["2", "2", "3", "norcar", '"rattle, not sure'],
        ["3", "4", "5", '"aldfly "', '"a ""far"" one"'],  # as Excel and R write it
        ["4", "6", "7", "aldfly", ""],
    ]
    path = write_raven(tmp_path / "quotes.txt", ['"Species"', "Notes"], *rows)
    events = outputs.read_raven_table(path)
    assert [(event.ebird_code, event.onset) for event in events] == [
        ("norcar", 0), ("norcar", 2), ("aldfly", 4), ("aldfly", 6),
    ]  # fmt: skip
    assert [event.note for event in events[:3]] == [rows[0][4], rows[1][4], 'a "far" one']


def test_empty_cells_at_the_end_of_a_row_may_be_missing_or_more(tmp_path: Path) -> None:
    """Excel leaves them out, or adds some."""
    rows = [["1", "0", "1", "norcar"], ["2", "2", "3", "norcar", "far", "x", "", ""]]
    path = write_raven(tmp_path / "excel.txt", ["Species", "Notes", "y"], *rows)
    expected = [Event("norcar", 0, 1), Event("norcar", 2, 3, 1.0, "far")]
    assert outputs.read_raven_table(path) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_table_is_read_in_the_encodings_of_raven_and_excel(tmp_path: Path, encoding: str) -> None:
    row = ["1", "1", "2", "norcar", "Grünfink?"]
    path = write_raven(tmp_path / "a.txt", ["Species", "Notes"], row, encoding=encoding)
    assert outputs.read_raven_table(path) == [Event("norcar", 1, 2, 1.0, "Grünfink?")]


@pytest.mark.parametrize("column", ["species", "SPECIES CODE", "Common Name", "Species.Code"])
def test_the_column_of_labels_is_known_by_its_letters(tmp_path: Path, column: str) -> None:
    path = write_raven(tmp_path / "a.txt", ["x", column], ["1", "1", "2", "", "norcar"])
    assert outputs.read_raven_table(path) == [Event("norcar", 1, 2)]


def test_a_label_column_of_any_name_can_be_given(tmp_path: Path) -> None:
    path = write_raven(tmp_path / "a.txt", ["Species", "My Tags"], ["1", "1", "2", "x", "norcar"])
    assert outputs.read_raven_table(path, "my tags") == [Event("norcar", 1, 2)]
    with pytest.raises(ValueError, match=r"other.*My Tags"):
        outputs.read_raven_table(path, "other")


def test_a_confidence_in_words_is_that_of_a_person(tmp_path: Path) -> None:
    rows = [["1", "1", "2", "a", "high"], ["2", "3", "4", "a", ""], ["3", "5", "6", "a", "0.25"]]
    path = write_raven(tmp_path / "a.txt", ["Species", "Confidence"], *rows)
    assert [event.confidence for event in outputs.read_raven_table(path)] == [1, 1, 0.25]


def test_audacity_labels_are_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    outputs.write_audacity_labels(path, EVENTS)
    assert path.read_text().splitlines()[0] == "0.0\t1.25\tnorcar 1.0"
    assert read_audacity_labels(path) == EVENTS


def test_float32_scores_are_written_as_numbers(tmp_path: Path) -> None:
    event = Event("a", np.float32(0.5), np.float64(1), np.float32(0.25))
    outputs.write_detections(tmp_path / "a.csv", {"r": [event]})
    outputs.write_detections(tmp_path / "a.jsonl", {"r": [event]})
    outputs.write_raven_table(tmp_path / "a.txt", [event])
    expected = [Event("a", 0.5, 1.0, 0.25)]
    assert read_detections(tmp_path / "a.csv") == {"r": expected}
    assert read_detections(tmp_path / "a.jsonl") == {"r": expected}
    assert outputs.read_raven_table(tmp_path / "a.txt") == expected


def test_no_events_make_a_readable_file_and_no_file_an_error(tmp_path: Path) -> None:
    outputs.write_detections(tmp_path / "empty.csv", {})
    assert (tmp_path / "empty.csv").read_text() == ",".join(outputs.DETECTION_COLUMNS) + "\n"
    outputs.write_raven_table(tmp_path / "empty.txt", [])
    assert outputs.read_raven_table(tmp_path / "empty.txt") == []
    with pytest.raises(FileNotFoundError, match=r"missing\.txt is missing"):
        outputs.read_raven_table(tmp_path / "missing.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        outputs.read_raven_table(tmp_path / "binary.txt")


RAVEN_HEAD = "Selection\tBegin Time (s)\tEnd Time (s)\tSpecies\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RAVEN_HEAD + "1\t3\t2\ta\n", "line 2: event of a lasts from 3"),
        (RAVEN_HEAD + "1\tx\t2\ta\n", r"line 2: Begin Time \(s\) is 'x'"),
        (RAVEN_HEAD + "1\t1\t2,5\ta\n", r"line 2: End Time \(s\) is '2,5'"),
        (RAVEN_HEAD + "1\t1_0\t20\ta\n", "line 2: Begin Time .* '1_0'"),
        (RAVEN_HEAD + "1\t0:01\t0:02\ta\n", "line 2: Begin Time .* '0:01'"),
        (RAVEN_HEAD + "1\t1\tnan\ta\n", "line 2: End Time .* 'nan'"),
        (RAVEN_HEAD + "1\t1\t2\ta\tmore\n", "line 2: 5 fields where the header has 4"),
        (RAVEN_HEAD + "1\t1\t2\n", "line 2: 3 fields where the header has 4"),
        ("Selection\tBegin Time (s)\tEnd Time (s)\n1\t1\t2\n", "with labels"),
        ("Selection\tBegin Time (s)\tSpecies\n1\t1\ta\n", "End Time"),
        ("Selection,Begin Time (s)\n", "no column"),
    ],
)
def test_a_bad_raven_table_is_refused_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "events.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        outputs.read_raven_table(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
