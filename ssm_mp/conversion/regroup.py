"""Other components out of the same model: experts each for itself or together, in_proj by its rows.

Dimensions: `X` experts, `n` outputs, `k` inputs of an expert's projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ssm_mp.blocks.block import Block
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.mamba2 import PIECES, Mamba2
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.config import Config
from ssm_mp.errors import PrecisionMapError

Grouping = Literal["each", "together"]
SPLIT = ("in_proj",)
"""Projections that may be split into their rows."""


def regrouped(
    checkpoint: Checkpoint,
    experts: Grouping | None = None,
    split: Sequence[str] = (),
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Checkpoint:
    """The same model with other components, its tensors' values the same.

    experts: one component for each expert's projection, or one for each kind of projection of a layer; None: as it is.
    split: `in_proj` of Mamba-2 becomes five components, of the rows of z, x, B, C and dt.
    place: where a tensor that had to be put together is held, one after another; by default in memory.
    Raises PrecisionMapError where there is nothing of the kind in the model.
    """
    if experts is None and not split:
        return checkpoint
    config = checkpoint.config
    _require(config, experts, split)

    def changed(block: Block) -> Block:
        if experts is not None and isinstance(block, Experts):
            return replace(block, together=experts == "together")
        return replace(block, split=True) if split and isinstance(block, Mamba2) else block

    new = config.rebuilt(changed)
    tensors = dict(_tensors(config, new, checkpoint.tensors, place))
    return replace(checkpoint, config=new, tensors={p.name: tensors[p.name] for p in new.parameters()})


def has_experts(config: Config) -> bool:
    """Whether a layer has experts whose components can be grouped; those of the `itera` family cannot."""
    return any(isinstance(block, Experts) for block in _blocks(config))


def grouping_of(config: Config) -> dict[str, str]:
    """How the components of a model are grouped, such as `{"experts": "together"}`; empty where each expert is a
    component and no projection is split."""
    blocks = _blocks(config)
    together = any(isinstance(block, Experts) and block.together for block in blocks)
    split = any(isinstance(block, Mamba2) and block.split for block in blocks)
    return {**({"experts": "together"} if together else {}), **({"in_proj": "split"} if split else {})}


def same_model(one: Config, other: Config) -> bool:
    """Whether two configurations are of the same model, however its components are grouped and its embedding split."""
    return _plain(one) == _plain(other)


def _plain(config: Config) -> Config:
    def plain(block: Block) -> Block:
        if isinstance(block, Experts):
            return replace(block, together=False)
        return replace(block, split=False) if isinstance(block, Mamba2) else block

    return config.replaced(embedding_blocks=()).rebuilt(plain)


def _require(config: Config, experts: Grouping | None, split: Sequence[str]) -> None:
    blocks = _blocks(config)
    if experts is not None and not any(isinstance(block, Experts) for block in blocks):
        raise PrecisionMapError(f"experts = {experts!r}, but no layer of this model has experts; leave the key out")
    for name in split:
        if name not in SPLIT:
            raise PrecisionMapError(f"split = {list(split)}: expected any of {list(SPLIT)}, found {name!r}")
    if split and not any(isinstance(block, Mamba2) for block in blocks):
        raise PrecisionMapError(
            f"split = {list(split)}, but no layer of this model has a Mamba-2 mixer, whose in_proj can be split"
        )


def _blocks(config: Config) -> set[Block]:
    return {part.block for branches in config.branches for branch in branches for part in branch.parts}


def _tensors(
    old: Config, new: Config, held: Mapping[str, Tensor], place: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its new name; those that are only cut apart share their memory."""
    yield from held.items()
    for i, (before, after) in enumerate(zip(old.branches, new.branches, strict=True)):
        for one, other in zip(before, after, strict=True):
            for part, changed in zip(one.parts, other.parts, strict=True):
                at = f"layers.{i}.{part.name}"
                match part.block, changed.block:
                    case Experts() as was, Experts() as now if was.together != now.together:
                        yield from _experts(was, at, held, place)
                    case Mamba2() as was, Mamba2() as now if now.split and not was.split:
                        yield from _rows(now, at, held)


def _experts(
    block: Experts, at: str, held: Mapping[str, Tensor], place: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for leaf in (*(leaf for leaf, _ in block.hidden.inward), block.hidden.outward):
        whole = f"{block.component(at, f'experts.{leaf}')}.weight"
        each = [f"{block.component(at, f'experts.{e}.{leaf}')}.weight" for e in range(block.experts)]
        if block.together:
            yield from zip(each, held[whole].chunk(block.experts), strict=True)
        else:
            yield whole, place(torch.cat([held[name] for name in each]))


def _rows(block: Mamba2, at: str, held: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    name = block.component(at, "in_proj")
    for leaf in ("weight", "bias"):
        if f"{name}.{leaf}" in held:
            for piece, rows in zip(PIECES, held[f"{name}.{leaf}"].split(block.sizes), strict=True):
                yield f"{block.component(at, f'in_proj.{piece}')}.{leaf}", rows
