"""Key layouts: which family a file holds, its tensors under canonical names, and the config their shapes imply.

Dimensions as in `config.py`: `V` vocabulary, `T` positions, `d` model, `I` inner, `N` state, `R` step rank,
`K` convolution kernel, `E` feed-forward hidden, `X` experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ssm_mp.config import Config, IteraConfig, IteraLayer, MambaConfig
from ssm_mp.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before every name."""

_ALIASES = (
    (r"^backbone\.embeddings?\.", "embedding."),
    (r"^backbone\.norm_f\.", "norm."),
    (r"^backbone\.layers\.(\d+)\.norm\.", r"layers.\1.ssm.norm."),
    (r"^backbone\.layers\.(\d+)\.mixer\.", r"layers.\1.ssm."),
    (r"^embeddings\.token_embeddings\.", "embedding."),
    (r"^embeddings\.position_embeddings\.", "position_embedding."),
    (r"^norm_f\.", "norm."),
    (r"^(layers\.\d+\.moe)\.moe\.", r"\1.layer."),
)
"""Other names of the same tensors: pattern → canonical."""


@dataclass(frozen=True)
class Recognised:
    """Canonical names of a file's tensors. `names` maps canonical → the name in the file."""

    family: str
    layout: str
    names: dict[str, str]


def canonical_name(name: str) -> str:
    """The canonical name of a tensor under any known layout; an unknown name stays as it is."""
    stripped = True
    while stripped:
        stripped = False
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name, stripped = name[len(wrapper) :], True
    for pattern, replacement in _ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def recognise(names: Iterable[str]) -> Recognised:
    """Family and layout from the names alone. Raises CheckpointError where they fit no known family."""
    found = list(names)
    canonical: dict[str, str] = {}
    for name in found:
        other = canonical.setdefault(canonical_name(name), name)
        if other != name:
            raise CheckpointError(f"{other!r} and {name!r} are two names of one tensor; keep one of them")
    if any(re.match(r"layers\.\d+\.ssm\.(x_proj|dt_proj)\.", name) for name in canonical):
        return Recognised("mamba", _mamba_layout(found), canonical)
    if any(re.match(r"layers\.\d+\.ssm\.ssm\.", name) for name in canonical):
        return Recognised("itera", _itera_layout(found), canonical)
    shown = ", ".join(sorted(found)[:6]) or "none"
    raise CheckpointError(
        "these tensors are of no known family (expected 'mamba': …x_proj.weight, or 'itera': "
        f"layers.0.ssm.ssm.A_log); found {len(found)}: {shown}{', …' if len(found) > 6 else ''}"
    )


def _mamba_layout(names: list[str]) -> str:
    if any("backbone.embeddings." in name for name in names):
        return "huggingface"
    if any("backbone.embedding." in name for name in names):
        return "original"
    return "positions"


def _itera_layout(names: list[str]) -> str:
    differences = [
        label
        for label, mark in (
            ("token_embeddings", "embeddings.token_embeddings."),
            ("norm_f", "norm_f."),
            ("moe.moe", ".moe.moe."),
        )
        if any(mark in name for name in names)
    ]
    return "+".join(differences) or "canonical"


def infer_config(family: str, shapes: Shapes) -> Config:
    """The configuration that the shapes of canonical tensors imply.

    Each size is the one that most of the tensors that show it agree on, so that one misshapen tensor is
    reported as such, not believed. Raises CheckpointError where no tensor shows a size.
    """
    layers = {int(match[1]) for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}
    missing = sorted(set(range(max(layers, default=-1) + 1)) - layers)
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise CheckpointError(f"{len(missing)} layers are missing, though later ones are there: {shown}")
    if family == "mamba":
        return _infer_mamba(shapes, len(layers))
    return _infer_itera(shapes, len(layers))


def _size(shapes: Shapes, what: str, *sources: tuple[str, int]) -> int:
    """The size that most `sources` (regular expression of names, dimension) agree on."""
    votes: Counter[int] = Counter()
    for pattern, dimension in sources:
        for name, shape in shapes.items():
            if re.fullmatch(pattern, name) and len(shape) > dimension and shape[dimension]:
                votes[shape[dimension]] += 1
    if not votes:
        expected = " or ".join(re.sub(r"\\d\+", "…", pattern).replace("\\", "") for pattern, _ in sources)
        raise CheckpointError(f"no tensor shows the {what}; expected one of {expected}")
    return votes.most_common(1)[0][0]


def _infer_mamba(shapes: Shapes, n_layers: int) -> MambaConfig:
    at = r"layers\.\d+\.ssm\."
    state = _size(shapes, "state size N", (at + "A_log", 1))
    rank = _size(shapes, "step rank R", (at + r"dt_proj\.weight", 1))
    return MambaConfig(
        vocabulary=_size(shapes, "vocabulary V", (r"embedding\.weight", 0), (r"lm_head\.weight", 0)),
        d_model=_size(
            shapes, "width d",
            (r"embedding\.weight", 1), (at + r"norm\.weight", 0),
            (at + r"in_proj\.weight", 1), (at + r"out_proj\.weight", 0),
        ),
        d_inner=_size(
            shapes, "inner width I",
            (at + "D", 0), (at + "A_log", 0), (at + r"conv1d\.weight", 0), (at + r"out_proj\.weight", 1),
        ),
        d_state=state,
        dt_rank=rank,
        d_conv=_size(shapes, "convolution kernel K", (at + r"conv1d\.weight", 2)),
        n_layers=n_layers,
        max_length=shapes["position_embedding.weight"][0] if shapes.get("position_embedding.weight") else None,
        norm="layer" if any(re.fullmatch(r"(layers\.\d+\.ssm\.)?norm\.bias", name) for name in shapes) else "rms",
        projection_bias=any(re.fullmatch(at + r"(in|out)_proj\.bias", name) for name in shapes),
        conv_bias=any(re.fullmatch(at + r"conv1d\.bias", name) for name in shapes),
        tied="lm_head.weight" not in shapes,
    )  # fmt: skip


def _infer_itera(shapes: Shapes, n_layers: int) -> IteraConfig:
    return IteraConfig(
        vocabulary=_size(shapes, "vocabulary V", (r"embedding\.weight", 0), (r"lm_head\.weight", 0)),
        d_model=_size(
            shapes, "width d",
            (r"embedding\.weight", 1), (r"position_embedding\.weight", 1), (r"layers\.\d+\.ssm\.norm\.weight", 0),
            (r"layers\.\d+\.ssm\.in_proj\.weight", 1), (r"layers\.\d+\.ssm\.out_proj\.weight", 0),
        ),
        max_length=_size(shapes, "number of positions T", (r"position_embedding\.weight", 0)),
        layers=tuple(_infer_itera_layer(shapes, i) for i in range(n_layers)),
        tied="lm_head.weight" not in shapes,
    )  # fmt: skip


def _infer_itera_layer(shapes: Shapes, i: int) -> IteraLayer:
    ssm, moe = rf"layers\.{i}\.ssm\.", rf"layers\.{i}\.moe\."
    hidden = rf"{moe}(ffn|layer\.experts\.\d+)\."
    return IteraLayer(
        d_inner=_size(
            shapes, f"inner width I of layer {i}",
            (ssm + r"ssm\.D", 0), (ssm + r"conv1d\.weight", 0), (ssm + r"out_proj\.weight", 1),
            (ssm + r"ssm\.delta_proj\.weight", 0), (ssm + r"ssm\.B", 1),
        ),
        d_state=_size(
            shapes, f"state size N of layer {i}",
            (ssm + r"ssm\.A_log", 0), (ssm + r"ssm\.B", 0), (ssm + r"ssm\.C", 1),
        ),
        d_conv=_size(shapes, f"convolution kernel K of layer {i}", (ssm + r"conv1d\.weight", 2)),
        d_hidden=_size(
            shapes, f"hidden width E of layer {i}", (hidden + r"w1\.weight", 0), (hidden + r"w2\.weight", 1)
        ),
        experts=_experts(shapes, i),
    )  # fmt: skip


def _experts(shapes: Shapes, i: int) -> int:
    """Experts of layer `i`: as many as are numbered; the router's shape is then checked against it."""
    pattern = re.compile(rf"layers\.{i}\.moe\.layer\.experts\.(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    return max(numbers, default=-1) + 1
