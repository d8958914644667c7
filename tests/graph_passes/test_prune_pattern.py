"""N:M patterns: exact counts in every group, the smallest ones, ragged ends."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from sparamx_onnx.graph_passes import prune_pattern as module
from sparamx_onnx.graph_passes.prune_pattern import Pattern, prune_to_pattern
from sparamx_onnx.ops.errors import SparamxError


def _expected(w: np.ndarray, pattern: Pattern, factors: np.ndarray) -> np.ndarray:
    """Group by group, in plain Python."""
    result = w.copy()
    for n in range(w.shape[1]):
        for start in range(0, w.shape[0], pattern.of):
            rows = range(start, min(w.shape[0], start + pattern.of))
            order = sorted(rows, key=lambda row: (np.float32(abs(w[row, n])) * factors[row], row))
            for row in order[: max(0, len(rows) - pattern.kept)]:
                result[row, n] = 0
    return result


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:3"])
@pytest.mark.parametrize("k", [1, 4, 23, 64])
def test_smallest_of_each_group(dtype, text, k) -> None:
    rng = np.random.default_rng(k)
    pattern = Pattern.parse(text)
    w = rng.standard_normal((k, 9)).astype(dtype)
    factors = rng.random(k).astype(np.float32) + 0.1
    before = w.copy()
    np.testing.assert_array_equal(prune_to_pattern(w, pattern, factors), _expected(w, pattern, factors))
    plain = prune_to_pattern(w, pattern)
    np.testing.assert_array_equal(plain, _expected(w, pattern, np.ones(k, np.float32)))
    np.testing.assert_array_equal(w, before)
    assert np.count_nonzero(plain.astype(np.float32) == 0) == pattern.zeros(*w.shape)


def test_transposed_views_and_pieces(monkeypatch) -> None:
    w = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    whole = prune_to_pattern(w, Pattern(2, 4))
    np.testing.assert_array_equal(prune_to_pattern(np.asfortranarray(w), Pattern(2, 4)), whole)
    monkeypatch.setattr(module, "_CHUNK", 1)
    np.testing.assert_array_equal(prune_to_pattern(w, Pattern(2, 4)), whole)


def test_ties_and_zeros_that_are_there() -> None:
    w = np.array([[1, 0], [1, 0], [1, 0], [1, 5]], np.float32)
    np.testing.assert_array_equal(prune_to_pattern(w, Pattern(2, 4)), [[0, 0], [0, 0], [1, 0], [1, 5]])


def test_names() -> None:
    assert Pattern.parse("2:4") == Pattern(2, 4)
    assert str(Pattern(4, 8)) == "4:8"
    assert Pattern(1, 4).sparsity == 0.75


@pytest.mark.parametrize("text", ["", "2", "2:", "4:4", "0:4", "5:4", "-1:4", "2:4:8", "2:1000", "a:b"])
def test_other_texts(text) -> None:
    with pytest.raises(SparamxError, match="is no pattern"):
        Pattern.parse(text)
