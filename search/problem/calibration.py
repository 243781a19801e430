"""Calibration's statistics, kept in the run directory, so that a run that is continued does not calibrate anew.

Dimensions: `c` components that multiply inputs, `b` bins, `e` experts of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from search.base.progress import slow
from search.problem.calibrating import Calibrating
from search.problem.kept_arrays import Array, KeptArrays
from ssm_mp.conversion.calibrate import InputStatistics, Statistics, calibrate


def statistics_of(given: Calibrating) -> Statistics:
    """Those of a model's inputs on the calibration windows, from an earlier process where it kept them in a folder."""
    exponents = {} if given.prepared is None else given.prepared.inputs

    def measure() -> Statistics:
        given.say(f"calibrating on {len(given.windows)} windows ({given.spec.data.calibration})")
        return calibrate(given.model, given.windows, lambda stage, total: slow(stage, total).step, exponents)

    found = STATISTICS.of(given.folder, given.depends, measure, given.say)
    return {name: replace(one, exponent=exponents.get(name)) for name, one in found.items()}


def _arrays(statistics: Statistics) -> dict[str, Array]:
    every = list(statistics.values())
    return {
        "names": np.array(list(statistics), dtype=str),
        "largest": np.array([one.largest for one in every]),
        "counts": np.stack([one.counts.numpy() for one in every]) if every else np.zeros((0, 0)),
        "experts": np.array([len(one.tokens) for one in every], dtype=np.int64),
        "tokens": np.array([count for one in every for count in one.tokens], dtype=np.int64),
    }


def _restored(held: Mapping[str, Array]) -> Statistics:
    names, largest, counts = held["names"].tolist(), held["largest"], held["counts"]  # [c], [c], [c, b]
    experts, tokens = held["experts"], held["tokens"]  # [c], [e]
    if not len(names) == len(largest) == len(counts) == len(experts) or experts.sum() != len(tokens):
        raise ValueError(f"{len(names)} components, but {len(largest)} ranges and {len(counts)} histograms")
    ends = experts.cumsum()
    return {
        str(name): InputStatistics(
            float(largest[c]), torch.from_numpy(counts[c]), tuple(tokens[ends[c] - experts[c] : ends[c]].tolist())
        )
        for c, name in enumerate(names)
    }


STATISTICS = KeptArrays("calibration.npz", 1, "calibration", "calibrating", _arrays, _restored)
"""Without the exponents of scaled inputs, which are kept with what was prepared."""
