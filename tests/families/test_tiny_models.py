"""The tiny models themselves: they can be read back, and every tensor of theirs matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.families.tiny_models import CASES, Case, expected_decoding, expected_logits, random_ids, written

pytestmark = pytest.mark.slow
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_a_written_case_is_read_back_with_the_same_logits(case: Case, tmp_path: Path) -> None:
    model = case.make()
    ids = random_ids(37)
    again = type(model).from_pretrained(written(case, tmp_path))
    assert AutoConfig.from_pretrained(tmp_path).model_type == case.family
    assert (tmp_path / "model.safetensors").exists()
    assert torch.allclose(expected_logits(model, ids), expected_logits(again, ids), rtol=0, atol=1e-5)


@every_case
def test_every_tensor_moves_the_logits(case: Case) -> None:
    model = case.make()
    logits = model(random_ids(37), use_cache=False).logits
    (logits * torch.randn(logits.shape)).sum().backward()
    still = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 1e-4
    ]
    assert [name for name in still if "visual" not in name and not name.endswith("k_proj.bias")] == []


@every_case
def test_no_tensor_has_equal_elements(case: Case) -> None:
    assert [
        name for name, tensor in case.make().state_dict().items() if tensor.unique().numel() < tensor.numel() / 2
    ] == []


@every_case
def test_decoding_agrees_with_whole_windows(case: Case) -> None:
    model = case.make()
    ids = random_ids(19)
    found = expected_decoding(model, ids, 6)
    whole = expected_logits(model, torch.cat([ids, found.tokens], dim=1))[:, 19:]
    assert (found.logits - whole).abs().max() < 1e-5 * whole.abs().max()
