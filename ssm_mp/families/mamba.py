"""Family `mamba`: Mamba-1 (Gu & Dao 2023, section 3) in three layouts (design, section 4).

Dimensions: `V` vocabulary, `T` positions, `d` model, `I` inner, `N` state, `R` step rank, `K` convolution kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.config import Branch, Config, Part
from ssm_mp.errors import CheckpointError
from ssm_mp.families.family import Family
from ssm_mp.families.shapes import INDEX, Shapes, count_of, size_of
from ssm_mp.families.stated import closing_notes, compared, declares_untied, stated_epsilon
from ssm_mp.files.config_keys import ACTIVATIONS
from ssm_mp.files.shown import shown
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.files.tree import members
from ssm_mp.modules.norm import NormForm, NormKind


@dataclass(frozen=True)
class MambaConfig(Config):
    """A Mamba-1 language model (Gu & Dao 2023, section 3); norm, positions, tie and biases are properties.

    embedding_blocks: rows of each block that the token embedding is split into; empty where it is whole.
    """

    vocabulary: int
    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    d_conv: int
    n_layers: int
    max_length: int | None = None
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    projection_bias: bool = False
    conv_bias: bool = True
    tied: bool = True
    embedding_blocks: tuple[int, ...] = ()

    @property
    def family(self) -> str:
        return "mamba"

    @property
    def final_norm(self) -> NormForm:
        return NormForm(self.norm_eps, self.norm)

    @property
    def branches(self) -> tuple[tuple[Branch, ...], ...]:
        block = Mamba1(
            d_model=self.d_model, d_inner=self.d_inner, d_state=self.d_state, dt_rank=self.dt_rank, d_conv=self.d_conv,
            projection_bias=self.projection_bias, conv_bias=self.conv_bias,
        )  # fmt: skip
        return ((Branch("ssm.norm", self.final_norm, (Part("ssm", block),)),),) * self.n_layers

    @property
    def max_tokens(self) -> int | None:
        return self.max_length

    @property
    def position_table(self) -> int | None:
        return self.max_length

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class MambaFamily(Family):
    """Mamba-1."""

    word = "mamba"
    model_types = ("mamba",)
    mark = r"(?:backbone\.)?layers\.[0-9]+\.(?:mixer|ssm)\.(?:x_proj|dt_proj)\."
    example = "layers.0.mixer.x_proj.weight"
    aliases = (
        (r"^(?:backbone\.)?embeddings?\.weight$", "embedding.weight"),
        (r"^embeddings\.token_embeddings\.", "embedding."),
        (r"^embeddings\.position_embeddings\.", "position_embedding."),
        (r"^(?:backbone\.)?norm_f\.", "norm."),
        (r"^(?:backbone\.)?layers\.([0-9]+)\.norm\.", r"layers.\1.ssm.norm."),
        (r"^(?:backbone\.)?layers\.([0-9]+)\.mixer\.", r"layers.\1.ssm."),
    )

    def recognises(self, names: Iterable[str]) -> bool:
        return any(re.match(self.mark, name) for name in names)

    def layout(self, names: Iterable[str]) -> str:
        held = list(names)
        if not any(re.match(r"(backbone\.)?layers\.[0-9]+\.mixer\.", name) for name in held):
            return "positions"
        return "original" if any(re.match(r"(backbone\.)?embedding\.", name) for name in held) else "huggingface"

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[MambaConfig, tuple[str, ...]]:
        config = infer_config(shapes)
        notes, unused = compared(config, stored)
        expand = stored.number(("expand",), most=1 << 20)
        if expand is not None and int(expand * config.d_model) != config.d_inner:
            said = f"expand = {expand:g} of {config.d_model}"
            notes.append(f"{stored.source} says {said}, the shapes say {config.d_inner}; the shapes win")
        config = _declared(config, stored)
        eps, more = stated_epsilon(stored)
        config = config if eps is None else replace(config, norm_eps=eps)
        return config, (*notes, *more, *closing_notes(config, stored, unused))

    def config_from_json(self, values: dict[str, Any]) -> MambaConfig:
        return MambaConfig(**{**values, "embedding_blocks": tuple(values.get("embedding_blocks", ()))})


def infer_config(shapes: Shapes) -> MambaConfig:
    """The configuration that the shapes of canonical tensors imply.

    Each size is the one that most of the tensors that show it agree on, so that one misshapen tensor is
    reported as such, not believed. Raises CheckpointError where no tensor shows a size.
    """
    n_layers = count_of(shapes, rf"layers\.{INDEX}\.", "layer", "layers")
    at = r"layers\.[0-9]+\.ssm\."
    state = size_of(shapes, "state size N", (at + "A_log", 1))
    rank = size_of(shapes, "step rank R", (at + r"dt_proj\.weight", 1))
    return MambaConfig(
        vocabulary=size_of(shapes, "vocabulary V", (r"embedding\.weight", 0), (r"lm_head\.weight", 0)),
        d_model=size_of(
            shapes, "width d",
            (r"embedding\.weight", 1), (at + r"norm\.weight", 0),
            (at + r"in_proj\.weight", 1), (at + r"out_proj\.weight", 0),
        ),
        d_inner=size_of(
            shapes, "inner width I",
            (at + "D", 0), (at + "A_log", 0), (at + r"conv1d\.weight", 0), (at + r"out_proj\.weight", 1),
        ),
        d_state=state,
        dt_rank=rank,
        d_conv=size_of(shapes, "convolution kernel K", (at + r"conv1d\.weight", 2)),
        n_layers=n_layers,
        max_length=shapes["position_embedding.weight"][0] if shapes.get("position_embedding.weight") else None,
        norm="layer" if any(re.fullmatch(r"(layers\.[0-9]+\.ssm\.)?norm\.bias", name) for name in shapes) else "rms",
        projection_bias=any(re.fullmatch(at + r"(in|out)_proj\.bias", name) for name in shapes),
        conv_bias=any(re.fullmatch(at + r"conv1d\.bias", name) for name in shapes),
        tied="lm_head.weight" not in shapes,
    )  # fmt: skip


def _declared(config: MambaConfig, stored: StoredConfig) -> MambaConfig:
    """The config with the head and biases that a Hugging Face config declares, so that their absence is reported.

    Raises CheckpointError for another model type or activation, and for layers of another kind.
    """
    kind = stored.values.get("model_type")
    if kind not in (None, "mamba"):
        raise CheckpointError(
            f"{stored.source} says model_type = {shown(kind)}; only 'mamba' (Mamba-1) has this forward pass"
        )
    if kind is None and stored.values.get("mixer_rms_eps") is not None:
        raise CheckpointError(
            f"{stored.source}: model_type: expected 'falcon_mamba', as only that has mixer_rms_eps, found nothing"
        )
    for key in ACTIVATIONS:
        activation = stored.values.get(key)
        if activation not in (None, "silu", "swish"):
            raise CheckpointError(f"{stored.source} says {key} = {shown(activation)}; only 'silu' is supported")
    block = members(stored.values.get("ssm_cfg")) or {}
    if block.get("layer") not in (None, "Mamba1", "Mamba"):
        raise CheckpointError(f"{stored.source} says ssm_cfg.layer = {shown(block['layer'])}; only 'Mamba1' is read")
    attention = stored.values.get("attn_layer_idx")
    if attention is not None and not (isinstance(attention, list | tuple) and not attention):
        raise CheckpointError(f"{stored.source} says attn_layer_idx: attention layers are not read")
    rms = stored.flag("rms_norm")
    if rms is not None and rms != (config.norm == "rms"):
        norm = "an RMSNorm" if rms else "a LayerNorm"
        raise CheckpointError(f"{stored.source} says rms_norm = {rms}: {norm}, which the norms in the file are not")
    conv_bias, projection_bias = stored.flag("use_conv_bias", "conv_bias"), stored.flag("use_bias", "bias")
    if conv_bias is None:
        conv_bias = kind is not None  # Hugging Face's default is that there is one
    return replace(
        config,
        tied=config.tied and not declares_untied(stored),
        conv_bias=config.conv_bias or conv_bias,
        projection_bias=config.projection_bias or projection_bias is True,
    )
