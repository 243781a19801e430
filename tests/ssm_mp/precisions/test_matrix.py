"""Products of few rows with a weight as it is stored, against those of the unpacked weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ssm_mp.modules.linear
from ssm_mp.kernels import matrices
from ssm_mp.modules.convolution import DepthwiseConv
from ssm_mp.modules.embedding import Embedding
from ssm_mp.modules.inputs import DynamicInput, InputQuantizer, StaticInput
from ssm_mp.modules.likelihood import token_nll
from ssm_mp.modules.linear import Linear, linear
from ssm_mp.precisions.grouped import GroupedTensor
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.matrix import FEW_ROWS, Head, Matrix
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import ActivationScheme, ScaleRule

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
    weight = PRECISIONS[precision].store(weights(n, k, g), "weight", ScaleRule())
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
    weight = PRECISIONS[precision].store(weights(n, 64 * units, g), "weight", ScaleRule())
    assert isinstance(weight, GroupedTensor)
    weight.scale[torch.rand(weight.scale.shape, generator=g) < 0.1] = 0.0
    held = FloatTensor(torch.randn(n, generator=g).half()) if bias else None
    x = torch.randn(m, 64 * units, generator=g) * 10 ** torch.randint(-6, 1, (m, 64 * units), generator=g) * size
    assert_within_fixed_point(known(Matrix.of(weight, held)).product(x), x, weight, held)


@pytest.mark.parametrize("precision", GROUPED)
def test_products_of_codes_are_as_near_as_any_model_needs(precision: str) -> None:
    g = torch.Generator().manual_seed(0)
    weight = PRECISIONS[precision].store(weights(300, 1536, g), "weight", ScaleRule())
    x = torch.randn(8, 1536, generator=g)
    values = weight.tensor().double()
    error = (known(Matrix.of(weight)).product(x) - x.double() @ values.t()).abs()
    assert (error / (x.double().abs() @ values.abs().t())).max() < 1e-5


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [70, 128])
@pytest.mark.parametrize("precision", ["fp16", "int8", *GROUPED])
def test_an_input_that_is_not_finite_spoils_the_products_of_its_row(precision: str, k: int, value: float) -> None:
    g = torch.Generator().manual_seed(0)
    weight = PRECISIONS[precision].store(weights(9, k, g), "weight", ScaleRule())
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
    matrix = known(Matrix.of(PRECISIONS[precision].store(weights(50, 192, g), "weight", ScaleRule())))
    x = torch.randn(FEW_ROWS, 192, generator=g)
    alone = torch.cat([matrix.product(row[None]) for row in x])
    for m in range(1, FEW_ROWS + 1):
        torch.testing.assert_close(matrix.product(x[:m]), alone[:m], rtol=1e-5, atol=1e-5)


def test_products_of_few_do_not_depend_on_the_number_of_threads() -> None:
    g, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    x = torch.randn(3, 256, generator=g)
    for precision in ("fp16", "int8", "nf4", "nf3"):
        weight = PRECISIONS[precision].store(weights(1100, 256, g), "weight", ScaleRule())
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


def known(matrix: Matrix | None) -> Matrix:
    """That of a weight which the kernels know."""
    assert matrix is not None
    return matrix


def weights(n: int, k: int, g: torch.Generator) -> torch.Tensor:
    """Random weights, no row of them so small that its scale would be none."""
    values = torch.randn(n, k, generator=g)
    return torch.where(values.abs() < 1e-3, 1e-3, values)


def integer_linear(n: int, k: int, scheme: ActivationScheme, bias: bool, g: torch.Generator) -> Linear:
    """A linear layer whose product is one of integers; skips where this CPU's kernels take no many inputs."""
    weight = PRECISIONS["int8"].store(weights(n, k, g), "weight", ScaleRule())
    held = FloatTensor(torch.randn(n, generator=g)) if bias else None
    inputs = DynamicInput() if scheme == "dynamic" else StaticInput(torch.tensor([0.02], dtype=torch.float16))
    layer = Linear(weight, held, inputs)
    if not known(layer.matrix()).takes_many:
        pytest.skip("this CPU has no instruction for it")
    return layer


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


@given(
    st.integers(1, 60), st.integers(1, 2500), st.integers(1, 70), st.sampled_from(["static", "dynamic"]),
    st.sampled_from([1e-3, 1.0, 40.0]), st.integers(0, 99),
)  # fmt: skip
def test_likelihoods_of_an_integer_head_are_those_of_its_logits(
    m: int, n: int, k: int, scheme: ActivationScheme, spread: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    head = integer_linear(n, k, scheme, False, g)
    x, targets = torch.randn(m, k, generator=g) * spread, torch.randint(n, (m,), generator=g)
    logits = linear(x, head.weight, None, head.inputs)
    found = head.projection().nll(x, targets, held=7)
    torch.testing.assert_close(found, token_nll(logits.double(), targets), rtol=1e-5, atol=1e-5 * max(1.0, spread))


def float16_linear(n: int, k: int, g: torch.Generator, bias: bool = False) -> Linear:
    """A linear layer of float16 weights of many magnitudes; skips where this CPU's kernels take no many inputs."""
    weight = torch.randn(n, k, generator=g) * 10 ** torch.randint(-7, 3, (n, 1), generator=g)
    layer = Linear(FloatTensor(weight.half()), FloatTensor(torch.randn(n, generator=g)) if bias else None)
    if not known(layer.matrix()).takes_many:
        pytest.skip("this CPU has no instruction for it")
    return layer


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


@given(st.integers(1, 250), st.integers(1, 2500), st.integers(1, 70), st.integers(0, 99))
def test_likelihoods_of_a_float16_head_are_those_of_its_logits(m: int, n: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    head = Embedding(FloatTensor(torch.randn(n, k, generator=g).half()))
    x, targets = torch.randn(m, k, generator=g), torch.randint(n, (m,), generator=g)
    found = head.projection().nll(x, targets, held=7)
    torch.testing.assert_close(
        found, token_nll(x.double() @ head.weight.tensor().double().t(), targets), rtol=1e-5, atol=1e-5
    )


@given(
    st.integers(1, 250), st.integers(1, 2500), st.integers(1, 70), st.sampled_from(["int8", "fp16"]),
    st.sampled_from(["int8", "fp16"]), st.sampled_from([0.3, 1.0, 5.0]), st.integers(0, 99),
)  # fmt: skip
def test_divergences_of_two_heads_are_those_of_their_logits(
    m: int, n: int, k: int, ours: str, theirs: str, spread: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    values, x = weights(n, k, g) * spread, torch.randn(m, k, generator=g)
    heads = [
        Embedding(
            PRECISIONS[precision].store(values, "weight", ScaleRule()), DynamicInput() if precision == "int8" else None
        )
        for precision in (ours, theirs)
    ]
    inputs = (x, x + 0.1 * torch.randn(m, k, generator=g))
    logits = [
        of.double() @ head.weight.tensor().double().t()
        if head.inputs is None
        else linear(of, head.weight, None, head.inputs).double()
        for of, head in zip(inputs, heads, strict=True)
    ]
    q, p = (each.log_softmax(-1) for each in logits)
    targets, head = torch.randint(n, (m,), generator=g), heads[0].projection()
    nll, found = head.divergence(inputs[0], targets, heads[1].projection(), inputs[1], held=7)
    assert torch.equal(nll, head.nll(inputs[0], targets, held=7))
    rounding = 2e-6 * max(1.0, *(float(each.abs().max()) for each in logits))  # float32's, of numbers as large
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=rounding)


def test_a_head_does_not_diverge_from_itself_and_what_is_not_finite_spoils_its_token() -> None:
    head = integer_linear(700, 30, "dynamic", False, torch.Generator().manual_seed(0)).projection()
    x, targets = torch.randn(30, 30), torch.arange(30)
    assert head.divergence(x, targets, head, x, held=7)[1].abs().max() < 1e-6
    for at in (0, 1):
        spoiled = [x, x]
        spoiled[at] = x.clone()
        spoiled[at][11, 3] = torch.inf
        kl = head.divergence(spoiled[0], targets, head, spoiled[1], held=7)[1]
        assert torch.equal(kl.isfinite(), torch.arange(30) != 11)


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


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_no_inputs_give_nothing_and_sizes_that_do_not_fit_are_refused(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    layers = [
        integer_linear(n, 30, "dynamic", False, g) if kind == "int8" else float16_linear(n, 30, g) for n in (70, 40)
    ]
    one = known(layers[0].matrix())
    head, other = (Head(known(layer.matrix())) for layer in layers)
    none, x = torch.empty(0, 30), torch.randn(20, 30)
    no_targets, targets = torch.empty(0, dtype=torch.int64), torch.zeros(20, dtype=torch.int64)
    assert one.product(none).shape[0] == 0
    assert matrices.multiply_many(one.structure, none).shape[0] == 0
    assert head.nll(none, no_targets).shape == (0,)
    assert head.divergence(none, no_targets, head, none)[1].shape == (0,)
    wrong_calls: list[Callable[[], torch.Tensor]] = [
        lambda: one.product(x[:, :29].contiguous()),
        lambda: head.nll(x[:, :29].contiguous(), targets),
        lambda: head.nll(x, targets[:19]),
        lambda: head.nll(x, targets.int()),
        lambda: head.nll(x, torch.full((20,), 70)),
        lambda: head.nll(x, torch.full((20,), -1)),
        lambda: head.divergence(x, targets, other, x)[1],
        lambda: head.divergence(x, targets, head, x[:19])[1],
    ]
    for wrong in wrong_calls:
        with pytest.raises(ValueError, match="inputs|targets|outputs"):
            wrong()


@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_a_head_has_the_same_likelihoods_laid_out_whole_and_some_outputs_at_a_time(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 20000, 70  # more than are laid out at a time
    g = torch.Generator().manual_seed(0)
    weight = PRECISIONS[precision].store(weights(n, k, g), "weight", ScaleRule())
    x, targets, found = torch.randn(30, k, generator=g), torch.randint(n, (30,), generator=g), []
    reference = Linear(FloatTensor(torch.randn(n, k, generator=g))).projection()
    for lay_out in (lambda own: matrices.packed(own.structure), lambda _: None):
        monkeypatch.setattr(Matrix, "laid_out", lay_out)
        head = Linear(weight, None, DynamicInput() if precision == "int8" else None).projection()
        found.append((head.nll(x, targets, held=7), *head.divergence(x, targets, reference, x + 0.1, held=7)))
    for whole, some in zip(*found, strict=True):
        assert torch.equal(whole, some)


def test_threads_share_a_head_that_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    laid = list[Matrix]()

    def lay_out(own: Matrix) -> torch.Tensor:
        laid.append(own)
        return matrices.packed(own.structure)

    monkeypatch.setattr(Matrix, "laid_out", lay_out)
    head = integer_linear(700, 30, "dynamic", False, torch.Generator().manual_seed(0)).projection()
    x, targets = torch.randn(8, 20, 30), torch.randint(700, (8, 20))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: head.nll(x[i], targets[i], 7), range(8)))
    assert len(laid) == 1
    assert torch.equal(torch.cat(found), head.nll(x.flatten(0, 1), targets.flatten(), 7))


@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_a_head_too_large_to_stay_unpacked_is_unpacked_once_for_all_divergences(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssm_mp.modules.linear, "_MOST_UNPACKED", 100)
    n, k = 50, 64
    weight = PRECISIONS[precision].store(torch.randn(n, k), "weight", ScaleRule())
    whole, kind = list[int](), type(weight)
    unpack = kind.tensor

    def counted(stored: Stored) -> torch.Tensor:
        found = unpack(stored)
        whole.extend([n] * (found.shape[0] == n and stored is weight))
        return found

    monkeypatch.setattr(kind, "tensor", counted)
    x, targets = torch.randn(20, k), torch.arange(20)
    head, other = (replace(Linear(weight).projection(), head=None) for _ in range(2))
    for _ in range(3):
        nll, kl = head.divergence(x, targets, other, x + 0.1, held=1)
    assert len(whole) == 2  # of either side
    logits, others = (each.double() @ unpack(weight).double().t() for each in (x, x + 0.1))
    torch.testing.assert_close(nll, token_nll(logits, targets), rtol=1e-5, atol=1e-5)
    p = others.log_softmax(-1)
    torch.testing.assert_close(kl, (p.exp() * (p - logits.log_softmax(-1))).sum(-1), rtol=1e-5, atol=1e-5)


def test_a_likelihood_survives_logits_that_grow_along_the_vocabulary() -> None:
    head = integer_linear(1000, 8, "static", False, torch.Generator().manual_seed(0))
    assert isinstance(head.weight, Int8Tensor)
    # from −406 to 406: each few dozens are far above all before them
    head.weight.q.copy_(torch.linspace(-127, 127, 1000).round()[:, None].expand(1000, 8))
    head.weight.scale.fill_(4.0)
    x, targets = torch.full((20, 8), 0.1), torch.arange(20) * 50
    logits = linear(x, head.weight, None, head.inputs)
    assert float(logits.max() - logits.min()) > 800
    found = head.projection().nll(x, targets, held=7)
    torch.testing.assert_close(found, token_nll(logits.double(), targets), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("logit", [-5000.0, 5000.0])
def test_a_likelihood_survives_logits_that_are_all_far_from_zero(logit: float) -> None:
    head = integer_linear(70, 4, "dynamic", False, torch.Generator().manual_seed(0))
    assert isinstance(head.weight, Int8Tensor)
    head.weight.q.fill_(127)
    head.weight.scale.fill_(1.0)
    x = torch.full((20, 4), logit / (4 * 127))
    scorer = head.projection()
    nll, kl = scorer.divergence(x, torch.zeros(20, dtype=torch.int64), scorer, x, held=7)
    assert nll.tolist() == pytest.approx([math.log(70)] * 20, abs=1e-3)
    assert kl.abs().max() < 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_an_input_that_is_not_finite_spoils_its_row_and_no_other(value: float, scheme: ActivationScheme) -> None:
    head = integer_linear(70, 30, scheme, False, torch.Generator().manual_seed(0))
    x = torch.randn(30, 30)
    x[11, 3] = value
    finite = torch.arange(30) != 11
    assert torch.equal(head(x).isfinite().all(dim=1), finite)
    assert torch.equal(head.projection().nll(x, torch.zeros(30, dtype=torch.int64), held=7).isfinite(), finite)


def test_products_of_many_do_not_depend_on_the_number_of_threads() -> None:
    head = integer_linear(300, 64, "dynamic", False, torch.Generator().manual_seed(0))
    x, targets, before, found = torch.randn(200, 64), torch.randint(300, (200,)), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((head(x), head.projection().nll(x, targets, held=7)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


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
