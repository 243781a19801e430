"""Exhaustive oracles: every map of a subspace of a reference model, really converted and really evaluated.

    OMP_NUM_THREADS=1 python -m benchmarks.oracle two --workers 2      # 12 components, 2 precisions, 4096 maps
    OMP_NUM_THREADS=1 python -m benchmarks.oracle three --workers 2    # 8 components, 3 precisions, 6561 maps
    OMP_NUM_THREADS=1 python -m benchmarks.oracle hybrid --workers 2   # 12 components of the hybrid, 4096 maps

Each writes `benchmarks/oracles/NAME.npz`. Maps are walked as a tree in the order of the data flow, so that two
maps share the activations before the first layer in which they differ. An interrupted run continues.

They were measured before rounding was compensated, when `int3` had seven levels and scales had one sign, and still are:
what a sampler is judged by is how effects add up, which that does not change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from search.measure.gradient import gradient_effects
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from ssm_mp.components import fp32_bytes
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import Converter
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import Evaluation, Prefix, advance, evaluate, finish, paired_increase, start
from ssm_mp.modules.parameter import held_by
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.grouped import NF4_BOOK, Grouped
from ssm_mp.precisions.groups import CodeBook

REFERENCE, HYBRID = Path("studies/reference-cumulative.toml"), Path("studies/hybrid-cumulative.toml")
FOLDER = Path("benchmarks/oracles")
GRADIENT_WINDOWS = 16
"""Calibration windows that the gradient probe makes its one pass over."""

_FORMER = (
    Grouped("nf4", CodeBook(4, NF4_BOOK.values)),
    Grouped("int3", CodeBook(3, tuple(map(float, range(-3, 4))))),
)
"""The books of version 0.4."""

_BLOCKS = tuple(f"embedding.blocks.{b}" for b in range(4))
_IN = tuple(f"layers.{i}.ssm.in_proj" for i in range(4))
_OUT = tuple(f"layers.{i}.ssm.out_proj" for i in range(4))
_MIXERS = tuple(f"layers.{i}.mamba.{leaf}" for i in (0, 1, 3) for leaf in ("in_proj", "out_proj"))
_OTHERS = ("layers.2.self_attn.o_proj", "layers.2.shared_mlp.output_linear")


@dataclass(frozen=True)
class Subspace:
    """Free components and their precisions, the widest first; every other component that is not pinned stays int8.

    windows: search windows of the study that the increases are measured on: the oracle's truth.
    """

    study: Path
    components: tuple[str, ...]
    precisions: tuple[str, ...]
    windows: int


SUBSPACES: Mapping[str, Subspace] = {
    "two": Subspace(REFERENCE, (*_BLOCKS, *_IN, *_OUT), ("int8", "int3"), 32),
    "three": Subspace(REFERENCE, (*_BLOCKS, *_IN), ("int8", "nf4", "int3"), 16),
    "hybrid": Subspace(HYBRID, (*_BLOCKS, *_MIXERS, *_OTHERS), ("int8", "int3"), 32),
}
"""Of the first two, the sampler's prior was chosen; the third was made afterwards, and judges it."""


@dataclass(frozen=True, eq=False)
class Oracle:
    """A subspace of which everything is known. A map is a tuple of choices, one index a component.

    log_increase, log_stderr: `[k, …, k]`, one axis a component; sizes `[components, k]` bytes; `fixed` bytes of all
    others; gradient `[components, k]`: estimate of each effect over the widest, without evaluating any map;
    windows_digest: of the windows that it was measured on, which another Python's library does not have.
    """

    components: tuple[str, ...]
    precisions: tuple[str, ...]
    log_increase: np.ndarray
    log_stderr: np.ndarray
    sizes: np.ndarray
    fixed: int
    fp32_bytes: int
    gradient: np.ndarray
    windows_digest: str

    def bytes(self, chosen: Sequence[int]) -> int:
        """Stored bytes of a map."""
        return self.fixed + int(sum(self.sizes[c, k] for c, k in enumerate(chosen)))

    def all_bytes(self) -> np.ndarray:
        """Stored bytes of every map, `[k, …, k]`."""
        total = np.asarray(self.fixed)
        for row in self.sizes:
            total = total[..., None] + row
        return total


def load_oracle(name: str) -> Oracle:
    """A stored oracle."""
    with np.load(FOLDER / f"{name}.npz") as file:
        said = json.loads(str(file["said"]))
        return Oracle(
            components=tuple(said["components"]), precisions=tuple(said["precisions"]),
            log_increase=file["log_increase"], log_stderr=file["log_stderr"], sizes=file["sizes"],
            fixed=said["fixed"], fp32_bytes=said["fp32_bytes"], gradient=file["gradient"],
            windows_digest=said["windows_digest"],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Task:
    """What one process works with."""

    workspace: Workspace
    windows: Windows
    baseline: Evaluation
    base: PrecisionMap


def former_workspace(name: str) -> Workspace:
    """The workspace of a subspace, its components as version 0.4 stored them."""
    subspace = SUBSPACES[name]
    choices = json.dumps(["fp16", *subspace.precisions])
    kept = [f"precision.choices={choices}", 'precision.rounding="nearest"', "data.calibration_windows=64"]
    opened = open_workspace(load_spec(subspace.study, kept))
    scheme, rule = opened.spec.precision.scheme, opened.spec.precision.scheme.weight_scales
    former = {
        (component.name, book.name): book.store(held_by(module, "weight").tensor(), "weight", rule)
        for component in opened.space.free
        if any(parameter.leaf == "weight" for parameter in component.parameters)
        for module in [opened.model.component(component.name)]
        for book in _FORMER
    }
    statistics = calibrate(opened.model, opened.splits.calibration)
    return replace(opened, converter=Converter(opened.model, scheme, statistics, rounded=former))


@cache
def _task(name: str) -> _Task:
    workspace = former_workspace(name)
    windows = Windows(workspace.splits.search.ids[: SUBSPACES[name].windows])
    space = workspace.space
    base = space.map({c.name: "int8" for c in space.free})
    return _Task(workspace, windows, evaluate(workspace.model, windows), base)


def _walk(prefix: Prefix, held: PrecisionMap, name: str) -> Iterator[tuple[float, float]]:
    """Log-increase and its standard error of every map that continues `held` from a layer on, in index order.

    The layers' components are the slowest axes where they come first in the network.
    """
    task, components, precisions = _task(name), SUBSPACES[name].components, SUBSPACES[name].precisions
    model = task.workspace.converter.convert(held)
    if prefix.layer == len(model.layers):
        increase = paired_increase(finish(model, prefix, task.windows), task.baseline)
        yield increase.log_mean, increase.log_stderr
        return
    here = [c for c in components if c.startswith(f"layers.{prefix.layer}.")]
    for chosen in itertools.product(precisions, repeat=len(here)):
        changed = held.changed(dict(zip(here, chosen, strict=True)))
        moved = advance(task.workspace.converter.convert(changed), prefix)
        yield from _walk(moved, changed, name)


def _branch(name: str, chosen: tuple[str, ...]) -> np.ndarray:
    """All maps with these precisions of the embedding's blocks: `[maps, 2]`."""
    task = _task(name)
    held = task.base.changed(dict(zip(_BLOCKS, chosen, strict=True)))
    return np.array(list(_walk(start(task.workspace.converter.convert(held), task.windows), held, name)))


def make(name: str, workers: int, parts: Path) -> Oracle:
    """Evaluate a subspace, keeping each branch in `parts` as it is done."""
    components, precisions = SUBSPACES[name].components, SUBSPACES[name].precisions
    parts.mkdir(parents=True, exist_ok=True)
    branches = list(itertools.product(precisions, repeat=len(_BLOCKS)))
    paths = {chosen: parts / f"{name}-{'-'.join(chosen)}.npy" for chosen in branches}
    missing = [chosen for chosen in branches if not paths[chosen].exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for chosen, found in zip(missing, pool.map(_branch, itertools.repeat(name), missing), strict=True):
            np.save(paths[chosen], found)
            print(f"{name} {'-'.join(chosen)}: {len(found)} maps", file=sys.stderr, flush=True)
    values = np.stack([np.load(paths[chosen]) for chosen in branches])  # [branches, maps, 2]
    layers = range(len(_task(name).workspace.model.layers))
    in_walk = [*_BLOCKS, *(c for i in layers for c in components if c.startswith(f"layers.{i}."))]
    cube = values.reshape(*[len(precisions)] * len(components), 2)
    cube = cube.transpose([*(in_walk.index(c) for c in components), len(components)])
    space = _task(name).workspace.space
    part = {c.name: c for c in space.components}
    sizes = np.array([[part[c].bytes(p, "static") for p in precisions] for c in components])
    fixed = _task(name).base.bytes(space.components, "static") - int(sizes[:, 0].sum())
    calibration = _task(name).workspace.splits.calibration
    effects = gradient_effects(_task(name).workspace, windows=Windows(calibration.ids[:GRADIENT_WINDOWS]))
    over_fp32 = np.array([[effects[c][p].log_increase for p in precisions] for c in components])
    return Oracle(
        components,
        precisions,
        cube[..., 0],
        cube[..., 1],
        sizes,
        fixed,
        fp32_bytes(space.components),
        over_fp32 - over_fp32[:, :1],
        _task(name).windows.digest,
    )


def save(name: str, oracle: Oracle) -> None:
    """Write an oracle as a small file."""
    said = {
        "components": oracle.components, "precisions": oracle.precisions, "fixed": oracle.fixed,
        "fp32_bytes": oracle.fp32_bytes, "windows": SUBSPACES[name].windows, "study": SUBSPACES[name].study.name,
        "windows_digest": oracle.windows_digest,
    }  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(
        FOLDER / f"{name}.npz", said=json.dumps(said), log_increase=oracle.log_increase,
        log_stderr=oracle.log_stderr.astype(np.float32), sizes=oracle.sizes, gradient=oracle.gradient,
    )  # fmt: skip


def main() -> None:
    """Make one oracle."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("name", choices=sorted(SUBSPACES))
    arguments.add_argument("--workers", type=int, default=1)
    arguments.add_argument("--parts", type=Path, default=Path("runs/oracle"), help="where unfinished work is kept")
    given = arguments.parse_args()
    save(given.name, make(given.name, given.workers, given.parts))


if __name__ == "__main__":
    main()
