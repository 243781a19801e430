"""What is kept of a model's components, to show a search without its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.run_directory import COMPONENTS, FINGERPRINT, RunDirectory
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from search.run.components import keep_components, stored_components
from tests.tiny import write_study


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return open_workspace(load_spec(write_study(tmp_path_factory.mktemp("study"))))


@pytest.fixture
def run(tmp_path: Path, workspace: Workspace) -> RunDirectory:
    """A run directory of the study, in which nothing is kept yet."""
    found = RunDirectory(tmp_path)
    found.write_json(FINGERPRINT, {"space": workspace.space.to_json()})
    return found


def test_bytes_of_any_map_are_the_sum_of_what_is_kept(run: RunDirectory, workspace: Workspace) -> None:
    keep_components(run, workspace)
    rows = stored_components(run)
    scheme = workspace.spec.precision.activations
    for chosen in (workspace.space.widest(), workspace.space.lowest()):
        held = chosen.to_json()
        total = sum(row["bytes"][held[row["name"]]] for row in rows)
        assert total == chosen.bytes(workspace.space.components, scheme)
    assert {row["name"] for row in rows if row["pinned"]} == workspace.space.pins


def test_it_is_written_once_by_many_workers_and_anew_where_it_is_damaged(
    run: RunDirectory, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_components(run, workspace)
    kept = (run / COMPONENTS).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_text", lambda *_: pytest.fail("written again"))
        keep_components(run, workspace)
    (run / COMPONENTS).write_bytes(kept[:100])
    keep_components(run, workspace)
    assert (run / COMPONENTS).read_bytes() == kept


def test_what_is_missing_is_one_error_that_says_what_writes_it(run: RunDirectory, workspace: Workspace) -> None:
    with pytest.raises(StudyError, match=r"components\.json: missing.*`ssm-mp search` or `finish` writes it"):
        stored_components(run)
    keep_components(run, workspace)
    grown = {name: [*choices, "nf4"] for name, choices in workspace.space.to_json().items()}
    run.write_json(FINGERPRINT, {"space": grown})
    with pytest.raises(StudyError, match=r"of a smaller space \(it lacks embedding\)"):
        stored_components(run)
    run.write_json(COMPONENTS, {"components": [{"kind": "norm"}]})
    with pytest.raises(StudyError, match=r"components\.json: damaged \('name'\)"):
        stored_components(run)
