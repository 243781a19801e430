"""Products of many rows with weights of every kind that the kernels know, and likelihoods of heads of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.kernels import matrices
from ssm_mp.modules.inputs import StaticInput
from ssm_mp.modules.likelihood import token_nll
from ssm_mp.modules.linear import Linear, linear
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.matrix import Matrix
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import ScaleRule

KINDS = ("fp32", "fp16", "int8", "nf4", "nf4g32", "int4", "int4g128", "nf3", "int3", "nf3g128", "nf2", "nf2g128")


def weight_of(kind: str, n: int, k: int, g: torch.Generator) -> Stored:
    """A random weight, no part of it so small that its scale would be none."""
    values = torch.randn(n, k, generator=g)
    values = torch.where(values.abs() < 1e-3, 1e-3, values)
    return FloatTensor(values) if kind == "fp32" else PRECISIONS[kind].store(values, "weight", ScaleRule())


def product(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """Whatever is the fastest on this CPU: the product for many rows."""
    matrix = layer.matrix()
    assert matrix is not None
    assert matrix.takes_many
    return matrices.multiply_many(matrix.structure, x)


def rounding_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What float32 may be off by, of each product and of the sums, in float64."""
    sizes = x.double().abs() @ weight.double().abs().t()
    return sizes * (2**-23 * (math.sqrt(x.shape[1]) + 2))


@given(
    st.integers(1, 250), st.integers(1, 150), st.integers(1, 600), st.sampled_from(KINDS), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_products_with_stored_weights_are_as_exact_as_those_of_float32(
    m: int, n: int, k: int, kind: str, bias: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    layer = Linear(weight_of(kind, n, k, g), FloatTensor(torch.randn(n, generator=g)) if bias else None)
    x = torch.randn(m, k + 2, generator=g)[:, :k]
    weight = layer.weight.tensor()
    held = torch.zeros(n) if layer.bias is None else layer.bias.tensor()
    expected = x.double() @ weight.double().t() + held.double()
    assert ((product(layer, x) - expected).abs() <= rounding_of(x, weight) + 2**-23 * held.abs()).all()


@given(st.integers(1, 60), st.integers(1, 150), st.integers(1, 5000), st.booleans(), st.integers(0, 99))
def test_products_of_integers_are_exact(m: int, n: int, k: int, extreme: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, x = (torch.randint(-127, 128, (rows, k), generator=g) for rows in (n, m))
    if extreme:
        q, x = (torch.where(each < 0, -127, 127) for each in (q, x))
        q[0], x[0] = 127, -127
    one = torch.ones(1, dtype=torch.float16)
    layer = Linear(Int8Tensor(q.to(torch.int8), one.repeat(n)), None, StaticInput(one))
    assert torch.equal(product(layer, x.float()), (x @ q.t()).float())


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_laid_out_part_by_part_gives_what_its_parts_give(kind: str) -> None:
    n, k = 20000, 64  # more than is laid out at a time
    g = torch.Generator().manual_seed(0)
    weight, x = weight_of(kind, n, k, g), torch.randn(20, k, generator=g)
    whole = product(Linear(weight), x)
    for start in (0, 7 * 64, n - 100):
        part = product(Linear(FloatTensor(weight.tensor()[start : start + 100])), x)
        torch.testing.assert_close(whole[:, start : start + 100], part, rtol=1e-5, atol=1e-4)


@given(st.integers(1, 250), st.integers(1, 2500), st.integers(1, 70), st.sampled_from(KINDS), st.integers(0, 99))
def test_likelihoods_of_a_head_are_those_of_its_logits(m: int, n: int, k: int, kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    head = Linear(weight_of(kind, n, k, g))
    x, targets = torch.randn(m, k, generator=g), torch.randint(n, (m,), generator=g)
    logits = x.double() @ head.weight.tensor().double().t()
    found = head.projection().nll(x, targets, held=7)
    torch.testing.assert_close(found, token_nll(logits, targets), rtol=1e-5, atol=1e-5 + 1e-6 * k)


@given(
    st.integers(1, 100), st.integers(1, 1200), st.integers(1, 70), st.sampled_from(KINDS), st.sampled_from(KINDS),
    st.integers(0, 99),
)  # fmt: skip
def test_divergences_of_two_heads_are_those_of_their_logits(
    m: int, n: int, k: int, ours: str, theirs: str, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    heads = [Linear(weight_of(kind, n, k, g)) for kind in (ours, theirs)]
    inputs = [torch.randn(m, k, generator=g) for _ in heads]
    logits = [of.double() @ head.weight.tensor().double().t() for of, head in zip(inputs, heads, strict=True)]
    q, p = (each.log_softmax(-1) for each in logits)
    targets, head = torch.randint(n, (m,), generator=g), heads[0].projection()
    nll, found = head.divergence(inputs[0], targets, heads[1].projection(), inputs[1], held=7)
    assert torch.equal(nll, head.nll(inputs[0], targets, held=7))
    rounding = 2e-6 * max(1.0, *(float(each.abs().max()) for each in logits))  # float32's, of numbers as large
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=2 * rounding)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_not_finite_spoils_its_row_and_no_other(kind: str, value: float) -> None:
    layer = Linear(weight_of(kind, 70, 30, torch.Generator().manual_seed(0)))
    x = torch.randn(40, 30)
    x[11, 3] = value
    finite = torch.arange(40) != 11
    assert torch.equal(product(layer, x).isfinite().all(dim=1), finite)
    assert torch.equal(layer.projection().nll(x, torch.zeros(40, dtype=torch.int64), held=7).isfinite(), finite)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_weight_that_is_not_finite_spoils_all_likelihoods(kind: str) -> None:
    weight = weight_of(kind, 70, 32, torch.Generator().manual_seed(0))
    for array in weight.arrays().values():
        if array.is_floating_point():
            array.view(-1)[0] = torch.inf
    nll = Linear(weight).projection().nll(torch.randn(20, 32), torch.zeros(20, dtype=torch.int64), held=7)
    assert not nll.isfinite().any()


def test_products_of_many_do_not_depend_on_the_number_of_threads() -> None:
    g, before, found = torch.Generator().manual_seed(0), torch.get_num_threads(), []
    layers = [Linear(weight_of(kind, 300, 64, g)) for kind in KINDS]
    x, targets = torch.randn(200, 64, generator=g), torch.randint(300, (200,), generator=g)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([(product(one, x), one.projection().nll(x, targets, held=7)) for one in layers])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one[0], three[0])
        assert torch.equal(one[1], three[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_gives_what_torch_gives(kind: str) -> None:
    layer = Linear(weight_of(kind, 300, 128, torch.Generator().manual_seed(0)))
    x = torch.randn(3, 8, 128)
    torch.testing.assert_close(layer(x), linear(x, layer.weight, None, None), rtol=1e-5, atol=1e-4)


def test_a_head_that_is_trained_is_left_to_torch() -> None:
    weight = FloatTensor(torch.randn(70, 30))
    assert Linear(weight).projection().head is not None
    weight.value.requires_grad_()
    assert Linear(weight).projection().head is None


def test_a_weight_is_not_laid_out_whole_where_that_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_mp.precisions.matrix._MOST_PACKED", 0)
    matrix = Matrix.of(weight_of("int8", 70, 30, torch.Generator().manual_seed(0)), None, "dynamic")
    assert matrix is not None
    assert matrix.packed_bytes > 0
    assert matrix.laid_out() is None
