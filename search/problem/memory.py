"""How much memory a study takes, and how it is kept below what there is: decided before anything slow begins.

Dimensions: `w` windows, `L` window length, `d` model.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from search.base.errors import StudyError
from search.problem.spec import StudySpec
from ssm_mp.checkpoints import Checkpoint
from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.conversion.forms import Scratch
from ssm_mp.errors import MachineError
from ssm_mp.evaluation.memory import Limit, memory_limit
from ssm_mp.files.mapped import spilled
from ssm_mp.precisions.matrix import head_bytes
from ssm_mp.shards import shard_tokens, token_bytes

GIB = 1 << 30
_PROCESS = 640 << 20
"""Resident bytes of a search without a model: interpreter, torch, optuna, scipy, matplotlib, freed memory kept."""
_STATES = {"measured": 6, "gradient": 4, "none": 3}
"""Hidden states of all windows that are held at once, by the kind of probe: both ends', and a layer's in and out."""
_GRADIENTS = 512 << 20
"""What gradients keep of layers' inputs, activations and errors, beside three times a layer in float32: its weights,
and two gradients."""
_KEPT = 64 << 20
"""Freed bytes that the C library keeps where memory is short."""
_LARGE = 64 << 20
"""Bytes of a checkpoint from which on a layer takes so long that taking all windows through it first costs nothing."""
_FEW_SHARED = 128 << 20
"""States that maps share give way to a model that then fits, down to so many bytes."""
_RESERVE = 0.1
"""Share of what there is that is left to others."""
SHARE = "SSM_MP_MEMORY"
"""Environment variable: bytes that each of several processes of a search on this machine may take."""
_OWN, _BESIDE = 1.5, 6 * GIB // 5
"""Unless a study says more, a search takes this multiple of the checkpoint's own bytes, and so much beside it."""


@dataclass(frozen=True)
class Needs:
    """Bytes that parts of a search take.

    checkpoint: its tensors as its file has them. forms: every component at every one of its precisions. running: hidden
    states of all windows and the activations of each thread. layer: the layer that takes the most, as it is stored and
    unpacked by each thread.
    """

    checkpoint: int
    forms: int
    running: int
    layer: int

    @property
    def least(self) -> int:
        """With one layer in memory at a time, nothing else kept."""
        return _PROCESS + self.running + self.layer

    @property
    def all(self) -> int:
        """With everything in memory."""
        return _PROCESS + self.running + self.checkpoint + self.forms


@dataclass(frozen=True)
class MemoryPlan:
    """How a study keeps below `bound` bytes.

    forms: bytes of quantised components in memory, None: all of them; shared: of hidden states that maps share.
    """

    bound: int
    layer_by_layer: bool
    forms: int | None
    shared: int
    scratch: Scratch | None
    sentence: str

    @property
    def kept(self) -> int:
        """Freed bytes that the C library may keep."""
        return _KEPT if self.layer_by_layer else GIB


def needs_of(spec: StudySpec, checkpoint: Checkpoint, components: Sequence[Component], length: int) -> Needs:
    """What a study of these components takes on windows of so many tokens."""
    config, threads = checkpoint.config, torch.get_num_threads()
    windows = max(spec.data.search_windows, spec.data.certify_windows, spec.data.calibration_count)
    states = 4 * windows * length * config.d_model
    tokens = min(windows * length, threads * max(length, shard_tokens(config, windows * length)))
    own = {name: tensor.numel() * tensor.element_size() for name, tensor in checkpoint.tensors.items()}
    stages: dict[int, int] = {}
    for component in components:
        held = 2 * component.count + sum(own.get(parameter.name, 0) for parameter in component.parameters)
        stages[component.stage] = stages.get(component.stage, 0) + held
    widened = max((4 * c.count for c in components if c.layer is not None), default=0)
    asked = [(c, precision) for c in components for precision in spec.precision.choices]
    held = _STATES[spec.search.probe] + (spec.search.metric == "kl")  # FP32's last
    running = held * states + tokens * token_bytes(config)
    if spec.search.probe != "gradient":  # which keeps more in any case
        running += 2 * head_bytes(config.vocabulary, config.d_model)  # divergences hold FP32's beside a map's
    if spec.search.probe == "gradient":
        running += _GRADIENTS + 4 * 3 * max(_stage_counts(components).values(), default=0)
    return Needs(
        checkpoint=sum(own.values()),
        forms=sum(component.bytes(precision, spec.precision.activations) for component, precision in asked),
        running=running,
        layer=max(stages.values(), default=0) + threads * widened,
    )


def _stage_counts(components: Sequence[Component]) -> dict[int, int]:
    """Parameters of what acts at each stage of the forward pass."""
    found: dict[int, int] = {}
    for component in components:
        found[component.stage] = found.get(component.stage, 0) + component.count
    return found


def plan_memory(spec: StudySpec, needs: Needs) -> MemoryPlan:
    """How a study keeps below its bound. Raises StudyError or MachineError where it cannot, with what would fit.

    On a GPU everything is held there, and nothing is planned.
    """
    limit = _limit(os.environ)
    at_once = _at_once(spec)
    bound = _bound(spec, needs.all + _FEW_SHARED if at_once else needs.least, needs, limit)
    shared = spec.search.shared_mib << 20
    if torch.device(spec.search.device).type == "cuda":
        return MemoryPlan(bound, False, None, shared, None, "")
    fits = needs.all + min(shared, _FEW_SHARED) <= bound
    if at_once and not fits:
        raise MachineError(
            f"{at_once} needs the model and all its quantised components in memory at once, about {_gib(needs.all)}, "
            f"and {_who(spec, limit)} {_gib(bound)}; give more, or leave it out"
        )
    if fits and (at_once or needs.checkpoint < _LARGE):
        shared = min(shared, bound - needs.all)
        said = f"memory: at most about {_gib(needs.all + shared)}, all of it held at once"
        return MemoryPlan(bound, False, None, shared, None, said)
    if needs.least > bound:
        raise _too_little(spec, needs, bound, limit)
    shared = min(shared, bound - needs.least)
    forms = bound - needs.least - shared
    said = f"memory: below {_gib(bound)}, evaluating layer by layer, quantised components "
    if needs.forms <= forms:
        return MemoryPlan(bound, True, None, shared, None, said + f"({_gib(needs.forms)}) in memory")
    scratch = scratch_of(spec, needs.forms - forms)
    said += f"in memory ({_gib(forms)}) and, up to {_gib(needs.forms - forms)} of them, in {scratch.folder}"
    return MemoryPlan(bound, True, forms, shared, scratch, said)


def _limit(environ: Mapping[str, str]) -> Limit | None:
    """What this process may take: of its search's share, where there are several processes, or of all that there is."""
    share = environ.get(SHARE, "")
    return Limit(int(share), "each process of this search (--workers) may take") if share.isdigit() else memory_limit()


def _at_once(spec: StudySpec) -> str | None:
    """What a study asks for that cannot be had layer by layer."""
    if spec.search.asks_latency:
        return 'the objective "latency"'
    return f"[search] stacked = {spec.search.stacked}" if spec.search.stacked not in ("auto", 1) else None


def _who(spec: StudySpec, limit: Limit | None) -> str:
    """Who bounds a study's memory, to be followed by how much that is."""
    return "[search] memory_gib allows" if spec.search.memory_gib is not None else limit.who if limit else "there is"


def _bound(spec: StudySpec, least: int, needs: Needs, limit: Limit | None) -> int:
    """Bytes that a study may take which cannot do with less than `least`. Raises StudyError where it asks for more than
    there is."""
    asked = spec.search.memory_gib
    if asked is None:
        if needs.checkpoint < _LARGE:  # its needs are mostly the process itself, and no reason to refuse anything
            return needs.all + (spec.search.shared_mib << 20)
        wanted = max(least, int(_OWN * needs.checkpoint) + _BESIDE)
        return wanted if limit is None else min(wanted, int((1 - _RESERVE) * limit.bytes))
    if limit is not None and asked * GIB > limit.bytes:
        raise StudyError(
            f"[search] memory_gib = {asked:g}, but {limit.who} {_gib(limit.bytes)}; expected at most that, e.g. "
            f"memory_gib = {(1 - _RESERVE) * limit.bytes / GIB:.1f}, or more from Slurm with [slurm] mem"
        )
    return int(asked * GIB)


def _too_little(spec: StudySpec, needs: Needs, bound: int, limit: Limit | None) -> MachineError:
    instead = ', or probe = "none" for "gradient"' if spec.search.probe == "gradient" else ""
    rest = needs.least - needs.layer - _PROCESS
    return MachineError(
        f"too little memory for one layer at a time: it takes about {_gib(needs.least)} ({_gib(needs.layer)} for the "
        f"largest layer, {_gib(rest)} for the states of all windows and the activations of {torch.get_num_threads()} "
        f"threads, {_gib(_PROCESS)} without a model), and {_who(spec, limit)} {_gib(bound)}; give more, or fewer or "
        f"shorter windows ([data] search_windows, certify_windows, window), or fewer threads (OMP_NUM_THREADS){instead}"
    )


def too_large_to_time(plan: MemoryPlan, fp32: int, stored: int, tokens: int, config: Config) -> str | None:
    """Why a converted model of `stored` bytes cannot be timed beside FP32 of `fp32` bytes within a plan, in a sentence;
    None where it can. tokens: that are read at once."""
    takes = _PROCESS + fp32 + stored + tokens * token_bytes(config)
    if not plan.layer_by_layer or takes <= plan.bound:
        return None
    return (
        f"speed not measured: with the FP32 model beside it that takes about {_gib(takes)} of memory, above "
        f"{_gib(plan.bound)}; [search] memory_gib gives more"
    )


def put_aside(spec: StudySpec, checkpoint: Checkpoint) -> Callable[[Tensor], Tensor] | None:
    """Where tensors that are put together of a large checkpoint's are held; None: in memory."""
    if checkpoint.file_bytes < _LARGE or torch.device(spec.search.device).type == "cuda":
        return None
    found = cache(lambda: scratch_of(spec, checkpoint.file_bytes).folder)  # not asked for where nothing is put together

    def place(tensor: Tensor) -> Tensor:
        folder = found()
        try:
            return spilled(tensor, folder)
        except OSError as error:
            raise MachineError(f"{folder}: the scratch folder cannot be written ({error.strerror or error})") from None

    return place


def scratch_of(spec: StudySpec, written: int) -> Scratch:
    """The folder for quantised components that do not fit memory. Raises MachineError where it cannot take so much."""
    asked = spec.search.scratch
    folder = Path(tempfile.gettempdir()) if asked is None else spec.resolve(asked, "[search] scratch")
    advice = "give another with [search] scratch (or TMPDIR), or more memory with [search] memory_gib"
    try:
        with tempfile.TemporaryFile("wb", dir=folder) as file:
            file.write(b"\0")
        free = _free_bytes(folder)
    except OSError as error:
        raise MachineError(
            f"{folder}: the scratch folder cannot be written ({error.strerror or error}); {advice}"
        ) from None
    if _is_memory(folder):
        raise MachineError(f"{folder}: the scratch folder lies in memory, which it is to save; {advice}")
    most = free if spec.search.scratch_gib is None else min(free, int(spec.search.scratch_gib * GIB))
    if written > most:
        has = (
            f"has {free / 1e9:.1f} GB free" if most == free else f"may take {most / 1e9:.1f} GB ([search] scratch_gib)"
        )
        raise MachineError(
            f"{folder}: quantised components may take {written / 1e9:.1f} GB of this scratch folder, which {has}; "
            f"{advice}, or ask for fewer precisions"
        )
    return Scratch(folder, most)


def _free_bytes(folder: Path) -> int:
    """What its file system has room for."""
    return shutil.disk_usage(folder).free


def _is_memory(folder: Path) -> bool:
    """Whether a folder's file system is kept in memory."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    real, best, kind = os.path.realpath(folder), "", ""
    for line in lines:
        _, point, system, *_ = line.split()
        point = point.replace("\\040", " ")
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, system
    return kind in ("tmpfs", "ramfs")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size >> 20} MiB"
