"""A private PostgreSQL for tests: its own cluster, port and password, in one directory."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests import debian
from tests.cluster import processes

HOST = "127.0.0.1"
USER = "search"
DATABASE = "search"
# PostgreSQL refuses to run as root; its package brings this account.
ACCOUNT = "postgres"

Mode = Literal["immediate", "fast"]


@dataclass(frozen=True)
class PrivatePostgres:
    """A PostgreSQL server that lives in `directory` and listens on one port of the loopback."""

    directory: Path
    port: int
    password: str = field(repr=False)

    @property
    def url(self) -> str:
        """The address of the default database, without the password."""
        return self._url(DATABASE)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that give a client the password."""
        return {"PGPASSWORD": self.password}

    def create_database(self, name: str) -> str:
        """Creates an empty database and returns its address."""
        self.psql(f'CREATE DATABASE "{name}"', "postgres")
        return self._url(name)

    def psql(self, sql: str, database: str = DATABASE) -> str:
        """What one statement prints: a line a row, columns parted by `|`."""
        where = ["-h", HOST, "-p", str(self.port), "-U", USER, "-d", database]
        options = ["-X", "-A", "-t", "-q", "-w", "-v", "ON_ERROR_STOP=1"]
        command = [debian.program("psql"), *where, *options, "-c", sql]
        return _run(command, server=self, as_account=False)[1].strip()

    def running(self) -> bool:
        """Whether the server runs."""
        command = [debian.program("pg_ctl"), "status", "-D", str(self.data)]
        return _run(command, server=self, check=False)[0] == 0

    def start(self) -> None:
        """Starts the server and waits until it answers; a running one stays as it is."""
        if not self.running():
            self._pg_ctl("start", "-l", str(self.directory / "server.log"))

    def stop(self, mode: Mode = "fast") -> None:
        """Stops the server: `fast` ends connections and tidies up, `immediate` is a crash."""
        if self.running():
            self._pg_ctl("stop", "-m", mode)

    def restart(self, mode: Mode = "immediate") -> None:
        """Stops and starts the server; clients lose their connections."""
        self.stop(mode)
        self.start()

    @property
    def data(self) -> Path:
        """The folder that PostgreSQL keeps its cluster in."""
        return self.directory / "data"

    def _url(self, database: str) -> str:
        return f"postgresql+psycopg://{USER}@{HOST}:{self.port}/{database}"

    def _pg_ctl(self, action: str, *options: str) -> None:
        command = [
            debian.program("pg_ctl"),
            action,
            "-w",
            "-t",
            str(round(processes.HUNG)),
            "-D",
            str(self.data),
            *options,
        ]
        try:
            _run(command, server=self)
        except RuntimeError as error:
            log = self.directory / "server.log"
            error.add_note(log.read_text()[-2000:] if log.exists() else f"{log} does not exist")
            raise


@contextlib.contextmanager
def private_postgres(directory: Path) -> Iterator[PrivatePostgres]:
    """A running server with a database, in an empty `directory`; at the end nothing of either is left.

    As root the server runs under the account `postgres`, which must be able to reach `directory`.
    """
    debian.install(debian.POSTGRES_PACKAGES, debian.POSTGRES_BINARIES)
    directory.mkdir(parents=True, exist_ok=True)
    with processes.reserved_ports(1) as (port,):
        server = PrivatePostgres(directory, port, secrets.token_urlsafe(24))
        try:
            _initialise(server)
            server.start()
            server.create_database(DATABASE)
            yield server
        finally:
            # An orderly stop first: a killed server leaves a segment of shared memory.
            with contextlib.suppress(RuntimeError, FileNotFoundError):
                server.stop("immediate")
            processes.remove(directory)


def _initialise(server: PrivatePostgres) -> None:
    if os.geteuid() == 0:
        shutil.chown(server.directory, ACCOUNT, ACCOUNT)
    server.directory.chmod(0o700)
    secret = server.directory / "password"
    secret.touch(mode=0o600)
    if os.geteuid() == 0:
        shutil.chown(secret, ACCOUNT, ACCOUNT)
    secret.write_text(server.password)
    options = ["--username", USER, "--auth", "scram-sha-256", "--pwfile", str(secret), "--encoding", "UTF8"]
    # Only the making of the cluster is not flushed; the server itself flushes as in production.
    command = [debian.program("initdb"), "--no-sync", "--no-locale", *options, "-D", str(server.data)]
    _run(command, server=server)
    secret.unlink()
    settings = {
        "listen_addresses": HOST,
        "port": server.port,
        "unix_socket_directories": server.directory,
        "max_connections": 200,
        "fsync": "on",
        # In the data folder, so that it goes with it.
        "dynamic_shared_memory_type": "mmap",
    }
    with (server.data / "postgresql.conf").open("a") as file:
        file.writelines(f"{key} = '{value}'\n" for key, value in settings.items())


def _run(
    command: list[str], *, server: PrivatePostgres, as_account: bool = True, check: bool = True
) -> tuple[int, str]:
    account = ACCOUNT if as_account and os.geteuid() == 0 else None
    # Variables of the caller's own PostgreSQL would lead the programs astray.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    done = subprocess.run(
        command,
        user=account,
        group=account,
        extra_groups=[] if account else None,
        cwd=server.directory,
        env=outside | server.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * processes.HUNG,
        check=False,
    )
    if check and done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode, done.stdout
