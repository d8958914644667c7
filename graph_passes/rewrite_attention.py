"""Replaces attention operators over a float cache by SparseAMXAttention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from sparamx_onnx.graph_passes.attention_plan import AttentionPlan, AttentionReason
from sparamx_onnx.graph_passes.plan import Action
from sparamx_onnx.graph_passes.products import MICROSOFT
from sparamx_onnx.ops.definitions import DOMAIN, DOMAIN_VERSION, SPARSE_AMX_ATTENTION

_GROUP_QUERY_INPUTS = (
    *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"),
    *("cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink"),
)
_GROUP_QUERY_REFUSED = ("k_scale", "v_scale", "q_norm_weight", "k_norm_weight")
_MULTI_HEAD_INPUTS = ("query", "key", "value", None, "key_padding_mask", "attention_bias", "past_key", "past_value")
_MULTI_HEAD_REFUSED = {3: "bias", 8: "past_sequence_length", 9: "cache_indirection"}

# Inputs that only rotation reads.
_ROTARY = ("cos_cache", "sin_cache", "position_ids")

# Attributes of GroupQueryAttention whose only supported value is this one.
_GROUP_QUERY_FIXED: Mapping[str, int | str] = {
    "causal": 1,
    "qk_output": 0,
    "sliding_window_cache": 0,
    "k_quant_type": "NONE",
    "v_quant_type": "NONE",
}
_GROUP_QUERY_IGNORED = frozenset({"kv_cache_bit_width", "qk_norm_epsilon", "do_rotary"})
_GROUP_QUERY_KEPT = frozenset(
    {"num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "rotary_interleaved", "smooth_softmax"}
)
_MULTI_HEAD_KEPT = frozenset({"num_heads", "scale", "mask_filter_value"})

_MOST_OUTPUTS = 3

# Relatives that are listed as left alone.
_OTHERS = frozenset(
    {
        *((MICROSOFT, name) for name in ("Attention", "QAttention", "DecoderAttention", "LongformerAttention")),
        *((MICROSOFT, name) for name in ("PackedAttention", "PackedMultiHeadAttention", "SparseAttention")),
        *((MICROSOFT, name) for name in ("DecoderMaskedMultiHeadAttention", "PagedAttention")),
        ("", "Attention"),
    }
)


@dataclass(frozen=True)
class _Refusal:
    """Why a node stays as it is."""

    reason: AttentionReason
    detail: str = ""


@dataclass(frozen=True)
class _Replacement:
    """Inputs by role, in order, and attributes of the node to write."""

    inputs: Mapping[str, ir.Value]
    attributes: Sequence[ir.Attr]


class RewriteAttentionPass(ir.passes.InPlacePass):
    """Replaces attention operators, and plans every one of them.

    Rules:

    1. GroupQueryAttention of com.microsoft becomes one SparseAMXAttention with the same inputs in the same order, those
       that are not there left out. Without do_rotary, the inputs of rotation are left out.
    2. It stays where its cache is quantized, where query and key are normalized in it, where it has an output of scores
       or a cache that moves on within a window, where it is not causal, and where its window is empty.
    3. MultiHeadAttention of com.microsoft becomes one, too, where query, key and value have three dimensions and there
       is no bias, no shared buffer with a length of its own and no beam search in it. A mask has two dimensions. With
       ``unidirectional``, query and key must have equally many tokens.
    4. Other attention operators stay.
    5. The node keeps its name, documentation and metadata; its outputs keep their names, types and shapes.
    6. The operators' domain is imported when a node has been replaced; nothing else of the model is touched.
    """

    def __init__(self, *, fast: bool, exclude: Sequence[str] = ()) -> None:
        """What to do.

        Args:
            fast: Replace what can be replaced; without it only ``plans`` are made.
            exclude: Regular expressions; nodes in whose name one of them is found stay.
        """
        super().__init__()
        self._fast = fast
        self._exclude = [re.compile(pattern) for pattern in exclude]
        self.plans: list[AttentionPlan] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the model in place."""
        modified = False
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            found = _read(node)
            if found is None:
                continue
            name = node.name or ""
            excluded = next((pattern.pattern for pattern in self._exclude if pattern.search(name)), None)
            if isinstance(found, _Replacement) and excluded is not None:
                found = _Refusal(AttentionReason.EXCLUDED_BY_USER, f"It is {excluded}.")
            if isinstance(found, _Replacement) and not self._fast:
                found = _Refusal(AttentionReason.NOT_ASKED_FOR)
            if isinstance(found, _Refusal):
                self.plans.append(AttentionPlan(name, node.op_type, Action.LEFT_ALONE, found.reason, found.detail))
                continue
            self.plans.append(AttentionPlan(name, node.op_type, Action.CONVERTED, AttentionReason.CONVERTED))
            _replace(node, found)
            modified = True
        if modified:
            model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
        return ir.passes.PassResult(model, modified=modified)


def _read(node: ir.Node) -> _Replacement | _Refusal | None:
    """What becomes of a node; None for one that is no attention operator."""
    if (node.domain, node.op_type) == (DOMAIN, SPARSE_AMX_ATTENTION.name):
        return _Refusal(AttentionReason.ALREADY_CONVERTED)
    if (node.domain, node.op_type) in _OTHERS:
        return _Refusal(AttentionReason.UNSUPPORTED_OPERATOR)
    readers: Mapping[str, Callable[[ir.Node], _Replacement | _Refusal]] = {
        "GroupQueryAttention": _read_group_query,
        "MultiHeadAttention": _read_multi_head,
    }
    if node.domain != MICROSOFT or node.op_type not in readers:
        return None
    return _common_refusal(node) or readers[node.op_type](node)


def _common_refusal(node: ir.Node) -> _Refusal | None:
    """What no attention operator may have."""
    if not node.inputs or node.inputs[0] is None or not node.outputs or not node.outputs[0].name:
        return _Refusal(AttentionReason.MALFORMED_NODE)
    named = [bool(output.name) for output in node.outputs]
    if any(named[_MOST_OUTPUTS:]):
        return _Refusal(AttentionReason.UNSUPPORTED_OUTPUT, f"It is {node.outputs[_MOST_OUTPUTS].name}.")
    if len(named) > 1 and named[1] != (len(named) > _MOST_OUTPUTS - 1 and named[2]):
        return _Refusal(AttentionReason.UNSUPPORTED_OUTPUT, "It has one of present_key and present_value only.")
    for attribute in node.attributes.values():
        if attribute.is_ref():
            return _Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It is {attribute.name}, of a function.")
    return None


def _inputs_by_role(node: ir.Node, roles: Sequence[str | None]) -> dict[str, ir.Value]:
    return {
        role: value
        for role, value in zip(roles, node.inputs, strict=False)
        if role is not None and value is not None and value.name
    }


def _wrong_type(inputs: Mapping[str, ir.Value]) -> _Refusal | None:
    """Types that are not known are taken for float32, as with linear layers: ONNX Runtime will say if they are not."""
    for role in ("query", "key", "value", "past_key", "past_value", "attention_bias", "cos_cache", "head_sink"):
        dtype = inputs[role].dtype if role in inputs else None
        if dtype not in (None, ir.DataType.FLOAT):
            return _Refusal(AttentionReason.UNSUPPORTED_DTYPE, f"{role} is {dtype.name}.")
    return None


def _missing_half(inputs: Mapping[str, ir.Value], *pairs: tuple[str, str]) -> _Refusal | None:
    for first, second in pairs:
        if (first in inputs) != (second in inputs):
            return _Refusal(AttentionReason.MALFORMED_NODE, f"It has one of {first} and {second} only.")
    return None


def _heads(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None and attribute.type == ir.AttributeType.INT else 0


def _read_group_query(node: ir.Node) -> _Replacement | _Refusal:
    for role, value in zip(_GROUP_QUERY_REFUSED, node.inputs[len(_GROUP_QUERY_INPUTS) :], strict=False):
        if value is not None and value.name:
            return _Refusal(AttentionReason.UNSUPPORTED_INPUT, f"It is {role}.")
    inputs = _inputs_by_role(node, _GROUP_QUERY_INPUTS)
    refusal = _wrong_type(inputs) or _missing_half(inputs, ("key", "value"), ("past_key", "past_value"))
    if refusal is not None:
        return refusal
    for attribute in node.attributes.values():
        fixed = _GROUP_QUERY_FIXED.get(attribute.name)
        if fixed is not None and attribute.value != fixed:
            return _Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It has {attribute.name} = {attribute.value}.")
        if fixed is None and attribute.name not in _GROUP_QUERY_IGNORED | _GROUP_QUERY_KEPT:
            return _Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It is {attribute.name}.")
    window = node.attributes.get("local_window_size")
    if window is not None and (window.as_int() == 0 or window.as_int() < -1):
        return _Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It has local_window_size = {window.as_int()}.")
    heads, kv_heads = _heads(node, "num_heads"), _heads(node, "kv_num_heads")
    if heads < 1 or kv_heads < 1 or heads % kv_heads or not {"seqlens_k", "total_sequence_length"} <= inputs.keys():
        return _Refusal(AttentionReason.MALFORMED_NODE)
    rotates = bool(_heads(node, "do_rotary"))
    if rotates and not {"cos_cache", "sin_cache"} <= inputs.keys():
        return _Refusal(AttentionReason.MALFORMED_NODE, "It rotates without cos_cache and sin_cache.")
    kept = {role: value for role, value in inputs.items() if rotates or role not in _ROTARY}
    return _Replacement(kept, [a for a in node.attributes.values() if a.name in _GROUP_QUERY_KEPT])


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _read_multi_head(node: ir.Node) -> _Replacement | _Refusal:
    for index, role in _MULTI_HEAD_REFUSED.items():
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.name:
            return _Refusal(AttentionReason.UNSUPPORTED_INPUT, f"It is {role}.")
    inputs = _inputs_by_role(node, _MULTI_HEAD_INPUTS)
    if "key" not in inputs or "value" not in inputs:
        return _Refusal(AttentionReason.UNSUPPORTED_INPUT, "Query, key and value are one tensor.")
    refusal = _wrong_type(inputs) or _missing_half(inputs, ("past_key", "past_value")) or _wrong_ranks(inputs)
    if refusal is not None:
        return refusal
    heads = _heads(node, "num_heads")
    if heads < 1:
        return _Refusal(AttentionReason.MALFORMED_NODE)
    causal = _heads(node, "unidirectional") != 0
    if causal and not _equally_many_tokens(inputs["query"], inputs["key"]):
        return _Refusal(AttentionReason.UNKNOWN_SHAPE, "It is unidirectional.")
    for attribute in node.attributes.values():
        if attribute.name not in _MULTI_HEAD_KEPT | {"unidirectional"}:
            return _Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It is {attribute.name}.")
    attributes = [a for a in node.attributes.values() if a.name in _MULTI_HEAD_KEPT]
    attributes += [ir.AttrInt64("kv_num_heads", heads), ir.AttrInt64("causal", int(causal))]
    return _Replacement(inputs, attributes)


def _wrong_ranks(inputs: Mapping[str, ir.Value]) -> _Refusal | None:
    ranks = {"query": 3, "key": 3, "value": 3, "key_padding_mask": 2}
    for role, wanted in ranks.items():
        rank = _rank(inputs[role]) if role in inputs else wanted
        if rank is None:
            return _Refusal(AttentionReason.UNKNOWN_SHAPE, f"It is that of {role}.")
        if rank != wanted:
            return _Refusal(AttentionReason.UNSUPPORTED_INPUT, f"{role} has {rank} dimensions.")
    return None


def _equally_many_tokens(query: ir.Value, key: ir.Value) -> bool:
    assert query.shape is not None
    assert key.shape is not None
    tokens = (query.shape[1], key.shape[1])
    known = [size.value if isinstance(size, ir.SymbolicDim) else size for size in tokens]
    return known[0] is not None and known[0] == known[1]


def _replace(node: ir.Node, replacement: _Replacement) -> None:
    graph = node.graph
    assert graph is not None
    outputs = [output for output in node.outputs if output.name]
    roles = [role for role in replacement.inputs if role != "query"]
    new = ir.Node(
        DOMAIN,
        SPARSE_AMX_ATTENTION.name,
        [replacement.inputs["query"], *(replacement.inputs[role] for role in roles)],
        [*replacement.attributes, ir.AttrString("roles", ",".join(roles))],
        num_outputs=len(outputs),
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    for old, output in zip(outputs, new.outputs, strict=True):
        output.doc_string = old.doc_string
        output.metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], outputs, new.outputs)
