"""Calibration's statistics, kept in the run directory, so that a run that is continued does not calibrate anew.

The file is an archive of arrays under a mark of all that they depend on; where it is damaged, or of something else,
calibration is done again.

Dimensions: `c` components that multiply inputs, `b` bins, `e` experts of all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from search.base.progress import slow
from search.problem.preparation import digest_of
from search.problem.run_directory import GROUPING, mark_of
from search.problem.spec import StudySpec
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.conversion.calibrate import InputStatistics, Statistics, calibrate
from ssm_mp.conversion.prepare import Prepared
from ssm_mp.conversion.regroup import grouping_of
from ssm_mp.data import Windows
from ssm_mp.model import LanguageModel
from ssm_mp.modules.embedding import BlockedEmbedding

CALIBRATION = "calibration.npz"

_VERSION = 1
"""Of what is measured and how it is kept."""

Say = Callable[[str], None]


def statistics_of(
    spec: StudySpec,
    checkpoint: Checkpoint,
    model: LanguageModel,
    windows: Windows,
    compute: str,
    say: Say,
    folder: Path | None,
    prepared: Prepared | None = None,
) -> Statistics:
    """Those of a model's inputs on the calibration windows, from an earlier process where it kept them in a folder.

    compute: what results depend on of the machine. prepared: what was folded into the model before.
    """
    exponents = {} if prepared is None else prepared.inputs

    def measure() -> Statistics:
        say(f"calibrating on {len(windows)} windows ({spec.data.calibration})")
        return calibrate(model, windows, lambda stage, total: slow(stage, total).step, exponents)

    depends = {
        "checkpoint": checkpoint.digest,
        "windows": windows.digest,
        "blocks": blocks_digest(model) if spec.precision.embedding_blocks else None,
        GROUPING: grouping_of(checkpoint.config),
        "compute": compute,
        **({} if prepared is None else {"prepared": digest_of(prepared)}),
    }
    found = kept_statistics(folder, depends, measure, say)
    return {name: replace(one, exponent=exponents.get(name)) for name, one in found.items()}


def blocks_digest(model: LanguageModel) -> str:
    """Which token is in which block of the embedding."""
    embedding = model.embedding
    assert isinstance(embedding, BlockedEmbedding)
    return hashlib.sha256(embedding.block_of.cpu().numpy().tobytes()).hexdigest()


def kept_statistics(
    folder: Path | None, depends: Mapping[str, Any], measure: Callable[[], Statistics], say: Say
) -> Statistics:
    """The statistics kept in a folder, or measured and kept there; None: nothing is kept.

    depends: what they depend on. `say` is told where a file is damaged, or cannot be written.
    """
    if folder is None:
        return measure()
    path, mark = folder / CALIBRATION, mark_of({"version": _VERSION, **depends})
    try:
        found = _read(path, mark)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        say(f"note: {path} is damaged ({error}); calibrating again")
        found = None
    if found is not None:
        return found
    statistics = measure()
    try:
        _write(path, mark, statistics)
    except OSError as error:
        say(f"note: calibration cannot be kept, other processes calibrate again ({error})")
    return statistics


def _read(path: Path, mark: str) -> Statistics | None:
    """The statistics of a file; None where there is none, or of something else. An archive checks its own sums."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as held:
        if str(held["mark"]) != mark:
            return None
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


def _write(path: Path, mark: str, statistics: Statistics) -> None:
    """Write the file whole: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    every = list(statistics.values())
    try:
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                mark=np.array(mark),
                names=np.array(list(statistics), dtype=str),
                largest=np.array([one.largest for one in every]),
                counts=np.stack([one.counts.numpy() for one in every]) if every else np.zeros((0, 0)),
                experts=np.array([len(one.tokens) for one in every], dtype=np.int64),
                tokens=np.array([count for one in every for count in one.tokens], dtype=np.int64),
            )
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
