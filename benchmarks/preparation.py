"""What comes before the first trial, as it was and as it is: calibration, and quantising with least-square scales.

`python -m benchmarks.preparation` prints, for the reference and a Mamba of 94 million parameters: seconds of one FP32
evaluation of the calibration windows, of calibration on them in two passes and in one, and of quantising every
component as a whole by torch and in slices by kernels; each the least of a few turns. Then, once, of what compensated
rounding takes: second moments of all inputs, and rounding every component that has some at two precisions. Weights are
random where there is no checkpoint, and windows are random tokens: the time depends on neither.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.shapes import LENGTH, checkpoint_of, initial_tensors, random_windows
from ssm_mp.components import find_components
from ssm_mp.conversion.calibrate import calibrate, calibrate_reference
from ssm_mp.conversion.rounding import damping_of, gathered_moments, weight_of
from ssm_mp.data import Windows
from ssm_mp.evaluation.evaluate import evaluate
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.model import LanguageModel, build
from ssm_mp.precisions.grouped import Grouped
from ssm_mp.precisions.groups import group_scales, nearest_codes, pack, to_groups
from ssm_mp.precisions.quantize import quantize_rows, weight_scales
from ssm_mp.precisions.registry import PRECISIONS
from ssm_mp.precisions.stored import FloatTensor, Role
from ssm_mp.scheme import ScaleRule

LARGE = MambaConfig(4096, 768, 1536, 16, 48, 4, 24)
"""24 layers of 768: 94 million parameters with the reference's vocabulary."""
PRECISION_NAMES = ("int8", "nf4", "int4")
COMPENSATED = ("nf4", "nf3")
_RULE = ScaleRule("mse")


def models() -> Iterator[tuple[str, LanguageModel]]:
    """The models measured, by name."""
    reference = checkpoint_of("reference")
    yield "reference", build(reference.config, reference.tensors)
    yield "24 layers of 768", build(LARGE, initial_tensors(LARGE))


def quantise_whole(name: str, tensor: Tensor, role: Role) -> None:
    """A tensor at a precision as a whole, by torch."""
    precision = PRECISIONS[name]
    if role in ("bias", "index"):
        return
    if isinstance(precision, Grouped):
        groups = to_groups(tensor)
        pack(nearest_codes(groups, group_scales(groups, _RULE, precision.book), precision.book), precision.bits)
    else:
        rows = tensor.reshape(tensor.shape[0] if role == "weight" else 1, -1)
        quantize_rows(rows, weight_scales(rows, _RULE))


def quantise(name: str, tensor: Tensor, role: Role) -> None:
    """The same in slices, by kernels."""
    PRECISIONS[name].store(tensor, role, _RULE)


def tensors_of(model: LanguageModel) -> list[tuple[Tensor, Role]]:
    """Every parameter of a model, with its role."""
    found: list[tuple[Tensor, Role]] = []
    for component in find_components(model):
        module = model.component(component.name)
        for parameter in component.parameters:
            held = module if isinstance(module, FloatTensor) else getattr(module, parameter.leaf)
            if isinstance(held, FloatTensor):
                found.append((held.value.data, parameter.role))
    return found


def seconds(function: Callable[[], object], turns: int) -> float:
    """The least time of a few turns."""
    spent = []
    for _ in range(turns):
        began = time.perf_counter()
        function()
        spent.append(time.perf_counter() - began)
    return min(spent)


def report(name: str, model: LanguageModel, windows: Windows, turns: int, slow: bool) -> None:
    """Print one model's lines; `slow`: with the ways that were."""
    tensors = tensors_of(model)
    values = sum(tensor.numel() for tensor, _ in tensors)
    evaluation = seconds(lambda: evaluate(model, windows), turns)
    print(f"{name}: {values / 1e6:.1f} M parameters, {len(windows)} windows of {windows.length}")
    print(f"  evaluation            {evaluation:8.2f} s")
    once = seconds(lambda: calibrate(model, windows), turns)
    twice = f"{seconds(lambda: calibrate_reference(model, windows), 1):8.2f} s before" if slow else ""
    print(f"  calibration           {once:8.2f} s  {twice}  ({once / evaluation:.2f} evaluations)", flush=True)
    for precision in PRECISION_NAMES:

        def every(way: Callable[[str, Tensor, Role], None], precision: str = precision) -> None:
            for tensor, role in tensors:
                way(precision, tensor, role)

        fast = seconds(lambda every=every: every(quantise), turns)  # type: ignore[misc]
        before = f"{seconds(lambda every=every: every(quantise_whole), 1):8.2f} s before" if slow else ""  # type: ignore[misc]
        print(
            f"  quantising at {precision:8}{fast:8.2f} s  {before}  ({fast / values * 1e9:.1f} ns a value)", flush=True
        )


def report_compensated(model: LanguageModel, windows: Windows) -> None:
    """Print what compensated rounding takes of one model."""
    components = find_components(model)
    began = time.perf_counter()
    moments = list(gathered_moments(model, windows, components))
    print(f"  second moments        {time.perf_counter() - began:8.2f} s", flush=True)
    for precision in COMPENSATED:
        grouped, began = PRECISIONS[precision], time.perf_counter()
        assert isinstance(grouped, Grouped)
        for name, gathered in moments:
            weight = weight_of(model, name)
            grouped.compensated(weight, gathered.all, damping_of(weight, gathered))
        print(f"  compensating at {precision:6}{time.perf_counter() - began:8.2f} s", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of 128 tokens")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--new", action="store_true", help="leave out the ways that were")
    asked = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name, model in models():
        windows = random_windows(model.config.vocabulary, asked.windows, LENGTH)
        report(name, model, windows, asked.turns, not asked.new)
        report_compensated(model, windows)


if __name__ == "__main__":
    main()
