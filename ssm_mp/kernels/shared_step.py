"""The structures of `shared_step.c`."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

from ssm_mp.kernels.program import Rows


class SharedStep(ctypes.Structure):
    """Steps and states; `state`: the number of the last ones."""

    _fields_ = (
        ("dt", Rows), ("driven", Rows), ("inner", c_int64), ("states", c_int64), ("A2", c_void_p), ("state", c_int64),
    )  # fmt: skip


class SharedStepOutputs(ctypes.Structure):
    """Skip and gate."""

    _fields_ = (("y", Rows), ("a", Rows), ("z", Rows), ("inner", c_int64), ("D", c_void_p))
