"""Every spelling of an activation function is absorbed and gives the same numbers; look-alikes are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sparamx_onnx.graph_passes.linear_layers import LinearLayerFinder

K, N = 64, 48
node = helper.make_node
EXACT = 1e-5

# Each spelling computes y from v, a node a line; the attribute of an operator stands behind a colon.
SPELLINGS: dict[str, tuple[str, str]] = {
    "relu": ("relu", "y = Relu v"),
    "gelu op": ("gelu", "y = Gelu v"),
    "gelu op of onnxruntime": ("gelu", "y = com.microsoft.Gelu v"),
    "x * 0.5 * (1 + erf(x / sqrt 2))": (
        "gelu",
        """h = Mul v 0.5
        d = Div v 1.4142135
        e = Erf d
        a = Add 1.0 e
        y = Mul h a""",
    ),
    "(x * (1 + erf(x * sqrt 1/2))) * 0.5": (
        "gelu",
        """d = Mul v 0.70710677
        e = Erf d
        a = Add e 1.0
        p = Mul v a
        y = Mul p 0.5""",
    ),
    "(0.5 * (erf(x / 1.41421) + 1)) * x": (
        "gelu",
        """d = Div v 1.41421
        e = Erf d
        a = Add e 1.0
        p = Mul 0.5 a
        y = Mul p v""",
    ),
    "gelu op, tanh": ("gelu_tanh", "y = Gelu:tanh v"),
    "fast gelu of onnxruntime": ("gelu_tanh", "y = com.microsoft.FastGelu v"),
    "gpt-2": (
        "gelu_tanh",
        """h = Mul v 0.5
        p = Pow v 3.0
        c = Mul p 0.044715
        s = Add v c
        t = Mul s 0.7978846
        u = Tanh t
        a = Add u 1.0
        y = Mul h a""",
    ),
    "gelu_fast": (
        "gelu_tanh",
        """h = Mul v 0.5
        t = Mul v 0.7978846
        c = Mul v 0.044715
        d = Mul c v
        e = Add d 1.0
        f = Mul t e
        u = Tanh f
        a = Add u 1.0
        y = Mul h a""",
    ),
    "x * sigmoid(x)": (
        "silu",
        """s = Sigmoid v
        y = Mul v s""",
    ),
    "sigmoid(x) * x": (
        "silu",
        """s = Sigmoid v
        y = Mul s v""",
    ),
    "x / (1 + exp(-x))": (
        "silu",
        """n = Neg v
        e = Exp n
        a = Add e 1.0
        y = Div v a""",
    ),
    "quick gelu with alpha 1": ("silu", "y = com.microsoft.QuickGelu:1 v"),
}

LOOK_ALIKES: dict[str, str] = {
    "quick gelu": "y = com.microsoft.QuickGelu v",
    "x * sigmoid(1.702 x)": """t = Mul v 1.702
        s = Sigmoid t
        y = Mul v s""",
    "twice gelu": """d = Div v 1.4142135
        e = Erf d
        a = Add e 1.0
        y = Mul v a""",
    "sigmoid": "y = Sigmoid v",
    "x * tanh(x)": """t = Tanh v
        y = Mul v t""",
    "silu of 2 x": """t = Mul v 2.0
        s = Sigmoid t
        y = Mul t s""",
    "leaky relu": "y = LeakyRelu v",
    "more steps than any": "\n".join(f"n{i} = Neg {f'n{i - 1}' if i else 'v'}" for i in range(12)) + "\ny = Neg n11",
    "x times another's sigmoid": """s = Sigmoid z
        y = Mul v s""",
}


def _results(spelling: str) -> list[str]:
    return [line.split()[0] for line in spelling.splitlines()]


def _operators(spelling: str) -> list[str]:
    return [line.split()[2].partition(":")[0].rpartition(".")[2] for line in spelling.splitlines()]


def _model(make_model, spelling: str, outputs=("y",)) -> onnx.ModelProto:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["v"])]
    rng = np.random.default_rng(0)
    constants = {"w": rng.standard_normal((K, N), np.float32) / 4, "b": rng.standard_normal(N, np.float32)}
    constants["w"][rng.random((K, N)) < 0.5] = 0
    for line in spelling.splitlines():
        result, _, operator, *operands = line.split()
        for operand in operands:
            if operand[0].isdigit():
                constants[operand] = np.array(float(operand), np.float32)
        operator, _, attribute = operator.partition(":")
        attributes = {"tanh": {"approximate": "tanh"}, "1": {"alpha": 1.0}}.get(attribute, {})
        domain, _, op_type = operator.rpartition(".")
        nodes.append(node(op_type, operands, [result], domain=domain, **attributes))
    return make_model(nodes, {"x": (7, K), "z": (7, N)}, list(outputs), constants)


def _feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((7, K), np.float32) * 3, "z": rng.standard_normal((7, N), np.float32)}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(workbench, make_model, name) -> None:
    epilogue, spelling = SPELLINGS[name]
    converted = workbench.convert(_model(make_model, spelling))
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.attributes("m") == {"K": K, "N": N, "epilogue": epilogue.encode()}
    assert converted.node("m").epilogue == epilogue
    assert set(converted.node("m").absorbed) == {"v", *_results(spelling)}
    assert converted.initializers == {"w.sparamx", "b"}
    assert converted.error(_feeds()) <= EXACT


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes(workbench, make_model, name) -> None:
    spelling = LOOK_ALIKES[name]
    converted = workbench.convert(_model(make_model, spelling))
    assert converted.op_types == ["SparseAMXMatMul", *_operators(spelling)]
    assert converted.node("m").epilogue == "none"
    assert converted.error(_feeds()) <= EXACT


@pytest.mark.parametrize("name", SPELLINGS)
def test_values_that_are_needed_elsewhere(workbench, make_model, name) -> None:
    """Neither the sums nor anything in between may go where another node or the caller wants it."""
    _, spelling = SPELLINGS[name]
    for index, value in enumerate(["v", *_results(spelling)[:-1]]):
        as_output = workbench.convert(_model(make_model, spelling, outputs=("y", value)), name=f"o{index}.onnx")
        used = workbench.convert(
            _model(make_model, f"{spelling}\nother = Mul {value} z", outputs=("y", "other")),
            name=f"u{index}.onnx",
        )
        for converted in (as_output, used):
            assert converted.node("m").epilogue == "none"
            assert converted.op_types[0] == "SparseAMXMatMul"
            assert converted.error(_feeds()) <= EXACT


def test_a_gate_keeps_its_product_with_the_other_branch(workbench, make_model) -> None:
    converted = workbench.convert(_model(make_model, "s = Sigmoid v\ng = Mul v s\ny = Mul g z"))
    assert converted.op_types == ["SparseAMXMatMul", "Mul"]
    assert converted.node("m").epilogue == "silu"
    assert converted.error(_feeds()) <= EXACT


def test_swish_of_opset_24(workbench, make_model) -> None:
    """onnxruntime has no kernel for it yet, so the graph alone is looked at."""
    proto = _model(make_model, "y = Swish v")
    proto.opset_import[0].version = 24
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.node("m").epilogue == "silu"


def test_a_constant_that_adds_dimensions_is_not_absorbed(workbench, make_model) -> None:
    proto = _model(make_model, "h = Mul v half\nd = Div v 1.4142135\ne = Erf d\na = Add e 1.0\ny = Mul h a")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((1, 1, 1), 0.5, np.float32), "half"))
    converted = workbench.convert(proto)
    assert converted.node("m").epilogue == "none"
    assert converted.error(_feeds()) <= EXACT


@pytest.mark.parametrize(
    "after",
    [
        node("Mul", ["v", ""], ["y"]),
        node("Mul", ["v", "words"], ["y"]),
        node("Gelu", ["v", "z"], ["y"]),
        node("Gelu", ["v"], ["y"], approximate="other"),
        node("Swish", ["v", "z"], ["y"]),
    ],
)
def test_what_is_no_valid_node_is_not_absorbed(make_model, after: onnx.NodeProto) -> None:
    proto = _model(make_model, "")
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, (), [b"half"]))
    proto.graph.node.append(after)
    proto.graph.node[-1].name = "y"
    (found,) = LinearLayerFinder(ir.from_proto(proto)).find()
    assert found.layer is not None
    assert found.plan.epilogue == "none"


def test_a_body_that_uses_the_sums(workbench, make_model) -> None:
    proto = _model(make_model, "y = Relu v", outputs=("y", "z2"))
    body = helper.make_graph(
        [node("Neg", ["v"], ["n"], name="n")], "b", [], [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)]
    )
    proto.graph.node.append(node("If", ["c"], ["z2"], name="if", then_branch=body, else_branch=body))
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, ()))
    converted = workbench.convert(proto)
    assert converted.node("m").epilogue == "none"
    assert converted.error({**_feeds(), "c": np.array(True)}) <= EXACT
