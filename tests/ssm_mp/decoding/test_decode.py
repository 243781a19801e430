"""Reading token by token is reading at once, in every family and precision, and generating is repeated reading."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssm_mp.components import find_components
from ssm_mp.config import Config
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import convert
from ssm_mp.conversion.embedding_blocks import split_embedding
from ssm_mp.decoding.compiled import CompiledDecoder
from ssm_mp.decoding.decode import (
    Decoding,
    PlainDecoder,
    generate,
    generate_timed,
    open_decoder,
    prefill,
    require_room,
    step,
)
from ssm_mp.errors import DataError, EvaluationError
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import LanguageModel, build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import ActivationScheme, Scheme
from tests.tiny import (
    CONFIGS,
    LENGTH,
    MAMBA,
    VOCABULARY,
    random_model,
    random_tensors,
    some_windows,
)

UNTIED = MambaConfig(
    vocabulary=VOCABULARY, d_model=16, d_inner=32, d_state=4, dt_rank=2, d_conv=1, n_layers=2, tied=False
)  # fmt: skip
FAMILIES: dict[str, Config] = {**CONFIGS, "untied, kernel of one": UNTIED}
FORMS = (
    "fp32", "blocks", "fp16 none", "int8 static", "int8 dynamic", "int8 none", "nf4 none", "int4 none", "int3 none",
    "mixed blocks",
)  # fmt: skip


@cache
def made(family: str, form: str) -> LanguageModel:
    """A tiny model in one of its forms."""
    model = random_model(FAMILIES[family])
    if "blocks" in form:
        counts = torch.randint(0, 99, (VOCABULARY,), generator=torch.Generator().manual_seed(1))
        model = split_embedding(model, counts, (5, 20, 50))
    if form in ("fp32", "blocks"):
        return model
    components = find_components(model)
    precision, activations = form.split()
    if form == "mixed blocks":
        rules = {"*": "nf4", "embedding.blocks.0": "int8", "embedding.blocks.1": "fp16", "embedding.blocks.2": "int3"}
        return convert(model, PrecisionMap.from_rules(rules, components), Scheme("none"))
    scheme: ActivationScheme = activations  # type: ignore[assignment]
    statistics = calibrate(model, some_windows(4, seed=1)) if scheme == "static" else None
    return convert(model, PrecisionMap.uniform(precision, components), Scheme(scheme), statistics)


def some_ids(sequences: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def tolerance(form: str) -> float:
    """Rounding; where inputs are rounded to 8 bits, a hair can be a whole level."""
    return 1e-2 if form in ("int8 static", "int8 dynamic") else 1e-5


def read_on(model: LanguageModel, decoding: Decoding, tokens: Tensor) -> Decoding:
    """Several steps: `tokens [b, n]`."""
    for column in tokens.unbind(dim=1):
        decoding = step(model, decoding, column)
    return decoding


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_agree_with_the_whole_forward_pass(family: str, form: str) -> None:
    model, ids = made(family, form), some_ids(3, LENGTH)
    with torch.inference_mode():
        whole = model(ids)
    decoding = prefill(model, ids[:, :4])
    assert off(decoding.logits, whole[:, 3]) < tolerance(form)
    session = open_decoder(model, decoding)
    for t in range(4, LENGTH):
        decoding = step(model, decoding, ids[:, t])
        assert decoding.position == t + 1
        assert off(decoding.logits, whole[:, t]) < tolerance(form)
        assert off(session.step(ids[:, t]), whole[:, t]) < tolerance(form)


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, LENGTH - 1), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40)
def test_a_prompt_may_be_split_anywhere(family: str, at: int, sequences: int, seed: int) -> None:
    model, ids = made(family, "fp32"), some_ids(sequences, LENGTH, seed)
    at_once, in_two = prefill(model, ids), read_on(model, prefill(model, ids[:, :at]), ids[:, at:])
    assert at_once.position == in_two.position == LENGTH
    assert off(in_two.logits, at_once.logits) < 1e-5
    for ours, theirs in zip(in_two.states, at_once.states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_and_a_session_leave_their_arguments_alone(family: str) -> None:
    model, ids = made(family, "fp32"), some_ids(2, 8)
    decoding, tokens = prefill(model, ids), torch.tensor([3, 5])
    held = [decoding.logits, *(t for layer in decoding.states for state in layer for t in state), tokens, ids]
    before = [t.clone() for t in held]
    once = step(model, decoding, tokens)
    session = open_decoder(model, decoding)
    first = session.step(tokens)
    kept = first.clone()
    session.step(tokens)
    assert torch.equal(first, kept), "logits that were handed out changed later"
    again = step(model, decoding, tokens)
    assert torch.equal(once.logits, again.logits)
    assert decoding.position == 8
    assert all(map(torch.equal, held, before))


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_greedily_is_repeated_whole_forward_passes(family: str) -> None:
    model, ids = made(family, "fp32"), some_ids(2, 3)
    expected = ids
    with torch.inference_mode():
        for _ in range(LENGTH - 3):
            expected = torch.cat([expected, model(expected)[:, -1].argmax(dim=-1)[:, None]], dim=1)
    assert torch.equal(generate(model, ids, LENGTH - 3), expected)


@pytest.mark.parametrize("form", ["fp32", "int8 dynamic", "mixed blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_a_batch_do_not_see_each_other(family: str, form: str) -> None:
    model, ids = made(family, form), some_ids(4, 5)
    together = read_on(model, prefill(model, ids), ids)
    for row in range(4):
        alone = read_on(model, prefill(model, ids[row : row + 1]), ids[row : row + 1])
        assert off(together.logits[row], alone.logits[0]) < tolerance(form)
    swapped = torch.tensor([2, 0, 3, 1])
    permuted = read_on(model, prefill(model, ids[swapped]), ids[swapped])
    assert off(permuted.logits, together.logits[swapped]) < tolerance(form)


def test_what_no_compiled_decoder_takes_is_decoded_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = made("mamba", "fp32"), some_ids(1, 4)
    compiled = open_decoder(model, prefill(model, ids))
    monkeypatch.setattr(CompiledDecoder, "of", classmethod(lambda cls, *arguments: None))
    plain = open_decoder(model, prefill(model, ids))
    assert isinstance(plain, PlainDecoder)
    for token in range(5):
        assert off(compiled.step(torch.tensor([token])), plain.step(torch.tensor([token]))) < 1e-5
    assert plain.decoding.position == 9


def test_the_same_seed_draws_the_same_tokens_and_leaves_the_global_generator_alone() -> None:
    model, ids = made("huggingface", "fp32"), some_ids(2, 4)
    before = torch.get_rng_state()
    drawn = [generate(model, ids, 20, temperature=2.0, seed=seed) for seed in (7, 7, 8)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_tokens_are_drawn_by_the_softmax_of_logits_over_temperature() -> None:
    model, ids, temperature = made("huggingface", "fp32"), some_ids(1, 4), 3.0
    expected = (prefill(model, ids).logits[0].double() / temperature).softmax(dim=0)
    drawn = generate(model, ids.expand(20_000, -1), 1, temperature=temperature)[:, -1]
    found = torch.bincount(drawn, minlength=VOCABULARY) / drawn.numel()
    deviation = (expected * (1 - expected) / drawn.numel()).sqrt()
    assert bool(((found - expected).abs() < 5 * deviation + 1e-4).all())


def test_a_temperature_next_to_zero_takes_the_most_likely_token() -> None:
    model, ids = made("huggingface", "fp32"), some_ids(2, 4)
    assert torch.equal(generate(model, ids, 12, temperature=1e-300), generate(model, ids, 12))


def test_prompts_stand_before_the_new_tokens_and_zero_new_ones_are_the_prompt() -> None:
    model, ids = made("itera", "fp32"), some_ids(2, 4)
    assert torch.equal(generate(model, ids, 0), ids)
    assert torch.equal(generate(model, ids, 3)[:, :4], ids)
    assert torch.equal(generate(model, ids.int(), 3), generate(model, ids, 3).int())


@pytest.mark.parametrize("family", ["mamba", "itera"])
def test_where_positions_run_out_the_error_says_how_many_tokens_are_possible(family: str) -> None:
    model, ids = made(family, "fp32"), some_ids(1, LENGTH - 3)
    assert generate(model, ids, 4).shape == (1, LENGTH + 1)  # the last one made needs no position
    with pytest.raises(DataError, match=f"positions for {LENGTH} tokens: at most 4 new ones are possible"):
        generate(model, ids, 5)
    with pytest.raises(DataError, match="none is possible, shorten the prompt"):
        generate(model, some_ids(1, LENGTH + 1), 0)
    at_the_end = prefill(model, some_ids(1, LENGTH))
    with pytest.raises(DataError, match=f"positions for {LENGTH}"):
        step(model, at_the_end, torch.tensor([1]))
    with pytest.raises(DataError, match=f"positions for {LENGTH}"):
        open_decoder(model, at_the_end).step(torch.tensor([1]))


def test_without_positions_nothing_runs_out() -> None:
    require_room(made("huggingface", "fp32"), 10**6, 10**6)
    assert generate(made("huggingface", "fp32"), some_ids(1, 3), 5 * LENGTH).shape == (1, 3 + 5 * LENGTH)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "no tokens to read"),
        (torch.zeros(0, 4, dtype=torch.long), "no tokens to read"),
        (torch.zeros(4, dtype=torch.long), r"expected token ids \[b, l\]"),
        (torch.zeros(1, 4), "as integers, found torch.float32"),
        (torch.tensor([[1, VOCABULARY]]), f"token id {VOCABULARY} is outside the model's vocabulary of {VOCABULARY}"),
        (torch.tensor([[1, -1]]), "token id -1 is outside"),
    ],
)
def test_ids_that_cannot_be_read_are_one_clear_error(ids: Tensor, said: str) -> None:
    for reading in (lambda: generate(made("mamba", "fp32"), ids, 2), lambda: prefill(made("mamba", "fp32"), ids)):
        with pytest.raises(DataError, match=said):
            reading()


def test_a_step_wants_one_token_of_the_vocabulary_for_each_sequence() -> None:
    model = made("mamba", "fp32")
    decoding = prefill(model, some_ids(2, 4))
    with pytest.raises(DataError, match=r"one token for each of 2 sequences, found shape \[1\]"):
        step(model, decoding, torch.tensor([1]))
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        step(model, decoding, torch.tensor([1, VOCABULARY]))


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(DataError, match="temperature"):
        generate(made("mamba", "fp32"), some_ids(1, 3), 2, temperature=temperature)
    with pytest.raises(DataError, match="-1 new tokens"):
        generate(made("mamba", "fp32"), some_ids(1, 3), -1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_choose_no_token(temperature: float) -> None:
    broken = random_tensors(MAMBA)
    broken["norm.bias"][0] = math.nan
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        generate(build(MAMBA, broken), some_ids(1, 3), 2, temperature=temperature)


def test_timed_generation_counts_the_first_new_token_to_the_prompt() -> None:
    found = generate_timed(made("itera", "fp32"), some_ids(2, 4), 5)
    assert found.prompt == 4
    assert found.prefill_tokens_per_second == pytest.approx(2 * 4 / found.prefill_seconds)
    assert found.decode_tokens_per_second == pytest.approx(2 * 4 / found.decode_seconds)
    assert generate_timed(made("itera", "fp32"), some_ids(2, 4), 1).decode_tokens_per_second is None
