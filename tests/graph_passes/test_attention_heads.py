"""What attention operators say of their inputs and of the size of a head."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from sparamx_onnx.graph_passes.attention_heads import inputs_by_role, key_size, value_size

HEADS, KV_HEADS, SIZE = 8, 2, 16


def _value(name: str, *shape: int | str | None) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape) if shape else None)


def _group_query(query: ir.Value, key: ir.Value | None, output: ir.Value) -> ir.Node:
    past = [_value(name, "b", KV_HEADS, "p", None) for name in ("past_key", "past_value")]
    inputs = [query, key, key, *past, _value("lengths", "b")]
    heads = [ir.AttrInt64("num_heads", HEADS), ir.AttrInt64("kv_num_heads", KV_HEADS)]
    return ir.Node("com.microsoft", "GroupQueryAttention", inputs, heads, outputs=[output])


@pytest.mark.parametrize("packed", [False, True])
def test_sizes_are_read_from_query_and_result(packed: bool) -> None:
    width = SIZE * (HEADS + 2 * KV_HEADS if packed else HEADS)
    key = None if packed else _value("key", "b", "s", KV_HEADS * SIZE)
    node = _group_query(_value("query", "b", "s", width), key, _value("output", "b", "s", HEADS * SIZE))
    named = {"query", "past_key", "past_value", "seqlens_k"} | (set() if packed else {"key", "value"})
    assert set(inputs_by_role(node)) == named
    assert (key_size(node), value_size(node)) == (SIZE, SIZE)


def test_a_sparse_operator_names_its_roles_and_may_have_an_axis_for_the_heads() -> None:
    inputs = [_value("q", "b", HEADS, "s", SIZE), _value("k", "b", KV_HEADS, "s", SIZE), _value("lengths", "b")]
    attributes = [ir.AttrInt64("num_heads", HEADS), ir.AttrString("roles", "key,seqlens_k")]
    node = ir.Node("com.sparamx", "SparseAMXAttention", inputs, attributes)
    assert {role: value.name for role, value in inputs_by_role(node).items()} == {
        "query": "q", "key": "k", "seqlens_k": "lengths",
    }  # fmt: skip
    assert (key_size(node), value_size(node)) == (SIZE, None)


def test_what_the_graph_does_not_tell_is_unknown() -> None:
    node = _group_query(_value("query", "b", "s", "width"), None, _value("output"))
    assert (key_size(node), value_size(node)) == (None, None)
    other = ir.Node("", "MatMul", [_value("a", 2, 4), _value("b", 4, 4)], outputs=[_value("c", 2, 4)])
    assert (inputs_by_role(other), key_size(other), value_size(other)) == ({}, None, None)
