"""How far one study reaches: what a claim and a tell take, and what a new worker waits, in a study of many trials.

    python -m benchmarks.storage_scale [--trials 300 1000] [--json]

Claims and tells of one study happen one after another, so the time of one, with nobody else asking, says how many
trials a second all its workers together can be given. The objective is empty, there are 22 components and 128 windows,
and the sampler is `random`, whose proposals cost nothing. PostgreSQL runs on this machine with fsync on; `proxy` is
Optuna's gRPC proxy in front of it. `connections` are those that PostgreSQL sees from eight idle workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from benchmarks.proposals import catalogue_of
from benchmarks.worker_overhead import COMPONENTS, ROOT, WINDOWS, timed, work
from search.problem.run_directory import RunDirectory
from search.trials.attributes import DIFFERENCES, MEASURED, ORIGIN, packed
from search.trials.owner import this_process
from search.trials.storage import STORAGE, OpenStudy, StorageChoice, connect
from tests.cluster.private_postgres import PrivatePostgres, private_postgres
from tests.cluster.processes import private_directory, reserved_ports

MEASURED_TRIALS = 40
IDLE_WORKERS = 8


@dataclass(frozen=True)
class Scale:
    """One storage with so many finished trials: milliseconds of claim + tell, seconds to open, size on disk."""

    storage: str
    trials: int
    ms: float
    open_seconds: float
    megabytes: float | None
    connections: int | None

    @property
    def most_a_second(self) -> float:
        """Trials a second that all workers together can be given."""
        return 1e3 / self.ms


def fill(opened: OpenStudy, trials: int) -> None:
    """Give a study so many finished trials with maps drawn at random."""
    catalogue, rng = catalogue_of(COMPONENTS), np.random.default_rng(0)

    space = {n: CategoricalDistribution(p) for n, p in zip(catalogue.names, catalogue.precisions, strict=True)}
    study = opened.study
    for _ in range(trials):
        choices = np.array([rng.integers(len(held)) for held in catalogue.precisions])
        size, rise = int(catalogue.bytes(choices[None])[0]), float(rng.exponential(3.0))
        figures = {
            "bytes": size, "compression": catalogue.fp32_bytes / size, "perplexity": 20.0, "increase_percent": rise,
            "stderr_percent": 0.1, "windows": WINDOWS, "of_windows": WINDOWS, "stopped": None, "seconds": 1.0,
        }  # fmt: skip
        attributes = {ORIGIN: "front", MEASURED: figures, DIFFERENCES: packed(rng.normal(0, 0.01, WINDOWS))}
        trial = create_trial(
            state=TrialState.COMPLETE, values=[catalogue.fp32_bytes / size, rise], params=catalogue.decode(choices),
            distributions=dict(space), user_attrs=attributes,
        )  # fmt: skip
        study.add_trial(trial)


def measure(choice: StorageChoice, name: str, run: RunDirectory, trials: int, server: PrivatePostgres | None) -> Scale:
    """Fill a study, open it as a new worker does, and let that worker claim and tell."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_json(STORAGE, asdict(choice))
    direct = StorageChoice(**{**asdict(choice), "proxy": ""})
    fill(connect(direct, run, _quiet), trials)
    opening, opened = timed(lambda: _read(connect(choice, run, _quiet)))
    spent = work(opened, this_process(), trials + MEASURED_TRIALS, "random", 0)
    journal = run / "study.journal"
    return Scale(
        storage=name,
        trials=trials,
        ms=1e3 * statistics.median(one.claim + one.tell for one in spent),
        open_seconds=opening,
        megabytes=journal.stat().st_size / 1e6 if journal.exists() else None,
        connections=None if server is None else _connections(choice, run, server),
    )


def _read(opened: OpenStudy) -> OpenStudy:
    opened.study.get_trials(deepcopy=False)
    return opened


def _connections(choice: StorageChoice, run: RunDirectory, server: PrivatePostgres) -> int:
    """How many connections more PostgreSQL has with eight workers that have read the study."""
    count = "select count(*) from pg_stat_activity where application_name = 'ssm-mp'"
    before = int(server.psql(count))
    workers = [_read(connect(choice, run, _quiet)) for _ in range(IDLE_WORKERS)]
    for opened in workers:
        with opened.locked():
            pass
    return max(0, int(server.psql(count)) - before)  # the connection that filled the study may be gone by now


@contextmanager
def proxy_of(run: RunDirectory, url: str, environment: dict[str, str]) -> Iterator[str]:
    """A proxy in front of a database, as `ssm-mp proxy` starts it: its address."""
    with reserved_ports(1) as (port,):
        yield from _proxy_at(port, run, url, environment)


def _proxy_at(port: int, run: RunDirectory, url: str, environment: dict[str, str]) -> Iterator[str]:
    study = run.path.parent / f"{run.path.name}.toml"
    study.write_text(
        f'[checkpoint]\npath = "none"\n[storage]\nkind = "postgresql"\nurl = "{url}"\nproxy = "localhost:{port}"\n',
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "search.cli", "proxy", str(study), "--port", str(port), "--run-dir", str(run.path)]
    with subprocess.Popen(command, env={**os.environ, **environment}, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            time.sleep(2)
            yield f"localhost:{port}"
        finally:
            process.terminate()


def _quiet(line: str) -> None:
    """Nothing is said while being timed."""


def all_scales(trials: list[int]) -> Iterator[Scale]:
    """Every storage at every number of trials."""
    with (
        tempfile.TemporaryDirectory() as folder,
        private_directory("scale") as held,
        private_postgres(held) as server,
    ):
        os.environ.update(server.environment)
        for count in trials:
            run = RunDirectory(Path(folder) / f"journal-{count}")
            yield measure(StorageChoice("journal"), "journal", run, count, None)
            url = server.create_database(f"direct{count}")
            run = RunDirectory(Path(folder) / f"postgresql-{count}")
            yield measure(StorageChoice("postgresql", url, "direct", "database"), "postgresql", run, count, server)
            url = server.create_database(f"proxied{count}")
            run = RunDirectory(Path(folder) / f"proxy-{count}")
            with proxy_of(run, url, dict(server.environment)) as address:
                choice = StorageChoice("postgresql", url, "proxied", "folder", address)
                yield measure(choice, "proxy", run, count, server)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trials", type=int, nargs="+", default=[300, 1000])
    arguments.add_argument("--json", action="store_true")
    asked = arguments.parse_args()
    rows = []
    for scale in all_scales(asked.trials):
        rows.append({**asdict(scale), "most_a_second": scale.most_a_second})
        size = "" if scale.megabytes is None else f"  {scale.megabytes:.1f} MB"
        connections = "" if scale.connections is None else f"  {scale.connections} connections"
        print(
            f"{scale.storage:<11} {scale.trials:>6} trials  {scale.ms:6.1f} ms  {scale.most_a_second:6.0f} a second  "
            f"open {scale.open_seconds:.2f} s{size}{connections}",
            file=sys.stderr if asked.json else sys.stdout,
            flush=True,
        )
    if asked.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
