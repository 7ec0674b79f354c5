"""Look up the competition's 264 species by eBird code, scientific or common name."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, order=True)
class Species:
    """One of the 264; ``label`` is its name in xeno-canto's metadata, ``Scientific_Common``."""

    ebird_code: str
    scientific_name: str
    common_name: str

    @property
    def label(self) -> str:
        return f"{self.scientific_name}_{self.common_name}"


@cache
def all_species() -> tuple[Species, ...]:
    """Return the 264 species by code, which is the competition's order of classes."""
    text = resources.files("birdcall").joinpath("ebird_codes.csv").read_text(encoding="utf-8")
    return tuple(
        Species(row["ebird_code"], row["scientific_name"], row["common_name"])
        for row in csv.DictReader(text.splitlines())
    )


@cache
def species_of(ebird_code: str) -> Species | None:
    """Return the species of a code; None for a code outside the 264."""
    return next((species for species in all_species() if species.ebird_code == ebird_code), None)


def find_species(name: str) -> Species | None:
    """Return the species of a ``Scientific_Common`` label, scientific or common name, in any case.

    If the scientific name of a label has changed since 2020, its common name decides, and the
    other way round. None: not among the 264.
    """
    options = _normal(name)
    scientific, _, common = options.partition("_")
    names = _by_name()
    return names.get(options) or names.get(scientific) or names.get(common)


def display_name(ebird_code: str) -> str:
    """Return the common name, or the code itself where it is outside the 264."""
    species = species_of(ebird_code)
    return species.common_name if species else ebird_code


@cache
def _by_name() -> dict[str, Species]:
    names = {}
    for species in all_species():
        for name in (species.label, species.scientific_name, species.common_name):
            names[_normal(name)] = species
    return names


def _normal(name: str) -> str:
    return " ".join(name.split()).casefold()
