"""Attention as a compiled program, against its modules and against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ssm_mp.blocks.attention import Attention, AttentionMixing, attention_reference
from ssm_mp.blocks.rotary import LinearStretch, Llama3Stretch, Rotary, YarnStretch
from ssm_mp.kernels.attention import Attention as Structure
from ssm_mp.kernels.program import RESULT, STREAM, Calls
from ssm_mp.modules.norm import NormForm
from ssm_mp.programs.program import NotCompiledError, UnknownWeightError, Value
from tests.ssm_mp.blocks.compiling import (
    KNOWN,
    branch_of,
    compiled,
    require_no_change_by_threads,
    require_own_sequence_spoilt,
    require_steps_of_the_model,
    require_what_modules_give,
)

SMALL = Attention(d_model=24, n_heads=6, n_kv_heads=3, head_dim=10)
EVERYTHING = replace(
    SMALL, output_gate=True, qk_norm=NormForm(1e-6, one_plus=True), rotary=Rotary(8, 1e4), key_multiplier=0.7,
    qkv_bias=True, o_bias=True, scale=0.4,
)  # fmt: skip
BLOCKS: dict[str, Attention] = {
    "plain": SMALL,
    "one head of keys": replace(SMALL, n_heads=19, n_kv_heads=1, head_dim=7),
    "heads of their own": replace(SMALL, n_kv_heads=6, rotary=Rotary(10, 1e5)),
    "wide heads": replace(SMALL, n_heads=4, n_kv_heads=1, head_dim=80, rotary=Rotary(32, 1e4)),
    "biases": replace(SMALL, qkv_bias=True, o_bias=True),
    "norms": replace(SMALL, qk_norm=NormForm(1e-5), scale=0.3),
    "gate": replace(SMALL, output_gate=True),
    "everything": EVERYTHING,
    "linear": replace(SMALL, rotary=Rotary(6, 1e4, LinearStretch(3.0))),
    "llama3": replace(SMALL, rotary=Rotary(10, 1e4, Llama3Stretch(8.0, 1.0, 4.0, 64))),
    "yarn": replace(SMALL, rotary=Rotary(10, 1e4, YarnStretch(4.0, 256))),
}
SIZES = [(1, 1), (8, 1), (3, 2), (2, 37), (1, 330)]
"""Sequences and tokens: single ones, a few, blocks in part, several passes."""


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_it_gives_what_the_modules_give(block: str, many: bool) -> None:
    require_what_modules_give(BLOCKS[block], "fp16", SIZES, many=many)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("precision", KNOWN)
def test_it_gives_so_at_every_precision(precision: str, many: bool) -> None:
    require_what_modules_give(EVERYTHING, precision, SIZES[1:], many=many)


@pytest.mark.parametrize("length", [5, 64, 257, 700])
def test_threads_change_nothing(length: int) -> None:
    require_no_change_by_threads(compiled(branch_of(EVERYTHING)), 3, length, SMALL.d_model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [2, 6, 90])
@pytest.mark.parametrize("block", ["plain", "heads of their own", "everything"])
def test_a_token_that_is_not_finite_spoils_its_own_sequence_only(block: str, length: int, bad: float) -> None:
    require_own_sequence_spoilt(compiled(branch_of(BLOCKS[block])), length, SMALL.d_model, bad)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_of_it_decodes_in_compiled_calls(block: str, precision: str) -> None:
    require_steps_of_the_model(BLOCKS[block], precision)


def attended(q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, Tensor], scale: float, room: int) -> Tensor:
    """The call alone: `q [b, h, l, e]` of the tokens that `k` and `v [b, g, l, e]` are of, those before them held in
    arrays with room for `room` more: `[b, h, l, e]`. What is behind the last token is not finite."""
    (b, h, length, e), g = q.shape, k.shape[1]
    stream = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
    held = [torch.cat((x, torch.full((b, g, length + room, e), torch.nan)), dim=2) for x in before]
    width, values = stream.shape[2], (h * e, g * e, g * e)
    parts = [Value(STREAM, width, sum(values[:i]), values[i]).structure for i in range(3)]
    into = Value(RESULT, h * e, 0, h * e).structure
    calls, result = Calls(width), torch.empty(b, length, h * e)
    calls.append("attention", Structure(*parts, into, h, g, e, 0, 0, None, 1.0, scale, 0, 1), -1)
    calls.close(0, h * e)
    calls.run(stream, result, held, before[0].shape[2], held[0].shape[2], few=False)
    found: Tensor = result.unflatten(2, (h, e)).transpose(1, 2)
    return found


@pytest.mark.parametrize("width", [1, 4, 16, 31, 64, 128])
@pytest.mark.parametrize(("groups", "shared"), [(1, 1), (2, 1), (2, 2), (1, 3), (2, 4), (1, 5), (1, 20)])
@pytest.mark.parametrize(("length", "before"), [(1, 0), (1, 3), (1, 67), (1, 200), (2, 0), (21, 0), (70, 45), (5, 130)])
def test_it_is_the_definition(groups: int, shared: int, width: int, length: int, before: int) -> None:
    generator = torch.Generator().manual_seed(width + length)
    q = torch.randn(2, groups * shared, length, width, generator=generator)
    k, v = torch.randn(2, 2, groups, before + length, width, generator=generator)
    scale = 3.0 / width  # some scores are far from the others
    found = attended(q, k[:, :, before:], v[:, :, before:], (k[:, :, :before], v[:, :, :before]), scale, 3)
    torch.testing.assert_close(found, attention_reference(q, k, v, scale), rtol=1e-5, atol=1e-5)


def test_large_scores_are_no_infinities() -> None:
    q, k = torch.full((1, 1, 3, 16), 50.0), torch.full((1, 1, 70, 16), 50.0)
    k[0, 0, 40] *= 1.01
    v = torch.randn(1, 1, 70, 16)
    for length in (1, 3):
        before = 70 - length
        found = attended(
            q[:, :, :length], k[:, :, before:], v[:, :, before:], (k[:, :, :before], v[:, :, :before]), 1.0, 0
        )
        torch.testing.assert_close(found, v[:, :, 40:41].expand(1, 1, length, 16))


@pytest.mark.parametrize("position", [0, 5000, 131000])
def test_positions_far_away_are_turned_alike(position: int) -> None:
    rotary = Rotary(64, 1e6, YarnStretch(4.0, 32768))
    frequencies, louder = rotary.frequencies(torch.device("cpu"))
    frequencies = frequencies.contiguous()
    cosine, sine = rotary.waves(position, 3, torch.device("cpu"))
    stream = torch.zeros(1, 3, 64 * 3)
    stream[:, :, 64:96] = 1.0  # of keys that are first numbers of a pair only, the waves are left
    held = [torch.zeros(1, 1, position + 3, 64) for _ in range(2)]
    parts = [Value(STREAM, 192, 64 * i, 64).structure for i in range(3)]
    calls = Calls(192)
    what = Structure(
        *parts, Value(RESULT, 64, 0, 64).structure, 1, 1, 64, 32, 0, frequencies.data_ptr(), louder, 1.0, 0, 1
    )
    calls.append("attention", what, -1)
    calls.close(0, 64)
    calls.run(stream, torch.empty(1, 3, 64), held, position, position + 3, few=False)
    keys = held[0][0, 0, position:]
    torch.testing.assert_close(keys, torch.cat((cosine, sine), dim=1), rtol=0, atol=1e-6)


def test_what_it_does_not_take_is_said() -> None:
    with pytest.raises(UnknownWeightError, match="GroupedTensor"):
        compiled(branch_of(SMALL, "int6"))
    branch = branch_of(SMALL)
    (mixing,) = branch.mixings
    assert isinstance(mixing, AttentionMixing)
    mixing.scan = attention_reference
    with pytest.raises(NotCompiledError, match="another scan"):
        compiled(branch)
