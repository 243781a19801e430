"""A study's text cut into disjoint windows: calibration, search, certify; and the tokenizer that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from search.base.errors import StudyError
from search.base.progress import slow
from search.problem.spec import STDLIB, StudySpec
from ssm_mp.artifact_folder import ACCOMPANYING
from ssm_mp.config import Config
from ssm_mp.data import (
    BYTES,
    Pool,
    Splits,
    Windows,
    bos_id,
    cut,
    draw,
    draw_evenly,
    encode,
    find_tokenizer,
    load_tokenizer,
    named_files,
    overlap,
    read_documents,
    synthetic_windows,
)
from ssm_mp.data.corpus import Part, stdlib_documents

_LONGEST_DEFAULT_WINDOW = 1024
_DEFAULT_WINDOW = 256
"""Window length where neither the study nor the model's positions say one."""

Say = Callable[[str], None]
"""Told a line for people."""

_CALIBRATION_STRIDE = 10
"""Calibration windows are drawn from every tenth file of the training part: enough for ranges, quicker to tokenise."""


def window_length(spec: StudySpec, config: Config) -> int:
    """The study's window, else the model's positions, else a default. Raises StudyError beyond them."""
    if spec.data.window is None:
        return min(config.max_tokens or _DEFAULT_WINDOW, _LONGEST_DEFAULT_WINDOW)
    if config.max_tokens is not None and spec.data.window > config.max_tokens:
        raise StudyError(
            f"[data] window = {spec.data.window}, but {config.limit}; expected at most {config.max_tokens}"
        )
    return spec.data.window


def load_splits(
    spec: StudySpec, config: Config, say: Say = lambda line: None, cache: Path | None = None
) -> Splits:  # fmt: skip
    """The study's disjoint windows: calibration, search, certify. Raises DataError where the text is too short.

    cache: as in `open_workspace`. `say` is told what repeats and was left out.
    """
    splits = _stdlib_splits(spec, config, say) if spec.data.text == STDLIB else _file_splits(spec, config, say, cache)
    certify = overlap(splits.certify, splits.search, splits.bos)
    for note in (*splits.dropped, *([certify.sentence()] if certify.near_duplicates else [])):
        say(f"note: {note}")
    return replace(splits, overlap=certify)


def _stdlib_splits(spec: StudySpec, config: Config, say: Say) -> Splits:
    """Each split from its own part of the library, less what another split has drawn already."""
    data, length, path = spec.data, window_length(spec, config), tokenizer_path(spec)
    tokenizer = load_tokenizer(path, config.vocabulary, say)
    bos = bos_id(data.bos, tokenizer, path if path.is_dir() else path.parent, config.vocabulary)

    def part(name: Part) -> Pool:
        documents = stdlib_documents(name)
        documents = documents[::_CALIBRATION_STRIDE] if name == "train" else documents
        encoded = encode(documents, tokenizer)
        across = data.cross_documents
        return cut(encoded.ids, length, f"the library's {name} part", bos, encoded.starts, across=across)

    search_pool = part("search")
    search = draw(search_pool, [data.search_windows], data.seed)[0]
    text = part("train")
    calibration = text.without([search])
    counts = text.counts(config.vocabulary, repeats=True)
    drawn = _calibration(spec, calibration, counts)
    certify_pool = part("certify").without([search, drawn])
    certify = draw_evenly(certify_pool, data.certify_windows, data.seed)
    dropped = [line for pool in (calibration, search_pool, certify_pool) for line in pool.dropped()]
    return Splits(drawn, search, certify, counts, bos, tuple(dropped))


def _file_splits(spec: StudySpec, config: Config, say: Say, cache: Path | None) -> Splits:
    """All splits from one text, of as many files as it has."""
    data, files = spec.data, named_files(spec.text_paths)
    for note in files.notes:
        say(f"note: {note}")
    tokenizer, folder = None, None
    if not data.is_ids:
        tokenizer = load_tokenizer(tokenizer_path(spec), config.vocabulary, say)
        named = tokenizer_path(spec)
        folder = named if named.is_dir() else named.parent
    bos = bos_id(data.bos, tokenizer, folder, config.vocabulary)
    text = read_documents(
        files.paths, tokenizer, config.vocabulary, data.text_field, cache=cache, say=say,
        steps=lambda stage, total: slow(stage, total).step,
    )  # fmt: skip
    what = str(files.paths[0]) if len(files.paths) == 1 else f"{files.paths[0]} and {len(files.paths) - 1} more files"
    pool = cut(text.ids, window_length(spec, config), what, bos, text.starts, across=data.cross_documents)
    # calibration windows first: a larger certify split then leaves the other two as they are. Those drawn last only
    # show that there are enough for all
    own = 0 if data.calibration == "synthetic" else data.calibration_count
    calibration, search, _ = draw(pool, [own, data.search_windows, data.certify_windows], data.seed)
    certify = draw_evenly(pool.without([calibration, search]), data.certify_windows, data.seed)
    if data.calibration == "text":
        # not the unused windows: there are fewer of them where more windows certify
        counts = torch.bincount(calibration.ids.flatten(), minlength=config.vocabulary)
    else:
        counts = pool.without([search, certify]).counts(config.vocabulary)
        calibration = _calibration(spec, pool, counts)
    return Splits(calibration, search, certify, counts, bos, pool.dropped())


def _calibration(spec: StudySpec, pool: Pool, counts: torch.Tensor) -> Windows:
    """Calibration windows of a text, or made up from the frequencies of its tokens."""
    data = spec.data
    if data.calibration == "text":
        return draw(pool, [data.calibration_count], data.seed)[0]
    return synthetic_windows(counts.numpy(), data.calibration_count, pool.length, data.seed, pool.bos)


def tokenizer_path(spec: StudySpec) -> Path:
    """The study's tokenizer, else the one found beside the checkpoint."""
    asked = spec.data.tokenizer
    if asked is not None:
        named = spec.resolve(asked, "[data] tokenizer")
        return Path(BYTES) if asked == BYTES and not named.exists() else named
    checkpoint = spec.checkpoint_path
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return find_tokenizer(folder) or folder / "tokenizer.json"


def tokenizer_json(spec: StudySpec, config: Config) -> bytes | None:
    """The tokenizer that the study's text is read with, as a `tokenizer.json`; None where the text is token ids."""
    if spec.data.is_ids:
        return None
    return load_tokenizer(tokenizer_path(spec), config.vocabulary).to_str().encode()


def accompanying(spec: StudySpec) -> dict[str, bytes]:
    """Files beside the checkpoint that other programs read: name → content."""
    path = spec.checkpoint_path
    folder = path if path.is_dir() else path.parent
    return {name: (folder / name).read_bytes() for name in ACCOMPANYING if (folder / name).is_file()}
