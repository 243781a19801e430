"""Every family against transformers: folders that it wrote, whole windows, and tokens one by one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.decoding.decode import prefill, step
from ssm_mp.families.registry import FAMILIES, config_from_json, config_to_json
from ssm_mp.model import build
from tests.families.tiny_models import CASES, Case, expected_decoding, expected_logits, random_ids, written

BY_NAME = {case.name: case for case in CASES}
STEPS = 64


@cache
def both(name: str) -> tuple[PreTrainedModel, Checkpoint]:
    """A case's model in transformers, and the checkpoint that is read from what it wrote."""
    case: Case = BY_NAME[name]
    with TemporaryDirectory() as folder:
        return case.make(), load_checkpoint(written(case, Path(folder)))


def off(found: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", BY_NAME)
def test_logits_of_windows_are_those_of_transformers(name: str) -> None:
    theirs, checkpoint = both(name)
    ids = random_ids(41)
    with torch.inference_mode():
        found = build(checkpoint.config, checkpoint.tensors)(ids)
    assert off(found, expected_logits(theirs, ids)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_decoded_tokens_are_those_of_transformers(name: str) -> None:
    theirs, checkpoint = both(name)
    ids = random_ids(17)
    expected = expected_decoding(theirs, ids, STEPS)
    model = build(checkpoint.config, checkpoint.tensors)
    standing = prefill(model, ids)
    for t in range(STEPS):
        standing = step(model, standing, expected.tokens[:, t])
        assert off(standing.logits, expected.logits[:, t]) < 1e-5, t


@pytest.mark.parametrize("name", BY_NAME)
def test_a_config_survives_json(name: str) -> None:
    import json

    config = both(name)[1].config
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


def test_every_family_that_transformers_writes_has_a_case() -> None:
    types = {word for family in FAMILIES.values() for word in family.model_types} - {"mamba"}
    assert types <= {case.family for case in CASES}
