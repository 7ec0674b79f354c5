"""The submission kernel: find the mounted package and data, then one call."""

import os
import sys
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
TEMP = Path(os.environ.get("KAGGLE_TEMP", "/kaggle/temp"))  # gone after the session
# Seconds, of the two hours that the competition allows; the start has taken some already.
BUDGET = float(os.environ.get("KAGGLE_TIME_LIMIT", 6600))


def find(marker: str) -> Path:
    """Return the mounted folder that holds ``marker``, at any depth that Kaggle has had."""
    for depth in ("*", "*/*", "*/*/*"):
        for path in sorted(INPUT.glob(f"{depth}/{marker}")):
            return path.parent
    raise FileNotFoundError(f"{marker} is nowhere below {INPUT}: is the data source attached?")


package = find("manifest.json")
sys.path.insert(0, str(package))

from birdcall.kaggle.manifest import install_wheels  # noqa: E402 - found only now

site = install_wheels(package, TEMP)
if site is not None:
    sys.path.insert(0, str(site))

from birdcall.kaggle.kernel import run_kernel  # noqa: E402 - some packages are found only now

run_kernel(package, find("sample_submission.csv"), WORKING / "submission.csv", BUDGET)
