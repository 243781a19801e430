"""Arrays kept in the run directory under a mark of all that they depend on, so that other processes need not make them.

Each file is an archive, which checks its own sums; where it is damaged, or of something else, it is made again.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from search.problem.run_directory import mark_of

T = TypeVar("T")
Array = npt.NDArray[Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class KeptArrays(Generic[T]):
    """A kind of thing that is kept: the name of its file, and its way into arrays and back.

    version: of how it is made and kept. told, again: it, and making it again, in what is said. restored: raises
    ValueError or KeyError where arrays are not of such a thing.
    """

    name: str
    version: int
    told: str
    again: str
    arrays: Callable[[T], Mapping[str, Array]]
    restored: Callable[[Mapping[str, Array]], T]

    def of(self, folder: Path | None, depends: Mapping[str, Any], make: Callable[[], T], say: Say) -> T:
        """What is kept in a folder, or made and kept there; None: nothing is kept.

        depends: what it depends on. `say` is told where a file is damaged, or cannot be written.
        """
        if folder is None:
            return make()
        path, mark = folder / self.name, mark_of({"version": self.version, **depends})
        try:
            found = self._read(path, mark)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            say(f"note: {path} is damaged ({error}); {self.again} again")
            found = None
        if found is not None:
            return found
        made = make()
        try:
            _write(path, {"mark": np.array(mark), **self.arrays(made)})
        except OSError as error:
            say(f"note: {self.told} cannot be kept, other processes start {self.again} again ({error})")
        return made

    def _read(self, path: Path, mark: str) -> T | None:
        """What a file holds; None where there is none, or of something else."""
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as held:
            return self.restored(held) if str(held["mark"]) == mark else None


def _write(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write the file whole: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
