"""Compensated rounding: its kernels against the references, and that it never loses to rounding to the nearest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.errors import InfeasibleError
from ssm_mp.kernels import calls
from ssm_mp.kernels import compensate as kernels
from ssm_mp.precisions import compensate
from ssm_mp.precisions.compensate import (
    DAMPINGS,
    LEAST_DAMPING,
    Curve,
    Moment,
    chosen_damping,
    compensated,
    damped,
    descend_columns_reference,
    output_error,
    restored,
    round_columns_reference,
)
from ssm_mp.precisions.grouped import INT3_BOOK, NF2_BOOK, NF3_BOOK, NF4_BOOK, Grouped
from ssm_mp.precisions.groups import CodeBook, best_group_scales, group_ranges, nearest_codes, to_groups
from ssm_mp.precisions.quantize import stored_scales
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.scheme import ScaleRule

BOOKS = {"nf4": NF4_BOOK, "int3": INT3_BOOK, "nf3": NF3_BOOK, "nf2": NF2_BOOK}
GROUPED = {name: found for name, found in PRECISIONS.items() if isinstance(found, Grouped)}
books = st.sampled_from(list(BOOKS.values()))
seeds = st.integers(0, 999)
with_kernels = pytest.mark.skipif(not calls.compiled(), reason="no compiler: nothing to compare")
few = settings(max_examples=25)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(seed: int, k: int, count: int = 40) -> Tensor:
    """Inputs `[count, k]` that depend on one another, some much larger than others."""
    return normal(seed, count, k) @ normal(seed + 1, k, k) * normal(seed + 2, k).exp()


def moment_of(seed: int, k: int, parts: int = 1, count: int = 40) -> Moment:
    inputs = [inputs_of(seed + 10 * part, k, count) for part in range(parts)]
    return Moment(torch.stack([x.T @ x for x in inputs]))


def rising(book: CodeBook) -> Tensor:
    return torch.tensor(sorted(book.values))


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "usable", lambda *_: False)
        yield


def loss(weight: Tensor, found: tuple[Tensor, Tensor], moment: Moment, book: CodeBook) -> float:
    return output_error(weight, restored(*found, book, tuple(weight.shape)), moment)


def nearest(weight: Tensor, importance: Tensor | None, book: CodeBook, group: int) -> Tensor:
    """The matrix at the nearest levels, its scales of least square error, values counting by `importance [n, k]`."""
    groups = to_groups(weight, group)
    counts = None if importance is None else to_groups(importance, group)
    scales = best_group_scales(groups, stored_scales(group_ranges(groups, book)).float(), book, counts)
    values = book.levels(weight.device)[nearest_codes(groups, scales, book)] * scales.float()[:, None]
    return values.flatten()[: weight.numel()].reshape(weight.shape)


def diagonals(moment: Moment, n: int, damping: float = LEAST_DAMPING) -> Tensor:
    """What the square of a value counts by in each of n rows, `[n, k]`."""
    found = [damped(second, damping) for second in moment.second]
    return torch.cat([one.diagonal().float().expand(n // moment.parts, -1) for one in found if one is not None])


@with_kernels
@given(books, st.integers(1, 9), st.integers(1, 40), seeds)
def test_the_kernel_that_rounds_columns_agrees_with_its_reference(book: CodeBook, n: int, b: int, seed: int) -> None:
    weight, scale = normal(seed, n, b), normal(seed + 1, n, b).abs() + 0.1
    factor = normal(seed + 2, b, b).triu() * 0.2
    factor.diagonal().copy_(torch.rand(b, generator=torch.Generator().manual_seed(seed)) + 0.5)
    expected, errors = round_columns_reference(weight, factor, scale, rising(book))
    found, found_errors = kernels.round_columns(weight.clone(), factor, scale, rising(book))
    # a value in the middle of two levels may go to either, and what comes after it in its row then differs
    same = (found == expected).all(dim=1)
    assert int((~same).sum()) <= n // 5
    torch.testing.assert_close(found_errors[same], errors[same], rtol=1e-3, atol=1e-4)


@with_kernels
@given(books, st.integers(1, 9), st.integers(1, 40), seeds)
def test_the_kernel_that_improves_columns_agrees_with_its_reference(book: CodeBook, n: int, b: int, seed: int) -> None:
    curvature, levels = damped(moment_of(seed, b).second[0], 0.03), rising(book)
    assert curvature is not None
    curvature = curvature.float()
    weight, scale = normal(seed, n, b), normal(seed + 1, n, b).abs() + 0.1
    start = levels[torch.randint(0, len(levels), (n, b), generator=torch.Generator().manual_seed(seed))] * scale
    expected, slope = start.clone(), (start - weight) @ curvature
    found, found_slope = start.clone(), slope.clone()
    descend_columns_reference(expected, slope, curvature, scale, levels)
    kernels.descend_columns(found, found_slope, curvature, scale, levels)
    same = (found == expected).all(dim=1)
    assert int((~same).sum()) <= n // 5
    torch.testing.assert_close(found_slope[same], slope[same], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found_slope, (found - weight) @ curvature, rtol=1e-3, atol=1e-3)


@with_kernels
@given(books, st.integers(1, 9), st.sampled_from([8, 32, 64, 128]), seeds)
def test_the_kernel_that_chooses_scales_takes_one_of_least_error(
    book: CodeBook, count: int, group: int, seed: int
) -> None:
    groups, weight = normal(seed, count, group), normal(seed + 1, count, group).square()
    full, rule = stored_scales(group_ranges(groups, book)).float(), ScaleRule("mse")
    tried = torch.stack([stored_scales(full * part) for part in book.clippings(rule)]).float()
    found = kernels.choose_scales(groups, weight, tried, rising(book))
    expected = best_group_scales(groups, full, book, weight).float()

    def error(scales: Tensor) -> Tensor:
        values = book.levels(groups.device)[nearest_codes(groups, scales, book)] * scales[:, None]
        return ((values - groups).square() * weight).sum(dim=1)

    assert bool((tried == found).any(dim=0).all())
    torch.testing.assert_close(error(found), error(expected), rtol=1e-5, atol=1e-6)


@with_kernels
def test_the_kernel_that_chooses_scales_refuses_groups_that_it_has_no_room_for() -> None:
    groups = torch.ones(2, kernels.MOST + 1)
    with pytest.raises(ValueError, match="129 values: .* at most 128"):
        kernels.choose_scales(groups, groups, torch.ones(1, 2), torch.tensor([-1.0, 1.0]))


@with_kernels
@given(books, st.integers(1, 6), st.sampled_from([8, 64, 96, 192]), st.sampled_from([32, 64]), seeds)
@few
def test_with_and_without_kernels_as_little_is_lost(book: CodeBook, n: int, k: int, group: int, seed: int) -> None:
    weight, moment = normal(seed, 8 * n, k), moment_of(seed, k)
    found = compensated(weight, moment, book, group)
    with without_kernels():
        expected = compensated(weight, moment, book, group)
    one, other = loss(weight, found, moment, book), loss(weight, expected, moment, book)
    assert one == pytest.approx(other, rel=0.05)  # a tie anywhere leads elsewhere, hardly to another error
    assert float((found[0] == expected[0]).float().mean()) > 0.8


@given(
    books, st.sampled_from([1, 2]), st.integers(1, 5), st.sampled_from([8, 40, 64, 128, 192]),
    st.sampled_from([32, 64]), seeds, st.booleans(),
)  # fmt: skip
@few
def test_never_more_is_lost_than_by_the_nearest_levels_of_the_same_scales(
    book: CodeBook, parts: int, n: int, k: int, group: int, seed: int, kernels_used: bool
) -> None:
    weight, moment = normal(seed, 8 * n * parts, k), moment_of(seed, k, parts)
    if kernels_used:
        found = compensated(weight, moment, book, group)
    else:
        with without_kernels():
            found = compensated(weight, moment, book, group)
    plain = nearest(weight, diagonals(moment, 8 * n * parts), book, group)
    assert loss(weight, found, moment, book) < output_error(weight, plain, moment)


@given(books, st.integers(1, 9), st.sampled_from([64, 128, 160]), seeds, st.booleans())
@few
def test_no_step_of_improvement_raises_the_form(book: CodeBook, n: int, k: int, seed: int, kernels_used: bool) -> None:
    """After each step the gradient is that of the values as they are, too."""
    weight, group = normal(seed, n, k), 32
    curve = Curve.of(moment_of(seed, k).second[0], 0.03)
    assert curve is not None
    scale = (normal(seed + 1, n, k // group).abs() + 0.1).half().float().repeat_interleave(group, dim=1)
    rounded = compensate.fed_back(weight, curve, scale, rising(book))

    def form() -> Tensor:
        off = (rounded - weight).double()
        return ((off @ curve.second.double()) * off).sum(dim=1)

    gradient, last = (rounded - weight) @ curve.second, form()
    with pytest.MonkeyPatch.context() as patch:
        if not kernels_used:
            patch.setattr(calls, "usable", lambda *_: False)
        for _ in range(3):
            compensate._descend(rounded, gradient, curve.second, scale, rising(book))
            assert bool((form() <= last * (1 + 1e-4) + 1e-6).all())
            last = form()
            scale = compensate._refined(rounded, gradient, curve.second, scale, group)
            assert bool((form() <= last * (1 + 1e-4) + 1e-6).all())
            last = form()
            torch.testing.assert_close(gradient, (rounded - weight) @ curve.second, rtol=1e-3, atol=1e-3)
    levels = rounded / scale
    assert bool(((levels[..., None] - rising(book)).abs().amin(dim=-1) < 1e-5).all())
    assert torch.equal(scale, scale.half().float())


@pytest.mark.parametrize("kernels_used", [True, False])
def test_errors_go_from_block_to_block_as_within_one(kernels_used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels_used:
        monkeypatch.setattr(calls, "usable", lambda *_: False)
    weight, scale, levels = normal(15, 40, 64), torch.full((40, 64), 0.5), rising(NF3_BOOK)
    curve = Curve.of(moment_of(15, 64).second[0], 0.03)
    assert curve is not None
    whole = compensate.fed_back(weight, curve, scale, levels)
    monkeypatch.setattr(compensate, "_BLOCK", 16)
    same = (compensate.fed_back(weight, curve, scale, levels) == whole).all(dim=1)
    assert float(same.float().mean()) > 0.9


def test_improvement_in_rounds_loses_less_than_feeding_errors_on_alone() -> None:
    weight, moment = normal(1, 32, 128), moment_of(1, 128, count=300)
    best = loss(weight, compensated(weight, moment, NF3_BOOK, 64), moment, NF3_BOOK)
    alone = compensated(weight, moment, NF3_BOOK, 64, rounds=0)
    assert best < 0.95 * loss(weight, alone, moment, NF3_BOOK)


@pytest.mark.parametrize("k", [8, 64, 100])
@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_with_inputs_that_are_independent_the_values_are_the_nearest(book: CodeBook, k: int) -> None:
    weight, moment = normal(2, 32, k), Moment(torch.eye(k)[None])
    improved = loss(weight, compensated(weight, moment, book, 64), moment, book)
    # without rounds: the last scales are better ones for the codes before them
    found = restored(*compensated(weight, moment, book, 64, rounds=0), book, (32, k))
    expected = nearest(weight, None, book, 64)
    assert torch.equal(found, expected)
    assert improved <= output_error(weight, expected, moment) * (1 + 1e-6)


@pytest.mark.parametrize("name", GROUPED)
def test_every_precision_that_has_a_book_has_its_arrays_and_loses_less_than_the_nearest(name: str) -> None:
    precision, weight, moment = GROUPED[name], normal(3, 16, 128), moment_of(3, 128, count=200)
    stored = precision.compensated(weight, moment, LEAST_DAMPING)
    expected = {suffix: (spec.shape, spec.dtype) for suffix, spec in precision.arrays((16, 128), "weight").items()}
    assert {suffix: (tuple(a.shape), a.dtype) for suffix, a in stored.arrays().items()} == expected
    plain = precision.store(weight, "weight", ScaleRule("mse")).tensor()
    assert output_error(weight, stored.tensor(), moment) < output_error(weight, plain, moment)


@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_rows_without_a_moment_are_rounded_to_the_nearest(book: CodeBook) -> None:
    weight, zero = normal(4, 16, 64), torch.zeros(1, 64, 64)
    expected = nearest(weight, None, book, 64)
    assert torch.equal(restored(*compensated(weight, Moment(zero), book, 64), book, (16, 64)), expected)
    half = Moment(torch.cat([moment_of(4, 64).second, zero]))
    found = restored(*compensated(weight, half, book, 64), book, (16, 64))
    assert torch.equal(found[8:], expected[8:])
    assert not torch.equal(found[:8], expected[:8])


@pytest.mark.parametrize("where", [(0, 0), (0, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_nothing_to_go_by(where: tuple[int, int], value: float) -> None:
    second = moment_of(5, 64).second.clone()
    second[0][where] = second[0][where[::-1]] = value
    assert damped(second[0], LEAST_DAMPING) is None
    weight = normal(5, 8, 64)
    found = restored(*compensated(weight, Moment(second), NF4_BOOK, 64), NF4_BOOK, (8, 64))
    assert torch.equal(found, nearest(weight, None, NF4_BOOK, 64))


@given(st.integers(1, 5), st.integers(0, 30), seeds)
def test_a_singular_moment_still_has_factors(count: int, unseen: int, seed: int) -> None:
    """Of fewer tokens than inputs, and with inputs that are always zero."""
    x = normal(seed, count, 48)
    x[:, :unseen] = 0
    curve = Curve.of(x.T @ x, LEAST_DAMPING)
    assert curve is not None
    second = curve.second[curve.order][:, curve.order].double()
    upper = curve.factor.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ second, torch.eye(48, dtype=torch.float64), rtol=0, atol=2e-2)
    moment = Moment((x.T @ x)[None])
    weight = normal(seed + 1, 8, 48)
    assert loss(weight, compensated(weight, moment, NF3_BOOK, 32), moment, NF3_BOOK) < output_error(
        weight, nearest(weight, diagonals(moment, 8), NF3_BOOK, 32), moment
    )


def test_a_moment_that_is_not_even_positive_is_damped_until_it_is() -> None:
    second = torch.eye(8)
    second[0, 1] = second[1, 0] = 5.0
    found = damped(second, LEAST_DAMPING)
    assert found is not None
    assert bool((torch.linalg.eigvalsh(found) > 0).all())
    assert float(found.diagonal().mean()) == pytest.approx(1)


@pytest.mark.parametrize("k", [64, 40])
def test_rows_of_each_part_are_rounded_by_its_moment(k: int) -> None:
    """40: groups cross rows, and a part's first row begins with one."""
    weight, moment = normal(6, 48, k), moment_of(6, k, parts=3)
    found = restored(*compensated(weight, moment, NF3_BOOK, 64), NF3_BOOK, (48, k))
    for part in range(3):
        rows = slice(16 * part, 16 * (part + 1))
        alone = compensated(weight[rows], Moment(moment.second[part : part + 1]), NF3_BOOK, 64)
        assert torch.equal(found[rows], restored(*alone, NF3_BOOK, (16, k)))
    turned = Moment(moment.second.roll(1, 0))
    assert loss(weight, compensated(weight, turned, NF3_BOOK, 64), moment, NF3_BOOK) > output_error(
        weight, found, moment
    )


@pytest.mark.parametrize(("n", "k", "group"), [(60, 64, 64), (66, 40, 64), (90, 8, 64), (60, 24, 32)])
@pytest.mark.parametrize("parts", [1, 6])
def test_rows_in_slices_are_what_they_are_together(
    n: int, k: int, group: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moment = normal(7, n, k), moment_of(7, k, parts)
    whole = compensated(weight, moment, INT3_BOOK, group)
    asked: list[int] = []
    of_rows = compensate._of_rows

    def counted(weight: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        asked.append(len(weight))
        return of_rows(weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(compensate, "_of_rows", counted)
    monkeypatch.setattr(compensate, "_VALUES", 10 * k)
    found = compensated(weight, moment, INT3_BOOK, group)
    assert sum(asked) == n
    assert len(asked) > 1
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


@pytest.mark.parametrize("n", [1, 7, 30])
@pytest.mark.parametrize("k", [1, 8, 40])
def test_groups_that_cross_rows_have_all_values_in_place(n: int, k: int) -> None:
    weight = normal(8, n, k)
    packed, scales = compensated(weight, moment_of(8, k), NF4_BOOK, 64)
    assert packed.shape == (-(-n * k // 64), 32)
    found = restored(packed, scales, NF4_BOOK, (n, k))
    assert float((found - weight).norm()) < 0.5 * float(weight.norm())


def test_matrices_of_a_smaller_type_are_rounded_as_their_values_are() -> None:
    weight, moment = normal(9, 16, 64).bfloat16(), moment_of(9, 64)
    found, expected = (compensated(one, moment, NF4_BOOK, 64) for one in (weight, weight.float()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_damping_is_the_one_that_loses_the_least_by_the_moment_held_out() -> None:
    taken: set[float] = set()
    for seed in range(12):
        weight, k = normal(seed, 16, 64), 64
        # as few tokens as inputs say least of others
        basis = normal(seed + 500, k, k)
        fit, held = (Moment((x.T @ x)[None]) for x in (normal(seed + s, 20 + 40 * seed, k) @ basis for s in (100, 200)))
        errors = [loss(weight, compensated(weight, fit, NF3_BOOK, 64, d), held, NF3_BOOK) for d in DAMPINGS]
        found = chosen_damping(weight, fit, held, NF3_BOOK, 64)
        assert found == DAMPINGS[errors.index(min(errors))]
        taken.add(found)
    assert len(taken) > 1


def test_where_nothing_is_held_out_the_least_damping_is_taken() -> None:
    fit = moment_of(10, 64, count=3)
    assert chosen_damping(normal(10, 8, 64), fit, Moment(torch.zeros(1, 64, 64)), NF4_BOOK, 64) == LEAST_DAMPING


def test_the_damping_of_experts_is_chosen_by_the_one_that_is_seen_most() -> None:
    weight, fit, held = normal(11, 32, 64), moment_of(11, 64, 2, count=30), moment_of(12, 64, 2, count=30)
    held = Moment(held.second * torch.tensor([1e-3, 1.0])[:, None, None])
    alone = chosen_damping(weight[16:], Moment(fit.second[1:]), Moment(held.second[1:]), NF2_BOOK, 64)
    assert chosen_damping(weight, fit, held, NF2_BOOK, 64) == alone


@given(books, st.floats(-30, 4), seeds)
@few
def test_scales_are_finite_and_never_zero(book: CodeBook, exponent: float, seed: int) -> None:
    weight = normal(seed, 8, 64) * 10.0**exponent
    weight[3] = 0
    _, scales = compensated(weight, moment_of(seed, 64), book, 64)
    assert scales.dtype == torch.float16
    assert bool((scales.isfinite() & (scales != 0)).all())


@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
def test_a_row_of_zeros_stays_as_good_as_zero(book: CodeBook) -> None:
    weight = normal(13, 8, 128)
    weight[2] = 0
    found = restored(*compensated(weight, moment_of(13, 128), book, 64), book, (8, 128))
    assert float(found[2].abs().max()) <= 2.0**-24
    assert bool((found[3] != 0).any())


@pytest.mark.parametrize("book", BOOKS.values(), ids=BOOKS)
@pytest.mark.parametrize("kernels_used", [True, False])
def test_a_value_beyond_float16_is_refused(book: CodeBook, kernels_used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels_used:
        monkeypatch.setattr(calls, "usable", lambda *_: False)
    weight = normal(14, 8, 64)
    weight[1, 1] = 1e7
    with pytest.raises(InfeasibleError, match="65504"):
        compensated(weight, moment_of(14, 64), book, 64)


def test_kernels_refuse_what_is_not_float32_in_one_piece() -> None:
    good, levels = torch.ones(4, 4), rising(NF4_BOOK)
    for bad in (good.double(), torch.ones(4, 8)[:, ::2], torch.ones(4, 5)):
        with pytest.raises(ValueError, match="float32, in one piece"):
            kernels.round_columns(good.clone(), good, bad, levels)
