"""Stage what is uploaded to Kaggle, and rehearse the kernel as Kaggle will run it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import safetensors.torch

from birdcall.config import Experiment, require
from birdcall.data.dataset import load_training_data
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision, write_decision
from birdcall.inference.tables import read_submission
from birdcall.inference.windows import ONNX_FILE, export_checkpoint
from birdcall.kaggle.kernel import DECISION_FILE, MEMBERS_FOLDER
from birdcall.kaggle.manifest import MANIFEST_FILE, copy_wheels, find_wheels, make_manifest
from birdcall.kaggle.submission import SUMMARY_FILE
from birdcall.kaggle.test_set import read_test_rows
from birdcall.kaggle.training_kernel import (
    AUDIT_FILE,
    FOLDS_FILE,
    INIT_FOLDER,
    LABELS_FILE,
    NOISE_FOLDER,
    TrainingSettings,
    read_settings,
    write_settings,
)
from birdcall.models.checkpoint import SETTINGS_FILE, STATE_FILE, WEIGHTS_FILE, load_model
from birdcall.models.onnx import is_onnx_installed
from birdcall.models.sed import SEDModel
from birdcall.storage.files import write_atomically
from birdcall.training.initialisation import initialise
from birdcall.training.resume import read_state

logger = logging.getLogger(__name__)


COMPETITION = "birdsong-recognition"
SLUG = "birdcall-package"
MAX_TITLE = 50  # characters
MAX_DATASET_BYTES = 100 * 2**30  # Kaggle's limit on one dataset

# Python runs a module of this name at its start. In a rehearsal this one keeps the kernel, and the
# processes that it starts, from every connection but those between them.
OFFLINE_FILE = "sitecustomize.py"
OFFLINE = """
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


@dataclass(frozen=True)
class Upload:
    """Under which names a dataset and the kernel that reads it go to Kaggle."""

    owner: str
    dataset: str  # slugs
    kernel: str
    sees_own_output: bool = False  # the kernel's next version finds what this one has left

    def __post_init__(self) -> None:
        for slug in (self.dataset, self.kernel):
            if len(slug) > MAX_TITLE:
                raise ValueError(f"{slug!r} is too long: Kaggle takes {MAX_TITLE} characters")

    @property
    def kernel_id(self) -> str:
        return f"{self.owner}/{self.kernel}"


def stage_package(
    members: Sequence[Path],
    decision: Decision,
    script: Path,
    build: Path,
    owner: str,
    wheels: Path | None = None,
) -> Path:
    """Write ``build/dataset`` (code, members, decision) and ``build/kernel`` (script, metadata).

    Whatever an earlier call left there is replaced. Every member is loaded once, so that what
    cannot run is not uploaded, and exported for ONNX Runtime, where that is installed. ``wheels``:
    a folder of those that Kaggle's image lacks. Returns the dataset's folder.
    """
    packages = find_wheels(wheels)
    dataset = start_dataset(build)
    can_export = is_onnx_installed()
    if not can_export:
        logger.warning("onnxruntime is not installed: a kernel without GPU will run torch, slowly")
    for folder in members:
        _, checkpoint = load_model(folder)
        target = dataset / MEMBERS_FOLDER / checkpoint.name
        target.mkdir(parents=True)
        for name in (WEIGHTS_FILE, SETTINGS_FILE):
            shutil.copyfile(folder / name, target / name)
        if can_export:
            difference = export_checkpoint(target, target / ONNX_FILE, decision.window_config)
            logger.info("%s: exported, within %.1g of torch", checkpoint.name, difference)
    copy_wheels(packages, dataset)
    write_decision(dataset / DECISION_FILE, decision)
    finish_build(build, script, Upload(owner, SLUG, "birdcall-submission"))
    return dataset


def start_dataset(build: Path) -> Path:
    """Empty ``build/dataset`` and ``build/kernel``; return the first, with the code in it."""
    dataset = build / "dataset"
    for folder in (dataset, build / "kernel"):
        shutil.rmtree(folder, ignore_errors=True)
    with resources.as_file(resources.files("birdcall")) as source:
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source, dataset / "birdcall", ignore=ignore)
    return dataset


def finish_build(build: Path, script: Path, upload: Upload) -> None:
    """Write the kernel, what Kaggle wants to know of both folders, and the dataset's manifest."""
    dataset, kernel = build / "dataset", build / "kernel"
    _write_json(dataset / "dataset-metadata.json", dataset_metadata(upload))
    kernel.mkdir()
    shutil.copyfile(script, kernel / script.name)
    _write_json(kernel / "kernel-metadata.json", kernel_metadata(upload, script.name))
    _write_json(dataset / MANIFEST_FILE, make_manifest(dataset))
    size = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    if size > MAX_DATASET_BYTES:
        raise ValueError(f"{dataset} has {size / 2**30:.1f} GiB; Kaggle takes at most 100")


def dataset_metadata(upload: Upload) -> dict[str, object]:
    return {
        "title": upload.dataset.replace("-", " "),
        "id": f"{upload.owner}/{upload.dataset}",
        "licenses": [{"name": "CC-BY-NC-SA-4.0"}],  # as most of the recordings
    }


def kernel_metadata(upload: Upload, code_file: str) -> dict[str, object]:
    """Return kernel-metadata.json. Internet is off explicitly: the client's default is on."""
    metadata: dict[str, object] = {
        "id": upload.kernel_id,
        "title": upload.kernel.replace("-", " "),
        "code_file": code_file,
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [f"{upload.owner}/{upload.dataset}"],
        "competition_sources": [COMPETITION],
        "kernel_sources": [],
        "model_sources": [],
    }
    if upload.sees_own_output:
        metadata["kernel_sources"] = [upload.kernel_id]
        metadata["docker_image_pinning_type"] = "original"  # to go on under the same torch
    return metadata


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def dry_run_submission(build: Path, data: Path, submission: Path) -> str:
    """Run the staged kernel on ``data`` as Kaggle would, keep its submission, return its log.

    ``ValueError`` holds the end of the log if it fails, or says that its submission is not valid or
    that a member was left out, with which the kernel on Kaggle would go on.
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
    previous_output: Path | None = None,
    time_limit_seconds: float | None = None,
) -> str:
    """Run the staged kernel in a session like one of Kaggle's; return its log.

    A fresh process with an empty environment, isolated from this checkout and without network,
    sees only a folder laid out like /kaggle/input: the data, the dataset, and what an earlier
    version of the kernel has left. ``working`` stands for /kaggle/working. ``ValueError`` holds the
    end of the log if the kernel fails.
    """
    script = next((build / "kernel").glob("*.py"))
    with tempfile.TemporaryDirectory() as machine:
        root = Path(machine) / "input"
        _link(data, root / "competitions" / COMPETITION)
        _link(build / "dataset", root / "datasets" / "owner" / "dataset")
        if previous_output is not None:
            _link(previous_output, root / "notebooks" / "owner" / "kernel")
        (Path(machine) / "offline").mkdir()
        (Path(machine) / "offline" / OFFLINE_FILE).write_text(OFFLINE, encoding="utf-8")
        working.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": machine,
            "PYTHONPATH": str(Path(machine) / "offline"),
            "PYTHONSAFEPATH": "1",  # the folder of the script is not searched for modules,
            "PYTHONNOUSERSITE": "1",  # nor is the user's own
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
        last = finished.stdout.strip().splitlines()[-1:] or ["no output"]
        raise ValueError(f"the kernel failed with exit code {finished.returncode}: {last[0]}")
    return finished.stdout


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.symlink_to(source.resolve(), target_is_directory=True)


# --- training packaging ---


# What Kaggle's image lacks; drawn on by the augmentations with these probabilities alone.
MISSING_PACKAGES = "audiomentations numpy-minmax numpy-rms python-stretch fast-mp3-augment"
NEED_PACKAGES = ("mp3_probability", "pitch_probability", "tempo_probability")
N_GPUS = 2  # of Kaggle's sessions with T4s; the kernel shares each batch between them
SECOND_SESSION_SECONDS = 600.0


def stage_training(
    settings: TrainingSettings,
    data: Path,
    folds: Path,
    audit: Path,
    script: Path,
    build: Path,
    owner: str,
    *,
    init: Path | None = None,
    noise: Path | None = None,
    labels: Path | None = None,
    wheels: Path | None = None,
) -> Path:
    """Write ``build/dataset`` and ``build/kernel``, with which Kaggle trains one run.

    The dataset holds code, settings, folds, audit, ``labels`` with times, the bird-free sound that
    training here would take, the weights to start from (``init``, or the experiment's pretrained
    ones, fetched here), and from ``wheels`` what Kaggle's image lacks. Whatever an earlier call
    left is replaced. The network is built once, and the tables are matched with ``data``, so that
    what cannot run is not uploaded. Returns the dataset's folder.
    """
    experiment = find_experiment(settings.experiment)
    _require_shareable_batch(experiment)
    training = load_training_data(
        data, folds=folds, audit=audit, cache=audit.parent / "cache", noise=noise, labels=labels
    )
    training.split(settings.fold)
    model = initialise(experiment, len(training.classes), init, classes=training.classes)
    upload = _upload_of(settings, owner)
    _warn_of_missing_wheels(wheels, experiment)
    packages = find_wheels(wheels)
    dataset = start_dataset(build)
    shutil.copyfile(folds, dataset / FOLDS_FILE)
    shutil.copyfile(audit, dataset / AUDIT_FILE)
    if labels is not None:
        shutil.copyfile(labels, dataset / LABELS_FILE)
    _copy_noise(training.noise_files, dataset / NOISE_FOLDER)
    if init is not None:
        settings = replace(settings, init=_copy_init(init, dataset))
    elif experiment.model.pretrained:
        settings = replace(settings, init=_write_backbone(model, dataset))
    copy_wheels(packages, dataset)
    write_settings(dataset, settings)
    finish_build(build, script, upload)
    return dataset


def _require_shareable_batch(experiment: Experiment) -> None:
    size = experiment.train.data.batch_size
    require(
        size % N_GPUS == 0,
        f"{experiment.name} has a batch_size of {size}, which Kaggle's {N_GPUS} GPUs cannot share; "
        f"it must be a multiple of {N_GPUS}",
    )


def _copy_init(init: Path, dataset: Path) -> str:
    """Copy the weights, and a run's settings beside them: they say whose its outputs are."""
    name = f"{INIT_FOLDER}/weights{init.suffix}"
    (dataset / INIT_FOLDER).mkdir()
    shutil.copyfile(init, dataset / name)
    if (init.parent / SETTINGS_FILE).is_file():
        shutil.copyfile(init.parent / SETTINGS_FILE, dataset / INIT_FOLDER / SETTINGS_FILE)
    return name


def _write_backbone(model: SEDModel, dataset: Path) -> str:
    """Write the pretrained backbone, as the kernel has no network to fetch it."""
    name = f"{INIT_FOLDER}/weights.safetensors"
    tensors = {key: one.contiguous() for key, one in model.backbone.state_dict().items()}
    write_atomically(dataset / name, safetensors.torch.save(tensors))
    return name


def _upload_of(settings: TrainingSettings, owner: str) -> Upload:
    """Name a run's own dataset and kernel: runs are trained side by side."""
    kernel = f"birdcall-{settings.name.replace('_', '-')}"
    return Upload(owner, f"{kernel}-data", kernel, sees_own_output=True)


def _warn_of_missing_wheels(folder: Path | None, experiment: Experiment) -> None:
    needed = any(getattr(experiment.augment, name) > 0 for name in NEED_PACKAGES)
    if folder is None and needed:
        logger.warning(
            "%s augments with packages that Kaggle's image lacks: give --wheels DIR, filled by "
            "`pip download --no-deps -d DIR --python-version 3.12 --only-binary :all: %s`",
            experiment.name, MISSING_PACKAGES,
        )  # fmt: skip


def _copy_noise(files: Sequence[Path], target: Path) -> None:
    """Copy bird-free sound: a numbered folder for each that it comes from.

    A collection's own folder would ask for the metadata that say what is bird-free; this all is.
    """
    numbers: dict[Path, int] = {}
    for path in files:
        folder = target / f"{numbers.setdefault(path.parent, len(numbers)):03}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / path.name)


def dry_run_training(
    build: Path, data: Path, output: Path, second_seconds: float = SECOND_SESSION_SECONDS
) -> str:
    """Run two sessions of the staged kernel on ``data`` as Kaggle would; return their log.

    The first one's time is over at once, so it saves its state after a step. The second is given
    the first one's output and ``second_seconds``, and must go on from it: to the end where that is
    time enough (`small_gru` on the demo), else further than the first. What it leaves is put in
    place of ``output``. ``ValueError`` holds the end of the log if a session fails.
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
            raise ValueError(f"the second session did not get past step {step}: {_last(log)}")
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(second, output)
    return log


def _saved_step(run: Path, log: str) -> int:
    if not (run / STATE_FILE).is_file():
        raise ValueError(f"the session has saved no state of its training: {_last(log)}")
    return int(read_state(run / STATE_FILE)[1]["progress"]["step"])


def _last(log: str) -> str:
    return (log.strip().splitlines() or ["no output"])[-1]
