"""Model configurations, and the list of parameters that each one implies.

Dimensions: `V` vocabulary, `T` positions, `d` model, `I` inner, `N` state, `R` step rank,
`K` convolution kernel, `E` feed-forward hidden, `X` experts.

A configuration is the single source of what tensors a checkpoint must hold, which component each
belongs to and how it is quantised; the checkpoint reader, the component list, the converter and the
artifact loader all ask `config.parameters()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Role = Literal["weight", "vector", "bias", "index"]
"""`weight`: quantised per row (output channel); `vector`: one scale; `bias`: stored float16 always; `index`: bytes
that no precision changes, not a parameter of the FP32 model."""

NormKind = Literal["layer", "rms"]


@dataclass(frozen=True)
class Parameter:
    """One tensor that a model of some configuration must have, under its canonical name."""

    name: str
    shape: tuple[int, ...]
    component: str
    kind: str
    layer: int | None
    role: Role

    @property
    def leaf(self) -> str:
        """Its name within its component: `weight`, `bias`, or the bare value's own, such as `A_log`."""
        return self.name.rsplit(".", 1)[-1]


def _weight(component: str, kind: str, layer: int | None, *shape: int) -> Parameter:
    return Parameter(f"{component}.weight", shape, component, kind, layer, "weight")


def _bias(component: str, kind: str, layer: int | None, size: int) -> Parameter:
    return Parameter(f"{component}.bias", (size,), component, kind, layer, "bias")


def _value(component: str, layer: int, *shape: int) -> Parameter:
    kind = component.rsplit(".", 1)[-1]
    return Parameter(component, shape, component, kind, layer, "weight" if len(shape) > 1 else "vector")


def _norm(component: str, norm: NormKind, layer: int | None, size: int) -> Iterator[Parameter]:
    yield Parameter(f"{component}.weight", (size,), component, "norm", layer, "vector")
    if norm == "layer":
        yield _bias(component, "norm", layer, size)


def _embedding(vocabulary: int, d_model: int, blocks: tuple[int, ...]) -> Iterator[Parameter]:
    """The token embedding, whole or in blocks of rows; the first block then tells which token is in which."""
    if not blocks:
        yield _weight("embedding", "embedding", None, vocabulary, d_model)
        return
    for b, rows in enumerate(blocks):
        yield _weight(f"embedding.blocks.{b}", "embedding", None, rows, d_model)
        if b == 0:
            size = -(-vocabulary * index_bits(len(blocks)) // 8)
            component = "embedding.blocks.0"
            yield Parameter(f"{component}.block_of", (size,), component, "embedding", None, "index")


def index_bits(blocks: int) -> int:
    """Bits in which a block's number is stored: a divisor of 8, so that no number crosses a byte."""
    return next(bits for bits in (1, 2, 4, 8) if blocks <= 1 << bits)


@dataclass(frozen=True)
class MambaConfig:
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

    def parameters(self) -> tuple[Parameter, ...]:
        """Every tensor of the model, canonical names, in the order of the data flow."""
        return tuple(self._parameters())

    def _parameters(self) -> Iterator[Parameter]:
        d, inner = self.d_model, self.d_inner
        yield from _embedding(self.vocabulary, d, self.embedding_blocks)
        if self.max_length is not None:
            yield _weight("position_embedding", "position_embedding", None, self.max_length, d)
        for i in range(self.n_layers):
            at = f"layers.{i}.ssm"
            yield from _norm(f"{at}.norm", self.norm, i, d)
            yield _weight(f"{at}.in_proj", "in_proj", i, 2 * inner, d)
            if self.projection_bias:
                yield _bias(f"{at}.in_proj", "in_proj", i, 2 * inner)
            yield _weight(f"{at}.conv1d", "conv1d", i, inner, 1, self.d_conv)
            if self.conv_bias:
                yield _bias(f"{at}.conv1d", "conv1d", i, inner)
            yield _weight(f"{at}.x_proj", "x_proj", i, self.dt_rank + 2 * self.d_state, inner)
            yield _weight(f"{at}.dt_proj", "dt_proj", i, inner, self.dt_rank)
            yield _bias(f"{at}.dt_proj", "dt_proj", i, inner)
            yield _value(f"{at}.A_log", i, inner, self.d_state)
            yield _value(f"{at}.D", i, inner)
            yield _weight(f"{at}.out_proj", "out_proj", i, d, inner)
            if self.projection_bias:
                yield _bias(f"{at}.out_proj", "out_proj", i, d)
        yield from _norm("norm", self.norm, None, d)
        if not self.tied:
            yield _weight("lm_head", "lm_head", None, self.vocabulary, d)


@dataclass(frozen=True)
class IteraLayer:
    """Sizes of one `itera` layer; `experts` is 0 for a plain feed-forward."""

    d_inner: int
    d_state: int
    d_conv: int
    d_hidden: int
    experts: int = 0


@dataclass(frozen=True)
class IteraConfig:
    """A small SSM with feed-forward or expert layers (design, section 4); layers may differ in size.

    embedding_blocks: rows of each block that the token embedding is split into; empty where it is whole.
    """

    vocabulary: int
    d_model: int
    max_length: int
    layers: tuple[IteraLayer, ...]
    top_k: int = 2
    norm_eps: float = 1e-5
    tied: bool = True
    embedding_blocks: tuple[int, ...] = ()

    @property
    def family(self) -> str:
        return "itera"

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def norm(self) -> NormKind:
        return "layer"

    def parameters(self) -> tuple[Parameter, ...]:
        """Every tensor of the model, canonical names, in the order of the data flow."""
        return tuple(self._parameters())

    def _parameters(self) -> Iterator[Parameter]:
        d = self.d_model
        yield from _embedding(self.vocabulary, d, self.embedding_blocks)
        yield _weight("position_embedding", "position_embedding", None, self.max_length, d)
        for i, layer in enumerate(self.layers):
            yield from self._ssm(i, layer)
            yield from self._feed_forward(i, layer)
        yield from _norm("norm", "layer", None, d)
        if not self.tied:
            yield _weight("lm_head", "lm_head", None, self.vocabulary, d)

    def _ssm(self, i: int, layer: IteraLayer) -> Iterator[Parameter]:
        at, d, inner, n = f"layers.{i}.ssm", self.d_model, layer.d_inner, layer.d_state
        yield from _norm(f"{at}.norm", "layer", i, d)
        yield _weight(f"{at}.in_proj", "in_proj", i, 2 * inner, d)
        yield _weight(f"{at}.conv1d", "conv1d", i, inner, 1, layer.d_conv)
        yield _bias(f"{at}.conv1d", "conv1d", i, inner)
        yield _weight(f"{at}.ssm.delta_proj", "delta_proj", i, inner, inner)
        yield _bias(f"{at}.ssm.delta_proj", "delta_proj", i, inner)
        yield _value(f"{at}.ssm.A_log", i, n)
        yield _value(f"{at}.ssm.B", i, n, inner)
        yield _value(f"{at}.ssm.C", i, inner, n)
        yield _value(f"{at}.ssm.D", i, inner)
        yield _weight(f"{at}.out_proj", "out_proj", i, d, inner)

    def _feed_forward(self, i: int, layer: IteraLayer) -> Iterator[Parameter]:
        d, hidden = self.d_model, layer.d_hidden
        if not layer.experts:
            at = f"layers.{i}.moe"
            yield from _norm(f"{at}.norm", "layer", i, d)
            yield _weight(f"{at}.ffn.w1", "w1", i, hidden, d)
            yield _weight(f"{at}.ffn.w2", "w2", i, d, hidden)
            return
        at = f"layers.{i}.moe.layer"
        yield from _norm(f"{at}.norm", "layer", i, d)
        yield _weight(f"{at}.router.gate", "router", i, layer.experts, d)
        for e in range(layer.experts):
            yield _weight(f"{at}.experts.{e}.w1", "w1", i, hidden, d)
            yield _weight(f"{at}.experts.{e}.w2", "w2", i, d, hidden)

    def statistics(self) -> dict[str, tuple[int, ...]]:
        """Tensors that a checkpoint may hold but the forward pass does not use: name → shape."""
        return {
            f"layers.{i}.moe.layer.router.expert_counts": (layer.experts,)
            for i, layer in enumerate(self.layers)
            if layer.experts
        }


Config = MambaConfig | IteraConfig


def config_to_json(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, with its family."""
    return {"family": config.family, **asdict(config)}


def config_from_json(values: dict[str, Any]) -> Config:
    """Inverse of `config_to_json`; raises KeyError or TypeError on foreign input."""
    fields = dict(values)
    family = fields.pop("family")
    fields["embedding_blocks"] = tuple(fields.get("embedding_blocks", ()))
    if family == "mamba":
        return MambaConfig(**fields)
    if family == "itera":
        layers = tuple(IteraLayer(**layer) for layer in fields.pop("layers"))
        return IteraConfig(layers=layers, **fields)
    raise KeyError(f"unknown family {family!r}")
