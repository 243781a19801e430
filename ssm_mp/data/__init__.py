"""Texts and token files → windows, and their division into disjoint splits."""

from __future__ import annotations

from ssm_mp.data.encoding import END_OF_TEXT, Encoded, encode, tokenize
from ssm_mp.data.named_files import NamedFiles, named_files
from ssm_mp.data.overlap import Overlap, overlap
from ssm_mp.data.special_tokens import bos_id
from ssm_mp.data.splits import Splits
from ssm_mp.data.token_files import read_documents, read_tokens
from ssm_mp.data.tokenizer_files import BYTES, find_tokenizer, load_tokenizer, prompt_ids
from ssm_mp.data.unigram import unigram_perplexity
from ssm_mp.data.windows import Pool, TokenIds, Windows, cut, draw, draw_evenly, synthetic_windows

__all__ = [
    "BYTES",
    "END_OF_TEXT",
    "Encoded",
    "NamedFiles",
    "Overlap",
    "Pool",
    "Splits",
    "TokenIds",
    "Windows",
    "bos_id",
    "cut",
    "draw",
    "draw_evenly",
    "encode",
    "find_tokenizer",
    "load_tokenizer",
    "named_files",
    "overlap",
    "prompt_ids",
    "read_documents",
    "read_tokens",
    "synthetic_windows",
    "tokenize",
    "unigram_perplexity",
]
