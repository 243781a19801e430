"""A private Slurm for tests: one controller and four nodes on this host, in one directory, without systemd."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import debian
from tests.cluster import processes, slurm_config
from tests.cluster.processes import Process
from tests.cluster.slurm_config import NODES, PARTITION, URGENT

ENDED = frozenset(
    [
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
        *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
    ]
)
COLUMNS = {
    "JobArrayID": 48,
    "JobID": 24,
    "State": 24,
    "NodeList": 64,
    "RestartCnt": 12,
    "Name": 128,
    "ReasonList": 256,
}
# Variables of a real Slurm, which these tests may run under, would steer the private one's programs.
FOREIGN = ("SLURM", "SBATCH_", "SQUEUE_", "SCANCEL_", "SINFO_", "SALLOC_", "SRUN_")


@dataclass(frozen=True)
class Job:
    """A job or one task of an array, as `squeue` shows it; `raw_id` is the number that its own processes see."""

    id: str
    raw_id: int
    state: str
    node: str
    restarts: int
    name: str
    reason: str

    @property
    def ended(self) -> bool:
        """Whether it will never run again."""
        return self.state in ENDED

    def among(self, ids: Iterable[str]) -> bool:
        """Whether its id, or the id of its array, is one of `ids`."""
        return not {self.id, self.id.partition("_")[0]}.isdisjoint(ids)


@dataclass(frozen=True)
class PrivateSlurm:
    """A Slurm that lives in `directory`; the directory holds all of its state."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead a program to this Slurm."""
        path = dict.fromkeys([*os.environ.get("PATH", "").split(os.pathsep), *debian.folders()])
        return {"SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": os.pathsep.join(path)}

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints when it runs against this Slurm."""
        done = self._call(command)
        if check and done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self) -> list[Job]:
        """Every job and every task of an array, ended ones too."""
        form = ",".join(f"{name}:{width}" for name, width in COLUMNS.items())
        return [parse_job(line) for line in self.run("squeue", "-h", "-r", "-t", "all", "-O", form).splitlines()]

    def wait(self, until: Callable[[list[Job]], bool] | Iterable[str], timeout: float = processes.HUNG) -> list[Job]:
        """Waits until a condition on all jobs holds, or until the jobs named have ended; returns those jobs.

        The id of an array stands for all its tasks.
        """
        ids = None if callable(until) else frozenset([until] if isinstance(until, str) else until)
        seen: list[Job] = []

        def holds() -> bool:
            seen[:] = [job for job in self.jobs() if ids is None or job.among(ids)]
            return until(seen) if callable(until) else bool(seen) and all(job.ended for job in seen)

        def explain() -> str:
            return f"expected {'the condition' if ids is None else f'{sorted(ids)} to end'}; jobs: {seen}"

        processes.wait_until(holds, explain, timeout)
        return seen

    def cancel(self, *ids: str) -> None:
        """Cancels jobs, arrays or single tasks."""
        self.run("scancel", *ids)

    def cancel_all(self, timeout: float = processes.HUNG) -> None:
        """Cancels every job that has not ended and waits until none is left."""
        if ids := [job.id for job in self.jobs() if not job.ended]:
            self.run("scancel", "--signal=KILL", "--full", *ids, check=False)
            self.run("scancel", *ids, check=False)
            self.wait(lambda jobs: all(job.ended for job in jobs), timeout)

    def submit_urgent(self, nodes: Sequence[str] = NODES, seconds: int = 86_400) -> str:
        """Submits a job that wants these nodes for itself and preempts what runs there; returns its id."""
        where = ["--partition", URGENT, "--exclusive", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"]
        sleep = ["--job-name=urgent", "--chdir=/", "--output=/dev/null", "--wrap", f"exec sleep {seconds}"]
        return self.run("sbatch", "--parsable", *where, *sleep).strip()

    def set_grace(self, seconds: int) -> None:
        """How long preempted jobs are left to end by themselves; the controller looks about every 30 s."""
        self.run("scontrol", "update", f"partitionname={PARTITION}", f"gracetime={seconds}")

    def pids(self, job_id: str) -> list[int]:
        """The living processes of a job's batch script, the script first."""
        raw = {job.raw_id for job in self.jobs() if job.among([job_id])}
        titles = {f"slurmstepd: [{number}.batch]" for number in raw}
        everything = processes.living()
        steps = {p.pid for p in everything.values() if p.command in titles and p.mentions(self.directory)}
        return [p.pid for p in processes.with_descendants(everything, steps) if p.pid not in steps]

    def node_states(self) -> dict[str, str]:
        """The state of each node, such as `idle`, `mixed` or `down`; a star means that it does not answer."""
        lines = self.run("sinfo", "-h", "-N", "-p", PARTITION, "-o", "%N %T").splitlines()
        return {name: state for name, _, state in (line.partition(" ") for line in lines)}

    def node_down(self, name: str) -> None:
        """A node dies with all that runs on it; the controller requeues its jobs at once."""
        processes.kill_all(lambda: self._of_node(name))
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def node_up(self, name: str) -> None:
        """A node that was down comes back, empty."""
        self._start_node(name)
        # It may have come back by registering, which makes this an error of no consequence.
        self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        self._wait_for_nodes([name])

    def start(self) -> None:
        """Starts what does not run and waits until every node is ready; what runs stays as it is."""
        settings = self.directory / "slurm.conf"
        running = [p.command for p in processes.of_directory(self.directory)]
        if not any("munged " in command for command in running):
            self._daemon("munged", *slurm_config.munge_arguments(self.directory))
        if not any("slurmctld " in command for command in running):
            self._daemon("slurmctld", "-f", str(settings))
        for name in NODES:
            self._start_node(name)
        self._wait_for_nodes(NODES)

    def stop(self) -> None:
        """Kills every daemon, every job and every client."""
        processes.kill_all(lambda: processes.of_directory(self.directory))

    def _call(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)} | self.environment
        program = shutil.which(command[0], path=own["PATH"]) or command[0]
        return subprocess.run(
            [program, *command[1:]],
            env=own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=processes.HUNG,
            check=False,
        )

    def _daemon(self, name: str, *arguments: str) -> None:
        log = self.directory / "log" / "start.log"
        own = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)} | self.environment
        # Its output goes to a file, because a daemon that holds a pipe would keep the reader waiting.
        with log.open("a") as file:
            command = [debian.program(name), *arguments]
            done = subprocess.run(
                command,
                env=own,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                timeout=processes.HUNG,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` ended with {done.returncode}:\n{log.read_text()[-2000:]}")

    def _start_node(self, name: str) -> None:
        if not any(p.command.startswith("slurmd ") or "/slurmd " in p.command for p in self._of_node(name)):
            self._daemon("slurmd", "-f", str(self.directory / "slurm.conf"), "-N", name)

    def _of_node(self, name: str) -> list[Process]:
        """A node's processes: the daemon, then its steps (each would report a death to the controller), then jobs."""
        own = processes.of_directory(self.directory)
        # Node daemons work in the folder of their log; a step keeps it.
        folder = str(slurm_config.node_folder(self.directory, name))
        daemons = [p for p in own if p.folder == folder and "slurmd " in p.command]
        steps = [p for p in own if p.folder == folder and "slurmstepd" in p.command]
        strays = [p for p in own if f"SLURMD_NODENAME={name}" in p.environment]
        jobs = processes.with_descendants({p.pid: p for p in own}, [p.pid for p in steps + strays])
        return list(dict.fromkeys(daemons + steps + jobs))

    def _wait_for_nodes(self, names: Sequence[str]) -> None:
        ready = {"idle", "mixed", "allocated", "completing"}

        def explain() -> str:
            logs = "\n".join(f"{log}:\n{log.read_text()[-1000:]}" for log in sorted(self.directory.rglob("*.log")))
            return f"expected the nodes {', '.join(names)} ready, found {self.run('sinfo', '-N', '-l')}\n{logs}"

        def holds() -> bool:
            # The controller may not answer yet.
            with contextlib.suppress(RuntimeError):
                states = self.node_states()
                return all(states.get(name) in ready for name in names)
            return False

        processes.wait_until(holds, explain)


@contextlib.contextmanager
def private_slurm(directory: Path) -> Iterator[PrivateSlurm]:
    """A running Slurm in `directory` (a short path: sockets lie in it); at the end nothing of either is left."""
    debian.install(debian.SLURM_PACKAGES, debian.SLURM_BINARIES)
    slurm = PrivateSlurm(directory)
    with processes.reserved_ports(1 + len(NODES)) as ports:
        try:
            slurm_config.write(directory, ports)
            slurm.start()
            yield slurm
        finally:
            processes.remove(directory)


def parse_job(line: str) -> Job:
    """One line of `squeue -O` with the columns of COLUMNS."""
    fields = []
    for width in COLUMNS.values():
        fields.append(line[:width].strip())
        line = line[width:]
    job_id, raw_id, state, node, restarts, name, reason = fields
    return Job(job_id, int(raw_id), state, node, int(restarts), name, reason.removeprefix("(").removesuffix(")"))
