"""Texts that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ssm_mp.errors import MachineError


def write_whole(path: Path, text: str, errors: str = "strict", *, new_folders: bool = False) -> None:
    """Write a file in UTF-8: under another name first, then renamed. Raises MachineError, and leaves nothing then.

    errors: what becomes of signs that UTF-8 cannot hold, as `str.encode` takes it. new_folders: make those that lack.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if new_folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors=errors)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where not even its folder is one
            partial.unlink(missing_ok=True)
        raise MachineError(f"{path}: cannot be written ({error})") from None
