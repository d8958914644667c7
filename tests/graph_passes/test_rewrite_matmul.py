"""What the rewritten graph looks like: names, metadata, sharing, and what is removed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.graph_passes import pipeline
from sparamx_onnx.graph_passes.options import ConvertOptions

K, N = 66, 50
node = helper.make_node
EXACT = 1e-5


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def test_names_and_metadata_are_kept(workbench, make_model, sparse) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="the product", doc_string="where it came from"),
        node("Add", ["m", "b"], ["y"], name="the sum"),
    ]
    nodes[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'fc', 'linear']")
    nodes[1].metadata_props.add(key="only", value="of the sum")
    proto = make_model(nodes, {"x": ("batch", K)}, ["y"], {"w": sparse((K, N)), "b": _x(N)})
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", N)))
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "maker", "7", "org.example", 3
    proto.doc_string = "about the model"
    proto.metadata_props.add(key="theirs", value="kept")
    proto.graph.metadata_props.add(key="graph", value="kept too")
    converted = workbench.convert(proto)
    result = converted.proto
    (sparse_node,) = result.graph.node
    assert (sparse_node.name, sparse_node.doc_string) == ("the product", "where it came from")
    assert {p.key: p.value for p in sparse_node.metadata_props} == {
        "pkg.torch.onnx.name_scopes": "['', 'fc', 'linear']"
    }
    assert list(sparse_node.input) == ["x", "w.sparamx", "b"]
    assert list(sparse_node.output) == ["y"]
    assert result.graph.output == proto.graph.output
    assert result.graph.input == proto.graph.input
    assert (result.graph.name, result.graph.metadata_props) == (proto.graph.name, proto.graph.metadata_props)
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        assert getattr(result, field) == getattr(proto, field), field
    assert {p.key: p.value for p in result.metadata_props}["theirs"] == "kept"
    assert converted.node("the product").scope == "fc"


def test_value_information_inside_the_graph_is_kept(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["r"]), node("Neg", ["r"], ["y"])]
    proto = make_model(nodes, {"x": ("batch", K)}, ["y"], {"w": sparse((K, N))})
    for name in ("m", "r"):
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ("batch", N)))
    infos = {info.name: info for info in workbench.convert(proto).proto.graph.value_info}
    assert "m" not in infos
    assert infos["r"] == proto.graph.value_info[1]
    packed = infos["w.sparamx"].type.tensor_type
    assert packed.elem_type == TensorProto.UINT8
    assert len(packed.shape.dim) == 1


def test_only_our_domain_is_imported(workbench, make_model, sparse) -> None:
    proto = make_model([node("MatMul", ["x", "w"], ["y"])], {"x": (2, K)}, ["y"], {"w": sparse((K, N))}, opset=17)
    imports = {i.domain: i.version for i in workbench.convert(proto).proto.opset_import}
    assert imports == {"": 17, "com.microsoft": 1, "com.sparamx": 1}


def test_a_shared_weight_is_packed_once(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["r"]), node("MatMul", ["r", "w"], ["y"])]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, K))})
    converted = workbench.convert(proto)
    assert converted.initializers == {"w.sparamx"}
    assert [n.packed for n in converted.plan] == ["w.sparamx", "w.sparamx"]
    assert converted.plan.bytes_after == converted.node("a").bytes_after
    assert converted.plan.bytes_before == K * K * 4
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_a_weight_used_both_ways_is_packed_twice(workbench, make_model, sparse) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["a", "t"], ["b"]),
        node("Gemm", ["b", "w"], ["c"], alpha=2.0),
        node("Gemm", ["c", "w"], ["y"], transB=1),
    ]
    converted = workbench.convert(make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, N))}))
    assert converted.op_types == ["SparseAMXMatMul"] * 4
    assert [n.packed for n in converted.plan] == ["w.sparamx", "w.sparamx.2", "w.sparamx.3", "w.sparamx.2"]
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_deduplicated_weights_behind_identity(workbench, make_model, sparse) -> None:
    """As the TorchScript exporter writes equal tensors."""
    nodes = [
        node("Identity", ["w"], ["w2"]),
        node("Identity", ["b"], ["b2"]),
        node("MatMul", ["x", "w"], ["m1"]),
        node("Add", ["b", "m1"], ["a1"]),
        node("MatMul", ["a1", "w2"], ["m2"]),
        node("Add", ["b2", "m2"], ["y"]),
    ]
    converted = workbench.convert(make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, K)), "b": _x(K)}))
    assert converted.op_types == ["SparseAMXMatMul"] * 2
    assert converted.initializers == {"w.sparamx", "b"}
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_a_tied_embedding_keeps_its_dense_weight(workbench, make_model, sparse) -> None:
    nodes = [
        node("Gather", ["embedding", "ids"], ["e"]),
        node("Transpose", ["embedding"], ["t"]),
        node("MatMul", ["e", "t"], ["y"]),
    ]
    ids = [helper.make_tensor_value_info("ids", TensorProto.INT64, (1, 3))]
    proto = make_model(nodes, {}, ["y"], {"embedding": sparse((300, K))}, extra_inputs=ids)
    converted = workbench.convert(proto)
    assert converted.op_types == ["Gather", "SparseAMXMatMul"]
    assert converted.initializers == {"embedding", "embedding.sparamx"}
    assert converted.node("y").keeps_dense
    assert converted.error({"ids": np.array([[1, 299, 7]])}) <= EXACT


def test_what_others_use_stays(workbench, make_model, sparse) -> None:
    """A bias, a scale and a transposed weight that another node, or the caller, uses too."""
    nodes = [
        node("Transpose", ["w"], ["t"]),
        node("MatMul", ["x", "t"], ["m"]),
        node("Add", ["m", "b"], ["y"]),
        node("Neg", ["b"], ["other"]),
        node("ReduceSum", ["t"], ["sum"], keepdims=0),
    ]
    proto = make_model(nodes, {"x": (2, K)}, ["y", "other", "sum", "w"], {"w": sparse((N, K)), "b": _x(1, N)})
    converted = workbench.convert(proto)
    assert converted.op_types == ["Transpose", "SparseAMXMatMul", "Neg", "ReduceSum"]
    assert converted.initializers == {"w", "b", "w.sparamx", "b.sparamx"}
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_a_weight_that_a_body_uses_stays(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"])]
    use = node("ReduceSum", ["w"], ["i"], name="inner", keepdims=0)
    result = helper.make_tensor_value_info("i", TensorProto.FLOAT, None)
    body = helper.make_graph([use], "b", [], [result])
    nodes.append(node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=body))
    condition = [helper.make_tensor_value_info("c", TensorProto.BOOL, ())]
    proto = make_model(nodes, {"x": (2, K)}, ["m", "y"], {"w": sparse((K, N))}, extra_inputs=condition)
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul", "If"]
    assert converted.initializers == {"w", "w.sparamx"}
    assert converted.node("m").keeps_dense
    assert converted.error({"x": _x(2, K), "c": np.array(True)}) <= EXACT


@pytest.mark.parametrize("taken", ["w.sparamx", "m.sparamx"])
def test_names_that_are_taken(workbench, make_model, sparse, taken) -> None:
    nodes = [node("Neg", ["x"], [taken]), node("MatMul", [taken, "w"], ["y"])]
    converted = workbench.convert(make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, N))}))
    assert converted.initializers == {"w.sparamx.2" if taken == "w.sparamx" else "w.sparamx"}
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_the_product_as_graph_output(workbench, make_model, sparse, open_session) -> None:
    nodes = [node("MatMul", ["x", "w"], ["logits"])]
    converted = workbench.convert(make_model(nodes, {"x": ("b", "t", K)}, ["logits"], {"w": sparse((K, N))}))
    session = open_session(converted.path)
    assert [output.name for output in session.get_outputs()] == ["logits"]
    assert converted.error({"x": _x(2, 3, K)}) <= EXACT


def test_a_model_that_was_converted_is_left_alone(workbench, make_model, sparse) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["y"])]
    first = workbench.convert(make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((K, N))}))
    proto = onnx.load(first.path)
    again = workbench.convert(proto, name="again.onnx", weights="bf16")
    (plan,) = again.plan
    assert (plan.reason.value, plan.action.value) == ("already_converted", "left_alone")
    assert (plan.k, plan.n, plan.nnz, plan.weight_type) == (K, N, first.node("m").nnz, "fp32")
    assert plan.bytes_after == first.node("m").bytes_after
    assert plan.epilogue == "relu"
    assert again.proto.metadata_props == first.proto.metadata_props
    assert again.error({"x": _x(2, K)}) == 0


def test_malformed_sparse_operators_are_reported(make_model) -> None:
    nodes = [
        node("SparseAMXMatMul", ["x"], ["a"], domain="com.sparamx", K=4, N=4),
        node("SparseAMXMatMul", ["x", "w"], ["b"], domain="com.sparamx", K=4, N=4, epilogue=1),
    ]
    model = ir.from_proto(make_model(nodes, {"x": (2, 4), "w": (4,)}, ["a", "b"], {}))
    plans = list(pipeline.run(model, ConvertOptions()))
    assert [plan.reason.value for plan in plans] == ["already_converted", "malformed_node"]
    assert plans[0].detail == "Its packed weight is not a constant."
    assert "'epilogue' of the SparseAMXMatMul node 'b' is of type INT" in plans[1].detail


def test_a_damaged_packed_weight_is_reported(workbench, make_model) -> None:
    nodes = [node("SparseAMXMatMul", ["x", "w"], ["y"], domain="com.sparamx", K=4, N=4)]
    proto = make_model(nodes, {"x": (2, 4)}, ["y"], {})
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(300, np.uint8), "w"))
    (plan,) = workbench.convert(proto).plan
    assert plan.reason.value == "already_converted"
    assert "cannot be read" in plan.detail
