"""Rounding a matrix so that its products change the least, not its values: a value makes up for others' errors.

What is minimised is Σ over rows of (q − w) H (q − w)ᵀ, where H is the second moment of the inputs that a row is
multiplied with (Frantar et al. 2022, GPTQ), weighted by how much the row's output matters where that is known. Scales
are chosen before, each value counting by its input's square; columns are rounded in the order of falling moments, each
error going into those that are still to come; then codes and scales are improved in turn, one at a time, on the same
quadratic form (coordinate descent), which never makes it larger.

Dimensions: `n` rows, `k` values in a row, `r` parts of equally many rows with a moment each, `g` groups of values with
a scale each, `b` columns of a block, `c` levels of a book.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod

import torch
from torch import Tensor

from ssm_mp.kernels import calls, compensate
from ssm_mp.precisions.groups import (
    CodeBook,
    best_group_scales,
    group_count,
    group_ranges,
    nearest_codes,
    pack,
    to_groups,
    unpack_values,
)
from ssm_mp.precisions.quantize import FLOAT16_LARGEST, stored_scales
from ssm_mp.scheme import ScaleRule

_LEAST = ScaleRule("mse")
_BLOCK = 128
"""Columns that are rounded before the errors of all of them go into the others; a multiple of every group."""
ROUNDS = 3
"""Times at most that codes and scales are improved in turn."""
_SETTLED = 1e-3
"""Part of the codes below which so few change that the next round is left out."""
DAMPINGS = (0.003, 0.03, 0.3)
"""What is tried to be added to a moment's diagonal, in parts of its mean."""
LEAST_DAMPING = DAMPINGS[0]
_VALUES = 1 << 22
"""Values that are rounded at a time: of those several copies are held."""
_TRIED_ROWS = 256
"""Rows of a matrix by which its damping is chosen."""


@dataclass(frozen=True, eq=False)
class Moment:
    """Second moments of the inputs of a matrix `[n, k]`: float32 `[r, k, k]`, of the rows of each of r equal parts."""

    second: Tensor

    @property
    def parts(self) -> int:
        return self.second.shape[0]


def compensated(
    weight: Tensor, moment: Moment, book: CodeBook, group: int, damping: float = LEAST_DAMPING, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """`weight [n, k]`, of any float type, as packed codes, uint8 `[g, group·bits/8]`, and their float16 scales `[g]`.

    damping: what is added to the diagonal of moments, in parts of its mean; rounds: how often codes and scales are
    improved. Rows whose moment is zero are rounded to the nearest. Raises InfeasibleError where float16 cannot hold a
    scale.
    """
    n, k = weight.shape
    count = group_count(n * k, group)
    packed = torch.empty(count, group * book.bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(count, dtype=torch.float16, device=weight.device)
    for rows, curves in _slices(weight, [Curve.of(second, damping) for second in moment.second], group):
        codes, own = _of_rows(weight[rows].float(), curves, book, group, rounds)
        first = rows.start * k // group
        packed[first : first + len(own)], scales[first : first + len(own)] = pack(codes, book.bits), own
    return packed, scales


def restored(packed: Tensor, scales: Tensor, book: CodeBook, shape: tuple[int, ...]) -> Tensor:
    """The matrix `[n, k]`, float32, that packed codes and scales are."""
    return unpack_values(packed, scales, book).flatten()[: prod(shape)].reshape(shape)


def output_error(weight: Tensor, rounded: Tensor, moment: Moment) -> float:
    """Σ over tokens of |w x − q x|²: float64."""
    total = 0.0
    offs = (rounded - weight).double().tensor_split(moment.parts)
    for second, off in zip(moment.second, offs, strict=True):
        total += float(((off @ second.double()) * off).sum())
    return total


def chosen_damping(weight: Tensor, fit: Moment, held: Moment, book: CodeBook, group: int) -> float:
    """Of a few dampings the one with which rounding by one moment loses the least by another, held out.

    Found on some rows of the matrix `[n, k]`; the least one where nothing was held out.
    """
    if not bool(held.second.any()):
        return LEAST_DAMPING
    size = group // gcd(group, weight.shape[1])  # rows that begin and end with a group
    own = weight.shape[0] // fit.parts
    p = int(held.second.diagonal(dim1=1, dim2=2).sum(dim=1).argmax())
    some = weight[p * own : (p + 1) * own][: max(size, _TRIED_ROWS // size * size)].float()
    fit, held = Moment(fit.second[p : p + 1]), Moment(held.second[p : p + 1])
    errors = []
    for damping in DAMPINGS:
        found = compensated(some, fit, book, group, damping)
        errors.append(output_error(some, restored(*found, book, tuple(some.shape)), held))
    return DAMPINGS[errors.index(min(errors))]


@dataclass(frozen=True, eq=False)
class Curve:
    """The quadratic form of a row: half its second derivatives `[k, k]` in float32, the order in which columns are
    rounded `[k]`, and by which factors `[k, k]` their errors go into the columns after them, in this order."""

    second: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, moment: Tensor, damping: float) -> Curve | None:
        """Of a moment `[k, k]`; None where there is nothing to go by."""
        curvature = damped(moment, damping)
        if curvature is None:
            return None
        order = curvature.diagonal().argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature[order][:, order]))
        return cls(curvature.float(), order, torch.linalg.cholesky(inverse, upper=True).float())


def damped(second: Tensor, damping: float) -> Tensor | None:
    """A moment `[k, k]` in float64 with part of its mean diagonal added, as much as its factors need, its mean diagonal
    then 1; None where it is zero, or not finite. An input that never differs from zero counts as the mean one."""
    wide = second.double()
    mean = float(wide.diagonal().mean())
    if not mean > 0 or not bool(wide.isfinite().all()):
        return None
    wide = wide / mean
    unseen = wide.diagonal() <= 0
    wide = wide + torch.diag(unseen.double() + damping)
    while int(torch.linalg.cholesky_ex(wide).info) != 0:
        wide = wide + torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * damping
        damping *= 10
    return wide / wide.diagonal().mean()


Curves = Sequence[tuple[slice, Curve | None]]
"""Rows that follow one another, and the form of each."""


def _slices(weight: Tensor, curves: Sequence[Curve | None], group: int) -> Iterator[tuple[slice, Curves]]:
    """The rows of `weight [n, k]` some at a time, beginning with a group, and which of those have which form."""
    n, k = weight.shape
    size = group // gcd(group, k)
    step = max(size, _VALUES // k // size * size)
    part = n // len(curves)
    for first in range(0, n, step):
        last = min(first + step, n)
        inside = [
            (slice(max(first, p * part) - first, min(last, (p + 1) * part) - first), curve)
            for p, curve in enumerate(curves)
            if p * part < last and first < (p + 1) * part
        ]
        yield slice(first, last), inside


def _of_rows(weight: Tensor, curves: Curves, book: CodeBook, group: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Rows `[n, k]` that begin with a group: codes, int32 `[g, group]`, and scales, float16 `[g]`."""
    scales = _first_scales(weight, curves, book, group)
    spread, rounded = _spread(scales, weight, group), torch.empty_like(weight)  # [n, k]
    for rows, curve in curves:
        if curve is None:
            rounded[rows] = _nearest_level(weight[rows], spread[rows], _rising(book, weight.device))
        else:
            rounded[rows], spread[rows] = _improved(weight[rows], curve, spread[rows], book, group, rounds)
    if weight.shape[1] % group == 0:
        scales = spread.reshape(-1, group)[:, 0].half()
    return nearest_codes(to_groups(rounded, group), scales, book), scales


def _first_scales(weight: Tensor, curves: Curves, book: CodeBook, group: int) -> Tensor:
    """Scales of least square error, each value counting by its input's second moment: float16 `[g]`."""
    counts = torch.ones_like(weight)
    for rows, curve in curves:
        if curve is not None:
            counts[rows] = curve.second.diagonal()
    groups, importance = to_groups(weight, group), to_groups(counts, group)
    full = stored_scales(group_ranges(groups, book)).float()
    if group > compensate.MOST or not calls.usable(groups, importance):
        return best_group_scales(groups, full, book, importance)
    tried = [stored_scales((full * part).clamp(-FLOAT16_LARGEST, FLOAT16_LARGEST)) for part in book.clippings(_LEAST)]
    return compensate.choose_scales(groups, importance, torch.stack(tried).float(), _rising(book, weight.device)).half()


def _rising(book: CodeBook, device: torch.device) -> Tensor:
    """The levels of a book, rising."""
    return book.levels(device)[torch.tensor(book.rising, device=device)]


def _spread(scales: Tensor, weight: Tensor, group: int) -> Tensor:
    """The scale of each value: float32 `[n, k]`."""
    return scales.float().repeat_interleave(group)[: weight.numel()].reshape(weight.shape)


def _improved(
    weight: Tensor, curve: Curve, scale: Tensor, book: CodeBook, group: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """Rows `[n, k]` of one form rounded, and the scales of their values `[n, k]`."""
    levels = _rising(book, weight.device)
    rounded = fed_back(weight, curve, scale, levels)
    for _ in range(rounds):
        gradient = (rounded - weight) @ curve.second
        before = rounded.clone()
        _descend(rounded, gradient, curve.second, scale, levels)
        if weight.shape[1] % group == 0:
            scale = _refined(rounded, gradient, curve.second, scale, group)
        if float((before != rounded).float().mean()) < _SETTLED:
            break
    return rounded, scale


def fed_back(weight: Tensor, curve: Curve, scale: Tensor, levels: Tensor) -> Tensor:
    """`weight [n, k]` rounded to `levels [c]` · `scale [n, k]`, the inputs of largest moments first, each error going
    into the values still to come: float32 `[n, k]`."""
    left, scale = weight[:, curve.order], scale[:, curve.order]
    rounded = torch.empty_like(left)
    for block in _blocks(left.shape[1]):
        factor = curve.factor[block, block].contiguous()
        own, at = left[:, block].contiguous(), scale[:, block].contiguous()
        rounded[:, block], errors = _round(own, factor, at, levels)
        left[:, block.stop :] -= errors @ curve.factor[block, block.stop :]
    return rounded[:, curve.order.argsort()]


def _descend(rounded: Tensor, gradient: Tensor, curvature: Tensor, scale: Tensor, levels: Tensor) -> None:
    """Improve each value of `rounded [n, k]` in place while all others stay, block after block."""
    for block in _blocks(rounded.shape[1]):
        # copies, though a block may be all there is: the gradient follows for all columns at once
        own, slope = (one[:, block].clone(memory_format=torch.contiguous_format) for one in (rounded, gradient))
        before = own.clone()
        step = compensate.descend_columns if calls.usable(own) else descend_columns_reference
        step(own, slope, curvature[block, block].contiguous(), scale[:, block].contiguous(), levels)
        rounded[:, block] = own
        gradient += (own - before) @ curvature[block]


def _refined(rounded: Tensor, gradient: Tensor, curvature: Tensor, scale: Tensor, group: int) -> Tensor:
    """Better scales `[n, k]` of the codes as they are, group after group; `rounded` and `gradient` follow in place.

    Groups lie within rows. A scale stays where float16 holds no better one.
    """
    scale = scale.clone()
    for first in range(0, rounded.shape[1], group):
        part = slice(first, first + group)
        old = scale[:, first]
        codes = rounded[:, part] / old[:, None]  # [n, group], the levels
        slope = (codes * gradient[:, part]).sum(dim=1)
        bend = ((codes @ curvature[part, part]) * codes).sum(dim=1)
        new = (old - slope / bend).half().float()
        change = new - old
        better = new.isfinite() & (new != 0) & (change * (2 * slope + change * bend) < 0)
        change = torch.where(better, change, 0.0)
        scale[:, part] = (old + change)[:, None]
        moved = codes * change[:, None]
        rounded[:, part] = codes * scale[:, part]
        gradient += moved @ curvature[part]
    return scale


def _blocks(columns: int) -> Iterator[slice]:
    for first in range(0, columns, _BLOCK):
        yield slice(first, min(first + _BLOCK, columns))


def _round(weight: Tensor, factor: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    step = compensate.round_columns if calls.usable(weight) else round_columns_reference
    return step(weight, factor, scale, levels)


def round_columns_reference(weight: Tensor, factor: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`weight [n, b]` rounded column after column, and what each is off over the diagonal of `factor [b, b]`: this,
    times its row, goes out of the columns after it."""
    left, rounded, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = _nearest_level(left[:, j], scale[:, j], levels)
        errors[:, j] = (left[:, j] - rounded[:, j]) / factor[j, j]
        left[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
    return rounded, errors


def descend_columns_reference(
    rounded: Tensor, gradient: Tensor, curvature: Tensor, scale: Tensor, levels: Tensor
) -> None:
    """Move each of `rounded [n, b]`, column after column, to the best level while all others stay, in place."""
    for j in range(rounded.shape[1]):
        best = _nearest_level(rounded[:, j] - gradient[:, j] / curvature[j, j], scale[:, j], levels)
        change = best - rounded[:, j]
        rounded[:, j] = best
        gradient += change[:, None] * curvature[j]


def _nearest_level(values: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The nearest level times its scale; of two as near the lower level."""
    between = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize((values / scale).contiguous(), between)] * scale
