"""A residual branch as one compiled call for many tokens: norm, blocks, multipliers and residual.

Dimensions: `b` sequences, `l` tokens of each, `d` model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ssm_mp.programs.program import Carried, Program

States = tuple[Tensor, ...]
"""What a block carries."""
Observer = Callable[[Mapping[nn.Module, float]], None]
"""Takes the seconds that a compiled call spent in each component."""


class CompiledBranch:
    """A closed program of one branch; threads may share it."""

    def __init__(self, program: Program, counts: Sequence[int]) -> None:
        """counts: tensors of each block's state."""
        self._program = program
        self._counts = counts

    def __call__(
        self, x: Tensor, before: Sequence[States] | None, observer: Observer | None = None
    ) -> tuple[Tensor, list[States]]:
        """`x [b, l, d]`, float32, and the blocks' states before it (None: the beginning) → `[b, l, d]`, and the states
        after it. No argument is changed. observer: is told where its time goes."""
        program, (b, length, width) = self._program, x.shape
        if width != program.stream.width:
            raise ValueError(f"inputs of width {width} for a branch of width {program.stream.width}")
        y = x.clone(memory_format=torch.contiguous_format)
        former = None if before is None else [tensor for state in before for tensor in state]
        position = tokens_in(program.carried, former)
        held = held_states(program.carried, former, b, position, position + length)
        seconds = None if observer is None else torch.zeros(max(1, len(program.parts)), dtype=torch.float64)
        program.calls.run(y, None, held, position, position + length, few=not program.many, seconds=seconds)
        if observer is not None and seconds is not None:
            observer(added(program.parts, seconds.tolist()))
        pairs = zip(program.carried, held, strict=True)
        after = iter([carried.view(array, position + length) for carried, array in pairs])
        return y, [tuple(next(after) for _ in range(count)) for count in self._counts]


def added(parts: Sequence[nn.Module], seconds: Sequence[float]) -> dict[nn.Module, float]:
    """Seconds by component, which may have had several calls."""
    found = dict.fromkeys(parts, 0.0)
    for part, spent in zip(parts, seconds, strict=False):  # memory of none is memory of one
        found[part] += spent
    return found


def tokens_in(carried: Sequence[Carried], states: Sequence[Tensor] | None) -> int:
    """How many tokens states have seen, as those say that grow with them; 0 where none does."""
    if states is None:
        return 0
    return next((state.shape[2] for one, state in zip(carried, states, strict=True) if one.grows), 0)


def held_states(
    carried: Sequence[Carried], states: Sequence[Tensor] | None, batch: int, tokens: int, capacity: int
) -> list[Tensor]:
    """States as the kernels hold them, with room for `capacity` tokens: copies, or zeros at the beginning."""
    held = [torch.zeros(one.shape(batch, capacity)) for one in carried]
    if states is not None:
        for one, array, state in zip(carried, held, states, strict=True):
            one.view(array, tokens).copy_(state)
    return held
