from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.checkpoints.wrappers import find_weights
from ssm_mp.errors import CheckpointError
from ssm_mp.files.record import Record
from tests.ssm_mp.files.written import hugging_face, prefixed, write

HF = hugging_face()
AT = "backbone.layers.0.mixer.in_proj"


def _packed(*, drop: bool, **more: Tensor) -> dict[str, Tensor]:
    """Every projection packed, as a tool does it, under further names; `weight` itself dropped or replaced."""
    tensors = dict(HF)
    for name in [name for name in HF if name.endswith("_proj.weight")]:
        if drop:
            del tensors[name]
        tensors |= {f"{name.removesuffix('weight')}{leaf.replace('__', '.')}": value for leaf, value in more.items()}
    return tensors


WORDS, BYTES = torch.zeros(8, 4, dtype=torch.int32), torch.zeros(8, 4, dtype=torch.uint8)
PACKED = {
    "GPTQ": (_packed(drop=True, qweight=WORDS, qzeros=WORDS, scales=torch.ones(2)), "GPTQ or AWQ"),
    "compressed-tensors": (_packed(drop=True, weight_packed=WORDS, weight_scale=torch.ones(2)), "compressed-tensors"),
    "bitsandbytes 4 bit": (_packed(drop=False, weight=BYTES, weight__absmax=torch.ones(2)), "bitsandbytes"),
    "bitsandbytes 8 bit": (_packed(drop=False, weight=BYTES.char(), SCB=torch.ones(8)), "bitsandbytes"),
    "MLX": (_packed(drop=False, weight=WORDS.to(torch.uint32), scales=torch.ones(2), biases=torch.ones(2)), "MLX"),
    "float8 with scales": (_packed(drop=False, weight_scale_inv=torch.ones(1)), "a tool that stores scales"),
    "HQQ": (_packed(drop=True, W_q=BYTES), "HQQ"),
}


@pytest.mark.parametrize(("tensors", "packer"), PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_packed_weights_are_one_sentence_that_says_who_packed_them(
    tmp_path: Path, tensors: dict[str, Tensor], packer: str, suffix: str
) -> None:
    with pytest.raises(CheckpointError, match=f"packed by {packer}.*; give the float checkpoint") as caught:
        load_checkpoint(write(tmp_path / f"m{suffix}", {name: tensor.clone() for name, tensor in tensors.items()}))
    assert len(str(caught.value)) - len(str(tmp_path)) < 300


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_dynamically_quantised_model_of_torch_is_named(tmp_path: Path) -> None:
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if not engines:
        pytest.skip("this torch has no engine for quantised layers")
    torch.backends.quantized.engine = engines[0]
    layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})[0].state_dict()
    tensors = {name: tensor for name, tensor in HF.items() if "in_proj" not in name}
    with pytest.raises(CheckpointError, match=r"packed by torch\.ao"):
        load_checkpoint(write(tmp_path / "m.pt", {**tensors, **{f"{AT}.{name}": v for name, v in layer.items()}}))


UNREADABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "int8": (lambda tensor: tensor.char(), r"already quantised or packed tensors: .*in_proj\.weight \(int8\)"),
    "bool": (lambda tensor: tensor > 0, r"already quantised or packed.*\(bool\)"),
    "float8": (lambda tensor: tensor.to(torch.float8_e4m3fn), r"already quantised or packed.*\(float8_e4m3fn\)"),
    "qint8": (
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "already quantised.*qint8|qtensor",
    ),
    "complex": (lambda tensor: tensor.to(torch.complex64), "complex values"),
    "meta": (lambda tensor: tensor.to("meta"), "without values, on torch's meta device"),
    "sparse": (lambda tensor: tensor.to_sparse(), "sparse tensors cannot be searched"),
    "expanded": (
        lambda tensor: torch.zeros(1).expand(10**12),
        "would take .* bytes more than the file holds|in a storage of 1",
    ),
    "too many dimensions": (lambda tensor: tensor[None], r"misshapen: .*\[1, 64, 16\], expected \[64, 16\]"),
    "too few dimensions": (lambda tensor: tensor.flatten(), r"misshapen: .*\[1024\], expected \[64, 16\]"),
    "no dimensions": (lambda tensor: tensor[0, 0], r"misshapen: .*\[\], expected \[64, 16\]"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("changed", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_tensors_without_plain_values_are_refused(
    tmp_path: Path, changed: Callable[[Tensor], Tensor], message: str
) -> None:
    tensors = {name: changed(tensor) if name == f"{AT}.weight" else tensor for name, tensor in HF.items()}
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(tmp_path / "m.pt", tensors))


def test_all_tensors_on_the_meta_device_are_one_error(tmp_path: Path) -> None:
    tensors = {**HF, "lm_head.weight": HF["backbone.embeddings.weight"]}
    with pytest.raises(CheckpointError, match=r"meta device: .* and \d+ more"):
        load_checkpoint(write(tmp_path / "m.pt", {name: tensor.to("meta") for name, tensor in tensors.items()}))


KINDS = [
    ("torch._utils._rebuild_qtensor", "already quantised"),
    ("torch._utils._rebuild_meta_tensor_no_storage", "without values"),
    ("torch._utils._rebuild_sparse_tensor", "sparse tensors"),
    ("torch._utils._rebuild_nested_tensor", "nested tensors"),
    ("torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor", "already quantised"),
    ("bitsandbytes.nn.modules.Params4bit", "already quantised"),
]


@pytest.mark.parametrize(("kind", "message"), KINDS)
@pytest.mark.parametrize("name", ["in_proj", "x_proj"])
def test_a_record_in_a_tensors_place_says_what_the_tensor_was(kind: str, message: str, name: str) -> None:
    for fields in ({"shape": (64, 16)}, {"data": torch.zeros(64, 16)}):
        content = {**HF, f"backbone.layers.0.mixer.{name}.weight": Record(kind, fields)}
        with pytest.raises(CheckpointError, match=message):
            find_weights({"model": content})
        assert find_weights({"model": HF, "optimizer": {"exp_avg": Record(kind, fields)}}).tensors.keys() == HF.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nested_tensors_are_refused(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(CheckpointError, match="nested tensors"):
        load_checkpoint(write(tmp_path / "m.pt", {**HF, "backbone.layers.0.mixer.D": nested}))


@pytest.mark.parametrize("at", ["in_proj", "x_proj"])
def test_an_adapter_alone_or_not_merged_is_refused_by_that_name(tmp_path: Path, at: str) -> None:
    name = f"base_model.model.backbone.layers.0.mixer.{at}"
    adapter = {f"{name}.lora_A.weight": torch.zeros(2, 16), f"{name}.lora_B.weight": torch.zeros(8, 2)}
    for tensors in (adapter, {**prefixed("base_model.model.", HF), **adapter}):
        with pytest.raises(CheckpointError, match="a PEFT adapter"):
            load_checkpoint(write(tmp_path / "adapter_model.safetensors", tensors))


@pytest.mark.parametrize("name", ["position_ids", "num_batches_tracked", "layers.0.mixer.num_batches_tracked"])
def test_a_buffer_of_a_module_is_ignored_with_a_note(tmp_path: Path, name: str) -> None:
    found = load_checkpoint(write(tmp_path / "m.pt", {**HF, f"backbone.{name}": torch.arange(3)}))
    assert found.notes == (f"no part of the model, ignored: backbone.{name}",)


def test_another_integer_tensor_is_unknown_and_not_packed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unknown: backbone\.ids \[3\]"):
        load_checkpoint(write(tmp_path / "m.pt", {**HF, "backbone.ids": torch.arange(3)}))
