"""A layer of family `mamba` as one compiled call for many tokens, where the kernels take all of its products.

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `R` step rank, `K` convolution kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssm_mp.kernels import calls, decoding, matrices
from ssm_mp.model import LayerState
from ssm_mp.modules.layers import DepthwiseConv, Embedding, Linear, Norm
from ssm_mp.precisions.matrix import Matrix
from ssm_mp.precisions.stored import Stored

if TYPE_CHECKING:
    from ssm_mp.blocks.mamba1 import MambaMixer

_LOG2_E = math.log2(math.e)
Observer = Callable[[Mapping[str, float]], None]
"""Takes the seconds spent in each component of a layer, by kind."""


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
        self._matrices.append(module.matrix())
        return self._matrices[-1].structure

    def norm(self, norm: nn.Module) -> decoding.Norm:
        """A norm's structure."""
        assert isinstance(norm, Norm)
        return decoding.Norm(self.floats(norm.weight.tensor()), self.optional(norm.bias), norm.eps)

    def layer(self, mixer: MambaMixer, many: bool) -> decoding.Layer:
        """A layer's structure for one token at a time, or for many, as yet without states."""
        A2 = torch.exp(mixer.A_log.tensor()) * -_LOG2_E  # [I, N]  # noqa: N806
        conv = mixer.conv1d
        assert isinstance(conv, DepthwiseConv)
        return decoding.Layer(
            self.norm(mixer.norm),
            *(self.matrix(module) for module in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)),
            self.floats(conv.weight.tensor()[:, 0].t()),  # [K, I]
            self.optional(conv.bias),
            self.floats(A2.t() if many else A2),
            self.floats(mixer.D.tensor()),
        )


class CompiledLayer:
    """The whole layer, residual included."""

    def __init__(self, mixer: MambaMixer) -> None:
        """Only of what `CompiledLayer.of` would take."""
        self._held = Held()
        self._layer = self._held.layer(mixer, many=True)
        self._inner, self._states = mixer.A_log.tensor().shape
        self._rank = mixer.sizes[0]
        conv = mixer.conv1d
        assert isinstance(conv, DepthwiseConv)
        self._kernel = conv.weight.tensor().shape[-1]

    @classmethod
    def of(cls, mixer: MambaMixer) -> CompiledLayer | None:
        """None where there is no compiled way: not on a CPU, no compiler or instructions, another precision, or so
        large that torch's products are faster."""
        # a stack of maps puts a module of its own where they differ
        if not isinstance(mixer.norm, Norm) or not isinstance(mixer.conv1d, DepthwiseConv):
            return None
        if not isinstance(mixer.A_log, Stored) or not isinstance(mixer.D, Stored):
            return None
        for module in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj):
            if not isinstance(module, Linear) or module.weight.device.type != "cpu" or not calls.compiled():
                return None
            matrix = module.matrix()
            if not matrix.takes_many or not matrix.is_small:
                return None
        return cls(mixer)

    def __call__(
        self, x: Tensor, before: LayerState | None, observer: Observer | None = None
    ) -> tuple[Tensor, LayerState]:
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
            conv, scan = (t.clone(memory_format=torch.contiguous_format) for t in (before.conv, before.scan))
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
        return y, LayerState(conv, scan)
