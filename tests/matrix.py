"""Write what a cell of the version matrix ran into docs/versions.md: the pytest plugin of `tox`."""

import os
import platform
import re
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "docs" / "versions.md"
PACKAGES = (
    *("torch", "timm", "numpy", "scipy", "pandas", "scikit-learn", "librosa", "soundfile"),
    *("pyarrow", "onnxruntime", "ray"),
)
START = time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    cell = os.environ.get("MATRIX_CELL")
    if cell is None or hasattr(config, "workerinput"):
        return
    outcomes = {
        name: len(terminalreporter.stats.get(name, ()))
        for name in ("passed", "failed", "error", "skipped")
    }
    tests = "all" if config.args == config.getini("testpaths") else " ".join(config.args)
    minutes = (time.monotonic() - START) / 60
    row = (
        *(cell, platform.python_version(), *map(installed_version, PACKAGES), tests),
        *(outcomes["passed"], outcomes["failed"] + outcomes["error"], outcomes["skipped"]),
        *(f"{minutes:.0f}", date.today()),
    )
    line = f"| {' | '.join(map(str, row))} |"
    text = TABLE.read_text(encoding="utf-8")
    text, found = re.subn(rf"^\| {re.escape(cell)} \|.*$", line, text, flags=re.MULTILINE)
    if not found:
        raise ValueError(f"{TABLE} has no row that starts with | {cell} |")
    TABLE.write_text(text, encoding="utf-8")
    terminalreporter.write_line(line)


def installed_version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"
