"""Memory: what a process that evaluates one model after another may take, keeps, and lets go."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ssm_mp.files.mapped import let_go
from ssm_mp.modules.unpacked import Remembering
from ssm_mp.precisions.stored import Stored

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt (malloc.h)."""
_KEPT, _PAD, _LARGEST = 1 << 30, 1 << 24, 1 << 25
_UNBOUNDED = 1 << 60
"""A control group without a limit says a number of about this size."""


@dataclass(frozen=True)
class Limit:
    """Bytes that this process may take, and who says so."""

    bytes: int
    who: str


def keep_freed_memory(most: int = _KEPT) -> bool:
    """Let the C library keep what is freed, at most so many bytes, in place of giving it back to the system; whether it
    can be told so.

    Activations and logits are allocated and freed thousands of times; each time the system would hand out the same
    pages anew, zeroed. For processes of our own only: a program that merely uses the library decides for itself.
    """
    with suppress(OSError, AttributeError):  # another system, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        values = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, most), (_TOP_PAD, _PAD))
        return all(mallopt(parameter, value) == 1 for parameter, value in values)
    return False


def give_back() -> None:
    """Give freed memory back to the system, whatever the C library was told to keep."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_limit(root: Path = Path("/")) -> Limit | None:
    """The least that machine, control group and Slurm job allow; None where nothing says anything.

    root: where the system's `proc` and `sys` are.
    """
    return min(_limits(root), key=lambda limit: limit.bytes, default=None)


def _limits(root: Path) -> Iterator[Limit]:
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        yield Limit(kibibytes << 10, "this machine has free")
    for file in _group_files(root):
        with suppress(OSError, ValueError):
            size = int(file.read_text(encoding="utf-8"))  # v2 says "max" where there is none
            if size < _UNBOUNDED:
                yield Limit(size, "this job's control group allows")
    given = _of_slurm(os.environ)
    if given is not None:
        yield Limit(given, "this Slurm job was given")


def _of_slurm(environ: Mapping[str, str]) -> int | None:
    """Bytes that a Slurm job was given on this node; None outside Slurm, and where it was given all of the node's."""
    with suppress(KeyError, ValueError):
        return int(environ["SLURM_MEM_PER_NODE"]) << 20 or None  # 0 stands for all
    with suppress(KeyError, ValueError):
        return int(environ["SLURM_MEM_PER_CPU"]) * int(environ["SLURM_CPUS_ON_NODE"]) << 20 or None
    return None


def _group_files(root: Path) -> Iterator[Path]:
    """Files with limits of the control groups that this process is in, from its own outwards."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            named = controllers.split(",")  # one of the first version may have several
            if named != [""] and "memory" not in named:
                continue
            top, name = ("sys/fs/cgroup", "memory.max")
            if "memory" in named:
                top, name = ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            group = Path(path.lstrip("/"))
            for part in (group, *group.parents):
                yield root / top / part / name


def let_go_of(part: nn.Module) -> None:
    """Drop the pages of all tensors of a part of a model that are mapped from files, whose values stay, and give freed
    memory back: what a model takes that is run layer by layer is then what one layer takes.

    What its modules made of their tensors goes too, so that a model that waits keeps no quantised tensor in memory
    whose place another has taken.
    """
    for module in part.modules():
        if isinstance(module, Remembering):
            module.forget()
    stored = (module for module in part.modules() if isinstance(module, Stored))
    let_go(tensor for one in stored for tensor in one.arrays().values())
    give_back()
