"""Links of the pages lead somewhere, and every page is led to."""

from __future__ import annotations

import os

import pytest

from tests.docs.pages import NAMES, PAGES, ROOT, Page, cells_of

ELSEWHERE = ("https://", "mailto:")
"""Not looked up: a test needs no network."""


def broken(page: Page) -> list[str]:
    """Links of a page that lead to no file, or to no heading of it."""
    return [link for link in page.links if not link.startswith(ELSEWHERE) and not leads_somewhere(page, link)]


def leads_somewhere(page: Page, link: str) -> bool:
    path, _, anchor = link.partition("#")
    name = os.path.normpath(os.path.join(os.path.dirname(page.name), path)) if path else page.name  # noqa: PTH118, PTH120
    if not is_in_repository(name):
        return False
    return not anchor or (name in PAGES and anchor in PAGES[name].anchors)


def is_in_repository(name: str) -> bool:
    """Whether there is such a file or folder, in this very spelling, as Linux and GitHub want it."""
    folder = ROOT
    for part in name.split("/"):
        if not folder.is_dir() or part not in os.listdir(folder):
            return False
        folder /= part
    return True


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    assert broken(PAGES[name]) == []


def test_every_page_is_led_to_from_the_readme() -> None:
    reached, left = {"README.md"}, ["README.md"]
    while left:
        page = PAGES[left.pop()]
        found = {os.path.normpath(os.path.join(os.path.dirname(page.name), link.split("#")[0])) for link in page.links}  # noqa: PTH118, PTH120
        left += (found & PAGES.keys()) - reached
        reached |= found & PAGES.keys()
    assert reached == set(NAMES)


@pytest.mark.parametrize(
    "link",
    ["gone.md", "../readme.md", "slurm.md#nowhere", "#nowhere", "../../outside.md", "../studies/reference/front.png#a"],
)
def test_a_broken_link_is_found(link: str) -> None:
    assert broken(Page("docs/some.md", f"[one]({link}) and [another](slurm.md), not `[code](gone.md)`")) == [link]


def test_anchors_are_those_of_github() -> None:
    text = (
        "# What `cp` does: 10, 1000 and 10 000\n\n## A [link](b.md), a *word*\n## a link a word\n```sh\n# none\n```\n"
    )
    assert Page("a.md", text).anchors == {"what-cp-does-10-1000-and-10-000", "a-link-a-word", "a-link-a-word-1"}


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_of_a_table_are_as_wide_as_its_head(name: str) -> None:
    lines = [line for line in PAGES[name].sentences.splitlines() if not line or line.startswith("|")]
    before = ["", *lines]
    wrong = [
        line
        for line, previous in zip(lines, before, strict=False)
        if line and previous and len(cells_of(line)) != len(cells_of(previous))
    ]
    assert wrong == []


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].text.splitlines()) <= 220
