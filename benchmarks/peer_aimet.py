"""AIMET's automatic mixed precision (AMP) on a study: fp16, int8 and int4 weights, its whole curve.

Activations are left alone, biases and pinned modules too. AMP is asked for its complete curve (no limit on the drop,
one step after another), which holds every map that it would stop at for any budget.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import nn

from benchmarks.peer_problem import Decision, Found, Problem
from benchmarks.plain_mamba import HEAD, PlainScan, share_lookup
from ssm_mp.kernels.scan import selective_scan
from ssm_mp.precisions.groups import GROUP

NAME = "aimet-torch"

_TORCHVISION_OPERATORS = ("nms", "qnms")
_DECOMPOSE = "aimet_torch.nn.base._decompose_prequantized_tensor"
_QUANTIZER_CONFIG: dict[str, Any] = {
    "defaults": {
        "ops": {},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "per_channel_quantization": "True",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {},
    "supergroups": [],
    "model_input": {},
    "model_output": {},
}
"""Weights per output channel, symmetric; nothing else is quantised."""


def search(problem: Problem) -> Found:
    """Run AMP. ImportError where it is not installed; what it raises itself is passed on."""
    began = time.monotonic()
    notes = _load()
    passes = _Passes(problem)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, _no_search_for_stored_integers():
        simulated = _simulate(problem, Path(folder))
        decides = frozenset(
            name for name, module in simulated.named_qmodules() if any(module.param_quantizers.values())
        )
        curve = _run(problem, simulated, passes, folder)
    return Found(
        version=version(NAME),
        decisions=tuple(_decisions(curve)),
        decides=decides,
        settings={"candidates": ["fp16", "int8", "int4"], "search": "BruteForce", "allowed_accuracy_drop": None},
        evaluations=passes.total,
        counted="forward passes over all search windows that AMP asked for in both phases; the passes of a single "
        "window that refresh its quantisers count by their share",
        seconds=time.monotonic() - began,
        notes=(*notes, "the search for integers behind float weights is skipped: it finds none and takes minutes"),
    )


def _load() -> tuple[str, ...]:
    """Import AIMET; returns what had to be done for it.

    torchvision of the package index is built for CUDA: beside a CPU build of torch its operators cannot be loaded,
    and declaring them is enough for the import. AIMET uses none of them here.
    """
    try:
        import aimet_torch.quantsim
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in _TORCHVISION_OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import aimet_torch.quantsim  # noqa: F401

        _KEPT.append(library)
        return (f"torchvision's compiled operators cannot be loaded here ({error}); declared without a body",)
    return ()


_KEPT: list[torch.library.Library] = []
"""A library's operators vanish with it."""


class _Passes:
    """Evaluates a simulated model on the search windows and counts."""

    def __init__(self, problem: Problem) -> None:
        self._batches = problem.batches
        self._windows = sum(len(batch) for batch in self._batches)
        self._scored = 0
        self._refreshed = 0

    @property
    def total(self) -> float:
        """Forward passes over all search windows."""
        return self._scored + self._refreshed / self._windows

    def score(self, model: nn.Module, _arguments: object = None) -> float:
        """Mean log-likelihood of a predicted token, higher is better."""
        self._scored += 1
        total, tokens = 0.0, 0
        for ids in self._batches:
            targets = ids[:, 1:].flatten()
            total += F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), targets, reduction="sum").item()
            tokens += targets.numel()
        return -total / tokens

    def refresh(self, model: nn.Module, _arguments: object = None) -> None:
        """What AIMET derives quantiser ranges from: one window, as only weights are quantised."""
        self._refreshed += 1
        model(self._batches[0][:1])


@contextmanager
def _no_search_for_stored_integers() -> Iterator[None]:
    """Skip AIMET's test whether float weights are integers times a scale.

    It tries tens of thousands of divisors for 16-bit candidates each time that ranges are refreshed; its answer
    for weights that were never quantised is this exception.
    """
    from aimet_torch.utils import _DecompositionError

    with mock.patch(_DECOMPOSE, side_effect=_DecompositionError("weights were never quantised")):
        yield


def _simulate(problem: Problem, folder: Path) -> Any:
    """AIMET's simulation of the plain model: weights alone, in groups of 64 where their rows divide into them."""
    from aimet_torch.nn import QuantizationMixin
    from aimet_torch.quantsim import QuantizationSimModel
    from aimet_torch.quantsim.config_utils import set_blockwise_quantization_for_weights

    QuantizationMixin.ignore(PlainScan)
    config = folder / "quantizers.json"
    config.write_text(json.dumps(_QUANTIZER_CONFIG), encoding="utf-8")
    window = problem.batches[0][:1]
    simulated = QuantizationSimModel(
        problem.model(selective_scan), dummy_input=window, default_param_bw=8, config_file=str(config)
    )
    free = problem.free_modules()
    for name, module in simulated.named_qmodules():
        if name not in free:
            for leaf in module.param_quantizers:
                module.param_quantizers[leaf] = None
    set_blockwise_quantization_for_weights(
        simulated,
        lambda module: isinstance(module, nn.Linear) and module.in_features % GROUP == 0,
        bitwidth=8,
        symmetric=True,
        block_size=GROUP,
    )
    if problem.config.tied:
        head = simulated.model.get_submodule(HEAD)
        share_lookup(simulated.model.embedding, lambda: head.param_quantizers["weight"](head.weight))
    simulated.compute_encodings(lambda model, _: model(window), None)
    return simulated


def _run(problem: Problem, simulated: Any, passes: _Passes, folder: str) -> list[Any]:
    """AMP's curve: (relative bit operations, score, quantiser group, candidate), each on top of those before."""
    from aimet_torch.common.amp.utils import AMPSearchAlgo
    from aimet_torch.common.defs import CallbackFunc, QuantizationDataType
    from aimet_torch.mixed_precision import choose_mixed_precision

    inputs = (16, QuantizationDataType.float)
    weights = [(16, QuantizationDataType.float), (8, QuantizationDataType.int), (4, QuantizationDataType.int)]
    score: Callable[..., float] = CallbackFunc(passes.score)
    curve = choose_mixed_precision(
        simulated,
        problem.batches[0][:1],
        [(inputs, weight) for weight in weights],
        score,
        score,
        None,
        folder,
        True,
        CallbackFunc(passes.refresh),
        use_all_amp_candidates=True,
        amp_search_algo=AMPSearchAlgo.BruteForce,
    )
    return list(curve or ())


def _decisions(curve: list[Any]) -> Iterator[Decision]:
    """The map after each step of the curve, and the one before the first, all fp16."""
    held: dict[str, str] = {}
    yield Decision("start of the curve", {})
    for step, (_, score, group, (_, (bits, _))) in enumerate(curve, start=1):
        held = {**held, **dict.fromkeys(group.parameter_quantizers, _precision(bits))}
        yield Decision(f"step {step}, own perplexity {math.exp(-score):.4f}", held)


def _precision(bits: int) -> str:
    return "fp16" if bits == 16 else f"int{bits}"
