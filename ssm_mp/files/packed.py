"""Tensors that are no float weights: already quantised, an adapter, or without values. One sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files.record import Record
from ssm_mp.files.shown import listed

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ADAPTER = re.compile(
    r"\.(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)|ia3_l|vera_lambda_[bd]|base_layer|modules_to_save)(\.|$)"
)
_PACKERS = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.weight_(packed|zero_point|g_idx)$", "compressed-tensors"),
    (r"(\.quant_state(\.|$)|\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format)$)", "bitsandbytes"),
    (r"(^|\.)_packed_params(\.|$)", "torch.ao"),
    (r"\.(W_q|W_nbits)$", "HQQ"),
    (r"\.weight\._(data|scale|shift)$", "optimum-quanto"),
    (r"\.weight\.(tensor_impl|qdata|int_data|original_weight_tensor)(\.|$)", "torchao"),
    (r"\.weight_(scale|scale_inv|scale_2|qtype)$|\.(input|output)_scale$|_quantizer\._(amax|scale|pre_quant_scale)$",
     "a tool that stores scales"),
    (r"\.(codebooks|codes)$", "AQLM"),
)  # fmt: skip
"""What only a packed file's names hold → who packs so."""
_REMEDY = "an already quantised checkpoint cannot be searched; give the float checkpoint that it was made from"

_QUANTISED = f"already quantised or packed tensors: {{}}; {_REMEDY}"
_VALUELESS = "tensors without values, on torch's meta device: {}; load the weights, then save again"
_SPARSE = "sparse tensors cannot be searched, give dense ones: {}"
_NESTED = "nested tensors cannot be searched, give dense ones: {}"


def refuse_adapter(names: Iterable[str]) -> None:
    """Raise CheckpointError where names are those of a PEFT adapter that is not merged."""
    held = [name for name in names if _ADAPTER.search(name)]
    if held:
        raise CheckpointError(
            f"a PEFT adapter (LoRA or its kin: {listed(held, 1)}), not a whole model; merge it into its base model "
            "(merge_and_unload()), save that and give it"
        )


def refuse_packed(held: Mapping[str, object]) -> None:
    """Raise CheckpointError where names in a file, or the types of their tensors, show who packed them."""
    for pattern, packer in _PACKERS:
        signs = [name for name in held if re.search(pattern, name)]
        if signs:
            raise CheckpointError(f"packed by {packer} ({listed(signs, 1)}): {_REMEDY}")
    words = [name for name, value in held.items() if isinstance(value, Tensor) and value.dtype == torch.uint32]
    if words and any(name.endswith(".scales") for name in held):
        raise CheckpointError(f"packed by MLX ({listed(words, 1)}): {_REMEDY}")


def refuse_stand_ins(held: Mapping[str, object]) -> None:
    """Raise CheckpointError where records stand for tensors of other kinds than plain ones."""
    kinds = {name: value.kind for name, value in held.items() if isinstance(value, Record)}
    for sign, what in (("meta", _VALUELESS), ("sparse", _SPARSE), ("nested", _NESTED), ("", _QUANTISED)):
        signs = [f"{name} ({kind.rsplit('.', 1)[-1]})" for name, kind in kinds.items() if sign in kind]
        if signs:
            raise CheckpointError(what.format(listed(signs, 2)))


def refuse_nested(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for tensors without a shape."""
    nested = [name for name, tensor in tensors.items() if tensor.is_nested]
    if nested:
        raise CheckpointError(_NESTED.format(listed(nested, 2)))


def refuse_unreadable(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for parameters (name in the file → tensor) without plain float values."""
    valueless = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if valueless:
        raise CheckpointError(_VALUELESS.format(listed(valueless, 2)))
    sparse = [name for name, tensor in tensors.items() if tensor.layout != torch.strided]
    if sparse:
        raise CheckpointError(_SPARSE.format(listed(sparse, 2)))
    complex_ = [name for name, tensor in tensors.items() if tensor.dtype.is_complex]
    if complex_:
        raise CheckpointError(f"complex values, which no known family has: {listed(complex_, 2)}")
    packed = [
        f"{name} ({type_name(tensor)})" for name, tensor in tensors.items() if tensor.dtype not in _FLOATS
    ]  # fmt: skip
    if packed:
        raise CheckpointError(_QUANTISED.format(listed(packed, 2)))


def type_name(tensor: Tensor) -> str:
    """A tensor's type as people write it: `bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")
