"""The structures of `routing.h` and `experts.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p

from ssm_mp.kernels.feed_forward import Hidden
from ssm_mp.kernels.matrices import Matrix
from ssm_mp.kernels.program import Rows

SCORES = ("chosen_softmax", "softmax", "sigmoid")
"""In the order of `routing.h`."""


class Routing(ctypes.Structure):
    """From a router's logits to `chosen` of so many experts."""

    _fields_ = (
        *((name, c_int64) for name in ("experts", "chosen", "scores", "normalised", "groups", "chosen_groups")),
        ("correction", c_void_p), ("eps", c_float), ("scaling", c_float),
    )  # fmt: skip


class Projection(ctypes.Structure):
    """One projection of one expert. above: outputs of others before its own. part: the number of its time."""

    _fields_ = (("matrix", Matrix), ("above", c_int64), ("part", c_int64))


class Experts(ctypes.Structure):
    """All experts of a layer; `projections`: expert after expert, `inward` ones and then one outward."""

    _fields_ = (
        *((name, Rows) for name in ("x", "logits", "merit", "y")),
        *((name, c_int64) for name in ("adds", "width", "inward", "inward_room", "outward_room")),
        ("routing", Routing), ("hidden", Hidden), ("projections", POINTER(Projection)),
    )  # fmt: skip


def listed(projections: Sequence[Projection]) -> ctypes.Array[Projection]:
    """Side by side in memory."""
    return (Projection * len(projections))(*projections)
