"""Layers with the same input become one operator: which, where it stands, and that no result changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.graph_passes import fuse_siblings, pipeline
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.packed_weight import PackedSiblings
from sparamx_onnx.ops import packing

K = 96
WIDTHS = {"q": 320, "k": 288, "v": 304}  # wide enough for results to keep every bit (docs/numerics.md)
node = helper.make_node


def _x(rows: int = 3, k: int = K) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((rows, k)).astype(np.float32)


@pytest.fixture
def attention(make_model, sparse):
    """q = x Wq + bq, k = x Wk, v = relu(x Wv + bv), with other nodes between them, and all used."""

    def make(widths: dict[str, int] = WIDTHS, outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
        nodes = [
            node("MatMul", ["x", "wq"], ["qm"], name="query"),
            node("Add", ["qm", "bq"], ["q"]),
            node("Neg", ["q"], ["nq"]),
            node("MatMul", ["x", "wk"], ["k"], name="key"),
            node("MatMul", ["x", "wv"], ["vm"], name="value"),
            node("Add", ["vm", "bv"], ["vs"]),
            node("Relu", ["vs"], ["v"]),
            node("Concat", ["nq", "k", "v"], ["y"], axis=-1),
        ]
        weights = {f"w{name}": sparse((K, n), seed=i) for i, (name, n) in enumerate(widths.items())}
        biases = {f"b{name}": _x(widths[name], 1)[:, 0] for name in "qv"}
        return make_model(nodes, {"x": ("batch", K)}, list(outputs), {**weights, **biases})

    return make


def test_a_packed_weight_tells_its_size_and_is_shown_without_being_packed(attention) -> None:
    model = ir.from_proto(attention({"q": 48, "k": 32, "v": 16}))
    pipeline.run(model, ConvertOptions(fuse_siblings="always"), reading=pipeline.Reading.NOTHING)
    (packed,) = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, PackedSiblings)]
    assert "PackedSiblings('" in repr(packed)
    assert packed._size is None
    assert packed.shape == ir.Shape([packed.pack().size])


def _run(open_session, converted, feeds: dict[str, np.ndarray]) -> list[bytes]:
    return [y.tobytes() for y in open_session(converted.path).run(None, feeds)]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_fused_layers_compute_the_same_bits(workbench, open_session, attention, weights: str) -> None:
    proto = attention()
    apart = workbench.convert(proto, name="apart.onnx", weights=weights, fuse_siblings="never")
    fused = workbench.convert(proto, name="fused.onnx", weights=weights, fuse_siblings="always")
    assert apart.op_types.count("SparseAMXMatMul") == 3
    assert fused.op_types == ["SparseAMXMatMul", "Neg", "Concat"]
    for rows in (1, 5, 40):
        assert _run(open_session, fused, {"x": _x(rows)}) == _run(open_session, apart, {"x": _x(rows)})


def test_what_the_fused_operator_looks_like(workbench, attention) -> None:
    converted = workbench.convert(attention(), fuse_siblings="always")
    (fused,) = [n for n in converted.proto.graph.node if n.op_type == "SparseAMXMatMul"]
    assert fused.name == "query+key+value"
    assert list(fused.input) == ["x", "wq+wk+wv.sparamx", "bq+bv.sparamx"]
    assert list(fused.output) == ["q", "k", "v"]
    assert converted.attributes(fused.name) == {
        "K": K,
        "N": sum(WIDTHS.values()),
        "splits": list(WIDTHS.values()),
        "epilogue": b"none,none,relu",
    }
    assert converted.initializers == {"wq+wk+wv.sparamx", "bq+bv.sparamx"}
    (bias,) = [i for i in onnx.load(converted.path).graph.initializer if i.name == fused.input[2]]
    bias_values = numpy_helper.to_array(bias)
    assert not bias_values[WIDTHS["q"] : -WIDTHS["v"]].any()
    assert bias_values[: WIDTHS["q"]].all()


def test_plans_stay_one_for_each_layer(workbench, attention) -> None:
    proto = attention()
    apart, fused = (workbench.convert(proto, name=f"{when}.onnx", fuse_siblings=when) for when in ("never", "always"))
    assert [plan.node for plan in fused.plan] == ["query", "key", "value"]
    for alone, together in zip(apart.plan, fused.plan, strict=True):
        assert (alone.fused, together.fused) == (None, "query+key+value")
        assert together.packed == "wq+wk+wv.sparamx"
        for name in ("k", "n", "nnz", "bytes_before", "bytes_after", "bias", "epilogue", "action", "absorbed"):
            assert getattr(alone, name) == getattr(together, name), name
    assert fused.plan.bytes_after == apart.plan.bytes_after
    assert fused.plan.to_json()["nodes"][0]["fused"] == "query+key+value"


def test_no_bias_where_nobody_has_one(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "a"], ["l"]), node("MatMul", ["x", "b"], ["r"]), node("Mul", ["l", "r"], ["y"])]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"a": sparse((K, 48)), "b": sparse((K, 48), seed=1)})
    converted = workbench.convert(proto, fuse_siblings="always")
    (fused, _) = converted.proto.graph.node
    assert list(fused.input) == ["x", "a+b.sparamx"]
    assert "epilogue" not in converted.attributes(fused.name)
    assert converted.error({"x": _x(2)}) <= 1e-5


def test_the_layer_of_an_odd_width_comes_last(workbench, attention) -> None:
    converted = workbench.convert(attention({"q": 50, "k": 48, "v": 64}), fuse_siblings="always")
    (fused,) = [n for n in converted.proto.graph.node if n.op_type == "SparseAMXMatMul"]
    assert list(fused.output) == ["k", "v", "q"]
    assert converted.op_types == ["SparseAMXMatMul", "Neg", "Concat"]
    assert converted.error({"x": _x()}) <= 1e-5
    # Two of them cannot be fused with each other.
    converted = workbench.convert(attention({"q": 50, "k": 48, "v": 34}), fuse_siblings="always")
    assert converted.op_types.count("SparseAMXMatMul") == 2
    assert [plan.fused for plan in converted.plan] == ["key+query", "key+query", None]
    assert converted.error({"x": _x()}) <= 1e-5


def test_results_that_the_model_returns(workbench, attention) -> None:
    converted = workbench.convert(attention(outputs=("k", "y", "q")), fuse_siblings="always")
    assert [o.name for o in converted.proto.graph.output] == ["k", "y", "q"]
    assert converted.error({"x": _x()}) <= 1e-5


def test_layers_after_a_fused_one(workbench, make_model, sparse) -> None:
    nodes = [
        node("MatMul", ["x", "a"], ["g"]),
        node("MatMul", ["x", "b"], ["u"]),
        node("Mul", ["g", "u"], ["h"]),
        node("MatMul", ["h", "c"], ["d"]),
        node("MatMul", ["d", "e"], ["l"]),
        node("MatMul", ["d", "f"], ["r"]),
        node("Sub", ["l", "r"], ["y"]),
    ]
    shapes = {"a": (K, 64), "b": (K, 64), "c": (64, 80), "e": (80, 32), "f": (80, 32)}
    weights = {name: sparse(shape, seed=ord(name)) for name, shape in shapes.items()}
    converted = workbench.convert(make_model(nodes, {"x": (2, K)}, ["y"], weights), fuse_siblings="always")
    assert [plan.fused for plan in converted.plan] == ["g+u", "g+u", None, "l+r", "l+r"]
    assert converted.error({"x": _x(2)}) <= 1e-5


def test_a_weight_that_layers_share_is_left_alone(workbench, make_model, sparse) -> None:
    nodes = [
        node("MatMul", ["x", "a"], ["p"]),
        node("MatMul", ["x", "b"], ["q"]),
        node("MatMul", ["p", "a"], ["r"]),
        node("Sub", ["q", "r"], ["y"]),
    ]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"a": sparse((K, K)), "b": sparse((K, K), seed=1)})
    converted = workbench.convert(proto, fuse_siblings="always")
    assert converted.op_types.count("SparseAMXMatMul") == 3
    assert {plan.fused for plan in converted.plan} == {None}
    assert converted.error({"x": _x(2)}) <= 1e-5


def test_layers_that_are_pruned_differently_are_left_alone(workbench, make_model) -> None:
    nodes = [node("MatMul", ["x", "router"], ["l"]), node("MatMul", ["x", "b"], ["r"]), node("Mul", ["l", "r"], ["y"])]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"router": _x(K, 80), "b": _x(K, 80)})
    converted = workbench.convert(proto, fuse_siblings="always", method="magnitude", sparsity=0.5)
    assert [plan.pruned for plan in converted.plan] == [False, True]
    assert {plan.fused for plan in converted.plan} == {None}


def test_layers_of_other_inputs_are_left_alone(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "a"], ["l"]), node("MatMul", ["z", "b"], ["r"]), node("Mul", ["l", "r"], ["y"])]
    weights = {"a": sparse((K, 48)), "b": sparse((K, 48), seed=1)}
    converted = workbench.convert(make_model(nodes, {"x": (2, K), "z": (2, K)}, ["y"], weights), fuse_siblings="always")
    assert converted.op_types.count("SparseAMXMatMul") == 2


def test_inside_a_body_siblings_are_those_of_the_body(workbench, make_model, sparse) -> None:
    def body(name: str, seed: int) -> onnx.GraphProto:
        weights = {f"{name}{i}": sparse((K, 48), seed=seed + i) for i in range(2)}
        nodes = [node("MatMul", ["x", w], [f"m{w}"], f"n{w}") for w in weights]
        nodes.append(node("Sub", [f"m{w}" for w in weights], [f"r{name}"]))
        output = helper.make_tensor_value_info(f"r{name}", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [output], [numpy_helper.from_array(w, n) for n, w in weights.items()])

    branch = node("If", ["c"], ["t"], then_branch=body("p", 1), else_branch=body("q", 5))
    outer = [node("MatMul", ["x", "o"], ["m"]), branch, node("Add", ["m", "t"], ["y"])]
    proto = make_model(
        outer,
        {"x": (2, K)},
        ["y"],
        {"o": sparse((K, 48), seed=9)},
        extra_inputs=[helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
    )
    converted = workbench.convert(proto, fuse_siblings="always")
    assert {plan.fused for plan in converted.plan if plan.graph} == {"np0+np1", "nq0+nq1"}
    assert converted.node("m").fused is None
    for condition in (True, False):
        assert converted.error({"x": _x(2), "c": np.array(condition)}) <= 1e-5


def test_one_form_for_all_siblings(workbench, make_model, sparse) -> None:
    """A sibling that would be smaller dense and one that would be smaller sparse share the form that is smaller."""
    for widths, form in (((64, 320), packing.Form.SPARSE), ((640, 16), packing.Form.DENSE)):
        weights = {"a": _x(K, widths[0]), "b": sparse((K, widths[1]), 0.6, seed=1)}
        nodes = [node("MatMul", ["x", "a"], ["l"]), node("MatMul", ["x", "b"], ["r"])]
        proto = make_model([*nodes, node("Concat", ["l", "r"], ["y"], axis=-1)], {"x": (2, K)}, ["y"], weights)
        converted = workbench.convert(proto, fuse_siblings="always")
        (packed,) = onnx.load(converted.path).graph.initializer
        info = packing.describe(numpy_helper.to_array(packed))
        assert (info.form, info.n) == (form, sum(widths))
        assert {plan.action.value for plan in converted.plan} == {
            "converted" if form is packing.Form.SPARSE else "packed_dense"
        }
        assert converted.error({"x": _x(2)}) <= 1e-5


@pytest.mark.parametrize(
    ("widths", "weights", "fused"),
    [
        ((K, 48, 48), "fp32", True),
        ((2 * K, 2 * K), "fp32", True),
        ((3 * K, 2 * K), "fp32", False),
        ((3 * K, 2 * K), "int8", False),
        ((3 * K, 2 * K), "int4", True),
    ],
)
def test_auto_fuses_what_is_faster(
    workbench, make_model, sparse, widths: tuple[int, ...], weights: str, fused: bool
) -> None:
    nodes = [node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(len(widths))]
    values = {f"w{i}": sparse((K, n), seed=i) for i, n in enumerate(widths)}
    proto = make_model(nodes, {"x": (2, K)}, [f"y{i}" for i in range(len(widths))], values)
    assert len(workbench.convert(proto, weights=weights).op_types) == (1 if fused else len(widths))
    assert len(workbench.convert(proto, weights=weights, fuse_siblings="never").op_types) == len(widths)


def test_auto_leaves_large_int4_products_apart(workbench, make_model, sparse, monkeypatch) -> None:
    monkeypatch.setattr(fuse_siblings, "_MOST_INT4_WEIGHTS", 5 * K * K - 1)
    values = {"w0": sparse((K, 3 * K)), "w1": sparse((K, 2 * K))}
    nodes = [node("MatMul", ["x", name], [f"y{name}"]) for name in values]
    proto = make_model(nodes, {"x": (2, K)}, ["yw0", "yw1"], values)
    assert len(workbench.convert(proto, weights="int4").op_types) == 2
