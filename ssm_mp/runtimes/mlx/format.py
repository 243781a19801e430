"""MLX: a folder that `mlx_lm` opens, on Apple's machines and on any CPU.

Dimensions: `n` rows and `k` columns of a matrix.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.modules.parameter import Parameter
from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.codes import Codes, integers_of
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.format import Arrays, Encoding, Format
from ssm_mp.runtimes.huggingface import CONFIG, WEIGHTS, divided, held, in_one_tensor, mixed, whole_name, write_beside
from ssm_mp.runtimes.huggingface_config import huggingface_config
from ssm_mp.runtimes.mlx.arrangement import Entry, entries, factors, is_matrix, is_multiplied
from ssm_mp.runtimes.mlx.families import unfit
from ssm_mp.runtimes.mlx.packing import arrays, group_of, grouped, multiplied, packed_bytes

_FLOATS = {"fp16": 2, "fp32": 4}
_SCALED = "scales times the config's multipliers"


class Mlx(Format):
    """The folder that `mlx_lm` reads: `model.safetensors` and a `config.json` that says how each module is packed.

    Scales are float32: with float16 ones, MLX computes in float16. Float16 matrices stay: it multiplies them with
    float32 inputs exactly. Norms, convolutions and single values are float32.
    """

    word = "mlx"
    runtime = "MLX"
    extra = "mlx"
    packages = ("mlx-lm", "mlx")
    reader = ("mlx",)
    modules = ("mlx_lm",)
    inputs = "none"
    suffix = ""
    largest_divergence = 1e-3

    def refusal(self, config: Config) -> str | None:
        return self._never(config) or divided(config)

    def refusal_of(self, item: Exportable) -> str | None:
        return self._never(item.config) or mixed(item)

    def _never(self, config: Config) -> str | None:
        if config.embedding_blocks:
            return "the embedding is in blocks (embedding_blocks); MLX has one precision for the table, leave them out"
        return unfit(config)

    def joined(self, config: Config) -> Iterable[tuple[str, ...]]:
        return in_one_tensor(config)

    def encoding(self, component: Component, precision: str, config: Config) -> Encoding | None:
        size, words, note = 0, set(), ""
        scaled = factors(config)
        for parameter in component.parameters:
            count = prod(parameter.shape)
            is_scaled = _is_scaled(parameter, scaled)
            if not is_multiplied(parameter):
                words.add("F32")
                size += 4 * count
            elif precision in _FLOATS or parameter.role == "bias":
                width = 4 if is_scaled else _FLOATS.get(precision, 2)
                words.add(f"F{8 * width}")
                size += width * count
                note = note or ("times the config's multipliers" if is_scaled else "")
            else:
                integers = integers_of(precision)
                group = None if integers is None else group_of(parameter.shape[-1], integers)
                if integers is None or group is None or not _may_be_packed(component, config):
                    return None
                words = {f"{integers.bits} bits, groups of {group}"}
                size += packed_bytes(count, integers.bits, group)
                note = _SCALED if is_scaled else ""
        word = next((word for word in words if "bits" in word), max(words))
        return Encoding(word, size, note)

    def write(self, item: Exportable, path: Path) -> None:
        path.mkdir()
        stored, scaled = item.stored(), factors(item.config)
        tensors: dict[str, Tensor] = {}
        modules: dict[str, dict[str, Any]] = {}
        for entry in entries(item.config):
            found = _placed(entry, stored, scaled, item.config)
            if isinstance(found, Codes):
                tensors |= {f"{entry.module}.{leaf}": array for leaf, array in arrays(found).items()}
                modules[entry.module] = {"group_size": found.group, "bits": found.bits, "mode": "affine"}
            else:
                tensors[entry.name] = found.contiguous()
        save_file(tensors, path / WEIGHTS, {"format": "mlx"})
        write_beside(path, mlx_config(item.config, item.source, modules), item)

    def expected(self, item: Exportable) -> Arrays:
        stored, scaled = item.stored(), factors(item.config)

        def of(entry: Entry) -> np.ndarray:
            if entry.whole.name in scaled:
                placed = _placed(entry, stored, scaled, item.config)
                return (placed.tensor() if isinstance(placed, Codes) else placed.float()).numpy()
            values = [stored[parameter.name][1].tensor().cpu() for parameter in entry.whole.parameters]
            return entry.value(torch.cat(values)).float().numpy()

        return {entry.name: partial(of, entry) for entry in entries(item.config)}

    def read(self, path: Path) -> Arrays:
        import mlx.core as mx

        tensors: Any = mx.load(str(path / WEIGHTS))
        modules = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("quantization", {})

        def of(name: str) -> np.ndarray:
            module = name.removesuffix(".weight")
            if f"{module}.scales" not in tensors or name == module:
                return np.array(tensors[name].astype(mx.float32))
            weight, scales, biases = (tensors[f"{module}.{leaf}"] for leaf in ("weight", "scales", "biases"))
            how = modules[module]
            return np.array(mx.dequantize(weight, scales, biases, how["group_size"], how["bits"]))

        names = [name for name in tensors if not name.endswith((".scales", ".biases"))]
        return {name: partial(of, name) for name in names}

    def tensor_bytes(self, path: Path) -> int:
        import mlx.core as mx

        tensors: Any = mx.load(str(path / WEIGHTS))
        return sum(int(tensor.nbytes) for tensor in tensors.values())

    def ask(self, path: Path, ids: Path, out: Path) -> list[str]:
        return [sys.executable, "-P", str(Path(__file__).with_name("run.py")), str(path), str(ids), str(out)]

    def environment(self) -> Mapping[str, str]:
        # on a CPU MLX compiles fused operations with the machine's compiler, which may be missing and takes longer
        return {"MLX_DISABLE_COMPILE": "1"}

    def command(self, path: Path, item: Exportable) -> str:
        if item.tokenizer is None:
            return self.command_on_ids(path)
        return f"mlx_lm.generate --model {quote(str(path))} --prompt 'Once upon a time' --max-tokens 100"


def mlx_config(config: Config, source: Mapping[str, Any], modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The folder's `config.json`; modules: how each that is packed is."""
    values = huggingface_config(config, source)
    if config.family in ("qwen3_5_text", "qwen3_5_moe_text"):  # mlx-lm has the language model within one of both
        kind = config.family.removesuffix("_text")
        outer: dict[str, Any] = {
            key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in values
        }
        values = {
            **outer, "architectures": [f"{'Qwen3_5Moe' if 'moe' in kind else 'Qwen3_5'}ForConditionalGeneration"],
            "model_type": kind, "tie_word_embeddings": config.tied, "text_config": values,
        }  # fmt: skip
    if modules:
        most = Counter((how["group_size"], how["bits"]) for how in modules.values()).most_common(1)[0][0]
        packing = {"group_size": most[0], "bits": most[1], "mode": "affine", **modules}
        values |= {"quantization": packing, "quantization_config": packing}
    return values


def _may_be_packed(component: Component, config: Config) -> bool:
    """Whether mlx-lm has a module there: Nemotron-H's router is a bare matrix."""
    return not (config.family == "nemotron_h" and component.kind == "router")


def _is_scaled(parameter: Parameter, scaled: Mapping[str, Tensor]) -> bool:
    return whole_name(parameter.name) in scaled


def _placed(
    entry: Entry, stored: Mapping[str, tuple[Parameter, Stored]], scaled: Mapping[str, Tensor], config: Config
) -> Codes | Tensor:
    """A tensor of the folder, as it is there but for how codes are packed."""
    found, factor = held(entry.whole, stored), scaled.get(entry.whole.name)
    first = entry.whole.first
    if isinstance(found, Codes) and is_matrix(first):
        codes = grouped(found)
        return (codes if factor is None else multiplied(codes, factor)).rows(entry.rows)
    value = found.tensor() if isinstance(found, Codes) else found
    if factor is not None:
        value = (value.double() * factor.reshape(-1, *[1] * (value.dim() - 1))).float()
    return entry.value(value if is_multiplied(first) else value.float())


MLX = Mlx()
