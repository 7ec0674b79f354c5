"""The benchmark of a season takes its table through real commands, and its numbers follow."""

import numpy as np
import pandas as pd
import pytest
from helpers import SCRIPT

from birdcall.audio.reading import read_audio
from birdcall.benchmark import season as season_module
from birdcall.benchmark.frontend import make_recordings
from birdcall.benchmark.scale import Machine
from birdcall.benchmark.season import (
    SeasonCosts,
    benchmark_season,
    compare_sizes,
    season_names,
    select_names,
)
from birdcall.data.audit import read_audit
from birdcall.data.recordings import read_recordings
from birdcall.demo.writer import SoundBank, write_season


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return make_recordings(tmp_path_factory.mktemp("sounds"), 3, 6.0)


@pytest.fixture(scope="module")
def few_names(tmp_path_factory):
    """A table of 240 recordings of four species; every third one lists another species."""
    codes = ["aldfly", "ameavo", "amebit", "amecro"]
    rows = [
        (f"XC{number}.mp3", codes[number % 4], codes[(number + 1) % 4] if number % 3 == 0 else "")
        for number in range(240)
    ]
    path = tmp_path_factory.mktemp("names") / "recordings.csv"
    columns = ["filename", "ebird_code", "background_codes"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def test_names_that_are_made_up_are_distributed_as_a_season():
    names = season_names()
    counts = names["ebird_code"].value_counts()
    assert (len(names), len(counts)) == (43_934, 264)
    assert names["filename"].is_unique
    assert counts.min() >= 9
    assert counts.max() > 1000 > 3 * counts.median()
    assert names["recordist"].value_counts().max() > 20 * names["recordist"].value_counts().median()


def test_a_part_of_the_names_has_all_species_and_no_name_twice(few_names):
    names = season_names()
    part = select_names(names, 1000)
    assert part["ebird_code"].nunique() == 264
    assert len(part) == 1000
    assert part["filename"].is_unique
    assert select_names(names, 43_934).equals(names)
    assert select_names(names, 7)["ebird_code"].nunique() == 7


def test_sounds_repeat_but_never_the_same(sounds, tmp_path):
    bank = SoundBank(sounds)
    decoded = set()
    for number in range(80):
        content, seconds = bank.sound(number)
        path = tmp_path / f"{number}.mp3"
        path.write_bytes(content)
        waveform = read_audio(path, 48_000)
        assert len(waveform) / 48_000 == pytest.approx(seconds, abs=0.06)
        assert np.abs(waveform).max() > 0.001
        decoded.add(waveform.tobytes())
    assert len(decoded) == 80


def test_an_audit_that_is_killed_decodes_no_finished_recording_again(sounds, few_names, tmp_path):
    season = season_module._Season(tmp_path)
    names = season_names(few_names)
    hours = write_season(season.data, names, SoundBank(sounds))
    recordings = read_recordings(season.data)
    assert recordings["secondary_codes"].map(len).sum() == 80
    usage, resumed = season.audit()
    audit = read_audit(season.output / "audit.csv")
    assert 40 <= resumed["finished"] < 240
    assert resumed["again"] == 0
    assert usage.cpu_seconds > 0
    assert set(audit["path"]) == set(recordings["path"])
    assert (audit["status"] == "ok").all()
    assert audit["seconds"].sum() / 3600 == pytest.approx(hours, rel=0.05)


def test_growth_is_one_where_a_step_is_linear_and_more_where_it_is_not():
    rows = []
    for n in (1000, 10_000, 40_000):
        start = {"recordings": n, "seconds": 9.0}
        rows.append({"step": "linear", "cpu_seconds": 5 + 2e-3 * n, **start})
        rows.append({"step": "square", "cpu_seconds": 5 + 1e-6 * n**2, **start})
    table = compare_sizes(rows)
    linear, square = (table[table["step"] == step] for step in ("linear", "square"))
    assert linear["growth"].iloc[-1] == pytest.approx(1)
    assert linear["added_per_1000"].iloc[1] == pytest.approx(2)
    assert square["growth"].iloc[-1] == pytest.approx(50_000 / 11_000, abs=0.01)
    assert linear["seconds_per_1000"].tolist() == [9.0, 0.9, 0.225]


def test_the_real_season_is_what_its_costs_make_of_a_machine():
    costs = SeasonCosts(
        recording=0.36, hour=36.0, tables=120.0, package=60.0, clip=0.09, n_recordings=10_000
    )
    two = costs.estimate(Machine("two", 2))
    hours = 10_000 * 52.6 / 3600
    assert two["audit_hours"] == pytest.approx((3600 + 36 * hours) / 1.8 / 3600, abs=0.006)
    assert two["epoch_minutes"] == pytest.approx(8000 * 0.09 / 1.8 / 60, abs=0.06)
    assert (two["tables_minutes"], two["package_minutes"]) == (2.0, 1.0)
    gpu = costs.estimate(Machine("gpu", 4, 2, 1800.0))
    assert gpu["audit_hours"] == pytest.approx(two["audit_hours"] / 2, abs=0.01)
    assert gpu["epoch_minutes"] == pytest.approx(8000 * 5 / (2 * 1800 / 3) / 60, abs=0.06)


def test_only_what_grows_is_scaled_to_the_season():
    """By hand: folds and evaluation take 4 s at the start and 1 s for each thousand, both."""
    rows = [
        {"step": step, "recordings": size, "hours": size / 1000, "seconds": 1.0, "cpu_seconds": cpu}
        for size, grown in ((1000, 1.0), (2000, 2.0))
        for step, cpu in (
            ("audit --cache", 6 + 3 * grown), ("folds", 4 + grown), ("evaluate", 4 + grown),
            ("package", 60.0),
        )
    ]  # fmt: skip
    long = {"step": "audit --cache, 10 x as long", "recordings": 1000, "hours": 10.0}
    table = compare_sizes([*rows, long | {"seconds": 1.0, "cpu_seconds": 27.0}])
    costs = SeasonCosts.of(table, clips_per_second=10.0)
    assert costs.tables == pytest.approx(2 * (4 + 43.934))
    assert (costs.hour, costs.package) == (2.0, 60.0)
    alone = SeasonCosts.of(table[table["recordings"] == 1000].assign(added_per_1000=np.nan), 10.0)
    assert alone.tables == pytest.approx(2 * 5 * 43.934)


def test_a_size_beyond_the_names_is_refused(sounds, few_names, tmp_path):
    with pytest.raises(ValueError, match="a size is 241; there are 240 names"):
        benchmark_season(sounds, tmp_path, SCRIPT, names=few_names, sizes=[241])


@pytest.mark.slow
def test_every_step_has_a_row_for_each_size(sounds, few_names, tmp_path):
    table, machines = benchmark_season(sounds, tmp_path, SCRIPT, names=few_names, sizes=[120, 240])
    sizes = table.groupby("step", sort=False)["recordings"].apply(list)
    assert sizes.pop("audit --cache, 10 x as long") == [120]
    assert len(sizes) == 7
    assert all(of_step == [120, 240] for of_step in sizes)
    audits = table[table["step"] == "audit --cache"]
    assert (audits["finished"] >= [20, 40]).all()
    assert (audits["again"] == 0).all()
    measured = table[table["step"] != "stored predictions"]
    assert (measured["cpu_seconds"] > 0).all()
    assert machines is None  # of such small sizes nothing can be estimated
    assert not (tmp_path / "season" / "240").exists()
