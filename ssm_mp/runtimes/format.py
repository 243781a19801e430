"""What an export format is: what it can hold, how it is written and read back, and how its runtime is asked.

A format is one folder here and one line in `registry.py`. Reader and runtime are imported inside the methods that need
them, so that a format is known, and its table printed, where neither is installed.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.scheme import ActivationScheme


@dataclass(frozen=True)
class Encoding:
    """How a format holds a component.

    word: the format's own, such as `Q8_0`. bytes: of the component's tensors there, scales and biases included.
    note: in what its values differ from ours, such as scales rounded anew; empty where they are equal bit for bit.
    """

    word: str
    bytes: int
    note: str = ""


Arrays = Mapping[str, Callable[[], np.ndarray]]
"""Tensors by the name that a file has for them, float32, dequantised when asked for."""


class Format(ABC):
    """An export format. Instances have no state."""

    word: str
    """What commands and studies call it."""
    runtime: str
    """The runtime that opens it, for people."""
    extra: str
    """The extra of this project that installs reader and runtime: `pip install 'ssm-mp[…]'`."""
    packages: tuple[str, ...]
    """Distributions of the extra, the runtime's first: its version is told with a verdict."""
    writer: tuple[str, ...] = ()
    """Modules without which nothing can be written."""
    reader: tuple[str, ...] = ()
    """Modules without which the file cannot be read back and compared."""
    modules: tuple[str, ...]
    """Modules without which the runtime cannot be asked."""
    inputs: ActivationScheme
    """How the runtime rounds the inputs of a quantised product."""
    suffix: str
    """Of its file; empty where it is a folder."""
    largest_divergence: float
    """Gate: the largest mean KL of the runtime's next-token distributions from ours."""
    largest_twin: float = 1e-4
    """Gate: the largest difference of log-probabilities of a file of the float32 twin."""

    @abstractmethod
    def refusal(self, config: Config) -> str | None:
        """Why not every map of models of this configuration can be written, with what to do; None where all can.

        A search for the format is refused by it at its start: experts that are a component each, say, where the format
        has one tensor for all of them.
        """

    def refusal_of(self, item: Exportable) -> str | None:
        """Why this very model cannot be written: configuration, map, tokenizer; None where it can.

        It may be less strict than `refusal`: experts that are a component each can be one tensor where all have one
        precision.
        """
        return self.refusal(item.config)

    def refusal_of_tokenizer(self, tokenizer: bytes, config: Config) -> str | None:
        """Why a `tokenizer.json` cannot go into a file of such a model; None where it can. A study whose text needs it
        is refused by it at its start."""
        return None

    def joined(self, config: Config) -> Iterable[tuple[str, ...]]:
        """Components that are one tensor in the file, so that they must be stored alike."""
        return ()

    @abstractmethod
    def encoding(self, component: Component, precision: str, config: Config) -> Encoding | None:
        """How a component at a precision is held with all its values; None where the format has no way.

        A tensor that the format keeps float32 whatever its precision (norms, `A_log`, `D`) is held by it.
        """

    @abstractmethod
    def write(self, item: Exportable, path: Path) -> None:
        """Write the file or folder `path`, which does not exist, by how each tensor is stored: `FloatTensor` float16
        or float32 (`twin`), `Int8Tensor`, `GroupedTensor`. What `encoding` does not know never comes here."""

    @abstractmethod
    def expected(self, item: Exportable) -> Arrays:
        """What must be read back: the model's dequantised tensors by the format's names and in its arrangement."""

    @abstractmethod
    def read(self, path: Path) -> Arrays:
        """What the format's own reader finds in the file, dequantised by it."""

    @abstractmethod
    def tensor_bytes(self, path: Path) -> int:
        """Bytes of the tensors in the file, as its reader tells: the sum of the encodings' bytes."""

    @abstractmethod
    def ask(self, path: Path, ids: Path, out: Path) -> list[str]:
        """The command, run in a process of its own, that lets the runtime read token ids.

        ids: the file of int64 token ids `[w, l]` (`.npy`). It writes float32 log-probabilities `[w, l, V]` to `out`
        (`.npy`) and prints one JSON line: `{"tokens": …, "seconds": …}` of reading them.
        """

    @abstractmethod
    def command(self, path: Path, item: Exportable) -> str:
        """What the user types next."""

    def command_on_ids(self, path: Path) -> str:
        """What the user of a file without a tokenizer types next."""
        return (
            f"{shlex.join(self.ask(path, Path('ids.npy'), Path('log-probabilities.npy')))}  "
            "# it has no tokenizer: token ids, int64 [windows, length]"
        )

    def environment(self) -> Mapping[str, str]:
        """Variables that the runtime's process needs."""
        return {}

    def details(self) -> Mapping[str, Any]:
        """How the runtime is set up when it is asked, to stand beside its verdict."""
        return {}
