"""The ranges of versions in pyproject.toml: whole, true, and around what CI and Kaggle install."""

import ast
import os
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import birdcall

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CELL = os.environ.get("MATRIX_CELL", "")


def by_name(lines, **environment: str) -> dict[str, list[Requirement]]:
    """Requirements by name of the package, ours and those of other Pythons left out."""
    requirements = [Requirement(line) for line in lines]
    names: dict[str, list[Requirement]] = {}
    for item in requirements:
        if item.name != PROJECT["name"] and (
            item.marker is None or item.marker.evaluate(environment)
        ):
            names.setdefault(canonicalize_name(item.name), []).append(item)
    return names


def pins_of(file: str) -> dict[str, Version]:
    """The versions that a file of requirements pins."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = (re.match(r"([\w.-]+)(?:\[\w+\])?==(\S+)", line) for line in lines)
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}


LINES = [*PROJECT["dependencies"], *(line for name in EXTRAS for line in EXTRAS[name])]
DECLARED = by_name(LINES)


def test_what_the_package_imports_is_declared():
    modules = set()
    for path in Path(birdcall.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, PROJECT["name"]}
    packages = packages_distributions()
    undeclared = {
        module for module in modules
        if not DECLARED.keys() & set(map(canonicalize_name, packages.get(module, [module])))
    }  # fmt: skip
    assert not undeclared


def test_pins_lie_in_the_ranges_and_none_is_missing():
    pins = pins_of("requirements.txt")
    installed = by_name([*PROJECT["dependencies"], *EXTRAS["dev"]])
    assert installed.keys() <= pins.keys()
    outside = [
        f"{name} {pins[name]}: {item}"
        for name, items in DECLARED.items()
        for item in items
        if name in pins and pins[name] not in item.specifier
    ]
    assert not outside


def test_kaggles_versions_lie_in_the_ranges():
    """But for soxr, whose upper bound is that of audiomentations, which the image does not have."""
    pins, declared = pins_of("tests/kaggle/image.txt"), by_name(LINES, python_version="3.12")
    outside = {
        name
        for name, pin in pins.items()
        if not all(pin in item.specifier for item in declared.get(name, ()))
    }
    assert outside == {"soxr"}


@pytest.mark.skipif(not CELL.endswith("-lowest"), reason="for `tox -e 3.11-lowest` and its like")
def test_the_lowest_versions_that_can_be_installed_are_those_declared():
    lowest = {
        name: max(
            Version(part.version)
            for item in items
            for part in item.specifier
            if part.operator in {">=", "=="}
        )
        for name, items in DECLARED.items()
        if name not in by_name(EXTRAS["peers"])  # it needs newer versions of the others
    }
    installed = {name: Version(version(name)) for name in lowest}
    assert installed == lowest
