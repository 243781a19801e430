"""The configuration of the private Slurm: what its files say, and where they lie."""

from __future__ import annotations

import getpass
import secrets
import socket
from pathlib import Path

PARTITION = "gpu"
URGENT = "urgent"
NODES = ("n0", "n1", "n2", "n3")
CPUS = 4
MEMORY = 4000
GPUS = 4
# Seconds that a job has to end by itself, and a message to be answered: more than the busiest machine needs.
PATIENCE = 900
# The longest that Linux allows is 108; the sockets of a node lie in its spool.
LONGEST_DIRECTORY = 70


def write(directory: Path, ports: list[int]) -> None:
    """Writes the configuration into `directory`; one that is there already stays, with its ports.

    ports: for the controller and for each of NODES.
    """
    if len(str(directory)) > LONGEST_DIRECTORY:
        raise ValueError(
            f"expected a path of at most {LONGEST_DIRECTORY} characters, for sockets lie in it, "
            f"found {len(str(directory))}: {directory}; set TMPDIR to a shorter one"
        )
    settings = directory / "slurm.conf"
    if settings.exists():
        return
    for folder in ("run", "state", "log"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for name in NODES:
        (node_folder(directory, name) / "spool").mkdir(parents=True, exist_ok=True)
    key = directory / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    # `disabled` came after 22.05, and `cgroup/v2` needs a cgroup of its own.
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    # Slurm drains a node whose GPUs have no files; it complains of plain ones in the log and takes them.
    gpus = [directory / f"gpu{number}" for number in range(GPUS)]
    for gpu in gpus:
        gpu.touch()
    nodes = f"n[0-{len(NODES) - 1}]"
    (directory / "gres.conf").write_text(f"NodeName={nodes} Name=gpu Type=a30 File={directory}/gpu[0-{GPUS - 1}]\n")
    settings.write_text(slurm_conf(directory, ports))


def munge_arguments(directory: Path) -> list[str]:
    """The arguments of the daemon that vouches for messages; forced, for its folder is nobody else's."""
    run = directory / "run"
    return [
        "--force",
        f"--key-file={directory}/munge.key",
        f"--socket={run}/munge.sock",
        f"--pid-file={run}/munged.pid",
        f"--seed-file={run}/munged.seed",
        f"--log-file={directory}/log/munged.log",
    ]


def node_folder(directory: Path, name: str) -> Path:
    """Where one node's daemon keeps its log and its spool, and works."""
    return directory / "nodes" / name


def slurm_conf(directory: Path, ports: list[int]) -> str:
    """The text of slurm.conf: the controller listens on the first port, the nodes on the others."""
    host = socket.gethostname().partition(".")[0]
    user = getpass.getuser()
    settings = {
        "ClusterName": "private",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": ports[0],
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        # A requeued job waits for a second longer than a credential lives, in which a node must have begun a job.
        "AuthInfo": f"socket={directory}/run/munge.sock,cred_expire=30",
        "StateSaveLocation": directory / "state",
        "SlurmctldPidFile": directory / "run" / "slurmctld.pid",
        "SlurmctldLogFile": directory / "log" / "slurmctld.log",
        "SlurmdSpoolDir": node_folder(directory, "%n") / "spool",
        "SlurmdPidFile": directory / "run" / "%n.pid",
        "SlurmdLogFile": node_folder(directory, "%n") / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "JobCompType": "jobcomp/filetxt",
        "JobCompLoc": directory / "log" / "completed",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
        "SlurmctldParameters": "preempt_send_user_signal",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmdParameters": "config_overrides",
        "PlugStackConfig": "/dev/null",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "ReturnToService": 2,
        "KillWait": PATIENCE,
        "MessageTimeout": 300,
        "BatchStartTimeout": PATIENCE,
        "UnkillableStepTimeout": PATIENCE,
        "SlurmdTimeout": 0,
        "MinJobAge": 86400,
        "GresTypes": "gpu",
    }
    here = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={CPUS} RealMemory={MEMORY} Gres=gpu:a30:{GPUS}"
    nodes = [f"NodeName={name} Port={port} {here}" for name, port in zip(NODES, ports[1:], strict=True)]
    members = f"Nodes={','.join(NODES)} MaxTime=UNLIMITED DefaultTime=UNLIMITED"
    partitions = [
        f"PartitionName={PARTITION} {members} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={PATIENCE}",
        f"PartitionName={URGENT} {members} PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join([*(f"{key}={value}" for key, value in settings.items()), *nodes, *partitions, ""])
