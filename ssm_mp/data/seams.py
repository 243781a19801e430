"""Where a text may be cut so that its parts give the same token ids as the whole."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Encode = Callable[[Sequence[str]], list[list[int]]]
"""Token ids of each text."""

_CONTEXT = 1024
"""Characters on either side of a cut that are compared, cut and whole."""
_REACH = 4096
"""How far from the place where a piece should end a cut is looked for."""
_TRIES = 3
"""Places of each kind that are tried."""

_PLACES = (
    re.compile(r"(?<=[^\W_])(?=\s)"),  # after a letter or digit, before white space
    re.compile(r"(?<=\S)(?=\s)"),
    re.compile(r"(?<=[^\w\s])(?=\w)"),  # after a sign
    re.compile(r"(?<=\w)(?=[^\w\s])"),
)
"""Kinds of places where tokenizers join little, the likeliest first."""


def checked_cuts(text: str, size: int, whole: Encode, onward: Encode) -> list[int]:
    """Positions about `size` characters apart at which the text may be cut; as many as are found.

    A position is kept where `_CONTEXT` characters on either side give the same ids together (`whole`) as the left
    ones by themselves followed by the right ones (`onward`).
    """
    cuts: list[int] = []
    waiting = list(range(size, len(text) - _CONTEXT, size))
    for place in _PLACES:
        near = {target: _near(text, target, place) for target in waiting}
        for turn in range(_TRIES):
            tried = [(target, at[turn]) for target, at in near.items() if turn < len(at) and target in waiting]
            holds = _hold(text, [at for _, at in tried], whole, onward)
            kept = {target: at for (target, at), good in zip(tried, holds, strict=True) if good}
            cuts += kept.values()
            waiting = [target for target in waiting if target not in kept]
    return sorted(set(cuts))


def _near(text: str, target: int, place: re.Pattern[str]) -> list[int]:
    """The first few positions of a kind from `target` on."""
    end = min(target + _REACH, len(text) - 1)
    return [found.start() for found in itertools.islice(place.finditer(text, target, end), _TRIES)]


def _hold(text: str, positions: Sequence[int], whole: Encode, onward: Encode) -> list[bool]:
    # from white space to white space: a part of a word may be none that the tokenizer knows
    lefts = [text[_first_space(text, max(0, at - _CONTEXT), at) : at] for at in positions]
    rights = [text[at : _last_space(text, at, at + _CONTEXT)] for at in positions]
    together = whole([a + b for a, b in zip(lefts, rights, strict=True)])
    return [a + b == c for a, b, c in zip(whole(lefts), onward(rights), together, strict=True)]


def _first_space(text: str, first: int, end: int) -> int:
    found = re.compile(r"\s").search(text, first, end - 1) if first else None
    return first if found is None else found.start()


def _last_space(text: str, first: int, end: int) -> int:
    found = [match.start() for match in re.compile(r"\s").finditer(text, first + 1, end)]
    return found[-1] if found and end < len(text) else end


@dataclass(frozen=True)
class Words:
    """Words of a text: parts between the seams of a known pre-tokenizer. Each has the same ids wherever it stands."""

    pattern: re.Pattern[str]
    seam: re.Pattern[str]

    def split(self, text: str) -> list[str]:
        return self.pattern.findall(text)

    def last_seam(self, text: str) -> int:
        """The last position, near the end, at which a text may be cut; 0 where there is none."""
        reach = _REACH
        while True:
            found = [match.start() for match in self.seam.finditer(text, max(1, len(text) - reach))]
            if found or reach >= len(text):
                return found[-1] if found else 0
            reach *= 16


_GPT2 = Words(
    # white space, then all up to the next; a word ends before a space, tab or newline. What Python counts as white
    # space and Unicode does not, or what is neither of the three, never ends one
    re.compile(r"[ \t\n]*[^ \t\n]+(?:(?<=\s)[ \t\n]+[^ \t\n]+)*(?:[ \t\n]+\Z)?|[ \t\n]+"),
    re.compile(r"(?<=\S)(?=[ \t\n])"),
)
"""Of `'s| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+`: no part of it goes on into white space."""

_GPT4 = Words(
    # as above, but a newline after a sign belongs to the sign
    re.compile(
        r"[ \t\n]*[^ \t\n]+(?:(?:(?<![0-9A-Za-z])(?=\n)|(?<=\s)(?=[ \t]))[ \t\n]+[^ \t\n]+)*(?:[ \t\n]+\Z)?|[ \t\n]+"
    ),
    re.compile(r"(?<=[0-9A-Za-z])(?=[ \t\n])|(?<=\S)(?=[ \t])"),
)
"""Of the patterns below, in which signs take the newlines after them along."""

_GPT4_PATTERNS = frozenset(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
"""Of GPT-4 and Llama 3, which take three digits at a time, and of Qwen 2, which takes one."""


def word_pattern(tokenizer: dict[str, Any]) -> Words | None:
    """The words of a tokenizer (the content of its tokenizer.json); None where its pre-tokenizer is not a known one.

    Known are BPE models without normaliser (or with NFC, which joins nothing over white space) whose added tokens
    hold no seam and take nothing from their neighbours.
    """
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    words = _known_words(tokenizer.get("pre_tokenizer") or {})
    plain = model["type"] == "BPE" and not model.get("dropout")
    if words is None or not plain or (normalizer or {"type": "NFC"})["type"] != "NFC":
        return None
    for token in tokenizer.get("added_tokens", []):
        if token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\S\s", token["content"]):
            return None
    return words


def _known_words(before: dict[str, Any]) -> Words | None:
    parts = before.get("pretokenizers", [before])
    match parts:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return _GPT2
        case [{"type": "Digits"}, {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return _GPT2
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if pattern in _GPT4_PATTERNS:
            return _GPT4
    return None
