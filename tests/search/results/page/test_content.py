"""What the page shows, as values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from search.base.metric import KL, PERPLEXITY
from search.measure.probe import LOWEST, WIDEST, Probe
from search.results.page.content import sensitivities
from search.results.page.tiles import tiles_of
from tests.search.searched import Searched

ROWS = [
    {"name": "a", "bytes": {"fp16": 100, "int8": 60, "nf4": 30}},
    {"name": "b", "bytes": {"fp16": 1000, "int8": 510, "nf4": 260}},
    {"name": "c", "bytes": {"fp16": 8}},
]
PROBES = [
    Probe("a", "int8", WIDEST, "fp16", 0.001, 1e-4, 0.0),
    Probe("a", "nf4", WIDEST, "fp16", 0.02, 1e-3, 0.0),
    Probe("b", "int8", WIDEST, "fp16", 0.003, 1e-4, 0.0),
    Probe("a", "fp16", LOWEST, "nf4", -0.015, 1e-3, 0.0),
]


def test_sensitivities_are_the_costliest_first_with_what_they_save_and_what_raising_gives_back() -> None:
    rows = sensitivities(PROBES, ROWS, {}, PERPLEXITY)
    assert [(row["component"], row["precision"], row["saved"]) for row in rows] == [
        ("a", "nf4", 70), ("b", "int8", 490), ("a", "int8", 40),
    ]  # fmt: skip
    assert rows[0]["cost"] == pytest.approx(2.02013, rel=1e-4)
    assert rows[0]["back"] == pytest.approx(1.48881, rel=1e-4)
    assert rows[1]["back"] is None


def test_a_group_saves_what_its_members_save_and_kl_is_in_nats() -> None:
    rows = sensitivities([Probe("both", "nf4", WIDEST, "fp16", 0.02, 1e-3, 0.0)], ROWS, {"both": ("a", "b")}, KL)
    assert rows[0]["members"] == ["a", "b"]
    assert rows[0]["saved"] == 70 + 740
    assert rows[0]["cost"] == pytest.approx(0.02)
    assert rows[0]["spread"] == pytest.approx(1.96e-3)


def test_what_no_number_can_hold_is_cut_off() -> None:
    assert sensitivities([replace(PROBES[0], log_increase=1e6)], ROWS, {}, PERPLEXITY)[0]["cost"] > 1e40


def test_only_the_drift_of_a_map_of_this_study_is_shown(searched: Searched) -> None:
    content = searched.content()
    last = content.points[-1]
    measured = {"windows": {"length": 8}, "long": None}
    known = replace(
        content, drift={"x": {"map": dict(last.map), **measured}, "y": {"map": {"other": "int8"}, **measured}}
    )
    assert [(row["path"], row["trial"]) for row in known.to_json()["drift"]] == [("x", last.trial)]


def test_tiles_say_how_far_a_search_has_come(searched: Searched) -> None:
    done = {tile.name: tile for tile in tiles_of(searched.content())}
    assert done["Winner"].figure.endswith("× smaller")
    assert done["Trials"].figure == "9 of 9"
    running = replace(searched.content(), certificate=None, gates=[], asked=64, said="Not certified yet.")
    now = {tile.name: tile for tile in tiles_of(running)}
    assert now["Trials"].figure == "9 of 64"
    assert now["Certificate"].figure == "none yet"
    assert "Gates" not in now
    none = {tile.name for tile in tiles_of(replace(running, points=[]))}
    assert none == {"Certificate", "Budget", "Trials"}
