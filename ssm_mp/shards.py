"""Windows in parts that threads take one at a time.

Dimensions: `w` windows, `L` window length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ssm_mp.config import Config

_SHARD_TOKENS, _MANY_TOKENS = 1024, 8192
"""Tokens that one thread takes at a time, so that their activations stay near its core; twice as many where there are
enough of them, so that the interpreter, which threads share, has less to do."""
_SHARD_BYTES = 320 << 20
"""Activations of one shard at the most: fewer tokens go together where a model is so wide that they would take more."""
_GPU_WINDOWS = 32


def shards(values: Tensor, config: Config) -> Sequence[Tensor]:
    """`[w, L, …]` in parts of whole windows, the same whatever the number of threads, so that results are the same."""
    if values.is_cuda:
        return list(values.split(_GPU_WINDOWS))
    tokens = values.shape[0] * values.shape[1]
    parts = math.ceil(tokens / shard_tokens(config, tokens))
    even = parts + parts % 2 if parts > 1 else 1  # two threads have as much to do
    return list(values.tensor_split(min(even, values.shape[0])))


def shard_tokens(config: Config, tokens: int) -> int:
    """How many of so many tokens one thread takes at a time on a CPU, rounded up to whole windows."""
    near = _SHARD_TOKENS * (2 if tokens >= _MANY_TOKENS else 1)
    return min(near, max(1, _SHARD_BYTES // token_bytes(config)))


def token_bytes(config: Config) -> int:
    """Upper bound of the float32 activations that one token takes at the widest point of a model, its logits apart."""
    branches = [branch for layer in config.branches for branch in layer]
    return 4 * max((sum(part.block.token_floats for part in branch.parts) for branch in branches), default=1)
