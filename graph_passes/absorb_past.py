"""Lets SparseAMXAttention put new keys and values behind past ones, where a Concat does."""

from __future__ import annotations

import onnx_ir as ir

from sparamx_onnx.graph_passes.attributes import int_attribute
from sparamx_onnx.graph_passes.repeated_heads import RANK_BY_HEAD, known_shape

_TOKENS_AXIS = 2  # of [batch, heads, tokens, size]


def absorb_past(node: ir.Node) -> None:
    """Replaces a SparseAMXAttention without a past by one that has the inputs of the Concats before it.

    Rules:

    1. Key and value must each come from a Concat of their own, of two along the tokens, by head, with pasts of the same
       length.
    2. The results must be outputs of the graph, which the node's presents then are, and nothing else may read them.
    3. The node must not be causal: what a query sees would depend on the past.
    """
    graph = node.graph
    assert graph is not None
    roles = node.attributes["roles"].as_string().split(",")
    inputs = dict(zip(roles, node.inputs[1:], strict=True)) if len(node.inputs) > 1 else {}
    if int_attribute(node, "causal", 1) or {"past_key", "nonpad_kv_seqlen", "seqlens_k"} & inputs.keys():
        return
    key, value = (_concat(inputs.get(role), node) for role in ("key", "value"))
    if key is None or value is None or key is value:  # one tensor cannot be both presents
        return
    if _past_length(key) is None or _past_length(key) != _past_length(value):
        return
    replaced = {"key": key.inputs[1], "value": value.inputs[1]}
    inputs = {role: replaced.get(role, one) for role, one in inputs.items()}
    inputs |= {"past_key": key.inputs[0], "past_value": value.inputs[0]}
    attributes = [a for a in node.attributes.values() if a.name != "roles"]
    new = ir.Node(
        node.domain,
        node.op_type,
        [node.inputs[0], *inputs.values()],
        [*attributes, ir.AttrString("roles", ",".join(inputs))],
        num_outputs=3,
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    old = [node.outputs[0], key.outputs[0], value.outputs[0]]
    for before, after in zip(old, new.outputs, strict=True):
        after.doc_string = before.doc_string
        after.metadata_props.update(before.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node, key, value], [new], old, new.outputs)


def _concat(value: ir.Value | None, reader: ir.Node) -> ir.Node | None:
    """The Concat of a past and new keys or values that only one node reads, and the graph's caller."""
    node = None if value is None else value.producer()
    if value is None or node is None or (node.domain, node.op_type) != ("", "Concat") or len(node.inputs) != 2:
        return None
    is_along_tokens = int_attribute(node, "axis", 0) in (_TOKENS_AXIS, _TOKENS_AXIS - RANK_BY_HEAD)
    is_ours = value.is_graph_output() and all(user is reader for user, _ in value.uses()) and node.graph is reader.graph
    shapes = [known_shape(one) for one in node.inputs]
    return (
        node if is_along_tokens and is_ours and all(s is not None and len(s) == RANK_BY_HEAD for s in shapes) else None
    )


def _past_length(concat: ir.Node) -> int | str | None:
    shape = known_shape(concat.inputs[0])
    return None if shape is None else shape[_TOKENS_AXIS]
