"""The training kernel: find the mounted package and the data, and call the package."""

import os
import sys
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
TEMP = Path(os.environ.get("KAGGLE_TEMP", "/kaggle/temp"))  # deleted after the session
TIME_LIMIT = os.environ.get("KAGGLE_TIME_LIMIT")  # seconds, instead of the limit in the package


def find(marker: str) -> Path:
    """Return the mounted folder that contains ``marker``; its depth depends on Kaggle's version."""
    for depth in ("*", "*/*", "*/*/*"):
        for path in sorted(INPUT.glob(f"{depth}/{marker}")):
            return path.parent
    raise FileNotFoundError(
        f"no {marker} below {INPUT}: is the data source attached to the kernel?"
    )


package = find("training.json")
sys.path.insert(0, str(package))

from birdcall.kaggle.training_kernel import (  # noqa: E402 - in the package
    SessionFolders,
    run_training_kernel,
)

folders = SessionFolders(
    package=package, data=find("train.csv"), mounts=INPUT, working=WORKING, scratch=TEMP
)
sys.exit(run_training_kernel(folders, float(TIME_LIMIT) if TIME_LIMIT else None))
