"""The structure of `mamba2.c`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

from ssm_mp.kernels.program import Rows


class Mamba2Scan(ctypes.Structure):
    """The scan; `state`: the number of its states."""

    _fields_ = (
        *((name, Rows) for name in ("x", "B", "C", "dt", "y")),
        *((name, c_int64) for name in ("heads", "width", "states", "groups")),
        *((name, c_void_p) for name in ("A2", "D", "dt_bias")), ("low", c_float), ("high", c_float),
        ("state", c_int64),
    )  # fmt: skip
