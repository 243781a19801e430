"""Every precision by name. Imports no torch, so that a study file is read quickly.

Adding one is its file and its line here; the first names where the other is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from ssm_mp.errors import PrecisionMapError

if TYPE_CHECKING:
    from ssm_mp.precisions.precision import Precision


class Registry(Mapping[str, "Precision"]):
    """Precisions by name, the widest first, scales counted; of equally wide ones the better on normally distributed
    weights.

    Names are known at once; a precision's file is loaded when it is asked for.
    """

    def __init__(self, homes: Mapping[str, str]) -> None:
        """`homes`: name → "file:instance"."""
        self.homes = homes

    def __getitem__(self, name: str) -> Precision:
        file, _, instance = self.homes[name].partition(":")
        found: Precision = getattr(import_module(file), instance)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.homes  # Mapping's own would load the file

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


_GROUPED = (
    "int6", "int5",
    "nf4g32", "int4g32", "nf4", "int4", "nf4g128", "int4g128",
    "nf3g32", "int3g32", "nf3", "int3", "nf3g128", "int3g128",
    "nf2g32", "nf2", "nf2g128",
)  # fmt: skip
PRECISIONS = Registry(
    {
        "fp16": "ssm_mp.precisions.float16:FP16",
        "int8": "ssm_mp.precisions.int8:INT8",
        **{name: f"ssm_mp.precisions.grouped:{name.upper()}" for name in _GROUPED},
    }
)


def get_precision(name: str) -> Precision:
    """The precision of a name; raises PrecisionMapError with the known names."""
    if name not in PRECISIONS:
        raise PrecisionMapError(f"unknown precision {name!r}; known are {', '.join(map(repr, PRECISIONS))}")
    return PRECISIONS[name]


def precisions_of(bits: int) -> tuple[str, ...]:
    """Names of the precisions of so many bits, in the order of the registry."""
    return tuple(name for name, precision in PRECISIONS.items() if precision.bits == bits)
