"""Prunes by Wanda's score: the magnitude of a weight times the norm of its input, compared within each output."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from sparamx_onnx.graph_passes.prune_magnitude import zeros_wanted
from sparamx_onnx.graph_passes.prune_pattern import Pattern, prune_to_pattern

# Weights scored together: the scores and their order are what is held beside the matrix.
_CHUNK = 1 << 20


class Wanda:
    """Prunes the layers that share an input; the rules are those of ``prune_wanda``."""

    def __init__(self, rows: Iterable[npt.NDArray[np.float32]], k: int) -> None:
        """Gathers what is needed of the inputs, float32 [rows, k] in pieces."""
        self._norms = input_norms(rows, k)

    def costs(self, w: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
        """What it costs to set each weight [K, N] to zero: how much the squares of the results change."""
        costs: npt.NDArray[np.float32] = np.square(np.asarray(w, np.float32) * self._norms.astype(np.float32)[:, None])
        return costs

    def prune(self, w: npt.NDArray[np.generic], sparsity: float, pattern: Pattern | None) -> npt.NDArray[np.generic]:
        """A copy of the weight [K, N] with zeros."""
        return prune_wanda(w, self._norms, sparsity, pattern)


def input_norms(rows: Iterable[npt.NDArray[np.float32]], k: int) -> npt.NDArray[np.float64]:
    """The Euclidean norm of every input over all rows.

    Args:
        rows: The inputs of a layer, float32 [rows, k], in pieces.
        k: Inputs of the layer.

    Returns:
        float64 [k].
    """
    squares = np.zeros(k, np.float64)
    for x in rows:
        squares += np.einsum("ij,ij->j", x, x, dtype=np.float64)
    return np.sqrt(squares)


def prune_wanda(
    w: npt.NDArray[np.generic],
    norms: npt.NDArray[np.float64],
    sparsity: float,
    pattern: Pattern | None = None,
) -> npt.NDArray[np.generic]:
    """Sets the weights with the smallest scores of each output to zero; the others stay as they are.

    Zeros that are there count: their score is 0. Of equal scores, those of the first inputs go.

    Args:
        w: The weight [K, N], float32, float16 or bfloat16.
        norms: The norms of the inputs, float64 [K].
        sparsity: The share of zeros in every output, at least 0 and below 1. A pattern has its own.
        pattern: Compare within its groups instead of within whole outputs.

    Returns:
        A copy with zeros, of the same shape and dtype.

    Raises:
        SparamxError: The sparsity is out of range.
    """
    factors = norms.astype(np.float32)
    if pattern is not None:
        return prune_to_pattern(w, pattern, factors)
    k, n = w.shape
    zeros = zeros_wanted(k, sparsity)
    pruned = np.array(w, order="K")
    columns = max(1, _CHUNK // k)
    for start in range(0, n, columns):
        part = pruned[:, start : start + columns]
        scores = np.abs(part.astype(np.float32)) * factors[:, None]
        order = np.argsort(scores, axis=0, kind="stable")[:zeros]
        np.put_along_axis(part, order, np.zeros((), part.dtype), axis=0)
    return pruned
