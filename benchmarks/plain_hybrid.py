"""The plain way to evaluate precision maps on a Granite hybrid: `transformers`' own model, rounded.

As `benchmarks.huggingface` does it for Mamba: weights are rounded in a copy, inputs of products by hooks. Experts are
two tensors for all of a layer, multiplied within one call; where their inputs are rounded, that call is written out.

Dimensions: `t` tokens, `d` model, `E` an expert's hidden width, `X` experts, `k` of which are chosen.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from benchmarks.huggingface import rounding, set_rounded
from ssm_mp.precisions.quantize import INT8_LIMIT

HYBRID = Path("studies/hybrid")
_EXPERT = re.compile(r"(?P<block>.*\.block_sparse_moe)\.experts\.(?P<number>[0-9]+)\.(?P<leaf>input|output)_linear")
_TENSORS = {"input": "gate_up_proj", "output": "down_proj"}
_VALUES = ("A_log", "D", "dt_bias")


def transformers_hybrid(folder: Path = HYBRID) -> nn.Module:
    """The model of a folder as `transformers` loads it, float32."""
    from transformers import AutoModelForCausalLM

    untyped: Any = AutoModelForCausalLM
    model: nn.Module = untyped.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def their_name(name: str) -> str:
    """The name of a canonical component in `transformers`; experts have none of their own."""
    name = name.replace("embedding", "embed_tokens", 1) if name == "embedding" else name
    return f"model.{name.removesuffix('.layer') if name.endswith('.router.layer') else name}"


def convert_hybrid(model: nn.Module, precision_map: Mapping[str, str], input_scales: Mapping[str, float]) -> nn.Module:
    """As `benchmarks.huggingface.plain_convert`, for a Granite hybrid."""
    converted = copy.deepcopy(model)
    scales: dict[str, dict[tuple[str, int], float]] = {}
    for name, precision in precision_map.items():
        scale = input_scales.get(name) if precision == "int8" else None
        if found := _EXPERT.fullmatch(name):
            at, number = f"{their_name(found['block'])}.experts", int(found["number"])
            tensor = converted.get_parameter(f"{at}.{_TENSORS[found['leaf']]}")
            tensor.data[number] = rounding(precision)(tensor.data[number]).float()
            if scale is not None:
                scales.setdefault(at, {})[found["leaf"], number] = scale
        elif name.rsplit(".", 1)[-1] in _VALUES:
            set_rounded(converted.get_parameter(their_name(name)), Tensor.half)
        else:
            module = converted.get_submodule(their_name(name))
            for leaf, parameter in module.named_parameters():
                set_rounded(parameter, rounding(precision) if leaf == "weight" else Tensor.half)
            if scale is not None:
                _round_inputs(converted, name, scale)
    for at, held in scales.items():
        block, _, leaf = at.rpartition(".")
        setattr(converted.get_submodule(block), leaf, RoundedExperts(converted.get_submodule(at), held))
    return converted


def _round_inputs(model: Any, name: str, scale: float) -> None:
    """Round the inputs of one component's product to int8, by a hook."""
    if name == "embedding":
        scale *= model.config.logits_scaling  # transformers divides the logits by it, ours what they are made of
    product = model.get_submodule("lm_head" if name == "embedding" else their_name(name))
    product.register_forward_pre_hook(lambda _module, arguments: (_rounded(arguments[0], scale), *arguments[1:]))


def _rounded(x: Tensor, scale: float | None) -> Tensor:
    return x if scale is None else (x / scale).round().clamp(-INT8_LIMIT, INT8_LIMIT) * scale


class RoundedExperts(nn.Module):
    """The experts of a layer, an expert after another, the inputs of its two products rounded where they have a
    scale."""

    def __init__(self, experts: nn.Module, scales: Mapping[tuple[str, int], float]) -> None:
        super().__init__()
        self.experts, self.scales = experts, scales

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`x [t, d]`, which experts `[t, k]` and their weights `[t, k]` → `[t, d]`."""
        out, inward, outward = torch.zeros_like(x), *(self.experts.get_parameter(name) for name in _TENSORS.values())
        for number in range(inward.shape[0]):
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            taken = _rounded(x[tokens], self.scales.get(("input", number)))
            gate, up = F.linear(taken, inward[number]).chunk(2, dim=-1)  # [·, E] each
            hidden = _rounded(F.silu(gate) * up, self.scales.get(("output", number)))
            out.index_add_(0, tokens, F.linear(hidden, outward[number]) * weights[tokens, place, None])
        return out
