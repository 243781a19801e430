"""What one tensor of a model is: its name, shape, component, and what kind of module that component makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ssm_mp.modules.inputs import InputQuantizer
from ssm_mp.precisions.stored import Role, Stored


class Form(Protocol):
    """What kind of module a component is, whatever its precision; frozen, one class beside each kind of module."""

    @property
    def multiplies_inputs(self) -> bool:
        """Whether the activation scheme has a part in it: whether inputs may be quantised."""
        ...

    def module(self, tensors: Mapping[str, Stored], inputs: InputQuantizer | None) -> nn.Module:
        """The module of a component's stored tensors by leaf name (`weight`, `bias`, or the bare value's own)."""
        ...


@dataclass(frozen=True)
class Parameter:
    """One tensor that a model of some configuration must have, under its canonical name."""

    name: str
    shape: tuple[int, ...]
    component: str
    kind: str
    layer: int | None
    role: Role
    form: Form

    @property
    def leaf(self) -> str:
        """Its name within its component: `weight`, `bias`, or the bare value's own, such as `A_log`."""
        return self.name.rsplit(".", 1)[-1]


def weight(component: str, kind: str, layer: int | None, form: Form, *shape: int) -> Parameter:
    """The weight of a component, quantised per row."""
    return Parameter(f"{component}.weight", shape, component, kind, layer, "weight", form)


def bias(component: str, kind: str, layer: int | None, form: Form, size: int) -> Parameter:
    """The bias of a component, float16 in every precision."""
    return Parameter(f"{component}.bias", (size,), component, kind, layer, "bias", form)


def held_by(module: nn.Module, leaf: str) -> Stored:
    """How a component's module stores one of its tensors, by leaf name; a bare value is the module itself."""
    held = module if isinstance(module, Stored) else getattr(module, leaf)
    assert isinstance(held, Stored)
    return held
