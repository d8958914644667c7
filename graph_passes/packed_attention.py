"""Reads com.microsoft Attention, whose one weight makes queries, keys and values, as a product and the rest of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparamx_onnx.graph_passes.attributes import int_attribute, ints_attribute
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder
from sparamx_onnx.graph_passes.plan import Reason
from sparamx_onnx.graph_passes.products import (
    MICROSOFT,
    Bias,
    Product,
    RefusedError,
    constant_vector,
    read_operands,
)

# From this version of ONNX's operators on, the sizes of a Split are an input.
_SPLIT_SIZES_ARE_INPUT = 13

# What MultiHeadAttention has under the same names, with the same meaning.
_COMMON_ATTRIBUTES = ("num_heads", "mask_filter_value", "scale", "unidirectional")


def read_attention(node: ir.Node, folder: ConstantFolder) -> Product:
    """The product with the packed weight [K, Nq + Nk + Nv], and behind it Split and MultiHeadAttention.

    Attention with a cache, with rotary embedding, with a bias that is no constant, or with a mask that has several
    numbers for each entry is refused.
    """
    if len(node.outputs) != 1:
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "It has a cache.")
    x, weight = read_operands(node, folder)
    mask, past, added, past_length = (node.inputs[i] if i < len(node.inputs) else None for i in (3, 4, 5, 6))
    if past is not None or past_length is not None:
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "It has a cache.", weight)
    if int_attribute(node, "do_rotary", 0):
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "It has do_rotary = 1.", weight)
    if not _has_one_number_per_entry(mask, x):
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "Its mask may have several numbers for an entry.", weight)
    if len(weight.shape) != 2:
        return Product((node,), x, weight, output=node.outputs[0])
    n = weight.shape[1]
    sizes = ints_attribute(node, "qkv_hidden_sizes", (n // 3,) * 3)
    if len(sizes) != 3 or sum(sizes) != n or sizes[0] != sizes[1]:
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, f"Its weight has {n} columns for {list(sizes)}.", weight)
    bias = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        constant = constant_vector(node.inputs[2], n, folder, rank=1)
        if constant is None:
            raise RefusedError(Reason.UNSUPPORTED_BIAS, weight=weight)
        bias = Bias(constant)
    attributes = [node.attributes[name] for name in _COMMON_ATTRIBUTES if name in node.attributes]

    def after(value: ir.Value) -> Sequence[ir.Node]:
        nodes = _split(value, sizes, folder.opset)
        query, key, values = nodes[-1].outputs
        inputs = [query, key, values, None, mask, added]
        while inputs[-1] is None:
            inputs.pop()
        return [*nodes, ir.Node(MICROSOFT, "MultiHeadAttention", inputs, attributes)]

    return Product((node,), x, weight, bias=bias, takes_add=False, output=node.outputs[0], after=after)


def _has_one_number_per_entry(mask: ir.Value | None, x: ir.Value) -> bool:
    """Whether a mask of one dimension has the end of each entry alone; MultiHeadAttention takes no beginnings.

    What is not known is taken for such a mask: ONNX Runtime will say if it is none.
    """
    if mask is None or mask.shape is None or len(mask.shape) != 1 or x.shape is None or len(x.shape) == 0:
        return True
    unknown = ir.SymbolicDim(None)
    return unknown in (mask.shape[0], x.shape[0]) or mask.shape[0] == x.shape[0]


def _split(value: ir.Value, sizes: Sequence[int], opset: int) -> list[ir.Node]:
    """Nodes of which the last one splits the last dimension."""
    if opset < _SPLIT_SIZES_ARE_INPUT:
        attributes = [ir.AttrInt64("axis", 2), ir.AttrInt64s("split", list(sizes))]
        return [ir.Node("", "Split", [value], attributes, num_outputs=len(sizes))]
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(np.array(sizes, np.int64)))])
    split = ir.Node("", "Split", [value, constant.outputs[0]], [ir.AttrInt64("axis", 2)], num_outputs=len(sizes))
    return [constant, split]
