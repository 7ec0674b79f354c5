"""The submission kernel: find the mounted package and the data, and call the package."""

import os
import sys
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
TEMP = Path(os.environ.get("KAGGLE_TEMP", "/kaggle/temp"))  # deleted after the session
# Seconds: the competition allows two hours, and the start of the session has taken some of them.
BUDGET = float(os.environ.get("KAGGLE_TIME_LIMIT", 6600))


def find(marker: str) -> Path:
    """Return the mounted folder that contains ``marker``; its depth depends on Kaggle's version."""
    for depth in ("*", "*/*", "*/*/*"):
        for path in sorted(INPUT.glob(f"{depth}/{marker}")):
            return path.parent
    raise FileNotFoundError(
        f"no {marker} below {INPUT}: is the data source attached to the kernel?"
    )


package = find("manifest.json")
sys.path.insert(0, str(package))

from birdcall.storage.files import install_wheels  # noqa: E402 - in the package

site = install_wheels(package, TEMP)
if site is not None:
    sys.path.insert(0, str(site))

from birdcall.kaggle.submission import run_kernel  # noqa: E402 - needs the wheels

run_kernel(package, find("sample_submission.csv"), WORKING / "submission.csv", BUDGET)
