"""Attention operators become SparseAMXAttention, or stay for a reason; what they compute stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import sparamx_onnx
from sparamx_onnx.graph_passes import pipeline
from sparamx_onnx.graph_passes.attention_plan import AttentionPlan
from sparamx_onnx.graph_passes.options import ConvertOptions
from sparamx_onnx.graph_passes.plan import Action
from sparamx_onnx.html_report import report_page
from sparamx_onnx.ops import library
from sparamx_onnx.reports import conversion_text

HEADS, KV_HEADS, SIZE, HIDDEN, POSITIONS = 4, 2, 16, 24, 40
GROUP_QUERY_INPUTS = [
    *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"),
    *("cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink"),
]
CACHE = {"past_key": ["batch", KV_HEADS, "past", SIZE], "past_value": ["batch", KV_HEADS, "past", SIZE]}
Arrays = dict[str, np.ndarray]


def value_info(name: str, shape: Sequence[int | str], element_type: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, shape)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(graph, ir_version=10, opset_imports=imports)


def decoder(packed: bool, roles: Sequence[str] = (), **attributes: Any) -> onnx.ModelProto:
    """Projections of x, GroupQueryAttention with rotation, and a projection of its output.

    Args:
        packed: One projection for query, key and value.
        roles: Optional inputs beyond rotation.
        attributes: Of the attention.
    """
    rng = np.random.default_rng(0)
    widths = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    weights = {"wq": sum(widths)} if packed else dict(zip(("wq", "wk", "wv"), widths, strict=True))
    angles = rng.uniform(0, 6, (POSITIONS, SIZE // 2))
    constants = {name: rng.standard_normal((HIDDEN, n), np.float32) / 5 for name, n in weights.items()}
    constants |= {
        "wo": rng.standard_normal((HEADS * SIZE, HIDDEN), np.float32),
        "cos_cache": np.cos(angles).astype(np.float32),
        "sin_cache": np.sin(angles).astype(np.float32),
    }
    products = dict(zip(("wq", "wk", "wv"), ("query", "key", "value"), strict=True))
    nodes = [helper.make_node("MatMul", ["x", name], [products[name]], products[name]) for name in weights]
    there = {*CACHE, *roles, *(products[name] for name in weights), "seqlens_k", "total_sequence_length"}
    if attributes.get("do_rotary", 1):
        there |= {"cos_cache", "sin_cache"}
    names = [name if name in there else "" for name in GROUP_QUERY_INPUTS]
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "do_rotary": 1, **attributes}
    outputs = ["mixed", "present_key", "present_value"]
    nodes.append(
        helper.make_node("GroupQueryAttention", names, outputs, "attention", domain="com.microsoft", **attributes)
    )
    nodes.append(helper.make_node("MatMul", ["mixed", "wo"], ["y"], "out"))
    shapes = {"attention_bias": [1, HEADS, "tokens", "total"], "head_sink": [HEADS]}
    inputs = [
        value_info("x", ["batch", "tokens", HIDDEN]),
        *(value_info(name, shape) for name, shape in CACHE.items()),
        value_info("seqlens_k", ["batch"], TensorProto.INT32),
        value_info("total_sequence_length", [], TensorProto.INT32),
        *(value_info(role, shapes[role]) for role in roles if role in shapes),
        *(value_info(role, ["batch", "tokens"], TensorProto.INT64) for role in roles if role == "position_ids"),
    ]
    presents = [value_info(name, ["b", KV_HEADS, "total", SIZE]) for name in outputs[1:]]
    return model_of(nodes, inputs, [value_info("y", ["b", "t", HIDDEN]), *presents], constants)


def session(model: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    library.register(options)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def step(rng: np.random.Generator, tokens: int, past: int, roles: Sequence[str]) -> Arrays:
    """Inputs of a call of the decoder, without the cache."""
    feeds = {
        "x": rng.standard_normal((1, tokens, HIDDEN), np.float32),
        "seqlens_k": np.array([past + tokens - 1], np.int32),
        "total_sequence_length": np.array(past + tokens, np.int32),
        "attention_bias": rng.standard_normal((1, HEADS, tokens, past + tokens), np.float32),
        "head_sink": rng.standard_normal(HEADS, np.float32),
        "position_ids": np.arange(past, past + tokens)[None],
    }
    return {name: array for name, array in feeds.items() if name not in GROUP_QUERY_INPUTS[9:] or name in roles}


def attention_plan(proto: onnx.ModelProto, **options: Any) -> AttentionPlan:
    (plan,) = pipeline.run(ir.from_proto(proto), ConvertOptions(**{"attention": "fast", **options})).attention
    return plan


@pytest.mark.parametrize(
    ("packed", "roles", "attributes"),
    [
        (False, [], {}),
        (True, [], {"rotary_interleaved": 1}),
        (True, ["position_ids"], {"local_window_size": 5, "scale": 0.2}),
        (False, ["attention_bias", "head_sink"], {"softcap": 3.0}),
        (False, [], {"smooth_softmax": -1}),  # the default, written out
        (False, [], {"do_rotary": 0, "smooth_softmax": 1, "kv_cache_bit_width": 0, "k_quant_type": "NONE"}),
    ],
)
def test_a_converted_decoder_goes_on_like_the_original(workbench, packed: bool, roles, attributes) -> None:
    proto = decoder(packed, roles, **attributes)
    converted = workbench.convert(proto, attention="fast")
    assert [plan.action for plan in converted.plan.attention] == [Action.CONVERTED]
    assert converted.op_types.count("SparseAMXAttention") == 1
    assert "GroupQueryAttention" not in converted.op_types
    (node,) = [node for node in converted.proto.graph.node if node.op_type == "SparseAMXAttention"]
    assert node.name == "attention"
    assert list(node.output) == ["mixed", "present_key", "present_value"]
    assert all(node.input)
    sessions = [session(proto), session(converted.path)]
    rng = np.random.default_rng(1)
    caches = [[np.zeros((1, KV_HEADS, 0, SIZE), np.float32)] * 2 for _ in sessions]
    past = 0
    for tokens in (9, 1, 1, 4, 1):
        feeds = step(rng, tokens, past, roles)
        outputs = []
        for index, one in enumerate(sessions):
            y, *caches[index] = one.run(None, feeds | {"past_key": caches[index][0], "past_value": caches[index][1]})
            outputs.append([y, *caches[index]])
        for expected, actual in zip(*outputs, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        past += tokens


def test_a_shared_buffer_stays_one(workbench) -> None:
    proto = decoder(True)
    paths: list[Any] = [proto, workbench.convert(proto, attention="fast").path]
    results = []
    for path in paths:
        one = session(path)
        rng = np.random.default_rng(2)
        buffers = [
            onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, KV_HEADS, 20, SIZE), np.float32)) for _ in "kv"
        ]
        ys, past = [], 0
        for tokens in (7, 1, 1):
            feeds = step(rng, tokens, past, [])
            binding = one.io_binding()
            for name in ("x", "seqlens_k", "total_sequence_length"):
                binding.bind_cpu_input(name, feeds[name])
            for name, buffer in zip(("key", "value"), buffers, strict=True):
                binding.bind_ortvalue_input(f"past_{name}", buffer)
                binding.bind_ortvalue_output(f"present_{name}", buffer)
            binding.bind_output("y")
            one.run_with_iobinding(binding)
            ys.append(binding.copy_outputs_to_cpu()[0])
            past += tokens
        results.append([*ys, *(buffer.numpy()[:, :, :past].copy() for buffer in buffers)])
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_kept_unless_asked_for(workbench) -> None:
    converted = workbench.convert(decoder(True))
    (plan,) = converted.plan.attention
    assert (plan.action, plan.reason.value) == (Action.LEFT_ALONE, "not_asked_for")
    assert "--attention fast" in plan.text
    assert "GroupQueryAttention" in converted.op_types


def test_a_second_conversion_finds_it_done(workbench) -> None:
    converted = workbench.convert(decoder(True), attention="fast")
    plan = pipeline.run(ir.load(converted.path), ConvertOptions(attention="fast"))
    assert [node.reason.value for node in plan.attention] == ["already_converted"]
    assert not plan.changes


def test_what_cannot_be_converted_has_a_reason() -> None:
    def changed(**attributes: Any) -> onnx.ModelProto:
        return decoder(True, **attributes)

    def without(role: str) -> onnx.ModelProto:
        proto = decoder(True)
        proto.graph.node[1].input[GROUP_QUERY_INPUTS.index(role)] = ""
        return proto

    scores = decoder(True)
    scores.graph.node[1].output.append("scores")
    quantized = decoder(True)
    quantized.graph.node[1].input.extend(["total_sequence_length"] * 2)
    half = decoder(True)
    half.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16
    one_present = decoder(True)
    del one_present.graph.node[1].output[2]
    one_present.graph.output.remove(next(o for o in one_present.graph.output if o.name == "present_value"))
    cases: list[tuple[onnx.ModelProto, str, str]] = [
        (changed(local_window_size=0), "unsupported_attributes", "local_window_size = 0"),
        (changed(causal=0), "unsupported_attributes", "causal = 0"),
        (changed(sliding_window_cache=1), "unsupported_attributes", "sliding_window_cache = 1"),
        (changed(k_quant_type="PER_TENSOR"), "unsupported_attributes", "k_quant_type"),
        (changed(qk_output=1), "unsupported_attributes", "qk_output"),
        (changed(something_new=1), "unsupported_attributes", "something_new"),
        (changed(num_heads=3), "malformed_node", ""),
        (changed(local_window_size=2.0), "malformed_node", "'local_window_size' of the GroupQueryAttention node"),
        (changed(do_rotary="yes"), "malformed_node", "'do_rotary' of the GroupQueryAttention node 'attention'"),
        (without("query"), "malformed_node", ""),
        (without("past_value"), "malformed_node", "one of past_key and past_value only"),
        (without("cos_cache"), "malformed_node", "without cos_cache"),
        (scores, "unsupported_output", "scores"),
        (one_present, "unsupported_output", "one of present_key"),
        (quantized, "unsupported_input", "k_scale"),
        (half, "unsupported_dtype", "past_key is FLOAT16"),
    ]
    for proto, reason, detail in cases:
        plan = attention_plan(proto)
        assert (plan.action, plan.reason.value) == (Action.LEFT_ALONE, reason), detail
        assert detail in plan.text
    excluded = attention_plan(decoder(True), exclude=["^att"])
    assert (excluded.reason.value, excluded.node) == ("excluded_by_user", "attention")
    assert excluded.to_json()["text"] == "An exclude pattern matches it. It is ^att."


def multi_head(
    inputs: Mapping[str, Sequence[int | str] | None], outputs: Sequence[str] = ("y",), **attributes: Any
) -> onnx.ModelProto:
    """One MultiHeadAttention; inputs by role, in its order, None for those that are empty."""
    types = {"key_padding_mask": TensorProto.INT32, "past_sequence_length": TensorProto.INT32}
    names = [name if shape is not None else "" for name, shape in inputs.items()]
    node = helper.make_node(
        "MultiHeadAttention", names, list(outputs), "attention", domain="com.microsoft", num_heads=2, **attributes
    )
    given = [
        value_info(name, shape, types.get(name, TensorProto.FLOAT))
        for name, shape in inputs.items()
        if shape is not None
    ]
    return model_of([node], given, [value_info(name, [None] * (3 if name == "y" else 4)) for name in outputs])


MULTI_HEAD: dict[str, Sequence[int | str] | None] = {
    "query": ["batch", "tokens", 32],
    "key": ["batch", "keys", 32],
    "value": ["batch", "keys", 48],
    "bias": None,
    "key_padding_mask": ["batch", "total"],
    "attention_bias": [1, 2, "tokens", "total"],
}


@pytest.mark.parametrize("past", [0, 6])
def test_multi_head_attention(workbench, past: int) -> None:
    inputs = dict(MULTI_HEAD)
    outputs = ["y"]
    if past:
        inputs |= {"past_key": ["batch", 2, "past", 16], "past_value": ["batch", 2, "past", 16]}
        inputs["value"] = ["batch", "keys", 32]
        outputs += ["present_key", "present_value"]
    proto = multi_head(inputs, outputs, scale=0.3)
    converted = workbench.convert(proto, attention="fast")
    assert converted.op_types == ["SparseAMXAttention"]
    rng = np.random.default_rng(3)
    # Past and new keys as many as queries: ONNX Runtime's operator asks for it where there is a past.
    sizes = {"batch": 2, "tokens": 9, "keys": 9 if past else 13, "past": past, "total": past + (9 if past else 13)}
    feeds = {
        name: rng.standard_normal([sizes.get(str(size), size) for size in shape], np.float32)
        for name, shape in inputs.items()
        if shape is not None
    }
    mask = rng.integers(0, 2, feeds["key_padding_mask"].shape).astype(np.int32)
    mask[:, 0] = 1
    assert converted.error(feeds | {"key_padding_mask": mask}) < 1e-4


def test_causal_multi_head_attention(workbench) -> None:
    shape = ["batch", "tokens", 32]
    proto = multi_head({"query": shape, "key": shape, "value": shape}, unidirectional=1)
    converted = workbench.convert(proto, attention="fast")
    rng = np.random.default_rng(4)
    feeds = {name: rng.standard_normal((2, 21, 32), np.float32) for name in ("query", "key", "value")}
    assert converted.op_types == ["SparseAMXAttention"]
    assert converted.error(feeds) < 1e-4


@pytest.mark.parametrize("spelling", ["norm", "product", "cast", "result"])
def test_types_that_the_model_does_not_record(spelling: str) -> None:
    """What the query is made of tells them, or the result: ONNX Runtime refuses the operator of float16 numbers."""
    half = TensorProto.FLOAT16
    made = {
        "norm": [helper.make_node("LayerNormalization", ["x", "ones"], ["n"]), helper.make_node("Relu", ["n"], ["q"])],
        "product": [helper.make_node("Abs", ["x"], ["n"]), helper.make_node("MatMul", ["n", "eye"], ["q"])],
        "cast": [helper.make_node("Cast", ["x"], ["q"], to=half)],
        "result": [helper.make_node("Abs", ["x"], ["q"])],
    }[spelling]
    attention = helper.make_node("MultiHeadAttention", ["q"] * 3, ["a"], "a", domain="com.microsoft", num_heads=2)
    nodes = [*made, attention, helper.make_node("Identity", ["a"], ["y"])]
    constants = {"ones": np.ones(32, np.float16), "eye": np.eye(32, dtype=np.float16)}
    x, y = (value_info(name, ["b", "t", 32], half) for name in "xy")
    proto = model_of(nodes, [x], [y], constants)
    if spelling == "result":
        proto.graph.value_info.append(value_info("a", ["b", "t", 32], half))
    plan = attention_plan(proto)
    assert (plan.reason.value, " is FLOAT16." in plan.text) == ("unsupported_dtype", True)


BIAS = np.random.default_rng(9).standard_normal(32 + 32 + 48).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "bias", "types"),
    [
        ({"key_padding_mask": ["batch"]}, None, []),
        ({"key_padding_mask": ["batch", "tokens", "keys"]}, None, []),
        ({"key": ["batch", 2, "keys", 16], "value": ["batch", 2, "keys", 16]}, None, []),
        ({}, BIAS, ["Constant", "Add"] * 3),
        ({}, np.concatenate([BIAS[:32], np.zeros(32, np.float32), BIAS[64:]]), ["Constant", "Add"] * 2),
        ({"key": ["batch", 2, "keys", 16], "value": ["batch", 2, "keys", 16]}, BIAS[:96], ["Constant", "Add"]),
    ],
)
def test_layouts_and_masks_of_multi_head_attention(workbench, changes, bias, types: list[str]) -> None:
    inputs: dict[str, Sequence[int | str] | None] = {**MULTI_HEAD, "key_padding_mask": ["batch", "keys"], **changes}
    inputs["attention_bias"] = [1, 2, "tokens", "keys"]
    if bias is not None:
        inputs["bias"] = [len(bias)]
    proto = multi_head(inputs)
    if bias is not None:
        proto.graph.initializer.append(numpy_helper.from_array(bias, "bias"))
        proto.graph.input.remove(next(value for value in proto.graph.input if value.name == "bias"))
    converted = workbench.convert(proto, attention="fast")
    assert converted.op_types == [*types, "SparseAMXAttention"]
    sizes = {"batch": 2, "tokens": 9, "keys": 13}
    rng = np.random.default_rng(8)
    feeds = {
        name: rng.standard_normal([sizes.get(str(size), size) for size in shape], np.float32)
        for name, shape in inputs.items()
        if shape is not None and name != "bias"
    }
    mask = feeds["key_padding_mask"]
    feeds["key_padding_mask"] = rng.integers(*((1, 14) if mask.ndim == 1 else (0, 2)), mask.shape).astype(np.int32)
    if mask.ndim > 1:
        feeds["key_padding_mask"][..., 0] = 1
    assert converted.error(feeds) < 1e-4


@pytest.mark.parametrize(
    "shapes",
    [
        {"query": ["batch", "tokens", 2, 3, 16]},
        {"query": ["batch", "tokens", 32], "key": ["batch", "keys", 2, 2, 16]},
    ],
)
def test_packed_multi_head_attention(workbench, shapes: dict[str, Sequence[int | str]]) -> None:
    """ONNX Runtime computes these on other devices only: compared with the same heads apart."""
    converted = workbench.convert(multi_head(shapes), attention="fast")
    assert converted.op_types == ["SparseAMXAttention"]
    sizes = {"batch": 2, "tokens": 9, "keys": 13}
    rng = np.random.default_rng(7)
    feeds = {
        name: rng.standard_normal([sizes.get(str(size), size) for size in shape], np.float32)
        for name, shape in shapes.items()
    }
    packed = feeds.get("key", feeds["query"])
    parts = [packed[:, :, :, i].reshape(2, packed.shape[1], 32) for i in range(packed.shape[3])]
    apart = dict(zip(("query", "key", "value"), [feeds["query"], *parts] if "key" in feeds else parts, strict=True))
    (expected,) = session(multi_head({name: ["b", "t" + name, 32] for name in apart})).run(None, apart)
    (actual,) = session(converted.path).run(None, feeds)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def with_bias(changes: Mapping[str, Sequence[int | str | None]], length: int = 112) -> onnx.ModelProto:
    proto = multi_head({**MULTI_HEAD, **changes, "bias": [length]})
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(length, np.float32), "bias"))
    proto.graph.input.remove(next(value for value in proto.graph.input if value.name == "bias"))
    return proto


def test_multi_head_attention_that_stays() -> None:
    cases: list[tuple[onnx.ModelProto, str, str]] = [
        (multi_head({**MULTI_HEAD, "bias": [112]}), "unsupported_input", "bias is not constant"),
        (multi_head({"query": ["batch", "tokens", 96]}), "unsupported_input", "one tensor"),
        (multi_head({**MULTI_HEAD, "key_padding_mask": ["numbers"]}), "unknown_shape", "one dimension"),
        (multi_head(MULTI_HEAD, unidirectional=1), "unknown_shape", "unidirectional"),
        (multi_head(MULTI_HEAD, something_new=1), "unsupported_attributes", "something_new"),
        (multi_head(MULTI_HEAD, unidirectional="x"), "malformed_node", "'unidirectional' of the MultiHeadAttention"),
        (multi_head({**MULTI_HEAD, "key": None}), "malformed_node", ""),
        (
            multi_head({**MULTI_HEAD, "past_key": None, "past_value": None, "past_sequence_length": [1]}),
            *("unsupported_input", "past_sequence_length"),
        ),
        (with_bias({"value": [None, None, None, None, None]}), "unsupported_input", "side by side"),
        (with_bias({"query": ["batch", "tokens", "width"]}), "unknown_shape", "It has a bias"),
        (with_bias({}, 63), "malformed_node", "too short"),
    ]
    for proto, reason, detail in cases:
        plan = attention_plan(proto)
        assert (plan.action, plan.reason.value) == (Action.LEFT_ALONE, reason), detail
        assert detail in plan.text
    ranks_unknown = multi_head(MULTI_HEAD)
    ranks_unknown.graph.input[3].type.tensor_type.ClearField("shape")
    assert attention_plan(ranks_unknown).reason.value == "unknown_shape"
    other = multi_head(MULTI_HEAD)
    other.graph.node[0].op_type = "DecoderMaskedMultiHeadAttention"
    assert attention_plan(other).reason.value == "unsupported_operator"


@pytest.mark.parametrize(
    ("op_type", "inputs", "is_converted"),
    [
        ("MatMul", ["query", "w"], True),
        ("MatMul", ["query", "other"], False),
        ("Add", ["query", "bias"], True),
        ("Add", ["query", "positions"], False),  # one query and five keys, if the query has one token
        ("Identity", ["query"], False),
        ("Split", ["query"], False),
    ],
)
def test_causal_attention_needs_as_many_keys_as_queries(op_type: str, inputs: list[str], is_converted: bool) -> None:
    """Where the shapes do not tell, the keys must be made of what the queries are made of, token by token."""
    proto = multi_head({role: ["b", None, 32] for role in ("query", "key", "value")}, unidirectional=1)
    proto.graph.input[1].CopyFrom(value_info("other", [32, 32]))
    constants = {"w": np.eye(32), "bias": np.ones(32), "positions": np.ones((5, 32))}
    for name, array in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    proto.graph.node.insert(0, helper.make_node(op_type, inputs, ["key"], "made"))
    plan = attention_plan(proto, weights="fp32")
    assert (plan.action is Action.CONVERTED) == is_converted


STANDARD: dict[str, Sequence[int | str] | None] = {
    "query": ["batch", 4, "tokens", 16],
    "key": ["batch", 2, "keys", 16],
    "value": ["batch", 2, "keys", 16],
    "attention_bias": None,
    "past_key": None,
    "past_value": None,
    "nonpad_kv_seqlen": None,
}


def standard(
    changes: Mapping[str, Sequence[int | str] | None], outputs: Sequence[str] = ("y",), **attributes: Any
) -> onnx.ModelProto:
    """One Attention of ONNX's own operators."""
    shapes = {**STANDARD, **changes}
    names = [name if shape is not None else "" for name, shape in shapes.items()]
    node = helper.make_node("Attention", names, list(outputs), "attention", **attributes)
    inputs = [
        value_info(name, shape, TensorProto.INT64 if name == "nonpad_kv_seqlen" else TensorProto.FLOAT)
        for name, shape in shapes.items()
        if shape is not None
    ]
    return model_of([node], inputs, [value_info(name, [None] * 4) for name in outputs], opset=24)


def test_standard_attention_that_stays() -> None:
    past = {"past_key": ["batch", 2, "past", 16], "past_value": ["batch", 2, "past", 16]}
    presents = ("y", "present_key", "present_value")
    cases: list[tuple[onnx.ModelProto, str, str]] = [
        (standard({}, something_new=1), "unsupported_attributes", "something_new"),
        (standard({}, scale="x"), "malformed_node", "'scale' of the Attention node 'attention'"),
        (standard({"value": None}), "malformed_node", ""),
        (standard({"past_key": past["past_key"]}), "malformed_node", "one of past_key and past_value only"),
        (standard({"query": ["batch", "heads", "tokens", 16]}), "unknown_shape", "number of heads"),
        (standard({"query": ["batch", "tokens", 64]}), "unknown_shape", "number of heads"),
        (standard({"query": ["batch", 3, "tokens", 16]}), "malformed_node", ""),
        (
            standard({**past, "nonpad_kv_seqlen": ["batch"]}, presents),
            "malformed_node",
            "past_key and nonpad_kv_seqlen",
        ),
        (standard({"nonpad_kv_seqlen": ["batch"]}, presents), "unsupported_output", "present_key and nonpad_kv_seqlen"),
    ]
    for proto, reason, detail in cases:
        plan = attention_plan(proto)
        assert (plan.action, plan.reason.value) == (Action.LEFT_ALONE, reason), plan.text
        assert detail in plan.text


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize("shape", [["batch", "tokens", 32], [None, None, 32], None])
def test_attention_with_weights_is_converted_in_both_steps(workbench, unidirectional: int, shape) -> None:
    """The product is a linear layer; the rest is attention whose keys are as many as its queries, known or not."""
    rng = np.random.default_rng(6)
    weight, bias = rng.standard_normal((32, 96), np.float32) / 6, rng.standard_normal(96).astype(np.float32)
    node = helper.make_node(
        "Attention", ["x", "weight", "bias"], ["y"], "attention", domain="com.microsoft", num_heads=2,
        unidirectional=unidirectional,
    )  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in (("x", shape), ("y", None)))
    proto = model_of([node], [x], [y], {"weight": weight, "bias": bias})
    converted = workbench.convert(proto, weights="fp32", attention="fast")
    assert "SparseAMXAttention" in converted.op_types
    assert "MultiHeadAttention" not in converted.op_types
    assert converted.error({"x": rng.standard_normal((2, 11, 32), np.float32)}) < 1e-4


def test_a_model_of_attention_alone_is_written(tmp_path: Path) -> None:
    shape = ["batch", "tokens", 32]
    model = tmp_path / "m.onnx"
    onnx.save(multi_head({"query": shape, "key": shape, "value": shape}), model)
    kept = sparamx_onnx.convert(model)
    assert not kept.written
    assert "Attention left alone (not asked for): 1. It can be converted" in conversion_text(kept)
    result = sparamx_onnx.convert(model, attention="fast")
    assert result.written
    assert "1 attention operator converted: files" in conversion_text(result)
    assert result.data is None
    assert ".data" not in conversion_text(result)
    assert result.to_dict()["summary"]["attention_converted"] == 1
    assert sparamx_onnx.inspect(tmp_path / "m.sparse.onnx").record["attention"] == "fast"
    assert not sparamx_onnx.convert(tmp_path / "m.sparse.onnx", attention="fast").written


def test_the_page_of_a_decoder_lists_its_attention_and_says_what_is_special_of_layers(tmp_path: Path) -> None:
    onnx.save(decoder(False), tmp_path / "m.onnx")
    options: dict[str, Any] = {"method": "magnitude", "attention": "fast", "fuse_siblings": "always"}
    result = sparamx_onnx.convert(tmp_path / "m.onnx", dry_run=True, exclude=["out"], **options)
    first = result.plan.converted[0]
    first.epilogue, first.keeps_dense, first.keeps_codes = "gelu", True, True
    first.group_size = 32
    page = report_page(result)
    for words in (
        "Attention operators replaced",
        "GroupQueryAttention",
        "Not pruned: it is a small head",
        "With gelu.",
        "in groups of 32",
        f"Computed by {first.fused}.",
        "Its dense weight stays",
        "Keeps the codes that it had.",
    ):
        assert words in page, words
    assert "not pruned" in conversion_text(result)
