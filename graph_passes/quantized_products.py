"""Reads the operators that multiply by a quantized matrix, as products of dequantized operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from sparamx_onnx.graph_passes.attributes import float_attribute, int_attribute
from sparamx_onnx.graph_passes.dequantize import Reshaped, Unpacked
from sparamx_onnx.graph_passes.fold_constants import ConstantFolder, FoldedConstant, NotConstant, dequantized
from sparamx_onnx.graph_passes.plan import Reason
from sparamx_onnx.graph_passes.products import (
    MICROSOFT,
    Bias,
    NewNodes,
    Product,
    Reader,
    RefusedError,
    constant_vector,
    only_user,
)

# Operators that only move values: an activation that was dequantized before them is still made of its codes.
_MOVERS = frozenset(
    {"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


def has_static_scale(x: ir.Value) -> bool:
    """Whether activations are codes of a scale that was chosen before the model ran, dequantized for the product."""
    for _ in range(16):
        node = x.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return False
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0].producer()
            return source is None or source.op_type != "DynamicQuantizeLinear"
        if node.domain != "" or node.op_type not in _MOVERS:
            return False
        x = node.inputs[0]
    return False


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _constant(value: ir.Value | None, folder: ConstantFolder) -> FoldedConstant | None:
    folded = None if value is None else folder.fold(value)
    return folded if isinstance(folded, FoldedConstant) else None


def _codes(node: ir.Node, index: int, folder: ConstantFolder) -> FoldedConstant | None:
    """The constant codes of a weight; None where it is no constant matrix, and so no weight."""
    value = _input(node, index)
    folded = None if value is None else folder.fold(value)
    if isinstance(folded, FoldedConstant):
        return folded if len(folded.shape) >= 2 else None
    if folded is None or folded.reason is Reason.TWO_ACTIVATIONS:
        return None
    raise RefusedError(folded.reason, folded.detail)


def _weight(
    node: ir.Node,
    codes: FoldedConstant,
    scale: FoldedConstant | None,
    zero: ir.Value | None,
    folder: ConstantFolder,
) -> FoldedConstant:
    """The weight [K, N] whose columns may have scales of their own."""
    n = _columns(codes)
    zero_point = _constant(zero, folder)
    if scale is None or (zero is not None and zero_point is None):
        raise RefusedError(Reason.QUANTIZED_WEIGHT, "Its scales are computed at run time.", codes)
    weight = dequantized(
        codes, _flat(scale, n), None if zero_point is None else _flat(zero_point, n), axis=1, block=0,
        what=f"the {node.op_type} node '{node.name}'",
    )  # fmt: skip
    return _understood(weight, codes)


def _columns(codes: FoldedConstant) -> int:
    if len(codes.shape) != 2:
        raise RefusedError(Reason.WEIGHT_NOT_2D, f"Its shape is {list(codes.shape)}.", codes)
    return codes.shape[1]


def _understood(weight: FoldedConstant | NotConstant, codes: FoldedConstant) -> FoldedConstant:
    if isinstance(weight, NotConstant):
        raise RefusedError(weight.reason, weight.detail, codes)
    return weight


def _flat(constant: FoldedConstant, n: int) -> FoldedConstant:
    """A row [1, n] as the vector that it means; anything else as it is."""
    if constant.shape == (1, n):
        return constant.with_step(Reshaped((n,)), (n,), constant.dtype)
    return constant


def _single(value: ir.Value | None, folder: ConstantFolder) -> float | None:
    """The number that a constant of one element holds."""
    constant = _constant(value, folder)
    if constant is None or math.prod(constant.shape) != 1:
        return None
    return float(np.asarray(constant.numpy()).astype(np.float64).reshape(()))


def _codes_before(scale: ir.Value | float, zero: ir.Value | None) -> NewNodes:
    """Dequantizes the codes of activations by the scale that they have."""

    def before(x: ir.Value) -> Sequence[ir.Node]:
        nodes = []
        factor = scale
        if not isinstance(factor, ir.Value):
            tensor = ir.Tensor(np.array(factor, np.float32))
            nodes.append(ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)]))
            factor = nodes[0].outputs[0]
        inputs = [x, factor] if zero is None else [x, factor, zero]
        return [*nodes, ir.Node("", "DequantizeLinear", inputs)]

    return before


def _quantize_after(scale: ir.Value, zero: ir.Value | None) -> NewNodes:
    """Quantizes a result by the scale that the model gives it."""

    def after(value: ir.Value) -> Sequence[ir.Node]:
        return [ir.Node("", "QuantizeLinear", [value, scale] if zero is None else [value, scale, zero])]

    return after


def _is_scalar(value: ir.Value | None) -> bool:
    """Whether a value is known to be one number for all rows; an absent one is."""
    if value is None:
        return True
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None:
        node = value.producer()
        return node is not None and node.op_type == "DynamicQuantizeLinear"
    return all(size == 1 for size in shape)


def _dynamic_source(codes: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None) -> ir.Value | None:
    """What a DynamicQuantizeLinear quantized, if all three are its results."""
    node = None if codes is None else codes.producer()
    if node is None or node.op_type != "DynamicQuantizeLinear" or node.domain != "" or len(node.outputs) != 3:
        return None
    return node.inputs[0] if (codes, scale, zero) == tuple(node.outputs) else None


# --- com.microsoft operators that take and give floats ----------------------------------------------------------------


def _read_matmul_nbits(node: ir.Node, folder: ConstantFolder, codes: FoldedConstant) -> Product:
    """MatMulNBits: x [.., K], codes [N, blocks, bytes], scales [N, blocks], zero points of as many bits, bias [N]."""
    k, n, bits = (int_attribute(node, name, default) for name, default in (("K", 0), ("N", 0), ("bits", 4)))
    block = int_attribute(node, "block_size", 0)
    x, scales, zeros = _input(node, 0), _constant(_input(node, 2), folder), _input(node, 3)
    if x is None or k <= 0 or n <= 0 or block <= 0:
        raise RefusedError(Reason.MALFORMED_NODE, "An input or one of K, N and block_size is missing.", codes)
    if bits not in (2, 4, 8):
        raise RefusedError(Reason.QUANTIZED_WEIGHT, f"Its codes have {bits} bits.", codes)
    if _input(node, 4) is not None or int_attribute(node, "weight_prepacked", 0):
        raise RefusedError(
            Reason.QUANTIZED_WEIGHT, "Its inputs are in another order (g_idx, or packed for a device).", codes
        )
    if scales is None:
        raise RefusedError(Reason.QUANTIZED_WEIGHT, "Its scales are computed at run time.", codes)
    blocks = -(-k // block)
    bytes_per_row = blocks * (block * bits // 8)
    if codes.dtype != ir.DataType.UINT8 or math.prod(codes.shape) != n * bytes_per_row:
        raise RefusedError(Reason.MALFORMED_NODE, f"Its codes have the shape {list(codes.shape)}.", codes)
    if math.prod(scales.shape) != n * blocks:
        raise RefusedError(Reason.MALFORMED_NODE, f"Its scales have the shape {list(scales.shape)}.", codes)
    weight = dequantized(
        codes.with_step(Unpacked(bits, (n, k)), (n, k), ir.DataType.UINT8),
        scales.with_step(Reshaped((n, blocks)), (n, blocks), scales.dtype),
        _nbits_zero(zeros, (n, blocks), bits, codes, folder),
        axis=1, block=block, what=f"the MatMulNBits node '{node.name}'",
    )  # fmt: skip
    weight = _understood(weight, codes).transposed()
    bias = _bias(node, 5, weight, codes, folder)
    return Product((node,), x, weight, bias=bias, takes_add=bias is None, output=node.outputs[0])


def _nbits_zero(
    zeros: ir.Value | None, shape: tuple[int, int], bits: int, codes: FoldedConstant, folder: ConstantFolder
) -> FoldedConstant | int:
    """The zero points of a MatMulNBits node, one per scale; the middle code where it has none."""
    if zeros is None:
        return 1 << (bits - 1)
    constant = _constant(zeros, folder)
    if constant is None:
        raise RefusedError(Reason.QUANTIZED_WEIGHT, "Its zero points are computed at run time.", codes)
    rows, blocks = shape
    if constant.dtype == ir.DataType.UINT8 and math.prod(constant.shape) == rows * -(-blocks * bits // 8):
        return constant.with_step(Unpacked(bits, shape), shape, ir.DataType.UINT8)
    if constant.dtype != ir.DataType.UINT8 and math.prod(constant.shape) == rows * blocks:
        return constant.with_step(Reshaped(shape), shape, constant.dtype)
    raise RefusedError(Reason.MALFORMED_NODE, f"Its zero points have the shape {list(constant.shape)}.", codes)


def _read_dynamic_quantize_matmul(node: ir.Node, folder: ConstantFolder, codes: FoldedConstant) -> Product:
    """DynamicQuantizeMatMul: x, codes [K, N], their scale and zero point, bias."""
    x = _input(node, 0)
    if x is None:
        raise RefusedError(Reason.MALFORMED_NODE, "An input is missing.", codes)
    weight = _weight(node, codes, _constant(_input(node, 2), folder), _input(node, 3), folder)
    bias = _bias(node, 4, weight, codes, folder)
    return Product((node,), x, weight, bias=bias, takes_add=bias is None, output=node.outputs[0])


def _bias(
    node: ir.Node, index: int, weight: FoldedConstant, codes: FoldedConstant, folder: ConstantFolder
) -> Bias | None:
    if _input(node, index) is None:
        return None
    constant = constant_vector(_input(node, index), weight.shape[1], folder, rank=1, dtype=weight.dtype)
    if constant is None:
        raise RefusedError(Reason.UNSUPPORTED_BIAS, weight=codes)
    return Bias(constant)


def _read_matmul_integer_to_float(node: ir.Node, folder: ConstantFolder, codes: FoldedConstant) -> Product:
    """MatMulIntegerToFloat: codes of x, codes [K, N], both scales, both zero points, bias."""
    a, a_scale, a_zero = (_input(node, index) for index in (0, 2, 4))
    if a is None or a_scale is None:
        raise RefusedError(Reason.MALFORMED_NODE, "An input is missing.", codes)
    weight = _weight(node, codes, _constant(_input(node, 3), folder), _input(node, 5), folder)
    bias = _bias(node, 6, weight, codes, folder)
    x = _dynamic_source(a, a_scale, a_zero)
    if x is None and not (_is_scalar(a_scale) and _is_scalar(a_zero)):
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "Its activations have a scale per row.", codes)
    return Product(
        (node,), a if x is None else x, weight, bias=bias, takes_add=bias is None, output=node.outputs[0],
        before=_codes_before(a_scale, a_zero) if x is None else None,
    )  # fmt: skip


# --- integer operators ------------------------------------------------------------------------------------------------


def _read_matmul_integer(node: ir.Node, folder: ConstantFolder, codes: FoldedConstant) -> Product:
    """MatMulInteger, an Add of int32 or not, a Cast to float32, and a Mul by the product of both scales."""
    a, a_zero = _input(node, 0), _input(node, 2)
    if a is None:
        raise RefusedError(Reason.MALFORMED_NODE, "An input is missing.", codes)
    n = _columns(codes)
    nodes, integer_bias = [node], None
    cast = only_user(node.outputs[0])
    if cast is not None and cast.op_type == "Add" and cast.domain == "":
        integer_bias = _constant(_other_input(cast, node.outputs[0]), folder)
        if integer_bias is None or integer_bias.dtype != ir.DataType.INT32 or not _is_row(integer_bias, n):
            raise RefusedError(Reason.UNSUPPORTED_BIAS, weight=codes)
        nodes.append(cast)
        cast = only_user(cast.outputs[0])
    mul = None if cast is None or not _casts_to_float(cast) else only_user(cast.outputs[0])
    if cast is None or mul is None or mul.op_type != "Mul" or mul.domain != "" or len(mul.inputs) != 2:
        raise RefusedError(
            Reason.QUANTIZED_WEIGHT, "Its integers are not turned into floats by a Cast and a Mul that follow.", codes
        )
    nodes += [cast, mul]
    factor = _other_input(mul, cast.outputs[0])
    dynamic_scale, scale = _scales_of_factor(factor, folder)
    if scale is None or not _is_row(scale, n):
        raise RefusedError(Reason.QUANTIZED_WEIGHT, "Its scales are computed at run time.", codes)
    weight = _weight(node, codes, scale, _input(node, 3), folder)
    x = _dynamic_source(a, dynamic_scale, a_zero)
    if x is not None:
        if integer_bias is not None:
            # It is a multiple of a scale that changes from run to run.
            raise RefusedError(Reason.UNSUPPORTED_BIAS, weight=codes)
        return Product(tuple(nodes), x, weight, output=mul.outputs[0])
    if not (_is_scalar(a_zero) and _is_scalar(dynamic_scale)):
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "Its activations have a scale per row.", codes)
    bias = None
    if integer_bias is not None:
        if dynamic_scale is not None:
            raise RefusedError(Reason.UNSUPPORTED_BIAS, weight=codes)
        bias = _integer_bias(node, integer_bias, scale, codes)
    before = _codes_before(1.0 if dynamic_scale is None else dynamic_scale, a_zero)
    return Product(tuple(nodes), a, weight, bias=bias, takes_add=bias is None, output=mul.outputs[0], before=before)


def _scales_of_factor(factor: ir.Value | None, folder: ConstantFolder) -> tuple[ir.Value | None, FoldedConstant | None]:
    """The scale of the activations, where it is computed, and the constant rest of a product of scales."""
    constant = _constant(factor, folder)
    if constant is not None:
        return None, constant
    node = None if factor is None else factor.producer()
    if node is None or node.op_type != "Mul" or node.domain != "" or len(node.inputs) != 2:
        return None, None
    first, second = node.inputs
    for scale, other in ((first, second), (second, first)):
        constant = _constant(scale, folder)
        if constant is not None:
            return other, constant
    return None, None


def _is_row(constant: FoldedConstant, n: int) -> bool:
    return math.prod(constant.shape) in (1, n) and (not constant.shape or constant.shape[-1] in (1, n))


def _integer_bias(node: ir.Node, bias: FoldedConstant, scale: FoldedConstant, codes: FoldedConstant) -> Bias:
    """A bias that is added to the integers, as the number that it means."""
    n = codes.shape[1]
    flat = [
        constant.with_step(Reshaped((n,)), (n,), constant.dtype) if math.prod(constant.shape) == n else constant
        for constant in (bias, scale)
    ]
    numbers = dequantized(flat[0], flat[1], None, axis=0, block=0, what=f"the {node.op_type} node '{node.name}'")
    if isinstance(numbers, NotConstant):
        raise RefusedError(Reason.UNSUPPORTED_BIAS, weight=codes)
    return Bias(numbers)


def _casts_to_float(node: ir.Node) -> bool:
    is_cast = (node.domain, node.op_type) == ("", "Cast")
    return is_cast and int_attribute(node, "to", None) == ir.DataType.FLOAT


def _other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return next((other for other in node.inputs if other is not value), None)


def _read_qlinear_matmul(node: ir.Node, folder: ConstantFolder, codes: FoldedConstant) -> Product:
    """QLinearMatMul: codes of x, their scale and zero; codes [K, N] and theirs; the scale and zero of the result."""
    a, a_scale, a_zero = (_input(node, index) for index in (0, 1, 2))
    y_scale, y_zero = _input(node, 6), _input(node, 7)
    if a is None or a_scale is None or y_scale is None:
        raise RefusedError(Reason.MALFORMED_NODE, "An input is missing.", codes)
    weight = _weight(node, codes, _constant(_input(node, 4), folder), _input(node, 5), folder)
    if not all(_is_scalar(value) for value in (a_scale, a_zero, y_scale, y_zero)):
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "Its activations have a scale per row.", codes)
    return Product(
        (node,), a, weight, takes_add=False, output=node.outputs[0],
        before=_codes_before(a_scale, a_zero), after=_quantize_after(y_scale, y_zero),
    )  # fmt: skip


def _read_qgemm(node: ir.Node, folder: ConstantFolder, codes: FoldedConstant) -> Product:
    """QGemm: as QLinearMatMul, with transB, alpha, an int32 bias, and a result in float32 or quantized."""
    a, a_scale, a_zero = (_input(node, index) for index in (0, 1, 2))
    scale, y_scale = _constant(_input(node, 4), folder), _input(node, 7)
    single = _single(a_scale, folder)
    if a is None or a_scale is None or scale is None:
        raise RefusedError(Reason.MALFORMED_NODE, "An input is missing.", codes)
    if int_attribute(node, "transA", 0):
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "It has transA = 1.", codes)
    if len(codes.shape) == 2 and int_attribute(node, "transB", 0):
        codes = codes.transposed()
    weight = _weight(node, codes, scale, _input(node, 5), folder)
    if not all(_is_scalar(value) for value in (a_scale, a_zero, y_scale, _input(node, 8))):
        raise RefusedError(Reason.UNSUPPORTED_ATTRIBUTES, "Its activations have a scale per row.", codes)
    alpha = float_attribute(node, "alpha", 1.0)
    bias = None
    if _input(node, 6) is not None:
        integers = _constant(_input(node, 6), folder)
        if integers is None or single is None or not _is_row(integers, weight.shape[1]):
            raise RefusedError(Reason.UNSUPPORTED_BIAS, weight=codes)
        bias = replace(_integer_bias(node, integers, scale, codes), scale=alpha * single)
    return Product(
        (node,), a, weight, alpha, bias, takes_add=bias is None and y_scale is None, rank=2, output=node.outputs[0],
        before=_codes_before(a_scale, a_zero),
        after=None if y_scale is None else _quantize_after(y_scale, _input(node, 8)),
    )  # fmt: skip


def _reader(read: Callable[[ir.Node, ConstantFolder, FoldedConstant], Product], codes: int) -> Reader:
    """A reader of an operator, by what reads it once its codes are known.

    Args:
        read: Reads it.
        codes: The input that holds the codes.
    """

    def read_node(node: ir.Node, folder: ConstantFolder) -> Product | None:
        constant = _codes(node, codes, folder)
        return None if constant is None else read(node, folder, constant)

    return read_node


QUANTIZED_READERS: Mapping[tuple[str, str], Reader] = {
    ("", "MatMulInteger"): _reader(_read_matmul_integer, codes=1),
    ("", "QLinearMatMul"): _reader(_read_qlinear_matmul, codes=3),
    (MICROSOFT, "DynamicQuantizeMatMul"): _reader(_read_dynamic_quantize_matmul, codes=1),
    (MICROSOFT, "MatMulIntegerToFloat"): _reader(_read_matmul_integer_to_float, codes=1),
    (MICROSOFT, "MatMulNBits"): _reader(_read_matmul_nbits, codes=1),
    (MICROSOFT, "QGemm"): _reader(_read_qgemm, codes=3),
}
