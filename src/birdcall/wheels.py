"""Install the packages that Kaggle's image lacks from wheels that were uploaded with the code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WHEELS_FOLDER = "wheels"


def find_wheels(folder: Path | None) -> list[Path]:
    """Return the wheels in a folder; FileNotFoundError if it has none."""
    wheels = [] if folder is None else sorted(folder.glob("*.whl"))
    if folder is not None and not wheels:
        raise FileNotFoundError(f"{folder}: no wheels; `pip download --no-deps -d` puts them there")
    return wheels


def copy_wheels(wheels: Sequence[Path], package: Path) -> None:
    """Copy wheels to where `install_wheels` finds them."""
    for path in wheels:
        (package / WHEELS_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(path, package / WHEELS_FOLDER / path.name)


def install_wheels(package: Path, scratch: Path) -> Path | None:
    """Install the package's wheels below ``scratch``, without a network; return where.

    None if there are none. Raises CalledProcessError, after pip's message, if one does not fit.
    """
    wheels = sorted((package / WHEELS_FOLDER).glob("*.whl"))
    if not wheels:
        return None
    site = scratch / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--upgrade", "--target", str(site), *map(str, wheels)], check=True)
    return site
