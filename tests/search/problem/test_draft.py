"""A drafted study file: what it says of what was found, and that it is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.base.errors import StudyError
from search.problem.draft import Draft, drafted
from search.problem.found import FoundModel, FoundText
from search.problem.spec import StudySpec, load_spec

MODEL = FoundModel("mamba", 1_500_000, 35, 22, 0, 8000, ("float32",))
TEXT = FoundText(128, 5000, 40, True, False)
DRAFT = Draft("model", None, ("text.txt",), "text", None, MODEL, TEXT, "cpu")


def read(draft: Draft, folder: Path) -> StudySpec:
    (folder / "a.toml").write_text(drafted(draft, "a.toml"), encoding="utf-8")
    return load_spec(folder / "a.toml")


def test_a_draft_is_a_study_that_says_what_was_found(tmp_path: Path) -> None:
    spec = read(DRAFT, tmp_path)
    assert spec.checkpoint_path == tmp_path / "model"
    assert (spec.data.text, spec.data.tokenizer, spec.data.bos) == ("text.txt", None, False)
    assert (spec.data.calibration_count, spec.data.search_windows, spec.data.certify_windows) == (128, 128, 512)
    assert (spec.search.probe, spec.search.device, spec.precision.experts) == ("measured", "cpu", None)


def test_what_is_left_as_a_comment_is_the_default(tmp_path: Path) -> None:
    """Each commented key, put in, changes nothing."""
    lines = drafted(replace(DRAFT, tokenizer="t.json"), "a.toml").splitlines()
    defaults = [n for n, line in enumerate(lines) if line.startswith("# ") and " = " in line.split("#")[1]]
    keys = [lines[n].removeprefix("# ").split(" = ")[0] for n in defaults]
    assert {"bos", "cross_documents", "activations", "probe", "device"} <= set(keys)
    spec = read(replace(DRAFT, tokenizer="t.json"), tmp_path)
    for number, key in zip(defaults, keys, strict=True):
        if key in ("window", "partition"):  # found, not a default; of a section that is a comment too
            continue
        changed = [*lines[:number], lines[number].removeprefix("# "), *lines[number + 1 :]]
        (tmp_path / "a.toml").write_text("\n".join(changed), encoding="utf-8")
        assert load_spec(tmp_path / "a.toml") == spec, key


def test_many_experts_layers_and_a_gpu_make_other_choices(tmp_path: Path) -> None:
    large = replace(MODEL, free=5000, components=6000, experts=4800)
    spec = read(replace(DRAFT, model=large, device="cuda"), tmp_path)
    assert (spec.precision.experts, spec.search.probe, spec.search.device) == ("together", "gradient", "cuda")


def test_a_tokenizer_that_begins_texts_and_a_field_are_said(tmp_path: Path) -> None:
    held = replace(DRAFT, found=replace(TEXT, begins=True), text_field="body", texts=("a", "b/*.jsonl"), weights="ema")
    spec = read(held, tmp_path)
    assert (spec.data.bos, spec.data.text_field, spec.checkpoint.weights) == (True, "body", "ema")
    assert spec.data.texts == ("a", "b/*.jsonl")


@given(st.integers(24, 2000))
def test_a_short_text_is_shared_out_whole(windows: int) -> None:
    parts = replace(DRAFT, found=replace(TEXT, windows=windows)).windows
    assert sum(parts) == min(windows, 768)
    assert all(part >= least for part, least in zip(parts, (4, 8, 12), strict=True))


def test_a_text_that_is_too_short_is_refused_with_what_it_takes() -> None:
    with pytest.raises(StudyError, match="23 different windows of 128 tokens, and a study takes 24 at the least"):
        drafted(replace(DRAFT, found=replace(TEXT, windows=23)), "a.toml")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip() == text))
def test_any_name_is_written_so_that_it_is_read_again(name: str) -> None:
    import tomllib

    held = tomllib.loads(drafted(replace(DRAFT, texts=(name,), checkpoint=name), name))
    assert (held["data"]["text"], held["checkpoint"]["path"]) == (name, name)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(StudyError, match="cannot hold this name"):
        drafted(replace(DRAFT, texts=("\udcff",)), "a.toml")
