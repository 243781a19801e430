"""A study's windows: what is drawn, dropped, said, kept; and baselines that do not know their text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from search.cli.main import app
from search.measure.objective import measure_baseline, require_knowing
from search.problem.run_directory import RunDirectory
from search.problem.spec import load_spec
from search.problem.splits import load_splits
from search.problem.workspace import open_workspace
from search.run.prepare import prepare
from ssm_mp.data import cut, unigram_perplexity
from ssm_mp.data.token_files import KEPT_FROM
from ssm_mp.errors import DataError, EvaluationError
from ssm_mp.evaluation.evaluate import evaluate
from tests.tiny import LENGTH, MAMBA, VOCABULARY, repetitive_tokens, write_study


def rows(folder: Path, splits_of: str = "data.seed=0") -> list[set[bytes]]:
    splits = load_splits(load_spec(folder / "tiny.toml", [splits_of]), MAMBA)
    return [{row.numpy().tobytes() for row in part.ids} for part in (splits.calibration, splits.search, splits.certify)]


def test_no_window_is_on_two_sides_of_the_split_however_often_the_text_repeats_it(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    tokens = repetitive_tokens(LENGTH * 40).reshape(40, LENGTH)
    np.save(tmp_path / "tokens.npy", np.concatenate([tokens, tokens[::-1], tokens]))
    calibration, search, certify = rows(tmp_path)
    assert (len(calibration), len(search), len(certify)) == (4, 8, 16)
    assert len(calibration | search | certify) == 28
    said: list[str] = []
    splits = load_splits(load_spec(study), MAMBA, said.append)
    assert any(line.startswith("note: 80 of 120 windows of") for line in said)
    assert any("repeat an earlier one" in line for line in splits.described())
    np.save(tmp_path / "tokens.npy", np.tile(tokens[:20].ravel(), 40))
    with pytest.raises(DataError, match="gives 20 different windows .*780 of 800 windows .* 28 are asked for"):
        rows(tmp_path)


def test_near_duplicates_are_noted(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    rng = np.random.default_rng(0)
    once = rng.integers(0, VOCABULARY, size=LENGTH * 30)
    np.save(tmp_path / "tokens.npy", np.concatenate([once, once[5:], once[3:]]))  # the same, shifted
    said: list[str] = []
    splits = load_splits(load_spec(study), MAMBA, said.append)
    assert splits.overlap is not None
    assert 0 < splits.overlap.near_duplicates <= 16
    assert any("near duplicates of search windows" in line for line in said)
    np.save(tmp_path / "tokens.npy", rng.integers(0, VOCABULARY, size=LENGTH * 90))
    splits = load_splits(load_spec(study), MAMBA, said.append)
    assert splits.overlap is not None
    assert splits.overlap.near_duplicates == 0


def test_windows_begin_with_bos_where_the_study_says_so(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    plain, begun = (open_workspace(load_spec(study, [f"data.bos={bos}"])) for bos in ("false", "7"))
    for part in (begun.splits.calibration, begun.splits.search, begun.splits.certify):
        assert part.ids[:, 0].tolist() == [7] * len(part)
        assert part.length == LENGTH
    assert begun.fingerprint() != plain.fingerprint()
    assert any("begins with token 7 (BOS), which is never predicted" in line for line in begun.splits.described())
    with pytest.raises(DataError, match="give its id"):
        open_workspace(load_spec(study, ["data.bos=true"]))
    made = load_splits(load_spec(study, ["data.bos=0", "data.calibration=synthetic"]), MAMBA)
    assert set(made.calibration.ids[:, 0].tolist()) == {0}


def test_what_is_made_up_knows_no_window_of_the_other_splits(tmp_path: Path) -> None:
    splits = load_splits(load_spec(write_study(tmp_path), ["data.calibration=synthetic"]), MAMBA)
    rest = cut(np.load(tmp_path / "tokens.npy"), LENGTH).without([splits.search, splits.certify])
    assert splits.token_counts.tolist() == rest.counts(VOCABULARY).tolist()


def write_long_study(folder: Path) -> Path:
    study = write_study(folder)
    words = np.array([f"w{i}" for i in range(VOCABULARY)])
    tokens = repetitive_tokens(KEPT_FROM // 3)
    (folder / "text.txt").write_text(" ".join(words[tokens]))
    (folder / "vocab.txt").write_text("\n".join(words))
    return study


def test_a_run_keeps_the_ids_of_a_long_text_for_those_who_come_after(tmp_path: Path) -> None:
    study = write_long_study(tmp_path)
    spec = load_spec(study, ["data.text=text.txt", "search.probe=none"])  # the tokenizer is found beside the model
    run, said = RunDirectory(tmp_path / "run"), list[str]()
    with run.owned():
        first = prepare(spec, run, said.append).workspace.splits
    (kept,) = run.path.glob("tokens-*.npy")
    assert any(str(kept) in line for line in said)
    said.clear()
    again = open_workspace(spec, said.append, run.path).splits
    assert not any(str(kept) in line for line in said)
    assert again.search.digest == first.search.digest == load_splits(spec, MAMBA).search.digest


def skewed_study(folder: Path) -> Path:
    """A text of eight tokens in short runs: frequencies tell more of it than a random model does."""
    study = write_study(folder)
    rng = np.random.default_rng(0)
    tokens = np.repeat(rng.integers(0, 8, size=2000), rng.integers(3, 9, size=2000))
    np.save(folder / "tokens.npy", tokens)
    return study


def test_a_baseline_below_token_frequencies_is_refused_unless_forced(tmp_path: Path) -> None:
    study = skewed_study(tmp_path)
    workspace = open_workspace(load_spec(study))
    baseline = evaluate(workspace.model, workspace.splits.search)
    unigram = unigram_perplexity(workspace.splits.token_counts, workspace.splits.search)
    assert unigram < baseline.perplexity < VOCABULARY
    with pytest.raises(EvaluationError, match="mere token frequencies.*another tokenizer.*shifted.*layout.*--force"):
        measure_baseline(workspace)
    forced = open_workspace(load_spec(study, ["search.force_baseline=true"]))
    assert measure_baseline(forced).perplexity == baseline.perplexity
    assert "mere token frequencies" in (require_knowing(forced, baseline) or "")
    np.save(tmp_path / "fine.npy", repetitive_tokens(LENGTH * 120))
    fine = open_workspace(load_spec(study, ["data.text=fine.npy"]))
    assert require_knowing(fine, evaluate(fine.model, fine.splits.search)) is None


def test_force_reaches_every_step_and_is_asked_for_again(tmp_path: Path) -> None:
    study, run = skewed_study(tmp_path), tmp_path / "run"
    ask = [str(study), "--run-dir", str(run), "--set", "search.probe=none"]
    for command in ("prepare", "probe", "prepare"):
        assert isinstance(CliRunner().invoke(app, [command, *ask]).exception, EvaluationError)
        forced = CliRunner().invoke(app, [command, *ask, "--force"])
        assert forced.exit_code == 0, forced.output
        assert "note: the FP32 model's perplexity" in forced.stderr
    script = CliRunner().invoke(app, ["launch", *ask, "--force", "--dry-run"])
    assert "search.force_baseline=true" in script.output


def write_documents(folder: Path, count: int = 40) -> Path:
    """A study whose text is many token files of odd lengths."""
    study = write_study(folder)
    (folder / "parts").mkdir()
    for number in range(count):
        np.save(folder / f"parts/{number:02}.npy", repetitive_tokens(LENGTH * 3 + number % 7, seed=number))
    return study


def test_documents_of_several_files_are_the_sources_of_windows(tmp_path: Path) -> None:
    spec = load_spec(write_documents(tmp_path), ['data.text="parts/*.npy"'])
    certify = load_splits(spec, MAMBA).certify
    assert certify.sources is not None
    assert len(set(certify.sources.tolist())) == len(certify) == 16


def test_windows_cross_no_document_where_that_is_asked(tmp_path: Path) -> None:
    study = write_documents(tmp_path)
    parts = [np.load(path).tolist() for path in sorted((tmp_path / "parts").glob("*.npy"))]
    for across in (True, False):
        asked = ['data.text="parts/*.npy"', f"data.cross_documents={str(across).lower()}"]
        splits = load_splits(load_spec(study, asked), MAMBA)
        held = []
        for split in (splits.calibration, splits.search, splits.certify):
            assert split.sources is not None
            for row, source in zip(split.ids.tolist(), split.sources.tolist(), strict=True):
                held.append(any(parts[source][i : i + LENGTH] == row for i in range(len(parts[source]))))
        assert all(held) is not across


def test_a_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    study = write_long_study(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "texts" / "a.txt")
    (tmp_path / "texts" / "README.md").write_text("about", encoding="utf-8")
    said: list[str] = []
    splits = load_splits(load_spec(study, ['data.text="texts"']), MAMBA, said.append)
    assert any(line.startswith("note: ") and "README.md left out" in line for line in said)
    whole = load_splits(load_spec(study, ['data.text="texts/a.txt"']), MAMBA)
    assert splits.search.digest == whole.search.digest
