"""Folders of noise are read without their birds, and split without a source on both sides."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from birdcall.audio.filters import NOISE_KINDS, generate_noise
from birdcall.data.noise import find_noise, split_noise


def test_noise_files_are_found_in_all_subfolders_sorted_and_nothing_else(tmp_path):
    for name in ("b/rain.WAV", "a.flac", "b/c/wind.ogg", "notes.txt", "b/list.csv", "z.mp3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in find_noise(tmp_path)]
    assert names == ["a.flac", "b/c/wind.ogg", "b/rain.WAV", "z.mp3"]


def test_a_link_to_a_parent_ends_and_a_link_elsewhere_is_followed(tmp_path):
    folder, elsewhere = tmp_path / "noise", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "wind.wav").touch()
    (elsewhere / "rain.wav").touch()
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "far").symlink_to(elsewhere, target_is_directory=True)
    (folder / "gone.wav").symlink_to(tmp_path / "nothing.wav")
    names = [path.relative_to(folder).as_posix() for path in find_noise(folder)]
    assert names == ["far/rain.wav", "wind.wav"]


def test_noise_in_any_format_that_is_read_is_taken_once_and_the_rest_is_named(tmp_path, caplog):
    for name in ("a.W64", "b.caf", "c.mp2", "rain.m4a", "._a.W64"):
        (tmp_path / name).touch()
    (tmp_path / "again.wav").symlink_to("b.caf")
    assert [path.name for path in find_noise(tmp_path)] == ["a.W64", "b.caf", "c.mp2"]
    assert "rain.m4a" in caplog.text and "convert" in caplog.text


def test_an_absent_folder_has_no_noise(tmp_path):
    assert find_noise(tmp_path / "nowhere") == []


def test_generated_noise_has_every_kind_and_is_written_once(tmp_path):
    paths = generate_noise(tmp_path / "noise", seconds=1.0, per_kind=2)
    assert find_noise(tmp_path / "noise") == sorted(paths)
    assert len(paths) == 2 * len(NOISE_KINDS)
    first = {path: path.stat().st_mtime_ns for path in paths}
    for path in paths:
        noise, sample_rate = soundfile.read(path)
        assert (len(noise), sample_rate) == (32_000, 32_000)
        assert np.sqrt(np.mean(np.square(noise))) == pytest.approx(0.1, rel=1e-3)
    assert generate_noise(tmp_path / "noise", seconds=1.0, per_kind=2) == paths
    assert {path: path.stat().st_mtime_ns for path in paths} == first


def write_files(folder: Path, *names: str) -> list[Path]:
    """Write files of different content; find_noise does not decode them."""
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(path).encode() * 100)
    return paths


def write_table(path: Path, *lines: str, end: str = "\n", encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(end.join([*lines, ""]).encode(encoding))


def found(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_noise(folder)]


@pytest.mark.parametrize("end, encoding", [("\n", "utf-8"), ("\r\n", "utf-8-sig")])
@pytest.mark.parametrize(
    "table, header, sound",
    [
        # As the zips of 2016 and 2018 and their CSV files unpack, side by side or inside out.
        ("ff1010bird_metadata.csv", "itemid,hasbird", "ff1010bird/wav"),
        ("ff1010bird_metadata_2018.csv", "itemid,datasetid,hasbird", "wav"),
        ("ff1010bird/ff1010bird_metadata_2018.csv", "itemid,datasetid,hasbird", "ff1010bird_wav"),
        (
            "warblrb10k_public_metadata_2018.csv",
            "itemid,datasetid,hasbird",
            "warblrb10k_public/wav",
        ),
        ("b/c/BirdVoxDCASE20k_csvpublic.csv", "itemid,datasetid,hasbird", "BirdVox-DCASE-20k/wav"),
    ],
)
def test_of_the_bird_audio_detection_sets_only_bird_free_clips_are_taken(
    tmp_path: Path, table: str, header: str, sound: str, end: str, encoding: str
) -> None:
    ids = ["64486", "2525", "6c1b65c5-41da-47f9-93f1", "100"]
    middle = ",set" if "datasetid" in header else ""
    rows = [f"{item}{middle},{label}" for item, label in zip(ids, "1001", strict=True)]
    write_table(tmp_path / table, header, *rows, end=end, encoding=encoding)
    write_files(tmp_path, *[f"{sound}/{item}.wav" for item in ids], "mine/rain.flac")
    write_files(tmp_path, "__MACOSX/._2525.wav")
    names = [f"{sound}/2525.wav", f"{sound}/6c1b65c5-41da-47f9-93f1.wav", "mine/rain.flac"]
    assert found(tmp_path) == sorted(names)


ESC50 = "filename,fold,target,category,esc10,src_file,take"


@pytest.mark.parametrize("root", ["ESC-50-master", "esc50/ESC-50-master", "."])
def test_of_esc_50_all_but_the_birds_are_taken_insects_and_frogs_too(
    tmp_path: Path, root: str
) -> None:
    clips = {
        "1-100032-A-0.wav": "dog",
        "1-18755-A-4.wav": "frog",
        "2-50667-A-41.wav": "chainsaw",
        "3-110913-A-7.wav": "insects",
        "1-100038-A-14.wav": "chirping_birds",
        "1-103298-A-9.wav": "crow",
        "1-31251-A-6.wav": "hen",
        "1-26806-A-1.wav": "rooster",
    }
    folder = tmp_path / root
    rows = [f"{name},1,0,{kind},False,1,A" for name, kind in clips.items()]
    write_table(folder / "meta" / "esc50.csv", ESC50, *rows)
    write_files(folder, *[f"audio/{name}" for name in clips])
    taken = {Path(name).name for name in found(tmp_path)}
    assert taken == set(list(clips)[:4])


def test_listed_files_that_are_absent_are_counted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(tmp_path / "ff1010bird_metadata.csv", "itemid,hasbird", "100,0", "200,0", "300,1")
    write_files(tmp_path, "wav/100.wav")
    with caplog.at_level(logging.INFO):
        assert found(tmp_path) == ["wav/100.wav"]
    assert "ff1010bird: 1 bird-free files, 0 left out" in caplog.text
    assert "ff1010bird: 2 of 3 listed files are missing, such as 200" in caplog.text


def test_sound_of_a_collection_that_nothing_calls_bird_free_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_table(tmp_path / "ff1010bird_metadata.csv", "itemid,hasbird", "100,0")
    night = "night/BirdVox-full-night_flac-audio_unit01.flac"
    write_files(tmp_path, "ff1010bird/wav/100.wav", "ff1010bird/wav/999.wav", night)
    assert found(tmp_path) == ["ff1010bird/wav/100.wav"]
    assert "ff1010bird: 1 files are left out" in caplog.text
    assert "BirdVox-full-night: 1 files are left out" in caplog.text


@pytest.mark.parametrize("sound", ["ESC-50-master/audio/a.wav", "BirdVox-DCASE-20k/wav/b.wav"])
def test_a_collection_without_its_metadata_is_refused(tmp_path: Path, sound: str) -> None:
    (path,) = write_files(tmp_path / "noise", sound)
    with pytest.raises(FileNotFoundError, match="without the metadata") as caught:
        find_noise(tmp_path / "noise")
    assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="without the metadata"):
        find_noise(tmp_path / "noise" / sound.split("/")[0])  # given by --noise


@pytest.mark.parametrize(
    "name, lines, message",
    [
        ("ff1010bird_metadata.csv", ["itemid,bird", "1,0"], "no column 'hasbird'"),
        ("ff1010bird_metadata.csv", ["itemid,hasbird", "1,0", "2,yes"], "line 3, column hasbird"),
        ("ff1010bird_metadata.csv", ["itemid,hasbird", "1,0", "2,"], "'' is no hasbird; expected"),
        ("ff1010bird_metadata.csv", ["itemid,hasbird", "../2,1"], "line 2, column itemid"),
        ("ff1010bird_metadata.csv", ["itemid,hasbird", ",1"], "line 2, column itemid: '' is no"),
        ("ff1010bird_metadata.csv", ["itemid,hasbird", "1"], "line 2: 1 fields"),
        ("ff1010bird_metadata.csv", ["itemid,hasbird"], "has a header, but no rows"),
        ("BirdVoxDCASE20k_csvpublic.csv", ["<html>"], "no column 'itemid'"),
        ("esc50.csv", [ESC50, "a.wav,1,0,,False,1,A"], "line 2, column category: '' is no cat"),
    ],
)
def test_metadata_that_cannot_be_read_are_one_clear_line(
    tmp_path: Path, name: str, lines: list[str], message: str
) -> None:
    write_table(tmp_path / name, *lines)
    with pytest.raises(ValueError, match=message) as caught:
        find_noise(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clip_that_one_of_two_tables_calls_a_bird_is_left_out(tmp_path: Path) -> None:
    write_table(tmp_path / "ff1010bird_metadata.csv", "itemid,hasbird", "1,1", "2,0")
    write_table(tmp_path / "ff1010bird_metadata_2018.csv", "itemid,hasbird", "1,0", "2,0")
    write_files(tmp_path, "wav/1.wav", "wav/2.wav")
    assert found(tmp_path) == ["wav/2.wav"]


def split_names(files: list[Path], fold: int, n_folds: int = 5) -> tuple[set[str], set[str]]:
    training, validation = split_noise(files, fold, n_folds)
    assert sorted([*training, *validation]) == sorted(files)
    return {path.name for path in training}, {path.name for path in validation}


def test_clips_of_one_freesound_recording_stay_together_across_collections(tmp_path: Path) -> None:
    clips = [f"ESC-50/audio/1-{1000 + n // 3}-{'ABC'[n % 3]}-{n % 4}.wav" for n in range(150)]
    files = write_files(tmp_path, *clips, *[f"wav/{1000 + n}.wav" for n in range(50)])
    for fold in range(5):
        training, validation = split_noise(files, fold, 5)
        numbers = [
            {path.stem.split("-")[1] if "-" in path.stem else path.stem for path in part}
            for part in (training, validation)
        ]
        assert not numbers[0] & numbers[1]
        assert 0.1 < len(validation) / len(files) < 0.3


def test_every_file_is_validated_with_in_one_fold_where_there_are_many(tmp_path: Path) -> None:
    files = write_files(tmp_path, *[f"wav/clip {n:03d}.wav" for n in range(200)])
    held_out = [name for fold in range(4) for name in split_names(files, fold, 4)[1]]
    assert sorted(held_out) == sorted(path.name for path in files)


def test_the_split_depends_on_the_sound_alone(tmp_path: Path) -> None:
    names = [f"wav/clip {n:03d}.wav" for n in range(60)]
    files = write_files(tmp_path / "a", *names)
    training, validation = split_names(files, 1)
    assert split_names(files[::-1], 1) == (training, validation)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert split_names(find_noise(tmp_path / "moved"), 1) == (training, validation)
    more = write_files(tmp_path / "a", *[f"wav/new {n}.wav" for n in range(30)])
    after = split_names([*files, *more], 1)
    assert training <= after[0]
    assert validation <= after[1]


def test_a_copy_under_another_name_stays_with_its_original(tmp_path: Path) -> None:
    files = write_files(tmp_path, *[f"clip {n:02d}.wav" for n in range(20)])
    for path in files:
        shutil.copy(path, tmp_path / f"copy of {path.name}")
    for fold in range(2):
        for part in split_names(find_noise(tmp_path), fold, 2):
            assert part
            assert {name.removeprefix("copy of ") for name in part} <= part


@pytest.mark.parametrize("n_folds", [2, 5])
def test_every_kind_of_generated_noise_is_on_both_sides_of_every_fold(
    tmp_path: Path, n_folds: int
) -> None:
    files = generate_noise(tmp_path, 8_000, seconds=0.5)
    before = [split_noise(files, fold, n_folds) for fold in range(n_folds)]
    for part in (part for parts in before for part in parts):
        assert {path.name.split("_")[0] for path in part} == set(NOISE_KINDS)
    for path in files:  # another processor may round otherwise
        path.write_bytes(path.read_bytes()[::-1])
    assert [split_noise(files, fold, n_folds) for fold in range(n_folds)] == before


def test_two_sources_are_divided_and_a_single_one_is_for_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_files(tmp_path, "rain_01.wav", "wind_01.wav")
    for fold in range(5):
        training, validation = split_noise(files, fold, 5)
        assert len(training) == len(validation) == 1
    assert not caplog.records
    assert split_noise(files[:1], 0, 5) == (files[:1], [])
    assert "of one source" in caplog.text
    assert split_noise([], 0, 5) == ([], [])
    with pytest.raises(ValueError, match="fold 5 is out of range; it must be from 0 to 4"):
        split_noise(files, 5, 5)
