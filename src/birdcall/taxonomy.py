"""Look up the competition's 264 species by eBird code, scientific or common name."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

# Codes and names of eBird's other taxonomies (before 2020; 2021 to 2025) by the competition's code.
# A species that was split is the one of North America, lumped species are the one of the 264.
_OTHER_NAMES = {
    "comred": ("redpol1", "Redpoll"),
    "coohaw": ("Astur cooperii",),
    "doccor": ("Nannopterum auritum",),
    "hergul": ("amhgul1", "American Herring Gull", "Larus smithsonianus"),
    "houwre": ("Northern House Wren",),
    "leabit": ("Botaurus exilis",),
    "pasfly": ("wesfly", "Western Flycatcher"),
    "reevir1": ("reevir",),
    "ruckin": ("Corthylio calendula",),
    "warvir": ("eawvir1", "Eastern Warbling Vireo", "wewvir2", "Western Warbling Vireo")
    + ("Vireo swainsoni",),
    "yelwar": ("yelwar1", "Northern Yellow Warbler", "Setophaga aestiva"),
}
UNKNOWN_BIRD = "????"  # the label of a bird that nobody could name, in the Cornell Lab's tables


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

    Codes and names of eBird's later taxonomies count too. If the scientific name of a label has
    changed since 2020, its common name decides, and the other way round; BirdNET-Analyzer has a
    comma between them. None: not among the 264.
    """
    options = _normal(name)
    scientific, _, common = options.replace(", ", "_").partition("_")
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


def is_unknown_bird(label: str) -> bool:
    """Return whether a label says that there is a bird, and that nobody could name it: ``????``."""
    return set(label.strip("\"' ")) == {"?"}


def display_name(ebird_code: str) -> str:
    """Return the common name, or the code itself where it is outside the 264."""
    species = species_of(ebird_code)
    return species.common_name if species else ebird_code


@cache
def _by_name() -> dict[str, Species]:
    names = {}
    for species in all_species():
        others = _OTHER_NAMES.get(species.ebird_code, ())
        for name in (species.label, species.scientific_name, species.common_name, *others):
            names[_normal(name)] = species
    return names


@lru_cache(maxsize=4096)
def _normal(name: str) -> str:
    text = unicodedata.normalize("NFKC", name).replace("\u2019", "'")  # as in Say's Phoebe
    return " ".join(text.strip("\"' \t").split()).casefold()
