"""Packed weights that are computed when they are asked for: one dense matrix in memory at a time."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.graph_passes.fold_constants import FoldedConstant
from sparamx_onnx.graph_passes.kept_codes import KeptCodes
from sparamx_onnx.ops import packing
from sparamx_onnx.ops.errors import SparamxError
from sparamx_onnx.ops.packing import Blob, Form, PackedInfo, PackOptions, WeightType

Pruner = Callable[[npt.NDArray[np.generic]], npt.NDArray[np.generic]]

# Elements converted together where a weight has to be computed before it is packed.
_CHUNK_ELEMENTS = 1 << 20


class PackedTensor(ir.LazyTensor, abc.ABC):
    """A blob, as a tensor of uint8 [bytes], that is made anew, with the same result, whenever its values are used.

    ``shape`` needs the blob's size: it is computed on the first use; ``write.save`` packs first and asks afterwards.
    """

    def __init__(self, name: str) -> None:
        super().__init__(self._as_tensor, ir.DataType.UINT8, ir.Shape([None]), name=name)
        self._size: int | None = None

    @property
    def shape(self) -> ir.Shape:  # type: ignore[override]  # read-only, as in every tensor of onnx_ir
        """[bytes]."""
        if self._size is None:
            self._size = self._compute_size()
        return ir.Shape([self._size])

    def pack(self) -> Blob:
        """The blob, uint8 [bytes].

        Raises:
            SparamxError: A weight cannot be read or packed.
        """
        blob = self._pack()
        self._size = blob.size
        return blob

    @property
    @abc.abstractmethod
    def sources(self) -> tuple[FoldedConstant, ...]:
        """The weights of the input model that it is made of."""

    @property
    def source_bytes(self) -> int:
        """Size of these weights in the input model."""
        return sum(source.tensor.nbytes for source in self.sources)

    @abc.abstractmethod
    def _pack(self) -> Blob: ...

    @abc.abstractmethod
    def _compute_size(self) -> int: ...

    def _as_tensor(self) -> ir.TensorProtocol:
        return ir.Tensor(self.pack(), name=self.name)

    def __repr__(self) -> str:  # onnx_ir's own shows the shape, for which the weights would be packed
        names = ", ".join(source.name for source in self.sources)
        return f"{type(self).__name__}({self.name!r} of {names})"


class PackedWeight(PackedTensor):
    """The blob of one weight.

    Neither the dense weight nor the blob is kept: every use of the values reads the weight, prunes and packs it. For a
    pruned weight even the blob's size means pruning it.
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
        super().__init__(name)
        self.weight = weight
        self.options = options
        self._scale = scale
        self._prune = prune
        self._codes = codes
        self._observers: list[Callable[[PackedInfo], None]] = []
        self.source_nnz: int | None = None
        """Weights that are not zero before pruning; None until it has been packed."""

    @property
    def sources(self) -> tuple[FoldedConstant, ...]:
        """The weight."""
        return (self.weight,)

    @property
    def pruner(self) -> Pruner | None:
        """What sets its weights to zero."""
        return self._prune

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

    def pack_as(self, form: Form) -> tuple[Blob, PackedInfo]:
        """The blob in another form than the options say, and what it says of itself; tells no observer.

        Raises:
            SparamxError: The weight cannot be read or packed.
        """
        source = self.source()
        self.source_nnz = packing.count_nonzero(source, WeightType.FP32)
        dense = source if self._prune is None else self._prune(source)
        try:
            blob = packing.pack(dense, dataclasses.replace(self.options, form=form), self._scales())
        except SparamxError as error:
            raise SparamxError(
                f"The weight '{self.weight.name}' cannot be packed as {self.options.weight_type.value}: {error}"
            ) from error
        # Describing checks the whole blob: nothing is written that a kernel would refuse.
        return blob, packing.describe(blob)

    def tell(self, info: PackedInfo) -> None:
        """Calls the observers."""
        for observer in self._observers:
            observer(info)

    def _pack(self) -> Blob:
        blob, info = self.pack_as(self.options.form)
        self.tell(info)
        return blob

    def _compute_size(self) -> int:
        return packing.packed_size(self.dense(), self.options, self._scales())

    def _scales(self) -> npt.NDArray[np.float32] | None:
        return None if self._codes is None else self._codes.scales() * np.float32(self._scale)


class PackedSiblings(PackedTensor):
    """The blob of several weights side by side: [K, N of all].

    They are packed one after the other and their blobs joined, so that there is never more than one dense weight in
    memory. The observers of each are told of its own part.
    """

    def __init__(self, name: str, parts: Sequence[PackedWeight]) -> None:
        """Describes the packed weight; reads nothing.

        Args:
            name: Name of the initializer.
            parts: The weights, of equal K and options; all but the last have a multiple of 16 columns.
        """
        super().__init__(name)
        self.parts = tuple(parts)

    @property
    def sources(self) -> tuple[FoldedConstant, ...]:
        """The weights, in the order of their columns."""
        return tuple(part.weight for part in self.parts)

    def _pack(self) -> Blob:
        packed = [part.pack_as(part.options.form) for part in self.parts]
        forms = {info.form for _, info in packed}
        if len(forms) > 1:
            # One blob has one form: the one in which it is smaller.
            options = [[part.pack_as(form) for part in self.parts] for form in (Form.SPARSE, Form.DENSE)]
            packed = min(options, key=lambda parts: sum(info.blob_bytes for _, info in parts))
        blob = packing.join([blob for blob, _ in packed])
        packing.validate(blob)
        for part, (_, info) in zip(self.parts, packed, strict=True):
            part.tell(info)
        return blob

    def _compute_size(self) -> int:
        return self.pack().size


@np.errstate(all="ignore")
def _scaled(array: npt.NDArray[np.generic], scale: float) -> npt.NDArray[np.float32]:
    """The product in float32, computed in pieces so that no other copy of the whole is made."""
    scaled = np.empty(array.shape, np.float32)
    rows = max(1, _CHUNK_ELEMENTS // max(1, array.shape[1]))
    for start in range(0, array.shape[0], rows):
        np.multiply(array[start : start + rows].astype(np.float32), np.float32(scale), out=scaled[start : start + rows])
    return scaled
