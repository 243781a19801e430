"""What tensors an MLX folder has, in the arrangement that mlx-lm itself saves, and out of which of ours each is made.

Dimensions: `X` experts, `n` rows and `k` columns of a matrix, `C` channels and `K` kernel of a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba2 import PIECES, Mamba2
from ssm_mp.config import Config
from ssm_mp.modules.convolution import ConvolutionForm
from ssm_mp.modules.embedding import EmbeddingForm
from ssm_mp.modules.experts import ExpertsForm
from ssm_mp.modules.linear import LinearForm
from ssm_mp.modules.norm import NormForm
from ssm_mp.modules.parameter import Parameter
from ssm_mp.runtimes.huggingface import Whole, in_family, stacked, wholes

_LFM2 = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "granitemoehybrid": ((r"\.block_sparse_moe\.experts\.output_linear\.", ".block_sparse_moe.switch_mlp.down_proj."),),
    "nemotron_h": (
        (r"\.mixer\.experts\.up_proj\.", ".mixer.switch_mlp.fc1."),
        (r"\.mixer\.experts\.down_proj\.", ".mixer.switch_mlp.fc2."),
    ),
    "lfm2_moe": (
        *((rf"\.experts\.{old}\.", f".switch_mlp.{new}.") for old, new in _LFM2.items()),
        *((rf"\.{old}\.", f".{new}.") for old, new in _LFM2.items()),
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), ((r"\.mlp\.experts\.", ".mlp.switch_mlp."),)),
}
"""Names of transformers → names of mlx-lm's modules: regular expressions and replacements, one after another."""
_DENSE_GRANITE = (
    (r"\.shared_mlp\.input_linear\.", ".mlp.gate_up."),
    (r"\.shared_mlp\.output_linear\.", ".mlp.down_proj."),
)


@dataclass(frozen=True)
class Entry:
    """A tensor of the folder.

    half: 0 or 1: only so much of the rows, of gate and up that are one for us; None: all.
    """

    name: str
    whole: Whole
    half: int | None = None

    @property
    def module(self) -> str:
        """The path of its module, as a config names it."""
        return self.name.rpartition(".")[0]

    def rows(self, tensor: Tensor) -> Tensor:
        """Ours `[n, …]`, parts one below the other → the folder's `[n, …]` or `[X, n, …]`; columns are left alone."""
        tensor = stacked(self.whole, tensor)
        if self.half is None:
            return tensor
        return tensor.chunk(2, dim=0 if self.whole.experts is None else 1)[self.half]

    def value(self, tensor: Tensor) -> Tensor:
        """Ours, float → the folder's: kernels last but one, and norms with their one."""
        form = self.whole.first.form
        if isinstance(form, ConvolutionForm) and tensor.dim() == 3:
            return tensor.transpose(1, 2)  # [C, K, 1]
        if isinstance(form, NormForm) and form.one_plus:
            return tensor.float() + 1
        return self.rows(tensor)


def entries(config: Config) -> Iterator[Entry]:
    """Every tensor of the folder."""
    dense = config.family == "granitemoehybrid" and not any(whole.experts for whole in wholes(config))
    changes = (*_RENAMED.get(config.family, ()), *(_DENSE_GRANITE if dense else ()))
    for whole in wholes(config):
        name = in_family(config, whole.name)
        for pattern, replacement in changes:
            name = re.sub(pattern, replacement, name)
        if config.family in ("qwen3_5_text", "qwen3_5_moe_text"):
            name = f"language_model.{name}"
        fused = re.sub(r"\.block_sparse_moe\.experts\.input_linear\.", ".block_sparse_moe.switch_mlp.gate_up.", name)
        if ".gate_up." in fused:
            yield Entry(fused.replace(".gate_up.", ".gate_proj."), whole, 0)
            yield Entry(fused.replace(".gate_up.", ".up_proj."), whole, 1)
        else:
            yield Entry(name, whole)


def is_matrix(parameter: Parameter) -> bool:
    """Whether it is the weight of a product or a table of rows, which may be integers."""
    return isinstance(parameter.form, LinearForm | EmbeddingForm | ExpertsForm) and parameter.leaf == "weight"


def is_multiplied(parameter: Parameter) -> bool:
    """Whether it is such a weight or the bias of one: the rest is float32, as mlx-lm computes with it as it is."""
    return isinstance(parameter.form, LinearForm | EmbeddingForm | ExpertsForm)


@lru_cache(maxsize=4)
def factors(config: Config) -> dict[str, Tensor]:
    """What the rows of a tensor are multiplied with there, for its config's multipliers are in the weights already:
    canonical name of a whole → float32 `[n]`, without those that are multiplied with one."""
    if config.family != "falcon_h1":
        return {}
    found = {"embedding.weight": config.embedding_multiplier, "lm_head.weight": config.logit_multiplier}
    by_row: dict[str, Tensor] = {}
    for i, layer in enumerate(config.branches):
        for part in (part for branch in layer for part in branch.parts):
            at = f"layers.{i}.{part.name}"
            match part.block:
                case Mamba2() as mamba:
                    pieces = torch.tensor(mamba.multipliers or (1.0,) * len(PIECES)).double()
                    rows = pieces.repeat_interleave(torch.tensor(mamba.sizes))
                    by_row |= {f"{at}.in_proj.weight": rows * part.before, f"{at}.in_proj.bias": rows}
                    found |= dict.fromkeys((f"{at}.out_proj.weight", f"{at}.out_proj.bias"), part.after)
                case Attention() as attention:
                    found |= {f"{at}.{leaf}_proj.weight": part.before for leaf in "qv"}
                    found[f"{at}.k_proj.weight"] = part.before * attention.key_multiplier
                    found[f"{at}.k_proj.bias"] = attention.key_multiplier
                    found |= dict.fromkeys((f"{at}.o_proj.weight", f"{at}.o_proj.bias"), part.after)
                case FeedForward() as forward:
                    for leaf, factor in (("gate", forward.gate_multiplier), ("down", forward.down_multiplier)):
                        found |= dict.fromkeys((f"{at}.{leaf}_proj.weight", f"{at}.{leaf}_proj.bias"), factor)
    sizes = {whole.name: sum(p.shape[0] for p in whole.parameters) for whole in wholes(config)}
    by_row |= {name: torch.full((sizes[name],), factor).double() for name, factor in found.items() if name in sizes}
    return {name: rows for name, rows in by_row.items() if name in sizes and bool((rows != 1).any())}
