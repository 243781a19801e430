"""int8 products by torch and by the exact emulation in float32, for the shapes of a small and a 130M Mamba.

    python -m benchmarks.integers

Which of them serves is decided once a process by timing both (`precisions.quantize.integer_product`); the numbers are
the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ssm_mp.precisions.quantize import _native_product, _native_product_is_exact, integer_product_emulated

SHAPES = ((4096, 128, 512), (4096, 256, 40), (256, 128, 8000), (4096, 256, 128), (2048, 768, 3072))
"""Tokens, inner size, outputs."""
_ROUNDS = 3


def median_milliseconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """Median time of a product, after one to set up."""
    product(a, b)
    spent = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        product(a, b)
        spent.append(1e3 * (time.perf_counter() - began))
    return statistics.median(spent)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"torch's product is {'exact' if _native_product_is_exact() else 'not exact'} on this CPU")
    print(f"{'tokens':>8} {'inner':>6} {'outputs':>8} {'torch ms':>10} {'emulated ms':>12} {'ratio':>7}")
    generator = torch.Generator().manual_seed(0)
    for m, k, n in SHAPES:
        a, b = (torch.randint(-127, 128, (r, k), generator=generator, dtype=torch.int8) for r in (m, n))
        native = median_milliseconds(_native_product, a, b)
        emulated = median_milliseconds(integer_product_emulated, a, b)
        print(f"{m:>8} {k:>6} {n:>8} {native:>10.2f} {emulated:>12.2f} {native / emulated:>7.2f}")


if __name__ == "__main__":
    main()
