"""What must be true of every written file, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ssm_mp.checkpoints import Checkpoint
from ssm_mp.conversion.convert import Converter
from ssm_mp.model import build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.format import Format
from ssm_mp.runtimes.transfer import Transferred, transfer
from ssm_mp.runtimes.verify import twin_difference
from ssm_mp.scheme import Scheme

TWIN = 3e-4
"""Log-probability; the gate of 1e-4 holds where it was measured, and another processor sums in another order. An error
of arrangement is seen at 6e-4 and more."""


def item_of(checkpoint: Checkpoint, rules: Mapping[str, str], tokenizer: bytes | None = None) -> Exportable:
    """A checkpoint converted by a map, weights only."""
    converter = Converter(build(checkpoint.config, checkpoint.tensors), Scheme(activations="none"))
    precision_map = PrecisionMap.from_rules(rules, converter.components)
    return Exportable("tiny", converter.convert(precision_map), precision_map, checkpoint.source, tokenizer)


def mixed_rules(format_: Format, checkpoint: Checkpoint, *precisions: str) -> dict[str, str]:
    """One precision after another for the components that the format holds at it; fp16 for all others."""
    converter = Converter(build(checkpoint.config, checkpoint.tensors), Scheme(activations="none"))
    rules, turn = {"*": "fp16"}, 0
    for component in converter.components:
        wanted = precisions[turn % len(precisions)]
        if component.pin is None and format_.encoding(component, wanted, checkpoint.config) is not None:
            rules[component.name] = wanted
            turn += 1
    return rules


def ids_of(vocabulary: int, windows: int = 2, length: int = 24, seed: int = 3) -> torch.Tensor:
    return torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(seed))


def checked(format_: Format, item: Exportable, folder: Path, ids: torch.Tensor | None = None) -> Transferred:
    """Written, weights and bytes as predicted, confirmed by the runtime, and a float32 twin within its gate."""
    windows = (ids_of(item.config.vocabulary) if ids is None else ids).numpy()
    done = transfer(format_, item, folder / f"model{format_.suffix}", windows=windows)
    assert done.verdict is not None, done.unverified
    assert done.verdict.agrees
    assert twin_difference(format_, item, folder, windows) <= TWIN
    return done
