"""Sizes that the shapes of a file's tensors show."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import count, islice

from ssm_mp.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
"""Canonical name → shape."""

INDEX = r"(0|[1-9][0-9]{0,8})"
"""A layer's or an expert's number as a file writes it; a longer one numbers nothing that fits in a file."""


def count_of(shapes: Shapes, pattern: str, one: str, many: str) -> int:
    """How many things `pattern` numbers from 0, so no more than there are tensors.

    Raises CheckpointError where numbers between them are missing; `one` and `many` say what is numbered.
    """
    numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    last = max(numbers, default=-1)
    missing = last + 1 - len(numbers)
    if missing:
        first = list(islice((number for number in count() if number not in numbers), min(5, missing)))
        shown = ", ".join(map(str, first)) + (", …" if missing > 5 else "")
        are = f"{many} are" if missing > 1 else f"{one} is"
        raise CheckpointError(f"{missing} {are} missing, though number {last} is there: {shown}")
    return last + 1


def size_of(shapes: Shapes, what: str, *sources: tuple[str, int]) -> int:
    """The size that most `sources` (regular expression of names, dimension) agree on."""
    votes: Counter[int] = Counter()
    for pattern, dimension in sources:
        for name, shape in shapes.items():
            if re.fullmatch(pattern, name) and len(shape) > dimension and shape[dimension]:
                votes[shape[dimension]] += 1
    if not votes:
        expected = " or ".join(re.sub(r"\[0-9\]\+", "…", pattern).replace("\\", "") for pattern, _ in sources)
        raise CheckpointError(f"no tensor shows the {what}; expected one of {expected}")
    return votes.most_common(1)[0][0]
