"""Products of few rows with a weight as it is stored, against those of the unpacked weight."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.modules.convolution import DepthwiseConv
from ssm_mp.modules.embedding import Embedding
from ssm_mp.modules.inputs import DynamicInput, InputQuantizer, StaticInput
from ssm_mp.modules.linear import Linear, linear
from ssm_mp.precisions.grouped import GroupedTensor
from ssm_mp.precisions.matrix import FEW_ROWS, Matrix
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import ActivationScheme, ScaleRule
from tests.ssm_mp.precisions.layers import known, weight_of

KNOWN = ("fp16", "int8", "nf4", "int4", "int3", "nf4g32", "int4g128", "nf3", "int3g32", "nf3g128", "nf2", "nf2g128")
"""Precisions that the kernels read as they are stored."""
GROUPED = (*(name for name in KNOWN if name not in ("fp16", "int8")), "nf4g128", "int4g32", "nf3g32", "nf2g32")


@given(
    st.integers(1, FEW_ROWS), st.integers(1, 9), st.integers(1, 300), st.sampled_from(KNOWN),
    st.booleans(), st.sampled_from(["none", "static", "dynamic"]), st.integers(0, 99),
)  # fmt: skip
def test_a_product_equals_that_of_the_unpacked_weight(
    m: int, n: int, k: int, precision: str, bias: bool, scheme: ActivationScheme, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = weight_of(precision, n, k, g)
    held = FloatTensor(torch.randn(n, generator=g).half()) if bias else None
    inputs: InputQuantizer | None = None
    if PRECISIONS[precision].quantizes_inputs and scheme != "none":
        inputs = DynamicInput() if scheme == "dynamic" else StaticInput(torch.tensor([0.02], dtype=torch.float16))
    x = torch.randn(m, k + 2, generator=g)[:, :k]
    found = known(Linear(weight, held, inputs).matrix()).product(x)
    if isinstance(weight, GroupedTensor):
        assert_within_fixed_point(found, x, weight, held)
    else:
        expected = linear(x, weight, held, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


@given(
    st.integers(1, FEW_ROWS), st.integers(1, 40), st.integers(1, 12), st.sampled_from(GROUPED), st.booleans(),
    st.sampled_from([1e-42, 1e-30, 1.0, 1e30]), st.integers(0, 99),
)  # fmt: skip
def test_a_product_of_codes_in_whole_units_is_within_the_tolerance_said(
    m: int, n: int, units: int, precision: str, bias: bool, size: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = weight_of(precision, n, 64 * units, g)
    assert isinstance(weight, GroupedTensor)
    weight.scale[torch.rand(weight.scale.shape, generator=g) < 0.1] = 0.0
    held = FloatTensor(torch.randn(n, generator=g).half()) if bias else None
    x = torch.randn(m, 64 * units, generator=g) * 10 ** torch.randint(-6, 1, (m, 64 * units), generator=g) * size
    assert_within_fixed_point(known(Matrix.of(weight, held)).product(x), x, weight, held)


@pytest.mark.parametrize("precision", GROUPED)
def test_products_of_codes_are_as_near_as_any_model_needs(precision: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight = weight_of(precision, 300, 1536, g)
    x = torch.randn(8, 1536, generator=g)
    values = weight.tensor().double()
    error = (known(Matrix.of(weight)).product(x) - x.double() @ values.t()).abs()
    assert (error / (x.double().abs() @ values.abs().t())).max() < 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [70, 128])
@pytest.mark.parametrize("precision", ["fp16", "int8", *GROUPED])
def test_an_input_that_is_not_finite_spoils_the_products_of_its_row(precision: str, k: int, value: float) -> None:
    g = torch.Generator().manual_seed(0)
    weight = weight_of(precision, 9, k, g)
    for inputs in ("none", "dynamic", "static")[: 3 if precision == "int8" else 1]:
        matrix = known(Matrix.of(weight, None, inputs, 0.02))  # type: ignore[arg-type]
        for m in (1, 6):
            for at in range(0, k, 7):
                x = torch.randn(m, k, generator=g)
                x[m // 2, at] = value
                found = matrix.product(x)
                assert not found[m // 2].isfinite().any()
                assert found[torch.arange(m) != m // 2].isfinite().all()


@pytest.mark.parametrize("precision", ["nf4", "int4g32", "nf3", "int3g32", "nf2", "nf2g32"])
def test_inputs_give_the_same_together_as_alone(precision: str) -> None:
    g = torch.Generator().manual_seed(0)
    matrix = known(Matrix.of(weight_of(precision, 50, 192, g)))
    x = torch.randn(FEW_ROWS, 192, generator=g)
    alone = torch.cat([matrix.product(row[None]) for row in x])
    for m in range(1, FEW_ROWS + 1):
        torch.testing.assert_close(matrix.product(x[:m]), alone[:m], rtol=1e-5, atol=1e-5)


def test_products_of_few_do_not_depend_on_the_number_of_threads() -> None:
    g, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x = torch.randn(3, 256, generator=g)
    for precision in ("fp16", "int8", "nf4", "nf3"):
        weight = weight_of(precision, 1100, 256, g)
        matrix, found = known(Matrix.of(weight)), []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append(matrix.product(x))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*found)


def assert_within_fixed_point(found: torch.Tensor, x: torch.Tensor, weight: GroupedTensor, bias: Stored | None) -> None:
    """That products are as `matrix.h` says: each input may be off by 1/32000 of the largest of the 32 around it, each
    level by as much of the largest level; and some roundings of float32."""
    n, k = weight.shape
    values, inputs = weight.tensor().double(), x.double()
    expected = inputs @ values.t() + (0 if bias is None else bias.tensor().double())
    around = torch.nn.functional.pad(inputs, (0, -k % 32)).view(len(x), -1, 32).abs().amax(-1)
    around = around.repeat_interleave(32, dim=1)[:, :k]
    scales = weight.scale.double().abs().repeat_interleave(weight.group)[: n * k].view(n, k)
    highest = scales * max(map(abs, weight.book.values))
    bound = (around @ values.abs().t() + inputs.abs() @ highest.t()) / 32000
    bound += 1e-6 * (inputs.abs() @ values.abs().t() + expected.abs()) + 1e-37 * k * highest.max()
    assert ((found.double() - expected).abs() <= bound).all()


@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from(KNOWN), st.integers(0, 99))
def test_an_unpacked_weight_has_the_very_numbers_that_it_stands_for(n: int, k: int, precision: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=g) * 1e-3
    values[:, 0] = 1e-3  # no row so small that its scale is none
    weight = PRECISIONS[precision].store(values, "weight", ScaleRule())
    assert torch.equal(known(Matrix.of(weight)).unpacked(), weight.tensor())


def test_a_float32_product_equals_torch() -> None:
    weight, x = torch.randn(7, 133), torch.randn(2, 133)
    for inputs in ("none", "static"):  # which are quantised for int8 only
        found = known(Matrix.of(FloatTensor(weight), None, inputs, 0.02)).product(x)
        torch.testing.assert_close(found, x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_modules_give_the_same_with_few_rows_as_with_many(precision: str, rows: int) -> None:
    weight, x = PRECISIONS[precision].store(torch.randn(30, 70), "weight", ScaleRule()), torch.randn(2 * FEW_ROWS, 70)
    for multiply in (Linear(weight), Embedding(weight).project):
        torch.testing.assert_close(multiply(x[None, :rows])[0], multiply(x)[:rows], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
def test_a_weight_that_was_loaded_anew_is_the_one_that_multiplies(precision: str) -> None:
    one, other = (Linear(PRECISIONS[precision].store(torch.randn(3, 64), "weight", ScaleRule())) for _ in range(2))
    x = torch.randn(1, 64)
    assert not torch.equal(one(x), other(x))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))


def test_a_convolution_that_was_loaded_anew_is_the_one_that_is_computed() -> None:
    one, other = (DepthwiseConv(FloatTensor(torch.randn(5, 1, 3)), FloatTensor(torch.randn(5))) for _ in range(2))
    x = torch.randn(1, 4, 5)
    assert not torch.equal(one(x)[0], other(x)[0])
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x)[0], other(x)[0])


def test_a_module_can_be_copied_after_its_weight_was_read() -> None:
    module = Linear(PRECISIONS["int8"].store(torch.randn(3, 40), "weight", ScaleRule()))
    x = torch.randn(1, 40)
    assert torch.equal(module(x), copy.deepcopy(module)(x))


def test_nothing_of_the_weight_is_copied() -> None:
    weight = FloatTensor(torch.randn(4, 8).half())
    assert known(Matrix.of(weight)).structure.values == weight.value.data_ptr()
