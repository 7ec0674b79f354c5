"""The 264 species come with the package and are found by any of their names."""

import pytest

from birdcall.taxonomy import (
    all_species,
    display_name,
    find_species,
    is_unknown_bird,
    match_code,
    species_of,
)


def test_there_are_264_species_in_the_competitions_class_order() -> None:
    codes = [species.ebird_code for species in all_species()]
    assert len(set(codes)) == 264
    assert codes == sorted(codes)
    assert (codes[0], codes[-1]) == ("aldfly", "yetvir")


@pytest.mark.parametrize("species", all_species(), ids=lambda species: species.ebird_code)
def test_every_species_is_found_by_each_of_its_names(species) -> None:
    assert species_of(species.ebird_code) is species
    for name in (species.label, species.scientific_name, species.common_name):
        assert find_species(name) is species


@pytest.mark.parametrize(
    "name",
    [
        "Empidonax alnorum_Alder Flycatcher",
        "empidonax  alnorum",
        "ALDER FLYCATCHER",
        "Empidonax alnorum_Some Other Name",
        "Empidonax renamed_Alder Flycatcher",
    ],
)
def test_names_are_found_in_any_case_and_by_either_half_of_a_label(name: str) -> None:
    assert find_species(name) == species_of("aldfly")


@pytest.mark.parametrize("name", ["", "_", "Parus major_Great Tit", "aldfly_"])
def test_what_is_not_among_the_264_is_not_found(name: str) -> None:
    assert find_species(name) is None


def test_people_read_common_names_and_codes_outside_the_264() -> None:
    assert display_name("amecro") == "American Crow"
    assert display_name("gretit1") == "gretit1"


@pytest.mark.parametrize(
    "label", ["saypho", "SAYPHO", ' "saypho "', "Say\u2019s  phoebe", "Sayornis saya_Say's Phoebe"]
)
def test_a_label_means_a_class_in_any_spelling(label: str) -> None:
    assert match_code(label, ["amecro", "saypho"]) == "saypho"
    assert match_code(label, ["amecro"]) is None


def test_classes_outside_the_264_are_matched_by_their_code() -> None:
    assert match_code(" Gretit1", ["gretit1", "saypho"]) == "gretit1"
    assert match_code("Great Tit", ["gretit1"]) is None


@pytest.mark.parametrize(
    "label, code",
    [
        ("reevir", "reevir1"),
        ("redpol1", "comred"),  # lumped in 2024
        ("AMHGUL1", "hergul"),  # split in 2024
        ("American Herring Gull", "hergul"),
        ("Larus smithsonianus_American Herring Gull", "hergul"),
        ("eawvir1", "warvir"),  # split in 2025
        ("wewvir2", "warvir"),
        ("yelwar1", "yelwar"),
        ("Western Flycatcher", "pasfly"),
        ("Nannopterum auritum", "doccor"),
        ("Corthylio calendula, Ruby-crowned Kinglet", "ruckin"),
    ],
)
def test_codes_and_names_of_other_taxonomies_are_those_of_the_competition(label, code) -> None:
    assert find_species(label) == species_of(code)
    assert match_code(label, ["amecro", code]) == code


def test_a_class_with_a_later_code_is_that_class() -> None:
    assert match_code("redpol1", ["comred", "redpol1"]) == "redpol1"


def test_question_marks_are_a_bird_that_nobody_could_name() -> None:
    assert [
        label for label in ("????", " ? ", "", "saypho", "saypho?") if is_unknown_bird(label)
    ] == [
        "????",
        " ? ",
    ]
