"""Reads attention operators: what SparseAMXAttention needs to compute the same, or why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sparamx_onnx.graph_passes.attention_plan import AttentionReason
from sparamx_onnx.graph_passes.attributes import MalformedAttributeError, float_attribute, int_attribute
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder, FoldedConstant
from sparamx_onnx.graph_passes.products import MICROSOFT
from sparamx_onnx.graph_passes.repeated_heads import RANK_BY_HEAD, without_repeats
from sparamx_onnx.ops.definitions import DOMAIN, SPARSE_AMX_ATTENTION, SPARSE_AMX_MATMUL

_GROUP_QUERY_INPUTS = (
    *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"),
    *("cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink"),
)
_GROUP_QUERY_REFUSED = ("k_scale", "v_scale", "q_norm_weight", "k_norm_weight")
_MULTI_HEAD_INPUTS = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value")
_MULTI_HEAD_REFUSED = {8: "past_sequence_length", 9: "cache_indirection"}
_STANDARD_INPUTS = ("query", "key", "value", "attention_bias", "past_key", "past_value", "nonpad_kv_seqlen")

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
_STANDARD_KNOWN = frozenset(
    {
        *("is_causal", "q_num_heads", "kv_num_heads", "qk_matmul_output_mode", "scale", "softcap"),
        *("softmax_precision", "left_window_size", "right_window_size"),
    }
)

# Operators, of ONNX and of onnxruntime, whose first output has the type of the first input; and of the second.
_OF_TWO_OF_A_TYPE = frozenset({"Add", "Div", "FusedMatMul", "Gemm", "LayerNormalization", "MatMul", "Mul", "Sub"})
_OF_ONE_TYPE = _OF_TWO_OF_A_TYPE | {
    *("BiasGelu", "Concat", "Expand", "FastGelu", "Flatten", "Gather", "Gelu", "Identity", "Relu", "Reshape"),
    *("RMSNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", "Slice", "Softmax", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
_LONGEST_WAY_TO_TYPE = 16

_MOST_OUTPUTS = 3
_HEADS_AXIS = 1  # of RANK_BY_HEAD dimensions
_RANK_SIDE_BY_SIDE = 5

# Relatives that are listed as left alone.
_OTHERS = frozenset(
    {
        *((MICROSOFT, name) for name in ("Attention", "QAttention", "DecoderAttention", "LongformerAttention")),
        *((MICROSOFT, name) for name in ("PackedAttention", "PackedMultiHeadAttention", "SparseAttention")),
        *((MICROSOFT, name) for name in ("DecoderMaskedMultiHeadAttention", "PagedAttention")),
    }
)


@dataclass(frozen=True)
class Refusal:
    """Why a node stays as it is."""

    reason: AttentionReason
    detail: str = ""


@dataclass(frozen=True)
class Replacement:
    """What to write.

    Attributes:
        inputs: Of the node, by role, in order; the query first.
        attributes: Of the node.
        before: Nodes that come before it.
    """

    inputs: Mapping[str, ir.Value]
    attributes: Sequence[ir.Attr]
    before: Sequence[ir.Node] = ()


def read_operator(node: ir.Node, folder: ConstantFolder) -> Replacement | Refusal | None:
    """What becomes of a node; None for one that is no attention operator.

    Rules:

    1. GroupQueryAttention of com.microsoft becomes one SparseAMXAttention with the same inputs in the same order, those
       that are not there left out. Without do_rotary, the inputs of rotation are left out.
    2. It stays where its cache is quantized, where query and key are normalized in it, where it has an output of scores
       or a cache that moves on within a window, where it is not causal, and where its window is empty.
    3. MultiHeadAttention of com.microsoft becomes one, too, in all its layouts, where there is no shared buffer with a
       length of its own and no beam search in it. A bias must be constant; it becomes additions before the node. With
       ``unidirectional``, query and key must have equally many tokens. A mask of one dimension must have one number for
       each entry of the batch.
    4. Attention of ONNX's own operators becomes one, too. With four dimensions, the numbers of heads must be known, and
       heads of keys and values that are repeated for the queries are taken before that. It stays where the scores are
       an output, where softmax is asked for in a precision of its own, and where it has a window and is not causal.
    """
    if (node.domain, node.op_type) == (DOMAIN, SPARSE_AMX_ATTENTION.name):
        return Refusal(AttentionReason.ALREADY_CONVERTED)
    if (node.domain, node.op_type) in _OTHERS:
        return Refusal(AttentionReason.UNSUPPORTED_OPERATOR)
    readers: Mapping[tuple[str, str], Callable[[ir.Node], Replacement | Refusal]] = {
        (MICROSOFT, "GroupQueryAttention"): _read_group_query,
        (MICROSOFT, "MultiHeadAttention"): lambda node: _read_multi_head(node, folder),
        ("", "Attention"): _read_standard,
    }
    reader = readers.get((node.domain, node.op_type))
    if reader is None:
        return None
    try:
        return _common_refusal(node) or reader(node)
    except MalformedAttributeError as error:
        return Refusal(AttentionReason.MALFORMED_NODE, str(error))


def _common_refusal(node: ir.Node) -> Refusal | None:
    """What no attention operator may have."""
    if not node.inputs or node.inputs[0] is None or not node.outputs or not node.outputs[0].name:
        return Refusal(AttentionReason.MALFORMED_NODE)
    named = [bool(output.name) for output in node.outputs]
    if any(named[_MOST_OUTPUTS:]):
        return Refusal(AttentionReason.UNSUPPORTED_OUTPUT, f"It is {node.outputs[_MOST_OUTPUTS].name}.")
    if len(named) > 1 and named[1] != (len(named) > _MOST_OUTPUTS - 1 and named[2]):
        return Refusal(AttentionReason.UNSUPPORTED_OUTPUT, "It has one of present_key and present_value only.")
    for output in node.outputs:
        if output.name and output.dtype not in (None, ir.DataType.UNDEFINED, ir.DataType.FLOAT):
            return Refusal(AttentionReason.UNSUPPORTED_DTYPE, f"{output.name} is {output.dtype.name}.")
    return None


def _inputs_by_role(node: ir.Node, roles: Sequence[str | None]) -> dict[str, ir.Value]:
    return {
        role: value
        for role, value in zip(roles, node.inputs, strict=False)
        if role is not None and value is not None and value.name
    }


def _wrong_type(inputs: Mapping[str, ir.Value]) -> Refusal | None:
    """Types that are not known are taken for float32, as with linear layers: ONNX Runtime will say if they are not."""
    for role in ("query", "key", "value", "past_key", "past_value", "attention_bias", "cos_cache", "head_sink", "bias"):
        dtype = _type_of(inputs[role]) if role in inputs else None
        if dtype is ir.DataType.BOOL and role == "attention_bias":
            continue
        if dtype not in (None, ir.DataType.FLOAT):
            return Refusal(AttentionReason.UNSUPPORTED_DTYPE, f"{role} is {dtype.name}.")
    return None


def _type_of(value: ir.Value) -> ir.DataType | None:
    """The type of a value, by what it is made of where the model does not record it; None where that does not tell."""
    for _ in range(_LONGEST_WAY_TO_TYPE):
        node = value.producer()
        if value.dtype not in (None, ir.DataType.UNDEFINED) or node is None or not node.inputs:
            return value.dtype
        if (node.domain, node.op_type) == ("", "Cast"):
            to = int_attribute(node, "to", ir.DataType.UNDEFINED)
            return ir.DataType(to) if to in ir.DataType.__members__.values() else None
        if node.op_type not in _OF_ONE_TYPE:
            return None
        first = node.inputs[0]
        weight = node.inputs[1] if len(node.inputs) > 1 and node.op_type in _OF_TWO_OF_A_TYPE else None
        if first is None:
            return None
        value = first if weight is None or weight.dtype is None else weight
    return None


def _missing_half(inputs: Mapping[str, ir.Value], *pairs: tuple[str, str]) -> Refusal | None:
    for first, second in pairs:
        if (first in inputs) != (second in inputs):
            return Refusal(AttentionReason.MALFORMED_NODE, f"It has one of {first} and {second} only.")
    return None


def _read_group_query(node: ir.Node) -> Replacement | Refusal:
    for role, value in zip(_GROUP_QUERY_REFUSED, node.inputs[len(_GROUP_QUERY_INPUTS) :], strict=False):
        if value is not None and value.name:
            return Refusal(AttentionReason.UNSUPPORTED_INPUT, f"It is {role}.")
    inputs = _inputs_by_role(node, _GROUP_QUERY_INPUTS)
    refusal = _wrong_type(inputs) or _missing_half(inputs, ("key", "value"), ("past_key", "past_value"))
    if refusal is not None:
        return refusal
    for attribute in node.attributes.values():
        fixed = _GROUP_QUERY_FIXED.get(attribute.name)
        if fixed is not None and attribute.value != fixed:
            return Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It has {attribute.name} = {attribute.value}.")
        if fixed is None and attribute.name not in _GROUP_QUERY_IGNORED | _GROUP_QUERY_KEPT:
            return Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It is {attribute.name}.")
    window = int_attribute(node, "local_window_size", -1)
    if window == 0 or window < -1:
        return Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It has local_window_size = {window}.")
    heads, kv_heads = int_attribute(node, "num_heads", 0), int_attribute(node, "kv_num_heads", 0)
    if heads < 1 or kv_heads < 1 or heads % kv_heads or not {"seqlens_k", "total_sequence_length"} <= inputs.keys():
        return Refusal(AttentionReason.MALFORMED_NODE)
    rotates = bool(int_attribute(node, "do_rotary", 0))
    if rotates and not {"cos_cache", "sin_cache"} <= inputs.keys():
        return Refusal(AttentionReason.MALFORMED_NODE, "It rotates without cos_cache and sin_cache.")
    kept = {role: value for role, value in inputs.items() if rotates or role not in _ROTARY}
    attributes = [a for a in node.attributes.values() if a.name in _GROUP_QUERY_KEPT]
    if int_attribute(node, "smooth_softmax", 0) != 1:  # its default is -1, and ours 0
        attributes = [a for a in attributes if a.name != "smooth_softmax"]
    return Replacement(kept, attributes)


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _length(value: ir.Value, axis: int) -> int | str | None:
    """The length of a dimension: a number, a name, or None where it is not known."""
    if value.shape is None or axis >= len(value.shape):
        return None
    length = value.shape[axis]
    return length.value if isinstance(length, ir.SymbolicDim) else length


def _read_multi_head(node: ir.Node, folder: ConstantFolder) -> Replacement | Refusal:
    for index, role in _MULTI_HEAD_REFUSED.items():
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and value.name:
            return Refusal(AttentionReason.UNSUPPORTED_INPUT, f"It is {role}.")
    for attribute in node.attributes.values():
        if attribute.name not in _MULTI_HEAD_KEPT | {"unidirectional"}:
            return Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It is {attribute.name}.")
    inputs = _inputs_by_role(node, _MULTI_HEAD_INPUTS)
    heads, causal = int_attribute(node, "num_heads", 0), int_attribute(node, "unidirectional", 0) != 0
    if heads < 1 or ("value" in inputs and "key" not in inputs):
        return Refusal(AttentionReason.MALFORMED_NODE)
    refusal = (
        _wrong_type(inputs) or _missing_half(inputs, ("past_key", "past_value")) or _wrong_mask(inputs)
        or _wrong_layout(inputs)
    )  # fmt: skip
    if refusal is not None:
        return refusal
    if causal and "key" in inputs and not _equally_many_tokens(inputs["query"], inputs["key"]):
        return Refusal(AttentionReason.UNKNOWN_SHAPE, "It is unidirectional.")
    before: list[ir.Node] = []
    if "bias" in inputs:
        added = _add_bias(inputs, folder)
        if isinstance(added, Refusal):
            return added
        before = added
    attributes = [a for a in node.attributes.values() if a.name in _MULTI_HEAD_KEPT]
    attributes += [ir.AttrInt64("kv_num_heads", heads), ir.AttrInt64("causal", int(causal))]
    return Replacement({role: value for role, value in inputs.items() if role != "bias"}, attributes, before)


def _wrong_layout(inputs: Mapping[str, ir.Value]) -> Refusal | None:
    """Query, key and value are told apart when the model runs; but here, they decide what the other inputs mean."""
    if "key" not in inputs and _rank(inputs["query"]) != _RANK_SIDE_BY_SIDE:
        known = _rank(inputs["query"]) is not None
        reason = AttentionReason.UNSUPPORTED_INPUT if known else AttentionReason.UNKNOWN_SHAPE
        return Refusal(reason, "Query, key and value are one tensor.")
    return None


def _wrong_mask(inputs: Mapping[str, ir.Value]) -> Refusal | None:
    if "key_padding_mask" not in inputs:
        return None
    mask = inputs["key_padding_mask"]
    rank = _rank(mask)
    if rank is None:
        return Refusal(AttentionReason.UNKNOWN_SHAPE, "It is that of key_padding_mask.")
    if rank == 1 and (_length(mask, 0) is None or _length(mask, 0) != _length(inputs["query"], 0)):
        return Refusal(AttentionReason.UNKNOWN_SHAPE, "Its mask of one dimension may have more numbers than entries.")
    return None


def _add_bias(inputs: dict[str, ir.Value], folder: ConstantFolder) -> list[ir.Node] | Refusal:
    """Replaces query, key and value by what they are with the bias added to them."""
    bias = folder.fold(inputs["bias"])
    if not isinstance(bias, FoldedConstant) or len(bias.shape) != 1:
        return Refusal(AttentionReason.UNSUPPORTED_INPUT, "Its bias is not constant.")
    ranks: dict[str, int | None] = {role: _rank(inputs[role]) for role in ("query", "key", "value") if role in inputs}
    width = _length(inputs["query"], 2)
    if None in ranks.values() or not isinstance(width, int):
        return Refusal(AttentionReason.UNKNOWN_SHAPE, "It has a bias.")
    if _RANK_SIDE_BY_SIDE in ranks.values():
        return Refusal(AttentionReason.UNSUPPORTED_INPUT, "It is a bias for heads that are side by side.")
    if bias.shape[0] < 2 * width:
        return Refusal(AttentionReason.MALFORMED_NODE, "Its bias is too short.")
    nodes = []
    for role, numbers in zip(("query", "key", "value"), np.split(bias.numpy(), [width, 2 * width]), strict=True):
        # Keys and values that are there by head have been made elsewhere: ONNX Runtime adds nothing to them.
        if ranks[role] == RANK_BY_HEAD or not numbers.any():
            continue
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(np.ascontiguousarray(numbers)))])
        add = ir.Node("", "Add", [inputs[role], constant.outputs[0]])
        inputs[role] = add.outputs[0]
        nodes += [constant, add]
    return nodes


def _equally_many_tokens(query: ir.Value, key: ir.Value) -> bool:
    length = _length(query, 1)
    if length is not None and length == _length(key, 1):
        return _rank(query) == _rank(key)
    return _tokens_of(query) is _tokens_of(key)


def _tokens_of(value: ir.Value) -> ir.Value:
    """The value behind linear layers and splits of their outputs, whose tokens are the same."""
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        is_split = (node.domain, node.op_type) == ("", "Split") and int_attribute(node, "axis", 0) in (2, -1)
        is_product = (node.domain, node.op_type) == (DOMAIN, SPARSE_AMX_MATMUL.name) or (
            (node.domain, node.op_type) == ("", "MatMul")
            and _is_constant(node.inputs[-1])
            and _rank(node.inputs[-1]) == 2
        )
        # A constant of more dimensions, such as positions, may have more tokens.
        is_bias = (
            (node.domain, node.op_type) == ("", "Add")
            and _is_constant(node.inputs[-1])
            and _rank(node.inputs[-1]) in (0, 1)
        )
        if not (is_split or is_product or is_bias):
            break
        value = node.inputs[0]
    return value


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _read_standard(node: ir.Node) -> Replacement | Refusal:
    inputs = _inputs_by_role(node, _STANDARD_INPUTS)
    for attribute in node.attributes.values():
        if attribute.name not in _STANDARD_KNOWN:
            return Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It is {attribute.name}.")
    if not {"query", "key", "value"} <= inputs.keys():
        return Refusal(AttentionReason.MALFORMED_NODE)
    refusal = _wrong_type(inputs) or _missing_half(inputs, ("past_key", "past_value")) or _wrong_cache(node, inputs)
    if refusal is not None:
        return refusal
    causal = int_attribute(node, "is_causal", 0) != 0
    scale, softcap = float_attribute(node, "scale", None), float_attribute(node, "softcap", 0.0)
    left, right = int_attribute(node, "left_window_size", -1), int_attribute(node, "right_window_size", -1)
    precision = int_attribute(node, "softmax_precision", ir.DataType.FLOAT)
    for name, wrong in {
        "softmax_precision": precision != ir.DataType.FLOAT,
        "scale": scale == 0,
        "softcap": softcap < 0,
        "left_window_size": left >= 0 and not causal,
        "right_window_size": right >= 0 and not causal,
    }.items():
        if wrong:
            return Refusal(AttentionReason.UNSUPPORTED_ATTRIBUTES, f"It is {name}.")
    if _rank(inputs["key"]) == RANK_BY_HEAD and "past_key" not in inputs and not any(o.name for o in node.outputs[1:]):
        inputs["key"], inputs["value"] = without_repeats(inputs["key"], inputs["value"])
    heads = _heads_of(node, "q_num_heads", inputs["query"])
    kv_heads = _heads_of(node, "kv_num_heads", inputs["key"])
    if heads is None or kv_heads is None:
        return Refusal(AttentionReason.UNKNOWN_SHAPE, "It is the number of heads.")
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        return Refusal(AttentionReason.MALFORMED_NODE)
    attributes = [
        ir.AttrInt64("num_heads", heads),
        ir.AttrInt64("kv_num_heads", kv_heads),
        ir.AttrInt64("causal", int(causal)),
        ir.AttrFloat32("scale", scale or 0.0),
        ir.AttrFloat32("softcap", softcap),
        # Of the keys up to the query's own, which counts here and not there.
        ir.AttrInt64("local_window_size", left + 1 if left >= 0 else -1),
    ]
    return Replacement(inputs, attributes)


def _wrong_cache(node: ir.Node, inputs: Mapping[str, ir.Value]) -> Refusal | None:
    if "nonpad_kv_seqlen" not in inputs:
        return None
    if "past_key" in inputs:
        return Refusal(AttentionReason.MALFORMED_NODE, "It has past_key and nonpad_kv_seqlen.")
    if any(output.name for output in node.outputs[1:]):
        return Refusal(AttentionReason.UNSUPPORTED_OUTPUT, "It has present_key and nonpad_kv_seqlen.")
    return None


def _heads_of(node: ir.Node, attribute: str, value: ir.Value) -> int | None:
    if _rank(value) == RANK_BY_HEAD:
        heads = _length(value, _HEADS_AXIS)
        return heads if isinstance(heads, int) else None
    return int_attribute(node, attribute, None)
