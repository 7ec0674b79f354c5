"""The estimates for large amounts of audio follow from the measured costs, by hand."""

import pytest

from birdcall.benchmark.scale import Archive, InferenceCosts, Machine

COSTS = InferenceCosts(reading=2.0, front_end=1.0, network=3.0)


def test_cores_share_all_of_the_work():
    assert Machine("m", 4).seconds_per_hour(COSTS, 5) == pytest.approx(18 / (4 * 0.9))


def test_beside_a_gpu_the_slower_of_reading_and_networks_decides():
    assert Machine("m", 4, 2, 3600.0).seconds_per_hour(COSTS, 1) == pytest.approx(2 / (2 * 0.9))
    assert Machine("m", 4, 2, 3600.0).seconds_per_hour(COSTS, 10) == pytest.approx(5)


def test_without_failures_an_archive_takes_its_work_divided_by_the_workers():
    archive = Archive(hours=1000, n_workers=10, task_hours=2, failures_per_day=0)
    result = archive.simulate(seconds_per_hour=36.0)
    assert result["tasks"] == 500
    assert result["days"] == pytest.approx(1000 * 36 / 10 / 86400, abs=0.005)
    assert result["work_done_again"] == result["lost_workers"] == 0


def test_what_failures_cost_is_what_theory_says():
    """A worker that is lost has done half of a short task on average."""
    archive = Archive(
        hours=20_000, n_workers=20, task_hours=2, failures_per_day=24, restart_seconds=0
    )
    result = archive.simulate(seconds_per_hour=36.0)
    task, rate = 72.0, 24 / 86400
    expected_losses = 10_000 * task * rate  # while all of the work is done once
    assert result["lost_workers"] == pytest.approx(expected_losses, rel=0.15)
    assert result["work_done_again"] == pytest.approx(rate * task / 2, rel=0.25)
    archive = Archive(20_000, 20, 2, failures_per_day=24, restart_seconds=600)
    slow = archive.simulate(seconds_per_hour=36.0)
    assert slow["longer_than_without_failures"] == pytest.approx(rate * 600, rel=0.25)


def test_costs_are_those_of_the_largest_ensemble(tmp_path):
    path = tmp_path / "inference.csv"
    path.write_text(
        "members,reading_seconds,front_end_seconds,networks_seconds\n1,2,1,4\n5,2.5,1.5,20\n"
    )
    assert InferenceCosts.read(path) == InferenceCosts(2.5, 1.5, 4.0)
    with pytest.raises(FileNotFoundError, match="birdcall benchmark inference"):
        InferenceCosts.read(tmp_path / "none.csv")


@pytest.mark.parametrize("field, value", [("hours", 0), ("n_workers", 0), ("restart_seconds", -1)])
def test_an_impossible_archive_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Archive(**{field: value})
