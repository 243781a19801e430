"""A runtime in a process of its own: it may crash, and it may be missing, without harm to ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ssm_mp.errors import DisagreementError, MissingError
from ssm_mp.runtimes.format import Format

_TOLD = 12
"""Lines of what a runtime printed before it failed."""


@dataclass(frozen=True, eq=False)
class Ran:
    """What a runtime said of some windows: log-probabilities `[w, l, V]`, float32, and how long reading took."""

    log_probabilities: np.ndarray
    tokens: int
    seconds: float


def missing(modules: Sequence[str]) -> list[str]:
    """Those that cannot be imported here."""
    return [module for module in modules if find_spec(module) is None]


def named(format_: Format) -> str:
    """The runtime with the version of what is installed: `llama.cpp (xllamacpp 2026.10.11549)`."""
    package = format_.packages[0]
    try:
        return f"{format_.runtime} ({package} {version(package)})"
    except PackageNotFoundError:
        return f"{format_.runtime} ({package}, not installed)"


def install_line(format_: Format) -> str:
    """What installs reader and runtime."""
    return f"pip install -c constraints.txt '.[{format_.extra}]'"


def require_writer(format_: Format) -> None:
    """Raise MissingError with the install line where the format cannot be written here."""
    lacking = missing(format_.writer)
    if lacking:
        raise MissingError(
            f"{format_.word} needs {', '.join(lacking)}, which this Python lacks: {install_line(format_)}"
        )


def cannot_verify(format_: Format) -> str:
    """Why the runtime cannot be asked here, with the install line; empty where it can."""
    lacking = missing((*format_.reader, *format_.modules))
    if not lacking:
        return ""
    return f"not verified: this Python lacks {', '.join(dict.fromkeys(lacking))}; {install_line(format_)}"


def run(format_: Format, path: Path, ids: np.ndarray, vocabulary: int) -> Ran:
    """Let the runtime read token ids `[w, l]`, int64, in a process of its own.

    Raises DisagreementError where it dies, fails, or answers in another shape.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "ids.npy"), Path(folder, "log-probabilities.npy")
        np.save(asked, np.ascontiguousarray(ids, dtype=np.int64))
        done = subprocess.run(
            format_.ask(path, asked, answered),
            env={**os.environ, **format_.environment()},
            capture_output=True, encoding="utf-8", errors="replace", check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            ended = _ended(done.returncode)
            raise DisagreementError(f"{path}: {named(format_)} {ended}; it said:\n{_last(done.stderr)}")
        told = _told(done.stdout)
        if told is None or not answered.is_file():
            raise DisagreementError(f"{path}: {named(format_)} ended without an answer; it said:\n{_last(done.stderr)}")
        found = np.load(answered)
    if found.ndim != 3 or found.shape[:2] != ids.shape or found.dtype != np.float32:
        raise DisagreementError(
            f"{path}: {named(format_)} answered {found.dtype} {list(found.shape)} to {list(ids.shape)} token ids"
        )
    if found.shape[2] != vocabulary:
        raise DisagreementError(f"{path}: {named(format_)} knows {found.shape[2]} tokens, the model {vocabulary}")
    return Ran(found, int(told["tokens"]), float(told["seconds"]))


def _ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"failed with exit code {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _told(output: str) -> Mapping[str, float] | None:
    """The last line that is a JSON object with tokens and seconds."""
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and {"tokens", "seconds"} <= found.keys():
            return found
    return None


def _last(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-_TOLD:]) or "  nothing"
