"""Train the second reference: a small hybrid in Granite-4.0-H layout on the Python standard library.

    pip install '.[dev]'                          # transformers, which builds and writes the checkpoint
    python studies/hybrid/train.py                # writes a folder as `save_pretrained` does, and training.json
    python studies/hybrid/train.py --steps 20 --out try
    python studies/hybrid/train.py --progress hybrid-progress.pt  # run it again after a stop: it goes on

Three Mamba-2 layers and one attention layer without positions, each followed by a gated feed-forward and
by four small experts of which two are chosen. Granite's format knows experts in every layer or in none
(`num_local_experts` holds for the whole model), so it is every layer, with few and narrow experts. The text
and the tokenizer are the first reference's. The checkpoint beside this file saw 4.1 million tokens in 51 minutes on
one thread of a busy machine. Needs a C++ compiler (torch.compile).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, PreTrainedTokenizerFast

from ssm_mp.data.corpus import Part, stdlib_documents

LENGTH = 128
END_OF_TEXT = "<|endoftext|>"
TOKENIZER = Path(__file__).parents[1] / "reference" / "tokenizer.json"
BALANCE = 0.01
"""Weight of the load-balancing loss (Fedus et al. 2021, equation 4) in the training loss."""


FEW = 32
"""Windows whose perplexity is written down apart, for a quick check of the checkpoint."""
DECAY = 0.3
"""The share of the steps, at the end, over which the rate falls to 0: until then `--steps` has no influence."""


def configuration() -> GraniteMoeHybridConfig:
    """The sizes and the multipliers, none of which is 1."""
    return GraniteMoeHybridConfig(
        vocab_size=8000, hidden_size=128, num_hidden_layers=4, tie_word_embeddings=True,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        mamba_n_heads=8, mamba_d_head=32, mamba_expand=2, mamba_d_state=32, mamba_n_groups=1, mamba_d_conv=4,
        mamba_chunk_size=64, mamba_conv_bias=True, mamba_proj_bias=False,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=False, position_embedding_type="nope",
        shared_intermediate_size=96, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=BALANCE, embedding_multiplier=6.0, residual_multiplier=0.5,
        attention_multiplier=0.125, logits_scaling=1.5, rms_norm_eps=1e-5, max_position_embeddings=LENGTH,
        bos_token_id=0, eos_token_id=0, pad_token_id=None, dtype="float32",
    )  # fmt: skip


def initialise(model: GraniteMoeHybridForCausalLM, seed: int) -> None:
    """Mamba-2's initialisation (Dao & Gu 2024) in place: steps in [0.001, 0.1], A in [−16, −1], D = 1, norms 1.

    transformers' own sets every step's bias to 1 (steps of 1.3) and A to −(1 … heads).
    """
    generator = torch.Generator().manual_seed(seed)
    branches = 2 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind == "A_log":
            value = (1 + 15 * torch.rand(parameter.shape, generator=generator)).log()
        elif kind == "dt_bias":
            step = torch.exp(torch.rand(parameter.shape, generator=generator) * math.log(100.0) + math.log(0.001))
            value = step + torch.log(-torch.expm1(-step))  # inverse of softplus
        elif kind == "D" or "norm" in kind:
            value = torch.ones(parameter.shape)
        elif name.endswith(".bias"):
            value = torch.zeros(parameter.shape)
        else:
            fan_in = parameter.shape[-1]
            std = 0.02 if kind == "embed_tokens" else 1 / math.sqrt(3 * fan_in)
            if kind in ("out_proj", "o_proj", "output_linear", "down_proj"):
                std /= math.sqrt(branches)
            value = torch.randn(parameter.shape, generator=generator) * std
        with torch.no_grad():
            parameter.copy_(value)


def tokens_of(part: Part, tokenizer: Tokenizer) -> np.ndarray:
    """All tokens of one part, each document followed by the end of text: int64."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(stdlib_documents(part))
    return np.concatenate([np.array([*text.ids, end], dtype=np.int64) for text in encoded])


def mamba2(mixer: Any, x: Tensor) -> Tensor:
    """The Mamba-2 mixer over one window, in its quadratic form (Dao & Gu 2024, section 3): `[b, l, d]`."""
    b, length, _ = x.shape
    heads, width, states = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    z, mixed, dt = mixer.in_proj(x).split([heads * width, heads * width + 2 * states, heads], dim=-1)
    taps = mixer.conv1d.weight.squeeze(1)  # [channels, kernel]: shifted sums are faster than a grouped convolution
    padded = F.pad(mixed, (0, 0, taps.shape[1] - 1, 0))
    mixed = mixer.conv1d.bias + sum(padded[:, k : k + length] * taps[:, k] for k in range(taps.shape[1]))
    u, keys, queries = F.silu(mixed).split([heads * width, states, states], dim=-1)
    dt = F.softplus(dt + mixer.dt_bias).transpose(1, 2)  # [b, heads, l]
    summed = torch.cumsum(-torch.exp(mixer.A_log)[:, None] * dt, dim=-1)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    decay = (summed[:, :, :, None] - summed[:, :, None, :]).masked_fill(later, -math.inf).exp()
    weights = (queries @ keys.transpose(1, 2))[:, None] * decay * dt[:, :, None, :]
    u = u.view(b, length, heads, width).transpose(1, 2)
    y = weights @ u + mixer.D[:, None, None] * u
    out: Tensor = mixer.out_proj(mixer.norm(y.transpose(1, 2).reshape(b, length, heads * width), z))
    return out


def attention(mixer: Any, x: Tensor) -> Tensor:
    """Causal attention without positions, with grouped heads: `[b, l, d]`."""
    b, length, _ = x.shape
    projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    q, k, v = (project(x).view(b, length, -1, mixer.head_dim).transpose(1, 2) for project in projections)
    repeats = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=mixer.scaling)
    out: Tensor = mixer.o_proj(y.transpose(1, 2).reshape(b, length, -1))
    return out


def experts(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """All experts at once, those not chosen times zero: `[b, l, d]` and the load-balancing loss."""
    logits = F.linear(x, block.router.weight)
    count, chosen_count = logits.shape[-1], block.router.top_k
    best, chosen = logits.topk(chosen_count, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, chosen, best.softmax(dim=-1))
    share = (weights > 0).to(x.dtype).mean(dim=(0, 1))
    balance = count / chosen_count * (share * logits.softmax(dim=-1).mean(dim=(0, 1))).sum()
    gate, up = F.linear(x, block.experts.gate_up_proj.flatten(0, 1)).unflatten(-1, (count, -1)).chunk(2, dim=-1)
    hidden = F.silu(gate) * up * weights[..., None]
    return hidden.flatten(-2) @ block.experts.down_proj.transpose(1, 2).flatten(0, 1), balance


def training_loss(model: GraniteMoeHybridForCausalLM, ids: Tensor, dropout: float) -> Tensor:
    """Next-token loss of windows `[b, l + 1]` plus the balance of the experts.

    The forward pass is transformers', written for speed on one window, with dropout on the embeddings and on
    every branch. `main` compares the two before it trains.
    """
    config: Any = model.config
    body: Any = model.model
    x = F.dropout(F.embedding(ids[:, :-1], body.embed_tokens.weight) * config.embedding_multiplier, dropout)
    balance = x.new_zeros(())
    for layer in body.layers:
        normed = layer.input_layernorm(x)
        y = attention(layer.self_attn, normed) if layer.mamba is None else mamba2(layer.mamba, normed)
        x = x + F.dropout(y, dropout) * config.residual_multiplier
        normed = layer.post_attention_layernorm(x)
        y, uneven = experts(layer.block_sparse_moe, normed)
        x = x + F.dropout(y + layer.shared_mlp(normed), dropout) * config.residual_multiplier
        balance = balance + uneven / config.num_hidden_layers
    logits = F.linear(body.norm(x), body.embed_tokens.weight) / config.logits_scaling
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + BALANCE * balance


def perplexity(model: GraniteMoeHybridForCausalLM, tokens: np.ndarray, batch: int = 32) -> float:
    """Perplexity over all whole windows of `LENGTH` tokens, by transformers' own forward pass."""
    windows = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH))
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in windows.split(batch):
            logits = model(ids, use_cache=False).logits[:, :-1]
            nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total, count = total + nll.double().sum().item(), count + nll.numel()
    return math.exp(total / count)


def check_forward(model: GraniteMoeHybridForCausalLM, ids: Tensor) -> None:
    """Raises SystemExit where `training_loss` is not transformers' loss."""
    with torch.inference_mode():
        ours = training_loss(model, ids, 0.0).item()
        found = model(ids[:, :-1], use_cache=False, output_router_logits=True)
        theirs = F.cross_entropy(found.logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        balance = 0.0
        for logits in found.router_logits:
            share = F.one_hot(logits.topk(2, dim=-1).indices, logits.shape[-1]).sum(dim=1).float().mean(dim=0)
            balance += (logits.shape[-1] / 2 * (share * logits.softmax(dim=-1).mean(dim=0)).sum()).item()
    expected = theirs + BALANCE * balance / len(found.router_logits)
    if not math.isclose(ours, expected, rel_tol=1e-5):
        raise SystemExit(f"the training loss is {ours}, by transformers' forward pass {expected}")


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors, convolutions and per-head numbers do not."""
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1 and "conv1d" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "conv1d" in name]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def train(model: GraniteMoeHybridForCausalLM, tokens: np.ndarray, given: argparse.Namespace) -> float:
    """AdamW with warm-up, a constant rate and a last stretch towards 0, in place. Returns the seconds it took.

    Windows and dropout of a step depend on the seed and the step alone, so that a run that goes on from
    `given.progress` sees what it would have seen.
    """
    optimizer = torch.optim.AdamW(groups_of(model), lr=given.rate, betas=(0.9, 0.95))
    loss_of: Callable[..., Tensor] = torch.compile(training_loss, dynamic=False)
    first, before = 0, 0.0
    if given.progress and given.progress.exists():
        held = torch.load(given.progress, weights_only=True)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        first, before = held["step"], held["seconds"]
    began = time.monotonic() - before
    for step in range(first, given.steps):
        rate = given.rate * min(1.0, (step + 1) / 100, (given.steps - step) / (DECAY * given.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = np.random.default_rng([given.seed, step]).integers(0, len(tokens) - LENGTH, size=given.batch)
        ids = torch.from_numpy(np.stack([tokens[s : s + LENGTH + 1] for s in starts]))
        torch.manual_seed(given.seed + step)
        loss = loss_of(model, ids, given.dropout)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent = time.monotonic() - began
        if step % 25 == 0 or step == given.steps - 1:
            print(f"step {step}/{given.steps}  loss {loss.item():.3f}  rate {rate:.2e}  {spent:.0f} s", flush=True)
        if given.progress and (step + 1) % 100 == 0:
            written = given.progress.with_suffix(".part")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1, "seconds": spent}, written)
            written.replace(given.progress)
    return time.monotonic() - began


def write_folder(model: GraniteMoeHybridForCausalLM, out: Path) -> None:
    """The checkpoint as users have them: config, tensors and tokenizer, readable by `from_pretrained`."""
    model.save_pretrained(out)
    wrap: Any = PreTrainedTokenizerFast
    said = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "model_max_length": LENGTH}
    wrap(tokenizer_file=str(TOKENIZER), **said).save_pretrained(out)
    shutil.copyfile(TOKENIZER, out / "tokenizer.json")  # byte for byte the first reference's


def sizes(model: nn.Module) -> dict[str, int]:
    """Parameters of each kind of block."""
    kinds = {"embed_tokens": "embedding", "mamba": "mamba", "self_attn": "attention", "shared_mlp": "feed_forward"}
    found = dict.fromkeys([*kinds.values(), "experts", "norms"], 0)
    for name, parameter in model.named_parameters():
        kind = next((said for part, said in kinds.items() if part in name.split(".")), None)
        found[kind or ("experts" if "block_sparse_moe" in name else "norms")] += parameter.numel()
    return found | {"total": sum(found.values())}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--progress", type=Path, help="where the state of the run is kept, so that it can go on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


def main() -> None:
    """Training, perplexities, files."""
    given = arguments()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    parts: tuple[Part, ...] = ("train", "search", "certify")
    tokens = {part: tokens_of(part, tokenizer) for part in parts}

    model = GraniteMoeHybridForCausalLM(configuration())
    initialise(model, given.seed)
    print({part: len(found) for part, found in tokens.items()}, sizes(model), flush=True)
    check_forward(model, torch.from_numpy(tokens["train"][: 2 * (LENGTH + 1)].reshape(2, -1)))
    seconds = train(model, tokens["train"], given)
    model.train(False)
    write_folder(model, given.out)
    read = GraniteMoeHybridForCausalLM.from_pretrained(given.out)
    result = {
        "perplexity": {part: perplexity(read, tokens[part]) for part in ("search", "certify")},
        "first_windows": {"count": FEW, "certify": perplexity(read, tokens["certify"][: FEW * LENGTH])},
        "parameters": sizes(model),
        "tokens": {part: len(found) for part, found in tokens.items()},
        "files": {part: len(stdlib_documents(part)) for part in parts},
        "trained_tokens": given.steps * given.batch * LENGTH,
        "steps": given.steps, "batch": given.batch, "rate": given.rate, "dropout": given.dropout, "seed": given.seed,
        "seconds": round(seconds), "threads": given.threads, "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "checkpoint_sha256": hashlib.sha256((given.out / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    (given.out / "training.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
