"""Family `falcon_mamba` (Zuo et al. 2024): Mamba-1 with norms without weights on step, B and C.

Its tensors have the names and shapes of family `mamba`; only the config's model type tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ssm_mp.config import Branch, Part
from ssm_mp.families.family import BACKBONE, Family
from ssm_mp.families.hybrid import HybridConfig, hybrid_from_json
from ssm_mp.families.mixers import LAYER, Mamba1Keys, mamba1_block
from ssm_mp.families.said import Said
from ssm_mp.families.shapes import Shapes
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.modules.norm import NormForm

_KEYS = Mamba1Keys("state_size", "time_step_rank", "expand", "conv_kernel", "use_conv_bias", "use_bias")


class FalconMambaFamily(Family):
    """Falcon-Mamba."""

    word = "falcon_mamba"
    model_types = ("falcon_mamba",)
    mark = r"(?:backbone\.)?layers\.[0-9]+\.mixer\.(?:x_proj|dt_proj)\."
    example = "backbone.layers.0.mixer.x_proj.weight"
    aliases = BACKBONE

    def recognises(self, names: Iterable[str]) -> bool:
        return any(re.match(self.mark, name) for name in names)

    def config(self, shapes: Shapes, stored: StoredConfig) -> tuple[HybridConfig, tuple[str, ...]]:
        said = Said(stored, shapes)
        d = said.size("hidden_size", said.shown(LAYER + r"norm\.weight", 0))
        norm = NormForm(said.number("layer_norm_epsilon", 1e-5, most=1.0))
        said.activation()
        plain = mamba1_block(said, _KEYS, "mixer", d, inner_key="intermediate_size")
        block = replace(plain, weightless_eps=said.number("mixer_rms_eps", 1e-6, most=1.0))
        config = HybridConfig(
            word=self.word, vocabulary=said.size("vocab_size", said.shown(r"embedding\.weight", 0)), d_model=d,
            norm=norm, tied=said.tied(),
            layers=((Branch("norm", norm, (Part("mixer", block),)),),) * said.layers(),
        )  # fmt: skip
        return config, said.closing("use_falcon_mambapy", "rms_norm")

    def config_from_json(self, values: dict[str, Any]) -> HybridConfig:
        return hybrid_from_json(self.word, values)
