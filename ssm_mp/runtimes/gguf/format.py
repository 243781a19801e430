"""GGUF, for llama.cpp and what is built on it (Ollama, LM Studio).

Matrices are F16, Q8_0, Q5_0 or Q4_0 with our own codes and scales; norms, convolutions, routers, biases, `A`, `D` and
the bias of the step are float32 at every precision.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ssm_mp.components import Component
from ssm_mp.config import Config
from ssm_mp.errors import ExportError
from ssm_mp.files.shown import listed
from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.format import Arrays, Encoding, Format
from ssm_mp.runtimes.gguf import file
from ssm_mp.runtimes.gguf.architectures import unknown
from ssm_mp.runtimes.gguf.layout import known_layout, layout_of
from ssm_mp.runtimes.gguf.packing import row_bytes, word_for, word_of
from ssm_mp.runtimes.gguf.tensors import Entry
from ssm_mp.runtimes.gguf.tokenizer import require_known

_FLOAT32 = 4
_ADVICE = '[precision] experts = "together", and no [precision] split'


class Gguf(Format):
    """The format; see above."""

    word = "gguf"
    runtime = "llama.cpp"
    extra = "gguf"
    packages = ("xllamacpp", "gguf")
    writer = ("gguf",)
    reader = ("gguf",)
    modules = ("xllamacpp",)
    inputs = "blocks"
    suffix = ".gguf"
    largest_divergence = 1e-4

    def refusal(self, config: Config) -> str | None:
        reason = unknown(config)
        if reason is None and config.embedding_blocks:
            reason = "GGUF has one type for the token embedding; leave out [precision] embedding_blocks"
        if reason is not None:
            return reason
        for entry, parts in _shared(config):
            return (
                f"{entry.name} is one tensor of one type, here it is {len(parts)} components "
                f"({listed(parts)}); use {_ADVICE}"
            )
        return None

    def refusal_of(self, item: Exportable) -> str | None:
        reason = unknown(item.config)
        if reason is not None or item.config.embedding_blocks:
            return reason or self.refusal(item.config)
        stored = {name: held for name, (_, held) in item.stored().items()}
        for entry, parts in _shared(item.config):
            words = {name: word_of(stored[name]) for name in dict.fromkeys(rows.tensor for rows in entry.rows)}
            if len(set(words.values())) > 1:
                said = listed(f"{part} {item.precision(part)}" for part in parts)
                return (
                    f"{entry.name} is one tensor of one type, found {said}; --widen stores all as the widest; or use "
                    f"{_ADVICE}"
                )
        refused = None if item.tokenizer is None else self.refusal_of_tokenizer(item.tokenizer, item.config)
        return refused and f"{refused}; --no-tokenizer leaves it out, and the file then takes token ids"

    def refusal_of_tokenizer(self, tokenizer: bytes, config: Config) -> str | None:
        try:
            require_known(tokenizer, config.vocabulary)
        except ExportError as error:
            return str(error)
        return None

    def joined(self, config: Config) -> Iterable[tuple[str, ...]]:
        return [] if known_layout(config) is None else [tuple(parts) for _, parts in _shared(config)]

    def encoding(self, component: Component, precision: str, config: Config) -> Encoding | None:
        layout = None if config.embedding_blocks else known_layout(config)
        if layout is None:
            return None
        word, size, folded = "F32", 0, False
        for parameter in component.parameters:
            found = layout.uses[parameter.name]
            if not any(entry.matrix for entry, _ in found):
                size += _FLOAT32 * prod(parameter.shape)
                continue
            wanted = word_for(precision)
            row = None if wanted is None else row_bytes(wanted, parameter.shape[-1])
            if wanted is None or row is None:
                return None
            word = wanted
            size += prod(parameter.shape[:-1]) * row
            folded = folded or any(rows.factor != 1.0 for _, rows in found)
        size += sum(_FLOAT32 * prod(entry.shape) for entry in layout.fillers.get(component.name, ()))
        what = "values" if word == "F16" else "scales"
        note = (
            f"{what} times what llama.cpp has no key for, rounded to float16 anew" if folded and word != "F32" else ""
        )
        return Encoding(word, size, note)

    def write(self, item: Exportable, path: Path) -> None:
        reason = self.refusal_of(item)
        if reason is not None:
            raise ExportError(reason)
        file.write(item, path)

    def expected(self, item: Exportable) -> Arrays:
        stored = {name: held for name, (_, held) in item.stored().items()}
        return {entry.name: _later(entry, stored) for entry in layout_of(item.config).entries}

    def read(self, path: Path) -> Arrays:
        return file.read(path)

    def tensor_bytes(self, path: Path) -> int:
        return file.tensor_bytes(path)

    def ask(self, path: Path, ids: Path, out: Path) -> list[str]:
        return [sys.executable, "-P", str(_RUNNER), str(path), str(ids), str(out)]

    def command(self, path: Path, item: Exportable) -> str:
        if item.tokenizer is None:
            return self.command_on_ids(path)
        return f"llama-cli -m {shlex.quote(str(path))} -no-cnv -p 'Once upon a time' -n 64"

    def environment(self) -> Mapping[str, str]:
        # spinning threads would take a busy machine's processors from each other; without a trace, no debugger starts
        return {"OMP_WAIT_POLICY": "passive", "GGML_NO_BACKTRACE": "1"}

    def details(self) -> Mapping[str, Any]:
        return {"flash_attention": False, "cache": "float32"}


_RUNNER = Path(__file__).with_name("run.py")


def _later(entry: Entry, stored: dict[str, Stored]) -> Any:
    return lambda: file.floats_of(entry, stored)


def _shared(config: Config) -> Iterator[tuple[Entry, list[str]]]:
    """Tensors of the file that several components are parts of, and these."""
    owners = {parameter.name: parameter.component for parameter in config.parameters()}
    for entry in layout_of(config).entries:
        parts = list(dict.fromkeys(owners[rows.tensor] for rows in entry.rows))
        if len(parts) > 1:
            yield entry, parts


GGUF = Gguf()
