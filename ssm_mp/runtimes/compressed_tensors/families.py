"""Which models transformers 5.23 loads from packed folders as they are meant; all found by loading them."""

from __future__ import annotations

from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.config import Config
from ssm_mp.runtimes.huggingface_config import first

_BROKEN = "transformers 5.23 fails to load it: its initialisation asks packed layers for their weight"
_ABSENT = {
    "mamba": _BROKEN,
    "mamba2": _BROKEN,
    "falcon_mamba": _BROKEN,
    "jamba": "transformers 5.23 fails to convert its tensors beside packed ones",
    "qwen3_next": "transformers 5.23 fails to convert its experts beside packed layers",
    "qwen3_5_moe_text": "not compared with transformers",
    "lfm2_moe": "not compared with transformers",
    "itera": "it is of this project alone, transformers does not know it",
}


def unfit(config: Config) -> str | None:
    """Why transformers does not load or compute this model; None where it does."""
    if config.family in _ABSENT:
        return f"family {config.family}: {_ABSENT[config.family]}"
    if config.family == "nemotron_h" and first(config, Experts) is not None:
        return (
            "nemotron_h with experts: transformers 5.23 takes them for missing beside packed layers and draws them at "
            "random; only models without experts are written"
        )
    block = first(config, Mamba2)
    if config.family != "falcon_h1" and block is not None and block.projection_bias != block.out_bias:
        return "one of in_proj and out_proj has a bias and the other has none; a config has one key for both"
    return None
