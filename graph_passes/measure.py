"""Reads weights before they are packed, all of them or a sample, to tell how large they become."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sparamx_onnx.graph_passes.packed_weight import PackedWeight
from sparamx_onnx.graph_passes.prune_calibrated import CalibratedPruner
from sparamx_onnx.graph_passes.prune_magnitude import prune_by_magnitude, zeros_wanted
from sparamx_onnx.graph_passes.prune_pattern import Pattern
from sparamx_onnx.graph_passes.rewrite_matmul import Chosen
from sparamx_onnx.ops.packing import (
    QUANTIZED,
    Form,
    WeightType,
    column_scale_bytes,
    count_nonzero,
    describe,
    expected_size,
    pack,
)

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in total."""

# Matrices of more elements are sampled: in blocks of so many rows and columns (the longer side is the one that lies
# together in the file, one page of float32), so many of them. A sixteenth of a large matrix of a language model.
_SAMPLED_ABOVE = 4 << 20
_BLOCKS = 16
_BLOCK_LENGTH = 1024
_BLOCK_BREADTH = 64
# Odd, so that blocks one below the other do not stand in one column.
_BLOCK_STRIDE = 7


@dataclass(frozen=True)
class Size:
    """What a weight becomes.

    Attributes:
        nnz_before: Weights that are not zero in the model; None where they were not looked at.
        nnz: Packed weights that are not zero.
        bytes: Size of the packed weight.
        form: Its form.
        estimated: Whether a sample says so.
    """

    nnz_before: int | None
    nnz: int
    bytes: int
    form: Form
    estimated: bool = False


def measure(
    chosen: Sequence[Chosen],
    sparsity: float,
    pattern: Pattern | None,
    progress: Progress | None = None,
    *,
    sampled: bool = False,
) -> None:
    """Fills in the plans how many non-zeros the layers have and how large they become.

    Each weight is read once, and not at all where pruning alone decides.

    Args:
        chosen: The layers.
        sparsity: The sparsity to which weights are pruned, if they are.
        pattern: The pattern in which they are pruned, in place of a sparsity.
        progress: Called while weights are read.
        sampled: Of large weights read a sample.
    """
    known: dict[Hashable, Size] = {}
    total = sum({c.weight_key: _bytes_to_read(c, sampled) for c in chosen}.values())
    done = 0
    for candidate in chosen:
        key = candidate.weight_key
        if key not in known:
            known[key] = _size(candidate, sparsity, pattern, sampled)
            done += _bytes_to_read(candidate, sampled)
            if progress is not None and total:
                progress(done, total)
        size, plan = known[key], candidate.plan
        plan.nnz_before, plan.nnz, plan.bytes_after = size.nnz_before, size.nnz, size.bytes
        plan.estimated = size.estimated
        plan.packed_as(size.form)


def _bytes_to_read(chosen: Chosen, sampled: bool) -> int:
    if chosen.prune is not None and chosen.options.weight_type not in QUANTIZED:
        return 0
    weight = chosen.layer.weight
    if sampled and _can_be_sampled(chosen):
        return _BLOCKS * _BLOCK_LENGTH * _BLOCK_BREADTH * weight.tensor.nbytes // (chosen.layer.k * chosen.layer.n)
    return weight.tensor.nbytes


def _can_be_sampled(chosen: Chosen) -> bool:
    k, n = chosen.layer.k, chosen.layer.n
    is_wide = min(k, n) >= _BLOCK_LENGTH and k * n > _SAMPLED_ABOVE
    return is_wide and not chosen.layer.weight.is_quantized


def _size(chosen: Chosen, sparsity: float, pattern: Pattern | None, sampled: bool) -> Size:
    layer, options = chosen.layer, chosen.options
    if chosen.prune is not None and options.weight_type not in QUANTIZED:
        size = layer.k * layer.n
        zeros = zeros_wanted(size, sparsity) if pattern is None else pattern.zeros(layer.k, layer.n)
        return _counted(chosen, size - zeros, None)
    if isinstance(chosen.prune, CalibratedPruner):
        # What it will leave is not known yet; as many zeros elsewhere take nearly as many bytes.
        chosen = replace(chosen, prune=prune_by_magnitude(sparsity, pattern))
    if sampled and _can_be_sampled(chosen):
        return _from_sample(_sample(layer.weight.numpy(), options.group_size), chosen)
    if options.weight_type in QUANTIZED:
        # Which weights round to zero depends on the scales, so on all others: there is nothing cheaper than packing.
        packed = chosen.packed_weight(layer.weight.name)
        info = describe(packed.pack())
        return Size(packed.source_nnz, info.nnz, info.blob_bytes, info.form)
    nnz = count_nonzero(PackedWeight("", layer.weight, options, scale=layer.scale).source(), options.weight_type)
    return _counted(chosen, nnz, nnz)


def _counted(chosen: Chosen, nnz: int, before: int | None) -> Size:
    return Size(before, nnz, *expected_size(chosen.layer.k, chosen.layer.n, nnz, chosen.options.weight_type))


def _sample(weight: npt.NDArray[np.generic], group_size: int) -> npt.NDArray[np.generic]:
    """Blocks of a matrix [K, N] side by side, as a matrix: [block's K, blocks * block's N]."""
    rows_lie_together = abs(weight.strides[1]) <= abs(weight.strides[0])
    breadth = max(_BLOCK_BREADTH, group_size)
    height, width = (breadth, _BLOCK_LENGTH) if rows_lie_together else (_BLOCK_LENGTH, breadth)
    blocks = []
    for index in range(_BLOCKS):
        row = (weight.shape[0] - height) * index // (_BLOCKS - 1)
        column = (weight.shape[1] - width) * (index * _BLOCK_STRIDE % _BLOCKS) // (_BLOCKS - 1)
        blocks.append(weight[row : row + height, column : column + width])
    return np.concatenate(blocks, axis=1)


def _from_sample(sample: npt.NDArray[np.generic], chosen: Chosen) -> Size:
    """The whole weight as its sample is."""
    factor = chosen.layer.k * chosen.layer.n / sample.size
    before = round(factor * count_nonzero(sample, WeightType.FP32))
    weight_type = chosen.options.weight_type
    if weight_type not in QUANTIZED:
        nnz = round(factor * count_nonzero(sample, weight_type))
        return replace(_counted(chosen, nnz, before), estimated=True)
    info = describe(pack(sample if chosen.prune is None else chosen.prune(sample), chosen.options))
    nnz = round(factor * info.nnz)
    if weight_type is WeightType.INT8:
        # Its scales are those of all rows, of which the sample has few.
        return replace(_counted(chosen, nnz, before), estimated=True)
    # A sample has more columns for its weights than the whole matrix.
    sampled, whole = (column_scale_bytes(n, info.scale_type) for n in (info.n, chosen.layer.n))
    return Size(before, nnz, round(factor * (info.blob_bytes - sampled)) + whole, info.form, estimated=True)
