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
SECTION_SCALES = 4
SECTION_SUMS = 6
SECTION_COLUMN_SCALES = 7

# Weight types as the header numbers them.
_FP32, _BF16, _INT8, _INT4 = range(4)

# Scale types as the header numbers them; int8 scales are multiples of an output's fp32 scale.
_SCALE_DTYPES = {1: "<f2", 2: "<f4", 3: "i1"}
_INT8_SCALES = 3

# What a stored code is above the number that it means; also the code of a weight that is not stored.
_CODE_OF_ZERO = {_INT8: 128, _INT4: 8}

# Groups of activations whose largest magnitude is smaller count as zero.
_SMALLEST_AMAX = np.float32(2.0**-100)

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

    @property
    def row_weights(self) -> int:
        """Weights in a tile row."""
        return STRIP * self.parts

    @property
    def groups(self) -> int:
        """Scales along K: none for floating-point weights."""
        if self.scale_type == 0:
            return 0
        return -(-self.k // self.group_size) if self.group_size else 1


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
    """The dense matrix of a blob.

    Args:
        blob: The packed weight.

    Returns:
        The weight [K, N], float32.

    Raises:
        SparamxError: The blob breaks the format.
    """
    header = read_header(blob)
    if header.weight_type not in (_FP32, _BF16, _INT8, _INT4):
        raise SparamxError(f"The reference does not read the weight type {header.weight_type}.")
    stored = _section(blob, header, SECTION_VALUES)
    shape = (header.strips, header.tiles, TILE_ROWS, STRIP, header.parts)
    if header.form == 1:
        bits = np.unpackbits(_section(blob, header, SECTION_BITMAP), bitorder="little").astype(bool)
        if bits.size != math.prod(shape):
            raise SparamxError("The bitmap of the packed weight has the wrong size.")
        halves = bits.reshape(-1, 2, TILE_ROWS // 2 * header.row_weights)
        counts = _values_of_tiles(halves, header)
        _check_offsets(_section(blob, header, SECTION_OFFSETS).view("<u8"), counts, header)
        values = _decode(stored, header)
        if values.size != counts.sum() or np.count_nonzero(bits) != header.nnz:
            raise SparamxError("The packed weight does not hold as many values as its bitmap says.")
        starts = np.cumsum(counts) - counts
        places = (starts[:, None, None] + _places_in_tile(halves, header))[halves]
        tiles = np.zeros(bits.size, np.float32)
        tiles[bits] = values[places]
    else:
        values = _decode(stored, header)
        if values.size != math.prod(shape):
            raise SparamxError("The values of the packed weight have the wrong size.")
        halves = np.ones((header.strips * header.tiles, 2, TILE_ROWS // 2 * header.row_weights), bool)
        by_tile = (len(halves), TILE_ROWS * header.row_weights)
        tiles = np.take_along_axis(values.reshape(by_tile), _places_in_tile(halves, header).reshape(by_tile), axis=1)
    if header.weight_type == _INT8:
        sums = _section(blob, header, SECTION_SUMS).view("<i4")
        if not np.array_equal(sums, tiles.reshape(shape).sum(axis=(1, 2, 4), dtype=np.int64).reshape(-1)):
            raise SparamxError("The sums of the packed weight do not agree with its values.")
    # [strip, tile, row, column, part] -> k = (tile, row, part), n = (strip, column)
    padded = tiles.reshape(shape).transpose(1, 2, 4, 0, 3).reshape(header.tiles * header.tile_k, header.strips * STRIP)
    return np.ascontiguousarray(padded[: header.k] * _scales(blob, header))[:, : header.n].copy()


def _section(blob: bytes, header: BlobHeader, identifier: int) -> npt.NDArray[np.uint8]:
    # An empty section is left out of the table.
    offset, size = header.sections.get(identifier, (0, 0))
    return np.frombuffer(blob, np.uint8, size, offset)


def _decode(stored: npt.NDArray[np.uint8], header: BlobHeader) -> npt.NDArray[np.float32]:
    """What the stored values mean, without scales; of int4, both codes of every byte."""
    if header.weight_type == _FP32:
        return stored.view("<f4").astype(np.float32)
    if header.weight_type == _BF16:
        return np.asarray(stored.view(ml_dtypes.bfloat16), np.float32)
    codes = stored
    if header.weight_type == _INT4:
        codes = np.stack([stored & 15, stored >> 4], axis=1).reshape(-1)
    return codes.astype(np.float32) - np.float32(_CODE_OF_ZERO[header.weight_type])


def _values_of_tiles(halves: npt.NDArray[np.bool_], header: BlobHeader) -> npt.NDArray[np.int64]:
    """How many codes every tile takes up: of int4, the fuller half counts twice, as two codes share a byte.

    Args:
        halves: The bits of a tile's upper and lower eight rows [tiles, 2, weights of a half].
        header: The header.
    """
    counts: npt.NDArray[np.int64] = halves.sum(axis=2, dtype=np.int64)
    stored: npt.NDArray[np.int64] = 2 * counts.max(axis=1) if header.weight_type == _INT4 else counts.sum(axis=1)
    return stored


def _places_in_tile(halves: npt.NDArray[np.bool_], header: BlobHeader) -> npt.NDArray[np.int64]:
    """The number of every stored weight's code, counted from the first of its tile; arguments as above.

    A weight's code comes after those of the bits before it; of int4, the codes of the two halves alternate.
    """
    before = np.cumsum(halves, axis=2, dtype=np.int64) - 1
    if header.weight_type == _INT4:
        return 2 * before + np.arange(2)[None, :, None]
    before[:, 1] += halves[:, 0].sum(axis=1, dtype=np.int64)[:, None]
    return before


def _scales(blob: bytes, header: BlobHeader) -> npt.NDArray[np.float32]:
    """A factor for every weight, [K, padded N] or a shape that broadcasts to it."""
    if header.groups == 0:
        return np.ones((1, 1), np.float32)
    section = _section(blob, header, SECTION_SCALES)
    stored = section.view(_SCALE_DTYPES[header.scale_type]).astype(np.float32)
    if stored.size != header.strips * header.groups * STRIP:
        raise SparamxError("The scales of the packed weight have the wrong size.")
    # [strip, group, column] -> [group, n]
    by_strip = stored.reshape(header.strips, header.groups, STRIP)
    if header.scale_type == _INT8_SCALES:
        columns = _section(blob, header, SECTION_COLUMN_SCALES).view("<f4")
        if columns.size != header.strips * STRIP:
            raise SparamxError("The column scales of the packed weight have the wrong size.")
        by_strip = by_strip * columns.reshape(header.strips, 1, STRIP)
    by_group = by_strip.transpose(1, 0, 2).reshape(header.groups, header.strips * STRIP)
    scales: npt.NDArray[np.float32] = by_group[np.arange(header.k) // (header.group_size or max(1, header.k))]
    return scales


def _check_offsets(offsets: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64], header: BlobHeader) -> None:
    """Raises unless every offset is the number of codes before its run, which int4 tiles may fill up."""
    tile_counts = counts.reshape(header.strips, header.tiles).astype(np.uint64)
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


def quantize_int8(
    x: npt.NDArray[np.float32], group_size: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Activations in int8, with one scale per row or per group of a row: x is about ``numbers * scales``.

    Args:
        x: The activations [..., K], float32.
        group_size: Elements that share a scale; 0: all of the row. The last group may be shorter.

    Returns:
        Whole numbers [..., K] and the scale of every element [..., K], both float32. Numbers of a group lie between
        -127 and 127; those of a row span 254, from wherever its least element (or zero) is. A group with an infinite or
        undefined element has an undefined scale; one without any element above 2^-100 has numbers and a scale of zero.
    """
    numbers, scales = np.zeros_like(x), np.zeros_like(x)
    k = x.shape[-1]
    step = group_size or max(1, k)
    half, top = np.float32(0.5), np.float32(127)
    for start in range(0, k, step):
        group = x[..., start : start + step]
        # NaN wins over all numbers.
        amax = np.abs(group).max(axis=-1, keepdims=True)
        finite = np.isfinite(amax)
        counts = finite & (amax >= _SMALLEST_AMAX)
        usable = np.where(counts, group, np.float32(0))
        above = half * usable.max(axis=-1, keepdims=True, initial=0)
        below = half * -usable.min(axis=-1, keepdims=True, initial=0)
        half_range = np.where(counts, amax if group_size else above + below, np.float32(1))
        inverse = top / half_range
        zero = np.float32(0) if group_size else np.rint((above - below) * inverse)
        codes = np.clip(np.rint(usable * inverse) - zero, -top, top)
        numbers[..., start : start + step] = np.where(counts, codes + zero, 0)
        scales[..., start : start + step] = np.where(
            counts, half_range / top, np.where(finite, np.float32(0), np.float32(np.nan))
        )
    return numbers, scales


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
    group_size: int = 0,
) -> npt.NDArray[np.float32]:
    """``epilogue(x w + bias)``, accumulated in double precision.

    Args:
        x: The activations [..., K], float32.
        w: The dense weight [K, N], float32, as unpacked.
        bias: The bias [N], float32, or None.
        epilogue: none, relu, gelu, gelu_tanh or silu.
        activations: fp32 leaves x as it is; bf16 rounds it, and counts denormal values of x and w as zero; int8
            quantizes it.
        group_size: With int8, how many elements of a row of x share a scale: the group size of int4 weights; 0 is one
            scale for the row, as for int8 weights.

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
        case "int8":
            return _finish(_multiply_int8(x, w, group_size), bias, epilogue)
        case _:
            raise SparamxError(f"There is no precision {activations!r} of activations.")
    return _finish(x.astype(np.float64) @ w.astype(np.float64), bias, epilogue)


def _multiply_int8(x: npt.NDArray[np.float32], w: npt.NDArray[np.float32], group_size: int) -> npt.NDArray[np.float64]:
    numbers, scales = quantize_int8(x, group_size)
    # The product of a number and its scale is exact in double precision.
    return (numbers.astype(np.float64) * scales) @ w.astype(np.float64)


def _finish(y: npt.NDArray[np.float64], bias: npt.NDArray[np.float32] | None, epilogue: str) -> npt.NDArray[np.float32]:
    if bias is not None:
        y = y + bias.astype(np.float64)
    return apply_epilogue(y, epilogue).astype(np.float32)
