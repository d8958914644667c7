"""Models as exporters and ONNX Runtime's own optimizer write them, built by hand: converted, with the same results."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparamx_onnx.graph_passes.plan import Action, Reason

K, N = 70, 45
node = helper.make_node
EXACT = 1e-5
MICROSOFT = "com.microsoft"


def _x(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# --- fused operators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.125, -1.5])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_fused_matmul(workbench, make_model, sparse, trans_b, alpha) -> None:
    nodes = [
        node("FusedMatMul", ["x", "w"], ["m"], domain=MICROSOFT, transB=trans_b, alpha=alpha),
        node("Add", ["m", "b"], ["a"]),
        node("FastGelu", ["a"], ["y"], domain=MICROSOFT),
    ]
    w = sparse((N, K) if trans_b else (K, N))
    converted = workbench.convert(make_model(nodes, {"x": (2, 3, K)}, ["y"], {"w": w, "b": _x(N)}))
    assert converted.op_types == ["SparseAMXMatMul"]
    plan = converted.node("m")
    assert (plan.k, plan.n, plan.bias, plan.epilogue) == (K, N, True, "gelu_tanh")
    assert converted.error({"x": _x(2, 3, K)}) <= EXACT


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [
        ("Relu", {}),
        ("Tanh", {}),
        ("LeakyRelu", {"activation_alpha": 0.25}),
        ("HardSigmoid", {"activation_alpha": 0.3, "activation_beta": 0.4}),
    ],
)
def test_fused_gemm(workbench, make_model, sparse, activation, parameters) -> None:
    attributes = {"transB": 1, "alpha": 0.5, "beta": 2.0, "activation": activation}
    nodes = [node("FusedGemm", ["x", "w", "c"], ["y"], domain=MICROSOFT, **attributes, **parameters)]
    converted = workbench.convert(make_model(nodes, {"x": (3, K)}, ["y"], {"w": sparse((N, K)), "c": _x(N)}))
    assert converted.op_types == ["SparseAMXMatMul", activation]
    assert converted.error({"x": _x(3, K)}) <= EXACT


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(3, N), (3, 1), (1, N), (N,), (1,)])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("op_type", ["Gemm", "FusedGemm"])
def test_a_gemm_adds_whatever_fits(workbench, make_model, sparse, op_type, constant, shape, beta) -> None:
    fused = {"domain": MICROSOFT, "activation": "Tanh"} if op_type == "FusedGemm" else {}
    nodes = [node(op_type, ["x", "w", "c"], ["y"], alpha=0.5, beta=beta, **fused)]
    c = _x(*shape)
    inputs, constants = {"x": (3, K)}, {"w": sparse((K, N))}
    (constants if constant else inputs)["c"] = c if constant else shape
    converted = workbench.convert(make_model(nodes, inputs, ["y"], constants))
    absorbed = constant and shape[-1] in (1, N) and math.prod(shape[:-1]) == 1
    added = [] if absorbed else [*(["Constant", "Mul"] if beta != 1.0 else []), "Add"]
    assert converted.op_types == ["SparseAMXMatMul", *added, *(["Tanh"] if fused else [])]
    assert converted.plan.nodes[0].bias == absorbed
    assert converted.error({"x": _x(3, K)} | ({} if constant else {"c": c})) <= EXACT


def test_a_gemm_adds_the_result_of_another_layer(workbench, make_model, sparse) -> None:
    nodes = [
        node("Gemm", ["x", "w0"], ["first"]),
        node("Gemm", ["x", "w1", "first"], ["second"], beta=-2.0),
        node("Relu", ["second"], ["y"]),
    ]
    for options in ({}, {"fuse_siblings": "always"}):
        proto = make_model(nodes, {"x": (3, K)}, ["y", "second"], {"w0": sparse((K, N)), "w1": sparse((K, N), seed=1)})
        converted = workbench.convert(proto, **options)
        assert "Gemm" not in converted.op_types
        assert converted.error({"x": _x(3, K)}) <= EXACT


def test_a_gemm_of_halves_adds_a_matrix(workbench, make_model, sparse) -> None:
    weights = {"w": sparse((K, N)).astype(np.float16), "c": _x(3, N).astype(np.float16)}
    nodes = [node("Gemm", ["x", "w", "c"], ["y"])]
    proto = make_model(nodes, {"x": (3, K)}, ["y"], weights, element_type=TensorProto.FLOAT16)
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul", "Add"]
    assert converted.error({"x": _x(3, K).astype(np.float16)}) <= 2e-3


def test_a_fused_gemm_with_an_unknown_activation(workbench, make_model, sparse) -> None:
    nodes = [node("FusedGemm", ["x", "w", "c"], ["y"], domain=MICROSOFT, activation="Mish")]
    converted = workbench.convert(make_model(nodes, {"x": (3, K)}, ["y"], {"w": sparse((K, N)), "c": _x(N)}))
    (plan,) = converted.plan
    assert (plan.reason, plan.detail) == (Reason.UNSUPPORTED_ATTRIBUTES, "Its activation is Mish.")
    assert converted.op_types == ["FusedGemm"]


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("mk,kn->mn", (3, K)),
        ("mk,nk->mn", (3, K)),
        ("bsk, kn -> bsn", (2, 3, K)),
        ("...k,nk->...n", (2, 1, 3, K)),
        ("...ij,jk->...ik", (2, 3, K)),
        ("k,kn->n", (K,)),
    ],
)
def test_einsum(workbench, make_model, sparse, equation, shape) -> None:
    k = equation.split(",")[0].strip()[-1]
    right = equation.split(",")[1].split("->")[0].strip()
    w = sparse((K, N) if right[0] == k else (N, K))
    nodes = [node("Einsum", ["x", "w"], ["m"], equation=equation), node("Add", ["b", "m"], ["y"])]
    converted = workbench.convert(make_model(nodes, {"x": shape}, ["y"], {"w": w, "b": _x(N)}))
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.error({"x": _x(*shape)}) <= EXACT


def test_einsums_that_multiply_no_weight_are_not_reported(workbench, make_model, sparse) -> None:
    nodes = [
        node("Einsum", ["f", "p"], ["o"], equation="i,j->ij"),  # the angles of a rotary embedding
        node("Einsum", ["x", "p"], ["q"], equation="mk,k->mk"),
        node("Einsum", ["x", "q"], ["s"], equation="mk,nk->mn"),
        node("ReduceSum", ["o"], ["r"], keepdims=0),
        node("Add", ["s", "r"], ["y"]),
    ]
    converted = workbench.convert(make_model(nodes, {"x": (3, K)}, ["y"], {"f": _x(5), "p": _x(K)}))
    assert len(converted.plan) == 0


# --- what ONNX Runtime's transformer optimizer makes of BERT ----------------------------------------------------------

HEADS, HEAD = 4, 16
HIDDEN = HEADS * HEAD
LENGTH = 7


def _attention(make_model, sparse, *, mask: str | None, sizes=None, opset: int = 20, **attributes: object):
    """Attention with its packed projection, and the model's feeds."""
    q, v = (HIDDEN, HIDDEN) if sizes is None else (sizes[0], sizes[2])
    width = 2 * q + v
    inputs = ["x", "w", "b"]
    feeds: dict[str, np.ndarray] = {"x": _x(2, LENGTH, HIDDEN)}
    extra = []
    if mask is not None:
        shapes = {"lengths": (2,), "ends and beginnings": (4,), "raw": (2, LENGTH), "square": (2, LENGTH, LENGTH)}
        extra.append(helper.make_tensor_value_info("mask", TensorProto.INT32, shapes[mask]))
        inputs.append("mask")
        value = np.array([LENGTH, 4]) if mask == "lengths" else np.arange(LENGTH) < np.array([[LENGTH], [4]])
        if mask == "ends and beginnings":
            value = np.array([LENGTH, 4, 0, 2])
        if mask == "square":
            value = value[:, None] & np.tri(LENGTH, dtype=bool)
        feeds["mask"] = value.astype(np.int32)
    if sizes is not None:
        attributes["qkv_hidden_sizes"] = sizes
    nodes = [node("Attention", inputs, ["a"], domain=MICROSOFT, num_heads=HEADS, name="attention", **attributes)]
    nodes.append(node("MatMul", ["a", "o"], ["y"], name="output"))
    weights = {"w": sparse((HIDDEN, width)), "b": _x(width), "o": sparse((v, N))}
    return make_model(nodes, {"x": (2, LENGTH, HIDDEN)}, ["y"], weights, extra_inputs=extra, opset=opset), feeds


@pytest.mark.parametrize("mask", [None, "raw", "square", "lengths"])
@pytest.mark.parametrize("attributes", [{}, {"unidirectional": 1}, {"scale": 0.5, "mask_filter_value": -1e4}])
def test_packed_attention_is_split(workbench, make_model, sparse, mask, attributes) -> None:
    proto, feeds = _attention(make_model, sparse, mask=mask, **attributes)
    converted = workbench.convert(proto)
    types = [t for t in converted.op_types if t != "Constant"]
    assert types == ["SparseAMXMatMul", "Split", "MultiHeadAttention", "SparseAMXMatMul"]
    plan = converted.node("attention")
    assert (plan.action, plan.k, plan.n, plan.bias) == (Action.CONVERTED, HIDDEN, 3 * HIDDEN, True)
    assert converted.error(feeds) <= EXACT


@pytest.mark.parametrize(("opset", "sizes"), [(20, (32, 32, 64)), (11, None), (12, (64, 64, 32)), (17, None)])
def test_packed_attention_of_other_sizes_and_versions(workbench, make_model, sparse, opset, sizes) -> None:
    proto, feeds = _attention(make_model, sparse, mask="raw", sizes=sizes, opset=opset)
    converted = workbench.convert(proto)
    assert "Attention" not in converted.op_types
    assert converted.error(feeds) <= EXACT


@pytest.mark.parametrize(("attributes", "words"), [({"do_rotary": 1}, "do_rotary"), ({"past": True}, "a cache")])
def test_attention_that_is_left_alone(workbench, make_model, sparse, attributes, words) -> None:
    with_past = attributes.pop("past", False)
    proto, _ = _attention(make_model, sparse, mask="raw", **attributes)
    if with_past:
        proto.graph.node[0].input.append("past")
        proto.graph.node[0].output.append("present")
        shape = (2, 2, HEADS, "past_length", HEAD)
        proto.graph.input.append(helper.make_tensor_value_info("past", TensorProto.FLOAT, shape))
        proto.graph.output.append(helper.make_tensor_value_info("present", TensorProto.FLOAT, None))
    plan = workbench.convert(proto).node("attention")
    assert plan.reason is Reason.UNSUPPORTED_ATTRIBUTES
    assert words in plan.detail


def test_a_mask_that_multi_head_attention_does_not_take(workbench, make_model, sparse, open_session) -> None:
    proto, feeds = _attention(make_model, sparse, mask="ends and beginnings")
    open_session(proto.SerializeToString()).run(None, feeds)
    converted = workbench.convert(proto)
    plan = converted.node("attention")
    assert (plan.reason, "several numbers for an entry" in plan.detail) == (Reason.UNSUPPORTED_ATTRIBUTES, True)
    assert converted.error(feeds) <= EXACT


@pytest.mark.parametrize("imports", [{"ai.onnx": 20, MICROSOFT: 1}, {MICROSOFT: 1}])
def test_the_other_name_of_the_domain(workbench, make_model, sparse, imports) -> None:
    """Nodes behind the product are those of the version that the model imports, however it names the domain."""
    proto, feeds = _attention(make_model, sparse, mask=None)
    del proto.graph.node[1:]  # of ONNX's own operators
    proto.graph.output[0].name = "a"
    del proto.opset_import[:]
    proto.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in imports.items())
    converted = workbench.convert(proto)
    assert "Attention" not in converted.op_types
    assert converted.error(feeds) <= EXACT


def test_a_layer_of_optimized_bert(workbench, make_model, sparse) -> None:
    """Attention, BiasGelu and SkipLayerNormalization with a bias, as the optimizer leaves them."""
    nodes = [
        node("Attention", ["x", "qkv.w", "qkv.b", "mask"], ["a"], domain=MICROSOFT, num_heads=HEADS),
        node("MatMul", ["a", "o.w"], ["o"]),
        node("SkipLayerNormalization", ["o", "x", "g", "beta", "o.b"], ["s"], domain=MICROSOFT, epsilon=1e-12),
        node("MatMul", ["s", "up.w"], ["u"]),
        node("BiasGelu", ["u", "up.b"], ["g1"], domain=MICROSOFT),
        node("MatMul", ["g1", "down.w"], ["d"]),
        node("SkipLayerNormalization", ["d", "s", "g", "beta", "down.b"], ["y"], domain=MICROSOFT, epsilon=1e-12),
    ]
    weights = {
        "qkv.w": sparse((HIDDEN, 3 * HIDDEN)), "qkv.b": _x(3 * HIDDEN), "o.w": sparse((HIDDEN, HIDDEN)),
        "o.b": _x(HIDDEN), "g": _x(HIDDEN, seed=1), "beta": _x(HIDDEN, seed=2), "up.w": sparse((HIDDEN, 4 * HIDDEN)),
        "up.b": _x(4 * HIDDEN), "down.w": sparse((4 * HIDDEN, HIDDEN)), "down.b": _x(HIDDEN, seed=3),
    }  # fmt: skip
    mask = [helper.make_tensor_value_info("mask", TensorProto.INT32, ("batch", "length"))]
    proto = make_model(nodes, {"x": ("batch", "length", HIDDEN)}, ["y"], weights, extra_inputs=mask)
    converted = workbench.convert(proto)
    assert [plan.action for plan in converted.plan] == [Action.CONVERTED] * 4
    kept = [t for t in converted.op_types if t not in ("SparseAMXMatMul", "Constant", "Split")]
    assert kept == ["MultiHeadAttention", "SkipLayerNormalization", "BiasGelu", "SkipLayerNormalization"]
    feeds = {"x": _x(2, LENGTH, HIDDEN), "mask": (np.arange(LENGTH) < [[5], [LENGTH]]).astype(np.int32)}
    assert converted.error(feeds) <= EXACT


# --- merged decoders --------------------------------------------------------------------------------------------------


def test_a_merged_decoder(workbench, make_model, sparse) -> None:
    """As optimum writes one: both branches of an If use the weights of the graph around it, a tied head among them."""
    shared = {
        "embed.weight": sparse((90, HIDDEN), 0.0),
        "q.weight": sparse((HIDDEN, HIDDEN)),
        "q.bias": _x(HIDDEN),
        "fc.weight_t": sparse((HIDDEN, HIDDEN)),
    }
    branches = {}
    for name in ("with_past", "without_past"):
        nodes = [
            node("Gather", ["embed.weight", "ids"], [f"{name}.e"], name=f"{name}.gather"),
            node("MatMul", [f"{name}.e", "q.weight"], [f"{name}.q"], name=f"{name}.q"),
            node("Add", ["q.bias", f"{name}.q"], [f"{name}.qb"], name=f"{name}.qb"),
            node("Identity", ["fc.weight_t"], [f"{name}.i"], name=f"{name}.i"),
            node("MatMul", [f"{name}.qb", f"{name}.i"], [f"{name}.fc"], name=f"{name}.fc"),
            node("Transpose", ["embed.weight"], [f"{name}.t"], name=f"{name}.t", perm=[1, 0]),
            node("MatMul", [f"{name}.fc", f"{name}.t"], [f"{name}.logits"], name=f"{name}.lm_head"),
        ]
        if name == "with_past":
            nodes.insert(5, node("Tanh", [f"{name}.fc"], [f"{name}.th"], name=f"{name}.th"))
            nodes[-1].input[0] = f"{name}.th"
        output = helper.make_tensor_value_info(f"{name}.logits", TensorProto.FLOAT, None)
        branches[name] = helper.make_graph(nodes, name, [], [output])
    choice = node(
        "If", ["use_cache"], ["logits"], name="optimum::if",
        then_branch=branches["with_past"], else_branch=branches["without_past"],
    )  # fmt: skip
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ("batch", "length")),
        helper.make_tensor_value_info("use_cache", TensorProto.BOOL, ()),
    ]
    converted = workbench.convert(make_model([choice], {}, ["logits"], shared, extra_inputs=inputs))
    assert [plan.action for plan in converted.plan] == [Action.CONVERTED] * 6
    # The embedding stays for the Gathers; the biases are those of the graph around.
    assert converted.initializers == {"embed.weight", "q.bias"}
    assert converted.node("with_past.lm_head").keeps_dense
    places = {}
    for attribute in converted.proto.graph.node[0].attribute:
        types = [n.op_type for n in attribute.g.node]
        assert types.count("SparseAMXMatMul") == 3
        assert not {"MatMul", "Transpose", "Identity", "Add"} & set(types)
        for tensor in attribute.g.initializer:
            places.setdefault(attribute.name, set()).update(
                int(e.value) for e in tensor.external_data if e.key == "offset"
            )
    assert places["then_branch"] == places["else_branch"]
    assert len(places["then_branch"]) == 3
    ids = np.array([[1, 5, 89], [0, 2, 3]])
    for cached in (False, True):
        assert converted.error({"ids": ids, "use_cache": np.array(cached)}) <= EXACT


# --- weights of other types and several dimensions --------------------------------------------------------------------


def test_experts_are_left_alone(workbench, make_model, sparse) -> None:
    nodes = [
        node("MatMul", ["x", "experts"], ["e"]),
        node("ReduceSum", ["e", "axis"], ["y"], keepdims=0),
        node("MatMul", ["y", "w"], ["z"]),
    ]
    weights = {"experts": sparse((3, K, N)), "w": sparse((N, K)), "axis": np.array([0])}
    converted = workbench.convert(make_model(nodes, {"x": (1, 4, K)}, ["z"], weights))
    assert converted.node("e").reason is Reason.WEIGHT_NOT_2D
    assert converted.node("z").action is Action.CONVERTED
    assert converted.error({"x": _x(1, 4, K)}) <= EXACT


@pytest.mark.parametrize("order", list(itertools.permutations(["Cast", "Transpose", "Identity"])))
def test_chains_in_any_order(workbench, make_model, sparse, order) -> None:
    attributes = {"Cast": {"to": TensorProto.FLOAT}, "Transpose": {"perm": [1, 0]}, "Identity": {}}
    nodes = [node(op, ["w" if i == 0 else f"c{i - 1}"], [f"c{i}"], **attributes[op]) for i, op in enumerate(order)]
    nodes.append(node("MatMul", ["x", "c2"], ["y"]))
    converted = workbench.convert(make_model(nodes, {"x": (2, K)}, ["y"], {"w": sparse((N, K)).astype(np.float16)}))
    assert converted.op_types == ["SparseAMXMatMul"]
    assert converted.initializers == {"w.sparamx"}
    assert converted.error({"x": _x(2, K)}) <= EXACT


def test_a_model_that_holds_weights_in_every_way(workbench, make_model, sparse) -> None:
    """Constant nodes, shared and deduplicated initializers, a bfloat16 weight: one model, all converted."""
    bfloat = helper.make_tensor("b16", TensorProto.BFLOAT16, (K, K), sparse((K, K)).ravel())
    nodes = [
        node("Constant", [], ["c"], value=numpy_helper.from_array(sparse((K, K), seed=1))),
        node("MatMul", ["x", "c"], ["m0"]),
        node("Identity", ["s"], ["s1"]),
        node("Identity", ["s1"], ["s2"]),
        node("MatMul", ["m0", "s"], ["m1"]),
        node("MatMul", ["m1", "s2"], ["m2"]),
        node("Gemm", ["m2", "s1", "bias"], ["m3"], transB=1),
        node("Cast", ["b16"], ["b32"], to=TensorProto.FLOAT),
        node("MatMul", ["m3", "b32"], ["y"]),
    ]
    proto = make_model(nodes, {"x": (2, K)}, ["y"], {"s": sparse((K, K)) / 4, "bias": _x(K)})
    proto.graph.initializer.append(bfloat)
    converted = workbench.convert(proto)
    assert converted.op_types == ["SparseAMXMatMul"] * 5
    assert converted.initializers == {"c.sparamx", "s.sparamx", "s.sparamx.2", "b16.sparamx", "bias"}
    assert converted.error({"x": _x(2, K)}) <= EXACT
