"""Many workers on one study: overhead a trial, trials a second, and faults survived.

    python -m benchmarks.workers [--json] [--faults N] [--trials N] [--only overhead|throughput|faults …]

Installs and starts its own PostgreSQL (flushing to disk as in production) and Slurm, as the tests do; about a quarter
of an hour on 2 cores with the default hundred faults. Three parts, each of which can be had alone:

overhead    milliseconds a trial of claim + tell, waiting for the study's lock included, in worker processes with an
            empty objective (`benchmarks/worker_overhead.py`): with the sampler `random`, which shows the storage, and
            with `front`, which adds its proposal, made outside of the lock
throughput  trials a second of real `ssm-mp worker` processes, one thread each, on the reference model with fewer
            windows: from the moment when the last worker began its first trial until the last trial began
faults      kills, preemptions, requeues, dead nodes, crashes of the database and time limits
            (`benchmarks/worker_faults.py`), and what became of the trials
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from benchmarks.worker_faults import Survived, survive
from benchmarks.worker_overhead import Overhead, measure
from search.problem.run_directory import RunDirectory
from search.trials.attributes import FINISHED, OWNER
from search.trials.storage import Kind, StorageChoice, read_study
from tests.cluster.private_postgres import PrivatePostgres, private_postgres
from tests.cluster.processes import private_directory
from tests.cluster.studying import ROOT, ssm_mp, started

Part = Literal["overhead", "throughput", "faults"]
PARTS: tuple[Part, ...] = ("overhead", "throughput", "faults")
STORAGES: tuple[Kind, ...] = ("journal", "postgresql")
REFERENCE = ROOT / "studies" / "reference.toml"
_WINDOWS, _THROUGHPUT_TRIALS = 32, 48
"""Search windows and trials of the reference model, so that a trial takes a fraction of a second."""


def overheads(
    trials: int, workers: Sequence[int], samplers: Sequence[str], server: PrivatePostgres, top: Path
) -> dict[str, dict[Kind, dict[int, Overhead]]]:
    """Sampler → storage → number of workers → overhead."""
    found: dict[str, dict[Kind, dict[int, Overhead]]] = {}
    for sampler in samplers:
        for kind in STORAGES:
            for count in workers:
                name = f"overhead-{sampler}-{kind}-{count}"
                choice = StorageChoice(kind)
                if kind == "postgresql":
                    choice = StorageChoice(kind, server.url, name, "database")
                one = measure(choice, top / name, workers=count, trials=trials, sampler=sampler)
                found.setdefault(sampler, {}).setdefault(kind, {})[count] = one
                _say(f"{sampler}, {kind}, {count} workers: {one.ms:.1f} ms a trial")
    return found


def throughput(workers: Sequence[int], server: PrivatePostgres, top: Path) -> dict[Kind, dict[int, float]]:
    """Storage → number of workers → trials a second of the reference model, which is prepared once."""
    fewer = [f"data.search_windows={_WINDOWS}", "data.calibration_windows=8", "search.racing=false"]
    wanted = [*fewer, 'search.probe="none"', f"search.trials={_THROUGHPUT_TRIALS}"]
    prepared = top / "prepared"
    _run("prepare", REFERENCE, "--run-dir", prepared, *_set(wanted), cwd=top)
    found: dict[Kind, dict[int, float]] = {}
    for kind in STORAGES:
        storage = [f"storage.kind={kind}", *([f"storage.url={server.url}"] if kind == "postgresql" else [])]
        for count in workers:
            run = top / f"throughput-{kind}-{count}"
            shutil.copytree(prepared, run, ignore=shutil.ignore_patterns("storage.json", "study.journal"))
            arguments = ("worker", REFERENCE, "--run-dir", run, *_set([*wanted, *storage]))
            log, outside = top / f"{run.name}.log", server.environment
            processes = [started(*arguments, cwd=top, log=log, environment=outside) for _ in range(count)]
            if {process.wait() for process in processes} != {0}:
                raise RuntimeError(f"a worker failed: {log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
            found.setdefault(kind, {})[count] = trials_per_second(RunDirectory(run), count)
            _say(f"reference model, {kind}, {count} workers: {found[kind][count]:.2f} trials a second")
    return found


def trials_per_second(run: RunDirectory, workers: int) -> float:
    """Finished trials a second while all workers were at work. Raises RuntimeError where they never all were."""
    trials = read_study(run).get_trials(deepcopy=False, states=FINISHED)
    first: dict[str, float] = {}
    for trial in trials:
        assert trial.datetime_start is not None
        lease, began = trial.user_attrs[OWNER]["lease"], trial.datetime_start.timestamp()
        first[lease] = min(began, first.get(lease, began))
    if len(first) < workers:
        raise RuntimeError(f"{run.path}: expected trials of {workers} workers, found those of {len(first)}")
    starts = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start is not None]
    begin, end = max(first.values()), max(starts)
    ends = [trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete is not None]
    return sum(begin < moment <= end for moment in ends) / (end - begin) if end > begin else float("nan")


def _run(*arguments: object, cwd: Path) -> None:
    done = ssm_mp(*arguments, cwd=cwd, timeout=600)
    if done.returncode:
        raise RuntimeError(f"`ssm-mp {arguments[0]}` ended with {done.returncode}:\n{done.stderr}")


def _set(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def _say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _postgres() -> Iterator[PrivatePostgres]:
    """A private server whose password this process and its children have."""
    with private_directory("ssm-postgres") as directory, private_postgres(directory) as server:
        before = {name: os.environ.get(name) for name in server.environment}
        os.environ.update(server.environment)
        try:
            yield server
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ.update({} if value is None else {name: value})


def answer(
    overhead: Mapping[str, Mapping[Kind, Mapping[int, Overhead]]],
    per_second: Mapping[Kind, Mapping[int, float]],
    survived: Survived | None,
    seconds: float,
) -> dict[str, Any]:
    """All figures as one JSON object; parts that were not asked for are missing."""
    found: dict[str, Any] = {"cores": os.cpu_count(), "seconds": round(seconds, 1)}
    names = {"random": "overhead_ms", "front": "front_overhead_ms"}
    for sampler, storages in overhead.items():
        found[names[sampler]] = {
            kind: {str(count): round(one.ms, 2) for count, one in held.items()} for kind, held in storages.items()
        }
    if overhead:
        found["overhead"] = {
            sampler: {kind: {str(n): asdict(one) for n, one in held.items()} for kind, held in storages.items()}
            for sampler, storages in overhead.items()
        }
    if per_second:
        found["trials_per_second"] = {
            kind: {str(n): rate for n, rate in held.items()} for kind, held in per_second.items()
        }
    if survived is not None:
        found["faults"] = {**survived.faults, "lost": survived.lost, "doubled": survived.doubled}
        found["survived"] = asdict(survived)
    return found


def _table(content: Mapping[str, Any]) -> Iterator[str]:
    """The same for people."""
    for sampler, storages in content.get("overhead", {}).items():
        yield f"sampler {sampler}, empty objective, ms a trial"
        yield "storage     workers  claim + tell  (quartiles)    mean  proposal  proposals  rivals  trials/s"
        for kind, held in storages.items():
            for count, one in held.items():
                low, high = one["quartiles_ms"]
                yield (
                    f"{kind:10} {count:>8} {one['ms']:13.1f} {low:6.1f}–{high:6.1f} {one['mean_ms']:7.1f} "
                    f"{one['proposal_ms']:9.1f} {one['proposals']:10.2f} {one['rivals_ms']:7.1f} "
                    f"{one['trials_per_second']:9.1f}"
                )
    for kind, held in content.get("trials_per_second", {}).items():
        rates = ", ".join(f"{count}: {rate:.2f}" for count, rate in held.items())
        yield f"reference model, {kind}, trials a second by workers: {rates}"
    if "survived" in content:
        survived = content["survived"]
        yield "faults: " + ", ".join(f"{count} {kind}" for kind, count in survived["faults"].items())
        yield (
            f"trials in {survived['studies']} studies: {survived['asked']} asked, {survived['finished']} finished, "
            f"{survived['lost']} lost, {survived['doubled']} doubled, {survived['running']} left running; "
            f"{survived['fronts_compared']} fronts compared, {survived['fronts_changed']} changed"
        )
    yield f"{content['seconds']:.0f} s on {content['cores']} cores"


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--faults", type=int, default=100, help="how many, of all kinds together")
    arguments.add_argument("--trials", type=int, default=300, help="of each study with an empty objective")
    arguments.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments.add_argument("--samplers", nargs="+", default=["random", "front"], choices=["random", "front"])
    arguments.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    arguments.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    asked = arguments.parse_args()
    began = time.monotonic()
    with private_directory("ssm-workers") as top, _postgres() as server:
        overhead = (
            overheads(asked.trials, asked.workers, asked.samplers, server, top) if "overhead" in asked.only else {}
        )
        per_second = throughput(asked.workers, server, top) if "throughput" in asked.only else {}
        survived = survive(asked.faults, server, asked.seed, _say) if "faults" in asked.only else None
    content = answer(overhead, per_second, survived, time.monotonic() - began)
    print(json.dumps(content) if asked.json else "\n".join(_table(content)))


if __name__ == "__main__":
    main()
