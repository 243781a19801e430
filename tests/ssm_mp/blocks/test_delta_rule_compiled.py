"""What the gated delta rule's kernel does not take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssm_mp.kernels.calls import MOST_KEYS
from ssm_mp.programs.program import NotCompiledError
from tests.ssm_mp.blocks.compiled_cases import DELTA_RULE
from tests.ssm_mp.blocks.compiling import branch_of, compiled


def test_more_keys_than_the_kernel_holds_are_not_compiled() -> None:
    block = DELTA_RULE["by key head"]
    compiled(branch_of(replace(block, key_dim=MOST_KEYS)))
    with pytest.raises(NotCompiledError, match="keys"):
        compiled(branch_of(replace(block, key_dim=MOST_KEYS + 1)))
