"""Stage the training kernel of one run, and rehearse two of its sessions."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import safetensors.torch

from birdcall.checkpoint import SETTINGS_FILE, STATE_FILE
from birdcall.config import Experiment, require
from birdcall.data.dataset import load_training_data
from birdcall.experiments import find_experiment
from birdcall.files import write_atomically
from birdcall.models import SEDModel
from birdcall.packaging import Upload, finish_build, run_as_kaggle, start_dataset
from birdcall.training.initialisation import initialise
from birdcall.training.resume import read_state
from birdcall.training_kernel import (
    AUDIT_FILE,
    FOLDS_FILE,
    INIT_FOLDER,
    LABELS_FILE,
    NOISE_FOLDER,
    TrainingSettings,
    read_settings,
    write_settings,
)
from birdcall.wheels import copy_wheels, find_wheels

logger = logging.getLogger(__name__)

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
        data, folds, audit=audit, cache=audit.parent / "cache", noise=noise, labels=labels
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
    size = experiment.train.batch_size
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


def rehearse_training(
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
