"""Whole searches of models of real size: peak memory, and the time before, in and after the trials.

    python -m benchmarks.large                                   # 94 million parameters
    python -m benchmarks.large --only 94m 370m 1.3b 7b --folder DIR [--memory-gib 20] [--json]

Each model is the reference made wider and deeper (`benchmarks.widen`), so that it has a perplexity; it is made once and
found again in the folder. The search, of fp16, int8 and nf4, is a process of its own under GNU time, which says the
peak of its resident memory. An evaluation is one of all search windows by the FP32 model, measured in a process of its
own after the search. The certificate's seconds are part of those after the last trial.

Targets: a peak of 1.5 × the checkpoint's bytes + 1.2 GiB where memory allows it, else what `--memory-gib` gives; before
the first trial 8 evaluations; after the last the certificate + 60 s.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from benchmarks.huggingface import REFERENCE
from benchmarks.widen import SIZES, make, weight_files
from search.problem.run_directory import BASELINE, CERTIFICATE, DATABASE, FINGERPRINT, FRONT, RunDirectory
from search.problem.spec import load_spec
from search.problem.splits import load_splits
from search.problem.workspace import plan_of, study_checkpoint
from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.evaluation.memory import let_go_of
from ssm_mp.model import build

ROOT = Path(__file__).parents[1]
GIB = 1 << 30
_LEAVING_SECONDS = 60.0
"""How long a search that was interrupted has to end."""
_PEAK = re.compile(r"Maximum resident set size \(kbytes\): (\d+)")


@dataclass(frozen=True)
class Plan:
    """How much of a search a size gets on two cores: windows of so many tokens in each split, and trials."""

    window: int
    calibration: int
    search: int
    certify: int
    trials: int
    activations: str = "static"
    probe: str = "none"


PLANS = {
    "94m": Plan(128, 16, 16, 64, 24),
    "370m": Plan(128, 8, 16, 32, 8),
    "1.3b": Plan(128, 8, 8, 16, 6, "none"),
    "7b": Plan(64, 8, 4, 16, 4, "none"),
}

Line = tuple[float, str]
"""Seconds since the search began, and what it said."""


@dataclass(frozen=True)
class Row:
    """One size: what was searched, what it took, what was found.

    `peak_bytes` is None where GNU time is missing. Seconds: `before` the first trial began, `trials` until the last was
    done, `after` it, of which `certificate`; `evaluation` of all search windows by the FP32 model. `cost_percent`: how
    much the model's perplexity is above the reference's on the same windows.
    """

    size: str
    plan: Plan
    parameters: int
    checkpoint_bytes: int
    memory_gib: float | None
    peak_bytes: int | None
    before: float
    trials: float
    after: float
    certificate: float
    total: float
    evaluation: float
    perplexity: float
    cost_percent: float
    winner_bytes: int | None
    compression: float | None
    increase_percent: float | None
    verdict: str
    lines: tuple[Line, ...]

    @property
    def aim(self) -> float:
        """The most bytes that the target allows."""
        free = 1.5 * self.checkpoint_bytes + 1.2 * GIB
        return free if self.memory_gib is None else min(free, self.memory_gib * GIB)


@dataclass(frozen=True)
class Ended:
    """A search that has ended: what it said, when it began and ended, its peak in bytes."""

    lines: tuple[Line, ...]
    began: float
    ended: float
    peak_bytes: int | None


def write_study(path: Path, checkpoint: Path, plan: Plan) -> None:
    """The study file of one size."""
    path.write_text(
        f"""[checkpoint]
path = {json.dumps(str(checkpoint.absolute()))}

[data]
text = "python-stdlib"
window = {plan.window}
calibration_windows = {plan.calibration}
search_windows = {plan.search}
certify_windows = {plan.certify}

[precision]
choices = ["fp16", "int8", "nf4"]
activations = "{plan.activations}"

[search]
trials = {plan.trials}
probe = "{plan.probe}"
""",
        encoding="utf-8",
    )


def run_search(study: Path, run: Path, overrides: Sequence[str], timeout: float) -> Ended:
    """A search in a process of its own, told line by line. Raises RuntimeError where it fails or takes too long."""
    timer = shutil.which("time")
    report = run.with_suffix(".time")
    command = [sys.executable, "-P", "-m", "search.cli", "search", str(study), "--run-dir", str(run)]
    command += [part for override in overrides for part in ("--set", override)]
    if timer is not None:
        command = [timer, "-v", "-o", str(report), *command]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    began, lines = time.time(), []
    # GNU time ignores the signal, so that it still says what an interrupted search took
    alarm = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGINT))
    murder = threading.Timer(timeout + _LEAVING_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    alarm.start()
    murder.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append((time.time() - began, line.rstrip()))
            print(f"{lines[-1][0]:8.1f} s  {lines[-1][1]}", file=sys.stderr, flush=True)
        code = process.wait()
    finally:
        alarm.cancel()
        murder.cancel()
    ended = Ended(tuple(lines), began, time.time(), peak_of(report) if timer else None)
    if code != 0 and not (run / FRONT).exists():  # 1 also where nothing could be certified
        said = "\n".join(line for _, line in lines[-5:])
        peak = "" if ended.peak_bytes is None else f" at a peak of {ended.peak_bytes:,} bytes"
        raise RuntimeError(f"{study}: the search ended with {code} after {ended.ended - began:.0f} s{peak}:\n{said}")
    return ended


def peak_of(report: Path) -> int:
    """Peak of resident memory in bytes, from what `time -v` wrote."""
    found = _PEAK.search(report.read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"{report}: expected GNU time's 'Maximum resident set size', as `time -v` writes it")
    return 1024 * int(found[1])


def trials_between(run: Path) -> tuple[float, float]:
    """When the first trial began and the last one was done, in seconds of the epoch."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{run / DATABASE}")
    (summary,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study_name=summary.study_name, storage=storage).trials
    began = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start is not None]
    done = [trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete is not None]
    return min(began), max(done)


def certificate_seconds(lines: Sequence[Line]) -> float:
    """From the line that a certificate begins to the next that is no progress of it; 0 where there was none."""
    starts = [i for i, (_, line) in enumerate(lines) if line.startswith("certifying on ")]
    if not starts:
        return 0.0
    after = (at for at, line in lines[starts[-1] + 1 :] if not line.startswith("certify"))
    return next(after, lines[-1][0]) - lines[starts[-1]][0]


def evaluate_fp32(study: Path, overrides: Sequence[str]) -> dict[str, float]:
    """Seconds of an evaluation of all search windows by the FP32 model, and the reference's perplexity on them.

    Layer by layer where the search would go so.
    """
    spec = load_spec(study, overrides)
    checkpoint, reference = study_checkpoint(spec), load_checkpoint(REFERENCE)
    windows = load_splits(spec, checkpoint.config).search
    perplexity = evaluate(build(reference.config, reference.tensors), windows).perplexity
    after_layer = let_go_of if plan_of(spec, checkpoint).layer_by_layer else None
    model = build(checkpoint.config, checkpoint.tensors, after_layer=after_layer)
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 30:
        began = time.perf_counter()
        evaluate(model, windows)
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds), "reference": perplexity}


def _evaluated_apart(study: Path, overrides: Sequence[str]) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, "-m", "benchmarks.large", "--evaluate", str(study), "--set", *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(size: str, plan: Plan, folder: Path, overrides: Mapping[str, str], timeout: float) -> Row:
    """One size: its model, its search, its figures."""
    checkpoint = folder / size
    make(SIZES[size], checkpoint)
    study, run = folder / f"{size}.toml", folder / f"{size}-run"
    write_study(study, checkpoint, plan)
    if run.exists():
        if not (run / FINGERPRINT).exists():
            raise RuntimeError(f"{run}: expected the run directory of a former measurement; remove it")
        shutil.rmtree(run)  # a search that is continued measures nothing
    changed = [f"{key}={value}" for key, value in overrides.items()]
    ended = run_search(study, run, changed, timeout)
    first, last = trials_between(run)
    fp32 = _evaluated_apart(study, changed)
    held = RunDirectory(run)
    front, certificate, baseline = held.read_json(FRONT), held.read_json(CERTIFICATE), held.read_json(BASELINE)
    winner = next((point for point in front["front"] if point["trial"] == front["winner"]), None)
    memory = overrides.get("search.memory_gib")
    return Row(
        size=size,
        plan=plan,
        parameters=baseline["bytes"] // 4,
        checkpoint_bytes=sum(path.stat().st_size for path in weight_files(checkpoint)),
        memory_gib=None if memory is None else float(memory),
        peak_bytes=ended.peak_bytes,
        before=first - ended.began,
        trials=last - first,
        after=ended.ended - last,
        certificate=certificate_seconds(ended.lines),
        total=ended.ended - ended.began,
        evaluation=fp32["seconds"],
        perplexity=baseline["perplexity"],
        cost_percent=100 * (baseline["perplexity"] / fp32["reference"] - 1),
        winner_bytes=None if winner is None else winner["bytes"],
        compression=None if winner is None else winner["compression"],
        increase_percent=None if certificate is None else certificate["increase_percent"],
        verdict="none within the budget" if certificate is None else certificate["verdict"],
        lines=ended.lines,
    )


def table(rows: Sequence[Row]) -> str:
    """All sizes in Markdown, for people: memory and time, then what was found."""
    lines = [
        "| model | parameters | checkpoint | peak memory | of the target | before the first trial | trials | after the "
        "last (certificate) | total |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peak, part = ("?", "?")
        if row.peak_bytes is not None:
            peak, part = f"{row.peak_bytes / GIB:.2f} GiB", f"{row.peak_bytes / row.aim:.2f}"
        lines.append(
            f"| {row.size} | {row.parameters / 1e6:,.0f} M | {row.checkpoint_bytes / GIB:.2f} GiB | {peak} | {part} | "
            f"{row.before:.0f} s = {row.before / row.evaluation:.1f} evaluations | {row.trials:.0f} s of "
            f"{row.plan.trials} | {row.after:.0f} s ({row.certificate:.0f} s) | {row.total:.0f} s |"
        )
    lines += [
        "",
        "| model | perplexity, over the reference's | inputs | winner | compression | increase | certificate |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = "– | – | –"
        if row.winner_bytes is not None and row.increase_percent is not None:
            found = f"{row.winner_bytes:,} bytes | {row.compression:.2f}× | {row.increase_percent:+.2f} %"
        lines.append(
            f"| {row.size} | {row.perplexity:.2f}, {row.cost_percent:+.2f} % | {row.plan.activations} | {found} | "
            f"{row.verdict} |"
        )
    return "\n".join(lines)


def _asked(plan: Plan, given: argparse.Namespace) -> Plan:
    changed = {name: value for name in ("trials", "probe", "activations") if (value := getattr(given, name))}
    return replace(plan, **changed)


def main() -> None:
    """Measure and print a table, or one JSON object."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=SIZES, default=["94m"])
    arguments.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ssm-mp-large")
    arguments.add_argument("--trials", type=int)
    arguments.add_argument("--probe", choices=("none", "gradient", "measured"))
    arguments.add_argument("--activations", choices=("none", "dynamic", "static"))
    arguments.add_argument("--memory-gib", type=float)
    arguments.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the study, as in ssm-mp")
    arguments.add_argument("--timeout", type=float, default=6 * 3600.0, help="seconds of one search")
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--evaluate", type=Path, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.evaluate is not None:
        print(json.dumps(evaluate_fp32(given.evaluate, given.set)))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    overrides = dict(one.partition("=")[::2] for one in given.set)
    if given.memory_gib is not None:
        overrides["search.memory_gib"] = str(given.memory_gib)
    rows = []
    for size in given.only:
        print(f"measuring {size}", file=sys.stderr)
        rows.append(measure(size, _asked(PLANS[size], given), given.folder, overrides, given.timeout))
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "sizes": [asdict(row) for row in rows]}
    print(json.dumps(found) if given.json else table(rows))


if __name__ == "__main__":
    main()
