"""`[search] metric` and its budgets in a study file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from search.base.errors import StudyError
from search.problem.spec import SearchSection, load_spec


def study(folder: Path, search: str = "") -> Path:
    path = folder / "s.toml"
    path.write_text(f'[checkpoint]\npath = "m.pt"\n[search]\n{search}\n', encoding="utf-8")
    return path


def of(folder: Path, search: str = "", *overrides: str) -> SearchSection:
    return load_spec(study(folder, search), overrides).search


def test_a_budget_in_nats_is_held_on_the_scale_of_all_budgets(tmp_path: Path) -> None:
    found = of(tmp_path, 'metric = "kl"\nbudget_nats = 0.02')
    assert math.log1p(found.budget_percent / 100) == pytest.approx(0.02, rel=1e-12)
    assert found.judged.budget(found.budget_percent) == "0.02 nats"
    assert found.objectives == ("compression", "kl")


def test_without_the_key_a_study_is_what_it_was(tmp_path: Path) -> None:
    found = of(tmp_path)
    assert (found.metric, found.budget_percent, found.objectives) == ("perplexity", 5.0, ("compression", "perplexity"))


def test_the_default_for_kl_is_about_five_percent_of_perplexity(tmp_path: Path) -> None:
    assert of(tmp_path, 'metric = "kl"').budget_percent == pytest.approx(5.0, abs=0.2)


@pytest.mark.parametrize(
    ("search", "overrides", "said"),
    [
        ("budget_nats = 0.02", (), 'budget_nats = 0.02 is a budget for metric = "kl"'),
        ("", ("search.budget_nats=0.02",), "give budget_percent"),
        ('metric = "kl"\nbudget_percent = 5', (), 'budget_percent = 5 is a budget for metric = "perplexity"'),
        ('metric = "kl"', ("search.budget_percent=5",), "give budget_nats"),
        ("budget_percent = 5", ("search.metric=kl", "search.budget_percent=5"), "give budget_nats"),
        ("budget_percent = 5", ("search.budget_percent=5", "search.metric=kl"), "give budget_nats"),
        ('objectives = ["compression", "kl"]', (), r'objectives name "kl", and metric = "perplexity"'),
        ('metric = "kl"\nobjectives = ["compression", "perplexity", "latency"]', (), "say the same in both"),
        ('metric = "kl"\nbudget_nats = 0', (), "budget_nats: input should be greater than 0"),
        ('metric = "kl"\nbudget_nats = 5', (), "budget_nats: input should be less than or equal to 2"),
        ('metric = "KL"', (), "metric: input should be 'perplexity' or 'kl', found 'KL'"),
        ("metric = 3", (), "metric: input should be 'perplexity' or 'kl', found 3"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, search: str, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(StudyError, match=said):
        of(tmp_path, search, *overrides)


@pytest.mark.parametrize("order", [1, -1])
def test_a_metric_that_is_put_in_leaves_the_files_budget_behind(tmp_path: Path, order: int) -> None:
    overrides = ("search.metric=kl", "search.budget_nats=0.01")[::order]
    found = of(tmp_path, "budget_percent = 7", *overrides)
    assert found.budget_nats == 0.01
    assert found.judged.shown(found.budget_percent) == pytest.approx(0.01)
    back = of(tmp_path, 'metric = "kl"\nbudget_nats = 0.3', "search.metric=perplexity")
    assert back.budget_percent == 5.0
    same = of(tmp_path, "budget_percent = 7", "search.metric=perplexity")
    assert same.budget_percent == 7.0
