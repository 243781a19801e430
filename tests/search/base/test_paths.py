"""Paths of studies: links are not followed, `~` and variables stand for what they name, other signs for themselves."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.base.errors import StudyError
from search.base.paths import PathError, absolute, shown
from search.problem.spec import StudySpec, load_spec
from ssm_mp.checkpoints import load_checkpoint
from tests.search.cli.test_main import answer
from tests.tiny import HUGGING_FACE, write_study

HOME = pwd.getpwuid(os.getuid()).pw_dir


def as_in_a_cache(folder: Path, model: Path) -> Path:
    """A model's files as Hugging Face's cache holds them: links of a snapshot to blobs that have no suffix."""
    snapshot = folder / "models--a--b" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (folder / "models--a--b" / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.move(file, folder / "models--a--b" / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A folder with a study, `tiny.toml`, whose checkpoint lies in such a cache, with a config that must be found."""
    study = write_study(tmp_path, config=HUGGING_FACE, windows=(4, 32, 32))
    model = tmp_path / "model"
    model.mkdir()
    shutil.move(tmp_path / "model.safetensors", model)
    config = {"model_type": "mamba", "layer_norm_epsilon": 0.25}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    snapshot = as_in_a_cache(tmp_path / "hub", model).relative_to(tmp_path)
    text = study.read_text(encoding="utf-8")
    study.write_text(text.replace('"model.safetensors"', f'"{snapshot}/model.safetensors"'), encoding="utf-8")
    return tmp_path


def test_a_checkpoint_in_a_cache_of_links_is_read_under_its_own_name(cached: Path) -> None:
    found = load_spec(cached / "tiny.toml").checkpoint_path
    assert found.name == "model.safetensors"
    assert found.is_symlink()
    assert load_checkpoint(found).config.final_norm.eps == 0.25  # of the config.json that is beside the link


@pytest.mark.slow
def test_a_link_is_converted_as_the_file_that_it_leads_to(cached: Path) -> None:
    (link,) = (cached / "hub").glob("*/snapshots/*/model.safetensors")
    for given_path in (link, link.parent, link.relative_to(cached)):
        arguments = ("convert", given_path, "--map", "aggressive", "--study", "tiny.toml", "--out", "out", "--force")
        assert answer(*arguments, cwd=cached)["compression"] > 1


def test_two_dots_behind_a_link_lead_where_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "there" / "inner").mkdir(parents=True)
    (tmp_path / "there" / "model.pt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "inner")
    assert absolute("link/../model.pt", tmp_path).samefile(tmp_path / "there" / "model.pt")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("model.pt", "{folder}/model.pt"),
        ("/a/model.pt", "/a/model.pt"),
        ("$SCRATCH/model.pt", "/scratch/me/model.pt"),
        ("${SCRATCH}/model.pt", "/scratch/me/model.pt"),
        ("${NAME}_2.pt", "{folder}/run_2.pt"),
        ("runs/$NAME.$NAME", "{folder}/runs/run.run"),
        ("$HERE/model.pt", HOME + "/x/model.pt"),
        ("~/model.pt", "/home/of/mine/model.pt"),
        ("~", "/home/of/mine"),
        (f"~{pwd.getpwuid(os.getuid()).pw_name}/m.pt", HOME + "/m.pt"),
        ("a~b/~/m.pt", "{folder}/a~b/~/m.pt"),
        ("price$/$5/a$", "{folder}/price$/$5/a$"),
        ("there $NAME/~.pt", "{folder}/there $NAME/~.pt"),
    ],
)
def test_signs_stand_for_what_they_name_and_else_for_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, found: str
) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("NAME", "run")
    monkeypatch.setenv("HERE", HOME + "/x")
    (tmp_path / "there $NAME").mkdir()
    (tmp_path / "there $NAME" / "~.pt").touch()
    assert str(absolute(path, tmp_path)) == found.format(folder=tmp_path)


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("[checkpoint] path", lambda spec: spec.checkpoint_path),
        ("[data] text", lambda spec: spec.resolve(spec.data.text, "[data] text")),
    ],
)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("$NOT_THERE/a", "the environment variable NOT_THERE is not set"),
        ("a/${NOT_THERE}", "the environment variable NOT_THERE is not set"),
        ("${A:-b}/a", "expected the name of an environment variable"),
        ("~no-such-user-here/a", "nobody knows the home folder that ~no-such-user-here stands for"),
    ],
)
def test_what_is_not_known_is_named_with_its_key(
    tmp_path: Path, key: str, read: object, path: str, message: str
) -> None:
    (tmp_path / "a.toml").write_text('[checkpoint]\npath = "m.pt"\n', encoding="utf-8")
    section, name = key.removeprefix("[").split("] ")
    spec: StudySpec = load_spec(tmp_path / "a.toml", [f"{section}.{name}={path}"])
    with pytest.raises(StudyError) as caught:
        read(spec)  # type: ignore[operator]
    assert message in str(caught.value)
    assert f"{key} = " in str(caught.value)


def test_a_tokenizer_may_lie_at_home_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from search.problem.splits import tokenizer_path

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.toml").write_text('[checkpoint]\npath = "$HOME/m/m.pt"\n', encoding="utf-8")
    assert tokenizer_path(load_spec(tmp_path / "a.toml")) == tmp_path / "m" / "tokenizer.json"
    spec = load_spec(tmp_path / "a.toml", ["data.tokenizer=~/t.json"])
    assert tokenizer_path(spec) == tmp_path / "t.json"


@given(st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=40))
def test_any_name_is_a_path_or_an_error_that_says_why(name: str) -> None:
    with contextlib.suppress(PathError) if name[0] == "~" or "$" in name else contextlib.nullcontext():
        assert absolute(name, Path("/no/such/folder")).is_absolute()


@given(st.text(st.characters(codec="utf-8")))
def test_a_name_that_the_locale_could_not_decode_is_shown_as_it_is(name: str) -> None:
    assert shown(name) == name == shown(name.encode("utf-8").decode("ascii", "surrogateescape"))


@pytest.mark.slow
def test_names_beyond_ascii_are_found_under_a_locale_of_ascii(tmp_path: Path) -> None:
    folder = tmp_path / "modèle ×"
    write_study(tmp_path, windows=(4, 32, 32))
    shutil.copytree(tmp_path, folder, ignore=lambda *_: ["modèle ×"])
    (folder / "model.safetensors").rename(folder / "modèle.safetensors")
    study = (folder / "tiny.toml").read_text(encoding="utf-8").replace("model.saf", "modèle.saf")
    (folder / "étude.toml").write_text("\ufeff" + study, encoding="utf-8")
    environment = {
        **os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    common = [sys.executable, "-m", "search.cli"]
    for arguments in (
        ["evaluate", "modèle ×/modèle.safetensors", "--study", "modèle ×/étude.toml", "--json"],
        ["convert", "modèle ×/modèle.safetensors", "--map", "aggressive", "--study", "modèle ×/étude.toml", "--out",
         "sortie é", "--json"],
        ["probe", "tiny.toml", "--set", "checkpoint.path=modèle ×/modèle.safetensors", "--json"],
    ):  # fmt: skip
        done = subprocess.run(
            [*common, *arguments], cwd=tmp_path, env=environment, capture_output=True, encoding="ascii", check=False
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found.get("path", "sortie é") == "sortie é"
