"""Components at precisions, made once: held in memory up to a bound, beyond it in a scratch folder, mapped back.

A form is the module of one component at one precision. Models share forms by reference, so a form that gives way to
others is not made anew and not taken from anybody: its tensors are written to the scratch folder, and mapped from
there in their place. Files there have no names, and vanish with the process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ssm_mp.errors import MachineError
from ssm_mp.files.mapped import spilled
from ssm_mp.modules.unpacked import Remembering
from ssm_mp.precisions.stored import Stored

Key = tuple[str, str]
"""Component and precision."""


@dataclass(frozen=True)
class Scratch:
    """A folder that forms may be written to, and how many bytes in all.

    least: bytes of a tensor below which a file of its own would take more than it frees.
    """

    folder: Path
    capacity: int
    least: int = 1 << 12


class Forms:
    """A cache of forms. Used by one thread at a time; the models made of them may run in any number."""

    def __init__(self, capacity: int | None = None, scratch: Scratch | None = None) -> None:
        """`capacity`: bytes of tensors held in memory, None: any number; scratch: where the others go."""
        self._capacity = capacity
        self._scratch = scratch
        self._made: dict[Key, nn.Module] = {}
        self._held: OrderedDict[Key, int] = OrderedDict()
        self._written = 0

    @property
    def held(self) -> int:
        """Bytes of tensors in memory."""
        return sum(self._held.values())

    @property
    def written(self) -> int:
        """Bytes of tensors in the scratch folder."""
        return self._written

    def __contains__(self, key: Key) -> bool:
        return key in self._made

    def get(self, key: Key, make: Callable[[], nn.Module]) -> nn.Module:
        """A form, made where it is not there yet; those that were used the longest ago then give way.

        Raises MachineError where the scratch folder cannot take them.
        """
        if key not in self._made:
            self._made[key] = make()
            self._held[key] = sum(tensor.numel() * tensor.element_size() for *_, tensor in _tensors(self._made[key]))
            while self._capacity is not None and self.held > self._capacity:
                oldest = next(iter(self._held))
                self._written += self._spill(self._made[oldest])
                del self._held[oldest]
        elif key in self._held:
            self._held.move_to_end(key)
        return self._made[key]

    def _spill(self, form: nn.Module) -> int:
        """Put mapped tensors in place of a form's own; returns their bytes."""
        scratch = self._scratch
        if scratch is None:
            return 0
        written = 0
        for stored, name, tensor in _tensors(form):
            size = tensor.numel() * tensor.element_size()
            if size < scratch.least or tensor.device.type != "cpu":
                continue
            if self._written + written + size > scratch.capacity:
                raise MachineError(
                    f"{scratch.folder}: the quantised components take more than the {scratch.capacity / 1e9:.1f} GB "
                    "that this scratch folder may; give another with [search] scratch, more memory with [search] "
                    "memory_gib, or fewer precisions"
                )
            try:
                _replace(stored, name, spilled(tensor, scratch.folder))
            except OSError as error:
                raise MachineError(
                    f"{scratch.folder}: a quantised component could not be written there ({error.strerror or error}) "
                    f"after {(self._written + written) / 1e9:.1f} GB; give another folder with [search] scratch, or "
                    "more memory with [search] memory_gib"
                ) from None
            written += size
        for module in form.modules():
            if isinstance(module, Remembering):
                module.forget()
        return written


def _tensors(form: nn.Module) -> Iterator[tuple[Stored, str, Tensor]]:
    """A form's tensors, each with what stores it and its name there."""
    for module in form.modules():
        if isinstance(module, Stored):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield module, name, tensor.detach()


def _replace(stored: Stored, name: str, tensor: Tensor) -> None:
    """Another tensor of the same values in the place of one. Who computes with the former meanwhile goes on with it."""
    if name in stored._parameters:
        stored._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        stored._buffers[name] = tensor
