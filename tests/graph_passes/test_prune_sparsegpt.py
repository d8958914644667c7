"""SparseGPT against the optimal brain surgeon computed directly, and what its results must hold to."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sparamx_onnx.graph_passes import prune_sparsegpt as module
from sparamx_onnx.graph_passes.prune_magnitude import prune_magnitude
from sparamx_onnx.graph_passes.prune_pattern import Pattern
from sparamx_onnx.graph_passes.prune_sparsegpt import SparseGpt, inverse_factor, prune_sparsegpt, second_moments
from sparamx_onnx.graph_passes.prune_wanda import Wanda
from sparamx_onnx.ops.errors import SparamxError


def _inputs(rows: int, k: int, seed: int = 0) -> np.ndarray:
    """Correlated, of different sizes, with a mean."""
    rng = np.random.default_rng([seed, k])
    x = rng.standard_normal((rows, k)) @ (rng.standard_normal((k, k)) / np.sqrt(k)) + rng.standard_normal(k)
    return (x * (0.2 + rng.random(k))).astype(np.float32)


def _weight(k: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, k, n]).standard_normal((k, n)).astype(np.float32)


def _damped(x: np.ndarray, damping: float = 0.01) -> np.ndarray:
    h = x.astype(np.float64).T @ x
    return h + damping * np.mean(np.diag(h)) * np.eye(h.shape[0])


def _error(x: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (before.astype(np.float32) - after.astype(np.float32))))


@pytest.mark.parametrize("panel", [1, 7, 256])
@pytest.mark.parametrize("k", [1, 2, 33, 64])
def test_second_moments_and_their_inverse(monkeypatch, panel, k) -> None:
    monkeypatch.setattr(module, "_PANEL", panel)
    x = _inputs(100, k)
    moments = second_moments([x[:40], x[40:]], k)
    expected = x.astype(np.float64).T @ x
    np.testing.assert_allclose(np.triu(moments), np.triu(expected), rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    factor = inverse_factor(moments)
    assert factor is moments
    np.testing.assert_array_equal(np.tril(factor, -1), 0)
    np.testing.assert_allclose(factor.T @ factor @ _damped(x), np.eye(k), atol=1e-4)


def _surgeon(w: np.ndarray, h: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Removes weights input by input; each time the later ones change as the inverse of what is left of H says."""
    w = w.astype(np.float64).copy()
    k = w.shape[0]
    for row in range(k):
        inverse = np.linalg.inv(h[row:, row:])
        for column in np.flatnonzero(mask[row]):
            w[row:, column] -= w[row, column] / inverse[0, 0] * inverse[:, 0]
            w[row, column] = 0
    return w


@pytest.mark.parametrize(("choice", "block"), [(1, 1), (3, 3), (2, 6), (32, 128)])
def test_updates_are_those_of_the_surgeon(monkeypatch, choice, block) -> None:
    monkeypatch.setattr(module, "_CHOICE", choice)
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_COLUMNS", 2)
    monkeypatch.setattr(module, "_PANEL", 4)
    x, w = _inputs(60, 10), _weight(10, 5)
    pruned = prune_sparsegpt(w, inverse_factor(second_moments([x], 10)), 0.4)
    mask = pruned == 0
    assert mask.sum() == 20
    np.testing.assert_allclose(pruned, _surgeon(w, _damped(x), mask), atol=1e-4)


def test_each_block_loses_its_cheapest_weights(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHOICE", 4)
    x, w = _inputs(60, 8, 1), _weight(8, 6, 1)
    pruned = prune_sparsegpt(w, inverse_factor(second_moments([x], 8)), 0.5)
    alone = np.square(w) / np.diag(np.linalg.inv(_damped(x)))[:, None]
    cheap = int((alone[:4] <= np.sort(alone, axis=None)[23]).sum())
    assert 4 < cheap < 20
    costs = np.square(w[:4]) / np.array([np.linalg.inv(_damped(x)[row:, row:])[0, 0] for row in range(4)])[:, None]
    gone = pruned[:4] == 0
    assert gone.sum() == cheap
    assert costs[gone].max() < costs[~gone].min()
    assert (pruned[4:] == 0).sum() == 24 - cheap


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_it_is_better_than_wanda_and_wanda_than_magnitude(sparsity) -> None:
    k, n = 96, 80
    x, w = _inputs(2000, k, 2), _weight(k, n, 2)
    errors = [
        _error(x, w, pruned)
        for pruned in (
            SparseGpt([x], k).prune(w, sparsity, None),
            Wanda([x], k).prune(w, sparsity, None),
            prune_magnitude(w, sparsity),
        )
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("k", [5, 130, 300])
def test_counts_are_exact(dtype, sparsity, k) -> None:
    w = _weight(k, 7).astype(dtype)
    before = w.copy()
    for source in (w, np.asfortranarray(w)):
        pruned = prune_sparsegpt(source, inverse_factor(second_moments([_inputs(400, k)], k)), sparsity)
        assert pruned.dtype == np.float32
        assert np.count_nonzero(pruned == 0) == int(sparsity * w.size + 0.5)
        np.testing.assert_array_equal(source, before)
    if sparsity == 0.0:
        np.testing.assert_array_equal(pruned, before.astype(np.float32))


@pytest.mark.parametrize("text", ["2:4", "4:8", "3:7"])
@pytest.mark.parametrize("k", [8, 131, 300])
def test_pattern_is_exact(text, k) -> None:
    pattern = Pattern.parse(text)
    x, w = _inputs(500, k), _weight(k, 9)
    pruned = SparseGpt([x], k).prune(w, 0.9, pattern)
    for start in range(0, k, pattern.of):
        group = pruned[start : start + pattern.of]
        np.testing.assert_array_equal((group != 0).sum(axis=0), min(pattern.kept, group.shape[0]))
    assert _error(x, w, pruned) < _error(x, w, Wanda([x], k).prune(w, 0.9, pattern))


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)])
def test_zeros_that_are_there_stay_and_count(pattern) -> None:
    k = 64
    x, w = _inputs(300, k), _weight(k, 16)
    w[np.random.default_rng(0).random(w.shape) < 0.3] = 0
    pruned = SparseGpt([x], k).prune(w, 0.5, pattern)
    assert (pruned[w == 0] == 0).all()
    if pattern is None:
        assert np.count_nonzero(pruned == 0) == w.size // 2
    else:
        assert ((pruned.reshape(-1, 4, 16) != 0).sum(axis=1) <= 2).all()
    mostly = np.where(np.arange(k)[:, None] % 4 == 0, w, 0)
    np.testing.assert_array_equal(SparseGpt([x], k).prune(mostly, 0.5, pattern), mostly)


def test_inputs_that_are_always_zero() -> None:
    """They cost nothing, so their weights go first; where all inputs are zero, the smallest weights go."""
    w = _weight(16, 8)
    x = np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32)
    x[:, :4] = 0
    pruned = SparseGpt([x], 16).prune(np.sign(w), 0.25, None)
    assert np.isfinite(pruned).all()
    assert (pruned[:4] == 0).all()
    nothing = SparseGpt([np.zeros((3, 16), np.float32)], 16).prune(w, 0.5, None)
    np.testing.assert_array_equal(nothing, prune_magnitude(w, 0.5))


def test_costs_are_what_the_best_update_leaves() -> None:
    x, w = _inputs(200, 12), _weight(12, 4)
    h = _damped(x)
    costs = SparseGpt([x], 12).costs(w)
    inverse = np.linalg.inv(h)
    best = w[:, 1].astype(np.float64) - w[5, 1] / inverse[5, 5] * inverse[:, 5]
    change = best - w[:, 1]
    np.testing.assert_allclose(costs[5, 1], change @ h @ change, rtol=1e-3)


def test_weights_that_are_not_finite() -> None:
    w = _weight(4, 4)
    w[1, 1] = np.nan
    with pytest.raises(SparamxError, match="infinite or undefined"):
        SparseGpt([_inputs(20, 4)], 4).prune(w, 0.5, None)


def test_sparsity_out_of_range() -> None:
    with pytest.raises(SparamxError, match="at least 0 and below 1"):
        SparseGpt([_inputs(20, 4)], 4).prune(_weight(4, 4), 1.0, None)


def test_moments_of_nothing_real_are_refused() -> None:
    with pytest.raises(SparamxError, match="not positive definite"):
        inverse_factor(-np.eye(4))
