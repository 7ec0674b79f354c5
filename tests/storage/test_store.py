"""A journal holds what was finished, whenever its process was killed; a store never gives back
what is damaged, outdated or incomplete."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from birdcall.storage import store as store_module
from birdcall.storage.files import write_atomically
from birdcall.storage.store import Journal, Store, code_digest, read_arrays, write_arrays

A, B = {"recording": "a.wav", "size": 1}, {"recording": "b.wav", "size": 2}


# --- journal ---


def test_an_added_item_is_read_again(tmp_path):
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


def test_a_second_value_of_a_key_replaces_the_first(tmp_path):
    with Journal(tmp_path / "j", "x") as journal:
        for key, n in ((A, 1), (B, 2), (A, 3)):
            journal.add(key, {"n": n})
    with Journal(tmp_path / "j", "x") as journal:
        assert list(journal.items()) == [(A, {"n": 3}), (B, {"n": 2})]


def test_a_journal_cut_at_any_byte_keeps_its_complete_lines_and_continues(tmp_path):
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


def test_the_journal_of_another_model_is_refused_and_not_changed(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, "x") as journal:
        journal.add(A, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="of another model or of other parameters"):
        Journal(path, "y")
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["nonsense", "[1]", json.dumps({"key": 1})])
def test_a_damaged_line_is_named_by_file_and_number_and_costs_its_item_only(tmp_path, caplog, line):
    path = tmp_path / "journal.jsonl"
    with Journal(path, "x") as journal:
        journal.add(A, {"n": 1})
        journal.add(B, {"n": 2})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[2], ""]))
    with Journal(path, "x", restart=True) as journal:
        assert list(journal.items()) == [(B, {"n": 2})]
        journal.add(A, {"n": 3})
    (record,) = caplog.records
    assert "journal.jsonl: damaged in line 2" in record.getMessage()
    path.write_text("\n".join([line, *lines[1:], ""]))
    with pytest.raises(ValueError, match=r"journal.jsonl, line 1.*--overwrite"):
        Journal(path, "x")


@contextmanager
def full_disk(n_bytes=1000):
    """No file can be longer, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_a_full_disk_does_not_take_is_named(tmp_path):
    store = Store(tmp_path / "store", ".x", ["config"])
    with Journal(tmp_path / "journal", "x") as journal, full_disk():
        journal.add(B, {"n": 2})
        with pytest.raises(OSError, match=r"large.*/journal'"):
            journal.add(A, {"text": 2000 * "x"})
        with pytest.raises(OSError, match=r"large.*/a\.csv'"):
            write_atomically(tmp_path / "a.csv", 2000 * "x")
        with pytest.raises(OSError, match=r"/store.*large"), store.writing("a", {}) as path:
            write_arrays(path, {"a": np.zeros(2000)}, {})
    with full_disk(0), pytest.raises(OSError, match=r"large.*/new'"):
        Journal(tmp_path / "new", "x")
    (tmp_path / "new").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "store"]
    assert not list((tmp_path / "store").iterdir())
    with Journal(tmp_path / "journal", "x") as journal:
        assert journal.find(B) == {"n": 2}


@pytest.mark.parametrize("content", ['{"fingerprint": "y"}\n{"key": 1, "value": {}}\n', "text\n"])
def test_a_journal_that_may_restart_drops_what_it_cannot_use(tmp_path, caplog, content):
    path = tmp_path / "journal.jsonl"
    path.write_text(content)
    with Journal(path, "x", restart=True) as journal:
        assert list(journal.items()) == []
        journal.add(A, {"n": 1})
    assert len(caplog.records) == 1
    assert "journal.jsonl" in caplog.text
    with Journal(path, "x") as journal:
        assert list(journal.items()) == [(A, {"n": 1})]


def test_a_second_process_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "link").symlink_to(tmp_path)
    with Journal(tmp_path / "j", "x") as journal:
        journal.add(A, {"n": 1})
        content = journal.path.read_bytes()
        with pytest.raises(OSError, match=rf"j: process {os.getpid()} on .*writes to it"):
            Journal(tmp_path / "link" / "j", "y", overwrite=True)
        assert journal.path.read_bytes() == content
        journal.add(B, {"n": 2})
    with Journal(tmp_path / "j", "x") as journal:
        assert [value["n"] for _, value in journal.items()] == [1, 2]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["j", "link"]  # and no lock


def test_a_journal_that_is_overwritten_begins_empty(tmp_path, caplog):
    with Journal(tmp_path / "j", "x") as journal:
        journal.add(A, {"n": 1})
    for fingerprint in ("x", "y"):
        with Journal(tmp_path / "j", fingerprint, overwrite=True) as journal:
            assert list(journal.items()) == []
            journal.add(B, {"n": 2})
    assert not caplog.records


def test_what_differs_from_the_journal_of_another_run_is_named(tmp_path):
    Journal(tmp_path / "j", {"code": {"a": "1"}, "device": "cpu", "package": "p"}).close()
    with pytest.raises(ValueError, match=r"\(code, device\)"):
        Journal(tmp_path / "j", {"code": {"a": "2"}, "device": "cuda", "package": "p"})


# --- store ---


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", ".txt", ["storage.files"])


def write(store, name, made_from, content, part=""):
    with store.writing(name, made_from, part) as temporary:
        temporary.write_text(content)


def files_of(store):
    return sorted(path for path in store.folder.rglob("*") if path.is_file())


def test_a_written_file_is_read_for_what_it_is_made_from_and_for_nothing_else(store):
    assert store.read("a", {"x": 1}, Path.read_text) is None
    write(store, "a", {"x": 1, "y": [Path("p")]}, "content")
    assert store.read("a", {"y": [Path("p")], "x": 1}, Path.read_text) == "content"
    assert store.read("a", {"x": 2, "y": [Path("p")]}, Path.read_text) is None
    assert store.read("b", {"x": 1, "y": [Path("p")]}, Path.read_text) is None


def test_other_code_is_another_file(store, monkeypatch):
    write(store, "a", {}, "content")
    monkeypatch.setattr(store_module, "code_digest", lambda *modules: {"storage.files": "other"})
    assert store.read("a", {}, Path.read_text) is None


def test_writing_deletes_earlier_states_of_the_same_name_only(store):
    others = ["a.b", "ab", "folder/a", "a.0123456789abcdef"]
    for name in (*others, "a"):
        write(store, name, {"x": 1}, name)
    write(store, "a", {"x": 2}, "new")
    assert store.read("a", {"x": 1}, Path.read_text) is None
    assert store.read("a", {"x": 2}, Path.read_text) == "new"
    assert [store.read(name, {"x": 1}, Path.read_text) for name in others] == others


def test_the_parts_of_a_name_are_outdated_together(store):
    for part in ("0-of-2", "1-of-2"):
        write(store, "deep/a[1]", {"x": 1}, part, part)
    assert store.read("deep/a[1]", {"x": 1}, Path.read_text, "0-of-2") == "0-of-2"
    assert len(files_of(store)) == 2
    write(store, "deep/a[1]", {"x": 2}, "new", "0-of-1")
    assert [path.read_text() for path in files_of(store)] == ["new"]


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ValueError("x")])
def test_a_damaged_file_is_one_warning_that_names_it(store, caplog, error):
    def fail(path):
        raise error

    write(store, "a", {}, "content")
    assert store.read("a", {}, fail) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(store.path("a", {})) in caplog.text


def test_an_interrupted_write_keeps_the_earlier_state(store):
    write(store, "a", {"x": 1}, "old")

    def write_half():
        with store.writing("a", {"x": 2}) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [path.read_text() for path in files_of(store)] == ["old"]


KILLED = """
import os, sys
from pathlib import Path
from birdcall.storage.store import Store
with Store(Path(sys.argv[1]), ".txt", []).writing("a", {}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_a_kill_in_the_middle_leaves_a_temporary_file_that_can_be_removed(store):
    done = subprocess.run([sys.executable, "-c", KILLED, store.folder], check=False)
    assert done.returncode == -9
    (left,) = files_of(store)
    assert left.name.startswith(".")
    write(store, "a", {}, "content")
    store.remove_leftovers()
    assert [path.read_text() for path in files_of(store)] == ["content"]


def test_too_little_disk_and_too_many_bytes_are_refused(store, monkeypatch):
    write(store, "a", {}, "1234567890")
    assert store.require_space(1, max_bytes=10) == pytest.approx(
        shutil.disk_usage(store.folder).free, rel=0.1
    )
    with pytest.raises(OSError, match="its limit"):
        store.require_space(1, max_bytes=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"needs 0\.23 GB, 0\.00 GB are free.*make room") as caught:
        store.require_space(230e6)
    assert "\n" not in str(caught.value)


def test_arrays_and_values_are_read_back_to_the_bit(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "empty": np.zeros((0, 4))}
    values = {"names": ["é", "b"], "seconds": 12.3, "none": None}
    write_arrays(tmp_path / "a.safetensors", arrays, values)
    read, again = read_arrays(tmp_path / "a.safetensors")
    assert again == values
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_arrays_are_absent_with_one_warning(tmp_path, caplog, damage):
    store = Store(tmp_path, ".safetensors", [])
    with store.writing("a", {}) as temporary:
        write_arrays(temporary, {"a": np.arange(100)}, {})
    path = store.path("a", {})
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:200], "garbage": b"\x80\x04pickle", "empty": b""}[damage])
    assert store.read("a", {}, read_arrays) is None
    assert len(caplog.records) == 1


# --- code ---


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make a small package birdcall around a copy of the module, and import that copy."""
    root = tmp_path / "birdcall"
    (root / "storage").mkdir(parents=True)
    (root / "models").mkdir()
    copy = shutil.copy(store_module.__file__, root / "storage" / "store.py")
    (root / "__init__.py").write_text("import birdcall.unrelated\n")
    (root / "top.py").write_text("from birdcall.models.net import Net\nX = Net\n")
    (root / "models" / "net.py").write_text(
        '"""Doc."""\nimport numpy\n\n\nclass Net:\n    """Doc."""\n\n    def run(self):\n'
        '        """Doc."""\n        from birdcall import leaf  # comment\n\n        return leaf\n'
    )
    (root / "leaf.py").write_text(
        "from typing import TYPE_CHECKING\nfrom birdcall import __version__\n"
        "if TYPE_CHECKING:\n    import birdcall.unrelated\nY = 1\n"
    )
    (root / "unrelated.py").write_text("Z = 1\n")

    def digest_anew(*modules):
        spec = importlib.util.spec_from_file_location("copied_store", copy)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "copied_store", module)
        spec.loader.exec_module(module)
        return module.code_digest(*modules)

    return root, digest_anew


def test_the_code_of_a_module_is_all_that_it_imports_directly_or_not(package):
    _, digest = package
    assert list(digest("top")) == ["leaf", "models.net", "top"]
    assert list(digest("leaf", "unrelated")) == ["leaf", "unrelated"]
    assert digest("top")["leaf"] == digest("leaf")["leaf"]
    with pytest.raises(ValueError, match=r"'models\.other' is no module"):
        digest("models.other")


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("# comment", "# another", False),
        ('"""Doc."""', '"""Other words."""', False),
        ("return leaf", "return  (\n            leaf\n        )", False),
        ("return leaf", "return [leaf]", True),
        ("import numpy", "import numpy as np", True),
    ],
)
def test_comments_docstrings_and_layout_are_no_part_of_the_code(package, old, new, changes):
    root, digest = package
    before = digest("top")
    path = root / "models" / "net.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    after = digest("top")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == ({"models.net"} if changes else set())


def test_what_a_training_imports_is_in_its_code():
    modules = code_digest("training.trainer")
    needed = {"config", "data.dataset", "data.augment", "models.sed", "audio.spectrogram"}
    assert needed <= modules.keys()
    assert not [name for name in modules if name.startswith(("report", "evaluation", "cli"))]


def test_a_digest_is_the_same_in_another_process():
    code = "import json; from birdcall.storage.store import code_digest as d; "
    printed = subprocess.run(
        [sys.executable, "-c", code + "print(json.dumps(d('audio.reading')))"],
        check=True, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert json.loads(printed.stdout) == code_digest("audio.reading")
