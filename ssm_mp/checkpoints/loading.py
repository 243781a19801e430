"""Read a checkpoint: a file or folder → `Checkpoint(config, tensors)`, with every tensor accounted for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ssm_mp.checkpoints.folder import broken_link, read_content
from ssm_mp.checkpoints.reading import Reading, read_through
from ssm_mp.checkpoints.wrappers import Weights, find_weights, holds_model
from ssm_mp.config import Config
from ssm_mp.errors import CheckpointError
from ssm_mp.families.family import Family
from ssm_mp.families.registry import Recognised, config_to_json, recognise, refuse_types
from ssm_mp.families.stated import declares_untied
from ssm_mp.files.file_state import FileState, file_states, state_of
from ssm_mp.files.packed import refuse_nested, refuse_unreadable, type_name
from ssm_mp.files.shown import listed, shown_name
from ssm_mp.files.stored_config import StoredConfig, refuse_quantised
from ssm_mp.files.weights_file import Content

_MOST_PROBLEMS = 40
"""Lines of the longest list of tensors that do not fit."""
_HEAD, _EMBEDDING = "lm_head.weight", "embedding.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors under canonical names, in the file's own types and mapped from it where it can be.

    `digest` is the SHA-256 of config, names, shapes and float32 values; `notes` are remarks for the user, e.g. where a
    stored config disagrees with the shapes. `file_types` are the types in the file → how many parameters have them,
    `file_bytes` what these take there; a tied head counts once. `source` is the `config.json` that it came with;
    `files` are the files of weights, as they were when they were read.
    """

    path: Path
    layout: str
    config: Config
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    file_types: Mapping[str, int] = field(default_factory=dict)
    file_bytes: int = 0
    source: Mapping[str, object] = field(default_factory=dict)
    files: tuple[FileState, ...] = ()

    @property
    def family(self) -> str:
        return self.config.family

    @property
    def digest(self) -> str:
        return self.reading.digest

    def require_files(self) -> None:
        """Raise CheckpointError where a file that tensors are mapped from is gone, or is another one now."""
        changed = next((file for file in self.files if file != state_of(file.path)), None)
        if changed is not None:
            raise CheckpointError(
                f"{changed.path}: it was there when its tensors were mapped, and is gone or another file now; restore "
                "it and start the same command again, what was measured so far is kept"
            )

    @cached_property
    def reading(self) -> Reading:
        """What one pass over all values finds; the pass is made once."""
        return read_through(config_to_json(self.config), self.tensors)


def load_checkpoint(path: str | Path, weights: str | None = None) -> Checkpoint:
    """Read a `.safetensors` file, a torch file, an index of shards, or a folder of them.

    weights: the dotted path of the weights to take, where the file holds several, such as `ema`.

    Raises CheckpointError for a file that cannot be read safely or whose tensors do not make a model of a
    known family: one error that lists every missing, unknown, empty or misshapen tensor.
    """
    path = Path(path)
    _require_there(path)
    try:
        content = read_content(path)
    except OSError as error:
        raise CheckpointError(f"{path}: not readable ({error.strerror or error})") from None
    try:
        return _understood(path, content, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _require_there(path: Path) -> None:
    try:
        if path.exists():
            return
        reason = broken_link(path) if path.is_symlink() else "the file or folder does not exist"
    except (OSError, ValueError) as error:  # a path too long, or with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
    raise CheckpointError(f"no checkpoint at {path}: {reason}")


def _understood(path: Path, content: Content, wanted: str | None) -> Checkpoint:
    """The checkpoint that a content is. Raises CheckpointError without the path."""
    stored = content.config
    refuse_quantised(stored)
    refuse_types(stored, others=not holds_model(content.values))
    weights = find_weights(content.values, wanted)
    refuse_nested({**weights.tensors, **weights.strangers})
    found = recognise(weights.tensors, stored)
    weights, left_out = _without_other_parts(found.family, weights)
    names = {canonical: name for canonical, name in found.names.items() if name in weights.tensors}
    found = replace(found, names=_with_embedding(names, stored))
    tensors = {canonical: weights.tensors[name] for canonical, name in found.names.items()}
    arranged = found.family.arranged(tensors, stored)
    found = replace(found, names={name: found.names[under] for name, (under, _) in arranged.items()})
    tensors = {name: tensor for name, (_, tensor) in arranged.items()}
    notes: list[str] = []
    if found.family.plain_in_mlx:
        tensors, notes = _with_kernels_last(tensors)
    if _HEAD in found.names.values() and _HEAD not in found.names:
        notes.append("no embedding in the file; the head is used for both, as the two are tied")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    config, more = found.family.config(shapes, stored)
    expected = {parameter.name for parameter in config.parameters()}
    refuse_unreadable({weights.names[found.names[name]]: tensors[name] for name in tensors if name in expected})
    if not declares_untied(stored) and _head_is_embedding(tensors):
        del tensors[_HEAD], shapes[_HEAD]
        config, more = found.family.config(shapes, stored)
    _account(found, weights, tensors, config)
    held = {name: tensor for name, tensor in tensors.items() if name in {one.name for one in config.parameters()}}
    kept = {name: _as_held(tensor) for name, tensor in held.items()}
    notes = [*content.notes, *weights.notes, *notes, *more]
    if left_out:
        notes.append(f"parts of a larger model that are not read: {listed(left_out)}")
    if content.left_out:
        notes.append(f"left out: {listed(content.left_out, 12)}")
    types: Counter[str] = Counter()
    for tensor in held.values():
        types[type_name(tensor)] += tensor.numel()
    size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in held.values())
    checkpoint = Checkpoint(
        path, found.layout, config, kept, tuple(notes), dict(types.most_common()), size, dict(stored.values),
        file_states(path),
    )  # fmt: skip
    _refuse_non_finite(checkpoint)
    return checkpoint


def _without_other_parts(family: Family, weights: Weights) -> tuple[Weights, list[str]]:
    """The weights without what the family does not read, such as a vision tower, and the names of that."""
    left = {name for name in weights.tensors if family.is_left_out(name)}
    strange = {name for name in weights.strangers if family.is_left_out(name)}
    kept = replace(
        weights,
        tensors={name: tensor for name, tensor in weights.tensors.items() if name not in left},
        strangers={name: tensor for name, tensor in weights.strangers.items() if name not in strange},
    )
    return kept, sorted({weights.names[name] for name in left} | strange)


def _with_embedding(names: Mapping[str, str], stored: StoredConfig) -> dict[str, str]:
    """The names, with the head as the embedding where a file keeps only the head of a tied pair."""
    if _EMBEDDING in names or _HEAD not in names or declares_untied(stored):
        return dict(names)
    return {_EMBEDDING if canonical == _HEAD else canonical: name for canonical, name in names.items()}


def _with_kernels_last(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with convolutions as `[I, 1, K]`; MLX keeps them as `[I, K, 1]`, others as `[I, K]`."""
    turned: Counter[str] = Counter()
    result = dict(tensors)
    for name, tensor in tensors.items():
        if not re.fullmatch(r"layers\.[0-9]+\..*\bconv(?:1d)?\.weight", name):
            continue
        if tensor.dim() == 2:
            result[name] = tensor.unsqueeze(1)
            turned["[I, K]"] += 1
        elif tensor.dim() == 3 and tensor.shape[2] == 1 and tensor.shape[1] > 1:
            result[name] = tensor.transpose(1, 2)
            turned["[I, K, 1]"] += 1
    return result, [f"{n} conv1d.weight are stored as {shape}, read as [I, 1, K]" for shape, n in turned.items()]


def _head_is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head equals the embedding: it is then tied, and counted once."""
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    return head is not None and embedding is not None and torch.equal(head, embedding)


def _account(found: Recognised, weights: Weights, tensors: Mapping[str, Tensor], config: Config) -> None:
    """Raise one error that lists every missing, unknown, empty or misshapen tensor."""
    expected = {parameter.name: parameter.shape for parameter in config.parameters()}
    optional = config.statistics()
    names = {canonical: weights.names[name] for canonical, name in found.names.items()}
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += sorted(_misfits(names, tensors, {**expected, **optional}))
    problems += [f"unknown: {shown_name(name)} {list(tensor.shape)}" for name, tensor in weights.strangers.items()]
    if problems:
        shown = problems[:_MOST_PROBLEMS]
        shown += [f"… and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise CheckpointError(
            f"{len(problems)} tensor{'s do' if len(problems) > 1 else ' does'} not fit a model of family "
            f"{found.family.word!r} (layout {found.layout!r}):\n  " + "\n  ".join(shown)
        )


def _misfits(
    names: Mapping[str, str], tensors: Mapping[str, Tensor], known: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    for name, tensor in tensors.items():
        shape, original = tuple(tensor.shape), shown_name(names[name])
        if tensor.numel() == 0:
            yield f"empty: {original} {list(shape)}"
        elif name not in known:
            yield f"unknown: {original} {list(shape)}"
        elif shape != known[name]:
            yield f"misshapen: {original} {list(shape)}, expected {list(known[name])}"


def _as_held(tensor: Tensor) -> Tensor:
    """A tensor as a checkpoint has it: in the file's own type, unless that is wider than float32."""
    held = tensor.detach().contiguous()
    return held.float() if held.dtype == torch.float64 else held


def _refuse_non_finite(checkpoint: Checkpoint) -> None:
    bad = [
        f"{name} ({checkpoint.reading.bad[name]} of {tensor.numel()} values)"
        for name, tensor in checkpoint.tensors.items()
        if name in checkpoint.reading.bad
    ]
    if bad:
        raise CheckpointError("NaN or infinite values in: " + listed(bad, 8))
