"""Pruning by magnitude: exact counts, the smallest ones, and which layers are spared."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sparamx_onnx.graph_passes import prune_magnitude as module
from sparamx_onnx.graph_passes.prune_magnitude import prune_magnitude, zeros_wanted
from sparamx_onnx.ops.errors import SparamxError

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def _zeros(w: np.ndarray) -> int:
    return int(np.count_nonzero(w.astype(np.float32) == 0))


def _check(w: np.ndarray, sparsity: float) -> np.ndarray:
    """Prunes, and checks count, choice and what else must hold; returns the result."""
    before = w.copy()
    pruned = prune_magnitude(w, sparsity)
    np.testing.assert_array_equal(w, before)
    assert (pruned.shape, pruned.dtype) == (w.shape, w.dtype)
    wanted = int(sparsity * w.size + 0.5)
    assert _zeros(pruned) == max(wanted, _zeros(w))
    removed = (pruned != w) & ~np.isnan(w)
    kept = ~removed & (w != 0)
    np.testing.assert_array_equal(pruned[kept], w[kept])
    if removed.any() and kept.any():
        assert np.abs(w[removed].astype(np.float32)).max() <= np.abs(w[kept].astype(np.float32)).min()
    return pruned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.3, 0.5, 0.9, 0.999])
def test_counts_are_exact(dtype, sparsity) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 7), (13, 17), (100, 131), (601, 509)):
        _check(rng.standard_normal(shape, np.float32).astype(dtype), sparsity)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties(dtype) -> None:
    """Few different magnitudes: the threshold is one of them, and not all weights that have it may go."""
    rng = np.random.default_rng(1)
    w = (rng.integers(-3, 4, (90, 50)) / 2).astype(dtype)
    for sparsity in (0.1, 0.2, 0.5, 0.75, 0.95):
        first = _check(w, sparsity)
        np.testing.assert_array_equal(first, prune_magnitude(w, sparsity))
    same = np.full((10, 10), -2.0, dtype)
    pruned = _check(same, 0.35)
    # The first in memory go.
    assert (pruned.ravel()[:35] == 0).all()
    np.testing.assert_array_equal(_check(np.asfortranarray(same), 0.35), pruned.T)


def test_ties_across_chunks(monkeypatch) -> None:
    w = (np.random.default_rng(2).integers(-2, 3, (40, 50))).astype(np.float32)
    whole = prune_magnitude(w, 0.6)
    monkeypatch.setattr(module, "_CHUNK", 37)
    np.testing.assert_array_equal(_check(w, 0.6), whole)


def test_zeros_that_are_there_count() -> None:
    w = np.random.default_rng(3).standard_normal((40, 40)).astype(np.float32)
    w[:20] = 0
    w[0, :20] = -0.0
    assert prune_magnitude(w, 0.5) is w
    assert prune_magnitude(w, 0.2) is w
    assert _zeros(prune_magnitude(w, 0.75)) == 1200


def test_special_values() -> None:
    w = np.array([[np.nan, np.inf, -np.inf, 1e-45, -3.0, 2.0]], np.float32)
    np.testing.assert_array_equal(prune_magnitude(w, 0.5), [[np.nan, np.inf, -np.inf, 0, 0, 0]])


def test_transposed_views_keep_their_order_in_memory() -> None:
    w = np.random.default_rng(4).standard_normal((60, 70)).astype(np.float32)
    pruned = _check(w.T, 0.5)
    assert pruned.strides == w.T.strides
    np.testing.assert_array_equal(pruned, prune_magnitude(w, 0.5).T)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_out_of_range(sparsity) -> None:
    with pytest.raises(SparamxError, match="at least 0 and below 1"):
        prune_magnitude(np.ones((2, 2), np.float32), sparsity)


def test_other_types() -> None:
    with pytest.raises(SparamxError, match="not float64"):
        prune_magnitude(np.ones((2, 2)), 0.5)


def test_rounding_of_the_count() -> None:
    assert [zeros_wanted(size, 0.5) for size in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert zeros_wanted(10, 0.7) == 7
