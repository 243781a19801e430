"""Which files a folder means: what `transformers` would load, else the only weights in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ssm_mp.checkpoints.wrappers import holds_model
from ssm_mp.errors import CheckpointError
from ssm_mp.files.json_file import read_json
from ssm_mp.files.refused import foreign_folder
from ssm_mp.files.shards import INDEX, read_index, read_shards, shard_family, shard_names
from ssm_mp.files.shown import listed
from ssm_mp.files.stored_config import StoredConfig, config_of, config_within, refuse_quantised
from ssm_mp.files.tree import equal, leaves
from ssm_mp.files.weights_file import WEIGHTS_SUFFIXES, Content, read_file

_CONFIG = "config.json"
_TRANSFORMERS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""What `transformers` looks for, the first that is there taken (its `_get_resolved_checkpoint_files`)."""
_FIRST = (*_TRANSFORMERS, "model.pt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "adapter_model")
"""How files begin that trainers write beside weights."""


def read_content(path: Path) -> Content:
    """What a checkpoint, a file or a folder, holds. Links are not followed: what is beside it is beside the link.

    Raises CheckpointError that names the file that is missing, damaged, another tool's or quantised.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(INDEX):
        return _with_config(path, read_index(path))
    family = shard_family(path.name)
    if family is not None:
        index = path.with_name(f"{family[0]}{family[1]}{INDEX}")
        whole = index.name if index.is_file() else "the folder"
        raise CheckpointError(f"{path}: one of {family[2]} shards of a checkpoint; give {whole}")
    values, left_out = read_file(path)
    if path.suffix.lower() in (".safetensors", ".bin") and not config_within(values, path.name).values:
        return _with_config(path, (values, left_out, ()))
    return Content(values, config_within(values, path.name), left_out)


def _with_config(path: Path, read: tuple[object, tuple[str, ...], tuple[str, ...]]) -> Content:
    """What was read, with the config beside `path`, else the one in the file itself."""
    values, left_out, notes = read
    config = _config_beside(path)
    return Content(values, config if config.values else config_within(values, path.name), left_out, notes)


def _config_beside(path: Path) -> StoredConfig:
    beside = path.with_name(_CONFIG)
    stored = config_of(read_json(beside) if beside.exists() else {}, _CONFIG)
    try:
        refuse_quantised(stored)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent}: {error}") from None
    return stored


def _read_folder(folder: Path) -> Content:
    config = _config_beside(folder / _CONFIG)
    first = _first_of(folder, config)
    others = [name for name in _sets(folder) if name != first]
    if first is not None:
        content = _with_config(folder / first, _read_set(folder, first))
        if not others:
            return content
        rule = f"{first} is read" + (", as transformers does" if first in _TRANSFORMERS else "")
        note = f"{rule}; also there, not read: {listed(others)}"
        return Content(content.values, content.config, content.left_out, (*content.notes, note))
    if not others:
        raise CheckpointError(f"{folder}: {foreign_folder(folder) or _nothing_there(folder)}")
    return _read_only_set(folder, others)


def _first_of(folder: Path, config: StoredConfig) -> str | None:
    """The weights that a rule takes, if any. Raises CheckpointError where they are a link to nothing."""
    said = config.values.get("transformers_weights")
    if said is not None and not (isinstance(said, str) and Path(said).name == said and (folder / said).is_file()):
        raise config.wrong("transformers_weights", f"the name of a weights file in {folder}", said)
    for name in (said, *_FIRST) if isinstance(said, str) else _FIRST:
        if (folder / name).is_file():
            return name
        if (folder / name).is_symlink():
            raise CheckpointError(f"{folder / name}: {broken_link(folder / name)}")
    return None


def broken_link(path: Path) -> str:
    """What to say of a link to nothing."""
    return f"a link to {path.readlink()}, which is not there; was the download interrupted?"


def _sets(folder: Path) -> list[str]:
    """Everything in a folder that may be a whole model: files, indices, and the first shards of those without one."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    weights = [name for name in names if name.endswith(WEIGHTS_SUFFIXES) and not name.startswith(_NO_WEIGHTS)]
    indices = [name for name in names if name.endswith(tuple(f"{suffix}{INDEX}" for suffix in WEIGHTS_SUFFIXES))]
    alone = [name for name in weights if shard_family(name) is None]
    families = {family for name in weights if (family := shard_family(name)) is not None}
    numbered = [shard_names(*family)[0] for family in families if f"{family[0]}{family[1]}{INDEX}" not in indices]
    return sorted((*alone, *indices, *numbered))


def _read_set(folder: Path, name: str) -> tuple[object, tuple[str, ...], tuple[str, ...]]:
    if name.endswith(INDEX):
        return read_index(folder / name)
    family = shard_family(name)
    if family is not None:
        return read_shards(folder, shard_names(*family))
    return (*read_file(folder / name), ())


def _read_only_set(folder: Path, names: list[str]) -> Content:
    """The one of several that holds a model. Raises CheckpointError where more do, and their tensors differ."""
    read = {name: _read_set(folder, name) for name in names}
    models = [name for name in names if holds_model(read[name][0])] or names
    first, *more = models
    differing = [name for name in more if not _same(read[first][0], read[name][0])]
    if differing:
        both = f"{first} and {listed(differing, 3)}"
        raise CheckpointError(
            f"{folder}: two sets of weights that differ, {both}, and no rule which is meant; give one"
        )
    content = _with_config(folder / first, read[first])
    others = [name for name in names if name != first]
    note = (f"{first} is read; also there, not read: {listed(others)}",) if others else ()
    return Content(content.values, content.config, content.left_out, (*content.notes, *note))


def _same(one: object, other: object) -> bool:
    """Whether two contents hold equal tensors under equal names."""
    ours, theirs = dict(_named(one)), dict(_named(other))
    return ours.keys() == theirs.keys() and all(equal(ours[name], theirs[name]) for name in ours)


def _named(content: object) -> Iterator[tuple[str, Tensor]]:
    return ((leaf.original, leaf.value) for leaf in leaves(content) if isinstance(leaf.value, Tensor))


def _nothing_there(folder: Path) -> str:
    snapshots = sorted(entry for entry in (folder / "snapshots").glob("*") if entry.is_dir())
    if snapshots:
        return (
            f"no weights in this folder, but it is a cache; give snapshots/{listed([one.name for one in snapshots], 2)}"
        )
    found = listed(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    return f"no model.safetensors, pytorch_model.bin, model.pt or other weights in this folder; found {found}"
