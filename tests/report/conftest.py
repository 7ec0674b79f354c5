"""The report of the shared evaluation, written once for all tests of this folder."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def written_report(write_report_of, held_out, evaluation, tmp_path_factory):
    """The path of a report, and its soundscape pages by recording; tests leave them as they are."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    pages: dict[str, Path] = write_report_of(path, "demo", held_out, evaluation)
    return path, pages
