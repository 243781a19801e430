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
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch  # noqa: F401  # its OpenMP runtime is the one that the kernels use

SWITCH = "SSM_MP_KERNELS"
"""Environment variable: `off` leaves the kernels out."""

_SOURCES = ("scan.c", "elementwise.c", "matrix.c", "many.c", "layer.c", "decode.c")
_HEADERS = ("vector.h", "scan_block.h", "matrix.h", "quantize.h", "tiles.h", "log_sum.h", "scan.h", "layer.h")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
_OPENMP = "-fopenmp"
_TIMEOUT_SECONDS = 120


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, which is logged once with the reason."""
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
    target = _run([*command, "-march=native", "-E", "-v", "-x", "c", os.devnull], "asking the compiler for its target")
    try:
        return _built(command, (*_FLAGS, _OPENMP), texts, target)
    except _NotCompiledError as error:
        # a compiler without OpenMP, or one (clang) with another library for it than torch's
        found = _built(command, _FLAGS, texts, target)
        logging.getLogger("ssm_mp").warning("note: kernels compiled without OpenMP, in one thread each: %s", error)
        return found


def _built(command: list[str], flags: tuple[str, ...], texts: dict[str, bytes], target: str) -> ctypes.CDLL:
    """The kernels, compiled with these flags and kept, or as they were kept before."""
    key = hashlib.sha256(repr((sorted(texts.items()), command, flags, target)).encode()).hexdigest()[:20]
    path = _cache() / f"kernels-{key}.so"
    if path.exists():
        return _opened(path)
    with tempfile.TemporaryDirectory() as scratch:
        built = _compile(command, flags, Path(__file__).parent, Path(scratch))
        with suppress(OSError):  # a cache that cannot be written only costs the next process its second of compiling
            _keep(built, path)
        return _opened(built)


def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _NotCompiledError(f"{path} does not load ({error})") from None


def _compiler() -> list[str]:
    """The C compiler as a command: `$CC`, else the first of the usual names."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found is not None:
            return [found, *command[1:]]
    raise _NotCompiledError("no C compiler was found" + (f" at CC={os.environ['CC']}" if named else ""))


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


def _compile(command: list[str], flags: tuple[str, ...], folder: Path, scratch: Path) -> Path:
    """The shared library of all kernels, in `scratch`."""
    objects = []
    for source in _SOURCES:
        objects.append(str(scratch / f"{source}.o"))
        _run([*command, *flags, "-c", str(folder / source), "-o", objects[-1]], f"compiling {source}")
    built = scratch / "kernels.so"
    # linked without OpenMP's own library: its functions are torch's, or two thread pools would fight for the cores
    _run([*command, "-shared", *objects, "-lm", "-o", str(built)], "linking the kernels")
    return built


def _keep(built: Path, path: Path) -> None:
    """Put a library into the cache: by a temporary name and a rename, so that processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent)
    os.close(descriptor)
    try:
        shutil.copyfile(built, partial)
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)


def _cache() -> Path:
    """The user's cache folder, in which compiled kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ssm-mp"
