"""A `transformers` Mamba of the reference's size, and the plain way to evaluate precision maps on it.

The plain way is the script that one would write without this project: copy the model, round its weights and by hooks
the inputs of its products, run `transformers`' own forward pass on all windows, take the log-softmax of all logits.

Dimensions: `w` windows, `L` window length, `d` model, `V` vocabulary, `R` step rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.data import Windows
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.precisions.quantize import INT8_LIMIT, stored_scales
from ssm_mp.precisions.registry import get_precision
from ssm_mp.scheme import ScaleRule

REFERENCE = Path("studies/reference/model.safetensors")
BATCH = 32
"""Windows in a batch of the plain way; 8 and 128 are no faster."""


def quiet() -> None:
    """Keep `transformers` from drawing progress bars and from saying that its kernels are missing."""
    from transformers.utils import logging as module

    logging: Any = module  # its functions are untyped
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def transformers_model(config: MambaConfig) -> nn.Module:
    """A `MambaForCausalLM` of our configuration, `transformers`' own initialisation."""
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM

    assert config.norm == "rms"
    assert config.max_length is None
    theirs = TheirConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.d_model,
        expand=config.d_inner // config.d_model,
        state_size=config.d_state,
        time_step_rank=config.dt_rank,
        conv_kernel=config.d_conv,
        num_hidden_layers=config.n_layers,
        layer_norm_epsilon=config.norm_eps,
        use_bias=config.projection_bias,
        use_conv_bias=config.conv_bias,
        tie_word_embeddings=config.tied,
    )
    untyped: Any = MambaForCausalLM(theirs)
    model: nn.Module = untyped.eval()
    return model


def write_reference(folder: Path) -> nn.Module:
    """The reference checkpoint as a Hugging Face folder, and its model.

    Tensors of the same shape are the reference's own. That layout has RMSNorms and no positions: norms lose their
    biases, and the mean position is added to every row of the embedding. Perplexity rises by about a fifth.
    """
    checkpoint = load_checkpoint(REFERENCE)
    tensors = dict(checkpoint.tensors)
    tensors["embedding.weight"] = tensors["embedding.weight"] + tensors["position_embedding.weight"].mean(dim=0)
    c = checkpoint.config
    assert isinstance(c, MambaConfig)
    config = MambaConfig(c.vocabulary, c.d_model, c.d_inner, c.d_state, c.dt_rank, c.d_conv, c.n_layers)
    model = transformers_model(config)
    with torch.no_grad():
        for parameter in config.parameters():
            model.get_parameter(their_name(parameter.name)).copy_(tensors[parameter.name])
    model.save_pretrained(folder)  # type: ignore[operator]  # nn.Module attributes are untyped
    return model


def their_name(name: str) -> str:
    """The name of a canonical component or tensor in `transformers`."""
    if name.startswith("layers."):
        layer, _, rest = name.removeprefix("layers.").partition(".ssm.")
        inside = rest if rest.startswith("norm") else f"mixer.{rest}"
        return f"backbone.layers.{layer}.{inside}"
    return name.replace("embedding", "backbone.embeddings", 1).replace("norm", "backbone.norm_f", 1)


Convert = Callable[[nn.Module, Mapping[str, str], Mapping[str, float]], nn.Module]
"""A model, a map and the scales of inputs → a copy that is rounded."""


def plain_perplexity(
    model: nn.Module,
    precision_map: Mapping[str, str],
    input_scales: Mapping[str, float],
    windows: Windows,
    convert: Convert | None = None,
) -> float:
    """One candidate by the plain way: `model` copied, converted by the map (by default as a Mamba), run on all
    windows."""
    converted = (convert or plain_convert)(model, precision_map, input_scales)
    total = 0.0
    with torch.inference_mode():
        device = next(converted.parameters()).device
        for ids in windows.ids.to(device).split(BATCH):
            logits: Tensor = converted(ids, use_cache=False).logits  # [·, L, V]
            likelihood = logits[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 1:, None])
            total -= likelihood.double().sum().item()
    return math.exp(total / (len(windows) * windows.predicted))


def plain_convert(model: nn.Module, precision_map: Mapping[str, str], input_scales: Mapping[str, float]) -> nn.Module:
    """A copy of `model` that computes in float32 with rounded weights and, by hooks, rounded inputs of products.

    precision_map: component → precision; input_scales: the static scale of each component's inputs at int8.
    """
    converted = copy.deepcopy(model)
    for name, precision in precision_map.items():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("A_log", "D"):
            set_rounded(converted.get_parameter(their_name(name)), lambda value: value.half())
            continue
        module = converted.get_submodule(their_name(name))
        for leaf, parameter in module.named_parameters():
            set_rounded(parameter, rounding(precision) if leaf == "weight" else Tensor.half)
        if precision == "int8" and name in input_scales:
            _hook(converted, name, kind, input_scales[name])
    return converted


def set_rounded(parameter: nn.Parameter, rounded: Callable[[Tensor], Tensor]) -> None:
    """Round a parameter in place, float32 as before."""
    parameter.data = rounded(parameter.data).float()


def rounding(precision: str) -> Callable[[Tensor], Tensor]:
    """How a weight is rounded; below 8 bits in groups, by the code that stores them."""
    if precision == "fp16":
        return Tensor.half
    if precision == "int8":
        return _int8_rows
    return lambda weight: get_precision(precision).store(weight, "weight", ScaleRule()).tensor()


def _int8_rows(weight: Tensor) -> Tensor:
    """A weight rounded to int8 with one scale an output channel, the largest magnitude at 127."""
    rows = weight.flatten(1)
    scale = stored_scales(rows.abs().amax(dim=1) / INT8_LIMIT).float()[:, None]
    return ((rows / scale).round().clamp(-INT8_LIMIT, INT8_LIMIT) * scale).reshape(weight.shape)


def _hook(model: nn.Module, name: str, kind: str, scale: float) -> None:
    """Round the inputs of one component's product to int8."""

    def rounded(x: Tensor) -> Tensor:
        return (x / scale).round().clamp(-INT8_LIMIT, INT8_LIMIT) * scale

    def before(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(arguments[0]), *arguments[1:])

    if kind == "dt_proj":  # transformers multiplies by its weight without calling it: round what x_proj hands over
        rank = model.get_submodule(their_name(name)).in_features
        assert isinstance(rank, int)

        def after(_module: nn.Module, _arguments: tuple[Any, ...], out: Tensor) -> Tensor:
            return torch.cat([rounded(out[..., :rank]), out[..., rank:]], dim=-1)

        model.get_submodule(their_name(name.replace("dt_proj", "x_proj"))).register_forward_hook(after)
        return
    product = "lm_head" if kind == "embedding" else their_name(name)
    model.get_submodule(product).register_forward_pre_hook(before)
