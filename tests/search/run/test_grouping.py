"""Searches in which components move together: what is measured, kept, continued, widened, refused and told."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

import search.run.prepare
from search.base.errors import StudyError
from search.measure.gradient import gradient_effects
from search.measure.probe import GRADIENT, LOWEST, WIDEST, Probe, gathered, planned, probe_from_stored
from search.problem.groups import GROUPS
from search.problem.run_directory import BASELINE, FINGERPRINT, FRONT, PROBES, REPORT, RunDirectory
from search.problem.spec import StudySpec, load_spec
from search.problem.workspace import Workspace, open_workspace
from search.run.grouping import grouped_as_stored
from search.run.one_process import run_search
from search.run.prepare import prepare, seeds
from search.run.stored import redraw, stored_probes
from search.sampling.clusters import sensitivities
from search.trials.maps import map_of
from search.trials.read_back import points
from search.trials.storage import read_study
from ssm_mp.artifact import read_artifact
from ssm_mp.evaluation.evaluate import evaluate, paired_increase
from tests.search.run.test_target import EVEN
from tests.tiny import ITERA, MAMBA, write_study

SMALL = '[search]\ntrials = 6\nseeds = 3\nbudget_percent = 1000\n[precision]\nchoices = ["fp16", "int8", "nf4"]\n'
AUTO = ["precision.group=auto", "precision.max_groups=5", "search.probe=gradient"]
GROUPED = {
    "layer": ["precision.group=layer"],
    "kind": ["precision.group=kind", "search.probe=gradient"],
    "patterns": ['precision.groups=["*.in_proj", "layers.1.*"]', "search.probe=none"],
    "auto": AUTO,
}


def quiet(line: str) -> None:
    """Says nothing."""


def spec_of(folder: Path, *overrides: str, extra: str = SMALL) -> StudySpec:
    study = folder / "tiny.toml"
    return load_spec(study if study.exists() else write_study(folder, config=MAMBA, extra=extra), overrides)


@pytest.mark.parametrize("name", GROUPED)
def test_a_search_ends_with_total_maps_in_which_members_agree(tmp_path: Path, name: str) -> None:
    run, spec = RunDirectory(tmp_path / "run"), spec_of(tmp_path, *GROUPED[name])
    said: list[str] = []
    result = run_search(spec, run, said.append)
    groups = run.groups()
    assert groups
    assert any("free components move in" in line for line in said)
    assert result.counts.finished == 6
    for point in (*result.points, *points(read_study(run), run.space())):
        assert point.map.keys() == {component.name for component in result.components}
        assert all(len({point.map[member] for member in members}) == 1 for members in groups.values())
        size = sum(component.bytes(point.map[component.name], "static") for component in result.components)
        assert point.bytes == size
    assert all(set(map_of(trial)) >= set(groups) for trial in read_study(run).get_trials(deepcopy=False))
    front = json.loads((run / FRONT).read_text())
    assert all(set(point["map"]) == set(run.space()) for point in front["front"])
    winner = read_artifact(run / "winner")
    assert winner.precision_map.to_json() == result.winner.map  # type: ignore[union-attr]
    report = (run / REPORT).read_text()
    assert "## Groups" in report
    assert all(f"`{group}`" in report and f"`{members[0]}`" in report for group, members in groups.items())
    probed = {probe.component for probe in stored_probes(run, spec.search.probe == "gradient")}
    assert probed == (set() if name == "patterns" else set(open_again(spec, run).space.moves))
    assert redraw(spec, run, read_study(run))


def open_again(spec: StudySpec, run: RunDirectory) -> Workspace:
    found = grouped_as_stored(open_workspace(spec), run)
    assert found is not None
    return found


def test_a_measured_probe_of_a_group_moves_all_its_members(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "precision.group=kind")
    prepared = prepare(spec, RunDirectory(tmp_path / "run"), quiet)
    workspace, windows = prepared.workspace, prepared.workspace.splits.search
    assert len(prepared.probes) == planned(workspace) == 4 * len(workspace.space.units)
    ends = {WIDEST: workspace.space.widest(), LOWEST: workspace.space.lowest()}
    for probe in prepared.probes:
        held = ends[probe.end]
        moved = dict.fromkeys(workspace.space.groups.get(probe.component, [probe.component]), probe.precision)
        changed, reference = (evaluate(workspace.converter.convert(m), windows) for m in (held.changed(moved), held))
        direct = paired_increase(changed, reference)
        assert (probe.log_increase, probe.log_stderr) == (direct.log_mean, direct.log_stderr)


def test_gradient_effects_of_a_group_are_the_sums_of_its_members(tmp_path: Path) -> None:
    prepared = prepare(spec_of(tmp_path, *GROUPED["kind"]), RunDirectory(tmp_path / "run"), quiet)
    apart = prepared.workspace.apart
    single = gradient_effects(apart)
    space = prepared.workspace.space
    assert {probe.component for probe in prepared.probes} == set(space.moves)
    for probe in prepared.probes:
        members = space.groups.get(probe.component, [probe.component])
        parts = [single[m][probe.precision].log_increase - single[m]["fp16"].log_increase for m in members]
        assert probe.log_increase == pytest.approx(math.fsum(parts), abs=1e-12)
        assert prepared.surrogate.effects[probe.component][probe.precision] == probe.log_increase
    assert all(len(seed.params) == len(space.moves) for seed in seeds(prepared))


def test_gradients_are_measured_once_for_whatever_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = RunDirectory(tmp_path / "alone")
    whole = prepare(spec_of(tmp_path, "search.probe=gradient"), alone, quiet)
    run = RunDirectory(tmp_path / "run")
    first = prepare(spec_of(tmp_path, *AUTO), run, quiet)
    assert (run / PROBES).read_text() == (alone / PROBES).read_text()
    assert json.loads((run / BASELINE).read_text()) == json.loads((alone / BASELINE).read_text())
    monkeypatch.setattr(search.run.prepare, "measured_gradients", None)
    monkeypatch.setattr(search.run.ends, "measure_baseline", None)
    again = prepare(spec_of(tmp_path, *AUTO), run, quiet)
    assert again.workspace.space.groups == first.workspace.space.groups
    assert again.probes == first.probes == sorted_by_key(gathered(whole.probes, run.space(), run.groups()))


def sorted_by_key(probes: list[Probe]) -> list[Probe]:
    return sorted(probes, key=lambda probe: (probe.end, probe.component, probe.precision))


def test_groups_of_the_tool_are_bounded_of_like_sensitivity_and_the_same_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    prepared = prepare(spec_of(tmp_path, *AUTO), run, quiet)
    space = prepared.workspace.space
    assert 2 < len(space.moves) <= 5
    assert {"embedding", "position_embedding"} < space.moves.keys()
    other = prepare(spec_of(tmp_path, *AUTO), RunDirectory(tmp_path / "other"), quiet)
    assert other.workspace.space.groups == space.groups
    stored = json.loads((run / FINGERPRINT).read_text())[GROUPS]
    assert stored == {"rule": "auto, at most 5", "members": {g: list(m) for g, m in space.groups.items()}}
    probes = {(p.component, p.precision): p.log_increase for p in stored_single(run)}
    saved = np.array([c.bytes("fp16", "static") - c.bytes("nf4", "static") for c in space.free], dtype=float)
    held = sensitivities(np.array([probes[c.name, "nf4"] for c in space.free]), saved)
    at = dict(zip((c.name for c in space.free), held, strict=True))
    layers = [[at[member.name] for member in unit.members] for unit in space.units if unit.members[0].layer is not None]
    ranges = sorted((min(one), max(one)) for one in layers)
    assert len(set(held)) > 2
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))


def stored_single(run: RunDirectory) -> list[Probe]:
    return [probe_from_stored(line["probe"]) for line in run.read_lines(PROBES) if line["probe"]["end"] == GRADIENT]


def test_a_preparation_that_was_killed_before_it_had_groups_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, spec = RunDirectory(tmp_path / "run"), spec_of(tmp_path, *AUTO)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(search.run.grouping, "by_sensitivity", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(spec, run, quiet)
    assert json.loads((run / FINGERPRINT).read_text())[GROUPS] == {"rule": "auto, at most 5", "members": None}
    with pytest.raises(StudyError, match="division into groups .auto, at most 5 → none."):
        prepare(spec_of(tmp_path, "search.probe=gradient"), run, quiet)
    with monkeypatch.context() as patched:
        patched.setattr(search.run.prepare, "measured_gradients", None)  # they are there
        assert prepare(spec, run, quiet).workspace.space.groups


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        (GROUPED["layer"], [], "layer → none"),
        ([], GROUPED["layer"], "none → layer"),
        (GROUPED["layer"], ["precision.group=kind"], "layer → kind"),
        (AUTO, [AUTO[0], "precision.max_groups=6", AUTO[2]], "5 → auto, at most 6"),
        (['precision.groups=["*.in_proj"]'], ['precision.groups=["*.out_proj"]'], "patterns, with other members"),
    ],
)  # fmt: skip
def test_a_run_is_not_continued_with_other_groups(
    tmp_path: Path, first: list[str], then: list[str], said: str
) -> None:  # fmt: skip
    run = RunDirectory(tmp_path / "run")
    prepare(spec_of(tmp_path, *first), run, quiet)
    held = (run / FINGERPRINT).read_text()
    with pytest.raises(StudyError, match=f"another division into groups .*{said}.* restore what changed"):
        prepare(spec_of(tmp_path, *then), run, quiet)
    assert (run / FINGERPRINT).read_text() == held


@pytest.mark.parametrize("name", ["layer", "auto"])
def test_more_choices_take_over_the_trials_of_groups(tmp_path: Path, name: str) -> None:
    run, said = RunDirectory(tmp_path / "run"), list[str]()
    before = run_search(spec_of(tmp_path, *GROUPED[name]), run, quiet)
    wider = 'precision.choices=["fp16", "int8", "nf4", "int3"]'
    after = run_search(spec_of(tmp_path, *GROUPED[name], wider, "search.trials=9"), run, said.append)
    assert any("the space has grown" in line and "6 finished trials" in line for line in said)
    assert [(p.trial, p.map, p.bytes) for p in after.points[:6]] == [(p.trial, p.map, p.bytes) for p in before.points]
    assert after.counts.finished >= 9
    assert any("int3" in point.map.values() for point in after.points)
    assert after.groups == before.groups == run.groups()


def test_too_few_groups_for_what_must_stay_apart_are_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(StudyError, match="max_groups = 2, but 3 must stay apart"):
        prepare(
            spec_of(tmp_path, "precision.group=auto", "precision.max_groups=2", "search.probe=gradient"), run, quiet
        )


@pytest.mark.slow
def test_latencies_of_a_group_are_the_sums_of_its_members(tmp_path: Path) -> None:
    objectives = 'search.objectives=["compression","perplexity","latency"]'
    run = RunDirectory(tmp_path / "run")
    result = run_search(spec_of(tmp_path, "precision.group=layer", "search.probe=none", objectives), run, quiet)
    assert result.latency is not None
    assert {point.latency for point in result.points} == {result.latency.predict(point.map) for point in result.points}
    prepared = prepare(spec_of(tmp_path, "precision.group=layer", "search.probe=none", objectives), run, quiet)
    catalogue = prepared.knowledge.catalogue
    for point in result.points:
        row = catalogue.encode(prepared.workspace.space.chosen(prepared.workspace.space.map(point.map)))
        assert catalogue.by_latency.bytes(row[None])[0] / 1e9 == pytest.approx(point.latency, abs=1e-9)


@pytest.mark.slow
def test_a_group_is_as_large_as_its_members_are_in_the_file_of_a_target(tmp_path: Path) -> None:
    write_study(tmp_path, config=EVEN, windows=(4, 24, 32), extra=SMALL.replace("nf4", "int4"))
    spec = spec_of(tmp_path, "export.target=gguf", "precision.group=layer")
    run = RunDirectory(tmp_path / "run")
    result = run_search(spec, run, quiet)
    workspace = open_workspace(spec)
    assert workspace.space.groups
    for point in result.points:
        assert point.bytes == sum(dict(c.sizes)[point.map[c.name]] for c in workspace.space.components)
    assert result.transferred is not None
    assert result.transferred.plan.bytes == result.winner.bytes  # type: ignore[union-attr]


def test_experts_that_are_one_component_are_one_member(tmp_path: Path) -> None:
    write_study(tmp_path, config=ITERA, extra=SMALL)
    spec = spec_of(tmp_path, "precision.experts=together", "precision.group=layer", 'precision.pin=["*.in_proj"]')
    space = open_workspace(spec).space
    members = space.groups["layer 1"]
    assert any("expert" in member for member in members)
    assert not any(".experts.0." in member for member in members)
    assert not any(member.endswith("in_proj") for held in space.groups.values() for member in held)
