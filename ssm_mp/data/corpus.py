"""The text that every user already has: the Python standard library of the running interpreter.

Its `.py` files, without tests and site-packages, are split by a hash of the relative path, so that the
reference checkpoint was trained on one part and is searched and certified on two others.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import Literal

from ssm_mp.errors import MachineError

Part = Literal["train", "search", "certify"]

_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_BUCKETS = 20
"""One bucket in twenty is `search`, one is `certify`, the others are `train`."""


def part_of(relative_path: str) -> Part:
    """Which part a file belongs to, by the SHA-256 of its path relative to the library (posix form)."""
    bucket = int(hashlib.sha256(relative_path.encode()).hexdigest()[:8], 16) % _BUCKETS
    if bucket == 0:
        return "search"
    return "certify" if bucket == 1 else "train"


def stdlib_files(part: Part, root: Path | None = None) -> list[Path]:
    """The files of one part, sorted by relative path. `root` stands in for the library in tests."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED]  # thousands of files that are somebody else's
        found += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    return [root / path for path in sorted(found) if part_of(path.as_posix()) == part]


def stdlib_documents(part: Part, root: Path | None = None) -> list[str]:
    """The texts of one part. Raises MachineError where the interpreter has no readable library."""
    files = stdlib_files(part, root)
    if not files:
        raise MachineError(
            f"no .py files of the standard library for the {part!r} part under "
            f"{root or sysconfig.get_paths()['stdlib']}; give the study a text of its own ([data] text = …)"
        )
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]
