"""Stage what is uploaded to Kaggle, and rehearse the kernel as Kaggle will run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from birdcall.checkpoint import SETTINGS_FILE, WEIGHTS_FILE, load_model
from birdcall.decision import Decision, write_decision
from birdcall.files import write_atomically
from birdcall.kernel import DECISION_FILE, MANIFEST_FILE, MEMBERS_FOLDER, make_manifest
from birdcall.outputs import read_submission
from birdcall.soundscapes import read_test_rows

COMPETITION = "birdsong-recognition"
SLUG = "birdcall-package"
MAX_DATASET_BYTES = 100 * 2**30  # Kaggle's limit on one dataset

# Runs a script as __main__ in a process that cannot open a connection.
OFFLINE = """
import runpy, socket, sys
def refuse(*_args, **_kwargs):
    raise OSError("the kernel has no network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stage_package(
    members: Sequence[Path], decision: Decision, script: Path, build: Path, owner: str
) -> Path:
    """Write ``build/dataset`` (code, members, decision) and ``build/kernel`` (script, metadata).

    Whatever an earlier call left in ``build`` is replaced. Every member is loaded once, so that
    what cannot run is not uploaded. Returns the dataset's folder.
    """
    shutil.rmtree(build, ignore_errors=True)
    dataset, kernel = build / "dataset", build / "kernel"
    _copy_code(dataset / "birdcall")
    for folder in members:
        _, checkpoint = load_model(folder)
        target = dataset / MEMBERS_FOLDER / checkpoint.name
        target.mkdir(parents=True)
        for name in (WEIGHTS_FILE, SETTINGS_FILE):
            shutil.copyfile(folder / name, target / name)
    write_decision(dataset / DECISION_FILE, decision)
    _write_json(dataset / "dataset-metadata.json", _dataset_metadata(owner))
    kernel.mkdir()
    shutil.copyfile(script, kernel / script.name)
    _write_json(kernel / "kernel-metadata.json", kernel_metadata(owner, script.name))
    _write_json(dataset / MANIFEST_FILE, make_manifest(dataset))
    size = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    if size > MAX_DATASET_BYTES:
        raise ValueError(f"{dataset} has {size / 2**30:.1f} GiB; Kaggle takes at most 100")
    return dataset


def _copy_code(target: Path) -> None:
    with resources.as_file(resources.files("birdcall")) as source:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def _dataset_metadata(owner: str) -> dict[str, object]:
    return {
        "title": "birdcall package",
        "id": f"{owner}/{SLUG}",
        "licenses": [{"name": "CC-BY-NC-SA-4.0"}],  # as most of the recordings it was trained on
    }


def kernel_metadata(owner: str, code_file: str) -> dict[str, object]:
    """Return kernel-metadata.json. Internet is off explicitly: the client's default is on."""
    return {
        "id": f"{owner}/birdcall-submission",
        "title": "birdcall submission",
        "code_file": code_file,
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [f"{owner}/{SLUG}"],
        "competition_sources": [COMPETITION],
        "kernel_sources": [],
        "model_sources": [],
    }


def _write_json(path: Path, values: dict[str, object]) -> None:
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def rehearse(build: Path, data: Path, submission: Path) -> str:
    """Run the staged kernel on ``data`` as Kaggle would, keep its submission, return its log.

    A fresh process with an empty environment, isolated from this checkout and without network,
    sees only a folder laid out like /kaggle/input. ``ValueError`` holds the end of the log if it
    fails or if its submission is not valid.
    """
    script = next((build / "kernel").glob("*.py"))
    with tempfile.TemporaryDirectory() as scratch:
        root, working = Path(scratch) / "input", Path(scratch) / "working"
        working.mkdir()
        _link(data, root / "competitions" / COMPETITION)
        _link(build / "dataset", root / "datasets" / "owner" / SLUG)
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": scratch,
            "KAGGLE_INPUT": str(root),
            "KAGGLE_WORKING": str(working),
        }
        finished = subprocess.run(
            [sys.executable, "-I", "-B", "-c", OFFLINE, str(script.resolve())],
            cwd=working,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        log = finished.stdout + finished.stderr
        if finished.returncode:
            last = log.strip().splitlines()[-1:] or ["no output"]
            raise ValueError(f"the kernel failed with exit code {finished.returncode}: {last[0]}")
        written = working / "submission.csv"
        read_submission(written, list(read_test_rows(data)["row_id"]))
        write_atomically(submission, written.read_bytes())
    return log


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.symlink_to(source.resolve(), target_is_directory=True)
