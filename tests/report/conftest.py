"""The report of the shared evaluation, written once for all tests of this folder."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def written_report(write_report_of, held_out, evaluation, make_once):
    """The path of a report, and its soundscape pages by recording; tests leave them as they are."""

    def write(folder: Path) -> None:
        pages = write_report_of(folder / "report.html", "demo", held_out, evaluation)
        names = {recording: str(path) for recording, path in pages.items()}
        (folder / "pages.json").write_text(json.dumps(names))

    folder = make_once("report", write)
    names = json.loads((folder / "pages.json").read_text())
    return folder / "report.html", {recording: Path(path) for recording, path in names.items()}
