"""The examples of the public functions run as they stand."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import ssm_mp

DOCUMENTED = (
    "",
    ".artifact",
    ".components",
    ".conversion.convert",
    ".decoding.decode",
    ".evaluation.drift",
    ".evaluation.evaluate",
    ".precision_map",
)


@pytest.mark.parametrize("module", DOCUMENTED)
def test_examples_run(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    result = doctest.testmod(import_module(ssm_mp.__name__ + module))
    assert result.attempted > 0
    assert result.failed == 0
