"""Trials that wait at a gate. Python imports a module of this name at its start, wherever PYTHONPATH has this folder.

A test puts it there (`tests.cluster.gate`), so that the commands of this package, which know nothing of it, hold their
trials until the test lets them through: it may look at a running search for as long as it likes, however fast or slow
the machine is. Without a gate in the environment nothing is changed.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "SSM_MP_TEST_GATE"
"""The environment's word for the folder of the gate."""
OPEN, STANDING, TICKETS = "open", "standing", "tickets"
"""In that folder: a file that lets all through, a folder with a file for each process that waits, and one with a file
for each trial that may pass."""
GATED = ("__call__", "race")
"""Methods of `search.measure.objective.Objective` that evaluate a trial."""
PATIENCE = {"search.trials.storage": "_PATIENCE_AT_START", "search.run.local_workers": "_GRACE_SECONDS"}
"""Seconds that a program waits for others that are slow: longer than a test can take, so that none is given up."""


def pass_gate(folder: Path, look: Callable[[], None]) -> None:
    """Wait until a trial may pass; `look` is called meanwhile, and may raise, as between two layers of a model."""
    here = folder / STANDING / str(os.getpid())
    here.touch()
    try:
        while True:
            if (folder / OPEN).exists():
                return
            if tickets := list((folder / TICKETS).iterdir()):
                here.unlink()  # before a ticket is taken: who stands while there is none is really waiting
                if any(map(_taken, tickets)):
                    return
                here.touch()
            look()
            time.sleep(0.05)
    finally:
        here.unlink(missing_ok=True)


def _taken(ticket: Path) -> bool:
    """Take a ticket, unless another process was faster."""
    try:
        ticket.unlink()
    except FileNotFoundError:
        return False
    return True


def _gate(folder: Path, module: ModuleType) -> None:
    """Make the objective of this process wait before each trial."""

    def waiting(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(evaluate)
        def waited(self: Any, *arguments: Any) -> Any:
            pass_gate(folder, self._before_layer or (lambda: None))
            return evaluate(self, *arguments)

        return waited

    for name in GATED:
        setattr(module.Objective, name, waiting(getattr(module.Objective, name)))


class _Changed(MetaPathFinder):
    """Changes modules of the package when they are imported; imports none itself, for some commands need no torch."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "search.measure.objective" and fullname not in PATIENCE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def changed(module: ModuleType) -> None:
            load(module)
            if fullname in PATIENCE:
                setattr(module, PATIENCE[fullname], 3600.0)
            else:
                _gate(self._folder, module)

        spec.loader.exec_module = changed  # type: ignore[method-assign]
        return spec


if VARIABLE in os.environ:
    sys.meta_path.insert(0, _Changed(Path(os.environ[VARIABLE])))
