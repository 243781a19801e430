"""Train the reference checkpoint: a small Mamba on the Python standard library of this interpreter.

    python studies/reference/train.py            # writes model.safetensors, tokenizer.json, training.json
    python studies/reference/train.py --steps 20 --out try

A byte-level BPE of 8000 entries is trained first; then 4 layers of width 128 with LayerNorm, learned
positions and a tied head, in the third `mamba` key layout. Needs a C++ compiler (torch.compile).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ssm_mp.data.corpus import Part, stdlib_documents
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import LanguageModel, build

VOCABULARY, LENGTH, CHUNK = 8000, 128, 32
END_OF_TEXT = "<|endoftext|>"
CONFIG = MambaConfig(
    vocabulary=VOCABULARY, d_model=128, d_inner=256, d_state=16, dt_rank=8, d_conv=4, n_layers=4,
    max_length=LENGTH, norm="layer",
)  # fmt: skip


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE with `VOCABULARY` entries, the first of them the end of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokens_of(part: Part, tokenizer: Tokenizer) -> np.ndarray:
    """All tokens of one part, each document followed by the end of text: int64."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(stdlib_documents(part))
    return np.concatenate([np.array([*text.ids, end], dtype=np.int64) for text in encoded])


@torch.compile(dynamic=False)
def scan_chunk(
    state: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`CHUNK` steps of the selective scan, time first: forward and backward are compiled together."""
    outputs = []
    for t in range(CHUNK):
        state = torch.exp(delta[t, :, :, None] * A) * state + (delta[t] * x[t])[:, :, None] * B[t, :, None, :]
        outputs.append((state * C[t, :, None, :]).sum(dim=-1))
    return state, torch.stack(outputs)


def compiled_scan(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan_reference`, fast forwards and backwards."""
    time_first = [part.transpose(0, 1).contiguous() for part in (a, F.softplus(dt), B, C)]
    held = a.new_zeros(a.shape[0], a.shape[2], A.shape[1]) if state is None else state
    outputs = []
    for start in range(0, a.shape[1], CHUNK):
        a_c, delta_c, b_c, c_c = (part[start : start + CHUNK] for part in time_first)
        held, y = scan_chunk(held, a_c, delta_c, A, b_c, c_c)
        outputs.append(y)
    return (torch.cat(outputs).transpose(0, 1) + a * D) * F.silu(z), held


def initial_tensors(config: MambaConfig, seed: int) -> dict[str, Tensor]:
    """Mamba's initialisation (Gu & Dao 2023, section 3.6): step sizes in [0.001, 0.1], A = −(1 … N), D = 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for parameter in config.parameters():
        if parameter.kind == "A_log":
            states = torch.arange(1, config.d_state + 1, dtype=torch.float32)
            value = states.log().repeat(config.d_inner, 1)
        elif parameter.kind == "D" or parameter.role == "vector":
            value = torch.ones(parameter.shape)
        elif parameter.kind == "dt_proj" and parameter.role == "bias":
            step = torch.exp(torch.rand(parameter.shape, generator=generator) * math.log(100.0) + math.log(0.001))
            value = step + torch.log(-torch.expm1(-step))  # inverse of softplus
        elif parameter.role == "bias":
            value = torch.zeros(parameter.shape)
        else:
            fan_in = math.prod(parameter.shape[1:])
            std = 0.02 if "embedding" in parameter.kind else 1 / math.sqrt(3 * fan_in)
            if parameter.kind == "out_proj":
                std /= math.sqrt(config.n_layers)
            value = torch.randn(parameter.shape, generator=generator) * std
        tensors[parameter.name] = value
    return tensors


def perplexity(model: LanguageModel, tokens: np.ndarray, batch: int = 32) -> float:
    """Perplexity over all whole windows of `LENGTH` tokens."""
    windows = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH))
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in windows.split(batch):
            logits = model(ids)[:, :-1]
            nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            total, count = total + nll.double().sum().item(), count + nll.numel()
    return math.exp(total / count)


def training_logits(model: LanguageModel, ids: Tensor, dropout: float) -> Tensor:
    """The forward pass with dropout on the embeddings and on every layer's output: `[b, l, V]`."""
    x = F.dropout(model.embed(ids), dropout)
    for layer in model.layers:
        x = x + F.dropout(layer(x) - x, dropout)
    return model.head(x)


def train(
    model: LanguageModel, tokens: np.ndarray, steps: int, batch: int, peak: float, dropout: float, seed: int
) -> None:
    """AdamW with warm-up and a cosine schedule over random windows; the model's tensors change in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    decayed = [p for p in model.parameters() if p.dim() > 1 and p.shape[-1] != CONFIG.d_state]
    others = [p for p in model.parameters() if not (p.dim() > 1 and p.shape[-1] != CONFIG.d_state)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    began = time.monotonic()
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = rng.integers(0, len(tokens) - LENGTH, size=batch)
        ids = torch.from_numpy(np.stack([tokens[s : s + LENGTH + 1] for s in starts]))
        logits = training_logits(model, ids[:, :-1], dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            print(f"step {step}/{steps}  loss {loss.item():.3f}  rate {rate:.2e}  {spent:.0f} s", flush=True)


def third_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical names → the names of the third `mamba` layout."""
    names = {
        "embedding.weight": "embeddings.token_embeddings.weight",
        "position_embedding.weight": "embeddings.position_embeddings.weight",
        "norm.weight": "norm_f.weight",
        "norm.bias": "norm_f.bias",
    }
    return {names.get(name, name): tensor.detach().contiguous() for name, tensor in tensors.items()}


def main() -> None:
    """Tokenizer, training, perplexities, files."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=3000)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--rate", type=float, default=4e-3)
    arguments.add_argument("--dropout", type=float, default=0.1)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = arguments.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer(stdlib_documents("train"))
    tokenizer.save(str(given.out / "tokenizer.json"))
    tokens: dict[Part, np.ndarray] = {part: tokens_of(part, tokenizer) for part in ("train", "search", "certify")}
    print({part: len(found) for part, found in tokens.items()}, flush=True)

    tensors = initial_tensors(CONFIG, given.seed)
    model = build(CONFIG, tensors, scans={"mamba1": compiled_scan})
    began = time.monotonic()
    train(model, tokens["train"], given.steps, given.batch, given.rate, given.dropout, given.seed)
    seconds = time.monotonic() - began

    trained = build(CONFIG, tensors)  # the same tensors, with the scan that everyone uses
    result = {
        "perplexity": {part: perplexity(trained, tokens[part]) for part in ("search", "certify")},
        "tokens": {part: len(found) for part, found in tokens.items()},
        "files": {part: len(stdlib_documents(part)) for part in ("train", "search", "certify")},
        "trained_tokens": given.steps * given.batch * LENGTH,
        "steps": given.steps, "batch": given.batch, "rate": given.rate, "dropout": given.dropout, "seed": given.seed,
        "seconds": round(seconds), "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
    save_file(third_layout(tensors), given.out / "model.safetensors")
    result["checkpoint_sha256"] = hashlib.sha256((given.out / "model.safetensors").read_bytes()).hexdigest()
    (given.out / "training.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
