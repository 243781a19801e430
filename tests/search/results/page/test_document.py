"""The page as a text: it holds what it needs, reaches for nothing, and nothing of a study is markup in it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.problem.run_directory import FRONT, PAGE
from search.results.page.document import SCRIPTS, STYLES, embedded, render, served
from tests.search.searched import EVIL, Searched

TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.just(EVIL)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


class Elements(HTMLParser):
    """The elements of a page: names, attributes, and the texts of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_embedded_values_come_back_and_hold_no_tag(values: dict[str, object]) -> None:
    text = str(embedded(values))
    assert "<" not in text
    assert json.loads(text) == values


def test_numbers_that_json_does_not_know_are_none() -> None:
    assert str(embedded({"a": [math.inf, -math.inf, math.nan, 1.5]})) == '{"a":[null,null,null,1.5]}'


def test_the_page_of_a_search_is_left_by_it_and_holds_its_front(searched: Searched) -> None:
    page = (searched.run / PAGE).read_text(encoding="utf-8")
    content = json.loads(Elements(page).scripts[0])
    answer = json.loads((searched.run / FRONT).read_text(encoding="utf-8"))
    assert content["front"] == [point["trial"] for point in answer["front"]]
    assert content["winner"] == answer["winner"]
    assert render(searched.content()) == page


def test_the_page_reaches_for_nothing_and_runs_only_the_scripts_that_its_policy_names(searched: Searched) -> None:
    found = Elements(render(replace(searched.content(), name=EVIL, said=EVIL, facts=[(EVIL, EVIL)])))
    addresses = [held[key] for _, held in found.tags for key in ("src", "href", "action", "data") if key in held]
    assert addresses == ["data:,", "#trials"]
    assert not [name for _, held in found.tags for name in held if name.startswith("on")]
    policy = next(held["content"] for tag, held in found.tags if tag == "meta" and "http-equiv" in held)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    data, *scripts = found.scripts
    assert json.loads(data)["name"] == EVIL
    for script in scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.count("sha256-") == len(scripts) == 2


def test_a_served_page_may_ask_its_server_and_changes_its_version_with_the_search(searched: Searched) -> None:
    content = searched.content()
    version, page = served(content)
    assert f'data-version="{version}"' in page
    assert "connect-src 'self'" in unescape(page)
    assert served(content)[0] == version
    assert served(replace(content, points=content.points[:-1]))[0] != version


def test_vega_is_the_file_that_its_package_holds() -> None:
    held = (files("search.results.page") / "vega" / "vega.min.js").read_bytes()
    assert hashlib.sha256(held).hexdigest() == "8f6a3587cf8d4f42c7e08120e3eb05d067e746d554e39d2dcf52acc0bd5ba28f"


def test_every_part_of_the_page_is_in_it() -> None:
    here = files("search.results.page")
    assert {one.name for one in (here / "script").iterdir()} == {f"{name}.js" for name in SCRIPTS}
    assert {one.name for one in (here / "style").iterdir()} == {f"{name}.css" for name in STYLES}


def luminance(colour: str) -> float:
    parts = [part / 255 for part in bytes.fromhex(colour[1:])]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("tone", [0, 1], ids=["light", "dark"])
def test_every_text_can_be_told_from_what_it_stands_on(tone: int) -> None:
    style = (files("search.results.page") / "style" / "colours.css").read_text(encoding="utf-8")
    held = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", style.split("@media")[tone]))
    for text, paper in product(("ink", "soft", "accent", "link", "red", "pass", "warn", "fail"), ("paper", "raised")):
        low, high = sorted(luminance(held[name]) for name in (text, paper))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, paper)
    for sign in ("blue", "grey", "green", "red"):  # of graphics
        low, high = sorted(luminance(held[name]) for name in (sign, "paper"))
        assert (high + 0.05) / (low + 0.05) >= 3, sign
