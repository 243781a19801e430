"""The structure of `attention.c`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

from ssm_mp.kernels.program import Rows


class Attention(ctypes.Structure):
    """`Attention` of attention.c; `keys`, `values`: the numbers of its states."""

    _fields_ = (
        *((name, Rows) for name in ("q", "k", "v", "y")),
        *((name, c_int64) for name in ("heads", "groups", "width", "pairs", "gated")), ("frequencies", c_void_p),
        ("louder", c_float), ("scale", c_float), ("keys", c_int64), ("values", c_int64),
    )  # fmt: skip
