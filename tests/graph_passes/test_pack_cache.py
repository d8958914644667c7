"""Float caches of attention become packed ones where nothing else reads or writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import sparamx_onnx
from sparamx_onnx import SparamxError
from sparamx_onnx.graph_passes.pack_cache import PackedCache, packed_caches
from sparamx_onnx.reports import conversion_text, inspection_text

HEADS, KV_HEADS, SIZE = 4, 2, 16
CACHE = {"k_sparsity": 0.25, "v_sparsity": 0.5, "sink": 64, "recent": 3}


def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def attention(layers: int = 2, size: int | str = SIZE, extra: str = "") -> onnx.ModelProto:
    """Layers of GroupQueryAttention over separate query, key and value; ``extra``: what else touches the last cache."""
    nodes = []
    inputs = [value("q", "b", "t", HEADS * SIZE), value("k", "b", "t", KV_HEADS * SIZE)]
    inputs += [value("v", "b", "t", KV_HEADS * SIZE), value("lengths", "b", kind=TensorProto.INT32)]
    inputs.append(value("total", kind=TensorProto.INT32))
    outputs = []
    for layer in range(layers):
        past, present = ([f"{which}.{layer}.{part}" for part in ("key", "value")] for which in ("past", "present"))
        inputs += [value(name, "b", KV_HEADS, "past", size) for name in past]
        outputs += [value(f"y{layer}", "b", "t", HEADS * SIZE)]
        outputs += [value(name, "b", KV_HEADS, "all", size) for name in present]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                ["q", "k", "v", *past, "lengths", "total"],
                [f"y{layer}", *present],
                f"layer{layer}",
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
            )
        )
    last = layers - 1
    if extra == "reads the past":
        nodes.append(helper.make_node("Identity", [f"past.{last}.value"], ["copy"]))
        outputs.append(value("copy", "b", KV_HEADS, "past", size))
    if extra == "reads the present":
        nodes.append(helper.make_node("Identity", [f"present.{last}.key"], ["copy"]))
        outputs.append(value("copy", "b", KV_HEADS, "all", size))
    if extra == "makes the past":
        nodes.insert(0, helper.make_node("Identity", [f"other.{last}.key"], [f"past.{last}.key"]))
        inputs[-2].name = f"other.{last}.key"
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=opsets, ir_version=10)


def convert(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[onnx.ModelProto, list[tuple[str, str]]]:
    """The converted model, and reason and text of every attention operator."""
    onnx.save(model, folder / "model.onnx")
    result = sparamx_onnx.convert(folder / "model.onnx", folder / "out.onnx", force=True, attention="packed", **options)
    return onnx.load(folder / "out.onnx"), [(plan.reason.value, plan.text) for plan in result.plan.attention]


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def test_one_tensor_of_bytes_takes_the_place_of_keys_and_values(tmp_path: Path) -> None:
    model, plans = convert(attention(), tmp_path, **CACHE)
    assert [reason for reason, _ in plans] == ["packed"] * 2
    assert names(model.graph.input) == ["q", "k", "v", "lengths", "total", "past.0.cache", "past.1.cache"]
    assert names(model.graph.output) == ["y0", "present.0.cache", "y1", "present.1.cache"]
    for tensor in (model.graph.input[5], model.graph.output[1]):
        assert tensor.type.tensor_type.elem_type == TensorProto.UINT8
        assert [dim.dim_param or dim.dim_value for dim in tensor.type.tensor_type.shape.dim][:2] == ["b", KV_HEADS]
    for layer, node in enumerate(model.graph.node):
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert list(node.input) == ["q", "k", "v", "lengths", "total", f"past.{layer}.cache"]
        assert attributes["roles"] == b"key,value,seqlens_k,total_sequence_length,past_cache"
        assert attributes["cache"] == b"packed"
        assert {name: attributes[name] for name in CACHE} == CACHE
        assert list(node.output) == [f"y{layer}", "", "", f"present.{layer}.cache"]


def test_the_metadata_describe_the_caches(tmp_path: Path) -> None:
    model, _ = convert(attention(), tmp_path, **CACHE)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    caches = [PackedCache(**entry) for entry in json.loads(properties["sparamx.caches"])]
    assert caches == [
        PackedCache(f"past.{layer}.cache", f"present.{layer}.cache", KV_HEADS, SIZE, SIZE, **CACHE)
        for layer in range(2)
    ]
    record = json.loads(properties["sparamx.options"])
    assert {name: record[name] for name in CACHE} == CACHE
    assert record["attention"] == "packed"


def test_the_converted_model_computes_what_the_original_does(tmp_path: Path) -> None:
    original = attention()
    model, _ = convert(original, tmp_path, k_sparsity=0, v_sparsity=0)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((2, 5, n * SIZE), np.float32) for name, n in (("q", 4), ("k", 2), ("v", 2))}
    feeds |= {"lengths": np.full(2, 4, np.int32), "total": np.array(5, np.int32)}
    empty = {name: np.zeros((2, KV_HEADS, 0, SIZE), np.float32) for name in names(original.graph.input)[5:]}
    expected = sparamx_onnx.InferenceSession(original.SerializeToString()).run(["y0", "y1"], {**feeds, **empty})
    nothing = {name: np.zeros((2, KV_HEADS, 0), np.uint8) for name in names(model.graph.input)[5:]}
    result = sparamx_onnx.InferenceSession(tmp_path / "out.onnx").run(["y0", "y1"], {**feeds, **nothing})
    assert np.abs(np.array(result) - np.array(expected)).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ("reads the past", "something else makes or reads its past"),
        ("makes the past", "something else makes or reads its past"),
        ("reads the present", "something else reads its present"),
    ],
)
def test_a_cache_that_something_else_touches_stays_in_floats(tmp_path: Path, extra: str, why: str) -> None:
    model, plans = convert(attention(extra=extra), tmp_path)
    assert [reason for reason, _ in plans] == ["packed", "converted"]
    assert why in plans[1][1]
    assert list(model.graph.node[-1 if extra == "makes the past" else 1].output)[1:] == [
        "present.1.key",
        "present.1.value",
    ]


def test_sizes_come_from_the_query_where_the_cache_leaves_them_open(tmp_path: Path) -> None:
    model, plans = convert(attention(layers=1, size="d"), tmp_path)
    assert plans[0][0] == "packed"
    properties = {entry.key: entry.value for entry in model.metadata_props}
    [cache] = json.loads(properties["sparamx.caches"])
    assert (cache["key_size"], cache["value_size"]) == (SIZE, SIZE)


def test_options_of_the_cache_need_a_packed_one_and_are_checked(tmp_path: Path) -> None:
    onnx.save(attention(), tmp_path / "model.onnx")
    for options, message in (
        ({"attention": "fast", "k_sparsity": 0.5}, "Only packed attention takes a k sparsity"),
        ({"recent": 5}, "Only packed attention takes a recent"),
        ({"attention": "packed", "v_sparsity": 1.0}, "from 0 to below 1"),
        ({"attention": "packed", "sink": -1}, "sink and recent tokens"),
    ):
        with pytest.raises(SparamxError, match=message):
            sparamx_onnx.convert(tmp_path / "model.onnx", tmp_path / "out.onnx", **options)


def test_caches_of_an_earlier_conversion_stay(tmp_path: Path) -> None:
    onnx.save(attention(), tmp_path / "model.onnx")
    sparamx_onnx.convert(tmp_path / "model.onnx", attention="fast")
    again = sparamx_onnx.convert(tmp_path / "model.sparse.onnx", attention="packed", dry_run=True)
    assert [node.reason.value for node in again.plan.attention] == ["already_converted"] * 2


def test_attention_without_a_cache_of_a_known_size_has_nothing_to_pack(tmp_path: Path) -> None:
    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], "mha", domain="com.microsoft", num_heads=2)
    inputs = [value(name, "b", "t", 32) for name in "qkv"]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", inputs, [value("y", "b", "t", 32)])
    _, plans = convert(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path)
    assert plans[0][0] == "converted"
    assert "no cache to pack" in plans[0][1]
    unknown = attention(layers=1, size="d")
    unknown.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "width"
    _, plans = convert(unknown, tmp_path)
    assert plans[0][0] == "converted"
    assert "does not tell the size of a head" in plans[0][1]


def test_the_text_says_which_caches_are_not_packed(tmp_path: Path) -> None:
    onnx.save(attention(extra="reads the past"), tmp_path / "model.onnx")
    line = "Attention without a packed cache: 1. Its cache is not packed: something else makes or reads its past."
    result = sparamx_onnx.convert(tmp_path / "model.onnx", attention="packed")
    assert line in conversion_text(result).splitlines()
    result = sparamx_onnx.convert(tmp_path / "model.onnx", tmp_path / "fast.onnx", attention="fast")
    assert "packed cache" not in conversion_text(result)
    again = sparamx_onnx.convert(tmp_path / "fast.onnx", attention="packed")
    assert "Attention left alone (already converted): 2." in conversion_text(again)


@pytest.mark.parametrize("mode", ["fast", "packed"])
def test_a_model_without_attention_has_none_to_replace(tmp_path: Path, mode: str) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "r")], "g", [value("x", 1)], [value("y", 1)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    sentence = f"There is no attention that --attention {mode} could replace."
    result = sparamx_onnx.convert(tmp_path / "m.onnx", attention=mode, report=tmp_path / "out.html")
    assert sentence in conversion_text(result).splitlines()
    assert sentence in (tmp_path / "out.html").read_text()
    assert "no attention" not in conversion_text(sparamx_onnx.convert(tmp_path / "m.onnx"))


def test_names_of_caches_that_are_taken(tmp_path: Path) -> None:
    model = attention(layers=1)
    model.graph.input[0].name = model.graph.node[0].input[0] = "past.0.cache"
    model, _ = convert(model, tmp_path)
    assert "past.0.cache_packed" in names(model.graph.input)


def test_metadata_of_caches_that_the_graph_lacks_are_refused(tmp_path: Path) -> None:
    model, _ = convert(attention(layers=1), tmp_path)
    model.graph.input[-1].name = model.graph.node[0].input[5] = "renamed"
    with pytest.raises(SparamxError, match=r"name past\.0\.cache, which the graph does not have"):
        packed_caches(ir.from_proto(model))


def test_a_dry_run_says_what_becomes_of_the_caches(tmp_path: Path) -> None:
    onnx.save(attention(), tmp_path / "model.onnx")
    plan = sparamx_onnx.convert(tmp_path / "model.onnx", attention="packed", dry_run=True).plan
    assert [node.reason.value for node in plan.attention] == ["packed"] * 2


def test_inspection_and_comparison_of_packed_caches(tmp_path: Path) -> None:
    model, _ = convert(attention(), tmp_path, **CACHE)
    text = inspection_text(sparamx_onnx.inspect(tmp_path / "out.onnx"))
    assert "Packed caches: 2; 25% of the keys' numbers and 50% of the values' are pruned" in text
    assert "but for the first 64 and the last 3 tokens" in text
    inputs = {value.name: np.zeros((1, 1, 64), np.float32) for value in model.graph.input[:1]}
    inputs |= {name: np.zeros((1, 1, 32), np.float32) for name in "kv"}
    inputs |= {"lengths": np.zeros(1, np.int32), "total": np.array(1, np.int32)}
    inputs |= {name: np.zeros((1, KV_HEADS, 0, SIZE), np.float32) for name in names(attention().graph.input)[5:]}
    with pytest.raises(SparamxError, match="have no input_ids to begin them with"):
        sparamx_onnx.verify(tmp_path / "model.onnx", tmp_path / "out.onnx", inputs=inputs)
    with pytest.raises(SparamxError, match="the tolerance is -1; it must be 0 or more"):
        sparamx_onnx.verify(tmp_path / "model.onnx", tmp_path / "out.onnx", tolerance=-1)


def test_a_damaged_record_of_the_conversion_is_left_out(tmp_path: Path) -> None:
    model, _ = convert(attention(), tmp_path)
    for entry in model.metadata_props:
        if entry.key == "sparamx.options":
            entry.value = "{"
    onnx.save(model, tmp_path / "damaged.onnx")
    assert list(sparamx_onnx.inspect(tmp_path / "damaged.onnx").record) == ["version"]


def test_folders_of_genai_have_no_packed_caches(tmp_path: Path) -> None:
    config = {"model": {"decoder": {"filename": "model.onnx"}}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(SparamxError, match="onnxruntime-genai has no packed caches; choose the attention fast"):
        sparamx_onnx.convert(tmp_path, attention="packed")
