"""Key layouts: which family a file holds, its tensors under canonical names, and the config their shapes imply.

Dimensions as in `config.py`: `V` vocabulary, `T` positions, `d` model, `I` inner, `N` state, `R` step rank,
`K` convolution kernel, `E` feed-forward hidden, `X` experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, islice

from ssm_mp.config import Config, IteraConfig, IteraLayer, MambaConfig
from ssm_mp.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

_ALIASES = (
    (r"^(?:backbone\.)?embeddings?\.weight$", "embedding.weight"),
    (r"^embeddings\.token_embeddings\.", "embedding."),
    (r"^embeddings\.position_embeddings\.", "position_embedding."),
    (r"^(?:backbone\.)?norm_f\.", "norm."),
    (r"^(?:backbone\.)?layers\.([0-9]+)\.norm\.", r"layers.\1.ssm.norm."),
    (r"^(?:backbone\.)?layers\.([0-9]+)\.mixer\.", r"layers.\1.ssm."),
    (r"^(layers\.[0-9]+\.moe)\.moe\.", r"\1.layer."),
)
"""Other names of the same tensors: pattern → canonical."""

MARK = r"(?:backbone\.)?layers\.[0-9]+\.(?:(?:mixer|ssm)\.(?:x_proj|dt_proj)|ssm\.ssm)\."
"""Part of a name that only a tensor of a known family has."""

FAMILIES = "'mamba': layers.0.mixer.x_proj.weight, or 'itera': layers.0.ssm.ssm.A_log"
"""What the marks look like, for messages."""

_INDEX = r"(0|[1-9][0-9]{0,8})"
"""A layer's or an expert's number as a file writes it; a longer one numbers nothing that fits in a file."""


@dataclass(frozen=True)
class Recognised:
    """Canonical names of a file's tensors. `names` maps canonical → the name in the file."""

    family: str
    layout: str
    names: dict[str, str]


def canonical_name(name: str) -> str:
    """The canonical name of a tensor under any known layout; an unknown name stays as it is."""
    for pattern, replacement in _ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def recognise(names: Iterable[str]) -> Recognised:
    """Family and layout from the names alone, without what wraps them (`checkpoints/wrappers.py`).

    Raises CheckpointError where they fit no known family or name one tensor twice.
    """
    found = list(names)
    canonical: dict[str, str] = {}
    for name in found:
        other = canonical.setdefault(canonical_name(name), name)
        if other != name:
            raise CheckpointError(f"{other!r} and {name!r} are two names of one tensor; keep one of them")
    if any(re.match(r"layers\.[0-9]+\.ssm\.(x_proj|dt_proj)\.", name) for name in canonical):
        return Recognised("mamba", _mamba_layout(found), canonical)
    if any(re.match(r"layers\.[0-9]+\.ssm\.ssm\.", name) for name in canonical):
        return Recognised("itera", _itera_layout(found), canonical)
    raise CheckpointError(f"these tensors are of no known family (expected {FAMILIES})")


def _mamba_layout(names: list[str]) -> str:
    if not any(re.match(r"(backbone\.)?layers\.[0-9]+\.mixer\.", name) for name in names):
        return "positions"
    return "original" if any(re.match(r"(backbone\.)?embedding\.", name) for name in names) else "huggingface"


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
    n_layers = _count(shapes, rf"layers\.{_INDEX}\.", "layer", "layers")
    if family == "mamba":
        return _infer_mamba(shapes, n_layers)
    return _infer_itera(shapes, n_layers)


def _count(shapes: Shapes, pattern: str, one: str, many: str) -> int:
    """How many things `pattern` numbers from 0, so no more than there are tensors.

    Raises CheckpointError where numbers between them are missing; `one` and `many` say what is numbered.
    """
    numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    last = max(numbers, default=-1)
    missing = last + 1 - len(numbers)
    if missing:
        first = list(islice((number for number in count() if number not in numbers), min(5, missing)))
        shown = ", ".join(map(str, first)) + (", …" if missing > 5 else "")
        are = f"{many} are" if missing > 1 else f"{one} is"
        raise CheckpointError(f"{missing} {are} missing, though number {last} is there: {shown}")
    return last + 1


def _size(shapes: Shapes, what: str, *sources: tuple[str, int]) -> int:
    """The size that most `sources` (regular expression of names, dimension) agree on."""
    votes: Counter[int] = Counter()
    for pattern, dimension in sources:
        for name, shape in shapes.items():
            if re.fullmatch(pattern, name) and len(shape) > dimension and shape[dimension]:
                votes[shape[dimension]] += 1
    if not votes:
        expected = " or ".join(re.sub(r"\[0-9\]\+", "…", pattern).replace("\\", "") for pattern, _ in sources)
        raise CheckpointError(f"no tensor shows the {what}; expected one of {expected}")
    return votes.most_common(1)[0][0]


def _infer_mamba(shapes: Shapes, n_layers: int) -> MambaConfig:
    at = r"layers\.[0-9]+\.ssm\."
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
        norm="layer" if any(re.fullmatch(r"(layers\.[0-9]+\.ssm\.)?norm\.bias", name) for name in shapes) else "rms",
        projection_bias=any(re.fullmatch(at + r"(in|out)_proj\.bias", name) for name in shapes),
        conv_bias=any(re.fullmatch(at + r"conv1d\.bias", name) for name in shapes),
        tied="lm_head.weight" not in shapes,
    )  # fmt: skip


def _infer_itera(shapes: Shapes, n_layers: int) -> IteraConfig:
    held: list[dict[str, tuple[int, ...]]] = [{} for _ in range(n_layers)]
    for name, shape in shapes.items():
        if match := re.match(rf"layers\.{_INDEX}\.", name):
            held[int(match[1])][name[match.end() :]] = shape
    return IteraConfig(
        vocabulary=_size(shapes, "vocabulary V", (r"embedding\.weight", 0), (r"lm_head\.weight", 0)),
        d_model=_size(
            shapes, "width d",
            (r"embedding\.weight", 1), (r"position_embedding\.weight", 1), (r"layers\.[0-9]+\.ssm\.norm\.weight", 0),
            (r"layers\.[0-9]+\.ssm\.in_proj\.weight", 1), (r"layers\.[0-9]+\.ssm\.out_proj\.weight", 0),
        ),
        max_length=_size(shapes, "number of positions T", (r"position_embedding\.weight", 0)),
        layers=tuple(_infer_itera_layer(layer, i) for i, layer in enumerate(held)),
        tied="lm_head.weight" not in shapes,
    )  # fmt: skip


def _infer_itera_layer(shapes: Shapes, i: int) -> IteraLayer:
    """Sizes of layer `i` from its own shapes, whose names are those within the layer."""
    hidden = r"moe\.(ffn|layer\.experts\.[0-9]+)\."
    return IteraLayer(
        d_inner=_size(
            shapes, f"inner width I of layer {i}",
            (r"ssm\.ssm\.D", 0), (r"ssm\.conv1d\.weight", 0), (r"ssm\.out_proj\.weight", 1),
            (r"ssm\.ssm\.delta_proj\.weight", 0), (r"ssm\.ssm\.B", 1),
        ),
        d_state=_size(
            shapes, f"state size N of layer {i}",
            (r"ssm\.ssm\.A_log", 0), (r"ssm\.ssm\.B", 0), (r"ssm\.ssm\.C", 1),
        ),
        d_conv=_size(shapes, f"convolution kernel K of layer {i}", (r"ssm\.conv1d\.weight", 2)),
        d_hidden=_size(
            shapes, f"hidden width E of layer {i}", (hidden + r"w1\.weight", 0), (hidden + r"w2\.weight", 1)
        ),
        experts=_count(shapes, rf"moe\.layer\.experts\.{_INDEX}\.", f"expert of layer {i}", f"experts of layer {i}"),
    )  # fmt: skip
