"""Memory of a process that evaluates one model after another."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's mallopt (malloc.h)."""
_KEPT, _PAD, _LARGEST = 1 << 30, 1 << 24, 1 << 25


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed, in place of giving it back to the system; whether it can be told so.

    Activations and logits are allocated and freed thousands of times; each time the system would hand out the same
    pages anew, zeroed. For processes of our own only: a program that merely uses the library decides for itself.
    """
    with suppress(OSError, AttributeError):  # another system, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        values = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _PAD))
        return all(mallopt(parameter, value) == 1 for parameter, value in values)
    return False
