"""Compile the kernels once a machine, and load them.

The C files are compiled at first use with the compiler that is found, for the very CPU that runs it, and kept in the
user's cache folder under a name that depends on the sources, the compiler and the CPU. Where there is no compiler,
torch computes everything, slower, and that is said once.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock

import torch  # noqa: F401  # its OpenMP runtime is the one that the kernels use

from ssm_mp.kernels import library_cache

SWITCH = "SSM_MP_KERNELS"
"""Environment variable: `off` leaves the kernels out."""

_SOURCES = (
    "scan.c",
    "ssd.c",
    "delta.c",
    "delta_step.c",
    "elementwise.c",
    "likelihood.c",
    "matrix.c",
    "many.c",
    "program.c",
    "steps.c",
    "mamba1.c",
    "attention.c",
    "attend_block.c",
    "attend_token.c",
    "short_conv.c",
    "hidden.c",
    "feed_forward.c",
    "routing.c",
    "experts.c",
    "shared_step.c",
    "mamba2.c",
    "delta_rule.c",
    "gates.c",
    "scored.c",
    "bus_error.c",
    "weights.c",
    "compensate.c",
    "histogram.c",
)
_HEADERS = (
    "vector.h",
    "scan_block.h",
    "matrix.h",
    "quantize.h",
    "stored.h",
    "threads.h",
    "rescale.h",
    "transpose.h",
    "lay_values.h",
    "plan.h",
    "panel_float.h",
    "panel_int8.h",
    "panel_amx.h",
    "tiles.h",
    "work.h",
    "log_sum.h",
    "register.h",
    "codes.h",
    "dots.h",
    "fixed.h",
    "scan.h",
    "ssd.h",
    "delta.h",
    "program.h",
    "attend.h",
    "hidden.h",
    "routing.h",
)
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
"""Of every compilation, besides the CPU and OpenMP."""
_THIS_CPU = ("-march=native",)
_THIS_ARM_CPU = ("-mcpu=native", "-march=native")  # compilers know both of them, or only one
_NAMES_A_CPU = ("-march=", "-mcpu=")
_OPENMP = "-fopenmp"
_TIMEOUT_SECONDS = 120
_LOADING = Lock()
"""Threads that ask for the kernels at once wait for the first of them."""


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, which is logged once with the reason."""
    with _LOADING:
        return _library()


@cache
def _library() -> ctypes.CDLL | None:
    reason = ""
    try:
        if os.environ.get(SWITCH) == "off":
            return None
        return _load()
    except _NotCompiledError as error:
        reason = str(error)
    logging.getLogger("ssm_mp").warning("note: computing without compiled kernels, slower: %s", reason)
    return None


class _NotCompiledError(Exception):
    """Why there are no kernels."""


def _load() -> ctypes.CDLL:
    command = _compiler()
    folder = Path(__file__).parent
    texts = {name: (folder / name).read_bytes() for name in (*_SOURCES, *_HEADERS)}
    own, target = _target(command)
    flags, folders = (*FLAGS, *own), library_cache.private_folders()
    try:
        return _built(command, (*flags, _OPENMP), texts, target, folders)
    except _NotCompiledError as error:
        # a compiler without OpenMP, or one (clang) with another library for it than torch's
        found = _built(command, flags, texts, target, folders)
        logging.getLogger("ssm_mp").warning("note: kernels compiled without OpenMP, in one thread each: %s", error)
        return found


def _built(
    command: list[str], flags: tuple[str, ...], texts: dict[str, bytes], target: str, folders: Sequence[Path]
) -> ctypes.CDLL:  # fmt: skip
    """The kernels, compiled with these flags and kept, or as they were kept before."""
    key = hashlib.sha256(repr((sorted(texts.items()), command, flags, target)).encode()).hexdigest()[:20]
    try:
        found = library_cache.load(folders, key)
        if found is not None:
            return found
        with tempfile.TemporaryDirectory() as scratch:
            built = _compile(command, flags, Path(__file__).parent, Path(scratch))
            library_cache.keep(folders, key, built)
            return ctypes.CDLL(str(built))
    except OSError as error:  # it does not load, or there is no folder for temporary files
        raise _NotCompiledError(str(error)) from None


def _compiler() -> list[str]:
    """The C compiler as a command: `$CC`, else the first of the usual names."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    raise _NotCompiledError("no C compiler was found" + (f" at CC={os.environ['CC']}" if named else ""))


def _target(command: list[str]) -> tuple[tuple[str, ...], str]:
    """The option for this very CPU, none where `$CC` names a CPU itself, and what the compiler says of its target.

    A compiler that knows no such option compiles for every CPU of its kind, which is said.
    """

    def asked(*own: str) -> tuple[tuple[str, ...], str]:
        return own, _run([*command, *own, "-E", "-v", "-x", "c", os.devnull], "asking the compiler for its target")

    if any(word.startswith(_NAMES_A_CPU) for word in command[1:]):
        return asked()
    refused: list[str] = []
    for option in _THIS_ARM_CPU if platform.machine() in ("aarch64", "arm64") else _THIS_CPU:
        try:
            return asked(option)
        except _NotCompiledError as error:
            refused.append(f"{option}: {error}")
    found = asked()
    logging.getLogger("ssm_mp").warning(
        "note: kernels compiled for any CPU of this kind, slower than for this one: %s", "; ".join(refused)
    )
    return found


def _run(command: list[str], doing: str) -> str:
    """What a command prints; raises where it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _NotCompiledError(f"{doing} failed ({error})") from None
    if done.returncode != 0:
        lines = (done.stderr.strip() or "no message").splitlines()
        reason = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise _NotCompiledError(f"{doing} failed with code {done.returncode}: {reason}")
    return done.stdout + done.stderr


def _processors() -> int:
    """Those that this process may use."""
    here = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(here(0)) if here is not None else os.cpu_count() or 1


def _compile(command: list[str], flags: tuple[str, ...], folder: Path, scratch: Path) -> Path:
    """The shared library of all kernels, in `scratch`."""
    objects = [str(scratch / f"{source}.o") for source in _SOURCES]

    def compiled(source: str, to: str) -> None:
        _run([*command, *flags, "-c", str(folder / source), "-o", to], f"compiling {source}")

    with ThreadPoolExecutor(_processors()) as pool:
        list(pool.map(compiled, _SOURCES, objects))  # the first failure is raised
    built = scratch / "kernels.so"
    # linked without OpenMP's own library: its functions are torch's, or two thread pools would fight for the cores
    _run([*command, "-shared", *objects, "-lm", "-o", str(built)], "linking the kernels")
    return built
