"""The structure of `short_conv.c`."""

from __future__ import annotations

import ctypes
from ctypes import c_int64

from ssm_mp.kernels.program import Rows


class Times(ctypes.Structure):
    """The product of two values."""

    _fields_ = (("x", Rows), ("z", Rows), ("y", Rows), ("width", c_int64))
