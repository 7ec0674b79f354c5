"""The training kernel: find the mounted package and the data, and call the package."""

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
TEMP = Path(os.environ.get("KAGGLE_TEMP", "/kaggle/temp"))  # deleted after the session
TIME_LIMIT = os.environ.get("KAGGLE_TIME_LIMIT")  # seconds, instead of the limit in the package
COMPETITION = "birdsong-recognition"

Rate = tuple[bool, ...] | None


def find(marker: str, rate: Callable[[Path], Rate], what: str) -> Path:
    """Return the mounted folder with a file ``marker`` for which ``rate`` is highest.

    Other data sources may have a file of this name, too; ``rate`` is None for what is not ours. The
    depth of the mounts depends on Kaggle's version, which may mount a source under two names.
    """
    depths = ("*", "*/*", "*/*/*")
    paths = [path for depth in depths for path in sorted(INPUT.glob(f"{depth}/{marker}"))]
    rates = {path: value for path in paths if (value := rate(path.parent)) is not None}
    best = [path for path in rates if rates[path] == max(rates.values())]
    if not best:
        others = f"; not ours: {', '.join(map(str, paths))}" if paths else ""
        raise FileNotFoundError(f"no {what} below {INPUT}: is its source attached?{others}")
    if len({path.read_bytes() for path in best}) > 1:
        raise ValueError(f"more than one {what}: {', '.join(map(str, best))}; detach all but one")
    return best[0].parent


def rate_package(folder: Path) -> Rate:
    """Return how well a folder's manifest fits: its name and version are ours, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        is_ours = manifest["name"] == "birdcall" and "training.json" in manifest["files"]
        return (True,) if is_ours and isinstance(manifest["version"], str) else None
    except Exception:  # whatever another source calls a manifest
        return None


def rate_data(folder: Path) -> Rate:
    """Return how well a folder fits; None without the columns and the audio of the competition."""
    try:
        with (folder / "train.csv").open(encoding="utf-8-sig", errors="replace") as file:
            columns = set(next(csv.reader(file), []))
    except (OSError, csv.Error):
        return None
    if not {"ebird_code", "filename"} <= columns or not (folder / "train_audio").is_dir():
        return None
    return (
        folder.parts[-2:] == ("competitions", COMPETITION),
        (folder / "test.csv").is_file(),
        folder.name == COMPETITION,
    )


package = find("manifest.json", rate_package, "manifest.json of `birdcall package-training`")
data = find("train.csv", rate_data, f"train.csv with the columns of {COMPETITION}")
print(f"package: {package}; data: {data}")
sys.path.insert(0, str(package))

from birdcall.kaggle.training_kernel import (  # noqa: E402 - in the package
    SessionFolders,
    run_training_kernel,
)

folders = SessionFolders(package=package, data=data, mounts=INPUT, working=WORKING, scratch=TEMP)
sys.exit(run_training_kernel(folders, float(TIME_LIMIT) if TIME_LIMIT else None))
