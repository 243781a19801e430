"""Files of other runtimes: bytes, perplexity there and here, and tokens a second there and here.

    python -m benchmarks.runtimes                               # the hybrid reference, random models of 130m and 350m
    python -m benchmarks.runtimes --models hybrid --formats gguf mlx --json

Each model is converted by one map (int8 and int4 in turn wherever the format holds them, else fp16), written, read back
and compared, and run by the runtime in a process of its own, one window after another, every token's distribution asked
for; ours reads the same windows in the same way in this process. `twin` is the largest difference of log-probabilities
of a float32 file of the same writer. Perplexities of the random models mean nothing; that both sides agree does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.families import SIZES
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace, study_checkpoint
from search.results.transferred import asked_windows
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.components import fp32_bytes
from ssm_mp.conversion.convert import Converter
from ssm_mp.errors import ExportError
from ssm_mp.model import build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.format import Format
from ssm_mp.runtimes.registry import FORMATS, get_format
from ssm_mp.runtimes.transfer import transfer
from ssm_mp.runtimes.verify import twin_difference
from ssm_mp.scheme import Scheme

STUDY = "studies/hybrid-runtime.toml"
MODELS = ("hybrid", *SIZES)
_SMALL_WINDOWS = (2, 64)
"""Windows and tokens of the random models."""


@dataclass(frozen=True)
class Row:
    """One model in one format; figures are None where it was refused, `said` then tells why."""

    model: str
    format: str
    said: str
    fp32_bytes: int
    bytes: int | None = None
    file_bytes: int | None = None
    perplexity_there: float | None = None
    perplexity_here: float | None = None
    mean_kl: float | None = None
    largest_kl: float | None = None
    twin: float | None = None
    rate_there: float | None = None
    rate_here: float | None = None


def opened(name: str) -> tuple[Checkpoint, torch.Tensor, bytes | None]:
    """A model of `MODELS`, windows of token ids `[w, l]`, and its tokenizer."""
    if name == "hybrid":
        spec = load_spec(STUDY)
        workspace = open_workspace(spec)
        ids = torch.from_numpy(asked_windows(workspace.splits.certify))
        return study_checkpoint(spec), ids, (spec.checkpoint_path / "tokenizer.json").read_bytes()
    import transformers

    kind, values = SIZES[name]
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**values))
    with TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        checkpoint = load_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    checkpoint = replace(checkpoint, tensors=dict(_calmed(checkpoint, generator)))
    return checkpoint, torch.randint(checkpoint.config.vocabulary, _SMALL_WINDOWS, generator=generator), None


_OUTWARD = ("out_proj", "o_proj", "output_linear", "down_proj")


def _calmed(checkpoint: Checkpoint, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with matrices as Mamba's own training begins with them (Gu & Dao 2023, section 3.6).

    Those of transformers are several times as large, so that logits are far from any model's and rounding grows from
    layer to layer.
    """
    for parameter in checkpoint.config.parameters():
        tensor = checkpoint.tensors[parameter.name]
        if parameter.role == "weight" and len(parameter.shape) == 2 and parameter.kind != "A_log":
            std = 0.02 if parameter.kind == "embedding" else (3 * parameter.shape[1]) ** -0.5
            std /= (2 * checkpoint.config.n_layers) ** 0.5 if parameter.kind in _OUTWARD else 1.0
            tensor = torch.randn(tensor.shape, generator=generator) * std
        yield parameter.name, tensor


def mixed(format_: Format, converter: Converter) -> PrecisionMap:
    """int8 and int4 in turn for the components that the format holds so, in fewer bytes than fp16."""
    rules, turn = {"*": "fp16"}, 0
    config = converter.model.config
    for component in converter.components:
        wide, wanted = format_.encoding(component, "fp16", config), ("int8", "int4")[turn % 2]
        found = format_.encoding(component, wanted, config)
        if component.pin is None and found is not None and wide is not None and found.bytes < wide.bytes:
            rules[component.name] = wanted
            turn += 1
    return PrecisionMap.from_rules(rules, converter.components)


def measured(name: str, word: str, opened_: tuple[Checkpoint, torch.Tensor, bytes | None], twins: bool) -> Row:
    """One model in one format."""
    checkpoint, ids, tokenizer = opened_
    format_ = get_format(word)
    converter = Converter(build(checkpoint.config, checkpoint.tensors), Scheme(activations="none"))
    size = fp32_bytes(converter.components)
    refused = format_.refusal(checkpoint.config)
    if refused is not None:
        return Row(name, word, f"refused: {refused}", size)
    precision_map = mixed(format_, converter)
    item = Exportable(name, converter.convert(precision_map), precision_map, checkpoint.source, tokenizer)
    with TemporaryDirectory() as folder:
        try:
            done = transfer(format_, item, Path(folder, f"model{format_.suffix}"), windows=ids.numpy())
            twin = twin_difference(format_, item, Path(folder), ids.numpy()) if twins and done.verdict else None
        except ExportError as error:
            return Row(name, word, str(error), size)
    found = done.verdict
    if found is None:
        return Row(name, word, done.unverified, size, done.plan.bytes, done.file_bytes)
    return Row(
        name, word, found.runtime, size, done.plan.bytes, done.file_bytes, found.perplexity, found.perplexity_here,
        found.mean_kl, found.largest_kl, twin, found.rate, found.rate_here,
    )  # fmt: skip


def _line(row: Mapping[str, Any]) -> str:
    if row["bytes"] is None or row["perplexity_there"] is None:
        return f"{row['model']:<20} {row['format']:<19} {row['said'][:150]}"
    twin = "-" if row["twin"] is None else f"{row['twin']:.0e}"
    return (
        f"{row['model']:<20} {row['format']:<19} {row['bytes']:>13,} {row['fp32_bytes'] / row['bytes']:>6.2f}× "
        f"{row['perplexity_there']:>12.4f} {row['perplexity_here']:>12.4f} {row['mean_kl']:>8.0e} "
        f"{row['largest_kl']:>8.0e} {twin:>7} {row['rate_there']:>9,.0f} {row['rate_here']:>9,.0f}"
    )


def main() -> None:
    """Measure and print a line for each model and format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--no-twins", action="store_true", help="leave out the float32 files, which are large")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = []
    if not asked.json:
        print(
            f"{'model':<20} {'format':<19} {'bytes':>13} {'':>7} {'ppl there':>12} {'ppl here':>12} {'mean KL':>8} "
            f"{'largest':>8} {'twin':>7} {'tok/s':>9} {'ours':>9}"
        )
    for name in asked.models:
        held = opened(name)
        for word in asked.formats:
            row = asdict(measured(name, word, held, not asked.no_twins))
            rows.append(row)
            if not asked.json:
                print(_line(row), flush=True)
    if asked.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
