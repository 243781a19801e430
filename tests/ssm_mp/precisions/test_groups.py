"""Packing, code books and scales below 8 bits; nf4 against bitsandbytes."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.errors import InfeasibleError
from ssm_mp.kernels import calls
from ssm_mp.kernels.weights import quantize_groups
from ssm_mp.precisions.grouped import (
    INT3_BOOK,
    INT4_BOOK,
    INT5_BOOK,
    INT6_BOOK,
    NF2_BOOK,
    NF3_BOOK,
    NF4_BOOK,
    Grouped,
    GroupedTensor,
)
from ssm_mp.precisions.groups import (
    CodeBook,
    group_count,
    group_ranges,
    group_scales,
    nearest_codes,
    pack,
    to_groups,
    unpack_at,
    unpack_reference,
    unpack_values,
)
from ssm_mp.precisions.quantize import stored_scales
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.scheme import ScaleMethod, ScaleRule

BOOKS = {
    "int6": INT6_BOOK, "int5": INT5_BOOK, "nf4": NF4_BOOK, "int4": INT4_BOOK, "nf3": NF3_BOOK, "int3": INT3_BOOK,
    "nf2": NF2_BOOK,
}  # fmt: skip
GROUPED = {name: found for name, found in PRECISIONS.items() if isinstance(found, Grouped)}
sizes = st.sampled_from([32, 64, 128])
# and books that no precision of the package has: of every width, full and not
books = st.sampled_from(
    [*BOOKS.values(), *(CodeBook(bits, tuple(map(float, range(2**bits - 1)))) for bits in (2, 5, 6, 7, 8))]
)


def random_codes(book: CodeBook, groups: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(book.values), (groups, size), generator=generator)


def restored(groups: torch.Tensor, scales: torch.Tensor, book: CodeBook) -> torch.Tensor:
    return unpack_values(pack(nearest_codes(groups, scales, book), book.bits), scales, book)


def square_error(groups: torch.Tensor, scales: torch.Tensor, book: CodeBook) -> torch.Tensor:
    return (restored(groups, scales, book) - groups).square().sum(1)


@given(books, st.integers(1, 5), sizes, st.integers(0, 99))
def test_packing_loses_nothing_and_takes_exactly_its_bits(book: CodeBook, groups: int, size: int, seed: int) -> None:
    codes = random_codes(book, groups, size, seed)
    packed = pack(codes, book.bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (groups, size // 8 * book.bits)
    assert torch.equal(unpack_reference(packed, book.bits), codes)


@given(books, st.integers(1, 5), sizes, st.integers(0, 99))
def test_unpacking_by_table_and_by_position_agree_with_the_reference(
    book: CodeBook, groups: int, size: int, seed: int
) -> None:
    codes = random_codes(book, groups, size, seed)
    scales = (torch.rand(groups) + 0.5).half() * torch.tensor([1, -1])[torch.arange(groups) % 2]
    packed = pack(codes, book.bits)
    expected = torch.tensor(book.values)[codes] * scales.float()[:, None]
    assert torch.equal(unpack_values(packed, scales, book), expected)
    positions = torch.randperm(codes.numel())[:50]
    assert torch.equal(unpack_at(packed.flatten(), book.bits, positions).long(), codes.flatten()[positions])


@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_every_value_becomes_its_nearest_level(book: CodeBook) -> None:
    groups = torch.randn(20, 64)
    scales = group_scales(groups, ScaleRule(), book)
    levels = book.levels(groups.device)
    distance = (groups[..., None] - levels * scales.float()[:, None, None]).abs()
    chosen = nearest_codes(groups, scales, book).long()
    assert torch.allclose(distance.gather(-1, chosen[..., None])[..., 0], distance.min(dim=-1).values)


@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_least_square_scales_are_never_worse_than_the_largest_magnitude(book: CodeBook) -> None:
    groups = torch.randn(200, 64)
    plain, best = (
        square_error(groups, group_scales(groups, ScaleRule(rule), book), book) for rule in ("minmax", "mse")
    )
    assert bool((best <= plain).all())
    assert float(best.sum()) < (0.97 if book.bits < 5 else 1.0) * float(plain.sum())


def test_levels_of_nf4_are_the_quantiles_of_qlora() -> None:
    """Appendix E: 2^(k−1) quantiles up to zero and 2^(k−1) + 1 from it on, evenly spaced in probability, one of the two
    zeros left out, divided by the largest."""
    book, half = NF4_BOOK, 8
    tail = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    below, above = (np.linspace(tail, 0.5, count) for count in (half, half + 1))
    quantile = NormalDist().inv_cdf
    levels = [*(-quantile(p) for p in below[:-1]), 0.0, *(quantile(p) for p in reversed(above[:-1]))]
    assert book.values == pytest.approx([level / max(levels) for level in levels], abs=1e-6)
    assert (min(book.values), max(book.values)) == (-1.0, 1.0)


@pytest.mark.parametrize("book", [NF3_BOOK, NF2_BOOK], ids=["nf3", "nf2"])
def test_levels_of_nf3_and_nf2_are_those_of_least_error_for_normal_values(book: CodeBook) -> None:
    """Each level is the mean of the values that are nearer to it than to any other (Lloyd 1982), at some scale."""
    levels, normal = np.array(book.values), NormalDist()
    spread = max(1 / levels[0] * low for low in (-2.1519, -1.5104) if len(levels) == (8 if low < -2 else 4))
    edges = [-math.inf, *(spread * (levels[1:] + levels[:-1]) / 2), math.inf]
    density = [0.0 if math.isinf(edge) else normal.pdf(edge) for edge in edges]
    share = [0.0, *(normal.cdf(edge) for edge in edges[1:-1]), 1.0]
    means = [(density[i] - density[i + 1]) / (share[i + 1] - share[i]) for i in range(len(levels))]
    assert list(levels * spread) == pytest.approx(means, abs=2e-3)


def test_levels_of_int3_are_in_the_places_that_version_0_4_gave_them() -> None:
    assert INT3_BOOK.values == (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, -4.0)
    assert INT3_BOOK.is_of_integers
    assert (INT3_BOOK.lowest, INT3_BOOK.reach, INT3_BOOK.limit) == (-4, -4.0, 4.0)
    assert all(book.is_of_integers for name, book in BOOKS.items() if name.startswith("int"))
    assert not any(book.is_of_integers for name, book in BOOKS.items() if name.startswith("nf"))
    shuffled = CodeBook(3, (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, -4.0, 3.0))
    assert not shuffled.is_of_integers


@given(st.integers(0, 99), sizes, st.booleans())
def test_the_outlier_of_a_group_chooses_the_sign_of_its_scale(seed: int, size: int, kernels: bool) -> None:
    weight = torch.randn(6, size, generator=torch.Generator().manual_seed(seed))
    sign = torch.tensor([1.0, -1, 1, -1, 1, -1])
    weight[:, seed % size] = 5 * sign
    name = "int3" if size == 64 else f"int3g{size}"
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(calls, "usable", lambda *_: False)
        stored = PRECISIONS[name].store(weight, "weight", ScaleRule())
    scale = stored.arrays()["scale"].float()
    assert torch.equal(scale.sign(), -sign)  # the level is −4
    assert torch.equal(scale.abs(), torch.full((6,), 1.25))
    assert torch.equal(stored.tensor()[:, seed % size], weight[:, seed % size])


@pytest.mark.parametrize("book", [NF4_BOOK, INT3_BOOK, NF3_BOOK, NF2_BOOK], ids=["nf4", "int3", "nf3", "nf2"])
@given(st.integers(0, 99), sizes)
def test_a_group_and_its_opposite_are_held_equally_well(book: CodeBook, seed: int, size: int) -> None:
    groups = torch.randn(5, size, generator=torch.Generator().manual_seed(seed)).exp() - 1
    rule = ScaleRule("mse")
    errors = [square_error(part, group_scales(part, rule, book), book) for part in (groups, -groups)]
    torch.testing.assert_close(*errors)
    one_sign = replace(book, either_sign=False)
    assert bool((errors[0] <= square_error(groups, group_scales(groups, rule, one_sign), one_sign) * 1.05).all())


def test_levels_that_are_not_symmetric_lower_the_error_by_a_quarter() -> None:
    groups, rule = torch.randn(500, 64), ScaleRule("mse")
    seven = CodeBook(3, tuple(map(float, range(-3, 4))))
    found, before = (square_error(groups, group_scales(groups, rule, book), book).sum() for book in (INT3_BOOK, seven))
    assert found < 0.8 * before


@given(st.sampled_from(list(BOOKS.values())), st.integers(0, 99), sizes, st.booleans())
def test_weighted_scales_have_the_least_weighted_error(book: CodeBook, seed: int, size: int, each: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(4, size, generator=generator)
    weight = torch.rand((4, size) if each else (size,), generator=generator).square()
    rule = ScaleRule("mse")

    def error(scales: torch.Tensor) -> torch.Tensor:
        return ((restored(groups, scales, book) - groups).square() * weight).sum(1)

    found = error(group_scales(groups, rule, book, weight))
    assert bool((found <= error(group_scales(groups, rule, book)) * (1 + 1e-5)).all())
    tried = [stored_scales(group_ranges(groups, book) * part) for part in book.clippings(rule)]
    torch.testing.assert_close(found, torch.stack([error(scales) for scales in tried]).amin(0))
    same = group_scales(groups, rule, book, torch.ones(size))
    assert torch.equal(same, group_scales(groups, rule, book))


def test_nf4_has_the_code_book_and_the_rounding_of_bitsandbytes() -> None:
    weight = torch.randn(96, 64)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(state.code, NF4_BOOK.levels(weight.device))
    codes = nearest_codes(to_groups(weight), state.absmax, NF4_BOOK)
    high, low = packed.flatten().int() >> 4, packed.flatten().int() & 15  # the first value in the high half there
    assert torch.equal(codes.flatten(), torch.stack([high, low], dim=1).flatten())
    restored = NF4_BOOK.levels(weight.device)[codes] * state.absmax[:, None]
    assert torch.equal(restored, functional.dequantize_4bit(packed, state).reshape(restored.shape))


@given(st.integers(1, 1000))
def test_odd_sizes_are_counted_with_their_filling(values: int) -> None:
    for precision in GROUPED.values():
        groups, size = group_count(values, precision.group), precision.group
        assert size * (groups - 1) < values <= size * groups
        stored = precision.store(torch.randn(values), "vector", ScaleRule())
        held = sum(array.numel() * array.element_size() for array in stored.arrays().values())
        assert held == precision.bytes((values,), "vector") == groups * (size // 8 * precision.bits + 2)
        assert stored.tensor().shape == (values,)
        assert isinstance(stored, GroupedTensor)
        assert stored.group == size


@pytest.mark.parametrize("name", BOOKS)
def test_a_group_of_zeros_stays_zero_and_an_infinite_scale_is_refused(name: str) -> None:
    precision = PRECISIONS[name]
    weight = torch.zeros(3, 64)
    weight[1] = torch.randn(64)
    for method in ("minmax", "mse"):
        zeros = precision.store(weight, "weight", ScaleRule(method)).tensor()[0]
        assert float(zeros.abs().max()) <= (0 if 0.0 in BOOKS[name].values else 2.0**-24)
    weight[2, 0] = 1e7
    with pytest.raises(InfeasibleError, match="65504"):
        precision.store(weight, "weight", ScaleRule("mse"))


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("value", [6e-8, 1e-9, 1e-30])
@pytest.mark.parametrize("name", BOOKS)
def test_a_group_below_float16_is_nearly_zeros_and_bars_no_other(name: str, value: float, method: ScaleMethod) -> None:
    weight = torch.randn(3, 64)
    alone = PRECISIONS[name].store(weight, "weight", ScaleRule(method)).tensor()
    weight[0] = torch.linspace(-1, 1, 64) * value
    found = PRECISIONS[name].store(weight, "weight", ScaleRule(method)).tensor()
    assert torch.equal(found[1:], alone[1:])
    least = 0 if 0.0 in BOOKS[name].values else 2.0**-24  # of a book without a zero, levels as near to it
    assert bool(((found[0] - weight[0]).abs() <= weight[0].abs() + least).all())


def test_books_are_in_the_order_of_their_error_on_normal_weights() -> None:
    weight, rule = torch.randn(100, 64), ScaleRule("mse")
    error = {name: float((PRECISIONS[name].store(weight, "weight", rule).tensor() - weight).norm()) for name in BOOKS}
    assert list(error) == sorted(error, key=error.__getitem__)


def test_shorter_groups_hold_the_same_values_better() -> None:
    weight, rule = torch.randn(100, 128), ScaleRule("mse")
    for book in ("nf4", "int4", "nf3", "int3", "nf2"):
        shorter = [PRECISIONS[f"{book}{size}"].store(weight, "weight", rule) for size in ("g32", "", "g128")]
        errors = [float((stored.tensor() - weight).norm()) for stored in shorter]
        assert errors == sorted(errors)


def test_a_size_of_groups_that_no_kernel_knows_is_held_all_the_same() -> None:
    weight = torch.randn(5, 48)
    stored = Grouped("nf4g16", NF4_BOOK, 16).store(weight, "weight", ScaleRule())
    expected = restored(to_groups(weight, 16), group_scales(to_groups(weight, 16), ScaleRule(), NF4_BOOK), NF4_BOOK)
    assert torch.equal(stored.tensor(), expected.reshape(5, 48))
    with pytest.raises(ValueError, match="groups of 16 values: the kernel knows groups of 32, 64, 128"):
        quantize_groups(
            to_groups(weight, 16), torch.ones(1), NF4_BOOK.levels(weight.device), 4, False, *stored.arrays().values()
        )
