"""The token embedding in blocks of rows by token frequency, each block a component with a precision of its own.

Dimensions: `V` vocabulary, `d` model.

A block holds its tokens in the order of their ids, so the number of each token's block is all that a file
needs besides the rows; it is stored packed, with the first block, and counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ssm_mp.components import find_components
from ssm_mp.config import Config
from ssm_mp.errors import PrecisionMapError
from ssm_mp.model import LanguageModel, assemble
from ssm_mp.modules.embedding import EmbeddingForm, index_bits
from ssm_mp.precisions.groups import pack
from ssm_mp.precisions.stored import ByteTensor, FloatTensor, source_tensor

_MOST_BLOCKS = 256


def with_blocks(config: Config, boundaries: Sequence[int]) -> Config:
    """The configuration with its embedding in blocks: the first `boundaries[0]` most frequent tokens, and so on.

    boundaries: numbers of tokens, rising, all below the vocabulary; none leaves the embedding whole.
    Raises PrecisionMapError for anything else.
    """
    if not boundaries:
        return config
    ends = [0, *boundaries, config.vocabulary]
    rising = all(low < high for low, high in itertools.pairwise(ends))
    if not rising or len(boundaries) >= _MOST_BLOCKS:
        raise PrecisionMapError(
            f"embedding_blocks = {list(boundaries)}: expected fewer than {_MOST_BLOCKS} rising numbers of tokens "
            f"between 1 and {config.vocabulary - 1}, the vocabulary less one, e.g. [250, 1000]"
        )
    return config.replaced(embedding_blocks=tuple(high - low for low, high in itertools.pairwise(ends)))


def block_numbers(counts: Tensor, sizes: Sequence[int]) -> Tensor:
    """The block of each token: the most frequent in block 0, among equals the lower id first. int64 `[V]`.

    counts: how often each token occurs, `[V]`; sizes: rows of each block.
    """
    order = counts.argsort(descending=True, stable=True)
    numbers = torch.empty_like(order)
    numbers[order] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return numbers


def split_embedding(model: LanguageModel, counts: Tensor, boundaries: Sequence[int]) -> LanguageModel:
    """The same FP32 model with its embedding in blocks; `model` is left as it is, other modules are shared.

    counts: how often each token occurs in the calibration text, `[V]`; boundaries: as in `with_blocks`.
    """
    config = with_blocks(model.config, boundaries)
    sizes = config.embedding_blocks
    if not sizes:
        return model
    modules = {c.name: model.component(c.name) for c in find_components(model) if c.kind != "embedding"}
    weight = model.embedding.weight
    assert isinstance(weight, FloatTensor)
    numbers = block_numbers(counts, sizes).to(weight.value.device)
    bits = index_bits(len(sizes))
    padded = torch.nn.functional.pad(numbers, (0, -config.vocabulary % (8 // bits)))
    for b in range(len(sizes)):
        tensors: dict[str, FloatTensor | ByteTensor] = {"weight": source_tensor(weight.value.data[numbers == b])}
        if b == 0:
            tensors["block_of"] = ByteTensor(pack(padded, bits))
        modules[f"embedding.blocks.{b}"] = EmbeddingForm(config.tied).module(tensors, None)
    return assemble(config, modules, after_layer=model.after_layer)
