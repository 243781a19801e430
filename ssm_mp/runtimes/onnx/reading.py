"""Reading a file back: every tensor as the file's own nodes dequantise it, evaluated by the runtime.

Dimensions: `n` rows and `k` values in a row of a matrix, `X` experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssm_mp.errors import DisagreementError, ExportError
from ssm_mp.runtimes.format import Arrays
from ssm_mp.runtimes.onnx.graph import KEY, VERSION, Use

_AT_ONCE = 1 << 24
"""Values that an operator gives at once where a matrix is read through it."""


@dataclass(frozen=True)
class Entry:
    """What the metadata says of a tensor: of how many experts it is, the names of its arrays, whether its whole value
    is there, and where it is used packed."""

    shape: tuple[int, ...]
    experts: int | None
    arrays: tuple[str, ...]
    whole: bool
    uses: tuple[Use, ...]


class File:
    """A file of ours."""

    def __init__(self, path: Path) -> None:
        """Raises ExportError where it is no such file."""
        import onnx
        from google.protobuf.message import DecodeError

        try:
            self.model = onnx.load(path)
        except (DecodeError, ValueError, OSError) as error:
            raise ExportError(f"{path}: not an ONNX file: {error}") from None
        said = {prop.key.removeprefix(KEY): prop.value for prop in self.model.metadata_props}
        if said.get("version") != VERSION:
            raise ExportError(
                f"{path}: metadata {KEY}version: expected {VERSION!r}, found {said.get('version')!r}; "
                "write the file anew with this version of ssm-mp"
            )
        self.entries = {
            name: Entry(
                tuple(each["shape"]),
                each["experts"],
                tuple(each["arrays"]),
                each["whole"],
                tuple(Use(*use) for use in each["uses"]),
            )
            for name, each in json.loads(said["tensors"]).items()
        }
        self._initialisers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._makers = {output: node for node in self.model.graph.node for output in node.output}

    @property
    def bytes(self) -> int:
        """Of all tensors' arrays."""
        from onnx import numpy_helper

        arrays = (name for entry in self.entries.values() for name in entry.arrays)
        return sum(numpy_helper.to_array(self._initialisers[name]).nbytes for name in arrays)

    def tensors(self) -> Arrays:
        """Every tensor by its canonical name."""
        return {name: partial(self._tensor, name, entry) for name, entry in self.entries.items()}

    def _tensor(self, name: str, entry: Entry) -> np.ndarray:
        """Raises DisagreementError where its uses differ."""
        found: dict[str, np.ndarray] = {"value": self._run(name, {})} if entry.whole else {}
        for use in entry.uses:
            if entry.whole and use.word == "product":
                continue  # of the value that was just read
            found[use.output] = self._through(use, entry)
        first, *others = found.items()
        for where, values in others:
            if not np.array_equal(values, first[1]):
                raise DisagreementError(f"onnx: {name} differs between {first[0]} and {where}")
        return first[1]

    def _through(self, use: Use, entry: Entry) -> np.ndarray:
        """The matrix that is used packed, through the operators that use it: of an identity, or of every number."""
        shape = entry.shape
        if use.word == "product":
            n, k = shape
            step = max(1, _AT_ONCE // max(n, k))
            parts = [self._run(use.output, {use.input: _identity(k, start, step)}) for start in range(0, k, step)]
            return np.ascontiguousarray(np.concatenate(parts).T)  # [k, n] → [n, k]
        index = np.arange(entry.experts or shape[0])[:, None]
        return self._run(use.output, {use.input: index}).reshape(shape)

    def _run(self, output: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """What a part of the graph gives, from the weights and given values."""
        import onnxruntime
        from onnx import helper, numpy_helper

        if output in self._initialisers:
            return numpy_helper.to_array(self._initialisers[output])
        nodes, arrays = self._part(output, values)
        types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in values.items()}
        graph = helper.make_graph(
            nodes, "part", [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()],
            [helper.make_tensor_value_info(output, 1, None)], arrays,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found: np.ndarray = session.run([output], dict(values))[0]
        return found

    def _part(self, output: str, given: Iterable[str]) -> tuple[list[Any], list[Any]]:
        """The nodes that lead to a value, in order, and the initialisers that they need."""
        nodes: list[Any] = []
        arrays: dict[str, Any] = {}
        waiting, seen = [output], set(given)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in self._initialisers:
                arrays[name] = self._initialisers[name]
            elif name in self._makers:
                nodes.append(self._makers[name])
                waiting += self._makers[name].input
        held = {id(node) for node in nodes}
        return [node for node in self.model.graph.node if id(node) in held], list(arrays.values())


def _identity(size: int, start: int, rows: int) -> np.ndarray:
    """Some rows of the identity matrix, from `start` on: float32 `[rows, size]`."""
    return np.eye(min(rows, size - start), size, start, dtype=np.float32)
