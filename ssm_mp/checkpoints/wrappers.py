"""Where in a file's content the model is: state dicts inside dictionaries, and what stands before every name.

A file is a tree of named values. A model is wherever names go on as a known family's do (`MARK` in
`families/registry.py`); what stands before that is its path, whether it is made of nested dictionaries
(`{"model": {"state_dict": …}}`) or of prefixes (`module._orig_mod.…`). Several models in one file are told apart by
their paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ssm_mp.errors import CheckpointError
from ssm_mp.families.registry import EXAMPLES, MARK, is_outer, outer_name
from ssm_mp.files.packed import refuse_adapter, refuse_packed, refuse_stand_ins
from ssm_mp.files.record import Record
from ssm_mp.files.shown import listed, shown_name
from ssm_mp.files.tree import INNER, Leaf, key_name, leaves, members

_USUAL = (
    "model_state_dict",
    "state_dict",
    "model",
    "module",
    "net",
    "network",
    "student",
    "online_model",
    "base_model",
)
"""Paths that the weights usually have, the first taken first; any combination of them is usual too."""
_AVERAGED = re.compile(r"(^|[._])(ema|swa|swag|polyak|average|averaged|avg|shadow|teacher|target)($|[._])", re.I)
_NO_MODEL = re.compile(r"optim|exp_avg|max_exp|(^|[._])(grad|grads|gradients|fisher|momentum|moments)($|[._])", re.I)
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|num_batches_tracked|n_averaged|inv_freq|total_ops|total_params|num_updates|initted)$"
)
"""Buffers of modules and tools that no forward pass of these families uses."""
_LONGEST = 1000
"""Characters of the longest name that a model's tensor can have."""


@dataclass(frozen=True)
class Weights:
    """One model in a file.

    at: its path, dotted, empty for the top. tensors: by name without that path. names: the same → as in the file.
    strangers: tensors beside the model's own, in the same dictionary, by their names in the file.
    """

    at: str
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    strangers: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def find_weights(content: object, wanted: str | None = None) -> Weights:
    """The model that a file's content holds; `wanted` is the path of one where there are several.

    Raises CheckpointError where there is none, none at `wanted`, or several of which no rule takes one, and for
    packed weights and adapters.
    """
    if members(content) is None:
        raise CheckpointError(f"expected a dictionary of tensors, found {_kind(content)}")
    held = list(leaves(content))
    paths = frozenset(at for leaf in held if (at := _path_of(leaf)) is not None)
    at = _chosen(sorted(paths), wanted) if paths else None
    own = held if at is None else [leaf for leaf in held if _owner(leaf.name, paths) == at]
    refuse_adapter(leaf.original for leaf in own)
    refuse_packed({leaf.original: leaf.value for leaf in own})
    refuse_stand_ins({leaf.original: leaf.value for leaf in own if not _NO_MODEL.search(leaf.name)})
    if at is None:
        raise CheckpointError(_unknown_layout(content, held))
    return _gathered(at, held, paths)


def holds_model(content: object) -> bool:
    """Whether there is a known family's model anywhere in a file's content."""
    return any(_path_of(leaf) is not None for leaf in leaves(content))


def _kind(value: object) -> str:
    return value.kind if isinstance(value, Record) else type(value).__name__


def _path_of(leaf: Leaf) -> str | None:
    """What stands before a name that only a known family has, with its last dot."""
    mark = re.search(rf"(?:^|(?<=\.)){MARK}", leaf.name) if len(leaf.name) <= _LONGEST else None
    return None if mark is None else leaf.name[: mark.start()]


def _owner(name: str, paths: frozenset[str]) -> str | None:
    """The longest of the models' paths that a name is under."""
    ends = [i + 1 for i, sign in enumerate(name[:_LONGEST]) if sign == "."]
    return next((name[:end] for end in (*reversed(ends), 0) if name[:end] in paths), None)


def _chosen(paths: list[str], wanted: str | None) -> str:
    if wanted is not None:
        return _asked(paths, wanted)
    models = [at for at in paths if not _NO_MODEL.search(at)] or paths
    pool = [at for at in models if not _AVERAGED.search(at)] or models
    if len(pool) == 1:
        return pool[0]
    usual = [at for at in pool if all(part in _USUAL for part in at.split(".")[:-1])]
    if not usual:
        raise CheckpointError(
            f"{len(pool)} models in one file, and no rule which is meant: {_shown_paths(pool)}; say which with "
            f"--weights {_dotted(pool[0])}"
        )
    return min(usual, key=lambda at: ([_USUAL.index(part) for part in at.split(".")[:-1]], at))


def _asked(paths: list[str], wanted: str) -> str:
    """The path asked for: in full, its beginning, or the only one that it is a part of."""
    parts = [part for part in wanted.strip(".").split(".") if part and part not in INNER]
    asked = "".join(f"{part}." for part in parts)
    fits = (
        [at for at in paths if at == asked],
        [at for at in paths if asked and at.startswith(asked)],
        [at for at in paths if asked and f".{asked}" in f".{at}"],
    )
    for found in fits:
        if len(found) == 1:
            return found[0]
        if found:
            break
    several = f"{len(found)} models at" if found else "no model at"
    raise CheckpointError(f"{several} --weights {shown_name(wanted)}; there are: {_shown_paths(found or paths)}")


def _shown_paths(paths: Iterable[str]) -> str:
    return listed([_dotted(at) or "the top of the file (without --weights)" for at in paths], 8)


def _dotted(at: str) -> str:
    return shown_name(at.removesuffix("."))


def _gathered(at: str, held: list[Leaf], paths: frozenset[str]) -> Weights:
    """The tensors of the model at `at`, those that belong to it from further out, and what is beside it."""
    marked = [leaf.keys[:-1] for leaf in held if _path_of(leaf) == at]
    home = _common(marked)
    spread = len(set(marked)) > 1  # every module has a dictionary of its own
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    taken: set[str] = set()
    strangers: dict[str, Tensor] = {}
    ignored: list[str] = []
    beside: list[Leaf] = []
    owners = [(leaf, _owner(leaf.name, paths)) for leaf in held]
    for leaf, owner in sorted(owners, key=lambda pair: pair[1] != at):  # its own first: they win over outer ones
        at_home = leaf.keys[:-1] == home or (spread and leaf.keys[: len(home)] == home)
        name = leaf.name.removeprefix(at) if owner == at and at_home else None
        if name is None and (owner is None or at.startswith(owner)):
            name = next((outer for outer in _outer_names(leaf.name, at) if outer_name(outer) not in taken), None)
        if not isinstance(leaf.value, Tensor) or (name is None and (owner not in (None, at) or not at_home)):
            beside.append(leaf)
        elif _BUFFERS.search(leaf.name) or (name is None and leaf.value.numel() == 1):
            ignored.append(leaf.original)
        elif name is None:
            strangers[leaf.original] = leaf.value
        elif name in tensors:
            two = f"{shown_name(names[name])!r} and {shown_name(leaf.original)!r}"
            raise CheckpointError(f"{two} are two names of one tensor; keep one of them")
        else:
            tensors[name], names[name] = leaf.value, leaf.original
            taken.add(outer_name(name))
    return Weights(_dotted(at), tensors, names, strangers, tuple(_notes(at, paths, ignored, beside, home)))


def _outer_names(name: str, at: str) -> Iterator[str]:
    """Names in the model at `at` that a tensor further out can have: the head beside `model.` is the model's."""
    parts = at.split(".")[:-1]
    for end in range(len(parts), -1, -1):
        above = "".join(f"{part}." for part in parts[:end])
        rest = name.removeprefix(above)
        if name.startswith(above) and is_outer(rest):
            yield rest


def _common(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """What all paths begin with."""
    held = sorted(set(paths))
    if not held:
        return ()
    first, last = held[0], held[-1]
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]


def _notes(
    at: str, paths: Iterable[str], ignored: list[str], beside: list[Leaf], home: tuple[str, ...]
) -> Iterator[str]:
    others = sorted(other for other in paths if other != at and not _NO_MODEL.search(other))
    if others:
        here = _dotted(at) or "the top of the file"
        how = f"; --weights {_dotted(others[-1])} takes it" if others[-1] else ""
        yield f"the weights read are those at {here}; also in the file: {_shown_paths(others)}{how}"
    if ignored:
        yield f"no part of the model, ignored: {listed(sorted(ignored))}"
    other = tuple(others)
    left = dict.fromkeys(_branch(leaf.keys, home) for leaf in beside if not other or not leaf.name.startswith(other))
    if left:
        yield f"tensors that are not read, beside the model: {listed(left)}"


def _branch(keys: tuple[str, ...], home: tuple[str, ...]) -> str:
    """The key at which a value's path leaves the model's, dotted."""
    same = len(_common([keys, home]))
    return ".".join(keys[: same + 1])


def _unknown_layout(content: object, held: list[Leaf]) -> str:
    inside = members(content) or {}
    keys = [name for key in inside if (name := key_name(key)) is not None]
    if held and all(len(leaf.keys) == 1 for leaf in held) and len(keys) == len(held):
        keys = [key.split(".")[0] for key in keys]
    top = listed(dict.fromkeys(keys), 12) or "none"
    if not held:
        return f"no tensors in it, at the top or in any dictionary; top-level keys: {top}"
    names = [leaf.name for leaf in held]
    hints = ((r"mixer\.dt_bias$", "Mamba-2"), (r"\.(self_attn|attn|attention)\.", "a model with attention"))
    guess = next((f"; it looks like {what}" for sign, what in hints if any(re.search(sign, n) for n in names)), "")
    return (
        f"these tensors are of no known family (expected {EXAMPLES}){guess}; top-level keys: {top}; "
        f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {listed(names)}"
    )
