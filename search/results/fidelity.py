"""A map and FP32 on the same windows → how far its predictions are from FP32's.

Dimensions: `w` windows.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtrit

from search.base.clustered import LEAST_CLUSTERS, clustered
from search.base.fidelity import Fidelity
from ssm_mp.evaluation.compare import Departure
from ssm_mp.evaluation.evaluate import Evaluation, FloatArray, percent_of

WORST = 0.1
"""The share of windows that are told of as the worst."""


def fidelity_of(found: Departure, fp32: Evaluation, sources: np.ndarray | None = None) -> Fidelity:
    """The figures of a map beside FP32 on the same windows; sources: which document each is from `[w]`."""
    n, tokens = found.windows, found.predicted
    rises = (found.nll - fp32.nll) / tokens
    kl, changed = found.kl / tokens, found.changed / tokens
    documents = 0 if sources is None else np.unique(sources).size
    known = sources if documents >= LEAST_CLUSTERS else None
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
        documents=None if known is None else documents,
        kl_reach_documents_nats=None if known is None else _reach(kl, known),
        changed_reach_documents=None if known is None else _reach(changed, known),
    )


def _reach(values: FloatArray, sources: np.ndarray) -> float:
    """How far 95 % of the mean of windows' values `[w]` reach, over documents, to either side."""
    found = clustered(values, sources)
    return found.log_stderr * float(stdtrit(found.freedom, 0.975))


def _stderr(values: FloatArray) -> float:
    """Of the mean of windows' values `[w]`."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.inf
