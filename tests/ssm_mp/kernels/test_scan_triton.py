"""The Triton scans: interpreted on a CPU, compiled for GPUs that need not be there, and run on one that is."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_mp.kernels import cuda, scan_triton
from tests.ssm_mp.kernels.scan_cases import CASES, FAMILIES, LONG, QUICK, require_close

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
Outputs = dict[str, tuple[Tensor, Tensor]]


def _interpreted(folder: Path, names: list[str]) -> Outputs:
    """What the kernels give in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "tests.ssm_mp.kernels.interpreted_scans", str(folder / "found.pt"), *names]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[3])
    found: Outputs = torch.load(folder / "found.pt")
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    return _interpreted(tmp_path_factory.mktemp("quick"), list(QUICK))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    return _interpreted(tmp_path_factory.mktemp("long"), list(LONG))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_agrees_with_the_recurrence_in_float64(quick: Outputs, family: str, name: str) -> None:
    inputs, truth = FAMILIES[family]
    require_close(quick[f"{family}\n{name}"], truth(inputs(name)))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_agrees_with_the_recurrence_in_float64_over_long_sequences(
    long: Outputs, family: str, name: str
) -> None:
    inputs, truth = FAMILIES[family]
    require_close(long[f"{family}\n{name}"], truth(inputs(name)))


@pytest.mark.skipif(not scan_triton.available(), reason="no GPU with Triton")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_compiled_kernel_agrees_with_the_recurrence_in_float64(family: str, name: str) -> None:
    inputs, truth = FAMILIES[family]
    on_device = {key: None if value is None else value.cuda() for key, value in inputs(name).items()}
    require_close(getattr(scan_triton, family)(**on_device), truth(inputs(name)))


def _compiled(kernel: Any, constants: dict[str, Any], pointers: tuple[str, ...], capability: int) -> str:
    """PTX of a kernel for a GPU of some compute capability; the assembler has taken it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else "*fp32" if name in pointers else "i32" for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=scan_triton._LAUNCH)
    assert found.asm["cubin"]
    ptx: str = found.asm["ptx"]
    return ptx


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("has_state", [False, True])
def test_the_selective_scan_compiles_with_its_state_in_lanes_and_its_loads_ahead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_state: bool, capability: int
) -> None:
    from ssm_mp.kernels.triton_scans import selective_scan_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {
        "HAS_STATE": has_state,
        "BLOCK_N": 16,
        "BLOCK_I": 32,
        "a_i": 1,
        "dt_i": 1,
        "B_n": 1,
        "C_n": 1,
        "z_i": 1,
    }
    pointers = ("a", "dt", "A", "B", "C", "D", "z", "first", "y", "last")
    ptx = _compiled(selective_scan_kernel, constants, pointers, capability)
    assert "shfl" not in ptx  # no exchange between lanes
    assert ".local" not in ptx  # no register spilled
    assert "cp.async" in ptx


@needs_triton
def test_the_shared_step_recurrence_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ssm_mp.kernels.triton_scans import shared_step_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = ("decay", "driven", "first", "states_out")
    assert "cp.async" in _compiled(shared_step_kernel, {"BLOCK_N": 16}, pointers, 90)


def test_without_a_gpu_there_is_no_kernel_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not scan_triton.available()


def test_without_triton_there_is_no_kernel_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "compiles", lambda: False)
    assert not scan_triton.available()
