"""Which rounding a study has, what its fingerprint says of it, and that weights are rounded once a run directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from search.base.errors import StudyError
from search.problem import rounding
from search.problem.rounding import ROUNDED
from search.problem.run_directory import ROUNDING
from search.problem.spec import StudySpec, load_spec
from search.problem.workspace import Workspace, open_workspace
from ssm_mp.artifact import load_artifact, save_artifact
from ssm_mp.conversion.convert import Converter
from ssm_mp.conversion.rounding import rounded
from ssm_mp.errors import MachineError
from ssm_mp.files.safetensors_file import write_safetensors
from ssm_mp.modules.parameter import held_by
from ssm_mp.precision_map import PrecisionMap
from tests.families.models import write_family_study
from tests.tiny import write_study

NARROW = '[precision]\nactivations = "none"\nchoices = ["fp16", "int8", "nf4", "int3"]\n'
SYNTHETIC = 'data.calibration="synthetic"'


@pytest.fixture
def spec(tmp_path: Path) -> StudySpec:
    return load_spec(write_study(tmp_path, extra=NARROW, windows=(16, 8, 16)), [])


def changed(spec: StudySpec, *overrides: str) -> StudySpec:
    return load_spec(spec.path, list(overrides))


def no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "rounded", lambda *_: pytest.fail("rounded again"))


def rounds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets an entry each time that rounding is done from now on."""
    done: list[str] = []

    def counted(*given: Any) -> Iterable[Any]:
        done.append("rounded")
        return rounded(*given)

    monkeypatch.setattr(rounding, "rounded", counted)
    return done


def weights(workspace: Workspace, precision: str = "int3") -> dict[str, torch.Tensor]:
    """The numbers of every free component's weight at a precision, by what the study converts with."""
    rules = {"*": "fp16"} | {name: precision for name, held in workspace.space.choices.items() if precision in held}
    model = workspace.converter.convert(PrecisionMap.from_rules(rules, workspace.space.components))
    names = [c.name for c in workspace.space.components if any(p.leaf == "weight" for p in c.parameters)]
    return {name: held_by(model.component(name), "weight").tensor() for name in names}


def same(one: Workspace, other: Workspace) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_below_8_bits_are_compensated_where_calibration_is_from_text(spec: StudySpec) -> None:
    workspace = open_workspace(spec)
    assert workspace.compensates
    assert workspace.fingerprint()[ROUNDING]["rule"] == "compensated"
    assert same(workspace, open_workspace(changed(spec, 'precision.rounding="compensated"')))
    assert not same(workspace, open_workspace(changed(spec, 'precision.rounding="nearest"')))


def test_with_synthetic_calibration_they_are_the_nearest(spec: StudySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    no_rounding(monkeypatch)
    workspace = open_workspace(changed(spec, SYNTHETIC))
    assert not workspace.compensates
    assert workspace.fingerprint()[ROUNDING]["rule"] == "nearest"


def test_nearest_is_what_a_converter_without_rounded_weights_gives(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_rounding(monkeypatch)
    workspace = open_workspace(changed(spec, 'precision.rounding="nearest"'), cache=tmp_path / "run")
    plain = Converter(workspace.model, workspace.spec.precision.scheme)
    precision_map = PrecisionMap.from_rules({"*": "nf4"}, workspace.space.components)
    ids = workspace.splits.search.ids
    assert torch.equal(workspace.converter.convert(precision_map)(ids), plain.convert(precision_map)(ids))
    assert not (tmp_path / "run" / ROUNDED).exists()


@pytest.mark.parametrize("overrides", [(), ('precision.rounding="nearest"',), ('precision.rounding="compensated"',)])
def test_a_study_without_such_weights_says_nothing_of_rounding(
    spec: StudySpec, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So run directories of before stay what they are."""
    no_rounding(monkeypatch)
    workspace = open_workspace(changed(spec, 'precision.choices=["fp16", "int8"]', *overrides))
    assert ROUNDING not in workspace.fingerprint()
    assert not workspace.compensates


def test_the_rule_changes_the_fingerprint(spec: StudySpec) -> None:
    prints = [
        open_workspace(changed(spec, f'precision.rounding="{rule}"')).fingerprint_digest
        for rule in ("nearest", "compensated")
    ]
    assert prints[0] != prints[1]


def test_compensated_and_synthetic_is_an_error_that_says_what_to_set(spec: StudySpec) -> None:
    with pytest.raises(StudyError, match=r'(?s)rounding = "compensated".*calibration = "synthetic".*"text"'):
        open_workspace(changed(spec, SYNTHETIC, 'precision.rounding="compensated"'))


def test_moments_beyond_memory_are_an_error_where_asked_for_and_said_where_not(
    spec: StudySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "moment_bytes", lambda _: 3 << 60)
    said: list[str] = []
    workspace = open_workspace(spec, said.append)
    assert not workspace.compensates
    assert workspace.fingerprint()[ROUNDING]["rule"] == "nearest"
    assert [line for line in said if "rounded to the nearest" in line and "memory_gib" in line]
    with pytest.raises(StudyError, match=r"second moments .* memory_gib to 9663676416"):
        open_workspace(changed(spec, 'precision.rounding="compensated"'))


def test_a_run_that_is_opened_again_rounds_nothing(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = tmp_path / "run", list[str]()
    first = open_workspace(spec, said.append, run)
    assert any(line.startswith("compensating rounding by 16 calibration windows") for line in said)
    no_rounding(monkeypatch)
    said.clear()
    second = open_workspace(spec, said.append, run)
    assert not [line for line in said if "rounding" in line]
    assert same(first, second)
    assert first.fingerprint() == second.fingerprint()
    free = {name for name, held in second.space.choices.items() if "nf4" in held}
    kept = {path.stem for path in (run / ROUNDED).glob("*.safetensors")}
    assert kept <= free
    assert {"embedding", "layers.0.ssm.in_proj"} <= kept
    assert not list((run / ROUNDED).glob(".*"))


def test_without_a_folder_the_weights_are_the_same(spec: StudySpec, tmp_path: Path) -> None:
    assert same(open_workspace(spec), open_workspace(spec, cache=tmp_path / "run"))


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "gone", "flipped", "list", "list of others"])
def test_a_damaged_folder_is_said_and_made_again(
    spec: StudySpec, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    first = open_workspace(spec, cache=run)
    path, names = run / ROUNDED / "layers.0.ssm.in_proj.safetensors", run / ROUNDED / "components.json"
    content, listed = path.read_bytes(), names.read_text()
    if damage == "gone":
        path.unlink()
    elif damage.startswith("list"):
        names.write_text(listed[:-9] if damage == "list" else listed.replace('"embedding"', '"another"'))
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.unlink()  # the first workspace has it mapped
        path.write_bytes({"cut": content[:-40], "empty": b"", "foreign": b"nothing" * 9, "flipped": flipped}[damage])
    done, said = rounds(monkeypatch), list[str]()
    assert same(open_workspace(spec, said.append, run), first)
    assert len(done) == 1
    damaged = [line for line in said if "damaged" in line]
    assert [str(run / ROUNDED) in line for line in damaged] == ([] if damage == "gone" else [True])
    assert (path.read_bytes(), names.read_text()) == (content, listed)
    open_workspace(spec, cache=run)
    assert len(done) == 1


@pytest.mark.parametrize(
    "override",
    [
        "data.calibration_windows=20", 'precision.choices=["fp16", "nf4"]', 'precision.pin=["embedding"]',
        "precision.embedding_blocks=[10]",
    ],
)  # fmt: skip
def test_of_other_windows_precisions_or_components_they_are_made_again(
    spec: StudySpec, tmp_path: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    open_workspace(spec, cache=run)
    done, said = rounds(monkeypatch), list[str]()
    found = open_workspace(changed(spec, override), said.append, run)
    assert len(done) == 1
    assert not [line for line in said if "damaged" in line]
    alone = open_workspace(changed(spec, override))
    precision = found.space.choices["layers.0.ssm.in_proj"][-1]
    one, other = weights(found, precision), weights(alone, precision)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_not_rounded_by_windows_is_kept_over(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    first = open_workspace(spec, cache=run)
    no_rounding(monkeypatch)
    overrides = ("search.trials=7", "data.search_windows=6", 'precision.group="layer"')
    assert same(first, open_workspace(changed(spec, *overrides), cache=run))


def test_what_others_left_in_the_folder_is_removed(spec: StudySpec, tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_workspace(spec, cache=run)
    before = {path.name for path in (run / ROUNDED).iterdir()}
    (run / ROUNDED / ".embedding.1.partial").write_bytes(b"of a process that was killed")
    open_workspace(changed(spec, 'precision.pin=["embedding"]'), cache=run)
    assert {path.name for path in (run / ROUNDED).iterdir()} == before - {"embedding.safetensors"}


def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ROUNDED).write_text("a file is in the way")
    with pytest.raises(MachineError, match=r"rounded weights cannot be kept there.*--run-dir"):
        open_workspace(spec, cache=run)


def test_a_disk_that_is_full_leaves_nothing_that_would_be_read(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    written = list[Path]()

    def until_full(path: Path, *rest: Any) -> None:
        write_safetensors(path, *rest)
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(rounding, "write_safetensors", until_full)
    with pytest.raises(MachineError, match="No space left on device"):
        open_workspace(spec, cache=run)
    assert len(list((run / ROUNDED).iterdir())) == 2
    monkeypatch.undo()
    done = rounds(monkeypatch)
    assert same(open_workspace(spec, cache=run), open_workspace(spec))
    assert len(done) == 2


def test_an_artifact_with_compensated_weights_needs_nothing_new_to_be_read(spec: StudySpec, tmp_path: Path) -> None:
    workspace = open_workspace(spec, cache=tmp_path / "run")
    rules = {"*": "nf4", "layers.0.*": "int3", "layers.1.ssm.out_proj": "int8"}
    precision_map = PrecisionMap.from_rules(rules, workspace.space.components)
    model = workspace.converter.convert(precision_map)
    folder = save_artifact(tmp_path / "artifact", model, precision_map, workspace.spec.precision.scheme, {})
    ids = workspace.splits.search.ids
    assert torch.equal(load_artifact(folder)(ids), model(ids))


@pytest.mark.parametrize("experts", ["each", "together"])
def test_experts_are_kept_and_read_back(experts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_family_study(tmp_path, "lfm2_moe/plain", windows=(16, 4, 4))
    asked = [f"precision.experts={experts}", 'precision.choices=["fp16", "nf3g32"]']
    first = open_workspace(load_spec(study, asked), cache=tmp_path / "run")
    no_rounding(monkeypatch)
    second = open_workspace(load_spec(study, asked), cache=tmp_path / "run")
    one, other = weights(first, "nf3g32"), weights(second, "nf3g32")
    assert all(torch.equal(one[name], other[name]) for name in one)
