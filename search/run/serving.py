"""The page of a search on this machine's own address, made anew while the search runs."""

from __future__ import annotations

import getpass
import html
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from search.results.page.content import PageContent
from search.results.page.document import served
from ssm_mp.errors import MachineError, SsmMpError

HOST = "127.0.0.1"
_AGE = 2.0
"""Seconds that a page is given again without looking for news."""

Say = Callable[[str], None]


@dataclass(eq=False)
class Pages:
    """The page as it stands, gathered at most every two seconds, whoever asks and however often."""

    gather: Callable[[], PageContent]
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _made: float | None = None
    _version: str = ""
    _page: str = ""

    def now(self) -> tuple[str, str]:
        """Its version and text. Raises what keeps the search from being read."""
        with self._lock:
            if self._made is None or time.monotonic() - self._made >= _AGE:
                self._version, self._page = served(self.gather())
                self._made = time.monotonic()
            return self._version, self._page


def server_of(pages: Pages, port: int) -> ThreadingHTTPServer:
    """A server of one page on 127.0.0.1, not started. Raises MachineError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # a page of the web that has its own name point at this address asks under that name
            if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
                self._answer(HTTPStatus.FORBIDDEN, f"this server answers under the name {HOST} alone")
            elif self.path != "/":
                self._answer(HTTPStatus.NOT_FOUND, "here is one page, at /")
            else:
                self._page()

        def _page(self) -> None:
            try:
                version, page = pages.now()
            except (SsmMpError, SQLAlchemyError, StorageInternalError, OSError) as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"nothing to show now: {error}", again=True)
                return
            if self.headers.get("If-None-Match") == version:
                self._send(HTTPStatus.NOT_MODIFIED, version, b"")
            else:
                self._send(HTTPStatus.OK, version, page.encode(errors="backslashreplace"))

        def _answer(self, status: HTTPStatus, said: str, again: bool = False) -> None:
            head = '<meta http-equiv="refresh" content="3">' if again else ""
            text = f'<!DOCTYPE html><meta charset="utf-8">{head}<title>ssm-mp</title><p>{html.escape(said)}</p>'
            self._send(status, "", text.encode(errors="backslashreplace"))

        def _send(self, status: HTTPStatus, version: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if version:
                self.send_header("ETag", version)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody reads who asks every three seconds."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise MachineError(
            f"{HOST}:{port} cannot be served ({error.strerror or error}); give another --port, or 0 for any free one"
        ) from None


def serve_page(gather: Callable[[], PageContent], port: int, say: Say, opened: Callable[[str], None] | None) -> None:
    """Serve the page until interrupted; opened: is told the address once it answers."""
    with server_of(Pages(gather), port) as server:
        number, address = server.server_port, f"http://{HOST}:{server.server_port}/"
        say(f"the page is at {address} until this command is ended (Ctrl-C)")
        say(f"from another machine:  ssh -N -L {number}:{HOST}:{number} {getpass.getuser()}@{socket.gethostname()}")
        say(f"and there open {address}")
        if opened is not None:
            opened(address)
        server.serve_forever()
