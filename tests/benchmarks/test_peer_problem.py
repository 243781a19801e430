"""What other tools decide, as maps of the study's own choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peer_problem import Decision, Problem
from benchmarks.plain_mamba import HEAD
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from tests.tiny import HUGGING_FACE, write_study

MODULE = "layers.0.ssm.in_proj"


@pytest.mark.parametrize(
    ("choices", "held"),
    [
        (("fp16", "int8", "nf4", "nf3", "int3"), {"fp16": "fp16", "int8": "int8", "int4": "nf4", "int3": "nf3"}),
        (("fp16", "int8", "nf4g32", "int4"), {"int4": "int4", "int3": "int3"}),
    ],
)
def test_a_tools_integers_are_the_best_that_the_study_has_in_as_many_bytes(
    tmp_path: Path, choices: tuple[str, ...], held: dict[str, str]
) -> None:
    listed = ", ".join(f'"{name}"' for name in choices)
    study = write_study(tmp_path, config=HUGGING_FACE, extra=f"[precision]\nchoices = [{listed}]")
    problem = Problem(open_workspace(load_spec(study)))
    decides = frozenset({MODULE, HEAD})
    for theirs, ours in held.items():
        found = problem.map(Decision("tool", {MODULE: theirs}), decides, "int8").to_json()
        assert (found[MODULE], found["embedding"], found["layers.1.ssm.in_proj"]) == (ours, "fp16", "int8")
