"""A packed weight that is computed when it is asked for: one dense matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.fold_constants import FoldedConstant
from sparamx_onnx.graph_passes.kept_codes import KeptCodes
from sparamx_onnx.ops import packing
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packing import PackedInfo, PackOptions

Pruner = Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]]

# Elements converted together where a weight has to be computed before it is packed.
_CHUNK_ELEMENTS = 1 << 20


class PackedWeight(ir.LazyTensor):
    """The blob of a weight, as a tensor of uint8 [bytes].

    Neither the dense weight nor the blob is kept: every use of the values reads the weight, prunes and packs it anew,
    with the same result. ``shape`` needs the blob's size: it is computed on the first use, and for a pruned weight that
    means pruning it; ``write.save`` packs first and asks afterwards.
    """

    def __init__(
        self,
        name: str,
        weight: FoldedConstant,
        options: PackOptions,
        *,
        scale: float = 1.0,
        prune: Pruner | None = None,
        codes: KeptCodes | None = None,
    ) -> None:
        """Describes the packed weight; reads nothing.

        Args:
            name: Name of the initializer.
            weight: The dense weight [K, N].
            options: How to pack it.
            scale: A factor of the weight.
            prune: Sets weights to zero: takes [K, N] float32, float16 or bfloat16 and returns the same shape and dtype.
            codes: The codes and scales to keep of a quantized weight; None to pack its values as any other's.
        """
        super().__init__(self._as_tensor, ir.DataType.UINT8, ir.Shape([None]), name=name)
        self.weight = weight
        self.options = options
        self._scale = scale
        self._prune = prune
        self._codes = codes
        self._size: int | None = None
        self._observers: list[Callable[[PackedInfo], None]] = []

    @property
    def shape(self) -> ir.Shape:  # type: ignore[override]  # read-only, as in every tensor of onnx_ir
        """[bytes]."""
        if self._size is None:
            self._size = packing.packed_size(self.dense(), self.options, self._scales())
        return ir.Shape([self._size])

    @property
    def source_bytes(self) -> int:
        """Size of the weight in the input model."""
        return self.weight.tensor.nbytes

    def when_packed(self, observer: Callable[[PackedInfo], None]) -> None:
        """Has a function called with what the blob says of itself, every time it has been packed."""
        self._observers.append(observer)

    def source(self) -> npt.NDArray[np.generic]:
        """The weight [K, N] before pruning; a view of the input model where that is possible."""
        array = self.weight.numpy() if self._codes is None else self._codes.values()
        return array if self._scale == 1.0 else _scaled(array, self._scale)

    def dense(self) -> npt.NDArray[np.generic]:
        """The weight [K, N] that is packed."""
        array = self.source()
        return array if self._prune is None else self._prune(array)

    def pack(self) -> npt.NDArray[np.uint8]:
        """The blob, uint8 [bytes].

        Raises:
            SparamxError: The weight cannot be read or packed.
        """
        dense = self.dense()
        try:
            blob = packing.pack(dense, self.options, self._scales())
        except SparamxError as error:
            raise SparamxError(
                f"The weight '{self.weight.name}' cannot be packed as {self.options.weight_type.value}: {error}"
            ) from error
        # Describing checks the whole blob: nothing is written that a kernel would refuse.
        info = packing.describe(blob)
        self._size = blob.size
        for observer in self._observers:
            observer(info)
        return blob

    def _scales(self) -> npt.NDArray[np.float32] | None:
        return None if self._codes is None else self._codes.scales() * np.float32(self._scale)

    def _as_tensor(self) -> ir.TensorProtocol:
        return ir.Tensor(self.pack(), name=self.name)

    def __repr__(self) -> str:
        return f"PackedWeight(name={self.name!r}, weight={self.weight.name!r}, k_n={self.weight.shape})"


def _scaled(array: npt.NDArray[np.generic], scale: float) -> npt.NDArray[np.float32]:
    """The product in float32, computed in pieces so that no other copy of the whole is made."""
    scaled = np.empty(array.shape, np.float32)
    rows = max(1, _CHUNK_ELEMENTS // max(1, array.shape[1]))
    for start in range(0, array.shape[0], rows):
        np.multiply(array[start : start + rows].astype(np.float32), np.float32(scale), out=scaled[start : start + rows])
    return scaled
