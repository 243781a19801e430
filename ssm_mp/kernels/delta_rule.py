"""The structures of `delta_rule.c`."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

from ssm_mp.kernels.program import Rows


class DeltaRule(ctypes.Structure):
    """The rule; `state`: the number of its states."""

    _fields_ = (
        *((name, Rows) for name in ("q", "k", "v", "b", "a", "y")),
        *((name, c_int64) for name in ("key_heads", "value_heads", "keys", "values")),
        ("rate", c_void_p), ("offset", c_void_p), ("state", c_int64),
    )  # fmt: skip


class Regrouped(ctypes.Structure):
    """Columns of each group, one after another."""

    _fields_ = (("x", Rows), ("y", Rows), ("groups", c_int64), ("stride", c_int64), ("width", c_int64))
