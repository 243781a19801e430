"""A gate that the trials of a search wait at, in whatever process, until a test lets them through."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import processes
from tests.cluster.gated.sitecustomize import OPEN, STANDING, TICKETS, VARIABLE

ROOT = Path(__file__).parents[2]
HOOK = Path(__file__).parent / "gated"


@dataclass(frozen=True)
class Gate:
    """One gate, in a folder of its own. It is closed at first; an admitted trial passes once, whoever comes first."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Gate:
        """A new gate."""
        for name in (STANDING, TICKETS):
            (folder / name).mkdir(parents=True)
        return cls(folder)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make a command of ours, and all that it starts, wait at this gate."""
        return {"PYTHONPATH": os.pathsep.join([str(HOOK), str(ROOT)]), VARIABLE: str(self.folder)}

    def admitted(self) -> int:
        """How many of the admitted trials have passed."""
        return sum(int(path.read_text()) for path in self._admissions()) - len(list((self.folder / TICKETS).iterdir()))

    def admit(self, trials: int) -> None:
        """Let so many more trials through."""
        known = len(self._admissions())
        (self.folder / f"admitted-{known}").write_text(str(trials))
        for number in range(trials):
            (self.folder / TICKETS / f"{known}-{number}").touch()

    def _admissions(self) -> list[Path]:
        return list(self.folder.glob("admitted-*"))

    def open(self) -> None:
        """Let all through from now on."""
        (self.folder / OPEN).touch()

    def standing(self) -> list[int]:
        """The living processes that wait with a trial in hand."""
        living = processes.living()
        waiting = (int(path.name) for path in (self.folder / STANDING).iterdir())
        return sorted(pid for pid in waiting if pid in living)

    def wait_for(self, count: int, explain: processes.Explain) -> list[int]:
        """The processes that wait, once there are so many."""
        seen: list[int] = []

        def enough() -> bool:
            seen[:] = self.standing()
            return len(seen) >= count

        processes.wait_until(enough, lambda: f"at the gate: {seen}, expected {count}\n{explain()}")
        return seen
