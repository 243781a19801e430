"""The mixer of `itera` as a compiled program, against its modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssm_mp.blocks.shared_step import SharedStep, SharedStepMixing
from ssm_mp.kernels.scan import shared_step_scan_reference
from ssm_mp.model import Residual
from ssm_mp.programs.program import NotCompiledError, UnknownWeightError
from tests.ssm_mp.blocks.compiling import (
    KNOWN,
    branch_of,
    by_modules,
    compiled,
    require_no_change_by_threads,
    require_own_sequence_spoilt,
    require_same,
    require_steps_of_the_model,
    require_what_modules_give,
)

SMALL = SharedStep(d_model=24, d_inner=48, d_state=16, d_conv=4)
BLOCKS = {
    "small": SMALL,
    "sizes that fill no vector": replace(SMALL, d_model=21, d_inner=37, d_state=5, d_conv=3),
    "one tap, a state beyond a vector": replace(SMALL, d_inner=16, d_state=35, d_conv=1),
}


def scan_of(branch: Residual) -> SharedStepMixing:
    (mixing,) = branch.mixings
    assert isinstance(mixing, SharedStepMixing)
    return mixing


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("precision", KNOWN)
@pytest.mark.parametrize("block", BLOCKS)
def test_it_gives_what_the_modules_give(block: str, precision: str, many: bool) -> None:
    require_what_modules_give(BLOCKS[block], precision, [(1, 1), (8, 1), (3, 2), (2, 21), (1, 600)], many=many)


def test_threads_change_nothing() -> None:
    require_no_change_by_threads(compiled(branch_of(SMALL)), 3, 700, SMALL.d_model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_its_own_sequence_only(bad: float) -> None:
    require_own_sequence_spoilt(compiled(branch_of(SMALL)), 12, SMALL.d_model, bad)


def test_weights_of_no_known_kind_are_unpacked_where_they_are_bare_values() -> None:
    branch, other = branch_of(SMALL, "fp16"), scan_of(branch_of(SMALL, "int6"))
    mixing = scan_of(branch)
    mixing.B, mixing.C = other.B, other.C
    x = torch.randn(2, 3, SMALL.d_model)
    with torch.inference_mode():
        require_same(compiled(branch)(x, None), by_modules(branch, x, None))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_of_it_decodes_in_compiled_calls(block: str, precision: str) -> None:
    require_steps_of_the_model(BLOCKS[block], precision)


def test_what_it_does_not_take_is_said() -> None:
    with pytest.raises(UnknownWeightError, match="GroupedTensor"):
        compiled(branch_of(SMALL, "int6"))
    branch = branch_of(SMALL)
    scan_of(branch).scan = shared_step_scan_reference
    with pytest.raises(NotCompiledError, match="another scan"):
        compiled(branch)
