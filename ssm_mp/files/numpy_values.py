"""NumPy's scalars and arrays in a pickle, made from their bytes; what holds no plain numbers stays inert."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssm_mp.files.inert import DamagedError, Instance, Symbol

_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|c(?:8|16)")
_TEXT = re.compile(r"[US]\d{1,9}")
_OTHERS = {"M": "datetime64", "m": "timedelta64", "V": "void", "O": "object_"}
_MOST_DIMENSIONS, _LARGEST = 64, 1 << 62


@dataclass(eq=False, slots=True)
class NumpyType:
    """A `numpy.dtype` by its code, `f4`; `order` is "<" or ">"."""

    code: str
    order: str = "<"

    @property
    def numbers(self) -> np.dtype[np.generic] | None:
        """NumPy's type where it holds plain numbers."""
        return np.dtype(self.order + self.code) if _NUMBERS.fullmatch(self.code) else None


@dataclass(eq=False, slots=True)
class NumpyArray:
    """An array while its pickle is read: type, shape and data come one after another."""

    kind: Symbol
    type: object = None
    shape: object = None
    fortran: bool = False
    data: object = None


def numpy_type(code: object) -> NumpyType:
    """`numpy.dtype(code)`."""
    if isinstance(code, bytes):
        code = code.decode("ascii", "replace")
    if not isinstance(code, str) or len(code) > 100:
        raise DamagedError("a numpy.dtype without a code")
    order = ">" if code[:1] == ">" else "<"
    return NumpyType(code.lstrip("<>|="), order)


def set_type(target: NumpyType, state: object) -> None:
    """`numpy.dtype.__setstate__`: of its parts only the byte order counts here."""
    if not isinstance(state, tuple) or len(state) < 2:
        raise DamagedError("a numpy.dtype without its state")
    order = state[1]
    target.order = ">" if order in (">", b">") else "<"


def set_array(target: NumpyArray, state: object) -> None:
    """`numpy.ndarray.__setstate__`: (version, shape, type, Fortran's order, data)."""
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise DamagedError("a numpy array without its state")
    target.shape, target.type, fortran, target.data = state[-4:]
    target.fortran = fortran is True or fortran == 1


def scalar(dtype: object, data: object = b"") -> object:
    """`numpy.core.multiarray.scalar`: a plain number or text, or an inert object."""
    if not isinstance(dtype, NumpyType):
        raise DamagedError("a numpy scalar without a type")
    raw = data.encode() if isinstance(data, str) else data
    numbers = dtype.numbers
    if numbers is not None:
        if not isinstance(raw, bytes) or len(raw) != numbers.itemsize:
            raise DamagedError("a numpy scalar of another size")
        return np.frombuffer(raw, numbers)[0].item()
    if isinstance(raw, bytes) and _TEXT.fullmatch(dtype.code):
        if dtype.code[0] == "S":
            return raw.rstrip(b"\0")
        return raw.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
    return Instance(Symbol("numpy", _OTHERS.get(dtype.code[:1], "generic")), (data,))


def elements(array: NumpyArray) -> int | None:
    """Bytes of an array of plain numbers; None for any other. Raises DamagedError where its data has another size."""
    shape = array.shape
    if not isinstance(array.type, NumpyType) or not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
        raise DamagedError("a numpy array without a type and a shape")
    numbers = array.type.numbers
    if numbers is None:
        return None
    if not all(type(n) is int and 0 <= n < _LARGEST for n in shape):
        raise DamagedError("a numpy array whose shape is no whole numbers")
    data = array.data.encode() if isinstance(array.data, str) else array.data
    size = math.prod(shape) * numbers.itemsize
    if not isinstance(data, bytes) or len(data) != size or math.prod(n for n in shape if n) > _LARGEST:
        raise DamagedError("a numpy array whose data has another size")
    return size


def as_tensor(array: NumpyArray) -> Tensor:
    """A copy of an array of plain numbers, in this machine's byte order; `elements` has checked it."""
    assert isinstance(array.type, NumpyType)
    assert isinstance(array.shape, tuple)
    data = array.data.encode() if isinstance(array.data, str) else array.data
    assert isinstance(data, bytes)
    numbers = array.type.numbers
    assert numbers is not None
    values = np.frombuffer(data, numbers).reshape(array.shape, order="F" if array.fortran else "C")
    return torch.from_numpy(np.array(values, dtype=numbers.newbyteorder("="), order="C"))
