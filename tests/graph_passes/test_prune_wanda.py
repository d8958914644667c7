"""Wanda: the mask by its definition."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sparamx_onnx.graph_passes import prune_wanda as module
from sparamx_onnx.graph_passes.prune_pattern import Pattern
from sparamx_onnx.graph_passes.prune_wanda import Wanda, input_norms, prune_wanda
from sparamx_onnx.ops.errors import SparamxError


def test_norms() -> None:
    x = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    np.testing.assert_allclose(input_norms([x[:100], x[100:]], 7), np.linalg.norm(x, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(input_norms([], 3), np.zeros(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_smallest_scores_of_each_output(dtype, sparsity, monkeypatch) -> None:
    rng = np.random.default_rng(1)
    k, n = 37, 11
    w = rng.standard_normal((k, n)).astype(dtype)
    norms = rng.random(k) * 10
    for chunk in (1 << 20, 4 * k):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        pruned = prune_wanda(w, norms, sparsity)
        scores = np.abs(w.astype(np.float64)) * norms[:, None]
        for output in range(n):
            gone = pruned[:, output].astype(np.float32) == 0
            assert gone.sum() == int(sparsity * k + 0.5)
            if gone.any():
                assert scores[gone, output].max() <= scores[~gone, output].min()
            np.testing.assert_array_equal(pruned[~gone, output], w[~gone, output])


def test_inputs_decide() -> None:
    """A large weight of an input that is nearly always zero goes before a small one of a large input."""
    w = np.array([[10.0], [0.1]], np.float32)
    x = np.array([[0.001, 5.0], [0.0, 5.0]], np.float32)
    np.testing.assert_array_equal(Wanda([x], 2).prune(w, 0.5, None), [[0.0], [np.float32(0.1)]])


def test_zeros_that_are_there_count() -> None:
    w = np.random.default_rng(2).standard_normal((20, 5)).astype(np.float32)
    w[:10] = 0
    np.testing.assert_array_equal(prune_wanda(w, np.ones(20), 0.5), w)


def test_pattern() -> None:
    w = np.array([[4.0], [3.0], [2.0], [1.0]], np.float32)
    pruned = prune_wanda(w, np.array([0.1, 0.1, 10.0, 10.0]), 0.9, Pattern(2, 4))
    np.testing.assert_array_equal(pruned, [[0], [0], [2], [1]])


def test_costs_are_what_the_results_change_by() -> None:
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((6, 4)).astype(np.float32), rng.standard_normal((50, 6)).astype(np.float32)
    costs = Wanda([x], 6).costs(w)
    without = w.copy()
    without[2, 3] = 0
    np.testing.assert_allclose(costs[2, 3], np.square(x @ w - x @ without).sum(), rtol=1e-4)


def test_sparsity_out_of_range() -> None:
    with pytest.raises(SparamxError, match="at least 0 and below 1"):
        prune_wanda(np.ones((2, 2), np.float32), np.ones(2), 1.0)
