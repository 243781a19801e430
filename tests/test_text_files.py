"""No text is read or written in whatever encoding the machine happens to have; people's files may begin with a mark."""

from __future__ import annotations

import ast
import codecs
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.spec import load_spec
from ssm_mp.artifact import MAP, METRICS, load_artifact, save_artifact
from ssm_mp.checkpoints import load_checkpoint
from ssm_mp.components import find_components
from ssm_mp.conversion.convert import convert
from ssm_mp.precision_map import PrecisionMap, read_rules
from ssm_mp.scheme import Scheme
from tests.tiny import HUGGING_FACE, MAMBA, random_model, write_study

ROOT = Path(__file__).parents[1]
TEXT_CALLS = {"read_text", "write_text", "open", "fdopen", "NamedTemporaryFile", "TemporaryFile"}


def without_encoding(source: str) -> Iterator[ast.Call]:
    """Calls that read or write text and leave the encoding to the machine."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {keyword.arg for keyword in call.keywords}
        values = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
        binary = any(isinstance(value, str) and "b" in value and len(value) <= 4 for value in values)
        of_os = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "os" and name == "open"
        run_directory = name == "write_text" and len(call.args) == 2  # RunDirectory's own, which is UTF-8
        if "encoding" in given or binary or of_os or run_directory:
            continue
        if name in TEXT_CALLS or given & {"text", "universal_newlines"}:
            yield call


@pytest.mark.parametrize("folder", ["search", "ssm_mp", "studies", "benchmarks"])
def test_every_text_is_opened_with_its_encoding(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}"
        for file in files
        for call in without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["path.read_text()", "path.write_text('a')", "open(path)", "path.open('w')", "run(command, text=True)"],
)
def test_one_without_is_found(source: str) -> None:
    assert list(without_encoding(source))


def marked(path: Path) -> None:
    """Put a byte-order mark before a file, as editors on Windows do."""
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())


def test_a_study_a_map_and_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    study = write_study(tmp_path, config=HUGGING_FACE)
    (tmp_path / "config.json").write_text('{"layer_norm_epsilon": 0.25, "é": "×"}', encoding="utf-8")
    (tmp_path / "map.toml").write_text('"*" = "fp16" # ×\n', encoding="utf-8")
    (tmp_path / "map.json").write_text('{"*": "fp16"}', encoding="utf-8")
    for path in (study, *(tmp_path / name for name in ("config.json", "map.toml", "map.json"))):
        marked(path)
    assert load_spec(study).checkpoint_path == tmp_path / "model.safetensors"
    assert load_checkpoint(tmp_path / "model.safetensors").config.final_norm.eps == 0.25
    assert read_rules(tmp_path / "map.toml") == read_rules(tmp_path / "map.json") == {"*": "fp16"}


def test_an_artifact_whose_files_were_saved_again_by_an_editor_is_read(tmp_path: Path) -> None:
    model = random_model(MAMBA)
    scheme, precision_map = Scheme("none"), PrecisionMap.uniform("fp16", find_components(model))
    save_artifact(tmp_path / "a", convert(model, precision_map, scheme), precision_map, scheme, {})
    for name in (MAP, METRICS):
        marked(tmp_path / "a" / name)
    assert load_artifact(tmp_path / "a").config == model.config


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_study_in_another_encoding_is_an_error_that_says_so(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.toml").write_text('[checkpoint]\npath = "modèle.pt"\n', encoding=encoding)
    with pytest.raises(StudyError, match="not in UTF-8 .* save it as UTF-8"):
        load_spec(tmp_path / "a.toml")


def test_json_of_a_run_directory_is_utf_8(tmp_path: Path) -> None:
    from search.problem.run_directory import RunDirectory

    run = RunDirectory(tmp_path)
    run.write_text("report.md", "3.90× ± \udcc3\udca9 \udcff")
    assert (tmp_path / "report.md").read_bytes().decode("utf-8") == "3.90× ± é \\udcff"
    run.write_json("a.json", {"a": "×"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"a": "×"}
