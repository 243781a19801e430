from __future__ import annotations

from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.spec import load_spec

MINIMAL = '[checkpoint]\npath = "model.pt"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "my_study.toml"
    path.write_text(text)
    return path


def test_everything_but_the_checkpoint_has_a_default(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, MINIMAL))
    assert spec.name == "my_study"
    assert spec.checkpoint_path == (tmp_path / "model.pt").resolve()
    assert (spec.search.sampler, spec.search.budget_percent, spec.data.text) == ("front", 5.0, "python-stdlib")
    assert spec.precision.choices == ("fp16", "int8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"missing \[checkpoint\]"),
        ("[checkpoint]\n", r"missing \[checkpoint\] path"),
        (MINIMAL + "[search]\ntrails = 3", r"unknown key \[search\] trails; the nearest is 'trials'"),
        (MINIMAL + "[serach]\ntrials = 3", r"unknown key \[serach\]; the nearest section is \[search\]"),
        (MINIMAL + "[search]\nchoices = []", r"unknown key \[search\] choices; it belongs to \[precision\]"),
        (MINIMAL + "[search]\ntrials = 0", r"\[search\] trials: .*greater than or equal to 1, found 0"),
        (MINIMAL + '[search]\ntrials = "many"', r"\[search\] trials: .*integer, found 'many'"),
        (MINIMAL + "[search]\nbudget_percent = -1", r"\[search\] budget_percent: .*greater than 0"),
        (MINIMAL + '[search]\nobjectives = ["latency"]', r"\[search\] objectives: expected .*found \['latency'\]"),
        (MINIMAL + '[search]\nobjectives = ["perplexity", "compression"]', r"expected \['compression', 'perplexity'\]"),
        (MINIMAL + "[search]\nlatency_batch = 0", r"\[search\] latency_batch: .*greater than or equal to 1"),
        (MINIMAL + '[search]\nsampler = "magic"', r"\[search\] sampler: .*'tpe'.*found 'magic'"),
        (MINIMAL + '[precision]\nchoices = ["fp16", "int7"]', r"unknown precision 'int7'"),
        (MINIMAL + '[precision]\nchoices = ["int8"]', r"at least two different precisions"),
        (MINIMAL + '[precision]\nactivations = "sometimes"', r"\[precision\] activations"),
        (MINIMAL + "[search]\nbudget_percent = inf", r"\[search\] budget_percent"),
        (MINIMAL + '[search]\ndevice = "tpu"', r"\[search\] device"),
        (MINIMAL + "[data]\ntext = []", r"\[data\] text: expected a file, a folder or a pattern"),
        (MINIMAL + '[data]\ntext = ["a.txt", "python-stdlib"]', r"\[data\] text: .*a text of its own"),
        (MINIMAL + "[data]\ntext = 3", r"\[data\] text"),
        (MINIMAL + 'path = "again"\n', "not a TOML file"),
        ('path = "x"\n' + MINIMAL, "did you mean"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(StudyError, match=message) as caught:
        load_spec(path)
    assert str(path) in str(caught.value)


def test_overrides_have_toml_values_and_bare_words(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    spec = load_spec(path, ["search.trials=7", "search.sampler=gp", "search.budget_percent=2", 'data.text="a.txt"'])
    assert (spec.search.trials, spec.search.sampler, spec.search.budget_percent) == (7, "gp", 2.0)
    assert spec.data.text == "a.txt"
    for wrong in ("trials=7", "search.trials", "search.=7"):
        with pytest.raises(StudyError, match="expected section.key=value"):
            load_spec(path, [wrong])
    with pytest.raises(StudyError, match="the nearest is 'trials'"):
        load_spec(path, ["search.trial=7"])


def test_choices_are_ordered_the_widest_first(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, MINIMAL + '[precision]\nchoices = ["int8", "fp16"]'))
    assert spec.precision.choices == ("fp16", "int8")


def test_an_absent_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study file at .*absent\.toml"):
        load_spec(tmp_path / "absent.toml")


def test_a_text_may_be_several_names(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, MINIMAL + '[data]\ntext = ["a/*.npy", "b.npy"]'))
    assert spec.text_paths == (tmp_path / "a/*.npy", tmp_path / "b.npy")
    assert spec.data.is_ids
    mixed = load_spec(written(tmp_path, MINIMAL + '[data]\ntext = ["a.npy", "b.txt"]'))
    assert not mixed.data.is_ids
    alone = load_spec(written(tmp_path, MINIMAL + '[data]\ntext = ["b.txt"]'))
    assert alone.data.text == "b.txt"
