"""Reads external tensors where they lie: mapped for as long as an array refers to them, never copied."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sparamx_onnx.ops.errors import SparamxError


def external_range(tensor: ir.ExternalTensor) -> tuple[Path, int, int]:
    """The file, the offset and the size in bytes of an external tensor.

    Raises:
        SparamxError: The file is missing or too short.
    """
    path = Path(tensor.path)
    offset = tensor.offset or 0
    size = tensor.nbytes
    try:
        available = path.stat().st_size
    except OSError as error:
        raise SparamxError(
            f"The external data of '{tensor.name}' cannot be read from {path}: {error.strerror}."
        ) from error
    if offset < 0 or offset + size > available or (tensor.length or size) < size:
        raise SparamxError(
            f"The external data of '{tensor.name}' needs {size} bytes at offset {offset} of {path}, "
            f"which has {available} bytes."
        )
    return path, offset, size


def read_tensor(tensor: ir.TensorProtocol) -> npt.NDArray[np.generic]:
    """The values of a tensor; of an external one, a read-only view into its file.

    The view is not cached: the file is unmapped when the last array that refers to it is gone.

    Raises:
        SparamxError: The external data is missing or too short, or the tensor contradicts itself.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        try:
            return tensor.numpy()
        except (TypeError, ValueError) as error:
            raise SparamxError(f"The tensor '{tensor.name}' does not hold what its type and shape say.") from error
    path, offset, size = external_range(tensor)
    try:
        if tensor.dtype.bitwidth < 8:
            # Packed elements have to be unpacked into an array of their own anyway.
            return ir.Tensor(tensor.numpy()).numpy()
        return _map(path, offset, size, tensor.dtype.numpy().newbyteorder("<"), tensor.shape.numpy())
    except (OSError, ValueError) as error:  # ValueError: the file has become too short since it was checked
        why = error.strerror if isinstance(error, OSError) else error
        raise SparamxError(f"The external data of '{tensor.name}' cannot be read from {path}: {why}.") from error


def _map(
    path: Path, offset: int, size: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> npt.NDArray[np.generic]:
    if size == 0:
        return np.empty(shape, dtype)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), offset - start + size, access=mmap.ACCESS_READ, offset=start)
    return np.frombuffer(mapped, dtype, math.prod(shape), offset - start).reshape(shape)
