"""Where a study's trials are kept: SQLite for one process, a journal file or PostgreSQL for many workers.

What a run uses is written down in its directory when it begins, so that every worker, `status` and a later
continuation open the same study.
"""

from __future__ import annotations

import hashlib
import importlib.util
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.study import Study, StudyDirection
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, PendingRollbackError, SQLAlchemyError

from search.base.errors import StudyError
from search.base.file_lock import FileLock
from search.problem.run_directory import DATABASE, JOURNAL, RunDirectory
from search.problem.spec import StudySpec
from search.trials.journal import PATIENCE, Journal
from search.trials.optuna_storage import storage_of
from ssm_mp.errors import MachineError

Kind = Literal["sqlite", "journal", "postgresql"]
Say = Callable[[str], None]
T = TypeVar("T")

STORAGE = "storage.json"
MOVED = "continued as"
"""User attribute of a study whose space has grown: the name of the one in the same storage that goes on."""
STUDY_NAME = "precision search"
"""Name of the one study that a run's own file holds."""
_PROXY_THREADS = 15
"""As many as the database's pool has connections."""
_PATIENCE_AT_START = 20.0
"""Seconds that a database is waited for where none has answered yet: its address may just be wrong."""
_LASTING = ("authentication", "no password supplied", "does not exist")
"""What a server says of an address or password that is wrong, and stays so."""
_COMING = ("starting up", "shutting down", "recovery mode", "not yet accepting connections")
"""What a server says that is there, and will soon be of use."""
_ONE_PROCESS = (
    "SQLite is for one process: measured with four, 14 of 120 queued trials ran twice. Give --run-dir another "
    'directory, or say [storage] kind = "journal" (a shared folder) or "postgresql"'
)


@dataclass(frozen=True)
class StorageChoice:
    """What a run keeps its trials in. `url` is PostgreSQL's, without a password; `study` the study's name there.

    lock: whose lock claims are made under, the run directory's or the database's; all workers must use the same.
    proxy: `host:port` of Optuna's gRPC proxy in front of the database, empty for none. latency: whether the study has
    this third objective.
    """

    kind: Kind
    url: str = ""
    study: str = STUDY_NAME
    lock: Literal["folder", "database"] = "folder"
    proxy: str = ""
    latency: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it is written down."""
        return {key: value for key, value in asdict(self).items() if key != "latency" or value}


def choose_storage(spec: StudySpec, run: RunDirectory, *, many: bool, say: Say) -> StorageChoice:
    """The storage of a run: the one it began with, else what the study asks for, written down.

    many: more than one process will work on it; SQLite is then refused, and a journal file is the default.
    Raises StudyError where the study file now asks for another storage than the run began with.
    """
    stored, asked = stored_choice(run), spec.storage.kind
    if stored is None:
        stored = _new_choice(spec, "journal" if many else "sqlite")
        if many and stored.kind == "sqlite":
            raise StudyError(f"[storage] kind = 'sqlite' with several workers: {_ONE_PROCESS}")
        with run.lock(STORAGE).held():  # workers that begin together agree on one
            stored = stored_choice(run) or stored
            run.write_json(STORAGE, stored.to_json())
    if asked not in ("auto", stored.kind):
        raise StudyError(
            f"{run.path}: this run keeps its trials in {stored.kind}, and [storage] kind = {asked!r} asks for another "
            "place; say what it was, or give --run-dir another directory"
        )
    if stored.latency != spec.search.asks_latency:
        raise StudyError(
            f"{run.path}: this run was begun {'with' if stored.latency else 'without'} latency among [search] "
            f"objectives, which now are {list(spec.search.objectives)}; say what it was, or give --run-dir another "
            "directory"
        )
    if spec.storage.url and spec.storage.url != stored.url:
        say("note: [storage] url differs from the one that this run began with; using the new one")
        stored = replace(stored, url=spec.storage.url)  # the same study behind a new address
    if spec.storage.proxy and stored.lock == "database":
        raise StudyError(
            f"{run.path}: this run was begun without [storage] proxy, and its claims are made under the database's "
            "lock, which a proxy does not pass on; leave proxy out, or give --run-dir another directory"
        )
    if spec.storage.kind == "postgresql":
        stored = replace(stored, proxy=spec.storage.proxy)
    if many and stored.kind == "sqlite":
        raise StudyError(f"{run.path}: this run keeps its trials in {DATABASE}. {_ONE_PROCESS}")
    return stored


def _new_choice(spec: StudySpec, default: Kind) -> StorageChoice:
    """What a run that has not begun will use."""
    asked, latency = spec.storage, spec.search.asks_latency
    if asked.kind != "postgresql":
        return StorageChoice(default if asked.kind == "auto" else asked.kind, latency=latency)
    name = f"{spec.name}-{secrets.token_hex(4)}"  # other runs may be in the same database
    return StorageChoice("postgresql", asked.url, name, "folder" if asked.proxy else "database", latency=latency)


def stored_choice(run: RunDirectory) -> StorageChoice | None:
    """What a run began with, None where it has not begun."""
    values = run.read_json(STORAGE)
    if values is None:
        return StorageChoice("sqlite") if (run / DATABASE).exists() else None  # of an older version
    try:
        return StorageChoice(**values)
    except TypeError:
        raise StudyError(f"{run / STORAGE}: damaged; restore it, or give --run-dir another directory") from None


@dataclass(frozen=True, eq=False)
class OpenStudy:
    """An Optuna study with the lock that claims are made under.

    latency: of a map (the free components' precisions), predicted, in seconds; None where the study does not ask.
    """

    study: Study
    choice: StorageChoice
    _lock: FileLock | sqlalchemy.Engine
    _say: Say
    _journal: Journal | None = None
    patience: float = PATIENCE
    latency: Callable[[Mapping[str, str]], float] | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study's lock. Raises a database error where it was lost before the end."""
        if isinstance(self._lock, FileLock):
            # the disk is waited for after the lock, by all workers side by side
            with self._journal.deferred() if self._journal is not None else nullcontext(), self._lock.held():
                yield
            return
        with self._lock.begin() as connection:
            # let go by the server when the transaction ends, or this process does
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": self._key})
            yield
            connection.execute(sqlalchemy.text("SELECT 1"))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a journal write what happens within as one piece; elsewhere nothing changes. Under the lock."""
        with self._journal.together() if self._journal is not None else nullcontext():
            yield

    def close(self) -> None:
        """Let a database's connections go."""
        if isinstance(self._lock, sqlalchemy.Engine):
            self._lock.dispose()

    @property
    def _key(self) -> int:
        digest = hashlib.sha256(self.choice.study.encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)

    def patiently(self, action: Callable[[], T]) -> T:
        """Do what can be done again: a database that is away is waited for. Raises MachineError out of patience."""
        deadline, told = time.monotonic() + self.patience, False
        while True:
            try:
                return action()
            except Exception as error:  # a proxy's errors are known only where grpcio is installed
                if self.choice.kind != "postgresql" or not _passes(error):
                    raise
                if time.monotonic() > deadline:
                    raise MachineError(f"the database stayed away for {self.patience:.0f} s ({_said(error)})") from None
                if not told:
                    self._say(f"the database is away ({_said(error)}); waiting for up to {self.patience:.0f} s")
                    told = True
                time.sleep(0.5)


def opened_as_it_is(run: RunDirectory, spec: StudySpec, say: Say) -> OpenStudy:
    """The study of a run that has begun, to read: whatever storage it began with."""
    return connect(choose_storage(spec, run, many=False, say=say), run, say)


def require_reachable(choice: StorageChoice, run: RunDirectory, say: Say) -> None:
    """Raise MachineError where a database cannot be reached, before anything is measured that needs it."""
    if choice.kind == "postgresql":
        connect(choice, run, say)


def read_study(run: RunDirectory) -> Study:
    """The study of a run that has begun, without its study file."""
    choice = stored_choice(run)
    if choice is None:
        raise StudyError(f"{run.path}: no search has been run here yet; start one with `ssm-mp search`")
    return connect(choice, run, lambda line: None).study


def connect(choice: StorageChoice, run: RunDirectory, say: Say) -> OpenStudy:
    """The study of a run as it stands, without a sampler; made where there is none yet.

    Raises MachineError where the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = run.lock("claims")
    if choice.kind == "journal":
        journal = Journal((run / JOURNAL).absolute(), run.lock(JOURNAL), say)
        with lock.held():
            return OpenStudy(_study(JournalStorage(journal), choice), choice, lock, say, journal)
    path = (run / DATABASE).absolute()
    url = f"sqlite:///{path}" if choice.kind == "sqlite" else choice.url
    where = str(path) if choice.kind == "sqlite" else choice.proxy or shown_url(url)
    making = run.lock("tables")  # not the claims' lock: nobody else need wait for a server that is away
    deadline = 0.0
    while True:
        try:
            if choice.proxy:
                behind = proxied(choice)
                with making.held():
                    return OpenStudy(_study(behind, choice), choice, lock, say)
            with making.held():  # tables are made once
                storage = database(url, choice.kind)
                study = _study(storage, choice)
            return OpenStudy(study, choice, storage.engine if choice.lock == "database" else lock, say)
        except Exception as error:
            if not isinstance(error, SQLAlchemyError | StorageInternalError) and not _of_proxy(error):
                raise
            if choice.kind == "sqlite" or not _passes(error) or 0 < deadline < time.monotonic():
                advice = _advice(choice.kind)
                raise MachineError(f"{where}: the database cannot be used ({_said(error)}){advice}") from None
            if not deadline:
                say(f"{where}: {_said(error)}; trying for {_PATIENCE_AT_START:.0f} s")
            if not deadline or any(coming in str(error) for coming in _COMING):
                deadline = time.monotonic() + _PATIENCE_AT_START
        time.sleep(2)


def proxied(choice: StorageChoice) -> BaseStorage:
    """The storage behind a gRPC proxy. Raises MachineError where none answers."""
    from optuna.storages import GrpcStorageProxy

    _require_grpc()
    host, _, port = choice.proxy.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            storage = GrpcStorageProxy(host=host, port=int(port))
        storage.wait_server_ready(timeout=_PATIENCE_AT_START)
    except ConnectionError:
        raise MachineError(f"{choice.proxy}: no proxy answers; start one there with `ssm-mp proxy STUDY`") from None
    return storage


def _require_grpc() -> None:
    if importlib.util.find_spec("grpc") is None:
        raise MachineError(
            "[storage] proxy needs grpcio, which is not installed: pip install --constraint constraints.txt '.[proxy]'"
        )


def serve_proxy(choice: StorageChoice, run: RunDirectory, host: str, port: int, say: Say) -> None:
    """Serve a run's database to workers until interrupted."""
    from optuna.storages import run_grpc_proxy_server

    _require_grpc()
    if not choice.proxy:
        raise StudyError('expected [storage] kind = "postgresql" with proxy = "host:port", where its workers find it')
    storage = storage_of(connect(replace(choice, proxy=""), run, say).study)  # tables and study are there from now on
    say(f"proxy of {shown_url(choice.url)} at {host}:{port}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        run_grpc_proxy_server(storage, host=host, port=port, thread_pool=ThreadPoolExecutor(_PROXY_THREADS))


def database(url: str, kind: Kind) -> RDBStorage:
    """A database as Optuna's storage. Raises MachineError without its driver."""
    options: dict[str, Any] = {}
    if kind == "postgresql":
        # a connection that a restart has cut is replaced before it is used
        options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": 10, "application_name": "ssm-mp"}}
    try:
        return RDBStorage(url, engine_kwargs=options)
    except ImportError:
        raise MachineError(
            "PostgreSQL needs psycopg, which is not installed: pip install --constraint constraints.txt '.[postgres]'"
        ) from None


def _study(storage: BaseStorage, choice: StorageChoice) -> Study:
    with suppress(KeyError):  # looking at a study writes nothing, so that it works on a full folder too
        study = optuna.load_study(study_name=choice.study, storage=storage)
        while (following := study.user_attrs.get(MOVED)) is not None:
            study = optuna.load_study(study_name=following, storage=storage)
        return study
    return optuna.create_study(
        study_name=choice.study,
        storage=storage,
        directions=[StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * (2 if choice.latency else 1)],
        load_if_exists=True,
    )


def name_metrics(study: Study) -> None:
    """Name a study's objectives, for Optuna's own pictures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(["compression", "increase_percent", "latency_seconds"][: len(study.directions)])


def shown_url(url: str) -> str:
    """A database's address for people; a password never shows."""
    return make_url(url).render_as_string(hide_password=True)


def _advice(kind: Kind) -> str:
    if kind == "sqlite":
        return ""
    return "; the password comes from PGPASSWORD or a pgpass file, the address from [storage] url"


def _passes(error: BaseException | None) -> bool:
    """Whether a database error is one that goes away: a restart, a cut connection, a deadlock; not a wrong password."""
    while error is not None:
        if isinstance(error, PendingRollbackError):
            return True
        if _of_proxy(error):
            return "UNAVAILABLE" in str(error) or "OperationalError" in str(error)
        if isinstance(error, IntegrityError):  # two programs that made the tables at the same moment
            return "pg_type_typname_nsp_index" in str(error)
        if isinstance(error, OperationalError | InterfaceError):
            return not any(lasting in str(error) for lasting in _LASTING)
        error = error.__cause__
    return False


def _of_proxy(error: BaseException) -> bool:
    """Whether an error is of gRPC, which need not be installed."""
    return type(error).__module__.startswith("grpc")


def _said(error: BaseException) -> str:
    """What a database driver said, in one line."""
    cause = error.__cause__ or error
    said = str(getattr(cause, "orig", None) or cause)
    return " ".join(said.split("\n", maxsplit=1)[0].split())


def exists(run: RunDirectory) -> bool:
    """Whether a run has trials to look at; a journal or database file that was never made is not made by looking."""
    choice = stored_choice(run)
    if choice is None:
        return False
    names: dict[str, str] = {"sqlite": DATABASE, "journal": JOURNAL}
    return choice.kind == "postgresql" or Path(run / names[choice.kind]).exists()
