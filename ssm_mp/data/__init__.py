"""Texts and token files → windows, and their division into disjoint splits."""

from __future__ import annotations

from ssm_mp.data.windows import (
    END_OF_TEXT,
    Splits,
    TokenIds,
    Windows,
    cut,
    draw,
    load_tokenizer,
    read_tokens,
    synthetic_windows,
    tokenize,
)

__all__ = [
    "END_OF_TEXT",
    "Splits",
    "TokenIds",
    "Windows",
    "cut",
    "draw",
    "load_tokenizer",
    "read_tokens",
    "synthetic_windows",
    "tokenize",
]
