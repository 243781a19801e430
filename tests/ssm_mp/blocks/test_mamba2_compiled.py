"""The Mamba-2 mixer as a compiled program, against its modules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssm_mp.blocks.mamba2 import Mamba2Mixing
from ssm_mp.kernels.ssd import ssd_scan_chunked
from ssm_mp.programs.program import NotCompiledError, UnknownWeightError
from tests.ssm_mp.blocks.compiling import (
    KNOWN,
    branch_of,
    compiled,
    require_no_change_by_threads,
    require_own_sequence_spoilt,
    require_steps_of_the_model,
    require_what_modules_give,
)
from tests.ssm_mp.blocks.test_mamba2 import BLOCKS, SMALL

SIZES = [(1, 1), (8, 1), (3, 2), (2, 21), (1, 330)]
"""Sequences and tokens: single ones, a few, a chunk in part, several passes."""


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_it_gives_what_the_modules_give(block: str, many: bool) -> None:
    require_what_modules_give(BLOCKS[block], "fp16", SIZES, many=many)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("precision", KNOWN)
@pytest.mark.parametrize("split", [False, True])
def test_it_gives_so_at_every_precision(precision: str, split: bool, many: bool) -> None:
    require_what_modules_give(replace(SMALL, split=split), precision, SIZES[1:], many=many)


@pytest.mark.parametrize("length", [5, 64, 257, 516, 700])
def test_threads_change_nothing(length: int) -> None:
    block = BLOCKS["one group, heads of sixteen"]
    require_no_change_by_threads(compiled(branch_of(block)), 3, length, block.d_model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [2, 6])
def test_a_token_that_is_not_finite_spoils_its_own_sequence_only(length: int, bad: float) -> None:
    require_own_sequence_spoilt(compiled(branch_of(SMALL)), length, SMALL.d_model, bad)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_of_it_decodes_in_compiled_calls(block: str, precision: str) -> None:
    require_steps_of_the_model(BLOCKS[block], precision)


def test_what_it_does_not_take_is_said() -> None:
    with pytest.raises(UnknownWeightError, match="GroupedTensor"):
        compiled(branch_of(SMALL, "int6"))
    branch = branch_of(SMALL)
    (mixing,) = branch.mixings
    assert isinstance(mixing, Mamba2Mixing)
    mixing.scan = ssd_scan_chunked
    with pytest.raises(NotCompiledError, match="another scan"):
        compiled(branch)
