"""Attention in MatMul, Softmax and MatMul becomes one operator, or stays for a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.graph_passes import pipeline
from sparamx_onnx.graph_passes.attention_plan import AttentionPlan
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.plan import Action
from sparamx_onnx.graph_passes.repeated_heads import without_repeats

HEADS, SIZE, VALUE_SIZE = 4, 16, 24
SIZES = {"batch": 2, "tokens": 7, "keys": 11, "past": 5, "total": 16}
FLOAT = TensorProto.FLOAT
Shape = list[int | str]


class Builder:
    """A graph that grows node by node; every value has a shape."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, Shape] = {}
        self.shapes: dict[str, Shape] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.outputs: list[str] = []

    def input(self, name: str, shape: Shape) -> str:
        self.inputs[name] = shape
        return name

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.array(array, dtype)
        return name

    def add(self, op_type: str, inputs: list[str], shape: Shape | None = None, **attributes: Any) -> str:
        name = f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        if shape is not None:
            self.shapes[name] = shape
        return name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in self.inputs.items()],
            [helper.make_tensor_value_info(name, FLOAT, self.shapes.get(name)) for name in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
            value_info=[
                helper.make_tensor_value_info(name, FLOAT, shape)
                for name, shape in self.shapes.items()
                if name not in self.outputs
            ],
        )
        return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])

    def feeds(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        return {
            name: rng.standard_normal([SIZES.get(str(n), n) for n in shape], np.float32)
            for name, shape in self.inputs.items()
        }


def repeated(b: Builder, name: str, heads: int, keys: str, size: int) -> str:
    """Heads repeated as PyTorch's repeat_kv is exported."""
    times = HEADS // heads
    one = b.add("Unsqueeze", [name, b.constant([2], np.int64)], ["batch", heads, 1, keys, size])
    whole = b.add("Concat", [part_of_shape(b, name, 0), b.constant([heads, times], np.int64),
                             part_of_shape(b, name, 2), b.constant([size], np.int64)], axis=0)  # fmt: skip
    many = b.add("Expand", [one, whole], ["batch", heads, times, keys, size])
    flat = b.add("Concat", [part_of_shape(b, name, 0), b.constant([HEADS], np.int64), part_of_shape(b, name, 2),
                            b.constant([size], np.int64)], axis=0)  # fmt: skip
    return b.add("Reshape", [many, flat], ["batch", HEADS, keys, size])


def part_of_shape(b: Builder, name: str, axis: int) -> str:
    return b.add("Shape", [name], start=axis, end=axis + 1)


def turned(b: Builder, key: str, how: str) -> str:
    """Keys as the first product wants them."""
    if how == "flat":
        shape = b.add("Shape", [key])

        def cut(start: int, end: int) -> str:
            return b.add("Slice", [shape, b.constant([start], np.int64), b.constant([end], np.int64)])

        first, rows, columns = cut(-(2**63), -2), cut(-2, -1), cut(-1, 2**63 - 1)
        flat = b.add("Reshape", [key, b.add("Concat", [b.constant([-1], np.int64), rows, columns], axis=0)])
        flat = b.add("Transpose", [flat], perm=[0, 2, 1])
        return b.add("Reshape", [flat, b.add("Concat", [first, columns, rows], axis=0)])
    return b.add("Transpose", [key], perm=[0, 2, 3, 1] if how == "from tokens" else [0, 1, 3, 2])


def attention(
    *,
    turn: str = "by head",
    scale: str = "scores",
    mask: Shape | None = None,
    mask_first: bool = False,
    softcap: bool = False,
    nan: bool = False,
    casts: bool = False,
    kv_heads: int = HEADS,
    past: bool = False,
) -> Builder:
    """One attention."""
    b = Builder()
    keys = "total" if past else "keys"
    query = b.input("query", ["batch", HEADS, "tokens", SIZE])
    key = b.input("key", ["batch", "keys", kv_heads, SIZE] if turn == "from tokens" else
                  ["batch", kv_heads, "keys", SIZE])  # fmt: skip
    value = b.input("value", ["batch", kv_heads, "keys", VALUE_SIZE])
    if past:
        for name, size in (("key", SIZE), ("value", VALUE_SIZE)):
            b.input(f"past_{name}", ["batch", kv_heads, "past", size])
        key = b.add("Concat", ["past_key", key], ["batch", kv_heads, keys, SIZE], axis=-2)
        value = b.add("Concat", ["past_value", value], ["batch", kv_heads, keys, VALUE_SIZE], axis=2)
        b.outputs = [key, value]
    if kv_heads != HEADS:
        key, value = repeated(b, key, kv_heads, keys, SIZE), repeated(b, value, kv_heads, keys, VALUE_SIZE)
    key_turned = turned(b, key, turn)
    if scale == "both":
        query = b.add("Mul", [query, b.constant(0.5)], ["batch", HEADS, "tokens", SIZE])
        key_turned = b.add("Mul", [b.constant(0.6), key_turned])
    scores = b.add("MatMul", [query, key_turned])
    if scale == "scores":
        scores = b.add("Mul", [scores, b.constant([0.25])])
    if scale == "division":
        scores = b.add("Div", [scores, b.constant(4.0)])
    if softcap:
        scores = b.add("Tanh", [b.add("Div", [scores, b.constant(2.0)])])
        scores = b.add("Mul", [scores, b.constant(2.0)])
    if mask is not None:
        b.input("mask", mask)
        scores = b.add("Add", ["mask", scores] if mask_first else [scores, "mask"])
    if casts:
        scores = b.add("Cast", [scores], to=FLOAT)
    weights = b.add("Softmax", [scores], axis=-1)
    if nan:
        weights = b.add("Where", [b.add("IsNaN", [weights]), b.constant(0.0), weights])
    if casts:
        weights = b.add("Cast", [weights], to=FLOAT)
    y = b.add("MatMul", [weights, value], ["batch", HEADS, "tokens", VALUE_SIZE])
    b.outputs.insert(0, y)
    return b


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"turn": "from tokens", "scale": "division", "casts": True},
        {"turn": "flat", "scale": "both", "nan": True, "mask": ["batch", 1, "tokens", "keys"]},
        {"scale": "none", "mask": ["tokens", "keys"], "mask_first": True},
        {"softcap": True, "mask": [1, HEADS, 1, "keys"], "casts": True},
        {"kv_heads": 2, "mask": ["batch", 1, 1, "keys"]},
        {"kv_heads": 1, "turn": "flat", "scale": "both", "nan": True},
    ],
)
def test_it_becomes_one_operator(workbench, options: dict[str, Any]) -> None:
    b = attention(**options)
    converted = workbench.convert(b.model(), attention="fast")
    (plan,) = converted.plan.attention
    assert plan.action is Action.CONVERTED, plan.text
    assert not converted.plan.nodes  # its products are gone, not left alone
    (node,) = [node for node in converted.proto.graph.node if node.op_type != "Transpose"]
    assert node.op_type == "SparseAMXAttention"
    heads = {a.name: a.i for a in node.attribute}["kv_num_heads"]
    assert heads == options.get("kv_heads", HEADS)
    assert not converted.proto.graph.initializer
    assert len(converted.proto.graph.node) == (2 if options.get("turn") == "from tokens" else 1)
    assert converted.error(b.feeds()) < 1e-5


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("turn", ["by head", "flat"])
def test_a_past_is_taken_in(workbench, kv_heads: int, turn: str) -> None:
    b = attention(past=True, kv_heads=kv_heads, turn=turn, mask=["batch", 1, "tokens", "total"])
    converted = workbench.convert(b.model(), attention="fast")
    assert converted.op_types == ["SparseAMXAttention"]
    (node,) = converted.proto.graph.node
    assert list(node.output) == b.outputs
    assert {"past_key", "past_value"} <= set(node.input)
    assert converted.error(b.feeds()) < 1e-5


def test_a_past_that_somebody_else_reads_stays_apart(workbench) -> None:
    b = attention(past=True)
    b.outputs.append(b.add("Neg", [b.outputs[1]], ["batch", HEADS, "total", SIZE]))
    converted = workbench.convert(b.model(), attention="fast")
    assert sorted(converted.op_types) == ["Concat", "Concat", "Neg", "SparseAMXAttention"]
    assert converted.error(b.feeds()) < 1e-5


def test_one_past_for_keys_and_values_stays_apart(workbench) -> None:
    b = Builder()
    query = b.input("query", ["batch", HEADS, "tokens", SIZE])
    parts = [b.input("past", ["batch", HEADS, "past", SIZE]), b.input("new", ["batch", HEADS, "keys", SIZE])]
    both = b.add("Concat", parts, ["batch", HEADS, "total", SIZE], axis=2)
    scores = b.add("MatMul", [query, turned(b, both, "by head")])
    b.outputs = [b.add("MatMul", [b.add("Softmax", [scores], axis=-1), both]), both]
    converted = workbench.convert(b.model(), attention="fast")
    assert converted.op_types == ["Concat", "SparseAMXAttention"]
    assert converted.error(b.feeds()) < 1e-5


def plan_of(b: Builder) -> AttentionPlan:
    (plan,) = pipeline.run(ir.from_proto(b.model()), ConvertOptions(attention="fast")).attention
    return plan


def _somebody_reads(op_type: str) -> Builder:
    b = attention(mask=["tokens", "keys"])
    (node,) = [node for node in b.nodes if node.op_type == op_type]
    b.outputs.append(b.add("Identity", [node.output[0]]))
    return b


def _changed(name: str, shape: Shape, **options: Any) -> Builder:
    b = attention(**options)
    b.inputs[name] = shape
    return b


def _node(b: Builder, op_type: str) -> onnx.NodeProto:
    return next(node for node in b.nodes if node.op_type == op_type)


def _with_scores(op_type: str, other: str) -> Builder:
    """Another operand of what is between the product and the Softmax."""
    b = attention(softcap=True) if op_type == "Div" else attention()
    b.input("other", ["batch", HEADS, "tokens", "keys"])
    if op_type == "Add":
        _node(b, "Softmax").input[0] = "sum"
        product = _node(b, "MatMul")
        second = helper.make_node("MatMul", list(product.input), ["second"], "second")
        b.nodes[-2:-2] = [second, helper.make_node("Add", [product.output[0], "second"], ["sum"], "sum")]
    else:
        _node(b, op_type).input[1] = other
    return b


def _attribute(op_type: str, name: str, value: Any) -> Builder:
    b = attention()
    _node(b, op_type).attribute[0].CopyFrom(helper.make_attribute(name, value))
    return b


def _tiny() -> Builder:
    b = attention(scale="both")
    for name, array in b.constants.items():
        if array.dtype == np.float32:
            b.constants[name] = np.array(1e-30, np.float32)
    return b


def _turned_with(**attributes: Any) -> Builder:
    """Flat keys whose Transpose or whose cuts of the shape are others."""
    b = attention(turn="flat")
    if "perm" in attributes:
        _node(b, "Transpose").attribute[0].CopyFrom(helper.make_attribute("perm", attributes["perm"]))
    if "cut" in attributes:
        _node(b, "Slice").input[1] = "key"
    if "part" in attributes:
        _node(b, "Concat").input[1] = "key"
    return b


def _over_heads() -> Builder:
    b = attention()
    (node,) = [node for node in b.nodes if node.op_type == "Softmax"]
    node.attribute[0].i = 1
    return b


def _nan_becomes(number: float) -> Builder:
    b = attention(nan=True)
    b.constants[_node(b, "Where").input[1]] = np.array(number, np.float32)
    return b


def _turned_otherwise() -> Builder:
    b = attention()
    (node,) = [node for node in b.nodes if node.op_type == "Transpose"]
    node.attribute[0].CopyFrom(helper.make_attribute("perm", [1, 0, 3, 2]))
    return b


def test_what_is_not_understood_stays() -> None:
    mask: Shape = ["batch", 1, "tokens", "keys"]
    cases = [
        (_somebody_reads("Softmax"), "unsupported_output", "softmax"),
        (_somebody_reads("Add"), "unsupported_output", "add"),
        (_over_heads(), "unsupported_attributes", "another dimension"),
        (_nan_becomes(1.0), "unsupported_input", "not replaced by zero"),
        (_attribute("Softmax", "axis", "last"), "malformed_node", "'axis' of the Softmax node"),
        (_with_scores("Mul", "other"), "unsupported_input", "What makes its scores"),
        (_with_scores("Add", "second"), "unsupported_input", "A sum of its scores"),
        (_with_scores("Div", "other"), "unsupported_attributes", "softcap is not understood"),
        (_tiny(), "unsupported_attributes", "scale is no number"),
        (_turned_with(perm=[0, 1, 2]), "unsupported_input", "keys are turned"),
        (_turned_with(cut=True), "unsupported_input", "keys are turned"),
        (_turned_with(part=True), "unsupported_input", "keys are turned"),
        (_turned_otherwise(), "unsupported_input", "keys are turned"),
        (_changed("query", [1, HEADS, "tokens", SIZE]), "unknown_shape", "may not fit each other"),
        (_changed("query", ["batch", "heads", "tokens", SIZE]), "unknown_shape", "number of heads"),
        (_changed("value", ["batch", HEADS, "values", SIZE]), "unknown_shape", "may not fit each other"),
        (_changed("mask", ["batch", 1, "tokens", 1], mask=mask), "unknown_shape", "that of its mask"),
        (_changed("mask", ["others", 1, "tokens", "keys"], mask=mask), "unknown_shape", "may not fit its scores"),
        (_changed("mask", ["batch", 1, 1, "tokens", "keys"], mask=mask), "unknown_shape", "that of its mask"),
    ]
    for b, reason, detail in cases:
        plan = plan_of(b)
        assert (plan.action, plan.reason.value) == (Action.LEFT_ALONE, reason), plan.text
        assert detail in plan.text


@pytest.mark.parametrize(("axis", "reason"), [(None, "unsupported_attributes"), (3, "converted"), (-1, "converted")])
def test_the_dimension_of_an_old_softmax(axis: int | None, reason: str) -> None:
    """Before version 13, a Softmax that names no dimension is over all but the first."""
    model = attention().model()
    model.opset_import[0].version = 11
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    del softmax.attribute[:]
    if axis is not None:
        softmax.attribute.append(helper.make_attribute("axis", axis))
    (plan,) = pipeline.run(ir.from_proto(model), ConvertOptions(attention="fast")).attention
    assert plan.reason.value == reason


def test_shapes_that_are_not_known_keep_it() -> None:
    model = attention().model()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    (plan,) = pipeline.run(ir.from_proto(model), ConvertOptions(attention="fast")).attention
    assert (plan.reason.value, "that of the query" in plan.text) == ("unknown_shape", True)


def test_other_types_keep_it() -> None:
    model = attention().model()
    model.graph.input[2].type.tensor_type.elem_type = TensorProto.FLOAT16
    (plan,) = pipeline.run(ir.from_proto(model), ConvertOptions(attention="fast")).attention
    assert (plan.reason.value, "value is" in plan.text) == ("unsupported_dtype", True)


@pytest.mark.parametrize("between", ["Where", "Tanh"])
def test_what_is_between_may_make_it_none(between: str) -> None:
    b = attention(nan=True)
    if between == "Where":
        _node(b, "IsNaN").input[0] = "query"
    else:  # so many that nobody writes them
        scores = _node(b, "Softmax").input[0]
        for _ in range(9):
            scores = b.add("Tanh", [scores])
        _node(b, "Softmax").input[0] = scores
        b.nodes.sort(key=lambda node: node.op_type != "Tanh" and node.name > "softmax")
    assert pipeline.run(ir.from_proto(b.model()), ConvertOptions(attention="fast")).attention == []


@pytest.mark.parametrize(
    ("op_type", "shape"),
    [("Expand", None), ("Expand", ["batch", 2, "times", "keys", SIZE]), ("Unsqueeze", ["batch", 2, 1, "keys"])],
)
def test_repeated_heads_that_are_not_known_stay_repeated(op_type: str, shape: Shape | None) -> None:
    b = attention(kv_heads=2)
    b.shapes[_node(b, op_type).output[0]] = shape or []
    model = b.model()
    if shape is None:
        for info in model.graph.value_info:
            if info.name == _node(b, op_type).output[0]:
                info.type.tensor_type.ClearField("shape")
    converted = ir.from_proto(model)
    (plan,) = pipeline.run(converted, ConvertOptions(attention="fast")).attention
    assert plan.action is Action.CONVERTED
    assert "Expand" in [node.op_type for node in converted.graph]


def test_a_reshape_of_nothing_repeats_nothing() -> None:
    key, value = (ir.Node("", "Reshape", []).outputs[0] for _ in "kv")
    assert without_repeats(key, value) == (key, value)


def test_pasts_of_different_lengths_stay_apart(workbench) -> None:
    b = attention(past=True)
    b.inputs["past_value"] = ["batch", HEADS, "other_past", VALUE_SIZE]
    assert sorted(workbench.convert(b.model(), attention="fast").op_types) == ["Concat", "Concat", "SparseAMXAttention"]


def test_a_softmax_before_a_product_is_no_attention() -> None:
    b = Builder()
    x = b.input("x", ["batch", "tokens", 8])
    b.outputs = [b.add("MatMul", [b.add("Softmax", [x]), b.input("w", [8, 4])], ["batch", "tokens", 4])]
    assert pipeline.run(ir.from_proto(b.model()), ConvertOptions(attention="fast")).attention == []
