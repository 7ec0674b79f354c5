"""Folds are even, reproducible, and crossed by no recordist and no sound."""

import csv
import hashlib
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from birdcall.data.folds import (
    TRAINING_ONLY,
    check_folds,
    class_shares,
    describe_training_only,
    fold_report,
    make_folds,
    read_folds,
    recordist_clusters,
    write_folds,
)
from birdcall.data.recordings import read_recordings
from birdcall.report.plots import plot_folds

REAL_NAMES = Path(__file__).resolve().parents[3] / "shared" / "facts" / "recordings.csv"


def make_recordings(codes: list[str], recordists: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "filename": [f"XC{number}.mp3" for number in range(len(codes))],
            "ebird_code": codes,
            "recordist": recordists,
            "duration": 30.0,
        }
    )


def make_long_tail(codes: list[str], n_recordists: int, seed: int = 0) -> pd.DataFrame:
    """Give recordings made-up recordists, the largest with a tenth of everything."""
    weights = 1 / np.arange(1, n_recordists + 1)
    drawn = np.random.default_rng(seed).choice(n_recordists, len(codes), p=weights / weights.sum())
    return make_recordings(codes, [f"Recordist {number}" for number in drawn])


@pytest.fixture(scope="module")
def recordings() -> pd.DataFrame:
    codes = [f"bird{int(number**0.5) % 12}" for number in range(900)]
    return make_long_tail(codes, 120)


def assert_even(folds: pd.DataFrame, recordings: pd.DataFrame, n_folds: int) -> None:
    """Compare every class's share in every fold with the tolerance that the docstring states."""
    groups = recordings.groupby("ebird_code")["recordist"]
    largest = groups.agg(lambda names: names.value_counts(normalize=True).iloc[0])
    sizes = recordings["ebird_code"].value_counts()
    tolerance = np.maximum(0.04, 1 / sizes) + (largest - 1 / n_folds).clip(lower=0)
    distance = (class_shares(folds) - 1 / n_folds).abs().max(axis=1)
    assert (distance <= tolerance).all(), (distance - tolerance).nlargest(5)


@pytest.mark.parametrize("n_folds", [2, 5])
def test_no_recordist_is_in_two_folds_and_every_class_is_divided_evenly(
    recordings: pd.DataFrame, n_folds: int
) -> None:
    folds = make_folds(recordings, n_folds)
    assert sorted(folds["filename"]) == sorted(recordings["filename"])
    assert set(folds["fold"]) == set(range(n_folds))
    joined = folds.merge(recordings, on="filename")
    assert joined.groupby("recordist")["fold"].nunique().max() == 1
    assert_even(folds, recordings, n_folds)


@pytest.mark.skipif(not REAL_NAMES.is_file(), reason="needs ../shared/facts/recordings.csv")
def test_all_real_recordings_are_divided_in_seconds(tmp_path: Path) -> None:
    with REAL_NAMES.open() as file:
        codes = [row["ebird_code"] for row in csv.DictReader(file)]
    assert len(codes) == 43_934
    recordings = make_long_tail(codes, 3_000)
    start = time.process_time()
    folds = make_folds(recordings)
    assert time.process_time() - start < 10
    check_folds(folds, recordings)
    assert_even(folds, recordings, 5)
    assert folds["fold"].value_counts(normalize=True).between(0.199, 0.201).all()
    few = recordings[::20]
    write_folds(make_folds(few), tmp_path / "a.csv")
    write_folds(make_folds(few.sample(frac=1, random_state=0)), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_another_seed_makes_other_folds(recordings: pd.DataFrame) -> None:
    folds = make_folds(recordings, seed=0)
    assert folds.equals(make_folds(recordings, seed=0))
    assert not folds.equals(make_folds(recordings, seed=1))


def test_a_small_case_comes_out_as_worked_by_hand() -> None:
    # A and D hold species x, B and the rest of D species y: only {A, B} against {D, E} is even.
    recordings = make_recordings(
        ["x"] * 6 + ["y"] * 6,
        ["A", "A", "A", "D", "D", "E", "B", "B", "B", "D", "E", "E"],
    )
    folds = make_folds(recordings, 2).set_index("filename")["fold"]
    fold_of = dict(zip(recordings["recordist"], folds[recordings["filename"]], strict=True))
    assert fold_of["A"] == fold_of["B"] != fold_of["D"] == fold_of["E"]


def test_the_same_bytes_come_out_on_every_machine_and_with_every_version(tmp_path: Path) -> None:
    # Committed folds are what all scores refer to: who changes this hash, voids them.
    codes = [f"bird{number * number % 17}" for number in range(2000)]
    recordists = [f"Recordist {number % 97 * (number % 11) // 3}" for number in range(2000)]
    write_folds(make_folds(make_recordings(codes, recordists)), tmp_path / "folds.csv")
    digest = hashlib.sha256((tmp_path / "folds.csv").read_bytes()).hexdigest()
    assert digest == "97bbd656fd8b56e530be3d336c9d101937d444a3c2dc4a99dcd329e6992acd88"


def test_recordings_of_one_sound_stay_together(recordings: pd.DataFrame) -> None:
    sounds = [f"hash {number // 2}" if number < 100 else "" for number in range(len(recordings))]
    folds = make_folds(recordings, 5, audio_hashes=sounds)
    check_folds(folds, recordings, sounds)
    fold_of = folds.set_index("filename")["fold"]
    for number in range(0, 100, 2):
        assert fold_of[f"XC{number}.mp3"] == fold_of[f"XC{number + 1}.mp3"]
    apart = make_folds(recordings, 5)
    with pytest.raises(ValueError, match="folds leak: the audio hash"):
        check_folds(apart, recordings, sounds)


def test_a_recordist_is_one_person_however_the_name_is_written() -> None:
    recordings = make_recordings(["x"] * 6, ["Jo Doe", " jo  doe", "JO DOE", "A", "B", "C"])
    folds = make_folds(recordings, 3)
    assert folds.set_index("filename")["fold"][["XC0.mp3", "XC1.mp3", "XC2.mp3"]].nunique() == 1
    check_folds(folds, recordings)


@pytest.mark.parametrize("unknown", ["", "  ", None, float("nan")])
def test_recordings_of_nobody_known_are_each_on_their_own(unknown: object) -> None:
    recordings = make_recordings(["x"] * 10, [unknown] * 10)
    folds = make_folds(recordings, 5)
    assert list(folds["fold"].value_counts()) == [2] * 5
    check_folds(folds, recordings)


def test_a_class_of_several_recordists_is_in_every_training_part() -> None:
    # Evenness alone would leave class y with the recordist of most of it, in one fold.
    codes = ["y"] * 9 + ["y"] + ["x"] * 90 + [f"z{number}" for number in range(40)]
    recordists = ["big"] * 9 + ["other"] + ["other"] * 90 + ["other"] * 20 + ["big"] * 20
    folds = make_folds(make_recordings(codes, recordists), 2)
    shares = class_shares(folds)
    assert shares.loc["y"].max() < 1


@pytest.fixture
def rare_recordings() -> pd.DataFrame:
    """A recordist with a third of all recordings, most of species that nobody else has."""
    codes = ["x"] * 8 + ["y"] * 8 + [f"rare{number}" for number in range(9)] + ["z"] * 3
    recordists = [f"R{number % 8}" for number in range(16)] + ["big"] * 9 + ["R1"] * 3
    return make_recordings([*codes, "x"], [*recordists, "big"])


def test_rare_species_are_in_every_training_part_and_held_out_in_none(
    tmp_path: Path, rare_recordings: pd.DataFrame
) -> None:
    before = fold_report(make_folds(rare_recordings, 2), rare_recordings)
    assert before["unknown_to_training"].sum() == 10
    folds = make_folds(rare_recordings, 2, min_recordings=2)
    is_rare = folds["ebird_code"].str.startswith("rare") | (folds["ebird_code"] == "z")
    assert (folds["fold"][is_rare] == TRAINING_ONLY).all()  # z: three, but by one recordist
    assert set(folds["fold"][~is_rare]) == {0, 1}
    report = fold_report(folds, rare_recordings)
    assert list(report.index) == [0, 1]
    assert report["unknown_to_training"].sum() == 0
    assert report["largest_recordist"].max() < before["largest_recordist"].max()
    assert list(class_shares(folds).index) == ["x", "y"]
    check_folds(folds, rare_recordings)  # "big" has one recording that is held out
    write_folds(folds, tmp_path / "folds.csv")
    assert read_folds(tmp_path / "folds.csv", rare_recordings, 2).equals(folds)
    text = describe_training_only(folds)
    assert "12 of 29 recordings" in text
    assert "10 rare species" in text
    assert describe_training_only(make_folds(rare_recordings, 2)) == ""


def test_what_sounds_like_a_rare_recording_is_in_every_training_part_too(
    rare_recordings: pd.DataFrame,
) -> None:
    hashes = [f"sound {number}" for number in range(len(rare_recordings))]
    hashes[0] = hashes[16]  # of x, and of the first rare species
    folds = make_folds(rare_recordings, 2, 0, hashes, min_recordings=2)
    fold_of = folds.set_index("filename")["fold"]
    assert fold_of["XC0.mp3"] == fold_of["XC16.mp3"] == TRAINING_ONLY
    assert fold_of["XC1.mp3"] >= 0
    check_folds(folds, rare_recordings, hashes)
    leaking = folds.assign(fold=folds["fold"].where(folds["filename"] != "XC0.mp3", 0))
    with pytest.raises(ValueError, match=r"XC0\.mp3"):
        check_folds(leaking, rare_recordings, hashes)


def test_where_all_species_are_rare_there_are_no_folds(rare_recordings: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="only 0 recordists of species with 99 recordings"):
        make_folds(rare_recordings, 2, min_recordings=99)


def test_what_the_recordists_make_impossible_is_said(caplog: pytest.LogCaptureFixture) -> None:
    recordings = make_recordings(["x"] * 4 + ["y"] * 4, ["A"] * 4 + ["A", "B", "C", "D"])
    with caplog.at_level(logging.WARNING):
        folds = make_folds(recordings, 2)
    assert "1 of 2 species are in one fold only" in caplog.text
    assert fold_report(folds, recordings)["unknown_to_training"].sum() == 1
    with pytest.raises(ValueError, match="n_folds is 5, but there are only 4 recordists"):
        make_folds(recordings, 5)
    with pytest.raises(ValueError, match="n_folds is 1"):
        make_folds(recordings, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("vwxyz"), st.sampled_from("ABCDEFGHIJ ")), min_size=30),
    st.integers(2, 3),
    st.integers(0, 3),
    st.integers(1, 8),
)
def test_whatever_the_recordings_nothing_leaks_and_classes_that_can_be_are_divided(
    rows: list[tuple[str, str]], n_folds: int, seed: int, min_recordings: int
) -> None:
    recordings = make_recordings([row[0] for row in rows], [row[1] for row in rows])
    groups = recordings["recordist"].where(recordings["recordist"] != " ", recordings["filename"])
    of_species = groups.groupby(recordings["ebird_code"])
    is_rare = (of_species.size() < min_recordings) | (of_species.nunique() == 1)
    is_rare &= min_recordings > 1
    groups = groups[~recordings["ebird_code"].map(is_rare)]
    if groups.nunique() < n_folds:
        return
    folds = make_folds(recordings, n_folds, seed, min_recordings=min_recordings)
    check_folds(folds, recordings)
    assert len(folds) == len(recordings)
    assert ((folds["fold"] == TRAINING_ONLY) == folds["ebird_code"].map(is_rare)).all()
    several = (of_species.nunique() > 1) & ~is_rare
    if groups.nunique() > 2 * several.sum():  # else dividing one may undivide another
        undivided = class_shares(folds).max(axis=1) == 1
        assert not undivided[several[several].index].any()


def test_a_leak_is_found_and_names_the_recordist(recordings: pd.DataFrame) -> None:
    folds = make_folds(recordings)
    largest = recordings["recordist"].value_counts().index[0]
    moved = recordings.loc[recordings["recordist"] == largest, "filename"].iloc[0]
    leaky = folds.assign(fold=folds["fold"].where(folds["filename"] != moved, 4 - folds["fold"]))
    if leaky.equals(folds):
        leaky = folds.assign(fold=folds["fold"].where(folds["filename"] != moved, 0))
    with pytest.raises(ValueError, match=rf"recordist {largest.lower()} is in fold .*{moved}"):
        check_folds(leaky, recordings)


def test_folds_are_read_back_as_written(tmp_path: Path, recordings: pd.DataFrame) -> None:
    path = tmp_path / "folds" / "data.csv"
    folds = make_folds(recordings)
    write_folds(folds, path)
    assert read_folds(path, recordings).equals(folds)
    assert read_folds(path, recordings, 5).equals(folds)
    assert path.read_text().splitlines()[0] == "filename,ebird_code,fold"


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("XC7.mp3,{code},{fold}", "XC7.mp3,{code},one", r"line \d+: fold is 'one'"),
        ("XC7.mp3,{code},{fold}", "XC7.mp3,otter,{fold}", r"line \d+: XC7.mp3 of otter is of"),
        ("XC7.mp3,{code},{fold}", "XC0.mp3,{code},{fold}", r"line \d+: XC0.mp3 .*"),
        ("XC7.mp3,{code},{fold}", "XC9999.mp3,{code},{fold}", "is not in this data set"),
        ("XC7.mp3,{code},{fold}", "XC7.mp3,{code},7", "has folds 0, 1, 2, 3, 4, 7; expected"),
        ("ebird_code", "species", "no column 'ebird_code'"),
        ("XC7.mp3,{code},{fold}", "XC7.mp3,{code}", "line "),
    ],
)
def test_folds_that_do_not_fit_are_refused(
    tmp_path: Path, recordings: pd.DataFrame, old: str, new: str, message: str
) -> None:
    path = tmp_path / "data.csv"
    folds = make_folds(recordings)
    write_folds(folds, path)
    row = folds.set_index("filename").loc["XC7.mp3"]
    values = {"code": row["ebird_code"], "fold": row["fold"]}
    text = path.read_text()
    assert old.format(**values) in text
    path.write_text(text.replace(old.format(**values), new.format(**values)))
    with pytest.raises(ValueError, match=message) as caught:
        read_folds(path, recordings)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_number_of_folds_than_asked_for_is_refused(
    tmp_path: Path, recordings: pd.DataFrame
) -> None:
    write_folds(make_folds(recordings, 3), tmp_path / "data.csv")
    with pytest.raises(ValueError, match="has folds 0, 1, 2; expected 0 to 4"):
        read_folds(tmp_path / "data.csv", recordings, 5)
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_folds(tmp_path / "none.csv", recordings)


def test_a_leak_in_a_file_is_refused(tmp_path: Path, recordings: pd.DataFrame) -> None:
    folds = make_folds(recordings)
    write_folds(folds.assign(fold=np.arange(len(folds)) % 5), tmp_path / "data.csv")
    with pytest.raises(ValueError, match="folds leak: the recordist"):
        read_folds(tmp_path / "data.csv", recordings)


def test_recordings_that_were_left_out_stay_out_and_are_named(
    tmp_path: Path, recordings: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    write_folds(make_folds(recordings.iloc[10:]), tmp_path / "data.csv")
    assert len(read_folds(tmp_path / "data.csv", recordings)) == len(recordings) - 10
    (record,) = [item for item in caplog.records if item.levelname == "WARNING"]
    assert "data.csv" in record.getMessage()
    assert sorted(recordings["filename"][:10])[0] in record.getMessage()


def test_the_report_counts_recordings_and_recordists() -> None:
    recordings = make_recordings(["x", "x", "y", "x"], ["A", "A", "B", ""])
    folds = recordings[["filename", "ebird_code"]].assign(fold=[0, 0, 1, 1])
    report = fold_report(folds, recordings)
    assert list(report["recordings"]) == [2, 2]
    assert list(report["recordists"]) == [1, 2]
    assert list(report["largest_recordist"]) == [1.0, 0.5]
    assert list(report["species"]) == [1, 2]
    assert list(report["highest_share"]) == [pytest.approx(2 / 3), 1.0]
    assert list(report["unknown_to_training"]) == [0, 1]


def test_hours_are_those_that_were_decoded(recordings: pd.DataFrame) -> None:
    stated = recordings.assign(duration=3600.0)
    folds = make_folds(stated)
    report = fold_report(folds, stated)
    assert list(report["hours"]) == list(report["recordings"])
    report = fold_report(folds, stated.assign(seconds=1800.0))  # as the audit measured
    assert list(report["hours"]) == list(report["recordings"] / 2)


def test_the_picture_shows_every_species_in_every_fold(recordings: pd.DataFrame) -> None:
    folds = make_folds(recordings)
    shares, report = class_shares(folds), fold_report(folds, recordings)
    left, right = plot_folds(shares, folds["ebird_code"].value_counts(), report).axes
    assert len(left.collections) == 5
    assert all(len(dots.get_offsets()) == 12 for dots in left.collections)
    assert len(right.patches) == 10


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_few_recordists_with_whole_species_are_still_divided(
    cornell_mini: Path, n_folds: int
) -> None:
    recordings = read_recordings(cornell_mini)
    folds = make_folds(recordings, n_folds)
    check_folds(folds, recordings)
    assert class_shares(folds).max(axis=1).max() < 1


def test_recordings_of_one_recordist_are_a_cluster_and_unknown_ones_their_own():
    table = pd.DataFrame(
        {"recordist": ["Ann B", " ann  b", "", None, "C"], "path": ["p", "q", "r", "s", "t"]}
    )
    ann, again, one, other, last = recordist_clusters(table)
    assert ann == again
    assert len({ann, one, other, last}) == 4
