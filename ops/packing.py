"""Packs weight matrices through the shared library, and inspects, unpacks and multiplies packed ones."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sparamx_onnx.ops import library
from sparamx_onnx.ops.definitions import Epilogue
from sparamx_onnx.ops.errors import SparamxError

Blob = npt.NDArray[np.uint8]


class WeightType(StrEnum):
    """The type in which weights are stored."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


QUANTIZED: Final = (WeightType.INT8, WeightType.INT4)
"""The types that are codes with scales; which weights are zero in them depends on the scales, so on all others."""


class Form(StrEnum):
    """How a matrix is stored. ``AUTO`` takes the smaller of the two."""

    AUTO = "auto"
    SPARSE = "sparse"
    DENSE = "dense"


class ScaleType(StrEnum):
    """The type of the scales of quantized weights. ``NONE`` takes the weight type's own default."""

    NONE = "none"
    INT8 = "int8"
    FP16 = "fp16"
    FP32 = "fp32"


GROUP_SIZES: Final = (16, 32, 64, 128, 256)
"""How many int4 weights along K may share a scale."""

DEFAULT_GROUP_SIZE: Final = 32
"""The group size that int4 weights take where none is given."""

# The numbers of the C interface are the positions in these lists.
_WEIGHT_TYPES = [WeightType.FP32, WeightType.BF16, WeightType.INT8, WeightType.INT4]
_FORMS = [Form.AUTO, Form.SPARSE, Form.DENSE]
_SCALE_TYPES = [ScaleType.NONE, ScaleType.FP16, ScaleType.FP32, ScaleType.INT8]
_EPILOGUES = [Epilogue.NONE, Epilogue.RELU, Epilogue.GELU, Epilogue.GELU_TANH, Epilogue.SILU]
_SOURCE_DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]

_PATH_BYTES = 256


@dataclass(frozen=True)
class PackOptions:
    """How to pack a matrix.

    Attributes:
        weight_type: Type of the stored weights.
        form: Sparse, dense, or the smaller of the two.
        scale_type: Type of the scales: fp32 for int8 weights; for int4 weights int8 (the default: multiples of one
            fp32 number an output), fp16 or fp32. fp16 scales cannot hold weights beyond about 500,000. Scales that are
            given are stored as fp16 (then the default) or fp32.
        group_size: Weights along K that share a scale, one of GROUP_SIZES; int4 only, where 0 takes 32. Others take 0.
        threads: Threads to pack with; 0 takes one per core. The result does not depend on it.
    """

    weight_type: WeightType = WeightType.BF16
    form: Form = Form.AUTO
    scale_type: ScaleType = ScaleType.NONE
    group_size: int = 0
    threads: int = 0

    def _as_struct(self, scales: npt.NDArray[np.float32] | None = None) -> library.PackOptionsStruct:
        return library.PackOptionsStruct(
            _WEIGHT_TYPES.index(self.weight_type),
            _FORMS.index(self.form),
            _SCALE_TYPES.index(self.scale_type),
            self.group_size,
            self.threads,
            None if scales is None else scales.ctypes.data,
        )

    def scale_groups(self, k: int) -> int:
        """Scales that an output of ``k`` inputs has."""
        if self.weight_type is WeightType.INT4:
            return -(-k // (self.group_size or DEFAULT_GROUP_SIZE))
        return 1 if self.weight_type is WeightType.INT8 else 0


@dataclass(frozen=True)
class PackedInfo:
    """What a blob says of itself.

    Attributes:
        k: Rows of the weight (inputs).
        n: Columns of the weight (outputs).
        nnz: Weights that are not zero in the weight type.
        blob_bytes: Size of the blob in bytes.
        format_version: Version of the packed format.
        weight_type: Type of the stored weights.
        form: Sparse or dense.
        scale_type: Type of the scales; ``NONE`` without scales.
        group_size: Weights along K that share a scale; 0 for types other than int4.
        run_k: Weights along K that share an entry of the offsets.
    """

    k: int
    n: int
    nnz: int
    blob_bytes: int
    format_version: int
    weight_type: WeightType
    form: Form
    scale_type: ScaleType
    group_size: int
    run_k: int

    @property
    def sparsity(self) -> float:
        """The share of zeros among the K * N weights; 0 for an empty matrix."""
        size = self.k * self.n
        return 1.0 - self.nnz / size if size else 0.0


# docs/format.md: sizes of the header and of a section's entry in the table, the alignment of sections, and the room
# after the values.
_HEADER_BYTES = 128
_SECTION_BYTES = 24
_ALIGNMENT = 64
_TAIL_BYTES = 64
_SECTION = "<IIQQ"
_SECTION_OFFSETS, _SECTION_VALUES = 1, 3
# Where fields of the header stand: N, the blob's bytes and nnz, 8 bytes each; the number of sections.
_N_AT, _SECTION_COUNT_AT = 32, 76
_EMPTY = np.zeros(0, np.uint8)
_CODE_BYTES = {WeightType.FP32: 4, WeightType.BF16: 2, WeightType.INT8: 1}
_SCALE_BYTES = {WeightType.INT8: 4}
_TILE_ROWS = 16
_STRIP = 16
_RUN_K = 512

# Elements looked at together when counting zeros: fits the L2 cache.
_CHUNK = 1 << 18


def expected_size(k: int, n: int, nnz: int, weight_type: WeightType, form: Form = Form.AUTO) -> tuple[int, Form]:
    """The size of the blob of a matrix that one need not have: from its shape and its number of non-zeros alone.

    For int4 weights these do not determine it: two codes share a byte (docs/format.md), so the size depends on where
    the non-zeros are. ``packed_size`` knows.

    Args:
        k: Rows.
        n: Columns.
        nnz: Weights that are not zero in the weight type. In int8 those count as zero that are below half a step.
        weight_type: fp32, bf16 or int8.
        form: The form; AUTO takes the smaller of the two, as packing does.

    Returns:
        The size in bytes, and the form that AUTO takes.

    Raises:
        SparamxError: The weight type is int4.
    """
    if weight_type not in _CODE_BYTES:
        raise SparamxError(f"The size of {weight_type.value} weights cannot be told from their number.")
    code_bytes = _CODE_BYTES[weight_type]
    tile_k = _TILE_ROWS * 4 // code_bytes
    strips, tiles = -(-n // _STRIP), -(-k // tile_k)
    runs = -(-tiles // (_RUN_K // tile_k))
    padded = strips * tiles * tile_k * _STRIP
    sections = {Form.SPARSE: [(strips * runs + 1) * 8, padded // 8], Form.DENSE: []}
    values = {Form.SPARSE: nnz * code_bytes, Form.DENSE: padded * code_bytes}
    scales = strips * _STRIP * _SCALE_BYTES.get(weight_type, 0)
    sizes: dict[Form, int] = {}
    for candidate in (Form.SPARSE, Form.DENSE):
        # An empty section is left out of the table; the values never are.
        present = [size for size in sections[candidate] if size]
        end = _HEADER_BYTES + _SECTION_BYTES * (len(present) + 1 + 2 * bool(scales))
        for size in present:
            end = _aligned(end) + size
        end = _aligned(end) + values[candidate] + _TAIL_BYTES
        # Scales, and sums of the same size.
        sizes[candidate] = _aligned(_aligned(_aligned(end) + scales) + scales)
    if form is Form.AUTO:
        form = Form.SPARSE if sizes[Form.SPARSE] < sizes[Form.DENSE] else Form.DENSE
    return sizes[form], form


def count_nonzero(w: npt.NDArray[np.generic], weight_type: WeightType) -> int:
    """Counts the weights that are not zero in the type in which they are packed.

    Args:
        w: float32, float16 or bfloat16, of any shape and strides.
        weight_type: fp32 or bf16; in bf16 denormal values count as zero.

    Raises:
        SparamxError: The weight type is quantized: which weights become zero depends on the scales, so on all others.
    """
    if weight_type in QUANTIZED:
        raise SparamxError(f"The non-zeros of {weight_type.value} weights are known once they are packed.")
    flat = w.transpose(sorted(range(w.ndim), key=lambda axis: -abs(w.strides[axis]))).reshape(-1)
    bits: npt.NDArray[np.unsignedinteger] = flat.view(np.uint32 if flat.dtype.itemsize == 4 else np.uint16)
    # Storing as bf16 makes denormal values zero (those of float16 are normal there). The smallest normal number of
    # float32 and of bfloat16 is one unit of the exponent.
    mantissa = {np.dtype(np.float32): 23, np.dtype(ml_dtypes.bfloat16): 7}.get(flat.dtype.newbyteorder("="), 0)
    smallest = 1 << mantissa if weight_type is WeightType.BF16 else 1
    count = 0
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        # Doubling shifts the sign out and leaves twice the magnitude.
        count += int(np.count_nonzero(np.add(chunk, chunk) >= 2 * smallest))
    return count


def column_scale_bytes(n: int, scale_type: ScaleType) -> int:
    """What of a blob with ``n`` columns does not grow with its rows: the numbers that int8 scales are multiples of."""
    return -(-n // _STRIP) * _STRIP * 4 if scale_type is ScaleType.INT8 else 0


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _matrix(w: npt.NDArray[np.generic]) -> tuple[library.Matrix, npt.NDArray[np.generic]]:
    """The C view of a matrix, and the array that owns what it points to."""
    if w.ndim != 2:
        raise SparamxError(f"A weight to pack must have two dimensions [K, N], not the shape {list(w.shape)}.")
    dtype = w.dtype.newbyteorder("=")
    if dtype not in _SOURCE_DTYPES:
        raise SparamxError(f"A weight to pack must be float32, float16 or bfloat16, not {w.dtype}.")
    size = w.dtype.itemsize
    if not w.dtype.isnative or any(stride % size for stride in w.strides) or not w.flags.aligned:
        w = np.ascontiguousarray(w, dtype=dtype)
    k, n = w.shape
    matrix = library.Matrix(
        w.ctypes.data, k, n, w.strides[0] // size, w.strides[1] // size, _SOURCE_DTYPES.index(dtype)
    )
    return matrix, w


def _scales(
    scales: npt.NDArray[np.float32] | None, shape: tuple[int, ...], options: PackOptions
) -> npt.NDArray[np.float32] | None:
    """The scales as the C interface takes them."""
    if scales is None:
        return None
    wanted = (options.scale_groups(shape[0]), shape[1])
    if scales.shape != wanted:
        raise SparamxError(f"The scales must have the shape {list(wanted)}, not {list(scales.shape)}.")
    return np.ascontiguousarray(scales, np.float32)


def packed_size(w: npt.NDArray[np.generic], options: PackOptions, scales: npt.NDArray[np.float32] | None = None) -> int:
    """The exact size in bytes of the blob that ``pack`` makes; reads the whole matrix.

    Args:
        w: The weight [K, N], float32, float16 or bfloat16, with any strides (a transposed view is not copied).
        options: How to pack it.
        scales: As for ``pack``.

    Raises:
        SparamxError: The matrix, the options or the scales cannot be packed.
    """
    matrix, owner = _matrix(w)
    size = ctypes.c_uint64()
    given = _scales(scales, w.shape, options)
    struct = options._as_struct(given)
    library.call("sparamx_packed_size", ctypes.byref(matrix), ctypes.byref(struct), ctypes.byref(size))
    del owner, given
    return size.value


def pack_into(
    w: npt.NDArray[np.generic], options: PackOptions, out: Blob, scales: npt.NDArray[np.float32] | None = None
) -> None:
    """Packs a matrix into a buffer.

    Args:
        w: The weight [K, N], float32, float16 or bfloat16, with any strides.
        options: How to pack it.
        out: Contiguous and writable uint8 [packed_size(w, options, scales)].
        scales: As for ``pack``.

    Raises:
        SparamxError: The matrix, the options or the buffer cannot be used.
    """
    if out.dtype != np.uint8 or out.ndim != 1 or not out.flags.c_contiguous or not out.flags.writeable:
        raise SparamxError("The buffer to pack into must be a writable, contiguous uint8 vector.")
    matrix, owner = _matrix(w)
    given = _scales(scales, w.shape, options)
    struct = options._as_struct(given)
    library.call("sparamx_pack", ctypes.byref(matrix), ctypes.byref(struct), out.ctypes.data, out.size)
    del owner, given


def pack(w: npt.NDArray[np.generic], options: PackOptions, scales: npt.NDArray[np.float32] | None = None) -> Blob:
    """Packs a matrix. The same matrix, options and scales give the same bytes.

    Args:
        w: The weight [K, N], float32, float16 or bfloat16, with any strides.
        options: How to pack it.
        scales: For int8 and int4 weights that are quantized already: their scales [options.scale_groups(K), N]. Weights
            that are code * scale in float32, with codes of the type's range, get exactly these codes. Without them the
            packer chooses the scales.

    Returns:
        The blob, uint8 [packed_size(w, options, scales)].

    Raises:
        SparamxError: The matrix, the options or the scales cannot be packed.
    """
    size = packed_size(w, options, scales) if scales is not None else _size_to_allocate(w, options)
    out = np.empty(size, np.uint8)
    pack_into(w, options, out, scales)
    return out


def _size_to_allocate(w: npt.NDArray[np.generic], options: PackOptions) -> int:
    """What packed_size gives; where the non-zeros can be counted without packing's detour through tiles, from those."""
    is_predicted = options.weight_type not in QUANTIZED and w.ndim == 2 and w.dtype in _SOURCE_DTYPES
    if is_predicted and (w.flags.c_contiguous or w.flags.f_contiguous):
        k, n = w.shape
        return expected_size(k, n, count_nonzero(w, options.weight_type), options.weight_type, options.form)[0]
    return packed_size(w, options)


def join(blobs: Sequence[Blob]) -> Blob:
    """The blob of several matrices side by side: what packing [W0, W1, ...] along N in the same form would give.

    Every section goes from strip to strip along N, so the joined ones follow each other.

    Args:
        blobs: Packed weights [K, N of each] of one type, form, scale type and group size; all but the last have a
            multiple of 16 columns.

    Returns:
        The packed weight [K, N of all].

    Raises:
        SparamxError: A blob is damaged, or they do not fit together.
    """
    infos = [describe(blob) for blob in blobs]
    kinds = {dataclasses.replace(info, n=0, nnz=0, blob_bytes=0) for info in infos}
    if len(kinds) != 1:
        raise SparamxError("Packed weights that are joined must have the same K, type, form, scales and groups.")
    if any(info.n % _STRIP for info in infos[:-1]):
        raise SparamxError(f"All packed weights that are joined but the last must have a multiple of {_STRIP} columns.")
    tables = [_sections(blob) for blob in blobs]
    identifiers = sorted(set().union(*tables))
    joined = [[table.get(identifier, _EMPTY) for table in tables] for identifier in identifiers]
    if identifiers[0] == _SECTION_OFFSETS:
        joined[0] = [_joined_offsets([section.view("<u8") for section in joined[0]])]
    places: list[int] = []
    end = _HEADER_BYTES + _SECTION_BYTES * len(identifiers)
    for identifier, parts in zip(identifiers, joined, strict=True):
        places.append(_aligned(end))
        end = places[-1] + sum(part.size for part in parts) + _TAIL_BYTES * (identifier == _SECTION_VALUES)
    out = np.zeros(_aligned(end), np.uint8)
    out[:_HEADER_BYTES] = blobs[0][:_HEADER_BYTES]
    struct.pack_into("<QQQ", out.data, _N_AT, sum(info.n for info in infos), out.size, sum(info.nnz for info in infos))
    struct.pack_into("<I", out.data, _SECTION_COUNT_AT, len(identifiers))
    for index, (identifier, place, parts) in enumerate(zip(identifiers, places, joined, strict=True)):
        size = sum(part.size for part in parts)
        struct.pack_into(_SECTION, out.data, _HEADER_BYTES + index * _SECTION_BYTES, identifier, 0, place, size)
        for part in parts:
            out[place : place + part.size] = part
            place += part.size
    return out


def _sections(blob: Blob) -> dict[int, Blob]:
    """The sections of a checked blob, by their numbers."""
    table = blob[_HEADER_BYTES:]
    (count,) = struct.unpack_from("<I", blob.data, _SECTION_COUNT_AT)
    entries = (struct.unpack_from(_SECTION, table.data, index * _SECTION_BYTES) for index in range(count))
    return {identifier: blob[offset : offset + size] for identifier, _, offset, size in entries}


def _joined_offsets(parts: Sequence[npt.NDArray[np.uint64]]) -> Blob:
    """Each counts from its own first value; the last entry is the total, where the next one begins."""
    pieces: list[npt.NDArray[np.uint64]] = []
    before = np.uint64(0)
    for part in parts:
        pieces.append(part[:-1] + before)
        before += part[-1]
    return np.concatenate([*pieces, np.array([before], "<u8")]).astype("<u8").view(np.uint8)


def _blob(blob: bytes | bytearray | memoryview | npt.NDArray[np.uint8]) -> Blob:
    array = blob if isinstance(blob, np.ndarray) else np.frombuffer(blob, np.uint8)
    if array.dtype != np.uint8 or array.ndim != 1:
        raise SparamxError(f"A packed weight is a uint8 vector, not {array.dtype} with the shape {list(array.shape)}.")
    return np.ascontiguousarray(array)


def validate(blob: bytes | npt.NDArray[np.uint8]) -> None:
    """Checks everything that the kernels rely on.

    Raises:
        SparamxError: The blob is damaged or of a newer format; says what is wrong.
    """
    array = _blob(blob)
    library.call("sparamx_validate", array.ctypes.data, array.size)


def describe(blob: bytes | npt.NDArray[np.uint8]) -> PackedInfo:
    """What a blob says of itself, after checking it.

    Raises:
        SparamxError: The blob is damaged or of a newer format.
    """
    array = _blob(blob)
    description = library.Description()
    library.call("sparamx_describe", array.ctypes.data, array.size, ctypes.byref(description))
    return PackedInfo(
        k=description.k,
        n=description.n,
        nnz=description.nnz,
        blob_bytes=description.blob_bytes,
        format_version=description.format_version,
        weight_type=_WEIGHT_TYPES[description.weight_type],
        form=_FORMS[description.form],
        scale_type=_SCALE_TYPES[description.scale_type],
        group_size=description.group_size,
        run_k=description.run_k,
    )


def unpack(blob: bytes | npt.NDArray[np.uint8], threads: int = 0) -> npt.NDArray[np.float32]:
    """The dense matrix of a blob.

    Args:
        blob: The packed weight.
        threads: Threads to unpack with; 0 takes one per core.

    Returns:
        The weight [K, N], float32, row-major.

    Raises:
        SparamxError: The blob is damaged or of a newer format.
    """
    array = _blob(blob)
    info = describe(array)
    dense = np.empty((info.k, info.n), np.float32)
    library.call("sparamx_unpack", array.ctypes.data, array.size, dense.ctypes.data, threads)
    return dense


def matmul(
    blob: bytes | npt.NDArray[np.uint8],
    x: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None = None,
    epilogue: str = "none",
    isa: str | None = None,
    threads: int = 1,
) -> tuple[npt.NDArray[np.float32], str]:
    """Runs a kernel without ONNX Runtime, for tests and measurements.

    Args:
        blob: The packed weight [K, N].
        x: The activations [..., K]; converted to float32.
        bias: The bias [N], or None.
        epilogue: none, relu, gelu, gelu_tanh or silu.
        isa: The instruction-set level to run, by the names of ``SPARAMX_ISA``; None chooses by CPU and shape.
        threads: Threads to start for this call; 1 starts none.

    Returns:
        The result [..., N], float32, and the name of the kernel that ran.

    Raises:
        SparamxError: Damaged blob, shapes that do not fit, or a level that this CPU lacks.
    """
    array = _blob(blob)
    info = describe(array)
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim == 0 or x.shape[-1] != info.k:
        raise SparamxError(f"The activations have the shape {list(x.shape)}, but the weight has K = {info.k}.")
    if bias is not None:
        bias = np.ascontiguousarray(bias, np.float32)
        if bias.shape != (info.n,):
            raise SparamxError(f"The bias has the shape {list(bias.shape)}, but the weight has N = {info.n}.")
    if epilogue not in _EPILOGUES:
        raise SparamxError(f"There is no epilogue {epilogue!r}; there are {', '.join(_EPILOGUES)}.")
    m = int(np.prod(x.shape[:-1], dtype=np.int64))
    y = np.empty((*x.shape[:-1], info.n), np.float32)
    path = ctypes.create_string_buffer(_PATH_BYTES)
    library.call(
        "sparamx_matmul",
        array.ctypes.data,
        array.size,
        x.ctypes.data,
        m,
        None if bias is None else bias.ctypes.data,
        _EPILOGUES.index(Epilogue(epilogue)),
        None if isa is None else isa.encode(),
        threads,
        y.ctypes.data,
        path,
        _PATH_BYTES,
    )
    return y, path.value.decode()
