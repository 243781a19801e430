"""Experts as files hold them: apart, or all in one tensor; and as components: each for itself, or together.

Dimensions: `X` experts, `n` outputs, `k` inputs of a projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files.shown import listed

MOST_EACH = 16
"""Experts of a layer up to which each is a component of its own by default."""

Arranged = dict[str, tuple[str, Tensor]]
"""Canonical name → the canonical name that a tensor came under, and the tensor."""

_ONE = re.compile(r"(layers\.[0-9]+\..*experts)\.(0|[1-9][0-9]{0,8})\.(.+)")
_IN_MEMORY = re.compile(r"(layers\.[0-9]+\..*experts)\.(gate_up_proj|down_proj)(?:\.weight)?")


def together(experts: int) -> bool:
    """Whether so many experts of a layer are one component a projection by default."""
    return experts > MOST_EACH


def arranged_experts(
    tensors: Mapping[str, Tensor], stacked: str | None = None, gated: tuple[str, str, str] | None = None
) -> Arranged:
    """Tensors as the default components have them.

    stacked: regular expression of names of tensors `[X, n, k]`, whose groups are what stands before and the
    projection's name. gated: the family's words for gate, up and down; then `experts.gate_up_proj` `[X, 2n, k]` and
    `experts.down_proj` `[X, k, n]`, which transformers has in memory and some files hold, are read too.
    Raises CheckpointError where the experts of a layer are unequal in number or shape.
    """
    found: Arranged = {}
    if gated is not None:
        found = _apart(tensors, *gated)
        under = {name for name, _ in found.values()}
        twice = next((name for name in found if name in tensors and found[name][0] != name), None)
        if twice is not None:
            raise CheckpointError(f"{found[twice][0]!r} and {twice!r} hold the same experts; keep one of them")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in under}
    apart: dict[tuple[str, str], dict[int, str]] = {}
    for name, tensor in tensors.items():
        one = _ONE.fullmatch(name)
        many = None if stacked is None else re.fullmatch(stacked, name)
        if one is not None:
            apart.setdefault((one[1], one[3]), {})[int(one[2])] = name
        elif many is not None and tensor.dim() == 3:
            if together(tensor.shape[0]):
                found[f"{many[1]}.experts.{many[2]}"] = (name, tensor.flatten(0, 1))
            else:
                found |= {f"{many[1]}.experts.{e}.{many[2]}": (name, part) for e, part in enumerate(tensor.unbind())}
        else:
            found[name] = (name, tensor)
    _require_equal(apart)
    for (at, leaf), members in apart.items():
        if together(len(members)):
            parts = [tensors[members[e]] for e in sorted(members)]
            if len({tuple(part.shape) for part in parts}) > 1:
                raise CheckpointError(
                    f"{at}.….{leaf}: experts of different shapes, {listed(str(list(p.shape)) for p in parts)}"
                )
            found[f"{at}.{leaf}"] = (members[min(members)], torch.cat(parts))
        else:
            found |= {name: (name, tensors[name]) for name in members.values()}
    return found


def _apart(tensors: Mapping[str, Tensor], gate: str, up: str, down: str) -> Arranged:
    """What tensors of all experts of a layer, as transformers has them in memory, are as the default components."""
    found: Arranged = {}
    for name, tensor in tensors.items():
        match = _IN_MEMORY.fullmatch(name)
        if match is None or tensor.dim() != 3:
            continue
        pieces = {down: tensor}
        if match[2] == "gate_up_proj":
            half = tensor.shape[1] // 2
            pieces = {gate: tensor[:, :half], up: tensor[:, half:]}
        for leaf, piece in pieces.items():
            if together(tensor.shape[0]):
                found[f"{match[1]}.{leaf}.weight"] = (name, piece.flatten(0, 1))
            else:
                found |= {f"{match[1]}.{e}.{leaf}.weight": (name, part) for e, part in enumerate(piece.unbind())}
    return found


def _require_equal(apart: Mapping[tuple[str, str], Mapping[int, str]]) -> None:
    """Raise CheckpointError where projections of a layer are of unequal numbers of experts, or one is left out."""
    counts: dict[str, dict[str, int]] = {}
    for (at, leaf), members in apart.items():
        counts.setdefault(at, {})[leaf] = len(members)
        missing = sorted(set(range(max(members) + 1)) - set(members))
        if missing:
            raise CheckpointError(f"{at}: expert {missing[0]} has no {leaf}, though number {max(members)} has")
    for at, by_leaf in counts.items():
        if len(set(by_leaf.values())) > 1:
            said = ", ".join(f"{leaf} of {count}" for leaf, count in sorted(by_leaf.items()))
            raise CheckpointError(f"{at}: expected as many experts for every projection, found {said}")
    by_layer = {at: max(by_leaf.values()) for at, by_leaf in counts.items()}
    if len(set(by_layer.values())) > 1:
        said = listed(f"{count} of {at}" for at, count in by_layer.items())
        raise CheckpointError(f"expected as many experts in every layer that has any, found {said}")
