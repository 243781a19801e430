"""Several precision maps at once → evaluated in one pass of a stack → what each trial reports.

Dimensions: `m` maps, `w` search windows.

The reference is `Objective`, one map at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from search.measure.objective import Finished, Measured, Objective, Seen
from search.measure.racing import best_rival, rungs
from search.problem.splits import window_length
from search.problem.workspace import Workspace
from ssm_mp.errors import EvaluationError, InfeasibleError
from ssm_mp.evaluation.stack import Outcome, at_once
from ssm_mp.precision_map import PrecisionMap

Raced = Measured | EvaluationError | InfeasibleError
"""What one map measured, or what is wrong with it."""

_FEWEST_ROUNDS = 8
"""A sampler that saw no result until a study is half over would propose blindly."""


def trials_at_once(workspace: Workspace) -> int:
    """Trials that a worker takes at once, by `[search] stacked`.

    `auto` is one on a CPU, where a stack is no faster, and on a GPU as many as memory allows, but at most an eighth
    of all trials, so that later proposals learn from earlier results.
    """
    search = workspace.spec.search
    if search.stacked != "auto":
        return int(search.stacked)
    if torch.device(search.device).type == "cpu" or workspace.memory.layer_by_layer:
        return 1
    length = window_length(workspace.spec, workspace.checkpoint.config)
    return max(1, min(at_once(workspace.model, length), search.trials // _FEWEST_ROUNDS))


class StackedObjective(Objective):
    """Converts and evaluates several maps of one workspace at a time."""

    def all_windows(self, maps: Sequence[PrecisionMap]) -> list[Raced]:
        """What `Objective` measures of each map on all windows, to rounding."""
        every = np.arange(len(self._workspace.splits.search))
        found = zip(maps, self._stacked(maps, None), strict=True)
        return [
            outcome if isinstance(outcome, Exception) else self._measured(one, self._seen(outcome, every))
            for one, outcome in found
        ]

    def race_many(self, entries: Sequence[tuple[PrecisionMap, Finished]], error: float) -> list[Raced]:
        """What `Objective.race` gives for each map and its rivals, to rounding: a map that is stopped leaves the stack.

        All maps are looked at where one of them may well be stopped, so that one may be stopped earlier than alone.

        error: chance allowed to stop a map that all windows would have left on the front.
        """
        windows = len(self._workspace.splits.search)
        maps = [precision_map for precision_map, _ in entries]
        rivals = [best_rival(self._size(one), finished) for one, finished in entries]
        all_seen = [Seen.nothing(windows) for _ in maps]
        found: dict[int, Raced] = {}
        began, count = 0, rungs(windows)[0]
        while began < windows and len(found) < len(maps):
            new, seen = self._order[began:count], self._order[:count]
            racing = [m for m in range(len(maps)) if m not in found]
            following = windows
            for m, outcome in zip(racing, self._stacked([maps[m] for m in racing], new), strict=True):
                if isinstance(outcome, Exception):
                    found[m] = outcome
                    continue
                all_seen[m].put(new, self._seen(outcome, new))
                whole = rivals[m]
                rival = None if whole is None else whole[seen]
                stopped = self._stopped(maps[m], all_seen[m].at(seen), rival, error)
                if stopped is not None:
                    found[m] = stopped
                elif count < windows:
                    following = min(following, self._next_rung(all_seen[m].at(seen), rival, error))
            began, count = count, following
        return [found[m] if m in found else self._measured(maps[m], all_seen[m]) for m in range(len(maps))]

    def _stacked(self, maps: Sequence[PrecisionMap], at: np.ndarray | None) -> list[Outcome]:
        return self._workspace.judge.stacked(self._workspace.converter, maps, at, self._before_layer)
