"""Tokens that are no text: which ones look so, and which begins a text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ssm_mp.errors import DataError

HIDDEN = "\ue000"
"""Stands before the names of entries that no text may spell; no text has this sign."""

_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Za-z_0-9 ]+\]|<\|.+\|>")

_BEGINS = ("<s>", "<bos>", "<BOS>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<sos>", "[CLS]", "<|endoftext|>")
"""Names of the token that begins a text, the surest first; where models have one token for both, it ends texts too."""


def looks_special(token: str) -> bool:
    """Whether a token's name is that of a special one: `<pad>`, `[UNK]`, `<|im_end|>`."""
    return _SPECIAL.fullmatch(token.removeprefix(HIDDEN)) is not None


def bos_id(bos: bool | int, tokenizer: Tokenizer | None, folder: Path | None, vocabulary: int) -> int | None:
    """The id that windows begin with: None for False, an id as it is, and for True what the tokenizer says.

    folder: where `tokenizer_config.json` or `special_tokens_map.json` may stand, which name the token. Raises
    DataError where it cannot be found, or is outside the vocabulary.
    """
    if bos is False:
        return None
    if bos is True:
        found = _named(tokenizer, folder)
        if found is None:
            reason = (
                "token ids have no tokenizer" if tokenizer is None else "the tokenizer has no token of a known name"
            )
            raise DataError(
                f"[data] bos = true: {reason} that says which token begins a text; give its id, e.g. [data] bos = 1"
            )
    else:
        found = int(bos)
    if not 0 <= found < vocabulary:
        raise DataError(f"[data] bos: token id {found} is outside the model's vocabulary of {vocabulary}")
    return found


def _named(tokenizer: Tokenizer | None, folder: Path | None) -> int | None:
    if tokenizer is None:
        return None
    said = (
        []
        if folder is None
        else [_said(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    )
    names = [*(name for name in said if name), *_BEGINS]
    ids = (tokenizer.token_to_id(mark + name) for name in names for mark in ("", HIDDEN))
    return next((found for found in ids if found is not None), None)


def _said(path: Path) -> str | None:
    """The token that a Hugging Face file calls `bos_token`."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None  # it is only one of several that may say it
    token = content.get("bos_token") if isinstance(content, dict) else None
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
