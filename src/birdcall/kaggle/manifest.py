"""Check the files of a package against its manifest, and install its wheels.

The kernels import this module first: it needs nothing that the wheels may bring.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from birdcall import __version__
from birdcall.storage.files import inside

MANIFEST_FILE = "manifest.json"
DATASET_METADATA, KERNEL_METADATA = "dataset-metadata.json", "kernel-metadata.json"  # Kaggle's
WHEELS_FOLDER = "wheels"
_CODE_FILE = "birdcall/__init__.py"  # every package has it
_NOT_MOUNTED = (MANIFEST_FILE, DATASET_METADATA)  # Kaggle does not mount the metadata


def make_manifest(package: Path) -> dict[str, object]:
    """Return our name and version, and the sha256 of every file below ``package``, by its path.

    The kernels know the package by it among all mounted data sources.
    """
    files = sorted(path for path in package.rglob("*") if path.is_file())
    digests = {
        path.relative_to(package).as_posix(): _sha256(path)
        for path in files
        if path.name not in _NOT_MOUNTED and path.suffix != ".pyc"
    }
    return {"name": "birdcall", "version": __version__, "files": digests}


def read_manifest(package: Path) -> dict[str, str]:
    """Return the sha256 of every file as packaged, by its path; ValueError if it is not ours."""
    path = package / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest; `birdcall package` writes one")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if _CODE_FILE in manifest:  # of an earlier version: the digests alone
            return dict(manifest)
        if manifest["name"] != "birdcall":
            raise ValueError(f"it is of {manifest['name']!r}, not of birdcall")
        return dict(manifest["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a manifest of `birdcall package`: {error}") from error


def find_changes(package: Path) -> dict[str, str]:
    """Return the files that are not as packaged, each with the reason."""
    changed = {}
    for name, digest in read_manifest(package).items():
        file = inside(package, name)
        if not file.is_file():
            changed[name] = f"{file}: in the manifest, but missing from the package"
        elif _sha256(file) != digest:
            changed[name] = f"{file}: its sha256 is not the manifest's; upload the package again"
    return changed


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
