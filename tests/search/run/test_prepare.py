"""Preparing a study: alone, together, and after others have done part of it."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.base.stop import Stop, WorkInterruptedError
from search.measure.probe import planned
from search.problem.run_directory import BASELINE, PROBES, RunDirectory
from search.problem.spec import StudySpec, load_spec
from search.run.one_worker import open_prepared
from search.run.prepare import MANY_PROBES, Prepared, prepare, prepare_alone, seeds
from search.run.stored import stored_probes
from tests.tiny import write_study

MANY = '[precision]\nchoices = ["fp16", "int8", "nf4", "int4", "int3"]\n'


def spec_of(folder: Path, extra: str = MANY) -> StudySpec:
    return load_spec(write_study(folder, extra=extra))


def quiet(line: str) -> None:
    """Says nothing."""


def keys(run: RunDirectory) -> list[tuple[str, str, str]]:
    lines = [line["probe"] for line in run.read_lines(PROBES)]
    return [(line["end"], line["component"], line["precision"]) for line in lines]


def test_processes_that_prepare_together_measure_every_probe_once(tmp_path: Path) -> None:
    spec, run = spec_of(tmp_path), RunDirectory(tmp_path / "run")
    alone = prepare(spec, RunDirectory(tmp_path / "alone"), quiet)
    found: list[Prepared] = []
    threads = [threading.Thread(target=lambda: found.append(prepare(spec, run, quiet))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    measured = keys(run)
    assert len(measured) == len(set(measured)) == planned(alone.workspace)
    for prepared in found:
        assert prepared.probes == alone.probes
        assert seeds(prepared) == seeds(alone)
        assert prepared.baseline.evaluation.nll.tolist() == alone.baseline.evaluation.nll.tolist()


def test_what_a_killed_worker_left_is_measured_and_nothing_else(tmp_path: Path) -> None:
    spec, run = spec_of(tmp_path), RunDirectory(tmp_path / "run")
    whole = prepare(spec, run, quiet)
    lines = (run / PROBES).read_text().splitlines(keepends=True)
    kept = random.Random(0).sample(lines, len(lines) // 2)
    (run / PROBES).write_text("".join(kept) + lines[0][:20])  # the last line was cut short
    again = prepare(spec, run, quiet)
    assert again.probes == whole.probes
    assert (run / PROBES).read_text().startswith("".join(kept))
    assert len(keys(run)) == len(lines)


def test_seeds_do_not_depend_on_the_order_in_which_probes_were_measured(tmp_path: Path) -> None:
    spec, run = spec_of(tmp_path), RunDirectory(tmp_path / "run")
    first = seeds(prepare(spec, run, quiet))
    lines = (run / PROBES).read_text().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    (run / PROBES).write_text("".join(lines))
    assert seeds(prepare(spec, run, quiet)) == first


def test_many_probes_are_left_to_the_workers_and_few_are_not(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "many")
    assert prepare_alone(spec_of(tmp_path), run, quiet, Stop()) is None
    assert run.read_lines(PROBES) == []
    assert run.read_json(BASELINE)["ends"].keys() == {"widest", "lowest"}
    few = spec_of(tmp_path, extra="")
    prepared = prepare_alone(few, RunDirectory(tmp_path / "few"), quiet, Stop())
    assert prepared is not None
    assert (
        len(prepared.probes)
        == planned(prepared.workspace)
        <= MANY_PROBES
        < planned(prepare(spec_of(tmp_path), run, quiet).workspace)
    )


def test_a_baseline_of_another_fingerprint_is_measured_anew(tmp_path: Path) -> None:
    spec, run = spec_of(tmp_path, extra=""), RunDirectory(tmp_path / "run")
    true = prepare(spec, run, quiet).baseline.perplexity
    stored = run.read_json(BASELINE)
    (run / BASELINE).write_text(json.dumps({**stored, "nll": [1.0] * len(stored["nll"]), "fingerprint": "other"}))
    assert prepare(spec, run, quiet).baseline.perplexity == true


def test_a_signal_ends_probing_between_two_layers_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, run, stop = spec_of(tmp_path), RunDirectory(tmp_path / "run"), Stop()
    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks > 25:
            raise WorkInterruptedError("SIGTERM")

    monkeypatch.setattr(stop, "check", check)
    with pytest.raises(WorkInterruptedError):
        prepare(spec, run, quiet, stop)
    kept = keys(run)
    assert kept
    prepare(spec, run, quiet)
    assert keys(run)[: len(kept)] == kept
    assert len(keys(run)) == len(set(keys(run)))


@pytest.mark.parametrize(
    ("before", "now", "kept_ends"),
    [
        (["fp16", "int8"], ["fp16", "int8", "nf4"], {"widest"}),
        (["fp16", "int8", "nf4"], ["fp16", "int8", "nf4", "int3"], {"widest"}),
        (["fp16", "int8", "int3"], ["fp16", "int8", "nf4", "int3"], {"widest", "lowest"}),
    ],
)
def test_probes_are_kept_where_their_end_stands_and_others_measured(
    tmp_path: Path, before: list[str], now: list[str], kept_ends: set[str]
) -> None:
    run, said = RunDirectory(tmp_path / "run"), list[str]()

    def spec(choices: list[str]) -> StudySpec:
        return load_spec(write_study(tmp_path, extra=f"[precision]\nchoices = {choices}\n"))

    first = prepare(spec(before), run, quiet)
    measured_before = len(keys(run))
    prepared = prepare(spec(now), run, said.append)
    assert prepared.probes == prepare(spec(now), RunDirectory(tmp_path / "fresh"), quiet).probes
    valid = [probe for probe in first.probes if probe.end in kept_ends]
    assert f"{len(valid)} of {len(first.probes)} probes are taken over" in "\n".join(said)
    assert len(keys(run)) == measured_before + planned(prepared.workspace)
    prepare(spec(now), run, quiet)
    assert len(keys(run)) == measured_before + planned(prepared.workspace)
    shown = {(probe.end, probe.component, probe.precision): probe for probe in stored_probes(run, gradient=False)}
    assert [shown[probe.end, probe.component, probe.precision] for probe in prepared.probes] == prepared.probes
    assert len(shown) == len(stored_probes(run, gradient=False))


@pytest.mark.slow
def test_latencies_of_a_smaller_space_are_not_taken_over(tmp_path: Path) -> None:
    run, timed = RunDirectory(tmp_path / "run"), 'search.objectives=["compression", "perplexity", "latency"]'
    latency = load_spec(write_study(tmp_path), [timed, "search.trials=1"])
    prepare(latency, run, quiet)
    open_prepared(latency, run, prepare(latency, run, quiet), quiet, many=False)
    wider = load_spec(tmp_path / "tiny.toml", [timed, 'precision.choices=["fp16", "int8", "nf4", "int4", "int3"]'])
    with pytest.raises(StudyError, match="its latencies were measured for the smaller one"):
        prepare(wider, run, quiet)
