"""The gated short convolution as a compiled program, against its modules."""

from __future__ import annotations

import pytest

from ssm_mp.blocks.short_conv import ShortConv
from ssm_mp.programs.program import UnknownWeightError
from tests.ssm_mp.blocks.compiling import (
    KNOWN,
    branch_of,
    compiled,
    require_no_change_by_threads,
    require_own_sequence_spoilt,
    require_steps_of_the_model,
    require_what_modules_give,
)

SMALL = ShortConv(d_model=21, d_conv=3)
BLOCKS = {
    "plain": SMALL,
    "biases": ShortConv(d_model=32, d_conv=4, with_bias=True),
    "one tap": ShortConv(d_model=12, d_conv=1),
}
SIZES = [(1, 1), (8, 1), (3, 2), (2, 21), (1, 330)]
"""Sequences and tokens: single ones, fewer than the convolution looks back, several passes."""


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("precision", KNOWN)
@pytest.mark.parametrize("block", BLOCKS)
def test_it_gives_what_the_modules_give(block: str, precision: str, many: bool) -> None:
    require_what_modules_give(BLOCKS[block], precision, SIZES, many=many)


@pytest.mark.parametrize("length", [5, 257, 700])
def test_threads_change_nothing(length: int) -> None:
    require_no_change_by_threads(compiled(branch_of(SMALL)), 3, length, SMALL.d_model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_its_own_sequence_only(bad: float) -> None:
    # a convolution's inputs are forgotten again, so that the last token has to be near
    require_own_sequence_spoilt(compiled(branch_of(SMALL)), 4, SMALL.d_model, bad)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "nf4"])
@pytest.mark.parametrize("block", ["plain", "biases"])
def test_a_model_of_it_decodes_in_compiled_calls(block: str, precision: str) -> None:
    require_steps_of_the_model(BLOCKS[block], precision)


def test_what_it_does_not_take_is_said() -> None:
    with pytest.raises(UnknownWeightError, match="GroupedTensor"):
        compiled(branch_of(SMALL, "int6"))
