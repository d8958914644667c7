"""Dequantization of constants, as steps of folding: described when a graph is read, computed when the weight is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

if TYPE_CHECKING:
    from sparamx_onnx.graph_passes.fold_constants import FoldedConstant

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]

CODE_BITS: Final[Mapping[ir.DataType, tuple[int, bool]]] = {
    ir.DataType.INT4: (4, True),
    ir.DataType.UINT4: (4, False),
    ir.DataType.INT8: (8, True),
    ir.DataType.UINT8: (8, False),
    ir.DataType.INT16: (16, True),
    ir.DataType.UINT16: (16, False),
    ir.DataType.INT32: (32, True),
}
"""The types of codes that can be dequantized: their bits, and whether they are signed."""

_RESULTS: Final[Mapping[ir.DataType, np.dtype[np.generic]]] = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Unpacked:
    """Codes out of bytes that hold several each, the first in the lowest bits: uint8 [rows, ...] to [rows, columns].

    Attributes:
        bits: Bits of a code: 2, 4 or 8.
        shape: Rows and columns; what a row holds beyond its columns is dropped.
    """

    bits: int
    shape: tuple[int, int]

    def apply(self, array: Array) -> Array:
        """The codes, uint8."""
        rows, columns = self.shape
        packed = array.reshape(rows, -1).astype(np.uint8, copy=False)
        per_byte = 8 // self.bits
        if per_byte == 1:
            return packed[:, :columns]
        codes = np.empty((rows, packed.shape[1] * per_byte), np.uint8)
        for index in range(per_byte):
            np.bitwise_and(packed >> np.uint8(self.bits * index), (1 << self.bits) - 1, out=codes[:, index::per_byte])
        return codes[:, :columns]


@dataclass(frozen=True)
class Reshaped:
    """The same values in another shape of as many elements."""

    shape: tuple[int, ...]

    def apply(self, array: Array) -> Array:
        """The values in the new shape."""
        return array.reshape(self.shape)


@dataclass(frozen=True)
class Dequantized:
    """``(code - zero) * scale``, rounded to the scale's type.

    Attributes:
        scale: The scales: one, one for every index of ``axis``, or one for every block of ``block`` of them.
        zero: The codes that mean zero, of the scales' shape; or one for all.
        axis: The dimension that has several scales; meaningless with one.
        block: How many indices of the axis share a scale; 0 where every index has its own.
        shape: The shape of the codes.
        low: The lowest code that the type of the codes has.
        high: The highest.
    """

    scale: FoldedConstant
    zero: FoldedConstant | int
    axis: int
    block: int
    shape: tuple[int, ...]
    low: int
    high: int

    def apply(self, array: Array) -> Array:
        """The values, in the type of the scales."""
        return self.values(array).astype(_RESULTS[self.scale.dtype], copy=False)

    def values(self, array: Array) -> Floats:
        """The values in float32, whatever the type of the scales."""
        values = self.codes(array)
        self._spread(np.multiply, values, np.asarray(self.scale.numpy(), np.float32))
        return values

    def codes(self, array: Array) -> Floats:
        """The codes with the zero taken off: whole numbers, as float32."""
        values = array.astype(np.float32)
        if self.zero != 0:
            self._spread(np.subtract, values, self.zeros())
        return values

    def zeros(self) -> Floats:
        """The codes that mean zero."""
        if isinstance(self.zero, int):
            return np.array(self.zero, np.float32)
        return np.asarray(self.zero.numpy()).astype(np.float32)

    @np.errstate(all="ignore")
    def _spread(self, operation: Callable[..., object], values: Floats, operand: Floats) -> None:
        """``values = operation(values, operand)``, every element with its own scale's operand."""
        if operand.size == 1:
            operation(values, operand.reshape(()), out=values)
        elif not self.block:
            operation(values, operand.reshape([-1 if i == self.axis else 1 for i in range(values.ndim)]), out=values)
        else:
            # A block at a time, so that the scales are never spread over the whole matrix.
            moved = np.moveaxis(values, self.axis, 0)
            for index, factors in enumerate(np.moveaxis(operand, self.axis, 0)):
                part = moved[index * self.block : (index + 1) * self.block]
                operation(part, factors, out=part)
