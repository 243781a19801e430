"""Experts together or each, in_proj by its rows: other components, the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssm_mp.checkpoints import Checkpoint
from ssm_mp.components import Component, find_components
from ssm_mp.conversion.calibrate import calibrate
from ssm_mp.conversion.convert import convert
from ssm_mp.conversion.regroup import Grouping, grouping_of, regrouped, same_model
from ssm_mp.decoding.decode import prefill
from ssm_mp.errors import PrecisionMapError
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.families.registry import config_from_json, config_to_json
from ssm_mp.files.mapped import spilled
from ssm_mp.model import build
from ssm_mp.precision_map import PrecisionMap
from ssm_mp.scheme import Scheme
from tests.families.models import GROUPED, checkpoint_of, fp32_of, off, windows_of
from tests.tiny import ITERA

WITH_EXPERTS = (
    "itera", "granitemoehybrid/experts", "granitemoehybrid/many-experts", "nemotron_h/experts-latent-together",
    "jamba/experts", "lfm2_moe/plain", "qwen3_next/many-experts", "qwen3_5_moe_text/plain",
)  # fmt: skip
WITH_MAMBA2 = (
    "mamba2/groups-2", "bamba/plain", "granitemoehybrid/dense", "nemotron_h/dense", "falcon_h1/norm-then-gate",
)  # fmt: skip


def logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = build(checkpoint.config, checkpoint.tensors)(ids)
    return found


def rows_of(component: Component) -> int:
    return component.parameters[0].shape[0]


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return one.config == other.config and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in {**one.tensors, **other.tensors}
    )


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_together_and_each_are_the_same_model(name: str) -> None:
    checkpoint, ids = checkpoint_of(name), windows_of(name).ids
    each, together = regrouped(checkpoint, "each"), regrouped(checkpoint, "together")
    assert torch.equal(logits(each, ids), logits(together, ids))
    assert torch.equal(logits(each, ids), logits(checkpoint, ids))
    one, other = find_components(each), find_components(together)
    assert sum(c.count for c in one) == sum(c.count for c in other)
    assert len(other) < len(one)
    assert each.digest != together.digest
    assert (grouping_of(each.config), grouping_of(together.config)) == ({}, {"experts": "together"})


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_there_and_back_again_is_the_same_checkpoint(name: str) -> None:
    checkpoint = checkpoint_of(name)
    each, together = regrouped(checkpoint, "each"), regrouped(checkpoint, "together")
    assert same(regrouped(each, "together"), together)
    assert same(regrouped(together, "each"), each)
    assert same(checkpoint, each) != same(checkpoint, together)


@pytest.mark.parametrize("name", WITH_MAMBA2)
def test_a_split_in_proj_is_the_same_model(name: str) -> None:
    checkpoint, ids = checkpoint_of(name), windows_of(name).ids
    split = regrouped(checkpoint, split=["in_proj"])
    assert grouping_of(split.config) == {"in_proj": "split"}
    assert off(logits(split, ids), logits(checkpoint, ids)) < 1e-5
    whole = {c.name: c for c in find_components(checkpoint)}
    pieces = [c for c in find_components(split) if c.name not in whole]
    assert {c.kind for c in pieces} == {f"in_proj_{piece}" for piece in ("z", "x", "B", "C", "dt")}
    for gone in whole.keys() - {c.name for c in find_components(split)}:
        of_it = [c for c in pieces if c.name.startswith(f"{gone}.")]
        assert [c.name.rsplit(".", 1)[-1] for c in of_it] == ["z", "x", "B", "C", "dt"]
        assert sum(map(rows_of, of_it)) == rows_of(whole[gone])
        assert torch.equal(
            torch.cat([split.tensors[f"{c.name}.weight"] for c in of_it]), checkpoint.tensors[f"{gone}.weight"]
        )


@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
@pytest.mark.parametrize("name", [*WITH_EXPERTS, *WITH_MAMBA2])
def test_bytes_and_products_are_exact_by_row(name: str, precision: str) -> None:
    """Rows have scales of their own, and groups lie in one row, so what is stored is the same cut elsewhere."""
    checkpoint, windows = checkpoint_of(name), windows_of(name)
    if name in WITH_EXPERTS:
        others = [regrouped(checkpoint, "each"), regrouped(checkpoint, "together")]
    else:
        others = [checkpoint, regrouped(checkpoint, split=["in_proj"])]
    stored, found = [], []
    for other in others:
        model = build(other.config, other.tensors)
        held = PrecisionMap.uniform(precision, find_components(model))
        stored.append(held.bytes(find_components(model), "none"))
        found.append(evaluate(convert(model, held, Scheme("none")), windows).nll)
    assert stored[0] == stored[1]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("experts", ["each", "together"])
def test_a_static_input_scale_is_counted_once_a_component(experts: Grouping) -> None:
    checkpoint = regrouped(checkpoint_of("itera"), experts)
    model = build(checkpoint.config, checkpoint.tensors)
    statistics = calibrate(model, windows_of("itera", 48))
    components = find_components(model)
    held = PrecisionMap.uniform("int8", components)
    multiplying = [c for c in components if c.multiplies_inputs and c.pin is None]
    assert held.bytes(components, "static") == held.bytes(components, "none") + 2 * len(multiplying)
    converted = convert(model, held, Scheme("static"), statistics)
    assert evaluate(converted, windows_of("itera")).nll == pytest.approx(
        evaluate(model, windows_of("itera")).nll, rel=0.05
    )


@pytest.mark.parametrize("name", [*WITH_EXPERTS, *GROUPED])
def test_a_grouping_survives_json_and_is_the_same_model(name: str) -> None:
    plain = checkpoint_of(name).config
    for experts in ("each", "together") if name in WITH_EXPERTS else (None,):
        config = regrouped(checkpoint_of(name), experts).config
        assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
        assert same_model(config, plain)


def test_another_model_is_not_the_same() -> None:
    config = checkpoint_of("granitemoehybrid/experts").config
    assert not same_model(config, checkpoint_of("granitemoehybrid/many-experts").config)
    assert not same_model(config, config.replaced(vocabulary=102))
    assert not same_model(ITERA, replace(ITERA, top_k=1))


def test_tensors_that_are_only_cut_apart_share_their_memory() -> None:
    checkpoint = checkpoint_of("mamba2/biases-split")
    whole = regrouped(replace(checkpoint_of("mamba2/groups-2")), split=["in_proj"])
    held = {t.untyped_storage().data_ptr() for t in checkpoint_of("mamba2/groups-2").tensors.values()}
    assert {t.untyped_storage().data_ptr() for t in whole.tensors.values()} <= held
    assert "layers.0.mixer.in_proj.dt.bias" in checkpoint.tensors


def test_nothing_asked_leaves_the_checkpoint() -> None:
    checkpoint = checkpoint_of("mamba")
    assert regrouped(checkpoint) is checkpoint


def test_what_a_model_does_not_have_is_an_error_that_says_so() -> None:
    with pytest.raises(PrecisionMapError, match=r"experts = 'each', but no layer of this model has experts"):
        regrouped(checkpoint_of("granitemoehybrid/dense"), "each")
    with pytest.raises(PrecisionMapError, match=r"split = \['in_proj'\], but no layer of this model has a Mamba-2"):
        regrouped(checkpoint_of("jamba/dense"), split=["in_proj"])
    with pytest.raises(PrecisionMapError, match=r"expected any of \['in_proj'\], found 'out_proj'"):
        regrouped(checkpoint_of("bamba/plain"), split=["out_proj"])


def test_an_itera_config_says_nothing_of_a_grouping_that_it_has_by_default() -> None:
    old = json.loads(json.dumps(config_to_json(ITERA)))
    assert "experts_together" not in old
    assert config_from_json(old) == ITERA
    together = regrouped(checkpoint_of("itera"), "together").config
    assert config_to_json(together)["experts_together"] is True
    assert config_from_json(config_to_json(together)) == together


def test_prompts_are_read_alike_in_any_grouping() -> None:
    for name in ("granitemoehybrid/experts", "granitemoehybrid/experts-together-split"):
        ids = windows_of(name, 1, length=1).ids  # a single token reaches two experts, and the others none
        assert prefill(fp32_of(name), ids).logits.isfinite().all()
    one, other = (
        prefill(fp32_of(name), windows_of(name).ids).logits
        for name in ("granitemoehybrid/experts", "granitemoehybrid/experts-together-split")
    )
    assert off(one, other) < 1e-5


def test_tensors_that_are_put_together_are_held_where_the_caller_says(tmp_path: Path) -> None:
    each = checkpoint_of("granitemoehybrid/experts")
    placed: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        placed.append(spilled(tensor, tmp_path))
        return placed[-1]

    found, expected = regrouped(each, "together", place=place), regrouped(each, "together")
    assert placed
    assert found.digest == expected.digest
    assert {tensor.data_ptr() for tensor in placed} <= {tensor.data_ptr() for tensor in found.tensors.values()}
