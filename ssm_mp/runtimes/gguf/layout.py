"""The file as a whole: its tensors out of a configuration, and its keys.

Dimensions: `V` vocabulary, `d` model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from ssm_mp.blocks.experts import Experts
from ssm_mp.config import Config
from ssm_mp.errors import ExportError
from ssm_mp.runtimes.gguf.architectures import Architecture, architecture_of, unknown
from ssm_mp.runtimes.gguf.blocks import Place, entries
from ssm_mp.runtimes.gguf.tensors import Entry, Rows, entry, matrix


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of a file, and which of them each component's tensors are in.

    uses: canonical name of a tensor → the entries with rows of it. fillers: component → zeros that belong to it.
    """

    architecture: Architecture
    entries: tuple[Entry, ...]
    uses: Mapping[str, tuple[tuple[Entry, Rows], ...]]
    fillers: Mapping[str, tuple[Entry, ...]]


@lru_cache(maxsize=4)
def layout_of(config: Config) -> Layout:
    """The tensors of a configuration's file. Raises ExportError for what llama.cpp does not know."""
    known = architecture_of(config)
    reason = unknown(config)
    if known is None or reason is not None:
        raise ExportError(f"GGUF: {reason}")
    found = tuple(_entries(known, config))
    uses: dict[str, list[tuple[Entry, Rows]]] = defaultdict(list)
    fillers: dict[str, list[Entry]] = defaultdict(list)
    for one in found:
        for rows in one.rows:
            uses[rows.tensor].append((one, rows))
        if not one.rows:
            fillers[one.component].append(one)
    return Layout(
        known, found, {name: tuple(held) for name, held in uses.items()},
        {name: tuple(held) for name, held in fillers.items()},
    )  # fmt: skip


def _entries(known: Architecture, config: Config) -> Iterator[Entry]:
    vocabulary, d = config.vocabulary, config.d_model
    folded = known.multipliers
    first = config.embedding_multiplier if folded else 1.0
    last = config.logit_multiplier if folded else 1.0
    yield matrix("token_embd.weight", (vocabulary, d), Rows("embedding.weight", factor=first))
    for i, layer in enumerate(config.branches):
        for branch, norm in zip(layer, ("attn_norm.weight", known.second_norm), strict=False):
            yield entry(f"blk.{i}.{norm}", (d,), f"layers.{i}.{branch.norm_name}.weight")
            experts = any(isinstance(part.block, Experts) for part in branch.parts)
            for part in branch.parts:
                shared = experts and not isinstance(part.block, Experts)
                yield from entries(
                    Place(
                        f"layers.{i}.{part.name}", f"blk.{i}", part, known.positions == "pairs", shared,
                        config.final_norm.eps,
                    )
                )  # fmt: skip
    # a multiplier of the logits goes into the last norm, which is float32; a tied head has the embedding's in it
    yield entry(known.final_norm, (d,), "norm.weight", factor=last / first if config.tied else last)
    if not config.tied:
        yield matrix("output.weight", (vocabulary, d), Rows("lm_head.weight"))
