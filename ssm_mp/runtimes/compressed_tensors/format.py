"""compressed-tensors: a folder of transformers whose linear layers hold packed integers; vLLM opens it too.

Dimensions: `n` rows and `k` columns of a matrix.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.modules.linear import LinearForm
from ssm_mp.runtimes.codes import Codes, integers_of, packed_rows
from ssm_mp.runtimes.compressed_tensors.families import unfit
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.format import Arrays, Encoding, Format
from ssm_mp.runtimes.huggingface import (
    CONFIG,
    WEIGHTS,
    Whole,
    divided,
    held,
    in_family,
    in_one_tensor,
    is_first,
    mixed,
    stacked,
    wholes,
    write_beside,
)
from ssm_mp.runtimes.huggingface_config import huggingface_config

_FLOATS = {"fp16": 2, "fp32": 4}
_SHAPE_BYTES = 16
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers that vLLM makes one of, which must then be packed alike."""
_PLAIN_KINDS = ("router", "token_gate")


class CompressedTensors(Format):
    """The folder that `compressed-tensors` packs: for each linear layer `weight_packed`, `weight_scale` (float16) and
    `weight_shape`; everything else is plain."""

    word = "compressed-tensors"
    runtime = "transformers"
    extra = "compressed-tensors"
    packages = ("compressed-tensors", "transformers")
    reader = ("compressed_tensors",)
    modules = ("compressed_tensors", "transformers")
    inputs = "none"
    suffix = ""
    largest_divergence = 1e-6

    def refusal(self, config: Config) -> str | None:
        return _never(config) or divided(config, experts=False)  # of experts all are float16

    def refusal_of(self, item: Exportable) -> str | None:
        return _never(item.config) or mixed(item)

    def joined(self, config: Config) -> Iterable[tuple[str, ...]]:
        return in_one_tensor(config)

    def encoding(self, component: Component, precision: str, config: Config) -> Encoding | None:
        size, word = 0, ""
        for parameter in component.parameters:
            count = prod(parameter.shape)
            plain = parameter.role == "bias" or precision in _FLOATS
            if plain:
                width = _FLOATS.get(precision, 2)
                size, word = size + width * count, word or f"F{8 * width}"
            elif parameter.role != "weight" or len(parameter.shape) != 2:
                size, word = size + 4 * count, word or "F32"
            else:
                integers, (n, k) = integers_of(precision), parameter.shape
                group = None if integers is None else integers.group_of(k)
                if integers is None or group is None or not _is_linear(component):
                    return None
                bits = _file_bits(integers.bits)
                size += n * (-(-k * bits // 32) * 4 + k // group * 2) + (_SHAPE_BYTES if is_first(parameter) else 0)
                word = f"W{bits}, {'a scale a row' if group == k else f'groups of {group}'}"
        return Encoding(word, size)

    def write(self, item: Exportable, path: Path) -> None:
        path.mkdir()
        stored = item.stored()
        tensors: dict[str, Tensor] = {}
        packed: dict[tuple[int, int | None], list[str]] = {}
        plain: list[str] = []
        for whole in wholes(item.config):
            found, name = held(whole, stored), _name(item.config, whole)
            module = name.removesuffix(".weight")
            if isinstance(found, Codes):
                tensors |= {f"{module}.weight_{leaf}": array for leaf, array in _arrays(found).items()}
                how = (_file_bits(found.bits), None if found.scale.shape[-1] == 1 else found.group)
                packed.setdefault(how, []).append(module)
            else:
                tensors[name] = stacked(whole, found).contiguous()
                if whole.first.leaf == "weight" and len(whole.first.shape) == 2:
                    plain.append(module)
        save_file(tensors, path / WEIGHTS, {"format": "pt"})
        config = huggingface_config(item.config, item.source)
        if packed:
            config["quantization_config"] = _quantization(packed, plain)
        write_beside(path, config, item)

    def expected(self, item: Exportable) -> Arrays:
        stored = item.stored()

        def of(whole: Whole) -> np.ndarray:
            values = torch.cat([stored[parameter.name][1].tensor().cpu() for parameter in whole.parameters])
            return stacked(whole, values).numpy()

        return {_name(item.config, whole): partial(of, whole) for whole in wholes(item.config)}

    def read(self, path: Path) -> Arrays:
        quantization = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("quantization_config", {})
        groups = [
            (re.compile("|".join(target.removeprefix("re:") for target in group["targets"])), group["weights"])
            for group in quantization.get("config_groups", {}).values()
        ]

        def of(name: str) -> np.ndarray:
            with safe_open(path / WEIGHTS, "pt") as file:
                if not name.endswith(".weight_packed"):
                    plain: np.ndarray = file.get_tensor(name).float().numpy()
                    return plain
                module = name.removesuffix(".weight_packed")
                layer = {leaf: file.get_tensor(f"{module}.weight_{leaf}") for leaf in ("packed", "scale", "shape")}
            how = next(weights for pattern, weights in groups if pattern.match(_in_memory(module)))
            return _dequantised(layer, how)

        with safe_open(path / WEIGHTS, "pt") as file:
            names = [name for name in file.keys() if not name.endswith((".weight_scale", ".weight_shape"))]  # noqa: SIM118
        return {name.replace(".weight_packed", ".weight"): partial(of, name) for name in names}

    def tensor_bytes(self, path: Path) -> int:
        with safe_open(path / WEIGHTS, "pt") as file:
            return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118

    def ask(self, path: Path, ids: Path, out: Path) -> list[str]:
        return [sys.executable, "-P", str(Path(__file__).with_name("run.py")), str(path), str(ids), str(out)]

    def command(self, path: Path, item: Exportable) -> str:
        if _joins_alike(item):
            return f"vllm serve {quote(str(path))}{' --skip-tokenizer-init' if item.tokenizer is None else ''}"
        load = f"from transformers import AutoModelForCausalLM as M; print(M.from_pretrained({str(path)!r}))"
        return f"python -c {quote(load)}  # vLLM needs one precision for q, k and v, and one for gate and up"


def _never(config: Config) -> str | None:
    """Why no map of models of this configuration can be written."""
    if config.embedding_blocks:
        return "the embedding is in blocks (embedding_blocks); it is one float16 table there, leave them out"
    return unfit(config)


def _joins_alike(item: Exportable) -> bool:
    """Whether the layers that vLLM makes one of are packed alike."""
    precisions = {whole.name: item.precision(whole.first.component) for whole in wholes(item.config)}
    for name in precisions:
        for leaves in _FUSED:
            at, leaf = name.removesuffix(f".{leaves[0]}.weight"), leaves[0]
            beside = {precisions.get(f"{at}.{other}.weight") for other in leaves}
            if name.endswith(f".{leaf}.weight") and len({_packing(str(one)) for one in beside}) > 1:
                return False
    return True


def _packing(precision: str) -> tuple[int, int | None]:
    """The bits of a value, 0 of a float, and how many share a scale."""
    integers = integers_of(precision)
    return (0, None) if integers is None else (_file_bits(integers.bits), integers.group)


def _name(config: Config, whole: Whole) -> str:
    """The name on disk."""
    return in_family(config, whole.name).replace(".block_sparse_moe.experts.", ".block_sparse_moe.")


def _in_memory(module: str) -> str:
    """What transformers calls a module once it is loaded, which is what a config names."""
    return re.sub(r"^backbone\.", "model.", module)


def _is_linear(component: Component) -> bool:
    return isinstance(component.form, LinearForm) and component.kind not in _PLAIN_KINDS and not _is_expert(component)


def _is_expert(component: Component) -> bool:
    return re.search(r"\.experts\.[0-9]+\.", component.name) is not None


def _file_bits(bits: int) -> int:
    """What codes of so many bits are packed in: in bits that the kernels of servers know."""
    return 8 if bits > 4 else 4


def _arrays(codes: Codes) -> dict[str, Tensor]:
    """What a layer holds: codes with half their range added, the first in the lowest bits of 32-bit words."""
    bits, values = _file_bits(codes.bits), codes.values()
    raised = F.pad(values.int() + (1 << bits - 1), (0, -values.shape[-1] % (32 // bits)))
    shape = torch.tensor(values.shape, dtype=torch.int64)
    return {"packed": packed_rows(raised, bits).view(torch.int32), "scale": codes.scale.contiguous(), "shape": shape}


def _dequantised(layer: Mapping[str, Tensor], how: Mapping[str, Any]) -> np.ndarray:
    """What compressed-tensors makes of a layer, float32 `[n, k]`."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    values = unpack_from_int32(layer["packed"], how["num_bits"], torch.Size(layer["shape"].tolist()))
    found: np.ndarray = dequantize(
        values, layer["scale"].float(), args=QuantizationArgs(**how), dtype=torch.float32
    ).numpy()
    return found


def _quantization(packed: Mapping[tuple[int, int | None], list[str]], plain: list[str]) -> dict[str, Any]:
    """What a config says of the packing: bits and groups of each linear layer, and which are plain."""
    groups = {}
    for i, ((bits, group), modules) in enumerate(packed.items()):
        strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
        targets = [_target(module) for module in modules]
        groups[f"group_{i}"] = {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": [_in_memory(module) for module in plain], "kv_cache_scheme": None,
    }  # fmt: skip


def _target(module: str) -> str:
    return f"re:^{re.escape(_in_memory(module))}$"


COMPRESSED_TENSORS = CompressedTensors()
