"""Token and position embeddings.

Dimensions: `b` batch, `l` length, `d` model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm_mp.kernels import calls
from ssm_mp.modules.inputs import InputQuantizer
from ssm_mp.modules.linear import Multiplier, Projection
from ssm_mp.modules.parameter import Parameter, weight
from ssm_mp.modules.unpacked import Unpacked
from ssm_mp.precisions.groups import unpack_reference
from ssm_mp.precisions.stored import ByteTensor, Stored


class Embedding(Multiplier):
    """The token embedding (or one block of its rows), and with the same rows the tied head.

    block_of: in the first block, which token is in which block, packed.
    """

    def __init__(
        self, weight: Stored, inputs: InputQuantizer | None = None, block_of: ByteTensor | None = None
    ) -> None:
        super().__init__(weight, None, inputs)
        self.block_of = block_of

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[b, l]` → `[b, l, d]`."""
        by_kernel = not self._is_float32 and not self.weight.is_trained and self.weight.device.type == "cpu"
        matrix = self._own_matrix() if by_kernel and type(ids) is Tensor and calls.compiled() else None
        if matrix is None:
            return self.weight.rows(ids)
        return matrix.rows(ids.flatten().long()).reshape(*ids.shape, matrix.structure.k)

    def project(self, x: Tensor) -> Tensor:
        """The tied head: `x [..., d]` → logits `[..., V]`."""
        return self.multiply(x)


class BlockedEmbedding(nn.Module):
    """A token embedding in blocks of rows; a block holds its tokens in the order of their ids."""

    block_of: Tensor
    row_of: Tensor
    column_of: Tensor

    def __init__(self, blocks: Sequence[nn.Module], block_of: Tensor) -> None:
        """`block_of [V]`: the number of each token's block, int64."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        order = block_of.argsort(stable=True)  # token of each column, block after block
        column_of = torch.empty_like(order)
        column_of[order] = torch.arange(order.numel(), device=order.device)
        sizes = torch.bincount(block_of, minlength=len(blocks))
        self.register_buffer("block_of", block_of, persistent=False)
        self.register_buffer("column_of", column_of, persistent=False)
        self.register_buffer("row_of", column_of - (sizes.cumsum(0) - sizes)[block_of], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[b, l]` → `[b, l, d]`; each block looks up its own tokens only."""
        flat = ids.flatten()
        of = self.block_of[flat]
        at = [(of == b).nonzero()[:, 0] for b in range(len(self.blocks))]
        found = [block(self.row_of[flat[where]]) for block, where in zip(self.blocks, at, strict=True)]
        rows = torch.empty(flat.numel(), found[0].shape[1], dtype=found[0].dtype, device=ids.device)
        return rows.index_copy_(0, torch.cat(at), torch.cat(found)).reshape(*ids.shape, -1)

    def project(self, x: Tensor) -> Tensor:
        """The tied head block after block: `x [..., d]` → logits `[..., V]`, token `i` in `column_of[i]`."""
        return torch.cat([block.project(x) for block in self.blocks], dim=-1)  # type: ignore[operator]

    def projection(self) -> Projection:
        """`project` for many calls: each block's rows are unpacked once."""
        return Projection([block.part() for block in self.blocks])  # type: ignore[operator]


class PositionEmbedding(nn.Module):
    """Learned absolute positions."""

    def __init__(self, weight: Stored) -> None:
        super().__init__()
        self.weight = weight
        self._table = Unpacked()  # of some hundred positions, while every token needs one

    def forward(self, length: int, start: int = 0) -> Tensor:
        """The positions `start` … `length` − 1: `[l − start, d]`."""
        return self._table(self.weight)[start:length]


@dataclass(frozen=True)
class EmbeddingForm:
    """The token embedding, or one block of its rows; `tied`: the head has the same rows."""

    tied: bool

    @property
    def multiplies_inputs(self) -> bool:
        return self.tied

    def module(self, tensors: Mapping[str, Stored], inputs: InputQuantizer | None) -> nn.Module:
        block_of = tensors.get("block_of")
        assert block_of is None or isinstance(block_of, ByteTensor)
        return Embedding(tensors["weight"], inputs, block_of)


@dataclass(frozen=True)
class PositionForm:
    """Learned absolute positions."""

    @property
    def multiplies_inputs(self) -> bool:
        return False

    def module(self, tensors: Mapping[str, Stored], inputs: InputQuantizer | None) -> nn.Module:
        return PositionEmbedding(tensors["weight"])


def embedding_parameters(vocabulary: int, d_model: int, tied: bool, blocks: tuple[int, ...]) -> Iterator[Parameter]:
    """The token embedding, whole or in blocks of rows; the first block then tells which token is in which."""
    form = EmbeddingForm(tied)
    if not blocks:
        yield weight("embedding", "embedding", None, form, vocabulary, d_model)
        return
    for b, rows in enumerate(blocks):
        component = f"embedding.blocks.{b}"
        yield weight(component, "embedding", None, form, rows, d_model)
        if b == 0:
            size = -(-vocabulary * index_bits(len(blocks)) // 8)
            yield Parameter(f"{component}.block_of", (size,), component, "embedding", None, "index", form)


def index_bits(blocks: int) -> int:
    """Bits in which a block's number is stored: a divisor of 8, so that no number crosses a byte."""
    return next(bits for bits in (1, 2, 4, 8) if blocks <= 1 << bits)


def blocked_embedding(blocks: Sequence[nn.Module], vocabulary: int) -> BlockedEmbedding:
    """The token embedding of blocks; the first one says which token is in which."""
    packed = blocks[0].block_of
    assert isinstance(packed, Stored)
    numbers = unpack_reference(packed.tensor(), index_bits(len(blocks)))[:vocabulary]
    return BlockedEmbedding(blocks, numbers)
