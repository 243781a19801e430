"""The forward passes against independent references."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssm_mp import PrecisionMap, Scheme, convert, evaluate, find_components, load_model
from ssm_mp.errors import DataError
from tests.families.models import fp32_of, windows_of
from tests.tiny import HUGGING_FACE, ITERA, LENGTH, MAMBA, VOCABULARY, random_model, random_tensors


def _huggingface(folder: Path, *, tied: bool, bias: bool) -> tuple[object, Path]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    c = HUGGING_FACE
    config = transformers.MambaConfig(
        vocab_size=c.vocabulary, hidden_size=c.d_model, state_size=c.d_state, num_hidden_layers=3, expand=2,
        time_step_rank=c.dt_rank, conv_kernel=c.d_conv, tie_word_embeddings=tied, use_bias=bias,
        layer_norm_epsilon=1e-4,
    )  # fmt: skip
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_logits_agree_with_transformers(tmp_path: Path, tied: bool, bias: bool) -> None:
    theirs, folder = _huggingface(tmp_path, tied=tied, bias=bias)
    ids = torch.randint(0, VOCABULARY, (2, 21))
    with torch.inference_mode():
        expected = theirs(ids).logits  # type: ignore[operator]
        found = load_model(folder)(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def _itera_by_the_equations(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The design's equations, written out in float64, a token and a time step at a time."""
    p = {name: tensor.double() for name, tensor in tensors.items()}
    b, length = ids.shape

    def layer_norm(x: Tensor, at: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{at}.weight"] + p[f"{at}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    x = p["embedding.weight"][ids] + p["position_embedding.weight"][:length]
    for i, sizes in enumerate(ITERA.layers):
        at = f"layers.{i}.ssm"
        az = layer_norm(x, f"{at}.norm") @ p[f"{at}.in_proj.weight"].T
        a, z = az[..., : sizes.d_inner], az[..., sizes.d_inner :]
        kernel, bias = p[f"{at}.conv1d.weight"], p[f"{at}.conv1d.bias"]
        convolved = torch.zeros_like(a)
        for t in range(length):
            for k in range(sizes.d_conv):
                source = t - sizes.d_conv + 1 + k
                if source >= 0:
                    convolved[:, t] += kernel[:, 0, k] * a[:, source]
        a = silu(convolved + bias)
        at = f"{at}.ssm"
        steps = a @ p[f"{at}.delta_proj.weight"].T + p[f"{at}.delta_proj.bias"]
        delta = torch.log1p(torch.exp(steps)).mean(-1)
        A = -torch.exp(p[f"{at}.A_log"])
        h = torch.zeros(b, sizes.d_state, dtype=torch.float64)
        y = torch.zeros_like(a)
        for t in range(length):
            dt = delta[:, t : t + 1]
            h = torch.exp(dt * A) * h + dt * (a[:, t] @ p[f"{at}.B"].T)
            y[:, t] = h @ p[f"{at}.C"].T + p[f"{at}.D"] * a[:, t]
        x = x + (y * silu(z)) @ p[f"layers.{i}.ssm.out_proj.weight"].T
        if not sizes.experts:
            at = f"layers.{i}.moe"
            v = layer_norm(x, f"{at}.norm")
            x = x + gelu(v @ p[f"{at}.ffn.w1.weight"].T) @ p[f"{at}.ffn.w2.weight"].T
            continue
        at = f"layers.{i}.moe.layer"
        v = layer_norm(x, f"{at}.norm")
        added = torch.zeros_like(x)
        for row in range(b):
            for t in range(length):
                logits = p[f"{at}.router.gate.weight"] @ v[row, t]
                best = sorted(range(sizes.experts), key=lambda e: -float(logits[e]))[:2]
                gates = torch.softmax(logits[best], dim=0)
                for g, e in zip(gates, best, strict=True):
                    hidden = gelu(p[f"{at}.experts.{e}.w1.weight"] @ v[row, t])
                    added[row, t] += g * (p[f"{at}.experts.{e}.w2.weight"] @ hidden)
        x = x + added
    return layer_norm(x, "norm") @ p["embedding.weight"].T


def test_itera_agrees_with_the_equations_in_float64() -> None:
    tensors = random_tensors(ITERA, seed=3)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    expected = _itera_by_the_equations(tensors, ids)
    with torch.inference_mode():
        found = random_model(ITERA, seed=3)(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("config", [MAMBA, ITERA], ids=["mamba", "itera"])
def test_later_tokens_do_not_change_earlier_logits(config: object) -> None:
    model = random_model(config)  # type: ignore[arg-type]
    ids = torch.randint(0, VOCABULARY, (1, LENGTH))
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCABULARY
    with torch.inference_mode():
        torch.testing.assert_close(model(ids)[:, :-1], model(changed)[:, :-1])


def test_a_sequence_beyond_the_positions_is_refused() -> None:
    with pytest.raises(DataError, match=f"positions for {LENGTH}"):
        random_model(MAMBA)(torch.zeros(1, LENGTH + 1, dtype=torch.long))


def test_a_model_without_a_float_knows_where_it_is() -> None:
    model = fp32_of("lfm2/plain")  # it has nothing that is always fp16
    everywhere = PrecisionMap.uniform("int8", find_components(model), frozenset())
    converted = convert(model, everywhere, Scheme(activations="none"))
    assert not list(converted.parameters())
    assert converted.device == torch.device("cpu")
    assert evaluate(converted, windows_of("lfm2/plain", 2)).windows == 2
