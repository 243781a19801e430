"""How often a certified winner breaks the budget on the reference model, over resamplings of its windows.

    python -m benchmarks.resampling [--resamplings 20] [--cache FILE] [--json]      # about ten minutes on one core

Sixteen maps near the budget and FP32 are evaluated once on a large pool of windows from the study's search and
certify parts: the smallest that the surrogate predicts within increases from 2 % to 5.5 %, probed on 32 windows. On
the pool they cost about 1.4 times as much, so that they lie on both sides of the budget. Each resampling then draws
search windows from the pool, which choose the front, and certify windows, which certify it, in four looks with one
ledger: half of the maps; the same again; all maps; twice the certify windows. Maps are tested in sequences, as the
project does, and beside that each for a share of its own, as version 0.5 did.

The truth is each map's increase on the whole pool. That is a truth about a finite pool, in this sense only:

- "disjoint": search and certify windows are drawn without replacement and never overlap. What is drawn is a large
  part of the pool, so its mean lies closer to the pool's than the certificate assumes: this can only look too good.
- "independent": every window is drawn with replacement. The pool is then the whole population and its mean the
  exact truth; the certificate has no advantage, and the two splits are independent.

Neither says anything of text from elsewhere. Windows of one file resemble each other, so that another library's
mean scatters more than windows drawn from this one do. Two figures say how much:

- "runs": runs of neighbouring windows of the text, about a file each, are drawn with replacement, as if each study
  had a library of its own of the same kind. Of 32 windows: a first look has 16 runs, few, but enough for bounds over
  documents; "runs of 16" has 32 runs. Bounds over the runs keep the promise, those over windows beside them do not.
- `file_effect`: the variance of the mean from such runs, over the variance from single windows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.looks import (
    BUDGET,
    BUDGET_PERCENT,
    HEADINGS,
    Look,
    Outcome,
    Rule,
    Summary,
    certifying,
    judge_study,
    points_of,
    row_of,
    summarise,
)
from benchmarks.synthetic import Floats, Ints
from search.base.certifiable import Certifying, alike_near
from search.base.front import Point
from search.problem.run_directory import RunDirectory
from search.problem.space import Space
from search.problem.spec import load_spec
from search.problem.splits import load_splits
from search.problem.workspace import Workspace
from search.results.certify import Held, held_of
from search.run.prepare import prepare
from search.sampling.catalogue import catalogue_of
from search.sampling.surrogate import Surrogate, smallest_within
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import ActivationScheme

Draw = Literal["disjoint", "independent", "runs", "runs of 16"]

SEARCH_WINDOWS, CERTIFY_WINDOWS = 128, 512
PROBE_WINDOWS = 32
"""Enough to find maps near the budget; which ones they are is fixed before any resampling."""

_NEIGHBOURS = 32
"""Windows in a run of neighbouring ones: about as many as a file of the library has."""


@dataclass(frozen=True)
class Way:
    """How windows are drawn and maps certified; `told`: whether the certificate knows which run a window is from."""

    draw: Draw
    rule: Rule = "sequence"
    told: bool = False

    @property
    def name(self) -> str:
        """For a row."""
        return f"{self.draw}, {self.rule}, by {'documents' if self.told else 'windows'}"


_HOW: tuple[tuple[Rule, bool], ...] = (("per map", False), ("sequence", False), ("sequence", True))
WAYS = tuple(Way(draw, *how) for draw in ("disjoint", "independent", "runs", "runs of 16") for how in _HOW)
"""Where windows are independent, they are told as those of 40 documents at random: what telling alone costs."""
_DOCUMENTS = 40


@dataclass(frozen=True, eq=False)
class Pool:
    """`sizes [m]` in bytes and paired differences `[m, w]`, nats a token, of the maps on every window of the pool.

    The windows of each part stand in the order of the text.
    """

    sizes: Ints
    differences: Floats

    @property
    def truth(self) -> Floats:
        """Log-increases `[m]` on the whole pool."""
        found: Floats = self.differences.mean(axis=1)
        return found


def choose_maps(
    surrogate: Surrogate, space: Space, scheme: ActivationScheme, count: int, low: float, high: float
) -> list[PrecisionMap]:
    """The smallest maps predicted within increases spread evenly from `low` to `high` percent."""
    found = []
    for percent in np.linspace(low, high, count):
        chosen = smallest_within(surrogate, catalogue_of(space, scheme), float(np.log1p(percent / 100)))
        if chosen is not None:
            found.append(space.map(chosen))
    return list(dict.fromkeys(found))


def measure_pool(workspace: Workspace, maps: list[PrecisionMap], windows: list[Windows], cache: Path | None) -> Pool:
    """Evaluate FP32 and all maps on all windows; what `cache` (.npz) holds of them is not evaluated again."""
    held = dict(np.load(cache)) if cache is not None and cache.is_file() else {}
    owner = workspace.fingerprint_digest + "".join(part.digest for part in windows)

    def nll(precision_map: PrecisionMap | None) -> Floats:
        content = owner + json.dumps(None if precision_map is None else precision_map.to_json(), sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        if key not in held:
            model = workspace.model if precision_map is None else workspace.converter.convert(precision_map)
            held[key] = np.concatenate([evaluate(model, part).nll for part in windows])
            if cache is not None:
                np.savez(cache, **held)
        found: Floats = held[key]
        return found

    reference = nll(None)
    rows, sizes = [], []
    for candidate in maps:
        rows.append((nll(candidate) - reference) / windows[0].predicted)
        sizes.append(candidate.bytes(workspace.space.components, workspace.spec.precision.activations))
        print(f"{sizes[-1]:,} bytes: {100 * np.expm1(rows[-1].mean()):+.2f} % on the pool", file=sys.stderr)
    return Pool(np.array(sizes), np.stack(rows))


def resample(pool: Pool, way: Way, rng: np.random.Generator) -> Outcome:
    """One study on windows drawn from the pool, against the truth of the whole pool."""
    maps = pool.differences.shape[0]
    drawn, sources = _drawn(pool.differences.shape[1], way.draw, rng)
    order = rng.permutation(maps)  # in which the maps are tried
    differences = pool.differences[order][:, drawn]
    certify_split, from_runs = differences[:, SEARCH_WINDOWS:], sources[SEARCH_WINDOWS:]

    def measure(point: Point, number: int) -> Held:
        return held_of(certify_split[point.trial, :number], from_runs[:number] if way.told else None)

    searched = differences[:, :SEARCH_WINDOWS]
    before = sources[:SEARCH_WINDOWS]
    alike = alike_near(list(searched), before, BUDGET_PERCENT)

    def asked(number: int) -> Certifying:
        return certifying(number, before, from_runs[:number], alike) if way.told else certifying(number)

    spread = searched.std(axis=1, ddof=1) / np.sqrt(SEARCH_WINDOWS)
    points = points_of(pool.sizes[order], searched.mean(axis=1), spread, SEARCH_WINDOWS)
    first = Look(maps // 2, CERTIFY_WINDOWS)
    looks = [first, first, Look(maps, CERTIFY_WINDOWS), Look(maps, 2 * CERTIFY_WINDOWS)]
    return judge_study(points, pool.truth[order], measure, looks, rule=way.rule, asked=asked)


def _drawn(windows: int, how: Draw, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Numbers of the windows that a study draws from the pool, and the document of each."""
    count = SEARCH_WINDOWS + 2 * CERTIFY_WINDOWS
    if how == "disjoint":
        return rng.permutation(windows)[:count], rng.integers(_DOCUMENTS, size=count)
    if how == "independent":
        return rng.integers(windows, size=count), rng.integers(_DOCUMENTS, size=count)
    size = _NEIGHBOURS if how == "runs" else _NEIGHBOURS // 2
    starts = size * rng.integers(windows // size, size=count // size)
    return (starts[:, None] + np.arange(size)).ravel(), np.arange(count) // size


def resample_often(pool: Pool, way: Way, count: int, seed: int = 0) -> Summary:
    """Many resamplings of one pool; the same figures for the same seed."""
    children = np.random.SeedSequence(seed).spawn(count)
    return summarise([resample(pool, way, np.random.default_rng(child)) for child in children])


def file_effect(pool: Pool) -> float:
    """Variance of the mean from runs of neighbouring windows over that from single ones, the maps' median."""
    maps, windows = pool.differences.shape
    runs = windows // _NEIGHBOURS
    kept = pool.differences[:, : runs * _NEIGHBOURS]
    of_runs = kept.reshape(maps, runs, _NEIGHBOURS).mean(axis=2).var(axis=1, ddof=1) / runs
    return float(np.median(of_runs / (kept.var(axis=1, ddof=1) / kept.shape[1])))


def describe(pool: Pool) -> dict[str, Any]:
    """The pool's maps and what their differences look like."""
    centred = pool.differences - pool.truth[:, None]
    sd = centred.std(axis=1)
    return {
        "windows": pool.differences.shape[1],
        "bytes": pool.sizes.tolist(),
        "increase_percent": (100 * np.expm1(pool.truth)).tolist(),
        "within": int((pool.truth <= BUDGET).sum()),
        "sd": sd.tolist(),
        "skewness": ((centred**3).mean(axis=1) / sd**3).tolist(),
        "kurtosis": ((centred**4).mean(axis=1) / sd**4).tolist(),
        "file_effect": file_effect(pool),
    }


def open_pool(study: Path, run_dir: Path, each: int, maps: int, cache: Path | None) -> Pool:
    """Probe the study (or read the probes in the run directory), choose the maps and evaluate them.

    each: windows of the pool from the search part, and as many from the certify part.
    """
    spec = load_spec(study, [f"data.search_windows={PROBE_WINDOWS}"])
    run = RunDirectory.of(spec, run_dir)
    with run.owned():
        prepared = prepare(spec, run, lambda line: print(line, file=sys.stderr))
    workspace = prepared.workspace
    wide = load_spec(study, [f"data.search_windows={each}", f"data.certify_windows={each}"])
    splits = load_splits(wide, workspace.checkpoint.config)
    chosen = choose_maps(
        prepared.surrogate, prepared.workspace.space, prepared.workspace.spec.precision.activations, maps, 2, 5.5
    )
    return measure_pool(workspace, chosen, [splits.search, splits.certify], cache)


def main() -> None:
    """Evaluate the pool, resample it, and print a table in percent, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--study", type=Path, default=Path("studies/reference-cumulative.toml"))
    arguments.add_argument("--run-dir", type=Path, default=Path("runs/resampling"), help="keeps the probes")
    arguments.add_argument("--each", type=int, default=1000, help="windows of the pool from each of the two parts")
    arguments.add_argument("--maps", type=int, default=16)
    arguments.add_argument("--resamplings", type=int, nargs="+", default=[20, 200, 2000])
    arguments.add_argument("--cache", type=Path, help="an .npz file that keeps the maps' values for the next time")
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    pool = open_pool(given.study, given.run_dir, given.each, given.maps, given.cache)
    found = [(way, count, resample_often(pool, way, count)) for way in WAYS for count in given.resamplings]
    if given.json:
        rows = [{**asdict(way), **asdict(summary)} for way, _, summary in found]
        print(json.dumps({"pool": describe(pool), "resamplings": rows}))
        return
    for name, value in describe(pool).items():
        shown = [round(float(x), 3) for x in value] if isinstance(value, list) else round(value, 2)
        print(f"{name}: {shown}")
    print(f"{'resamplings':46} {HEADINGS}")
    for way, count, summary in found:
        print(f"{way.name:40}{count:6} {row_of(summary)}")


if __name__ == "__main__":
    main()
