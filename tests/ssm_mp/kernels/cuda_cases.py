"""Inputs for the kernels of CUDA, odd shapes and strided rows among them, and what torch's operators make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import convert
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.kernels import calls, cuda
from ssm_mp.modules.convolution import conv_silu_reference
from ssm_mp.modules.inputs import DynamicInput, StaticInput
from ssm_mp.modules.linear import rescaled
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import ActivationScheme, Scheme
from tests.tiny import CONFIGS, random_model, some_windows

SHAPES = {
    "one value": (1, 1),
    "one row": (1, 70),
    "odd sizes": (5, 37),
    "more rows than a block": (331, 33),
    "longer than a block": (3, 5000),
}
CONVOLUTIONS = {
    "one tap, one token, one channel": (2, 1, 1, 1),
    "fewer tokens than taps": (3, 2, 40, 4),
    "more tokens and channels than a block": (2, 19, 150, 4),
    "three taps": (1, 9, 33, 3),
}
PRODUCTS = {
    "of single values": (1, 1, 1),
    "of one row": (1, 70, 40),
    "of odd sizes": (37, 45, 129),
    "of few columns": (150, 8, 256),
    "of several blocks": (300, 272, 384),
}
SMALLEST = 1e-12
SCALE = torch.tensor([0.0145416259765625], dtype=torch.float16)  # its inverse gives other roundings than itself


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows(name: str) -> Tensor:
    """`x [m, k]`, whose rows lie apart; some of it beyond what one scale holds, and some between two steps."""
    m, k = SHAPES[name]
    x = _normal(m, 2 * k + 3)[:, 2 : k + 2]
    between = SCALE.float() * (torch.arange(250) - 124.5)
    beside = [torch.nextafter(between, between + side) for side in (-1, 1)]
    x[0, :750] = torch.cat((between, *beside))[:k]
    return x


def spoiled_rows() -> Tensor:
    """Rows of which all but the first hold a value that is not finite, at an end or in the middle."""
    x = _normal(7, 1500)
    for row, (column, value) in enumerate(((0, torch.nan), (1499, torch.nan), (700, torch.inf), (1100, -torch.inf)), 1):
        x[row, column] = value
    x[5], x[6] = torch.nan, torch.inf
    return x


def products(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sums [m, n]`, whose rows lie apart, scales of columns and rows, and a bias."""
    m, n = SHAPES[name]
    sums = (_normal(m, n + 5) * 2**26).to(torch.int32)[:, :n]
    return sums, _normal(n).abs(), _normal(m, 1).abs(), _normal(n) * 1e5


def factors(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Factors `[m, k]`, whose rows lie apart, and `[n, k]` of a product, scales of columns and rows, a bias."""
    m, n, k = PRODUCTS[name]
    generator = torch.Generator().manual_seed(m + n + k)
    a, b = (
        torch.randint(-127, 128, (rows, k + 3), generator=generator).to(torch.int8)[:, 1 : k + 1] for rows in (m, n)
    )
    return a, b.contiguous(), _normal(n).abs().half(), _normal(m, 1).abs(), _normal(n) * 1e5


def convolution(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x`, whose tokens lie apart, weight, bias, and the inputs before."""
    b, length, inner, taps = CONVOLUTIONS[name]
    x = _normal(b, length, 2 * inner)[..., inner:]
    return x, _normal(inner, 1, taps)[:, 0], _normal(inner), _normal(b, length + taps, inner)[:, length + 1 :]


def logits(name: str) -> tuple[Tensor, Tensor]:
    """Logits `[m, V]`, far from zero and rising, whose rows lie apart, and targets."""
    m, k = SHAPES[name]
    x = (_normal(m, k + 3) * 3 + torch.arange(k + 3) * 0.01 + 300)[:, :k]
    return x, torch.arange(x.shape[0]) * 7 % x.shape[1]


def _rows_and(name: str, second: Any) -> tuple[Tensor, Any]:
    return rows(name), second


def _without_bias_of_product(*tensors: Tensor) -> tuple[Tensor | None, ...]:
    return (*tensors[:4], None)


def _without_bias(x: Tensor, weight: Tensor, _: Tensor, before: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
    return x, weight, None, before


CASES: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    **{f"static, {name}": ("quantize_static", partial(_rows_and, name, SCALE)) for name in SHAPES},
    **{f"dynamic, {name}": ("quantize_dynamic", partial(_rows_and, name, SMALLEST)) for name in SHAPES},
    "dynamic, zeros": ("quantize_dynamic", lambda: (torch.zeros(2, 9), SMALLEST)),
    **{f"rescale, {name}": ("rescale", partial(products, name)) for name in SHAPES},
    "rescale, no bias": ("rescale", lambda: (*products("odd sizes")[:3], None)),
    **{f"product {name}": ("scaled_product", partial(factors, name)) for name in PRODUCTS},
    "product, no bias": ("scaled_product", lambda: _without_bias_of_product(*factors("of odd sizes"))),
    **{f"convolution, {name}": ("conv_silu", partial(convolution, name)) for name in CONVOLUTIONS},
    "convolution, no bias": ("conv_silu", lambda: _without_bias(*convolution("three taps"))),
    **{f"likelihood, {name}": ("negative_log_likelihood", partial(logits, name)) for name in SHAPES},
}
"""By name: a function of `cuda`, and the arguments to give it."""
SPOILED: dict[str, Callable[[], Any]] = {
    "quantize_static": lambda: SCALE,
    "quantize_dynamic": lambda: SMALLEST,
    "negative_log_likelihood": lambda: torch.full((7,), 3),
}
"""The functions that mark rows that are not finite, and their second argument beside `spoiled_rows`."""
EXACT = ("quantize_static", "quantize_dynamic", "rescale", "scaled_product")
"""The functions that round as torch's operators do."""
REFERENCES: dict[str, Callable[..., Any]] = {
    "quantize_static": lambda x, scale: StaticInput(scale)(x),
    "quantize_dynamic": lambda x, _: DynamicInput()(x),
    "rescale": rescaled,
    "scaled_product": lambda a, b, columns, *rest: rescaled((a.long() @ b.long().t()).int(), columns.float(), *rest),
    "conv_silu": conv_silu_reference,
    "negative_log_likelihood": lambda x, targets: F.cross_entropy(x.double(), targets, reduction="none"),
}
"""The same out of torch's operators, within `only(None)`."""
MODELS: list[tuple[str, ActivationScheme]] = [("mamba", "static"), ("mamba", "dynamic"), ("itera", "static")]


def evaluated(family: str, scheme: ActivationScheme, kernels: str | None) -> Tensor:
    """The losses of a tiny model converted to int8, float64 `[w]`, computed by `only` these kernels."""
    model, windows = random_model(CONFIGS[family]), some_windows(2)
    int8 = PrecisionMap.uniform("int8", find_components(model))
    converted = convert(model, int8, Scheme(scheme), calibrate(model, windows))
    with only(kernels):
        return torch.from_numpy(evaluate(converted, windows).nll)


@contextmanager
def only(kernels: str | None) -> Iterator[None]:
    """All tensors are computed with by the kernels of CUDA, whose Triton is interpreted, or (None) by no kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "usable", lambda *tensors: False)
        patch.setattr(cuda, "usable", lambda *tensors: kernels == "cuda")
        yield
