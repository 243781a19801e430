"""The whole step out of its parts: every layer's graph with its own names, the weights put in, and what a user must
know of them in the file's metadata.

Dimensions: `b` sequences, `V` vocabulary, `t` tokens so far, `m` tokens of a product, `n` outputs and `k` inputs of a
product, `c` chosen experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ssm_mp.modules.parameter import Parameter
from ssm_mp.precisions.stored import Stored
from ssm_mp.runtimes.exportable import Exportable
from ssm_mp.runtimes.onnx.nodes import CONTRIB, Nodes
from ssm_mp.runtimes.onnx.step import (
    AT,
    DOMAIN,
    GROWING,
    IDS,
    LOGITS,
    OPSET,
    POSITION,
    Carried,
    Fragment,
    branch_fragment,
    carried,
    ends_fragment,
)
from ssm_mp.runtimes.onnx.weights import Layout, layout_of, stored_kind

VERSION = "1"
"""Of what the metadata says."""
IR_VERSION = 10
"""That of the operators' version."""
KEY = "ssm_mp."
"""What the metadata's keys begin with."""


@dataclass(frozen=True)
class Use:
    """A place where a tensor is used packed: what goes in there, and what comes out.

    word: `product`, `rows`, or `matrices` of chosen experts.
    """

    word: str
    input: str
    output: str


@dataclass(eq=False)
class Assembly:
    """The graph as it grows."""

    tensors: Mapping[str, tuple[Parameter, Stored]]
    nodes: Nodes = field(default_factory=Nodes)
    uses: dict[str, list[Use]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    """Tensors whose whole value is asked for."""

    def layout(self, name: str) -> Layout:
        parameter, stored = self.tensors[name]
        return layout_of(parameter, stored_kind(stored))

    def insert(self, fragment: Fragment, at: str, names: Mapping[str, str]) -> None:
        """A part of the step; `names` of what goes in and out, and of its weights; all else is named from `at` on."""
        from onnx import numpy_helper

        known = {"": "", **names}
        graph = fragment.graph.graph
        for constant in graph.initializer:
            known[constant.name] = self.nodes.constant(f"{at}/{constant.name}", numpy_helper.to_array(constant))
        for node in graph.node:
            if node.domain == DOMAIN:
                self._use(node.op_type, [known[name] for name in node.input], node.output[0], known)
                continue
            copy = type(node)()
            copy.CopyFrom(node)
            del copy.metadata_props[:], copy.input[:], copy.output[:]  # torch's own notes, with paths of this machine
            copy.doc_string, copy.name = "", f"{at}/{node.name}"
            copy.input.extend(known[name] for name in node.input)
            self.whole.update(name for name in copy.input if name in self.tensors)
            for output in node.output:
                known.setdefault(output, f"{at}/{output}")
            copy.output.extend(known[output] for output in node.output)
            self.nodes.nodes.append(copy)

    def _use(self, word: str, inputs: list[str], output: str, known: dict[str, str]) -> None:
        """What takes the place of a node of `DOMAIN`: `(x, weight)`, or `(x, weight, chosen)`."""
        name, nodes = inputs[1], self.nodes
        layout, found = self.layout(name), self.uses.setdefault(name, [])
        number = f".{len(found)}" if found else ""
        if word == "Chosen":
            use = Use("matrices", inputs[2], f"{name}/matrices{number}")
            whole = layout.matrices(nodes, name, use.input, use.output)
            last, result = nodes.integers(-1), known.setdefault(output, f"{name}/outputs{number}")
            x = nodes.add("Unsqueeze", [inputs[0], last], f"{use.output}/inputs")  # [m, 1 or c, k, 1]
            nodes.add("Squeeze", [nodes.add("MatMul", [use.output, x], f"{use.output}/columns"), last], result)
        else:
            use = Use(word.lower(), inputs[0], known.setdefault(output, f"{name}/{word.lower()}{number}"))
            take = layout.product if word == "Product" else layout.rows
            whole = take(nodes, name, use.input, use.output)
        found.append(use)
        if whole:
            self.whole.add(name)


def build(item: Exportable) -> Any:
    """The file, an `onnx.ModelProto`, of a model with its weights."""
    config, states = item.config, carried(item.model)
    assembly = Assembly(item.stored())
    hidden = "first"
    for i, branches in enumerate(config.branches):
        own = iter(states[i])
        for j, branch in enumerate(branches):
            at, held = f"layers.{i}.{j}", [next(own) for _ in branch.parts]
            fragment = branch_fragment(config.d_model, branch, tuple(tuple(s.shape for s in part) for part in held))
            names = {p.name: p.name.replace(AT, f"layers.{i}", 1) for p in fragment.parameters}
            for p, part in enumerate(held):
                names |= {f"state.{p}.{s}": state.name for s, state in enumerate(part)}
                names |= {f"new.{p}.{s}": state.new for s, state in enumerate(part)}
            assembly.insert(fragment, at, {**names, "x": hidden, "y": f"{at}/y"})
            hidden = f"{at}/y"
    ends = ends_fragment(config)
    own_names = {name: name for name in (*ends.inputs, *ends.outputs, *(p.name for p in ends.parameters))}
    assembly.insert(ends, "ends", {**own_names, "last": hidden})
    for name in assembly.whole:
        assembly.layout(name).value(assembly.nodes, name)
    return _file(item, assembly, [s for layer in states for block in layer for s in block if not s.is_empty])


_Value = tuple[str, int, list[int | str]]
"""Name, type and shape of what goes in or comes out."""


def _file(item: Exportable, assembly: Assembly, states: list[Carried]) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    config, integers, floats = item.config, TensorProto.INT64, TensorProto.FLOAT
    position: list[_Value] = [(POSITION, integers, [1])] if config.position_table is not None else []
    inputs: list[_Value] = [(IDS, integers, ["b", 1]), *position, *((s.name, floats, ["b", *s.shape]) for s in states)]
    outputs: list[_Value] = [
        (LOGITS, floats, ["b", 1, config.vocabulary]),
        *((s.new, floats, ["b", *(f"{GROWING} + 1" if size == GROWING else size for size in s.shape)]) for s in states),
    ]
    arrays = {**assembly.nodes.constants}
    for name, (_, stored) in assembly.tensors.items():
        arrays |= {name + suffix: array for suffix, array in assembly.layout(name).arrays(stored).items()}
    graph = helper.make_graph(
        list(_in_order(assembly.nodes.nodes, {*arrays, *(name for name, *_ in inputs)})), "step",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    versions = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=IR_VERSION, producer_name="ssm-mp")
    helper.set_model_props(model, {KEY + key: value for key, value in _metadata(item, assembly, states).items()})
    return model


def _metadata(item: Exportable, assembly: Assembly, states: list[Carried]) -> dict[str, str]:
    """What a user must know to write the loop, and the reader to find the tensors."""
    config = item.config
    tensors = {
        name: {
            "shape": list(parameter.shape),
            "experts": assembly.layout(name).experts,
            "arrays": [name + suffix for suffix in assembly.layout(name).arrays(stored)],
            "whole": name in assembly.whole,
            "uses": [[use.word, use.input, use.output] for use in assembly.uses.get(name, ())],
        }
        for name, (parameter, stored) in assembly.tensors.items()
    }
    said = {
        "version": VERSION,
        "family": config.family,
        "max_tokens": "" if config.max_tokens is None else str(config.max_tokens),
        # before the first token: zeros, `b` sequences, `t` = 0
        "states": json.dumps([{"name": s.name, "new": s.new, "shape": ["b", *s.shape]} for s in states]),
        "map": json.dumps({} if item.precision_map is None else item.precision_map.to_json()),
        "tensors": json.dumps(tensors),
    }
    return said if item.tokenizer is None else {**said, "tokenizer": item.tokenizer.decode()}


def _in_order(nodes: list[Any], known: set[str]) -> Iterator[Any]:
    """Nodes so that each comes after those that it needs, else in their order."""
    makers = {output: node for node in nodes for output in node.output}
    done = {"", *known}
    for node in nodes:
        waiting = [node]
        while waiting:
            missing = [name for name in waiting[-1].input if name not in done]
            if missing:
                waiting += [makers[name] for name in missing]
                continue
            ready = waiting.pop()
            if not done.issuperset(ready.output):
                done.update(ready.output)
                yield ready
