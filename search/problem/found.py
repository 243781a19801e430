"""What is found of a checkpoint and a text before there is a study: sizes, tokenizer, documents, windows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from search.base.errors import StudyError
from search.base.progress import slow
from search.problem.spec import STDLIB, StudySpec
from search.problem.splits import Say, tokenizer_path, window_length
from ssm_mp.checkpoints import Checkpoint, load_checkpoint
from ssm_mp.components import find_components
from ssm_mp.config import Config
from ssm_mp.data import (
    BYTES,
    Encoded,
    bos_id,
    cut,
    encode,
    find_tokenizer,
    load_tokenizer,
    named_files,
    read_documents,
)
from ssm_mp.data.texts import Document, documents
from ssm_mp.data.token_files import ENDS_OF_TEXT, Steps
from ssm_mp.files.shown import listed
from ssm_mp.precision_map import pinned_names

_BYTES_OF_TEXT = 1 << 25
"""As much of a text is read to count its windows: more than any default split asks for."""
_BYTE_VOCABULARY = 256


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint in numbers. free: components that are not pinned; experts: those of single experts among them."""

    family: str
    parameters: int
    components: int
    free: int
    experts: int
    vocabulary: int
    file_types: tuple[str, ...]


@dataclass(frozen=True)
class FoundText:
    """A text in numbers: its windows of `length` tokens that differ, and its documents, both `whole` or at least.

    begins: whether its tokenizer says that texts begin with a token of their own.
    """

    length: int
    windows: int
    documents: int
    whole: bool
    begins: bool


def find_model(path: Path, weights: str | None, say: Say) -> tuple[Checkpoint, FoundModel]:
    """The checkpoint, and what it is. Raises CheckpointError where it cannot be read."""
    checkpoint = load_checkpoint(path, weights)
    for note in checkpoint.notes:
        say(f"note: {note}")
    components = find_components(checkpoint)
    pins = pinned_names(components)
    free = [component for component in components if component.name not in pins]
    return checkpoint, FoundModel(
        family=checkpoint.family,
        parameters=sum(component.count for component in components),
        components=len(components),
        free=len(free),
        experts=sum(".experts." in component.name for component in free),
        vocabulary=checkpoint.config.vocabulary,
        file_types=tuple(checkpoint.file_types),
    )


def find_tokenizer_for(spec: StudySpec, vocabulary: int) -> str | None:
    """What `[data] tokenizer` must say: None where the one beside the checkpoint is found, or none is needed.

    Raises StudyError where none is found.
    """
    if spec.data.tokenizer is not None or spec.data.is_ids:
        return spec.data.tokenizer
    folder = spec.checkpoint_path if spec.checkpoint_path.is_dir() else spec.checkpoint_path.parent
    if find_tokenizer(folder) is not None:
        return None
    if vocabulary == _BYTE_VOCABULARY:
        return BYTES
    raise StudyError(
        f"no tokenizer beside {spec.checkpoint_path}; say which with --tokenizer (tokenizer.json, tokenizer.model, "
        'vocab.json, or "bytes"), or give token ids as .npy'
    )


def find_text(spec: StudySpec, config: Config, say: Say) -> FoundText | None:
    """What a study's text gives; None for the standard library, which has enough of everything."""
    if spec.data.text == STDLIB:
        return None
    files = named_files(spec.text_paths)
    for note in files.notes:
        say(f"note: {note}")
    length, begins = window_length(spec, config), False
    bos = None
    if not spec.data.is_ids:
        named = tokenizer_path(spec)
        folder = named if named.is_dir() else named.parent
        begins = _adds_bos(folder)
        bos = bos_id(begins, load_tokenizer(named, config.vocabulary, say), folder, config.vocabulary)
    text, whole = _encoded(spec, files.paths, config, say)
    pool = cut(text.ids, length, listed(map(str, files.paths), 2), bos, text.starts, across=spec.data.cross_documents)
    return FoundText(length, len(pool), text.starts.size, whole, begins)


def find_device() -> str:
    """The device that a search here is best made on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _encoded(spec: StudySpec, paths: Sequence[Path], config: Config, say: Say) -> tuple[Encoded, bool]:
    """The text's tokens, or those of its beginning; and whether they are all."""
    if spec.data.is_ids or sum(path.stat().st_size for path in paths) <= _BYTES_OF_TEXT:
        tokenizer = None if spec.data.is_ids else load_tokenizer(tokenizer_path(spec), config.vocabulary)
        steps: Steps = lambda stage, total: slow(stage, total).step  # noqa: E731
        return read_documents(paths, tokenizer, config.vocabulary, spec.data.text_field, steps=steps), True
    say(f"reading the first {_BYTES_OF_TEXT >> 20} MiB of the text")
    tokenizer = load_tokenizer(tokenizer_path(spec), config.vocabulary)
    every = (document for path in paths for document in documents(path, spec.data.text_field))
    return encode(_beginning(every, _BYTES_OF_TEXT), tokenizer, ENDS_OF_TEXT), False


def _beginning(every: Iterable[Document], most: int) -> Iterator[list[str]]:
    """Documents, until so many characters are read; the last may be cut off."""
    for document in every:
        held: list[str] = []
        for part in document:
            held.append(part[:most])
            most -= len(held[-1])
            if most <= 0:
                break
        yield held
        if most <= 0:
            return


def _adds_bos(folder: Path) -> bool:
    """Whether a tokenizer's config says that each text begins with a token of its own."""
    try:
        content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("add_bos_token") is True
