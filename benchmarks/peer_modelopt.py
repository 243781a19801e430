"""NVIDIA ModelOpt's `auto_quantize` on a study: both of its ways to score layers, swept over effective bits.

Its formats are made to store what ours store: int8 per output channel (with calibrated inputs where the study has
them), int4 and int3 in groups of 64. int3 is not one of its ready-made formats; each sweep is solved with it and
without, from the same scores.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from benchmarks.peer_problem import Decision, Found, Problem
from benchmarks.plain_mamba import HEAD, share_lookup
from ssm_mp.kernels.scan import selective_scan, selective_scan_reference
from ssm_mp.precisions.groups import GROUP

NAME = "nvidia-modelopt"

EFFECTIVE_BITS = (
    *(3.3 + 0.1 * step for step in range(17)),
    *(5.0 + 0.25 * step for step in range(13)),
    *(9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0),
)
"""Bits a weight that a map may take on average; what cannot be reached is left out."""

_SCALE_BITS = 16
_INT3 = 3
Method = Literal["gradient", "kl_div"]


@dataclass(frozen=True)
class Scored:
    """The search state that `auto_quantize` leaves, and how many forward passes over all windows it took."""

    method: Method
    state: Mapping[str, Any]
    passes: float


def search(problem: Problem) -> Found:
    """Score with both methods, then solve for each number of effective bits. ImportError where it is not installed."""
    import modelopt.torch.quantization  # noqa: F401  # absent means not compared

    began = time.monotonic()
    decisions: list[Decision] = []
    scored = [_score(problem, method) for method in ("gradient", "kl_div")]
    for one in scored:
        for without_int3 in (True, False):
            decisions += _solutions(one, without_int3)
    # the modules of the search space, "layers.0.ssm.in_proj.quant_recipe" and so on
    decides = frozenset(name.removesuffix(".quant_recipe") for name in scored[0].state["candidate_stats"])
    return Found(
        version=version(NAME),
        decisions=tuple(decisions),
        decides=decides,
        settings={
            "methods": [one.method for one in scored],
            "formats": ["int8", "int4", "int3"],
            "effective_bits": [round(bits, 2) for bits in EFFECTIVE_BITS],
            "activations": problem.workspace.spec.precision.activations,
        },
        evaluations=sum(one.passes for one in scored),
        counted="forward passes over all search windows while calibrating and scoring, a backward pass as two; "
        "repeated outputs of single layers (gradient) are not counted; solving takes none",
        seconds=time.monotonic() - began,
    )


def _formats(activations: str) -> list[dict[str, Any]]:
    """Formats that store what ours store, `effective_bits` with the float16 scales of groups."""
    inputs: dict[str, Any] = {"num_bits": 8, "axis": None} if activations == "static" else {"num_bits": 8}
    if activations == "dynamic":
        inputs |= {"type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}}
    rows: list[dict[str, Any]] = [_entry("*weight_quantizer", {"num_bits": 8, "axis": 0})]
    if activations != "none":
        rows.append(_entry("*input_quantizer", inputs))
    found = [_format(rows, 8.0)]
    for bits in (4, _INT3):
        groups = _entry("*weight_quantizer", {"num_bits": bits, "block_sizes": {-1: GROUP}})
        found.append(_format([groups], bits + _SCALE_BITS / GROUP))
    return found


def _entry(quantizer: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"quantizer_name": quantizer, "cfg": settings}


def _format(entries: list[dict[str, Any]], effective_bits: float) -> dict[str, Any]:
    disabled = {"quantizer_name": "*", "enable": False}
    return {"quant_cfg": [disabled, *entries], "algorithm": "max", "effective_bits": effective_bits}


def _score(problem: Problem, method: Method) -> Scored:
    """Calibrate and score on the search windows, the scan differentiable where gradients are asked for."""
    import modelopt.torch.quantization as mtq

    model = problem.model(selective_scan_reference if method == "gradient" else selective_scan)
    head = model.get_submodule(HEAD)
    if problem.config.tied:
        share_lookup(model.embedding, lambda: _quantized_weight(head))
    batches = problem.batches
    windows = sum(len(batch) for batch in batches)
    seen = 0  # windows that have gone forward

    def forward(given: nn.Module, ids: Tensor) -> Tensor:
        nonlocal seen
        seen += len(ids)
        logits: Tensor = given(ids)
        return logits

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    pinned = {name for name, _ in model.named_modules()} - problem.free_modules()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that custom formats are experimental
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": 8.0},
            quantization_formats=_formats(problem.workspace.spec.precision.activations),
            data_loader=batches,
            forward_step=forward,
            loss_func=loss if method == "gradient" else None,
            disabled_layers=sorted(pinned),
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            method=method,
            verbose=False,
        )
    backward = 2.0 if method == "gradient" else 0.0
    return Scored(method, state, seen / windows + backward)


def _quantized_weight(head: nn.Module) -> Tensor:
    """The head's weight through its quantiser, once it has one."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    quantizer = getattr(head, "weight_quantizer", None)
    if quantizer is None:
        return weight
    quantized: Tensor = quantizer(weight)
    return quantized


def _solutions(scored: Scored, without_int3: bool) -> Iterator[Decision]:
    """The map for each number of effective bits that can be reached."""
    import modelopt.torch.quantization as mtq

    state = _restricted(scored.state, _INT3) if without_int3 else scored.state
    stats = state["candidate_stats"].values()
    reachable = 16 * sum(min(one["costs"]) for one in stats) / sum(max(one["costs"]) for one in stats)
    for bits in EFFECTIVE_BITS:
        if bits < reachable:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that calibration is not carried over
            config = mtq.get_auto_quantize_config(state, {"effective_bits": bits})
        formats = "int8, int4" if without_int3 else "int8, int4, int3"
        yield Decision(f"{scored.method}, {formats}, {bits:.4g} bits", _precisions(config))


def _restricted(state: Mapping[str, Any], bits: int) -> dict[str, Any]:
    """The search state without the format of so many bits: its scores are those of a search that never had it."""

    def keep(stats: Mapping[str, Any]) -> dict[str, Any]:
        kept = [i for i, recipe in enumerate(stats["formats"]) if recipe.num_bits != bits]
        return {**stats, **{key: [stats[key][i] for i in kept] for key in ("formats", "scores", "costs")}}

    return {**state, "candidate_stats": {name: keep(stats) for name, stats in state["candidate_stats"].items()}}


def _precisions(config: Mapping[str, Any]) -> dict[str, str]:
    """Module → precision of a configuration that `get_auto_quantize_config` gives."""
    suffix = ".weight_quantizer"
    return {
        entry["quantizer_name"].removesuffix(suffix): f"int{entry['cfg']['num_bits']}"
        for entry in config["quant_cfg"]
        if entry["enable"] and entry["quantizer_name"].endswith(suffix)
    }
