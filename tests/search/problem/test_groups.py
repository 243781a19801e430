"""Components that move together: bytes, maps and their inverse, rules and what they refuse, the fingerprint."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.base.errors import StudyError
from search.problem.grouping import by_patterns, grouped_by_rule
from search.problem.groups import GROUPS, expanded, groups_in, moving
from search.problem.precision_section import PrecisionSection
from search.problem.run_directory import require_same
from search.problem.space import Space
from search.problem.spec import load_spec
from search.problem.workspace import Workspace, open_workspace
from search.sampling.catalogue import catalogue_of
from ssm_mp.errors import InfeasibleError
from ssm_mp.precision_map import PrecisionMap
from tests.tiny import ITERA, write_study

THREE = '[precision]\nchoices = ["fp16", "int8", "nf4"]\n'


@cache
def plain() -> Workspace:
    folder = Path(mkdtemp())
    return open_workspace(load_spec(write_study(folder, config=ITERA, extra=THREE)))


def space_of(**keys: object) -> Space:
    return grouped_by_rule(plain().space, PrecisionSection(choices=("fp16", "int8", "nf4"), **keys))  # type: ignore[arg-type]


SPACES: dict[str, dict[str, object]] = {
    "none": {},
    "layer": {"group": "layer"},
    "kind": {"group": "kind"},
    "patterns": {"groups": ("*.experts.*", "layers.0.*", "*.in_proj", "embedding")},
}
spaces = st.sampled_from(list(SPACES.values())).map(lambda keys: space_of(**keys))


@st.composite
def chosen_in(draw: st.DrawFn) -> tuple[Space, dict[str, str]]:
    """A space and the precisions of what moves in it."""
    space = draw(spaces)
    return space, {name: draw(st.sampled_from(held)) for name, held in space.moves.items()}


@given(spaces)
def test_bytes_of_a_group_are_the_sum_of_its_members(space: Space) -> None:
    assert sum(len(unit.members) for unit in space.units) == len(space.free)
    for unit in space.units:
        for precision in unit.choices:
            expected = sum(member.bytes(precision, "static") for member in unit.members)
            assert unit.bytes(precision, "static") == expected
        assert unit.count == sum(member.count for member in unit.members)
        assert unit.stage == min(member.stage for member in unit.members)


@given(chosen_in())
def test_choosing_is_the_inverse_of_expanding(pair: tuple[Space, dict[str, str]]) -> None:
    space, chosen = pair
    precision_map = space.map(chosen)
    assert space.chosen(precision_map) == chosen
    assert space.map(precision_map.to_json()) == precision_map
    assert space.within(precision_map) == precision_map


@given(chosen_in())
def test_members_of_a_group_have_one_precision_and_others_their_own(pair: tuple[Space, dict[str, str]]) -> None:
    space, chosen = pair
    held = space.map(chosen).to_json()
    assert held.keys() == {component.name for component in space.components}
    for unit in space.units:
        assert {held[member.name] for member in unit.members} == {chosen[unit.name]}
    assert all(held[name] == "fp16" for name in space.pins)


@given(st.lists(chosen_in(), min_size=1, max_size=5))
def test_the_catalogue_agrees_with_the_bytes_of_maps(pairs: list[tuple[Space, dict[str, str]]]) -> None:
    for space, chosen in pairs:
        catalogue = catalogue_of(space, "static")
        row = catalogue.encode(chosen)
        assert catalogue.decode(row) == chosen
        assert catalogue.bytes(row[None]).tolist() == [space.map(chosen).bytes(space.components, "static")]
        assert catalogue.maps == space.size


@given(spaces, st.data())
def test_any_map_becomes_one_of_the_space_no_narrower_than_it_was(space: Space, data: st.DataObject) -> None:
    free = {component.name for component in space.free}
    held = {c.name: data.draw(st.sampled_from(space.choices[c.name])) for c in space.components}
    found = space.within(PrecisionMap(tuple(held.items()))).to_json()
    space.chosen(space.map(found))  # raises where members differ
    order = ("fp16", "int8", "nf4")
    assert all(order.index(found[name]) <= order.index(held[name]) for name in free)
    grouped = {member for members in space.groups.values() for member in members}
    assert all(found[name] == held[name] for name in free - grouped)


def test_a_map_whose_members_differ_is_none_of_the_space() -> None:
    space = space_of(group="layer")
    with pytest.raises(ValueError, match="layer 0"):
        space.chosen(space.widest().changed({"layers.0.ssm.in_proj": "nf4"}))


def test_layers_and_kinds_are_groups_and_what_is_in_no_layer_stays_alone() -> None:
    by_layer, by_kind = space_of(group="layer"), space_of(group="kind")
    assert list(by_layer.moves) == ["embedding", "position_embedding", "layer 0", "layer 1", "layer 2"]
    layer = {c.name: c.layer for c in by_layer.components}
    for name, members in by_layer.groups.items():
        assert {f"layer {layer[member]}" for member in members} == {name}
    kinds = {c.name: c.kind for c in by_kind.components}
    assert {"embedding", "position_embedding"} < by_kind.moves.keys()
    for name, members in by_kind.groups.items():
        assert {f"kind {kinds[member]}" for member in members} == {name}
        assert len(members) > 1
    assert {m for held in by_kind.groups.values() for m in held}.isdisjoint(by_kind.pins)


def test_the_first_pattern_takes_what_several_match() -> None:
    groups = by_patterns(plain().space, ["layers.0.*", "*.in_proj", "*"])
    assert "layers.0.ssm.in_proj" in groups["layers.0.*"]
    assert groups["*.in_proj"] == ("layers.1.ssm.in_proj", "layers.2.ssm.in_proj")
    every = [member for members in groups.values() for member in members]
    assert sorted(every) == sorted(component.name for component in plain().space.free)


def test_a_pattern_of_one_component_leaves_it_itself() -> None:
    assert by_patterns(plain().space, ["layers.0.*.in_proj", "embedding"]) == {}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["layers.*.inproj"], r"matches no component; the nearest are 'layers\.\*\.ssm\.in_proj'"),
        (["*.A_log"], "matches only pinned components .*layers.0.ssm.ssm.A_log"),
        (["*.in_proj", "layers.1.ssm.in_*"], r"matches nothing that '\*\.in_proj' has not taken"),
    ],
)
def test_a_pattern_of_no_use_is_refused(patterns: list[str], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        by_patterns(plain().space, patterns)


def test_a_group_has_what_all_of_its_members_can_be() -> None:
    space = plain().space
    less = {**space.choices, "layers.0.ssm.in_proj": ("fp16", "nf4"), "layers.1.ssm.conv1d": ("fp16",)}
    grouped = grouped_by_rule(replace(space, choices=less), PrecisionSection(group="kind"))
    assert grouped.moves["kind in_proj"] == ("fp16", "nf4")
    assert grouped.choices["layers.2.ssm.in_proj"] == ("fp16", "nf4")
    assert grouped.groups["kind conv1d"] == ("layers.0.ssm.conv1d", "layers.2.ssm.conv1d")  # only what is free
    assert grouped.narrowed() == ["'kind in_proj' is never int8, which layers.0.ssm.in_proj cannot be"]
    assert plain().space.choices["layers.2.ssm.in_proj"] == ("fp16", "int8", "nf4")


def test_a_group_that_is_left_with_one_precision_says_what_to_do() -> None:
    space, names = plain().space, ("layers.0.ssm.in_proj", "layers.1.ssm.in_proj")
    less = replace(space, choices={**space.choices, names[0]: ("fp16", "nf4"), names[1]: ("fp16", "int8")})
    grouped = less.grouped({"both": names})
    assert "both" not in grouped.moves
    assert grouped.lowest()[names[0]] == "fp16"
    assert "stays at fp16: leave them out of the group" in grouped.narrowed()[-1]
    nothing = replace(space, choices={**space.choices, names[0]: ("int8", "nf4"), names[1]: ("fp16",)})
    with pytest.raises(InfeasibleError, match="'both' .* share no precision"):
        nothing.grouped({"both": names})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('group = "layer"\ngroups = ["*.in_proj"]', "keep one of them"),
        ('group = "auto"', 'set .search. probe = "gradient" .found "measured".'),
        ("max_groups = 5", 'max_groups is for group = "auto"'),
        ('groups = ["*.in_proj", "*.in_proj"]', "stands there twice"),
        ('group = "layers"', "group: input should be 'none', 'layer', 'kind' or 'auto'"),
    ],
)
def test_keys_that_contradict_one_another_are_refused(tmp_path: Path, keys: str, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        load_spec(write_study(tmp_path, extra=f"[precision]\n{keys}"))


def test_only_a_study_with_groups_has_them_in_its_fingerprint() -> None:
    alone = plain().fingerprint()
    assert GROUPS not in alone
    precision = plain().spec.precision.model_copy(update={"group": "layer"})
    spec = plain().spec.model_copy(update={"precision": precision})
    grouped = replace(plain(), spec=spec, space=grouped_by_rule(plain().space, precision))
    held = grouped.fingerprint()
    assert held[GROUPS]["rule"] == "layer"
    assert groups_in(held) == grouped.space.groups
    assert grouped.apart.fingerprint() == alone
    assert grouped.apart.space is plain().space


@pytest.mark.parametrize(
    ("stored", "current", "said"),
    [
        (None, "layer", "division into groups .none → layer."),
        ("layer", None, "division into groups .layer → none."),
        ("patterns", "patterns", "division into groups .patterns, with other members."),
    ],
)
def test_other_groups_are_refused_in_one_sentence(stored: str | None, current: str | None, said: str) -> None:
    def fingerprint(rule: str | None, members: list[str]) -> dict[str, object]:
        held = {} if rule is None else {GROUPS: {"rule": rule, "members": {"x": members}}}
        return {"checkpoint": "c", "space": {"a": members}, **held}

    before, now = fingerprint(stored, ["a", "b"]), fingerprint(current, ["a", "c"])
    with pytest.raises(StudyError, match=said) as refused:
        require_same(before, {**dict.fromkeys(before), **now}, "here")
    assert "another space" not in str(refused.value)


def test_what_moves_by_names_alone_is_what_the_space_says() -> None:
    for keys in SPACES.values():
        space = space_of(**keys)
        together = moving(space.to_json(), space.groups)
        assert {name: tuple(held) for name, held in together.items() if len(held) > 1} == space.moves
        assert expanded(dict.fromkeys(together, "x"), space.groups).keys() == space.choices.keys()


def test_the_ends_do_not_depend_on_groups_that_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    for keys in SPACES.values():
        space = space_of(**keys)
        assert space.lowest() == plain().space.lowest()
        assert space.widest() == plain().space.widest()
        held = {name: str(rng.choice(choices)) for name, choices in space.moves.items()}
        assert set(space.map(held).to_json()) == set(plain().space.choices)
