"""The Mamba-2 mixer against transformers', its state, its gradients, and in_proj in pieces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BambaConfig, FalconH1Config, GraniteMoeHybridConfig, Mamba2Config, NemotronHConfig
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer, compute_mup_vector
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from ssm_mp.blocks.block import Parts
from ssm_mp.blocks.mamba2 import PIECES, Mamba2, Mamba2Mixing
from ssm_mp.kernels.ssd import ssd_scan_reference
from ssm_mp.modules.inputs import DynamicInput, InputQuantizer
from ssm_mp.modules.norm import NormForm
from ssm_mp.precisions.int8 import Int8Tensor
from ssm_mp.precisions.stored import FloatTensor, Stored
from tests.ssm_mp.blocks.making import AT, mixing_of, tensors_of

TOLERANCE = 1e-5
"""Largest error over the largest value."""

SMALL = Mamba2(d_model=21, d_inner=42, n_heads=6, head_dim=7, d_state=5, n_groups=2, d_conv=3, norm_groups=2)
BLOCKS = {
    "two groups": SMALL,
    "one group, heads of sixteen": replace(
        SMALL, d_model=48, d_inner=96, head_dim=16, n_groups=1, norm_groups=1, d_state=16
    ),
    "with biases, without one of the convolution": replace(SMALL, projection_bias=True, out_bias=True, conv_bias=False),
    "limits that matter": replace(SMALL, dt_limits=(0.02, 0.05)),
    "a lower limit that matters": replace(SMALL, dt_limits=(0.02, None)),
    "norm first": replace(SMALL, gate="norm_first", norm_form=NormForm(1e-3)),
    "no norm": replace(SMALL, gate="no_norm"),
    "multipliers": replace(SMALL, multipliers=(0.5, 1.5, 0.75, 2.0, 3.0)),
    "multipliers, in pieces": replace(SMALL, multipliers=(0.5, 1.5, 0.75, 2.0, 3.0), split=True),
    "in pieces, with biases": replace(SMALL, projection_bias=True, split=True),
}


def transformers_mixer(family: str, block: Mamba2, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The family's mixer with these tensors."""
    sizes: dict[str, Any] = {
        "hidden_size": block.d_model, "mamba_n_heads": block.n_heads, "mamba_d_head": block.head_dim,
        "mamba_d_state": block.d_state, "mamba_n_groups": block.n_groups, "mamba_d_conv": block.d_conv,
        "mamba_expand": block.d_inner // block.d_model, "mamba_proj_bias": block.projection_bias,
        "mamba_conv_bias": block.conv_bias, "rms_norm_eps": block.norm_form.eps, "mamba_chunk_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8,
    }  # fmt: skip
    low, high = block.dt_limits
    limits = (low, float("inf") if high is None else high)
    mixer: nn.Module
    if family == "mamba2":
        mixer = Mamba2Mixer(Mamba2Config(
            hidden_size=block.d_model, num_heads=block.n_heads, head_dim=block.head_dim, state_size=block.d_state,
            n_groups=block.n_groups, conv_kernel=block.d_conv, expand=block.d_inner // block.d_model, chunk_size=8,
            use_bias=block.projection_bias, use_conv_bias=block.conv_bias, layer_norm_epsilon=block.norm_form.eps,
            time_step_limit=limits, num_hidden_layers=1,
        ), 0)  # fmt: skip
    elif family == "nemotron_h":
        nemotron: dict[str, Any] = {
            "hidden_size": block.d_model, "mamba_num_heads": block.n_heads, "mamba_head_dim": block.head_dim,
            "ssm_state_size": block.d_state, "n_groups": block.n_groups, "conv_kernel": block.d_conv, "chunk_size": 8,
            "use_bias": block.projection_bias, "use_conv_bias": block.conv_bias, "time_step_min": low,
            "layer_norm_epsilon": block.norm_form.eps, "hybrid_override_pattern": "M", "num_hidden_layers": 1,
        }  # fmt: skip
        mixer = NemotronHMamba2Mixer(NemotronHConfig(**nemotron), 0)
    elif family == "falcon_h1":
        config = FalconH1Config(
            **sizes, mamba_d_ssm=block.d_inner, projectors_bias=block.out_bias, ssm_in_multiplier=1.0,
            mamba_rms_norm=block.gate != "no_norm", mamba_norm_before_gate=block.gate == "norm_first",
            ssm_multipliers=list(block.multipliers or (1.0,) * 5), time_step_limit=limits,
        )  # fmt: skip
        mixer = FalconH1Mixer(config, 0)
        multipliers: Any = compute_mup_vector(config)  # type: ignore[no-untyped-call]
        mixer.register_buffer("mup_vector", multipliers, persistent=False)
    elif family == "bamba":
        mixer = BambaMixer(BambaConfig(**sizes, time_step_limit=limits), 0)
    else:
        granite = GraniteMoeHybridConfig(**sizes, time_step_limit=limits, layer_types=["linear_attention"])
        mixer = GraniteMoeHybridMambaLayer(granite, 0)
    mixer.load_state_dict({name.removeprefix(f"{AT}."): value for name, value in whole(block, tensors).items()})
    return mixer.eval()


def whole(block: Mamba2, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with in_proj in one piece."""
    if not block.split:
        return dict(tensors)
    joined = {name: value for name, value in tensors.items() if ".in_proj." not in name}
    for leaf in ("weight", "bias") if block.projection_bias else ("weight",):
        joined[f"{AT}.in_proj.{leaf}"] = torch.cat([tensors[f"{AT}.in_proj.{piece}.{leaf}"] for piece in PIECES])
    return joined


def inputs_of(block: Mamba2, b: int, length: int) -> Tensor:
    return torch.randn(b, length, block.d_model, generator=torch.Generator().manual_seed(1))


def require_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def families_of(block: Mamba2) -> list[str]:
    """Those whose mixer can be this block."""
    if block.out_bias != block.projection_bias or block.gate != "gate_first" or block.multipliers:
        return ["falcon_h1"]
    families = ["mamba2", "bamba", "granitemoehybrid", "falcon_h1"]
    return families if block.dt_limits[1] is not None else [*families, "nemotron_h"]


CASES = [(name, family) for name, block in BLOCKS.items() for family in families_of(block)]


@pytest.mark.parametrize(("name", "family"), CASES, ids=[f"{family}, {name}" for name, family in CASES])
def test_the_mixer_is_that_of_transformers(name: str, family: str) -> None:
    block = BLOCKS[name]
    tensors = tensors_of(block, 3)
    u = inputs_of(block, 2, 37)
    with torch.inference_mode():
        expected = transformers_mixer(family, block, tensors)(u)
        require_close(mixing_of(block, tensors)(u)[0], expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_carried_state_goes_on_where_it_was(name: str) -> None:
    block = BLOCKS[name]
    mixing, u = mixing_of(block, tensors_of(block, 4)), inputs_of(block, 2, 80)
    with torch.inference_mode():
        expected, (last_inputs, last) = mixing(u)
        first, before = mixing(u[:, :71])
        kept = [tensor.clone() for tensor in before]
        rest, _ = mixing(u[:, 71:], before)
        require_close(torch.cat((first, rest), dim=1), expected)
        assert all(torch.equal(now, then) for now, then in zip(before, kept, strict=True))
        steps, state = [first], before
        for t in range(71, 80):
            y, state = mixing(u[:, t : t + 1], state)
            steps.append(y)
    require_close(torch.cat(steps, dim=1), expected)
    require_close(state[0], last_inputs)
    require_close(state[1], last)
    assert state[1].shape == (2, block.n_heads, block.head_dim, block.d_state)


def test_limits_of_the_steps_hold_for_a_single_token_too() -> None:
    block = BLOCKS["limits that matter"]
    tensors, u = tensors_of(block, 5), inputs_of(block, 2, 1)
    unlimited = mixing_of(replace(block, dt_limits=(0.0, None)), tensors)(u)[1][1]
    assert not torch.allclose(mixing_of(block, tensors)(u)[1][1], unlimited, rtol=1e-3)


@pytest.mark.parametrize("name", ["two groups", "norm first", "no norm", "multipliers, in pieces"])
def test_gradients_are_those_of_the_reference(name: str) -> None:
    block = BLOCKS[name]
    found, expected = (gradients(block, scan) for scan in (Mamba2.differentiable, ssd_scan_reference))
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        require_close(found[parameter], gradient, 5e-5)


def gradients(block: Mamba2, scan: Any) -> dict[str, Tensor]:
    """Of the sum of squared outputs, by parameter."""
    mixing, u = mixing_of(block, tensors_of(block, 6), scan=scan), inputs_of(block, 2, 70)
    mixing.requires_grad_(True)
    mixing(u)[0].square().sum().backward()
    return {name: parameter.grad for name, parameter in mixing.named_parameters() if parameter.grad is not None}


def test_every_parameter_has_a_gradient() -> None:
    block = SMALL
    assert len(gradients(block, Mamba2.differentiable)) == len(tensors_of(block, 0))


def test_components_and_kinds_are_those_of_the_field() -> None:
    block = replace(SMALL, projection_bias=True, out_bias=True)
    assert {p.component.removeprefix(f"{AT}."): p.kind for p in block.parameters(AT, 0)} == {
        "in_proj": "in_proj", "conv1d": "conv1d", "dt_bias": "dt_bias", "A_log": "A_log", "D": "D", "norm": "norm",
        "out_proj": "out_proj",
    }  # fmt: skip
    split = {p.component: (p.kind, p.shape) for p in replace(block, split=True).parameters(AT, 0)}
    rows = zip(PIECES, (42, 42, 10, 10, 6), strict=True)
    for piece, size in rows:
        assert split[f"{AT}.in_proj.{piece}"] == (f"in_proj_{piece}", (size,))  # of the bias, which comes last


def test_its_values_survive_json() -> None:
    block = replace(SMALL, multipliers=(0.5, 1.5, 0.75, 2.0, 3.0), dt_limits=(0.001, None))
    values = json.loads(json.dumps(asdict(block), allow_nan=False))
    values["norm_form"] = NormForm(**values["norm_form"])
    for name in ("names", "multipliers", "dt_limits"):
        values[name] = tuple(values[name])
    assert Mamba2(**values) == block


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"d_inner": 40}, "d_inner 40"), ({"n_groups": 4}, "n_groups 4"), ({"norm_groups": 4}, "norm_groups 4")],
)
def test_sizes_that_do_not_fit_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **wrong)


def _half(weight: Tensor) -> Stored:
    return FloatTensor(weight.half())


def _integers(weight: Tensor) -> Stored:
    scale = (weight.abs().amax(dim=1) / 127).half()
    return Int8Tensor((weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale)


@pytest.mark.parametrize("length", [1, 3, 70])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("make", [FloatTensor, _half, _integers], ids=["fp32", "fp16", "int8"])
def test_in_proj_in_pieces_computes_the_same_to_rounding(make: Any, biased: bool, length: int) -> None:
    found, expected = _in_pieces_and_whole(make, biased, length, None)
    require_close(found, expected, 2e-6)  # a product adds in an order that depends on how many rows its weight has


@pytest.mark.parametrize("length", [1, 3, 70])
def test_in_proj_in_pieces_computes_the_very_same_of_integers(length: int) -> None:
    found, expected = _in_pieces_and_whole(_integers, True, length, DynamicInput())
    assert torch.equal(found, expected)


def _in_pieces_and_whole(make: Any, biased: bool, length: int, inputs: InputQuantizer | None) -> tuple[Tensor, Tensor]:
    """What goes into the gate, the convolution and the steps, side by side, of in_proj in pieces and whole."""
    pieces = replace(SMALL, d_model=96, projection_bias=biased, split=True)
    tensors = tensors_of(pieces, 7)
    whole_block, u = replace(pieces, split=False), inputs_of(pieces, 2, length)
    with torch.inference_mode():
        ours = _stored(pieces, tensors, make, inputs).projected(u)
        theirs = _stored(whole_block, whole(pieces, tensors), make, inputs).projected(u)
    return torch.cat(ours, dim=-1), torch.cat(theirs, dim=-1)


def _stored(block: Mamba2, tensors: Mapping[str, Tensor], make: Any, inputs: InputQuantizer | None) -> Mamba2Mixing:
    """The module with in_proj's weights stored as `make` says."""
    modules: dict[str, nn.Module] = {}
    for component, form in {p.component: p.form for p in block.parameters(AT, 0)}.items():
        own = {p.leaf: p.name for p in block.parameters(AT, 0) if p.component == component}
        of: dict[str, Stored] = {leaf: FloatTensor(tensors[name]) for leaf, name in own.items()}
        if ".in_proj" in component:
            of["weight"] = make(tensors[own["weight"]])
        modules[component] = form.module(of, inputs if ".in_proj" in component else None)
    return block.module(Parts(modules, f"{AT}."))
