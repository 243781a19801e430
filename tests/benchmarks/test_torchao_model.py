"""Before its linears are quantised, the model that torchao gets computes what ours does."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plain_mamba import plain_mamba
from benchmarks.torchao_model import TorchaoMamba, dynamic_int8
from ssm_mp.decoding.decode import prefill, step
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.kernels.scan import selective_scan
from ssm_mp.model import build
from tests.tiny import HUGGING_FACE, MAMBA, random_tensors


@pytest.mark.parametrize("config", [HUGGING_FACE, MAMBA], ids=["rms", "positions"])
def test_it_reads_and_steps_as_ours_does(config: MambaConfig) -> None:
    tensors = random_tensors(config)
    model = build(config, tensors)
    theirs = TorchaoMamba(plain_mamba(config, tensors, selective_scan).requires_grad_(False))
    ids = torch.randint(0, config.vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = prefill(model, ids)
    logits, states = theirs.read(ids)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    for position, tokens in enumerate((torch.tensor([3, 5]), torch.tensor([60, 1])), start=9):
        expected = step(model, expected, tokens)
        logits, states = theirs.step(tokens, states, torch.tensor([position]))
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_torchao_quantises_every_linear_and_leaves_the_embedding_alone() -> None:
    pytest.importorskip("torchao")
    tensors = random_tensors(HUGGING_FACE)
    model = dynamic_int8(HUGGING_FACE, tensors).model
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 1 + 4 * HUGGING_FACE.n_layers
    assert all(type(linear.weight).__name__ == "Int8Tensor" for linear in linears)
    torch.testing.assert_close(model.embedding.weight, tensors["embedding.weight"])
