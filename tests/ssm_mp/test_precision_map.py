from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssm_mp.components import fp32_bytes
from ssm_mp.errors import PrecisionMapError
from ssm_mp.precision_map import PRESETS, PrecisionMap, pinned_names, read_rules
from tests.tiny import CONFIGS, ITERA, MAMBA, random_model

from ssm_mp.components import find_components  # isort: skip

COMPONENTS = find_components(random_model(MAMBA))
NAMES = [component.name for component in COMPONENTS]
PINNED = pinned_names(COMPONENTS)


@given(st.dictionaries(st.sampled_from(["*", "layers.*", "layers.0.*", *NAMES]), st.sampled_from(["fp16", "int8"])))
def test_a_map_is_total_or_refused(rules: dict[str, str]) -> None:
    try:
        resolved = PrecisionMap.from_rules(rules, COMPONENTS)
    except PrecisionMapError:
        return
    assert [name for name, _ in resolved] == NAMES
    assert all(resolved[name] == "fp16" for name in PINNED)


@given(st.permutations([("*", "fp16"), ("layers.*", "int8"), ("layers.0.*", "fp16"), ("layers.0.ssm.in_proj", "int8")]))
def test_the_order_of_rules_does_not_matter(rules: list[tuple[str, str]]) -> None:
    resolved = PrecisionMap.from_rules(dict(rules), COMPONENTS)
    assert resolved["embedding"] == "fp16"
    assert resolved["layers.1.ssm.out_proj"] == "int8"
    assert resolved["layers.0.ssm.out_proj"] == "fp16"
    assert resolved["layers.0.ssm.in_proj"] == "int8"


def test_equally_long_patterns_are_a_tie() -> None:
    rules = {"*": "fp16", "layers.0.*": "int8", "*.in_proj*": "fp16"}
    assert len("layers.0.*") == len("*.in_proj*")
    with pytest.raises(PrecisionMapError, match="equally long"):
        PrecisionMap.from_rules(rules, COMPONENTS)


def test_uncovered_components_are_listed() -> None:
    with pytest.raises(PrecisionMapError, match="without a precision: embedding, position_embedding"):
        PrecisionMap.from_rules({"layers.*": "int8"}, COMPONENTS)


def test_a_rule_that_matches_nothing_names_the_closest() -> None:
    with pytest.raises(PrecisionMapError, match=r"'layers\.0\.ssm\.in_prj'.*closest is 'layers\.0\.ssm\.in_proj'"):
        PrecisionMap.from_rules({"*": "fp16", "layers.0.ssm.in_prj": "int8"}, COMPONENTS)


@pytest.mark.parametrize("rule", ["layers.0.ssm.A_log", "layers.*.D", "*A_log"])
def test_the_recurrence_cannot_be_unpinned(rule: str) -> None:
    with pytest.raises(PrecisionMapError, match="cannot be lifted"):
        PrecisionMap.from_rules({"*": "fp16", rule: "int8"}, COMPONENTS)
    for kind in ("A_log", "D"):
        with pytest.raises(PrecisionMapError, match="cannot be unpinned"):
            pinned_names(COMPONENTS, [kind])


def test_a_default_pin_gives_way_only_when_lifted() -> None:
    rules = {"*": "fp16", "norm": "int8"}
    with pytest.raises(PrecisionMapError, match="unpin"):
        PrecisionMap.from_rules(rules, COMPONENTS)
    assert PrecisionMap.from_rules(rules, COMPONENTS, pinned_names(COMPONENTS, ["norm"]))["norm"] == "int8"


def test_wildcards_pass_over_pins() -> None:
    everywhere = PrecisionMap.uniform("int8", COMPONENTS)
    assert {name for name, precision in everywhere if precision == "fp16"} == PINNED


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_every_family(family: str, preset: str) -> None:
    components = find_components(random_model(CONFIGS[family]))
    resolved = PrecisionMap.preset(preset, components)
    for component in components:
        embeds = component.kind in ("embedding", "position_embedding", "lm_head")
        projects = preset == "aggressive" and component.kind in ("in_proj", "out_proj")
        lower = "nf4" if preset == "cumulative" else "int8"
        assert resolved[component.name] == (lower if embeds or projects else "fp16")


def test_bytes_lie_between_half_and_a_quarter() -> None:
    components = find_components(random_model(ITERA))
    full = fp32_bytes(components)
    assert PrecisionMap.uniform("fp16", components).bytes(components, "static") == full / 2
    assert full / 4 < PrecisionMap.uniform("int8", components).bytes(components, "static") < full / 2


def test_changed_leaves_the_original_alone() -> None:
    before = PrecisionMap.uniform("fp16", COMPONENTS)
    after = before.changed({"embedding": "int8"})
    assert (before["embedding"], after["embedding"]) == ("fp16", "int8")
    with pytest.raises(PrecisionMapError, match="no component 'embeding'"):
        before.changed({"embeding": "int8"})


def test_map_files_in_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('"*" = "fp16"\nlayers.0.ssm.in_proj = "int8"\n')
    rules = {"*": "fp16", "layers.0.ssm.in_proj": "int8"}
    (tmp_path / "b.json").write_text(json.dumps(rules))
    (tmp_path / "c.json").write_text(json.dumps({"format": "x", "map": rules}))
    assert (
        read_rules(tmp_path / "a.toml") == read_rules(tmp_path / "b.json") == read_rules(tmp_path / "c.json") == rules
    )


@pytest.mark.parametrize("text", ["not toml at all", '"*" = 8\n'])
def test_files_that_are_no_map_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(PrecisionMapError, match="map.toml"):
        read_rules(tmp_path / "map.toml")
    with pytest.raises(PrecisionMapError, match="cannot be read"):
        read_rules(tmp_path / "absent.toml")
