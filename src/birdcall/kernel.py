"""Run a staged package on the competition's data: what the submission kernel calls."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from birdcall.checkpoint import find_checkpoints
from birdcall.decision import read_decision
from birdcall.files import inside
from birdcall.inference import (
    SubmissionSummary,
    default_device,
    load_ensemble,
    write_nocall,
    write_predictions,
)

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
DECISION_FILE = "decision.json"
MEMBERS_FOLDER = "members"
NOT_MOUNTED = (
    MANIFEST_FILE,
    "dataset-metadata.json",
)  # Kaggle keeps the metadata to itself


def run_kernel(package: Path, data: Path, submission: Path) -> SubmissionSummary:
    """Predict ``test.csv`` in ``data`` with the package's members and write ``submission``.

    A valid all-nocall file lies there before any model is loaded. What stops the models raises, so
    that a kernel without them fails visibly instead of scoring like all-nocall.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    write_nocall(data, submission)
    check_manifest(package)
    decision = read_decision(package / DECISION_FILE)
    device = default_device()
    ensemble = load_ensemble(find_checkpoints(package / MEMBERS_FOLDER), device)
    logger.info("%d members on %s, data in %s", len(ensemble.members), device, data)
    summary = write_predictions(data, ensemble, decision, submission)
    logger.info("%s: %s", submission, summary)
    return summary


def make_manifest(package: Path) -> dict[str, str]:
    """Return the sha256 of every file below ``package``, by relative path."""
    files = sorted(path for path in package.rglob("*") if path.is_file())
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in NOT_MOUNTED and path.suffix != ".pyc"
    }


def check_manifest(package: Path) -> None:
    """Raise an error naming the first file that is not as packaged."""
    path = package / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest; `birdcall package` makes one")
    for name, digest in json.loads(path.read_text(encoding="utf-8")).items():
        file = inside(package, name)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: in the manifest, but missing from the package")
        if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{file}: its sha256 is not the manifest's; upload the package again")
