"""Files appear whole or not at all; names stay in their folder; each file counts once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from birdcall.storage.files import (
    SOUND_SUFFIXES,
    atomic_path,
    conversion_advice,
    csv_text,
    digest_files,
    find_files,
    inside,
    is_sound,
    read_table,
    write_atomically,
)
from birdcall.storage.locks import locked


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def write_half(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("content", ["åäö\r\nline\n", b"\x00\xff", ""])
def test_what_is_written_is_read_back_byte_for_byte(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_a_second_write_replaces_the_first(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.csv", "long old content")
    write_atomically(tmp_path / "a.csv", "new")
    assert (tmp_path / "a.csv").read_text() == "new"
    assert files_below(tmp_path) == ["a.csv"]


def test_an_error_while_writing_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_half(path, OSError("disk full"))
    assert path.read_text() == "old"
    assert files_below(tmp_path) == ["a.csv"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "a.csv", KeyboardInterrupt())
    assert files_below(tmp_path) == []


def test_the_target_keeps_its_old_content_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("old")
    with atomic_path(path) as temporary:
        assert (temporary.parent, temporary.suffix) == (path.parent, ".csv")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_file_has_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    write_atomically(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


HOLDER = """
import os, sys, time
from pathlib import Path
from birdcall.storage.locks import locked
with locked(Path(sys.argv[1])):
    if not os.fork():
        print(os.getppid(), os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_process_and_ends_with_it_though_a_forked_child_lives(
    tmp_path: Path,
) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "new" / "run"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        pid, child = map(int, process.stdout.readline().split())
        try:
            with pytest.raises(OSError, match=rf"run: process {pid} on .* writes to it"):
                locked(path).__enter__()
            process.kill()
            process.wait()
            with locked(path), pytest.raises(OSError, match=f"process {os.getpid()} on"):
                locked(path.parent / ".." / "new" / "run").__enter__()
            os.kill(child, 0)  # it lives
        finally:
            os.kill(child, signal.SIGKILL)
    assert files_below(tmp_path) == ["new"]


@pytest.mark.parametrize("name", ["a.mp3", "sub/a.mp3", "a..b.mp3", "..mp3", "./a.mp3"])
def test_a_plain_name_is_joined_to_its_folder(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "sub/../../a", "/etc/passwd", "a\0b"])
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a name inside"):
        inside(tmp_path, name)


def test_a_link_out_of_the_folder_is_refused_and_a_link_within_it_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.mp3").write_text("")
    (folder / "a.mp3").write_text("")
    (folder / "out.mp3").symlink_to(tmp_path / "secret.mp3")
    (folder / "within.mp3").symlink_to(folder / "a.mp3")
    assert inside(folder, "within.mp3").exists()
    with pytest.raises(ValueError, match="leads out of"):
        inside(folder, "out.mp3")


def test_a_circle_of_links_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").symlink_to("b.mp3")
    (tmp_path / "b.mp3").symlink_to("a.mp3")
    with pytest.raises(OSError, match=r"'a\.mp3' leads nowhere .*: its links form a circle"):
        inside(tmp_path, "a.mp3")


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "linked", "a.mp3") == tmp_path / "linked" / "a.mp3"


def table(folder: Path, content: str | bytes) -> Path:
    write_atomically(folder / "t.csv", content)
    return folder / "t.csv"


def test_a_table_is_read_as_it_is_written_with_the_line_of_each_row(tmp_path: Path) -> None:
    path = table(tmp_path, '\ufeffcode,note,other\nNA,"two\nlines, one cell",\n\n1.50,nan,x\n')
    frame = read_table(path, ["code", "note"])
    assert frame.columns.tolist() == ["code", "note", "other"]
    assert frame["code"].tolist() == ["NA", "1.50"]
    assert frame["note"].tolist() == ["two\nlines, one cell", "nan"]
    assert frame["other"].tolist() == ["", "x"]
    assert frame.index.tolist() == [2, 5]  # where a row starts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "t.csv"),
        ("a;b\n1;2\n", "t.csv.*commas"),
        ("a\tb\n1\t2\n", "t.csv.*commas"),
        ("b,c\n1,2\n", "no column 'a'; its columns are b, c"),
        ("a,a\n1,2\n", "more than one column 'a'"),
        ("a,b\n1,2\n3\n", "t.csv, line 3: 1 fields where the header has 2"),
        ("a,b\n1,2,3\n", "t.csv, line 2: 3 fields where the header has 2"),
        ('a,b\n1,"two\nlines"\n3,"two\nlines",5\n', "t.csv, line 4: 3 fields"),
        ("a,b\né,2\n".encode("latin-1"), "t.csv, line 2, byte 0xe9: is not a CSV in UTF-8"),
        (b"a,b\n" + b"1,2\n" * 20_000 + b"\xff,2\n", "t.csv, line 20002, byte 0xff: is not"),
        ("a,b\n1,2\n3," + "4" * 200_000 + "\n", "t.csv, line 3: is not a CSV: field larger"),
    ],
)
def test_a_broken_table_is_refused_in_one_line(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_table(table(tmp_path, content), ["a"])
    assert "\n" not in str(caught.value)


def test_a_table_without_rows_has_its_columns(tmp_path: Path) -> None:
    frame = read_table(table(tmp_path, "a,b\n"), ["a"])
    assert (len(frame), frame.columns.tolist()) == (0, ["a", "b"])


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.csv is missing"):
        read_table(tmp_path / "no.csv", ["a"])


# --- files in folders ---------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_files(folder)]


def test_what_systems_leave_in_folders_is_no_file_of_ours(tmp_path: Path) -> None:
    kept = ["b/.hidden.wav", "b/a.WAV", "c.txt"]
    left = ["._c.wav", "b/.DS_Store", "b/Thumbs.db", "__MACOSX/._a.wav"]
    touch(tmp_path, *kept, *left, ".Trashes/501/gone.wav", "$RECYCLE.BIN/gone.wav")
    assert found(tmp_path) == kept
    assert find_files(tmp_path / "nowhere") == find_files(tmp_path / "c.txt") == []


def test_linked_folders_and_files_count_once_by_their_own_path(tmp_path: Path) -> None:
    touch(tmp_path, "data/nas/site1/a.wav", "data/field/b.wav", "elsewhere/c.wav")
    data = tmp_path / "data"
    (data / "field/site1").symlink_to(data / "nas/site1", target_is_directory=True)
    (data / "all").symlink_to(data, target_is_directory=True)
    (data / "a first.wav").symlink_to(data / "nas/site1/a.wav")
    (data / "other").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (data / "gone.wav").symlink_to(tmp_path / "no such file.wav")
    assert found(data) == ["field/b.wav", "gone.wav", "nas/site1/a.wav", "other/c.wav"]


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a/x.wav", "locked/y.wav")
    real = os.scandir

    def scan(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert found(tmp_path) == ["a/x.wav"]
    assert str(tmp_path / "locked") in caplog.text


@pytest.mark.parametrize(
    ("suffix", "container", "subtype"),
    [
        (".aif", "AIFF", None),
        (".oga", "OGG", "VORBIS"),
        (".w64", "W64", "PCM_16"),
        (".RF64", "RF64", "PCM_16"),
        (".caf", "CAF", "PCM_16"),
        (".au", "AU", "PCM_16"),
        (".VOC", "VOC", "PCM_16"),
        (".sph", "NIST", "PCM_16"),
        (".mp2", "MP3", "MPEG_LAYER_III"),
    ],
)
def test_what_libsndfile_reads_is_sound(
    tmp_path: Path, suffix: str, container: str, subtype: str | None
) -> None:
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, np.zeros(3200), 32_000, format=container, subtype=subtype)
    assert len(soundfile.read(path)[0]) >= 3200
    assert is_sound(path) and not conversion_advice(path)
    assert suffix.lower() in SOUND_SUFFIXES


@pytest.mark.parametrize("name", ["a.m4a", "A.WMA", "a.webm"])
def test_sound_that_is_not_read_comes_with_advice(name: str) -> None:
    assert is_sound(Path(name)) and "ffmpeg" in conversion_advice(Path(name))
    assert not is_sound(Path("notes.txt")) and not conversion_advice(Path("notes.txt"))


def test_a_name_that_is_no_utf8_is_found_digested_and_written_as_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"Gr\xfcnspecht.wav")
    touch(tmp_path, name)
    (path,) = find_files(tmp_path)
    assert path.name == name and len(digest_files([path])) == 16
    write_atomically(tmp_path / "table.csv", f"{path.name}\nGr\u00fcn\n")
    assert (tmp_path / "table.csv").read_text("utf-8") == "Gr%FCnspecht.wav\nGr\u00fcn\n"


def test_any_name_in_a_csv_is_read_back_equal(tmp_path: Path) -> None:
    names = [
        "a\rb.wav",
        "a\nb.wav",
        "a\r\nb.wav",
        'a"b,c;d.wav',
        " a\t.wav",
        "\u2028ü.wav",
        "'=1+1",
    ]
    write_atomically(
        tmp_path / "a.csv", csv_text([("name", "n"), *((name, 1.5) for name in names)])
    )
    table = pd.read_csv(tmp_path / "a.csv")
    assert table["name"].tolist() == names
    assert table["n"].tolist() == [1.5] * len(names)
    assert csv_text([("a", 1)]) == "a,1\n"
