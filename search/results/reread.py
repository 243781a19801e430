"""An artifact that was just written, read back: it must be what was converted, and do what was measured.

Every array is compared bit for bit with the one in memory, so that an evaluation has little left to find: that the
folder's config and map put them together to the same function. It is made on all search windows where that is quick,
and on as many as time allows where it is not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.base.progress import slow
from search.measure.objective import Baseline, Measured, window_order
from search.problem.judge import Judge
from search.problem.workspace import Workspace
from ssm_mp.artifact import Artifact, read_artifact, stored_arrays
from ssm_mp.errors import ArtifactError
from ssm_mp.evaluation.compare import Diverged
from ssm_mp.evaluation.evaluate import Evaluation, FloatArray, evaluate
from ssm_mp.files.mapped import let_go
from ssm_mp.files.shown import listed
from ssm_mp.model import LanguageModel

MOST_SECONDS = 15.0
"""What evaluating an artifact that was read back may take."""

TOLERANCE = 1e-3
"""Nats a token that another process may have measured otherwise: it adds up in another order."""


@dataclass(frozen=True, eq=False)
class Expected:
    """What a map is to do. seconds: what measuring it took here, in one pass; None where a trial measured it."""

    measured: Measured
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Reread:
    """An artifact as it was read back. windows: how many of the search windows it was evaluated on.

    difference: its distance from what was measured in nats a token, the mean over those windows; 0 is demanded where
    this process measured it the same way.
    """

    artifact: Artifact
    arrays: int
    windows: int
    of_windows: int
    difference: float

    @property
    def sentence(self) -> str:
        """In a few words, for the gate."""
        if self.windows == self.of_windows:
            return "same perplexity"
        return f"same arrays, same likelihood on {self.windows} of {self.of_windows} windows"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "arrays": self.arrays,
            "windows": self.windows,
            "of_windows": self.of_windows,
            "difference_nats_per_token": self.difference,
        }


def reread(
    folder: Path,
    model: LanguageModel,
    workspace: Workspace,
    baseline: Baseline,
    expected: Expected,
    size: int,
    seconds: float = MOST_SECONDS,
) -> Reread:
    """Read a folder and hold it against the model that was written, of `size` bytes of tensors, and what it is to do.

    Raises ArtifactError, without the path, where anything differs.
    """
    artifact = read_artifact(folder, workspace.spec.search.device, workspace.model.after_layer)
    different = different_arrays(model, artifact.model)
    if different or artifact.tensor_bytes != size:
        of = f"; arrays that differ: {listed(different, 4)}" if different else ""
        raise ArtifactError(f"{artifact.tensor_bytes} bytes for {size}{of}")
    full, measured = baseline.evaluation, expected.measured
    every = workspace.splits.search
    share = seconds if workspace.spec.search.metric == "perplexity" else seconds / 2  # FP32 is run as well
    numbers = _numbers(artifact.model, workspace, expected.seconds, share)
    at = np.arange(len(every)) if numbers is None else numbers
    found = _evaluated(artifact.model, workspace, numbers)
    fp32 = found.cost_of(Evaluation(full.nll[at], full.predicted))
    known = fp32 + measured.differences[at] * full.predicted
    difference = float(np.abs(found.cost - known).mean()) / full.predicted
    wrong = difference > TOLERANCE
    if numbers is None and expected.seconds is not None:
        wrong = found.perplexity != measured.perplexity
        difference = 0.0
    if wrong:
        raise ArtifactError(_wrong(found, known, measured))
    return Reread(artifact, len(stored_arrays(model)), at.size, len(every), difference)


def _wrong(found: Evaluation, known: FloatArray, measured: Measured) -> str:
    """How an artifact that was read back differs from what was measured; known: what windows were to cost, `[w]`."""
    if isinstance(found, Diverged):
        costs = [float(cost.sum()) / found.tokens for cost in (found.cost, known)]
        return (
            f"KL to FP32 {costs[0]!r} nats a token for {costs[1]!r} on {found.windows} windows, perplexity "
            f"{found.perplexity!r} for {measured.perplexity!r} on all"
        )
    theirs = Evaluation(known, found.predicted).perplexity
    return f"perplexity {found.perplexity!r} for {theirs!r} on {found.windows} windows"


def different_arrays(ours: LanguageModel, theirs: LanguageModel) -> list[str]:
    """Names of the arrays that two models do not hold alike, bit for bit."""
    held, found = stored_arrays(ours), stored_arrays(theirs)
    different = []
    for name in sorted(held.keys() | found.keys()):
        pair = held.get(name), found.get(name)
        if not _same(*pair):
            different.append(name)
        let_go(array for array in pair if array is not None)
    return different


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(array: Tensor) -> Tensor:
    return array.detach().contiguous().flatten().view(torch.uint8)


def _numbers(model: LanguageModel, workspace: Workspace, known: float | None, most: float) -> np.ndarray | None:
    """The windows to evaluate within `most` seconds, at least one; None for all of them.

    known: what all of them take; None: one of them tells.
    """
    windows, order = workspace.splits.search, window_order(workspace)
    if known is None:
        began = time.monotonic()
        evaluate(model, windows.part(order[:1]))
        known = (time.monotonic() - began) * len(windows)
    if known <= most:
        return None
    return order[: max(1, int(len(windows) * most / known))]


def _evaluated(model: LanguageModel, workspace: Workspace, numbers: np.ndarray | None) -> Evaluation:
    judge, windows = workspace.judge, workspace.splits.search
    if numbers is not None:
        windows = windows.part(numbers)
        judge = Judge(workspace.model, windows, workspace.spec.search.metric)  # FP32's states of these alone
    progress = slow("evaluating what was read back", judge.layer_calls(model))
    found = judge(model, None, progress.step)
    progress.close()
    return found
