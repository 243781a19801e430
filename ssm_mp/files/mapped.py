"""Tensors whose values lie in a file: mapped by the system, read when they are touched, and let go at will.

What a process has touched of a mapped file counts as its resident memory until it lets go; the system keeps the pages
for as long as it has room, so that touching them again rarely reads the disk. Linux only; elsewhere nothing is let go,
and the system decides alone.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ssm_mp.kernels.compiler import library

_MAPS = Path("/proc/self/maps")
_DONTNEED = 4
"""MADV_DONTNEED: of a private mapping of a file, pages that were only read are dropped and nothing is lost."""


def let_go(tensors: Iterable[Tensor]) -> None:
    """Drop the pages of those tensors that are mapped from files; the others, and all values, stay as they are."""
    spans = [span for tensor in tensors if (span := _pages(tensor)) is not None]
    if not spans or not _MAPS.exists():
        return
    begins, ends = _files()
    with suppress(OSError, AttributeError):  # a C library without it
        madvise = ctypes.CDLL(None).madvise
        for begin, end in spans:
            at = bisect.bisect_right(begins, begin) - 1
            if at >= 0 and end <= ends[at]:
                madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


def _pages(tensor: Tensor) -> tuple[int, int] | None:
    """Begin and end of the whole pages that a tensor's values lie in; None where there is none."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    return (begin, end) if begin < end else None


def _files() -> tuple[list[int], list[int]]:
    """Begins and ends of the parts of memory that are mapped from files and that this process cannot have changed, or
    has not: neighbours are joined. Memory that is nobody's file must never be dropped."""
    begins: list[int] = []
    ends: list[int] = []
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, rights, _, _, inode, *_ = line.split(maxsplit=5)
        if inode == "0" or "x" in rights:
            continue
        begin, end = (int(at, 16) for at in span.split("-"))
        if ends and ends[-1] == begin:
            ends[-1] = end
        else:
            begins.append(begin)
            ends.append(end)
    return begins, ends


def end_clearly(sentence: str, exit_code: int) -> None:
    """Let this process end with a sentence where a mapped file cannot be read any more, which is otherwise the end
    without a word; as otherwise where there are no compiled kernels.

    For processes of our own only, and for good.
    """
    kernels = library()
    if kernels is not None:
        kernels.end_on_bus_error(sentence.encode(errors="replace"), exit_code)


def spilled(tensor: Tensor, folder: Path) -> Tensor:
    """A tensor of the same values that is mapped from a file in `folder`, `tensor` itself where it is empty.

    The file has no name: it goes when the last tensor on it does, or the process. Raises OSError where it cannot be
    written whole.
    """
    if tensor.numel() == 0:
        return tensor
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    number, name = tempfile.mkstemp(prefix=".ssm-mp-", dir=folder)
    try:
        with os.fdopen(number, "wb") as file:
            octets.numpy().tofile(file)
        mapped = torch.from_file(name, shared=False, size=octets.numel(), dtype=torch.uint8)
    finally:
        Path(name).unlink()
    return mapped.view(tensor.dtype).reshape(tensor.shape)
