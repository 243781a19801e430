"""A tensor of any type and size, stored slice by slice, is what its float32 values give as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_mp.errors import InfeasibleError
from ssm_mp.kernels import calls
from ssm_mp.precisions import slices
from ssm_mp.precisions.grouped import Grouped
from ssm_mp.precisions.groups import group_scales, nearest_codes, pack, to_groups
from ssm_mp.precisions.precision import Precision, Unsure
from ssm_mp.precisions.quantize import dequantize_rows, quantize_rows, weight_scales
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.slices import in_slices, largest_magnitude
from ssm_mp.precisions.stored import Role
from ssm_mp.scheme import ScaleRule
from tests.ssm_mp.precisions.outside import OUTSIDE

CPU = torch.device("cpu")
precisions = st.sampled_from([*PRECISIONS.values(), *OUTSIDE.values()])
types = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
rules = st.sampled_from([ScaleRule(), ScaleRule("percentile", 90), ScaleRule("mse")])
roles: st.SearchStrategy[tuple[Role, tuple[int, ...]]] = st.one_of(
    st.tuples(st.just("weight"), st.tuples(st.integers(1, 20), st.integers(1, 140))),
    st.tuples(st.just("weight"), st.tuples(st.integers(1, 3), st.integers(1000, 3000))),
    st.tuples(st.just("weight"), st.tuples(st.integers(1, 40), st.just(1), st.integers(1, 5))),
    st.tuples(st.sampled_from(["vector", "bias"]), st.tuples(st.integers(1, 700))),
)


@contextmanager
def small_slices(kernels: bool, threads: int = 1) -> Iterator[None]:
    """Slices of 128 values, with kernels or without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_VALUES", 128)
        if not kernels:
            patch.setattr(calls, "usable", lambda *_: False)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)


def tensor_of(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, some rows far smaller than others, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(
        -9, 2, shape[:1], generator=generator
    ).view(-1, *[1] * (len(shape) - 1))
    values[seed % shape[0]] = 0
    return values.to(dtype)


def whole(precision: Precision, tensor: Tensor, role: Role, rule: ScaleRule) -> dict[str, Tensor]:
    """What the readable functions give for all of a tensor at once."""
    values = tensor.float()
    if role == "bias" or precision.name == "fp16":
        return {"": values.half()}
    if isinstance(precision, Grouped):
        groups = to_groups(values, precision.group)
        scale = group_scales(groups, rule, precision.book)
        return {"q": pack(nearest_codes(groups, scale, precision.book), precision.bits), "scale": scale}
    if precision.name == "int8":
        rows = values.reshape(values.shape[0] if role == "weight" else 1, -1)
        scale = weight_scales(rows, rule)
        return {"q": quantize_rows(rows, scale).reshape(values.shape), "scale": scale}
    return precision.store(values, role, rule).arrays()


@given(precisions, roles, rules, types, st.integers(0, 999), st.integers(1, 2), st.booleans())
def test_slices_give_what_the_whole_gives(
    precision: Precision, what: tuple[Role, tuple[int, ...]], rule: ScaleRule, dtype: torch.dtype, seed: int,
    threads: int, kernels: bool,
) -> None:  # fmt: skip
    role, shape = what
    tensor = tensor_of(shape, seed, dtype)
    before = tensor.clone()
    kernels = kernels and rule.method != "mse"  # whose kernels may choose another of two scales that are as good
    with small_slices(kernels, threads):
        found = precision.store(tensor, role, rule)
    expected = whole(precision, tensor, role, rule)
    assert found.arrays().keys() == expected.keys()
    for suffix, array in found.arrays().items():
        assert array.dtype == expected[suffix].dtype
        assert array.shape == expected[suffix].shape
        assert torch.equal(array.view(torch.uint8), expected[suffix].contiguous().view(torch.uint8))
        assert not array.is_inference()
    assert torch.equal(tensor, before)


@given(precisions, roles, types, st.integers(0, 999), st.integers(1, 2))
def test_least_squares_by_kernels_have_no_more_error(
    precision: Precision, what: tuple[Role, tuple[int, ...]], dtype: torch.dtype, seed: int, threads: int
) -> None:
    role, shape = what
    tensor = tensor_of(shape, seed, dtype)
    with small_slices(kernels=True, threads=threads):
        found = precision.store(tensor, role, ScaleRule("mse"))
    arrays = whole(precision, tensor, role, ScaleRule("mse"))
    expected = precision.restore(arrays, shape, role)
    if role == "bias" or "scale" not in arrays:
        assert torch.equal(found.tensor(), expected.tensor())
        return
    scales = (found.arrays()["scale"], arrays["scale"])
    values = tensor.double()

    def errors(held: Tensor) -> Tensor:
        off = (held.double() - values).square()
        if isinstance(precision, Grouped):
            return to_groups(off, precision.group).sum(dim=1)
        return off.reshape(len(scales[0]), -1).sum(dim=1)

    ours, theirs = errors(found.tensor()), errors(expected.tensor())
    same = scales[0] == scales[1]
    assert torch.equal(ours[same], theirs[same])
    assert bool((ours <= theirs * (1 + 1e-5)).all())


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("rule", [ScaleRule(), ScaleRule("mse")], ids=["minmax", "mse"])
def test_a_tensor_in_any_order_of_memory_is_its_values(precision: Precision, kernels: bool, rule: ScaleRule) -> None:
    matrix = tensor_of((30, 70), 3)
    for view in (matrix.t(), matrix[:, 5:64], matrix[::2]):
        with small_slices(kernels):
            found, expected = (precision.store(t, "weight", rule).tensor() for t in (view, view.contiguous()))
        assert torch.equal(found, expected)
    with small_slices(kernels):
        found, expected = (precision.store(t, "vector", rule).tensor() for t in (matrix[:, 3], matrix[:, 3].clone()))
    assert torch.equal(found, expected)


@given(
    precisions, st.sampled_from(["weight", "vector", "bias"]), rules, st.floats(1.0, 3.3e38), types,
    st.sampled_from([None, 65504.0, 65519.0, 65520.0, 127 * 65504.0, 127 * 65504.5, 7 * 65504.0, 7 * 65504.1]),
    st.booleans(),
)  # fmt: skip
def test_a_refusal_is_known_from_the_largest_magnitude_in_the_same_words(
    precision: Precision,
    role: Role,
    rule: ScaleRule,
    size: float,
    dtype: torch.dtype,
    edge: float | None,
    kernels: bool,
) -> None:
    tensor = torch.randn(4, 50) if role == "weight" else torch.randn(200)
    tensor.flatten()[77] = -(edge or size)
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        return
    said = precision.refusal(largest_magnitude(tensor), role, rule)
    if said is Unsure.UNSURE:
        assert role != "bias"
        assert precision in OUTSIDE.values() or (precision.name == "int8" and rule.method == "percentile")
        return
    with small_slices(kernels):
        try:
            precision.store(tensor, role, rule)
            found = None
        except InfeasibleError as error:
            found = str(error)
    assert said == found


def test_of_several_that_overflow_the_largest_is_named() -> None:
    tensor = torch.ones(40, 64)
    tensor[3], tensor[30] = 1e8, 3e9
    for name, limit in (("int8", 127), ("nf4", 1), ("int4", 8)):
        for kernels in (True, False):
            with (
                small_slices(kernels),
                pytest.raises(InfeasibleError, match=re.escape(f"a scale of {3e9 / limit:.3g} is")),
            ):
                PRECISIONS[name].store(tensor, "weight", ScaleRule("mse"))


@given(st.integers(0, 2000), types)
def test_the_largest_magnitude_is_that_of_all_slices(count: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    with small_slices(kernels=True, threads=2):
        assert largest_magnitude(tensor) == (float(tensor.float().abs().max()) if count else 0.0)


@given(st.integers(0, 50), st.integers(0, 400))
def test_slices_cover_every_row_once_in_order(count: int, width: int) -> None:
    with small_slices(kernels=True, threads=2):
        found = in_slices(lambda part: list(range(part.start, part.stop)), count, width, CPU)
    assert [row for part in found for row in part] == list(range(count))
    assert all(len(part) * width <= 128 or len(part) == 1 for part in found)


def test_rows_are_restored_as_they_were_rounded() -> None:
    tensor = tensor_of((9, 300), 5, torch.bfloat16)
    stored = PRECISIONS["int8"].store(tensor, "weight", ScaleRule("mse")).arrays()
    assert torch.equal(stored["q"], quantize_rows(tensor.float(), stored["scale"]))
    assert dequantize_rows(stored["q"], stored["scale"]).shape == (9, 300)


class Largest(TorchDispatchMode):
    """The most values that any operator returned in float32."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.found = max(self.found, out.numel())
        return out


@pytest.mark.parametrize("name", [name for name in PRECISIONS if "g" not in name or name == "nf3g128"])
def test_no_float32_copy_of_the_whole_is_made(name: str) -> None:
    tensor = tensor_of((64, 64), 1, torch.bfloat16)
    with small_slices(kernels=False), Largest() as watch:
        PRECISIONS[name].store(tensor, "weight", ScaleRule("mse"))
    assert watch.found <= 128


@pytest.mark.parametrize("name", [name for name, one in PRECISIONS.items() if isinstance(one, Grouped)])
def test_a_value_between_two_codes_goes_down(name: str) -> None:
    precision = PRECISIONS[name]
    assert isinstance(precision, Grouped)
    rising = precision.book.levels(CPU).sort().values
    between = (rising[1:] + rising[:-1]) / 2
    tensor = torch.cat([between, rising[-1:], rising[:1]])
    tensor = torch.cat([tensor, tensor.new_zeros(-len(tensor) % 32)])
    tensor[31::32] = precision.book.reach  # the scale is one
    stored = precision.store(tensor, "vector", ScaleRule()).arrays()
    assert torch.equal(stored["q"], whole(precision, tensor, "vector", ScaleRule())["q"])
    assert bool((stored["scale"] == 1).all())
