"""The packed format and the operator in NumPy alone: what the C++ side is tested against.

Written from docs/format.md and docs/numerics.md; it shares no code with the library.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sparamx_onnx.ops.errors import SparamxError

MAGIC = b"SPARAMXW"
FORMAT_VERSION = 1
STRIP = 16
TILE_ROWS = 16
RUN_K = 512
TAIL_BYTES = 64

SECTION_OFFSETS = 1
SECTION_BITMAP = 2
SECTION_VALUES = 3

_SMALLEST_NORMAL = np.float32(2.0**-126)

# magic, version, header bytes, flags, K, N, blob bytes, nnz, then the four one-byte codes, order and reserved,
# group size, run K, matrix count, section count, reserved.
_HEADER = struct.Struct("<8sIIQQQQQ4BB3sIIII48s")
_SECTION = struct.Struct("<IIQQ")


@dataclass(frozen=True)
class BlobHeader:
    """The header of a blob, and its sections as id: (offset, size)."""

    format_version: int
    k: int
    n: int
    blob_bytes: int
    nnz: int
    weight_type: int
    code_bits: int
    scale_type: int
    form: int
    order: int
    group_size: int
    run_k: int
    matrix_count: int
    sections: dict[int, tuple[int, int]]

    @property
    def parts(self) -> int:
        """Weights of one output that stand side by side in a tile row."""
        return {0: 1, 1: 2, 2: 4, 3: 4}[self.weight_type]

    @property
    def tile_k(self) -> int:
        """Weights along K in a tile."""
        return TILE_ROWS * self.parts

    @property
    def tiles(self) -> int:
        """Tiles in a strip."""
        return -(-self.k // self.tile_k)

    @property
    def strips(self) -> int:
        """Groups of 16 adjacent outputs."""
        return -(-self.n // STRIP)

    @property
    def runs(self) -> int:
        """Runs in a strip."""
        return -(-self.tiles // (self.run_k // self.tile_k))


def read_header(blob: bytes) -> BlobHeader:
    """Reads the header and the section table of a blob.

    Raises:
        SparamxError: It is not a blob of format version 1.
    """
    if len(blob) < _HEADER.size:
        raise SparamxError(f"A blob of {len(blob)} bytes is too short for its header.")
    (
        magic,
        version,
        header_bytes,
        flags,
        k,
        n,
        blob_bytes,
        nnz,
        weight_type,
        code_bits,
        scale_type,
        form,
        order,
        reserved_codes,
        group_size,
        run_k,
        matrix_count,
        section_count,
        reserved,
    ) = _HEADER.unpack_from(blob)
    if magic != MAGIC:
        raise SparamxError("The bytes are not a packed weight: the magic is missing.")
    if version != FORMAT_VERSION or flags or header_bytes != _HEADER.size or any(reserved_codes) or any(reserved):
        raise SparamxError(f"The packed weight is not of format version {FORMAT_VERSION}.")
    if blob_bytes != len(blob):
        raise SparamxError(f"The packed weight says {blob_bytes} bytes and has {len(blob)}.")
    sections: dict[int, tuple[int, int]] = {}
    for index in range(section_count):
        identifier, zero, offset, size = _SECTION.unpack_from(blob, _HEADER.size + index * _SECTION.size)
        if zero or offset % 64 or offset + size > len(blob):
            raise SparamxError(f"Section {identifier} of the packed weight is out of place.")
        sections[identifier] = (offset, size)
    return BlobHeader(
        version,
        k,
        n,
        blob_bytes,
        nnz,
        weight_type,
        code_bits,
        scale_type,
        form,
        order,
        group_size,
        run_k,
        matrix_count,
        sections,
    )


def unpack_blob(blob: bytes) -> npt.NDArray[np.float32]:
    """The dense matrix of a blob of fp32 or bf16 weights.

    Args:
        blob: The packed weight.

    Returns:
        The weight [K, N], float32.

    Raises:
        SparamxError: The blob breaks the format, or holds quantized weights.
    """
    header = read_header(blob)
    if header.weight_type not in (0, 1):
        raise SparamxError(f"The reference does not read the weight type {header.weight_type}.")
    dtype = np.dtype("<f4") if header.weight_type == 0 else np.dtype(ml_dtypes.bfloat16)
    shape = (header.strips, header.tiles, TILE_ROWS, STRIP, header.parts)
    values = _section(blob, header, SECTION_VALUES).view(dtype)
    if header.form == 1:
        bits = np.unpackbits(_section(blob, header, SECTION_BITMAP), bitorder="little").astype(bool)
        if bits.size != math.prod(shape):
            raise SparamxError("The bitmap of the packed weight has the wrong size.")
        _check_offsets(_section(blob, header, SECTION_OFFSETS).view("<u8"), bits, header)
        if values.size != np.count_nonzero(bits) or values.size != header.nnz:
            raise SparamxError("The packed weight does not hold as many values as its bitmap says.")
        tiles = np.zeros(bits.size, dtype)
        tiles[bits] = values
    else:
        if values.size != math.prod(shape):
            raise SparamxError("The values of the packed weight have the wrong size.")
        tiles = values
    # [strip, tile, row, column, part] -> k = (tile, row, part), n = (strip, column)
    padded = tiles.reshape(shape).transpose(1, 2, 4, 0, 3).reshape(header.tiles * header.tile_k, header.strips * STRIP)
    return np.ascontiguousarray(padded[: header.k, : header.n]).astype(np.float32)


def _section(blob: bytes, header: BlobHeader, identifier: int) -> npt.NDArray[np.uint8]:
    # An empty section is left out of the table.
    offset, size = header.sections.get(identifier, (0, 0))
    return np.frombuffer(blob, np.uint8, size, offset)


def _check_offsets(offsets: npt.NDArray[np.uint64], bits: npt.NDArray[np.bool_], header: BlobHeader) -> None:
    """Raises unless every offset is the number of values before its run."""
    tile_counts = bits.reshape(header.strips, header.tiles, TILE_ROWS * STRIP * header.parts).sum(
        axis=2, dtype=np.uint64
    )
    per_run = header.run_k // header.tile_k
    padding = header.runs * per_run - header.tiles
    runs = np.pad(tile_counts, ((0, 0), (0, padding))).reshape(header.strips * header.runs, per_run).sum(axis=1)
    expected = np.concatenate([np.zeros(1, np.uint64), np.cumsum(runs, dtype=np.uint64)])
    if not np.array_equal(offsets, expected):
        raise SparamxError("The offsets of the packed weight do not agree with its bitmap.")


def round_to_bf16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rounds to the nearest bf16, ties to even; denormal values become zero.

    Args:
        x: Values of any shape, float32.

    Returns:
        The same shape, float32 values that bf16 can hold.
    """
    flushed = np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)
    return flushed.astype(ml_dtypes.bfloat16).astype(np.float32)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def apply_epilogue(y: npt.NDArray[np.float64], epilogue: str) -> npt.NDArray[np.float64]:
    """Applies an activation function in double precision.

    Args:
        y: Values of any shape.
        epilogue: none, relu, gelu, gelu_tanh or silu.

    Raises:
        SparamxError: There is no such epilogue.
    """
    match epilogue:
        case "none":
            return y
        case "relu":
            return np.maximum(y, 0.0)
        case "gelu":
            return y * 0.5 * (1.0 + _erf(y * math.sqrt(0.5))) if y.size else y
        case "gelu_tanh":
            return y * 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y**3)))
        case "silu":
            # exp(-|y|) cannot overflow.
            e = np.exp(-np.abs(y))
            return y * np.where(y >= 0, 1.0, e) / (1.0 + e)
    raise SparamxError(f"There is no epilogue {epilogue!r}.")


def sparse_amx_matmul(
    x: npt.NDArray[np.float32],
    w: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None = None,
    epilogue: str = "none",
    activations: str = "fp32",
) -> npt.NDArray[np.float32]:
    """``epilogue(x w + bias)``, accumulated in double precision.

    Args:
        x: The activations [..., K], float32.
        w: The dense weight [K, N], float32, as unpacked.
        bias: The bias [N], float32, or None.
        epilogue: none, relu, gelu, gelu_tanh or silu.
        activations: fp32 leaves x as it is; bf16 rounds it, and counts denormal values of x and w as zero.

    Returns:
        The result [..., N], float32.

    Raises:
        SparamxError: There is no such epilogue or precision.
    """
    match activations:
        case "fp32":
            pass
        case "bf16":
            x = round_to_bf16(x)
            w = np.where(np.abs(w) < _SMALLEST_NORMAL, np.float32(0), w)
        case _:
            raise SparamxError(f"There is no precision {activations!r} of activations.")
    y = x.astype(np.float64) @ w.astype(np.float64)
    if bias is not None:
        y = y + bias.astype(np.float64)
    return apply_epilogue(y, epilogue).astype(np.float32)
