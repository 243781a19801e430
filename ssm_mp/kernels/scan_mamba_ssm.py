"""Mamba's scan by the CUDA kernel of the package mamba_ssm, where it is installed with that part.

Dimensions: `b` batch, `l` length, `I` inner, `N` state.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

INTERFACE = "mamba_ssm.ops.selective_scan_interface"
"""Where mamba_ssm keeps the kernel, and says whether it has it."""


def available() -> bool:
    """Whether there is a GPU, and mamba_ssm with its CUDA part: it also installs without, and then is only slow."""
    if not torch.cuda.is_available():
        return False
    try:
        interface = importlib.import_module(INTERFACE)
    except ImportError:  # not there, or there without the extension that it imports
        return False
    return getattr(interface, "selective_scan_cuda", None) is not None


ScanWithState = Callable[..., tuple[Tensor, Tensor]]


def make_selective_scan(with_state: ScanWithState) -> ScanWithState:
    """The kernel behind the contract of `scan.py`; it cannot begin from a state, so `with_state` does where one is."""
    kernel = importlib.import_module(INTERFACE).selective_scan_fn

    def selective_scan(
        a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None  # noqa: N803
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Arguments and results as of `scan_triton.selective_scan`."""
        if state is not None:
            return with_state(a, dt, A, B, C, D, z, state)
        # the kernel wants time last and contiguous
        a_t, dt_t, B_t, C_t, z_t = (values.transpose(1, 2).contiguous() for values in (a, dt, B, C, z))  # noqa: N806
        y, last = kernel(a_t, dt_t, A.float(), B_t, C_t, D.float(), z_t, delta_softplus=True, return_last_state=True)
        return y.transpose(1, 2), last

    return selective_scan
