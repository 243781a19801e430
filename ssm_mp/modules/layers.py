"""The modules that a model is made of, one a component, whatever precision each is stored in.

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `K` convolution kernel, `V` vocabulary,
`m` tokens (`b·l`), `n` outputs, `k` inputs of a product.

The FP32 model and every converted model are built of the same classes; only their `Stored` tensors and
input quantisers differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.config import Config
from ssm_mp.kernels import calls, cuda
from ssm_mp.kernels.chosen import kernels_for
from ssm_mp.modules.likelihood import token_divergence, token_nll
from ssm_mp.precisions.matrix import FEW_ROWS, SMALLEST_SCALE, Inputs, Matrix
from ssm_mp.precisions.quantize import INT8_LIMIT, quantize_tensor
from ssm_mp.precisions.stored import ByteTensor, FloatTensor, Int8Tensor, Stored

LINEAR_KINDS = frozenset({"in_proj", "x_proj", "dt_proj", "out_proj", "delta_proj", "w1", "w2", "router", "lm_head"})
"""Component kinds that are linear layers."""


class StaticInput(nn.Module):
    """Quantises the inputs of a linear layer with one scale, calibrated beforehand."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)  # float16 [1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [m, k]` → int8 `[m, k]` and its float32 scale, once for each row, `[m, 1]`."""
        if calls.usable(x):
            return calls.quantize_static(x, self.scale.item())
        if cuda.usable(x):
            return cuda.quantize_static(x, self.scale)  # reading its value would wait for the GPU
        scale = self.scale.float()
        # NaN and infinity have no int8 value: let them spoil their row's scale instead of vanishing
        return quantize_tensor(x, scale), scale + 0.0 * x.sum(dim=1, keepdim=True)


class DynamicInput(nn.Module):
    """Quantises the inputs of a linear layer with one scale a token, taken from the token itself."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [m, k]` → int8 `[m, k]` and float32 scales `[m, 1]`."""
        kernels = kernels_for(x)
        if kernels is not None:
            return kernels.quantize_dynamic(x, SMALLEST_SCALE)
        scale = (x.abs().amax(dim=1, keepdim=True) / INT8_LIMIT).clamp_(min=SMALLEST_SCALE)
        return quantize_tensor(x, scale), scale


InputQuantizer = StaticInput | DynamicInput


def linear(x: Tensor, weight: Stored, bias: Stored | None, inputs: InputQuantizer | None) -> Tensor:
    """`x [..., k]` times `weight [n, k]` transposed, plus `bias [n]`: float32 `[..., n]`.

    With an input quantiser the product is one of integers, accumulated in int32. Without one, a quantised
    weight is unpacked first, and a float16 weight computes in float16 on a GPU.
    """
    if inputs is not None:
        assert isinstance(weight, Int8Tensor)
        flat = x.reshape(-1, x.shape[-1])  # [m, k]
        quantized, input_scale = inputs(flat)
        sums = weight.product(quantized)
        product = rescaled(sums, weight.scale.float(), input_scale, None if bias is None else bias.tensor())
        return product.reshape(*x.shape[:-1], -1)
    if x.is_cuda and isinstance(weight, FloatTensor) and weight.value.dtype == torch.float16:
        half_bias = None if bias is None else bias.tensor().half()
        return F.linear(x.half(), weight.value, half_bias).float()
    return F.linear(x, weight.tensor(), None if bias is None else bias.tensor())


def rescaled(sums: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """int32 `sums [m, n]` · scales `columns [n]` and `rows [m, 1]`, plus `bias [n]`: float32 `[m, n]`."""
    kernels = kernels_for(columns, rows)
    if kernels is not None:
        return kernels.rescale(sums, columns, rows, bias)
    product = sums.float().mul_(columns).mul_(rows)
    return product if bias is None else product.add_(bias)


@dataclass(frozen=True, eq=False)
class Projection:
    """Products with the same inputs side by side, each `(weight, bias, input quantiser)`, ready for many calls.

    matrix: of a single product, where kernels take it straight from its inputs to likelihoods.
    """

    parts: Sequence[tuple[Stored, Stored | None, InputQuantizer | None]]
    matrix: Matrix | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`x [..., k]` → `[..., n]`, one part after another."""
        if self.matrix is not None and self.matrix.suits_many and calls.usable(x):
            return self.matrix.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        found = [linear(x, *part) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def nll(self, x: Tensor, columns: Tensor, held: int) -> Tensor:
        """Negative log-likelihood of `columns [m]` where the products of `x [m, k]` are logits: float64 `[m]`.

        held: for how many tokens at most there may be logits in memory.
        """
        if self.matrix is not None and calls.usable(x):
            return self.matrix.nll(x, columns)
        return torch.cat([self._nll(*part) for part in zip(x.split(held), columns.split(held), strict=True)])

    def divergence(
        self, x: Tensor, columns: Tensor, reference: Projection, expected: Tensor, held: int
    ) -> tuple[Tensor, Tensor]:
        """`nll`, the very same numbers, and KL(reference ‖ this) of each token's logits: float64 `[m]` each.

        Logits are those of `x [m, k]` here and of `expected [m, k]` there.
        """
        if self.matrix is not None and reference.matrix is not None and calls.usable(x, expected):
            return self.matrix.divergence(x, columns, reference.matrix, expected)
        chunks = zip(x.split(held), expected.split(held), strict=True)
        kl = torch.cat([token_divergence(self(ours), reference(theirs)) for ours, theirs in chunks])
        return self.nll(x, columns, held), kl

    def _nll(self, x: Tensor, columns: Tensor) -> Tensor:
        weight, bias, inputs = self.parts[0]
        if len(self.parts) == 1 and inputs is not None and bias is None and calls.usable(x):
            assert isinstance(weight, Int8Tensor)
            quantized, rows = inputs(x)
            return calls.scaled_nll(weight.product(quantized), weight.scale.float(), rows, columns)
        return token_nll(self(x), columns)


class _Multiplier(nn.Module):
    """A module with one weight that multiplies its inputs."""

    def __init__(self, weight: Stored, bias: Stored | None, inputs: InputQuantizer | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.inputs = inputs
        self._matrix: tuple[object, Matrix, object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None}  # addresses cannot be copied

    def multiply(self, x: Tensor) -> Tensor:
        """`x [..., k]` → `[..., n]`."""
        rows = x.numel() // x.shape[-1]
        if not self._is_float32 and calls.usable(x):
            matrix = self.matrix()
            if rows <= FEW_ROWS or matrix.suits_many:
                return matrix.product(x.reshape(rows, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return linear(x, self._to_multiply(), self.bias, self.inputs)

    def _to_multiply(self) -> Stored:
        """The weight as many rows are multiplied with it: unpacked, unless its own product takes it packed."""
        if self._is_float32 or self.inputs is not None or self.weight.device.type == "cuda":
            return self.weight
        return FloatTensor(self.matrix().unpacked() if calls.compiled() else self.weight.tensor())

    def matrix(self) -> Matrix:
        """The weight as the kernels of a CPU read it, made once."""
        held = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        stamp = ([tensor.stamp for tensor in held], self.inputs_stamp)
        current = self._matrix
        if current is None or current[0] != stamp:
            how: Inputs = "none" if self.inputs is None else "dynamic"
            if isinstance(self.inputs, StaticInput):
                made = Matrix(self.weight, self.bias, "static", self.inputs.scale.item())
            else:
                made = Matrix(self.weight, self.bias, how)
            # what was read is held too: another tensor in its place would have its stamp
            current = (stamp, made, [tensor.arrays() for tensor in held])
            self._matrix = current
        return current[1]

    @property
    def inputs_stamp(self) -> object:
        """Changes whenever the way that inputs are quantised does."""
        if not isinstance(self.inputs, StaticInput):
            return type(self.inputs)
        scale = self.inputs.scale
        return scale.item() if scale.device.type == "cpu" else scale.data_ptr()

    def projection(self) -> Projection:
        """`multiply` for many calls."""
        if self.bias is None and not self._is_float32 and self.weight.device.type == "cpu" and calls.compiled():
            matrix = self.matrix()
            if matrix.scores_many:
                return Projection([(self.weight, self.bias, self.inputs)], matrix)
        return Projection([self.part()])

    def part(self) -> tuple[Stored, Stored | None, InputQuantizer | None]:
        """As one of several in a `Projection`: the weight is unpacked once."""
        return self._to_multiply(), self.bias, self.inputs

    @property
    def _is_float32(self) -> bool:
        """Whether torch has nothing to unpack."""
        return isinstance(self.weight, FloatTensor) and self.weight.value.dtype == torch.float32


class Linear(_Multiplier):
    """A projection with its optional bias."""

    def __init__(self, weight: Stored, bias: Stored | None = None, inputs: InputQuantizer | None = None) -> None:
        super().__init__(weight, bias, inputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., k]` → `[..., n]`."""
        return self.multiply(x)


class Embedding(_Multiplier):
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
        return self.weight.rows(ids)

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

    def forward(self, length: int, start: int = 0) -> Tensor:
        """The positions `start` … `length` − 1: `[l − start, d]`."""
        return self.weight.rows(torch.arange(start, length, device=self.weight.device))


class Unpacked:
    """A small tensor as it is computed with, unpacked once: what does not change need not be unpacked at every call."""

    def __init__(self, make: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """`make`: of the float32 tensor, what is computed with."""
        self._make = make
        self._held: tuple[object, Tensor, object] | None = None

    def __call__(self, stored: Stored) -> Tensor:
        """What is computed with in place of `stored`."""
        if stored.is_trained:
            return self._make(stored.tensor())
        stamp = stored.stamp
        if self._held is None or self._held[0] != stamp:
            # what was unpacked is held too: another tensor in its place would have its stamp
            self._held = (stamp, self._make(stored.tensor()), stored.arrays())
        return self._held[1]


class Norm(nn.Module):
    """LayerNorm (with bias) or RMSNorm (without) over the last dimension."""

    def __init__(self, weight: Stored, bias: Stored | None, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self._factors, self._offsets = Unpacked(), Unpacked()

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., d]` → `[..., d]`."""
        weight = self._factors(self.weight)
        bias = None if self.bias is None else self._offsets(self.bias)
        if calls.usable(x, weight):
            return calls.normalise(x, weight, bias, self.eps)
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class DepthwiseConv(nn.Module):
    """Causal depthwise convolution along the length, then SiLU; weight-only in every precision."""

    def __init__(self, weight: Stored, bias: Stored | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._taps = Unpacked(lambda tensor: tensor[:, 0, :].t().contiguous().t())  # as the kernels read them
        self._offsets = Unpacked()

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x [b, l, I]`, and the inputs `[b, K−1, I]` before it (None: zeros) → `[b, l, I]`, and its last inputs."""
        weight = self._taps(self.weight)  # [I, K]
        bias = None if self.bias is None else self._offsets(self.bias)
        width = weight.shape[1] - 1
        if before is None:
            before = x.new_zeros(x.shape[0], width, x.shape[2])
        # copied, or the whole of what `x` is a part of would live on with it
        last = x[:, -width:].clone() if x.shape[1] >= width > 0 else torch.cat((before, x), dim=1)[:, x.shape[1] :]
        kernels = kernels_for(x, weight, before)
        if kernels is not None:
            return kernels.conv_silu(x, weight, bias, before), last
        return conv_silu_reference(x, weight, bias, before), last


def conv_silu_reference(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor:
    """SiLU of the convolution of `x [b, l, I]` by `weight [I, K]`, after the inputs `before [b, K−1, I]`.

    K shifted products, which need no transposed copy of `x`; differentiable.
    """
    kernel, length = weight.shape[1], x.shape[1]
    padded = torch.cat((before, x), dim=1)  # [b, l + K − 1, I]
    y = padded[:, :length] * weight[:, 0]
    for k in range(1, kernel):
        y = torch.addcmul(y, padded[:, k : k + length], weight[:, k])
    return F.silu(y if bias is None else y + bias)


def component_module(
    kind: str, tensors: Mapping[str, Stored], config: Config, inputs: InputQuantizer | None = None
) -> nn.Module:
    """The module of one component.

    tensors: its stored tensors by leaf name (`weight`, `bias`; the kind itself for bare values such as `A_log`).
    """
    if kind in LINEAR_KINDS:
        return Linear(tensors["weight"], tensors.get("bias"), inputs)
    if kind == "embedding":
        block_of = tensors.get("block_of")
        assert block_of is None or isinstance(block_of, ByteTensor)
        return Embedding(tensors["weight"], inputs, block_of)
    if kind == "position_embedding":
        return PositionEmbedding(tensors["weight"])
    if kind == "norm":
        return Norm(tensors["weight"], tensors.get("bias"), config.norm_eps)
    if kind == "conv1d":
        return DepthwiseConv(tensors["weight"], tensors.get("bias"))
    return tensors[kind]  # A_log, D, B, C: the stored value itself
