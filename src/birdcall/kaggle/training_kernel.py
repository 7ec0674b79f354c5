"""Train one run in a Kaggle session and let the next session go on: what the kernel calls."""

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
from pathlib import Path

import torch

from birdcall.config import config_from_dict, require
from birdcall.kaggle.manifest import install_wheels, require_unchanged
from birdcall.models.checkpoint import SETTINGS_FILE, STATE_FILE, read_checkpoint
from birdcall.storage.files import inside, write_atomically

# The kernel's own process imports nothing that only training needs: some of it may come from the
# package's wheels, which are not installed yet.

logger = logging.getLogger(__name__)

TRAINING_FILE = "training.json"
FOLDS_FILE = "folds.csv"
AUDIT_FILE = "audit.csv"
LABELS_FILE = "labels.csv"  # only where a run is trained on labels with times
NOISE_FOLDER = "noise"
INIT_FOLDER = "init"
RUNS_FOLDER = "runs"

SESSION_SECONDS = 12 * 3600.0  # Kaggle's limit for a session with a GPU
# After the time limit: for the validation that it may fall into, and for saving the output.
GRACE_SECONDS = 900.0
SHORTEST_SECONDS = 0.1  # of training, where getting ready took all the time: one step, then saved
MOUNT_DEPTHS = ("*", "*/*", "*/*/*")  # <slug>/, then notebooks/<owner>/<slug>/ since 2026
PROGRESS_SECONDS = 60  # between two lines of the progress bar: Kaggle keeps every one of them


@dataclass(frozen=True)
class TrainingSettings:
    """What a session trains and for how long: ``training.json`` in the staged dataset.

    ``time_limit_seconds`` counts from the kernel's start. ``workers`` are those of all GPUs
    together. ``init`` is a file in the dataset.
    """

    experiment: str
    fold: int
    time_limit_seconds: float = 11.5 * 3600
    workers: int = 4  # the cores of a session with GPUs
    init: str | None = None

    def __post_init__(self) -> None:
        longest = SESSION_SECONDS - GRACE_SECONDS
        require(
            0 < self.time_limit_seconds <= longest,
            f"time_limit_seconds is {self.time_limit_seconds:g}; give above 0 and at most "
            f"{longest:g}: Kaggle ends a session after {SESSION_SECONDS:g}",
        )
        require(self.workers >= 0, f"workers is {self.workers}; it must not be negative")
        require(self.fold >= 0, f"fold is {self.fold}; it must not be negative")

    @property
    def name(self) -> str:
        return f"{self.experiment}-fold{self.fold}"

    @property
    def run(self) -> Path:
        """The run's folder, below an output folder."""
        return Path(RUNS_FOLDER, self.experiment, f"fold{self.fold}")


def write_settings(package: Path, settings: TrainingSettings) -> None:
    write_atomically(package / TRAINING_FILE, json.dumps(asdict(settings), indent=1) + "\n")


def read_settings(package: Path) -> TrainingSettings:
    """Read ``training.json``; ``FileNotFoundError`` or ``ValueError`` names what is wrong."""
    path = package / TRAINING_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings; `birdcall package-training` makes them")
    try:
        return config_from_dict(TrainingSettings, json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the settings of a training: {error}") from error


def run_training_kernel(
    package: Path,
    data: Path,
    mounts: Path,
    working: Path,
    scratch: Path,
    time_limit_seconds: float | None = None,
) -> int:
    """Train the package's run, from where an earlier version of the kernel has left it.

    Returns the exit code: 0 where the run is finished or has saved its state at the time limit,
    else that of ``birdcall train``. Only ``runs/`` is left in ``working``; all else that is written
    goes to ``scratch``. ``mounts`` is /kaggle/input, where Kaggle puts an earlier version's output.
    """
    started = time.monotonic()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    require_unchanged(package)
    settings = read_settings(package)
    take_previous_run(mounts, working, settings.run)
    n_gpus = torch.cuda.device_count()
    output = _make_output(package, working, scratch)
    environment = _make_environment(package, scratch)
    limit = time_limit_seconds or settings.time_limit_seconds
    seconds = max(SHORTEST_SECONDS, limit - (time.monotonic() - started))
    command = training_command(
        settings, package, data=data, output=output, seconds=seconds, n_gpus=n_gpus
    )
    logger.info("%d GPUs, %.2f hours for: %s", n_gpus, seconds / 3600, " ".join(command))
    try:
        code = subprocess.run(
            command, env=environment, timeout=seconds + GRACE_SECONDS, check=False
        ).returncode
    except subprocess.TimeoutExpired:  # it is killed; states are written whole or not at all
        logger.warning("training did not end at its time limit: what it had saved before counts")
        code = 0
    if code == 0:
        _tell_outcome(working / settings.run, settings)
    return code


def training_command(
    settings: TrainingSettings,
    package: Path,
    data: Path,
    output: Path,
    seconds: float,
    n_gpus: int,
) -> list[str]:
    """Return the one command line that trains, by torchrun where there are several GPUs."""
    n_processes = max(1, n_gpus)
    launch = [sys.executable, "-m"]
    if n_processes > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}", "-m"]
    options: dict[str, object] = {
        "--data": data,
        "--experiment": settings.experiment,
        "--fold": settings.fold,
        "--output": output,
        "--folds": package / FOLDS_FILE,
        "--noise": package / NOISE_FOLDER,
        "--workers": -(-settings.workers // n_processes),
        "--time-limit": f"{seconds:.1f}",
    }
    if settings.init is not None:
        options["--init"] = inside(package, settings.init)
    if (package / LABELS_FILE).is_file():
        options["--labels"] = package / LABELS_FILE
    pairs = [str(part) for option in options.items() for part in option]
    return [*launch, "birdcall", "train", *pairs, "--resume"]


def take_previous_run(mounts: Path, working: Path, run: Path) -> None:
    """Copy to ``working`` what an earlier version of the kernel has left of ``run``, if anything.

    What lies in ``working`` already is newer and stays: an interactive session runs twice. Two
    outputs that differ are a ``ValueError``: either could be the one to go on from.
    """
    if _key_file(working / run) is not None:
        logger.info("%s is here already", working / run)
        return
    found: dict[str, Path] = {}
    for depth in MOUNT_DEPTHS:
        for folder in sorted(mounts.glob(f"{depth}/{run}")):
            key = _key_file(folder)
            if key is not None:  # Kaggle may mount one output under two names
                found.setdefault(hashlib.sha256(key.read_bytes()).hexdigest(), folder)
    if len(found) > 1:
        places = " and ".join(map(str, found.values()))
        raise ValueError(f"{run} is in the outputs of two kernels, {places}; detach one of them")
    if not found:
        logger.info("no output of an earlier version below %s: training starts", mounts)
        return
    (folder,) = found.values()
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):  # . is what a kill has left half done
            target = working / run / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)  # without the mode: mounts are read-only
    logger.info("%s: taken over from an earlier version", folder)


def _key_file(run: Path) -> Path | None:
    """Return the file that makes a folder a run, finished or not."""
    files = (run / SETTINGS_FILE, run / STATE_FILE)
    return next((file for file in files if file.is_file()), None)


def _make_output(package: Path, working: Path, scratch: Path) -> Path:
    """Make the folder for ``--output``: all of it is scratch but the runs, which are kept."""
    output, runs = scratch / "output", (working / RUNS_FOLDER).absolute()
    output.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(package / AUDIT_FILE, output / AUDIT_FILE)
    link = output / RUNS_FOLDER
    link.unlink(missing_ok=True)
    link.symlink_to(runs, target_is_directory=True)
    return output


def _make_environment(package: Path, scratch: Path) -> dict[str, str]:
    """Return the environment in which Python finds the package's code, and its wheels' first."""
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    site = install_wheels(package, scratch)
    if site is not None:
        paths.insert(0, str(site))
    own = {"PYTHONPATH": os.pathsep.join(paths), "TQDM_MININTERVAL": str(PROGRESS_SECONDS)}
    return os.environ | own


def _tell_outcome(run: Path, settings: TrainingSettings) -> None:
    """Log whether the run is finished, or how to go on; ``ValueError`` if it has left neither."""
    if (run / SETTINGS_FILE).is_file():
        scores = ", ".join(f"{name} {one:.3f}" for name, one in read_checkpoint(run).score.items())
        logger.info("%s is finished (%s): %s", settings.name, scores, run / SETTINGS_FILE)
    elif (run / STATE_FILE).is_file():
        logger.info(
            "%s is not finished; its state is saved. Push this kernel again: the next version finds"
            " the output of this one among its sources and goes on from there",
            settings.name,
        )
    else:
        raise ValueError(f"{run}: training has left neither a checkpoint nor a state")
