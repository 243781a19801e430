"""A space as numbers: bytes, latencies, and both blended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from search.problem.spec import load_spec
from search.problem.workspace import open_workspace
from search.sampling.catalogue import catalogue_of
from ssm_mp.evaluation.latency import LatencyTable
from tests.tiny import write_study


def test_latencies_of_maps_are_those_of_the_table(tmp_path: Path) -> None:
    space = open_workspace(load_spec(write_study(tmp_path))).space
    rng = np.random.default_rng(0)
    seconds = {c: {p: round(float(rng.uniform(1e-5, 1e-3)), 9) for p in held} for c, held in space.choices.items()}
    table = LatencyTable(1, 16, "cpu", 1, 3, 0.02, 0.005, seconds, ())
    catalogue = catalogue_of(space, "static", table)
    rows = np.array([[rng.integers(len(held)) for held in catalogue.precisions] for _ in range(20)])
    for row, nanoseconds in zip(rows, catalogue.by_latency.bytes(rows), strict=True):
        chosen = catalogue.decode(row)
        assert nanoseconds / 1e9 == pytest.approx(table.predict(chosen), abs=1e-12)
        assert table.predict(chosen) == table.predict(space.map(chosen).to_json())
    assert catalogue.latency_reference / 1e9 == pytest.approx(table.reference, abs=1e-12)
    assert catalogue_of(space, "static").latencies is None
    for share, axis in ((1.0, catalogue), (0.0, catalogue.by_latency)):
        order, blend = axis.bytes(rows), catalogue.blended(share).bytes(rows)
        assert np.corrcoef(order, blend)[0, 1] > 0.99999
    both = catalogue.blended(0.5).bytes(rows)
    assert np.allclose(both, (catalogue.blended(1.0).bytes(rows) + catalogue.blended(0.0).bytes(rows)) / 2, atol=20)
