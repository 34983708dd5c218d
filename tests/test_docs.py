"""Links of the pages lead somewhere; commands and recipes that the README names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def links(page):
    """Return file and anchor of every relative link of a page."""
    targets = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    parts = [target.partition("#") for target in targets if "://" not in target]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in parts]


def anchors(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in links(page):
        assert target.exists(), f"{target.relative_to(ROOT)} is missing"
        assert not anchor or anchor in anchors(target), f"no heading #{anchor} in {target.name}"


def test_readme_links_every_page():
    assert {target for target, _ in links(README)} >= set(PAGES)


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 140


def test_readme_names_recipes_that_exist():
    named = re.findall(r"\b(?:recipes/)?([\w/.]+\.yaml)\b", README.read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / "recipes" / name).exists()] == []


def test_readme_names_commands_that_exist():
    import typer

    from casp_plugin.cli import app

    named = set(re.findall(r"\bcasp ([a-z]+) ", README.read_text(encoding="utf-8")))
    assert named == set(typer.main.get_command(app).commands)
