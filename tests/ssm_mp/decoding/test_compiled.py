"""A token in one compiled call against the layers one after another."""

from __future__ import annotations

import pytest
import torch

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.rotary import Rotary
from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.embedding_blocks import split_embedding
from ssm_mp.decoding.compiled import MOST_SEQUENCES, CompiledDecoder
from ssm_mp.errors import DataError
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import ActivationScheme, Scheme
from tests.ssm_mp.blocks.compiling import model_of
from tests.tiny import ITERA, MAMBA, MAMBAS, VOCABULARY, random_model, some_windows


def _converted(model: LanguageModel, precision: str, scheme: ActivationScheme) -> LanguageModel:
    if precision == "fp32":
        return model
    statistics = calibrate(model, some_windows())
    everywhere = PrecisionMap.uniform(precision, find_components(model))
    return Converter(model, Scheme(activations=scheme), statistics).convert(everywhere)


@pytest.mark.parametrize("family", MAMBAS)
@pytest.mark.parametrize(
    ("precision", "scheme"),
    [
        ("fp32", "none"),
        ("fp16", "none"),
        ("int8", "static"),
        ("int8", "dynamic"),
        ("int8", "none"),
        ("nf4", "none"),
        ("int3", "none"),
    ],
)
def test_compiled_steps_equal_the_layers(family: str, precision: str, scheme: ActivationScheme) -> None:
    model = _converted(random_model(MAMBAS[family]), precision, scheme)
    ids = some_windows(3).ids
    with torch.inference_mode():
        _, states = model.carry(ids[:, :5])
        kept = [layer[0][1].clone() for layer in states]
        decoder = CompiledDecoder.of(model, states, 5)
        assert decoder is not None
        current = states
        for t in range(5, 12):
            hidden, current = model.carry(ids[:, t : t + 1], current, t)
            expected = model.head(hidden[:, -1])
            torch.testing.assert_close(
                decoder.step(ids[:, t]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )
    assert all(torch.equal(layer[0][1], before) for layer, before in zip(states, kept, strict=True))


def test_logits_of_a_blocked_head_are_in_the_order_of_the_tokens() -> None:
    model = split_embedding(random_model(MAMBA), torch.randperm(VOCABULARY), [4, 20])
    ids = some_windows(2).ids
    with torch.inference_mode():
        _, states = model.carry(ids[:, :3])
        decoder = CompiledDecoder.of(model, states, 3)
        assert decoder is not None
        expected = model.head(model.carry(ids[:, 3:4], states, 3)[0][:, -1])
        torch.testing.assert_close(decoder.step(ids[:, 3]), expected, rtol=1e-5, atol=1e-5)


def test_what_it_does_not_know_is_left_to_others() -> None:
    with torch.inference_mode():
        itera, mamba = random_model(ITERA), random_model(MAMBA)
        ids = torch.zeros(MOST_SEQUENCES + 1, 2, dtype=torch.long)
        assert CompiledDecoder.of(itera, itera.carry(ids[:1])[1], 2) is not None
        unknown = _converted(mamba, "int6", "none")
        assert CompiledDecoder.of(unknown, unknown.carry(ids[:1])[1], 2) is None
        assert CompiledDecoder.of(mamba, mamba.carry(ids)[1], 2) is None
        assert CompiledDecoder.of(mamba, mamba.carry(ids[:MOST_SEQUENCES])[1], 2) is not None


def test_states_that_grow_get_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssm_mp.decoding.compiled._ROOM", 2)
    model = model_of(Attention(d_model=16, n_heads=4, n_kv_heads=2, head_dim=8, rotary=Rotary(8, 1e4)), "fp32")
    ids = torch.randint(0, 40, (2, 14), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        states = model.carry(ids[:, :2])[1]
        decoder = CompiledDecoder.of(model, states, 2)
        assert decoder is not None
        found = torch.stack([decoder.step(ids[:, t]) for t in range(2, 14)], dim=1)
        torch.testing.assert_close(found, model(ids)[:, 2:], rtol=1e-4, atol=1e-4)


def test_a_token_that_is_none_has_no_finite_logits() -> None:
    model, ids = random_model(MAMBA), some_windows(1).ids
    with torch.inference_mode():
        decoder = CompiledDecoder.of(model, model.carry(ids[:, :3])[1], 3)
        assert decoder is not None
        assert decoder.step(torch.tensor([VOCABULARY])).isnan().all()


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_a_step_takes_one_token_of_each_sequence(shape: tuple[int, ...]) -> None:
    model = random_model(MAMBA)
    with torch.inference_mode():
        decoder = CompiledDecoder.of(model, model.carry(some_windows(2).ids[:, :3])[1], 3)
    assert decoder is not None
    with pytest.raises(DataError, match="expected one token for each of 2 sequences, found shape"):
        decoder.step(torch.zeros(shape, dtype=torch.int64))
    assert decoder.position == 3
