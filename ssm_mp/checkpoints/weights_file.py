"""Read one file of weights: its content as it is, before names are understood."""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from ssm_mp.checkpoints.refused import foreign_file
from ssm_mp.checkpoints.safetensors_file import looks_like_safetensors, read_safetensors
from ssm_mp.checkpoints.stored_config import StoredConfig
from ssm_mp.errors import CheckpointError

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
        return _read_torch(path)
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


def _read_torch(path: Path) -> tuple[object, tuple[str, ...]]:
    """A torch file, without executing anything in it."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[:2] != b"PK" and head[:1] != b"\x80":  # neither a zip archive nor a pickle
        advice = "; it looks like a .safetensors file, rename it" if head[8:9] == b"{" else ", truncated or renamed?"
        raise CheckpointError(f"{path}: not a torch file{advice}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # remarks about pickle protocols, for torch's developers
            return torch.load(path, map_location="cpu", weights_only=True), ()
    except Exception as error:  # a damaged file can make the unpickler raise anything
        needs = re.search(r"(?:GLOBAL|Unsupported (?:global|class))[^\n]*?(?= by default| was not|, |\n|$)", str(error))
        if isinstance(error, pickle.UnpicklingError) and needs:
            raise CheckpointError(
                f"{path}: refused, it needs more than tensors and plain values to unpickle, which could run any code "
                f"({needs[0]}). Save its state_dict() alone, best as .safetensors"
            ) from None
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: not a readable torch file, truncated or renamed? ({reason})") from None
