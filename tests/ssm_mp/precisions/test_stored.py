"""How an int8 matrix multiplies, on a CPU and as on a GPU; all else about stored tensors is in `test_precision.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssm_mp.precisions import quantize
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.quantize import integer_product_emulated

SHAPES = [(8, 16), (1, 1), (5, 16), (24, 7), (13, 9)]


class OnGpu(Tensor):
    """A tensor of the CPU that says it were on a GPU."""

    is_cuda = True


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


@pytest.fixture
def weights_multiplied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that the native product is given; it refuses what CUDA's refuses."""
    given = []

    def picky(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == b.shape[0] % 8 == 0
        given.append(b)
        return integer_product_emulated(a, b)

    monkeypatch.setattr(quantize, "_native_product", picky)
    return given


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [1, 16, 17, 40])
def test_a_product_on_a_gpu_is_that_of_a_cpu_and_pads_the_weight_once(
    weights_multiplied: list[Tensor], shape: tuple[int, int], m: int
) -> None:
    q, a = int8(*shape), int8(m, shape[1])
    weight = Int8Tensor(q.as_subclass(OnGpu), torch.ones(shape[0], dtype=torch.float16))
    found = [weight.product(a.as_subclass(OnGpu)) for _ in range(2)]
    assert all(torch.equal(sums.long(), a.long() @ q.long().t()) for sums in found)
    first, second = weights_multiplied
    assert first is second
    assert (first is weight.q) == (shape == (8, 16))
    assert weight.arrays().keys() == {"q", "scale"} == weight.state_dict().keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_on_a_cpu_is_that_of_the_integers(shape: tuple[int, int]) -> None:
    q, a = int8(*shape), int8(3, shape[1])
    found = Int8Tensor(q, torch.ones(shape[0], dtype=torch.float16)).product(a)
    assert torch.equal(found.long(), a.long() @ q.long().t())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [1, 16, 17, 40])
def test_a_product_on_this_gpu_is_that_of_the_integers(shape: tuple[int, int], m: int) -> None:
    q, a = int8(*shape), int8(m, shape[1])
    weight = Int8Tensor(q, torch.ones(shape[0], dtype=torch.float16)).cuda()
    assert torch.equal(weight.product(a.cuda()).cpu().long(), a.long() @ q.long().t())
