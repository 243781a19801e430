"""What a checkpoint takes in its own file, where that is not FP32: the other size that compression is told against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssm_mp.checkpoints import Checkpoint


@dataclass(frozen=True)
class Source:
    """Bytes of a checkpoint's tensors as its file holds them, and the types that it holds them in."""

    bytes: int
    types: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"source_bytes": self.bytes, "source_types": list(self.types)}

    def told(self, stored_bytes: int) -> str:
        """The compression over the file, in words.

        >>> Source(200, ("bfloat16",)).told(100)
        "2.00× of the file's own bfloat16"
        """
        return f"{self.bytes / stored_bytes:.2f}× of the file's own {' and '.join(self.types)}"


def source_of(checkpoint: Checkpoint) -> Source | None:
    """A checkpoint's own bytes; None where they are those of FP32, or not known."""
    types = tuple(name for name in sorted(checkpoint.file_types) if "float" in name)  # no statistics, no masks
    known = checkpoint.file_bytes > 0 and types not in ((), ("float32",))
    return Source(checkpoint.file_bytes, types) if known else None
