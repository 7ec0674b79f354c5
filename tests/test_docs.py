"""What README and docs name exists: files, headings, commands and their options."""

import re
from pathlib import Path

import pytest
import typer.main

from birdcall.__main__ import app

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT, ROOT / "docs", ROOT / "folds", ROOT / "input")
PAGES = [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]
EXAMPLES = re.compile(r"```.*?```", re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def links_of(page: Path) -> list[tuple[Path, str]]:
    """The files that a page links to or shows, each with the heading in it, if one is named."""
    targets = re.findall(r"\]\(([^)\s]+)\)", EXAMPLES.sub("", text_of(page)))
    parts = [target.partition("#") for target in targets if "://" not in target]
    return [(page.parent / name if name else page, anchor) for name, _, anchor in parts]


def anchors_of(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", EXAMPLES.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> dict[str, set[str]]:
    """The options of each command, by its name: ``benchmark frontend``."""
    options = {}

    def add(command: object, name: str) -> None:
        options[name] = {option for item in command.params for option in item.opts}
        for child, item in getattr(command, "commands", {}).items():
            add(item, f"{name} {child}".strip())

    add(typer.main.get_command(app), "")
    return options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page):
    for path, anchor in links_of(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors_of(path), f"{path}#{anchor}"


def test_each_picture_is_on_a_page_and_each_page_is_linked():
    linked = {path.resolve() for page in PAGES for path, _ in links_of(page)}
    files = {path for path in (ROOT / "docs").rglob("*") if path.is_file()}
    assert files <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    known = commands()
    text = text_of(page).replace("\\\n", " ")
    for line in re.findall(r"(?:^ {4}|`)(?:.*&& )?birdcall ([a-z][^`\n]*)", text, re.MULTILINE):
        words = line.split(" #")[0].split()
        name = " ".join(words[:2]) if words[0] == "benchmark" else words[0]
        assert name in known, line
        options = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
        assert options <= known[name] | known[""], line
