"""The pages that people read, taken apart: headings, links, blocks of code, code in sentences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHANGELOG = "CHANGELOG.md"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`([^`]+)`")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\[[^\[\]]*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, what it is written in (empty where that is not said), and its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A page by its path in the repository."""

    name: str
    text: str

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(
            Block(self.name, self.text.count("\n", 0, found.start()) + 1, found[1], found[2])
            for found in _FENCE.finditer(self.text)
        )

    @property
    def sentences(self) -> str:
        """The text without blocks and comments."""
        return _COMMENT.sub("", _FENCE.sub("", self.text))

    @property
    def codes(self) -> tuple[str, ...]:
        """Code in sentences and tables, on one line each."""
        return tuple(" ".join(found[1].replace("\\|", "|").split()) for found in _CODE.finditer(self.sentences))

    @property
    def links(self) -> tuple[str, ...]:
        """What links and pictures lead to."""
        return tuple(found[1] for found in _LINK.finditer(_CODE.sub("code", self.sentences)))

    @property
    def anchors(self) -> frozenset[str]:
        """What links may name after `#`: headings as GitHub writes them, a second one of the same words with `-1`."""
        seen: Counter[str] = Counter()
        found = set()
        for heading in _HEADING.findall(self.sentences):
            words = re.sub(r"\[([^\[\]]*)\]\([^()]*\)", r"\1", heading).lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
        return frozenset(found)

    def tables(self, head: str) -> Iterator[tuple[str, ...]]:
        """The rows of the tables whose first cell is `head`, cell by cell."""
        inside = False
        for line in self.text.splitlines():
            cells = cells_of(line)
            inside = bool(cells) and (inside or cells[0] == head)
            if inside and cells[0] != head and not set(cells[0]) <= set(":-"):
                yield cells


def cells_of(line: str) -> tuple[str, ...]:
    """The cells of a table's line; none of another line."""
    return tuple(cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1])


def page(name: str) -> Page:
    """A page by its path in the repository."""
    return Page(name, (ROOT / name).read_text(encoding="utf-8"))


NAMES = ("README.md", "CONTRIBUTING.md", CHANGELOG, *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")))
PAGES = {name: page(name) for name in NAMES}
"""Every page that is checked."""
NOW = {name: found for name, found in PAGES.items() if name != CHANGELOG}
"""Those that speak of what there is now; the changelog also names what is gone."""
