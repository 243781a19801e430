from __future__ import annotations

import pytest

from ssm_mp.components import find_components, fp32_bytes
from tests.tiny import CONFIGS, ITERA, MAMBA, random_model, random_tensors


@pytest.mark.parametrize("family", CONFIGS)
def test_components_hold_every_parameter_once(family: str) -> None:
    config = CONFIGS[family]
    held = [parameter.name for component in find_components(random_model(config)) for parameter in component.parameters]
    assert sorted(held) == sorted(random_tensors(config))
    total = sum(tensor.numel() for tensor in random_tensors(config).values())
    assert fp32_bytes(find_components(random_model(config))) == 4 * total


def test_kinds_layers_stages_and_pins_of_mamba() -> None:
    found = {c.name: (c.kind, c.layer, c.stage, c.pin) for c in find_components(random_model(MAMBA))}
    assert found["embedding"] == ("embedding", None, 0, None)
    assert found["layers.1.ssm.in_proj"] == ("in_proj", 1, 2, None)
    assert found["layers.0.ssm.A_log"] == ("A_log", 0, 1, "always")
    assert found["layers.0.ssm.D"] == ("D", 0, 1, "always")
    assert found["layers.0.ssm.norm"] == ("norm", 0, 1, "default")
    assert found["norm"] == ("norm", None, 3, "default")


def test_kinds_and_pins_of_itera() -> None:
    found = {c.name: (c.kind, c.pin) for c in find_components(random_model(ITERA))}
    assert found["layers.0.ssm.ssm.B"] == ("B", "default")
    assert found["layers.0.ssm.ssm.C"] == ("C", "default")
    assert found["layers.1.moe.layer.router.gate"] == ("router", "default")
    assert found["layers.1.moe.layer.experts.2.w1"] == ("w1", None)
    assert found["layers.0.moe.ffn.w2"] == ("w2", None)


def test_a_tied_head_belongs_to_the_embedding() -> None:
    components = {c.name: c for c in find_components(random_model(MAMBA))}
    assert "lm_head" not in components
    assert components["embedding"].multiplies_inputs


def test_a_projection_and_its_bias_are_one_component() -> None:
    components = {c.name: c for c in find_components(random_model(MAMBA))}
    projection = components["layers.0.ssm.dt_proj"]
    assert [parameter.role for parameter in projection.parameters] == ["weight", "bias"]
    assert projection.bytes("fp16", "static") == 2 * (32 * 2 + 32)
    assert projection.bytes("int8", "static") == 32 * 2 + 2 * 32 + 2 * 32 + 2
    assert projection.bytes("int8", "none") == projection.bytes("int8", "static") - 2
