"""What every precision keeps: those of the registry, and some that only the tests know."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.errors import InfeasibleError
from ssm_mp.modules.convolution import DepthwiseConv
from ssm_mp.modules.embedding import BlockedEmbedding, Embedding
from ssm_mp.modules.experts import ExpertsLinear
from ssm_mp.modules.inputs import DynamicInput, InputQuantizer, StaticInput
from ssm_mp.modules.likelihood import token_divergence, token_nll
from ssm_mp.modules.linear import Linear
from ssm_mp.modules.norm import Norm
from ssm_mp.precisions.grouped import Grouped
from ssm_mp.precisions.matrix import FEW_ROWS, Matrix
from ssm_mp.precisions.precision import Precision
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import ArraySpec, FloatTensor, IntegerTensor, Role, Stored
from ssm_mp.scheme import ScaleMethod, ScaleRule
from tests.ssm_mp.precisions.outside import OUTSIDE

ALL = {**PRECISIONS, **OUTSIDE}
SMALLEST, LARGEST = 2.0**-126, 3.4e38
precisions = st.sampled_from(list(ALL.values()))
every = pytest.mark.parametrize("precision", ALL.values(), ids=ALL)
weight_shapes = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 140)), st.tuples(st.integers(1, 9), st.just(1), st.integers(1, 5))
)
vector_shapes = st.tuples(st.integers(1, 200))
rules = st.builds(ScaleRule, st.sampled_from(["minmax", "percentile", "mse"]))
seeds = st.integers(0, 99)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix_of(precision: Precision, n: int, k: int, seed: int = 0) -> Stored:
    return precision.store(normal(seed, n, k), "weight", ScaleRule())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes; torch does not compare every type."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )


@given(
    precisions, rules, seeds, st.one_of(
        st.tuples(st.just("weight"), weight_shapes), st.tuples(st.sampled_from(["vector", "bias"]), vector_shapes)
    ),
)  # fmt: skip
def test_what_is_stored_is_what_is_promised_and_comes_back(
    precision: Precision, rule: ScaleRule, seed: int, what: tuple[Role, tuple[int, ...]]
) -> None:
    role, shape = what
    tensor = normal(seed, *shape)
    before = tensor.clone()
    stored = precision.store(tensor, role, rule)
    assert torch.equal(tensor, before)
    arrays = stored.arrays()
    assert {suffix: ArraySpec(tuple(a.shape), a.dtype) for suffix, a in arrays.items()} == precision.arrays(shape, role)
    assert sum(a.numel() * a.element_size() for a in arrays.values()) == precision.bytes(shape, role)
    assert stored.tensor().dtype == torch.float32
    assert stored.tensor().shape == stored.shape == shape
    restored = precision.restore({suffix: a.clone() for suffix, a in arrays.items()}, shape, role)
    assert torch.equal(restored.tensor(), stored.tensor())
    assert all(same(a, arrays[suffix]) for suffix, a in restored.arrays().items())


@given(precisions, st.integers(1, 30), st.integers(1, 140), st.data())
def test_rows_are_those_of_the_whole(precision: Precision, r: int, n: int, data: st.DataObject) -> None:
    stored = matrix_of(precision, r, n)
    index = torch.tensor(data.draw(st.lists(st.integers(0, r - 1), min_size=1, max_size=6)))
    for of in (index, index[None, :, None], index[:0]):
        assert torch.equal(stored.rows(of), stored.tensor()[of])


@given(precisions, st.integers(1, 4), st.integers(1, 9), st.integers(1, 140))
def test_experts_in_one_matrix_multiply_with_their_own_rows(precision: Precision, count: int, n: int, k: int) -> None:
    weight, x = matrix_of(precision, count * n, k), normal(1, 5, k)
    for inputs in quantizers(precision):
        experts, whole = ExpertsLinear(weight, count, inputs), Linear(weight, None, inputs)(x)
        for e in range(count):
            torch.testing.assert_close(experts(x, e), whole[:, e * n : (e + 1) * n], rtol=1e-5, atol=1e-4)
            rows, above = weight.part(slice(e * n, (e + 1) * n))
            assert torch.equal(rows.tensor()[above:], weight.tensor()[e * n : (e + 1) * n])
            assert torch.equal(rows.rows(torch.tensor([above])), weight.tensor()[e * n : e * n + 1])


@given(precisions, st.lists(st.floats(-44, 4), min_size=1, max_size=6), st.sampled_from(["weight", "vector"]))
def test_values_of_any_magnitude_are_held_no_worse_than_as_zeros(
    precision: Precision, exponents: list[float], role: Role
) -> None:
    rows = torch.tensor([[10.0**e] for e in exponents], dtype=torch.float64)
    tensor = (torch.randn(len(exponents), 64, dtype=torch.float64) * rows).float()
    tensor = tensor.flatten() if role == "vector" else tensor
    held = precision.store(tensor, role, ScaleRule("mse")).tensor().double()
    error, zeros = ((held - tensor.double()).square().sum(), tensor.double().square().sum())
    least = 2.0**-48 if isinstance(precision, Grouped) and 0.0 not in precision.book.values else SMALLEST
    assert error <= zeros * (1 + 1e-6) + tensor.numel() * least


@every
@pytest.mark.parametrize("role", ["weight", "vector"])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_a_value_that_does_not_fit_is_refused_with_a_reason(
    precision: Precision, role: Role, method: ScaleMethod
) -> None:
    tensor = torch.ones(3, 64) if role == "weight" else torch.ones(64)
    tensor.view(-1)[5:].mul_(LARGEST)
    with pytest.raises(InfeasibleError, match="above"):
        precision.store(tensor, role, ScaleRule(method))


def quantizers(precision: Precision) -> list[InputQuantizer | None]:
    """The ways to quantise inputs that a precision allows."""
    both: list[InputQuantizer] = [StaticInput(torch.tensor([0.03], dtype=torch.float16)), DynamicInput()]
    return [None, *(both if precision.quantizes_inputs else [])]


@given(precisions, st.integers(1, 3 * FEW_ROWS), st.integers(1, 80), st.integers(1, 140), st.booleans(), seeds)
def test_a_linear_layer_is_torchs_product_of_the_tensor(
    precision: Precision, m: int, n: int, k: int, with_bias: bool, seed: int
) -> None:
    weight, x = matrix_of(precision, n, k, seed), normal(seed + 1, 1, m, k)
    bias = precision.store(normal(seed + 2, n), "bias", ScaleRule()) if with_bias else None
    for inputs in quantizers(precision):
        taken = x
        if inputs is not None:
            integers, scale = inputs(x[0])
            taken = (integers.float() * scale)[None]
        expected = F.linear(taken.double(), weight.tensor().double(), None if bias is None else bias.tensor().double())
        layer = Linear(weight, bias, inputs)
        bound = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=bound)
        torch.testing.assert_close(layer.projection()(x).double(), expected, rtol=1e-5, atol=bound)


@every
def test_a_precision_that_quantizes_inputs_multiplies_integers(precision: Precision) -> None:
    weight = matrix_of(precision, 4, 64)
    assert isinstance(weight, IntegerTensor) or not precision.quantizes_inputs
    if not isinstance(weight, IntegerTensor):
        with pytest.raises(TypeError, match="IntegerTensor"):
            Linear(weight, None, DynamicInput())


@every
@pytest.mark.parametrize("vocabulary", [40, 700])
def test_a_tied_head_scores_and_looks_up(precision: Precision, vocabulary: int) -> None:
    weight, x = matrix_of(precision, vocabulary, 30), normal(1, 20, 30)
    targets, ids = torch.arange(20), torch.tensor([[0, 39], [7, 7]])
    reference = Embedding(FloatTensor(normal(0, vocabulary, 30).half()))
    for inputs in quantizers(precision):
        head = Embedding(weight, inputs)
        assert torch.equal(head(ids), weight.tensor()[ids])
        logits, expected = head.project(x).double(), reference.project(x).double()
        nll, kl = head.projection().divergence(x, targets, reference.projection(), x, held=7)
        torch.testing.assert_close(nll, token_nll(logits, targets), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nll, head.projection().nll(x, targets, held=7))
        torch.testing.assert_close(kl, token_divergence(logits, expected), rtol=1e-4, atol=1e-4)
        backwards = reference.projection().divergence(x, targets, head.projection(), x, held=7)[1]
        torch.testing.assert_close(backwards, token_divergence(expected, logits), rtol=1e-4, atol=1e-4)


@every
def test_a_tied_head_in_blocks_scores_beside_one_of_another_precision(precision: Precision) -> None:
    blocks = [Embedding(matrix_of(precision, 24, 30)), Embedding(FloatTensor(normal(1, 16, 30).half()))]
    block_of = torch.tensor([0, 0, 1, 0, 1] * 8)
    embedding = BlockedEmbedding(blocks, block_of)
    whole = torch.cat([block.weight.tensor() for block in blocks])[embedding.column_of]
    assert torch.equal(embedding(torch.arange(40)[None])[0], whole)
    x = normal(2, 12, 30)
    found = embedding.projection()(x)[:, embedding.column_of]
    torch.testing.assert_close(found, x @ whole.t(), rtol=1e-4, atol=1e-4)
    targets = torch.arange(12)
    expected = token_nll(found, targets)
    for held in (1, 7, 12):
        columns = embedding.column_of[targets]
        torch.testing.assert_close(embedding.projection().nll(x, columns, held), expected, rtol=1e-5, atol=1e-5)


@every
def test_a_convolution_and_a_norm_compute_with_the_tensor(precision: Precision) -> None:
    weight = precision.store(normal(0, 6, 1, 4), "weight", ScaleRule())
    bias = precision.store(normal(1, 6), "bias", ScaleRule())
    gain = precision.store(normal(2, 6), "vector", ScaleRule())
    x = normal(3, 2, 5, 6)
    plain = [FloatTensor(stored.tensor()) for stored in (weight, bias, gain)]
    assert torch.equal(DepthwiseConv(weight, bias)(x)[0], DepthwiseConv(*plain[:2])(x)[0])
    assert torch.equal(Norm(gain, None, 1e-5)(x), Norm(plain[2], None, 1e-5)(x))


@every
def test_a_module_that_was_used_can_be_copied_and_loaded_anew(precision: Precision) -> None:
    one, other = (Linear(matrix_of(precision, 3, 64, seed)) for seed in (0, 1))
    x = normal(2, 1, 64)
    assert torch.equal(one(x), copy.deepcopy(one)(x))
    assert not torch.equal(one(x), other(x))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("precision", OUTSIDE.values(), ids=OUTSIDE)
def test_the_kernels_know_none_from_outside_and_torch_multiplies(precision: Precision) -> None:
    weight = matrix_of(precision, 30, 64)
    assert Matrix.of(weight) is None
    assert Linear(weight).matrix() is None
    assert Linear(weight).projection().head is None


def test_a_class_derived_from_one_that_the_kernels_know_is_asked_for_its_own_tensor() -> None:
    class Doubled(FloatTensor):
        def tensor(self) -> torch.Tensor:
            return 2 * super().tensor()

    value, x = normal(0, 30, 64).half(), normal(1, 3, 64)
    torch.testing.assert_close(Linear(Doubled(value))(x), 2 * Linear(FloatTensor(value))(x))
