"""The submission kernel: find the mounted package and the data, and call the package."""

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
TEMP = Path(os.environ.get("KAGGLE_TEMP", "/kaggle/temp"))  # deleted after the session
# Seconds: the competition allows two hours, and the start of the session has taken some of them.
BUDGET = float(os.environ.get("KAGGLE_TIME_LIMIT", 6600))
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
        is_ours = manifest["name"] == "birdcall" and "decision.json" in manifest["files"]
        return (True,) if is_ours and isinstance(manifest["version"], str) else None
    except Exception:  # whatever another source calls a manifest
        return None


def rate_data(folder: Path) -> Rate:
    """Return how well a folder fits; None if its test.csv has other columns.

    BirdCLEF 2021 has the same test.csv, but no ebird_code in a train.csv.
    """
    if not {"site", "row_id", "seconds", "audio_id"} <= columns_of(folder / "test.csv"):
        return None
    return (
        folder.parts[-2:] == ("competitions", COMPETITION),
        "ebird_code" in columns_of(folder / "train.csv"),
        {"row_id", "birds"} <= columns_of(folder / "sample_submission.csv"),
        folder.name == COMPETITION,
    )


def columns_of(table: Path) -> set:
    try:
        with table.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            return set(next(csv.reader(file), []))
    except (OSError, csv.Error):
        return set()


def write_nocall(data: Path, submission: Path) -> None:
    """Write a valid submission: one that stays, even if the package cannot be imported."""
    with (data / "test.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = [(row["row_id"], "nocall") for row in csv.DictReader(file)]
    try:
        with submission.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("row_id", "birds"), *rows])
    except OSError:
        submission.unlink(missing_ok=True)
        raise


data = find("test.csv", rate_data, f"test.csv with the columns of {COMPETITION}")
write_nocall(data, WORKING / "submission.csv")
package = find("manifest.json", rate_package, "manifest.json of `birdcall package`")
print(f"package: {package}; data: {data}")
sys.path.insert(0, str(package))

from birdcall.kaggle.manifest import install_wheels  # noqa: E402 - in the package

site = install_wheels(package, TEMP)
if site is not None:
    sys.path.insert(0, str(site))

from birdcall.kaggle.submission import run_kernel  # noqa: E402 - needs the wheels

run_kernel(package, data, WORKING / "submission.csv", BUDGET)
