"""One finished search and one browser for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser import Browser, browser
from tests.search.results.page.searched import Searched, search_in


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in the browser are slow, and one process runs them, so that one browser is started."""
    for item in items:
        if "window" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
            item.add_marker(pytest.mark.xdist_group("browser"))


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    return search_in(tmp_path_factory.mktemp("searched"))


@pytest.fixture(scope="session")
def window() -> Iterator[Browser]:
    with browser() as found:
        yield found
