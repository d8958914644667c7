"""What attention operators over a cache say of their inputs and of the size of a head."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sparamx_onnx.graph_passes.attributes import int_attribute, string_attribute
from sparamx_onnx.graph_passes.products import MICROSOFT
from sparamx_onnx.ops.definitions import DOMAIN, SPARSE_AMX_ATTENTION

_GROUP_QUERY_ROLES = ("query", "key", "value", "past_key", "past_value", "seqlens_k")

# Dimensions of a tensor whose heads lie side by side; with one more, every head has an axis.
_SIDE_BY_SIDE = 3


def inputs_by_role(node: ir.Node) -> dict[str, ir.Value]:
    """The inputs of SparseAMXAttention or GroupQueryAttention by role, the query first; empty for other operators."""
    roles: Sequence[str] = ()
    if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention"):
        roles = _GROUP_QUERY_ROLES
    elif (node.domain, node.op_type) == (DOMAIN, SPARSE_AMX_ATTENTION.name):
        roles = ("query", *string_attribute(node, "roles", "").split(","))
    return {role: value for role, value in zip(roles, node.inputs, strict=False) if value is not None}


def key_size(node: ir.Node) -> int | None:
    """Numbers of a key, by the last dimension of the query; None where the graph does not tell it."""
    inputs = inputs_by_role(node)
    extra = 0 if "key" in inputs else int_attribute(node, "kv_num_heads", 0)
    return _size_of_head(node, inputs.get("query"), 2 * extra)


def value_size(node: ir.Node) -> int | None:
    """Numbers of a value, by the last dimension of the result, of any operator with ``num_heads``; None likewise."""
    return _size_of_head(node, node.outputs[0], 0)


def last_dimension(value: ir.Value | None) -> int | None:
    """The last dimension, where it is known."""
    size = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


def _size_of_head(node: ir.Node, value: ir.Value | None, more_heads: int) -> int | None:
    width, heads = last_dimension(value), int_attribute(node, "num_heads", None)
    if value is None or value.shape is None or width is None or heads is None:
        return None
    return width // max(1, heads + more_heads) if len(value.shape) == _SIDE_BY_SIDE else width
