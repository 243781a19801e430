"""Every way to hold a tensor, for every use, on sizes that fill no block: what the runtime makes of it, bit for bit."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ssm_mp.modules.embedding import EmbeddingForm, PositionForm
from ssm_mp.modules.experts import ExpertsForm
from ssm_mp.modules.linear import LinearForm
from ssm_mp.modules.parameter import Form, Parameter
from ssm_mp.modules.value import ValueForm
from ssm_mp.precisions.registry import PRECISIONS, get_precision
from ssm_mp.precisions.stored import FloatTensor, Stored
from ssm_mp.runtimes.onnx.nodes import Nodes
from ssm_mp.runtimes.onnx.weights import Layout, kind_of, layout_of, stored_kind
from ssm_mp.scheme import ScaleRule

HELD = tuple(name for name in PRECISIONS if kind_of(name) is not None)
EVERY = ("fp32", *(name for name in HELD if "g" not in name), "nf4g32", "int4g128", "int3g32")
"""Of every book, and of groups of other sizes some."""
SHAPES = ((7, 128), (6, 96), (5, 48), (9, 21), (12, 5), (64, 64))
NAME = "matrix"


def stored(precision: str, shape: tuple[int, ...], role: str = "weight") -> Stored:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    if precision == "fp32":
        return FloatTensor(value)
    return get_precision(precision).store(value, role, ScaleRule("mse"))  # type: ignore[arg-type]


def parameter_of(form: Form, shape: tuple[int, ...], role: str = "weight") -> Parameter:
    return Parameter(NAME, shape, NAME, "in_proj", 0, role, form)  # type: ignore[arg-type]


def laid_out(form: Form, precision: str, shape: tuple[int, ...], role: str = "weight") -> tuple[Stored, Layout]:
    held = stored(precision, shape, role)
    layout = layout_of(parameter_of(form, shape, role), stored_kind(held))
    if precision != "fp32":
        kind = kind_of(precision)
        assert kind is not None
        assert layout == layout_of(parameter_of(form, shape, role), kind)  # as predicted from the precision's name
    assert sum(array.nbytes for array in layout.arrays(held).values()) == layout.bytes
    return held, layout


def run(
    layout: Layout, held: Stored, nodes: Nodes, output: str, optimised: bool = True, **given: np.ndarray
) -> np.ndarray:
    arrays = {**nodes.constants, **{NAME + suffix: array for suffix, array in layout.arrays(held).items()}}
    graph = helper.make_graph(
        nodes.nodes, "use",
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), None) for k, v in given.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run([output], given)[0]
    return found


@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("shape", [*SHAPES, (12, 1, 3), (20,)], ids=str)
def test_a_value_is_the_dequantised_tensor(precision: str, shape: tuple[int, ...]) -> None:
    role = "vector" if len(shape) == 1 else "weight"
    held, layout = laid_out(ValueForm(), precision, shape, role)
    nodes = Nodes()
    layout.value(nodes, NAME)
    nodes.add("Identity", [NAME], "y")
    assert np.array_equal(run(layout, held, nodes, "y"), held.tensor().numpy())


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_with_the_dequantised_matrix(precision: str, shape: tuple[int, ...], optimised: bool) -> None:
    held, layout = laid_out(LinearForm(), precision, shape)
    nodes = Nodes()
    if layout.product(nodes, NAME, "x", "y"):
        layout.value(nodes, NAME)
        nodes.nodes.sort(key=lambda node: node.output[0].startswith("y"))
    matrix = held.tensor().numpy()
    found = run(layout, held, nodes, "y", optimised, x=np.eye(shape[1], dtype=np.float32)[:, None])  # [k, 1, k]
    assert np.array_equal(found[:, 0].T, matrix)
    x = np.random.default_rng(0).standard_normal((2, 1, shape[1])).astype(np.float32)
    np.testing.assert_allclose(run(layout, held, nodes, "y", optimised, x=x), x @ matrix.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", [EmbeddingForm(tied=True), EmbeddingForm(tied=False), PositionForm()], ids=str)
@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_dequantised_table(form: Form, precision: str, shape: tuple[int, ...]) -> None:
    held, layout = laid_out(form, precision, shape)
    nodes = Nodes()
    if layout.rows(nodes, NAME, "index", "y"):
        layout.value(nodes, NAME)
        nodes.nodes.sort(key=lambda node: node.output[0].startswith("y"))
    index = np.array([[3], [0], [shape[0] - 1]])
    assert np.array_equal(run(layout, held, nodes, "y", index=index), held.tensor().numpy()[index])


@pytest.mark.parametrize("precision", EVERY)
@pytest.mark.parametrize("sizes", [(4, 6, 32), (3, 5, 7), (5, 8, 48), (2, 3, 64)], ids=str)
def test_matrices_are_those_of_the_chosen_experts(precision: str, sizes: tuple[int, int, int]) -> None:
    experts, n, k = sizes
    held, layout = laid_out(ExpertsForm(experts), precision, (experts * n, k))
    nodes = Nodes()
    if layout.matrices(nodes, NAME, "chosen", "y"):
        layout.value(nodes, NAME)
        nodes.nodes.sort(key=lambda node: node.output[0].startswith("y"))
    chosen = np.array([[1, 0], [0, experts - 1], [1, 1]])
    expected = held.tensor().numpy().reshape(experts, n, k)[chosen]
    assert np.array_equal(run(layout, held, nodes, "y", chosen=chosen), expected)


@pytest.mark.parametrize("precision", HELD)
def test_only_codes_of_three_five_and_six_bits_take_more_than_ours(precision: str) -> None:
    for shape in SHAPES:
        own = get_precision(precision).bytes(shape, "weight")
        held = laid_out(LinearForm(), precision, shape)[1].bytes
        assert held <= own or precision.partition("g")[0] in ("int6", "int5", "int3")


def test_what_has_no_operator_and_no_table_is_not_held() -> None:
    assert [name for name in PRECISIONS if name not in HELD] == ["nf3g32", "nf3", "nf3g128", "nf2g32", "nf2", "nf2g128"]


def test_a_precision_from_outside_has_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRECISIONS.homes, "fp8", "tests.ssm_mp.precisions.fp8:FP8")
    assert kind_of("fp8") is None
