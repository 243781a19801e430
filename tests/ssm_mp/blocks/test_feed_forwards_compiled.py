"""Feed-forwards and experts of all families as calls of the kernels, alone and between mixers."""

from __future__ import annotations

import pytest
import torch

from ssm_mp.blocks.experts import Experts, ExpertsMixing
from ssm_mp.blocks.feed_forward import FeedForward, FeedForwardMixing
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.routing import Routing
from ssm_mp.components import find_components
from ssm_mp.config import Branch, Part
from ssm_mp.conversion.convert import Converter
from ssm_mp.decoding.compiled import CompiledDecoder
from ssm_mp.families.hybrid import HybridConfig
from ssm_mp.kernels.compiler import library
from ssm_mp.model import LanguageModel, Layer, Residual
from ssm_mp.modules.norm import NormForm
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.families.models import every_model, fp32_of
from tests.ssm_mp.blocks.compiled_residual import Weights, assert_near, by_module, compiled
from tests.tiny import VOCABULARY, random_model, some_windows

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler was found")
FORWARDS = FeedForwardMixing | ExpertsMixing


def converted(model: LanguageModel, weights: Weights) -> LanguageModel:
    if weights == "fp32":
        return model
    everywhere = PrecisionMap.uniform(weights.split()[0], find_components(model))
    return Converter(model, Scheme(activations="dynamic")).convert(everywhere)


def forwards_of(model: LanguageModel) -> list[Residual]:
    """The branches that are feed-forwards and experts and nothing else."""
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    branches = [branch for layer in layers for branch in layer.branches if isinstance(branch, Residual)]
    return [branch for branch in branches if all(isinstance(mixing, FORWARDS) for mixing in branch.mixings)]


@every_model
def test_branches_of_every_family_give_what_their_modules_give(name: str) -> None:
    model = fp32_of(name)
    assert forwards_of(model) or name.startswith(("mamba", "falcon_mamba"))
    for weights in ("fp32", "fp16", "int8 dynamic", "nf4"):
        for branch in forwards_of(converted(model, weights)):
            x = torch.randn(3, 41, model.config.d_model)
            with torch.inference_mode():
                assert_near(compiled(branch)(x, None)[0], by_module(branch, x), weights)


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
@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8 dynamic", "nf4"])
def test_compiled_steps_equal_the_layers(weights: Weights, together: bool) -> None:
    model = converted(random_model(hybrid(together=together)), weights)
    ids = some_windows(3).ids
    with torch.inference_mode():
        _, states = model.carry(ids[:, :5])
        decoder = CompiledDecoder.of(model, states, 5)
        assert decoder is not None
        for t in range(5, 12):
            hidden, states = model.carry(ids[:, t : t + 1], states, t)
            assert_near(decoder.step(ids[:, t])[:, None], model.head(hidden[:, -1])[:, None], weights)
