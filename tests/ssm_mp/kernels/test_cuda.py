"""The kernels of CUDA: interpreted on a CPU, compiled for GPUs that need not be there, and run on one that is."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_mp.kernels import calls, cuda
from ssm_mp.kernels.chosen import kernels_for
from ssm_mp.modules.inputs import StaticInput
from ssm_mp.scheme import ActivationScheme
from tests.ssm_mp.kernels.cuda_cases import CASES, EXACT, MODELS, REFERENCES, SPOILED, evaluated, only, spoiled_rows

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the kernels give in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    path = tmp_path_factory.mktemp("interpreted") / "found.pt"
    command = [sys.executable, "-m", "tests.ssm_mp.kernels.interpreted", str(path)]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[3])
    found: dict[str, dict[str, Any]] = torch.load(path)
    return found


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _require_agreement(name: str, found: Tensor | tuple[Tensor, ...]) -> None:
    """With torch's operators on a CPU: equal where both round alike, else to float32's rounding."""
    kernel, arguments = CASES[name]
    with only(None):
        expected = _tensors(REFERENCES[kernel](*arguments()))
    for ours, theirs in zip(_tensors(found), expected, strict=True):
        assert ours.dtype == theirs.dtype
        if kernel in EXACT:
            assert torch.equal(ours.cpu(), theirs.expand_as(ours))
        else:
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)


def _require_spoiled(kernel: str, found: Tensor | tuple[Tensor, ...]) -> None:
    marked = _tensors(found)[-1].flatten()
    assert torch.isfinite(marked).tolist() == [True, *[False] * (spoiled_rows().shape[0] - 1)], kernel


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_interpreted_kernel_agrees_with_torchs_operators(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    _require_agreement(name, interpreted["cases"][name])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", SPOILED)
def test_an_interpreted_kernel_marks_the_rows_that_are_not_finite(
    interpreted: dict[str, dict[str, Any]], kernel: str
) -> None:
    _require_spoiled(kernel, interpreted["spoiled"][kernel])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("family", "scheme"), MODELS)
def test_a_converted_model_by_interpreted_kernels_has_the_losses_of_torchs_operators(
    interpreted: dict[str, dict[str, Any]], family: str, scheme: ActivationScheme
) -> None:
    expected = evaluated(family, scheme, None)
    torch.testing.assert_close(interpreted["models"][f"{family}, {scheme}"], expected, rtol=1e-5, atol=0)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_kernel_agrees_with_torchs_operators_on_a_cpu(name: str) -> None:
    kernel, arguments = CASES[name]
    on_gpu = [value.cuda() if isinstance(value, Tensor) else value for value in arguments()]
    _require_agreement(name, getattr(cuda, kernel)(*on_gpu))


@needs_triton
@needs_gpu
@pytest.mark.parametrize("kernel", SPOILED)
def test_a_compiled_kernel_marks_the_rows_that_are_not_finite(kernel: str) -> None:
    second = SPOILED[kernel]()
    on_gpu = second.cuda() if isinstance(second, Tensor) else second
    _require_spoiled(kernel, getattr(cuda, kernel)(spoiled_rows().cuda(), on_gpu))


@needs_triton
@needs_gpu
def test_static_inputs_on_a_gpu_do_not_wait_for_it() -> None:
    inputs, x = StaticInput(torch.ones(1, dtype=torch.float16)).cuda(), torch.randn(3, 40).cuda()
    inputs(x)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        inputs(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


_TYPES = {
    **dict.fromkeys(("x", "weight", "bias", "before", "y", "scales", "columns", "product", "logits"), "*fp32"),
    **{"a": "*i8", "b": "*i8"},
    **{"q": "*i8", "sums": "*i32", "targets": "*i64", "nll": "*fp64", "scale": "*fp16", "smallest": "fp32"},
}
_LAUNCHES: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "conv_silu": ({"HAS_BIAS": True, "K": 4, "BLOCK_M": 16, "BLOCK_I": 128, "x_i": 1, "before_i": 1}, {}, cuda._FUSED),
    "quantize_static": ({"BLOCK_M": 2, "BLOCK_K": 1024, "x_k": 1}, {}, cuda._EXACT),
    "quantize_dynamic": ({"BLOCK_M": 2, "BLOCK_K": 1024, "x_k": 1}, {}, cuda._EXACT),
    "rescale": ({"HAS_BIAS": True, "BLOCK_M": 16, "BLOCK_N": 128}, {"rows": "*fp32"}, cuda._EXACT),
    "scaled_product": (
        {"HAS_BIAS": True, "IS_EVEN": True, "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128},
        {"rows": "*fp32", "columns": "*fp16"},
        {"num_warps": 4, "num_stages": 3, **cuda._EXACT},
    ),
    "negative_log_likelihood": ({"BLOCK_V": 4096, "logits_v": 1, "targets_m": 1}, {}, cuda._FUSED),
}
"""Constants, types of arguments and options that a kernel is compiled with at sizes that fill its blocks."""
_ANY = {"m", "rows", "length"}
"""Sizes that kernels are not specialised on; the others are multiples of 16, as Triton finds out by itself."""


def _compiled(name: str, capability: int) -> str:
    """PTX of a kernel for a GPU of some compute capability; the assembler has taken it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssm_mp.kernels import triton_kernels

    constants, types, options = _LAUNCHES[name]
    kernel = getattr(triton_kernels, f"{name}_kernel")
    signature = {
        argument: "constexpr" if argument in constants else (_TYPES | types).get(argument, "i32")
        for argument in kernel.arg_names
    }
    multiples = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and argument not in _ANY)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert found.asm["cubin"]
    ptx: str = found.asm["ptx"]
    return ptx


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", _LAUNCHES)
def test_a_kernel_compiles_to_wide_loads_and_exact_rounding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, capability: int
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = _compiled(name, capability)
    assert "cp.async" in ptx if name == "scaled_product" else "ld.global.v4.b32" in ptx
    assert ".local" not in ptx  # no register spilled
    if name in EXACT:
        assert not re.search(r"fma\.rn\.f32|div\.(full|approx)|\.ftz|(add|sub|mul)\.f32", ptx)
    assert name not in {"quantize_static", "quantize_dynamic"} or "div.rn.f32" in ptx


@needs_triton
def test_kernels_use_no_global_number_that_differs_from_itself() -> None:
    """Triton compares globals at every launch and refuses one that has changed, as NaN always has."""
    import triton.language as tl

    from ssm_mp.kernels import triton_kernels, triton_scans

    held = [*vars(triton_kernels).items(), *vars(triton_scans).items()]
    numbers = {name: value.value for name, value in held if isinstance(value, tl.constexpr)}
    assert numbers
    assert all(value == value for value in numbers.values()), numbers  # noqa: PLR0124, so NaN is found


def test_tensors_of_a_cpu_are_not_for_these_kernels() -> None:
    assert not cuda.usable(torch.ones(1))


def test_kernels_are_chosen_by_what_takes_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1)
    for of_cpu, of_cuda, expected in (
        (True, False, calls), (False, True, cuda), (False, False, None), (True, True, calls),
    ):  # fmt: skip
        monkeypatch.setattr(calls, "usable", lambda *tensors, answer=of_cpu: answer)
        monkeypatch.setattr(cuda, "usable", lambda *tensors, answer=of_cuda: answer)
        assert kernels_for(x) is expected


def test_without_triton_that_compiles_there_are_no_kernels_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr(cuda, "_tried", fails)
    with caplog.at_level(logging.WARNING, "ssm_mp"):
        assert not cuda.compiles.__wrapped__()
    assert "Failed to find C compiler." in caplog.text
