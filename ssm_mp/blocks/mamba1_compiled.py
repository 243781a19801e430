"""A Mamba-1 branch as one compiled call for many tokens, where the kernels take all of its products.

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `R` step rank, `K` convolution kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm_mp.blocks.block import Observer, State
from ssm_mp.kernels import calls, decoding, matrices
from ssm_mp.modules.convolution import DepthwiseConv
from ssm_mp.modules.embedding import Embedding
from ssm_mp.modules.linear import Linear
from ssm_mp.modules.norm import Norm
from ssm_mp.precisions.matrix import Matrix
from ssm_mp.precisions.stored import Stored

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, eq=False)
class Branch:
    """The components of a Mamba-1 branch, its norm among them; a stack of maps puts modules of its own in some."""

    norm: nn.Module
    in_proj: nn.Module
    x_proj: nn.Module
    dt_proj: nn.Module
    out_proj: nn.Module
    conv1d: nn.Module
    A_log: nn.Module
    D: nn.Module
    dt_rank: int

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """In the order of the structure that the kernels take."""
        return (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)


def knows(module: nn.Module) -> bool:
    """Whether the kernels read this component's weight as it is stored."""
    return isinstance(module, Linear | Embedding) and module.matrix() is not None


class Held:
    """Copies of tensors that structures point to: they live as long as this does."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._matrices: list[Matrix] = []

    def floats(self, values: Tensor) -> int:
        """Where a copy of these values lies, float32 and contiguous."""
        self._tensors.append(values.detach().float().clone(memory_format=torch.contiguous_format))
        return self._tensors[-1].data_ptr()

    def optional(self, stored: Stored | None) -> int | None:
        """The same of a tensor that may be missing."""
        return None if stored is None else self.floats(stored.tensor())

    def matrix(self, module: nn.Module) -> matrices.Matrix:
        """A weight's structure. The module may make its own anew at any time: this one lives on here."""
        assert isinstance(module, Linear | Embedding)
        matrix = module.matrix()
        assert matrix is not None, "asked for a weight that the kernels do not know"
        self._matrices.append(matrix)
        return matrix.structure

    def norm(self, norm: nn.Module) -> decoding.Norm:
        """A norm's structure."""
        assert isinstance(norm, Norm)
        return decoding.Norm(self.floats(norm.weight.tensor()), self.optional(norm.bias), norm.eps)

    def layer(self, branch: Branch, many: bool) -> decoding.Layer:
        """A branch's structure for one token at a time, or for many, as yet without states."""
        conv, A_log, D = branch.conv1d, branch.A_log, branch.D  # noqa: N806
        assert isinstance(conv, DepthwiseConv)
        assert isinstance(A_log, Stored)
        assert isinstance(D, Stored)
        A2 = torch.exp(A_log.tensor()) * -_LOG2_E  # [I, N]  # noqa: N806
        return decoding.Layer(
            self.norm(branch.norm),
            *(self.matrix(module) for module in branch.projections),
            self.floats(conv.weight.tensor()[:, 0].t()),  # [K, I]
            self.optional(conv.bias),
            self.floats(A2.t() if many else A2),
            self.floats(D.tensor()),
        )


class CompiledBranch:
    """The whole branch, norm and residual included."""

    def __init__(self, branch: Branch) -> None:
        """Only of what `CompiledBranch.of` would take."""
        assert isinstance(branch.A_log, Stored)
        assert isinstance(branch.conv1d, DepthwiseConv)
        self._held = Held()
        self._layer = self._held.layer(branch, many=True)
        self._inner, self._states = branch.A_log.tensor().shape
        self._rank = branch.dt_rank
        self._kernel = branch.conv1d.weight.tensor().shape[-1]

    @classmethod
    def of(cls, branch: Branch) -> CompiledBranch | None:
        """None where there is no compiled way: not on a CPU, no compiler, another precision, or so
        large that torch's products are faster."""
        norm, conv = branch.norm, branch.conv1d
        if not isinstance(norm, Norm) or norm.one_plus or not isinstance(conv, DepthwiseConv):
            return None
        if not isinstance(branch.A_log, Stored) or not isinstance(branch.D, Stored):
            return None
        for module in branch.projections:
            if not isinstance(module, Linear) or module.weight.device.type != "cpu" or not calls.compiled():
                return None
            matrix = module.matrix()
            if matrix is None or matrix.structure.kind == matrices.FLOAT32:
                return None
            if not (matrix.suits_many or matrix.is_small):
                return None
        return cls(branch)

    def __call__(self, x: Tensor, before: State | None, observer: Observer | None = None) -> tuple[Tensor, State]:
        """`x [b, l, d]`, float32, and the state before it (None: zeros) → `[b, l, d]`, and the state after it.

        observer: is told where its time goes.
        """
        x = x.contiguous()
        b, length, width = x.shape
        if width != self._layer.in_proj.k:
            raise ValueError(f"inputs of width {width} for a layer of width {self._layer.in_proj.k}")
        if before is None:
            conv, scan = torch.zeros(b, self._kernel - 1, self._inner), torch.zeros(b, self._inner, self._states)
        else:
            conv, scan = (t.clone(memory_format=torch.contiguous_format) for t in before)
        y = torch.empty_like(x)
        # a structure of its own for each call: threads share this object
        layer = decoding.Layer.from_buffer_copy(self._layer)
        layer.conv, layer.state = conv.data_ptr(), scan.data_ptr()
        seconds = torch.zeros(len(decoding.TIMED), dtype=torch.float64)
        tokens = decoding.Tokens(
            b, length, width, self._inner, self._states, self._rank, self._kernel,
            x.data_ptr(), y.data_ptr(), None, None if observer is None else seconds.data_ptr(),
        )  # fmt: skip
        decoding.layer_many(layer, tokens)
        if observer is not None:
            observer(dict(zip(decoding.TIMED, seconds.tolist(), strict=True)))
        return y, (conv, scan)
