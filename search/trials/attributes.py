"""What a trial carries besides its parameters and values, and how it is read back.

Dimensions: `w` windows.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from optuna.trial import TrialState

MEASURED, ORIGIN, REASON, DIFFERENCES = "measured", "origin", "reason", "differences"
"""Names of the user attributes: figures, where the map comes from, why it failed, log-increase of each window."""

LATENCY = "latency_seconds"
"""Among the figures: the map's predicted latency, where the study asks for it."""

OWNER, ATTEMPT, FIRST, REOPENED = "owner", "attempt", "first", "reopened"
"""Who evaluates it; which try of this map it is, from 1; number of the trial that tried it first; number of the one
that a smaller budget stopped."""

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
"""Trials with a result: with all windows, or stopped early."""


def packed(differences: np.ndarray) -> str:
    """Log-increases of windows `[w]` as a short text; float32 is far finer than their noise."""
    return base64.b64encode(differences.astype("<f4").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """Inverse of `packed`: float64 `[w]`."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(float)


def log_increase(measured: Mapping[str, Any]) -> tuple[float, float]:
    """Log-increase of a trial, and the variance that its unseen windows leave (0 where it has seen all)."""
    ratio = 1 + measured["increase_percent"] / 100
    unseen = 1 - measured["windows"] / measured.get("of_windows", measured["windows"])
    return math.log(ratio), (measured["stderr_percent"] / 100 / ratio) ** 2 * unseen
