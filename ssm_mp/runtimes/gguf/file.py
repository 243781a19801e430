"""A GGUF file written and read, by the package `gguf` of llama.cpp's own people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.gguf.keys import Value, keys_of
from ssm_mp.runtimes.gguf.layout import layout_of
from ssm_mp.runtimes.gguf.packing import Packed, packed, row_bytes, word_of
from ssm_mp.runtimes.gguf.tensors import BLOCK, Change, Entry, Rows
from ssm_mp.runtimes.gguf.tokenizer import tokenizer_keys


def write(item: Exportable, path: Path) -> None:
    """Write the file, one tensor after another. Raises ExportError for what it cannot hold."""
    import gguf

    layout = layout_of(item.config)
    stored = {name: held for name, (_, held) in item.stored().items()}
    word = layout.architecture.word
    writer = gguf.GGUFWriter(path, word, use_temp_file=False)
    try:
        for key, value in chain(keys_of(layout.architecture, item.config, item.name), tokenizer_keys(item)):
            _add(writer, key, value)
        for entry in layout.entries:
            kind = gguf.GGMLQuantizationType[entry_word(entry, stored)]
            writer.add_tensor_info(entry.name, *_described(entry, kind.name), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in layout.entries:
            writer.write_tensor_data(data_of(entry, stored))
    finally:
        writer.close()


def entry_word(entry: Entry, stored: dict[str, Stored]) -> str:
    """The type that an entry has, by how what it is made of is stored."""
    return (word_of(stored[entry.rows[0].tensor]) or "F32") if entry.matrix else "F32"


def data_of(entry: Entry, stored: dict[str, Stored]) -> np.ndarray:
    """What the file holds of an entry, its bytes or floats."""
    if not entry.matrix:
        return floats_of(entry, stored)
    return np.concatenate([part.bytes() for part in _packed(entry, stored)])


def floats_of(entry: Entry, stored: dict[str, Stored]) -> np.ndarray:
    """What an entry stands for, float32, as the file arranges it."""
    if not entry.rows:
        return np.zeros(entry.shape, dtype=np.float32)
    if entry.matrix and any(rows.factor != 1.0 for rows in entry.rows):
        return np.concatenate([part.floats() for part in _packed(entry, stored)]).reshape(entry.shape)
    parts = [_taken(stored[rows.tensor].tensor().cpu(), rows, entry.change) for rows in entry.rows]
    return torch.cat([part.flatten() for part in parts]).reshape(entry.shape).numpy()


def _packed(entry: Entry, stored: dict[str, Stored]) -> Iterable[Packed]:
    for rows in entry.rows:
        part = packed(stored[rows.tensor])
        if rows.order is not None:
            part = part.taken(np.asarray(rows.order))
        if rows.columns is not None:
            part = part.arranged(np.asarray(rows.columns))
        yield part.multiplied(rows.factor)


def _taken(tensor: torch.Tensor, rows: Rows, change: Change) -> torch.Tensor:
    if rows.order is not None:
        tensor = tensor[torch.tensor(rows.order)]
    if rows.columns is not None:
        tensor = tensor.unflatten(1, (-1, BLOCK))[:, torch.tensor(rows.columns)].flatten(1)
    if rows.factor != 1.0:
        tensor = tensor * rows.factor
    match change:
        case "decay":
            return -torch.exp(tensor)
        case "one_more":
            return tensor + 1
        case "none":
            return tensor.clone()


def _described(entry: Entry, word: str) -> tuple[tuple[int, ...], np.dtype[np.generic], int]:
    """Shape, type and bytes, as the writer wants them: of packed matrices, bytes in place of values."""
    row = row_bytes(word, entry.shape[-1])
    assert row is not None
    size = int(np.prod(entry.shape[:-1], dtype=np.int64)) * row
    if word in ("F32", "F16"):
        return entry.shape, np.dtype(np.float32 if word == "F32" else np.float16), size
    return (*entry.shape[:-1], row), np.dtype(np.uint8), size


def _add(writer: Any, key: str, value: Value) -> None:
    add: Callable[..., None]
    match value:
        case bool():
            add = writer.add_bool
        case int():
            add = writer.add_uint32
        case float():
            add = writer.add_float32
        case str():
            if key == "general.architecture":  # the writer has written it
                return
            add = writer.add_string
        case _:
            add = writer.add_array
    add(key, value)


def read(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """The tensors by name, dequantised by the reader when asked for."""
    import gguf

    def later(tensor: Any) -> Callable[[], np.ndarray]:
        return lambda: np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    return {tensor.name: later(tensor) for tensor in gguf.GGUFReader(path).tensors}


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors, without what lies between them."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
