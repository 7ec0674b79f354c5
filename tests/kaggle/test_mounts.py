"""Both kernels know their package and the competition's data among other data sources."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from helpers import ROOT, read_labels, rows_of, write_rows

from birdcall.kaggle.manifest import make_manifest

PACKAGES = ("datasets/me/birdcall-package", "birdcall-package")  # the two layouts of Kaggle
COMPETITIONS = ("competitions/birdsong-recognition", "birdsong-recognition")
STUBS = {
    "__init__.py": "",
    "kaggle/__init__.py": "",
    "kaggle/manifest.py": "def install_wheels(package, scratch): return None\n",
    "kaggle/submission.py": "def run_kernel(*given): print('called', *given[:2], sep='|')\n",
    "kaggle/training_kernel.py": """
class SessionFolders:
    def __init__(self, package, data, **others):
        print('called', package, data, sep='|')
def run_training_kernel(*given): return 0
""",
}


class Mounts:
    """A folder as /kaggle/input with data and a package whose code says what it is called with."""

    def __init__(self, folder, kind, layout):
        self.root, self.kind = folder / "input", kind
        self.working = folder / "working"
        self.working.mkdir()
        self.package = self.root / PACKAGES[layout]
        self.data = self.root / COMPETITIONS[layout]
        self.add_package(self.package, kind)
        self.data.joinpath("train_audio").mkdir(parents=True)
        write_rows(self.data, rows_of("aa"))
        (self.data / "train.csv").write_text("ebird_code,filename\naldfly,XC1.mp3\n")

    def add_package(self, folder, kind):
        for name, code in STUBS.items():
            (folder / "birdcall" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "birdcall" / name).write_text(code)
        name = "decision.json" if kind == "submission" else "training.json"
        (folder / name).write_text("{}")
        (folder / "manifest.json").write_text(json.dumps(make_manifest(folder)))

    def write(self, name, content):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(content)

    def run(self):
        """Run the script; return the package and the data that it calls, or its last line."""
        done = subprocess.run(
            [sys.executable, "-I", str(ROOT / "kernels" / self.kind / f"{self.kind}.py")],
            env={"KAGGLE_INPUT": str(self.root), "KAGGLE_WORKING": str(self.working)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return done.stderr.splitlines()[-1]
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("called"))
        return tuple(map(os.path.normpath, line.split("|")[1:]))

    @property
    def expected(self):
        return str(self.package), str(self.data)


@pytest.fixture(params=[0, 1], ids=["mounts of 2026", "old mounts"])
def mounts_of(request, tmp_path):
    return lambda kind: Mounts(tmp_path, kind, request.param)


@pytest.mark.parametrize("kind", ["submission", "training"])
def test_manifests_of_other_sources_are_not_the_package(mounts_of, kind):
    mounts = mounts_of(kind)
    for number, content in enumerate(
        ('{"files": []}', "[" * 9999, "[1]", "\x00", '{"name": "ornis", "version": "1"}', "{}")
    ):
        mounts.write(f"datasets/alice/a{number}/manifest.json", content)
        mounts.write(f"a{number}/training.json", "{}")
    assert mounts.run() == mounts.expected


@pytest.mark.parametrize("kind", ["submission", "training"])
def test_a_package_of_the_other_kernel_is_not_its_own(mounts_of, kind):
    mounts = mounts_of(kind)
    other = "training" if kind == "submission" else "submission"
    mounts.add_package(mounts.root / "datasets" / "me" / "a-package", other)
    assert mounts.run() == mounts.expected


@pytest.mark.parametrize("kind", ["submission", "training"])
def test_two_packages_are_refused_and_one_under_two_names_is_one(mounts_of, kind):
    mounts = mounts_of(kind)
    again = mounts.root / "datasets" / "me" / "z-package"
    shutil.copytree(mounts.package, again)
    assert mounts.run()[1] == mounts.expected[1]
    (again / "more.json").touch()
    (again / "manifest.json").write_text(json.dumps(make_manifest(again)))
    error = mounts.run()
    assert str(mounts.package) in error
    assert str(again) in error


def test_tables_of_other_sources_are_not_the_test_set(mounts_of):
    mounts = mounts_of("submission")
    rows = "row_id,site,audio_id,seconds\n1_COR_5,COR,1,5\n"
    for folder in ("competitions/birdclef-2021", "birdclef-2021", "datasets/al/birdcall-check"):
        mounts.write(f"{folder}/test.csv", rows)
        mounts.write(f"{folder}/sample_submission.csv", "row_id,birds\n1_COR_5,nocall\n")
        mounts.write(f"{folder}/train_metadata.csv", "primary_label,filename\nacafly,XC1.ogg\n")
    mounts.write("a/sample_submission.csv", "row_id,birds\n")
    mounts.write("b/test.csv", "id\n1\n")
    mounts.write("b/sample_submission.csv", "id,label\n1,0\n")
    (mounts.root / "c" / "test.csv").mkdir(parents=True)
    assert mounts.run() == mounts.expected


def test_tables_of_other_sources_are_not_the_training_data(mounts_of):
    mounts = mounts_of("training")
    mounts.write("competitions/a-titanic/train.csv", "PassengerId,Survived\n1,0\n")
    mounts.write("a-folds/train.csv", "ebird_code,filename,fold\naldfly,XC1.mp3,0\n")
    mounts.write("a-resampled/train.csv", "ebird_code,filename\naldfly,XC1.wav\n")
    (mounts.root / "a-resampled" / "train_audio").mkdir()
    assert mounts.run() == mounts.expected


def test_without_a_package_that_can_be_used_every_row_is_nocall(mounts_of):
    mounts = mounts_of("submission")
    (mounts.package / "birdcall" / "kaggle" / "manifest.py").write_text("import no_such_package")
    assert "no_such_package" in mounts.run()
    assert set(read_labels(mounts.working, mounts.data).values()) == {"nocall"}
    (mounts.working / "submission.csv").unlink()
    (mounts.package / "manifest.json").write_text('{"files": []}')
    assert str(mounts.package / "manifest.json") in mounts.run()  # it is named as not ours
    assert set(read_labels(mounts.working, mounts.data).values()) == {"nocall"}


def test_row_ids_of_any_characters_stay_as_they_are(mounts_of):
    mounts = mounts_of("submission")
    write_rows(mounts.data, [("site_1", name, 5, "aa") for name in ('a,"b"', "ä", "c\nd")])
    mounts.run()
    written = pd.read_csv(mounts.working / "submission.csv")
    assert list(written["row_id"]) == ['a,"b"', "ä", "c\nd"]
