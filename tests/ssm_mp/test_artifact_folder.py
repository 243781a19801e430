"""The folder of an artifact, whoever is killed, whatever fails, and whatever else is in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ssm_mp import artifact
from ssm_mp.artifact import (
    MAP,
    METRICS,
    TENSORS,
    TOKENIZER,
    read_artifact,
    require_free,
    save_artifact,
    stored_arrays,
)
from ssm_mp.artifact_folder import PICTURE, is_artifact, remove_artifact, write_folder
from ssm_mp.components import find_components
from ssm_mp.conversion.convert import convert
from ssm_mp.errors import ArtifactError
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.tiny import MAMBA, random_model, random_tensors

ROOT = Path(__file__).parents[2]
HIDDEN = ".ssm-mp"


def written(path: Path, perplexity: float, *, replace: bool = True, **extra: bytes) -> Path:
    """An artifact whose tensors, too, tell which it is; further files by the part of their names before the dot."""
    model = random_model(MAMBA, seed=int(perplexity))
    chosen = PrecisionMap.uniform("int8", find_components(model))
    files = {{"tokenizer": TOKENIZER, "allocation": PICTURE}[name]: data for name, data in extra.items()}
    converted = convert(model, chosen, Scheme("none"))
    return save_artifact(
        path, converted, chosen, Scheme("none"), {"perplexity": perplexity}, extra=files, replace=replace
    )


def perplexity(path: Path) -> Any:
    return read_artifact(path).metrics["perplexity"]


def as_version_0_4(path: Path) -> Path:
    """An artifact whose map lists no further files."""
    content = json.loads((path / MAP).read_text())
    (path / MAP).write_text(json.dumps({key: value for key, value in content.items() if key != "files"}))
    return path


def others(folder: Path) -> dict[str, str]:
    """Files of the user's in a folder: text, link, hidden, in folders, read-only."""
    files = {"notes.txt": "mine", ".git/HEAD": "ref", "deep/er/thesis.txt": "years", "locked/read-only.txt": "no"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "link").symlink_to("nowhere")
    (folder / "empty").mkdir()
    (folder / "locked/read-only.txt").chmod(0o444)
    (folder / "locked").chmod(0o555)
    return files


def require_kept(folder: Path, files: dict[str, str]) -> None:
    assert {name: (folder / name).read_text() for name in files} == files
    assert (folder / "link").readlink() == Path("nowhere")
    assert (folder / "empty").is_dir()
    assert (folder / "locked").stat().st_mode & 0o777 == 0o555


def hidden(folder: Path) -> list[str]:
    """What writers have left."""
    return [str(path) for path in folder.rglob(f"{HIDDEN}*")]


def killed(folder: Path, before: int | None = None) -> list[Path]:
    """A case for each change that a writer makes, killed before it; the last one lived."""
    asked = [str(folder)] if before is None else [str(folder), str(before)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ssm_mp.killed_writers", *asked],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sorted(folder.glob("case-*"), key=lambda case: int(case.name.removeprefix("case-")))


def test_a_writer_killed_at_any_step_leaves_the_old_artifact_or_the_new_one_and_the_next_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path / "new", 2, tokenizer=b"[]")
    files = others(written(tmp_path / "template/artifact", 1, tokenizer=b"{}", allocation=b"1"))
    cases = killed(tmp_path)
    found = [perplexity(case / "artifact") for case in cases]
    assert found == sorted(found)
    assert set(found) == {1, 2}
    said = [case for case in cases if f"{case / 'artifact'}: replacing it was interrupted" in caplog.text]
    assert len(said) > 3  # those in which not every file had its place
    for case in cases:
        require_kept(case / "artifact", files)
        assert perplexity(written(case / "artifact", 3)) == 3
        require_kept(case / "artifact", files)
        assert hidden(case) == []
        assert set(os.listdir(case / "artifact")) == {
            TENSORS, MAP, METRICS, "notes.txt", ".git", "deep", "locked", "link", "empty",
        }  # fmt: skip


@pytest.mark.slow
def test_whoever_goes_on_from_a_killed_writer_may_be_killed_too(tmp_path: Path) -> None:
    written(tmp_path / "new", 2, tokenizer=b"[]")
    files = others(written(tmp_path / "template/artifact", 1, tokenizer=b"{}", allocation=b"1"))
    steps = len(killed(tmp_path)) - 1
    for case in tmp_path.glob("case-*"):
        shutil.rmtree(case)
    for before in range(1, steps, 3):
        for case in killed(tmp_path, before):
            assert perplexity(case / "artifact") in (1, 2)
            require_kept(case / "artifact", files)
            require_free(case / "artifact", replace=True)
            assert not [name for name in os.listdir(case / "artifact") if name.startswith(f"{HIDDEN}.new")]
            assert perplexity(case / "artifact") in (1, 2)
            shutil.rmtree(case)


@pytest.mark.parametrize("there", ["nothing", "empty folder"])
def test_a_first_writer_killed_at_any_step_leaves_nothing_or_the_whole(tmp_path: Path, there: str) -> None:
    written(tmp_path / "new", 2)
    (tmp_path / "template").mkdir()
    if there == "empty folder":
        (tmp_path / "template/artifact").mkdir()
    cases = killed(tmp_path)
    whole = [is_artifact(case / "artifact") for case in cases]
    assert whole == sorted(whole)
    assert set(whole) == {False, True}
    for case, is_whole in zip(cases, whole, strict=True):
        if is_whole:
            assert perplexity(case / "artifact") == 2
        assert perplexity(written(case / "artifact", 3)) == 3
        assert hidden(case) == []


@pytest.mark.parametrize("at", ["_require_unchanged", "_listed", "_restore"])
def test_an_artifact_that_is_replaced_while_it_is_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    path = written(tmp_path / "artifact", 1)
    step, waiting = getattr(artifact, at), [2.0]

    def replaced_meanwhile(*arguments: Any) -> Any:
        if waiting:
            written(path, waiting.pop())
        return step(*arguments)

    monkeypatch.setattr(artifact, at, replaced_meanwhile)
    found = read_artifact(path)
    assert found.metrics["perplexity"] == 2
    assert torch.equal(
        stored_arrays(found.model)["embedding.weight.q"], load_file(path / TENSORS)["embedding.weight.q"]
    )


def test_what_a_living_writer_has_written_so_far_is_not_cleared_away(tmp_path: Path) -> None:
    path = written(tmp_path / "artifact", 1)

    def write_while_others_do(partial: Path) -> None:
        for name in (TENSORS, MAP, METRICS):
            shutil.copy2(path / name, partial)
        assert perplexity(written(path, 2)) == 2
        assert perplexity(written(tmp_path / "beside", 3)) == 3
        assert perplexity(partial) == 1

    write_folder(path, write_while_others_do, replace=True)
    assert perplexity(path) == 1
    write_folder(tmp_path / "third", write_while_others_do, replace=True)
    assert hidden(tmp_path) == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_fails_one_artifact_is_whole_and_the_error_says_where(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Each call that changes a disk may fail or not."""
    folder = tmp_path_factory.mktemp("failing")
    path = written(folder / "artifact", 1, tokenizer=b"{}")
    files = others(path)
    worked = data.draw(st.integers(0, 40), label="calls that work before the first that fails")
    also = data.draw(st.frozensets(st.sampled_from(["rename", "replace", "link", "unlink", "rmdir", "mkdir"])))
    with pytest.MonkeyPatch.context() as patch:
        count = [worked]
        for name in ("rename", "replace", "link", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, _failing(getattr(os, name), count, name in also))
        try:
            written(path, 2, allocation=b"2")
            failed = ""
        except ArtifactError as error:
            failed = str(error)
    require_kept(path, files)
    found = perplexity(path)
    assert found in (1, 2)
    if not failed:
        assert found == 2
    elif found == 2:  # whole, but not in its place
        assert str((path / ".ssm-mp.new").absolute()) in failed
        assert str(path.absolute()) in failed
    assert perplexity(written(path, 3)) == 3
    require_kept(path, files)
    assert hidden(path) == []


def _failing(call: Callable[..., Any], left: list[int], fails: bool) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0 and fails:
            raise OSError(5, "Input/output error")
        return call(*arguments, **named)

    return wrapped


def test_where_nothing_can_be_renamed_the_old_artifact_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "artifact", 1)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, fail)
            patch.setattr(Path, name, fail)
        with pytest.raises(ArtifactError, match="Input/output error.*nothing was left behind"):
            written(path, 2)
    assert perplexity(path) == 1
    assert hidden(tmp_path) == []


def test_a_file_system_without_hard_links_is_written_by_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "artifact", 1)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert perplexity(written(path, 2)) == 2
    assert hidden(tmp_path) == []


def test_an_artifact_that_version_0_4_had_moved_aside_is_read_and_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = as_version_0_4(written(tmp_path / "odd [name]", 1))
    aside = tmp_path / ".odd [name].old-abcdefgh"
    aside.mkdir()
    path.rename(aside / path.name)
    assert perplexity(path) == 1
    assert f"{path}: replacing it was interrupted; the old artifact is whole" in caplog.text
    with pytest.raises(ArtifactError, match="already exists"):
        require_free(path, replace=False)
    assert "the old artifact was put back" in caplog.text
    assert perplexity(path) == 1
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("old", ["0.4", "now"])
def test_files_of_the_users_stay_and_those_of_the_old_artifact_go(tmp_path: Path, old: str) -> None:
    path = written(tmp_path / "artifact", 1, tokenizer=b"{}", allocation=b"old")
    if old == "0.4":
        (as_version_0_4(path) / TOKENIZER).unlink()
    files = others(path)
    identity = path.stat().st_ino
    written(path, 2)
    require_kept(path, files)
    assert path.stat().st_ino == identity  # whoever works in it still does
    assert not (path / TOKENIZER).exists()
    assert not (path / PICTURE).exists()
    written(path, 3, tokenizer=b"[]", allocation=b"new")
    assert (path / TOKENIZER).read_bytes() == b"[]"
    assert perplexity(path) == 3


@pytest.mark.parametrize("kind", ["unlisted", "changed", "folder"])
def test_a_file_of_the_users_where_the_new_artifact_has_one_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "artifact"
    written(path, 1, tokenizer=b"{}") if kind == "changed" else written(path, 1)
    if kind == "folder":
        (path / TOKENIZER).mkdir()
    else:
        (path / TOKENIZER).write_text("my own")
    with pytest.raises(ArtifactError, match=r"tokenizer.json was not written by this tool, or was changed.*move it"):
        written(path, 2, tokenizer=b"[]")
    if kind != "folder":
        assert (path / TOKENIZER).read_text() == "my own"
        written(path, 2)  # without one of its own
        assert (path / TOKENIZER).read_text() == "my own"
        assert perplexity(written(path, 3, tokenizer=b"my own")) == 3  # the same content is in nobody's way
    assert hidden(path) == []


def test_a_checkpoint_of_the_users_beside_a_map_is_not_replaced(tmp_path: Path) -> None:
    path = written(tmp_path / "artifact", 1)
    save_file(random_tensors(MAMBA), path / TENSORS)
    before = (path / TENSORS).read_bytes()
    with pytest.raises(ArtifactError, match=r"model.safetensors was not written by this tool"):
        written(path, 2)
    (path / MAP).write_text('{"*": "int8"}')
    with pytest.raises(ArtifactError, match=r"model.safetensors was not written by this tool"):
        written(path, 2)
    (path / TENSORS).unlink()
    with pytest.raises(ArtifactError, match=r"is no artifact: its precision_map.json is none of this tool"):
        written(path, 2)
    (path / TENSORS).write_bytes(before)
    assert (path / MAP).read_text() == '{"*": "int8"}'


@pytest.mark.parametrize("damage", [MAP, TENSORS, METRICS])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 20])
def test_a_damaged_artifact_can_be_replaced(tmp_path: Path, damage: str, content: bytes) -> None:
    path = written(tmp_path / "artifact", 1)
    (path / damage).write_bytes(content)
    assert perplexity(written(path, 2)) == 2


def test_a_link_to_an_artifact_stays_a_link_and_one_to_nowhere_is_an_error(tmp_path: Path) -> None:
    real = written(tmp_path / "deep/real", 1)
    link = tmp_path / "link"
    link.symlink_to("deep/real")
    files = others(real)
    assert perplexity(written(link, 2)) == 2
    assert link.is_symlink()
    assert perplexity(real) == 2
    require_kept(real, files)
    (tmp_path / "broken").symlink_to("gone")
    with pytest.raises(ArtifactError, match="broken is a link to gone, which does not exist"):
        written(tmp_path / "broken", 2)
    (tmp_path / "file").write_text("mine")
    for inside in ("file", "file/artifact"):
        with pytest.raises(ArtifactError):
            written(tmp_path / inside, 2)
    assert (tmp_path / "file").read_text() == "mine"


def test_linked_and_read_only_files_of_an_artifact_are_replaced_where_they_stand(tmp_path: Path) -> None:
    path = written(tmp_path / "artifact", 1)
    kept = (path / TENSORS).rename(tmp_path / "elsewhere")
    (path / TENSORS).symlink_to(kept)
    (path / MAP).chmod(0o444)
    before = kept.read_bytes()
    assert perplexity(written(path, 2)) == 2
    assert kept.read_bytes() == before
    assert not (path / TENSORS).is_symlink()


def test_the_folder_one_stands_in_can_be_written_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert perplexity(written(Path(), 1)) == 1
    assert perplexity(written(Path(), 2)) == 2
    assert set(os.listdir()) == {TENSORS, MAP, METRICS}


def test_a_removed_artifact_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    path = written(tmp_path / "artifact", 1, tokenizer=b"{}", allocation=b"1")
    assert remove_artifact(path)
    assert os.listdir(tmp_path) == []
    assert not remove_artifact(path)
    files = others(written(path, 1, tokenizer=b"{}", allocation=b"1"))
    (path / TOKENIZER).write_text("changed")
    assert remove_artifact(path)
    require_kept(path, files)
    assert (path / TOKENIZER).read_text() == "changed"
    assert not is_artifact(path)
    assert not remove_artifact(path)
    require_kept(path, files)


def test_a_map_that_lists_files_elsewhere_removes_none_of_them(tmp_path: Path) -> None:
    path = written(tmp_path / "artifact", 1)
    (tmp_path / "thesis.txt").write_text("")
    content = json.loads((path / MAP).read_text())
    empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    content["files"] = dict.fromkeys(["../thesis.txt", str(tmp_path / "thesis.txt")], empty)
    (path / MAP).write_text(json.dumps(content))
    written(path, 2)
    assert (tmp_path / "thesis.txt").exists()
    for name in ("../x", "a/b", MAP, ""):
        with pytest.raises(ArtifactError, match="cannot be the name of a further file"):
            save_artifact(path, random_model(MAMBA), PrecisionMap(()), Scheme(), {}, extra={name: b""}, replace=True)
