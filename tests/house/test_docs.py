"""The docs point at things that exist: files, pages, and the tests that hold the promises."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PROMISES = sorted((ROOT / "docs/promises").glob("P*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())

    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]

    assert broken == []


@pytest.mark.parametrize("page", PROMISES, ids=lambda p: p.stem)
def test_a_promise_names_tests_that_exist(page):
    """A line `- `tests/x/test_y.py::test_z`: what it shows` under "Held by"."""
    held_by = page.read_text().split("**Held by**", 1)[1]
    tests = re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", held_by)

    assert len(tests) >= 2, "a promise is held by at least two tests"
    assert [f"{path}::{name}" for path, name in tests if f"def {name}(" not in (ROOT / path).read_text()] == []
