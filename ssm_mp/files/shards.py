"""Weights in several files: the shards that an index names, or that number themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.files.json_file import read_json
from ssm_mp.files.shown import listed, shown, shown_name
from ssm_mp.files.tree import equal, leaves
from ssm_mp.files.weights_file import read_file

INDEX = ".index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})(?P<suffix>\.[a-z]+)")


def shard_family(name: str) -> tuple[str, str, int] | None:
    """Stem, suffix and number of all the shards that a file named so is one of; None where it stands alone."""
    match = _NUMBERED.fullmatch(name)
    return None if match is None or int(match["total"]) < 2 else (match["stem"], match["suffix"], int(match["total"]))


def shard_names(stem: str, suffix: str, total: int) -> list[str]:
    """The files of such a family."""
    return [f"{stem}-{number:05d}-of-{total:05d}{suffix}" for number in range(1, total + 1)]


def read_index(index: Path) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The tensors of all shards that an index names, in its own folder; what was left out; notes.

    Raises CheckpointError for shards that are missing or damaged, and where index and shards contradict each other.
    """
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(map(_plain_name, placed.values())):
        raise CheckpointError(
            f"{index}: weight_map: expected tensor → name of a file in this folder, found {_odd(placed)}"
        )
    tensors, held_by, left_out, notes = _read_all(index.parent, sorted(set(placed.values())), index.name)
    lost = [f"{shown_name(name)} ({placed[name]})" for name in placed if name not in tensors]
    if lost:
        raise CheckpointError(f"{index}: names tensors that their shards lack: {listed(lost)}")
    moved = [name for name, shard in placed.items() if shard not in held_by[name]]
    unnamed = [name for name in tensors if name not in placed]
    if moved:
        notes += [f"{index.name} puts into other shards than they are in: {listed(moved)}"]
    if unnamed:
        notes += [f"{index.name} does not name, but its shards hold: {listed(unnamed)}; they are read too"]
    return tensors, left_out, tuple(notes)


def read_shards(folder: Path, names: list[str]) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The same for shards without an index, which number themselves."""
    tensors, _, left_out, notes = _read_all(folder, names, f"{names[0]} (one of {len(names)} shards)")
    return tensors, left_out, (*notes, f"no index beside the {len(names)} shards; all of them are read")


def _read_all(
    folder: Path, names: Iterable[str], by: str
) -> tuple[dict[str, Tensor], dict[str, list[str]], tuple[str, ...], list[str]]:
    """All tensors, the shards that each is in, what was left out, and notes. `by`: who names the shards."""
    tensors: dict[str, Tensor] = {}
    held_by: dict[str, list[str]] = {}
    left_out: dict[str, None] = {}
    twice: list[str] = []
    for shard in names:
        if not _is_file(folder / shard):
            raise CheckpointError(f"{folder}: {by} names {shown_name(shard)}, which is not there")
        content, left = read_file(folder / shard)
        left_out.update(dict.fromkeys(left))
        for leaf in leaves(content):
            name, value = leaf.original, leaf.value
            if not isinstance(value, Tensor):
                continue
            if name in tensors:
                if not equal(tensors[name], value):
                    both = f"{held_by[name][0]} and {shard}"
                    raise CheckpointError(
                        f"{folder}: {shown_name(name)} has other values in {both}; remove one of them"
                    )
                twice.append(name)
            tensors.setdefault(name, value)
            held_by.setdefault(name, []).append(shard)
    notes = [f"the same in two shards: {listed(twice)}"] if twice else []
    return tensors, held_by, tuple(left_out), notes


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def _odd(placed: object) -> str:
    if not isinstance(placed, Mapping):
        return "nothing" if placed is None else shown(placed)
    return shown(next((name for name in placed.values() if not _plain_name(name)), "no tensor"))
