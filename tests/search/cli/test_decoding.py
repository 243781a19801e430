"""The commands `generate` and `drift` on tiny checkpoints and artifacts, and mistakes without a traceback."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from search.cli import main as cli
from search.cli.decoding import _agreeing
from search.problem.run_directory import FINGERPRINT, RunDirectory
from search.results.plots.drift import plot_drift
from search.run.drift import stored_drift
from ssm_mp import PrecisionMap, Scheme, convert, find_components, generate, load_artifact, load_model, save_artifact
from ssm_mp.config import Config
from ssm_mp.decoding.decode import Generation
from ssm_mp.evaluation.drift import LONG, drift_of
from tests.tiny import HUGGING_FACE, ITERA, LENGTH, MAMBA, VOCABULARY, write_checkpoint, write_study

Command = Callable[..., tuple[int, str, str]]
Folder = Callable[[Config], Path]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line: its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ssm-mp", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Goes to a folder with a tiny study of a config, its checkpoint, a tokenizer and an artifact."""

    def make(config: Config) -> Path:
        write_study(tmp_path, config=config)
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
        words.pre_tokenizer = Whitespace()
        words.save(str(tmp_path / "tokenizer.json"))
        model = load_model(tmp_path / "model.safetensors")
        chosen = PrecisionMap.uniform("int8", find_components(model))
        save_artifact(tmp_path / "small", convert(model, chosen, Scheme("dynamic")), chosen, Scheme("dynamic"), {})
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


def answered(done: tuple[int, str, str]) -> Any:
    code, out, err = done
    assert code == 0, err
    return json.loads(out)


def refused(done: tuple[int, str, str], code: int = 2) -> str:
    """The error of a command that fails as it should: one line, and no answer."""
    found, out, err = done
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err
    assert [line.startswith("error: ") for line in err.splitlines()] == [True]
    return err


@pytest.mark.parametrize("config", [MAMBA, HUGGING_FACE, ITERA], ids=["mamba", "huggingface", "itera"])
@pytest.mark.parametrize("path", ["model.safetensors", "small"])
def test_generate_continues_the_prompt_as_the_library_does(
    command: Command, folder: Folder, config: Config, path: str
) -> None:
    here = folder(config)
    found = answered(command("generate", path, "--study", "tiny.toml", "--prompt", "w5 w9 w2", "--tokens", 6, "--json"))
    model = load_artifact(here / path) if path == "small" else load_model(here / path)
    expected = generate(model, torch.tensor([[5, 9, 2]]), 6)[0].tolist()
    assert found["ids"] == expected
    assert found["text"] == " ".join(f"w{i}" for i in expected)
    assert (found["prompt_tokens"], found["new_tokens"]) == (3, 6)
    assert min(found["prefill_tokens_per_second"], found["decode_tokens_per_second"]) > 0


def test_an_artifact_that_was_exported_needs_neither_study_nor_tokenizer(command: Command, folder: Folder) -> None:
    here = folder(MAMBA)
    rng = np.random.default_rng(0)
    text = " ".join(f"w{i}" for i in np.repeat(rng.integers(0, VOCABULARY, size=300), 8))
    (here / "text.txt").write_text(text)
    study = (here / "tiny.toml").read_text().replace("tokens.npy", "text.txt")
    (here / "tiny.toml").write_text(study.replace("[data]", '[data]\ntokenizer = "words.json"'))
    (here / "tokenizer.json").rename(here / "words.json")
    convert = ("convert", "model.safetensors", "--map", "conservative", "--study", "tiny.toml", "--json")
    answered(command(*convert, "--out", "own"))
    own = here / "moved/own"
    own.parent.mkdir()
    (here / "own").rename(own)
    expected = command("generate", own, "--prompt", "w5 w9 w2", "--study", "tiny.toml", "--tokens", 4, "--json")
    other = Tokenizer(WordLevel({f"v{i}": i for i in range(VOCABULARY)}, unk_token="v0"))
    other.pre_tokenizer = Whitespace()
    other.save(str(here / "other.json"))
    overridden = ("generate", own, "--prompt", "v5 v9 v2", "--tokens", 4, "--tokenizer", "other.json", "--json")
    ids = answered(command(*overridden))["ids"]
    for name in ("words.json", "text.txt", "tiny.toml", "model.safetensors"):
        (here / name).unlink()
    found = answered(command("generate", own, "--prompt", "w5 w9 w2", "--tokens", 4, "--json"))
    assert found["ids"] == answered(expected)["ids"] == ids
    assert found["text"].startswith("w5 w9 w2 w")
    content = json.loads((own / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"w5": 6, "w6": 5}
    (own / "tokenizer.json").write_text(json.dumps(content))
    assert "tokenizer.json: its checksum is not the one in" in refused(command("generate", own, "--prompt", "w5"))
    (own / "tokenizer.json").unlink()
    assert f"{own} holds no tokenizer" in refused(command("generate", own, "--prompt", "w5"))
    assert answered(command(*overridden))["ids"] == ids


def test_an_artifact_of_token_ids_says_what_to_give(command: Command, folder: Folder) -> None:
    here = folder(MAMBA)
    answered(command("convert", "model.safetensors", "--map", "conservative", "--study", "tiny.toml", "--out", "own",
                     "--json"))  # fmt: skip
    assert not (here / "own/tokenizer.json").exists()
    said = refused(command("generate", "own", "--prompt", "w5"))
    assert "own holds no tokenizer (it was made from token ids, or by a version before 0.5): say which with" in said
    assert answered(command("generate", "own", "--prompt", "w5", "--study", "tiny.toml", "--tokens", 4, "--json"))[
        "text"
    ]
    shutil.copy(here / "tokenizer.json", here / "own")  # put there by hand, as one did with 0.4
    assert answered(command("generate", "own", "--prompt", "w5", "--tokens", 4, "--json"))["text"]


def test_a_seed_and_a_temperature_are_those_of_the_library(command: Command, folder: Folder) -> None:
    here = folder(MAMBA)
    arguments = ("--prompt", "w1 w2", "--tokens", 9, "--temperature", 2, "--seed", 5, "--json")
    found = answered(command("generate", "model.safetensors", "--tokenizer", "tokenizer.json", *arguments))
    expected = generate(load_model(here / "model.safetensors"), torch.tensor([[1, 2]]), 9, temperature=2, seed=5)
    assert found["ids"] == expected[0].tolist()


def test_text_and_speeds_are_for_people_unless_json_is_asked_for(command: Command, folder: Folder) -> None:
    folder(MAMBA)
    code, out, _ = command("generate", "model.safetensors", "--prompt", "w5 w9", "--tokens", 3)
    assert code == 0  # the tokenizer beside the checkpoint needs no study
    lines = out.splitlines()
    assert lines[0].startswith("w5 w9 w")
    assert lines[2].startswith("2 tokens read at ")
    assert ", 3 made at " in lines[2]


def test_a_comparison_times_fp32_fp16_and_the_artifact(command: Command, folder: Folder) -> None:
    folder(MAMBA)
    asked = ("generate", "small", "--study", "tiny.toml", "--prompt", "w5 w9", "--tokens", 4, "--compare")
    rows = answered(command(*asked, "--json"))["compare"]
    assert list(rows) == ["fp32", "fp16", "artifact"]
    assert rows["fp32"]["bytes"] == 2 * rows["fp16"]["bytes"]
    assert (rows["fp32"]["prefill_speedup"], rows["fp32"]["decode_speedup"], rows["fp32"]["same_tokens"]) == (1, 1, 4)
    for row in rows.values():
        assert row["prefill_tokens_per_second"] > 0
        assert row["decode_tokens_per_second"] > 0
        assert 0 <= row["same_tokens"] <= 4
    _, out, _ = command(*asked)
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["fp32", "fp16", "artifact"]
    own = answered(command("generate", "model.safetensors", *asked[2:], "--json"))["compare"]
    assert list(own) == ["fp32", "fp16"]  # the checkpoint is the FP32 model itself


def test_one_new_token_takes_no_step_and_has_no_rate(command: Command, folder: Folder) -> None:
    folder(MAMBA)
    asked = ("generate", "small", "--study", "tiny.toml", "--prompt", "w5", "--tokens", 1, "--compare")
    found = answered(command(*asked, "--json"))
    assert found["decode_tokens_per_second"] is None
    assert found["compare"]["artifact"]["decode_tokens_per_second"] is None
    assert " 1 made at - a second" in command(*asked)[1]


def test_tokens_agree_up_to_the_first_that_differs() -> None:
    first, second = torch.tensor([[9, 1, 2, 3, 4]]), torch.tensor([[9, 1, 2, 7, 4]])
    assert _agreeing(Generation(first, 1, 1.0, 1.0), Generation(second, 1, 1.0, 1.0)) == 2
    assert _agreeing(Generation(first, 1, 1.0, 1.0), Generation(first, 1, 1.0, 1.0)) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model.safetensors", "--prompt", ""), "no token in it"),
        (("model.safetensors", "--prompt", "w1 w2", "--tokens", LENGTH), f"at most {LENGTH - 1} new ones are possible"),
        (("small", "--prompt", "w1"), "say which with --study or --tokenizer"),
        (("small", "--prompt", "w1", "--tokenizer", "nothing.json"), "no tokenizer at nothing.json"),
        (("model.safetensors", "--prompt", "w1", "--compare"), "--compare needs --study"),
        (("nothing", "--prompt", "w1", "--study", "tiny.toml"), "no checkpoint at nothing"),
        (("small", "--prompt", "w1", "--study", "nothing.toml"), "no study file at nothing.toml"),
    ],
)
def test_a_mistake_in_generating_is_one_clear_error(
    command: Command, folder: Folder, arguments: tuple[object, ...], said: str
) -> None:
    folder(MAMBA)
    assert said in refused(command("generate", *arguments))


def test_an_artifact_of_another_model_is_not_compared(command: Command, folder: Folder) -> None:
    folder(MAMBA)
    write_checkpoint(Path("model.safetensors"), HUGGING_FACE)
    for asked in (("generate", "small", "--prompt", "w1", "--tokens", 2, "--compare"), ("drift", "small")):
        assert "small is no version of" in refused(command(*asked, "--study", "tiny.toml"))


@pytest.mark.parametrize("config", [MAMBA, ITERA], ids=["mamba", "itera"])
def test_drift_by_position_and_why_there_are_no_longer_windows(
    command: Command, folder: Folder, config: Config
) -> None:
    folder(config)
    found = answered(command("drift", "small", "--study", "tiny.toml", "--buckets", 3, "--json"))
    assert (found["windows"], found["length"], found["long"]) == (8, LENGTH, None)
    assert [(b["first"], b["last"]) for b in found["buckets"]] == [(1, 5), (6, 10), (11, 15)]
    assert found["increase_percent"] != 0
    assert found["long_refused"] == (
        f"the model's positions end at {LENGTH} tokens, so it cannot read windows of {LONG * LENGTH}"
    )
    evaluated = answered(command("evaluate", "model.safetensors", "--study", "tiny.toml", "--json"))
    assert found["fp32_perplexity"] == pytest.approx(evaluated["perplexity"])
    _, out, _ = command("drift", "small", "--study", "tiny.toml", "--buckets", 3)
    assert "11 – 15" in out
    assert f"no longer windows: the model's positions end at {LENGTH} tokens" in out


def test_without_positions_drift_goes_on_to_four_times_the_length(command: Command, folder: Folder) -> None:
    folder(HUGGING_FACE)
    found = answered(command("drift", "small", "--study", "tiny.toml", "--json", "--out", "drift.png"))
    assert found["long_refused"] is None
    assert (found["long"]["length"], found["long"]["windows"]) == (4 * LENGTH, 2)
    assert found["long"]["buckets"][-1]["last"] == 4 * LENGTH - 1
    assert found["picture"] == "drift.png"
    assert Path("drift.png").read_bytes().startswith(b"\x89PNG")
    _, out, _ = command("drift", "small", "--study", "tiny.toml", "--set", "data.search_windows=16")
    assert f"16 windows of {LENGTH} tokens" in out
    assert f"4 windows of {4 * LENGTH} tokens" in out


def test_a_text_too_short_for_longer_windows_says_so_beside_the_answer(command: Command, folder: Folder) -> None:
    folder(HUGGING_FACE)
    np.save("tokens.npy", np.load("tokens.npy")[: 28 * LENGTH])  # 4 + 8 + 16 windows, and not one more
    found = answered(
        command("drift", "small", "--study", "tiny.toml", "--json", "--set", "data.calibration_windows=1",
                "--set", "data.search_windows=3", "--set", "data.certify_windows=24")
    )  # fmt: skip
    assert found["windows"] == 3
    assert found["long"] is None
    assert "windows of 64 tokens, 9 are asked for" in found["long_refused"]


def test_the_drift_of_an_artifact_is_kept_where_its_study_was_run(command: Command, folder: Folder) -> None:
    folder(MAMBA)
    begun, other = RunDirectory(Path("runs/tiny")), RunDirectory(Path("elsewhere"))
    for run in (begun, other):
        run.path.mkdir(parents=True)
        run.write_json(FINGERPRINT, {})
    for path in ("small", "model.safetensors"):
        found = answered(command("drift", path, "--study", "tiny.toml", "--buckets", 3, "--json"))
        if path == "small":
            (kept,) = stored_drift(begun).values()
            assert kept["windows"]["buckets"] == found["buckets"]
            assert kept["long"] is None
            assert set(kept["map"].values()) == {"int8", "fp16"}
    assert list(stored_drift(begun)) == ["small"]  # a checkpoint is no map of the study
    command("drift", "small", "--study", "tiny.toml", "--run-dir", "elsewhere")
    assert list(stored_drift(other)) == ["small"]
    said = refused(command("drift", "small", "--study", "tiny.toml", "--run-dir", "nowhere"))
    assert "nowhere: no search has been run here yet" in said
    assert not Path("nowhere").exists()


def test_a_checkpoint_does_not_drift_from_itself(command: Command, folder: Folder) -> None:
    folder(MAMBA)
    found = answered(command("drift", "model.safetensors", "--study", "tiny.toml", "--json"))
    assert {b["increase_percent"] for b in found["buckets"]} == {0.0}
    assert found["grows"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("small", "--study", "tiny.toml", "--out", "drift.txt"), "a picture ends in .png, .svg, .pdf"),
        (("small", "--study", "tiny.toml", "--out", "nowhere/drift.png"), "there is no folder nowhere"),
        (("nothing", "--study", "tiny.toml"), "no checkpoint at nothing"),
        (("small", "--study", "nothing.toml"), "no study file at nothing.toml"),
    ],
)
def test_a_mistake_in_drift_is_one_clear_error(
    command: Command, folder: Folder, arguments: tuple[object, ...], said: str
) -> None:
    folder(MAMBA)
    assert said in refused(command("drift", *arguments))


def test_the_picture_has_error_bars_and_marks_where_the_other_windows_ended() -> None:
    rng = np.random.default_rng(0)
    short, long = (
        drift_of(fp32 + rng.normal(0.02, 0.1, size=fp32.shape), fp32, 8)
        for fp32 in (rng.normal(3, 1, size=(32, 31)), rng.normal(3, 1, size=(16, 127)))
    )
    alone, both = plot_drift("x", short, None), plot_drift("x", short, long)
    assert (len(alone.axes), len(both.axes)) == (1, 2)
    assert [len(axes.containers) for axes in both.axes] == [1, 1]
    marks = [text.get_text() for text in both.axes[1].get_legend().get_texts()]  # type: ignore[union-attr]
    assert "end of the study's windows" in marks
    assert "end of the study's windows" not in [text.get_text() for text in both.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
