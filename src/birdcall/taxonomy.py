"""Look up the competition's 264 species by eBird code, scientific or common name."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
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


def known_species(classes: Iterable[str]) -> list[str]:
    """Return the codes of the classes, then of all other species of the competition."""
    return list(dict.fromkeys((*classes, *(species.ebird_code for species in all_species()))))


def find_species(name: str) -> Species | None:
    """Return the species of a ``Scientific_Common`` label, a name or a code, in any case.

    If the scientific name of a label has changed since 2020, its common name decides, and the
    other way round. None: not among the 264.
    """
    options = _normal(name)
    scientific, _, common = options.partition("_")
    names = _by_name()
    return names.get(options) or species_of(options) or names.get(scientific) or names.get(common)


def match_code(label: str, codes: Collection[str]) -> str | None:
    """Return which of ``codes`` a person's label means: a code or a name, in any case; else None.

    Spaces and quotes around the label do not count.
    """
    if label in codes:
        return label
    species = find_species(label)
    wanted = {_normal(label), species.ebird_code if species else None}
    return next((code for code in codes if _normal(code) in wanted), None)


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


@lru_cache(maxsize=4096)
def _normal(name: str) -> str:
    text = unicodedata.normalize("NFKC", name).replace("\u2019", "'")  # as in Say's Phoebe
    return " ".join(text.strip("\"' \t").split()).casefold()
