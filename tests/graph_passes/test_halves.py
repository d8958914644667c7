"""Layers of float16 models become operators with float16 inputs and outputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

K, N = 66, 48
# ONNX Runtime rounds to float16 between the product, the bias and the activation function; the operator rounds once.
TOLERANCE = 3e-3
node = helper.make_node


@pytest.fixture
def make_half(make_model):
    def make(nodes, initializers: dict[str, np.ndarray], outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
        halves = {name: array.astype(np.float16) for name, array in initializers.items()}
        return make_model(nodes, {"x": ("batch", K)}, list(outputs), halves, element_type=TensorProto.FLOAT16)

    return make


def _x(rows: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(4).standard_normal((rows, K)).astype(np.float16)}


def _vector(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(N)


def _element_types(converted) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(converted.proto).graph
    values = [*inferred.value_info, *inferred.output, *inferred.initializer]
    return {v.name: v.data_type if isinstance(v, onnx.TensorProto) else v.type.tensor_type.elem_type for v in values}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_bias_and_activation_are_absorbed(workbench, make_half, sparse, weights: str) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="layer"),
        node("Add", ["m", "b"], ["s"]),
        node("Relu", ["s"], ["r"]),
        node("Neg", ["r"], ["y"]),
    ]
    converted = workbench.convert(make_half(nodes, {"w": sparse((K, N)), "b": _vector()}), weights=weights)
    assert converted.op_types == ["SparseAMXMatMul", "Neg"]
    assert converted.attributes("layer")["epilogue"] == b"relu"
    assert _element_types(converted)["r"] == TensorProto.FLOAT16
    assert converted.error(_x()) <= TOLERANCE + (1e-2 if weights == "bf16" else 0)


def test_gemm_with_factors(workbench, make_half, sparse) -> None:
    nodes = [node("Gemm", ["x", "w", "c"], ["y"], name="layer", alpha=0.5, beta=3.0, transB=1)]
    converted = workbench.convert(make_half(nodes, {"w": sparse((N, K)), "c": _vector()}))
    assert converted.op_types == ["SparseAMXMatMul"]
    (layer,) = converted.proto.graph.node
    assert _element_types(converted)[layer.input[2]] == TensorProto.FLOAT16
    assert converted.error(_x()) <= TOLERANCE


def test_siblings_share_a_bias_of_their_type(workbench, make_half, sparse) -> None:
    nodes = [
        node("MatMul", ["x", "a"], ["l"]),
        node("Add", ["l", "b"], ["lb"]),
        node("MatMul", ["x", "c"], ["r"]),
        node("Mul", ["lb", "r"], ["y"]),
    ]
    weights = {"a": sparse((K, N)), "b": _vector(), "c": sparse((K, N), seed=1)}
    converted = workbench.convert(make_half(nodes, weights), fuse_siblings="always")
    assert converted.op_types == ["SparseAMXMatMul", "Mul"]
    (fused, _) = converted.proto.graph.node
    assert _element_types(converted)[fused.input[2]] == TensorProto.FLOAT16
    assert converted.error(_x()) <= TOLERANCE


def test_a_float_bias_is_no_bias_of_a_half_layer(workbench, make_model, sparse) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Cast", ["m"], ["f"], to=TensorProto.FLOAT),
        node("Add", ["f", "b"], ["s"]),
        node("Cast", ["s"], ["y"], to=TensorProto.FLOAT16),
    ]
    weights = {"w": sparse((K, N)).astype(np.float16), "b": _vector().astype(np.float32)}
    proto = make_model(nodes, {"x": ("batch", K)}, ["y"], weights, element_type=TensorProto.FLOAT16)
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul", "Cast", "Add", "Cast"]
    assert converted.error(_x()) <= TOLERANCE


def test_results_beyond_the_largest_half_are_infinite(workbench, make_half, open_session) -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    converted = workbench.convert(make_half(nodes, {"w": np.full((K, N), 30000.0)}))
    x = np.zeros((3, K), np.float16)
    x[0, :2], x[1, :3], x[2, :4] = 1, 1, (1, 1, 1, -1)
    (y,) = open_session(converted.path).run(None, {"x": x})
    assert y.dtype == np.float16
    assert (y[0] == 60000).all()
    assert np.isposinf(y[1]).all()
    assert (y[2] == 60000).all()  # the sum on the way there is in float32
