"""A journal holds what was finished, whenever its process was killed."""

import json

import pytest

from birdcall.storage.journal import Journal

A, B = {"recording": "a.wav", "size": 1}, {"recording": "b.wav", "size": 2}


def test_what_was_added_is_found_again(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path, "x") as journal:
        journal.add(A, {"n": 1})
        assert journal.find(A) == {"n": 1}
        assert journal.find(B) is None
    with Journal(path, "x") as journal:
        assert journal.find(A) == {"n": 1}
        assert journal.find({**A, "size": 3}) is None  # the file has changed
        journal.add(B, {"n": 2})
    assert len(path.read_text().splitlines()) == 3


def test_wherever_it_is_cut_off_whole_lines_are_kept_and_it_can_go_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, "x") as journal:
        journal.add(A, {"n": 1})
        journal.add(B, {"n": 2})
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        n_lines = content[:length].count(b"\n")
        with Journal(path, "x") as journal:
            assert [journal.find(key) is not None for key in (A, B)] == [n_lines > 1, n_lines > 2]
            for key, value in ((A, {"n": 1}), (B, {"n": 2})):
                if journal.find(key) is None:
                    journal.add(key, value)
        assert path.read_bytes() == content


def test_another_model_s_journal_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, "x") as journal:
        journal.add(A, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="of another model, or of other parameters"):
        Journal(path, "y")
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["nonsense", "[1]", json.dumps({"key": 1})])
def test_a_file_that_is_no_journal_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    Journal(path, "x").close()
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"journal.jsonl, line 2: not of a journal"):
        Journal(path, "x")


def test_a_second_process_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    with Journal(tmp_path / "j", "x"), pytest.raises(OSError, match="another process"):
        Journal(tmp_path / "j", "x")
