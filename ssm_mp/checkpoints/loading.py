"""Read a checkpoint: a file or folder → `Checkpoint(config, tensors)`, with every tensor accounted for."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssm_mp.config import Config, IteraConfig, MambaConfig, config_to_json
from ssm_mp.errors import CheckpointError
from ssm_mp.layouts import Recognised, infer_config, recognise

_WRAPPING_KEYS = ("model_state_dict", "state_dict", "model")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PACKED_MARKS = ("qweight", "qzeros", "weight_packed", "quant_state", "absmax")
_STORED_NAMES = {
    "vocabulary": ("vocab_size", "vocabulary"),
    "d_model": ("hidden_size", "d_model"),
    "d_inner": ("intermediate_size", "d_inner"),
    "d_state": ("state_size", "d_state"),
    "dt_rank": ("time_step_rank", "dt_rank"),
    "d_conv": ("conv_kernel", "d_conv"),
    "n_layers": ("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "max_length": ("max_position_embeddings", "max_seq_len", "max_length"),
}
"""Sizes that a stored config may name → the names in use; compared with the shapes, which win."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's float32 tensors under canonical names.

    `digest` is the SHA-256 of config, names, shapes and values; `notes` are remarks for the user, e.g. where a
    stored config disagrees with the shapes.
    """

    path: Path
    layout: str
    config: Config
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(json.dumps(config_to_json(self.config), sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a `.safetensors`, `.pt` or `.pth` file or a Hugging Face folder.

    Raises CheckpointError for a file that cannot be read safely or whose tensors do not make a model of a
    known family: one error that lists every missing, unknown, empty or misshapen tensor.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: the file or folder does not exist")
    raw, stored_config = _read_folder(path) if path.is_dir() else _read_file(path)
    try:
        found = recognise(raw)
        _refuse_packed(raw)
        tensors = {canonical: raw[name] for canonical, name in found.names.items()}
        tensors = _drop_tied_head(tensors, stored_config)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        config, notes = _with_stored(infer_config(found.family, shapes), stored_config)
        _account(found, tensors, config)
        wanted = {parameter.name for parameter in config.parameters()}
        kept = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items() if name in wanted}
        _refuse_non_finite(kept)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(path, found.layout, config, kept, notes)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by the names in the file, and the stored config where there is one."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path), _sibling_config(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_torch(path)
    raise CheckpointError(f"{path}: expected a .safetensors, .pt or .pth file or a folder, found {path.suffix!r}")


def _sibling_config(path: Path) -> dict[str, Any]:
    config = path.with_name("config.json")
    return _read_json(config) if config.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file, truncated or renamed? ({error})") from None


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A torch file, without executing anything in it."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[:2] != b"PK" and head[:1] != b"\x80":  # neither a zip archive nor a pickle
        advice = "; it looks like a .safetensors file, rename it" if head[8:9] == b"{" else ", truncated or renamed?"
        raise CheckpointError(f"{path}: not a torch file{advice}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # remarks about pickle protocols, for torch's developers
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        needs = re.search(r"(?:GLOBAL|Unsupported (?:global|class))[^\n]*?(?= by default| was not|, |\n|$)", str(error))
        if isinstance(error, pickle.UnpicklingError) and needs:
            raise CheckpointError(
                f"{path}: refused, it needs more than tensors and plain values to unpickle, which could run any code "
                f"({needs[0]}). Save its state_dict() alone, best as .safetensors"
            ) from None
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable torch file, truncated or renamed? ({reason})") from None
    return _unwrap(path, content)


def _unwrap(path: Path, content: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Find the state dict at the top or under one of the usual keys; the config may stand beside it."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    config = content.get("config", {})
    held = next((content[key] for key in _WRAPPING_KEYS if isinstance(content.get(key), dict)), content)
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    nested = [str(name) for name, value in held.items() if not isinstance(value, Tensor) and _holds_tensors(value)]
    if tensors and nested:
        raise CheckpointError(f"{path}: tensors inside {', '.join(nested)}, where none is expected; remove that entry")
    if not tensors:
        raise CheckpointError(f"{path}: no tensors at the top or under {', '.join(_WRAPPING_KEYS)}")
    return tensors, config if isinstance(config, dict) else {}


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A Hugging Face folder: one weights file, or shards with an index."""
    config = _read_json(path / "config.json") if (path / "config.json").exists() else {}
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError(f"{index}: expected a weight_map of tensor → file name in this folder")
        shards = sorted({str(name) for name in names})
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            if not (path / shard).exists():
                raise CheckpointError(f"{path}: the index names {shard}, which is not there")
            tensors |= _read_safetensors(path / shard)
        return tensors, config
    for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
        if (path / name).exists():
            tensors, stored = _read_file(path / name)
            return tensors, config or stored
    raise CheckpointError(f"{path}: no model.safetensors, pytorch_model.bin or model.pt in this folder")


def _refuse_packed(tensors: Mapping[str, Tensor]) -> None:
    sparse = [name for name, tensor in tensors.items() if tensor.layout != torch.strided]
    if sparse:
        raise CheckpointError("sparse tensors cannot be searched, give dense ones: " + ", ".join(sparse))
    packed = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors.items()
        if any(mark in name for mark in _PACKED_MARKS)
        or (tensor.dtype not in _FLOATS and not name.endswith("expert_counts"))
    ]
    if packed:
        raise CheckpointError(
            "already quantised or packed tensors cannot be searched, give the float checkpoint: " + ", ".join(packed)
        )


def _drop_tied_head(tensors: dict[str, Tensor], stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without `lm_head.weight` where it equals the embedding: the head is then tied, and counted once.

    A stored config that declares an untied head keeps it.
    """
    if stored.get("tie_word_embeddings") is False:
        return tensors
    head, embedding = tensors.get("lm_head.weight"), tensors.get("embedding.weight")
    if head is None or embedding is None or not torch.equal(head, embedding):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def _with_stored(config: Config, stored: Mapping[str, Any]) -> tuple[Config, tuple[str, ...]]:
    """The config with what shapes cannot show taken from the stored one, and notes where the two disagree."""
    notes = []
    for field, aliases in _STORED_NAMES.items():
        inferred = getattr(config, field, None)
        for alias in aliases:
            value = stored.get(alias)
            if isinstance(value, int) and inferred is not None and value != inferred:
                notes.append(f"the stored config says {alias} = {value}, the shapes say {inferred}; the shapes win")
    if isinstance(config, MambaConfig):
        config = _with_declared(config, stored)
    eps = stored.get("layer_norm_epsilon", stored.get("norm_eps"))
    if isinstance(eps, float):
        config = replace(config, norm_eps=eps)
    if isinstance(config, IteraConfig):
        top_k = stored.get("top_k", stored.get("num_experts_per_tok"))
        if isinstance(top_k, int) and not isinstance(top_k, bool) and top_k > 0:
            config = replace(config, top_k=top_k)
            fewest = min((layer.experts for layer in config.layers if layer.experts), default=top_k)
            if top_k > fewest:
                notes.append(
                    f"the stored config says top_k = {top_k}, but a layer has {fewest} experts; it uses them all"
                )
    return config, tuple(notes)


def _with_declared(config: MambaConfig, stored: Mapping[str, Any]) -> MambaConfig:
    """The config with the head and biases that a Hugging Face config declares, so that their absence is reported.

    Raises CheckpointError for another model type or activation.
    """
    kind, activation = stored.get("model_type", "mamba"), stored.get("hidden_act", "silu")
    if kind != "mamba":
        raise CheckpointError(
            f"the stored config says model_type = {kind!r}; only 'mamba' (Mamba-1) has this forward pass"
        )
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"the stored config says hidden_act = {activation!r}; only 'silu' is supported")
    hugging_face = "model_type" in stored
    return replace(
        config,
        tied=config.tied and stored.get("tie_word_embeddings") is not False,
        conv_bias=config.conv_bias or stored.get("use_conv_bias", hugging_face) is True,
        projection_bias=config.projection_bias or stored.get("use_bias") is True,
    )


def _account(found: Recognised, tensors: Mapping[str, Tensor], config: Config) -> None:
    """Raise one error that lists every missing, unknown, empty or misshapen tensor."""
    expected = {parameter.name: parameter.shape for parameter in config.parameters()}
    optional = config.statistics() if isinstance(config, IteraConfig) else {}
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += sorted(_misfits(found, tensors, {**expected, **optional}))
    if problems:
        raise CheckpointError(
            f"{len(problems)} tensor{'s do' if len(problems) > 1 else ' does'} not fit a model of family "
            f"{found.family!r} (layout {found.layout!r}):\n  " + "\n  ".join(problems)
        )


def _misfits(found: Recognised, tensors: Mapping[str, Tensor], known: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    for name, tensor in tensors.items():
        shape, original = tuple(tensor.shape), found.names[name]
        if tensor.numel() == 0:
            yield f"empty: {original} {list(shape)}"
        elif name not in known:
            yield f"unknown: {original} {list(shape)}"
        elif shape != known[name]:
            yield f"misshapen: {original} {list(shape)}, expected {list(known[name])}"


def _refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [
        f"{name} ({int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values)"
        for name, tensor in tensors.items()
        if not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise CheckpointError("NaN or infinite values in: " + ", ".join(bad))
