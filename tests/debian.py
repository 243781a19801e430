"""Debian packages that tests need, installed where they are missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from search.base.file_lock import FileLock

SLURM_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
SLURM_BINARIES = ("slurmctld", "slurmd", "sbatch", "squeue", "sinfo", "scancel", "scontrol", "munged")
POSTGRES_PACKAGES = ("postgresql", "postgresql-client")
POSTGRES_BINARIES = ("initdb", "pg_ctl", "postgres", "psql")
VALGRIND_PACKAGES = VALGRIND_BINARIES = ("valgrind",)
ARM_PACKAGES = ("qemu-user", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross")
ARM_BINARIES = ("qemu-aarch64", "aarch64-linux-gnu-gcc")
CHROMIUM_PACKAGES = ("chromium", "chromium-driver", "fonts-dejavu-core")
CHROMIUM_BINARIES = ("chromium", "chromedriver")

# Debian keeps daemons out of an ordinary user's PATH, and each PostgreSQL in a folder of its own.
SYSTEM_FOLDERS = ("/usr/sbin", "/sbin", "/usr/bin", "/bin")
POSTGRES_FOLDERS = ("/usr/lib/postgresql", "*/bin")

# PostgreSQL's package would create and start a cluster of its own, munge's and Slurm's would start their daemons.
NO_CLUSTER = Path("/etc/postgresql-common/createcluster.d/tests.conf")
NO_DAEMONS = Path("/usr/sbin/policy-rc.d")
# One for the whole machine, whatever each test run's TMPDIR is.
INSTALLING = Path("/run/lock/ssm-mp-apt.lock")


class NotInstallableError(RuntimeError):
    """The packages are missing and cannot be installed here."""


def folders() -> list[str]:
    """Where programs may lie: the newest PostgreSQL first, then PATH, then the system's own folders."""
    top, pattern = POSTGRES_FOLDERS
    postgres = sorted(Path(top).glob(pattern), key=_version, reverse=True)
    return [*map(str, postgres), *os.environ.get("PATH", "").split(os.pathsep), *SYSTEM_FOLDERS]


def find(binary: str) -> Path | None:
    """The full path of a program, or nothing."""
    found = shutil.which(binary, path=os.pathsep.join(folders()))
    return Path(found) if found else None


def program(binary: str) -> str:
    """The full path of a program that must be there."""
    found = find(binary)
    if found is None:
        raise FileNotFoundError(f"expected the program {binary} in one of {folders()}, found none; install its package")
    return str(found)


def install(packages: Sequence[str], binaries: Sequence[str]) -> None:
    """Installs `packages` unless every one of `binaries` is there; raises NotInstallableError where that fails."""
    missing = _missing(binaries)
    if not missing:
        return
    needed = f"the programs {', '.join(missing)} are missing; the packages {' '.join(packages)} would bring them"
    if shutil.which("apt-get") is None:
        raise NotInstallableError(f"{needed}, but apt-get is not here: install them by the system's own means")
    if os.geteuid() != 0:
        raise NotInstallableError(f"{needed}, but only root may install: run apt-get install as root")
    INSTALLING.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(INSTALLING).held():
        # Another test process may have installed them while this one waited.
        if _missing(binaries):
            with _file(NO_CLUSTER, "create_main_cluster = false\n"), _file(NO_DAEMONS, "#!/bin/sh\nexit 101\n", 0o755):
                _apt_get("update", needed=needed)
                _apt_get("install", "-y", "--no-install-recommends", *packages, needed=needed)
        if left := _missing(binaries):
            raise NotInstallableError(
                f"apt-get installed {' '.join(packages)}, but {', '.join(left)} are still missing"
            )


def _missing(binaries: Sequence[str]) -> list[str]:
    return [binary for binary in binaries if find(binary) is None]


def _version(folder: Path) -> float:
    name = folder.parent.name
    return float(name) if name.replace(".", "", 1).isdigit() else 0.0


def _apt_get(*arguments: str, needed: str) -> None:
    command = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=1800", *arguments]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-2000:]
        raise NotInstallableError(f"{needed}, but `{' '.join(command)}` ended with {done.returncode}:\n{said}")


@contextlib.contextmanager
def _file(path: Path, text: str, mode: int = 0o644) -> Iterator[None]:
    """A file that is there for a moment; one that is there already stays as it is."""
    if path.exists():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
