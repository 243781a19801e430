"""Experts of all sizes as the kernels compute them, how tokens are routed to them, and the time of their components."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import POINTER, byref, c_void_p
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssm_mp.blocks.experts import Experts, ExpertsMixing
from ssm_mp.blocks.routing import Routing, Scores
from ssm_mp.kernels.compiler import library
from ssm_mp.model import Residual
from ssm_mp.modules.experts import EachExpert
from ssm_mp.programs.program import NotCompiledError
from tests.ssm_mp.blocks.compiled_cases import EXPERTS
from tests.ssm_mp.blocks.compiling import branch_of, by_modules, compiled, require_same_outputs

PLAIN, MANY = EXPERTS["plain"], EXPERTS["filling vectors"]

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler was found")


def mixing_of(branch: Residual) -> ExpertsMixing:
    (mixing,) = branch.mixings
    assert isinstance(mixing, ExpertsMixing)
    return mixing


@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 6), st.integers(1, 7), st.integers(1, 60),
    st.sampled_from(["plain", "gated", "fused"]), st.booleans(), st.booleans(),
    st.sampled_from(["fp16", "nf4", "int3"]),
)  # fmt: skip
def test_sizes_of_every_kind(
    d: int, hidden: int, experts: int, top_k: int, length: int, form: str, latent: bool, together: bool,
    precision: str,
) -> None:  # fmt: skip
    block = Experts(
        d_model=d, d_hidden=hidden, experts=experts, top_k=top_k, gated=form == "gated", fused=form == "fused",
        latent=3 if latent else None, together=together,
    )  # fmt: skip
    branch, x = branch_of(block, precision), torch.randn(2, length, d)
    with torch.inference_mode():
        require_same_outputs(compiled(branch)(x, None)[0], by_modules(branch, x)[0])


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("groups", "chosen_groups"), [(1, 1), (6, 2), (3, 1), (12, 5)])
@pytest.mark.parametrize("scores", ["chosen_softmax", "softmax", "sigmoid"])
def test_routing_chooses_and_weighs_as_the_readable_one(
    scores: Scores, groups: int, chosen_groups: int, normalised: bool, corrected: bool
) -> None:
    routing = Routing(scores, normalised, 1e-3, corrected, groups, chosen_groups, 1.7)
    logits = 3 * torch.randn(200, 12)
    correction = torch.randn(12) if corrected else None
    weights, chosen = routing(logits, correction, 2)
    expected = torch.zeros(200, 12).scatter_(1, chosen, weights)
    torch.testing.assert_close(routed(routing, logits, correction, 2), expected, rtol=1e-5, atol=1e-7)


def test_of_equally_good_experts_those_of_lower_numbers_are_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0]])
    assert routed(Routing(), logits, None, 2)[0].nonzero().flatten().tolist() == [1, 2]
    assert routed(Routing(), logits, None, 4)[0].nonzero().flatten().tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("scores", ["chosen_softmax", "softmax", "sigmoid"])
@pytest.mark.parametrize("logits", [[torch.nan] * 6, [torch.inf, -torch.inf] * 3, [-torch.inf] * 6, [torch.nan, 1] * 3])
def test_any_logits_choose_experts_that_there_are(logits: list[float], scores: Scores) -> None:
    routing = Routing(scores, normalised=True, groups=3, chosen_groups=1)
    weights = routed(routing, torch.tensor([logits, [1.0, 2, 3, 4, 5, 6]]), None, 2)
    assert weights[1].nonzero().flatten().tolist() == [4, 5]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_its_observer_is_told_where_the_time_goes(threads: int, together: bool) -> None:
    block = replace(MANY, d_model=128, d_hidden=100, latent=96, together=together, experts=6, top_k=2)
    branch, told = branch_of(block), list[Mapping[nn.Module, float]]()
    mixing, before = mixing_of(branch), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compiled(branch)(torch.randn(1, 1, 128), None, told.append)
    finally:
        torch.set_num_threads(before)
    spent = told[0]
    assert mixing.latent_in is not None
    assert mixing.latent_out is not None
    around = {branch.norm, mixing.router, mixing.latent_in, mixing.latent_out}
    kinds = [*mixing.inward, mixing.outward]
    projections = {p for kind in kinds for p in (kind.projections if isinstance(kind, EachExpert) else [kind])}
    assert set(spent) == around | projections
    reached = {module for module in projections if spent[module] > 0}
    assert len(reached) == (3 if together else 3 * 2)  # no time for experts without a token
    assert all(spent[module] > 0 for module in around)


@pytest.mark.parametrize("together", [False, True])
def test_projections_that_are_watched_are_not_compiled(together: bool) -> None:
    class Watched(nn.Module):
        pass

    branch = branch_of(replace(PLAIN, together=together))
    mixing = mixing_of(branch)
    if together:
        mixing.outward = Watched()
    else:
        assert isinstance(mixing.outward, EachExpert)
        mixing.outward.projections[1] = Watched()
    with pytest.raises(NotCompiledError, match="Watched in place of"):
        compiled(branch)


def routed(routing: Routing, logits: Tensor, correction: Tensor | None, top_k: int) -> Tensor:
    """The kernels' weights `[m, X]` of logits `[m, X]`, zero for experts that are not chosen."""
    kernels, (m, experts) = library(), logits.shape
    assert kernels is not None
    structure = routing.structure(experts, top_k, None if correction is None else correction.data_ptr())
    kernels.route.argtypes, kernels.route.restype = (POINTER(type(structure)), *(c_void_p,) * 4), None
    scores, merit = logits.clone(), torch.empty(experts + routing.groups)
    weights, chosen = torch.empty(m, structure.chosen), torch.empty(m, structure.chosen, dtype=torch.int32)
    for i in range(m):
        places = (t.data_ptr() for t in (scores[i], merit, chosen[i], weights[i]))
        kernels.route(byref(structure), *places)
    assert all(len(set(row)) == len(row) and {*row} <= {*range(experts)} for row in chosen.tolist())
    return torch.zeros(m, experts).scatter_(1, chosen.long(), weights)
