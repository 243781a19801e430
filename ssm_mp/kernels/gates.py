"""The structure of `gates.c`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

from ssm_mp.kernels.program import Rows


class GatedNorm(ctypes.Structure):
    """What `ssm_mp.kernels.gated_norm` computes, of y in place."""

    _fields_ = (
        ("y", Rows), ("z", Rows), *((name, c_int64) for name in ("inner", "groups", "norm_first")),
        ("weight", c_void_p), ("eps", c_float),
    )  # fmt: skip
