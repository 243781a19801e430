"""Branches of all families as compiled programs, and models of several kinds of blocks."""

from __future__ import annotations

import pytest
import torch

from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.routing import Routing
from ssm_mp.config import Branch, Part
from ssm_mp.families.hybrid import HybridConfig
from ssm_mp.kernels.compiler import library
from ssm_mp.model import Layer, Residual
from ssm_mp.modules.norm import NormForm
from tests.families.models import every_model, fp32_of
from tests.ssm_mp.blocks.compiling import (
    by_modules,
    compiled,
    converted,
    require_same_outputs,
    require_steps_of_the_model,
)
from tests.tiny import VOCABULARY, random_model

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler was found")


@every_model
def test_branches_of_every_family_give_what_their_modules_give(name: str) -> None:
    model = converted(fp32_of(name), "fp16")
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for branch in layer.branches:
            assert isinstance(branch, Residual)
            x = torch.randn(3, 41, model.config.d_model)
            with torch.inference_mode():
                require_same_outputs(compiled(branch)(x, None)[0], by_modules(branch, x)[0])


def hybrid(*, together: bool) -> HybridConfig:
    """Mamba-1 mixers, each before a feed-forward or experts, as in Jamba, and once experts beside a shared one."""
    d, norm = 16, NormForm(1e-5)
    mamba = Mamba1(d_model=d, d_inner=32, d_state=4, dt_rank=2, d_conv=4, inner_norms=norm)
    plain = FeedForward(d_model=d, d_hidden=24, activation="silu", gated=True, token_gate=True)
    experts = Experts(
        d_model=d, d_hidden=13, experts=5, top_k=2, routing=Routing("softmax", normalised=True), activation="silu",
        gated=True, together=together,
    )  # fmt: skip
    parts = (Part("forward", plain),), (Part("experts", experts),), (Part("experts", experts), Part("shared", plain))
    layers = tuple(
        (Branch("norm", norm, (Part("mamba", mamba),)), Branch("forward_norm", norm, part, residual=0.7))
        for part in parts
    )
    return HybridConfig(word="jamba", vocabulary=VOCABULARY, d_model=d, layers=layers, norm=norm, tied=True)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "int8 dynamic"])
def test_a_hybrid_decodes_in_compiled_calls(precision: str, together: bool) -> None:
    require_steps_of_the_model(converted(random_model(hybrid(together=together)), precision))
