"""Second moments are those of the inputs that reach each product, found by torch's hooks in a whole run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssm_mp.components import find_components
from ssm_mp.conversion import moments
from ssm_mp.conversion.embedding_blocks import split_embedding
from ssm_mp.conversion.moments import HELD, Gathered, end_moments, in_parts, layer_moments
from ssm_mp.errors import EvaluationError
from ssm_mp.kernels import calls
from ssm_mp.model import LanguageModel, build
from ssm_mp.modules.experts import ExpertsLinear
from tests.families.models import checkpoint_of, every_model, fp32_of, windows_of
from tests.tiny import HUGGING_FACE, MAMBA, VOCABULARY, random_model, some_windows

Seen = dict[str, dict[int, list[Tensor]]]
"""Inputs `[m, k]` of each component by the expert's number, or 0."""


@contextmanager
def hooked(model: LanguageModel) -> Iterator[Seen]:
    """What reaches the modules of a model, by torch's own hooks."""
    seen: Seen = defaultdict(lambda: defaultdict(list))
    handles = []
    for component in find_components(model):
        if component.multiplies_inputs and component.kind != "embedding":

            def see(module: Any, given: tuple[Any, ...], name: str = component.name) -> None:
                expert = given[1] if isinstance(module, ExpertsLinear) else 0
                seen[name][expert].append(given[0].reshape(-1, given[0].shape[-1]).double())

            handles.append(model.component(component.name).register_forward_pre_hook(see))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(calls, "usable", lambda *_: False)  # nothing goes past the modules then
        yield seen
    for handle in handles:
        handle.remove()


def states_of(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model.embed(part) for part in in_parts(ids)]


def of_layers(model: LanguageModel, ids: Tensor) -> tuple[dict[str, Gathered], list[Tensor]]:
    """The moments of all layers, and the last hidden states."""
    states = states_of(model, ids)
    found: dict[str, Gathered] = {}
    for i in range(len(model.layers)):
        found |= layer_moments(model, i, states)
    return found, states


def second(x: list[Tensor]) -> Tensor:
    """Σ x xᵀ, float64 `[k, k]`."""
    joined = torch.cat(x)
    return joined.T @ joined


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * max(float(expected.abs().max()), 1e-30))


def trace_one(one: Tensor) -> Tensor:
    return one / one.trace()


@every_model
def test_moments_of_each_product_are_of_all_inputs_that_reach_it(name: str) -> None:
    model, ids = fp32_of(name), windows_of(name, 9).ids
    with hooked(model) as seen:
        for part in in_parts(ids):
            model.head(model.hidden(part))
    found, _ = of_layers(model, ids)
    components = {c.name: c for c in find_components(model) if c.multiplies_inputs and c.layer is not None}
    assert found.keys() == components.keys()
    for component, gathered in found.items():
        experts = seen.get(component, {})
        assert gathered.tokens == tuple(
            sum(map(len, experts.get(e, []))) for e in range(moments.experts_of(components[component]))
        )
        for e, matrix in enumerate(gathered.all.second):
            if e in experts:
                close(matrix, second(experts[e]))
            else:
                assert not matrix.any()


def test_every_fourth_part_is_held_out_and_the_others_are_not() -> None:
    model, ids = random_model(MAMBA), some_windows(24).ids
    parts = in_parts(ids)
    assert len(parts) == 8
    held = [s % HELD == HELD - 1 for s in range(8)]
    assert sum(held) == 2
    found, _ = of_layers(model, ids)
    for wanted, which in ((True, "held"), (False, "fit")):
        with hooked(model) as seen:
            for part, one in zip(parts, held, strict=True):
                if one is wanted:
                    model.hidden(part)
        for component, gathered in found.items():
            close(getattr(gathered, which).second[0], second(seen[component][0]))
            assert torch.equal(gathered.all.second, gathered.fit.second + gathered.held.second)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 30, 400])
def test_parts_are_all_windows_in_order_and_some_of_them_held_out(count: int) -> None:
    ids = some_windows(count).ids
    parts = in_parts(ids)
    assert torch.equal(torch.cat(parts), ids)
    assert len(parts) >= min(count, 8)
    assert all(len(part) == 1 or part.numel() <= 2048 for part in parts)


def test_few_windows_have_no_part_held_out() -> None:
    found, states = of_layers(random_model(MAMBA), some_windows(3).ids)
    assert all(not one.held.second.any() and one.fit.second.any() for one in found.values())
    ends = end_moments(random_model(MAMBA), states)
    assert not ends["embedding"].held.second.any()


@every_model
def test_states_afterwards_are_what_the_layers_give(name: str) -> None:
    model, ids = fp32_of(name), windows_of(name, 3).ids
    _, states = of_layers(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(states), model.hidden(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lfm2_moe/plain", "granitemoehybrid/experts"])
def test_experts_together_have_the_moments_of_each_of_them(name: str) -> None:
    each = fp32_of(name) if name == "lfm2_moe/plain" else fp32_of("granitemoehybrid/many-experts-each")
    together = fp32_of(f"{name}-together") if name == "lfm2_moe/plain" else fp32_of("granitemoehybrid/many-experts")
    ids = windows_of("lfm2_moe/plain", 6).ids
    apart, one = of_layers(each, ids)[0], of_layers(together, ids)[0]
    compared = 0
    for component, gathered in one.items():
        if len(gathered.tokens) == 1:
            continue
        at, leaf = component.rsplit(".", 1)
        for e in range(len(gathered.tokens)):
            alone = apart[f"{at}.{e}.{leaf}"]
            assert alone.tokens == (gathered.tokens[e],)
            torch.testing.assert_close(gathered.fit.second[e], alone.fit.second[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(gathered.held.second[e], alone.held.second[0], rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared > 3


def test_found_twice_they_are_the_same_numbers() -> None:
    model, ids = fp32_of("lfm2/plain"), windows_of("lfm2/plain", 6).ids
    one, other = of_layers(model, ids), of_layers(model, ids)
    for name in one[0]:
        assert torch.equal(one[0][name].fit.second, other[0][name].fit.second)
    ends = end_moments(model, one[1]), end_moments(model, other[1])
    assert all(torch.equal(ends[0][name].all.second, ends[1][name].all.second) for name in ends[0])


def test_the_given_model_is_not_watched_afterwards() -> None:
    model, ids = random_model(MAMBA), some_windows(4).ids
    before = {c.name: model.component(c.name) for c in find_components(model)}
    expected = model(ids)
    of_layers(model, ids)
    assert all(model.component(name) is module for name, module in before.items())
    assert torch.equal(model(ids), expected)


def test_an_input_that_is_not_finite_is_an_error_that_names_the_component() -> None:
    checkpoint = checkpoint_of("mamba")
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    tensors["embedding.weight"][:] = float("inf")
    model = build(checkpoint.config, tensors)
    states = states_of(model, some_windows(4).ids)
    with pytest.raises(EvaluationError, match=r"an input of layers\.0\.ssm\.in_proj is not finite"):
        layer_moments(model, 0, states)
    with pytest.raises(EvaluationError, match="an input of the head is not finite"):
        end_moments(model, [torch.full((2, 16, 16), float("nan"))])


def expected_of_ends(model: LanguageModel, states: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What `end_moments` finds, slowly: token after token, each block's questions by the logits of its tokens."""
    d = model.config.d_model
    even, zero = torch.eye(d, dtype=torch.float64) * (0.5 / d), torch.zeros(d, d, dtype=torch.float64)
    names = [c.name for c in find_components(model) if c.kind == "embedding"]
    heads, opened = [zero.clone(), zero.clone()], [zero.clone() for _ in names]
    for s, state in enumerate(states):
        for window in state:
            for x in window[:-1]:
                with torch.no_grad():
                    h, chances = model.final(x).double(), model.head(x).double().softmax(-1)
                heads[s % HELD == HELD - 1] += torch.outer(h, h)
                for b in range(len(names)):
                    own = chances if len(names) == 1 else chances[model.embedding.block_of == b]
                    opened[b] += torch.outer(h, h) * float((own * (1 - own)).sum())
    if model.lm_head is not None:
        return {"lm_head": (heads[0], heads[1]), **dict.fromkeys(names, (even, zero))}
    return {
        name: tuple((trace_one(head) + trace_one(own)) / 2 + even for head in heads)  # type: ignore[misc]
        for name, own in zip(names, opened, strict=True)
    }


@pytest.mark.parametrize("kind", ["tied", "untied", "blocked", "blocked and untied", "multiplied"])
def test_moments_of_the_ends_are_those_of_the_slow_way(kind: str) -> None:
    if kind == "multiplied":
        model, ids = fp32_of("granitemoehybrid/dense"), windows_of("granitemoehybrid/dense", 9).ids
        assert model.config.logit_multiplier != 1.0
    else:
        config = replace(HUGGING_FACE, tied=not kind.endswith("untied"))
        model, ids = random_model(config), some_windows(9).ids
        if kind.startswith("blocked"):
            model = split_embedding(model, torch.arange(VOCABULARY).flip(0) % 7, (5, 30))
    with torch.no_grad():
        states = [model.hidden(part) for part in in_parts(ids)]
    found, expected = end_moments(model, states), expected_of_ends(model, states)
    assert found.keys() == expected.keys()
    tokens = ids[:, :-1].numel()
    for name, (fit, held) in expected.items():
        close(found[name].fit.second[0], fit)
        close(found[name].held.second[0], held)
        assert found[name].tokens == (tokens,)


def test_openness_is_asked_of_so_many_tokens_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(MAMBA), some_windows(9).ids
    with torch.no_grad():
        states = [model.hidden(part) for part in in_parts(ids)]
    monkeypatch.setattr(moments, "_OPEN_TOKENS", 20)
    found = end_moments(model, states)["embedding"]
    x = torch.cat([state[:, :-1].flatten(0, 1) for state in states])[:20]
    chances = model.scores(x).softmax(-1).double()
    h = model.final(x).double()
    opened = (h * (chances * (1 - chances)).sum(-1, keepdim=True)).T @ h
    expected = expected_of_ends(model, states)["embedding"][0]
    whole = torch.cat([state[:, :-1].flatten(0, 1) for state in states])
    all_chances, all_h = model.scores(whole).softmax(-1).double(), model.final(whole).double()
    all_opened = (all_h * (all_chances * (1 - all_chances)).sum(-1, keepdim=True)).T @ all_h
    close(found.fit.second[0], expected + (trace_one(opened) - trace_one(all_opened)) / 2)
