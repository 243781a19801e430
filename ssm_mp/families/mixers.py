"""Blocks as the configs of several families describe them: Mamba-1 and Mamba-2 mixers, and attention.

Dimensions: `d` model, `I` inner, `H` heads, `P` channels of a head, `N` state, `R` step rank, `G` groups, `W` convolved
channels (I + 2·G·N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.blocks.rotary import LinearStretch, Llama3Stretch, Rotary, Stretch, YarnStretch
from ssm_mp.errors import CheckpointError
from ssm_mp.families.said import Said
from ssm_mp.files.shown import shown
from ssm_mp.modules.norm import NormForm

LAYER = r"layers\.[0-9]+\."
MARKS = {"mamba": r"mamba\.", "attention": r"self_attn\."}
WORDS = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}
"""Kinds of layers of Granite and Bamba: by the tensors in them, and by what configs old and new call them."""


@dataclass(frozen=True)
class Mamba1Keys:
    """What a family's config calls the sizes of its Mamba-1 mixers."""

    state: str
    rank: str
    expand: str
    conv: str
    conv_bias: str
    projection_bias: str


def mamba1_block(said: Said, keys: Mamba1Keys, at: str, d_model: int, inner_key: str | None = None) -> Mamba1:
    """The Mamba-1 mixers at `layers.i.<at>`, without inner norms.

    inner_key: as `key` in `require_inner`.
    Raises CheckpointError where shapes and config contradict each other.
    """
    inside = rf"{LAYER}{at}\."
    inner = inner_width(said, inside)
    require_inner(said, inner_key, keys.expand, d_model, inner)
    return Mamba1(
        d_model=d_model,
        d_inner=inner,
        d_state=said.size(keys.state, said.shown(inside + "A_log", 1)),
        dt_rank=said.size(keys.rank, said.shown(inside + r"dt_proj\.weight", 1), automatic=math.ceil(d_model / 16)),
        d_conv=said.size(keys.conv, said.shown(inside + r"conv1d\.weight", 2)),
        projection_bias=biased(said, keys.projection_bias, False, inside + "(?:in|out)_proj"),
        conv_bias=biased(said, keys.conv_bias, True, inside + "conv1d"),
    )


def inner_width(said: Said, inside: str) -> int:
    """`I` of the mixers whose tensors' names begin so. Raises CheckpointError where nothing shows it."""
    inner = said.shown(inside + r"out_proj\.weight", 1)
    if inner is None:
        where = inside.replace("[0-9]+", "…").replace("\\", "")
        raise CheckpointError(f"no tensor shows the inner width of the mixers; expected {where}out_proj.weight")
    return inner


def require_inner(said: Said, key: str | None, expand: str, d_model: int, inner: int) -> None:
    """Raise CheckpointError where a config says another `I` than the tensors: under `key`, else by what multiplies `d`.

    Where the config has `key`, the other is not read: of the hub's Falcon-Mamba it is wrong.
    """
    if key is not None and said.count(key) is not None:
        said.size(key, inner)
        return
    factor = said.number(expand, 0.0)
    shows = f"{inner / d_model:g}, as the tensors show an inner width of {inner}"
    said.require(not factor or int(factor * d_model) == inner, expand, shows, factor)


@dataclass(frozen=True)
class Mamba2Keys:
    """What a family's config calls the sizes of its Mamba-2 mixers; out_bias: by default as `projection_bias`."""

    heads: str
    head_dim: str
    state: str
    groups: str
    conv: str
    conv_bias: str
    projection_bias: str
    out_bias: str | None = None


MAMBA_KEYS = Mamba2Keys(
    "mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv", "mamba_conv_bias",
    "mamba_proj_bias",
)  # fmt: skip
"""Of Bamba, Granite 4.0 H and Falcon-H1."""


def mamba2_block(said: Said, keys: Mamba2Keys, at: str, d_model: int, eps: float, groups: int | None = None) -> Mamba2:
    """The Mamba-2 mixers at `layers.i.<at>`; gate first, then a norm in groups; steps limited as a config may say.

    groups: by default where nothing is said of them.
    Raises CheckpointError where shapes and config contradict each other, or nobody tells the groups.
    """
    inside = rf"{LAYER}{at}\."
    heads = said.size(keys.heads, said.shown(inside + "A_log", 0))
    inner = inner_width(said, inside)
    said.require(inner % heads == 0, keys.heads, f"a divisor of {inner}, the inner width", heads)
    channels = said.shown(inside + r"conv1d\.weight", 0)
    both = None if channels is None else (channels - inner) // 2  # G · N
    found_groups = said.size(keys.groups, default=groups)
    if both is not None:
        expected = f"a divisor of {both}, half of the {channels} convolved channels beyond {inner}"
        said.require(both % found_groups == 0, keys.groups, expected, found_groups)
    said.require(heads % found_groups == 0, keys.groups, f"a divisor of the {heads} heads", found_groups)
    state = said.count(keys.state)
    if both is not None and state is not None and state * found_groups != both:
        expected = f"numbers that make {both}, as the {channels} convolved channels beyond {inner} show"
        raise said.stored.wrong(f"{keys.groups} · {keys.state}", expected, f"{found_groups} · {state}")
    low, high = said.numbers("time_step_limit", 2, (0.0, math.inf))
    return Mamba2(
        d_model=d_model,
        d_inner=inner,
        n_heads=heads,
        head_dim=said.size(keys.head_dim, inner // heads, automatic=inner // heads),
        d_state=said.size(keys.state, None if both is None else both // found_groups),
        n_groups=found_groups,
        d_conv=said.size(keys.conv, said.shown(inside + r"conv1d\.weight", 2)),
        projection_bias=biased(said, keys.projection_bias, False, inside + "in_proj"),
        conv_bias=biased(said, keys.conv_bias, True, inside + "conv1d"),
        out_bias=biased(said, keys.out_bias or keys.projection_bias, False, inside + "out_proj"),
        dt_limits=(low, None if math.isinf(high) else high),
        norm_form=NormForm(eps),
        norm_groups=found_groups,
    )


def has_bias(said: Said, pattern: str) -> bool:
    """Whether the file holds a bias of such a component."""
    return said.shown(pattern + r"\.bias", 0) is not None


def biased(said: Said, key: str, default: bool, pattern: str) -> bool:
    """Whether such components have a bias: what the config says, else what the file shows or is usual.

    Raises CheckpointError where the config denies a bias that the file holds.
    """
    held = has_bias(said, pattern)
    stated = said.flag(key, default or held)
    said.require(stated or not held, key, "true, as the file holds such a bias", stated)
    return stated


def attention_block(said: Said, at: str, d_model: int, rotary: Rotary | None, head_dim: int | None = None) -> Attention:
    """The attention at `layers.i.<at>`: heads from the config, widths held against the shapes.

    head_dim: by default what the config says, else d / heads. Raises CheckpointError where they do not fit.
    """
    inside = rf"{LAYER}{at}\."
    heads = said.size("num_attention_heads")
    kv_heads = said.size("num_key_value_heads", default=heads)
    keys = said.shown(inside + r"k_proj\.weight", 0)
    # in Nemotron-H, out_proj is of the Mamba-2 mixers, which stand under the same name
    inner = said.shown(inside + r"o_proj\.weight", 1) or said.shown(inside + r"out_proj\.weight", 1)
    width = _width(said, (heads, kv_heads), keys, inner, head_dim) or d_model // heads
    said.require(heads % kv_heads == 0, "num_key_value_heads", f"a divisor of the {heads} heads", kv_heads)
    with_bias = said.flag("attention_bias", False)
    return Attention(
        d_model=d_model, n_heads=heads, n_kv_heads=kv_heads, head_dim=width, rotary=rotary,
        qkv_bias=with_bias or has_bias(said, inside + "q_proj"), o_bias=with_bias or has_bias(said, inside + "o_proj"),
    )  # fmt: skip


def _width(
    said: Said, both_heads: tuple[int, int], keys: int | None, inner: int | None, known: int | None
) -> int | None:
    """Dimensions of a head, by the rows of k_proj and the inputs of o_proj; None where neither shapes nor config tell.

    both_heads: of queries and of keys. known: what else shows it. Raises CheckpointError for the key that does not fit.
    """
    heads, kv_heads = both_heads
    stated = known or said.count("head_dim")
    if keys is None or inner is None:
        return stated
    if inner % heads == 0 and inner // heads * kv_heads == keys and known in (None, inner // heads):
        return known or said.size("head_dim", inner // heads)
    if said.count("num_key_value_heads") is None:
        raise said.missing("num_key_value_heads", "a whole number above 0")
    made = f"the {inner} inputs of o_proj and the {keys} rows of k_proj"
    if stated is None:
        both = "num_attention_heads, num_key_value_heads"
        raise said.stored.wrong(both, f"heads that make {made}", f"{heads}, {kv_heads}")
    said.require(heads * stated == inner, "num_attention_heads", f"heads of {stated} that make {made}", heads)
    raise said.stored.wrong("num_key_value_heads", f"heads of {stated} that make {made}", kv_heads)


def head_width(said: Said, d_model: int) -> int:
    """Dimensions of an attention head: what the config says, else d / heads."""
    return said.count("head_dim") or d_model // said.size("num_attention_heads")


def refuse_windows(said: Said) -> None:
    """Raise CheckpointError where a config asks for attention within a sliding window, which is not computed here."""
    if said.flag("use_sliding_window", True):
        said.refuse("sliding_window", "attention within a sliding window is not computed")
    if said.stored.flag("use_sliding_window"):
        said.refuse("use_sliding_window", "attention within a sliding window is not computed")


def require_indices(said: Said, key: str, held: Sequence[int]) -> None:
    """Raise CheckpointError where a config lists other layers than the tensors show, `held`, in whatever order."""
    value = said.stored.values.get(key)
    if value is not None and (not isinstance(value, list | tuple) or set(map(repr, value)) != set(map(repr, held))):
        raise said.stored.wrong(key, f"{list(held)}, as the tensors show", value)


def rotary_of(said: Said, head_dim: int, share: float = 1.0, theta: float = 10000.0) -> Rotary:
    """Rotary positions as a config of transformers 5 (`rope_parameters`) or before (`rope_theta`, `rope_scaling`) says.

    share: of the head's dimensions that are turned, where nothing is said. Raises CheckpointError for another kind.
    """
    section = {**said.section("rope_scaling"), **said.section("rope_parameters")}
    turned = section.get("partial_rotary_factor") or said.number("partial_rotary_factor", share)
    base = section.get("rope_theta") or said.number("rope_theta", theta)
    if not isinstance(base, int | float) or not isinstance(turned, int | float):
        raise said.stored.wrong("rope_parameters", "numbers for rope_theta and partial_rotary_factor", shown(section))
    kind = section.get("rope_type", section.get("type", "default"))
    return Rotary(int(head_dim * turned), float(base), _stretch(said, kind, section))


def _stretch(said: Said, kind: object, section: dict[str, object]) -> Stretch | None:
    def number(key: str, default: float | None = None) -> float:
        value = section.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise said.stored.wrong(f"rope_parameters.{key}", "a number", value)
        return float(value)

    match kind:
        case "default":
            return None
        case "linear":
            return LinearStretch(number("factor"))
        case "llama3":
            return Llama3Stretch(
                number("factor"), number("low_freq_factor"), number("high_freq_factor"),
                int(number("original_max_position_embeddings")),
            )  # fmt: skip
        case "yarn" if not {"mscale", "mscale_all_dim"} & section.keys():
            attention = section.get("attention_factor")
            original = said.count("max_position_embeddings") or 0
            return YarnStretch(
                number("factor"), int(number("original_max_position_embeddings", original)), number("beta_fast", 32),
                number("beta_slow", 1), None if attention is None else number("attention_factor"),
                section.get("truncate", True) is not False,
            )  # fmt: skip
    raise said.stored.wrong("rope_parameters.rope_type", "'default', 'linear', 'llama3' or 'yarn'", kind)
