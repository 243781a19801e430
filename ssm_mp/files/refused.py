"""What a file or folder is that holds no float weights to read: one sentence that says so, and what is needed."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

_MAGIC = (
    (b"GGUF", "a GGUF file (llama.cpp)", "the float checkpoint that it was made from"),
    (b"lmgg", "a GGML file (llama.cpp)", "the float checkpoint that it was made from"),
    (b"tjgg", "a GGML file (llama.cpp)", "the float checkpoint that it was made from"),
    (b"fmgg", "a GGML file (llama.cpp)", "the float checkpoint that it was made from"),
    (b"algg", "a GGML adapter (llama.cpp)", "the float checkpoint of the whole model"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow)", "the model's PyTorch checkpoint"),
    (b"\x93NUMPY", "a NumPy array", "a checkpoint as .safetensors or .pt"),
    (b"\x1f\x8b", "a gzip archive", "the checkpoint inside it; unpack it first"),
    (b"BZh", "a bzip2 archive", "the checkpoint inside it; unpack it first"),
    (b"\xfd7zXZ", "an xz archive", "the checkpoint inside it; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", "the checkpoint inside it; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "the checkpoint inside it; unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "the file itself: run git lfs pull there"),
    (b"Entry not found", "the answer of a web server, not the weights", "the file itself; download it again"),
    (b"Invalid username or password", "the answer of a web server, not the weights", "the file; download it again"),
)
"""First bytes of a file → what it is, and what is needed in its place."""

_SUFFIXES = {
    ".onnx": ("an ONNX model", "the PyTorch checkpoint that it was exported from"),
    ".gguf": ("a GGUF file (llama.cpp)", "the float checkpoint that it was made from"),
    ".ggml": ("a GGML file (llama.cpp)", "the float checkpoint that it was made from"),
    ".h5": ("a Keras or TensorFlow file", "the model's PyTorch checkpoint"),
    ".hdf5": ("a Keras or TensorFlow file", "the model's PyTorch checkpoint"),
    ".keras": ("a Keras file", "the model's PyTorch checkpoint"),
    ".msgpack": ("a Flax file", "the model's PyTorch checkpoint"),
    ".pb": ("a TensorFlow or protobuf file", "the model's PyTorch checkpoint"),
    ".tflite": ("a TensorFlow Lite model", "the model's PyTorch checkpoint"),
    ".mlmodel": ("a Core ML model", "the model's PyTorch checkpoint"),
    ".engine": ("a TensorRT engine", "the model's PyTorch checkpoint"),
    ".plan": ("a TensorRT engine", "the model's PyTorch checkpoint"),
    ".pte": ("an ExecuTorch program", "the checkpoint that it was exported from"),
    ".pt2": ("an exported program (torch.export)", "the checkpoint that it was exported from"),
    ".nemo": ("a NeMo archive", "the checkpoint inside it; unpack it first"),
    ".distcp": ("a shard of a distributed checkpoint", "one file, by torch.distributed.checkpoint's dcp_to_torch_save"),
}

_FOLDERS = (
    ("adapter_config.json", "a PEFT adapter, not a whole model",
     "the whole model: merge the adapter into its base model (merge_and_unload()) and save that"),
    ("adapter_model.safetensors", "a PEFT adapter, not a whole model",
     "the whole model: merge the adapter into its base model (merge_and_unload()) and save that"),
    (".metadata", "a distributed checkpoint of torch",
     "one file, by torch.distributed.checkpoint's dcp_to_torch_save"),
    ("zero_to_fp32.py", "a DeepSpeed checkpoint in parts", "one file: run the zero_to_fp32.py in it"),
    ("saved_model.pb", "a TensorFlow model", "the model's PyTorch checkpoint"),
    ("tf_model.h5", "a TensorFlow model", "the model's PyTorch checkpoint"),
    ("flax_model.msgpack", "a Flax model", "the model's PyTorch checkpoint"),
    ("_CHECKPOINT_METADATA", "an Orbax checkpoint (Flax)", "the model's PyTorch checkpoint"),
    ("model.onnx", "an ONNX model", "the PyTorch checkpoint that it was exported from"),
)  # fmt: skip
"""A file that only such a folder has → what the folder is, and what is needed in its place."""


def foreign_file(path: Path, head: bytes) -> str | None:
    """What a file is that cannot hold weights to read, from its first bytes (512) and its suffix."""
    for magic, what, needed in _MAGIC:
        if head.startswith(magic):
            return _sentence(what, needed)
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return _sentence("a web page, not the weights", "the file itself; download it again")
    if head[257:262] == b"ustar":
        return _sentence("a tar archive", "the checkpoint inside it; unpack it first")
    if head[4:8] == b"TFL3":
        return _sentence(*_SUFFIXES[".tflite"])
    if head.startswith(b"PK"):
        inside = _foreign_archive(path)
        if inside is not None:
            return inside
    if path.suffix.lower() in _SUFFIXES:
        return _sentence(*_SUFFIXES[path.suffix.lower()])
    return None


def foreign_folder(path: Path) -> str | None:
    """What a folder is that holds no weights to read, or weights that are not to be read as a checkpoint."""
    for name, what, needed in _FOLDERS:
        if (path / name).exists():
            return _sentence(what, needed)
    if any(path.glob("*.gguf")):
        return _sentence("a folder of GGUF files (llama.cpp)", "the float checkpoint that they were made from")
    return None


def foreign_metadata(metadata: Mapping[str, str]) -> str | None:
    """What a safetensors file is that its metadata tell: the tensors of an artifact."""
    if metadata.get("format", "").startswith("ssm-mp/"):
        return _sentence("an artifact of ssm-mp, already converted", "the checkpoint that it was made from")
    return None


def _foreign_archive(path: Path) -> str | None:
    """What a zip archive is that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, EOFError):
        return None  # damaged: torch's own reader says how
    if any(name.endswith("/constants.pkl") for name in names):
        return _sentence("a TorchScript program", "the state_dict() of the model that it was compiled from")
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return _sentence(*_SUFFIXES[".pt2"])
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return _sentence("a NumPy archive", "a checkpoint as .safetensors or .pt")
    return _sentence("a zip archive that torch.save did not write", "the checkpoint inside it; unpack it first")


def _sentence(what: str, needed: str) -> str:
    return f"this is {what}; needed is {needed}"
