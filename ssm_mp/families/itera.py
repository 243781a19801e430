"""Family `itera`: a small SSM with feed-forward or expert layers (design, section 4).

Dimensions: `V` vocabulary, `T` positions, `d` model, `I` inner, `N` state, `K` convolution kernel, `E` feed-forward
hidden, `X` experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ssm_mp.blocks.block import Block
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.shared_step import SharedStep
from ssm_mp.config import Branch, Config, Part
from ssm_mp.families.family import Family
from ssm_mp.families.shapes import INDEX, Shapes, count_of, size_of
from ssm_mp.families.stated import closing_notes, compared, declares_untied, stated_epsilon
from ssm_mp.files.config_keys import ONLY_MAMBA, TOP_KS
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.modules.norm import NormForm

_CORE = tuple((leaf, f"ssm.{leaf}") for leaf in ("delta_proj", "A_log", "B", "C", "D"))
_PLAIN = (("up_proj", "w1"), ("down_proj", "w2"))
_EXPERTS = (*_PLAIN, ("router", "router.gate"))


@dataclass(frozen=True)
class IteraLayer:
    """Sizes of one `itera` layer; `experts` is 0 for a plain feed-forward."""

    d_inner: int
    d_state: int
    d_conv: int
    d_hidden: int
    experts: int = 0


@dataclass(frozen=True)
class IteraConfig(Config):
    """A small SSM with feed-forward or expert layers (design, section 4); layers may differ in size.

    embedding_blocks: rows of each block that the token embedding is split into; empty where it is whole.
    experts_together: one component for each kind of projection of a layer's experts.
    """

    vocabulary: int
    d_model: int
    max_length: int
    layers: tuple[IteraLayer, ...]
    top_k: int = 2
    norm_eps: float = 1e-5
    tied: bool = True
    embedding_blocks: tuple[int, ...] = ()
    experts_together: bool = False

    @property
    def family(self) -> str:
        return "itera"

    @property
    def norm(self) -> NormForm:
        """Every norm of the model."""
        return NormForm(self.norm_eps, "layer")

    @property
    def final_norm(self) -> NormForm:
        return self.norm

    @property
    def branches(self) -> tuple[tuple[Branch, ...], ...]:
        return tuple((self._mixer(layer), self._feed_forward(layer)) for layer in self.layers)

    def _mixer(self, layer: IteraLayer) -> Branch:
        block = SharedStep(
            d_model=self.d_model, d_inner=layer.d_inner, d_state=layer.d_state, d_conv=layer.d_conv, names=_CORE
        )
        return Branch("ssm.norm", self.norm, (Part("ssm", block),))

    def _feed_forward(self, layer: IteraLayer) -> Branch:
        if not layer.experts:
            plain: Block = FeedForward(d_model=self.d_model, d_hidden=layer.d_hidden, names=_PLAIN)
            return Branch("moe.norm", self.norm, (Part("moe.ffn", plain),))
        block = Experts(
            d_model=self.d_model, d_hidden=layer.d_hidden, experts=layer.experts, top_k=self.top_k,
            together=self.experts_together, names=_EXPERTS,
        )  # fmt: skip
        return Branch("moe.layer.norm", self.norm, (Part("moe.layer", block),))

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def max_tokens(self) -> int | None:
        return self.max_length

    @property
    def position_table(self) -> int | None:
        return self.max_length

    def statistics(self) -> dict[str, tuple[int, ...]]:
        return {
            f"layers.{i}.moe.layer.router.expert_counts": (layer.experts,)
            for i, layer in enumerate(self.layers)
            if layer.experts
        }

    def rebuilt(self, change: Callable[[Block], Block]) -> IteraConfig:
        blocks = [change(part.block) for layer in self.branches for branch in layer for part in branch.parts]
        return replace(self, experts_together=any(isinstance(b, Experts) and b.together for b in blocks))

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        if not self.experts_together:
            del values["experts_together"]  # as it was before there was this choice: digests are made of it
        return values


class IteraFamily(Family):
    """The small SSM with experts."""

    word = "itera"
    mark = r"layers\.[0-9]+\.ssm\.ssm\."
    example = "layers.0.ssm.ssm.A_log"
    aliases = (
        (r"^embeddings?\.weight$", "embedding.weight"),
        (r"^embeddings\.token_embeddings\.", "embedding."),
        (r"^embeddings\.position_embeddings\.", "position_embedding."),
        (r"^norm_f\.", "norm."),
        (r"^(layers\.[0-9]+\.moe)\.moe\.", r"\1.layer."),
    )

    def recognises(self, names: Iterable[str]) -> bool:
        return any(re.match(self.mark, name) for name in names)

    def layout(self, names: Iterable[str]) -> str:
        held = list(names)
        differences = [
            label
            for label, mark in (
                ("token_embeddings", "embeddings.token_embeddings."),
                ("norm_f", "norm_f."),
                ("moe.moe", ".moe.moe."),
            )
            if any(mark in name for name in held)
        ]
        return "+".join(differences) or "canonical"

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[IteraConfig, tuple[str, ...]]:
        config = infer_config(shapes)
        notes, unused = compared(config, stored)
        config = replace(config, tied=config.tied and not declares_untied(stored))
        config, more = _with_top_k(config, stored)
        unused |= stored.values.keys() & ONLY_MAMBA
        eps, also = stated_epsilon(stored)
        config = config if eps is None else replace(config, norm_eps=eps)
        return config, (*notes, *more, *also, *closing_notes(config, stored, unused))

    def config_from_json(self, values: dict[str, Any]) -> IteraConfig:
        layers = tuple(IteraLayer(**layer) for layer in values["layers"])
        blocks = tuple(values.get("embedding_blocks", ()))
        return IteraConfig(**{**values, "layers": layers, "embedding_blocks": blocks})


def infer_config(shapes: Shapes) -> IteraConfig:
    """The configuration that the shapes of canonical tensors imply; see `mamba.infer_config`."""
    n_layers = count_of(shapes, rf"layers\.{INDEX}\.", "layer", "layers")
    held: list[dict[str, tuple[int, ...]]] = [{} for _ in range(n_layers)]
    for name, shape in shapes.items():
        if match := re.match(rf"layers\.{INDEX}\.", name):
            held[int(match[1])][name[match.end() :]] = shape
    return IteraConfig(
        vocabulary=size_of(shapes, "vocabulary V", (r"embedding\.weight", 0), (r"lm_head\.weight", 0)),
        d_model=size_of(
            shapes, "width d",
            (r"embedding\.weight", 1), (r"position_embedding\.weight", 1), (r"layers\.[0-9]+\.ssm\.norm\.weight", 0),
            (r"layers\.[0-9]+\.ssm\.in_proj\.weight", 1), (r"layers\.[0-9]+\.ssm\.out_proj\.weight", 0),
        ),
        max_length=size_of(shapes, "number of positions T", (r"position_embedding\.weight", 0)),
        layers=tuple(_infer_itera_layer(layer, i) for i, layer in enumerate(held)),
        tied="lm_head.weight" not in shapes,
    )  # fmt: skip


def _infer_itera_layer(shapes: Shapes, i: int) -> IteraLayer:
    """Sizes of layer `i` from its own shapes, whose names are those within the layer."""
    hidden = r"moe\.(ffn|layer\.experts\.[0-9]+)\."
    return IteraLayer(
        d_inner=size_of(
            shapes, f"inner width I of layer {i}",
            (r"ssm\.ssm\.D", 0), (r"ssm\.conv1d\.weight", 0), (r"ssm\.out_proj\.weight", 1),
            (r"ssm\.ssm\.delta_proj\.weight", 0), (r"ssm\.ssm\.B", 1),
        ),
        d_state=size_of(
            shapes, f"state size N of layer {i}",
            (r"ssm\.ssm\.A_log", 0), (r"ssm\.ssm\.B", 0), (r"ssm\.ssm\.C", 1),
        ),
        d_conv=size_of(shapes, f"convolution kernel K of layer {i}", (r"ssm\.conv1d\.weight", 2)),
        d_hidden=size_of(
            shapes, f"hidden width E of layer {i}", (hidden + r"w1\.weight", 0), (hidden + r"w2\.weight", 1)
        ),
        experts=count_of(shapes, rf"moe\.layer\.experts\.{INDEX}\.", f"expert of layer {i}", f"experts of layer {i}"),
    )  # fmt: skip


def _with_top_k(config: IteraConfig, stored: StoredConfig) -> tuple[IteraConfig, list[str]]:
    key = next((key for key in TOP_KS if stored.values.get(key) is not None), None)
    top_k = None if key is None else stored.count(key)
    if top_k is None:
        return config, []
    fewest = min((layer.experts for layer in config.layers if layer.experts), default=top_k)
    notes = []
    if top_k > fewest:
        notes = [f"{stored.source} says {key} = {top_k}, but a layer has {fewest} experts; it uses them all"]
    return replace(config, top_k=top_k), notes
