"""The embedding in blocks computes what the whole one does, is counted honestly, and survives a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_mp.artifact import load_artifact, save_artifact, tensor_bytes
from ssm_mp.components import find_components, fp32_bytes
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import convert
from ssm_mp.conversion.embedding_blocks import block_numbers, split_embedding, with_blocks
from ssm_mp.errors import PrecisionMapError
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.families.registry import config_from_json, config_to_json
from ssm_mp.model import LanguageModel
from ssm_mp.modules.embedding import BlockedEmbedding, index_bits
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import CONFIGS, MAMBA, VOCABULARY, random_model, some_windows

BLOCKS = (5, 20, 50)


def counts(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1000, (VOCABULARY,), generator=torch.Generator().manual_seed(seed))


def mixed(model: LanguageModel) -> PrecisionMap:
    rules = {"*": "nf4", "embedding.blocks.0": "int8", "embedding.blocks.1": "fp16", "embedding.blocks.2": "int3"}
    return PrecisionMap.from_rules(rules, find_components(model))


@given(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=6, unique=True), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_the_split_model_is_the_same_function(boundaries: list[int], seed: int) -> None:
    model = random_model(MAMBA)
    split = split_embedding(model, counts(seed), sorted(boundaries))
    ids = some_windows().ids
    assert torch.equal(split.embed(ids), model.embed(ids))
    assert torch.allclose(split(ids), model(ids), atol=1e-5)
    hidden = split.hidden(ids)
    reordered = split.scores(hidden).gather(-1, split.columns(torch.arange(VOCABULARY)).expand(*ids.shape, -1))
    assert torch.equal(reordered, split.head(hidden))


def test_the_most_frequent_tokens_are_in_the_first_block() -> None:
    held = counts()
    numbers = block_numbers(held, (5, 15, 44))
    assert torch.bincount(numbers).tolist() == [5, 15, 44]
    for low, high in ((0, 1), (1, 2)):
        assert held[numbers == low].min() >= held[numbers == high].max()


@pytest.mark.parametrize("family", CONFIGS)
def test_blocks_are_components_that_count_every_row_once(family: str) -> None:
    model = random_model(CONFIGS[family])
    split = split_embedding(model, counts(), BLOCKS)
    rows = [c.parameters[0].shape[0] for c in find_components(split) if c.kind == "embedding"]
    assert rows == [5, 15, 30, 14]
    assert fp32_bytes(find_components(split)) == fp32_bytes(find_components(model))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("activations", ["static", "dynamic", "none"])
def test_a_mixed_map_of_blocks_survives_a_file_exactly(tmp_path: Path, family: str, activations: str) -> None:
    split = split_embedding(random_model(CONFIGS[family]), counts(), BLOCKS)
    scheme = Scheme(activations)  # type: ignore[arg-type]
    converted = convert(split, mixed(split), scheme, calibrate(split, some_windows()))
    assert tensor_bytes(converted) == mixed(split).bytes(find_components(split), scheme.activations)
    loaded = load_artifact(save_artifact(tmp_path / "a", converted, mixed(split), scheme, {}))
    assert isinstance(loaded.embedding, BlockedEmbedding)
    windows = some_windows()
    assert evaluate(loaded, windows).perplexity == evaluate(converted, windows).perplexity


def test_which_token_is_where_takes_two_bits_for_four_blocks_and_is_in_the_count() -> None:
    split = split_embedding(random_model(MAMBA), counts(), BLOCKS)
    first = find_components(split)[0]
    assert first.bytes("fp16", "none") == 5 * MAMBA.d_model * 2 + VOCABULARY * 2 // 8
    assert [index_bits(blocks) for blocks in (2, 3, 4, 5, 16, 17)] == [1, 2, 2, 4, 4, 8]


def test_a_config_with_blocks_survives_json() -> None:
    config = with_blocks(MAMBA, BLOCKS)
    assert config_from_json(config_to_json(config)) == config
    assert with_blocks(MAMBA, ()) == MAMBA


@pytest.mark.parametrize("wrong", [(0, 5), (5, 5), (9, 3), (VOCABULARY,)])
def test_boundaries_that_leave_an_empty_block_are_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(PrecisionMapError, match="expected fewer than 256 rising numbers of tokens between 1 and 63"):
        with_blocks(MAMBA, wrong)
