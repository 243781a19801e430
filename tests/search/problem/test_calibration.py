"""Statistics are kept as they were measured, for what they were measured on, and measured again where damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from search.problem import calibration
from search.problem.calibration import STATISTICS
from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from ssm_mp.conversion.calibrate import InputStatistics, Statistics
from tests.families.models import write_family_study

ON = {"checkpoint": "a", "windows": "b", "blocks": None}


def statistics(seed: int = 0, count: int = 3) -> dict[str, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{c}.é": InputStatistics(
            float(torch.rand(1, generator=generator)) * 10.0 ** (9 * c - 9),
            torch.rand(20, generator=generator, dtype=torch.float64),
            tuple(range(c, 2 * c + 1)),
        )
        for c in range(count)
    }


def same(one: Statistics, other: Statistics) -> bool:
    return list(one) == list(other) and all(
        (a.largest, a.tokens) == (b.largest, b.tokens) and torch.equal(a.counts, b.counts)
        for a, b in zip(one.values(), other.values(), strict=True)
    )


class Measured:
    """Counts how often statistics are measured."""

    def __init__(self, found: Statistics) -> None:
        self.found = found
        self.times = 0
        self.said: list[str] = []

    def kept(self, folder: Path | None, depends: dict[str, str | None] = ON) -> Statistics:
        def measure() -> Statistics:
            self.times += 1
            return self.found

        return STATISTICS.of(folder, depends, measure, self.said.append)


@given(seed=st.integers(0, 99), count=st.integers(0, 4))
def test_what_is_read_back_is_what_was_measured(
    seed: int, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, measured = tmp_path_factory.mktemp("run"), Measured(statistics(seed, count))
    first, second = measured.kept(folder), measured.kept(folder)
    assert measured.times == 1
    assert measured.said == []
    assert same(first, second)
    assert [path.name for path in folder.iterdir()] == [STATISTICS.name]


def test_the_folder_is_made_and_without_one_nothing_is_kept(tmp_path: Path) -> None:
    measured = Measured(statistics())
    measured.kept(tmp_path / "runs/new")
    assert (tmp_path / "runs/new" / STATISTICS.name).exists()
    measured.kept(None)
    measured.kept(None)
    assert measured.times == 3


def test_on_anything_else_they_are_measured_again(tmp_path: Path) -> None:
    measured = Measured(statistics())
    measured.kept(tmp_path)
    for key in ON:
        measured.kept(tmp_path, {**ON, key: "other"})
    assert measured.times == 1 + len(ON)
    assert measured.said == []


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "foreign"])
def test_a_damaged_file_is_said_and_replaced(tmp_path: Path, damage: str) -> None:
    measured = Measured(statistics())
    measured.kept(tmp_path)
    path = tmp_path / STATISTICS.name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    damaged = {"cut": bytes(content[:-200]), "empty": b"", "changed": bytes(content), "foreign": b"not an archive" * 9}
    path.write_bytes(damaged[damage])
    assert same(measured.kept(tmp_path), measured.found)
    assert measured.times == 2
    assert len(measured.said) == 1
    assert str(path) in measured.said[0]
    measured.kept(tmp_path)
    assert measured.times == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    measured = Measured(statistics())
    assert same(measured.kept(tmp_path / "file" / "run"), measured.found)
    assert len(measured.said) == 1
    assert "cannot be kept" in measured.said[0]


def test_a_run_that_is_opened_again_calibrates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(write_family_study(tmp_path, "lfm2_moe/plain", windows=(8, 4, 4)), [])
    run, told = tmp_path / "run", list[str]()
    first = open_workspace(spec, told.append, run)
    assert any(line.startswith("calibrating on") for line in told)
    monkeypatch.setattr(calibration, "calibrate", lambda *_: pytest.fail("calibrated again"))
    told.clear()
    second = open_workspace(spec, told.append, run)
    assert not any(line.startswith("calibrating on") for line in told)
    assert same(first.converter._statistics, second.converter._statistics)
    assert first.fingerprint() == second.fingerprint()
    assert first.space.choices == second.space.choices
