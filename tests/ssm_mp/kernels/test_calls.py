"""Each kernel against torch's own operators; the scans' are in `test_scan.py`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ssm_mp.kernels import calls
from ssm_mp.modules.convolution import DepthwiseConv, conv_silu_reference
from ssm_mp.modules.inputs import DynamicInput, StaticInput
from ssm_mp.modules.linear import rescaled
from ssm_mp.modules.norm import Norm
from ssm_mp.precisions.quantize import INT8_LIMIT, quantize_tensor
from ssm_mp.precisions.stored import FloatTensor


@pytest.mark.parametrize("inner", [5, 16, 40])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_equals_conv1d(kernel: int, length: int, inner: int, bias: bool) -> None:
    weight, x = torch.randn(inner, 1, kernel), torch.randn(2, length, 2 * inner)[..., inner:]
    held = torch.randn(inner) if bias else None
    before = torch.randn(2, kernel - 1, inner)
    whole = torch.cat((before, x), dim=1)
    expected = F.silu(F.conv1d(whole.transpose(1, 2), weight, held, groups=inner).transpose(1, 2))
    torch.testing.assert_close(conv_silu_reference(x, weight[:, 0], held, before), expected)
    module = DepthwiseConv(FloatTensor(weight), None if held is None else FloatTensor(held))
    found, last = module(x, before)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(last, whole[:, whole.shape[1] - kernel + 1 :])
    torch.testing.assert_close(module(x)[0], module(x, torch.zeros_like(before))[0])


@given(st.integers(1, 5), st.integers(1, 200), st.booleans(), st.floats(-100, 100), st.integers(0, 99))
def test_norms_are_those_of_float64(m: int, d: int, bias: bool, mean: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weight, held = torch.randn(m, d, generator=g) + mean, torch.randn(d, generator=g), torch.randn(d, generator=g)
    if bias:
        expected = F.layer_norm(x.double(), [d], weight.double(), held.double(), 1e-5)
    else:
        expected = F.rms_norm(x.double(), [d], weight.double(), 1e-5)
    found = Norm(FloatTensor(weight), FloatTensor(held) if bias else None, 1e-5)(x)
    # values far larger than what they differ by cost as many digits
    lost = float((x.abs().amax(dim=1) / (x.std(dim=1, correction=0) + 1e-3)).max()) if bias else 1.0
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, lost) * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_of_what_is_not_finite_is_not_finite(value: float, bias: bool) -> None:
    x = torch.randn(3, 40)
    x[1, 17] = value
    norm = Norm(FloatTensor(torch.ones(40)), FloatTensor(torch.ones(40)) if bias else None, 1e-5)
    assert norm(x)[:, 17].isfinite().tolist() == [True, False, True]


@given(st.integers(1, 5), st.integers(1, 70), st.floats(1e-3, 10), st.integers(0, 99))
def test_static_inputs_are_those_of_the_definition(m: int, k: int, spread: float, seed: int) -> None:
    x = torch.randn(m, k + 3, generator=torch.Generator().manual_seed(seed))[:, :k] * spread
    scale = torch.tensor([0.01], dtype=torch.float16)
    q, scales = StaticInput(scale)(x)
    assert torch.equal(q, quantize_tensor(x, scale.float()))
    assert torch.equal(scales, scale.float().expand(m, 1))


@given(st.integers(1, 5), st.integers(1, 70), st.floats(0, 1e4), st.integers(0, 99))
def test_dynamic_inputs_are_those_of_the_definition(m: int, k: int, spread: float, seed: int) -> None:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)) * spread
    q, scales = DynamicInput()(x)
    expected = (x.abs().amax(dim=1, keepdim=True) / INT8_LIMIT).clamp(min=1e-12)
    assert torch.equal(scales, expected)
    assert torch.equal(q, quantize_tensor(x, expected))


@pytest.mark.parametrize("inputs", [StaticInput(torch.ones(1, dtype=torch.float16)), DynamicInput()])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 17, 39])
def test_an_input_that_is_not_finite_spoils_its_row(
    inputs: StaticInput | DynamicInput, value: float, column: int
) -> None:
    x = torch.randn(3, 40)
    x[1, column] = value
    assert torch.isfinite(inputs(x)[1][:, 0]).tolist() == [True, False, True]


@pytest.mark.parametrize("n", [1, 15, 16, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_rescaling_equals_torch(n: int, bias: bool) -> None:
    sums = torch.randint(-(2**24), 2**24, (3, n), dtype=torch.int32)
    columns, rows, held = torch.rand(n), torch.rand(3, 1), torch.randn(n) * 1e5 if bias else None
    expected = sums.double() * columns * rows + (0 if held is None else held)
    found = rescaled(sums, columns, rows, held).double()
    assert (found - expected).abs().max() <= 1e-6 * max(2.0**24, float(expected.abs().max()))


@pytest.mark.parametrize("vocabulary", [3, 16, 50])
def test_likelihoods_of_sums_are_those_of_the_rescaled_logits(vocabulary: int) -> None:
    sums = torch.randint(-3000, 3000, (4, vocabulary), dtype=torch.int32)
    columns, rows, targets = torch.rand(vocabulary) * 1e-2, torch.rand(4, 1), torch.randint(vocabulary, (4,))
    expected = calls.negative_log_likelihood(calls.rescale(sums.clone(), columns, rows, None), targets)
    scaled = calls.LogSums(targets)
    scaled.add_scaled(sums.clone(), columns, rows, 0)
    assert torch.equal(scaled.nll(), expected)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, targets, before = torch.randn(70, 90), torch.randint(90, (70,)), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((calls.negative_log_likelihood(x, targets), *calls.quantize_dynamic(x, 1e-12)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_a_tensor_without_memory_is_not_for_kernels() -> None:
    """As a traced graph has them: they would be read at an address of nothing."""
    with FakeTensorMode():
        assert not calls.usable(torch.ones(2, 3))
    assert calls.usable(torch.ones(2, 3)) == calls.compiled()
