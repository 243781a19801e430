"""Several maps in one pass give what each gives alone, and do nothing twice."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssm_mp.components import ALWAYS_PINNED, DEFAULT_PINNED, find_components
from ssm_mp.config import Config
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.embedding_blocks import split_embedding
from ssm_mp.data import Windows
from ssm_mp.errors import EvaluationError, InfeasibleError
from ssm_mp.evaluation.evaluate import Evaluation, evaluate
from ssm_mp.evaluation.stack import (
    Split,
    Stack,
    at_once,
    evaluate_stacked,
    free_bytes,
    in_order,
    make_stack,
    windows_at_once,
)
from ssm_mp.families.itera import IteraConfig, IteraLayer
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import LanguageModel, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import ActivationScheme, Scheme
from ssm_mp.shards import token_bytes
from tests.tiny import CONFIGS, ITERA, LENGTH, MAMBA, VOCABULARY, random_model, random_tensors, some_windows

UNTIED = MambaConfig(
    vocabulary=VOCABULARY, d_model=16, d_inner=32, d_state=4, dt_rank=2, d_conv=4, n_layers=3, tied=False
)  # fmt: skip
FAMILIES: dict[str, Config] = {**CONFIGS, "untied": UNTIED}


def converter_of(config: Config, activations: ActivationScheme = "static") -> Converter:
    model = random_model(config)
    return Converter(model, Scheme(activations), calibrate(model, some_windows(4, seed=1)))


def random_maps(
    converter: Converter, count: int, kept: frozenset[str] = ALWAYS_PINNED, seed: int = 0
) -> list[PrecisionMap]:
    """Maps at random; components of the kinds `kept` stay fp16."""
    rng = random.Random(seed)
    return [
        PrecisionMap(
            tuple(
                (c.name, "fp16" if c.kind in kept else rng.choice(("fp16", "int8", "int4")))
                for c in converter.components
            )
        )
        for _ in range(count)
    ]


def alone(converter: Converter, maps: Sequence[PrecisionMap], windows: Windows) -> list[np.ndarray]:
    return [evaluate(converter.convert(one), windows).nll for one in maps]


def likelihoods(outcomes: Sequence[Any]) -> list[np.ndarray]:
    assert all(isinstance(outcome, Evaluation) for outcome in outcomes)
    return [outcome.nll for outcome in outcomes]


@pytest.mark.parametrize("most", [1, 3, 7])
@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_in_one_pass_give_what_each_gives_alone(family: str, activations: ActivationScheme, most: int) -> None:
    converter, windows = converter_of(FAMILIES[family], activations), some_windows(5)
    maps = random_maps(converter, 7, ALWAYS_PINNED | DEFAULT_PINNED)
    found = evaluate_stacked(converter, maps, windows, most=most)
    np.testing.assert_allclose(likelihoods(found), alone(converter, maps, windows), rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_with_every_pin_lifted_too(family: str) -> None:
    converter, windows = converter_of(FAMILIES[family], "none"), some_windows(5)
    maps = random_maps(converter, 9)
    found = evaluate_stacked(converter, maps, windows, most=9)
    np.testing.assert_allclose(likelihoods(found), alone(converter, maps, windows), rtol=1e-6)


@pytest.mark.parametrize("stage", range(4))
def test_maps_that_differ_in_one_component_only(stage: int) -> None:
    converter, windows = converter_of(MAMBA), some_windows(3)
    widest = PrecisionMap.uniform("fp16", converter.components)
    changed = [c.name for c in converter.components if c.stage == stage and c.kind not in ALWAYS_PINNED]
    maps = [widest, *(widest.changed({name: "int8"}) for name in changed)]
    found = evaluate_stacked(converter, maps, windows, most=len(maps))
    np.testing.assert_allclose(likelihoods(found), alone(converter, maps, windows), rtol=1e-6)


@pytest.mark.parametrize("kind", ["conv1d", "norm"])
@pytest.mark.parametrize("activations", ["dynamic", "none"])
def test_maps_that_agree_in_all_projections_of_a_layer(kind: str, activations: ActivationScheme) -> None:
    converter, windows = converter_of(MAMBA, activations), some_windows(3)
    for lowest in ("int8", "fp16"):
        base = PrecisionMap.uniform(lowest, converter.components)
        other = "fp16" if lowest == "int8" else "int8"
        maps = [base, base.changed({f"layers.1.ssm.{kind}": other})]
        found = likelihoods(evaluate_stacked(converter, maps, windows))
        for ours, theirs in zip(found, alone(converter, maps, windows), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_an_embedding_in_blocks() -> None:
    windows = some_windows(4)
    counts = torch.bincount(windows.ids.flatten(), minlength=VOCABULARY)
    converter = Converter(split_embedding(random_model(MAMBA), counts, [8, 30]), Scheme("none"))
    maps = random_maps(converter, 6)
    found = evaluate_stacked(converter, maps, windows, most=6)
    np.testing.assert_allclose(likelihoods(found), alone(converter, maps, windows), rtol=1e-6)


def test_outcomes_stand_in_the_order_of_the_maps_with_repeated_maps_twice() -> None:
    converter, windows = converter_of(MAMBA), some_windows(2)
    a, b, c = random_maps(converter, 3)
    found = likelihoods(evaluate_stacked(converter, [c, a, b, a], windows, most=2))
    np.testing.assert_allclose(found, alone(converter, [c, a, b, a], windows), rtol=1e-6)


def test_no_map_has_no_outcome() -> None:
    assert evaluate_stacked(converter_of(MAMBA), [], some_windows(2)) == []


@contextmanager
def calls_of(converter: Converter, maps: Sequence[PrecisionMap]) -> Iterator[Counter[tuple[str, str]]]:
    """How often each component's module of each precision is run meanwhile."""
    counted: Counter[tuple[str, str]] = Counter()
    hooks = []
    by_name = {component.name: component for component in converter.components}
    for name, precision in {entry for one in maps for entry in one}:
        module = converter.module(by_name[name], precision)
        hooks.append(module.register_forward_hook(lambda *_, key=(name, precision): counted.update([key])))
    yield counted
    for hook in hooks:
        hook.remove()


def test_in_one_pass_each_module_runs_once_for_all_maps_that_have_it() -> None:
    converter, windows = converter_of(MAMBA), some_windows(2)
    maps = random_maps(converter, 6)
    linear = {c.name for c in converter.components if c.multiplies_inputs and c.kind != "embedding"}
    with calls_of(converter, maps) as counted:
        evaluate_stacked(converter, maps, windows, most=6)
    wanted = {entry for one in maps for entry in one if entry[0] in linear}
    assert len(wanted) > len(linear)
    assert {key: counted[key] for key in wanted} == dict.fromkeys(wanted, 1)


def rows_of(converter: Converter, maps: Sequence[PrecisionMap]) -> list[int]:
    """Rows of each layer."""
    return [stage.parents.shape[0] for stage in make_stack(converter, in_order(converter.components, maps)).stages]


def test_maps_share_a_row_until_they_differ() -> None:
    converter = converter_of(UNTIED)
    base = PrecisionMap.uniform("fp16", converter.components)
    in_layer = [f"layers.{i}.ssm.out_proj" for i in range(3)]
    assert rows_of(converter, [base, base.changed({"lm_head": "int8"})]) == [1, 1, 1]
    assert rows_of(converter, [base, base.changed({in_layer[2]: "int8"})]) == [1, 1, 2]
    assert rows_of(converter, [base, base.changed({in_layer[1]: "int8"})]) == [1, 2, 2]
    four = [base.changed({in_layer[1]: p, in_layer[2]: q}) for p in ("fp16", "int8") for q in ("fp16", "int8")]
    assert rows_of(converter, four) == [1, 2, 4]
    assert rows_of(converter, [base, base.changed({"embedding": "int8"})]) == [2, 2, 2]


def test_where_all_maps_agree_nothing_is_split() -> None:
    converter = converter_of(MAMBA)
    base = PrecisionMap.uniform("fp16", converter.components)
    stack = make_stack(converter, [base, base.changed({"layers.1.ssm.in_proj": "int8"})])
    split = [name for stage in stack.stages for name, one in stage.layer.named_modules() if isinstance(one, Split)]
    assert split == ["branches.0.mixings.0.in_proj"]


def test_a_map_that_is_not_finite_leaves_the_others_as_they_are() -> None:
    converter, windows = converter_of(MAMBA), some_windows(4)
    base = PrecisionMap.uniform("int8", converter.components)
    component = next(c for c in converter.components if c.name == "layers.0.ssm.dt_proj")
    converter.module(component, "int4").weight.scale.fill_(torch.nan)  # type: ignore[union-attr, operator]
    maps = [base, base.changed({component.name: "int4"}), base.changed({"layers.1.ssm.dt_proj": "int4"})]
    first, broken, last = evaluate_stacked(converter, maps, windows, most=3)
    assert isinstance(broken, EvaluationError)
    with pytest.raises(EvaluationError) as raised:
        evaluate(converter.convert(maps[1]), windows)
    assert str(broken) == str(raised.value)
    np.testing.assert_allclose(likelihoods([first, last]), alone(converter, [maps[0], maps[2]], windows), rtol=1e-6)


def test_a_map_that_cannot_be_converted_stands_as_its_reason() -> None:
    tensors = random_tensors(MAMBA)
    tensors["layers.0.ssm.in_proj.weight"][0, 0] = 1e5
    converter = Converter(build(MAMBA, tensors), Scheme("none"))
    base = PrecisionMap.uniform("fp16", converter.components)
    possible = base.changed({"layers.0.ssm.in_proj": "int8"})
    refused, found = evaluate_stacked(converter, [base, possible], some_windows(2))
    assert isinstance(refused, InfeasibleError)
    assert "layers.0.ssm.in_proj" in str(refused)
    assert isinstance(found, Evaluation)


def test_what_is_raised_before_a_layer_ends_the_evaluation() -> None:
    converter = converter_of(MAMBA)
    calls: list[None] = []

    def second() -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_stacked(converter, random_maps(converter, 3), some_windows(2), before_layer=second)
    assert len(calls) == 2


@pytest.mark.parametrize("fits", [0, 1, 3])
def test_a_stack_that_does_not_fit_is_halved_until_it_does(monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    converter, windows = converter_of(MAMBA), some_windows(3)
    maps = random_maps(converter, 7)
    expected = alone(converter, maps, windows)
    real, tried = Stack.nll, list[int]()

    def within_memory(stack: Stack, *arguments: Any) -> Any:
        tried.append(stack.maps)
        if stack.maps > fits:
            raise torch.OutOfMemoryError
        return real(stack, *arguments)

    monkeypatch.setattr(Stack, "nll", within_memory)
    if fits == 0:
        with pytest.raises(torch.OutOfMemoryError):
            evaluate_stacked(converter, maps, windows, most=7)
        return
    found = evaluate_stacked(converter, maps, windows, most=7)
    assert max(tried) == 7
    np.testing.assert_allclose(likelihoods(found), expected, rtol=1e-6)


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensors made meanwhile that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self._hold(one.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.alive:
            return
        self.alive[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))


LARGER: dict[str, Config] = {
    "mamba": MambaConfig(
        vocabulary=VOCABULARY, d_model=64, d_inner=128, d_state=16, dt_rank=4, d_conv=4, n_layers=2, max_length=64
    ),
    "feed-forward": IteraConfig(vocabulary=VOCABULARY, d_model=64, max_length=64, layers=(IteraLayer(32, 8, 4, 256),)),
    "experts": IteraConfig(
        vocabulary=VOCABULARY, d_model=64, max_length=64, layers=(IteraLayer(32, 8, 4, 256, experts=4),)
    ),
    "core": IteraConfig(vocabulary=VOCABULARY, d_model=32, max_length=64, layers=(IteraLayer(128, 16, 4, 16),)),
}


@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
@pytest.mark.parametrize("name", LARGER)
def test_the_estimate_bounds_the_activations_that_are_alive_at_once(name: str, activations: ActivationScheme) -> None:
    config = LARGER[name]
    model = random_model(config)
    ids = torch.randint(0, VOCABULARY, (8, 64), generator=torch.Generator().manual_seed(0))
    converter = Converter(model, Scheme(activations), calibrate(model, Windows(ids)))
    maps = in_order(converter.components, random_maps(converter, 4, ALWAYS_PINNED | DEFAULT_PINNED))
    stack = make_stack(converter, maps)
    with torch.inference_mode(), PeakBytes() as measured:
        hidden = stack.hidden(ids)
    bound = token_bytes(config) * hidden.shape[0] * ids.numel()
    weights = sum(c.fp32_bytes for c in find_components(model) if c.stage > 0)
    assert bound / 6 < measured.peak <= bound + weights


def test_a_stack_converts_each_of_its_maps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    converter, converted = converter_of(MAMBA), list[PrecisionMap]()
    convert = converter.convert

    def counting(one: PrecisionMap) -> LanguageModel:
        converted.append(one)
        return convert(one)

    monkeypatch.setattr(converter, "convert", counting)
    maps = random_maps(converter, 5)
    evaluate_stacked(converter, maps, some_windows(2), most=3)
    assert sorted(converted, key=hash) == sorted(maps, key=hash)


def test_as_many_maps_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(ITERA)
    one = token_bytes(ITERA) * windows_at_once(torch.device("cpu"), LENGTH, 1) * LENGTH
    for free, expected in ((0, 1), (one, 1), (7 * one + 1, 7)):
        monkeypatch.setattr("ssm_mp.evaluation.stack.free_bytes", lambda device, free=free: free)
        assert at_once(model, LENGTH) == expected


def test_a_gpus_free_memory_is_what_torch_holds_empty_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    free = free_bytes(torch.device("cuda"))
    assert 0 < free < 1500
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 700)
    assert free_bytes(torch.device("cuda")) == pytest.approx(free * 1000 / 1500, abs=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_maps_in_one_pass_give_what_each_gives_alone(family: str, activations: ActivationScheme) -> None:
    windows, model = some_windows(40), random_model(FAMILIES[family]).cuda()
    converter = Converter(model, Scheme(activations), calibrate(model, some_windows(4, seed=1)))
    maps = random_maps(converter, 12)
    found = evaluate_stacked(converter, maps, windows)
    # a float16 product of more rows may add up in another order, and round to the float16 number beside
    np.testing.assert_allclose(likelihoods(found), alone(converter, maps, windows), rtol=5e-3)
