"""The submission kernel: find the mounted package and data, then one call."""

import os
import sys
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))


def find(marker: str) -> Path:
    """Return the mounted folder that holds ``marker``, at any depth that Kaggle has had."""
    for depth in ("*", "*/*", "*/*/*"):
        for path in sorted(INPUT.glob(f"{depth}/{marker}")):
            return path.parent
    raise FileNotFoundError(f"{marker} is nowhere below {INPUT}: is the data source attached?")


package = find("manifest.json")
sys.path.insert(0, str(package))

from birdcall.kernel import run_kernel  # noqa: E402 - found only now

run_kernel(package, find("sample_submission.csv"), WORKING / "submission.csv")
