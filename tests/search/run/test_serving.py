"""The page served: to this machine alone, made anew when the search goes on."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import ThreadingHTTPServer

import pytest
from sqlalchemy.exc import OperationalError

from search.base.errors import StudyError
from search.results.page.content import PageContent
from search.run import serving
from search.run.serving import HOST, Pages, serve_page, server_of
from ssm_mp.errors import MachineError
from tests.browser import Browser
from tests.search.searched import Searched


@dataclass
class Search:
    """A search that has come so far, as a test says."""

    content: PageContent | None = None
    asked: list[int] = field(default_factory=list)

    def gather(self) -> PageContent:
        self.asked.append(1)
        if self.content is None:
            raise StudyError("baseline.json: <missing>")
        return self.content


@contextmanager
def serving_of(gather: Callable[[], PageContent]) -> Iterator[int]:
    """The port of a server of a search."""
    with server_of(Pages(gather), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def got(port: int, path: str = "/", **headers: str) -> tuple[int, str, str]:
    """Status, ETag and body of an answer."""
    connection = http.client.HTTPConnection(HOST, port)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, answer.headers.get("ETag", ""), answer.read().decode()
    connection.close()
    return found


def test_the_page_is_given_once_and_again_when_it_has_changed(
    searched: Searched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_AGE", 0.0)
    search = Search(searched.content())
    assert search.content is not None
    with serving_of(search.gather) as port:
        status, version, page = got(port)
        assert status == 200
        assert f'data-version="{version}"' in page
        assert got(port, If_None_Match=version) == (304, version, "")
        search.content = replace(search.content, points=search.content.points[:4])
        status, other, _ = got(port, If_None_Match=version)
        assert status == 200
        assert other != version


def test_many_who_ask_at_once_cost_one_look_at_the_search(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_AGE", 1e9)
    search = Search(searched.content())
    with serving_of(search.gather) as port:
        threads = [threading.Thread(target=got, args=(port,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(search.asked) == 1


def test_before_there_is_anything_to_show_it_says_what_is_missing_and_looks_again() -> None:
    with serving_of(Search().gather) as port:
        status, _, page = got(port)
    assert status == 503
    assert "baseline.json: &lt;missing&gt;" in page
    assert 'http-equiv="refresh"' in page


def test_a_storage_that_is_away_is_said_and_asked_again() -> None:
    def away() -> PageContent:
        raise OperationalError("SELECT", {}, Exception("database is <locked>"))

    with serving_of(away) as port:
        status, _, page = got(port)
    assert status == 503
    assert "database is &lt;locked&gt;" in page


def test_nothing_else_is_served_and_no_other_name_is_answered(searched: Searched) -> None:
    with serving_of(Search(searched.content()).gather) as port:
        assert got(port, "/../study.db")[0] == 404
        assert got(port, Host="evil.example")[0] == 403
        assert got(port, Host=f"localhost:{port + 1}")[0] == 200  # another port at the near end of a tunnel
        with pytest.raises(MachineError, match=rf"^{HOST}:{port} cannot be served \(.*another --port"):
            server_of(Pages(Search().gather), port)


def test_it_listens_on_this_machine_alone_and_says_the_line_of_the_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    said, opened, bound = list[str](), list[str](), list[tuple[str, int]]()

    def forever(self: ThreadingHTTPServer) -> None:
        bound.append((str(self.server_address[0]), self.server_port))

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", forever)
    serve_page(Search().gather, 0, said.append, opened.append)
    ((host, port),) = bound
    assert host == HOST
    assert opened == [f"http://{HOST}:{port}/"]
    assert re.search(rf"ssh -N -L {port}:{HOST}:{port} \S+@\S+", "\n".join(said))


def test_an_open_page_follows_the_search_and_keeps_what_is_chosen(searched: Searched, window: Browser) -> None:
    whole = searched.content()
    begun = replace(whole, points=whole.points[:5], certificate=None, gates=[], said="Not certified yet.")
    search = Search(begun)
    with serving_of(search.gather) as port:
        window.open(f"http://{HOST}:{port}/")
        window.one('[data-select="3"]').click()
        window.pick("#trials-table select", "within the budget")
        search.content = whole
        window.until(lambda: "9 of 9" in window.one("#standing").text)
        window.until(lambda: "of 9" in window.one("#trials-table .counted").text)
        assert window.texts(".map h3")[0].startswith("ATrial 3")
        assert "certified" in window.one("#verdict").text
        assert set(window.asked()) == {f"http://{HOST}:{port}/"}
        assert window.said() == []
