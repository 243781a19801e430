"""Read and write one `.safetensors` file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files.mapped import let_go
from ssm_mp.files.refused import foreign_metadata

_TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.float64: "F64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
"""The format's words for torch's types."""


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the first bytes of a file are those of the format: the header's length, then JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by its name in the file. Raises CheckpointError for another file, a damaged one or an artifact."""
    try:
        with safe_open(path, framework="pt") as file:
            foreign = foreign_metadata(file.metadata() or {})
            if foreign is not None:
                raise CheckpointError(f"{path}: {foreign}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        # besides its own error, the reader raises whatever a type unknown to this torch leads to
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable safetensors file, truncated or renamed? ({reason})") from None


def write_safetensors(path: Path, arrays: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """What safetensors' own `save_file` writes, one tensor after another: of those that are mapped from files, no more
    than one is in memory at a time. Raises OSError where the file cannot be written whole.

    Format: the header's length in 8 bytes, the header as JSON filled up to 8 bytes, then the values, those of the
    widest types first so that all are aligned.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, str(arrays[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = arrays[name]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            values = arrays[name].detach().cpu().contiguous()
            if values.numel():
                values.reshape(-1).view(torch.uint8).numpy().tofile(file)
            let_go([values])
