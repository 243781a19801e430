"""The models that `benchmarks.inference` measures, and how each is converted.

A winner is that of a finished search where there is one. Without one, and where random weights cannot be searched, it
is made by a rule: what a search over int8 and fp16 finds on the reference (embeddings and projections int8,
convolutions, norms, `A_log` and `D` fp16), and nearly what the search below 8 bits finds there (`_BELOW_8_BITS`; it has
a few more projections in groups of 128 or at nf3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.runtimes import opened
from benchmarks.shapes import checkpoint_of, initial_tensors, workspace_of
from search.problem.run_directory import WINNER
from search.problem.spec import load_spec
from ssm_mp.artifact import MAP, read_artifact
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.components import Component
from ssm_mp.families.itera import IteraConfig, IteraLayer
from ssm_mp.model import LanguageModel
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme

CONVERTED = ("fp16", "int8-static", "int8-dynamic", "winner", "nf4", "int4")
"""What a model is converted to, in this order: everywhere at one precision, or by the winner's map. Inputs of int8
products are rounded with static scales where nothing else is said."""

HYBRID = Path("studies/hybrid")
CUMULATIVE_STUDY = Path("studies/reference-cumulative.toml")
ITERA = IteraConfig(8000, 128, 128, (IteraLayer(128, 16, 4, 96, experts=4),) * 4)
"""A small SSM with experts, of which two are chosen: 1.7 million parameters, the reference's vocabulary and width."""

_FP16 = ("conv1d", "norm", "A_log", "D")
_BELOW_8_BITS = {
    "*": "nf4", "*.out_proj": "nf4g128", "embedding.blocks.*": "nf4g128", "embedding.blocks.3": "nf3g128",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Converted:
    """A model with what an artifact of it says."""

    model: LanguageModel
    map: PrecisionMap
    scheme: Scheme


@dataclass(frozen=True)
class Case:
    """A model and what is measured of it.

    prompt: tokens that are read; decoding takes `steps` more after three quarters of it. ways: of `CONVERTED`.
    exported: those whose map llama.cpp runs too, where it can. torchao: whether it has a plain model of it. study: the
    name of the one whose finished run has its winner; empty where the winner, if any, is made by a rule.
    """

    load: Callable[[], Checkpoint]
    prompt: int
    steps: int
    rounds: int
    ways: tuple[str, ...]
    exported: tuple[str, ...]
    torchao: bool = False
    study: str = ""
    blocks: bool = False
    """Whether the winner has its embedding in blocks, as the study below 8 bits has."""


def _itera() -> Checkpoint:
    return Checkpoint(Path("itera"), "canonical", ITERA, initial_tensors(ITERA))


_FOUR = ("fp16", "int8-static", "int8-dynamic", "winner")
CASES: Mapping[str, Case] = {
    "itera": Case(_itera, 128, 32, 15, ("fp16", "int8-static", "nf4", "int4"), ("int8-static",)),
    "reference": Case(
        partial(checkpoint_of, "reference"), 128, 32, 15, _FOUR, ("int8-static",), torchao=True, study="reference"
    ),
    "cumulative": Case(
        partial(checkpoint_of, "reference"), 128, 32, 15, ("winner",), ("winner",), study="reference-cumulative",
        blocks=True,
    ),
    "hybrid": Case(
        partial(load_checkpoint, HYBRID), 128, 32, 15, ("fp16", "int8-static", "nf4", "int4"), ("int8-static", "int4")
    ),
    "130m": Case(
        partial(checkpoint_of, "130m"), 512, 16, 7, (*_FOUR, "nf4", "int4"), ("int8-static", "int4"), torchao=True
    ),
    "granite-350m": Case(
        lambda: opened("granite-4.0-h-350m")[0], 512, 16, 5, ("int8-static",), ("int8-static",)
    ),
}  # fmt: skip
"""By name, in the order in which they are measured. The hybrid reference is `studies/hybrid`, whose winner is int8
everywhere; `130m` and `granite-350m` have the shapes of state-spaces/mamba-130m and of granite-4.0-h-350m, and random
weights."""


def convert_all(
    checkpoint: Checkpoint,
    ways: Sequence[str],
    winner: Converted | None = None,
    device: str = "cpu",
    boundaries: Sequence[int] = (),
) -> dict[str, Converted]:
    """The converted models by way; `winner`: as a search found it. boundaries: of the blocks of a winner's embedding,
    where it is made by rule."""
    found: dict[str, Converted] = {} if winner is None else {"winner": winner}
    for activations in ("static", "dynamic"):
        wanted = [way for way in ways if way not in found and (way == "int8-dynamic") is (activations == "dynamic")]
        if not wanted:
            continue
        # the quickest rule for scales: speed does not depend on them
        overrides = [f'precision.activations="{activations}"', 'precision.weight_scale="minmax"']
        overrides += [f'search.device="{device}"', f"precision.embedding_blocks={list(boundaries)}"]
        converter = workspace_of(checkpoint, 1, overrides).converter
        for way in wanted:
            held = _map(way, converter.components)
            found[way] = Converted(converter.convert(held), held, converter.scheme)
    return {way: found[way] for way in CONVERTED if way in ways}


def _map(way: str, components: Sequence[Component]) -> PrecisionMap:
    """The map of a way, a winner's by rule."""
    if way == "winner":
        return winner_by_rule(components)
    return PrecisionMap.uniform(way.partition("-")[0], components)


def winner_by_rule(components: Sequence[Component]) -> PrecisionMap:
    """What a search below 8 bits finds where the embedding is in blocks, else what one over int8 and fp16 finds."""
    if any(component.name.startswith("embedding.blocks.") for component in components):
        return PrecisionMap.from_rules(_BELOW_8_BITS, components)
    rule = {c.name: "fp16" if c.kind in _FP16 or c.pin is not None else "int8" for c in components}
    return PrecisionMap(tuple(rule.items()))


def boundaries_of(case: Case) -> tuple[int, ...]:
    """Those of the blocks of the winner's embedding."""
    return tuple(load_spec(CUMULATIVE_STUDY).precision.embedding_blocks) if case.blocks else ()


def winner_of(run: Path, device: str = "cpu") -> Converted | None:
    """The winner of a finished run; None where there is none."""
    if not (run / WINNER / MAP).is_file():
        return None
    found = read_artifact(run / WINNER, device)
    return Converted(found.model, found.precision_map, found.scheme)
