"""Folders as transformers writes them: what tensors there are, how they are called, and what goes with them.

Dimensions: `X` experts, `n` rows and `k` columns of a matrix.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssm_mp.config import Config
from ssm_mp.files.shown import listed
from ssm_mp.modules.experts import ExpertsForm
from ssm_mp.modules.parameter import Parameter
from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.codes import Codes, codes_of, joined
from ssm_mp.runtimes.exportable import Exportable

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_EXPERT = re.compile(r"(layers\.[0-9]+\..*\bexperts)\.([0-9]+)\.(.+)")
_PIECE = re.compile(r"(layers\.[0-9]+\..*\bin_proj)\.(?:z|x|B|C|dt)\.(weight|bias)")
_BACKBONE = ("mamba", "falcon_mamba", "mamba2", "nemotron_h")
_FINAL_NORM = {"bamba": "final_layernorm", "falcon_h1": "final_layernorm", "jamba": "final_layernorm"}
_FINAL_NORM |= {"lfm2": "embedding_norm", "lfm2_moe": "embedding_norm"}


@dataclass(frozen=True)
class Whole:
    """One tensor as it is without regard to components: rows of several of ours, one below the other.

    name: canonical, without an expert's number or a piece's letter. experts: so many equal parts of its rows are
    those of experts; None where there are none.
    """

    name: str
    parameters: tuple[Parameter, ...]
    experts: int | None = None

    @property
    def first(self) -> Parameter:
        return self.parameters[0]

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(parameter.component for parameter in self.parameters)


def wholes(config: Config) -> tuple[Whole, ...]:
    """The tensors of a model, in the order of the data flow: experts in one, the pieces of in_proj together."""
    grouped: dict[str, list[Parameter]] = {}
    for parameter in config.parameters():
        grouped.setdefault(whole_name(parameter.name), []).append(parameter)
    return tuple(Whole(name, tuple(parts), _experts(parts)) for name, parts in grouped.items())


def whole_name(name: str) -> str:
    """The canonical name of a tensor without an expert's number or the letter of a piece of in_proj."""
    if expert := _EXPERT.fullmatch(name):
        return f"{expert[1]}.{expert[3]}"
    if piece := _PIECE.fullmatch(name):
        return f"{piece[1]}.{piece[2]}"
    return name


def is_first(parameter: Parameter) -> bool:
    """Whether a part is the first of what makes one tensor, as most that are alone."""
    if expert := _EXPERT.fullmatch(parameter.name):
        return expert[2] == "0"
    return whole_name(parameter.name) in (parameter.name, parameter.name.replace(".in_proj.z.", ".in_proj."))


def _experts(parts: list[Parameter]) -> int | None:
    form = parts[0].form
    if isinstance(form, ExpertsForm):
        return form.count
    return len(parts) if _EXPERT.fullmatch(parts[0].name) else None


def in_family(config: Config, name: str) -> str:
    """What transformers calls a tensor of a canonical name."""
    family = config.family
    backbone = family in _BACKBONE
    if name.startswith("lm_head."):
        return name
    if name.startswith("embedding."):
        return "backbone.embeddings.weight" if backbone else "model.embed_tokens.weight"
    if name.startswith("norm."):
        return "backbone.norm_f.weight" if backbone else f"model.{_FINAL_NORM.get(family, 'norm')}.weight"
    if family == "mamba":  # our own name for the mixer, with its norm inside
        name = name.replace(".ssm.norm.", ".norm.").replace(".ssm.", ".mixer.")
    return f"{'backbone' if backbone else 'model'}.{name}"


def held(whole: Whole, stored: Mapping[str, tuple[Parameter, Stored]]) -> Codes | Tensor:
    """A tensor's integers if all its parts are matrices of them at one precision, else its values, as a float tensor of
    the type that is stored or float32; in both cases the parts one below the other, on the CPU."""
    parts = [stored[parameter.name][1] for parameter in whole.parameters]
    codes = [codes for part in parts if (codes := codes_of(part)) is not None]
    if len(codes) == len(parts) and len({(one.bits, one.group) for one in codes}) == 1:
        return joined(codes)
    values = [_float(part) for part in parts]
    return values[0] if len(values) == 1 else torch.cat(values)


def _float(part: Stored) -> Tensor:
    plain = part.arrays().get("")
    return (part.tensor() if plain is None else plain).cpu()


def stacked(whole: Whole, tensor: Tensor) -> Tensor:
    """Rows of experts `[X·n, k]` → `[X, n, k]`; another tensor as it is."""
    return tensor if whole.experts is None else tensor.unflatten(0, (whole.experts, -1))


def divided(config: Config, experts: bool = True) -> str | None:
    """Which tensors of the file are several components of ours, so that these must have one precision, and what to do;
    None where none are. experts: whether theirs may have several."""
    several = [whole for whole in wholes(config) if len(set(whole.components)) > 1]
    advice = []
    if experts and any(whole.experts for whole in several):
        advice.append("the experts of a layer are one tensor there: set experts = 'together' under [precision]")
    if any(whole.experts is None for whole in several):
        advice.append("in_proj is one tensor there: leave out split = ['in_proj'] under [precision]")
    return "; ".join(advice) or None


def mixed(item: Exportable) -> str | None:
    """Which components must have one precision for being one tensor in the file and have several; None: none."""
    found = []
    for whole in wholes(item.config):
        precisions = sorted({item.precision(component) for component in whole.components})
        if len(precisions) > 1:
            found.append(f"{whole.name.removesuffix('.weight')} at {' and '.join(precisions)}")
    if not found:
        return None
    return (
        f"components that are one tensor there must have one precision; found {listed(found, 4)}; --widen stores all "
        "as the widest"
    )


def in_one_tensor(config: Config) -> list[tuple[str, ...]]:
    """Components that are one tensor in the file."""
    parts = (tuple(dict.fromkeys(whole.components)) for whole in wholes(config))
    return [components for components in parts if len(components) > 1]


def write_beside(folder: Path, config: Mapping[str, Any], item: Exportable) -> None:
    """Write what stands beside the weights: config, tokenizer and further files of the model's."""
    for name, content in item.files.items():
        if Path(name).name == name and name not in (WEIGHTS, CONFIG, TOKENIZER):
            (folder / name).write_bytes(content)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read what it writes
    if item.tokenizer is None:
        return
    (folder / TOKENIZER).write_bytes(item.tokenizer)
    if TOKENIZER_CONFIG not in item.files:
        minimal = {"tokenizer_class": "PreTrainedTokenizerFast", **_special_tokens(item.tokenizer, config)}
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(minimal, indent=2) + "\n", encoding="utf-8")


def _special_tokens(tokenizer: bytes, config: Mapping[str, Any]) -> dict[str, str]:
    """The beginning and the end of a text, as far as the config numbers them and the tokenizer names them."""
    added = {token["id"]: token["content"] for token in json.loads(tokenizer).get("added_tokens", ())}
    found = {}
    for key in ("bos_token", "eos_token"):
        number = config.get(f"{key}_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number in added:
            found[key] = added[number]
    return found
