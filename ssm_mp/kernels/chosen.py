"""Which kernels compute with given tensors: those of the CPU, those of CUDA, or none."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ssm_mp.kernels import calls, cuda


class Kernels(Protocol):
    """What the kernels of a CPU and those of CUDA have in common; `calls.py` says what each computes."""

    def conv_silu(self, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor) -> Tensor: ...

    def quantize_dynamic(self, x: Tensor, smallest: float) -> tuple[Tensor, Tensor]: ...

    def rescale(self, sums: Tensor, columns: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor: ...

    def negative_log_likelihood(self, logits: Tensor, targets: Tensor) -> Tensor: ...


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The kernels that take these tensors; None where torch's own operators must compute."""
    if calls.usable(*tensors):
        return calls
    return cuda if cuda.usable(*tensors) else None
