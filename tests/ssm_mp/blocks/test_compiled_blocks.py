"""Every block that the kernels compute, as a compiled program against its modules."""

from __future__ import annotations

import pytest

from ssm_mp.blocks.block import Block
from ssm_mp.kernels.compiler import library
from ssm_mp.programs.program import NotCompiledError, UnknownWeightError
from tests.ssm_mp.blocks.compiled_cases import CASES, Case
from tests.ssm_mp.blocks.compiling import (
    KNOWN,
    branch_of,
    compiled,
    edge_of,
    model_of,
    require_no_change_by_threads,
    require_own_sequence_spoilt,
    require_steps_of_the_model,
    require_what_modules_give,
)

SHAPES = {False: [(1, 1), (3, 2), (8, 1), (2, 37), (1, 290)], True: [(130, 2), (2, 37), (1, 290)]}
"""Sequences and tokens, by whether products are those of many rows: single tokens, fewer than a convolution looks back,
tiles in part, and two passes, of several sequences and of one."""
BLOCKS = {f"{kind}, {name}": (case, block) for kind, case in CASES.items() for name, block in case.blocks.items()}

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler was found")
every_kind = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_block = pytest.mark.parametrize("block", [block for _, block in BLOCKS.values()], ids=BLOCKS)
few_and_many = pytest.mark.parametrize("many", [False, True], ids=["few", "many"])


@few_and_many
@every_block
def test_it_gives_what_the_modules_give(block: Block, many: bool) -> None:
    require_what_modules_give(block, "fp16", SHAPES[many], many=many)


@few_and_many
@pytest.mark.parametrize("precision", KNOWN)
@every_kind
def test_it_gives_so_at_every_precision(case: Case, precision: str, many: bool) -> None:
    require_what_modules_give(case.one, precision, SHAPES[many][-3:], many=many)


@every_block
def test_it_gives_so_between_multipliers(block: Block) -> None:
    require_what_modules_give(block, "fp16", [(2, 9)], multipliers=(0.5, 1.25, 0.7))


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
@every_kind
def test_threads_change_nothing_in_few_rows(case: Case, precision: str) -> None:
    for block in case.shared:
        require_no_change_by_threads(block, precision, [(1, 1), (7, 1), (3, 5)])


@pytest.mark.parametrize(("precision", "many"), [("fp32", False), ("fp16", True), ("int8 dynamic", True)])
@every_kind
def test_threads_change_nothing_in_many_rows(case: Case, precision: str, many: bool) -> None:
    for block in case.shared:
        require_no_change_by_threads(block, precision, case.together, many=many)


@pytest.mark.parametrize(("case", "block"), BLOCKS.values(), ids=BLOCKS)
def test_a_token_that_is_not_finite_spoils_its_own_sequence_only(case: Case, block: Block) -> None:
    require_own_sequence_spoilt(block, "fp32", case.spoilt)


@every_kind
def test_it_spoils_no_other_where_inputs_are_quantised(case: Case) -> None:
    require_own_sequence_spoilt(case.one, "int8 dynamic", case.spoilt)


@every_block
def test_a_model_of_it_decodes_in_compiled_calls(block: Block) -> None:
    require_steps_of_the_model(model_of(block, "fp16"))


@pytest.mark.parametrize("precision", ["fp32", "int8 dynamic", "nf4"])
@every_kind
def test_a_model_of_it_decodes_so_at_every_precision(case: Case, precision: str) -> None:
    require_steps_of_the_model(model_of(case.one, precision), edge_of(case.one, precision))


@every_kind
def test_a_weight_that_the_kernels_do_not_know_is_said(case: Case) -> None:
    with pytest.raises(UnknownWeightError, match="GroupedTensor"):
        compiled(branch_of(case.one, "int6"))


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.scan], ids=lambda case: case.one.word)
def test_another_way_to_compute_it_is_not_compiled(case: Case) -> None:
    branch = branch_of(case.one)
    (mixing,) = branch.mixings
    mixing.scan = lambda *inputs: inputs  # type: ignore[assignment]
    with pytest.raises(NotCompiledError, match="another (scan|way to compute experts) is asked for"):
        compiled(branch)
