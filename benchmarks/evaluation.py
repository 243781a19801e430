"""Candidates an hour: the plain way, ours without and with racing, and the limit of this machine, in one run.

    python -m benchmarks.evaluation [--json] [--choices fp16 int8 …]   # needs transformers; some minutes on two cores
    python -m benchmarks.evaluation --device cuda [--only reference]

The checkpoints are the reference in a Hugging Face folder and the hybrid reference, `studies/hybrid`; the study has the
reference study's windows and scheme (scales from the largest magnitude, as a plain script takes them). First a search
of that study runs, as `ssm-mp search` would, with racing: its maps, in its order, are the candidates, so that racing
sees the maps and the rivals that it sees in use. Then all ways evaluate the same maps in turn, the plain way a few of
them, spread over the search.

A way's candidates an hour are its candidates over the sum of their times. What is made once a study (calibration, each
component at each precision) is outside of the times, for the plain way its input scales as well. `limit_fraction` is
the median, map by map, of the limit's time over ours where every map computes all of its layers;
`limit_fraction_sharing` where it may take layers that a map before has computed, as in a search, which is how `ours` is
measured. `least_seconds` are the shortest times, the ones that other load disturbed least. The limit is that of a
Mamba; the hybrid has none. In JSON the figures of the reference stand at the top, the hybrid's under `hybrid`.

The sampler `front` proposes maps so near to the front that few can be left before their last window; `windows_raced`
counts them. Other samplers (`--sampler`) try more that are far from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from benchmarks.huggingface import Convert, plain_convert, plain_perplexity, quiet, write_reference
from benchmarks.plain_hybrid import HYBRID, convert_hybrid, transformers_hybrid
from benchmarks.speed_limit import Limit, SpeedLimit
from search.base.stop import Stop
from search.measure.objective import Measured, Objective
from search.problem.run_directory import RunDirectory
from search.problem.spec import SAMPLERS, StudySpec, load_spec
from search.problem.workspace import Workspace
from search.run.one_worker import open_prepared, work_on
from search.run.prepare import Prepared, prepare
from search.trials.attributes import ORIGIN
from search.trials.maps import map_of
from search.trials.owner import this_process
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.precisions.registry import PRECISIONS

PLAIN_CANDIDATES = 8
T = TypeVar("T")

_STUDY = """
[checkpoint]
path = {checkpoint}
[data]
tokenizer = {tokenizer}
window = 128
[precision]
choices = {choices}
activations = "static"
weight_scale = "minmax"
input_scale = "minmax"
[search]
trials = {trials}
sampler = "{sampler}"
device = "{device}"
"""


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is evaluated.

    load: its Hugging Face folder and its model in `transformers`, given where one may be written. convert: how that
    model is rounded by a map, the plain way.
    """

    tokenizer: Path
    load: Callable[[Path], tuple[Path, nn.Module]]
    convert: Convert


def _reference(folder: Path) -> tuple[Path, nn.Module]:
    return folder / "checkpoint", write_reference(folder / "checkpoint")


def _hybrid(folder: Path) -> tuple[Path, nn.Module]:
    return HYBRID.resolve(), transformers_hybrid(HYBRID)


SUBJECTS = {
    "reference": Subject(Path("studies/reference/tokenizer.json"), _reference, plain_convert),
    "hybrid": Subject(HYBRID / "tokenizer.json", _hybrid, convert_hybrid),
}


@dataclass(frozen=True)
class Candidate:
    """A map that a search tried; `races`: against the maps finished before it, which seeds do not."""

    map: PrecisionMap
    races: bool


@dataclass(frozen=True)
class Timed:
    """One map by every way: seconds, and what they found; the plain way is None where it was not asked, the limit where
    none is known.

    unshared: ours without the layers that maps before have computed for it.
    """

    ours: float
    unshared: float
    racing: float
    limit: Limit | None
    windows_raced: int
    perplexity: float
    plain: float | None
    plain_perplexity: float | None


def write_study(
    folder: Path,
    subject: Subject,
    trials: int,
    choices: Sequence[str],
    sampler: str,
    device: str = "cpu",
    overrides: Sequence[str] = (),
) -> tuple[StudySpec, nn.Module]:
    """The study file with its checkpoint, and the checkpoint's model in `transformers`; `overrides` as `--set` has
    them."""
    checkpoint, model = subject.load(folder)
    study = folder / "huggingface.toml"
    paths = {"checkpoint": checkpoint, "tokenizer": subject.tokenizer.resolve()}
    said = {name: json.dumps(str(path)) for name, path in paths.items()}
    said |= {"trials": str(trials), "choices": json.dumps(list(choices)), "sampler": sampler}
    said["device"] = device
    study.write_text(_STUDY.format(**said), encoding="utf-8")
    return load_spec(study, overrides), model.to(device)


def searched(spec: StudySpec, run: RunDirectory) -> tuple[Prepared, list[Candidate]]:
    """Search the study, and return what was tried, in order."""
    with run.owned():
        prepared = prepare(spec, run, _say)
        opened = open_prepared(spec, run, prepared, _say, many=False)
        work_on(opened, spec, run, prepared, this_process(), _say, Stop())
        trials = sorted(opened.study.get_trials(deepcopy=False), key=lambda trial: trial.number)
    space = prepared.workspace.space
    return prepared, [Candidate(space.map(map_of(trial)), trial.user_attrs.get(ORIGIN) in SAMPLERS) for trial in trials]


def measure(prepared: Prepared, model: nn.Module, convert: Convert, candidates: Sequence[Candidate]) -> list[Timed]:
    """Every map by every way in turn."""
    workspace = prepared.workspace
    windows = workspace.splits.search
    config = workspace.checkpoint.config
    limit = None
    if isinstance(config, MambaConfig):
        limit = SpeedLimit(config, workspace.space.components, windows, workspace.model.device)
    scales = input_scales(workspace)
    # each has a cache of its own: what one keeps, the others do not see
    whole, racer = (Objective(workspace, prepared.baseline) for _ in range(2))
    alone = Objective(_without_cache(workspace), prepared.baseline)
    asked = {round(i) for i in np.linspace(0, len(candidates) - 1, PLAIN_CANDIDATES)}
    finished: list[tuple[int, np.ndarray]] = []
    found = []
    for number, candidate in enumerate(candidates):
        held = candidate.map.to_json()
        plain, expected = None, None
        if number in asked:
            plain, expected = _timed(partial(plain_perplexity, model, held, scales, windows, convert))
        ours, measured = _timed(lambda c=candidate: whole(c.map))  # type: ignore[misc]
        unshared, _ = _timed(lambda c=candidate: alone(c.map))  # type: ignore[misc]
        racing, raced = _timed(lambda c=candidate: _race(racer, workspace, c, finished))  # type: ignore[misc]
        if raced.stopped is None:
            finished.append((raced.bytes, raced.differences))
        found.append(
            Timed(
                ours,
                unshared,
                racing,
                None if limit is None else limit.measure(held),
                raced.increase.windows,
                measured.perplexity,
                plain,
                expected,
            )
        )
        _say(f"{number + 1} of {len(candidates)} candidates")
    _say(f"layers found computed: {whole.reuse}, by racing maps {racer.reuse}")
    return found


def _without_cache(workspace: Workspace) -> Workspace:
    """The same study, in which no layer's input is kept."""
    spec = workspace.spec
    search = spec.search.model_copy(update={"shared_mib": 0})
    return replace(workspace, spec=spec.model_copy(update={"search": search}))


def _race(
    objective: Objective, workspace: Workspace, candidate: Candidate, finished: Sequence[tuple[int, np.ndarray]]
) -> Measured:
    rivals = list(finished) if candidate.races else []
    return objective.race(candidate.map, rivals, workspace.spec.search.racing_error)


def input_scales(workspace: Workspace) -> dict[str, float]:
    """The static scale of every product's inputs, by component."""
    rule = workspace.spec.precision.scheme.input_scales
    statistics_of = calibrate(workspace.model, workspace.splits.calibration)
    return {name: float(found.scale(rule)) for name, found in statistics_of.items()}


def _timed(run: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def limits(timed: Sequence[Timed]) -> dict[str, Any]:
    """The figures of the limit; none where it is not known."""
    pairs = [(t, t.limit) for t in timed if t.limit is not None]
    if not pairs:
        return {}
    return {
        "limit": 3600 / statistics.mean(limit.seconds for _, limit in pairs),
        "limit_fraction": statistics.median(limit.seconds / t.unshared for t, limit in pairs),
        "limit_fraction_sharing": statistics.median(limit.seconds / t.ours for t, limit in pairs),
        "limit_seconds": {
            part: statistics.median(getattr(limit, part) for _, limit in pairs)
            for part in ("products", "exponentials", "logits")
        },
    }


def summarise(timed: Sequence[Timed], windows: int, length: int) -> dict[str, Any]:
    """The figures of the run; `length` tokens a window."""
    plain = statistics.mean(t.plain for t in timed if t.plain is not None)
    ours, unshared = statistics.mean(t.ours for t in timed), statistics.mean(t.unshared for t in timed)
    racing = statistics.mean(t.racing for t in timed)
    raced = statistics.mean(t.windows_raced for t in timed)
    least_limit = {"limit": min(t.limit.seconds for t in timed if t.limit)} if all(t.limit for t in timed) else {}
    differences = [
        abs(t.plain_perplexity / t.perplexity - 1) for t in timed if t.plain_perplexity is not None
    ]  # fmt: skip
    return {
        "plain": 3600 / plain,
        "ours": 3600 / ours,
        "ours_racing": 3600 / racing,
        "ratio": plain / ours,
        "ratio_racing": plain / racing,
        **limits(timed),
        "ours_unshared": 3600 / unshared,
        "seconds": {"plain": plain, "ours": ours, "ours_unshared": unshared, "ours_racing": racing},
        "least_seconds": {
            "plain": min(t.plain for t in timed if t.plain is not None),
            "ours": min(t.ours for t in timed),
            "ours_unshared": min(t.unshared for t in timed),
            **least_limit,
        },
        "tokens_per_second": {
            "plain": windows * length / plain,
            "ours": windows * length / ours,
            "ours_racing": raced * length / racing,
        },
        "largest_relative_difference_of_perplexity": max(differences),
        "perplexity": {"least": min(t.perplexity for t in timed), "most": max(t.perplexity for t in timed)},
        "candidates": len(timed),
        "plain_candidates": len(differences),
        "windows": windows,
        "window_length": length,
        "windows_raced": {str(n): sum(t.windows_raced == n for t in timed) for n in sorted(_rungs(timed))},
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _rungs(timed: Iterable[Timed]) -> set[int]:
    return {t.windows_raced for t in timed}


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def evaluated(
    name: str, trials: int, choices: Sequence[str], sampler: str, device: str, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The figures of one checkpoint: its study searched, then its maps by every way."""
    subject = SUBJECTS[name]
    with tempfile.TemporaryDirectory() as folder:
        spec, model = write_study(Path(folder), subject, trials, choices, sampler, device, overrides)
        prepared, candidates = searched(spec, RunDirectory(Path(folder) / "run"))
        windows = prepared.workspace.splits.search
        found = summarise(measure(prepared, model, subject.convert, candidates), len(windows), windows.length)
    found["device"] = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    return found


def _print(name: str, found: dict[str, Any]) -> None:
    cpu = f"{found['threads']} threads, {found['cpu_capability']}"
    print(f"{name}: {cpu if found['device'] == 'cpu' else found['device']}, torch {found['torch']}")
    print(f"{found['candidates']} candidates ({found['plain_candidates']} the plain way), {found['windows']} windows")
    print("             candidates/hour  seconds  tokens/s  over plain")
    for way, ratio in (("plain", 1.0), ("ours", found["ratio"]), ("ours_racing", found["ratio_racing"])):
        print(
            f"{way:12} {found[way]:16.0f} {found['seconds'][way]:8.3f} {found['tokens_per_second'][way]:9.0f}"
            f" {ratio:10.1f}×"
        )
    if "limit" in found:
        parts = ", ".join(f"{part} {seconds:.3f} s" for part, seconds in found["limit_seconds"].items())
        print(f"limit        {found['limit']:16.0f}   {parts}; ours reaches {found['limit_fraction']:.2f} of it,")
        print(f"             {found['limit_fraction_sharing']:.2f} with the layers that maps share")
    print(f"windows seen before a race ended: {found['windows_raced']}")
    print(
        f"perplexities differ from the plain way's by at most {found['largest_relative_difference_of_perplexity']:.1e}"
    )


def main() -> None:
    """Measure and print a table for each checkpoint, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--only", nargs="+", choices=tuple(SUBJECTS), default=tuple(SUBJECTS))
    arguments.add_argument("--trials", type=int, default=64)
    arguments.add_argument("--choices", nargs="+", choices=list(PRECISIONS), default=["fp16", "int8"])
    arguments.add_argument("--sampler", choices=SAMPLERS, default="front")
    arguments.add_argument("--device", default="cpu")
    given = arguments.parse_args()
    quiet()
    found = {
        name: evaluated(name, given.trials, given.choices, given.sampler, given.device) for name in given.only
    }  # fmt: skip
    if given.json:
        print(json.dumps({**found.pop("reference", {}), **found}))
        return
    for name, figures in found.items():
        _print(name, figures)


if __name__ == "__main__":
    main()
