"""The structures of `layer.h`, `layer.c` and `decode.c`, and the functions that take them.

A structure holds addresses only: whoever makes one keeps the tensors behind it alive.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_void_p
from functools import cache

import torch

from ssm_mp.kernels.compiler import library
from ssm_mp.kernels.matrices import Matrix


class Norm(ctypes.Structure):
    """LayerNorm, or RMSNorm where there is no bias."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float))


class Layer(ctypes.Structure):
    """One layer of family `mamba`, with the states that it carries."""

    _fields_ = (
        ("norm", Norm),
        *((name, Matrix) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        *((name, c_void_p) for name in ("taps", "conv_bias", "A2", "D", "conv", "state")),
    )


class Tokens(ctypes.Structure):
    """Many tokens for a layer, and the memory that it works in."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "length", "width", "inner", "states", "rank", "kernel")),
        *((name, c_void_p) for name in ("x", "y", "scratch", "seconds")),
    )


TIMED = ("norm", "in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")
"""The parts of a layer that `Tokens.seconds` has a float64 number for, in its order."""


class Model(ctypes.Structure):
    """A whole model, and the memory that one step works in."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "width", "inner", "states", "rank", "kernel", "vocabulary")),
        ("layers", c_int64),
        ("heads", c_int64),
        ("layer", POINTER(Layer)),
        ("norm", Norm),
        ("head", POINTER(Matrix)),
        *((name, c_void_p) for name in ("x", "logits", "scratch")),
    )


@cache
def _kernels() -> ctypes.CDLL:
    """The library with these functions' arguments declared."""
    found = library()
    assert found is not None, "asked for kernels that are not there"
    found.decode_scratch.argtypes, found.decode_scratch.restype = (POINTER(Model),), c_int64
    found.decode_step.argtypes = (POINTER(Model), c_int)
    found.layer_many.argtypes = (POINTER(Layer), POINTER(Tokens), c_int)
    found.layer_scratch.argtypes, found.layer_scratch.restype = (POINTER(Layer), POINTER(Tokens), c_int), c_int64
    return found


def layer_many(layer: Layer, tokens: Tokens) -> None:
    """A layer for many tokens, the states that it carries in place. Only of matrices that take many inputs."""
    threads = torch.get_num_threads()
    scratch = torch.empty(_kernels().layer_scratch(byref(layer), byref(tokens), threads), dtype=torch.int8)
    tokens.scratch = scratch.data_ptr()
    _kernels().layer_many(byref(layer), byref(tokens), threads)


def scratch_floats(model: Model) -> int:
    """How many float32 numbers of scratch memory a step needs."""
    return int(_kernels().decode_scratch(byref(model)))


def decode_step(model: Model) -> None:
    """One token of every sequence: from `x [b, d]` to `logits [b, V]`; states are carried in place."""
    _kernels().decode_step(byref(model), torch.get_num_threads())
