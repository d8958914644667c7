"""Which nodes are linear layers: every spelling that is taken gives the same numbers, every other has its reason."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.graph_passes import pipeline
from sparamx_onnx.graph_passes.linear_layers import LinearLayerFinder, scope_of
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.plan import Action, Reason
from sparamx_onnx.ops.errors import SparamxError

K, N = 70, 45
MICROSOFT = "com.microsoft"
node = helper.make_node
EXACT = 1e-5


def _x(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _find(proto: onnx.ModelProto) -> list:
    return list(LinearLayerFinder(ir.from_proto(proto)).find())


# --- what is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (2, 1, 3, K)])
def test_matmul_of_any_rank(workbench, make_model, sparse, shape) -> None:
    proto = make_model([node("MatMul", ["x", "w"], ["y"])], {"x": shape}, ["y"], {"w": sparse((K, N))})
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.attributes("y") == {"K": K, "N": N}
    assert converted.initializers == {"w.sparamx"}
    assert converted.error({"x": _x(*shape)}) <= EXACT


@pytest.mark.parametrize("bias_first", [False, True])
@pytest.mark.parametrize("bias_shape", [(N,), (1,), (), (1, N), (1, 1, N), (1, 1)])
def test_bias_add(workbench, make_model, sparse, bias_shape, bias_first) -> None:
    operands = ["b", "m"] if bias_first else ["m", "b"]
    proto = make_model(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", operands, ["y"])],
        {"x": (2, 3, K)},
        ["y"],
        {"w": sparse((K, N)), "b": _x(*bias_shape)},
    )
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"]
    (name,) = converted.initializers - {"w.sparamx"}
    assert name == ("b" if bias_shape == (N,) else "b.sparamx")
    plan = converted.node("m")
    assert plan.bias
    assert plan.absorbed == ("y",)
    assert converted.error({"x": _x(2, 3, K)}) <= EXACT


@pytest.mark.parametrize(
    ("x_shape", "bias_shape"),
    [((3, K), (2, 1, N)), ((3, K), (3, N)), ((3, K), (3, 1)), ((K,), (1, N)), (None, (1, N))],
    ids=str,
)
def test_adds_that_are_no_bias(workbench, make_model, sparse, x_shape, bias_shape) -> None:
    proto = make_model(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])],
        {"x": x_shape},
        ["y"],
        {"w": sparse((K, N)), "b": _x(*bias_shape)},
    )
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul", "Add"]
    assert not converted.node("m").bias
    assert converted.error({"x": _x(*(x_shape or (3, K)))}) <= EXACT


def test_an_add_of_activations_is_no_bias(workbench, make_model, sparse) -> None:
    proto = make_model(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "x"], ["y"])], {"x": (2, K)}, ["y"], {"w": sparse((K, K))}
    )
    assert workbench.convert(proto).op_types == ["SparseAMXMatMul", "Add"]


def test_a_product_that_is_used_twice_keeps_its_add(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["a"]), node("Mul", ["a", "m"], ["y"])]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, N)), "b": _x(N)})
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul", "Add", "Mul"]
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_a_product_that_is_an_output_keeps_its_add(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])]
    proto = make_model(nodes, {"x": (2, K)}, ["y", "m"], {"w": sparse((K, N)), "b": _x(N)})
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul", "Add"]
    assert converted.error({"x": _x(2, K)}) <= EXACT


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c_shape", [None, (N,), (1, N), (), (1,), (1, 1)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (-1.7, 0.0)])
def test_gemm(workbench, make_model, sparse, trans_b, c_shape, alpha, beta) -> None:
    inputs = ["x", "w"] if c_shape is None else ["x", "w", "c"]
    w = sparse((N, K) if trans_b else (K, N))
    proto = make_model(
        [node("Gemm", inputs, ["y"], transB=trans_b, alpha=alpha, beta=beta)],
        {"x": (4, K)},
        ["y"],
        {"w": w} if c_shape is None else {"w": w, "c": _x(*c_shape)},
    )
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.node("y").bias == (c_shape is not None and beta != 0)
    assert converted.node("y").nnz == np.count_nonzero(w)
    assert converted.error({"x": _x(4, K)}) <= EXACT


def test_gemm_without_c_takes_an_add(workbench, make_model, sparse) -> None:
    nodes = [node("Gemm", ["x", "w", ""], ["m"], transB=1), node("Add", ["b", "m"], ["y"])]
    proto = make_model(nodes, {"x": (4, K)}, ["y"], {"w": sparse((N, K)), "b": _x(N)})
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.error({"x": _x(4, K)}) <= EXACT


def test_weight_and_bias_as_constant_nodes(workbench, make_model, sparse) -> None:
    nodes = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(sparse((K, N)))),
        node("MatMul", ["x", "w"], ["m"]),
        # After the product: the sparse operator has to stand behind it.
        node("Constant", [], ["b"], value=numpy_helper.from_array(_x(N))),
        node("Add", ["m", "b"], ["y"]),
    ]
    converted = workbench.convert(make_model(nodes, {"x": (2, K)}, ["y"], {}))
    assert converted.op_types == ["Constant", "SparseAMXMatMul"]
    assert converted.initializers == {"w.sparamx"}
    assert converted.error({"x": _x(2, K)}) <= EXACT


@pytest.mark.parametrize("source", [np.float16, np.float64, "bfloat16"])
def test_weights_behind_a_cast(workbench, make_model, sparse, source) -> None:
    w = sparse((N, K))
    if source == "bfloat16":
        tensor = helper.make_tensor("w", TensorProto.BFLOAT16, w.shape, w.ravel())
    else:
        tensor = numpy_helper.from_array(w.astype(source), "w")
    nodes = [
        node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
        node("MatMul", ["x", "turned"], ["y"]),
    ]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {})
    proto.graph.initializer.append(tensor)
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.initializers == {"w.sparamx"}
    assert converted.node("y").bytes_before == w.size * {np.float64: 8}.get(source, 2)
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_a_cast_that_loses_precision_is_kept_in_mind(workbench, make_model, sparse) -> None:
    nodes = [
        node("Cast", ["w"], ["half"], to=TensorProto.FLOAT16),
        node("Cast", ["half"], ["wide"], to=TensorProto.FLOAT),
        node("MatMul", ["x", "wide"], ["y"]),
    ]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, N))})
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.error({"x": _x(2, K)}) <= 1e-6


def test_chains_of_identity_and_transpose(workbench, make_model, sparse) -> None:
    nodes = [
        node("Identity", ["w"], ["w1"]),
        node("Transpose", ["w1"], ["w2"]),
        node("Identity", ["w2"], ["w3"]),
        node("Transpose", ["w3"], ["w4"], perm=[1, 0]),
        node("MatMul", ["x", "w4"], ["m"]),
        node("Identity", ["b"], ["b1"]),
        node("Add", ["m", "b1"], ["y"]),
    ]
    converted = workbench.convert(make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, N)), "b": _x(N)}))
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.initializers == {"w.sparamx", "b"}
    assert converted.error({"x": _x(2, K)}) <= EXACT


@pytest.mark.parametrize("ir_version", [3, 8])
def test_an_input_with_a_default_that_no_sum_needs(workbench, make_model, sparse, ir_version) -> None:
    """With beta = 0 nothing reads C, but a caller may still give it, unless it is a constant: before IR version 4."""
    proto = make_model(
        [node("Gemm", ["x", "w", "c"], ["y"], beta=0.0)],
        {"x": (2, K)},
        ["y"],
        {"w": sparse((K, N)), "c": _x(N)},
        opset=9,
        ir_version=ir_version,
        extra_inputs=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in {"c": (N,), **({"w": (K, N)} if ir_version < 4 else {})}.items()
        ],
    )
    del proto.opset_import[1:]
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"]
    inputs = {value.name for value in converted.proto.graph.input}
    assert inputs == ({"x", "w.sparamx"} if ir_version < 4 else {"x", "c"})
    feeds = {"x": _x(2, K)} if ir_version < 4 else {"x": _x(2, K), "c": _x(N)}
    assert converted.error(feeds) <= EXACT


@pytest.mark.parametrize("ir_version", [3, 4, 8])
def test_initializers_listed_as_inputs(workbench, make_model, sparse, open_session, ir_version) -> None:
    """Before IR version 4 every initializer was; from then on it means that a caller may replace it."""
    listed = [
        helper.make_tensor_value_info("w", TensorProto.FLOAT, (K, N)),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, (N,)),
    ]
    proto = make_model(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])],
        {"x": (2, K)},
        ["y"],
        {"w": sparse((K, N)), "b": _x(N)},
        opset=9,
        ir_version=ir_version,
        extra_inputs=listed,
    )
    del proto.opset_import[1:]
    converted = workbench.convert(proto)
    if ir_version < 4:
        assert converted.op_types == ["SparseAMXMatMul"]
        assert [i.name for i in converted.proto.graph.input] == ["x", "b", "w.sparamx"]
        assert [i.name for i in open_session(converted.path).get_inputs()] == ["x"]
    else:
        assert converted.op_types == ["MatMul", "Add"]
        assert converted.node("m").reason is Reason.WEIGHT_IS_GRAPH_INPUT
    assert converted.error({"x": _x(2, K)}) <= EXACT


# --- what is refused ------------------------------------------------------------------------------------------------


def _refusals(make_model, sparse) -> dict[Reason, list[onnx.ModelProto]]:
    w = sparse((K, N))
    x = {"x": (2, K)}

    def fused(**attributes: int) -> onnx.NodeProto:
        return node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", **attributes)

    return {
        Reason.TWO_ACTIVATIONS: [
            make_model([node("MatMul", ["x", "z"], ["y"])], {"x": (2, K), "z": (K, N)}, ["y"], {}),
            make_model(
                [node("Transpose", ["z"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
                {"x": (2, K), "z": (N, K)},
                ["y"],
                {},
            ),
            make_model(
                [node("Mul", ["z", "w"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
                {"x": (2, K), "z": (K, N)},
                ["y"],
                {"w": w},
            ),
        ],
        Reason.WEIGHT_NOT_CONSTANT: [
            make_model(
                [node("Mul", ["w", "two"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
                x,
                ["y"],
                {"w": w, "two": np.array(2, np.float32)},
            ),
            make_model(
                [node("Cast", ["i"], ["t"], to=TensorProto.FLOAT), node("MatMul", ["x", "t"], ["y"])],
                x,
                ["y"],
                {"i": np.ones((K, N), np.int32)},
            ),
        ],
        Reason.WEIGHT_IS_GRAPH_INPUT: [
            make_model(
                [node("MatMul", ["x", "w"], ["y"])],
                x,
                ["y"],
                {"w": w},
                extra_inputs=[helper.make_tensor_value_info("w", TensorProto.FLOAT, (K, N))],
            ),
            make_model(
                [node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
                x,
                ["y"],
                {"w": sparse((N, K))},
                extra_inputs=[helper.make_tensor_value_info("w", TensorProto.FLOAT, (N, K))],
            ),
        ],
        Reason.WEIGHT_ON_LEFT: [
            make_model([node("MatMul", ["w", "x"], ["y"])], {"x": (N, 5)}, ["y"], {"w": w}),
        ],
        Reason.WEIGHT_NOT_2D: [
            make_model([node("MatMul", ["x", "v"], ["y"])], x, ["y"], {"v": _x(K)}),
            make_model([node("MatMul", ["x", "e"], ["y"])], x, ["y"], {"e": sparse((3, K, N))}),
        ],
        Reason.EMPTY_WEIGHT: [
            make_model([node("MatMul", ["x", "w"], ["y"])], x, ["y"], {"w": np.zeros((K, 0), np.float32)}),
            make_model([node("MatMul", ["x", "w"], ["y"])], {"x": (2, 0)}, ["y"], {"w": np.zeros((0, N), np.float32)}),
        ],
        Reason.CONSTANT_EXPRESSION: [
            make_model(
                [node("MatMul", ["c", "w"], ["m"]), node("Add", ["m", "x"], ["y"])],
                {"x": (2, N)},
                ["y"],
                {"w": w, "c": _x(2, K)},
            ),
        ],
        Reason.QUANTIZED_WEIGHT: [
            make_model(
                [
                    node("Cast", ["x"], ["i"], to=TensorProto.UINT8),
                    node("MatMulInteger", ["i", "q"], ["m"]),
                    node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
                ],
                x,
                ["y"],
                {"q": np.ones((K, N), np.int8)},
            ),
            make_model(
                [node("DequantizeLinear", ["q", "s"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
                {**x, "s": ()},
                ["y"],
                {"q": np.ones((K, N), np.int8)},
            ),
        ],
        Reason.UNSUPPORTED_DTYPE: [
            make_model(
                [node("Gemm", ["x", "w"], ["y"])],
                x,
                ["y"],
                {"w": w.astype(np.float64)},
                element_type=TensorProto.DOUBLE,
            ),
        ],
        Reason.UNSUPPORTED_ATTRIBUTES: [
            make_model([node("Gemm", ["x", "w"], ["y"], transA=1)], {"x": (K, 2)}, ["y"], {"w": w}),
            make_model([fused(transA=1)], {"x": (K, 2)}, ["y"], {"w": w}),
            make_model([fused(transBatchA=1)], {"x": (2, 3, K)}, ["y"], {"w": w}),
        ],
        Reason.WEIGHT_CHOSEN_AT_RUN_TIME: [
            make_model(
                [node("Gather", ["stack", "i"], ["g"]), *between, node("MatMul", ["x3", last], ["y"])],
                {"x3": (2, 3, K)},
                ["y"],
                {"stack": stack},
                extra_inputs=[helper.make_tensor_value_info("i", TensorProto.INT64, [2])],
            )
            for stack, between, last in (
                (sparse((4, K, N)), [], "g"),
                (sparse((4, N, K)), [node("Transpose", ["g"], ["t"], perm=[0, 2, 1])], "t"),
            )
        ],
        Reason.UNSUPPORTED_BIAS: [
            make_model(
                [node("DynamicQuantizeMatMul", ["x", "q", "s", "", "c"], ["y"], domain="com.microsoft")],
                {**x, "c": (N,)},
                ["y"],
                {"q": np.ones((K, N), np.int8), "s": np.float32(0.5)},
            ),
        ],
        Reason.UNSUPPORTED_OPERATOR: [
            make_model([node("Einsum", ["x", "e"], ["y"], equation="mk,khn->mhn")], x, ["y"], {"e": sparse((K, 2, N))}),
            make_model([node("Einsum", ["x", "w"], ["y"], equation="mk,kn->nm")], x, ["y"], {"w": w}),
            make_model([node("Einsum", ["x", "w"], ["y"], equation="nk,kn->n")], {"x": (N, K)}, ["y"], {"w": w}),
        ],
    }


REFUSED = [
    Reason.TWO_ACTIVATIONS,
    Reason.WEIGHT_CHOSEN_AT_RUN_TIME,
    Reason.WEIGHT_NOT_CONSTANT,
    Reason.WEIGHT_IS_GRAPH_INPUT,
    Reason.WEIGHT_ON_LEFT,
    Reason.WEIGHT_NOT_2D,
    Reason.EMPTY_WEIGHT,
    Reason.CONSTANT_EXPRESSION,
    Reason.QUANTIZED_WEIGHT,
    Reason.UNSUPPORTED_DTYPE,
    Reason.UNSUPPORTED_ATTRIBUTES,
    Reason.UNSUPPORTED_BIAS,
    Reason.UNSUPPORTED_OPERATOR,
]


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_leave_the_model_as_it_was(workbench, make_model, sparse, reason) -> None:
    for index, proto in enumerate(_refusals(make_model, sparse)[reason]):
        converted = workbench.convert(proto, name=f"{index}.onnx")
        (plan,) = converted.plan
        assert plan.action is Action.LEFT_ALONE
        assert plan.reason is reason
        assert plan.text.endswith(".")
        assert list(converted.proto.graph.node) == list(proto.graph.node)
        assert converted.initializers == {i.name for i in proto.graph.initializer}
        assert converted.proto.opset_import == proto.opset_import
        assert not converted.proto.metadata_props


@pytest.mark.parametrize(
    ("nodes", "reason", "words"),
    [
        ([node("Gemm", ["x", "z"], ["y"])], Reason.TWO_ACTIVATIONS, ""),
        ([node("FusedMatMul", ["x", "z"], ["y"], domain=MICROSOFT)], Reason.TWO_ACTIVATIONS, ""),
        ([node("Attention", ["x", "z", "b"], ["y"], domain=MICROSOFT)], Reason.TWO_ACTIVATIONS, ""),
        ([node("Einsum", ["x", "w", "w"], ["y"], equation="mk,kn,kn->mn")], Reason.UNSUPPORTED_OPERATOR, "equation is"),
        ([node("Einsum", ["w", "x"], ["y"], equation="kn,mk->mn")], Reason.WEIGHT_ON_LEFT, "'w'"),
        ([node("Gemm", ["x", "stack"], ["y"])], Reason.WEIGHT_NOT_2D, "[4, 3, 5]"),
        ([node("Attention", ["x", "stack"], ["y"], domain=MICROSOFT)], Reason.WEIGHT_NOT_2D, "[4, 3, 5]"),
        ([node("Gemm", ["x", "w", "doubles"], ["y"])], Reason.UNSUPPORTED_BIAS, ""),
        ([node("FusedGemm", ["x", "w", "b"], ["y"], domain=MICROSOFT)], Reason.CONVERTED, ""),
        (
            [node("Gather", ["stack", "i"], ["g"]), node("MatMul", ["g", "x"], ["y"])],
            *(Reason.WEIGHT_CHOSEN_AT_RUN_TIME, "'stack'"),
        ),
        (
            [node("Attention", ["x", "w", "b", "", "past"], ["y"], domain=MICROSOFT)],
            *(Reason.UNSUPPORTED_ATTRIBUTES, "cache"),
        ),
        (
            [node("Attention", ["x", "w", "b"], ["y"], domain=MICROSOFT, qkv_hidden_sizes=[9, 9, 9])],
            *(Reason.UNSUPPORTED_ATTRIBUTES, f"{N} columns for [9, 9, 9]"),
        ),
        ([node("Attention", ["x", "w", "z"], ["y"], domain=MICROSOFT)], Reason.UNSUPPORTED_BIAS, ""),
        ([node("Identity", [""], ["v"]), node("MatMul", ["x", "v"], ["y"])], Reason.TWO_ACTIVATIONS, ""),
        ([node("Cast", ["w"], ["v"], to=TensorProto.FLOAT), node("MatMul", ["x", "v"], ["y"])], Reason.CONVERTED, ""),
        (
            [node("Constant", [], ["v"]), node("MatMul", ["x", "v"], ["y"])],
            *(Reason.WEIGHT_NOT_CONSTANT, "no plain tensor"),
        ),
        (
            [node("DequantizeLinear", ["q", ""], ["v"]), node("MatMul", ["x", "v"], ["y"])],
            *(Reason.MALFORMED_NODE, "'v' has no scales"),
        ),
        (
            [node("DequantizeBFP", ["q", "q", "q"], ["v"], domain=MICROSOFT), node("MatMul", ["x", "v"], ["y"])],
            *(Reason.QUANTIZED_WEIGHT, "DequantizeBFP node 'v'"),
        ),
        (
            [node("DequantizeLinear", ["q8", "b"], ["v"]), node("MatMul", ["x", "v"], ["y"])],
            *(Reason.QUANTIZED_WEIGHT, "FLOAT8E4M3FN"),
        ),
        (
            [node("DequantizeLinear", ["q", "doubles"], ["v"]), node("MatMul", ["x", "v"], ["y"])],
            *(Reason.QUANTIZED_WEIGHT, "scales are DOUBLE"),
        ),
        (
            [node("Identity", ["b1"], ["a1"]), node("Identity", ["a1"], ["b1"]), node("MatMul", ["a1", "w"], ["y"])],
            *(Reason.CONVERTED, ""),
        ),
    ],
)
def test_what_becomes_of_odd_products(make_model, sparse, nodes, reason: Reason, words: str) -> None:
    constants = {
        "w": sparse((K, N)), "b": _x(N), "stack": sparse((4, 3, 5)), "doubles": np.ones(N),
        "q": np.ones((K, N), np.int8), "q8": np.ones((K, N), ml_dtypes.float8_e4m3fn),
    }  # fmt: skip
    inputs = {"x": (2, K), "z": (K, N), "past": (2, 1, 4, 3, 15)}
    index = [helper.make_tensor_value_info("i", TensorProto.INT64, [2])]
    (found,) = _find(make_model(nodes, inputs, ["y"], constants, extra_inputs=index))
    assert (found.plan.reason, found.layer is None) == (reason, reason is not Reason.CONVERTED)
    assert words in found.plan.detail


def test_shapes_that_do_not_fit(make_model, sparse) -> None:
    """Not a valid model: ONNX Runtime would refuse it, so it must not be made to look right."""
    wrong = make_model([node("MatMul", ["x", "w"], ["y"])], {"x": (2, K + 1)}, ["y"], {"w": sparse((K, N))})
    (found,) = _find(wrong)
    assert found.layer is None
    assert found.plan.reason is Reason.MALFORMED_NODE
    missing = make_model([node("MatMul", ["x", ""], ["y"])], {"x": (2, K)}, ["y"], {})
    assert _find(missing)[0].plan.reason is Reason.MALFORMED_NODE
    turned = make_model(
        [node("Transpose", ["w"], ["t"], perm=[0, 2, 1]), node("MatMul", ["x", "t"], ["y"])],
        {"x": (2, K)},
        ["y"],
        {"w": sparse((K, N))},
    )
    assert _find(turned)[0].plan.reason is Reason.MALFORMED_NODE


@pytest.mark.parametrize(("name", "value"), [("transB", 1.0), ("transA", "x"), ("alpha", [1.0]), ("beta", "y")])
def test_attributes_of_another_type(make_model, sparse, name, value) -> None:
    nodes = [node("Gemm", ["x", "w", "c"], ["y"], **{name: value})]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, N)), "c": _x(N)})
    (found,) = _find(proto)
    assert found.layer is None
    assert found.plan.reason is Reason.MALFORMED_NODE
    assert f"'{name}' of the Gemm node 'y'" in found.plan.detail


@pytest.mark.parametrize(
    ("nodes", "what"),
    [
        (
            [node("Transpose", ["w"], ["t"], perm="x"), node("MatMul", ["x", "t"], ["y"])],
            "'perm' of the Transpose node 't'",
        ),
        ([node("Cast", ["w"], ["c"], to=1.0), node("MatMul", ["x", "c"], ["y"])], "'to' of the Cast node 'c'"),
        (
            [node("MatMul", ["x", "w"], ["m"]), node("Gelu", ["m"], ["y"], approximate=1)],
            "'approximate' of the Gelu node 'y'",
        ),
        ([node("MatMul", ["x", "w"], ["m"]), node("Swish", ["m"], ["y"], alpha=1)], "'alpha' of the Swish node 'y'"),
    ],
)
def test_attributes_of_another_type_in_nodes_around(make_model, sparse, nodes, what) -> None:
    (found,) = _find(make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, N))}))
    assert found.layer is None
    assert found.plan.reason is Reason.MALFORMED_NODE
    assert what in found.plan.detail


@pytest.mark.parametrize("cycle", [["b"], ["c", "b"]])
def test_a_cycle_does_not_hang(make_model, cycle: list[str]) -> None:
    operator = "Identity" if len(cycle) == 1 else "DequantizeLinear"
    nodes = [node(operator, cycle, ["a"]), node("Identity", ["a"], ["b"]), node("MatMul", ["x", "a"], ["y"])]
    (found,) = _find(make_model(nodes, {"x": (2, K)}, ["y"], {"c": np.ones((K, N), np.int8)}))
    assert found.layer is None


def test_quantized_operators_are_reported(make_model) -> None:
    nodes = [node("MatMulInteger", ["x", "q"], ["y"])]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"q": np.ones((K, N), np.int8)})
    (found,) = _find(proto)
    assert found.plan.reason is Reason.QUANTIZED_WEIGHT
    assert found.plan.weight == "q"
    assert found.plan.bytes_before == K * N
    without_weight = make_model([node("MatMulInteger", ["x", "z"], ["y"])], {"x": (2, K), "z": (K, N)}, ["y"], {})
    assert _find(without_weight) == []


@pytest.mark.parametrize(
    ("operator", "inputs", "reason"),
    [
        ("GemmFastGelu", ["x", "w"], Reason.UNSUPPORTED_OPERATOR),
        ("MatMulFpQ4", ["x", "w"], Reason.QUANTIZED_WEIGHT),
        ("MoE", ["x", "p", "w"], Reason.UNSUPPORTED_OPERATOR),
        ("QMoE", ["x", "p", "w"], Reason.QUANTIZED_WEIGHT),
        ("MoE", ["x", "p", "x"], None),
        ("MoE", ["x"], None),
    ],
)
def test_relatives_are_reported(make_model, operator: str, inputs: list[str], reason: Reason | None) -> None:
    nodes = [node(operator, inputs, ["y"], domain="com.microsoft")]
    proto = make_model(nodes, {"x": (2, K), "p": (2, 4)}, ["y"], {"w": np.zeros(K * N, np.uint8)})
    plans = [found.plan for found in _find(proto)]
    assert [(plan.reason, plan.weight, plan.bytes_before) for plan in plans] == (
        [] if reason is None else [(reason, "w", K * N)]
    )


# --- bodies and functions -------------------------------------------------------------------------------------------


def _if_model(make_model, sparse, weight_inside: bool) -> onnx.ModelProto:
    w = numpy_helper.from_array(sparse((K, N)), "w")
    bodies = {}
    for branch in ("then", "else"):
        nodes = [node("MatMul", ["x", "w"], [f"m_{branch}"], name=f"m_{branch}")]
        nodes.append(node("Relu" if branch == "then" else "Neg", [f"m_{branch}"], [f"r_{branch}"], name=branch))
        output = helper.make_tensor_value_info(f"r_{branch}", TensorProto.FLOAT, None)
        bodies[branch] = helper.make_graph(nodes, branch, [], [output], [w] if weight_inside else [])
    return make_model(
        [node("If", ["c"], ["y"], name="choice", then_branch=bodies["then"], else_branch=bodies["else"])],
        {"x": (2, K)},
        ["y"],
        {} if weight_inside else {"w": sparse((K, N))},
        extra_inputs=[helper.make_tensor_value_info("c", TensorProto.BOOL, ())],
    )


@pytest.mark.parametrize("weight_inside", [False, True])
def test_bodies(workbench, make_model, sparse, weight_inside) -> None:
    proto = _if_model(make_model, sparse, weight_inside)
    converted = workbench.convert(proto)
    assert [plan.graph for plan in converted.plan] == ["choice", "choice"]
    for branch, taken in (("then", True), ("else", False)):
        plan = converted.node(f"m_{branch}")
        assert plan.action is Action.CONVERTED
        assert plan.epilogue == ("relu" if taken else "none")
        assert converted.error({"x": _x(2, K), "c": np.array(taken)}) <= EXACT
    # One name each: a body must not repeat a name of another scope.
    packed = _packed_in_bodies(converted.proto.graph)
    assert sorted(t.name for t in packed) == ["w.sparamx", "w.sparamx.2"]
    assert converted.initializers == set()
    if not weight_inside:
        # The same bytes of the file, counted once.
        first, second = ({e.key: e.value for e in tensor.external_data} for tensor in packed)
        assert first == second
        assert converted.plan.bytes_after == converted.node("m_then").bytes_after


def _packed_in_bodies(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """The initializers of all bodies."""
    bodies = [a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [tensor for body in bodies for tensor in (*body.initializer, *_packed_in_bodies(body))]


def test_a_weight_of_an_outer_graph_is_constant_in_the_body(workbench, make_model, sparse) -> None:
    """ONNX Runtime up to 1.28 treats only initializers of the body itself as constant: so all of them are."""
    proto = _if_model(make_model, sparse, weight_inside=False)
    # The same weight in the main graph, and in a body of a body, behind a Transpose that stands outside.
    inner = helper.make_graph(
        [node("MatMul", ["m_then", "t"], ["deep"], name="deep")],
        "inner",
        [],
        [helper.make_tensor_value_info("deep", TensorProto.FLOAT, None)],
    )
    choice = proto.graph.node[0]
    then_body = next(a.g for a in choice.attribute if a.name == "then_branch")
    then_body.node.append(node("If", ["c"], ["r2"], name="nested", then_branch=inner, else_branch=inner))
    then_body.output[0].name = "r2"
    else_body = next(a.g for a in choice.attribute if a.name == "else_branch")
    else_body.node.append(node("MatMul", ["r_else", "t"], ["back"], name="back"))
    else_body.output[0].name = "back"
    proto.graph.node.insert(0, node("Transpose", ["w"], ["t"], name="turn"))
    proto.graph.node.append(node("MatMul", ["y", "w"], ["z"], name="outer"))
    proto.graph.output[0].name = "z"
    converted = workbench.convert(proto)
    assert {plan.node: plan.graph for plan in converted.plan} == {
        "m_then": "choice", "m_else": "choice", "deep": "nested", "back": "choice", "outer": None,
    }  # fmt: skip
    assert all(plan.action is Action.CONVERTED for plan in converted.plan)
    assert [n.op_type for n in converted.proto.graph.node] == ["If", "SparseAMXMatMul"]
    packed = [*converted.proto.graph.initializer, *_packed_in_bodies(converted.proto.graph)]
    assert len({t.name for t in packed}) == len(packed) == 6
    assert len({e.value for t in packed for e in t.external_data if e.key == "offset"}) == 2
    for taken in (True, False):
        assert converted.error({"x": _x(2, K), "c": np.array(taken)}) <= EXACT


def test_a_loop(workbench, make_model, sparse) -> None:
    body = helper.make_graph(
        [
            node("Identity", ["go"], ["go_on"]),
            node("MatMul", ["state", "w"], ["m"], name="m"),
            node("Add", ["b", "m"], ["a"], name="a"),
            node("Relu", ["a"], ["next"], name="next"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ()),
            helper.make_tensor_value_info("go", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, (2, K)),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    proto = make_model(
        [node("Loop", ["count", ""], ["y"], name="loop", body=body)],
        {"x": (2, K)},
        ["y"],
        {"w": sparse((K, K)) / 8, "b": _x(K), "count": np.array(3)},
    )
    proto.graph.node[0].input.append("x")
    converted = workbench.convert(proto)
    plan = converted.node("m")
    assert (plan.action, plan.graph, plan.epilogue, plan.bias) == (Action.CONVERTED, "loop", "relu", True)
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_bodies_of_old_models_cannot_hold_weights(workbench, make_model, sparse) -> None:
    proto = _if_model(make_model, sparse, weight_inside=False)
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (K, N)))
    converted = workbench.convert(proto)
    assert [plan.reason for plan in converted.plan] == [Reason.IN_SUBGRAPH] * 2


@pytest.mark.parametrize("calls", [1, 2])
def test_functions(workbench, make_model, sparse, calls) -> None:
    """As older torch exporters write whole models; a name of the function is taken in the model."""
    inner = helper.make_function(
        "local", "Product", ["a", "b"], ["c"], [node("MatMul", ["a", "b"], ["c"], name="inner")],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
    nodes = [
        node("Product", ["a", "b"], ["x"], domain="local", name="call"),
        node("Constant", [], ["slope"], value_float=0.5, name="constant"),
        node("Mul", ["x", "slope"], ["c"], name="scaled"),
    ]
    outer = helper.make_function(
        "local", "Linear", ["a", "b"], ["c"], nodes,
        [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)],
    )  # fmt: skip
    model_nodes = [
        node("Linear", ["x" if i == 0 else f"h{i - 1}", "w"], [f"h{i}"], domain="local") for i in range(calls)
    ]
    proto = make_model(
        [*model_nodes, node("Neg", [f"h{calls - 1}"], ["y"])],
        {"x": (2, K)},
        ["y"],
        {"w": sparse((K, K))},
        functions=[inner, outer],
    )
    converted = workbench.convert(proto)
    assert [plan.action for plan in converted.plan] == [Action.CONVERTED] * calls
    assert not converted.proto.functions
    assert converted.initializers == {"w.sparamx"}
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_functions_that_cannot_be_inlined(workbench, make_model, sparse) -> None:
    function = helper.make_function(
        "local", "Linear", ["a", "b"], ["c"], [node("MatMul", ["a", "b"], ["c"], name="inner")],
        [helper.make_opsetid("", 19)],
    )  # fmt: skip
    proto = make_model(
        [node("Linear", ["x", "w"], ["y"], domain="local")], {"x": (2, K)}, ["y"], {"w": sparse((K, N))},
        functions=[function],
    )  # fmt: skip
    converted = workbench.convert(proto)
    (plan,) = converted.plan
    assert (plan.node, plan.graph, plan.reason) == ("inner", "Linear", Reason.IN_FUNCTION)
    assert converted.error({"x": _x(2, K)}) == 0


def _function(
    name: str, nodes: list[onnx.NodeProto], *, output: str = "c", domain: str = "local"
) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    return helper.make_function(domain, name, ["a", "b"], [output], nodes, imports)


def test_functions_that_are_not_valid_stay(make_model, sparse) -> None:
    product = node("MatMul", ["a", "b"], ["c"], name="inner")
    body = helper.make_graph([], "body", [], [])
    around = [product, node("Linear", ["a", "b"], ["d"], domain="local", name="itself")]
    for function, attributes in (
        (_function("Linear", around), {}),
        (_function("Linear", [product], output="a"), {}),
        (_function("Linear", [product]), {"body": body}),
    ):
        call = node("Linear", ["x", "w"], ["y"], domain="local", **attributes)
        model = ir.from_proto(make_model([call], {"x": (2, K)}, ["y"], {"w": sparse((K, N))}, functions=[function]))
        (plan,) = pipeline.run(model, ConvertOptions())
        assert (plan.node, plan.graph, plan.reason) == ("inner", "Linear", Reason.IN_FUNCTION)


def test_a_call_that_does_not_fit_its_function_is_refused(make_model, sparse) -> None:
    function = _function("Linear", [node("MatMul", ["a", "b"], ["c"], name="inner")])
    call = node("Linear", ["x", "w", "w"], ["y"], domain="local")
    model = ir.from_proto(make_model([call], {"x": (2, K)}, ["y"], {"w": sparse((K, N))}, functions=[function]))
    with pytest.raises(SparamxError, match="functions of the model cannot be inlined"):
        pipeline.run(model, ConvertOptions())


def test_functions_without_products_stay(workbench, make_model, sparse) -> None:
    function = helper.make_function(
        "local", "Twice", ["a"], ["c"], [node("Add", ["a", "a"], ["c"], name="inner")], [helper.make_opsetid("", 20)]
    )
    proto = make_model(
        [node("Twice", ["x"], ["h"], domain="local"), node("MatMul", ["h", "w"], ["y"])],
        {"x": (2, K)}, ["y"], {"w": sparse((K, N))}, functions=[function],
    )  # fmt: skip
    converted = workbench.convert(proto)
    assert converted.op_types == ["Twice", "SparseAMXMatMul"]
    assert len(converted.proto.functions) == 1
    assert converted.error({"x": _x(2, K)}) <= EXACT


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recorded", "scope"),
    [
        ("node_MatMul_7", "['', 'encoder.layer.0', 'encoder.layer.0.query', 'linear_3']", "encoder.layer.0.query"),
        ("n", "['', 'linear']", None),
        ("n", "not a list", None),
        ("/encoder/layer.0/query/MatMul", None, "encoder.layer.0.query"),
        ("/MatMul", None, None),
        ("MatMul_12", None, None),
    ],
)
def test_scopes(name, recorded, scope) -> None:
    metadata = {} if recorded is None else {"pkg.torch.onnx.name_scopes": recorded}
    assert scope_of(ir.Node("", "MatMul", [], name=name, metadata_props=metadata)) == scope
