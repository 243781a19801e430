"""The simplest language model of a text: how often each token occurs."""

from __future__ import annotations

import math

from torch import Tensor

from ssm_mp.data.windows import Windows


def unigram_perplexity(counts: Tensor, windows: Windows) -> float:
    """Perplexity of a unigram model, add-one smoothed, on the predicted tokens of `windows`.

    counts `[V]`: how often each token occurs in another text than that of the windows.
    """
    log_probabilities = ((counts.double() + 1) / (counts.double() + 1).sum()).log()
    return math.exp(-float(log_probabilities[windows.ids[:, 1:]].mean()))
