"""Stage the kernels and their datasets, ready to be uploaded to Kaggle."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import safetensors.torch

from birdcall.config import Experiment, require
from birdcall.data.dataset import load_training_data
from birdcall.experiments import find_experiment
from birdcall.inference.decision import Decision, write_decision
from birdcall.inference.ensemble import load_member
from birdcall.inference.windows import ONNX_FILE, export_checkpoint
from birdcall.kaggle.manifest import (
    DATASET_METADATA,
    KERNEL_METADATA,
    MANIFEST_FILE,
    WHEELS_FOLDER,
    make_manifest,
    read_manifest,
)
from birdcall.kaggle.submission import DECISION_FILE, MEMBERS_FOLDER
from birdcall.kaggle.test_set import COMPETITION
from birdcall.kaggle.training_kernel import PackagedFile, TrainingSettings, write_settings
from birdcall.models.backbones import BirdNETBackbone
from birdcall.models.checkpoint import (
    SETTINGS_FILE,
    WEIGHTS_FILE,
    is_onnx_installed,
    read_checkpoint,
)
from birdcall.models.sed import SEDModel
from birdcall.storage.files import OF_SYSTEMS, write_atomically
from birdcall.storage.locks import locked
from birdcall.training.initialisation import initialise

logger = logging.getLogger(__name__)

_OWNER = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_SLUG_PREFIX = "birdcall-"  # of all that is staged
_TEMPORARY = ".birdcall-staging-"  # begins the name of the folder in which a package is staged
_MAX_TITLE = 50  # characters
_MAX_DATASET_BYTES = 100 * 2**30  # Kaggle's limit on one dataset
_N_GPUS = 2  # of Kaggle's sessions with T4s; the kernel shares each batch between them


@dataclass(frozen=True)
class Upload:
    """The names of a dataset and of the kernel that reads it on Kaggle.

    ``ValueError`` if Kaggle does not take one of them.
    """

    owner: str
    dataset: str  # slugs
    kernel: str
    sees_own_output: bool = False  # a version of the kernel finds the output of the one before

    def __post_init__(self) -> None:
        require(
            _OWNER.fullmatch(self.owner) is not None,
            f"--owner is {self.owner!r}; give your user name on Kaggle as in the address of your "
            "page there: letters and digits, with single hyphens between them",
        )
        for slug in (self.dataset, self.kernel):
            require(
                _SLUG.fullmatch(slug) is not None and len(slug) <= _MAX_TITLE,
                f"Kaggle does not take the name {slug!r}; it must have small letters and digits, "
                f"with single hyphens between them, and at most {_MAX_TITLE} characters",
            )

    @classmethod
    def of_training(cls, settings: TrainingSettings, experiment: Experiment, owner: str) -> Upload:
        """Return the names of a run's dataset and kernel: several runs train side by side.

        ``ValueError`` if Kaggle takes neither the names nor the batches of the experiment.
        """
        size = experiment.train.data.batch_size
        require(
            size % _N_GPUS == 0,
            f"{experiment.name} has a batch_size of {size}, which Kaggle's {_N_GPUS} GPUs cannot "
            f"share; it must be a multiple of {_N_GPUS}",
        )
        kernel = f"{_SLUG_PREFIX}{settings.name.replace('_', '-')}"
        return cls(owner, f"{kernel}-data", kernel, sees_own_output=True)


@dataclass(frozen=True)
class StagingOptions:
    """Where a kernel and its dataset are staged, and what comes with them.

    script: of the kernel. build: the folder to write, ``dataset`` and ``kernel`` in it. owner: the
    user on Kaggle. wheels: a folder of packages that Kaggle's image lacks.
    """

    script: Path
    build: Path
    owner: str
    wheels: Path | None = None

    def __post_init__(self) -> None:
        if not self.script.is_file():
            raise FileNotFoundError(f"{self.script}: no such script of the kernel; give --script")


def stage_package(members: Sequence[Path], decision: Decision, staging: StagingOptions) -> Path:
    """Write ``build/dataset`` (code, members, decision) and ``build/kernel`` (script, metadata).

    What an earlier call wrote there is replaced when all is staged. Every member is loaded once, so
    that what cannot run is not uploaded. Exports for low precision are copied, others are made.
    Returns the dataset's folder. ValueError if the decision was chosen on other weights of a
    member.
    """
    upload = Upload(staging.owner, f"{_SLUG_PREFIX}package", f"{_SLUG_PREFIX}submission")
    require(len(members) > 0, "the decision names no members; `birdcall evaluate` writes one")
    for folder in members:
        checkpoint = read_checkpoint(folder)
        weights = decision.weights.get(checkpoint.name)
        require(
            not decision.members or weights == checkpoint.weights_sha256,
            f"{folder}: the decision was chosen on other weights of {checkpoint.name}, or does not "
            "name them; `birdcall evaluate` chooses one on these",
        )
    with _staging(staging, upload) as dataset:
        can_export = is_onnx_installed()
        if not can_export:
            logger.warning("no onnxruntime to use: a kernel without GPU will run torch, slowly")
        for folder in members:
            member = load_member(folder, decision.window_config, with_export=can_export)
            target = dataset / MEMBERS_FOLDER / member.name
            target.mkdir(parents=True)
            is_low_precision = member.export is not None and bool(member.export.low_precision)
            for name in [WEIGHTS_FILE, SETTINGS_FILE] + ([ONNX_FILE] if is_low_precision else []):
                shutil.copyfile(folder / name, target / name)
            if can_export and not is_low_precision:
                difference = export_checkpoint(target, target / ONNX_FILE, decision.window_config)
                logger.info("%s: exported, within %.1g of torch", member.name, difference)
        write_decision(dataset / DECISION_FILE, decision)
    return staging.build / "dataset"


@contextmanager
def _staging(staging: StagingOptions, upload: Upload) -> Iterator[Path]:
    """Yield a dataset's folder with code and wheels; then write what else Kaggle needs.

    If all succeeds, dataset and kernel replace those in ``build``: until then, and after an error,
    these stay. FileNotFoundError if the folder of wheels has none. ValueError for a file in their
    place that no earlier staging has written.
    """
    wheels = [] if staging.wheels is None else sorted(staging.wheels.glob("*.whl"))
    if staging.wheels is not None and not wheels:
        raise FileNotFoundError(
            f"{staging.wheels}: no wheels; `pip download --no-deps -d` puts them there"
        )
    _require_staged_files(staging.build)
    staging.build.mkdir(parents=True, exist_ok=True)
    with (
        locked(staging.build),
        tempfile.TemporaryDirectory(dir=staging.build, prefix=_TEMPORARY) as temporary,
    ):
        dataset, kernel = Path(temporary) / "dataset", Path(temporary) / "kernel"
        with resources.as_file(resources.files("birdcall")) as source:
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
            try:
                shutil.copytree(source, dataset / "birdcall", ignore=ignore)
            except shutil.Error as error:  # of all files; the first is enough
                raise OSError(error.args[0][0][-1]) from error
        for path in wheels:
            (dataset / WHEELS_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(path, dataset / WHEELS_FOLDER / path.name)
        yield dataset
        _write_metadata(dataset, kernel, staging.script, upload)
        _require_staged_files(staging.build)  # again: exports take minutes
        for folder in (dataset, kernel):
            target = staging.build / folder.name
            if target.is_dir():
                target.rename(Path(temporary) / f"old_{folder.name}")
            folder.rename(target)
        for leftover in staging.build.glob(f"{_TEMPORARY}*"):  # a killed process has left
            if leftover != Path(temporary):
                shutil.rmtree(leftover)


def _require_staged_files(build: Path) -> None:
    """Raise ``ValueError`` for a file in dataset or kernel that no earlier staging has written."""
    dataset, kernel = build / "dataset", build / "kernel"
    expected: set[Path] = set()
    with suppress(ValueError, OSError):
        names = [*read_manifest(dataset), MANIFEST_FILE, DATASET_METADATA]
        expected |= {dataset / name for name in names}
    with suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
        metadata = json.loads((kernel / KERNEL_METADATA).read_text(encoding="utf-8"))
        if metadata["id"].rpartition("/")[2].startswith(_SLUG_PREFIX):
            expected |= {kernel / KERNEL_METADATA, kernel / metadata["code_file"]}
    present = [path for path in (dataset, kernel) if path.exists() or path.is_symlink()]
    for path in [*present, *sorted(dataset.rglob("*")), *sorted(kernel.rglob("*"))]:
        is_folder = path.is_dir() and not path.is_symlink()
        is_worthless = path.suffix == ".pyc" or OF_SYSTEMS.fullmatch(path.name) is not None
        require(
            is_folder or is_worthless or path in expected,
            f"{path}: no earlier `birdcall package` has written it, and it would be lost; move it "
            "elsewhere, or give another --build",
        )


def _write_metadata(dataset: Path, kernel: Path, script: Path, upload: Upload) -> None:
    """Write the kernel, the metadata of both folders, and the dataset's manifest."""
    owner = upload.owner.lower()  # as in addresses and mounts, however the profile writes it
    dataset_id, kernel_id = f"{owner}/{upload.dataset}", f"{owner}/{upload.kernel}"
    metadata: dict[str, object] = {
        "title": upload.dataset.replace("-", " "),
        "id": dataset_id,
        "licenses": [{"name": "CC-BY-NC-SA-4.0"}],  # as most of the recordings
    }
    _write_json(dataset / DATASET_METADATA, metadata)
    kernel.mkdir()
    shutil.copyfile(script, kernel / script.name)
    metadata = {
        "id": kernel_id,
        "title": upload.kernel.replace("-", " "),
        "code_file": script.name,
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": False,  # explicitly: the client's default is on
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [dataset_id],
        "competition_sources": [COMPETITION],
        "kernel_sources": [],
        "model_sources": [],
    }
    if upload.sees_own_output:
        metadata["kernel_sources"] = [kernel_id]
        metadata["docker_image_pinning_type"] = "original"  # to resume under the same torch
    _write_json(kernel / KERNEL_METADATA, metadata)
    _write_json(dataset / MANIFEST_FILE, make_manifest(dataset))
    size = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    if size > _MAX_DATASET_BYTES:
        raise ValueError(f"{dataset} has {size / 2**30:.1f} GiB; Kaggle takes at most 100")


def _write_json(path: Path, values: Mapping[str, object]) -> None:
    write_atomically(path, json.dumps(values, indent=1) + "\n")


# --- the training kernel --------------------------------------------------------------------------

# What Kaggle's image lacks, and the augmentations that use it.
_MISSING_PACKAGES = "audiomentations numpy-minmax numpy-rms python-stretch fast-mp3-augment"
_NEED_PACKAGES = ("mp3_probability", "pitch_probability", "tempo_probability")


@dataclass(frozen=True)
class TrainingFiles:
    """What a training reads: the data, tables, bird-free recordings, weights to start from."""

    data: Path
    folds: Path
    audit: Path
    noise: Path | None = None
    other_birds: Path | None = None
    labels: Path | None = None
    init: Path | None = None


def stage_training(
    settings: TrainingSettings, files: TrainingFiles, staging: StagingOptions
) -> Path:
    """Write ``build/dataset`` and ``build/kernel``, with which Kaggle trains one run.

    The dataset holds code, settings, folds, audit, labels with times, the bird-free recordings that
    a training here would use, the weights to start from (``init``, or pretrained ones), and wheels.
    It replaces what an earlier call wrote, and checks network and tables. Returns the folder.
    """
    experiment = find_experiment(settings.experiment)
    upload = Upload.of_training(settings, experiment, staging.owner)
    training = load_training_data(
        files.data,
        folds=files.folds,
        audit=files.audit,
        cache=files.audit.parent / "cache",
        noise=files.noise,
        labels=files.labels,
        other_birds=files.other_birds,
    )
    training.split(settings.fold)
    replace(training, birdnet=None).require_sound_for(experiment)  # a kernel has no embeddings
    classes, names = training.classes, training.scientific_names
    model = initialise(experiment, len(classes), files.init, classes=classes, names=names)
    if staging.wheels is None and any(getattr(experiment.augment, n) > 0 for n in _NEED_PACKAGES):
        logger.warning(
            "%s augments with packages that Kaggle's image lacks: give --wheels DIR, filled by "
            "`pip download --no-deps -d DIR --python-version 3.12 --only-binary :all: %s`",
            experiment.name,
            _MISSING_PACKAGES,
        )
    with _staging(staging, upload) as dataset:
        shutil.copyfile(files.folds, dataset / PackagedFile.FOLDS)
        shutil.copyfile(files.audit, dataset / PackagedFile.AUDIT)
        if files.labels is not None:
            shutil.copyfile(files.labels, dataset / PackagedFile.LABELS)
        _copy_sound(training.noise_files, dataset / PackagedFile.NOISE)
        if experiment.augment.other_birds_probability > 0:
            _copy_sound(training.other_birds, dataset / PackagedFile.OTHER_BIRDS)
        if files.init is not None or experiment.model.pretrained:
            init = _stage_weights(files.init, model, dataset)
            settings = replace(settings, init=init)
        write_settings(dataset, settings)
    return staging.build / "dataset"


def _copy_sound(files: Sequence[Path], folder: Path) -> None:
    # Numbered folders: under its name, that of a collection of noise would need its metadata.
    numbers: dict[Path, int] = {}
    for path in files:
        number = numbers.setdefault(path.parent, len(numbers))
        (folder / f"{number:03}").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{number:03}" / path.name)


def _stage_weights(init: Path | None, model: SEDModel, dataset: Path) -> str:
    """Write the weights to start from into ``dataset``; return their name there.

    Those of ``init`` come with the settings of a run beside them, which name its classes. Without
    ``init`` it is what the kernel cannot fetch: the pretrained backbone, or BirdNET and its head.
    """
    folder = dataset / PackagedFile.INIT
    name = f"{PackagedFile.INIT}/weights{'.safetensors' if init is None else init.suffix}"
    if init is None:
        part = model if isinstance(model.backbone, BirdNETBackbone) else model.backbone
        tensors = {key: tensor.contiguous() for key, tensor in part.state_dict().items()}
        write_atomically(dataset / name, safetensors.torch.save(tensors))
        return name
    folder.mkdir()
    shutil.copyfile(init, dataset / name)
    if (init.parent / SETTINGS_FILE).is_file():
        shutil.copyfile(init.parent / SETTINGS_FILE, folder / SETTINGS_FILE)
    return name
