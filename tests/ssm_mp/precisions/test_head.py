"""Likelihoods and divergences of heads of every kind that the kernels know."""

from __future__ import annotations

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
from ssm_mp.modules.embedding import Embedding
from ssm_mp.modules.inputs import DynamicInput
from ssm_mp.modules.likelihood import token_nll
from ssm_mp.modules.linear import Linear, linear
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.matrix import Head, Matrix
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.scheme import ActivationScheme, ScaleRule
from tests.ssm_mp.precisions.layers import KINDS, float16_linear, integer_linear, known, weight_of, weights


@given(st.integers(1, 250), st.integers(1, 2500), st.integers(1, 70), st.sampled_from(KINDS), st.integers(0, 99))
def test_likelihoods_of_a_head_are_those_of_its_logits(m: int, n: int, k: int, kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    head = Linear(weight_of(kind, n, k, g))
    x, targets = torch.randn(m, k, generator=g), torch.randint(n, (m,), generator=g)
    logits = x.double() @ head.weight.tensor().double().t()
    found = head.projection().nll(x, targets, held=7)
    torch.testing.assert_close(found, token_nll(logits, targets), rtol=1e-5, atol=1e-5 + 1e-6 * k)


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


@given(
    st.integers(1, 250), st.integers(1, 2500), st.integers(1, 70), st.sampled_from(["int8", "fp16"]),
    st.sampled_from(["int8", "fp16"]), st.sampled_from([0.3, 1.0, 5.0]), st.integers(0, 99),
)  # fmt: skip
def test_divergences_of_heads_with_quantised_inputs_are_those_of_their_logits(
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


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_weight_that_is_not_finite_spoils_all_likelihoods(kind: str) -> None:
    weight = weight_of(kind, 70, 32, torch.Generator().manual_seed(0))
    for array in weight.arrays().values():
        if array.is_floating_point():
            array.view(-1)[0] = torch.inf
    nll = Linear(weight).projection().nll(torch.randn(20, 32), torch.zeros(20, dtype=torch.int64), held=7)
    assert not nll.isfinite().any()


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
    weight = weight_of(precision, n, k, g)
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


def test_a_head_that_is_trained_is_left_to_torch() -> None:
    weight = FloatTensor(torch.randn(70, 30))
    assert Linear(weight).projection().head is not None
    weight.value.requires_grad_()
    assert Linear(weight).projection().head is None
