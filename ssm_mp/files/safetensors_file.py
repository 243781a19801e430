"""Read one `.safetensors` file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files.refused import foreign_metadata


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the first bytes of a file are those of the format: the header's length, then JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by its name in the file. Raises CheckpointError for another file, a damaged one or an artifact."""
    try:
        with safe_open(path, framework="pt") as file:
            foreign = foreign_metadata(file.metadata() or {})
            if foreign is not None:
                raise CheckpointError(f"{path}: {foreign}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        # besides its own error, the reader raises whatever a type unknown to this torch leads to
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable safetensors file, truncated or renamed? ({reason})") from None
