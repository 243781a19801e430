"""The gated delta rule mixer as a compiled program, against its modules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssm_mp.blocks.delta_rule import DeltaRuleMixing
from ssm_mp.kernels.calls import MOST_KEYS
from ssm_mp.kernels.delta import delta_rule_chunked
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
from tests.ssm_mp.blocks.test_delta_rule import SHAPES

SMALL = SHAPES["odd sizes, three value heads a key head"]
BLOCKS = {
    **SHAPES,
    "by key head": replace(SMALL, fused=True),
    "by key head, as many value heads": replace(SHAPES["as many value heads as key heads"], fused=True),
    "more values than are taken at once": replace(SMALL, key_heads=1, value_heads=1, value_dim=261),
}

SIZES = [(1, 1), (8, 1), (3, 2), (2, 21), (1, 330)]
"""Sequences and tokens: single ones, a few, tiles in part, several passes."""


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_it_gives_what_the_modules_give(block: str, many: bool) -> None:
    require_what_modules_give(BLOCKS[block], "fp16", SIZES, many=many)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("precision", KNOWN)
@pytest.mark.parametrize("fused", [False, True])
def test_it_gives_so_at_every_precision(precision: str, fused: bool, many: bool) -> None:
    require_what_modules_give(replace(SMALL, fused=fused), precision, SIZES[1:], many=many)


@pytest.mark.parametrize("length", [5, 64, 257, 516, 700])
def test_threads_change_nothing(length: int) -> None:
    block = BLOCKS["values wider than a block of columns"]
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
    assert isinstance(mixing, DeltaRuleMixing)
    mixing.scan = delta_rule_chunked
    with pytest.raises(NotCompiledError, match="another scan"):
        compiled(branch)
    with pytest.raises(NotCompiledError, match="keys"):
        compiled(branch_of(replace(SMALL, key_dim=MOST_KEYS + 1)))
