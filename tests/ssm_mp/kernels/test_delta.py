"""Every way to compute the gated delta rule against its recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.kernels import calls, delta
from tests.ssm_mp.kernels.scan_cases import require_close

WAYS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": delta.delta_rule_reference,
    "chunks": delta.delta_rule_chunked,
    "kernel": calls.delta_rule,
    "chosen": delta.delta_rule,
}


@dataclass(frozen=True)
class Case:
    """decay: factor on random logs of decays; shift: added to what β is the sigmoid of; size: of keys and queries."""

    b: int = 2
    length: int = 20
    key_heads: int = 2
    ratio: int = 2
    keys: int = 8
    values: int = 12
    decay: float = 1.0
    shift: float = 0.0
    size: float = 1.0
    state: bool = False


CASES = {
    "one of everything": Case(b=1, length=1, key_heads=1, ratio=1, keys=1, values=1),
    "one token, from a state": Case(length=1, keys=16, values=16, state=True),
    "no multiple of anything, from a state": Case(b=3, length=67, key_heads=3, ratio=3, keys=19, values=37, state=True),
    "chunks without rest": Case(length=128, keys=16, values=32, state=True),
    "nothing is forgotten": Case(length=130, decay=0.0),
    "all is forgotten, and some is not": Case(length=70, decay=200.0, state=True),
    "decays of thousands": Case(length=70, decay=1e5, state=True),
    "β near 0": Case(shift=-30.0, state=True),
    "β near 1, nothing is forgotten": Case(length=70, shift=30.0, decay=0.0),
    "huge keys": Case(size=1e8),
    "vanishing keys": Case(size=1e-6, state=True),
    "keys of zeros": Case(size=0.0, state=True),
    "long": Case(b=1, length=1000, key_heads=1, ratio=1, keys=4, values=4, decay=0.01),
}


def inputs_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Queries, keys and values are parts of one wider tensor, as the convolution gives them."""
    g = torch.Generator().manual_seed(seed)
    heads, rows = case.key_heads * case.ratio, case.key_heads * case.keys
    mixed = torch.randn(case.b, case.length, 2 * rows + heads * case.values, generator=g)
    q, k, v = mixed.split((rows, rows, heads * case.values), dim=-1)
    if case.size != 1:
        q, k = q * case.size, k * case.size
    found = {
        "q": q.unflatten(-1, (case.key_heads, -1)),
        "k": k.unflatten(-1, (case.key_heads, -1)),
        "v": v.unflatten(-1, (heads, -1)),
        # cubed: there are weak ones beside strong ones
        "g": -(torch.rand(case.b, case.length, heads, generator=g) ** 3) * case.decay,
        "beta": torch.sigmoid(torch.randn(case.b, case.length, heads, generator=g) + case.shift),
    }
    if case.state:
        found["state"] = torch.randn(case.b, heads, case.keys, case.values, generator=g)
    return found


def truth_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """In float64, head by head, straight from the definition."""
    q, k, v, g, beta = (inputs[name].double() for name in ("q", "k", "v", "g", "beta"))
    b, length, heads, values = v.shape
    ratio, keys = heads // k.shape[2], k.shape[3]
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    last = inputs["state"].double().clone() if "state" in inputs else torch.zeros(b, heads, keys, values).double()
    y = torch.empty_like(v)
    for s in range(b):
        for h in range(heads):
            S = last[s, h].clone()
            for t in range(length):
                key, query = k[s, t, h // ratio], q[s, t, h // ratio]
                S = torch.exp(g[s, t, h]) * S
                S = S + torch.outer(key, beta[s, t, h] * (v[s, t, h] - S.T @ key))
                y[s, t, h] = S.T @ query / keys**0.5
            last[s, h] = S
    return y, last


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_it_agrees_with_float64(way: str, case: str) -> None:
    inputs = inputs_of(CASES[case])
    before = {name: value.clone() for name, value in inputs.items()}
    require_close(WAYS[way](**inputs), truth_of(inputs))
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was changed"


@given(
    st.builds(
        Case, b=st.integers(1, 3), length=st.integers(1, 90), key_heads=st.integers(1, 3), ratio=st.integers(1, 3),
        keys=st.integers(1, 40), values=st.integers(1, 40), decay=st.sampled_from([0.0, 0.1, 5.0, 300.0]),
        shift=st.sampled_from([-9.0, 0.0, 9.0]), state=st.booleans(),
    ),
    st.integers(0, 99),
)  # fmt: skip
def test_ways_agree_at_any_size(case: Case, seed: int) -> None:
    inputs = inputs_of(case, seed)
    expected = delta.delta_rule_reference(**{name: value.double() for name, value in inputs.items()})
    require_close(delta.delta_rule_chunked(**inputs), expected)
    require_close(calls.delta_rule(**inputs), expected)


@pytest.mark.parametrize("cut", [1, 7, 16, 64])
def test_two_parts_are_the_whole(cut: int) -> None:
    inputs = inputs_of(Case(length=67))
    y, last = delta.delta_rule(**inputs)
    first, state = delta.delta_rule(**{name: value[:, :cut] for name, value in inputs.items()})
    rest, end = delta.delta_rule(**{name: value[:, cut:] for name, value in inputs.items()}, state=state)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), y)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    inputs, before = inputs_of(Case(b=2, length=40, key_heads=2, values=40)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = calls.delta_rule(**inputs)
        torch.set_num_threads(threads)
        found = calls.delta_rule(**inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("way", ["reference", "chunks"])
@pytest.mark.parametrize("length", [3, 66])
def test_gradients_are_those_of_the_recurrence(way: str, length: int) -> None:
    inputs = {
        name: value.double() for name, value in inputs_of(Case(b=1, length=length, decay=20.0, state=True)).items()
    }
    inputs = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    weights = torch.randn(length, generator=torch.Generator().manual_seed(1)).double()

    def loss(function: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        y, last = function(**inputs)
        return (y.sum(dim=(0, 2, 3)) * weights).sum() + last.square().sum()

    found = torch.autograd.grad(loss(WAYS[way]), list(inputs.values()))
    expected = torch.autograd.grad(loss(lambda **held: truth_of(held)), list(inputs.values()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_what_needs_gradients_gets_them() -> None:
    inputs = inputs_of(Case(length=9))
    inputs["g"].requires_grad_()
    y, _ = delta.delta_rule(**inputs)
    (gradient,) = torch.autograd.grad(y.sum(), inputs["g"])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("token", [3, 4, 18])
def test_what_is_not_a_number_spoils_its_head_from_then_on(name: str, token: int) -> None:
    inputs = inputs_of(Case(length=20, ratio=1))
    inputs[name][1, token, 1] = torch.nan
    y, last = calls.delta_rule(**inputs)
    assert torch.isnan(y[1, token, 1]).all()
    assert torch.isnan(last[1, 1]).all() == (name != "q")
    assert torch.isfinite(y[0]).all()
    assert torch.isfinite(y[1, :, 0]).all()
    assert torch.isfinite(y[1, :token, 1]).all()


def test_keys_too_many_for_the_kernel_are_computed_all_the_same() -> None:
    inputs = inputs_of(Case(b=1, length=5, key_heads=1, ratio=1, keys=calls.MOST_KEYS + 1, values=2))
    require_close(delta.delta_rule(**inputs), truth_of(inputs))
