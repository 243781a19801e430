"""Packing, code books and scales below 8 bits; nf4 against bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.errors import InfeasibleError
from ssm_mp.precisions.grouped import (
    INT3_BOOK,
    INT4_BOOK,
    INT5_BOOK,
    INT6_BOOK,
    NF2_BOOK,
    NF3_BOOK,
    NF4_BOOK,
    Grouped,
)
from ssm_mp.precisions.groups import (
    CodeBook,
    group_count,
    group_scales,
    nearest_codes,
    pack,
    to_groups,
    unpack_at,
    unpack_reference,
    unpack_values,
)
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


def random_codes(book: CodeBook, groups: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, len(book.values), (groups, 64), generator=generator)


@given(books, st.integers(1, 5), st.integers(0, 99))
def test_packing_loses_nothing_and_takes_exactly_its_bits(book: CodeBook, groups: int, seed: int) -> None:
    codes = random_codes(book, groups, seed)
    packed = pack(codes, book.bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (groups, 8 * book.bits)
    assert torch.equal(unpack_reference(packed, book.bits), codes)


@given(books, st.integers(1, 5), st.integers(0, 99))
def test_unpacking_by_table_and_by_position_agree_with_the_reference(book: CodeBook, groups: int, seed: int) -> None:
    codes = random_codes(book, groups, seed)
    scales = (torch.rand(groups) + 0.5).half()
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

    def error(rule: ScaleRule) -> torch.Tensor:
        scales = group_scales(groups, rule, book)
        return (
            (unpack_values(pack(nearest_codes(groups, scales, book), book.bits), scales, book) - groups).square().sum(1)
        )

    plain, best = error(ScaleRule("minmax")), error(ScaleRule("mse"))
    assert bool((best <= plain).all())
    assert float(best.sum()) < (0.97 if book.bits < 5 else 1.0) * float(plain.sum())


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
    groups = group_count(values)
    assert 64 * (groups - 1) < values <= 64 * groups
    for precision in map(PRECISIONS.__getitem__, BOOKS):
        stored = precision.store(torch.randn(values), "vector", ScaleRule())
        held = sum(array.numel() * array.element_size() for array in stored.arrays().values())
        assert held == precision.bytes((values,), "vector") == groups * (8 * precision.bits + 2)
        assert stored.tensor().shape == (values,)


@pytest.mark.parametrize("name", BOOKS)
def test_a_group_of_zeros_stays_zero_and_an_infinite_scale_is_refused(name: str) -> None:
    precision = PRECISIONS[name]
    weight = torch.zeros(3, 64)
    weight[1] = torch.randn(64)
    assert torch.equal(precision.store(weight, "weight", ScaleRule("mse")).tensor()[0], torch.zeros(64))
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
    assert bool(((found[0] - weight[0]).abs() <= weight[0].abs()).all())


def test_books_are_in_the_order_of_their_error_on_normal_weights() -> None:
    weight, rule = torch.randn(100, 64), ScaleRule("mse")
    error = {name: float((PRECISIONS[name].store(weight, "weight", rule).tensor() - weight).norm()) for name in BOOKS}
    assert list(error) == sorted(error, key=error.__getitem__)
