"""Which storage a run uses, what is refused, and what never shows."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError

from search.base.errors import StudyError
from search.problem.run_directory import RunDirectory
from search.problem.spec import StudySpec, load_spec
from search.trials.storage import (
    STORAGE,
    OpenStudy,
    StorageChoice,
    choose_storage,
    connect,
    exists,
    read_study,
    shown_url,
    stored_choice,
)
from ssm_mp.errors import MachineError

URL = "postgresql+psycopg://user@db.example:5432/trials"
SECRET = "open-sesame"


def spec_of(folder: Path, **keys: str) -> StudySpec:
    (folder / "s.toml").write_text('[checkpoint]\npath = "m.pt"\n')
    return load_spec(folder / "s.toml", [f"storage.{key}={value}" for key, value in keys.items()])


def chosen(folder: Path, *, many: bool, **keys: str) -> StorageChoice:
    return choose_storage(spec_of(folder, **keys), RunDirectory(folder / "run"), many=many, say=lambda line: None)


@pytest.mark.parametrize(
    ("kind", "many", "expected"),
    [
        ("auto", False, "sqlite"),
        ("auto", True, "journal"),
        ("sqlite", False, "sqlite"),
        ("journal", False, "journal"),
        ("journal", True, "journal"),
    ],
)
def test_a_new_run_keeps_its_trials_where_it_is_told_to(tmp_path: Path, kind: str, many: bool, expected: str) -> None:
    assert chosen(tmp_path, many=many, kind=kind).kind == expected


def test_sqlite_is_refused_for_many_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"several workers: SQLite is for one process: measured with four, 14 of 120"):
        chosen(tmp_path, many=True, kind="sqlite")
    assert not (tmp_path / "run").exists()


def test_a_run_that_began_in_sqlite_is_refused_for_many_with_the_reason(tmp_path: Path) -> None:
    chosen(tmp_path, many=False)
    with pytest.raises(StudyError, match=r"study.db. SQLite is for one process.*--run-dir"):
        chosen(tmp_path, many=True)


def test_a_run_of_an_older_version_is_one_in_sqlite(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.db").touch()
    assert chosen(tmp_path, many=False).kind == "sqlite"
    with pytest.raises(StudyError, match="SQLite is for one process"):
        chosen(tmp_path, many=True)


def test_a_run_goes_on_where_it_began(tmp_path: Path) -> None:
    chosen(tmp_path, many=True)
    assert chosen(tmp_path, many=False).kind == "journal"
    assert chosen(tmp_path, many=False, kind="journal").kind == "journal"
    with pytest.raises(StudyError, match=r"keeps its trials in journal, and \[storage\] kind = 'sqlite'"):
        chosen(tmp_path, many=False, kind="sqlite")
    with pytest.raises(StudyError, match="keeps its trials in journal"):
        chosen(tmp_path, many=True, kind="postgresql", url=URL)


def test_workers_that_begin_together_agree_on_one_study(tmp_path: Path) -> None:
    spec, run, found = spec_of(tmp_path, kind="postgresql", url=URL), RunDirectory(tmp_path / "run"), list[str]()
    barrier = threading.Barrier(8)

    def one() -> None:
        barrier.wait()
        found.append(choose_storage(spec, run, many=True, say=lambda line: None).study)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_two_runs_in_one_database_are_two_studies(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, kind="postgresql", url=URL)
    names = [choose_storage(spec, RunDirectory(tmp_path / run), many=True, say=lambda line: None).study for run in "ab"]
    assert names[0] != names[1]
    assert all(name.startswith("s-") for name in names)


def test_a_server_that_moved_is_followed_and_said(tmp_path: Path) -> None:
    first = chosen(tmp_path, many=True, kind="postgresql", url=URL)
    said: list[str] = []
    moved = URL.replace("db.example", "db2.example")
    spec = spec_of(tmp_path, kind="postgresql", url=moved)
    second = choose_storage(spec, RunDirectory(tmp_path / "run"), many=True, say=said.append)
    assert second == replace(first, url=moved)
    assert len(said) == 1
    assert "url differs" in said[0]


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://user:{SECRET}@db.example/trials",
        f"postgresql+psycopg://user:{SECRET}@db.example:5432/trials?sslmode=require",
        f"postgresql+psycopg://user@db.example/trials?password={SECRET}",
        f"postgresql+psycopg://user@db.example/trials?sslmode=require&password={SECRET}",
    ],
)
def test_a_password_in_the_study_file_is_refused_without_showing_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(StudyError, match=r"holds a password.*PGPASSWORD.*pgpass") as caught:
        chosen(tmp_path, many=True, kind="postgresql", url=url)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "url", [f"postgres://user:{SECRET}@db/trials", f"mysql://user:{SECRET}@db/trials", f"user:{SECRET}@db"]
)
def test_an_address_of_another_kind_is_refused_without_showing_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(StudyError, match=r"begins with .postgresql\+psycopg://") as caught:
        chosen(tmp_path, many=True, kind="postgresql", url=url)
    assert SECRET not in str(caught.value)


def test_kind_and_url_belong_together(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"url is for kind = .postgresql"):
        spec_of(tmp_path, url=URL)
    with pytest.raises(StudyError, match=r"needs url = "):
        spec_of(tmp_path, kind="postgresql")
    with pytest.raises(StudyError, match=r"proxy = .* stands in front of kind"):
        spec_of(tmp_path, kind="journal", proxy="localhost:13000")


def test_a_proxy_needs_a_run_that_began_with_one(tmp_path: Path) -> None:
    assert chosen(tmp_path, many=True, kind="postgresql", url=URL).lock == "database"
    with pytest.raises(StudyError, match="a proxy does not pass on"):
        chosen(tmp_path, many=True, kind="postgresql", url=URL, proxy="localhost:13000")
    (tmp_path / "run" / STORAGE).unlink()
    held = chosen(tmp_path, many=True, kind="postgresql", url=URL, proxy="localhost:13000")
    assert (held.lock, held.proxy) == ("folder", "localhost:13000")


def test_a_shown_address_has_no_password() -> None:
    assert SECRET not in shown_url(f"postgresql+psycopg://user:{SECRET}@db.example/trials")
    assert shown_url(URL) == URL


def test_a_damaged_choice_is_refused_with_what_to_do(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for content in ('{"kind": "journal", "colour": "red"}', "[]", '{"kind": '):
        (tmp_path / STORAGE).write_text(content)
        with pytest.raises(StudyError, match=r"storage.json: damaged.*restore it"):
            stored_choice(run)


def test_what_is_stored_is_what_is_read(tmp_path: Path) -> None:
    held = chosen(tmp_path, many=True, kind="postgresql", url=URL)
    run = RunDirectory(tmp_path / "run")
    assert json.loads((run / STORAGE).read_text()) == held.to_json()
    assert stored_choice(run) == held


def test_only_a_study_with_latency_says_so_in_its_storage_file(tmp_path: Path) -> None:
    held = chosen(tmp_path, many=True)
    assert held.to_json().keys() == {"kind", "url", "study", "lock", "proxy"}
    assert replace(held, latency=True).to_json() == asdict(held) | {"latency": True}


@pytest.mark.parametrize("many", [False, True])
def test_looking_at_a_run_that_has_not_begun_makes_nothing(tmp_path: Path, many: bool) -> None:
    run = RunDirectory(tmp_path / "run")
    assert not exists(run)
    with pytest.raises(StudyError, match="no search has been run here yet"):
        read_study(run)
    assert not (tmp_path / "run").exists()
    chosen(tmp_path, many=many)
    assert not exists(run)


@pytest.mark.parametrize("many", [False, True])
def test_a_study_is_read_back_without_its_file(tmp_path: Path, many: bool) -> None:
    run = RunDirectory(tmp_path / "run")
    connect(chosen(tmp_path, many=many), run, lambda line: None).study.set_user_attr("mark", 1)
    assert exists(run)
    assert read_study(run).user_attrs == {"mark": 1}


def wrapped(error: Exception) -> StorageInternalError:
    """As Optuna passes a database's error on."""
    outer = StorageInternalError("An exception is raised during the commit.")
    outer.__cause__ = error
    return outer


PASSING = [
    OperationalError("SELECT", {}, Exception("server closed the connection unexpectedly")),
    OperationalError("SELECT", {}, Exception("connection refused")),
    InterfaceError("SELECT", {}, Exception("the connection is closed")),
]
LASTING = [
    OperationalError("", {}, Exception('password authentication failed for user "u"')),
    OperationalError("", {}, Exception("fe_sendauth: no password supplied")),
    OperationalError("", {}, Exception('database "d" does not exist')),
    IntegrityError("", {}, Exception("duplicate key")),
    ValueError("a defect of ours"),
]


class Flaky:
    """Fails the first calls."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.calls


def opened_as(tmp_path: Path, kind: str, said: list[str], patience: float = 60.0) -> OpenStudy:
    opened = connect(chosen(tmp_path, many=True), RunDirectory(tmp_path / "run"), said.append)
    choice = StorageChoice("postgresql") if kind == "postgresql" else opened.choice
    return replace(opened, choice=choice, _say=said.append, patience=patience)


@pytest.mark.parametrize("error", [*PASSING, wrapped(PASSING[0])], ids=repr)
def test_a_database_that_is_away_is_waited_for_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("search.trials.storage.time.sleep", slept.append)
    said: list[str] = []
    assert opened_as(tmp_path, "postgresql", said).patiently(Flaky(error, 3)) == 4
    assert len(slept) == 3
    assert len(said) == 1
    assert "the database is away" in said[0]


@pytest.mark.parametrize("error", [*LASTING, wrapped(LASTING[0])], ids=repr)
def test_an_error_that_stays_is_not_waited_on(tmp_path: Path, error: Exception) -> None:
    action = Flaky(error, 3)
    with pytest.raises(type(error)):
        opened_as(tmp_path, "postgresql", []).patiently(action)
    assert action.calls == 1


def test_a_journal_has_no_database_to_wait_for(tmp_path: Path) -> None:
    action = Flaky(PASSING[0], 1)
    with pytest.raises(OperationalError):
        opened_as(tmp_path, "journal", []).patiently(action)
    assert action.calls == 1


def test_patience_ends_with_what_the_database_said(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"stayed away for 0 s \(connection refused\)"):
        opened_as(tmp_path, "postgresql", [], patience=0.0).patiently(Flaky(PASSING[1], 9))
