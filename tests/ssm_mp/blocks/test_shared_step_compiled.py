"""Bare values of `itera`'s mixer in a compiled program."""

from __future__ import annotations

import torch

from ssm_mp.blocks.shared_step import SharedStepMixing
from ssm_mp.model import Residual
from tests.ssm_mp.blocks.compiled_cases import SHARED_STEP
from tests.ssm_mp.blocks.compiling import branch_of, by_modules, compiled, require_same


def scan_of(branch: Residual) -> SharedStepMixing:
    (mixing,) = branch.mixings
    assert isinstance(mixing, SharedStepMixing)
    return mixing


def test_weights_of_no_known_kind_are_unpacked_where_they_are_bare_values() -> None:
    block = SHARED_STEP["small"]
    branch, other = branch_of(block, "fp16"), scan_of(branch_of(block, "int6"))
    mixing = scan_of(branch)
    mixing.B, mixing.C = other.B, other.C
    x = torch.randn(2, 3, block.d_model)
    with torch.inference_mode():
        require_same(compiled(branch)(x, None), by_modules(branch, x))
