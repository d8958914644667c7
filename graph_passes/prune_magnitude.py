"""Prunes by magnitude: the smallest weights of a matrix become zero."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from sparamx_onnx.graph_passes.packed_weight import Pruner
from sparamx_onnx.graph_passes.prune_pattern import Pattern, prune_to_pattern
from sparamx_onnx.ops.errors import SparamxError

# Values looked at together: large enough for NumPy's overhead to vanish, small enough to stay in the L2 cache.
_CHUNK = 1 << 18

# Radix of the search for the threshold: one pass over the high bits of the magnitudes, one over the rest.
_HIGH_BITS = 16


def zeros_wanted(size: int, sparsity: float) -> int:
    """How many of ``size`` weights are zero at a sparsity, to the nearest one.

    Raises:
        SparamxError: The sparsity is not from 0 up to, but not including, 1.
    """
    if not 0.0 <= sparsity < 1.0:
        raise SparamxError(f"The sparsity must be at least 0 and below 1, not {sparsity:g}.")
    return int(sparsity * size + 0.5)


def prune_by_magnitude(sparsity: float, pattern: Pattern | None) -> Pruner:
    """Sets the smallest weights to zero, in a pattern or to a sparsity."""
    if pattern is not None:
        return functools.partial(prune_to_pattern, pattern=pattern)
    return functools.partial(prune_magnitude, sparsity=sparsity)


def prune_magnitude(w: npt.NDArray[np.generic], sparsity: float) -> npt.NDArray[np.generic]:
    """Sets the smallest weights to zero, so that exactly the wanted number of zeros results.

    Zeros that are there count. Among weights of equal magnitude at the threshold, those that come first in memory
    become zero. NaN counts as larger than infinity. Memory beyond the result does not depend on the matrix's size.

    Args:
        w: The weight, float32, float16 or bfloat16, of any shape and strides.
        sparsity: The share of zeros wanted, at least 0 and below 1.

    Returns:
        A copy with zeros, of the same shape, dtype and order in memory; ``w`` itself if it has zeros enough.

    Raises:
        SparamxError: The sparsity is out of range or the dtype is none of these.
    """
    wanted = zeros_wanted(w.size, sparsity)
    if wanted == 0:
        return w
    # Transposed views are pruned as they lie in memory, so that both are read in order.
    order = sorted(range(w.ndim), key=lambda axis: -abs(w.strides[axis]))
    flat = np.ascontiguousarray(w.transpose(order)).reshape(-1)
    magnitudes = _magnitudes(flat)
    threshold, ties = _threshold(magnitudes, wanted)
    if threshold == 0:
        return w
    pruned = np.empty_like(flat)
    for start in range(0, flat.size, _CHUNK):
        source = flat[start : start + _CHUNK]
        target = pruned[start : start + _CHUNK]
        bits = _clear_sign(magnitudes[start : start + _CHUNK])
        target[...] = source
        target[bits < threshold] = 0
        if ties:  # mostly spent within the first chunks
            equal = np.flatnonzero(bits == threshold)[:ties]
            target[equal] = 0
            ties -= equal.size
    return pruned.reshape([w.shape[axis] for axis in order]).transpose(np.argsort(order))


def _magnitudes(flat: npt.NDArray[np.generic]) -> npt.NDArray[np.unsignedinteger]:
    """The bits of floating-point numbers: without the sign they sort like the magnitudes, NaN last."""
    if flat.dtype.kind not in "fV" or flat.dtype.itemsize not in (2, 4):
        raise SparamxError(f"A weight to prune must be float32, float16 or bfloat16, not {flat.dtype}.")
    bits: npt.NDArray[np.unsignedinteger] = flat.view(np.uint32 if flat.dtype.itemsize == 4 else np.uint16)
    return bits


def _clear_sign(bits: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    sign = bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    return bits & ~sign


def _threshold(bits: npt.NDArray[np.unsignedinteger], wanted: int) -> tuple[int, int]:
    """The magnitude below which all weights become zero, and how many of those equal to it do too.

    A search by radix: it is exact, and it holds two tables of counts instead of a sorted copy.
    """
    width = 8 * bits.dtype.itemsize - 1
    shift = max(0, width - _HIGH_BITS)
    high = np.zeros(1 << (width - shift), np.int64)
    for start in range(0, bits.size, _CHUNK):
        high += np.bincount(_clear_sign(bits[start : start + _CHUNK]) >> shift, minlength=high.size)
    bucket = int(np.searchsorted(np.cumsum(high), wanted))
    below = int(high[:bucket].sum())
    if shift == 0:
        return bucket, wanted - below
    low = np.zeros(1 << shift, np.int64)
    for start in range(0, bits.size, _CHUNK):
        chunk = _clear_sign(bits[start : start + _CHUNK])
        low += np.bincount(chunk[chunk >> shift == bucket] & ((1 << shift) - 1), minlength=low.size)
    rest = int(np.searchsorted(np.cumsum(low), wanted - below))
    return (bucket << shift) | rest, wanted - below - int(low[:rest].sum())
