"""The kernels' attention alone, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssm_mp.blocks.attention import attention_reference
from ssm_mp.blocks.rotary import Rotary, YarnStretch
from ssm_mp.kernels.attention import Attention
from ssm_mp.kernels.program import RESULT, STREAM, Calls
from ssm_mp.programs.program import Value


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
    calls.append("attention", Attention(*parts, into, h, g, e, 0, 0, None, 1.0, scale, 0, 1), -1)
    calls.close(0, h * e)
    calls.run(stream, result, held, before[0].shape[2], held[0].shape[2], few=False)
    found: Tensor = result.unflatten(2, (h, e)).transpose(1, 2)
    return found


@pytest.mark.parametrize(("groups", "shared"), [(1, 1), (2, 1), (2, 2), (1, 3), (2, 4), (1, 5), (1, 20)])
@pytest.mark.parametrize(("length", "before"), [(1, 0), (1, 3), (1, 67), (1, 200), (2, 0), (21, 0), (70, 45), (5, 130)])
def test_it_is_the_definition(groups: int, shared: int, length: int, before: int) -> None:
    for width in (1, 4, 16, 31, 64, 128):
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
    what = Attention(
        *parts, Value(RESULT, 64, 0, 64).structure, 1, 1, 64, 32, 0, frequencies.data_ptr(), louder, 1.0, 0, 1
    )
    calls.append("attention", what, -1)
    calls.close(0, 64)
    calls.run(stream, torch.empty(1, 3, 64), held, position, position + 3, few=False)
    keys = held[0][0, 0, position:]
    torch.testing.assert_close(keys, torch.cat((cosine, sine), dim=1), rtol=0, atol=1e-6)
