from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.errors import CheckpointError
from tests.ssm_mp.files.written import hugging_face

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2147483648\n"
FILES = {
    "GGUF": ("m.gguf", b"GGUF\x03\0\0\0", "a GGUF file"),
    "GGUF under another name": ("pytorch_model.bin", b"GGUF\x03\0\0\0", "a GGUF file"),
    "GGML": ("ggml-model.bin", b"lmgg\x01\0\0\0", "a GGML file"),
    "Git LFS, safetensors": ("model.safetensors", LFS, "a Git LFS pointer"),
    "Git LFS, torch": ("pytorch_model.bin", LFS, "a Git LFS pointer"),
    "ONNX": ("model.onnx", b"\x08\x07\x12\x07pytorch", "an ONNX model"),
    "Keras": ("m.h5", b"\x89HDF\r\n\x1a\n\0", "an HDF5 file"),
    "Flax": ("flax_model.msgpack", b"\x81\xa6params", "a Flax file"),
    "TensorFlow Lite": ("m.bin", b"\x1c\0\0\0TFL3", "a TensorFlow Lite model"),
    "web page": ("model.safetensors", b"<!DOCTYPE html>\n<html>", "a web page"),
    "web answer": ("model.safetensors", b"Entry not found", "the answer of a web server"),
    "gzip": ("m.pt", gzip.compress(b"x"), "a gzip archive"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_a_file_of_another_tool_is_named_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, *([tmp_path] if name.endswith((".safetensors", ".bin", ".pt")) else [])):
        with pytest.raises(CheckpointError, match=f"this is .*{message}.*; needed is ") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives_that_torch_save_did_not_write_are_named(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        archive.add(__file__, "m.py")
    for name, what in (("script.pt", "a TorchScript"), ("arrays.npz", "a NumPy archive"), ("m.tar", "a tar archive")):
        with pytest.raises(CheckpointError, match=f"this is {what}"):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "a PEFT adapter, not a whole model"),
        (("adapter_model.safetensors",), "a PEFT adapter, not a whole model"),
        ((".metadata", "__0_0.distcp"), "a distributed checkpoint"),
        (("zero_to_fp32.py", "latest"), "a DeepSpeed checkpoint"),
        (("saved_model.pb",), "a TensorFlow model"),
        (("flax_model.msgpack",), "a Flax model"),
        (("model.Q4_K_M.gguf",), "GGUF"),
        (("README.md",), "no model.safetensors.*; found README.md"),
        ((), "no model.safetensors.*; found nothing"),
    ],
)
def test_a_folder_without_weights_to_read_is_named(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"load_in_8bit": True}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"compression_config": {"format": "pack-quantized"}},
    ],
)
def test_a_config_that_says_quantised_is_believed(tmp_path: Path, config: dict[str, object]) -> None:
    save_file(hugging_face(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=rf"config\.json: {next(iter(config))} says.*already quantised"):
            load_checkpoint(path)


def test_a_pointer_in_place_of_the_config_is_named(tmp_path: Path) -> None:
    save_file(hugging_face(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"config\.json: this is a Git LFS pointer"):
        load_checkpoint(tmp_path)


def test_a_suffix_of_any_case_is_known_and_another_one_left_to_the_content(tmp_path: Path) -> None:
    torch.save(hugging_face(), tmp_path / "m.PT")
    torch.save(hugging_face(), tmp_path / "m.pth.tar")
    save_file(hugging_face(), tmp_path / "5c1d")
    for name in ("m.PT", "m.pth.tar", "5c1d"):
        assert load_checkpoint(tmp_path / name).layout == "huggingface"
    (tmp_path / "words.txt").write_text("only words")
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file, .*found '\.txt'"):
        load_checkpoint(tmp_path / "words.txt")
