"""Evaluation of every family against transformers' own model, the same weights and windows in one run.

    python -m benchmarks.families                       # mamba2-130m and granite-4.0-h-350m, random weights
    python -m benchmarks.families --models tiny          # one tiny model of every family, as the tests have them
    python -m benchmarks.families --json

transformers takes its slow path on a CPU: there are no kernels of its own for it. Both compute the negative
log-likelihood of the same windows in float32, pair after pair; a ratio above 1 says how many times as fast ours is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.model import build

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2-130m": (
        "Mamba2",
        {
            "vocab_size": 50288, "hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64,
            "state_size": 128, "n_groups": 1, "tie_word_embeddings": True,
        },
    ),
    "granite-4.0-h-350m": (
        "GraniteMoeHybrid",
        {
            "vocab_size": 100352, "hidden_size": 768, "num_hidden_layers": 32, "shared_intermediate_size": 2048,
            "num_attention_heads": 12, "num_key_value_heads": 4, "mamba_n_heads": 48, "mamba_d_head": 32,
            "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2, "num_local_experts": 0,
            "num_experts_per_tok": 0, "position_embedding_type": "nope", "tie_word_embeddings": True,
            "layer_types": ["full_attention" if i in (10, 13, 17, 27) else "linear_attention" for i in range(32)],
            "max_position_embeddings": 32768,
        },
    ),
}  # fmt: skip
"""Models of real size: the class in transformers, and its config. Granite's sizes are those of its model card."""


@dataclass(frozen=True)
class Compared:
    """One model: milliseconds that each took, medians of the pairs, and the median of their ratios."""

    model: str
    parameters: int
    windows: int
    length: int
    threads: int
    pairs: int
    theirs_ms: float
    ours_ms: float
    ratio: float
    difference: float
    """Of the two perplexities, relative."""


def theirs_of(model: Any, windows: Windows, batch: int) -> float:
    """Mean negative log-likelihood by transformers, `batch` windows at a time."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in windows.ids.split(batch):
            logits: Tensor = model(ids, use_cache=False).logits[:, :-1]
            nll = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            total, count = total + nll.double().sum().item(), count + nll.numel()
    return total / count


def compare(name: str, make: Callable[[], Any], windows: int, length: int, pairs: int, batch: int = 4) -> Compared:
    """Both sides in turn on the same windows."""
    model = make()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checkpoint = load_checkpoint(Path(folder))
    ours = build(checkpoint.config, checkpoint.tensors)
    ids = torch.randint(0, checkpoint.config.vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
    text = Windows(ids)
    theirs_of(model, Windows(ids[:1]), 1), evaluate(ours, Windows(ids[:1]))  # kernels are compiled, pages are touched
    times: list[tuple[float, float]] = []
    mean, found = 0.0, None
    for _ in range(pairs):
        began = time.perf_counter()
        mean = theirs_of(model, text, batch)
        middle = time.perf_counter()
        found = evaluate(ours, text)
        times.append((middle - began, time.perf_counter() - middle))
    assert found is not None
    return Compared(
        model=name, parameters=sum(t.numel() for t in checkpoint.tensors.values()), windows=windows, length=length,
        threads=torch.get_num_threads(), pairs=pairs,
        theirs_ms=1e3 * statistics.median(theirs for theirs, _ in times),
        ours_ms=1e3 * statistics.median(mine for _, mine in times),
        ratio=statistics.median(theirs / mine for theirs, mine in times),
        difference=abs(found.nll.sum() / found.tokens - mean),
    )  # fmt: skip


def real_sizes(names: list[str], windows: int, length: int, pairs: int) -> list[Compared]:
    """Models of real size with random weights."""
    import transformers

    found = []
    for name in names:
        kind, options = SIZES[name]

        def make(kind: str = kind, options: dict[str, Any] = options) -> Any:
            torch.manual_seed(0)
            return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options)).eval()

        found.append(compare(name, make, windows, length, pairs))
    return found


def tiny_models(pairs: int) -> list[Compared]:
    """The first case of every family in the tests."""
    from tests.families.tiny_models import CASES

    first = {case.family: case for case in reversed(CASES)}
    return [compare(case.name, case.make, windows=32, length=64, pairs=pairs) for case in first.values()]


def main() -> None:
    """Print a table, or JSON."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", default=list(SIZES), choices=[*SIZES, "tiny"])
    arguments.add_argument("--windows", type=int, default=8)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--pairs", type=int, default=3)
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    names = [name for name in given.models if name != "tiny"]
    found = real_sizes(names, given.windows, given.length, given.pairs)
    if "tiny" in given.models:
        found += tiny_models(given.pairs)
    if given.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return
    print(f"{'model':<36} {'windows':>9} {'transformers':>13} {'ours':>10} {'ratio':>7}")
    for one in found:
        shape = f"{one.windows} × {one.length}"
        print(f"{one.model:<36} {shape:>9} {one.theirs_ms:>10,.0f} ms {one.ours_ms:>7,.0f} ms {one.ratio:>6.2f}×")


if __name__ == "__main__":
    main()
