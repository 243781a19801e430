"""Rotary position embeddings (Su et al. 2021), and how they are stretched for windows longer than those of training.

The formulas are those of transformers' `modeling_rope_utils`. Every family here turns pairs of numbers half a rotation
apart ("rotate half"), none neighbours.

Dimensions: `b` batch, `h` heads, `l` length, `e` head, `r` dimensions that are turned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearStretch:
    """Every frequency divided by `factor`."""

    factor: float

    def stretched(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        """Frequencies as they are used, and what cosine and sine are multiplied with."""
        return frequencies / self.factor, 1.0


@dataclass(frozen=True)
class Llama3Stretch:
    """Slow frequencies divided by `factor`, fast ones as they are, and a smooth way between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def stretched(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        """As `LinearStretch.stretched`."""
        turns = self.original_length * frequencies / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = share.clamp(0, 1)  # 1: as it is
        return (1 - share) * frequencies / self.factor + share * frequencies, 1.0


@dataclass(frozen=True)
class YarnStretch:
    """YaRN (Peng et al. 2023): frequencies stretched by how often they turn in the original length, and louder scores.

    attention_factor: what cosine and sine are multiplied with; None: 0.1 ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def stretched(self, frequencies: Tensor, theta: float) -> tuple[Tensor, float]:
        """As `LinearStretch.stretched`."""
        half = frequencies.numel()
        low, high = self._dimension(self.beta_fast, half, theta), self._dimension(self.beta_slow, half, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low or 0.001
        slow = ((torch.arange(half, dtype=torch.float32, device=frequencies.device) - low) / width).clamp(0, 1)
        louder = self.attention_factor
        if louder is None:
            louder = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return frequencies / self.factor * slow + frequencies * (1 - slow), louder

    def _dimension(self, turns: float, half: int, theta: float) -> float:
        """Which pair turns so often within the original length."""
        return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)


Stretch = LinearStretch | Llama3Stretch | YarnStretch


@dataclass(frozen=True)
class Rotary:
    """The first `dims` of a head's dimensions are turned, by angles that grow with the position."""

    dims: int
    theta: float
    stretch: Stretch | None = None

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Of each pair, in radians a position: float32 `[r / 2]`; and what cosine and sine are multiplied with."""
        exponents = torch.arange(0, self.dims, 2, dtype=torch.float32, device=device) / self.dims
        frequencies = 1.0 / self.theta**exponents
        return (frequencies, 1.0) if self.stretch is None else self.stretch.stretched(frequencies, self.theta)

    def waves(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the positions `start` … `start` + l − 1: float32 `[l, r / 2]` each."""
        frequencies, louder = self.frequencies(device)
        positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
        angles = positions[:, None] * frequencies
        return angles.cos() * louder, angles.sin() * louder


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`x [b, h, l, e]` with its first `r` dimensions turned by waves `[l, r / 2]`; the others are as they were."""
    half = cosine.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    pair = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat((*pair, x[..., 2 * half :]), dim=-1)
