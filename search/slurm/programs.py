"""Running Slurm's own programs, and what they say where they fail."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence

ASK_SECONDS = 30.0
"""How long an answer is waited for."""


def problem(command: Sequence[str]) -> str | None:
    """Run one of Slurm's programs; what went wrong, if anything."""
    try:
        answer = asked(command, ASK_SECONDS)
    except (FileNotFoundError, PermissionError):
        return f"no {command[0]} on PATH"
    except subprocess.TimeoutExpired:
        return f"{command[0]} did not answer within {ASK_SECONDS:.0f} s"
    return None if answer.returncode == 0 else f"{command[0]} exit {answer.returncode}: {last_words(answer.stderr)}"


def asked(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs without the user's filters (SQUEUE_PARTITION would hide living workers)."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SCANCEL_"))}
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
        env=environ,
        check=False,
    )


def last_words(stderr: str) -> str:
    """The end of an error output: a site's own checks speak before Slurm's last line."""
    lines = [re.sub(r"^s[a-z]+: (error|fatal): ", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    return "; ".join(lines[-3:]) or "no message"
