"""Nodes of a graph while it is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

CONTRIB = "com.microsoft"
"""Operators that only ONNX Runtime has."""


class Nodes:
    """Nodes in order, and the constants that they need."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """One node, named as its output."""
        from onnx import helper

        domain = CONTRIB if operator.startswith("MatMul") and operator != "MatMul" else ""
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        """A constant; the same name always means the same value."""
        self.constants.setdefault(name, value)
        return name

    def integers(self, *values: int) -> str:
        """A list of integers, such as a shape."""
        return self.constant(f"integers/{'x'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def cast(self, name: str, output: str, to: str = "FLOAT") -> str:
        from onnx import TensorProto

        return self.add("Cast", [name], output, to=getattr(TensorProto, to))

    def reshape(self, name: str, output: str, *shape: int) -> str:
        return self.add("Reshape", [name, self.integers(*shape)], output)

    def to_parts(self, name: str, index: str, output: str, *shape: int) -> str:
        """What was gathered by `index [...]`, as `[..., *shape]`."""
        size = [self.add("Shape", [index], f"{output}/count"), self.integers(*shape)]
        return self.add("Reshape", [name, self.add("Concat", size, f"{output}/size", axis=0)], output)
