"""Every block by the word that files say for it. Adding one is its file and its line here."""

from __future__ import annotations

from ssm_mp.blocks.attention import Attention
from ssm_mp.blocks.block import Block
from ssm_mp.blocks.delta_rule import DeltaRule
from ssm_mp.blocks.experts import Experts
from ssm_mp.blocks.feed_forward import FeedForward
from ssm_mp.blocks.mamba1 import Mamba1
from ssm_mp.blocks.mamba2 import Mamba2
from ssm_mp.blocks.shared_step import SharedStep
from ssm_mp.blocks.short_conv import ShortConv

_ALL: tuple[type[Block], ...] = (
    Mamba1,
    Mamba2,
    SharedStep,
    DeltaRule,
    ShortConv,
    Attention,
    FeedForward,
    Experts,
)

BLOCKS: dict[str, type[Block]] = {block.word: block for block in _ALL}
