"""Every family. Adding one is its file and its line here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ssm_mp.config import Config
from ssm_mp.errors import CheckpointError
from ssm_mp.families.bamba import BambaFamily
from ssm_mp.families.falcon_h1 import FalconH1Family
from ssm_mp.families.falcon_mamba import FalconMambaFamily
from ssm_mp.families.family import Family
from ssm_mp.families.granite import GraniteFamily
from ssm_mp.families.itera import IteraFamily
from ssm_mp.families.jamba import JambaFamily
from ssm_mp.families.lfm2 import Lfm2Family, Lfm2MoeFamily
from ssm_mp.families.mamba import MambaFamily
from ssm_mp.families.mamba2 import Mamba2Family
from ssm_mp.families.nemotron_h import NemotronHFamily
from ssm_mp.families.qwen import Qwen35Family, Qwen35MoeFamily, QwenNextFamily
from ssm_mp.files.shown import shown
from ssm_mp.files.stored_config import StoredConfig

_NOT_SUPPORTED = """
zamba zamba2 recurrent_gemma rwkv rwkv6 rwkv7 xlstm mamba3 olmo_hybrid minimax kimi_linear bailing_hybrid
nemotron_h_omni lfm2_vl lfm3 lfm3_vl qwen4_exp qwen4_exp_text
"""
NOT_SUPPORTED = frozenset(_NOT_SUPPORTED.split())
"""Model types that are known, and refused by name."""
_ALL: tuple[Family, ...] = (
    MambaFamily(),
    IteraFamily(),
    FalconMambaFamily(),
    Mamba2Family(),
    NemotronHFamily(),
    GraniteFamily(),
    JambaFamily(),
    BambaFamily(),
    FalconH1Family(),
    Lfm2Family(),
    Lfm2MoeFamily(),
    QwenNextFamily(),
    Qwen35Family(),
    Qwen35MoeFamily(),
)
FAMILIES: dict[str, Family] = {family.word: family for family in _ALL}
"""By word, in the order in which files are held against them."""

MARK = "(?:" + "|".join(dict.fromkeys(family.mark for family in FAMILIES.values())) + ")"
"""Part of a name that only a tensor of a known family has."""
EXAMPLES = ", or ".join(f"{family.word!r}: {family.example}" for family in FAMILIES.values())
"""What the marks look like, for messages."""
_OUTER = re.compile(r"(embedding|position_embedding|norm|lm_head)\.(weight|bias)")


@dataclass(frozen=True)
class Recognised:
    """Canonical names of a file's tensors. `names` maps canonical → the name in the file."""

    family: Family
    layout: str
    names: dict[str, str]


def recognise(names: Iterable[str], stored: StoredConfig) -> Recognised:
    """Family and layout from a file's names, without what wraps them (`checkpoints/wrappers.py`), and its config.

    Raises CheckpointError where they fit no known family or name one tensor twice.
    """
    found = list(names)
    family = _family_of(found, stored)
    canonical: dict[str, str] = {}
    for name in found:
        other = canonical.setdefault(family.canonical_name(name), name)
        if other != name:
            raise CheckpointError(f"{other!r} and {name!r} are two names of one tensor; keep one of them")
    return Recognised(family, family.layout(found), canonical)


def _family_of(names: list[str], stored: StoredConfig) -> Family:
    """The family that a config's model type means, else, where it means none, the first whose tensors these are."""
    said = stored.values.get("model_type")
    meant = next((family for family in FAMILIES.values() if said in family.model_types), None)
    if meant is not None and meant.recognises(names):
        return meant
    fitting = next((family for family in FAMILIES.values() if family.recognises(names)), None)
    if fitting is None:
        raise CheckpointError(f"these tensors are of no known family (expected {EXAMPLES})")
    if said is not None and fitting.model_types:
        raise CheckpointError(
            f"{stored.source} says model_type = {shown(said)}, but these tensors are of family {fitting.word!r}, whose "
            f"model type is {' or '.join(map(repr, fitting.model_types))}"
        )
    return fitting


def refuse_types(stored: StoredConfig, others: bool) -> None:
    """Raise CheckpointError for a model type that is known and not supported; with `others`, for any unknown one too.

    This comes before any look at tensors: they may be called as in a family that is supported, or as in none.
    """
    said = stored.values.get("model_type")
    if not isinstance(said, str) or any(said in family.model_types for family in FAMILIES.values()):
        return
    if said in NOT_SUPPORTED or others:
        known = "known, but not supported" if said in NOT_SUPPORTED else "no known family's"
        types = ", ".join(word for family in FAMILIES.values() for word in family.model_types)
        raise CheckpointError(f"{stored.source} says model_type = {shown(said)}: {known}; supported are {types}")


def outer_name(name: str) -> str:
    """The canonical name of a tensor that may stand outside of what wraps the layers; another name as it is."""
    found = (family.canonical_name(name) for family in FAMILIES.values())
    return next((canonical for canonical in found if _OUTER.fullmatch(canonical)), name)


def is_outer(name: str) -> bool:
    """Whether a tensor may stand outside of what wraps the layers."""
    return _OUTER.fullmatch(outer_name(name)) is not None


def config_to_json(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, with its family."""
    return {"family": config.family, **config.to_json()}


def config_from_json(values: dict[str, Any]) -> Config:
    """Inverse of `config_to_json`; raises KeyError, TypeError or ValueError on foreign input."""
    fields = dict(values)
    word = fields.pop("family")
    if word not in FAMILIES:
        raise KeyError(f"unknown family {word!r}")
    return FAMILIES[word].config_from_json(fields)
