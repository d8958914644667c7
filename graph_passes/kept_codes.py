"""Weights that are quantized already, and whether a packed weight can hold their codes and scales as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.dequantize import Dequantized, Floats
from sparamx_onnx.graph_passes.fold_constants import Converted, FoldedConstant, NotConstant, Transposed
from sparamx_onnx.graph_passes.plan import Reason
from sparamx_onnx.ops.packing import GROUP_SIZES, PackOptions, ScaleType, WeightType

_RANGES = {WeightType.INT4: (-8, 7), WeightType.INT8: (-128, 127)}


@dataclass(frozen=True)
class KeptCodes:
    """How a quantized weight is packed with the codes and the scales that it has.

    Attributes:
        weight: The weight [K, N].
        options: The type, the groups and the type of the scales that hold it exactly.
    """

    weight: FoldedConstant
    options: PackOptions

    def values(self) -> Floats:
        """The weight [K, N]: code * scale in float32, also where the model rounds that to another type."""
        prefix, step, turned = _split(self.weight)
        values = step.values(prefix.numpy())
        return values.T if turned else values

    def scales(self) -> Floats:
        """The scales [groups, N] of the packed weight."""
        _, step, turned = _split(self.weight)
        k, n = self.weight.shape
        scales = _scales_along_k(step, turned)
        assert scales is not None
        scales = np.broadcast_to(scales, (scales.shape[0], n))
        if self.options.weight_type is WeightType.INT4:
            # A group may be a part of what shares a scale in the model.
            block = step.block or k
            first_rows = np.arange(0, k, self.options.group_size)
            scales = scales[np.minimum(first_rows // block, scales.shape[0] - 1)]
        return np.ascontiguousarray(scales, np.float32)


def kept_codes(weight: FoldedConstant, scale: float = 1.0) -> KeptCodes | NotConstant:
    """How to keep the codes of a quantized weight, or why that cannot be done.

    Rules:

    1. The weight means ``(code - zero) * scale``, and nothing but Transpose and Cast lies behind that.
    2. The scales differ along N, or along blocks of K, or not at all.
    3. All ``code - zero`` lie from -8 to 7 and every block of K consists of groups of 16, 32, 64, 128 or 256: int4.
    4. Or they lie from -128 to 127 and there is one scale per output: int8.

    Codes are read only where their type and zero points leave it open whether they fit.

    Args:
        weight: The weight [K, N]; ``is_quantized``.
        scale: A further factor of the weight.

    Raises:
        SparamxError: A tensor cannot be read.
    """
    if any(isinstance(later, Converted) and later.dtype != ir.DataType.FLOAT for later in weight.steps):
        return NotConstant(Reason.QUANTIZED_WEIGHT, "It is rounded after it has been dequantized.")
    prefix, step, turned = _split(weight)
    scales = _scales_along_k(step, turned)
    if scales is None:
        return NotConstant(Reason.QUANTIZED_WEIGHT, "Its scales differ along the inputs of each output.")
    if not np.isfinite(scales).all():
        return NotConstant(Reason.QUANTIZED_WEIGHT, "It has scales that are not finite.")
    low, high = _range(prefix, step)
    k = weight.shape[0]
    group = _group_size(step.block or k, k)
    if group is not None and _fits(low, high, WeightType.INT4):
        with np.errstate(over="ignore"):  # what is beyond fp16 becomes infinite, and so differs
            rounded = scales.astype(np.float16).astype(np.float32)
        scale_type = ScaleType.FP16 if scale == 1.0 and np.array_equal(rounded, scales) else ScaleType.FP32
        return KeptCodes(weight, PackOptions(WeightType.INT4, scale_type=scale_type, group_size=group))
    if scales.shape[0] == 1 and _fits(low, high, WeightType.INT8):
        return KeptCodes(weight, PackOptions(WeightType.INT8))
    if scales.shape[0] > 1:
        return NotConstant(
            Reason.QUANTIZED_WEIGHT,
            f"It has a scale for every {step.block} inputs and codes from {low} to {high} around their zero.",
        )
    return NotConstant(Reason.QUANTIZED_WEIGHT, f"Its codes go from {low} to {high} around their zero.")


def _split(weight: FoldedConstant) -> tuple[FoldedConstant, Dequantized, bool]:
    """The codes, their dequantization, and whether the result is transposed."""
    [(index, step)] = [(i, step) for i, step in enumerate(weight.steps) if isinstance(step, Dequantized)]
    # Of two dimensions, and merged: it is the one that swaps them.
    turned = any(isinstance(later, Transposed) for later in weight.steps[index + 1 :])
    prefix = FoldedConstant(weight.root, weight.tensor, weight.steps[:index], step.shape, weight.tensor.dtype)
    return prefix, step, turned


def _scales_along_k(step: Dequantized, turned: bool) -> Floats | None:
    """The scales [blocks along K, N or 1]; None where the rows of a block have several."""
    scales: npt.NDArray[np.float32] = np.asarray(step.scale.numpy(), np.float32)
    if scales.size == 1:
        return scales.reshape(1, 1)
    axis = 1 - step.axis if turned else step.axis
    if step.block:
        if axis != 0:
            return None
        return scales.T if turned else scales
    return scales.reshape(1, -1) if axis == 1 else None


def _range(prefix: FoldedConstant, step: Dequantized) -> tuple[int, int]:
    """The lowest and the highest code, as numbers around their zero."""
    zeros = step.zeros()
    low, high = step.low - float(zeros.max()), step.high - float(zeros.min())
    narrow = WeightType.INT4 if step.high - step.low < 16 else WeightType.INT8
    if not _fits(low, high, narrow):
        codes = step.codes(prefix.numpy())
        low, high = float(codes.min()), float(codes.max())
    if not np.array_equal(zeros, np.rint(zeros)):
        return -(1 << 31), 1 << 31  # zero points between the codes: none of them is a whole number
    return int(low), int(high)


def _fits(low: float, high: float, weight_type: WeightType) -> bool:
    lowest, highest = _RANGES[weight_type]
    return lowest <= low and high <= highest


def _group_size(block: int, k: int) -> int | None:
    """The largest size of groups of which a block consists; None if there is none."""
    if block >= k:
        return max(GROUP_SIZES)
    return max((size for size in GROUP_SIZES if block % size == 0), default=None)
