"""`report.html`: the whole page as one text, which needs nothing else and reaches for nothing.

Charts are drawn by Vega (6.4.0, `vega/`). Of the libraries that work offline in one file it is the smallest that a page
can carry: 0.52 MB, where plotly.js takes 1.19 MB in its basic bundle (4.8 MB in the one that its Python package has)
and BokehJS 1.27 MB. A chart is a value in JSON, drawn as SVG, so that its points are elements that can be focused and
have a text of their own. No Python package brings Vega without a program of 33 MB, so the file itself is kept here.

Nothing of a study can act: Jinja escapes all text, data stand in a JSON block without a `<`, scripts put texts into the
page as texts, and the page's own policy lets no script run but those whose digests it names, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from search.results.gates import MARKS, overall
from search.results.page.content import PageContent
from search.results.page.tiles import tiles_of

SCRIPTS = (
    "figures", "search", "tooltip", "marks", "front_scales", "front_marks", "front_spec", "front", "legend", "charts",
    "table", "columns", "allocation", "chosen", "follow", "page",
)  # fmt: skip
"""Parts of the page's script, in the order in which they stand in it."""
STYLES = ("colours", "page", "charts", "tables")
"""Parts of its style."""
_VERSION = "not yet known"


def render(content: PageContent) -> str:
    """The page as a file."""
    return _rendered(content, "")


def served(content: PageContent) -> tuple[str, str]:
    """The page of a server, which it asks again while a search runs, and a word that changes when the page does."""
    page = _rendered(content, _VERSION)
    version = hashlib.sha256(page.encode(errors="replace")).hexdigest()[:16]
    return version, page.replace(_VERSION, version, 1)


def _rendered(content: PageContent, version: str) -> str:
    vega, own = _part("vega/vega.min.js"), script()
    head, tested = content.tested
    text: str = _template().render(
        page=content,
        version=version,
        tiles=tiles_of(content),
        tested_head=head,
        tested=tested,
        data=embedded(content.to_json()),
        provenance=json.dumps(content.provenance, indent=2, ensure_ascii=False),
        verdict=overall(content.gates) if content.gates else None,
        marks=MARKS,
        style=Markup("".join(_part(f"style/{name}.css") for name in STYLES)),
        vega=Markup(vega),
        script=Markup(own),
        policy=policy([vega, own], bool(version)),
    )
    return text


def embedded(content: Mapping[str, Any]) -> Markup:
    """Values as JSON that may stand inside a script element: no tag can begin or end in it.

    >>> print(embedded({"name": "</script>"}))
    {"name":"\\u003c/script>"}
    """
    text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def policy(scripts: Sequence[str], serves: bool) -> str:
    """What the page may do: run these scripts, and, where it is served, ask its own server.

    `unsafe-eval`: Vega compiles the expressions of our own chart descriptions, which hold nothing of a study.
    """
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    asks = "'self'" if serves else "'none'"
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {asks}; base-uri 'none'; form-action 'none'"
    )


@cache
def script() -> str:
    """The page's own script: its parts in one scope, so that nothing is global."""
    parts = "\n".join(_part(f"script/{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'


def _finite(value: Any) -> Any:
    """A value in which None stands for what is not a finite number, which JSON does not know."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("search.results.page", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("template.html")


@cache
def _part(name: str) -> str:
    """A file of this folder, as a page can hold it."""
    return (files("search.results.page") / name).read_text(encoding="utf-8").replace("\r\n", "\n")
