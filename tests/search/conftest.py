"""One finished search and one browser for all tests that look at what a search leaves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import Browser, browser
from tests.search.searched import Searched, search_in


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process runs them, so that the search runs and the browser starts once; those in a browser are slow."""
    for item in items:
        used = getattr(item, "fixturenames", ())
        if "searched" in used or "window" in used:
            item.add_marker(pytest.mark.xdist_group("page"))
        if "window" in used:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return search_in(tmp_path_factory.mktemp("searched"))


@pytest.fixture(scope="session")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found
