"""A map and FP32 on the same windows → how far its predictions are from FP32's.

Dimensions: `w` windows.
"""

from __future__ import annotations

import math

import numpy as np

from search.base.fidelity import Fidelity
from ssm_mp.evaluation.compare import Departure
from ssm_mp.evaluation.evaluate import Evaluation, FloatArray, percent_of

WORST = 0.1
"""The share of windows that are told of as the worst."""


def fidelity_of(found: Departure, fp32: Evaluation) -> Fidelity:
    """The figures of a map beside FP32 on the same windows."""
    n, tokens = found.windows, found.predicted
    rises = (found.nll - fp32.nll) / tokens
    kl, changed = found.kl / tokens, found.changed / tokens
    worst = np.argsort(-rises, kind="stable")[: math.ceil(WORST * n)]
    return Fidelity(
        windows=n,
        tokens=found.tokens,
        kl_nats=float(kl.mean()),
        kl_stderr_nats=_stderr(kl),
        changed=float(changed.mean()),
        changed_stderr=_stderr(changed),
        worst_windows=worst.size,
        worst_increase_percent=percent_of(float(rises[worst].mean())),
        worst_kl_nats=float(kl[worst].mean()),
    )


def _stderr(values: FloatArray) -> float:
    """Of the mean of windows' values `[w]`."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.inf
