"""Which installations of mamba_ssm count, and what the wrapper gives its kernel; the package itself is a stand-in."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssm_mp.kernels import scan_mamba_ssm
from tests.ssm_mp.kernels.scan_cases import CASES, require_close, selective_inputs, selective_truth


def _kernel(  # noqa: PLR0917, the arguments that the kernel has
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> tuple[Tensor, Tensor]:
    """What mamba_ssm's selective_scan_ref computes (u, delta, z `[b, I, l]`; B, C `[b, N, l]`), as the kernel does."""
    assert all(values.is_contiguous() for values in (u, delta, B, C, z))
    assert delta_bias is None
    assert delta_softplus
    assert return_last_state
    state, outputs = torch.zeros(u.shape[0], *A.shape), []
    step = F.softplus(delta)
    for t in range(u.shape[2]):
        decay = torch.exp(torch.einsum("bd,dn->bdn", step[..., t], A))
        state = decay * state + torch.einsum("bd,bn,bd->bdn", step[..., t], B[..., t], u[..., t])
        outputs.append(torch.einsum("bdn,bn->bd", state, C[..., t]))
    y = torch.stack(outputs, dim=2) + u * D[:, None]
    return y * F.silu(z), state


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a stand-in of mamba_ssm in place, with or without its CUDA part."""

    def put(**attributes: Any) -> None:
        package, operations = ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops")
        interface = ModuleType(scan_mamba_ssm.INTERFACE)
        vars(interface).update(attributes)
        for module in (package, operations, interface):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return put


def test_mamba_ssm_with_its_cuda_part_is_available(install: Any) -> None:
    install(selective_scan_cuda=object(), selective_scan_fn=_kernel)
    assert scan_mamba_ssm.available()


@pytest.mark.parametrize("attributes", [{}, {"selective_scan_cuda": None}])
def test_mamba_ssm_without_its_cuda_part_is_not_available(install: Any, attributes: dict[str, Any]) -> None:
    install(selective_scan_fn=_kernel, **attributes)
    assert not scan_mamba_ssm.available()


def test_mamba_ssm_that_cannot_be_imported_is_not_available(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, scan_mamba_ssm.INTERFACE, None)  # what importing then raises is ImportError
    assert not scan_mamba_ssm.available()


def test_mamba_ssm_without_a_gpu_is_not_available(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(selective_scan_cuda=object(), selective_scan_fn=_kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not scan_mamba_ssm.available()


def _from_a_state(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    names = ("a", "dt", "A", "B", "C", "D", "z", "state")
    return selective_truth(dict(zip(names, arguments, strict=True)))


@pytest.mark.parametrize("name", [name for name, sizes in CASES.items() if sizes.length < 100])
def test_the_wrapper_keeps_the_contract_of_the_scans(install: Any, name: str) -> None:
    install(selective_scan_cuda=object(), selective_scan_fn=_kernel)
    scan, inputs = scan_mamba_ssm.make_selective_scan(_from_a_state), selective_inputs(name)
    require_close(scan(**inputs), selective_truth(inputs))
