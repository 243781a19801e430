from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from torch import Tensor

from ssm_mp.checkpoints.reading import read_through
from ssm_mp.families.registry import config_to_json
from tests.tiny import MAMBA, random_tensors


def plain_digest(tensors: dict[str, Tensor]) -> str:
    """The digest as version 0.4 made it, of whole float32 tensors."""
    digest = hashlib.sha256(json.dumps(config_to_json(MAMBA), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_digest_is_that_of_the_float32_values_whatever_type_holds_them(dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(MAMBA).items()}
    found = read_through(config_to_json(MAMBA), tensors)
    assert found.digest == plain_digest(tensors)
    assert found.bad == {}


def test_slices_of_a_long_tensor_make_the_same_digest_as_the_whole() -> None:
    tensors = {"a": torch.randn(3, (1 << 22) // 2 + 5), "b": torch.ones(4)}
    assert read_through(config_to_json(MAMBA), tensors).digest == plain_digest(tensors)


def test_the_largest_magnitudes_are_found_of_either_sign() -> None:
    found = read_through({}, {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2.5, 0.0]), "c": torch.empty(0)})
    assert found.largest == {"a": 3.0, "b": 2.5, "c": 0.0}


def test_values_that_are_not_finite_are_counted_by_tensor() -> None:
    found = read_through({}, {"a": torch.tensor([1.0, math.nan, -math.inf]), "b": torch.ones(2)})
    assert found.bad == {"a": 2}
    assert not math.isfinite(found.largest["a"])
