"""Projections of experts: each a component of its own, or one component for all experts of a layer.

Dimensions: `X` experts, `m` tokens, `n` outputs and `k` inputs of one expert's product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.modules.inputs import InputQuantizer
from ssm_mp.modules.linear import Linear
from ssm_mp.precisions.stored import Stored


class EachExpert(nn.Module):
    """One kind of projection of all experts, where each is a component of its own."""

    def __init__(self, projections: Iterable[nn.Module]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(projections)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """`x [m, k]`, the tokens of one expert → `[m, n]`."""
        out: Tensor = self.projections[expert](x)
        return out

    def part(self, expert: int) -> tuple[nn.Module, int]:
        """One expert's projection, and how many rows of another expert it has before its own: none."""
        return self.projections[expert], 0

    def component(self, expert: int) -> nn.Module:
        """Whose time an expert's product takes."""
        return self.projections[expert]


class ExpertsLinear(nn.Module):
    """One kind of projection of all experts as one component, `[X · n, k]`, expert after expert.

    Called with an expert's tokens and its number, and never for one that has no token: who watches the calls sees how
    many tokens reached each expert.
    """

    def __init__(self, weight: Stored, count: int, inputs: InputQuantizer | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.count = count
        self.inputs = inputs
        self._parts: tuple[object, dict[int, tuple[Linear, int]], object] | None = None
        self._trained: tuple[object, tuple[Tensor, ...]] | None = None

    @property
    def input_quantizer(self) -> InputQuantizer | None:
        """How its inputs are quantised."""
        return self.inputs

    def forget(self) -> None:
        """Let go of the parts of the weight, which may be held elsewhere from now on."""
        self._parts = self._trained = None

    def __getstate__(self) -> dict[str, Any]:
        # views of the weight, and those of one that is trained cannot be copied
        return {**self.__dict__, "_parts": None, "_trained": None}

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """`x [m, k]`, the tokens of one expert → `[m, n]`: the product that a component of its own would give."""
        if self.weight.is_trained:
            return F.linear(x, self._rows_to_train()[expert])
        part, above = self.part(expert)
        out: Tensor = part(x)
        return out[:, above:] if above else out

    def _rows_to_train(self) -> tuple[Tensor, ...]:
        """Each expert's rows `[n, k]`, cut at one stroke: of single slices, each would have a gradient `[X · n, k]`."""
        stamp = (self.weight.stamp, torch.is_grad_enabled())
        if self._trained is None or self._trained[0] != stamp:
            self._trained = (stamp, self.weight.tensor().unflatten(0, (self.count, -1)).unbind(0))
        return self._trained[1]

    def part(self, expert: int) -> tuple[Linear, int]:
        """One expert's rows as a linear layer, made once, and how many rows of another expert come before them."""
        stamp = self.weight.stamp
        current = self._parts
        if current is None or current[0] != stamp:
            # what was cut up is held too: another tensor in its place would have its stamp
            current = (stamp, {}, self.weight.arrays())
            self._parts = current
        parts = current[1]
        if expert not in parts:
            size = self.weight.shape[0] // self.count
            rows, above = self.weight.part(slice(expert * size, (expert + 1) * size))
            parts[expert] = (Linear(rows, None, self.inputs), above)
        return parts[expert]

    def component(self, expert: int) -> nn.Module:
        """As `EachExpert.component`."""
        return self


@dataclass(frozen=True)
class ExpertsForm:
    """One kind of projection of `count` experts as one component. Its module is called with tokens and an expert."""

    count: int

    @property
    def multiplies_inputs(self) -> bool:
        return True

    def module(self, tensors: Mapping[str, Stored], inputs: InputQuantizer | None) -> nn.Module:
        return ExpertsLinear(tensors["weight"], self.count, inputs)
