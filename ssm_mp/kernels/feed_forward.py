"""The structures of `hidden.h` and `feed_forward.c`."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64

from ssm_mp.kernels.program import Rows

ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "silu")
"""In the order of `hidden.h`."""


class Hidden(ctypes.Structure):
    """What happens between the projections of a feed-forward of `size` hidden values."""

    _fields_ = (*((name, c_int64) for name in ("size", "activation", "gated")), ("multiplier", c_float))


class HiddenValues(ctypes.Structure):
    """The same of these rows; `up`: where it is gated."""

    _fields_ = (*((name, Rows) for name in ("gate", "up", "y")), ("hidden", Hidden))


class TokenGate(ctypes.Structure):
    """Rows times the sigmoid of a number each. adds: to what is there."""

    _fields_ = (*((name, Rows) for name in ("x", "gate", "y")), ("width", c_int64), ("adds", c_int64))
