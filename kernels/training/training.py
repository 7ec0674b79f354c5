"""The training kernel: find the mounted package and data, then one call."""

import os
import sys
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
TEMP = Path(os.environ.get("KAGGLE_TEMP", "/kaggle/temp"))  # gone after the session
TIME_LIMIT = os.environ.get("KAGGLE_TIME_LIMIT")  # seconds, in place of the package's


def find(marker: str) -> Path:
    """Return the mounted folder that holds ``marker``, at any depth that Kaggle has had."""
    for depth in ("*", "*/*", "*/*/*"):
        for path in sorted(INPUT.glob(f"{depth}/{marker}")):
            return path.parent
    raise FileNotFoundError(f"{marker} is nowhere below {INPUT}: is the data source attached?")


package = find("training.json")
sys.path.insert(0, str(package))

from birdcall.kaggle.training_kernel import run_training_kernel  # noqa: E402 - found only now

limit = float(TIME_LIMIT) if TIME_LIMIT else None
sys.exit(run_training_kernel(package, find("train.csv"), INPUT, WORKING, TEMP, limit))
