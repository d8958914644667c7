"""Prunes by SparseGPT: weights that cost the layer's result least become zero, and the others make up for them.

For a layer ``x W`` and inputs x with second moments ``H = sum of x^T x``, setting weight w of input k to zero costs
``w^2 / [H^-1]_kk`` if all weights of later inputs are then changed in the best way. Going through the inputs in order,
every output needs the same inverse: its factor ``U`` with ``H^-1 = U^T U`` is computed once, and its rows are what the
later weights are changed by (Frantar and Alistarh, 2023, arXiv 2301.00774).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from sparamx_onnx.graph_passes.prune_magnitude import zeros_wanted
from sparamx_onnx.graph_passes.prune_pattern import Pattern
from sparamx_onnx.ops.errors import SparamxError

# Inputs among which zeros are chosen together, before any of them is eliminated: with fewer, choices know more of what
# has become of the weights. 16 did better on MiniLM than 32, 128 or all.
_CHOICE = 16

# Inputs that are eliminated before all later ones are changed: this many times fewer passes over the matrix.
_BLOCK = 128

# Outputs that are eliminated together: with the inputs of a choice they fit into the L2 cache.
_COLUMNS = 4096

# Columns of a matrix of inputs or outputs that a step of the linear algebra takes.
_PANEL = 256

# What is added to the diagonal, relative to its mean: inputs that are (nearly) combinations of others would otherwise
# be given weights without bound.
_DAMPING = 0.01


class SparseGpt:
    """Prunes the layers that share an input; the rules are those of ``prune_sparsegpt``."""

    def __init__(self, rows: Iterable[npt.NDArray[np.float32]], k: int) -> None:
        """Gathers what is needed of the inputs, float32 [rows, k] in pieces: 8 k^2 bytes."""
        self._factor = inverse_factor(second_moments(rows, k))

    def costs(self, w: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """What it costs to set each weight [K, N] alone to zero: how much the squares of the results change."""
        return _costs_alone(w, np.einsum("ij,ij->j", self._factor, self._factor).astype(np.float32))

    def prune(self, w: npt.NDArray[np.generic], sparsity: float, pattern: Pattern | None) -> npt.NDArray[np.generic]:
        """The weight [K, N] with zeros, the other values changed."""
        return prune_sparsegpt(w, self._factor, sparsity, pattern)


def second_moments(rows: Iterable[npt.NDArray[np.float32]], k: int) -> npt.NDArray[np.float64]:
    """The sum of ``x^T x`` over all rows; only the upper triangle is computed.

    Args:
        rows: The inputs of a layer, float32 [rows, k], in pieces of a few thousand rows at most: in a piece the sums
            are of single precision.
        k: Inputs of the layer.

    Returns:
        float64 [k, k].
    """
    moments = np.zeros((k, k), np.float64)
    for x in rows:
        for start in range(0, k, _PANEL):
            end = start + _PANEL
            with np.errstate(over="ignore", invalid="ignore"):  # inverse_factor looks at that
                moments[start:end, start:] += x[:, start:end].T @ x[:, start:]
    return moments


def inverse_factor(moments: npt.NDArray[np.float64], damping: float = _DAMPING) -> npt.NDArray[np.float64]:
    """The upper triangular U with ``(H + damping mean(diag H) I)^-1 = U^T U``, in the place of H.

    Factoring from the last input to the first gives ``H = R R^T`` with an upper triangular R, and U is its inverse: one
    factorization and one inversion of a triangle, both in place, where the inverse of H is never formed.

    Args:
        moments: H, of which the upper triangle is read. It is overwritten.
        damping: What to add to the diagonal, relative to its mean.

    Returns:
        ``moments``, whose upper triangle is U; the rest is zero.

    Raises:
        SparamxError: H is not finite, or not positive definite.
    """
    k = moments.shape[0]
    diagonal = np.einsum("ii->i", moments)
    if not np.isfinite(moments.sum()):
        raise SparamxError("The squares of its inputs are beyond float32.")
    mean = float(diagonal.mean())
    # Inputs that are all zero say nothing: every weight is as good as another of its size.
    diagonal[...] += damping * mean if mean > 0 else 1.0
    starts = range(0, k, _PANEL)
    try:
        for start in reversed(starts):
            end = min(k, start + _PANEL)
            corner = _upper_factor(moments[start:end, start:end])
            moments[start:end, start:end] = corner
            moments[end:, start:end] = 0
            if start:
                panel = moments[:start, start:end] @ np.linalg.inv(corner).T
                moments[:start, start:end] = panel
                for left in range(0, start, _PANEL):
                    right = left + _PANEL
                    moments[:right, left:right] -= panel[:right] @ panel[left:right].T
        for start in starts:
            end = min(k, start + _PANEL)
            inverse = np.linalg.inv(moments[start:end, start:end])
            moments[start:end, start:end] = np.triu(inverse)
            if start:
                moments[:start, start:end] = -_triangle_times(moments, start, moments[:start, start:end]) @ inverse
    except np.linalg.LinAlgError as error:
        raise SparamxError("The second moments of the inputs are not positive definite.") from error
    return moments


def _upper_factor(a: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The upper triangular R with ``a = R R^T``; of ``a`` the upper triangle is read."""
    # NumPy factors from the first row on and reads the lower triangle: both come from turning the matrix around.
    factor = np.linalg.cholesky(a[::-1, ::-1])
    return np.asarray(factor[::-1, ::-1])


def _triangle_times(
    triangle: npt.NDArray[np.float64], size: int, right: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The product of the leading upper triangle [size, size] with a matrix [size, n]."""
    product = np.empty_like(right)
    for start in range(0, size, _PANEL):
        end = min(size, start + _PANEL)
        product[start:end] = triangle[start:end, start:size] @ right[start:size]
    return product


def prune_sparsegpt(
    w: npt.NDArray[np.generic],
    factor: npt.NDArray[np.float64],
    sparsity: float,
    pattern: Pattern | None = None,
) -> npt.NDArray[np.float32]:
    """Sets the cheapest weights to zero and changes the others to make up for them.

    Zeros that are there stay, and count. Without a pattern, a block of 16 inputs gets as many zeros as it has of the
    matrix's cheapest weights, and when it is the block's turn, its then cheapest weights become zero.

    Args:
        w: The weight [K, N], float32, float16 or bfloat16.
        factor: What ``inverse_factor`` returned, [K, K].
        sparsity: The share of zeros wanted, at least 0 and below 1. A pattern has its own.
        pattern: Choose within its groups.

    Returns:
        A new matrix [K, N].

    Raises:
        SparamxError: The sparsity is out of range, or a weight is infinite or undefined.
    """
    k, n = w.shape
    wanted = zeros_wanted(w.size, sparsity)
    result = np.ascontiguousarray(w, np.float32)
    if result is w or np.shares_memory(result, w):
        result = result.copy()
    if not np.isfinite(result).all():
        raise SparamxError("It has infinite or undefined values, which cannot be pruned.")
    choice = _CHOICE if pattern is None else max(1, _CHOICE // pattern.of) * pattern.of
    size = max(1, _BLOCK // choice) * choice
    zeros = [] if pattern is not None else _zeros_per_choice(result, factor, choice, wanted)
    for start in range(0, k, size):
        end = min(k, start + size)
        block = result[start:end]
        u = factor[start:end, start:].astype(np.float32)
        errors = np.empty_like(block)
        for first in range(0, end - start, choice):
            last = min(end - start, first + choice)
            inner = u[first:last, first:]
            mask = np.asarray(w[start + first : start + last]) == 0
            if pattern is None:
                mask = _cheapest(block[first:last], inner, mask, zeros[(start + first) // choice])
            for column in range(0, n, _COLUMNS):
                part = slice(column, column + _COLUMNS)
                errors[first:last, part] = _eliminate(block[first:last, part], inner, mask[:, part], pattern)
            block[last:] -= u[first:last, last : end - start].T @ errors[first:last]
        for row in range(end, k, _PANEL):
            result[row : row + _PANEL] -= u[:, row - start : row - start + _PANEL].T @ errors
    return result


def _zeros_per_choice(
    w: npt.NDArray[np.float32], factor: npt.NDArray[np.float64], choice: int, wanted: int
) -> list[int]:
    """How many of the matrix's cheapest weights each block of inputs has: their costs when set to zero alone."""
    if wanted == 0:
        return [0] * -(-w.shape[0] // choice)
    inverse_diagonal = np.einsum("ij,ij->j", factor, factor).astype(np.float32)
    costs = _costs_alone(w, inverse_diagonal).reshape(-1)
    costs.partition(wanted - 1)
    threshold = costs[wanted - 1]
    del costs
    ends = [0]
    for start in range(0, w.shape[0], choice):
        part = slice(start, start + choice)
        cheap = int(np.count_nonzero(_costs_alone(w[part], inverse_diagonal[part]) <= threshold))
        # Of costs that equal the threshold, there may be too many.
        ends.append(min(wanted, ends[-1] + cheap))
    return [end - start for start, end in itertools.pairwise(ends)]


def _costs_alone(w: npt.NDArray[np.generic], inverse_diagonal: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What it costs to set each weight to zero, if all others then make up for it."""
    costs: npt.NDArray[np.float32] = np.square(np.asarray(w, np.float32))
    costs /= inverse_diagonal[:, None]
    return costs


def _costs(block: npt.NDArray[np.float32], u: npt.NDArray[np.float32], first: int = 0) -> npt.NDArray[np.float32]:
    """What it costs to set each weight of some inputs to zero; ``first`` is the place of the first of them in u."""
    diagonal = np.diagonal(u)[first : first + block.shape[0]]
    costs: npt.NDArray[np.float32] = np.square(block / diagonal[:, None])
    return costs


def _cheapest(
    block: npt.NDArray[np.float32], u: npt.NDArray[np.float32], fixed: npt.NDArray[np.bool_], wanted: int
) -> npt.NDArray[np.bool_]:
    """The weights to set to zero: those that are zero, and the cheapest others until there are enough."""
    mask = fixed.copy()
    missing = wanted - int(np.count_nonzero(fixed))
    if missing > 0:
        costs = _costs(block, u)
        costs[fixed] = np.inf
        mask.reshape(-1)[np.argpartition(costs, missing - 1, axis=None)[:missing]] = True
    return mask


def _eliminate(
    block: npt.NDArray[np.float32],
    u: npt.NDArray[np.float32],
    mask: npt.NDArray[np.bool_],
    pattern: Pattern | None,
) -> npt.NDArray[np.float32]:
    """Sets the masked weights of a block to zero, input by input, and changes those of the block's later inputs.

    Args:
        block: [rows, columns]; changed in place.
        u: The rows of the factor, [rows, at least rows].
        mask: What becomes zero; with a pattern, what has to be zero beside what it chooses.
        pattern: Chooses further zeros, group by group, by what the weights have become when it is the group's turn.

    Returns:
        What later blocks are to be changed by, [rows, columns].
    """
    rows = block.shape[0]
    errors = np.empty_like(block)
    for row in range(rows):
        if pattern is not None and row % pattern.of == 0:
            group = slice(row, min(rows, row + pattern.of))
            costs = _costs(block[group], u, row)
            costs[mask[group]] = -1
            mask[group] |= pattern.smallest(costs)
        kept = np.where(mask[row], np.float32(0), block[row])
        np.divide(block[row] - kept, u[row, row], out=errors[row])
        block[row] = kept
        block[row + 1 :] -= u[row, row + 1 : rows, None] * errors[row]
    return errors
