"""Train one run in a session on Kaggle; the next session resumes it. The kernel calls this."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import torch

from birdcall.config import FULL, config_from_dict, require
from birdcall.kaggle.manifest import find_changes, install_wheels
from birdcall.models.checkpoint import SETTINGS_FILE, STATE_FILE, fold_name, read_checkpoint
from birdcall.storage.files import inside, write_atomically

# The process of the kernel imports nothing that only training needs: some of it may come from the
# package's wheels, which are not installed yet.

logger = logging.getLogger(__name__)

_RUNS_FOLDER = "runs"

_SESSION_SECONDS = 12 * 3600.0  # Kaggle's limit for a session with a GPU
# After the time limit: for the validation that it may fall into, and for saving the output.
GRACE_SECONDS = 900.0
# Of training, where the start took all the time: one step, then it saves its state.
_SHORTEST_SECONDS = 0.1
_MOUNT_DEPTHS = ("*", "*/*", "*/*/*")  # <slug>/, then notebooks/<owner>/<slug>/ since 2026
_PROGRESS_SECONDS = 60  # between two lines of the progress bar: the log on Kaggle has them all


class PackagedFile(StrEnum):
    """The files and folders of a staged training, in its dataset."""

    SETTINGS = "training.json"
    FOLDS = "folds.csv"
    AUDIT = "audit.csv"
    LABELS = "labels.csv"  # only where a run is trained on labels with times
    NOISE = "noise"
    OTHER_BIRDS = "other_birds"  # only where a run is trained on them
    INIT = "init"  # weights to start from


@dataclass(frozen=True)
class TrainingSettings:
    """What a session trains and for how long: ``training.json`` in the staged dataset.

    ``time_limit_seconds`` counts from the kernel's start. ``workers`` are those of all GPUs
    together. ``init`` is a file in the dataset.
    """

    experiment: str
    fold: int | str  # or FULL
    time_limit_seconds: float = 11.5 * 3600
    workers: int = 4  # the cores of a session with GPUs
    init: str | None = None

    def __post_init__(self) -> None:
        longest = _SESSION_SECONDS - GRACE_SECONDS
        require(
            0 < self.time_limit_seconds <= longest,
            f"time_limit_seconds is {self.time_limit_seconds:g}; give above 0 and at most "
            f"{longest:g}: Kaggle ends a session after {_SESSION_SECONDS:g}",
        )
        require(self.workers >= 0, f"workers is {self.workers}; it must not be negative")
        require(
            self.fold == FULL or (isinstance(self.fold, int) and self.fold >= 0),
            f"fold is {self.fold!r}; give the number of a fold, or {FULL}",
        )

    @property
    def name(self) -> str:
        return f"{self.experiment}-{fold_name(self.fold)}"

    @property
    def run(self) -> Path:
        """The run's folder, below an output folder."""
        return Path(_RUNS_FOLDER, self.experiment, fold_name(self.fold))


def write_settings(package: Path, settings: TrainingSettings) -> None:
    """Write ``training.json``."""
    text = json.dumps(asdict(settings), indent=1) + "\n"
    write_atomically(package / PackagedFile.SETTINGS, text)


def read_settings(package: Path) -> TrainingSettings:
    """Read ``training.json``; ``FileNotFoundError`` or ``ValueError`` names what is wrong."""
    path = package / PackagedFile.SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such settings; `birdcall package-training` writes them"
        )
    try:
        return config_from_dict(TrainingSettings, json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the settings of a training: {error}") from error


@dataclass(frozen=True)
class SessionFolders:
    """The folders of a session on Kaggle.

    package: the mounted dataset. data: of the competition. mounts: /kaggle/input, where the output
    of an earlier version of the kernel is. working: /kaggle/working, the output of this one.
    scratch: gone after the session.
    """

    package: Path
    data: Path
    mounts: Path
    working: Path
    scratch: Path


def run_training_kernel(folders: SessionFolders, time_limit_seconds: float | None = None) -> int:
    """Train the package's run, from where an earlier version of the kernel has left it.

    Returns the exit code: 0 where the run is finished or has saved its state at the time limit
    (None: the package's), else that of ``birdcall train``. Only ``runs/`` is left in ``working``;
    all else that is written goes to ``scratch``.
    """
    started = time.monotonic()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for reason in find_changes(folders.package).values():
        raise ValueError(reason)
    settings = read_settings(folders.package)
    take_previous_run(folders.mounts, folders.working, settings.run)
    n_gpus = torch.cuda.device_count()
    output = _make_output(folders)
    # Python looks for the package's wheels first, then for its code.
    paths = [str(folders.package), *filter(None, [os.environ.get("PYTHONPATH")])]
    site = install_wheels(folders.package, folders.scratch)
    if site is not None:
        paths.insert(0, str(site))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "TQDM_MININTERVAL": str(_PROGRESS_SECONDS)
    }  # fmt: skip
    limit = time_limit_seconds or settings.time_limit_seconds
    seconds = max(_SHORTEST_SECONDS, limit - (time.monotonic() - started))
    command = training_command(settings, folders, output=output, seconds=seconds, n_gpus=n_gpus)
    logger.info("%d GPUs, %.2f hours for: %s", n_gpus, seconds / 3600, " ".join(command))
    try:
        code = subprocess.run(
            command, env=environment, timeout=seconds + GRACE_SECONDS, check=False
        ).returncode
    except subprocess.TimeoutExpired:  # it is killed; states are written whole or not at all
        logger.warning("training did not end at its time limit: the last saved state counts")
        code = 0
    if code == 0:
        _log_outcome(folders.working / settings.run, settings)
    return code


def training_command(
    settings: TrainingSettings,
    folders: SessionFolders,
    *,
    output: Path,
    seconds: float,
    n_gpus: int,
) -> list[str]:
    """Return the one command line that trains, by torchrun where there are several GPUs."""
    package = folders.package
    n_processes = max(1, n_gpus)
    launch = [sys.executable, "-m"]
    if n_processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}", "-m"]
    options: dict[str, object] = {
        "--data": folders.data,
        "--experiment": settings.experiment,
        "--fold": settings.fold,
        "--output": output,
        "--folds": package / PackagedFile.FOLDS,
        "--noise": package / PackagedFile.NOISE,
        "--workers": -(-settings.workers // n_processes),
        "--time-limit": f"{seconds:.1f}",
    }
    if settings.init is not None:
        options["--init"] = inside(package, settings.init)
    if (package / PackagedFile.LABELS).is_file():
        options["--labels"] = package / PackagedFile.LABELS
    if (package / PackagedFile.OTHER_BIRDS).is_dir():
        options["--other-birds"] = package / PackagedFile.OTHER_BIRDS
    pairs = [str(part) for option in options.items() for part in option]
    return [*launch, "birdcall", "train", *pairs, "--resume"]


def take_previous_run(mounts: Path, working: Path, run: Path) -> None:
    """Copy to ``working`` the output of an earlier version of the kernel for ``run``, if any.

    What lies in ``working`` already is newer and stays: an interactive session runs twice. Two
    outputs that differ are a ``ValueError``: either could be the one to resume.
    """
    if _key_file(working / run) is not None:
        logger.info("%s is here already", working / run)
        return
    by_digest: dict[str, Path] = {}
    for depth in _MOUNT_DEPTHS:
        for folder in sorted(mounts.glob(f"{depth}/{run}")):
            key = _key_file(folder)
            if key is not None:  # Kaggle may mount one output under two names
                by_digest.setdefault(hashlib.sha256(key.read_bytes()).hexdigest(), folder)
    if len(by_digest) > 1:
        folders = " and ".join(map(str, by_digest.values()))
        raise ValueError(f"{run} is in the outputs of two kernels, {folders}; detach one of them")
    if not by_digest:
        logger.info("no output of an earlier version below %s: training starts", mounts)
        return
    (folder,) = by_digest.values()
    for path in folder.rglob("*"):
        is_temporary = path.name.startswith(".")  # a kill leaves such files half written
        if path.is_file() and not is_temporary:
            target = working / run / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # without the mode: mounts are read-only
    logger.info("%s: taken over from an earlier version", folder)


def _key_file(run: Path) -> Path | None:
    """Return the file that makes a folder a run, finished or not."""
    files = (run / SETTINGS_FILE, run / STATE_FILE)
    return next((file for file in files if file.is_file()), None)


def _make_output(folders: SessionFolders) -> Path:
    """Make the folder for ``--output``: in scratch, but its runs are in the kernel's output."""
    output, runs = folders.scratch / "output", (folders.working / _RUNS_FOLDER).absolute()
    output.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folders.package / PackagedFile.AUDIT, output / PackagedFile.AUDIT)
    link = output / _RUNS_FOLDER
    link.unlink(missing_ok=True)
    link.symlink_to(runs, target_is_directory=True)
    return output


def _log_outcome(run: Path, settings: TrainingSettings) -> None:
    """Log whether the run is finished, or how to resume it; ``ValueError`` if it is neither."""
    if (run / SETTINGS_FILE).is_file():
        score = read_checkpoint(run).score
        scores = ", ".join(f"{name} {value:g}" for name, value in score.items())
        logger.info("%s is finished (%s): %s", settings.name, scores, run / SETTINGS_FILE)
    elif (run / STATE_FILE).is_file():
        logger.info(
            "%s is not finished; its state is saved. Push this kernel again: the next version finds"
            " the output of this one among its sources and resumes it",
            settings.name,
        )
    else:
        raise ValueError(f"{run}: training has left neither a checkpoint nor a state")
