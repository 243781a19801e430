"""Products of many rows with weights of every kind that the kernels know."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.kernels import matrices
from ssm_mp.modules.inputs import StaticInput
from ssm_mp.modules.linear import Linear, linear
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.matrix import FEW_ROWS, Matrix
from ssm_mp.precisions.stored import FloatTensor
from ssm_mp.scheme import ActivationScheme
from tests.ssm_mp.precisions.layers import KINDS, float16_linear, integer_linear, known, weight_of


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


@given(
    st.integers(FEW_ROWS + 1, 250), st.integers(1, 150), st.integers(1, 200), st.booleans(),
    st.sampled_from([1e-20, 1.0, 1e30]), st.integers(0, 99),
)  # fmt: skip
def test_products_with_float16_weights_are_as_exact_as_those_of_float32(
    m: int, n: int, k: int, bias: bool, size: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    layer = float16_linear(n, k, g, bias)
    x = torch.randn(m, k + 2, generator=g)[:, :k] * size
    weight = layer.weight.tensor().double()
    held = torch.zeros(n, dtype=torch.float64) if layer.bias is None else layer.bias.tensor().double()
    # what float32 may be off by: its rounding of each product and of the sums
    rounding = 2**-23 * (k**0.5 + 2) * (x.double().abs() @ weight.abs().t() + held.abs())
    lost = k * 20 * 2.0**-126  # what is below the smallest normal number counts as zero
    found = known(layer.matrix()).product(x).double()
    assert ((found - (x.double() @ weight.t() + held)).abs() <= rounding + lost).all()


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


@given(
    st.integers(FEW_ROWS + 1, 60), st.integers(1, 150), st.integers(1, 140), st.booleans(),
    st.sampled_from(["static", "dynamic"]), st.integers(0, 99),
)  # fmt: skip
def test_a_product_of_many_integers_equals_that_of_the_operators(
    m: int, n: int, k: int, bias: bool, scheme: ActivationScheme, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    layer = integer_linear(n, k, scheme, bias, g)
    x = torch.randn(m, k + 2, generator=g)[:, :k]
    expected = linear(x, layer.weight, layer.bias, layer.inputs)
    torch.testing.assert_close(known(layer.matrix()).product(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_laid_out_part_by_part_gives_what_its_parts_give(kind: str) -> None:
    n, k = 20000, 64  # more than is laid out at a time
    g = torch.Generator().manual_seed(0)
    weight, x = weight_of(kind, n, k, g), torch.randn(20, k, generator=g)
    whole = product(Linear(weight), x)
    for start in (0, 7 * 64, n - 100):
        part = product(Linear(FloatTensor(weight.tensor()[start : start + 100])), x)
        torch.testing.assert_close(whole[:, start : start + 100], part, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_not_finite_spoils_its_row_and_no_other(kind: str, value: float) -> None:
    layer = Linear(weight_of(kind, 70, 30, torch.Generator().manual_seed(0)))
    x = torch.randn(40, 30)
    x[11, 3] = value
    finite = torch.arange(40) != 11
    assert torch.equal(product(layer, x).isfinite().all(dim=1), finite)
    assert torch.equal(layer.projection().nll(x, torch.zeros(40, dtype=torch.int64), held=7).isfinite(), finite)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_a_quantised_input_that_is_not_finite_spoils_its_row_only(value: float, scheme: ActivationScheme) -> None:
    head = integer_linear(70, 30, scheme, False, torch.Generator().manual_seed(0))
    x = torch.randn(30, 30)
    x[11, 3] = value
    finite = torch.arange(30) != 11
    assert torch.equal(head(x).isfinite().all(dim=1), finite)
    assert torch.equal(head.projection().nll(x, torch.zeros(30, dtype=torch.int64), held=7).isfinite(), finite)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38])
def test_an_input_that_float16_products_cannot_hold_spoils_its_row_and_no_other(value: float) -> None:
    layer = float16_linear(70, 30, torch.Generator().manual_seed(0))
    layer.weight.value.data.fill_(2.0)  # type: ignore[operator]
    x = torch.randn(40, 30)
    x[11, 3] = value
    assert torch.equal(known(layer.matrix()).product(x).isfinite().all(dim=1), torch.arange(40) != 11)


def test_an_input_scale_that_is_replaced_is_the_one_that_counts() -> None:
    layer = integer_linear(40, 30, "static", False, torch.Generator().manual_seed(0))
    x = torch.randn(20, 30)
    layer(x)
    assert isinstance(layer.inputs, StaticInput)
    layer.inputs.scale.fill_(0.3)
    torch.testing.assert_close(layer(x), linear(x, layer.weight, None, layer.inputs))
    torch.testing.assert_close(layer(x[:2]), linear(x[:2], layer.weight, None, layer.inputs))


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


def test_products_of_many_quantised_inputs_do_not_depend_on_the_number_of_threads() -> None:
    head = integer_linear(300, 64, "dynamic", False, torch.Generator().manual_seed(0))
    x, targets, before, found = torch.randn(200, 64), torch.randint(300, (200,)), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((head(x), head.projection().nll(x, targets, held=7)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_gives_what_torch_gives(kind: str) -> None:
    layer = Linear(weight_of(kind, 300, 128, torch.Generator().manual_seed(0)))
    x = torch.randn(3, 8, 128)
    torch.testing.assert_close(layer(x), linear(x, layer.weight, None, None), rtol=1e-5, atol=1e-4)


def test_a_weight_is_not_laid_out_whole_where_that_takes_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_mp.precisions.matrix._MOST_PACKED", 0)
    matrix = Matrix.of(weight_of("int8", 70, 30, torch.Generator().manual_seed(0)), None, "dynamic")
    assert matrix is not None
    assert matrix.packed_bytes > 0
    assert matrix.laid_out() is None
