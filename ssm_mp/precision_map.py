"""Precision maps: component → precision for every component, written with patterns and saved resolved."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssm_mp.components import ALWAYS_PINNED, DEFAULT_PINNED, Component
from ssm_mp.errors import PrecisionMapError
from ssm_mp.precisions.registry import get_precision
from ssm_mp.scheme import ActivationScheme

PINNED_TO = "fp16"
EIGHT_BIT, FOUR_BIT = "int8", "nf4"
"""What a preset holds in 8 and in 4 bits, unless told otherwise."""

_TABLES = frozenset({"embedding", "position_embedding", "lm_head"})
_PROJECTIONS = frozenset(
    {"in_proj", "out_proj", *(f"in_proj_{piece}" for piece in ("z", "x", "B", "C", "qkv", "qkvz"))}
)
_PRESETS = {
    "conservative": dict.fromkeys(_TABLES, EIGHT_BIT),
    "aggressive": dict.fromkeys(_TABLES | _PROJECTIONS, EIGHT_BIT),
    "cumulative": dict.fromkeys(_TABLES, FOUR_BIT),
}
PRESETS = tuple(_PRESETS)
"""Named maps, defined by component kind so that they fit every family: `conservative` puts embeddings and head to
int8 and the rest to fp16, `aggressive` also `in_proj` and `out_proj`; `cumulative` holds in 4 bits what the first
holds in int8."""


def pinned_names(components: Iterable[Component], lifted: Iterable[str] = ()) -> frozenset[str]:
    """Names of the components that stay fp16; `lifted` are kinds whose default pin is taken away.

    Raises PrecisionMapError for a kind that has no default pin, `A_log` and `D` above all.
    """
    lifted = frozenset(lifted)
    if lifted & ALWAYS_PINNED:
        names = ", ".join(sorted(lifted & ALWAYS_PINNED))
        raise PrecisionMapError(f"{names} cannot be unpinned: the recurrence keeps them at fp16 in every study")
    if lifted - DEFAULT_PINNED:
        names = ", ".join(sorted(lifted - DEFAULT_PINNED))
        raise PrecisionMapError(f"{names} has no pin to lift; these kinds have: {', '.join(sorted(DEFAULT_PINNED))}")
    return frozenset(c.name for c in components if c.pin is not None and c.kind not in lifted)


@dataclass(frozen=True)
class PrecisionMap:
    """A total precision map, in the order of the components.

    >>> from ssm_mp import PrecisionMap, find_components, load_checkpoint
    >>> components = find_components(load_checkpoint("studies/reference/model.safetensors"))
    >>> PrecisionMap.from_rules({"*": "fp16", "layers.*.in_proj": "int8"}, components)["layers.2.ssm.in_proj"]
    'int8'
    """

    entries: tuple[tuple[str, str], ...]

    def __getitem__(self, component: str) -> str:
        return dict(self.entries)[component]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.entries)

    @classmethod
    def from_rules(
        cls, rules: Mapping[str, str], components: Sequence[Component], pins: frozenset[str] | None = None
    ) -> PrecisionMap:
        """Resolve patterns to a total map.

        rules: component name, or pattern with `*` for any characters, → precision; order does not matter.
        An exact name beats a pattern and the longer pattern beats the shorter. pins: names that stay fp16
        (default: `pinned_names(components)`); a pattern that also matches others passes over them.
        Raises PrecisionMapError for a rule that matches nothing, a tie, a rule against a pin, an unknown
        precision, or components that no rule covers.
        """
        always = frozenset(component.name for component in components if component.pin == "always")
        pins = pinned_names(components) if pins is None else pins | always
        names = [component.name for component in components]
        for pattern, precision in rules.items():
            get_precision(precision)
            _check_rule(pattern, precision, names, pins, components)
        entries = [(name, PINNED_TO if name in pins else _winner(name, rules)) for name in names]
        uncovered = [name for name, precision in entries if precision is None]
        if uncovered:
            raise PrecisionMapError(
                f"the map leaves {len(uncovered)} of {len(names)} components without a precision: "
                f'{_listed(uncovered)}. Name them, or add a rule for the rest: "*" = "fp16"'
            )
        return cls(tuple((name, precision) for name, precision in entries if precision is not None))

    @classmethod
    def uniform(
        cls, precision: str, components: Sequence[Component], pins: frozenset[str] | None = None
    ) -> PrecisionMap:
        """Every component that is not pinned at one precision."""
        return cls.from_rules({"*": precision}, components, pins)

    @classmethod
    def preset(
        cls,
        name: str,
        components: Sequence[Component],
        pins: frozenset[str] | None = None,
        four_bit: str = FOUR_BIT,
        eight_bit: str = EIGHT_BIT,
    ) -> PrecisionMap:
        """A named map of `PRESETS`, with one's own choice of 8 and 4 bits. Raises PrecisionMapError for an unknown
        name."""
        if name not in _PRESETS:
            raise PrecisionMapError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
        kinds = _PRESETS[name]
        rules = {component.name: kinds[component.kind] for component in components if component.kind in kinds}
        chosen = {EIGHT_BIT: eight_bit, FOUR_BIT: four_bit}
        rules = {name: chosen[precision] for name, precision in rules.items()}
        return cls.from_rules({"*": "fp16", **rules}, components, pins)

    def changed(self, changes: Mapping[str, str]) -> PrecisionMap:
        """The same map with other precisions for some components."""
        known = {name for name, _ in self.entries}
        for name, precision in changes.items():
            get_precision(precision)
            if name not in known:
                raise PrecisionMapError(f"no component {name!r}; {_closest(name, sorted(known))}")
        return PrecisionMap(tuple((name, changes.get(name, precision)) for name, precision in self.entries))

    def bytes(self, components: Iterable[Component], scheme: ActivationScheme) -> int:
        """Predicted stored bytes of a model converted by this map."""
        held = dict(self.entries)
        return sum(component.bytes(held[component.name], scheme) for component in components)

    def to_json(self) -> dict[str, str]:
        """Component → precision, resolved."""
        return dict(self.entries)


def require_pins(precision_map: PrecisionMap, components: Iterable[Component]) -> None:
    """Raise PrecisionMapError where `A_log` or `D` is not at fp16."""
    held = precision_map.to_json()
    wrong = [c.name for c in components if c.pin == "always" and held[c.name] != PINNED_TO]
    if wrong:
        raise PrecisionMapError(f"{_listed(wrong)} is pinned to {PINNED_TO}: this pin cannot be lifted")


def read_rules(path: str | Path) -> dict[str, str]:
    """The rules of a map file: TOML or JSON, `"pattern" = "precision"`, or a saved `precision_map.json`.

    Raises PrecisionMapError where the file is not such a map.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        content: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise PrecisionMapError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise PrecisionMapError(
            f"{path}: not a map in {'JSON' if path.suffix == '.json' else 'TOML'} ({error})"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("map"), dict):
        content = content["map"]
    if not isinstance(content, dict):
        raise PrecisionMapError(f"{path}: expected pattern → precision, found {type(content).__name__}")
    rules = dict(_flattened(content))
    wrong = [f"{name} = {value!r}" for name, value in rules.items() if not isinstance(value, str)]
    if wrong:
        raise PrecisionMapError(f"{path}: expected a precision's name for each pattern, found {_listed(wrong)}")
    return rules


def _flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested TOML tables (`layers.0.ssm.in_proj = …` without quotes) as dotted names."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern, with `*` for any characters, is of a component's whole name."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def _check_rule(
    pattern: str, precision: str, names: Sequence[str], pins: frozenset[str], components: Sequence[Component]
) -> None:
    matched = [name for name in names if matches(pattern, name)]
    if not matched:
        raise PrecisionMapError(f"{pattern!r} matches no component; {_closest(pattern, names)}")
    if precision == PINNED_TO or not pins.issuperset(matched):
        return
    always = any(component.name in matched and component.pin == "always" for component in components)
    advice = "this pin cannot be lifted" if always else 'a study lifts such a pin with [precision] unpin = ["norm", …]'
    raise PrecisionMapError(f"{pattern!r} = {precision!r}, but {_listed(matched)} is pinned to {PINNED_TO}: {advice}")


def _winner(name: str, rules: Mapping[str, str]) -> str | None:
    """The precision of the most specific rule for a component; None where no rule matches."""
    if name in rules:
        return rules[name]
    matching = sorted((pattern for pattern in rules if matches(pattern, name)), key=len, reverse=True)
    if not matching:
        return None
    if len(matching) > 1 and len(matching[0]) == len(matching[1]):
        raise PrecisionMapError(
            f"{matching[0]!r} and {matching[1]!r} match {name!r} and are equally long, so neither wins; "
            "name the component itself, or make one pattern longer"
        )
    return rules[matching[0]]


def _closest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"the closest is {found[0]!r}" if found else "the model has none"


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
