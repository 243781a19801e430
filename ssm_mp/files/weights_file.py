"""Read one file of weights: its content as it is, before names are understood."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssm_mp.errors import CheckpointError
from ssm_mp.files.refused import foreign_file
from ssm_mp.files.safetensors_file import looks_like_safetensors, read_safetensors
from ssm_mp.files.stored_config import StoredConfig
from ssm_mp.files.torch_file import read_torch_file

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHTS_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


@dataclass(frozen=True)
class Content:
    """What a file or folder holds: nested dictionaries of tensors and other values, and the config beside them.

    left_out: what the reader did not take, in words. notes: remarks for the user.
    """

    values: object
    config: StoredConfig
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_file(path: Path) -> tuple[object, tuple[str, ...]]:
    """A file's content and what of it was left out; its suffix says its format, and where it has no known one, its
    first bytes do.

    Nothing in it is executed, and links are not followed: the suffix is that of the name given.
    Raises CheckpointError for a file that is damaged, no weights at all, or another tool's.
    """
    head = _head(path)
    foreign = foreign_file(path, head)
    if foreign is not None:
        raise CheckpointError(f"{path}: {foreign}")
    suffix = path.suffix.lower()
    if suffix not in WEIGHTS_SUFFIXES:
        torch_file = head.startswith((b"PK", b"\x80"))
        suffix = ".safetensors" if looks_like_safetensors(head) else ".pt" if torch_file else suffix
    if suffix == ".safetensors":
        return read_safetensors(path), ()
    if suffix in TORCH_SUFFIXES:
        read = read_torch_file(path)
        return read.content, read.left_out
    known = ", ".join(TORCH_SUFFIXES)
    raise CheckpointError(f"{path}: expected a .safetensors file, a torch file ({known}) or a folder, found {suffix!r}")


def _head(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError(f"{path}: neither a file nor a folder")
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror})") from None
