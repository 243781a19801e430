from __future__ import annotations

import datetime
import re
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from search.problem.directives import DEFAULTS, OPTIONS, RESERVED, SlurmSection, unwritable

DEFAULT_DIRECTIVES = ("--partition=gpu", "--gres=gpu:a30:1", "--cpus-per-task=8", "--mem=32G", "--time=04:00:00")

PASSED_THROUGH = sorted(OPTIONS - DEFAULTS.keys())
TAKE_VALUES = ["account", "constraint", "mail-user", "mem", "nice", "partition", "qos", "reservation", "time"]
values = st.integers(-10_000, 10_000) | st.text(max_size=30).map(str.strip).filter(lambda text: not unwritable(text))
tables = st.dictionaries(st.sampled_from(TAKE_VALUES), values | st.just(False), max_size=6)


def section(**table: Any) -> SlurmSection:
    return SlurmSection.model_validate(table)


def test_the_defaults_are_the_plans() -> None:
    assert SlurmSection().directives() == DEFAULT_DIRECTIVES
    assert (SlurmSection().setup, SlurmSection().throttle, SlurmSection().warning_seconds) == ("", None, 120)


def test_each_default_can_be_replaced() -> None:
    for name in DEFAULTS:
        assert f"--{name}=other" in section(**{name: "other"}).directives()
        assert len(section(**{name: "other"}).directives()) == len(DEFAULTS)


@pytest.mark.parametrize("nothing", [False, "", "  "])
def test_each_default_can_be_left_out(nothing: object) -> None:
    for name, directive in zip(DEFAULTS, DEFAULT_DIRECTIVES, strict=True):
        left = section(**{name: nothing}).directives()
        assert left == tuple(one for one in DEFAULT_DIRECTIVES if one != directive)


def test_true_is_a_flag_without_a_value() -> None:
    assert section(exclusive=True).directives()[-1] == "--exclusive"
    assert section(exclusive="user").directives()[-1] == "--exclusive=user"


@pytest.mark.parametrize("name", PASSED_THROUGH)
def test_every_option_of_sbatch_passes_through(name: str) -> None:
    try:
        assert section(**{name: "x"}).directives()[-1] == f"--{name}=x"
    except ValidationError:
        assert section(**{name: True}).directives()[-1] == f"--{name}"


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("partion", "partition"),
        ("acount", "account"),
        ("cpus_per_tasks", "cpus-per-task"),
        ("mem_per_gpus", "mem-per-gpu"),
        ("nodlist", "nodelist"),
        ("contraint", "constraint"),
        ("throtle", "throttle"),
        ("warning_second", "warning_seconds"),
        ("set_up", "setup"),
    ],
)
def test_a_misspelt_option_names_the_nearest(misspelt: str, nearest: str) -> None:
    with pytest.raises(ValidationError, match=f"'{misspelt}' is no option of sbatch; the nearest is '{nearest}'"):
        section(**{misspelt: "x"})


@pytest.mark.parametrize("name", RESERVED)
def test_what_the_launcher_sets_itself_is_refused_with_the_reason(name: str) -> None:
    for spelling in (name, name.replace("-", "_")):
        with pytest.raises(ValidationError, match=re.escape(f"'{spelling}' cannot be set: {RESERVED[name]}")):
            section(**{spelling: "x"})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"cpus_per_task": 4, "cpus-per-task": 8}, "'cpus_per_task' and 'cpus-per-task' are the same option"),
        ({"warning_seconds": 4, "warning-seconds": 8}, "'warning_seconds' and 'warning-seconds' are the same option"),
        ({"mem": 1.5}, "mem: expected a string, a whole number, true or false, found 1.5"),
        ({"mem": ["1G"]}, "mem: expected a string"),
        ({"account": True}, "account: expected a value, found true"),
        ({"contiguous": "yes"}, "contiguous: expected true or false, found 'yes'"),
        ({"comment": "a\nb"}, "comment: expected one line"),
        ({"comment": "a\x1bb"}, "comment: expected one line"),
        ({"comment": 'say "a"'}, "comment: expected one line without quotes"),
        ({"comment": "it's"}, "comment: expected one line without quotes"),
        ({"comment": "a\\b"}, "comment: expected one line without quotes, backslashes"),
        ({"setup": "a\x00b"}, "found a control character"),
        ({"setup": "module load x\n #SBATCH --mem=1G"}, "'#SBATCH --mem=1G' would not be read here"),
        ({"throttle": 0}, "greater than or equal to 1"),
        ({"throttle": True}, "valid integer"),
        ({"warning_seconds": 0}, "greater than or equal to 1"),
    ],
)
def test_what_sbatch_could_not_read_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        section(**table)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValidationError, match=r"'partion' is no option .*; 'array' cannot be set"):
        section(partion="x", array="0-7")


def test_times_without_quotes_are_read_as_written() -> None:
    assert "--time=02:30:00" in section(time=datetime.time(2, 30)).directives()
    assert "--begin=2030-01-02T03:04:05" in section(begin=datetime.datetime(2030, 1, 2, 3, 4, 5)).directives()


def test_our_own_keys_may_have_hyphens() -> None:
    assert section(**{"warning-seconds": 60}).warning_seconds == 60


@given(tables)
def test_a_section_survives_its_own_dump(table: dict[str, Any]) -> None:
    one = section(**table)
    again = SlurmSection.model_validate(one.model_dump())
    assert again == one
    assert again.directives() == one.directives()


@given(tables)
def test_spelling_and_order_of_keys_do_not_matter(table: dict[str, Any]) -> None:
    other = {name.replace("-", "_"): value for name, value in reversed(table.items())}
    assert section(**other).directives() == section(**table).directives()


@given(tables)
def test_every_value_is_read_back_whole(table: dict[str, Any]) -> None:
    for name, value in section(**table).options.items():
        directive = next(one for one in section(**table).directives() if one.startswith(f"--{name}="))
        assert shlex.split(directive, comments=True) == [f"--{name}={value}"]
