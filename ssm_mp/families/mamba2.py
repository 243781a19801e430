"""Family `mamba2` (Dao & Gu 2024): Hugging Face's layout, and that of the original repository (`ssm_cfg`).

Dimensions: `V` vocabulary, `d` model, `G` groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ssm_mp.config import Branch, Part
from ssm_mp.errors import CheckpointError
from ssm_mp.families.family import BACKBONE, Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import Mamba2Keys, mamba2_block
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.shown import shown
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.files.tree import members
from ssm_mp.modules.norm import NormForm

_KEYS = Mamba2Keys("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "use_conv_bias", "use_bias")
_ORIGINAL = Mamba2Keys("nheads", "headdim", "d_state", "ngroups", "d_conv", "conv_bias", "bias")


class Mamba2Family(Family):
    """Mamba-2 without attention."""

    word = "mamba2"
    model_types = ("mamba2",)
    mark = r"(?:backbone\.)?layers\.[0-9]+\.mixer\.(?:dt_bias|A_log)$"
    example = "layers.0.mixer.dt_bias"
    aliases = BACKBONE

    def recognises(self, names: Iterable[str]) -> bool:
        held = [re.sub(r"^backbone\.", "", name) for name in names]
        others = r"layers\.[0-9]+\.mixer\.(x_proj|q_proj|up_proj|experts)"
        return any(re.fullmatch(r"layers\.[0-9]+\.mixer\.dt_bias", name) for name in held) and not any(
            re.match(others, name) for name in held
        )

    def layout(self, names: Iterable[str]) -> str:
        return "original" if any(re.match(r"(backbone\.)?embedding\.", name) for name in names) else "huggingface"

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        said = Said(stored, shapes)
        original = "ssm_cfg" in stored.values
        if original:
            _refuse_others(stored)
        width = "d_model" if original else "hidden_size"
        d = said.size(width, said.shown(r"layers\.[0-9]+\.norm\.weight", 0))
        eps = said.number("norm_epsilon" if original else "layer_norm_epsilon", 1e-5, most=1.0)
        said.activation()
        block = mamba2_block(said, _ORIGINAL if original else _KEYS, "mixer", d, eps, groups=1 if original else None)
        norm = NormForm(eps)
        layer = (Branch("norm", norm, (Part("mixer", block),)),)
        config = HybridConfig(
            word=self.word, vocabulary=_vocabulary(said, original), d_model=d, norm=norm, tied=said.tied(),
            layers=(layer,) * said.layers("n_layer" if original else "num_hidden_layers"),
        )  # fmt: skip
        return config, said.closing(
            "layer", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm", "fused_add_norm", "d_intermediate",
            "pad_vocab_size_multiple", "tie_embeddings", "dt_limit", "norm_before_gate", "rmsnorm", "A_init_range",
            "time_step_max", "time_step_floor", "rescale_prenorm_residual",
        )  # fmt: skip

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)


def _vocabulary(said: Said, original: bool) -> int:
    """`V`; the original repository rounds what its config says up to a multiple."""
    rows = said.shown(r"embedding\.weight", 0)
    value, multiple = said.count("vocab_size"), said.count("pad_vocab_size_multiple")
    if original and value is not None and -(-value // (multiple or 16)) * (multiple or 16) == rows:
        return rows
    return said.size("vocab_size", rows)


def _refuse_others(stored: StoredConfig) -> None:
    """Raise CheckpointError for what the original repository can have and is not computed here."""
    cfg = members(stored.values.get("ssm_cfg")) or {}
    if cfg.get("layer") not in (None, "Mamba2"):
        raise CheckpointError(f"{stored.source}: ssm_cfg.layer: expected 'Mamba2', found {shown(cfg['layer'])}")
    others = {
        "attn_layer_idx": "attention layers of the original repository are not read",
        "d_intermediate": "feed-forwards of the original repository are not read",
        "norm_before_gate": "a norm before the gate is not read in this layout",
        "dt_limit": "a limited time step is not read in this layout",
    }
    for key, why in others.items():
        value = stored.values.get(key, cfg.get(key))
        if value not in (None, False, 0, [], ()) and not (key == "dt_limit" and _unlimited(value)):
            raise CheckpointError(f"{stored.source}: {key} = {shown(value)}: {why}")
    if stored.flag("rms_norm") is False or cfg.get("rmsnorm") is False or cfg.get("D_has_hdim") is True:
        raise CheckpointError(
            f"{stored.source}: expected rms_norm, rmsnorm and no D_has_hdim, found another kind of mixer"
        )


def _unlimited(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and value[0] == 0
        and str(value[1]).lower().startswith("inf")
    )
