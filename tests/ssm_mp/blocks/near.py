"""How near the values of a block must be to those of another implementation."""

from __future__ import annotations

from torch import Tensor

TOLERANCE = 1e-5
"""Largest error over the largest value."""


def require_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
