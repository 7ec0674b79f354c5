"""Run the staged kernels as Kaggle will: a fresh process, offline, with Kaggle's folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from birdcall.kaggle.submission import SUMMARY_FILE
from birdcall.kaggle.test_set import COMPETITION, read_submission, read_test_rows
from birdcall.kaggle.training_kernel import read_settings
from birdcall.models.checkpoint import SETTINGS_FILE, STATE_FILE
from birdcall.storage.files import write_atomically
from birdcall.training.resume import read_state

_SECOND_SESSION_SECONDS = 600.0

# Python runs a module of this name at its start. In a dry run it refuses the kernel, and the
# processes that it starts, every connection but those between them.
_OFFLINE_FILE = "sitecustomize.py"
_OFFLINE = """
import socket

LOCAL = (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname())

def check(host):
    if host not in LOCAL:
        raise OSError(f"the kernel has no network: {host}")

def getaddrinfo(host, *rest, real=socket.getaddrinfo, **named):
    check(host)
    return real(host, *rest, **named)

def connecting(real):
    def connect(self, address):
        if isinstance(address, tuple):  # else a pipe on this machine
            check(address[0])
        return real(self, address)
    return connect

socket.getaddrinfo = getaddrinfo
socket.socket.connect = connecting(socket.socket.connect)
socket.socket.connect_ex = connecting(socket.socket.connect_ex)
"""


def dry_run_submission(build: Path, data: Path, submission: Path) -> str:
    """Run the staged kernel on ``data`` as Kaggle would; copy its submission, return its log.

    ``ValueError`` holds the end of the log if the kernel fails. It is also raised for a submission
    that is not valid, and for a member that was left out, without which the kernel on Kaggle would
    continue.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = run_as_kaggle(build, data, Path(scratch))
        written = Path(scratch) / "submission.csv"
        read_submission(written, list(read_test_rows(data)["row_id"]))
        summary = json.loads((Path(scratch) / SUMMARY_FILE).read_text(encoding="utf-8"))
        for name, reason in summary["left_out"].items():
            raise ValueError(f"the kernel has left out {name}: {reason}")
        write_atomically(submission, written.read_bytes())
    return log


def run_as_kaggle(
    build: Path,
    data: Path,
    working: Path,
    *,
    previous_output: Path | None = None,
    time_limit_seconds: float | None = None,
) -> str:
    """Run the staged kernel in a session like one of Kaggle's; return its log.

    A fresh process with an empty environment, isolated from this checkout and without network,
    sees only a folder laid out like /kaggle/input: the data, the dataset, and the output of an
    earlier version of the kernel. ``working`` stands for /kaggle/working. ``ValueError`` holds the
    end of the log if the kernel fails.
    """
    script = next((build / "kernel").glob("*.py"))
    with tempfile.TemporaryDirectory() as machine:
        root = Path(machine) / "input"
        mounts = {
            f"competitions/{COMPETITION}": data,
            "datasets/owner/dataset": build / "dataset",
        }
        if previous_output is not None:
            mounts["notebooks/owner/kernel"] = previous_output
        for mount, source in mounts.items():
            (root / mount).parent.mkdir(parents=True)
            (root / mount).symlink_to(source.resolve(), target_is_directory=True)
        (Path(machine) / "offline").mkdir()
        (Path(machine) / "offline" / _OFFLINE_FILE).write_text(_OFFLINE, encoding="utf-8")
        working.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": machine,
            "PYTHONPATH": str(Path(machine) / "offline"),
            "PYTHONSAFEPATH": "1",  # the folder of the script is not searched for modules,
            "PYTHONNOUSERSITE": "1",  # nor is the folder of the user
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",  # the log is in order
            "KAGGLE_INPUT": str(root),
            "KAGGLE_WORKING": str(working.resolve()),
            "KAGGLE_TEMP": str(Path(machine) / "temp"),
        }
        if time_limit_seconds is not None:
            environment["KAGGLE_TIME_LIMIT"] = str(time_limit_seconds)
        finished = subprocess.run(
            [sys.executable, str(script.resolve())],
            cwd=working,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if finished.returncode:
        last = _last_line(finished.stdout)
        raise ValueError(f"the kernel failed with exit code {finished.returncode}: {last}")
    return finished.stdout


def dry_run_training(
    build: Path, data: Path, output: Path, second_seconds: float = _SECOND_SESSION_SECONDS
) -> str:
    """Run two sessions of the staged kernel on ``data`` as Kaggle would; return their log.

    The time of the first session is over at once, so it saves its state after a step. The second
    gets the output of the first and ``second_seconds``, and must resume from it: to the end where
    there is time enough (`small_gru` on the demo), else further than the first. Its run replaces
    that in ``output``. ``ValueError`` holds the end of the log if a session fails.
    """
    run = read_settings(build / "dataset").run
    with tempfile.TemporaryDirectory() as scratch:
        first, second = Path(scratch) / "first", Path(scratch) / "second"
        log = run_as_kaggle(build, data, first, time_limit_seconds=1e-3)
        step = _saved_step(first / run, log)
        log += run_as_kaggle(
            build, data, working=second, previous_output=first, time_limit_seconds=second_seconds
        )
        is_finished = (second / run / SETTINGS_FILE).is_file()
        if not is_finished and _saved_step(second / run, log) <= step:
            raise ValueError(f"the second session did not get past step {step}: {_last_line(log)}")
        shutil.rmtree(output / run, ignore_errors=True)
        shutil.copytree(second, output, dirs_exist_ok=True)
    return log


def _saved_step(run: Path, log: str) -> int:
    if not (run / STATE_FILE).is_file():
        raise ValueError(f"the session has saved no state of its training: {_last_line(log)}")
    _, values = read_state(run / STATE_FILE)
    return int(values["progress"]["step"])


def _last_line(log: str) -> str:
    return (log.strip().splitlines() or ["no output"])[-1]
